//! `step` on raw CUDA buffers and borrowed streams: gradients of the next step are copied to the device on one stream
//! while the present ones are blended on another. The CPU does the same from the host's copy, and both must agree.
//!
//! ```sh
//! cargo run --release --features cuda --example cuda_step [-- DEVICE]
//! ```

use std::ffi::c_void;

use anyhow::{Context, Result, ensure};
use cudarc::driver::{result, sys};
use gradblend::{Blender, Config, DType, Device, Plan, Stream, TensorGrads};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Modalities: video, audio, and both together.
const K: usize = 3;
/// Elements of each parameter tensor.
const LENGTHS: [usize; 4] = [300_000, 1000, 70_001, 10];
const STEPS: usize = 8;

/// The gradients of all tensors on the host, list after list: t, g, v_1 .. v_K of each tensor.
type Host = Vec<Vec<f32>>;

/// The same on the device, with a place for the blend after each tensor's lists.
struct OnDevice {
    lists: Vec<sys::CUdeviceptr>,
}

impl OnDevice {
    /// # Safety
    /// A context is current, and stays until this is given back.
    unsafe fn new() -> Result<Self> {
        let mut lists = Vec::new();
        for len in LENGTHS {
            for _ in 0..K + 3 {
                // SAFETY: as the caller's.
                lists.push(unsafe { result::malloc_sync(len * 4) }?);
            }
        }
        Ok(OnDevice { lists })
    }

    /// Lists of each tensor: t, g, v_1 .. v_K, and the blend.
    fn tensors(&self) -> impl Iterator<Item = (usize, &[sys::CUdeviceptr])> {
        LENGTHS.into_iter().zip(self.lists.chunks(K + 3))
    }

    /// Puts copies of the gradients on a stream.
    ///
    /// # Safety
    /// The stream's context is current.
    unsafe fn upload(&self, host: &Host, stream: sys::CUstream) -> Result<()> {
        for ((_, lists), host) in self.tensors().zip(host.chunks(K + 2)) {
            for (list, host) in lists.iter().zip(host) {
                // SAFETY: both have as many elements; the driver copies from pageable memory before it returns.
                unsafe { result::memcpy_htod_async(*list, host, stream) }?;
            }
        }
        Ok(())
    }

    fn plan(&self, blender: &Blender) -> Result<Plan<'static>> {
        let tensors: Vec<TensorGrads<'_>> = self
            .tensors()
            .map(|(len, lists)| {
                let modalities: Vec<*const c_void> = lists[2..2 + K].iter().map(|v| *v as *const c_void).collect();
                let (t, g, blended) =
                    (lists[0] as *const c_void, lists[1] as *const c_void, lists[2 + K] as *mut c_void);
                // SAFETY: `len` f32 each, on the device, freed after the plan is dropped. Events order what else uses them.
                unsafe { TensorGrads::from_raw(len as u64, DType::F32, t, g, &modalities, blended) }
            })
            .collect();
        Ok(blender.plan(&tensors)?)
    }
}

/// What a trainer would compute: a train gradient, a validation gradient near it, and one gradient for each loss.
fn gradients(random: &mut ChaCha8Rng) -> Host {
    let mut host = Host::new();
    for len in LENGTHS {
        let truth: Vec<f32> = (0..len).map(|_| random.random_range(-1.0..1.0)).collect();
        for noise in [0.5, 0.2, 2.0, 0.7, 1.0] {
            host.push(truth.iter().map(|x| x + noise * random.random_range(-1.0..1.0_f32)).collect());
        }
    }
    host
}

/// The same step on the CPU, and the blend of each tensor.
fn on_cpu(blender: &mut Blender, host: &Host) -> Result<Vec<Vec<f32>>> {
    let mut blended: Vec<Vec<f32>> = LENGTHS.into_iter().map(|len| vec![0.0; len]).collect();
    let tensors: Vec<TensorGrads<'_>> = host
        .chunks(K + 2)
        .zip(&mut blended)
        .map(|(lists, blended)| {
            let modalities: Vec<Option<&[f32]>> = lists[2..].iter().map(|v| Some(v.as_slice())).collect();
            TensorGrads::new(&lists[0], &lists[1], &modalities).blended(blended)
        })
        .collect();
    let plan = blender.plan(&tensors)?;
    blender.step(&plan, Stream::default())?;
    drop((plan, tensors));
    Ok(blended)
}

fn main() -> Result<()> {
    let ordinal = std::env::args().nth(1).map_or(Ok(0), |word| word.parse()).context("DEVICE is a number")?;
    let mut blender = Blender::new(&Device::cuda(ordinal)?, Config::new(K as u32))?;
    let mut reference = Blender::new(&Device::cpu(), Config::new(K as u32))?;

    // What a framework has anyway: a context, streams, events and buffers. The blender borrows them.
    let device = result::device::get(ordinal)?;
    // SAFETY: the device exists, and its primary context is retained until the end.
    let context = unsafe { result::primary_ctx::retain(device) }?;
    // SAFETY: the context was just retained.
    unsafe { result::ctx::set_current(context) }?;
    let new_stream = || result::stream::create(result::stream::StreamKind::NonBlocking);
    let (copies, compute) = (new_stream()?, new_stream()?);
    let no_timing = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
    let event = || result::event::create(no_timing);
    let (ready, done) = ([event()?, event()?], [event()?, event()?]);
    // SAFETY: a context is current.
    let buffers = unsafe { [OnDevice::new()?, OnDevice::new()?] };
    let plans = [buffers[0].plan(&blender)?, buffers[1].plan(&blender)?];
    // SAFETY: alive until the end of `main`, of the device that the blender is on.
    let stream = unsafe { Stream::from_raw(compute.cast()) };

    let mut random = ChaCha8Rng::seed_from_u64(1905);
    let mut blended = Vec::new();
    for step in 0..STEPS {
        let (host, turn) = (gradients(&mut random), step % 2);
        let (ready, done) = (ready[turn], done[turn]);
        // SAFETY: events and streams of the context that is current. The step before the last has read these buffers
        // before they are written again, and they are written before this step reads them.
        unsafe {
            result::stream::wait_event(copies, done, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT)?;
            buffers[turn].upload(&host, copies)?;
            result::event::record(ready, copies)?;
            result::stream::wait_event(compute, ready, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT)?;
            blender.step(&plans[turn], stream)?;
            blender.reweight(stream)?;
            result::event::record(done, compute)?;
        }
        blended = on_cpu(&mut reference, &host)?;
        reference.reweight(Stream::default())?;
    }

    // The only waits: for the report, and for the last blend.
    let (report, expected) = (blender.report(stream)?, reference.report(Stream::default())?);
    println!("          weights on the GPU   on the CPU");
    for (k, (got, want)) in report.weights.iter().zip(&expected.weights).enumerate() {
        println!("modality {k}        {got:.8}   {want:.8}");
        ensure!((got - want).abs() < 1e-4, "weights of modality {k} differ");
    }
    for ((len, lists), want) in buffers[(STEPS - 1) % 2].tensors().zip(&blended) {
        let mut got = vec![0.0_f32; len];
        // SAFETY: `len` f32 on both sides, and the report has waited for the stream.
        unsafe { result::memcpy_dtoh_sync(&mut got, lists[2 + K]) }?;
        let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        ensure!(worst < 1e-4, "blends differ by {worst}");
    }
    println!(
        "{STEPS} steps of {} elements agree, OGR of the blend {:.3}",
        LENGTHS.iter().sum::<usize>(),
        report.ogr_blend
    );

    drop((plans, blender));
    for list in buffers.iter().flat_map(|buffer| &buffer.lists) {
        // SAFETY: allocated above; dropping the plans has waited for all work.
        unsafe { result::free_sync(*list) }?;
    }
    for event in ready.into_iter().chain(done) {
        // SAFETY: created above, and nothing is pending.
        unsafe { result::event::destroy(event) }?;
    }
    // SAFETY: created and retained above, given back once.
    unsafe {
        result::stream::destroy(copies)?;
        result::stream::destroy(compute)?;
        Ok(result::primary_ctx::release(device)?)
    }
}
