//! The naive way: t - g into a buffer, two dots a modality, then a product and axpys, a launch each.

use cudarc::driver::sys;

use super::super::Way;
use super::super::naive::Naive;
use super::super::oracle::Sums;
use super::super::ours::Which;
use super::Inputs;
use super::device::{Device, Memory, parameter};

pub(super) struct Kernels {
    difference: sys::CUfunction,
    product: sys::CUfunction,
    scale: sys::CUfunction,
    axpy: sys::CUfunction,
    /// Room for t - g of the longest tensor, used again for each.
    buffer: Memory,
    /// The c_k, then the d_k, in f64.
    sums: Memory,
}

impl Kernels {
    pub(super) fn new<T: Naive>(inputs: &Inputs<T>) -> Result<Self, String> {
        let kernel = |name| inputs.device.kernel(name, Some(T::DTYPE));
        Ok(Kernels {
            difference: kernel("difference"),
            product: kernel("product"),
            scale: kernel("scale"),
            axpy: kernel("axpy"),
            buffer: Memory::new(inputs.longest() * size_of::<T>() as u64, "t - g")?,
            sums: Memory::new(2 * 8 * inputs.weights.len() as u64, "the sums")?,
        })
    }
}

impl<T: Naive> Way<Inputs<T>> for Kernels {
    fn run(&mut self, inputs: &mut Inputs<T>, set: usize) {
        let device = &inputs.device;
        let (modalities, buffer) = (inputs.weights.len(), self.buffer.address);
        // SAFETY: 2K sums.
        unsafe { device.fill(self.sums.address, 0, 2 * 8 * modalities as u64) };
        for (index, (tensor, range)) in inputs.lists.tensors.iter().enumerate() {
            let (len, blocks) = (range.len() as u64, Device::blocks(range.len() as u64));
            let at = |which| inputs.at(set, which, index);
            let present = || (0..modalities).filter(|k| tensor.present(*k));
            if tensor.dots(inputs.operation) {
                let (t, g) = (at(Which::Train), at(Which::Valid));
                let mut parameters = [parameter(&t), parameter(&g), parameter(&buffer), parameter(&len)];
                // SAFETY: t, g, out, len; the buffer is as long as the longest.
                unsafe { device.launch(self.difference, blocks, &mut parameters) };
                for k in present() {
                    let v = at(Which::Modality(k));
                    for (first, sum) in [(g, k), (buffer, modalities + k)] {
                        let sum = self.sums.address + 8 * sum as u64;
                        let mut parameters = [parameter(&first), parameter(&v), parameter(&len), parameter(&sum)];
                        let blocks = device.resident_blocks(len);
                        // SAFETY: a, b, len, sum.
                        unsafe { device.launch(self.product, blocks, &mut parameters) };
                    }
                }
            }
            if inputs.operation.blends() {
                let out = at(Which::Blended);
                for (nth, k) in present().enumerate() {
                    let (w, v) = (inputs.weights[k], at(Which::Modality(k)));
                    let mut parameters = [parameter(&w), parameter(&v), parameter(&out), parameter(&len)];
                    // The first needs no zeros to add to.
                    let kernel = if nth == 0 { self.scale } else { self.axpy };
                    // SAFETY: w, v, out, len.
                    unsafe { device.launch(kernel, blocks, &mut parameters) };
                }
            }
        }
    }

    fn sums(&mut self, inputs: &mut Inputs<T>) -> Option<Sums> {
        inputs.device.wait();
        let mut sums = vec![0.0; 2 * inputs.weights.len()];
        self.sums.read(0, &mut sums);
        Some(Sums::of(sums))
    }
}
