//! A CUDA device's contenders: this crate, a copy and a read, the naive way as kernels, cuBLAS.

mod device;
mod limit;
mod naive;
mod ours;
mod vendor;

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::cases::Case;
use super::cpu;
use super::lists::Lists;
use super::naive::Naive;
use super::oracle::Bound;
use super::record::Machine;
use super::{Contender, Made, Operation, Place, Role, Way};

use device::{Device, Memory};

/// Device 0.
pub(crate) struct Cuda(Rc<Device>);

/// A case in the device's memory: sets of lists, one list after another, each as long as on the host.
pub(crate) struct Inputs<T> {
    device: Rc<Device>,
    operation: Operation,
    weights: Vec<f32>,
    lists: Lists<T>,
    memory: Memory,
    sets: usize,
    next: usize,
}

/// A list of a set.
#[derive(Clone, Copy)]
enum Which {
    Train,
    Valid,
    Modality(usize),
    Blended,
}

impl<T: Naive> Inputs<T> {
    fn list_bytes(&self) -> u64 {
        (self.lists.len * size_of::<T>()) as u64
    }

    /// Bytes of a set.
    fn set_bytes(&self) -> u64 {
        self.list_bytes() * self.operation.lists(self.weights.len()) as u64
    }

    /// Bytes of the floor.
    fn floor_bytes(&self) -> u64 {
        let lists = |(tensor, range): &(super::cases::Tensor, _)| -> u64 {
            let range: &std::ops::Range<usize> = range;
            range.len() as u64 * tensor.lists(self.operation)
        };
        self.lists.tensors.iter().map(lists).sum::<u64>() * size_of::<T>() as u64
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

    /// Offset of the first set's blended gradient.
    fn blended(&self) -> u64 {
        self.list(0, Which::Blended) - self.memory.address
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
        self.0.free().min(cpu::free())
    }

    fn load(
        &self,
        operation: Operation,
        _: &Case,
        lists: Lists<T>,
        weights: Vec<f32>,
        most: usize,
    ) -> Result<Inputs<T>, String> {
        let bytes = (lists.len * size_of::<T>() * operation.lists(weights.len())) as u64;
        // So many that the cache has lost a set before its turn comes again.
        let sets = (2 * self.0.cache).div_ceil(bytes.max(1)).clamp(1, most as u64);
        let memory = Memory::new(sets * bytes, "the gradients")?;
        for set in 0..sets {
            for (place, list) in lists.all().enumerate() {
                memory.write(set * bytes + (place * size_of_val(list)) as u64, list);
            }
        }
        Ok(Inputs { device: self.0.clone(), operation, weights, lists, memory, sets: sets as usize, next: 0 })
    }

    fn contenders(&self, operation: Operation, case: &Case) -> Vec<Contender<Inputs<T>>> {
        let limit = |name, make| Contender { name, role: Role::Limit, bound: None, make };
        let ours = |name, make| Contender { name, role: Role::Ours, bound: Some(cpu::OURS), make };
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
            let at = inputs.blended();
            inputs.memory.read(at, &mut inputs.lists.blended);
        }
        &inputs.lists
    }

    fn poison(&self, inputs: &mut Inputs<T>) {
        if inputs.operation.blends() {
            inputs.device.wait();
            inputs.lists.blended.fill(T::from_f32(7.0));
            inputs.memory.write(inputs.blended(), &inputs.lists.blended);
        }
    }

    fn prepare(&self, contender: &Contender<Inputs<T>>, inputs: &mut Inputs<T>) -> (Made<Inputs<T>>, u64) {
        let before = self.0.free();
        let mut made = (contender.make)(inputs);
        if let Ok(way) = &mut made {
            way.run(inputs, 0);
            self.0.wait();
        }
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

    fn host(&self, way: &mut dyn Way<Inputs<T>>, inputs: &mut Inputs<T>, most: usize) -> Option<Vec<f64>> {
        let mut calls = |repeats: usize| {
            self.0.wait();
            let start = Instant::now();
            for _ in 0..repeats {
                inputs.next = (inputs.next + 1) % inputs.sets;
                way.run(inputs, inputs.next);
            }
            start.elapsed().as_secs_f64() / repeats as f64
        };
        let first = calls(1);
        let (rounds, repeats) = match first {
            _ if most == 1 => (1, 1),
            // So few that no call waits for room in the stream's queue.
            ..1e-3 => (most, 16),
            ..0.1 => (most.min(5), 1),
            _ => (1, 1),
        };
        let seconds = (0..rounds).map(|_| calls(repeats)).collect();
        self.0.wait();
        Some(seconds)
    }

    fn counts(&self, way: &mut dyn Way<Inputs<T>>, inputs: &mut Inputs<T>) -> [Option<u64>; 2] {
        // A graph of a million nodes takes gigabytes of the host.
        const MOST: usize = 2_000;
        if inputs.lists.tensors.len() > MOST {
            return [None; 2];
        }
        let graph = self.0.capture(|| way.run(inputs, 0));
        graph.map_or([None; 2], |graph| graph.counts().map(Some))
    }
}
