//! A blender and a plan of any face: each call dispatches to the Rust API or to the C function of the same name.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};

use gradblend::ffi::{self, Status, gradblend_blender, gradblend_plan};
use gradblend::{Blender, Config, Device, Flags, GradScale, MAX_MODALITIES, Pass, Plan, Report, Stream};

use crate::c::{config, records};
use crate::failure::{Failure, Result};
use crate::{Face, Input};

/// A blender. Its calls have the names of [`Blender`]'s and use the stream in `stream`.
#[derive(Debug)]
pub struct TestBlender {
    api: Api,
    config: Config,
    face: Face,
    /// The stream that calls are put on.
    pub stream: Stream,
}

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "tests make few of them")]
enum Api {
    Rust(Blender),
    C(CBlender),
}

/// A blender's handle.
#[derive(Debug)]
struct CBlender(*mut gradblend_blender);

// SAFETY: a handle is used by one thread at a time, which is all that the header asks.
unsafe impl Send for CBlender {}

impl Drop for CBlender {
    fn drop(&mut self) {
        ffi::gradblend_blender_destroy(self.0);
    }
}

/// A plan.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "tests make few of them")]
pub enum TestPlan<'a> {
    /// Of the Rust API.
    Rust(Plan<'a>),
    /// Of the C functions.
    C(CPlan<'a>),
}

/// A plan's handle.
#[derive(Debug)]
pub struct CPlan<'a>(*mut gradblend_plan, PhantomData<&'a mut [u8]>);

impl Drop for CPlan<'_> {
    fn drop(&mut self) {
        ffi::gradblend_plan_destroy(self.0);
    }
}

impl<'a> TestPlan<'a> {
    /// Releases the plan. C has no such call: there the caller sees to it that a plan is updated before it runs.
    pub fn release(self) -> TestPlan<'static> {
        match self {
            TestPlan::Rust(plan) => TestPlan::Rust(plan.release()),
            TestPlan::C(plan) => TestPlan::C(CPlan(std::mem::ManuallyDrop::new(plan).0, PhantomData)),
        }
    }

    /// Gives the plan other buffers; the work is put on `stream`.
    pub fn update(&mut self, inputs: Vec<Input<'a>>, stream: Stream) -> Result<()> {
        match self {
            TestPlan::Rust(plan) => Ok(plan.update(inputs.into_iter().map(Input::grads), stream)?),
            TestPlan::C(plan) => {
                let (tensors, _addresses) = records(inputs);
                let (at, count) = (tensors.as_ptr(), tensors.len() as u64);
                // SAFETY: a handle and as many records; the buffers live as long as this plan.
                Failure::check(unsafe { ffi::gradblend_plan_update(plan.0, at, count, stream.as_raw()) })
            }
        }
    }
}

type RustCall = fn(&mut Blender, Stream) -> gradblend::Result<()>;
type CCall = unsafe extern "C" fn(*mut gradblend_blender, *mut c_void) -> Status;
type RustRun = fn(&mut Blender, &Plan<'_>, Stream) -> gradblend::Result<()>;
type CRun = unsafe extern "C" fn(*mut gradblend_blender, *const gradblend_plan, *mut c_void) -> Status;

#[allow(missing_docs, reason = "the methods of Blender with the same names are documented")]
impl TestBlender {
    pub(crate) fn new(face: Face, device: i32, config_wanted: Config) -> Result<Self> {
        let api = if face.c {
            let (config, mut blender) = (config(&config_wanted)?, null_mut());
            // SAFETY: a record, and room for a handle.
            let status = unsafe { ffi::gradblend_blender_create(device, &config, &mut blender) };
            assert!(status == 0 || blender.is_null(), "a rejected call writes nothing");
            Failure::check(status)?;
            Api::C(CBlender(blender))
        } else {
            let device = if device < 0 { Device::cpu() } else { Device::cuda(device)? };
            Api::Rust(Blender::new(&device, config_wanted)?)
        };
        Ok(TestBlender { api, config: config_wanted, face, stream: Stream::default() })
    }

    /// The configuration that the blender was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// K.
    pub fn k(&self) -> usize {
        self.config.modalities as usize
    }

    pub fn plan<'a>(&self, inputs: Vec<Input<'a>>) -> Result<TestPlan<'a>> {
        match &self.api {
            Api::Rust(blender) => Ok(TestPlan::Rust(blender.plan(inputs.into_iter().map(Input::grads))?)),
            Api::C(blender) => {
                let (tensors, _addresses) = records(inputs);
                let (at, count, mut plan) = (tensors.as_ptr(), tensors.len() as u64, null_mut());
                // SAFETY: a handle and as many records; the buffers live as long as the plan.
                let status = unsafe { ffi::gradblend_plan_create(blender.0, at, count, &mut plan) };
                assert!(status == 0 || plan.is_null(), "a rejected call writes nothing");
                Failure::check(status)?;
                Ok(TestPlan::C(CPlan(plan, PhantomData)))
            }
        }
    }

    fn run(&mut self, plan: &TestPlan<'_>, rust: RustRun, c: CRun) -> Result<()> {
        match (&mut self.api, plan) {
            (Api::Rust(blender), TestPlan::Rust(plan)) => Ok(rust(blender, plan, self.stream)?),
            (Api::C(blender), TestPlan::C(plan)) => {
                // SAFETY: handles, whose buffers the plan borrows.
                Failure::check(unsafe { c(blender.0, plan.0, self.stream.as_raw()) })
            }
            _ => unreachable!("a plan of another face"),
        }
    }

    pub fn dot(&mut self, plan: &TestPlan<'_>) -> Result<()> {
        self.run(plan, Blender::dot, ffi::gradblend_dot)
    }

    pub fn blend(&mut self, plan: &TestPlan<'_>) -> Result<()> {
        self.run(plan, Blender::blend, ffi::gradblend_blend)
    }

    pub fn step(&mut self, plan: &TestPlan<'_>) -> Result<()> {
        self.run(plan, Blender::step, ffi::gradblend_step)
    }

    pub fn pass(&mut self, plan: &TestPlan<'_>, what: Pass) -> Result<()> {
        match (&mut self.api, plan) {
            (Api::Rust(blender), TestPlan::Rust(plan)) => Ok(blender.pass(plan, what, self.stream)?),
            (Api::C(blender), TestPlan::C(plan)) => {
                // SAFETY: handles, whose buffers the plan borrows.
                Failure::check(unsafe { ffi::gradblend_pass(blender.0, plan.0, what.bits(), self.stream.as_raw()) })
            }
            _ => unreachable!("a plan of another face"),
        }
    }

    /// BLEND with ACCUMULATE.
    pub fn accumulate(&mut self, plan: &TestPlan<'_>) -> Result<()> {
        self.pass(plan, Pass::BLEND | Pass::ACCUMULATE)
    }

    fn call(&mut self, rust: RustCall, c: CCall) -> Result<()> {
        match &mut self.api {
            Api::Rust(blender) => Ok(rust(blender, self.stream)?),
            // SAFETY: a handle.
            Api::C(blender) => Failure::check(unsafe { c(blender.0, self.stream.as_raw()) }),
        }
    }

    pub fn observe(&mut self) -> Result<()> {
        self.call(Blender::observe, ffi::gradblend_observe)
    }

    pub fn reweight(&mut self) -> Result<()> {
        self.call(Blender::reweight, ffi::gradblend_reweight)
    }

    pub fn reset(&mut self) -> Result<()> {
        self.call(Blender::reset, ffi::gradblend_reset)
    }

    pub fn set_weights(&mut self, weights: &[f64]) -> Result<()> {
        let (at, count, stream) = (weights.as_ptr(), weights.len() as u32, self.stream);
        match &mut self.api {
            Api::Rust(blender) => Ok(blender.set_weights(weights, stream)?),
            // SAFETY: a handle and as many numbers.
            Api::C(b) => Failure::check(unsafe { ffi::gradblend_set_weights(b.0, at, count, stream.as_raw()) }),
        }
    }

    /// Reads the gradient scale from an address at each observation; NULL is a scale of 1.
    ///
    /// # Safety
    /// As for [`GradScale::from_raw`].
    pub unsafe fn set_grad_scale(&mut self, scale: *const f32) -> Result<()> {
        match &mut self.api {
            // SAFETY: as `from_raw` asks, `scale` is NULL or stays alive and unwritten while observations read it.
            Api::Rust(blender) => Ok(blender.set_grad_scale(unsafe { GradScale::from_raw(scale) })?),
            // SAFETY: a live handle, and `scale` as for `from_raw`.
            Api::C(blender) => Failure::check(unsafe { ffi::gradblend_set_grad_scale(blender.0, scale) }),
        }
    }

    /// Sets a gradient scale by value. `None`: C cannot.
    pub fn set_grad_scale_value(&mut self, scale: f32) -> Option<Result<()>> {
        match &mut self.api {
            Api::Rust(blender) => Some(blender.set_grad_scale(GradScale::value(scale)).map_err(Into::into)),
            Api::C(_) => None,
        }
    }

    pub fn report(&mut self) -> Result<Report> {
        let blender = match &mut self.api {
            Api::Rust(blender) => return Ok(blender.report(self.stream)?),
            Api::C(blender) => blender.0,
        };
        let mut report = MaybeUninit::<ffi::gradblend_report>::zeroed();
        let size = size_of::<ffi::gradblend_report>() as u32;
        // SAFETY: a handle and room for one record, of numbers alone; the caller says how large it is.
        let report = unsafe {
            (&raw mut (*report.as_mut_ptr()).size).write(size);
            Failure::check(ffi::gradblend_get_report(blender, report.as_mut_ptr(), self.stream.as_raw()))?;
            report.assume_init()
        };
        assert_eq!((report.size, report.modalities), (size, self.config.modalities));
        let values = |all: [f64; MAX_MODALITIES]| {
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
            floored: report.floored,
            effective: report.effective,
            standard_error: values(report.standard_error),
        })
    }

    pub fn second_moments(&mut self) -> Result<Vec<f64>> {
        let (mut moments, stream) = (vec![0.0; self.k() * self.k()], self.stream);
        match &mut self.api {
            Api::Rust(blender) => return Ok(blender.second_moments(stream)?),
            // SAFETY: a handle and room for K x K numbers.
            Api::C(blender) => Failure::check(unsafe {
                ffi::gradblend_get_second_moments(blender.0, moments.as_mut_ptr(), stream.as_raw())
            })?,
        }
        Ok(moments)
    }

    /// In C, into a buffer of exactly the size that the library asks for; one byte less is rejected and says the size.
    pub fn save(&mut self) -> Result<Vec<u8>> {
        let (blender, stream) = match &mut self.api {
            Api::Rust(blender) => return Ok(blender.save(self.stream)?),
            Api::C(blender) => (blender.0, self.stream.as_raw()),
        };
        let mut bytes = 0;
        // SAFETY: a handle and room for a size.
        Failure::check(unsafe { ffi::gradblend_save(blender, null_mut(), &mut bytes, stream) })?;
        let (mut saved, mut small) = (vec![0_u8; bytes], bytes - 1);
        // SAFETY: a handle and room for `bytes` bytes.
        unsafe {
            let rejected = ffi::gradblend_save(blender, saved.as_mut_ptr().cast(), &mut small, stream);
            assert_eq!((rejected, small, saved.iter().any(|byte| *byte != 0)), (1, bytes, false));
            Failure::check(ffi::gradblend_save(blender, saved.as_mut_ptr().cast(), &mut bytes, stream))?;
        }
        assert_eq!(bytes, saved.len());
        Ok(saved)
    }

    pub fn load(&mut self, saved: &[u8]) -> Result<()> {
        let (at, bytes, stream) = (saved.as_ptr().cast(), saved.len(), self.stream);
        match &mut self.api {
            Api::Rust(blender) => Ok(blender.load(saved, stream)?),
            // SAFETY: a handle and as many bytes.
            Api::C(blender) => Failure::check(unsafe { ffi::gradblend_load(blender.0, at, bytes, stream.as_raw()) }),
        }
    }

    /// Addresses of the pending sums and of the weights in force.
    pub fn addresses(&self) -> Result<(*mut f64, *const f32)> {
        let blender = match &self.api {
            Api::Rust(blender) => return Ok((blender.pending_sums(), blender.device_weights())),
            Api::C(blender) => blender.0,
        };
        let (mut sums, mut count, mut weights) = (null_mut(), 0, null());
        // SAFETY: a handle and room for two addresses and a count.
        unsafe {
            Failure::check(ffi::gradblend_pending_sums(blender, &mut sums, &mut count))?;
            Failure::check(ffi::gradblend_device_weights(blender, &mut weights))?;
        }
        assert_eq!(count as usize, 2 * self.k());
        Ok((sums, weights))
    }

    /// The pending sums, once the default stream is done.
    pub fn pending(&self) -> Result<Vec<f64>> {
        // SAFETY: 2K numbers, and no call on the blender runs.
        Ok(unsafe { self.face.read(self.addresses()?.0, 2 * self.k()) })
    }

    /// Replaces the pending sums, as a sharded trainer does: K values of c, then of d.
    pub fn set_pending(&mut self, c: &[f64], d: &[f64]) -> Result<()> {
        assert_eq!((c.len(), d.len()), (self.k(), self.k()));
        // SAFETY: 2K numbers, and no call on the blender runs.
        unsafe { self.face.write(self.addresses()?.0, &[c, d].concat()) };
        Ok(())
    }

    /// Replaces the pending sums and closes them as an observation.
    pub fn observe_sums(&mut self, c: &[f64], d: &[f64]) -> Result<()> {
        self.set_pending(c, d)?;
        self.observe()
    }

    /// The weights in force as f32 in memory of the device, once the default stream is done.
    pub fn weights(&self) -> Result<Vec<f32>> {
        // SAFETY: K numbers, and no call on the blender runs.
        Ok(unsafe { self.face.read(self.addresses()?.1, self.k()) })
    }
}
