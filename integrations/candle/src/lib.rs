//! Gradient-Blending for [candle](candle_core): blends the gradients of K losses in the memory of candle's tensors.
//!
//! candle owns the gradients. gradblend reads them by address, and candle takes over the memory that gradblend blended
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

use std::ffi::c_void;
use std::ptr;

use candle_core::backprop::GradStore;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, Shape, Storage, StorageRef, Tensor, Var};
use gradblend::{Blender, Config, DType, Device, Plan, Report, Role, Stream, TensorGrads};

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
    /// Bound to gradients only during a step. `None` only after a panic in one.
    plan: Option<Plan<'static>>,
    vars: Vec<(Var, DType)>,
}

impl GradBlend {
    /// A blender for the parameters `vars`, with uniform weights. `config.modalities` is the number of losses, the fused
    /// one included.
    ///
    /// # Errors
    /// [`Error::Parameter`]; [`Error::Blend`] for a configuration out of range.
    pub fn new(vars: &[Var], config: Config) -> Result<Self> {
        let blender = Blender::new(&Device::cpu(), config)?;
        let absent = vec![NULL; config.modalities as usize];
        let mut typed = Vec::with_capacity(vars.len());
        for (parameter, var) in vars.iter().enumerate() {
            let dtype = match var.dtype() {
                candle_core::DType::F32 => DType::F32,
                candle_core::DType::F16 => DType::F16,
                candle_core::DType::BF16 => DType::BF16,
                got => return Err(Error::Parameter { parameter, got: got.as_str() }),
            };
            typed.push((var.clone(), dtype));
        }
        let plan = blender.plan(typed.iter().map(|(var, dtype)| {
            // SAFETY: all addresses are NULL.
            unsafe { TensorGrads::from_raw(var.elem_count() as u64, *dtype, NULL, NULL, &absent, ptr::null_mut()) }
        }))?;
        Ok(GradBlend { plan: Some(plan.release()), blender, vars: typed })
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
    pub fn step<'a>(
        &mut self,
        losses: &'a [GradStore],
        train: Option<&'a GradStore>,
        valid: &'a GradStore,
    ) -> Result<GradStore> {
        let expected = self.blender.config().modalities as usize;
        if losses.len() != expected {
            return Err(Error::Losses { expected, got: losses.len() });
        }
        let mut v = vec![NULL; expected];
        let (mut guards, mut tensors, mut blended) = (Vec::new(), Vec::new(), Vec::new());
        for (parameter, (var, dtype)) in self.vars.iter().enumerate() {
            let mut address = |store: &'a GradStore, role| -> Result<*const c_void> {
                let Some(gradient) = store.get(var) else { return Ok(NULL) };
                let (address, guard) = locate(gradient, var, parameter, role)?;
                guards.push(guard);
                Ok(address)
            };
            for (k, store) in losses.iter().enumerate() {
                v[k] = address(store, Role::Modality(k))?;
            }
            let valid = address(valid, Role::Valid)?;
            let train = train.map_or(Ok(v[expected - 1]), |store| address(store, Role::Train))?;
            let len = var.elem_count();
            let mut output = ptr::null_mut();
            if v.iter().any(|v| !v.is_null()) {
                let (storage, start) = allocate(*dtype, len);
                blended.push((var, storage));
                output = start;
            }
            // SAFETY: each address but NULL is that of `len` elements of `dtype`, which `locate` and `allocate` see to. The
            // plan is released before this call returns. Until then the stores are borrowed, `guards` keep others from
            // writing to the gradients, and nothing else has the address of the output.
            tensors.push(unsafe { TensorGrads::from_raw(len as u64, *dtype, train, valid, &v, output) });
        }
        let Some(mut plan) = self.plan.take() else { return Err(gradblend::Error::ReleasedPlan.into()) };
        let updated = plan.update(tensors, Stream::default());
        let stepped = updated.and_then(|()| self.blender.step(&plan, Stream::default()));
        self.plan = Some(plan.release());
        stepped?;
        let mut store = GradStore::default();
        for (var, storage) in blended {
            store.insert(var, Tensor::from_storage(Storage::Cpu(storage), var.shape(), BackpropOp::none(), false));
        }
        Ok(store)
    }

    /// Puts the weights in force that the observations since the last [`reset`](Self::reset) ask for.
    ///
    /// # Errors
    /// None on the CPU.
    pub fn reweight(&mut self) -> Result<()> {
        Ok(self.blender.reweight(Stream::default())?)
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
        // SAFETY: the blender keeps K f32 at this address for its life, and writes to them only in calls on `&mut self`.
        unsafe { std::slice::from_raw_parts(self.blender.device_weights(), self.blender.config().modalities as usize) }
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

const NULL: *const c_void = ptr::null();

/// Address of a gradient, once it is known to be contiguous, on the CPU, and of its parameter's shape and dtype. The guard
/// keeps it from being written to.
fn locate<'a>(
    gradient: &'a Tensor,
    var: &Var,
    parameter: usize,
    role: Role,
) -> Result<(*const c_void, StorageRef<'a>)> {
    if gradient.shape() != var.shape() {
        let (expected, got) = (var.shape().clone(), gradient.shape().clone());
        return Err(Error::Shape { parameter, role, expected, got });
    }
    let (guard, layout) = gradient.storage_and_layout();
    let Storage::Cpu(storage) = &*guard else {
        return Err(Error::Device { parameter, role, got: format!("{:?}", gradient.device().location()) });
    };
    if gradient.dtype() != var.dtype() {
        let (expected, got) = (var.dtype().as_str(), gradient.dtype().as_str());
        return Err(Error::DType { parameter, role, expected, got });
    }
    let range = layout.contiguous_offsets().map(|(start, end)| start..end);
    let address = match (storage, range) {
        (CpuStorage::F32(buffer), Some(range)) => buffer.get(range).map(|slice| slice.as_ptr().cast()),
        (CpuStorage::F16(buffer), Some(range)) => buffer.get(range).map(|slice| slice.as_ptr().cast()),
        (CpuStorage::BF16(buffer), Some(range)) => buffer.get(range).map(|slice| slice.as_ptr().cast()),
        _ => None,
    };
    Ok((address.ok_or(Error::NotContiguous { parameter, role })?, guard))
}

/// A zeroed buffer of candle's, and its address for writing.
fn allocate(dtype: DType, len: usize) -> (CpuStorage, *mut c_void) {
    fn zeros<T: Clone + Default>(len: usize, storage: fn(Vec<T>) -> CpuStorage) -> (CpuStorage, *mut c_void) {
        let mut buffer = vec![T::default(); len];
        let address = buffer.as_mut_ptr().cast();
        (storage(buffer), address)
    }
    match dtype {
        DType::F32 => zeros(len, CpuStorage::F32),
        DType::F16 => zeros(len, CpuStorage::F16),
        DType::BF16 => zeros(len, CpuStorage::BF16),
    }
}
