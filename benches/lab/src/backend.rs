//! What a device offers to the rounds: its implementations, how to run them and how to time them.

use std::time::Duration;

use anyhow::Result;
use gradblend::DType;

use crate::case::Operation;
use crate::inputs::Inputs;
use crate::oracle::{self, Bound, Sums};
use crate::record::{Kind, Machine};
use crate::results::OURS;

/// One implementation of an operation, prepared for inputs `I`.
pub(crate) trait Implementation<I> {
    /// Executes the operation once on one input set. On a GPU it only launches the work.
    fn run(&mut self, inputs: &mut I, set: usize) -> Result<()>;

    /// Prepares the other input sets, after memory was measured on the first.
    fn prepare_sets(&mut self, _inputs: &mut I) -> Result<()> {
        Ok(())
    }

    /// The sums, after `run` was called for the first time and is done.
    fn sums(&mut self, _inputs: &mut I) -> Result<Option<Sums>> {
        Ok(None)
    }
}

/// An implementation that can take part.
pub(crate) struct Entry<I> {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// None without a result to check.
    pub(crate) bound: Option<Bound>,
    pub(crate) make: Make<I>,
}

impl<I> Entry<I> {
    /// Whether this is its name or kind.
    pub(crate) fn is(&self, filter: &str) -> bool {
        self.name == filter || format!("{:?}", self.kind).to_lowercase() == filter
    }
}

/// Makes an implementation of an operation, ready to run.
type Make<I> = Box<dyn Fn(&mut I, Operation) -> Result<Box<dyn Implementation<I>>>>;

impl<I: 'static> Entry<I> {
    fn new<M: Implementation<I> + 'static>(
        name: &'static str,
        kind: Kind,
        bound: Option<Bound>,
        make: impl Fn(&mut I, Operation) -> Result<M> + 'static,
    ) -> Self {
        Entry { name, kind, bound, make: Box::new(move |inputs, operation| Ok(Box::new(make(inputs, operation)?))) }
    }

    /// Moves the bytes of the minimum traffic.
    pub(crate) fn limit<M: Implementation<I> + 'static>(
        name: &'static str,
        make: fn(&mut I, Operation) -> Result<M>,
    ) -> Self {
        Entry::new(name, Kind::Limit, None, make)
    }

    /// Computes the same results by other means; they are checked to `bound`.
    pub(crate) fn baseline<M: Implementation<I> + 'static>(
        name: &'static str,
        bound: Bound,
        make: fn(&mut I, Operation) -> Result<M>,
    ) -> Self {
        Entry::new(name, Kind::Baseline, Some(bound), make)
    }

    /// gradblend; for `step` also as the three calls that it stands for, which the last argument of `make` asks for.
    pub(crate) fn ours<M: Implementation<I> + 'static>(
        operation: Operation,
        make: fn(&mut I, Operation, bool) -> Result<M>,
    ) -> impl Iterator<Item = Self> {
        let entry = move |(name, three_calls)| {
            let make = move |inputs: &mut I, operation| make(inputs, operation, three_calls);
            Entry::new(name, Kind::Ours, Some(oracle::OURS), make)
        };
        let three_calls = (operation == Operation::Step).then_some(("gradblend, three calls", true));
        [(OURS, false)].into_iter().chain(three_calls).map(entry)
    }
}

/// A device and the implementations on it.
pub(crate) trait Backend {
    /// The inputs of a case in the device's memory.
    type Inputs;
    const ROUNDS: usize;
    /// A round of one implementation takes at least this long.
    const ROUND: Duration;

    fn machine(&self) -> Machine;
    /// Bytes that a case may take.
    fn free_bytes(&self) -> Result<u64>;
    /// Copies the inputs to the device, at most `most_sets` times.
    fn load(&self, inputs: Inputs, most_sets: usize) -> Result<Self::Inputs>;
    fn sets(&self, inputs: &Self::Inputs) -> usize;
    fn entries(&self, operation: Operation, dtype: DType) -> Vec<Entry<Self::Inputs>>;
    /// Overwrites the blended gradient of the first set with a number that no blend is.
    fn poison(&self, inputs: &mut Self::Inputs) -> Result<()>;
    /// The inputs on the host, with the blended gradient of the first set.
    fn host<'a>(&self, inputs: &'a mut Self::Inputs) -> Result<&'a Inputs>;
    /// Makes an implementation and runs it once on the first set; also returns the bytes by which memory grew.
    fn prepare(
        &self,
        entry: &Entry<Self::Inputs>,
        operation: Operation,
        inputs: &mut Self::Inputs,
    ) -> Result<Prepared<Self::Inputs>>;
    /// Seconds of one execution, from this many in a row.
    fn time(
        &self,
        implementation: &mut dyn Implementation<Self::Inputs>,
        inputs: &mut Self::Inputs,
        repeats: usize,
    ) -> Result<f64>;
    /// Seconds that one call takes on the host, where that is another time.
    fn host_time(&self, _: &mut dyn Implementation<Self::Inputs>, _: &mut Self::Inputs) -> Result<Option<f64>> {
        Ok(None)
    }
}

/// An implementation that has run once, and the peak of its memory.
pub(crate) type Prepared<I> = (Box<dyn Implementation<I>>, u64);

/// An implementation whose library is not on this machine.
#[derive(Debug)]
pub(crate) struct Missing(pub(crate) String);

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Missing {}
