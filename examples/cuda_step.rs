//! `step` on device memory and streams of cudarc: while one stream blends the gradients of a step, another copies those of
//! the next step to the device. The CPU does the same steps, and both must agree.
//!
//! ```sh
//! cargo run --release --features cuda --example cuda_step [-- DEVICE]
//! ```

use std::error::Error;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DriverError};
use gradblend::{Blender, Config, DType, Device, Gradient, GradientMut, Stream, TensorGrads};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Modalities: video, audio, and both together.
const K: usize = 3;
/// Elements of each parameter tensor.
const LENGTHS: [usize; 4] = [300_000, 1000, 70_001, 10];
const STEPS: usize = 8;

/// The gradients of a step: t, g, v_1 .. v_K of each tensor. A trainer would compute them.
fn gradients(step: usize) -> Vec<Vec<f32>> {
    // How much of the training batch's noise is in t and in each v_k. The noise of the held-out batch is another.
    let overfitting = [0.5, 0.0, 2.0, 0.7, 1.0];
    let mut buffers = Vec::new();
    for len in LENGTHS {
        for (buffer, overfitting) in overfitting.iter().enumerate() {
            let value = |i: usize| {
                let (x, step) = (i as f32, step as f32);
                let held_out = if buffer == 1 { 0.2 * (x * 1.1 + step * 1.7).sin() } else { 0.0 };
                (x * 0.37 + step).sin() + overfitting * (x * 0.73 + step * 1.9).sin() + held_out
            };
            buffers.push((0..len).map(value).collect());
        }
    }
    buffers
}

/// The same buffers on the device, and one for the blended gradient after those of each tensor.
struct OnDevice(Vec<CudaSlice<f32>>);

impl OnDevice {
    fn new(stream: &Arc<CudaStream>) -> std::result::Result<Self, DriverError> {
        let lengths = LENGTHS.iter().flat_map(|len| [*len; K + 3]);
        Ok(OnDevice(lengths.map(|len| stream.alloc_zeros(len)).collect::<std::result::Result<_, _>>()?))
    }

    /// Submits copies of the gradients to a stream.
    fn upload(&mut self, host: &[Vec<f32>], stream: &Arc<CudaStream>) -> std::result::Result<(), DriverError> {
        for (device, host) in self.0.chunks_mut(K + 3).zip(host.chunks(K + 2)) {
            for (device, host) in device.iter_mut().zip(host) {
                stream.memcpy_htod(host, device)?;
            }
        }
        Ok(())
    }

    /// The tensors for work on a stream, which waits for the copies.
    fn tensors<'a>(&'a mut self, stream: &'a CudaStream) -> impl Iterator<Item = TensorGrads<'a>> {
        self.0.chunks_mut(K + 3).map(move |buffers| {
            let (inputs, blended) = buffers.split_at_mut(K + 2);
            let mut inputs = inputs.iter().map(|input| Some(Gradient::cuda(input, stream)));
            let (t, g) = (inputs.next().flatten(), inputs.next().flatten());
            let blended = &mut blended[0];
            let shape = (blended.len() as u64, DType::F32);
            TensorGrads::from_gradients(shape, t, g, inputs, Some(GradientMut::cuda(blended, stream)))
        })
    }
}

/// The same step on the CPU. Returns the blended gradient of each tensor.
fn step_on_cpu(blender: &mut Blender, host: &[Vec<f32>]) -> Result<Vec<Vec<f32>>> {
    let mut blended: Vec<Vec<f32>> = LENGTHS.into_iter().map(|len| vec![0.0; len]).collect();
    let plan = blender.plan(host.chunks(K + 2).zip(&mut blended).map(|(buffers, blended)| {
        let modalities: [Option<&[f32]>; K] = std::array::from_fn(|k| Some(&buffers[2 + k][..]));
        TensorGrads::new(&buffers[0], &buffers[1], &modalities).blended(blended)
    }))?;
    blender.step(&plan, Stream::default())?;
    blender.reweight(Stream::default())?;
    drop(plan);
    Ok(blended)
}

fn main() -> Result<()> {
    sigpipe::reset(); // the end of `cuda_step | head` is no panic
    let ordinal = std::env::args()
        .nth(1)
        .map_or(Ok(0), |word| word.parse().map_err(|_| format!("no number of a device: {word:?}")))?;
    let mut reference = Blender::new(&Device::cpu(), Config::new(K as u32))?;
    // Before cudarc is used: it panics where there is no driver, and this is an error.
    let mut blender = Blender::new(&Device::cuda(ordinal)?, Config::new(K as u32))?;

    // A framework has these anyway; the blender borrows them. Two sets of buffers, for even and odd steps.
    let context = CudaContext::new(ordinal as usize)?;
    let (copies, compute) = (context.new_stream()?, context.new_stream()?);
    let mut buffers = [OnDevice::new(&copies)?, OnDevice::new(&copies)?];
    let mut plan = blender.plan(buffers[0].tensors(&compute))?.release();

    let mut expected = Vec::new();
    for step in 0..STEPS {
        let (host, set) = (gradients(step), &mut buffers[step % 2]);
        // cudarc makes the copies wait until the step before the last has read these buffers, and `compute` for the copies.
        set.upload(&host, &copies)?;
        let mut bound = plan;
        bound.update(set.tensors(&compute), (&compute).into())?;
        blender.step(&bound, (&compute).into())?;
        blender.reweight((&compute).into())?;
        plan = bound.release(); // ends the borrow of the buffers, without waiting for the step
        expected = step_on_cpu(&mut reference, &host)?;
    }

    // Only now does the host synchronize: for the report, and for the last blended gradients.
    let (report, on_cpu) = (blender.report((&compute).into())?, reference.report(Stream::default())?);
    println!("weights on the GPU {:.6?}, on the CPU {:.6?}", report.weights, on_cpu.weights);
    let worst = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let weights = report.weights.iter().zip(&on_cpu.weights).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let mut difference = weights as f32;
    for (device, expected) in buffers[(STEPS - 1) % 2].0.chunks(K + 3).zip(&expected) {
        difference = difference.max(worst(&compute.clone_dtoh(&device[K + 2])?, expected));
    }
    println!("{STEPS} steps, OGR of the blend {:.3}, largest difference {difference:e}", report.ogr_blend);
    if difference < 1e-4 { Ok(()) } else { Err("the GPU and the CPU differ".into()) }
}
