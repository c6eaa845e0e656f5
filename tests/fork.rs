//! A forked process cannot use the blenders and plans of its parent: each call is an error, and a drop does nothing.
#![cfg(unix)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use gradblend::{Blender, Config, Device, Error, GradScale, Pass, Plan, Stream, TensorGrads};
use gradblend_testkit::Outcome;

const LEN: usize = 100_000;
const K: u32 = 2;

/// Runs a body in a forked process. An alarm ends one that hangs. The tests of this file take turns, because a forked
/// process cannot take a lock that another thread of its parent holds.
fn in_child(body: impl FnOnce() -> Outcome) {
    // SAFETY: the child has one thread. It calls what the allocator of glibc and the standard library allow after a fork.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "{}", std::io::Error::last_os_error());
    if child == 0 {
        // SAFETY: the call takes a number alone.
        unsafe { libc::alarm(120) };
        let passed = match catch_unwind(AssertUnwindSafe(body)) {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                eprintln!("in the forked process: {error:?}");
                false
            }
            Err(_) => false,
        };
        // SAFETY: nothing of the parent is to be cleaned up here.
        unsafe { libc::_exit(i32::from(!passed)) };
    }
    let mut status = 0;
    // SAFETY: `status` is a valid out-pointer for one int.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "status of the forked process: a signal if below 256");
}

fn alone() -> impl Sized {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[track_caller]
fn forked<T: std::fmt::Debug>(result: gradblend::Result<T>, what: &str) {
    let told = matches!(&result, Err(error @ Error::Forked { .. }) if error.to_string().contains(what));
    assert!(told, "expected an error about a {what} and a fork, got {result:?}");
}

/// Every call on the values of a parent.
fn check_calls(blender: &mut Blender, plan: &mut Plan<'_>) {
    let (stream, saved) = (Stream::default(), vec![0; blender.saved_bytes()]);
    for what in [Pass::DOT, Pass::BLEND, Pass::OBSERVE, Pass::DOT | Pass::BLEND | Pass::OBSERVE] {
        forked(blender.pass(plan, what, stream), "blender");
    }
    forked(blender.dot(plan, stream), "blender");
    forked(blender.blend(plan, stream), "blender");
    forked(blender.step(plan, stream), "blender");
    forked(blender.observe(stream), "blender");
    forked(blender.reweight(stream), "blender");
    forked(blender.reset(stream), "blender");
    forked(blender.set_weights(&[0.25, 0.75], stream), "blender");
    forked(blender.set_grad_scale(GradScale::default()), "blender");
    forked(blender.report(stream), "blender");
    forked(blender.second_moments(stream), "blender");
    forked(blender.save(stream), "blender");
    forked(blender.plan([TensorGrads::blend_only::<f32>(&[None, None])]), "blender");
    forked(plan.update([TensorGrads::blend_only::<f32>(&[None, None])], stream), "plan");
    assert!(blender.load(&saved, stream).is_err());
    assert_eq!(blender.config().modalities, K);
}

/// A step on the CPU by a blender of this process.
fn step(threads: u32) -> Outcome {
    let (t, g, v) = (vec![1.0_f32; LEN], vec![0.5; LEN], vec![2.0; LEN]);
    let mut blended = vec![0.0; LEN];
    let mut config = Config::new(K);
    config.threads = threads;
    let mut blender = Blender::new(&Device::cpu(), config)?;
    let plan = blender.plan([TensorGrads::new(&t, &g, &[Some(&v), None]).blended(&mut blended)])?;
    blender.step(&plan, Stream::default())?;
    assert_eq!(blender.report(Stream::default())?.observed, 1);
    drop(plan);
    assert!(blended.iter().all(|value| *value == 1.0));
    Ok(())
}

#[test]
fn cpu() -> Outcome {
    let _alone = alone();
    for threads in [1, 2, 3] {
        let (t, g, v) = (vec![1.0_f32; LEN], vec![0.5; LEN], vec![2.0; LEN]);
        let mut config = Config::new(K);
        config.threads = threads;
        let mut blender = Blender::new(&Device::cpu(), config)?;
        let mut plan = blender.plan([TensorGrads::new(&t, &g, &[Some(&v), None])])?;
        blender.step(&plan, Stream::default())?;
        in_child(|| {
            check_calls(&mut blender, &mut plan);
            step(threads)?;
            let mut own = Blender::new(&Device::cpu(), Config::new(K))?;
            assert_eq!(own.step(&plan, Stream::default()), Err(Error::ForeignPlan));
            // As the parent would: the drops must not wait for its threads.
            // SAFETY: the parent has its own copies, and this process ends without another use.
            unsafe {
                drop(std::ptr::read(&plan));
                drop(std::ptr::read(&blender));
            }
            // A process that is forked from this one is another again.
            in_child(|| {
                forked(own.observe(Stream::default()), "blender");
                step(threads)
            });
            Ok(own.observe(Stream::default())?)
        });
        // The parent goes on.
        blender.step(&plan, Stream::default())?;
        assert_eq!(blender.report(Stream::default())?.observed, 2);
    }
    Ok(())
}

#[cfg(feature = "cuda")]
#[test]
fn cuda() -> Outcome {
    let _alone = alone();
    gradblend_testkit::cuda::alone_on_cuda(|_| {
        let device = Device::cuda(0)?;
        let mut blender = Blender::new(&device, Config::new(K))?;
        let mut plan = blender.plan([TensorGrads::blend_only::<f32>(&[None, None])])?;
        blender.step(&plan, Stream::default())?;
        in_child(|| {
            check_calls(&mut blender, &mut plan);
            forked(Device::cuda(0), "CUDA driver");
            forked(Blender::new(&device, Config::new(K)), "CUDA driver");
            // SAFETY: the parent has its own copies, and this process ends without another use.
            unsafe {
                drop(std::ptr::read(&plan));
                drop(std::ptr::read(&blender));
            }
            step(2)
        });
        blender.step(&plan, Stream::default())?;
        assert_eq!(blender.report(Stream::default())?.observed, 2);
        Ok(())
    })
}
