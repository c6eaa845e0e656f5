//! Two later methods, implemented anew from their papers for networks with one encoder and one head per modality and a
//! fused head.

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use super::train::Task;

/// GradNorm (Z. Chen, V. Badrinarayanan, C.-Y. Lee, A. Rabinovich, ICML 2018, algorithm 1): weights that bring the norms of
/// the weighted gradients w_k v_k to a common scale, greater for a loss that falls slowly.
///
/// The paper takes the norms on the last layer that all losses share. Here no layer is shared by all: each uni-modal loss
/// shares its encoder with the fused loss. So the norms are those on all encoders.
pub(crate) struct GradNorm {
    /// The paper's weights: their sum is K.
    weights: Vec<f64>,
    /// The losses of the first step.
    initial: Vec<f64>,
    /// Adam's moments of the gradients of the weights.
    moments: Vec<(f64, f64)>,
    steps: i32,
}

impl GradNorm {
    /// How strongly rates of training are equalised: the value of the paper's results on NYUv2.
    const ALPHA: f64 = 1.5;
    /// Adam's learning rate for the weights.
    const RATE: f64 = 0.025;
    /// The least weight: it is not to become negative.
    const LEAST: f64 = 1e-3;

    pub(crate) fn new(k: usize) -> Self {
        GradNorm { weights: vec![1.0; k], initial: Vec::new(), moments: vec![(0.0, 0.0); k], steps: 0 }
    }

    /// The weights with a sum of 1.
    pub(crate) fn shares(&self) -> Vec<f64> {
        self.weights.iter().map(|weight| weight / self.weights.len() as f64).collect()
    }

    /// The gradients of sum_k w_k L_k. The weights are then changed for the next step.
    pub(crate) fn backward<T: Task>(&mut self, task: &T, losses: &[Tensor]) -> Result<GradStore> {
        let gradients = losses.iter().map(|loss| Ok(loss.backward()?)).collect::<Result<Vec<_>>>()?;
        let norm = |gradients: &GradStore| -> Result<f64> {
            let squares = task.encoders().iter().flatten().filter_map(|parameter| gradients.get(parameter));
            Ok(squares.map(|gradient| dot(gradient, gradient)).sum::<Result<f64>>()?.sqrt())
        };
        let norms = gradients.iter().map(norm).collect::<Result<Vec<_>>>()?;
        let values = losses.iter().map(|loss| Ok(f64::from(loss.to_scalar::<f32>()?))).collect::<Result<Vec<_>>>()?;
        let blended = weighted_sum(task.parameters(), gradients, &self.weights)?;
        self.update(&norms, &values);
        Ok(blended)
    }

    /// A step of Adam on sum_k |w_k norm_k - target_k|, the targets taken as constant.
    fn update(&mut self, norms: &[f64], losses: &[f64]) {
        const BETA: (f64, f64) = (0.9, 0.999);
        if self.initial.is_empty() {
            self.initial = losses.to_vec();
        }
        let len = losses.len() as f64;
        let scaled: Vec<f64> = self.weights.iter().zip(norms).map(|(weight, norm)| weight * norm).collect();
        let mean_norm = scaled.iter().sum::<f64>() / len;
        let progress: Vec<f64> = losses.iter().zip(&self.initial).map(|(loss, first)| loss / first).collect();
        let mean_progress = progress.iter().sum::<f64>() / len;
        self.steps += 1;
        let (first, second) = (1.0 - BETA.0.powi(self.steps), 1.0 - BETA.1.powi(self.steps));
        for (k, weight) in self.weights.iter_mut().enumerate() {
            let target = mean_norm * (progress[k] / mean_progress).powf(Self::ALPHA);
            let difference = scaled[k] - target;
            let gradient = if difference == 0.0 { 0.0 } else { difference.signum() * norms[k] };
            let (m, v) = &mut self.moments[k];
            *m = BETA.0 * *m + (1.0 - BETA.0) * gradient;
            *v = BETA.1 * *v + (1.0 - BETA.1) * gradient * gradient;
            *weight = (*weight - Self::RATE * (*m / first) / ((*v / second).sqrt() + 1e-8)).max(Self::LEAST);
        }
        let sum: f64 = self.weights.iter().sum();
        self.weights.iter_mut().for_each(|weight| *weight *= len / sum);
    }
}

/// MMPareto (Y. Wei, D. Hu, ICML 2024): the gradients of the sum of all losses, but for the encoders, where the gradient of
/// the fused loss and that of the encoder's own loss are summed alike only if they agree. If not, their weights are those of
/// the convex combination of least norm. The result is not shorter than the plain sum, and 1.5 times as long (the paper's
/// gamma).
pub(crate) fn mm_pareto<T: Task>(task: &T, losses: &[Tensor]) -> Result<GradStore> {
    const GAMMA: f64 = 1.5;
    let (fused, own) = losses.split_last().context("there is no loss")?;
    let fused = fused.backward()?;
    // Uni-modal losses have no parameter in common, so one backward pass has the gradients of all.
    let own = Tensor::stack(own, 0)?.sum_all()?.backward()?;
    let mut of_encoders = Vec::new();
    for encoder in task.encoders() {
        let gradients =
            encoder.iter().filter_map(|parameter| Some((parameter, fused.get(parameter)?, own.get(parameter)?)));
        let gradients: Vec<(&Var, &Tensor, &Tensor)> = gradients.collect();
        let (mut ff, mut fo, mut oo) = (0.0, 0.0, 0.0);
        for (_, f, o) in &gradients {
            ff += dot(f, f)?;
            fo += dot(f, o)?;
            oo += dot(o, o)?;
        }
        let scales = pareto_scales(ff, fo, oo).map(|scale| GAMMA * scale);
        for (parameter, f, o) in gradients {
            of_encoders.push((parameter, ((f * scales[0])? + (o * scales[1])?)?));
        }
    }
    let mut sum = weighted_sum(task.parameters(), vec![fused, own], &[1.0, 1.0])?;
    for (parameter, gradient) in of_encoders {
        sum.insert(parameter, gradient);
    }
    Ok(sum)
}

/// The factors of two gradients f and o with the products <f, f>, <f, o> and <o, o>: 1 and 1 if they agree, else those of
/// the convex combination of least norm, with a sum of 2, and longer if that is shorter than f + o.
fn pareto_scales(ff: f64, fo: f64, oo: f64) -> [f64; 2] {
    if fo > 0.0 {
        return [1.0, 1.0];
    }
    // The denominator is |f - o|^2: 0 only if both are 0.
    let share = if ff + oo > 0.0 { (oo - fo) / (ff - 2.0 * fo + oo) } else { 0.5 };
    let scales = [2.0 * share, 2.0 * (1.0 - share)];
    let squared = scales[0].powi(2) * ff + 2.0 * scales[0] * scales[1] * fo + scales[1].powi(2) * oo;
    let longer = (ff + 2.0 * fo + oo) / squared;
    // Opposite gradients have a combination of length 0, which no factor makes longer.
    if longer > 1.0 && longer.is_finite() { scales.map(|scale| scale * longer.sqrt()) } else { scales }
}

/// The products of two gradients.
fn dot(a: &Tensor, b: &Tensor) -> Result<f64> {
    Ok(f64::from((a * b)?.sum_all()?.to_scalar::<f32>()?))
}

/// sum_k w_k v_k. A gradient that a loss does not have is 0.
fn weighted_sum(parameters: &[Var], gradients: Vec<GradStore>, weights: &[f64]) -> Result<GradStore> {
    let mut sums = Vec::new();
    for parameter in parameters {
        let mut sum: Option<Tensor> = None;
        for (gradients, weight) in gradients.iter().zip(weights) {
            if let Some(gradient) = gradients.get(parameter) {
                let term = (gradient * *weight)?;
                sum = Some(sum.map_or_else(|| Ok(term.clone()), |sum| sum + &term)?);
            }
        }
        sums.extend(sum.map(|sum| (parameter, sum)));
    }
    // candle lets nobody make a store.
    let mut store = gradients.into_iter().next().context("there is no loss")?;
    for (parameter, sum) in sums {
        store.insert(parameter, sum);
    }
    Ok(store)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: &[f64], b: &[f64]) {
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-9), "{a:?}, expected {b:?}");
    }

    #[test]
    fn pareto_scales_of_gradients_that_agree_or_not() {
        close(&pareto_scales(4.0, 0.5, 1.0), &[1.0, 1.0]);
        // Orthogonal, lengths 2 and 1: the shares of the least norm are 1/5 and 4/5, its length 2 sqrt(4/5); |f + o|^2 = 5.
        let longer = (5.0_f64 / 3.2).sqrt();
        close(&pareto_scales(4.0, 0.0, 1.0), &[0.4 * longer, 1.6 * longer]);
        // Opposite: 0 whatever the factor.
        close(&pareto_scales(4.0, -2.0, 1.0), &[2.0 / 3.0, 4.0 / 3.0]);
        close(&pareto_scales(0.0, 0.0, 0.0), &[1.0, 1.0]);
    }

    #[test]
    fn grad_norm_gives_more_weight_to_a_loss_with_a_small_gradient() {
        let mut grad_norm = GradNorm::new(2);
        grad_norm.update(&[3.0, 1.0], &[1.0, 1.0]);
        // The first step of Adam is its rate: 1 - 0.025 and 1 + 0.025, with a sum of 2.
        close(&grad_norm.shares(), &[0.4875, 0.5125]);
        // Norms that are equal with these weights: a loss that has fallen less has the greater target.
        let mut grad_norm = GradNorm::new(2);
        grad_norm.update(&[1.0, 1.0], &[1.0, 1.0]);
        let before = grad_norm.shares();
        grad_norm.update(&[1.0, 1.0], &[0.9, 0.1]);
        assert!(grad_norm.shares()[0] > before[0], "{:?}", grad_norm.shares());
    }
}
