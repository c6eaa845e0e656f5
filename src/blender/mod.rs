//! The blender and its plans: checks, then dispatch to a backend.

mod plan;
mod ranks;

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::Zeroable;

use crate::abi::{MAX_MODALITIES, State};
use crate::backend::{AnyBackend, Backend, Memory};
use crate::checkpoint;
use crate::config::{Config, Pass};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::process::InProcess;
use crate::report::Report;
use crate::state;
use crate::table::Table;
use crate::tensor::{GradScale, Scale, StreamRef, TensorGrads};

pub use plan::Plan;
use plan::with_tracked;

/// Estimates the weights of K losses from their gradients, and blends the gradients with these weights.
///
/// Source of the estimate: Wang, Tran, Feiszli, CVPR 2020, Proposition 1.
///
/// ```
/// use gradblend::{Blender, Config, Device, Stream, TensorGrads};
/// # fn main() -> gradblend::Result<()> {
/// let mut blender = Blender::new(&Device::cpu(), Config::new(2))?;
/// let (t, g) = ([1.0_f32, 2.0], [1.0, 1.0]);
/// let (video, audio) = ([1.0, 0.5], [0.5, 1.0]);
/// let mut blended = [0.0; 2];
/// let plan = blender.plan([TensorGrads::new(&t, &g, &[Some(&video), Some(&audio)]).blended(&mut blended)])?;
/// blender.step(&plan, Stream::default())?;
/// blender.reweight(Stream::default())?;
/// let report = blender.report(Stream::default())?;
/// // <g, v> = 1.5 for both; <t - g, v> = 0.5 and 1: the weights are as 1 / 0.25 to 1 / 1.
/// assert!((report.weights[0] - 0.8).abs() < 1e-9);
/// // The step blended with the weights in force before it, 1 / 2 each.
/// drop(plan);
/// assert_eq!(blended, [0.75, 0.75]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Blender {
    id: u64,
    backend: InProcess<AnyBackend>,
    /// The number of this rank and of all in the group that was found to agree; None until an exchange, and after a call that
    /// could make ranks differ.
    agreed: Option<(usize, usize)>,
}

impl Blender {
    /// A blender with uniform weights 1 / K and no observation.
    ///
    /// # Errors
    /// [`Error::Modalities`], [`Error::Decay`], [`Error::Damping`], [`Error::MinWeight`] or [`Error::MinWeightSum`] for a
    /// configuration out of range;
    /// [`Error::Threads`]; [`Error::OutOfMemory`]; those of [`Device::cuda`].
    pub fn new(device: &Device, config: Config) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        config.check()?;
        let k = config.k();
        let mut state = State::zeroed();
        state::set_weights(&mut state, &[1.0 / k as f64; MAX_MODALITIES][..k]);
        let backend = InProcess::new("blender was made", AnyBackend::new(device.ordinal(), config, &state)?)?;
        Ok(Blender { id: NEXT.fetch_add(1, Ordering::Relaxed), backend, agreed: None })
    }

    /// The configuration that the blender was made with.
    pub fn config(&self) -> &Config {
        self.backend.in_any_process().config()
    }

    /// Checks `tensors` and makes a plan of them. Reads no gradient.
    ///
    /// There may be any number of tensors, none included, and a tensor may be empty. A blended gradient may be exactly one
    /// of its own tensor's modality gradients (in place); otherwise it overlaps no other buffer.
    ///
    /// # Errors
    /// Each names the tensor and the role of the buffer: [`Error::ModalityCount`], [`Error::Unpaired`],
    /// [`Error::Length`], [`Error::MixedDTypes`], [`Error::Misaligned`], [`Error::OutOfRange`], [`Error::Overlap`],
    /// [`Error::UnknownMemory`]. Besides, [`Error::OutOfMemory`] and [`Error::Cuda`].
    pub fn plan<'a>(&self, tensors: impl IntoIterator<Item = TensorGrads<'a>>) -> Result<Plan<'a>> {
        let backend = self.backend.get()?;
        let mut tracked = Vec::new();
        let table = Table::new(self.config().k(), with_tracked(tensors, &mut tracked), backend.grouping())?;
        let memory = backend.memory(&table)?;
        memory.check_tracked(&tracked, None)?;
        let memory = InProcess::new("plan was made", memory)?;
        Ok(Plan { blender: self.id, table, memory, bound: true, tracked, borrow: PhantomData })
    }

    /// One pass over memory with any of the parts DOT, BLEND (with ACCUMULATE: blended += instead of =) and OBSERVE.
    /// BLEND uses the weights in force at entry, and leaves out modalities of weight 0.
    ///
    /// On a CUDA device the work is submitted to `stream`. The call synchronizes only for a plan of slices, which works on
    /// devices that can access pageable host memory and cannot be captured.
    ///
    /// # Errors
    /// [`Error::Pass`] for no bit, an unknown bit, or ACCUMULATE without BLEND; [`Error::ForeignPlan`];
    /// [`Error::ReleasedPlan`]; [`Error::Capturing`]; [`Error::Cuda`].
    pub fn pass(&mut self, plan: &Plan<'_>, what: Pass, stream: StreamRef<'_>) -> Result<()> {
        what.check()?;
        let backend = self.backend.get_mut()?;
        if plan.blender != self.id {
            return Err(Error::ForeignPlan);
        }
        if !plan.bound {
            return Err(Error::ReleasedPlan);
        }
        let memory = plan.memory.get()?;
        memory.check_tracked(&plan.tracked, Some(stream))?;
        // SAFETY: the plan is bound, so its addresses come from slices that it borrows or from `from_raw`, whose caller
        // guarantees them. This blender made it, and its memory for its table.
        unsafe { backend.pass(&plan.table, memory, what, stream) }?;
        memory.submitted(&plan.tracked)
    }

    /// Adds c_k = <g, v_k> and d_k = <t - g, v_k>, summed over the tensors, to the pending sums.
    ///
    /// Can be called several times before [`observe`](Self::observe): per layer, per modality, per shard. A tensor without
    /// train and validation gradients adds nothing. For each product |computed - exact| <= 2^-16 * sum |a_i b_i|, barring
    /// overflow, plus 2^-149 an element for underflow.
    ///
    /// # Errors
    /// [`Error::ForeignPlan`], [`Error::ReleasedPlan`], [`Error::Capturing`], [`Error::Cuda`].
    pub fn dot(&mut self, plan: &Plan<'_>, stream: StreamRef<'_>) -> Result<()> {
        self.pass(plan, Pass::DOT, stream)
    }

    /// Writes sum_k w_k v_k with the weights in force to the blended gradient of each tensor that has one; zeros where no
    /// modality is present. Accumulates in f32 and rounds once.
    ///
    /// A modality whose weight as f32 is 0 counts as absent: its gradient is not read, and an infinity or a NaN in it does
    /// not reach the blend.
    ///
    /// # Errors
    /// [`Error::ForeignPlan`], [`Error::ReleasedPlan`], [`Error::Capturing`], [`Error::Cuda`].
    pub fn blend(&mut self, plan: &Plan<'_>, stream: StreamRef<'_>) -> Result<()> {
        self.pass(plan, Pass::BLEND, stream)
    }

    /// [`dot`](Self::dot), [`blend`](Self::blend), [`observe`](Self::observe) in this order, bit for bit, in one pass over
    /// memory. Gradients of weight 0 are read for the products alone.
    ///
    /// # Errors
    /// [`Error::ForeignPlan`], [`Error::ReleasedPlan`], [`Error::Capturing`], [`Error::Cuda`].
    pub fn step(&mut self, plan: &Plan<'_>, stream: StreamRef<'_>) -> Result<()> {
        self.pass(plan, Pass::DOT | Pass::BLEND | Pass::OBSERVE, stream)
    }

    /// Commits the pending sums as one observation and zeroes them. Without a `dot` before it, zeros are an observation.
    ///
    /// If a product, divided by the gradient scale squared, is not finite, the observation is skipped: only a counter and a
    /// flag change. Otherwise reweights if the [`Cadence`](crate::Cadence) says so.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn observe(&mut self, stream: StreamRef<'_>) -> Result<()> {
        self.backend.get_mut()?.observe(stream)
    }

    /// Puts the weights in force that [`solve`](crate::solve) finds for the moments. Before the first observation, and
    /// where `solve` finds no weights, those in force stay and [`Flags::HELD`](crate::Flags::HELD) is set. With fewer than K
    /// observations S is singular, so correlated overfitting is solved as uncorrelated.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn reweight(&mut self, stream: StreamRef<'_>) -> Result<()> {
        self.backend.get_mut()?.reweight(stream)
    }

    /// Starts a new super-epoch: forgets n, m, S, the counters, the flags and the pending sums; keeps the weights.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn reset(&mut self, stream: StreamRef<'_>) -> Result<()> {
        self.backend.get_mut()?.reset(stream)
    }

    /// Puts `weights` in force as given, whatever their signs and their sum.
    ///
    /// # Errors
    /// [`Error::Count`] unless there are K; [`Error::Weight`] for one that is not finite as f32; [`Error::Cuda`].
    pub fn set_weights(&mut self, weights: &[f64], stream: StreamRef<'_>) -> Result<()> {
        let expected = self.config().k();
        if weights.len() != expected {
            return Err(Error::Count { what: "the weights", expected, got: weights.len() });
        }
        if let Some(modality) = weights.iter().position(|w| !(*w as f32).is_finite()) {
            return Err(Error::Weight { modality, got: weights[modality] });
        }
        self.backend.get_mut()?.set_weights(weights, stream)?;
        self.agreed = None;
        Ok(())
    }

    /// Sets the gradient scale of the next observations. The scale is not part of a saved state. A graph keeps the scale,
    /// or the address of one, that it was captured with.
    ///
    /// # Errors
    /// [`Error::MisalignedScale`] for an address that is not aligned to an f32; [`Error::UnknownScale`] for an address that
    /// the device cannot read; [`Error::Scale`] for a value that is 0 or not finite. Such a value behind an address makes
    /// the observation that reads it not finite.
    pub fn set_grad_scale(&mut self, scale: GradScale) -> Result<()> {
        match scale.0 {
            Scale::Address(address) if !address.is_multiple_of(4) => return Err(Error::MisalignedScale { address }),
            Scale::Value(got) if got == 0.0 || !got.is_finite() => return Err(Error::Scale { got }),
            _ => {}
        }
        self.backend.get_mut()?.set_grad_scale(scale.0)
    }

    /// Reads weights, moments, counters and ratios. Synchronizes `stream`.
    ///
    /// # Errors
    /// [`Error::Capturing`], [`Error::Cuda`].
    pub fn report(&mut self, stream: StreamRef<'_>) -> Result<Report> {
        Ok(Report::new(&self.backend.get()?.read(stream)?, self.config()))
    }

    /// Reads S, the running means of d_j d_k: K x K, row-major; zeros before the first observation. Synchronizes `stream`.
    ///
    /// # Errors
    /// [`Error::Capturing`], [`Error::Cuda`].
    pub fn second_moments(&mut self, stream: StreamRef<'_>) -> Result<Vec<f64>> {
        let k = self.config().k();
        let mut second_moment = vec![0.0; k * k];
        state::moments(&self.backend.get()?.read(stream)?, k, &mut [], &mut second_moment);
        Ok(second_moment)
    }

    /// Address of the K weights in force as f32, in memory of the device; it does not change for the blender's life.
    ///
    /// A trainer can weight its losses by them and run one backward pass. It leaves out a loss of weight 0, because 0 times
    /// an infinity is NaN. On a CUDA device, read them in work that is
    /// ordered after the blender's work, by its stream or by events; on the CPU, while no call on this blender runs.
    pub fn device_weights(&self) -> *const f32 {
        self.backend.in_any_process().device_weights()
    }

    /// Address of the 2K pending sums, c_0 .. c_K-1 then d_0 .. d_K-1, in memory of the device; it does not change
    /// for the blender's life.
    ///
    /// A sharded trainer all-reduces them between `dot` and `observe`. On a CUDA device, access them in work that is ordered
    /// after the blender's work, by its stream or by events; on the CPU, while no call on this blender runs.
    pub fn pending_sums(&self) -> *mut f64 {
        self.backend.in_any_process().pending_sums()
    }

    /// The whole state as bytes, bit for bit: moments, weights, counters, flags and pending sums. Synchronizes `stream`.
    ///
    /// # Errors
    /// [`Error::Capturing`], [`Error::Cuda`].
    pub fn save(&mut self, stream: StreamRef<'_>) -> Result<Vec<u8>> {
        Ok(checkpoint::write(&self.backend.get()?.read(stream)?, self.config()))
    }

    /// Length of a saved state in bytes.
    pub fn saved_bytes(&self) -> usize {
        checkpoint::bytes(self.config().k())
    }

    /// Restores a state written by [`save`](Self::save) of this or an earlier version, on any device. Standard errors are
    /// unknown (infinite) after a state of 0.1.0, until a reset.
    ///
    /// # Errors
    /// [`Error::CorruptState`] for bytes that are foreign, truncated, altered or of an unknown version;
    /// [`Error::StateMismatch`] for a state of another K, average or decay; [`Error::Capturing`]; [`Error::Cuda`]. The
    /// blender then stays as it was.
    pub fn load(&mut self, saved: &[u8], stream: StreamRef<'_>) -> Result<()> {
        let state = checkpoint::read(saved, self.config())?;
        self.backend.get_mut()?.write(&state, stream)?;
        self.agreed = None;
        Ok(())
    }
}
