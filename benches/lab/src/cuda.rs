//! A CUDA device: a copy and a read, gradblend, the naive kernels, cuBLAS.

mod cublas;
mod device;
mod naive;

use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::Result;
use gradblend::DType;
use gradblend_testkit::Sample;

use crate::backend::{Backend, Entry, Implementation, Prepared};
use crate::case::Operation;
use crate::heap;
use crate::inputs::{self, Buffer};
use crate::oracle::{Bound, NAIVE, Sums};
use crate::ours::Calls;
use crate::per_tensor::At;
use crate::record::Machine;

use device::{Device, Memory};

/// Device 0.
pub(crate) struct Cuda(Rc<Device>);

/// A case in the device's memory: input sets one after another, each with all buffers of the host.
pub(crate) struct Inputs {
    device: Rc<Device>,
    host: inputs::Inputs,
    memory: Memory,
    sets: usize,
    /// The set that was used last.
    set: usize,
}

impl Inputs {
    /// Address of a buffer.
    fn buffer(&self, set: usize, buffer: Buffer) -> u64 {
        let buffers = self.host.buffers().len();
        self.memory.address + ((set * buffers + self.host.index(buffer)) * self.host.buffer_bytes) as u64
    }

    /// Address of a tensor's first element in a buffer.
    fn tensor(&self, at: At, buffer: Buffer) -> u64 {
        let start = self.host.tensors[at.tensor].1.start as u64 * self.host.dtype.bytes();
        self.buffer(at.set, buffer) + start
    }

    /// Elements of a tensor.
    fn len(&self, at: At) -> u64 {
        self.host.tensors[at.tensor].1.len() as u64
    }

    /// The c_k and d_k, which lie one after another in f64, after all work on the stream.
    fn sums(&self, memory: &Memory) -> Result<Sums> {
        self.device.synchronize()?;
        let mut sums = vec![0.0; 2 * self.host.modalities];
        memory.read(0, &mut sums)?;
        Ok(Sums::from_pending(sums))
    }

    /// Bytes of the longest tensor.
    fn longest(&self) -> u64 {
        self.host.longest() as u64 * self.host.dtype.bytes()
    }

    fn next_set(&mut self) -> usize {
        self.set = (self.set + 1) % self.sets;
        self.set
    }
}

impl AsRef<inputs::Inputs> for Inputs {
    fn as_ref(&self) -> &inputs::Inputs {
        &self.host
    }
}

impl Cuda {
    pub(crate) fn new() -> Result<Self> {
        // gradblend reports why there is no device, where cudarc panics.
        gradblend::Device::cuda(0)?;
        Ok(Cuda(Rc::new(Device::new()?)))
    }
}

impl Backend for Cuda {
    type Inputs = Inputs;
    const ROUNDS: usize = 15;
    const ROUND: Duration = Duration::from_millis(5);

    fn machine(&self) -> Machine {
        self.0.machine(cublas::version())
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(self.0.free_bytes()?.min(heap::free_bytes()))
    }

    fn load(&self, host: inputs::Inputs, most_sets: usize) -> Result<Inputs> {
        let bytes = (host.buffer_bytes * host.buffers().len()) as u64;
        // Four times the cache, so that no set is still in it when its turn comes.
        let sets = (4 * self.0.cache_bytes()?).div_ceil(bytes.max(1)).clamp(1, most_sets as u64);
        let memory = Memory::new(sets * bytes)?;
        for set in 0..sets {
            for (index, buffer) in host.buffers().enumerate() {
                memory.write(set * bytes + (index * host.buffer_bytes) as u64, buffer)?;
            }
        }
        Ok(Inputs { device: self.0.clone(), host, memory, sets: sets as usize, set: 0 })
    }

    fn sets(&self, inputs: &Inputs) -> usize {
        inputs.sets
    }

    fn entries(&self, operation: Operation, _: DType) -> Vec<Entry<Inputs>> {
        // Each tensor's result is rounded, too.
        let vectors = Bound { sums: 1.0 / 4096.0, roundings: 3.0, ..NAIVE };
        let matrices = Bound { sums: 1.0 / 4096.0, roundings: 0.0, cancels: true, blend: 1.0 };
        let mut entries = vec![Entry::limit("copy", |inputs, operation| Copy::new(inputs, operation))];
        entries.extend(Entry::ours(operation, |inputs, operation, three| Ours::new(inputs, operation, three)));
        entries.extend([
            Entry::limit("read", |inputs, operation| naive::Read::new(inputs, operation)),
            Entry::baseline("naive", NAIVE, |inputs, operation| naive::Naive::new(inputs, operation)),
            Entry::baseline("cuBLAS dot + axpy", vectors, |inputs, operation| cublas::Vectors::new(inputs, operation)),
            Entry::baseline("cuBLAS gemm", matrices, |inputs, operation| cublas::Matrices::new(inputs, operation)),
        ]);
        entries
    }

    fn poison(&self, inputs: &mut Inputs) -> Result<()> {
        // 7.3 in f16 and 51,015 in f32 and bf16: more than any blend of numbers below 1.
        let blended = inputs.buffer(0, Buffer::Blended);
        // SAFETY: a buffer of the first set.
        unsafe { self.0.fill(blended, 0x47, inputs.host.buffer_bytes as u64) }
    }

    fn host<'a>(&self, inputs: &'a mut Inputs) -> Result<&'a inputs::Inputs> {
        fn read<T: Sample>(memory: &Memory, at: u64, blended: &mut [T]) -> Result<()> {
            memory.read::<u8>(at, bytemuck::cast_slice_mut(blended))
        }
        self.0.synchronize()?;
        let at = inputs.buffer(0, Buffer::Blended) - inputs.memory.address;
        inputs::with_dtype!(inputs.host.dtype, T => read::<T>(&inputs.memory, at, inputs.host.blended_mut()))?;
        Ok(&inputs.host)
    }

    fn prepare(&self, entry: &Entry<Inputs>, operation: Operation, inputs: &mut Inputs) -> Result<Prepared<Inputs>> {
        let mut make = || -> Result<_> {
            let mut implementation = (entry.make)(inputs, operation)?;
            implementation.run(inputs, 0)?;
            self.0.synchronize()?;
            Ok(implementation)
        };
        // The driver loads code at the first time, which is not the implementation's memory.
        drop(make()?);
        let before = self.0.free_bytes()?;
        let implementation = make()?;
        // Implementations free nothing before they are dropped, so this is the peak.
        Ok((implementation, before.saturating_sub(self.0.free_bytes()?)))
    }

    fn time(
        &self,
        implementation: &mut dyn Implementation<Inputs>,
        inputs: &mut Inputs,
        repeats: usize,
    ) -> Result<f64> {
        let seconds = self.0.seconds(|| {
            (0..repeats).try_for_each(|_| {
                let set = inputs.next_set();
                implementation.run(inputs, set)
            })
        })?;
        Ok(seconds / repeats as f64)
    }

    /// Of one call on an idle stream, so that it never waits for a free entry of the launch queue.
    fn host_time(&self, implementation: &mut dyn Implementation<Inputs>, inputs: &mut Inputs) -> Result<Option<f64>> {
        self.0.synchronize()?;
        let set = inputs.next_set();
        let start = Instant::now();
        implementation.run(inputs, set)?;
        let seconds = start.elapsed().as_secs_f64();
        self.0.synchronize()?;
        Ok(Some(seconds))
    }
}

struct Ours(Calls);

impl Ours {
    fn new(inputs: &Inputs, operation: Operation, three_calls: bool) -> Result<Self> {
        let calls = Calls::new(&gradblend::Device::cuda(0)?, &inputs.host, operation, three_calls)?;
        // The weights were set on the default stream, which the device's stream does not wait for.
        inputs.device.synchronize_all()?;
        let mut ours = Ours(calls);
        ours.plan(inputs)?;
        Ok(ours)
    }

    fn plan(&mut self, inputs: &Inputs) -> Result<()> {
        let set = self.0.plans();
        // SAFETY: the inputs outlive every implementation, and all work on them is on one stream.
        unsafe { self.0.plan(&inputs.host, |buffer| inputs.buffer(set, buffer)) }
    }
}

impl Implementation<Inputs> for Ours {
    fn run(&mut self, inputs: &mut Inputs, set: usize) -> Result<()> {
        self.0.run(set, inputs.device.borrowed_stream())
    }

    fn prepare_sets(&mut self, inputs: &mut Inputs) -> Result<()> {
        (self.0.plans()..inputs.sets).try_for_each(|_| self.plan(inputs))
    }

    fn sums(&mut self, inputs: &mut Inputs) -> Result<Option<Sums>> {
        inputs.device.synchronize()?;
        // SAFETY: `out` is as long as the pending sums, which live in the blender; no work is pending.
        let read = |pending: *const f64, out: &mut [f64]| unsafe { device::read(pending as u64, out) };
        self.0.sums(inputs.device.borrowed_stream(), read).map(Some)
    }
}

/// A copy of half of the minimum traffic, which reads one half and writes the other.
struct Copy {
    /// A target for each set, aligned like the source.
    target: Memory,
    half: u64,
    operation: Operation,
}

impl Copy {
    fn new(inputs: &Inputs, operation: Operation) -> Result<Self> {
        let half = inputs.host.minimum_traffic(operation) as u64 / 2;
        Ok(Copy { target: Memory::new(half.next_multiple_of(256) * inputs.sets as u64)?, half, operation })
    }
}

impl Implementation<Inputs> for Copy {
    fn run(&mut self, inputs: &mut Inputs, set: usize) -> Result<()> {
        let source = inputs.buffer(set, inputs.host.first(self.operation));
        let target = self.target.address + set as u64 * self.half.next_multiple_of(256);
        // SAFETY: the minimum traffic is at most the bytes of the buffers, and each target has half of it.
        unsafe { inputs.device.copy(source, target, self.half) }
    }
}
