//! The naive kernels: t - g into a buffer, two products a modality, then scale and axpys, one launch each. And plain
//! reading.

use anyhow::Result;
use cudarc::driver::{CudaFunction, LaunchConfig, PushKernelArg};
use gradblend::Role;

use super::Inputs;
use super::device::{BLOCK, Device, Memory, blocks};
use crate::case::Operation;
use crate::oracle::Sums;
use crate::run::Implementation;

fn config(blocks: u64) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks as u32, 1, 1), block_dim: (BLOCK as u32, 1, 1), shared_mem_bytes: 0 }
}

/// Launches a kernel of three addresses or numbers after one parameter of another type.
///
/// # Safety
/// The kernel has these parameters, and may use the memory at those that are addresses.
pub(super) unsafe fn launch<T: cudarc::driver::DeviceRepr>(
    device: &Device,
    kernel: &CudaFunction,
    blocks: u64,
    first: T,
    [b, c, d]: [u64; 3],
) -> Result<()> {
    let mut launch = device.stream.launch_builder(kernel);
    launch.arg(&first).arg(&b).arg(&c).arg(&d);
    // SAFETY: the caller's promise.
    unsafe { launch.launch(config(blocks)) }?;
    Ok(())
}

pub(super) struct Naive {
    operation: Operation,
    difference: CudaFunction,
    product: CudaFunction,
    scale: CudaFunction,
    axpy: CudaFunction,
    /// t - g of one tensor at a time.
    buffer: Memory,
    /// The c_k, then the d_k, in f64.
    sums: Memory,
}

impl Naive {
    pub(super) fn new(inputs: &Inputs, operation: Operation) -> Result<Self> {
        let kernel = |name| inputs.device.kernel(name, Some(inputs.host.dtype));
        Ok(Naive {
            operation,
            difference: kernel("difference")?,
            product: kernel("product")?,
            scale: kernel("scale")?,
            axpy: kernel("axpy")?,
            buffer: Memory::new(if operation.dots() { inputs.longest() } else { 0 })?,
            sums: Memory::new(2 * 8 * inputs.host.modalities as u64)?,
        })
    }
}

impl Implementation<Inputs> for Naive {
    fn run(&mut self, inputs: &mut Inputs, set: usize) -> Result<()> {
        let (device, buffer, modalities) = (&*inputs.device, self.buffer.address, inputs.host.modalities);
        // SAFETY: 2K sums, which only this stream uses.
        unsafe { device.fill(self.sums.address, 0, 2 * 8 * modalities as u64) }?;
        for (place, (tensor, range)) in inputs.host.tensors.iter().enumerate() {
            let len = range.len() as u64;
            let at = |role| inputs.tensor(set, role, place);
            let present = || (0..modalities).filter(|k| tensor.present(*k));
            if tensor.dots(self.operation) {
                let (t, g) = (at(Role::Train), at(Role::Valid));
                // SAFETY: t, g, out, len; the buffer is as long as the longest tensor.
                unsafe { launch(device, &self.difference, blocks(len), t, [g, buffer, len]) }?;
                for k in present() {
                    for (factor, sum) in [(g, k), (buffer, modalities + k)] {
                        let sum = self.sums.address + 8 * sum as u64;
                        let blocks = device.looping_blocks(len)?;
                        // SAFETY: a, b, len, sum; both factors have `len` elements.
                        unsafe { launch(device, &self.product, blocks, factor, [at(Role::Modality(k)), len, sum]) }?;
                    }
                }
            }
            if self.operation.blends() {
                for (nth, k) in present().enumerate() {
                    // The first needs no zeros to add to.
                    let kernel = if nth == 0 { &self.scale } else { &self.axpy };
                    let (v, out) = (at(Role::Modality(k)), at(Role::Blended));
                    // SAFETY: w, v, out, len; both buffers have `len` elements.
                    unsafe { launch(device, kernel, blocks(len), inputs.host.weights[k], [v, out, len]) }?;
                }
            }
        }
        Ok(())
    }

    fn sums(&mut self, inputs: &mut Inputs) -> Result<Option<Sums>> {
        inputs.device.synchronize()?;
        let mut sums = vec![0.0; 2 * inputs.host.modalities];
        self.sums.read(0, &mut sums)?;
        Ok(Some(Sums::from_pending(sums)))
    }
}

/// Reads the bytes of the minimum traffic.
pub(super) struct Read {
    kernel: CudaFunction,
    units: u64,
    first: usize,
    sink: Memory,
}

impl Read {
    pub(super) fn new(inputs: &Inputs, operation: Operation) -> Result<Self> {
        Ok(Read {
            kernel: inputs.device.kernel("read_units", None)?,
            units: inputs.host.minimum_traffic(operation) as u64 / 16,
            first: inputs.host.places(operation).start,
            sink: Memory::new(4)?,
        })
    }
}

impl Implementation<Inputs> for Read {
    fn run(&mut self, inputs: &mut Inputs, set: usize) -> Result<()> {
        let blocks = inputs.device.looping_blocks(self.units)?;
        let mut launch = inputs.device.stream.launch_builder(&self.kernel);
        let source = inputs.buffer(set, self.first);
        launch.arg(&source).arg(&self.units).arg(&self.sink.address);
        // SAFETY: address, units, sink; the minimum traffic is at most the bytes of the buffers.
        unsafe { launch.launch(config(blocks)) }?;
        Ok(())
    }
}
