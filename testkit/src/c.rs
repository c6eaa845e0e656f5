//! The records of `include/gradblend.h`, and the C functions without a handle.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr::null;

use gradblend::dlpack::Dlpack;
use gradblend::{Average, Cadence, Config, DType, Flags, Negative, Overfitting, Policy, Solution, ffi};

use crate::failure::{Failure, Result};
use crate::{Addresses, Input};

/// The C record of a configuration.
pub fn config(config: &Config) -> Result<ffi::gradblend_config> {
    let mut record = MaybeUninit::zeroed();
    // SAFETY: room for one record, of numbers alone; the call fills the fields of the first version.
    let mut record = unsafe {
        Failure::check(ffi::gradblend_config_default(config.modalities, record.as_mut_ptr()))?;
        record.assume_init()
    };
    (record.average, record.decay) = match config.average {
        Average::Mean => (0, f64::NAN),
        Average::Ema { decay } => (1, decay),
    };
    record.overfitting = i32::from(config.policy.overfitting == Overfitting::Correlated);
    record.negative = i32::from(config.policy.negative == Negative::Signed);
    record.damping = config.policy.damping;
    record.min_weight = config.policy.min_weight;
    record.size = size_of::<ffi::gradblend_config>() as u32;
    record.cadence = i32::from(config.cadence == Cadence::EveryObservation);
    record.threads = config.threads;
    Ok(record)
}

/// `gradblend_solve`.
pub(crate) fn solve(numerator: &[f64], second_moment: &[f64], policy: &Policy) -> Result<Solution> {
    let config = config(&Config { policy: *policy, ..Config::new(numerator.len() as u32) })?;
    let (mut weights, mut flags) = (vec![0.0; numerator.len()], 0);
    assert_eq!(second_moment.len(), numerator.len() * numerator.len());
    let (m, s, out) = (numerator.as_ptr(), second_moment.as_ptr(), weights.as_mut_ptr());
    // SAFETY: K, K x K and K numbers, and one integer.
    Failure::check(unsafe { ffi::gradblend_solve(&config, m, s, null(), out, &mut flags) })?;
    let flags = Flags::from_bits_retain(flags);
    let held = flags.contains(Flags::HELD);
    assert!(!held || weights.iter().all(|w| *w == 1.0 / weights.len() as f64), "held weights are uniform");
    Ok(Solution { weights: (!held).then_some(weights), flags })
}

/// `gradblend_tensor_from_dlpack`.
///
/// # Safety
/// As for [`gradblend::TensorGrads::from_dlpack`].
pub(crate) unsafe fn from_dlpack(
    device: i32,
    train: Option<Dlpack>,
    valid: Option<Dlpack>,
    modalities: &[Option<Dlpack>],
    blended: Option<Dlpack>,
) -> Result<Addresses> {
    let record = |array: &Option<Dlpack>| {
        let (managed, versioned) = match array {
            None => (null(), null()),
            Some(Dlpack::Managed(managed)) => (*managed, null()),
            Some(Dlpack::Versioned(versioned)) => (null(), *versioned),
        };
        ffi::gradblend_dlpack { managed, versioned }
    };
    let (train, valid, blended) = (record(&train), record(&valid), record(&blended));
    let gradients: Vec<_> = modalities.iter().map(record).collect();
    let unwritten = std::ptr::without_provenance::<c_void>(0xa5a5);
    let mut addresses = vec![unwritten; modalities.len()];
    let mut tensor = ffi::gradblend_tensor {
        len: 77,
        dtype: 77,
        train: unwritten,
        valid: unwritten,
        modalities: null(),
        blended: unwritten.cast_mut(),
    };
    let (k, v, out) = (modalities.len() as u32, gradients.as_ptr(), addresses.as_mut_ptr());
    // SAFETY: records of the right types and room for K addresses and one tensor; the DLPack records are live, as this function asks.
    let status = unsafe { ffi::gradblend_tensor_from_dlpack(device, k, &train, &valid, v, &blended, out, &mut tensor) };
    if status != 0 {
        let same = (tensor.len, tensor.dtype, tensor.train, tensor.valid, tensor.blended);
        assert_eq!(same, (77, 77, unwritten, unwritten, unwritten.cast_mut()), "a rejected call writes nothing");
        assert!(tensor.modalities.is_null() && addresses.iter().all(|address| *address == unwritten));
    }
    Failure::check(status)?;
    assert_eq!(tensor.modalities, addresses.as_ptr());
    Ok(Addresses {
        len: tensor.len,
        dtype: DType::try_from(tensor.dtype)?,
        train: tensor.train,
        valid: tensor.valid,
        modalities: addresses,
        blended: tensor.blended,
    })
}

/// The C records of tensors, and the addresses that they point to.
pub(crate) fn records(inputs: Vec<Input<'_>>) -> (Vec<ffi::gradblend_tensor>, Vec<Addresses>) {
    let record = |input| match input {
        Input::Addresses(a) => {
            let (train, valid, modalities, blended) = (a.train, a.valid, a.modalities.as_ptr(), a.blended);
            (ffi::gradblend_tensor { len: a.len, dtype: a.dtype as i32, train, valid, modalities, blended }, a)
        }
        Input::Slices(_) => unreachable!("C takes addresses"),
    };
    inputs.into_iter().map(record).unzip()
}
