//! The blender: the operations, the report, and the saved state.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::abi::{MAX_MODALITIES, State};
use crate::backend::cpu::{Cpu, Partials};
#[cfg(feature = "cuda")]
use crate::backend::cuda::{Cuda, Scratch};
use crate::checkpoint;
use crate::config::{Cadence, Config, Pass};
use crate::device::{Device, Kind};
use crate::error::{Error, Result};
use crate::report::Report;
use crate::state;
use crate::table::{Grouping, Table};
use crate::tensor::{GradScale, Scale, Stream, TensorGrads};

/// A checked list of tensors: what the operations run on, without allocating or looking anything up.
///
/// It belongs to the blender that made it, and either may be dropped first: on a CUDA device, each waits for the blender's
/// work. That of a graph is waited for by waiting for the whole device, which spoils what is just being captured there; no
/// graph that a blender or plan is in may be launched once it is dropped. A plan of slices borrows them; [`release`](Self::release) gives them back and
/// keeps the table, and [`update`](Self::update) takes new ones of the same lengths and dtypes.
#[derive(Debug)]
pub struct Plan<'a> {
    blender: u64,
    table: Table,
    place: Place,
    bound: bool,
    /// Whether it has slices. A run on them waits, so that nothing uses them once it has returned.
    slices: bool,
    borrow: PhantomData<&'a mut [u8]>,
}

/// What a plan has where its blender works.
#[derive(Debug)]
enum Place {
    Cpu(Partials),
    #[cfg(feature = "cuda")]
    Cuda(Scratch),
}

impl<'a> Plan<'a> {
    /// Takes other addresses, and other choices of which are absent, for the same lengths and dtypes. Allocates nothing.
    /// `stream` orders the update after work that was put on it before; the CPU ignores it. A graph that was captured
    /// before sees the new addresses.
    ///
    /// # Errors
    /// As [`Blender::plan`], [`Error::Capturing`], [`Error::Cuda`], and [`Error::PlanTensors`], [`Error::Length`], [`Error::MixedDTypes`] where the tensors are
    /// not those the plan was made for. The plan is then as it was; but after [`Error::Cuda`] from a copy it is released,
    /// and a graph that it is in must not be launched.
    pub fn update(&mut self, tensors: impl IntoIterator<Item = TensorGrads<'a>>, stream: Stream) -> Result<()> {
        let tensors: &[TensorGrads<'a>] = &tensors.into_iter().collect::<Vec<_>>();
        self.table.check_update(tensors)?;
        match &self.place {
            Place::Cpu(_) => {}
            #[cfg(feature = "cuda")]
            Place::Cuda(scratch) => {
                scratch.check_memory(lists(tensors))?;
                scratch.check_update(stream)?;
            }
        }
        self.table.bind(tensors);
        self.slices = tensors.iter().any(|tensor| tensor.slices);
        self.bound = true;
        match &self.place {
            Place::Cpu(_) => {
                let _ = stream;
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Place::Cuda(scratch) => {
                let copied = scratch.update(&self.table, stream, self.slices);
                // Where the copies failed there is no telling what the device has.
                self.bound = copied.is_ok();
                copied
            }
        }
    }

    /// How many tensors it was made for, and with how many modalities each.
    #[cfg(feature = "capi")]
    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.table.tensors.len(), self.table.modalities)
    }

    /// Gives the gradients back. The plan cannot run until it is updated.
    pub fn release(mut self) -> Plan<'static> {
        self.table.unbind();
        Plan {
            blender: self.blender,
            table: self.table,
            place: self.place,
            bound: false,
            slices: false,
            borrow: PhantomData,
        }
    }
}

/// All lists, with their names.
#[cfg(feature = "cuda")]
fn lists<'b>(
    tensors: &'b [TensorGrads<'_>],
) -> impl Iterator<Item = (usize, crate::error::Role, crate::tensor::Grad)> + 'b {
    tensors.iter().enumerate().flat_map(|(tensor, grads)| grads.lists().map(move |(list, grad)| (tensor, list, grad)))
}

/// Estimates the weights of K losses from their gradients, and blends the gradients with them.
///
/// ```
/// use gradblend::{Blender, Config, Device, Stream, TensorGrads};
/// # fn main() -> gradblend::Result<()> {
/// let mut blender = Blender::new(&Device::cpu(), Config::new(2))?;
/// let (t, g) = ([1.0_f32, 2.0], [1.0, 1.0]);
/// let (video, audio) = ([1.0, 0.5], [0.5, 1.0]);
/// let mut out = [0.0; 2];
/// let tensors = [TensorGrads::new(&t, &g, &[Some(&video), Some(&audio)]).blended(&mut out)];
/// let plan = blender.plan(tensors)?;
/// blender.step(&plan, Stream::default())?;
/// blender.reweight(Stream::default())?;
/// let report = blender.report(Stream::default())?;
/// // <g, v> = 1.5 for both; <t - g, v> = 0.5 and 1: the weights are as 1 / 0.25 to 1 / 1.
/// assert!((report.weights[0] - 0.8).abs() < 1e-9);
/// // The step blended with the weights in force before it, 1 / 2 each.
/// assert_eq!(out, [0.75, 0.75]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Blender {
    number: u64,
    config: Config,
    scale: GradScale,
    backend: Backend,
}

/// Where a blender works: its state, and what runs the operations.
#[derive(Debug)]
enum Backend {
    Cpu(Cpu),
    #[cfg(feature = "cuda")]
    Cuda(Cuda),
}

impl Blender {
    /// A blender with uniform weights and no observation.
    ///
    /// # Errors
    /// [`Error::Modalities`], [`Error::Decay`] or [`Error::Damping`] for a configuration out of range,
    /// [`Error::Threads`] if a thread could not be started, [`Error::OutOfMemory`]; as [`Device::cuda`], and
    /// [`Error::Cuda`].
    pub fn new(device: &Device, config: Config) -> Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        config.check()?;
        let modalities = config.modalities as usize;
        let mut start = state::EMPTY;
        state::put_weights(&mut start, &[1.0 / modalities as f64; MAX_MODALITIES][..modalities]);
        let backend = match device.0 {
            Kind::Cpu => Backend::Cpu(Cpu::new(config.threads, &start)?),
            #[cfg(feature = "cuda")]
            Kind::Cuda(ordinal) => Backend::Cuda(Cuda::new(ordinal, config.args(), &start)?),
        };
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Ok(Blender { number, config, scale: GradScale::default(), backend })
    }

    /// The configuration that the blender was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    fn modalities(&self) -> usize {
        self.config.modalities as usize
    }

    /// Checks `tensors` and makes a plan of them. No gradient is read.
    ///
    /// `tensors` may be empty, tensors may be empty, and there may be any number of them. A blended gradient may be
    /// exactly one of its own tensor's modality gradients, else it overlaps nothing.
    ///
    /// # Errors
    /// Each names the tensor and the list: [`Error::ModalityCount`], [`Error::Unpaired`], [`Error::Length`],
    /// [`Error::MixedDTypes`], [`Error::Misaligned`], [`Error::OutOfRange`], [`Error::Overlap`],
    /// [`Error::UnknownMemory`]; and [`Error::OutOfMemory`], [`Error::Cuda`].
    pub fn plan<'a>(&self, tensors: impl IntoIterator<Item = TensorGrads<'a>>) -> Result<Plan<'a>> {
        let tensors: &[TensorGrads<'a>] = &tensors.into_iter().collect::<Vec<_>>();
        let grouping = match &self.backend {
            Backend::Cpu(_) => Grouping::THREADS,
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => Grouping::BLOCKS,
        };
        let table = Table::new(self.modalities(), tensors, grouping)?;
        let place = match &self.backend {
            Backend::Cpu(_) => Place::Cpu(Cpu::partials(&table)?),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => {
                cuda.check_memory(lists(tensors))?;
                Place::Cuda(cuda.scratch(&table)?)
            }
        };
        let slices = tensors.iter().any(|tensor| tensor.slices);
        Ok(Plan { blender: self.number, table, place, bound: true, slices, borrow: PhantomData })
    }

    /// One pass over memory that does any of DOT, BLEND (with ACCUMULATE: blended += instead of =) and OBSERVE. The blend
    /// uses the weights in force at entry.
    ///
    /// On a CUDA device the work is put on `stream`, and a plan of addresses does not wait for it. A plan of slices, which
    /// only a device that reads the host's memory takes, does, and cannot be captured in a graph.
    ///
    /// # Errors
    /// [`Error::Pass`] for no bit, an unknown one, or ACCUMULATE without BLEND; [`Error::ForeignPlan`];
    /// [`Error::ReleasedPlan`]; [`Error::Capturing`], [`Error::Cuda`].
    pub fn pass(&mut self, plan: &Plan<'_>, what: Pass, stream: Stream) -> Result<()> {
        let bad = what.is_empty() || !Pass::all().contains(what);
        if bad || (what.contains(Pass::ACCUMULATE) && !what.contains(Pass::BLEND)) {
            return Err(Error::Pass { bits: what.bits() });
        }
        if plan.blender != self.number {
            return Err(Error::ForeignPlan);
        }
        if !plan.bound {
            return Err(Error::ReleasedPlan);
        }
        match (&mut self.backend, &plan.place) {
            (Backend::Cpu(cpu), Place::Cpu(partials)) => {
                let (dot, blend) = (what.contains(Pass::DOT), what.contains(Pass::BLEND));
                if dot || blend {
                    let accumulate = what.contains(Pass::ACCUMULATE);
                    // SAFETY: the plan is bound, to slices that it borrows or to addresses that its maker vouches for,
                    // and it is this blender's.
                    unsafe { cpu.pass(&plan.table, partials, dot, blend, accumulate) };
                }
                if what.contains(Pass::OBSERVE) { self.observe(stream) } else { Ok(()) }
            }
            #[cfg(feature = "cuda")]
            (Backend::Cuda(cuda), Place::Cuda(scratch)) => {
                // SAFETY: as above; and where there are slices, the call waits.
                unsafe { cuda.pass(scratch, what.bits(), self.scale.0, stream, plan.slices) }
            }
            // A blender makes plans for where it works, and refuses those of others.
            #[cfg(feature = "cuda")]
            _ => Err(Error::ForeignPlan),
        }
    }

    /// Adds c_k = <g, v_k> and d_k = <t - g, v_k>, summed over the tensors, to the pending sums.
    ///
    /// May be called many times before [`observe`](Self::observe): per layer, per modality, per shard. Tensors without
    /// train and validation gradients add nothing. |computed - exact| <= 2^-16 * sum |a_i b_i| for each product, barring
    /// overflow, plus 2^-149 an element for underflow.
    ///
    /// # Errors
    /// [`Error::ForeignPlan`], [`Error::ReleasedPlan`], [`Error::Capturing`], [`Error::Cuda`].
    pub fn dot(&mut self, plan: &Plan<'_>, stream: Stream) -> Result<()> {
        self.pass(plan, Pass::DOT, stream)
    }

    /// Writes sum_k w_k v_k, with the weights in force, to each tensor's blended gradient, if it has one; zeros where no
    /// modality is present. Accumulates in f32, rounds once.
    ///
    /// # Errors
    /// [`Error::ForeignPlan`], [`Error::ReleasedPlan`], [`Error::Capturing`], [`Error::Cuda`].
    pub fn blend(&mut self, plan: &Plan<'_>, stream: Stream) -> Result<()> {
        self.pass(plan, Pass::BLEND, stream)
    }

    /// [`dot`](Self::dot), [`blend`](Self::blend), [`observe`](Self::observe), in this order and to the same bits, in
    /// one pass over memory.
    ///
    /// # Errors
    /// [`Error::ForeignPlan`], [`Error::ReleasedPlan`], [`Error::Capturing`], [`Error::Cuda`].
    pub fn step(&mut self, plan: &Plan<'_>, stream: Stream) -> Result<()> {
        self.pass(plan, Pass::DOT | Pass::BLEND | Pass::OBSERVE, stream)
    }

    /// Closes the pending sums as one observation and zeroes them; zeros count as an observation too.
    ///
    /// An observation with a product that is not finite, after division by the gradient scale squared, changes nothing
    /// but a counter and a flag. Reweights if the [`Cadence`] says so, unless the observation was skipped.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn observe(&mut self, stream: Stream) -> Result<()> {
        let _ = stream;
        let modalities = self.modalities();
        match &mut self.backend {
            Backend::Cpu(cpu) => {
                let entered = cpu.observe(modalities, self.config.average, self.scale.0);
                if entered && self.config.cadence == Cadence::EveryObservation {
                    cpu.reweight(modalities, self.config.policy);
                }
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => cuda.observe(self.scale.0, stream),
        }
    }

    /// Puts in force what [`solve`](crate::solve) makes of the moments. Before the first observation, or where there is
    /// nothing to go by, the weights stay and [`Flags::HELD`](crate::Flags::HELD) is set. Correlated solving with fewer than K observations
    /// (S would be singular) solves uncorrelated.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn reweight(&mut self, stream: Stream) -> Result<()> {
        let _ = stream;
        let modalities = self.modalities();
        match &mut self.backend {
            Backend::Cpu(cpu) => {
                cpu.reweight(modalities, self.config.policy);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => cuda.reweight(stream),
        }
    }

    /// Starts a new super-epoch: forgets n, m, S, the counters, the flags and the pending sums, and keeps the weights.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn reset(&mut self, stream: Stream) -> Result<()> {
        let _ = stream;
        match &mut self.backend {
            Backend::Cpu(cpu) => {
                state::reset(cpu.state_mut());
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => cuda.reset(stream),
        }
    }

    /// Puts `weights` in force as given, whatever their signs and sum.
    ///
    /// # Errors
    /// [`Error::Count`] unless there are K, [`Error::Weight`] for one that is not finite as f32; [`Error::Cuda`].
    pub fn set_weights(&mut self, weights: &[f64], stream: Stream) -> Result<()> {
        let _ = stream;
        if weights.len() != self.modalities() {
            let (expected, got) = (self.modalities(), weights.len());
            return Err(Error::Count { what: "the weights", expected, got });
        }
        if let Some(modality) = weights.iter().position(|w| !(*w as f32).is_finite()) {
            return Err(Error::Weight { modality, got: weights[modality] });
        }
        match &mut self.backend {
            Backend::Cpu(cpu) => {
                state::put_weights(cpu.state_mut(), weights);
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => cuda.set_weights(weights, stream),
        }
    }

    /// Sets the factor that gradients are scaled by from the next observation on. It is not part of the saved state. A graph keeps
    /// the scale, or the address of one, that it was captured with.
    ///
    /// # Errors
    /// [`Error::MisalignedScale`] for an address that is not aligned to an f32, [`Error::Scale`] for a value that is zero
    /// or not finite. Such a value behind an address makes the observation that reads it not finite.
    pub fn set_grad_scale(&mut self, scale: GradScale) -> Result<()> {
        match scale.0 {
            Scale::Address(address) if !address.is_multiple_of(4) => Err(Error::MisalignedScale { address }),
            Scale::Value(got) if got == 0.0 || !got.is_finite() => Err(Error::Scale { got }),
            #[cfg(feature = "cuda")]
            Scale::Address(address) => match &self.backend {
                Backend::Cpu(_) => Ok(()),
                Backend::Cuda(cuda) => cuda.check_scale(address),
            },
            _ => Ok(()),
        }?;
        self.scale = scale;
        Ok(())
    }

    /// The state once the work on `stream` is done.
    fn read(&self, stream: Stream) -> Result<State> {
        let _ = stream;
        match &self.backend {
            Backend::Cpu(cpu) => Ok(*cpu.state()),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => cuda.read(stream),
        }
    }

    /// Reads what the blender knows. Waits for `stream`.
    ///
    /// # Errors
    /// [`Error::Capturing`], [`Error::Cuda`].
    pub fn report(&mut self, stream: Stream) -> Result<Report> {
        Ok(Report::read(&self.read(stream)?, self.modalities()))
    }

    /// Reads S, K x K, row-major; zeros before the first observation. Waits for `stream`.
    ///
    /// # Errors
    /// [`Error::Capturing`], [`Error::Cuda`].
    pub fn second_moments(&mut self, stream: Stream) -> Result<Vec<f64>> {
        let modalities = self.modalities();
        let mut second_moment = vec![0.0; modalities * modalities];
        state::moments(&self.read(stream)?, modalities, &mut [], &mut second_moment);
        Ok(second_moment)
    }

    /// Address of the K weights in force as f32, where the device can read them, the same for the blender's life.
    ///
    /// A trainer can weight its losses by them and run one backward pass. Read them only while no call on this blender
    /// runs.
    pub fn device_weights(&self) -> *const f32 {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.device_weights(),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => std::ptr::without_provenance(cuda.device_weights() as usize),
        }
    }

    /// Address of the 2K pending sums in memory of the device, c_0..c_K then d_0..d_K, the same for the blender's life.
    ///
    /// A sharded trainer adds these up across its shards between `dot` and `observe`. Use them only while no call on this
    /// blender runs.
    pub fn pending_sums(&self) -> *mut f64 {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.pending_sums(),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => std::ptr::without_provenance_mut(cuda.pending_sums() as usize),
        }
    }

    /// The whole state as bytes: moments, weights, counters, flags and pending sums, bit for bit. Waits for `stream`.
    ///
    /// # Errors
    /// [`Error::Capturing`], [`Error::Cuda`].
    pub fn save(&mut self, stream: Stream) -> Result<Vec<u8>> {
        Ok(checkpoint::write(&self.read(stream)?, &self.config))
    }

    /// Size of the saved state.
    pub fn saved_bytes(&self) -> usize {
        checkpoint::bytes(self.modalities())
    }

    /// Goes on from a saved state.
    ///
    /// # Errors
    /// [`Error::CorruptState`] for bytes that are foreign, truncated, altered or of an unknown version;
    /// [`Error::StateMismatch`] for a state of another K, average or decay; [`Error::Capturing`], [`Error::Cuda`]. The
    /// blender is then as it was.
    pub fn load(&mut self, saved: &[u8], stream: Stream) -> Result<()> {
        let _ = stream;
        let state = checkpoint::read(saved, &self.config)?;
        match &mut self.backend {
            Backend::Cpu(cpu) => {
                *cpu.state_mut() = state;
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => cuda.write(&state, stream),
        }
    }
}
