//! From a list of tensors to a checked table of addresses and chunks. Pure: it touches no gradient.

use bytemuck::Zeroable;

use crate::abi::{ALIGNMENT, CHUNK, Chunk, SPAN, Span, THREADS_PER_BLOCK, TensorRecord, WARP_CHUNK};
use crate::error::{Error, Result, Role};
use crate::tensor::{DType, Grad, TensorGrads};

/// All that the passes need to know of a list of tensors. Lengths and dtypes fix the chunks; addresses can change.
#[derive(Debug)]
pub(crate) struct Table {
    /// K.
    pub(crate) modalities: usize,
    pub(crate) tensors: Vec<TensorRecord>,
    /// Addresses of the modalities present, K slots a tensor.
    pub(crate) addresses: Vec<u64>,
    /// Which modalities those are, in ascending order, K slots a tensor.
    pub(crate) indices: Vec<u32>,
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) spans: Vec<Span>,
    /// Room for the overlap check, kept so that an update allocates nothing.
    blended: Vec<Range>,
}

/// How chunks are grouped to spans: as many in a row as these limits allow, and at least one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grouping {
    /// A span that has so many elements is full.
    elements: u64,
    /// A span that has so many chunks is full.
    chunks: u64,
    /// A chunk that has more elements than this is alone.
    largest: u64,
}

impl Grouping {
    /// For threads that take a span each.
    pub(crate) const THREADS: Self = Grouping { elements: SPAN, chunks: u64::MAX, largest: CHUNK };
    /// For blocks of warps, that take a large chunk together or a small one each.
    #[allow(dead_code, reason = "of the feature cuda")]
    pub(crate) const BLOCKS: Self =
        Grouping { elements: u64::MAX, chunks: THREADS_PER_BLOCK / 32, largest: WARP_CHUNK };

    /// Whether a span of `chunks` chunks with `elements` elements in all takes one more.
    fn takes(self, chunks: u64, elements: u64, more: u64) -> bool {
        let alone = chunks == 1 && elements > self.largest || more > self.largest;
        elements < self.elements && chunks < self.chunks && !alone
    }
}

/// The bytes of a blended gradient.
#[derive(Clone, Copy, Debug)]
struct Range {
    start: u64,
    end: u64,
    tensor: usize,
}

impl Table {
    /// Checks `tensors` and lays out their table for K = `modalities`.
    pub(crate) fn new(modalities: usize, tensors: &[TensorGrads<'_>], grouping: Grouping) -> Result<Self> {
        check_shapes(modalities, tensors)?;
        let slots = tensors.len() * modalities;
        let chunks = tensors.iter().map(|tensor| tensor.len().div_ceil(CHUNK)).fold(0, u64::saturating_add);
        let mut table = Table {
            modalities,
            tensors: reserved(tensors.len() as u64)?,
            addresses: reserved(slots as u64)?,
            indices: reserved(slots as u64)?,
            chunks: reserved(chunks)?,
            spans: reserved(chunks)?,
            blended: reserved(tensors.len() as u64)?,
        };
        table.check_overlap(tensors)?;
        table.tensors.resize(tensors.len(), TensorRecord::zeroed());
        table.addresses.resize(slots, 0);
        table.indices.resize(slots, 0);
        for (index, tensor) in tensors.iter().enumerate() {
            table.tensors[index].len = tensor.len();
            table.tensors[index].dtype = tensor.dtype() as u32;
            let mut start = 0;
            while start < tensor.len() {
                let len = CHUNK.min(tensor.len() - start);
                table.chunks.push(Chunk { start, tensor: index as u32, len: len as u32 });
                start += len;
            }
        }
        table.group_chunks(grouping);
        table.bind(tensors);
        Ok(table)
    }

    /// Takes other addresses for the same lengths and dtypes. On an error the table is as it was.
    pub(crate) fn check_update(&mut self, tensors: &[TensorGrads<'_>]) -> Result<()> {
        if tensors.len() != self.tensors.len() {
            return Err(Error::PlanTensors { expected: self.tensors.len(), got: tensors.len() });
        }
        check_shapes(self.modalities, tensors)?;
        for (index, (tensor, record)) in tensors.iter().zip(&self.tensors).enumerate() {
            let list = match tensor.lists().next() {
                Some((list, _)) => list,
                // A tensor of slices that are all absent has no length or dtype that could be another.
                None if tensor.slices => continue,
                None => Role::Tensor,
            };
            if tensor.len() != record.len {
                return Err(Error::Length { tensor: index, list, expected: record.len, got: tensor.len() });
            }
            if tensor.dtype() as u32 != record.dtype {
                let expected = DType::try_from(record.dtype as i32)?.name();
                return Err(Error::MixedDTypes { tensor: index, list, expected, got: tensor.dtype().name() });
            }
        }
        self.check_overlap(tensors)
    }

    /// Puts addresses that were checked into the records.
    pub(crate) fn bind(&mut self, tensors: &[TensorGrads<'_>]) {
        let address = |grad: Option<Grad>| grad.map_or(0, |grad| grad.address);
        for (index, (tensor, record)) in tensors.iter().zip(&mut self.tensors).enumerate() {
            record.train = address(tensor.train);
            record.valid = address(tensor.valid);
            record.blended = address(tensor.blended);
            let mut present = 0;
            for (k, grad) in tensor.modalities().iter().enumerate() {
                if let Some(grad) = grad {
                    self.addresses[index * self.modalities + present] = grad.address;
                    self.indices[index * self.modalities + present] = k as u32;
                    present += 1;
                }
            }
            record.present = present as u32;
            // The lowest bit that any address has is what they all are a multiple of.
            let all = tensor.lists().fold(ALIGNMENT, |all, (_, grad)| all | grad.address);
            record.alignment = 1 << all.trailing_zeros();
        }
    }

    /// Forgets all addresses.
    pub(crate) fn unbind(&mut self) {
        for record in &mut self.tensors {
            *record = TensorRecord { len: record.len, dtype: record.dtype, ..TensorRecord::zeroed() };
        }
        self.addresses.fill(0);
    }

    /// Bytes that a pass must move at the least: each list that takes part, once.
    pub(crate) fn floor_bytes(&self, dot: bool, blend: bool, accumulate: bool) -> u64 {
        let bytes = |record: &TensorRecord| {
            let dots = dot && record.train != 0 && record.present > 0;
            let blends = blend && record.blended != 0 && (record.present > 0 || !accumulate);
            let lists = if dots { 2 } else { 0 }
                + if dots || blends { record.present } else { 0 }
                + if blends { 1 + u32::from(accumulate) } else { 0 };
            let element = if record.dtype == DType::F32 as u32 { 4 } else { 2 };
            record.len.saturating_mul(element).saturating_mul(u64::from(lists))
        };
        self.tensors.iter().map(bytes).fold(0, u64::saturating_add)
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

    /// Refuses a blended gradient that shares memory with any list but one modality gradient of its own tensor, of
    /// which it may be the whole.
    fn check_overlap(&mut self, tensors: &[TensorGrads<'_>]) -> Result<()> {
        self.blended.clear();
        for (tensor, grads) in tensors.iter().enumerate() {
            if let Some(grad) = grads.blended.filter(|grad| grad.len > 0) {
                self.blended.push(Range { start: grad.address, end: end(grad), tensor });
            }
        }
        self.blended.sort_unstable_by_key(|range| (range.start, range.tensor));
        for pair in self.blended.windows(2) {
            if pair[1].start < pair[0].end {
                let (tensor, other_tensor) = (pair[0].tensor, pair[1].tensor);
                return Err(Error::Overlap { tensor, other: Role::Blended, other_tensor });
            }
        }
        if self.blended.is_empty() {
            return Ok(());
        }
        for (other_tensor, grads) in tensors.iter().enumerate() {
            let mut in_place = false;
            for (other, grad) in grads.lists().filter(|(other, _)| *other != Role::Blended) {
                // The blended ranges are sorted and disjoint, so only the last one that starts before this list ends
                // can reach into it.
                let before = self.blended.partition_point(|range| range.start < end(grad));
                let Some(range) = before.checked_sub(1).map(|last| self.blended[last]) else { continue };
                if grad.len == 0 || range.end <= grad.address {
                    continue;
                }
                let own = range.tensor == other_tensor && range.start == grad.address;
                if own && matches!(other, Role::Modality(_)) && !in_place {
                    in_place = true;
                    continue;
                }
                return Err(Error::Overlap { tensor: range.tensor, other, other_tensor });
            }
        }
        Ok(())
    }
}

/// One past the last byte; `check_shapes` has seen that it is there.
fn end(grad: Grad) -> u64 {
    grad.address + grad.len * grad.dtype.bytes()
}

/// Checks each tensor by itself.
fn check_shapes(modalities: usize, tensors: &[TensorGrads<'_>]) -> Result<()> {
    for (tensor, grads) in tensors.iter().enumerate() {
        if grads.count() != modalities {
            return Err(Error::ModalityCount { tensor, expected: modalities, got: grads.count() });
        }
        match (grads.train, grads.valid) {
            (Some(_), None) => return Err(Error::Unpaired { tensor, missing: Role::Valid }),
            (None, Some(_)) => return Err(Error::Unpaired { tensor, missing: Role::Train }),
            _ => {}
        }
        for (list, grad) in grads.lists() {
            if grad.len != grads.len() {
                return Err(Error::Length { tensor, list, expected: grads.len(), got: grad.len });
            }
            if grad.dtype != grads.dtype() {
                let (expected, got) = (grads.dtype().name(), grad.dtype.name());
                return Err(Error::MixedDTypes { tensor, list, expected, got });
            }
            let bytes = grad.dtype.bytes();
            if !grad.address.is_multiple_of(bytes) {
                return Err(Error::Misaligned { tensor, list, address: grad.address, alignment: bytes });
            }
            let fits = grad.len.checked_mul(bytes).filter(|bytes| *bytes <= isize::MAX as u64);
            if fits.and_then(|bytes| grad.address.checked_add(bytes)).is_none() {
                return Err(Error::OutOfRange { tensor, list, address: grad.address, len: grad.len });
            }
        }
        if grads.lists().next().is_none() && grads.len() > isize::MAX as u64 / grads.dtype().bytes() {
            return Err(Error::OutOfRange { tensor, list: Role::Tensor, address: 0, len: grads.len() });
        }
    }
    Ok(())
}

/// More bytes than a plan needs for anything: at 512 bytes for each 65,536 elements, the CPU's partial sums, some 5e11
/// elements. A wrong length is better told before memory is asked for, which systems promise without having it. So few
/// tensors and chunks are counted in 32 bits.
const MAX_BYTES: u64 = 1 << 32;

/// An empty vector with room for `len` items, or a typed error.
pub(crate) fn reserved<T>(len: u64) -> Result<Vec<T>> {
    let mut items = Vec::new();
    let out_of_memory = || Error::OutOfMemory { what: "the plan", bytes: len.saturating_mul(size_of::<T>() as u64) };
    if len > MAX_BYTES / size_of::<T>() as u64 {
        return Err(out_of_memory());
    }
    let len = usize::try_from(len).map_err(|_| out_of_memory())?;
    items.try_reserve_exact(len).map_err(|_| out_of_memory())?;
    Ok(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A wrong length is told before memory is asked for that a system may promise and not have.
    #[test]
    fn more_than_a_plan_needs() {
        let refused = Error::OutOfMemory { what: "the plan", bytes: (1 << 32) + 512 };
        assert_eq!(reserved::<[u8; 512]>((1 << 23) + 1), Err(refused));
        assert_eq!(reserved::<[u8; 512]>(1), Ok(Vec::new()));
    }
}
