//! The modality gradients of a tensor, apart by whether their weight is 0.

use crate::abi::MAX_MODALITIES;

/// Modality gradients: the addresses of their buffers, and which modalities they are.
#[derive(Clone, Copy, Default)]
pub(super) struct Modalities<'a> {
    pub(super) addresses: &'a [u64],
    pub(super) indices: &'a [u32],
}

/// Memory for modality gradients in another order.
#[derive(Default)]
pub(super) struct Sorted {
    addresses: [u64; MAX_MODALITIES],
    indices: [u32; MAX_MODALITIES],
}

impl<'a> Modalities<'a> {
    pub(super) fn len(self) -> usize {
        self.indices.len()
    }

    pub(super) fn is_empty(self) -> bool {
        self.indices.is_empty()
    }

    /// The first `count`, and the others.
    pub(super) fn split_at(self, count: usize) -> (Self, Self) {
        let (addresses, indices) = (self.addresses.split_at(count), self.indices.split_at(count));
        (
            Modalities { addresses: addresses.0, indices: indices.0 },
            Modalities { addresses: addresses.1, indices: indices.1 },
        )
    }

    /// Those of weight 0, which are no part of a blend because 0 times an infinity is NaN, and the others. Both keep
    /// their order, so the bits of the blend are those without the former.
    pub(super) fn split(self, weights: &[f32; MAX_MODALITIES], sorted: &'a mut Sorted) -> (Self, Self) {
        let is_zero = |index: &u32| weights[*index as usize] == 0.0;
        let zeros = self.indices.iter().filter(|index| is_zero(index)).count();
        if zeros == 0 {
            return self.split_at(0);
        }
        let (mut zero, mut other) = (0, zeros);
        for (address, index) in self.addresses.iter().zip(self.indices) {
            let next = if is_zero(index) { &mut zero } else { &mut other };
            (sorted.addresses[*next], sorted.indices[*next]) = (*address, *index);
            *next += 1;
        }
        Modalities { addresses: &sorted.addresses[..other], indices: &sorted.indices[..other] }.split_at(zeros)
    }
}
