//! This crate, wherever it runs.

use std::ffi::c_void;

use gradblend::{Average, Blender, Config, Plan, Stream, TensorGrads};

use super::Operation;
use super::cases::Tensor;
use super::lists::Real;
use super::oracle::{Bound, Sums};

/// This crate's results: within guarantee 4 of the design, and rounded once.
pub(crate) const BOUND: Bound = Bound { sums: 1.0 / 65536.0, roundings: 0.0, cancels: false, blend: 1.0 };

/// A list of a tensor.
#[derive(Clone, Copy)]
pub(crate) enum Which {
    Train,
    Valid,
    Modality(usize),
    Blended,
}

/// A tensor as this crate takes it, with the lists that take part at the addresses that `at` gives.
///
/// # Safety
/// As of [`TensorGrads::from_raw`].
pub(crate) unsafe fn grads<T: Real>(
    operation: Operation,
    tensor: &Tensor,
    modalities: usize,
    at: impl Fn(Which) -> *const c_void,
) -> TensorGrads<'static> {
    let there = |is: bool, which: Which| if is { at(which) } else { std::ptr::null() };
    let v: Vec<_> = (0..modalities).map(|k| there(tensor.present(k), Which::Modality(k))).collect();
    let dots = tensor.dots(operation);
    let (t, g) = (there(dots, Which::Train), there(dots, Which::Valid));
    let blended = there(operation.blends(), Which::Blended).cast_mut();
    // SAFETY: as the caller's.
    unsafe { TensorGrads::from_raw(tensor.len as u64, T::DTYPE, t, g, &v, blended) }
}

pub(crate) fn config(modalities: usize) -> Config {
    Config { average: Average::Mean, ..Config::new(modalities as u32) }
}

/// A blender with these weights in force.
pub(crate) fn blender(device: &gradblend::Device, config: Config, weights: &[f32]) -> Result<Blender, String> {
    let mut blender = Blender::new(device, config).map_err(|error| error.to_string())?;
    let weights: Vec<f64> = weights.iter().map(|w| f64::from(*w)).collect();
    blender.set_weights(&weights, Stream::default()).map_err(|error| error.to_string())?;
    Ok(blender)
}

/// Puts an operation on a stream; `step` as its three calls if `apart`.
pub(crate) fn call(
    operation: Operation,
    apart: bool,
    blender: &mut Blender,
    plan: &Plan<'_>,
    stream: Stream,
) -> gradblend::Result<()> {
    match operation {
        Operation::Dot => blender.dot(plan, stream),
        Operation::Blend => blender.blend(plan, stream),
        Operation::Step if apart => {
            blender.dot(plan, stream)?;
            blender.blend(plan, stream)?;
            blender.observe(stream)
        }
        Operation::Step => blender.step(plan, stream),
    }
}

/// The sums of a blender's only observation: S_kk is d_k squared.
pub(crate) fn observed(blender: &mut Blender, stream: Stream) -> Sums {
    let report = blender.report(stream).expect("a report");
    assert_eq!(report.observed, 1, "the sums are asked for after one run");
    Sums { c: report.mean, d: report.second_moment.iter().map(|s| s.sqrt()).collect(), unsigned: true }
}
