//! The naive steps by kernels, one launch each, and plain reading.

use anyhow::Result;
use cudarc::driver::{CudaFunction, LaunchConfig, PushKernelArg};

use super::Inputs;
use super::device::{BLOCK, Device, Memory, blocks};
use crate::backend::Implementation;
use crate::case::Operation;
use crate::inputs::Buffer;
use crate::oracle::Sums;
use crate::per_tensor::{At, PerTensor, Steps};

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
    // SAFETY: the kernel has these four parameters, and may use the memory at those that are addresses.
    unsafe { launch.launch(config(blocks)) }?;
    Ok(())
}

pub(super) struct Naive {
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
    pub(super) fn new(inputs: &Inputs, operation: Operation) -> Result<PerTensor<Self>> {
        let kernel = |name| inputs.device.kernel(name, Some(inputs.host.dtype));
        let steps = Naive {
            difference: kernel("difference")?,
            product: kernel("product")?,
            scale: kernel("scale")?,
            axpy: kernel("axpy")?,
            buffer: Memory::new(if operation.dots() { inputs.longest() } else { 0 })?,
            sums: Memory::new(2 * 8 * inputs.host.modalities as u64)?,
        };
        Ok(PerTensor { operation, steps })
    }
}

impl Steps<Inputs> for Naive {
    fn begin_sums(&mut self, inputs: &mut Inputs) -> Result<()> {
        // SAFETY: the memory has 2K sums of 8 bytes, which only work on this stream uses.
        unsafe { inputs.device.fill(self.sums.address, 0, 2 * 8 * inputs.host.modalities as u64) }
    }

    fn difference(&mut self, inputs: &mut Inputs, at: At) -> Result<()> {
        let (len, out) = (inputs.len(at), self.buffer.address);
        let [t, g] = [Buffer::Train, Buffer::Valid].map(|buffer| inputs.tensor(at, buffer));
        // SAFETY: the kernel takes t, g, out, len. t and g have `len` elements, and the buffer those of the longest tensor.
        unsafe { launch(&inputs.device, &self.difference, blocks(len), t, [g, out, len]) }
    }

    fn dots(&mut self, inputs: &mut Inputs, at: At, k: usize) -> Result<()> {
        let (device, len) = (&*inputs.device, inputs.len(at));
        let [g, v] = [Buffer::Valid, Buffer::Modality(k)].map(|buffer| inputs.tensor(at, buffer));
        for (factor, sum) in [(g, k), (self.buffer.address, inputs.host.modalities + k)] {
            let sum = self.sums.address + 8 * sum as u64;
            // SAFETY: the kernel takes a, b, len, sum. Both factors have `len` elements, and `sum` is one of 2K sums.
            unsafe { launch(device, &self.product, device.looping_blocks(len)?, factor, [v, len, sum]) }?;
        }
        Ok(())
    }

    fn blend(&mut self, inputs: &mut Inputs, at: At, k: usize, first: bool) -> Result<()> {
        let (len, w) = (inputs.len(at), inputs.host.weights[k]);
        let kernel = if first { &self.scale } else { &self.axpy };
        let [v, out] = [Buffer::Modality(k), Buffer::Blended].map(|buffer| inputs.tensor(at, buffer));
        // SAFETY: the kernel takes w, v, out, len. Both buffers have `len` elements.
        unsafe { launch(&inputs.device, kernel, blocks(len), w, [v, out, len]) }
    }

    fn sums(&mut self, inputs: &mut Inputs) -> Result<Sums> {
        inputs.sums(&self.sums)
    }
}

/// Reads the bytes of the minimum traffic.
pub(super) struct Read {
    kernel: CudaFunction,
    units: u64,
    first: Buffer,
    sink: Memory,
}

impl Read {
    pub(super) fn new(inputs: &Inputs, operation: Operation) -> Result<Self> {
        Ok(Read {
            kernel: inputs.device.kernel("read_units", None)?,
            units: inputs.host.minimum_traffic(operation) as u64 / 16,
            first: inputs.host.first(operation),
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
        // SAFETY: the kernel takes address, units, sink. The minimum traffic is at most the bytes of the buffers from this one
        // on, and the sink has 4 bytes.
        unsafe { launch.launch(config(blocks)) }?;
        Ok(())
    }
}
