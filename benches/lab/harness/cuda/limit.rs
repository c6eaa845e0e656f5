//! What no program that moves the same bytes can be faster than.

use cudarc::driver::sys;

use super::super::Way;
use super::super::naive::Naive;
use super::Inputs;
use super::device::{Memory, parameter};

/// A copy of half of the bytes, which reads them and writes as many.
pub(super) struct Copy {
    /// As many places to copy to as there are sets.
    to: Memory,
    half: u64,
    /// From one place to the next, which is aligned as well as the first.
    step: u64,
}

impl Copy {
    pub(super) fn new<T: Naive>(inputs: &Inputs<T>) -> Result<Self, String> {
        let half = inputs.bytes / 2;
        let step = half.next_multiple_of(256);
        Ok(Copy { to: Memory::new(step * inputs.sets as u64, "a copy")?, half, step })
    }
}

impl<T: Naive> Way<Inputs<T>> for Copy {
    fn run(&mut self, inputs: &mut Inputs<T>, set: usize) {
        let from = inputs.memory.address + set as u64 * inputs.set_bytes();
        // SAFETY: the floor is at most a set's bytes, and there is room for half of it.
        unsafe { inputs.device.copy(from, self.to.address + set as u64 * self.step, self.half) };
    }
}

/// A kernel that reads all of the bytes.
pub(super) struct Read {
    kernel: sys::CUfunction,
    units: u64,
    sink: Memory,
}

impl Read {
    pub(super) fn new<T: Naive>(inputs: &Inputs<T>) -> Result<Self, String> {
        let kernel = inputs.device.kernel("read_units", None);
        Ok(Read { kernel, units: inputs.bytes / 16, sink: Memory::new(4, "a number")? })
    }
}

impl<T: Naive> Way<Inputs<T>> for Read {
    fn run(&mut self, inputs: &mut Inputs<T>, set: usize) {
        let from = inputs.memory.address + set as u64 * inputs.set_bytes();
        let mut parameters = [parameter(&from), parameter(&self.units), parameter(&self.sink.address)];
        let blocks = inputs.device.resident_blocks(self.units);
        // SAFETY: address, units, sink; the floor is at most a set's bytes.
        unsafe { inputs.device.launch(self.kernel, blocks, &mut parameters) };
    }
}
