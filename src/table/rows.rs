//! Rows of a table: one record per tensor, and the checks of addresses.

use crate::abi::{ALIGNMENT, TensorRecord};
use crate::error::{Error, Result, Role};
use crate::tensor::{DType, TensorGrads};

use super::{reserve, reserved};

/// One record per tensor, and the tables of its modalities.
#[derive(Debug)]
pub(crate) struct Rows {
    pub(crate) tensors: Vec<TensorRecord>,
    /// Addresses of the modalities present, K slots a tensor.
    pub(crate) addresses: Vec<u64>,
    /// Indices of these modalities in ascending order, K slots a tensor.
    pub(crate) indices: Vec<u32>,
    /// Whether a buffer is a slice. A call that uses a slice synchronizes before it returns.
    pub(crate) slices: bool,
}

impl TensorRecord {
    /// Of a pass with these parts: whether it adds products of this tensor, and whether it writes its blended gradient.
    pub(crate) fn parts(&self, dot: bool, blend: bool, accumulate: bool) -> (bool, bool) {
        let present = self.present != 0;
        (dot && self.train != 0 && present, blend && self.blended != 0 && (present || !accumulate))
    }
}

/// A buffer of a tensor that is not empty.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffer {
    pub(crate) tensor: usize,
    pub(crate) role: Role,
    /// Address of the first byte.
    pub(crate) start: u64,
    /// One past the last byte.
    pub(crate) end: u64,
}

/// The bytes of a blended gradient.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blended {
    start: u64,
    end: u64,
    tensor: usize,
}

impl Rows {
    pub(super) fn with_capacity(tensors: usize, modalities: usize) -> Result<Self> {
        let slots = (tensors as u64).saturating_mul(modalities as u64);
        Ok(Rows {
            tensors: reserved(tensors as u64)?,
            addresses: reserved(slots)?,
            indices: reserved(slots)?,
            slices: false,
        })
    }

    /// Makes room for one more tensor.
    pub(super) fn reserve(&mut self, modalities: usize) -> Result<()> {
        reserve(&mut self.tensors, 1)?;
        reserve(&mut self.addresses, modalities)?;
        reserve(&mut self.indices, modalities)
    }

    pub(super) fn clear(&mut self) {
        self.tensors.clear();
        self.addresses.clear();
        self.indices.clear();
        self.slices = false;
    }

    /// Checks a tensor by itself and adds it.
    pub(super) fn push(&mut self, tensor: usize, grads: &TensorGrads<'_>, modalities: usize) -> Result<()> {
        check_shape(tensor, grads, modalities)?;
        let first = self.addresses.len();
        self.addresses.resize(first + modalities, 0);
        self.indices.resize(first + modalities, 0);
        let mut present = 0;
        for (k, grad) in grads.modalities().iter().enumerate() {
            if let Some(grad) = grad {
                self.addresses[first + present] = grad.address;
                self.indices[first + present] = k as u32;
                present += 1;
            }
        }
        // The lowest bit set in any address is the largest power of two that divides them all.
        let bits = grads.buffers().fold(ALIGNMENT, |bits, (_, grad)| bits | grad.address);
        self.tensors.push(TensorRecord {
            train: grads.train.map_or(0, |grad| grad.address),
            valid: grads.valid.map_or(0, |grad| grad.address),
            blended: grads.blended.map_or(0, |grad| grad.address),
            len: grads.len(),
            dtype: grads.dtype() as u32,
            present: present as u32,
            alignment: 1 << bits.trailing_zeros(),
            reserved: 0,
        });
        self.slices |= grads.slices;
        Ok(())
    }

    /// All buffers of tensors that are not empty: train, valid, modalities, blended of each.
    pub(super) fn buffers(&self, modalities: usize) -> impl Iterator<Item = Buffer> {
        self.tensors.iter().enumerate().filter(|(_, record)| record.len > 0).flat_map(move |(tensor, record)| {
            let slots = tensor * modalities..tensor * modalities + record.present as usize;
            let present = self.indices[slots.clone()].iter().zip(&self.addresses[slots]);
            [(Role::Train, record.train), (Role::Valid, record.valid)]
                .into_iter()
                .chain(present.map(|(k, address)| (Role::Modality(*k as usize), *address)))
                .chain([(Role::Blended, record.blended)])
                .filter(|(_, start)| *start != 0)
                .map(move |(role, start)| {
                    // `check_shape` has seen that the sum does not overflow.
                    let end = start + record.len * DType::of_record(record.dtype).bytes();
                    Buffer { tensor, role, start, end }
                })
        })
    }
}

/// Rejects a blended gradient that overlaps another buffer and is not exactly one modality gradient of its own tensor.
pub(super) fn check_overlap(rows: &Rows, blended: &mut Vec<Blended>, modalities: usize) -> Result<()> {
    blended.clear();
    let outputs = rows.buffers(modalities).filter(|buffer| buffer.role == Role::Blended);
    blended.extend(outputs.map(|Buffer { tensor, start, end, .. }| Blended { start, end, tensor }));
    blended.sort_unstable_by_key(|range| (range.start, range.tensor));
    for pair in blended.windows(2) {
        if pair[1].start < pair[0].end {
            let (tensor, other_tensor) = (pair[0].tensor, pair[1].tensor);
            return Err(Error::Overlap { tensor, other: Role::Blended, other_tensor });
        }
    }
    if blended.is_empty() {
        return Ok(());
    }
    // The tensor that is blended in place, once that was seen: a second modality at the same address overlaps.
    let mut in_place = None;
    for input in rows.buffers(modalities).filter(|buffer| buffer.role != Role::Blended) {
        // The blended ranges are sorted and disjoint, so only the last one that starts before this buffer ends can
        // overlap it.
        let before = blended.partition_point(|range| range.start < input.end);
        let Some(range) = before.checked_sub(1).map(|last| blended[last]) else { continue };
        if range.end <= input.start {
            continue;
        }
        let own = range.tensor == input.tensor && range.start == input.start;
        if own && matches!(input.role, Role::Modality(_)) && in_place != Some(input.tensor) {
            in_place = Some(input.tensor);
            continue;
        }
        return Err(Error::Overlap { tensor: range.tensor, other: input.role, other_tensor: input.tensor });
    }
    Ok(())
}

/// Checks one tensor by itself.
fn check_shape(tensor: usize, grads: &TensorGrads<'_>, modalities: usize) -> Result<()> {
    if grads.count() != modalities {
        return Err(Error::ModalityCount { tensor, expected: modalities, got: grads.count() });
    }
    match (grads.train, grads.valid) {
        (Some(_), None) => return Err(Error::Unpaired { tensor, missing: Role::Valid }),
        (None, Some(_)) => return Err(Error::Unpaired { tensor, missing: Role::Train }),
        _ => {}
    }
    for (role, grad) in grads.buffers() {
        if grad.len != grads.len() {
            return Err(Error::Length { tensor, role, expected: grads.len(), got: grad.len });
        }
        if grad.dtype != grads.dtype() {
            let (expected, got) = (grads.dtype().name(), grad.dtype.name());
            return Err(Error::MixedDTypes { tensor, role, expected, got });
        }
        let bytes = grad.dtype.bytes();
        if !grad.address.is_multiple_of(bytes) {
            return Err(Error::Misaligned { tensor, role, address: grad.address, alignment: bytes });
        }
        let fits = grad.len.checked_mul(bytes).filter(|bytes| *bytes <= isize::MAX as u64);
        if fits.and_then(|bytes| grad.address.checked_add(bytes)).is_none() {
            return Err(Error::OutOfRange { tensor, role, address: grad.address, len: grad.len });
        }
    }
    if grads.buffers().next().is_none() && grads.len() > isize::MAX as u64 / grads.dtype().bytes() {
        return Err(Error::OutOfRange { tensor, role: Role::Tensor, address: 0, len: grads.len() });
    }
    Ok(())
}
