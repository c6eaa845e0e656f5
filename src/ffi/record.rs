//! Records of the header, with its names, and their conversion to Rust types.
//!
//! Records with a `size` grow at the end. Programs compiled with an earlier header pass smaller ones.

use std::ffi::c_void;
use std::mem::offset_of;

use super::argument::{array, check};
use super::status::{Fault, Outcome};
use crate::abi::MAX_MODALITIES;
use crate::config::{Cadence, Config};
use crate::device::Device;
use crate::dlpack::{DLManagedTensor, DLManagedTensorVersioned, Dlpack};
use crate::error::Role;
use crate::report::Report;
use crate::solve::{Negative, Overfitting, Policy};
use crate::state::Average;
use crate::tensor::{DType, TensorGrads};

/// Number of the CPU. CUDA devices have their ordinals, from 0.
pub(super) const CPU: i32 = -1;

#[derive(Clone, Copy, Debug, bytemuck::Zeroable)]
#[repr(C)]
pub struct gradblend_config {
    pub size: u32,
    pub modalities: u32,
    pub average: i32,
    pub overfitting: i32,
    pub negative: i32,
    pub cadence: i32,
    pub threads: u32,
    pub reserved: u32,
    pub decay: f64,
    pub damping: f64,
    // Since 0.1.1.
    pub min_weight: [f64; MAX_MODALITIES],
}

/// Bytes of the records of version 0.1.0.
pub(super) const FIRST_CONFIG: usize = offset_of!(gradblend_config, min_weight);
pub(super) const FIRST_REPORT: usize = offset_of!(gradblend_report, floored);

#[derive(Clone, Copy, Debug, bytemuck::Zeroable)]
#[repr(C)]
pub struct gradblend_tensor {
    pub len: u64,
    pub dtype: i32,
    pub train: *const c_void,
    pub valid: *const c_void,
    pub modalities: *const *const c_void,
    pub blended: *mut c_void,
}

#[derive(Clone, Copy, Debug, bytemuck::Zeroable)]
#[repr(C)]
pub struct gradblend_report {
    pub size: u32,
    pub modalities: u32,
    pub observed: u64,
    pub skipped: u64,
    pub flags: u32,
    pub nonfinite: u32,
    pub weights: [f64; MAX_MODALITIES],
    pub mean: [f64; MAX_MODALITIES],
    pub second_moment: [f64; MAX_MODALITIES],
    pub ogr: [f64; MAX_MODALITIES],
    pub ogr_blend: f64,
    pub ogr_uniform: f64,
    // Since 0.1.1.
    pub floored: u32,
    pub reserved: u32,
    pub effective: f64,
    pub standard_error: [f64; MAX_MODALITIES],
}

#[derive(Clone, Copy, Debug, bytemuck::Zeroable)]
#[repr(C)]
pub struct gradblend_dlpack {
    pub managed: *const DLManagedTensor,
    pub versioned: *const DLManagedTensorVersioned,
}

/// The variant with this code, 0 or 1.
fn either<T: Copy>(name: &str, code: i32, choices: [T; 2]) -> Outcome<T> {
    let choice = usize::try_from(code).ok().and_then(|code| choices.get(code));
    choice.copied().ok_or_else(|| Fault::Argument(format!("config: {name} is {code}, expected 0 or 1")))
}

impl gradblend_config {
    pub(super) fn of(config: &Config) -> Self {
        let (average, decay) = config.average.coded();
        gradblend_config {
            size: size_of::<Self>() as u32,
            modalities: config.modalities,
            average: average as i32,
            overfitting: config.policy.overfitting as i32,
            negative: config.policy.negative as i32,
            cadence: config.cadence as i32,
            threads: config.threads,
            reserved: 0,
            decay,
            damping: config.policy.damping,
            min_weight: config.policy.min_weight,
        }
    }

    /// The configuration at `address`, in which fields that the record lacks have their defaults, and the record's size.
    ///
    /// # Safety
    /// `address` is NULL or valid for reads of a `u32`, and of as many bytes as this number says.
    pub(super) unsafe fn read(address: *const Self) -> Outcome<(Config, usize)> {
        check("config", address)?;
        // SAFETY: `check` has seen that the address is not NULL and aligned; the caller guarantees a number there.
        let size = unsafe { address.cast::<u32>().read() } as usize;
        if ![FIRST_CONFIG, size_of::<Self>()].contains(&size) {
            let expected = format!("expected {FIRST_CONFIG} or {}", size_of::<Self>());
            let hint = "fill it with gradblend_config_default, and use the header of this library or an earlier one";
            return Err(Fault::Argument(format!("config: size is {size}, {expected}: {hint}")));
        }
        let mut record = Self::of(&Config::new(1));
        // SAFETY: `size` is at most the size of the record; the caller guarantees as many readable bytes.
        unsafe { address.cast::<u8>().copy_to_nonoverlapping((&raw mut record).cast(), size) };
        Ok((record.config()?, size))
    }

    /// Checks codes; `Config::check` checks numbers.
    fn config(&self) -> Outcome<Config> {
        if self.reserved != 0 {
            return Err(Fault::Argument(format!("config: reserved is {}, expected 0", self.reserved)));
        }
        let config = Config {
            modalities: self.modalities,
            average: either("average", self.average, [Average::Mean, Average::Ema { decay: self.decay }])?,
            policy: Policy {
                overfitting: either(
                    "overfitting",
                    self.overfitting,
                    [Overfitting::Uncorrelated, Overfitting::Correlated],
                )?,
                negative: either("negative", self.negative, [Negative::Clamp, Negative::Signed])?,
                damping: self.damping,
                min_weight: self.min_weight,
            },
            cadence: either("cadence", self.cadence, [Cadence::OnRequest, Cadence::EveryObservation])?,
            threads: self.threads,
        };
        config.check()?;
        Ok(config)
    }
}

/// The device with this number.
pub(super) fn device(number: i32) -> Outcome<Device> {
    Ok(match ordinal(number)? {
        None => Device::cpu(),
        Some(ordinal) => Device::cuda(ordinal)?,
    })
}

/// Ordinal of the device with this number, which need not exist; `None` for the CPU.
pub(super) fn ordinal(number: i32) -> Outcome<Option<i32>> {
    match number {
        CPU => Ok(None),
        0.. => Ok(Some(number)),
        _ => {
            let expected = "expected -1 for the CPU or the ordinal of a CUDA device";
            Err(Fault::Argument(format!("device is {number}, {expected}")))
        }
    }
}

/// The tensor of a record, which is number `index` of an array.
///
/// # Safety
/// `modalities` of the record is NULL or the address of K addresses, and the contract of [`TensorGrads::from_raw`].
pub(super) unsafe fn tensor(
    index: usize,
    tensor: &gradblend_tensor,
    modalities: usize,
) -> Outcome<TensorGrads<'static>> {
    let dtype = DType::try_from(tensor.dtype);
    let dtype = dtype.map_err(|error| Fault::Argument(format!("tensor {index}: {error}")))?;
    // SAFETY: the caller fulfils the contract of `tensor`.
    unsafe {
        let v = array(format_args!("tensor {index}: modalities"), tensor.modalities, modalities as u64)?;
        Ok(TensorGrads::from_raw(tensor.len, dtype, tensor.train, tensor.valid, v, tensor.blended))
    }
}

impl gradblend_report {
    pub(super) fn of(report: &Report) -> Self {
        let padded = |values: &[f64]| {
            let mut all = [0.0; MAX_MODALITIES];
            all[..values.len()].copy_from_slice(values);
            all
        };
        gradblend_report {
            size: size_of::<Self>() as u32,
            modalities: report.weights.len() as u32,
            observed: report.observed,
            skipped: report.skipped,
            flags: report.flags.bits(),
            nonfinite: report.nonfinite,
            weights: padded(&report.weights),
            mean: padded(&report.mean),
            second_moment: padded(&report.second_moment),
            ogr: padded(&report.ogr),
            ogr_blend: report.ogr_blend,
            ogr_uniform: report.ogr_uniform,
            floored: report.floored,
            reserved: 0,
            effective: report.effective,
            standard_error: padded(&report.standard_error),
        }
    }

    /// Bytes of the report that a program reads from `address`: what its `size` says, as far as this version goes.
    ///
    /// # Safety
    /// `address` is not NULL, aligned, and valid for reads of a `u32`.
    pub(super) unsafe fn writable_bytes(address: *const Self) -> Outcome<usize> {
        // SAFETY: the caller guarantees a number at `address`.
        let size = unsafe { address.cast::<u32>().read() } as usize;
        if size < FIRST_REPORT {
            let hint = "set it to sizeof(gradblend_report) before the call";
            return Err(Fault::Argument(format!("report: size is {size}, expected at least {FIRST_REPORT}: {hint}")));
        }
        // No field of 8 bytes is cut.
        Ok(size.min(size_of::<Self>()) / 8 * 8)
    }

    /// Writes the first `bytes` of the report, and their number as its `size`.
    ///
    /// # Safety
    /// `to` is valid for writes of `bytes`, which is at most the size of a report.
    pub(super) unsafe fn write(mut self, to: *mut Self, bytes: usize) {
        self.size = bytes as u32;
        // SAFETY: the caller guarantees `bytes` writable bytes; a report has no padding.
        unsafe { (&raw const self).cast::<u8>().copy_to_nonoverlapping(to.cast(), bytes) };
    }
}

impl gradblend_dlpack {
    /// The one of the two arrays that is given; `None` if neither is.
    pub(super) fn array(self, role: Role) -> Outcome<Option<Dlpack>> {
        match (self.managed.is_null(), self.versioned.is_null()) {
            (true, true) => Ok(None),
            (false, true) => Ok(Some(Dlpack::Managed(self.managed))),
            (true, false) => Ok(Some(Dlpack::Versioned(self.versioned))),
            (false, false) => {
                Err(Fault::Argument(format!("{role}: expected a managed or a versioned array, got both")))
            }
        }
    }
}
