//! Observations of several ranks.

use crate::abi::State;
use crate::backend::{AnyBackend, Backend};
use crate::checkpoint;
use crate::config::Config;
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::ranks::{Ranks, Sums, agree, failed, gather};
use crate::tensor::StreamRef;

use super::Blender;

impl Blender {
    /// The 2K pending sums, c_0 .. c_K-1 then d_0 .. d_K-1, for an exchange of the caller's own between `dot` and `observe`.
    ///
    /// On a CUDA device `stream` waits for the blender's earlier work, and later calls on the same stream come after the
    /// caller's work there. [`reduce`](Self::reduce) is this, with checks.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn pending_sums_mut<'a>(&'a mut self, stream: StreamRef<'a>) -> Result<Sums<'a>> {
        self.backend.get_mut()?.sums(stream)
    }

    /// Adds the pending sums of all ranks: call it between `dot` and `observe` where each rank holds a part of each gradient.
    /// Products are sums over elements, so these are the products of the whole gradients.
    ///
    /// All ranks of the group call it, those without a tensor too, and then have the same sums, and with the same state and
    /// gradient scale the same weights, bit for bit. It moves 2K f64. The first call of a blender, for a group, and after
    /// `load` or `set_weights` also compares K, the configuration (`threads` may differ) and the state between the ranks, which
    /// reads the state. All ranks do these things in the same order of calls.
    ///
    /// On a CUDA device the exchange is submitted to `stream`, and synchronizes only if the engine does.
    ///
    /// # Errors
    /// On all ranks: [`Error::Group`] for ranks that count or number themselves differently;
    /// [`Error::RankDiffers`]. [`Error::Exchange`] where the engine fails: a rank is gone, or the engine does not
    /// know this memory. Besides, [`Error::Capturing`] for a first call, and
    /// [`Error::Cuda`]. The pending sums are then those of this rank, as before.
    pub fn reduce(&mut self, ranks: &mut dyn Ranks, stream: StreamRef<'_>) -> Result<()> {
        let backend = self.agreed(ranks, stream)?;
        backend.keep_sums(stream)?;
        if let Err(error) = ranks.sum(backend.sums(stream)?) {
            let kept = backend.kept_sums(stream)?;
            backend.put_sums(&kept, stream)?;
            return Err(failed(error));
        }
        backend.record(stream)
    }

    /// Commits the pending sums of each rank as an observation of its own, in the order of the ranks: where ranks hold
    /// gradients of batches of their own, which nobody has averaged.
    ///
    /// Each observation is then one rank's batch, noisier than one of averaged gradients. (A mean of the ranks' products is
    /// not the product of mean gradients.) A rank that has no batch calls this without a pass: sums that are all 0 are left out.
    /// Otherwise as [`reduce`](Self::reduce); it moves 2K f64 of each rank, and synchronizes `stream`. Returns the ranks whose
    /// observation was skipped because a sum was not finite.
    ///
    /// # Errors
    /// Those of [`reduce`](Self::reduce). Nothing is observed then.
    pub fn observe_each(&mut self, ranks: &mut dyn Ranks, stream: StreamRef<'_>) -> Result<Vec<usize>> {
        let k = self.config().k();
        let backend = self.agreed(ranks, stream)?;
        backend.keep_sums(stream)?;
        let own = backend.kept_sums(stream)?;
        let all = gather(ranks, &own[..2 * k])?;
        for sums in all.chunks_exact(2 * k).filter(|sums| sums.iter().any(|sum| *sum != 0.0)) {
            backend.put_sums(sums, stream)?;
            backend.observe(stream)?;
        }
        Ok(not_finite(&all, 2 * k))
    }

    /// The ranks whose own sums in the latest [`reduce`](Self::reduce) were not finite: those to look at after a report with
    /// [`Flags::NONFINITE`](crate::Flags::NONFINITE), which all ranks get. None if only the sum over ranks or its square is
    /// not finite.
    ///
    /// All ranks of the group call it. Synchronizes `stream`.
    ///
    /// # Errors
    /// [`Error::Exchange`], [`Error::Capturing`],
    /// [`Error::Cuda`].
    pub fn nonfinite_ranks(&mut self, ranks: &mut dyn Ranks, stream: StreamRef<'_>) -> Result<Vec<usize>> {
        let k = self.config().k();
        let own = self.backend.get_mut()?.kept_sums(stream)?;
        // 0 times a finite number is 0; else it is NaN, also in the sum.
        let own: f64 = own[..2 * k].iter().map(|sum| 0.0 * sum).sum();
        Ok(not_finite(&gather(ranks, &[own])?, 1))
    }

    /// The backend, once the ranks were found to agree.
    fn agreed(&mut self, ranks: &mut dyn Ranks, stream: StreamRef<'_>) -> Result<&mut AnyBackend> {
        let backend = self.backend.get_mut()?;
        let group = Some((ranks.rank(), ranks.count()));
        if self.agreed != group {
            let (config, state) = (*backend.config(), backend.read(stream)?);
            let facts = [
                ("number of modalities", config.modalities),
                ("configuration", fingerprint_of_config(&config)),
                ("state", fingerprint_of_state(state, &config)),
            ];
            agree(ranks, &facts)?;
            self.agreed = group;
        }
        Ok(backend)
    }
}

/// Indices of the ranks whose numbers, `each` of them, are not all finite.
fn not_finite(all: &[f64], each: usize) -> Vec<usize> {
    let of_ranks = all.chunks_exact(each).enumerate();
    of_ranks.filter(|(_, sums)| !sums.iter().all(|sum| sum.is_finite())).map(|(rank, _)| rank).collect()
}

/// Of what must be the same on all ranks: everything but the number of threads.
fn fingerprint_of_config(config: &Config) -> u32 {
    let (average, decay) = config.average.coded();
    let policy = &config.policy;
    let codes = [average, policy.overfitting as u32, policy.negative as u32, config.cadence as u32];
    let numbers = [decay, policy.damping].into_iter().chain(policy.min_weight);
    let bytes = codes.into_iter().flat_map(u32::to_le_bytes).chain(numbers.flat_map(f64::to_le_bytes));
    crc32fast::hash(&bytes.collect::<Vec<_>>())
}

/// Of the state without the pending sums, which differ between ranks: the checksum at the end of its saved form. (One of the
/// whole, with its own checksum, would be the same for all states.)
fn fingerprint_of_state(mut state: State, config: &Config) -> u32 {
    state.pending.fill(0.0);
    checkpoint::write(&state, config).last_chunk().copied().map_or(0, u32::from_le_bytes)
}
