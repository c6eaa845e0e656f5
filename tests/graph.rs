//! CUDA graphs: every run call can be captured, and what cannot be says so without spoiling the capture.
//!
//! In a program of their own, one after the other: what waits for all work of a device, as the end of a blender that is in
//! a graph does, spoils the captures of all threads.
#![cfg(feature = "cuda")]

use gradblend::{Blender, Error, Pass, Plan, Stream, TensorGrads};
use gradblend_testkit::cuda::{Own, alone_on_cuda};
use gradblend_testkit::{Face, Outcome, Random, Tensor, bits};

type Operation = fn(&mut Blender, &Plan<'_>, Stream) -> Result<()>;

const OPERATIONS: [(&str, Operation); 10] = [
    ("dot", |blender, plan, stream| blender.dot(plan, stream)),
    ("blend", |blender, plan, stream| blender.blend(plan, stream)),
    ("accumulate", |blender, plan, stream| blender.pass(plan, Pass::BLEND | Pass::ACCUMULATE, stream)),
    ("step", |blender, plan, stream| blender.step(plan, stream)),
    ("observe", |blender, _, stream| blender.observe(stream)),
    ("reweight", |blender, _, stream| blender.reweight(stream)),
    ("reset", |blender, _, stream| blender.reset(stream)),
    ("set_weights", |blender, _, stream| blender.set_weights(&[0.5, 2.0, -1.0], stream)),
    ("dot, observe, reweight, blend", |blender, plan, stream| {
        blender.dot(plan, stream)?;
        blender.observe(stream)?;
        blender.reweight(stream)?;
        blender.blend(plan, stream)
    }),
    ("step, reweight", |blender, plan, stream| {
        blender.step(plan, stream)?;
        blender.reweight(stream)
    }),
];

fn tensors(seed: u64, absent: usize) -> Vec<Tensor<f32>> {
    let mut random = Random(seed);
    [70_000, 0, 3000, 17].map(|len| Tensor::random(&mut random, len, 3, 1, absent)).into()
}

fn blends(tensors: &[Tensor<f32>]) -> Vec<Vec<u32>> {
    tensors.iter().map(|tensor| bits(&tensor.blended)).collect()
}

/// A blender that has seen something.
fn seasoned(face: Face) -> Result<Blender> {
    let mut blender = face.blender(3)?;
    face.run(&mut blender, &mut tensors(90, 0), TestBlender::step)?;
    Ok(blender)
}

#[test]
fn replays_do_what_calls_do() -> Outcome {
    alone_on_cuda(|face| {
        for (name, operation) in OPERATIONS {
            let own = Own::new();
            let (mut called, mut replayed) = (tensors(91, 4), tensors(91, 4));
            let mut caller = seasoned(face)?;
            face.run(&mut caller, &mut called, |blender, plan, stream| {
                (0..3).try_for_each(|_| operation(blender, plan, stream))
            })?;
            let mut blender = seasoned(face)?;
            let mut lists = face.place(&mut replayed);
            let plan = blender.plan(&lists.grads())?;
            let before = blender.save(own.stream())?;
            let graph = own.capture(|stream| operation(&mut blender, &plan, stream))?;
            assert_eq!(blender.save(own.stream())?, before, "{name}: a capture runs nothing");
            (0..3).for_each(|_| own.launch(&graph));
            assert_eq!(blender.save(own.stream())?, caller.save(Stream::default())?, "{name}");
            drop((graph, plan));
            lists.fetch();
            assert_eq!(blends(&replayed), blends(&called), "{name}");
        }
        Ok(())
    })
}

/// A graph that was captured before an update works on the new addresses, and on what is absent now.
#[test]
fn graphs_see_updates() -> Outcome {
    alone_on_cuda(|face| {
        let own = Own::new();
        let (mut first, mut second, mut called) = (tensors(92, 0), tensors(93, 2), tensors(93, 2));
        let untouched = blends(&first);
        let mut blender = face.blender(3)?;
        let (mut first_lists, mut second_lists) = (face.place(&mut first), face.place(&mut second));
        let mut plan = blender.plan(&first_lists.grads())?;
        let graph = own.capture(|stream| blender.step(&plan, stream))?;
        plan.update(&second_lists.grads(), own.stream())?;
        own.launch(&graph);
        own.launch(&graph);
        let saved = blender.save(own.stream())?;
        drop((graph, plan));
        first_lists.fetch();
        second_lists.fetch();
        let mut caller = face.blender(3)?;
        face.run(&mut caller, &mut called, |blender, plan, stream| {
            blender.step(plan, stream)?;
            blender.step(plan, stream)
        })?;
        assert_eq!(saved, caller.save(Stream::default())?);
        assert_eq!(blends(&second), blends(&called));
        assert_eq!(blends(&first), untouched, "the old addresses are forgotten");
        Ok(())
    })
}

/// Nor does the end of a blender and of a plan that are in no graph spoil the capture of another.
#[test]
fn drops_do_not_spoil_captures() -> Outcome {
    alone_on_cuda(|face| {
        let own = Own::new();
        let (mut all, mut others) = (tensors(98, 0), tensors(99, 0));
        let (mut lists, mut other_lists) = (face.place(&mut all), face.place(&mut others));
        let (mut blender, mut other) = (face.blender(3)?, face.blender(3)?);
        let (plan, other_plan) = (blender.plan(&lists.grads())?, other.plan(&other_lists.grads())?);
        other.step(&other_plan, Stream::default())?;
        own.capture(|stream| {
            drop((other, other_plan));
            blender.step(&plan, stream)
        })?;
        Ok(())
    })
}

fn refused<T: std::fmt::Debug>(result: Result<T>) {
    assert!(matches!(result, Err(Error::Capturing { .. })), "{result:?}");
}

/// What has to wait or to copy is refused on a stream that captures, and the capture goes on.
#[test]
fn what_cannot_be_captured_is_refused() -> Outcome {
    alone_on_cuda(|face| {
        let own = Own::new();
        let (mut all, mut others, mut called) = (tensors(94, 0), tensors(95, 0), tensors(94, 0));
        let (mut blender, mut caller) = (seasoned(face)?, seasoned(face)?);
        face.run(&mut caller, &mut called, TestBlender::step)?;
        let saved = blender.save(own.stream())?;
        let (mut lists, mut other_lists) = (face.place(&mut all), face.place(&mut others));
        let grads = other_lists.grads();
        let mut plan = blender.plan(&lists.grads())?;
        let mut host = tensors(96, 0);
        let slices: Vec<TensorGrads<'_>> = host.iter_mut().map(Tensor::grads).collect();
        // A device that does not read the host's memory takes no slices at all.
        let of_slices = blender.plan(&slices).ok();
        let graph = own.capture(|stream| {
            refused(blender.report(stream));
            refused(blender.second_moments(stream));
            refused(blender.save(stream));
            refused(blender.load(&saved, stream));
            refused(plan.update(&grads, stream));
            if let Some(of_slices) = &of_slices {
                refused(blender.step(of_slices, stream));
            }
            blender.step(&plan, stream)
        })?;
        assert_eq!(blender.save(own.stream())?, saved, "nothing has happened");
        own.launch(&graph);
        assert_eq!(blender.save(own.stream())?, caller.save(Stream::default())?);
        drop((graph, plan, of_slices));
        lists.fetch();
        assert_eq!(blends(&all), blends(&called), "the plan has its own addresses");
        Ok(())
    })
}

/// A capture leaves other streams, other blenders, and the making of more of them alone.
#[test]
fn captures_do_not_forbid_other_work() -> Outcome {
    alone_on_cuda(|face| {
        let (own, other) = (Own::new(), Own::new());
        let (mut all, mut more, mut called) = (tensors(97, 0), tensors(97, 0), tensors(97, 0));
        let (mut blender, mut caller) = (face.blender(3)?, face.blender(3)?);
        face.run(&mut caller, &mut called, TestBlender::step)?;
        let (mut lists, mut more_lists) = (face.place(&mut all), face.place(&mut more));
        let plan = blender.plan(&lists.grads())?;
        let grads = more_lists.grads();
        let mut made = None;
        let graph = own.capture(|stream| {
            let mut second = face.blender(3)?;
            let second_plan = second.plan(&grads)?;
            second.step(&second_plan, other.stream())?;
            assert_eq!(second.save(other.stream())?, caller.save(other.stream())?);
            made = Some((second, second_plan));
            blender.step(&plan, stream)
        })?;
        own.launch(&graph);
        assert_eq!(blender.save(own.stream())?, caller.save(Stream::default())?);
        Ok(())
    })
}
