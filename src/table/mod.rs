//! Table of a plan: checked addresses, and the chunks and spans of its tensors. Pure: it reads no gradient.

mod rows;

use bytemuck::Zeroable;

use crate::abi::{ACCUMULATE, BLEND, CHUNK, Chunk, DOT, SPAN, Span, THREADS_PER_BLOCK, TensorRecord, WARP_CHUNK};
use crate::error::{Error, Result, Role};
use crate::tensor::{DType, TensorGrads};

pub(crate) use rows::Buffer;
use rows::{Blended, Rows, check_overlap};

/// The tensors of a plan, as the backends read them.
///
/// Lengths and dtypes fix the chunks. Addresses can change: `stage` checks new ones beside those in force, `commit` puts
/// them in force, and neither allocates.
#[derive(Debug)]
pub(crate) struct Table {
    /// K.
    pub(crate) modalities: usize,
    /// The addresses in force.
    pub(crate) rows: Rows,
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) spans: Vec<Span>,
    staged: Rows,
    /// Memory of the overlap check.
    blended: Vec<Blended>,
}

/// How chunks are grouped to spans: as many consecutive chunks as these limits allow, and at least one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grouping {
    /// A span with this many elements is full.
    elements: u64,
    /// A span with this many chunks is full.
    chunks: u64,
    /// A chunk with more elements than this is a span of its own.
    largest: u64,
}

impl Grouping {
    /// For CPU threads, each of which processes one span at a time.
    pub(crate) const THREADS: Self = Grouping { elements: SPAN, chunks: u64::MAX, largest: CHUNK };
    /// For thread blocks, whose warps share a large chunk or process a small one each.
    #[allow(dead_code, reason = "without the feature cuda there is no such backend")]
    pub(crate) const BLOCKS: Self =
        Grouping { elements: u64::MAX, chunks: THREADS_PER_BLOCK / 32, largest: WARP_CHUNK };

    /// Whether a span of `chunks` chunks with `elements` elements in all takes one more of `more` elements.
    fn takes(self, chunks: u64, elements: u64, more: u64) -> bool {
        let alone = chunks == 1 && elements > self.largest || more > self.largest;
        elements < self.elements && chunks < self.chunks && !alone
    }
}

impl Table {
    /// Checks `tensors` and makes their table for K = `modalities`.
    pub(crate) fn new<'a>(
        modalities: usize,
        tensors: impl IntoIterator<Item = TensorGrads<'a>>,
        grouping: Grouping,
    ) -> Result<Self> {
        let tensors = tensors.into_iter();
        let mut rows = Rows::with_capacity(tensors.size_hint().0, modalities)?;
        for (index, tensor) in tensors.enumerate() {
            rows.reserve(modalities)?;
            rows.push(index, &tensor, modalities)?;
        }
        let count = rows.tensors.len();
        let chunks = rows.tensors.iter().map(|tensor| tensor.len.div_ceil(CHUNK)).fold(0, u64::saturating_add);
        let mut table = Table {
            modalities,
            staged: Rows::with_capacity(count, modalities)?,
            chunks: reserved(chunks)?,
            spans: reserved(chunks)?,
            blended: reserved(count as u64)?,
            rows,
        };
        check_overlap(&table.rows, &mut table.blended, modalities)?;
        for (index, tensor) in table.rows.tensors.iter().enumerate() {
            let mut start = 0;
            while start < tensor.len {
                let len = CHUNK.min(tensor.len - start);
                table.chunks.push(Chunk { start, tensor: index as u32, len: len as u32 });
                start += len;
            }
        }
        table.group_chunks(grouping);
        Ok(table)
    }

    /// Checks other addresses for the same lengths and dtypes. The addresses in force stay.
    pub(crate) fn stage<'a>(&mut self, tensors: impl IntoIterator<Item = TensorGrads<'a>>) -> Result<()> {
        let expected = self.rows.tensors.len();
        let (mut got, mut staged) = (0, Ok(()));
        self.staged.clear();
        for tensor in tensors {
            if staged.is_ok() && got < expected {
                staged = self.stage_one(got, &tensor);
            }
            got += 1;
        }
        if got != expected {
            return Err(Error::PlanTensors { expected, got });
        }
        staged?;
        check_overlap(&self.staged, &mut self.blended, self.modalities)
    }

    fn stage_one(&mut self, tensor: usize, grads: &TensorGrads<'_>) -> Result<()> {
        self.staged.push(tensor, grads, self.modalities)?;
        let record = &self.rows.tensors[tensor];
        let role = match grads.buffers().next() {
            Some((role, _)) => role,
            // A tensor of slices that are all absent has no length and no dtype that could differ.
            None if grads.slices => {
                let staged = &mut self.staged.tensors[tensor];
                (staged.len, staged.dtype) = (record.len, record.dtype);
                return Ok(());
            }
            None => Role::Tensor,
        };
        if grads.len() != record.len {
            return Err(Error::Length { tensor, role, expected: record.len, got: grads.len() });
        }
        if grads.dtype() as u32 != record.dtype {
            let (expected, got) = (DType::of_record(record.dtype).name(), grads.dtype().name());
            return Err(Error::MixedDTypes { tensor, role, expected, got });
        }
        Ok(())
    }

    /// The staged buffers.
    pub(crate) fn staged(&self) -> impl Iterator<Item = Buffer> {
        self.staged.buffers(self.modalities)
    }

    /// The buffers in force.
    #[allow(dead_code, reason = "without the feature cuda, no backend checks memory")]
    pub(crate) fn buffers(&self) -> impl Iterator<Item = Buffer> {
        self.rows.buffers(self.modalities)
    }

    /// Puts the staged addresses in force.
    pub(crate) fn commit(&mut self) {
        std::mem::swap(&mut self.rows, &mut self.staged);
    }

    /// Forgets all addresses.
    pub(crate) fn unbind(&mut self) {
        for record in &mut self.rows.tensors {
            *record = TensorRecord { len: record.len, dtype: record.dtype, ..TensorRecord::zeroed() };
        }
        self.rows.addresses.fill(0);
        self.rows.slices = false;
    }

    /// Minimum traffic in bytes of a pass with these bits of `Pass` if no weight is 0: each role that takes part counts
    /// once, `blended` twice with ACCUMULATE.
    pub(crate) fn minimum_traffic(&self, what: u32) -> u64 {
        let accumulate = what & ACCUMULATE != 0;
        let bytes = |record: &TensorRecord| {
            let (dots, blends) = record.parts(what & DOT != 0, what & BLEND != 0, accumulate);
            let buffers = if dots { 2 } else { 0 }
                + if dots || blends { record.present } else { 0 }
                + if blends { 1 + u32::from(accumulate) } else { 0 };
            let element = DType::of_record(record.dtype).bytes();
            record.len.saturating_mul(element).saturating_mul(u64::from(buffers))
        };
        self.rows.tensors.iter().map(bytes).fold(0, u64::saturating_add)
    }

    fn group_chunks(&mut self, grouping: Grouping) {
        let (mut span, mut elements) = (Span { first: 0, end: 0 }, 0);
        for chunk in &self.chunks {
            let len = u64::from(chunk.len);
            if span.end > span.first && !grouping.takes(u64::from(span.end - span.first), elements, len) {
                self.spans.push(span);
                (span.first, elements) = (span.end, 0);
            }
            span.end += 1;
            elements += len;
        }
        if span.end > span.first {
            self.spans.push(span);
        }
    }
}

/// Most bytes of one array of a plan. The largest are the CPU's partial sums, 512 bytes for each 65,536 elements: 5e11
/// elements. A larger request is a wrong length, and systems promise memory that they do not have. The limit also keeps
/// counts of tensors and chunks in 32 bits.
pub(crate) const MAX_BYTES: u64 = 1 << 32;

/// An empty vector with room for `len` items.
pub(crate) fn reserved<T>(len: u64) -> Result<Vec<T>> {
    let mut items = Vec::new();
    reserve_exact(&mut items, len)?;
    Ok(items)
}

/// Makes room for `more` items, for a vector that grows.
fn reserve<T>(items: &mut Vec<T>, more: usize) -> Result<()> {
    if items.capacity() - items.len() >= more {
        return Ok(());
    }
    reserve_exact(items, (items.len() as u64 / 2).max(more as u64))
}

fn reserve_exact<T>(items: &mut Vec<T>, more: u64) -> Result<()> {
    let len = (items.len() as u64).saturating_add(more);
    let out_of_memory = || Error::OutOfMemory { what: "the plan", bytes: len.saturating_mul(size_of::<T>() as u64) };
    if len > MAX_BYTES / size_of::<T>() as u64 {
        return Err(out_of_memory());
    }
    items.try_reserve_exact(more as usize).map_err(|_| out_of_memory())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A wrong length is an error before the memory is requested.
    #[test]
    fn more_than_a_plan_needs() {
        let rejected = Error::OutOfMemory { what: "the plan", bytes: (1 << 32) + 512 };
        assert_eq!(reserved::<[u8; 512]>((1 << 23) + 1), Err(rejected));
        assert_eq!(reserved::<[u8; 512]>(1), Ok(Vec::new()));
    }
}
