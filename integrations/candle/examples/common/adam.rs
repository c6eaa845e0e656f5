//! The optimiser.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

/// Adam. Our own because candle's does not expose its state, which a checkpoint of the loss-based estimator needs.
#[derive(Clone)]
pub(crate) struct Adam {
    rate: f64,
    steps: i32,
    /// First and second moment of each parameter's gradient. Replaced, never written to, so a clone is a checkpoint.
    moments: Vec<(Tensor, Tensor)>,
}

impl Adam {
    pub(crate) fn new(parameters: &[Var], rate: f64) -> Result<Self> {
        let zeros = |parameter: &Var| Ok((parameter.zeros_like()?, parameter.zeros_like()?));
        Ok(Adam { rate, steps: 0, moments: parameters.iter().map(zeros).collect::<Result<_>>()? })
    }

    /// One step. A parameter without a gradient does not change.
    pub(crate) fn step(&mut self, parameters: &[Var], gradients: &GradStore) -> Result<()> {
        const BETA: (f64, f64) = (0.9, 0.999);
        self.steps += 1;
        let (first, second) = (1.0 - BETA.0.powi(self.steps), 1.0 - BETA.1.powi(self.steps));
        for (parameter, moments) in parameters.iter().zip(&mut self.moments) {
            let Some(gradient) = gradients.get(parameter) else { continue };
            let m = ((&moments.0 * BETA.0)? + (gradient * (1.0 - BETA.0))?)?;
            let v = ((&moments.1 * BETA.1)? + (gradient.sqr()? * (1.0 - BETA.1))?)?;
            let update = ((&m * (self.rate / first))? / ((&v / second)?.sqrt()? + 1e-8)?)?;
            parameter.set(&(parameter.as_tensor() - update)?)?;
            *moments = (m, v);
        }
        Ok(())
    }
}
