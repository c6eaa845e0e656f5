//! What a user writes first: on one tensor after another, t - g into a buffer and two dots a modality, then a product
//! and axpys.

use anyhow::Result;

use crate::backend::Implementation;
use crate::case::Operation;
use crate::inputs;
use crate::oracle::Sums;

/// One tensor of one input set.
#[derive(Clone, Copy)]
pub(crate) struct At {
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "the CPU has one input set"))]
    pub(crate) set: usize,
    /// Index of the tensor.
    pub(crate) tensor: usize,
}

/// The steps that vary between implementations, for inputs `I`.
pub(crate) trait Steps<I> {
    /// Prepares the sums, before the first tensor.
    fn begin_sums(&mut self, _inputs: &mut I) -> Result<()> {
        Ok(())
    }

    /// difference = t - g
    fn difference(&mut self, inputs: &mut I, at: At) -> Result<()>;

    /// Adds <g, v_k> to c_k, and <difference, v_k> to d_k.
    fn dots(&mut self, inputs: &mut I, at: At, k: usize) -> Result<()>;

    /// blended = w_k v_k for the first modality that reaches the tensor, which needs no zeros to add to; else
    /// blended += w_k v_k.
    fn blend(&mut self, inputs: &mut I, at: At, k: usize, first: bool) -> Result<()>;

    /// Completes the sums, after the last tensor.
    fn finish_sums(&mut self, _inputs: &mut I) -> Result<()> {
        Ok(())
    }

    /// The sums of the last execution.
    fn sums(&mut self, inputs: &mut I) -> Result<Sums>;
}

/// An operation in these steps, tensor by tensor.
pub(crate) struct PerTensor<S> {
    pub(crate) operation: Operation,
    pub(crate) steps: S,
}

impl<I: AsRef<inputs::Inputs>, S: Steps<I>> Implementation<I> for PerTensor<S> {
    fn run(&mut self, inputs: &mut I, set: usize) -> Result<()> {
        let PerTensor { operation, steps } = self;
        let host: &inputs::Inputs = (*inputs).as_ref();
        let (count, modalities) = (host.tensors.len(), host.modalities);
        if operation.dots() {
            steps.begin_sums(inputs)?;
        }
        for index in 0..count {
            let tensor = (*inputs).as_ref().tensors[index].0;
            let at = At { set, tensor: index };
            let present = || (0..modalities).filter(|k| tensor.present(*k));
            if tensor.dots(*operation) {
                steps.difference(inputs, at)?;
                for k in present() {
                    steps.dots(inputs, at, k)?;
                }
            }
            if operation.blends() {
                for (nth, k) in present().enumerate() {
                    steps.blend(inputs, at, k, nth == 0)?;
                }
            }
        }
        if operation.dots() { steps.finish_sums(inputs) } else { Ok(()) }
    }

    fn sums(&mut self, inputs: &mut I) -> Result<Option<Sums>> {
        self.steps.sums(inputs).map(Some)
    }
}
