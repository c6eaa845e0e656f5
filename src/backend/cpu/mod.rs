//! The operations on the CPU.

mod pass;
mod pool;
#[cfg(test)]
mod tests;
mod vector;

use std::alloc::Layout;
use std::cell::UnsafeCell;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::abi::{MAX_MODALITIES, State};
use crate::error::{Error, Result};
use crate::solve::{Overfitting, Policy, solve_into};
use crate::state::{self, Average, Flags};
use crate::table::{Table, reserved};
use crate::tensor::Scale;

use pass::{Run, Sums, Work};
use pool::Pool;

/// Bytes that a pass moves from which on the blend is written past the cache: more than any second-level cache holds,
/// so the blend would be evicted before it is read again, and writing it there costs a read of the line first.
const PAST_CACHE: u64 = 32 << 20;

/// A blender's memory and threads.
#[derive(Debug)]
pub(crate) struct Cpu {
    pool: Pool,
    /// At an address of its own for life: callers hold the addresses of the pending sums and of the f32 weights.
    state: NonNull<State>,
    run: Run,
}

// SAFETY: the state belongs to this value alone; addresses of it that callers hold are for them to order.
unsafe impl Send for Cpu {}
// SAFETY: no `&self` method but `state` touches the state, and that one only reads.
unsafe impl Sync for Cpu {}

/// A plan's partial sums, one per span. Only the blender that the plan was made for writes here, one call at a time.
#[derive(Debug)]
pub(crate) struct Partials(Vec<UnsafeCell<Sums>>);

// SAFETY: `Cpu::pass` is the only access. It takes the blender as `&mut`, and the blender refuses plans of others.
unsafe impl Sync for Partials {}

impl Cpu {
    pub(crate) fn new(threads: u32, start: &State) -> Result<Self> {
        let pool = Pool::new(threads)?;
        let layout = Layout::new::<State>();
        // SAFETY: the layout is not empty.
        let state = NonNull::new(unsafe { std::alloc::alloc(layout) }.cast::<State>())
            .ok_or(Error::OutOfMemory { what: "the blender", bytes: layout.size() as u64 })?;
        // SAFETY: `state` is fresh memory of the right layout.
        unsafe { state.write(*start) };
        Ok(Cpu { pool, state, run: pass::best() })
    }

    pub(crate) fn state(&self) -> &State {
        // SAFETY: alive until drop; callers promise not to write to it meanwhile.
        unsafe { self.state.as_ref() }
    }

    pub(crate) fn state_mut(&mut self) -> &mut State {
        // SAFETY: alive until drop; callers promise not to use it meanwhile.
        unsafe { self.state.as_mut() }
    }

    /// Address of the pending sums.
    pub(crate) fn pending_sums(&self) -> *mut f64 {
        // SAFETY: a place inside the state, which is alive.
        unsafe { (&raw mut (*self.state.as_ptr()).pending).cast() }
    }

    /// Address of the f32 weights.
    pub(crate) fn device_weights(&self) -> *const f32 {
        // SAFETY: a place inside the state, which is alive.
        unsafe { (&raw const (*self.state.as_ptr()).weights_f32).cast() }
    }

    /// Room for the partial sums of a table.
    pub(crate) fn partials(table: &Table) -> Result<Partials> {
        let mut partials = reserved(table.spans.len() as u64)?;
        partials.resize_with(table.spans.len(), || UnsafeCell::new(Sums::default()));
        Ok(Partials(partials))
    }

    /// Dot, blend, or both.
    ///
    /// # Safety
    /// The table's addresses are as `TensorGrads::from_raw` says or come from slices, and `partials` are those of
    /// a plan of this blender.
    pub(crate) unsafe fn pass(&mut self, table: &Table, partials: &Partials, dot: bool, blend: bool, accumulate: bool) {
        let weights = self.state().weights_f32;
        let work = Work {
            modalities: table.modalities,
            tensors: &table.tensors,
            addresses: &table.addresses,
            indices: &table.indices,
            weights: &weights,
            dot,
            blend,
            accumulate,
            past_cache: blend && table.floor_bytes(dot, blend, accumulate) >= PAST_CACHE,
        };
        let run = self.run;
        let next = AtomicUsize::new(0);
        let job = || {
            while let Some(index) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|i| *i < table.spans.len()) {
                let span = table.spans[index];
                let mut sums = Sums::default();
                // SAFETY: the caller vouches for the addresses; spans are disjoint, and each is taken once.
                unsafe {
                    run(&work, &table.chunks[span.first as usize..span.end as usize], &mut sums);
                    *partials.0[index].get() = sums;
                }
            }
        };
        // Waking the others costs more than one span.
        if table.spans.len() > 1 {
            self.pool.run(&job)
        } else {
            job()
        }
        if dot {
            let state = self.state_mut();
            for k in 0..table.modalities {
                let (mut c, mut d) = (0.0, 0.0);
                for partial in &partials.0 {
                    // SAFETY: all threads are done, and `&mut self` keeps other passes of this blender away.
                    let [part_c, part_d] = unsafe { (*partial.get())[k] };
                    c += part_c;
                    d += part_d;
                }
                state.pending[k] += c;
                state.pending[table.modalities + k] += d;
            }
        }
    }

    /// Closes the pending sums as one observation; says whether it entered the moments.
    pub(crate) fn observe(&mut self, modalities: usize, average: Average, scale: Scale) -> bool {
        let scale = read_scale(scale);
        state::observe(self.state_mut(), modalities, average, scale)
    }

    /// Puts in force what the moments say.
    pub(crate) fn reweight(&mut self, modalities: usize, mut policy: Policy) {
        let state = self.state_mut();
        if state.observed < modalities as u64 {
            policy.overfitting = Overfitting::Uncorrelated;
        }
        let mut mean = [0.0; MAX_MODALITIES];
        let mut second_moment = [0.0; MAX_MODALITIES * MAX_MODALITIES];
        let mut weights = [0.0; MAX_MODALITIES];
        let (mean, second_moment) = (&mut mean[..modalities], &mut second_moment[..modalities * modalities]);
        let weights = &mut weights[..modalities];
        state::moments(state, modalities, mean, second_moment);
        let found = solve_into(mean, second_moment, &policy, weights);
        if !found.contains(Flags::HELD) {
            state::put_weights(state, weights);
        }
        let kept = Flags::from_bits_retain(state.flags) & Flags::NONFINITE;
        state.flags = (kept | found).bits();
    }
}

/// The scale's value now.
fn read_scale(scale: Scale) -> f32 {
    match scale {
        Scale::Value(scale) => scale,
        // SAFETY: `GradScale::from_raw` had the caller promise a live f32 that nothing writes to meanwhile.
        Scale::Address(address) => unsafe { *std::ptr::with_exposed_provenance::<f32>(address as usize) },
    }
}

impl Drop for Cpu {
    fn drop(&mut self) {
        // SAFETY: made by `new` with this layout, and freed here only.
        unsafe { std::alloc::dealloc(self.state.as_ptr().cast(), Layout::new::<State>()) }
    }
}
