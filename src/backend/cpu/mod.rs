//! The CPU backend.

mod convert;
mod modalities;
mod pass;
mod pool;
#[cfg(test)]
mod tests;
mod vector;

use std::cell::UnsafeCell;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::abi::{MAX_MODALITIES, State};
use crate::config::{Cadence, Config, Pass};
use crate::error::{Error, Result};
use crate::gradient::Tracked;
use crate::ranks;
use crate::solve::{Overfitting, solve_into};
use crate::state::{self, Flags};
use crate::table::{Buffer, Grouping, Table, reserved};
use crate::tensor::{Scale, StreamRef};

use super::{Backend, Memory, PendingSums};
use pass::{Kernel, SpanPass, Sums};
use pool::Pool;

/// Minimum traffic in bytes from which the blended gradient is written by non-temporal stores. A pass of this size
/// evicts the blended gradient from a core's caches before it is read again, and an ordinary store reads the cache line
/// first.
const NON_TEMPORAL_BYTES: u64 = 32 << 20;

/// A blender's state and threads.
#[derive(Debug)]
pub(crate) struct Cpu {
    config: Config,
    scale: Scale,
    pool: Pool,
    kernel: Kernel,
    /// Owned, and never moved: callers hold the addresses of the pending sums and of the f32 weights.
    state: NonNull<State>,
    /// The pending sums of this rank before those of all were added.
    kept: PendingSums,
}

// SAFETY: the state belongs to this value alone; callers that hold addresses into it order their accesses themselves.
unsafe impl Send for Cpu {}
// SAFETY: the only `&self` methods that access the state read it or compute addresses.
unsafe impl Sync for Cpu {}

/// The partial sums of a plan, one per span.
#[derive(Debug)]
pub(crate) struct PlanMemory {
    partials: Vec<UnsafeCell<Sums>>,
}

// SAFETY: `Cpu::pass` is the only access. It borrows the backend as `&mut`, and a blender rejects plans of other blenders.
unsafe impl Sync for PlanMemory {}

impl Cpu {
    pub(crate) fn new(config: Config, state: &State) -> Result<Self> {
        let pool = Pool::new(config.threads)?;
        let bytes = size_of::<State>() as u64;
        let mut memory =
            bytemuck::try_zeroed_box::<State>().map_err(|()| Error::OutOfMemory { what: "the blender", bytes })?;
        *memory = *state;
        let state = NonNull::from(Box::leak(memory));
        Ok(Cpu { config, scale: Scale::default(), pool, kernel: pass::best(), state, kept: [0.0; 2 * MAX_MODALITIES] })
    }

    fn state(&self) -> &State {
        // SAFETY: the state is alive until drop, and callers do not write to it during a call.
        unsafe { self.state.as_ref() }
    }

    fn state_mut(&mut self) -> &mut State {
        // SAFETY: the state is alive until drop, and callers do not access it during a call.
        unsafe { self.state.as_mut() }
    }

    /// Runs DOT and BLEND.
    ///
    /// # Safety
    /// As [`Backend::pass`].
    unsafe fn run(&mut self, table: &Table, memory: &PlanMemory, what: Pass) {
        let weights = self.state().weights_f32;
        let blend = what.contains(Pass::BLEND);
        let span_pass = SpanPass {
            modalities: table.modalities,
            tensors: &table.rows.tensors,
            addresses: &table.rows.addresses,
            indices: &table.rows.indices,
            weights: &weights,
            dot: what.contains(Pass::DOT),
            blend,
            accumulate: what.contains(Pass::ACCUMULATE),
            non_temporal: blend && table.minimum_traffic(what.bits()) >= NON_TEMPORAL_BYTES,
        };
        let kernel = self.kernel;
        let next = AtomicUsize::new(0);
        let job = || {
            while let Some(index) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|i| *i < table.spans.len()) {
                let span = table.spans[index];
                let mut sums = Sums::default();
                // SAFETY: the addresses are valid by the contract of `run`; spans are disjoint, and one thread claims each.
                unsafe {
                    kernel(&span_pass, &table.chunks[span.first as usize..span.end as usize], &mut sums);
                    *memory.partials[index].get() = sums;
                }
            }
        };
        // Waking the other threads costs more than one span.
        if table.spans.len() > 1 {
            self.pool.run(&job)
        } else {
            job()
        }
        if span_pass.dot {
            self.add_partials(memory, table.modalities);
        }
    }

    /// Adds the partial sums to the pending sums, in the order of the spans.
    fn add_partials(&mut self, memory: &PlanMemory, modalities: usize) {
        let state = self.state_mut();
        for k in 0..modalities {
            let (mut c, mut d) = (0.0, 0.0);
            for partial in &memory.partials {
                // SAFETY: all threads have finished, and `&mut self` excludes other passes of this blender.
                let [partial_c, partial_d] = unsafe { (*partial.get())[k] };
                c += partial_c;
                d += partial_d;
            }
            state.pending[k] += c;
            state.pending[modalities + k] += d;
        }
    }

    /// The gradient scale now.
    fn scale(&self) -> f32 {
        match self.scale {
            Scale::Value(scale) => scale,
            // SAFETY: `GradScale::from_raw` requires a live f32 that nothing writes to during an observation.
            Scale::Address(address) => unsafe { *std::ptr::with_exposed_provenance::<f32>(address as usize) },
        }
    }
}

impl Backend for Cpu {
    type Memory = PlanMemory;

    fn config(&self) -> &Config {
        &self.config
    }

    fn grouping(&self) -> Grouping {
        Grouping::THREADS
    }

    fn memory(&self, table: &Table) -> Result<PlanMemory> {
        let mut partials = reserved(table.spans.len() as u64)?;
        partials.resize_with(table.spans.len(), || UnsafeCell::new(Sums::default()));
        Ok(PlanMemory { partials })
    }

    unsafe fn pass(&mut self, table: &Table, memory: &PlanMemory, what: Pass, stream: StreamRef<'_>) -> Result<()> {
        if what.reads() {
            // SAFETY: the caller fulfils the contract of `pass`.
            unsafe { self.run(table, memory, what) };
        }
        if what.contains(Pass::OBSERVE) { self.observe(stream) } else { Ok(()) }
    }

    fn observe(&mut self, stream: StreamRef<'_>) -> Result<()> {
        let (k, average, scale) = (self.config.k(), self.config.average, self.scale());
        let entered = state::observe(self.state_mut(), k, average, scale);
        if entered && self.config.cadence == Cadence::EveryObservation { self.reweight(stream) } else { Ok(()) }
    }

    fn reweight(&mut self, _: StreamRef<'_>) -> Result<()> {
        let (k, mut policy) = (self.config.k(), self.config.policy);
        let state = self.state_mut();
        if state.observed < k as u64 {
            // S of fewer than K observations is singular.
            policy.overfitting = Overfitting::Uncorrelated;
        }
        let mut mean = [0.0; MAX_MODALITIES];
        let mut second_moment = [0.0; MAX_MODALITIES * MAX_MODALITIES];
        let mut weights = [0.0; MAX_MODALITIES];
        let (mean, second_moment) = (&mut mean[..k], &mut second_moment[..k * k]);
        let weights = &mut weights[..k];
        state::moments(state, k, mean, second_moment);
        let found = solve_into(mean, second_moment, &policy, weights);
        if !found.flags.contains(Flags::HELD) {
            state::set_weights(state, weights);
        }
        let kept = Flags::from_bits_retain(state.flags) & Flags::NONFINITE;
        state.flags = (kept | found.flags).bits();
        state.floored = found.floored;
        Ok(())
    }

    fn reset(&mut self, _: StreamRef<'_>) -> Result<()> {
        state::reset(self.state_mut());
        Ok(())
    }

    fn set_weights(&mut self, weights: &[f64], _: StreamRef<'_>) -> Result<()> {
        state::set_weights(self.state_mut(), weights);
        Ok(())
    }

    fn set_grad_scale(&mut self, scale: Scale) -> Result<()> {
        self.scale = scale;
        Ok(())
    }

    fn read(&self, _: StreamRef<'_>) -> Result<State> {
        Ok(*self.state())
    }

    fn write(&mut self, state: &State, _: StreamRef<'_>) -> Result<()> {
        *self.state_mut() = *state;
        Ok(())
    }

    fn pending_sums(&self) -> *mut f64 {
        // SAFETY: `pending` is a field of the state, which is alive.
        unsafe { (&raw mut (*self.state.as_ptr()).pending).cast() }
    }

    fn sums<'a>(&'a mut self, _: StreamRef<'a>) -> Result<ranks::Sums<'a>> {
        let count = 2 * self.config.k();
        Ok(ranks::Sums::Host(&mut self.state_mut().pending[..count]))
    }

    fn record(&mut self, _: StreamRef<'_>) -> Result<()> {
        Ok(())
    }

    fn keep_sums(&mut self, _: StreamRef<'_>) -> Result<()> {
        self.kept = self.state().pending;
        Ok(())
    }

    fn kept_sums(&self, _: StreamRef<'_>) -> Result<PendingSums> {
        Ok(self.kept)
    }

    fn put_sums(&mut self, sums: &[f64], _: StreamRef<'_>) -> Result<()> {
        self.state_mut().pending[..sums.len()].copy_from_slice(sums);
        Ok(())
    }

    fn device_weights(&self) -> *const f32 {
        // SAFETY: `weights_f32` is a field of the state, which is alive.
        unsafe { (&raw const (*self.state.as_ptr()).weights_f32).cast() }
    }
}

impl Memory for PlanMemory {
    fn check_update(&self, _: impl Iterator<Item = Buffer>, _: StreamRef<'_>) -> Result<()> {
        Ok(())
    }

    fn check_tracked(&self, tracked: &[Tracked<'_>], _: Option<StreamRef<'_>>) -> Result<()> {
        match tracked.first() {
            Some(Tracked { address, .. }) => Err(Error::DeviceMemory { address: *address }),
            None => Ok(()),
        }
    }

    fn submitted(&self, _: &[Tracked<'_>]) -> Result<()> {
        Ok(())
    }

    fn update(&self, _: &Table, _: StreamRef<'_>) -> Result<()> {
        Ok(())
    }
}

impl Drop for Cpu {
    fn drop(&mut self) {
        // SAFETY: `new` leaked this box, and nothing uses it after drop.
        drop(unsafe { Box::from_raw(self.state.as_ptr()) });
    }
}
