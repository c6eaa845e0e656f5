//! A CUDA device's contenders: this crate, a copy and a read, the naive way as kernels, cuBLAS.

mod device;
mod limit;
mod naive;
mod ours;
mod vendor;

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::cases::Case;
use super::heap;
use super::lists::Lists;
use super::naive::Naive;
use super::oracle::Bound;
use super::ours::{BOUND, Which};
use super::record::Machine;
use super::{Contender, Made, Measured, Operation, Place, Role, Way};

use device::{Device, Memory};

/// Device 0.
pub(crate) struct Cuda(Rc<Device>);

/// A case in the device's memory: sets of lists, one list after another, each as long as on the host.
pub(crate) struct Inputs<T> {
    device: Rc<Device>,
    operation: Operation,
    weights: Vec<f32>,
    /// Of the floor.
    bytes: u64,
    lists: Lists<T>,
    memory: Memory,
    sets: usize,
    next: usize,
}

impl<T: Naive> Inputs<T> {
    fn list_bytes(&self) -> u64 {
        (self.lists.len * size_of::<T>()) as u64
    }

    /// Bytes of a set.
    fn set_bytes(&self) -> u64 {
        self.list_bytes() * self.operation.lists(self.weights.len()) as u64
    }

    /// Address of the first element of a set's list.
    fn list(&self, set: usize, which: Which) -> u64 {
        let modalities = if self.operation.dots() { 2 } else { 0 };
        let place = match which {
            Which::Train => 0,
            Which::Valid => 1,
            Which::Modality(k) => modalities + k,
            Which::Blended => modalities + self.weights.len(),
        };
        self.memory.address + set as u64 * self.set_bytes() + place as u64 * self.list_bytes()
    }

    /// Address of a tensor's first element in it.
    fn at(&self, set: usize, which: Which, tensor: usize) -> u64 {
        self.list(set, which) + (self.lists.tensors[tensor].1.start * size_of::<T>()) as u64
    }

    /// Elements of the longest tensor that adds to the sums.
    fn longest(&self) -> u64 {
        let dots = self.lists.tensors.iter().filter(|(tensor, _)| tensor.dots(self.operation));
        dots.map(|(_, range)| range.len() as u64).max().unwrap_or(0)
    }
}

impl Cuda {
    /// Device 0, or why this crate cannot use it.
    pub(crate) fn find() -> Result<Self, String> {
        gradblend::Device::cuda(0).map_err(|error| error.to_string())?;
        Ok(Cuda(Device::new()))
    }
}

impl<T: Naive> Place<T> for Cuda {
    type Inputs = Inputs<T>;
    const ROUNDS: usize = 15;
    const TURN: Duration = Duration::from_millis(5);

    fn machine(&self) -> Machine {
        self.0.machine(vendor::version())
    }

    fn threads(&self, _: &Case) -> usize {
        0
    }

    fn free(&self) -> u64 {
        self.0.free().min(heap::free())
    }

    fn load(
        &self,
        operation: Operation,
        case: &Case,
        lists: Lists<T>,
        weights: Vec<f32>,
        most: usize,
    ) -> Result<Inputs<T>, String> {
        let bytes = (lists.len * size_of::<T>() * operation.lists(weights.len())) as u64;
        // So many that the cache has long lost a set before its turn comes again.
        let sets = (4 * self.0.cache).div_ceil(bytes.max(1)).clamp(1, most as u64);
        let memory = Memory::new(sets * bytes, "the gradients")?;
        for set in 0..sets {
            for (place, list) in lists.all().enumerate() {
                memory.write(set * bytes + (place * size_of_val(list)) as u64, list);
            }
        }
        let (device, bytes) = (self.0.clone(), case.bytes(operation));
        Ok(Inputs { device, operation, weights, bytes, lists, memory, sets: sets as usize, next: 0 })
    }

    fn contenders(&self, operation: Operation, case: &Case) -> Vec<Contender<Inputs<T>>> {
        let limit = |name, make| Contender { name, role: Role::Limit, bound: None, make };
        let ours = |name, make| Contender { name, role: Role::Ours, bound: Some(BOUND), make };
        let peer = |name, bound, make| Contender { name, role: Role::Peer, bound: Some(bound), make };
        let several = case.modalities as f64 + 1.0;
        let naive = Bound { sums: 1.0 / 8192.0, roundings: 1.0, cancels: false, blend: several };
        // Each tensor's result is rounded, too.
        let dots = Bound { sums: 1.0 / 4096.0, roundings: 3.0, ..naive };
        let gemm = Bound { sums: 1.0 / 4096.0, roundings: 0.0, cancels: true, blend: 1.0 };
        let mut contenders: Vec<Contender<Inputs<T>>> = vec![
            limit("copy", |inputs| Ok(Box::new(limit::Copy::new(inputs)?))),
            ours("gradblend", |inputs| Ok(Box::new(ours::Calls::new(inputs, false)?))),
            limit("read", |inputs| Ok(Box::new(limit::Read::new(inputs)?))),
            ours("gradblend, graph", |inputs| Ok(Box::new(ours::Replay::new(inputs)?))),
        ];
        if operation == Operation::Step {
            contenders.push(ours("gradblend, calls apart", |inputs| Ok(Box::new(ours::Calls::new(inputs, true)?))));
        }
        contenders.extend([
            peer("naive", naive, |inputs| Ok(Box::new(naive::Kernels::new(inputs)?))),
            peer("cuBLAS dot + axpy", dots, |inputs| Ok(Box::new(vendor::Vectors::new(inputs)?))),
            peer("cuBLAS gemm, flat", gemm, |inputs| Ok(Box::new(vendor::Matrices::new(inputs, false)?))),
        ]);
        if case.tensors().len() > 1 {
            contenders.push(peer("cuBLAS gemm, concatenated", gemm, |inputs| {
                Ok(Box::new(vendor::Matrices::new(inputs, true)?))
            }));
        }
        contenders
    }

    fn sets(&self, inputs: &Inputs<T>) -> usize {
        inputs.sets
    }

    fn lists<'a>(&self, inputs: &'a mut Inputs<T>) -> &'a Lists<T> {
        if inputs.operation.blends() {
            inputs.device.wait();
            let at = inputs.list(0, Which::Blended) - inputs.memory.address;
            inputs.memory.read(at, &mut inputs.lists.blended);
        }
        &inputs.lists
    }

    fn poison(&self, inputs: &mut Inputs<T>) {
        // In f16 this is 7.3, in f32 and bf16 51,015: more than any blend of numbers below 1.
        const BYTE: u8 = 0x47;
        if inputs.operation.blends() {
            // SAFETY: a list of the first set.
            unsafe { inputs.device.fill(inputs.list(0, Which::Blended), BYTE, inputs.list_bytes()) };
        }
    }

    fn prepare(&self, contender: &Contender<Inputs<T>>, inputs: &mut Inputs<T>) -> (Made<Inputs<T>>, u64) {
        // A panic is how a way says that the device or a library refused a call, which ends this contender alone.
        let mut make = || {
            let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| -> Made<Inputs<T>> {
                let mut way = (contender.make)(inputs)?;
                way.run(inputs, 0);
                self.0.wait();
                Ok(way)
            }));
            made.unwrap_or_else(|panic| Err(panic.downcast_ref::<String>().map_or("a call failed", |text| text).into()))
        };
        // The first time, code is loaded, which is nobody's memory.
        if let Err(reason) = make() {
            return (Err(reason), 0);
        }
        let before = self.0.free();
        let made = make();
        // Nothing gives memory back before it is dropped, so this is the peak.
        (made, before.saturating_sub(self.0.free()))
    }

    fn seconds(&self, way: &mut dyn Way<Inputs<T>>, inputs: &mut Inputs<T>, repeats: usize) -> f64 {
        let all = self.0.seconds(|| {
            for _ in 0..repeats {
                inputs.next = (inputs.next + 1) % inputs.sets;
                way.run(inputs, inputs.next);
            }
        });
        all / repeats as f64
    }

    fn host(
        &self,
        measured: &Measured,
        way: &mut dyn Way<Inputs<T>>,
        inputs: &mut Inputs<T>,
        most: usize,
    ) -> Option<Vec<f64>> {
        // Beyond these, a call waits for room in the stream's queue, which takes about a thousand.
        const QUEUE: u64 = 500;
        // A graph's own launch may be refused in a capture, but is one.
        let unknown = if measured.role == Role::Peer { u64::MAX } else { 1 };
        let launches = measured.launches.unwrap_or(unknown);
        if launches > QUEUE {
            return None;
        }
        let repeats = if most == 1 { 1 } else { (QUEUE / launches.max(1)).clamp(1, 16) as usize };
        let mut calls = || {
            self.0.wait();
            let start = Instant::now();
            for _ in 0..repeats {
                inputs.next = (inputs.next + 1) % inputs.sets;
                way.run(inputs, inputs.next);
            }
            start.elapsed().as_secs_f64() / repeats as f64
        };
        let seconds = (0..most).map(|_| calls()).collect();
        self.0.wait();
        Some(seconds)
    }

    fn counts(&self, role: Role, way: &mut dyn Way<Inputs<T>>, inputs: &mut Inputs<T>) -> [Option<u64>; 2] {
        // A graph of a million nodes takes gigabytes of the host. Ours has one, whatever the list.
        const MOST: usize = 2_000;
        if role == Role::Peer && inputs.lists.tensors.len() > MOST {
            return [None; 2];
        }
        let graph = self.0.capture(|| way.run(inputs, 0));
        graph.map_or([None; 2], |graph| graph.counts().map(Some))
    }
}
