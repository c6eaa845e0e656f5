//! Ranks of a group: what an engine adds up, and what all ranks must agree on.

use std::error::Error as StdError;

use crate::error::{Error, Result};
use crate::tensor::StreamRef;

/// Numbers to add up over the ranks, where they are.
#[derive(Debug)]
pub enum Sums<'a> {
    /// In host memory.
    Host(&'a mut [f64]),
    /// In memory of a CUDA device.
    Device {
        /// Address of the first number. Only work on `stream` may use the memory.
        address: *mut f64,
        /// How many there are.
        count: usize,
        /// Earlier work on the numbers is ordered before later work on this stream.
        stream: StreamRef<'a>,
    },
}

/// What a failed engine returns.
pub type EngineError = Box<dyn StdError + Send + Sync>;

/// A group of ranks and the engine that adds numbers up over them: MPI, NCCL, or any other.
///
/// ```
/// use gradblend::{EngineError, Ranks, Sums};
///
/// /// A group of one.
/// struct Alone;
///
/// impl Ranks for Alone {
///     fn count(&self) -> usize {
///         1
///     }
///     fn rank(&self) -> usize {
///         0
///     }
///     fn sum(&mut self, sums: Sums<'_>) -> Result<(), EngineError> {
///         match sums {
///             Sums::Host(_) => Ok(()), // the sum over one rank
///             Sums::Device { .. } => Err("this engine has no CUDA".into()),
///         }
///     }
/// }
/// ```
pub trait Ranks {
    /// Number of ranks in the group.
    fn count(&self) -> usize;

    /// Number of this rank, from 0.
    fn rank(&self) -> usize;

    /// Replaces each number by its sum over the ranks, with the same bits on all of them. All ranks call it with as many
    /// numbers, in the same order of calls. For a blender on a CUDA device, some calls have numbers in host memory.
    ///
    /// # Errors
    /// The engine's own: it does not know this kind of memory, a rank is gone, or did not call within a time.
    fn sum(&mut self, sums: Sums<'_>) -> std::result::Result<(), EngineError>;
}

/// Adds up numbers in host memory.
fn sum(ranks: &mut dyn Ranks, numbers: &mut [f64]) -> Result<()> {
    ranks.sum(Sums::Host(numbers)).map_err(failed)
}

/// The error of an engine that failed.
pub(crate) fn failed(error: EngineError) -> Error {
    Error::Exchange { reason: error.to_string() }
}

/// The numbers of each rank, as many as this rank's, in the order of the ranks: a sum in which each rank has a part of its own.
pub(crate) fn gather(ranks: &mut dyn Ranks, own: &[f64]) -> Result<Vec<f64>> {
    let mut all = vec![0.0; ranks.count() * own.len()];
    if let Some(part) = all.chunks_exact_mut(own.len()).nth(ranks.rank()) {
        part.copy_from_slice(own);
    }
    sum(ranks, &mut all)?;
    Ok(all)
}

/// Checks that the group is one, and that each fact is the same on all ranks. All ranks return the same.
///
/// # Errors
/// [`Error::Group`], [`Error::RankDiffers`], [`Error::Exchange`].
pub(crate) fn agree(ranks: &mut dyn Ranks, facts: &[(&'static str, u32)]) -> Result<()> {
    let group = |reason| Err(Error::Group { reason });
    // Ranks that differ in the count would exchange as many numbers as they count, so these three come first.
    let (count, outside) = (ranks.count() as f64, ranks.rank() >= ranks.count());
    // They are five with a zero, so that an engine that compares lengths tells them from pending sums, of which there are 2K.
    let mut counts = [1.0, count, count * count, f64::from(u8::from(outside)), 0.0];
    sum(ranks, &mut counts)?;
    let [members, counts, squares, outside, _] = counts;
    // By Cauchy and Schwarz, equal only if all counts are equal.
    if counts != members * members || squares != members * members * members {
        return group(format!("it has {members} ranks, which count {} on average", counts / members));
    }
    if outside != 0.0 {
        return group(format!("a rank has a number above {}", members - 1.0));
    }
    let own: Vec<f64> = [1.0].into_iter().chain(facts.iter().map(|(_, fact)| f64::from(*fact))).collect();
    let all = gather(ranks, &own)?;
    if let Some(rank) = all.chunks_exact(own.len()).position(|of_rank| of_rank[0] != 1.0) {
        return group(format!("not one rank, but {}, has the number {rank}", all[rank * own.len()]));
    }
    for (i, (what, _)) in facts.iter().enumerate() {
        let mut of_rank = all.iter().skip(i + 1).step_by(own.len());
        let first = of_rank.next();
        if let Some(rank) = of_rank.position(|fact| Some(fact) != first) {
            return Err(Error::RankDiffers { rank: rank + 1, what });
        }
    }
    Ok(())
}
