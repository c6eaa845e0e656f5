//! Plans of cudarc's memory: made without `unsafe`, and ordered with cudarc's other work by its own events.
#![cfg(feature = "cuda")]

use std::sync::Arc;

use cudarc::driver::sys::CUstreamCaptureMode;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DriverError};
use gradblend::{Blender, Config, DType, Device, Error, Gradient, GradientMut, Pass, Stream, StreamRef, TensorGrads};
use gradblend_testkit::Outcome;
use gradblend_testkit::cuda::on_cuda;

/// Elements: several thread blocks, so that work takes more than one step of the emulator.
const LEN: usize = 70_000;

/// t, g, v_1 and the blended gradient.
struct Buffers([CudaSlice<f32>; 4]);

impl Buffers {
    /// Submits copies to a stream; nothing waits for them.
    fn new(stream: &Arc<CudaStream>, scale: f32) -> Result<Self, DriverError> {
        let host = |i: usize| (0..LEN).map(|at| scale * ((at * (i + 3)) as f32).sin()).collect::<Vec<_>>();
        let [t, g, v] = [host(0), host(1), host(2)];
        Ok(Buffers([stream.clone_htod(&t)?, stream.clone_htod(&g)?, stream.clone_htod(&v)?, stream.alloc_zeros(LEN)?]))
    }

    fn tensor<'a>(&'a mut self, stream: &'a CudaStream) -> TensorGrads<'a> {
        let [t, g, v, blended] = &mut self.0;
        let of = |slice| Some(Gradient::cuda(slice, stream));
        let shape = (LEN as u64, DType::F32);
        TensorGrads::from_gradients(shape, of(t), of(g), [of(v)], Some(GradientMut::cuda(blended, stream)))
    }
}

/// The second half of a slice.
fn half<'a>(slice: &'a CudaSlice<f32>, stream: &'a CudaStream) -> Option<Gradient<'a>> {
    Some(Gradient::cuda_view(slice.slice(LEN / 2..), stream))
}

fn blender() -> gradblend::Result<Blender> {
    Blender::new(&Device::cuda(0)?, Config::new(1))
}

#[test]
fn cudarc_waits_for_passes_and_passes_for_cudarc() -> Outcome {
    on_cuda(|_| {
        let context = CudaContext::new(0)?;
        let (copies, compute) = (context.new_stream()?, context.new_stream()?);
        let mut blender = blender()?;
        let mut buffers = Buffers::new(&copies, 1.0)?;
        let plan = blender.plan([buffers.tensor(&compute)])?;
        blender.step(&plan, (&compute).into())?;
        // Nothing depends on the drop of the plan.
        std::mem::forget(plan);
        // The stream of the copies waits for the pass before it reads, and before it writes to its inputs.
        let blended = copies.clone_dtoh(&buffers.0[3])?;
        let v = copies.clone_dtoh(&buffers.0[2])?;
        copies.memcpy_htod(&vec![f32::NAN; LEN], &mut buffers.0[0])?;
        drop(buffers);
        copies.synchronize()?;
        assert!(v.iter().any(|v| *v != 0.0) && blended == v, "K = 1 has the weight 1");
        let report = blender.report((&copies).into())?;
        assert_eq!((report.observed, report.skipped), (1, 0));
        Ok(())
    })
}

/// A blender makes each stream wait for its work on the stream before.
#[test]
fn one_blender_on_several_streams() -> Outcome {
    on_cuda(|_| {
        let context = CudaContext::new(0)?;
        let streams = [context.new_stream()?, context.new_stream()?, context.new_stream()?];
        let (mut one, mut many) = (blender()?, blender()?);
        let stream = |step: usize| &streams[step % 3];
        let new = |step: usize| Buffers::new(stream(step), 1.0 + step as f32);
        let mut buffers = (0..12).map(|step| Ok((new(step)?, new(step)?))).collect::<Result<Vec<_>, DriverError>>()?;
        let mut plans = Vec::new();
        for (step, (first, second)) in buffers.iter_mut().enumerate() {
            let (own, stream) = (stream(0), stream(step));
            plans.push((one.plan([first.tensor(own)])?, many.plan([second.tensor(stream)])?));
        }
        // Dropping a plan waits for the blender's work, so all stay alive.
        for (step, (first, second)) in plans.iter().enumerate() {
            one.step(first, stream(0).into())?;
            one.reweight(stream(0).into())?;
            many.step(second, stream(step).into())?;
            many.reweight(stream(step + 2).into())?;
        }
        assert_eq!(one.report(Stream::default())?, many.report(Stream::default())?);
        assert_eq!(one.save(Stream::default())?, many.save((&streams[1]).into())?);
        Ok(())
    })
}

#[test]
fn a_plan_stays_on_its_stream() -> Outcome {
    on_cuda(|_| {
        let context = CudaContext::new(0)?;
        let (own, other) = (context.new_stream()?, context.new_stream()?);
        let mut blender = blender()?;
        let [mut first, mut second, mut third] =
            [Buffers::new(&own, 1.0)?, Buffers::new(&own, 2.0)?, Buffers::new(&own, 3.0)?];
        let foreign = blender.plan([first.tensor(&own), second.tensor(&other)]);
        assert_eq!(foreign.err(), Some(Error::ForeignStream));
        let mut plan = blender.plan([first.tensor(&own)])?;
        for stream in [StreamRef::from(&other), Stream::default()] {
            assert_eq!(blender.step(&plan, stream), Err(Error::ForeignStream));
        }
        assert_eq!(plan.update([third.tensor(&other)], (&own).into()), Err(Error::ForeignStream));
        let on_cpu = Blender::new(&Device::cpu(), Config::new(1))?.plan([second.tensor(&own)]).err();
        assert!(matches!(on_cpu, Some(Error::DeviceMemory { .. })), "{on_cpu:?}");
        // Objects of two contexts of cudarc do not know of each other.
        let context = CudaContext::new(0)?;
        let stranger = context.new_stream()?;
        assert_eq!(blender.plan([second.tensor(&stranger)]).err(), Some(Error::ForeignStream));
        // It stayed as it was.
        blender.step(&plan, (&own).into())?;
        own.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
        let captured = blender.pass(&plan, Pass::BLEND, (&own).into());
        assert_eq!(captured, Err(Error::Capturing { what: "a plan of cudarc's memory" }));
        own.end_capture(
            cudarc::driver::sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH,
        )?;
        assert_eq!(blender.report((&own).into())?.observed, 1);
        // Parts of memory, and on another stream after a release.
        let mut plan = plan.release();
        let mut fourth = Buffers::new(&other, 4.0)?;
        plan.update([fourth.tensor(&other)], (&other).into())?;
        blender.step(&plan, (&other).into())?;
        drop(plan);
        let [t, g, v, blended] = &mut fourth.0;
        let (shape, out) = ((LEN as u64 / 2, DType::F32), GradientMut::cuda_view(blended.slice_mut(LEN / 2..), &other));
        let (t, g, v) = (half(t, &other), half(g, &other), half(v, &other));
        let plan = blender.plan([TensorGrads::from_gradients(shape, t, g, [v], Some(out))])?;
        blender.step(&plan, (&other).into())?;
        drop(plan);
        assert_eq!(blender.report((&own).into())?.observed, 3);
        Ok(())
    })
}
