//! CUDA graphs: every run call can be captured, and what cannot be captured is rejected without ending the capture.
//!
//! These tests run one after another, in a program of their own: a call that waits for all work of a device, as the drop
//! of a blender that is part of a graph does, invalidates the captures of all threads.
#![cfg(feature = "cuda")]

use gradblend::{Error, Pass};
use gradblend_testkit::cuda::{OwnStream, alone_on_cuda};
use gradblend_testkit::{Face, Input, Outcome, Random, Result, Tensor, TestBlender, TestPlan, bits, rejected_as};

type Operation = fn(&mut TestBlender, &TestPlan<'_>) -> Result<()>;

const OPERATIONS: [(&str, Operation); 10] = [
    ("dot", TestBlender::dot),
    ("blend", TestBlender::blend),
    ("accumulate", TestBlender::accumulate),
    ("step", TestBlender::step),
    ("observe", |blender, _| blender.observe()),
    ("reweight", |blender, _| blender.reweight()),
    ("reset", |blender, _| blender.reset()),
    ("set_weights", |blender, _| blender.set_weights(&[0.5, 2.0, -1.0])),
    ("dot, observe, reweight, blend", |blender, plan| {
        blender.dot(plan)?;
        blender.observe()?;
        blender.reweight()?;
        blender.blend(plan)
    }),
    ("pass of all, reweight", |blender, plan| {
        blender.pass(plan, Pass::all())?;
        blender.reweight()
    }),
];

fn tensors(seed: u64, absent: usize) -> Vec<Tensor<f32>> {
    let mut random = Random(seed);
    [70_000, 0, 3000, 17].map(|len| Tensor::random(&mut random, len, 3, 1, absent)).into()
}

fn blends(tensors: &[Tensor<f32>]) -> Vec<Vec<u32>> {
    tensors.iter().map(|tensor| bits(&tensor.blended)).collect()
}

/// A blender with an observation.
fn observed(face: Face) -> Result<TestBlender> {
    let mut blender = face.blender(3)?;
    face.run(&mut blender, &mut tensors(90, 0), TestBlender::step)?;
    Ok(blender)
}

#[test]
fn replays_do_what_calls_do() -> Outcome {
    alone_on_cuda(|face| {
        for (name, operation) in OPERATIONS {
            let own = OwnStream::default();
            let (mut called, mut replayed) = (tensors(91, 4), tensors(91, 4));
            let mut caller = observed(face)?;
            face.run(&mut caller, &mut called, |blender, plan| (0..3).try_for_each(|_| operation(blender, plan)))?;
            let mut blender = observed(face)?;
            blender.stream = own.stream();
            let mut uploaded = face.upload(&mut replayed);
            let plan = blender.plan(uploaded.inputs())?;
            let before = blender.save()?;
            let graph = own.capture(|| operation(&mut blender, &plan))?;
            assert_eq!(blender.save()?, before, "{name}: a capture runs nothing");
            (0..3).for_each(|_| own.launch(&graph));
            assert_eq!(blender.save()?, caller.save()?, "{name}");
            drop((graph, plan));
            uploaded.fetch();
            assert_eq!(blends(&replayed), blends(&called), "{name}");
        }
        Ok(())
    })
}

/// A graph that was captured before an update uses the new addresses, and the modalities that are present now.
#[test]
fn graphs_see_updates() -> Outcome {
    alone_on_cuda(|face| {
        let own = OwnStream::default();
        let (mut first, mut second, mut called) = (tensors(92, 0), tensors(93, 2), tensors(93, 2));
        let untouched = blends(&first);
        let mut blender = face.blender(3)?;
        blender.stream = own.stream();
        let (mut first_uploaded, mut second_uploaded) = (face.upload(&mut first), face.upload(&mut second));
        let mut plan = blender.plan(first_uploaded.inputs())?;
        let graph = own.capture(|| blender.step(&plan))?;
        plan.update(second_uploaded.inputs(), own.stream())?;
        own.launch(&graph);
        own.launch(&graph);
        let saved = blender.save()?;
        drop((graph, plan));
        first_uploaded.fetch();
        second_uploaded.fetch();
        let mut caller = face.blender(3)?;
        face.run(&mut caller, &mut called, |blender, plan| {
            blender.step(plan)?;
            blender.step(plan)
        })?;
        assert_eq!(saved, caller.save()?);
        assert_eq!(blends(&second), blends(&called));
        assert_eq!(blends(&first), untouched, "the old addresses are not used");
        Ok(())
    })
}

/// The drop of a blender and of a plan that are part of no graph leaves the capture of another valid.
#[test]
fn drops_do_not_invalidate_captures() -> Outcome {
    alone_on_cuda(|face| {
        let own = OwnStream::default();
        let (mut all, mut others) = (tensors(98, 0), tensors(99, 0));
        let (mut uploaded, mut other_uploaded) = (face.upload(&mut all), face.upload(&mut others));
        let (mut blender, mut other) = (face.blender(3)?, face.blender(3)?);
        blender.stream = own.stream();
        let (plan, other_plan) = (blender.plan(uploaded.inputs())?, other.plan(other_uploaded.inputs())?);
        other.step(&other_plan)?;
        own.capture(|| {
            drop((other, other_plan));
            blender.step(&plan)
        })?;
        Ok(())
    })
}

/// A call that waits or copies from the host is rejected on a stream that captures, and the capture continues.
#[test]
fn what_cannot_be_captured_is_rejected() -> Outcome {
    fn capturing<T: std::fmt::Debug>(result: Result<T>) {
        let failure = rejected_as(result, 1, "cannot be captured");
        assert!(matches!(failure.error, Some(Error::Capturing { .. })), "{failure:?}");
    }
    alone_on_cuda(|face| {
        let own = OwnStream::default();
        let (mut all, mut others, mut called) = (tensors(94, 0), tensors(95, 0), tensors(94, 0));
        let (mut blender, mut caller) = (observed(face)?, observed(face)?);
        blender.stream = own.stream();
        face.run(&mut caller, &mut called, TestBlender::step)?;
        let saved = blender.save()?;
        let (mut uploaded, mut other_uploaded) = (face.upload(&mut all), face.upload(&mut others));
        let mut plan = blender.plan(uploaded.inputs())?;
        let mut host = tensors(96, 0);
        // A device that cannot read the host's memory rejects slices altogether.
        let of_slices = blender.plan(host.iter_mut().map(|tensor| Input::Slices(tensor.grads())).collect()).ok();
        let graph = own.capture(|| {
            capturing(blender.report());
            capturing(blender.second_moments());
            capturing(blender.save());
            capturing(blender.load(&saved));
            capturing(plan.update(other_uploaded.inputs(), own.stream()));
            if let Some(of_slices) = &of_slices {
                capturing(blender.step(of_slices));
            }
            blender.step(&plan)
        })?;
        assert_eq!(blender.save()?, saved, "nothing has run");
        own.launch(&graph);
        assert_eq!(blender.save()?, caller.save()?);
        drop((graph, plan, of_slices));
        uploaded.fetch();
        assert_eq!(blends(&all), blends(&called), "the plan keeps its addresses");
        Ok(())
    })
}

/// During a capture, other streams and other blenders work, and more of them can be made.
#[test]
fn captures_do_not_forbid_other_work() -> Outcome {
    alone_on_cuda(|face| {
        let (own, other) = (OwnStream::default(), OwnStream::default());
        let (mut all, mut more, mut called) = (tensors(97, 0), tensors(97, 0), tensors(97, 0));
        let (mut blender, mut caller) = (face.blender(3)?, face.blender(3)?);
        blender.stream = own.stream();
        face.run(&mut caller, &mut called, TestBlender::step)?;
        caller.stream = other.stream();
        let (mut uploaded, mut more_uploaded) = (face.upload(&mut all), face.upload(&mut more));
        let plan = blender.plan(uploaded.inputs())?;
        let inputs = more_uploaded.inputs();
        let mut made = None;
        let graph = own.capture(|| {
            let mut second = face.blender(3)?;
            second.stream = other.stream();
            let second_plan = second.plan(inputs)?;
            second.step(&second_plan)?;
            assert_eq!(second.save()?, caller.save()?);
            made = Some((second, second_plan));
            blender.step(&plan)
        })?;
        own.launch(&graph);
        assert_eq!(blender.save()?, caller.save()?);
        Ok(())
    })
}
