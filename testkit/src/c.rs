//! Blenders and plans behind the C functions, with the records of `include/gradblend.h`.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};

use gradblend::dlpack::Dlpack;
use gradblend::ffi::{self, Status, gradblend_blender, gradblend_plan};
use gradblend::{
    Average, Cadence, Config, DType, Flags, Negative, Overfitting, Pass, Policy, Report, Solution, Stream,
};

use crate::failure::{Failure, Result};
use crate::{Addresses, Input};

/// A call on a blender.
pub(crate) type Call = unsafe extern "C" fn(*mut gradblend_blender, *mut c_void) -> Status;
/// A call on a blender and a plan.
pub(crate) type Run = unsafe extern "C" fn(*mut gradblend_blender, *const gradblend_plan, *mut c_void) -> Status;

/// The C record of a configuration.
///
/// # Errors
/// Those of `gradblend_config_default`.
pub fn config(config: &Config) -> Result<ffi::gradblend_config> {
    let mut record = MaybeUninit::uninit();
    // SAFETY: room for one record, which the call fills if it succeeds.
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
    // SAFETY: records of the right types and room for K addresses and one tensor; the rest is the caller's promise.
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

/// The C records of tensors, with the addresses that they point to.
fn records(inputs: Vec<Input<'_>>) -> Vec<(ffi::gradblend_tensor, Addresses)> {
    let record = |input| match input {
        Input::Addresses(a) => {
            let (train, valid, modalities, blended) = (a.train, a.valid, a.modalities.as_ptr(), a.blended);
            (ffi::gradblend_tensor { len: a.len, dtype: a.dtype as i32, train, valid, modalities, blended }, a)
        }
        Input::Slices(_) => unreachable!("C takes addresses"),
    };
    inputs.into_iter().map(record).collect()
}

/// A blender's handle.
#[derive(Debug)]
pub(crate) struct CBlender(*mut gradblend_blender);

// SAFETY: a handle is used by one thread at a time, which is all that the header asks.
unsafe impl Send for CBlender {}

impl Drop for CBlender {
    fn drop(&mut self) {
        ffi::gradblend_blender_destroy(self.0);
    }
}

/// A plan's handle.
#[derive(Debug)]
pub struct CPlan<'a>(*mut gradblend_plan, PhantomData<&'a mut [u8]>);

impl Drop for CPlan<'_> {
    fn drop(&mut self) {
        ffi::gradblend_plan_destroy(self.0);
    }
}

impl<'a> CPlan<'a> {
    pub(crate) fn release(self) -> CPlan<'static> {
        let handle = self.0;
        std::mem::forget(self);
        CPlan(handle, PhantomData)
    }

    pub(crate) fn update(&mut self, inputs: Vec<Input<'a>>, stream: Stream) -> Result<()> {
        let inputs = records(inputs);
        let tensors: Vec<_> = inputs.iter().map(|(tensor, _)| *tensor).collect();
        let (address, count) = (tensors.as_ptr(), tensors.len() as u64);
        // SAFETY: as many records; the addresses live in `inputs`, and the buffers as long as this plan.
        Failure::check(unsafe { ffi::gradblend_plan_update(self.0, address, count, stream.as_raw()) })
    }
}

impl CBlender {
    pub(crate) fn new(device: i32, wanted: &Config) -> Result<Self> {
        let (config, mut blender) = (config(wanted)?, null_mut());
        // SAFETY: a record, and room for a handle.
        Failure::check(unsafe { ffi::gradblend_blender_create(device, &config, &mut blender) })?;
        Ok(CBlender(blender))
    }

    pub(crate) fn plan<'a>(&self, inputs: Vec<Input<'a>>) -> Result<CPlan<'a>> {
        let inputs = records(inputs);
        let tensors: Vec<_> = inputs.iter().map(|(tensor, _)| *tensor).collect();
        let mut plan = null_mut();
        // SAFETY: as many records; the addresses live in `inputs`, and the buffers as long as the plan.
        let status = unsafe { ffi::gradblend_plan_create(self.0, tensors.as_ptr(), tensors.len() as u64, &mut plan) };
        assert!(status == 0 || plan.is_null(), "a rejected call writes nothing");
        Failure::check(status)?;
        Ok(CPlan(plan, PhantomData))
    }

    pub(crate) fn run(&mut self, plan: &CPlan<'_>, function: Run, stream: Stream) -> Result<()> {
        // SAFETY: handles, whose buffers the plan borrows.
        Failure::check(unsafe { function(self.0, plan.0, stream.as_raw()) })
    }

    pub(crate) fn pass(&mut self, plan: &CPlan<'_>, what: Pass, stream: Stream) -> Result<()> {
        // SAFETY: handles, whose buffers the plan borrows.
        Failure::check(unsafe { ffi::gradblend_pass(self.0, plan.0, what.bits(), stream.as_raw()) })
    }

    pub(crate) fn call(&mut self, function: Call, stream: Stream) -> Result<()> {
        // SAFETY: a handle.
        Failure::check(unsafe { function(self.0, stream.as_raw()) })
    }

    pub(crate) fn set_weights(&mut self, weights: &[f64], stream: Stream) -> Result<()> {
        let (address, count) = (weights.as_ptr(), weights.len() as u32);
        // SAFETY: a handle and as many numbers.
        Failure::check(unsafe { ffi::gradblend_set_weights(self.0, address, count, stream.as_raw()) })
    }

    /// # Safety
    /// As for [`gradblend::GradScale::from_raw`].
    pub(crate) unsafe fn set_grad_scale(&mut self, scale: *const f32) -> Result<()> {
        // SAFETY: a handle, and the caller's promise.
        Failure::check(unsafe { ffi::gradblend_set_grad_scale(self.0, scale) })
    }

    pub(crate) fn report(&mut self, stream: Stream) -> Result<Report> {
        let mut report = MaybeUninit::<ffi::gradblend_report>::zeroed();
        // SAFETY: a handle and room for one record, of numbers alone; the caller says how large it is.
        let report = unsafe {
            (&raw mut (*report.as_mut_ptr()).size).write(size_of::<ffi::gradblend_report>() as u32);
            Failure::check(ffi::gradblend_get_report(self.0, report.as_mut_ptr(), stream.as_raw()))?;
            report.assume_init()
        };
        assert_eq!(report.size as usize, size_of::<ffi::gradblend_report>());
        let values = |all: [f64; gradblend::MAX_MODALITIES]| {
            let (values, rest) = all.split_at(report.modalities as usize);
            assert!(rest.iter().all(|value| *value == 0.0), "zeros after the K values");
            values.to_vec()
        };
        Ok(Report {
            observed: report.observed,
            skipped: report.skipped,
            flags: Flags::from_bits_retain(report.flags),
            nonfinite: report.nonfinite,
            weights: values(report.weights),
            mean: values(report.mean),
            second_moment: values(report.second_moment),
            ogr: values(report.ogr),
            ogr_blend: report.ogr_blend,
            ogr_uniform: report.ogr_uniform,
        })
    }

    pub(crate) fn second_moments(&mut self, k: usize, stream: Stream) -> Result<Vec<f64>> {
        let mut numbers = vec![0.0; k * k];
        let address = numbers.as_mut_ptr();
        // SAFETY: a handle and room for K x K numbers.
        Failure::check(unsafe { ffi::gradblend_get_second_moments(self.0, address, stream.as_raw()) })?;
        Ok(numbers)
    }

    pub(crate) fn addresses(&self, k: usize) -> Result<(*mut f64, *const f32)> {
        let (mut sums, mut count, mut weights) = (null_mut(), 0, null());
        // SAFETY: a handle and room for two addresses and a count.
        unsafe {
            Failure::check(ffi::gradblend_pending_sums(self.0, &mut sums, &mut count))?;
            Failure::check(ffi::gradblend_device_weights(self.0, &mut weights))?;
        }
        assert_eq!(count as usize, 2 * k);
        Ok((sums, weights))
    }

    /// Saves into a buffer of exactly the size that the library asks for; one byte less is rejected and says the size.
    pub(crate) fn save(&mut self, stream: Stream) -> Result<Vec<u8>> {
        let mut bytes = 0;
        // SAFETY: a handle and room for a size.
        Failure::check(unsafe { ffi::gradblend_save(self.0, null_mut(), &mut bytes, stream.as_raw()) })?;
        let mut saved = vec![0_u8; bytes];
        let mut small = bytes - 1;
        // SAFETY: a handle and room for `bytes` bytes.
        unsafe {
            let rejected = ffi::gradblend_save(self.0, saved.as_mut_ptr().cast(), &mut small, stream.as_raw());
            assert_eq!((rejected, small, saved.iter().any(|byte| *byte != 0)), (1, bytes, false));
            Failure::check(ffi::gradblend_save(self.0, saved.as_mut_ptr().cast(), &mut bytes, stream.as_raw()))?;
        }
        assert_eq!(bytes, saved.len());
        Ok(saved)
    }

    pub(crate) fn load(&mut self, saved: &[u8], stream: Stream) -> Result<()> {
        let (address, bytes) = (saved.as_ptr().cast(), saved.len());
        // SAFETY: a handle and as many bytes.
        Failure::check(unsafe { ffi::gradblend_load(self.0, address, bytes, stream.as_raw()) })
    }
}
