//! From losses to blended gradients in one call, for any framework.
//!
//! A [`Trainer`] decides when to observe, and runs what a call needs: backward passes and memory by a framework ([`Passes`]),
//! moments, weights and the blend by a [`Blender`]. The crates for candle, tch and burn are made of it; users of a framework
//! meet their `GradBlend`, which dereferences to a `Trainer`.

mod config;
mod error;
mod passes;
mod ranks;

use std::fmt;

use crate::blender::{Blender, Plan};
use crate::config::{Cadence, Pass};
use crate::device::Device;
use crate::report::Report;
use crate::schedule::Schedule;
use crate::tensor::{GradScale, Stream, StreamRef, TensorGrads};

pub use config::GradBlendConfig;
pub use error::{Error, IntoLoss, Loss, Result};
pub use passes::{Passes, Row};

/// Weights the K losses of a multi-modal network by how each overfits, and blends their gradients.
///
/// An *observing* call (the first, then each `every`-th) runs one backward pass for each loss and one for the fused loss on a
/// held-out batch, blends with the weights in force, and updates the moments and the weights. Any other call runs one backward
/// pass on sum_k w_k L_k, without the losses of weight 0.
pub struct Trainer {
    device: Device,
    blender: Blender,
    /// Made by the first observing call. Bound to gradients only during a call; `None` after one that failed in gradblend.
    plan: Option<Plan<'static>>,
    weights: Vec<f32>,
    every: u64,
    schedule: Option<Schedule>,
    grad_scale: f32,
    calls: u64,
    observations: u64,
    observed: bool,
    on_observation: Option<OnObservation>,
    /// Whether observing calls leave their products pending, and whether the latest call has.
    leave_sums: bool,
    pending: bool,
}

type OnObservation = Box<dyn FnMut(&Report) + Send>;

/// One gradient for each parameter.
type Gradients<P> = Vec<Option<<P as Passes>::Gradient>>;

impl Trainer {
    /// A trainer with weights 1/K and no observation.
    ///
    /// # Errors
    /// [`Error::Blend`] for an option out of range, and those of [`Blender::new`].
    pub fn new(device: &Device, config: &GradBlendConfig) -> Result<Self> {
        let mut blender = Blender::new(device, config.checked()?)?;
        let weights = weights_of(&blender.report(Stream::default())?);
        Ok(Trainer {
            device: *device,
            blender,
            plan: None,
            weights,
            every: config.every,
            schedule: config.schedule,
            grad_scale: 1.0,
            calls: 0,
            observations: 0,
            observed: false,
            on_observation: None,
            leave_sums: config.leave_sums,
            pending: false,
        })
    }

    /// The K weights in force.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// The operations that this trainer is made of.
    pub fn blender(&self) -> &Blender {
        &self.blender
    }

    /// Whether the latest call that succeeded observed.
    pub fn observed(&self) -> bool {
        self.observed
    }

    /// Calls of this trainer that observed, skipped observations included.
    pub fn observations(&self) -> u64 {
        self.observations
    }

    /// Whether the next call observes, and so calls the function of the held-out loss.
    pub fn observes(&self) -> bool {
        self.schedule != Some(Schedule::offline()) && self.calls.is_multiple_of(self.every)
    }

    /// Calls `function` with a report after each observation.
    pub fn on_observation(&mut self, function: impl FnMut(&Report) + Send + 'static) {
        self.on_observation = Some(Box::new(function));
    }

    /// Weights, moments, ratios and counters. On CUDA it synchronizes.
    ///
    /// # Errors
    /// [`Error::Blend`] for a failure of the driver.
    pub fn report(&mut self) -> Result<Report> {
        Ok(self.blender.report(Stream::default())?)
    }

    /// Puts K weights in force as given, until the next reweight: with [`Schedule::offline`], for good.
    ///
    /// # Errors
    /// [`Error::Blend`] for another number of weights, or one that is not finite.
    pub fn set_weights(&mut self, weights: &[f64]) -> Result<()> {
        self.blender.set_weights(weights, Stream::default())?;
        self.read_weights().map(drop)
    }

    /// Solves for the weights of the moments now; for [`Cadence::OnRequest`], as after a number of
    /// observations.
    ///
    /// # Errors
    /// [`Error::Blend`] for a failure of the driver.
    pub fn reweight(&mut self) -> Result<()> {
        self.blender.reweight(Stream::default())?;
        self.read_weights().map(drop)
    }

    /// Tells the schedule that this epoch, counted from 0, has ended.
    ///
    /// At the end of a super-epoch reweights from its observations, starts the next one, and returns the report of the one
    /// that ended, with the new weights. [`Flags::HELD`](crate::Flags::HELD) in it: the weights are the old ones. `None` at
    /// other epochs, and without a schedule.
    ///
    /// # Errors
    /// [`Error::Blend`] for a failure of the driver.
    pub fn end_epoch(&mut self, epoch: u64) -> Result<Option<Report>> {
        if !self.schedule.is_some_and(|schedule| schedule.ends(epoch)) {
            return Ok(None);
        }
        self.blender.reweight(Stream::default())?;
        let report = self.read_weights()?;
        self.blender.reset(Stream::default())?;
        Ok(Some(report))
    }

    /// Multiplies losses by this factor before their backward passes, for gradients of 16 bits. The gradients of a call are
    /// scaled by it, and the moments are not.
    ///
    /// # Errors
    /// [`Error::Blend`] for a factor that is 0 or not finite.
    pub fn set_grad_scale(&mut self, scale: f32) -> Result<()> {
        self.blender.set_grad_scale(GradScale::value(scale))?;
        self.grad_scale = scale;
        Ok(())
    }

    /// The moments, the weights and the position among calls, for [`load`](Self::load): continues bit for bit.
    ///
    /// # Errors
    /// [`Error::Blend`] for a failure of the driver; [`Error::PendingSums`].
    pub fn save(&mut self) -> Result<Vec<u8>> {
        self.expect_pending(false)?;
        let mut saved = self.blender.save(Stream::default())?;
        saved.extend(self.calls.to_le_bytes());
        saved.extend(crc32fast::hash(&saved).to_le_bytes());
        Ok(saved)
    }

    /// Restores a state of [`save`](Self::save), of any framework and device.
    ///
    /// # Errors
    /// [`Error::Blend`] for another K, average or decay, or a state that is damaged. Nothing has changed then.
    pub fn load(&mut self, saved: &[u8]) -> Result<()> {
        let corrupt = |reason: &str| crate::Error::CorruptState { reason: reason.into() };
        let (body, sum) = saved.split_last_chunk().ok_or_else(|| corrupt("it is too short"))?;
        let (state, calls) = body.split_last_chunk().ok_or_else(|| corrupt("it is too short"))?;
        if crc32fast::hash(body) != u32::from_le_bytes(*sum) {
            return Err(corrupt("the checksum of the trainer does not match").into());
        }
        self.blender.load(state, Stream::default())?;
        self.calls = u64::from_le_bytes(*calls);
        self.pending = false;
        self.read_weights().map(drop)
    }

    fn read_weights(&mut self) -> Result<Report> {
        let report = self.report()?;
        self.weights = weights_of(&report);
        Ok(report)
    }

    /// Rejects a number of losses other than K.
    ///
    /// # Errors
    /// [`Error::Losses`].
    pub fn check_losses(&self, got: usize) -> Result<()> {
        let expected = self.weights.len();
        if got == expected { Ok(()) } else { Err(Error::Losses { expected, got }) }
    }

    /// Runs one call: for those who write the crate of a framework. `held_out` computes the fused loss on a held-out batch,
    /// `train` on an independent training batch, without which t is the gradient of the last loss. Calls that observe call
    /// them.
    ///
    /// # Errors
    /// Those of `passes`, [`Error::Unreached`], [`Error::PendingSums`], and [`Error::Blend`]. A call that does not observe
    /// checks the reach of the weighted sum alone.
    pub fn backward<P: Passes, R: IntoLoss<P::Loss>, T: IntoLoss<P::Loss>>(
        &mut self,
        passes: &mut P,
        held_out: impl FnOnce() -> R,
        train: Option<impl FnOnce() -> T>,
    ) -> Result<P::Output> {
        if passes.device() != self.device {
            return Err(crate::Error::ForeignPlan.into());
        }
        self.expect_pending(false)?;
        let observes = self.observes();
        let (output, report) = match observes {
            true => self.observe(passes, held_out, train)?,
            false => (passes.weighted(&self.terms())?, None),
        };
        self.calls += 1;
        self.observations += u64::from(observes);
        self.observed = observes;
        self.tell(report.as_ref());
        Ok(output)
    }

    /// Calls the function of observations.
    fn tell(&mut self, report: Option<&Report>) {
        if let (Some(function), Some(report)) = (&mut self.on_observation, report) {
            function(report);
        }
    }

    /// The losses whose weight is not 0, with their factors: 0 times an infinity is NaN.
    fn terms(&self) -> Vec<(usize, f32)> {
        let weighted = self.weights.iter().enumerate().filter(|(_, weight)| **weight != 0.0);
        weighted.map(|(k, weight)| (k, weight * self.grad_scale)).collect()
    }

    fn observe<P: Passes, R: IntoLoss<P::Loss>, T: IntoLoss<P::Loss>>(
        &mut self,
        passes: &mut P,
        held_out: impl FnOnce() -> R,
        train: Option<impl FnOnce() -> T>,
    ) -> Result<(P::Output, Option<Report>)> {
        let mut v = Vec::with_capacity(self.weights.len());
        for k in 0..self.weights.len() {
            let loss = passes.loss(k)?;
            v.push(self.gradients(passes, Loss::Given(k), loss)?.into_iter());
        }
        let loss = held_out().into_loss(Loss::HeldOut)?;
        let valid = self.gradients(passes, Loss::HeldOut, loss)?;
        let train = match train {
            Some(train) => {
                let loss = train().into_loss(Loss::Train)?;
                Some(self.gradients(passes, Loss::Train, loss)?)
            }
            None => None,
        };
        let (two_passes, mut train) = (train.is_some(), train.map(Vec::into_iter));
        let mut rows = Vec::with_capacity(valid.len());
        for (i, valid) in valid.into_iter().enumerate() {
            let modalities = v.iter_mut().map(|gradients| gradients.next().flatten()).collect();
            let train = train.as_mut().map(|gradients| gradients.next().flatten());
            let shape = passes.shape(i);
            rows.push(Row::new(shape, modalities, train, valid, |like| passes.zeros(like))?);
        }
        let blended = if two_passes {
            // The blend has a pass of its own, which reuses the memory of t and g. If it fails, nothing has been observed.
            let before = self.blender.save(Stream::default())?;
            self.dot_then_blend(passes, rows).inspect_err(|_| {
                // The state is of this blender. If the device fails here too, the first error says so.
                let _ = self.blender.load(&before, Stream::default());
            })?
        } else {
            self.blend(passes, rows, Pass::DOT | Pass::BLEND | self.observation())?
        };
        self.pending = self.leave_sums;
        // Without a change or a reader, a report would synchronize a CUDA device for nothing.
        let changed = self.blender.config().cadence == Cadence::EveryObservation;
        let reads = !self.pending && (changed || self.on_observation.is_some());
        let report = reads.then(|| self.read_weights()).transpose()?;
        Ok((passes.output(blended)?, report))
    }

    /// The part of a pass that observes.
    fn observation(&self) -> Pass {
        if self.leave_sums { Pass::empty() } else { Pass::OBSERVE }
    }

    fn dot_then_blend<P: Passes>(
        &mut self,
        passes: &mut P,
        mut rows: Vec<Row<P::Gradient>>,
    ) -> Result<Vec<Option<P::Memory>>> {
        let mut none: Vec<_> = rows.iter().map(|_| None).collect();
        self.run(passes, &rows, &mut none, Pass::DOT)?;
        rows.iter_mut().for_each(|row| (row.train, row.valid) = (None, None));
        self.blend(passes, rows, Pass::BLEND | self.observation())
    }

    /// Runs a pass that blends, into new memory.
    fn blend<P: Passes>(
        &mut self,
        passes: &mut P,
        rows: Vec<Row<P::Gradient>>,
        what: Pass,
    ) -> Result<Vec<Option<P::Memory>>> {
        let reached = |row: &Row<_>| row.modalities.iter().any(Option::is_some);
        let memory = |(i, row)| reached(row).then(|| passes.memory(i)).transpose();
        let mut blended = rows.iter().enumerate().map(memory).collect::<Result<Vec<_>>>()?;
        self.run(passes, &rows, &mut blended, what)?;
        Ok(blended)
    }

    fn gradients<P: Passes>(&self, passes: &mut P, name: Loss, loss: P::Loss) -> Result<Gradients<P>> {
        let gradients = passes.gradients(name, loss, self.grad_scale)?;
        match gradients.iter().any(Option::is_some) {
            true => Ok(gradients),
            false => Err(Error::Unreached { loss: name }),
        }
    }

    /// Binds the plan to the rows, runs a pass, and releases it.
    fn run<P: Passes>(
        &mut self,
        passes: &mut P,
        rows: &[Row<P::Gradient>],
        blended: &mut [Option<P::Memory>],
        what: Pass,
    ) -> Result<()> {
        passes.bind(rows, blended, &mut |tensors: Vec<TensorGrads<'_>>, stream: StreamRef<'_>| {
            let plan = match self.plan.take() {
                Some(plan) => {
                    // The plan of no borrow becomes one that borrows the gradients.
                    let mut plan: Plan<'_> = plan;
                    plan.update(tensors, stream)?;
                    plan
                }
                None => self.blender.plan(tensors)?,
            };
            let ran = self.blender.pass(&plan, what, stream);
            self.plan = Some(plan.release());
            ran
        })
    }
}

fn weights_of(report: &Report) -> Vec<f32> {
    report.weights.iter().map(|weight| *weight as f32).collect()
}

impl fmt::Debug for Trainer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Trainer { weights, every, calls, .. } = self;
        f.debug_struct("Trainer").field("weights", weights).field("every", every).field("calls", calls).finish()
    }
}
