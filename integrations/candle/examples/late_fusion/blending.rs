//! How to link gradblend to a Rust trainer, here candle's: this file is all of it.
//!
//! Candle owns the gradients and keeps owning them. gradblend gets their addresses, reads them where they lie, and
//! writes the blended gradient into tensors that candle owns too. Nothing is copied.

use std::cell::Cell;
use std::ffi::c_void;
use std::ptr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp1, Layout, Storage, Var};
use gradblend::{Blender, Config, DType, Device, Plan, Report, Stream, TensorGrads};

/// What the backward passes of one step left behind.
pub(crate) struct Gradients {
    /// v_k, one store for each loss, the fused one last. A store has no gradient for a parameter that its loss does not
    /// reach.
    pub(crate) losses: Vec<GradStore>,
    /// t, if it comes from a batch of its own. Else it is the fused v_k: the same tensors, given twice.
    pub(crate) train: Option<GradStore>,
    /// g, from held-out samples.
    pub(crate) valid: GradStore,
}

/// A blender, its plan over a network's parameters, and the tensors that it blends into.
///
/// Fields are dropped in this order: the plan goes before what it points at.
pub(crate) struct Blending {
    plan: Plan<'static>,
    blender: Blender,
    /// What the plan points at; kept until the plan points elsewhere.
    gradients: Option<Gradients>,
    blended: GradStore,
    blended_at: Vec<*mut c_void>,
    parameters: Vec<Var>,
    modalities: usize,
    /// Time spent in gradblend, and in gathering addresses for it.
    pub(crate) library: Duration,
}

impl Blending {
    pub(crate) fn new(parameters: &[Var], config: Config) -> Result<Self> {
        let modalities = config.modalities as usize;
        let blender = Blender::new(&Device::cpu(), config)?;
        // The blended gradients are allocated once. The optimiser finds them where it would find those of a backward
        // pass: in a GradStore.
        let mut blended = GradStore::default();
        let mut blended_at = Vec::with_capacity(parameters.len());
        let mut tensors = Vec::with_capacity(parameters.len());
        for parameter in parameters {
            let gradient = parameter.zeros_like()?;
            let address = AddressOf(Cell::new(ptr::null_mut()));
            gradient.inplace_op1(&address)?;
            let address = address.0.get().cast::<c_void>();
            blended.insert(parameter, gradient);
            blended_at.push(address);
            let absent = vec![ptr::null(); modalities];
            // SAFETY: the only address is that of a buffer of `elem_count` f32 that `blended` keeps alive for longer
            // than the plan, and that only this module writes to.
            tensors.push(unsafe {
                let len = parameter.elem_count() as u64;
                TensorGrads::from_raw(len, DType::F32, ptr::null(), ptr::null(), &absent, address)
            });
        }
        // A plan is made of lengths and dtypes, so it can be made before there is any gradient.
        let plan = blender.plan(tensors)?;
        let (parameters, gradients) = (parameters.to_vec(), None);
        Ok(Blending { plan, blender, gradients, blended, blended_at, parameters, modalities, library: Duration::ZERO })
    }

    /// Observes the gradients of a step and blends them with the weights in force before it, in one pass over memory.
    ///
    /// The blended gradients are valid until the next step: it writes over them.
    pub(crate) fn step(&mut self, gradients: Gradients) -> Result<&GradStore> {
        let begun = Instant::now();
        if gradients.losses.len() != self.modalities {
            bail!("expected the gradients of {} losses, got {}", self.modalities, gradients.losses.len());
        }
        let train = gradients.train.as_ref().or(gradients.losses.last()).context("there is no loss")?;
        let mut tensors = Vec::with_capacity(self.parameters.len());
        let mut losses = vec![ptr::null(); self.modalities];
        for (parameter, &blended) in self.parameters.iter().zip(&self.blended_at) {
            for (slot, store) in losses.iter_mut().zip(&gradients.losses) {
                *slot = address(store, parameter)?;
            }
            let (train, valid) = (address(train, parameter)?, address(&gradients.valid, parameter)?);
            // SAFETY: each address but NULL is that of `elem_count` contiguous f32 (`address` checks it). `self` keeps
            // the tensors alive until the plan points elsewhere or is dropped. Candle never writes to a finished
            // gradient, and of the blended ones only the optimiser holds any, which reads them between two steps.
            tensors.push(unsafe {
                let len = parameter.elem_count() as u64;
                TensorGrads::from_raw(len, DType::F32, train, valid, &losses, blended)
            });
        }
        self.plan.update(tensors, Stream::default())?;
        // Only now does the plan no longer point at the gradients of the step before.
        self.gradients = Some(gradients);
        self.blender.step(&self.plan, Stream::default())?;
        self.library += begun.elapsed();
        Ok(&self.blended)
    }

    /// Puts the weights in force that this super-epoch's observations ask for, and starts the next super-epoch. The
    /// report is of the moment between the two.
    pub(crate) fn end_super_epoch(&mut self) -> Result<Report> {
        let begun = Instant::now();
        self.blender.reweight(Stream::default())?;
        let report = self.blender.report(Stream::default())?;
        self.blender.reset(Stream::default())?;
        self.library += begun.elapsed();
        Ok(report)
    }

    pub(crate) fn report(&mut self) -> Result<Report> {
        let begun = Instant::now();
        let report = self.blender.report(Stream::default())?;
        self.library += begun.elapsed();
        Ok(report)
    }

    /// The weights in force, for a loss that is weighted before its one backward pass.
    pub(crate) fn weights(&self) -> &[f32] {
        // SAFETY: the blender has K f32 there for as long as it lives, and no call that writes to them can run while
        // this borrow of it lasts.
        unsafe { std::slice::from_raw_parts(self.blender.device_weights(), self.modalities) }
    }
}

/// Where candle keeps the gradient of a parameter; NULL if the loss does not reach it.
fn address(store: &GradStore, parameter: &Var) -> Result<*const c_void> {
    let Some(gradient) = store.get(parameter) else { return Ok(ptr::null()) };
    if gradient.shape() != parameter.shape() {
        bail!("a parameter of shape {:?} has a gradient of shape {:?}", parameter.shape(), gradient.shape());
    }
    let (storage, layout) = gradient.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(buffer)), Some((start, end))) => {
            let elements = buffer.get(start..end).context("a gradient reaches past its buffer")?;
            Ok(elements.as_ptr().cast())
        }
        (_, None) => bail!("the gradient of a parameter of shape {:?} is not contiguous", parameter.shape()),
        _ => bail!("the gradient of a parameter of shape {:?} is not f32 on the CPU", parameter.shape()),
    }
}

/// Tells the address of a tensor's own buffer. Candle lends a buffer for writing to an in-place operation only.
struct AddressOf(Cell<*mut f32>);

impl InplaceOp1 for AddressOf {
    fn name(&self) -> &'static str {
        "address-of"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        match (storage, layout.contiguous_offsets()) {
            // From the vector, not from a slice of it: the address stays good when candle lends the vector again.
            (CpuStorage::F32(buffer), Some((start, end))) if end <= buffer.len() => {
                self.0.set(buffer.as_mut_ptr().wrapping_add(start));
                Ok(())
            }
            _ => candle_core::bail!("the gradient to blend into is not a contiguous f32 tensor on the CPU"),
        }
    }
}
