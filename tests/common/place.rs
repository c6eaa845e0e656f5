//! The places that a test body runs at: what differs between host memory and memory of a device stands here.

use std::cell::UnsafeCell;

use gradblend::{Blender, Config, Device, Plan, Stream, TensorGrads};

use super::{Outcome, Sample, Tensor};

#[cfg(feature = "cuda")]
use super::cuda;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda,
}

/// Runs a body on the CPU.
pub(crate) fn cpu(body: impl FnOnce(Place) -> Outcome) -> Outcome {
    body(Place::Cpu)
}

impl Place {
    pub(crate) fn device(self) -> gradblend::Result<Device> {
        match self {
            Place::Cpu => Ok(Device::cpu()),
            #[cfg(feature = "cuda")]
            Place::Cuda => Device::cuda(0),
        }
    }

    pub(crate) fn blender_with(self, config: Config) -> gradblend::Result<Blender> {
        Blender::new(&self.device()?, config)
    }

    /// A blender with the default configuration and 2 threads.
    pub(crate) fn blender(self, k: usize) -> gradblend::Result<Blender> {
        self.blender_with(Config { threads: 2, ..Config::new(k as u32) })
    }

    /// Puts the lists of tensors where the device can work on them.
    pub(crate) fn put<T: Sample>(self, tensors: &mut [Tensor<T>]) -> Lists<'_, T> {
        Lists {
            #[cfg(feature = "cuda")]
            memory: (self == Place::Cuda).then(|| tensors.iter().map(cuda::Gradients::of).collect()),
            tensors,
        }
    }

    /// Runs one operation on `tensors`, on the default stream, and brings back what it wrote.
    pub(crate) fn run<T: Sample>(
        self,
        blender: &mut Blender,
        tensors: &mut [Tensor<T>],
        operation: impl FnOnce(&mut Blender, &Plan<'_>, Stream) -> gradblend::Result<()>,
    ) -> gradblend::Result<()> {
        let mut lists = self.put(tensors);
        let plan = blender.plan(&lists.grads())?;
        operation(blender, &plan, Stream::default())?;
        drop(plan);
        lists.fetch();
        Ok(())
    }

    /// The pending sums, once the default stream is done.
    pub(crate) fn pending(self, blender: &Blender) -> Vec<f64> {
        // SAFETY: 2K numbers, and no call on the blender runs.
        unsafe { self.read(blender.pending_sums(), 2 * blender.config().modalities as usize) }
    }

    /// Puts numbers where `dot` would have left them.
    pub(crate) fn set_pending(self, blender: &mut Blender, c: &[f64], d: &[f64]) {
        let k = blender.config().modalities as usize;
        assert_eq!((c.len(), d.len()), (k, k));
        // SAFETY: 2K numbers, and no call on the blender runs.
        unsafe { self.write(blender.pending_sums(), &[c, d].concat()) };
    }

    /// The weights in force as f32, once the default stream is done.
    pub(crate) fn weights(self, blender: &Blender) -> Vec<f32> {
        // SAFETY: K numbers, and no call on the blender runs.
        unsafe { self.read(blender.device_weights(), blender.config().modalities as usize) }
    }

    /// Numbers in memory of the device.
    pub(crate) fn buffer<N: Copy>(self, numbers: Vec<N>) -> Buffer<N> {
        Buffer {
            place: self,
            #[cfg(feature = "cuda")]
            memory: (self == Place::Cuda).then(|| cuda::Memory::of(&numbers)),
            host: if self == Place::Cpu { numbers.into_iter().map(UnsafeCell::new).collect() } else { Vec::new() },
        }
    }

    /// # Safety
    /// `from` has `len` numbers in memory of the place, which only work on the default stream writes to.
    pub(crate) unsafe fn read<N: Copy + Default>(self, from: *const N, len: usize) -> Vec<N> {
        match self {
            // SAFETY: as the caller's.
            Place::Cpu => unsafe { std::slice::from_raw_parts(from, len) }.to_vec(),
            #[cfg(feature = "cuda")]
            // SAFETY: as the caller's.
            Place::Cuda => unsafe { cuda::read(from, len) },
        }
    }

    /// # Safety
    /// `to` has room for the numbers in memory of the place, which only work on the default stream uses.
    pub(crate) unsafe fn write<N: Copy>(self, to: *mut N, numbers: &[N]) {
        match self {
            // SAFETY: as the caller's.
            Place::Cpu => unsafe { to.copy_from_nonoverlapping(numbers.as_ptr(), numbers.len()) },
            #[cfg(feature = "cuda")]
            // SAFETY: as the caller's.
            Place::Cuda => unsafe { cuda::write(to, numbers) },
        }
    }
}

/// Tensors where the device of a place can work on them.
pub(crate) struct Lists<'a, T> {
    #[cfg(feature = "cuda")]
    memory: Option<Vec<cuda::Gradients>>,
    tensors: &'a mut [Tensor<T>],
}

impl<T: Sample> Lists<'_, T> {
    pub(crate) fn grads(&mut self) -> Vec<TensorGrads<'_>> {
        #[cfg(feature = "cuda")]
        if let Some(memory) = &self.memory {
            return memory.iter().zip(&*self.tensors).map(|(memory, tensor)| memory.grads(tensor)).collect();
        }
        self.tensors.iter_mut().map(Tensor::grads).collect()
    }

    /// Brings back what was written to the tensors, once the default stream is done.
    pub(crate) fn fetch(self) {
        #[cfg(feature = "cuda")]
        for (memory, tensor) in self.memory.iter().flatten().zip(self.tensors) {
            memory.fetch(tensor);
        }
    }
}

/// Numbers that a device reads.
pub(crate) struct Buffer<N> {
    place: Place,
    host: Vec<UnsafeCell<N>>,
    #[cfg(feature = "cuda")]
    memory: Option<cuda::Memory>,
}

impl<N: Copy> Buffer<N> {
    pub(crate) fn address(&self) -> *mut N {
        #[cfg(feature = "cuda")]
        if let Some(memory) = &self.memory {
            return memory.address(0);
        }
        UnsafeCell::raw_get(self.host.as_ptr())
    }

    /// Changes the first of them, once the default stream is done.
    pub(crate) fn set(&self, number: N) {
        // SAFETY: the buffer's own memory, which observations on the default stream alone read.
        unsafe { self.place.write(self.address(), &[number]) };
    }
}
