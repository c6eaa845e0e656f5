//! gradblend's calls, on whichever device.

use std::ffi::c_void;

use anyhow::{Result, ensure};
use gradblend::{Average, Blender, Config, Device, Plan, Stream, TensorGrads};

use crate::case::Operation;
use crate::inputs::{Buffer, Inputs};
use crate::oracle::Sums;

/// An operation, with the plan of each input set.
pub(crate) struct Calls {
    operation: Operation,
    /// `step` as the three calls that it stands for.
    three_calls: bool,
    blender: Blender,
    modalities: usize,
    /// One for each input set.
    plans: Vec<Plan<'static>>,
}

impl Calls {
    pub(crate) fn new(device: &Device, inputs: &Inputs, operation: Operation, three_calls: bool) -> Result<Self> {
        let config = Config { average: Average::Mean, ..Config::new(inputs.modalities as u32) };
        let mut blender = Blender::new(device, config)?;
        let weights: Vec<f64> = inputs.weights.iter().map(|w| f64::from(*w)).collect();
        blender.set_weights(&weights, Stream::default())?;
        Ok(Calls { operation, three_calls, blender, modalities: inputs.modalities, plans: Vec::new() })
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn plans(&self) -> usize {
        self.plans.len()
    }

    /// Makes the plan of the next input set, whose buffers start at the addresses that `start` returns.
    ///
    /// # Safety
    /// The buffers live longer than `self`, and nothing else uses them while an operation runs.
    pub(crate) unsafe fn plan(&mut self, inputs: &Inputs, start: impl Fn(Buffer) -> u64) -> Result<()> {
        let grads: Vec<TensorGrads<'static>> = (inputs.tensors.iter())
            .map(|(tensor, range)| {
                let address = |present: bool, buffer| {
                    let address = (start(buffer) + range.start as u64 * inputs.dtype.bytes()) as usize;
                    if present { std::ptr::with_exposed_provenance::<c_void>(address) } else { std::ptr::null() }
                };
                let modality = |k| address(tensor.present(k), Buffer::Modality(k));
                let v: Vec<_> = (0..inputs.modalities).map(modality).collect();
                let dots = tensor.dots(self.operation);
                let (t, g) = (address(dots, Buffer::Train), address(dots, Buffer::Valid));
                let blended = address(self.operation.blends(), Buffer::Blended).cast_mut();
                // SAFETY: `len` elements start at each address, in buffers that live longer than the plan.
                unsafe { TensorGrads::from_raw(tensor.len as u64, inputs.dtype, t, g, &v, blended) }
            })
            .collect();
        self.plans.push(self.blender.plan(grads)?);
        Ok(())
    }

    pub(crate) fn run(&mut self, set: usize, stream: Stream) -> Result<()> {
        let (blender, plan) = (&mut self.blender, &self.plans[set]);
        match self.operation {
            Operation::Dot => blender.dot(plan, stream)?,
            Operation::Blend => blender.blend(plan, stream)?,
            Operation::Step if self.three_calls => {
                blender.dot(plan, stream)?;
                blender.blend(plan, stream)?;
                blender.observe(stream)?;
            }
            Operation::Step => blender.step(plan, stream)?,
        }
        Ok(())
    }

    /// The sums after the first run, which is done. `read` copies the pending sums from their address.
    pub(crate) fn sums(
        &mut self,
        stream: Stream,
        read: impl FnOnce(*const f64, &mut [f64]) -> Result<()>,
    ) -> Result<Sums> {
        if self.operation == Operation::Step {
            // After one observation the mean is c_k, and S_kk is the square of d_k.
            let report = self.blender.report(stream)?;
            ensure!(report.observed == 1, "{} observations in one step", report.observed);
            let d = report.second_moment.iter().map(|s| s.sqrt()).collect();
            return Ok(Sums { c: report.mean, d, unsigned: true });
        }
        let mut pending = vec![0.0; 2 * self.modalities];
        read(self.blender.pending_sums(), &mut pending)?;
        Ok(Sums::from_pending(pending))
    }
}
