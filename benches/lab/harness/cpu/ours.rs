//! This crate's calls.

use std::ffi::c_void;

use gradblend::{Blender, Config, Device, Plan, Stream, TensorGrads};

use super::super::lists::Real;
use super::super::oracle::Sums;
use super::super::ours::{self, Which};
use super::super::{Operation, Way};
use super::Inputs;

pub(super) struct Calls {
    operation: Operation,
    apart: bool,
    blender: Blender,
    /// Of raw addresses, as other contenders write to the same blended gradient in their turn.
    plan: Plan<'static>,
}

impl Calls {
    pub(super) fn new<T: Real>(inputs: &Inputs<T>, apart: bool) -> Result<Self, String> {
        let config = Config { threads: inputs.threads as u32, ..ours::config(inputs.lists.modalities.len()) };
        let blender = ours::blender(&Device::cpu(), config, &inputs.weights)?;
        let lists = &inputs.lists;
        let grads: Vec<TensorGrads<'static>> = (lists.tensors.iter())
            .map(|(tensor, range)| {
                let at = |which: Which| match which {
                    Which::Train => lists.train[range.start..].as_ptr().cast::<c_void>(),
                    Which::Valid => lists.valid[range.start..].as_ptr().cast(),
                    Which::Modality(k) => lists.modalities[k][range.start..].as_ptr().cast(),
                    Which::Blended => lists.blended[range.start..].as_ptr().cast(),
                };
                // SAFETY: the lists live longer than the plan and nothing writes to them while an operation runs.
                unsafe { ours::grads::<T>(inputs.operation, tensor, inputs.weights.len(), at) }
            })
            .collect();
        let plan = blender.plan(&grads).map_err(|error| error.to_string())?;
        Ok(Calls { operation: inputs.operation, apart, blender, plan })
    }
}

impl<T: Real> Way<Inputs<T>> for Calls {
    fn run(&mut self, _: &mut Inputs<T>, _: usize) {
        let done = ours::call(self.operation, self.apart, &mut self.blender, &self.plan, Stream::default());
        done.expect("the operation");
    }

    fn sums(&mut self, inputs: &mut Inputs<T>) -> Option<Sums> {
        if self.operation == Operation::Step {
            return Some(ours::observed(&mut self.blender, Stream::default()));
        }
        // SAFETY: 2K sums that are there for the blender's life, and no call on it runs.
        let pending = unsafe { std::slice::from_raw_parts(self.blender.pending_sums(), 2 * inputs.weights.len()) };
        Some(Sums::of(pending.to_vec()))
    }
}
