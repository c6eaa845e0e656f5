//! Gradient-Blending for [candle](candle_core): blends the gradients of K losses in the memory of candle's tensors.
//!
//! candle owns the gradients. gradblend reads them where they lie, and candle takes over the memory that gradblend blended
//! into, so no gradient is copied. Tensors are on the CPU, contiguous, and f32, f16 or bf16.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use gradblend_candle::{GradBlend, weighted_loss};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let vars = [Var::new(&[1.0_f32, 2.0], &Device::Cpu)?];
//! let mut gb = GradBlend::new(&vars, gradblend::Config::new(2))?; // the loss of one input, and the fused loss
//!
//! // At each step, or at every r-th: one backward pass per loss, and one of the fused loss on held-out samples.
//! let fused_loss = |target: f32| vars[0].affine(1.0, -f64::from(target))?.sqr()?.sum_all();
//! let losses = [vars[0].sqr()?.sum_all()?, fused_loss(1.5)?];
//! let stores = [losses[0].backward()?, losses[1].backward()?];
//! let blended = gb.step(&stores, None, &fused_loss(1.4)?.backward()?)?;
//! println!("{}", blended.get(&vars[0]).unwrap()); // for the optimiser
//! gb.reweight()?;
//!
//! // At the steps between: one backward pass on the weighted loss.
//! let store = weighted_loss(&losses.map(Some), gb.weights())?.backward()?;
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

use std::ops::Range;

use candle_core::backend::BackendStorage;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, Shape, Storage, StorageRef, Tensor, Var, WithDType};
use gradblend::{Blender, Config, Device, Element, Plan, Report, Role, Stream, TensorGrads, bf16, f16};

#[cfg(test)]
mod tests;

/// Result of a call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of this crate. Parameters are counted in the order of [`GradBlend::new`], losses in that of the gradients.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// gradblend rejected a configuration or the gradients.
    #[error(transparent)]
    Blend(#[from] gradblend::Error),
    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// The number of losses, weights or gradient stores is not K.
    #[error("expected {expected} losses, got {got}")]
    Losses {
        /// K.
        expected: usize,
        /// The number given.
        got: usize,
    },
    /// A loss is absent although its weight is not 0.
    #[error("loss {loss} has the weight {weight} and is absent")]
    AbsentLoss {
        /// The loss.
        loss: usize,
        /// Its weight.
        weight: f32,
    },
    /// All weights are 0, so there is no loss to minimise.
    #[error("all weights are 0")]
    NoWeight,
    /// A gradient does not have its parameter's shape.
    #[error("parameter {parameter}: {role} has shape {got:?}, expected {expected:?}")]
    Shape {
        /// The parameter.
        parameter: usize,
        /// The gradient.
        role: Role,
        /// Shape of the parameter.
        expected: Shape,
        /// Shape of the gradient.
        got: Shape,
    },
    /// A parameter's dtype is not supported.
    #[error("parameter {parameter} is {got}, expected f32, f16 or bf16")]
    Parameter {
        /// The parameter.
        parameter: usize,
        /// Its dtype.
        got: &'static str,
    },
    /// A gradient does not have its parameter's dtype.
    #[error("parameter {parameter}: {role} is {got}, expected {expected}")]
    DType {
        /// The parameter.
        parameter: usize,
        /// The gradient.
        role: Role,
        /// Dtype of the parameter.
        expected: &'static str,
        /// Dtype of the gradient.
        got: &'static str,
    },
    /// A gradient is not on the CPU.
    #[error("parameter {parameter}: {role} is on {got}, expected the CPU")]
    Device {
        /// The parameter.
        parameter: usize,
        /// The gradient.
        role: Role,
        /// Where it is.
        got: String,
    },
    /// A gradient is not contiguous in memory.
    #[error("parameter {parameter}: {role} is not contiguous")]
    NotContiguous {
        /// The parameter.
        parameter: usize,
        /// The gradient.
        role: Role,
    },
}

/// Blends the gradients of K losses over the parameters of a network.
#[derive(Debug)]
pub struct GradBlend {
    blender: Blender,
    /// Made by the first step. Bound to gradients only during a step; `None` after a step that failed in gradblend.
    plan: Option<Plan<'static>>,
    vars: Vec<Var>,
    weights: Vec<f32>,
}

impl GradBlend {
    /// A blender for the parameters `vars`, with uniform weights. `config.modalities` is the number of losses, the fused
    /// one included.
    ///
    /// # Errors
    /// [`Error::Parameter`]; [`Error::Blend`] for a configuration out of range.
    pub fn new(vars: &[Var], config: Config) -> Result<Self> {
        let supported = |var: &Var| matches!(var.dtype(), DType::F32 | DType::F16 | DType::BF16);
        if let Some(parameter) = vars.iter().position(|var| !supported(var)) {
            return Err(Error::Parameter { parameter, got: vars[parameter].dtype().as_str() });
        }
        let blender = Blender::new(&Device::cpu(), config)?;
        let mut gb = GradBlend { blender, plan: None, vars: vars.to_vec(), weights: Vec::new() };
        gb.read_weights()?;
        Ok(gb)
    }

    fn read_weights(&mut self) -> Result<()> {
        self.weights = self.report()?.weights.into_iter().map(|weight| weight as f32).collect();
        Ok(())
    }

    /// Observes the gradients of a step and blends them with the weights in force before it, in one pass over memory.
    ///
    /// `losses` has v_k, one store per loss, the fused one last; a loss does not reach a parameter that has no gradient in
    /// its store. `train` is t, the gradient of the fused loss on another training batch; `None` takes the fused v_k, which
    /// costs no further backward pass but is biased against the fused loss. `valid` is g, its gradient on held-out samples.
    ///
    /// Returns the blended gradients, for the optimiser. It has none for a parameter that no loss reaches.
    ///
    /// # Errors
    /// [`Error::Losses`], [`Error::Shape`], [`Error::DType`], [`Error::Device`], [`Error::NotContiguous`], and
    /// [`Error::Blend`] where only one of t and g reaches a parameter. Nothing is observed then.
    pub fn step(&mut self, losses: &[GradStore], train: Option<&GradStore>, valid: &GradStore) -> Result<GradStore> {
        let expected = self.blender.config().modalities as usize;
        if losses.len() != expected {
            return Err(Error::Losses { expected, got: losses.len() });
        }
        let vars = self.vars.iter().enumerate();
        let locked = vars.map(|(parameter, var)| Locked::new(parameter, var, losses, train, valid));
        let locked = locked.collect::<Result<Vec<_>>>()?;
        let mut blended: Vec<CpuStorage> = self.vars.iter().map(zeros).collect();
        let tensors = locked.iter().zip(&mut blended).map(|(locked, blended)| locked.bind(blended));
        let tensors = tensors.collect::<Result<Vec<_>>>()?;
        let plan = match self.plan.take() {
            Some(plan) => {
                // The plan of no borrow becomes one that borrows the gradients.
                let mut plan: Plan<'_> = plan;
                plan.update(tensors, Stream::default())?;
                plan
            }
            None => self.blender.plan(tensors)?,
        };
        self.blender.step(&plan, Stream::default())?;
        self.plan = Some(plan.release());
        let reached: Vec<bool> = locked.iter().map(|locked| locked.v.iter().any(Option::is_some)).collect();
        drop(locked);
        self.read_weights()?;
        let mut store = GradStore::default();
        for ((var, blended), _) in self.vars.iter().zip(blended).zip(reached).filter(|(_, reached)| *reached) {
            store.insert(var, to_tensor(blended, var.shape())?);
        }
        Ok(store)
    }

    /// Puts the weights in force that the observations since the last [`reset`](Self::reset) ask for.
    ///
    /// # Errors
    /// None on the CPU.
    pub fn reweight(&mut self) -> Result<()> {
        self.blender.reweight(Stream::default())?;
        self.read_weights()
    }

    /// Forgets the observations and keeps the weights: a new super-epoch.
    ///
    /// # Errors
    /// None on the CPU.
    pub fn reset(&mut self) -> Result<()> {
        Ok(self.blender.reset(Stream::default())?)
    }

    /// Weights, moments, overfitting-to-generalisation ratios and flags.
    ///
    /// # Errors
    /// None on the CPU.
    pub fn report(&mut self) -> Result<Report> {
        Ok(self.blender.report(Stream::default())?)
    }

    /// The K weights in force, for [`weighted_loss`].
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }
}

/// sum_k w_k L_k, for one backward pass. Losses of weight 0 are left out and may be `None`.
///
/// # Errors
/// [`Error::Losses`], [`Error::AbsentLoss`], [`Error::NoWeight`].
pub fn weighted_loss(losses: &[Option<Tensor>], weights: &[f32]) -> Result<Tensor> {
    if losses.len() != weights.len() {
        return Err(Error::Losses { expected: weights.len(), got: losses.len() });
    }
    let mut total: Option<Tensor> = None;
    for (k, (loss, &weight)) in losses.iter().zip(weights).enumerate().filter(|(_, (_, weight))| **weight != 0.0) {
        let loss = loss.as_ref().ok_or(Error::AbsentLoss { loss: k, weight })?;
        let term = (loss * f64::from(weight))?;
        total = Some(match total {
            Some(total) => (total + term)?,
            None => term,
        });
    }
    total.ok_or(Error::NoWeight)
}

/// The gradients of one parameter, locked against writes by other threads while gradblend reads them.
struct Locked<'g> {
    parameter: usize,
    /// `None` also where t is v_fused, which is locked once: a second lock could wait for a writer between the two.
    train: Option<Gradient<'g>>,
    valid: Option<Gradient<'g>>,
    v: Vec<Option<Gradient<'g>>>,
}

impl<'g> Locked<'g> {
    fn new(
        parameter: usize,
        var: &Var,
        losses: &'g [GradStore],
        train: Option<&'g GradStore>,
        valid: &'g GradStore,
    ) -> Result<Self> {
        let find = |store: &'g GradStore, role| Gradient::find(store, var, parameter, role);
        let v =
            losses.iter().enumerate().map(|(k, store)| find(store, Role::Modality(k))).collect::<Result<Vec<_>>>()?;
        let own = train.map(|store| find(store, Role::Train)).transpose()?.flatten();
        let valid = find(valid, Role::Valid)?;
        let has_train = if train.is_some() { own.is_some() } else { v.last().is_some_and(Option::is_some) };
        if has_train != valid.is_some() {
            let missing = if has_train { Role::Valid } else { Role::Train };
            return Err(gradblend::Error::Unpaired { tensor: parameter, missing }.into());
        }
        Ok(Locked { parameter, train: own, valid, v })
    }

    /// The gradients with `blended` as their output.
    fn bind<'a>(&'a self, blended: &'a mut CpuStorage) -> Result<TensorGrads<'a>> {
        match blended {
            CpuStorage::F16(blended) => self.bind_as(blended),
            CpuStorage::BF16(blended) => self.bind_as(blended),
            CpuStorage::F32(blended) => self.bind_as(blended),
            other => Err(Error::Parameter { parameter: self.parameter, got: other.dtype().as_str() }),
        }
    }

    fn bind_as<'a, T: WithDType + Element>(&'a self, blended: &'a mut [T]) -> Result<TensorGrads<'a>> {
        let elements = |gradient: &'a Option<Gradient<'g>>| gradient.as_ref().map(Gradient::elements::<T>).transpose();
        let v = self.v.iter().map(elements).collect::<Result<Vec<_>>>()?;
        let train = elements(&self.train)?.or(v.last().copied().flatten());
        let tensor = match (train, elements(&self.valid)?) {
            (Some(train), Some(valid)) => TensorGrads::new(train, valid, &v),
            _ => TensorGrads::blend_only(&v),
        };
        Ok(tensor.blended(blended))
    }
}

/// One gradient, locked against writes.
struct Gradient<'g> {
    storage: StorageRef<'g>,
    /// Its elements in the storage.
    range: Range<usize>,
}

impl<'g> Gradient<'g> {
    /// The gradient of a parameter; `None` if the loss does not reach it.
    fn find(store: &'g GradStore, var: &Var, parameter: usize, role: Role) -> Result<Option<Self>> {
        let Some(gradient) = store.get(var) else { return Ok(None) };
        if gradient.shape() != var.shape() {
            let (expected, got) = (var.shape().clone(), gradient.shape().clone());
            return Err(Error::Shape { parameter, role, expected, got });
        }
        let (storage, layout) = gradient.storage_and_layout();
        if !matches!(&*storage, Storage::Cpu(_)) {
            return Err(Error::Device { parameter, role, got: format!("{:?}", gradient.device().location()) });
        }
        if gradient.dtype() != var.dtype() {
            let (expected, got) = (var.dtype().as_str(), gradient.dtype().as_str());
            return Err(Error::DType { parameter, role, expected, got });
        }
        let (start, end) = layout.contiguous_offsets().ok_or(Error::NotContiguous { parameter, role })?;
        Ok(Some(Gradient { storage, range: start..end }))
    }

    /// The elements, where candle keeps them.
    fn elements<T: WithDType>(&self) -> Result<&[T]> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(&T::cpu_storage_as_slice(storage)?[self.range.clone()]),
            _ => Err(candle_core::Error::Msg("the gradient left the CPU".into()).into()),
        }
    }
}

/// Memory for the blended gradient of a parameter, whose dtype was checked.
fn zeros(var: &Var) -> CpuStorage {
    let len = var.elem_count();
    match var.dtype() {
        DType::F16 => CpuStorage::F16(vec![f16::ZERO; len]),
        DType::BF16 => CpuStorage::BF16(vec![bf16::ZERO; len]),
        _ => CpuStorage::F32(vec![0.0; len]),
    }
}

/// A tensor of these elements, which are moved.
fn to_tensor(elements: CpuStorage, shape: &Shape) -> candle_core::Result<Tensor> {
    let device = &candle_core::Device::Cpu;
    match elements {
        CpuStorage::F32(elements) => Tensor::from_vec(elements, shape, device),
        CpuStorage::F16(elements) => Tensor::from_vec(elements, shape, device),
        CpuStorage::BF16(elements) => Tensor::from_vec(elements, shape, device),
        other => candle_core::bail!("a blended gradient is {}", other.dtype().as_str()),
    }
}
