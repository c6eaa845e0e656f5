//! Random gradients, and the parts of them that ranks hold.

use std::ops::Range;

use gradblend::{Blender, Stream, Sums, TensorGrads};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::K;

/// Gradients of one tensor: t, g, v_0, v_1, v_2.
pub(crate) type Tensor = [Vec<f32>; K + 2];

/// Does loss `k` reach tensor `p`? The last loss is the fused one.
pub(crate) fn reaches(k: usize, p: usize) -> bool {
    k == K - 1 || !(p + k).is_multiple_of(3)
}

/// The same gradients on all ranks, for the same seed. Means of 0 would hide an error below the bound: t and g differ in theirs.
pub(crate) fn tensors(lengths: &[usize], seed: u64) -> Vec<Tensor> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut list = |len: usize, mean: f32| (0..len).map(|_| mean + random.random_range(-1.0..1.0)).collect();
    lengths.iter().map(|&len| std::array::from_fn(|i| list(len, 0.7 - 0.2 * i as f32))).collect()
}

/// The part of a tensor that a rank holds. The last ranks hold more than the first, and in every other tensor the first
/// holds nothing; all in all with `idle`, where another rank follows.
pub(crate) fn part(len: usize, p: usize, rank: usize, count: usize, idle: bool) -> Range<usize> {
    let skipped = usize::from(count > 1 && (idle || p.is_multiple_of(2)));
    let cut = |rank: usize| {
        let (rank, count) = (rank.saturating_sub(skipped), count - skipped);
        len * rank * rank / (count * count)
    };
    cut(rank)..cut(rank + 1)
}

/// Adds the products of parts of the tensors to the pending sums.
pub(crate) fn dot(blender: &mut Blender, tensors: &[Tensor], part: impl Fn(usize, usize) -> Range<usize>) {
    let lists = tensors.iter().enumerate().map(|(p, lists)| {
        let lists = lists.each_ref().map(|list| &list[part(p, list.len())]);
        let [t, g, ..] = lists;
        let of_modalities: [_; K] = std::array::from_fn(|k| reaches(k, p).then_some(lists[k + 2]));
        TensorGrads::new(t, g, &of_modalities)
    });
    let plan = blender.plan(lists).unwrap();
    blender.dot(&plan, Stream::default()).unwrap();
}

/// The pending sums.
pub(crate) fn pending(blender: &mut Blender) -> &mut [f64] {
    match blender.pending_sums_mut(Stream::default()).unwrap() {
        Sums::Host(sums) => sums,
        Sums::Device { .. } => panic!("the blender is on the CPU"),
    }
}

/// The pending sums, as bytes.
pub(crate) fn pending_bytes(blender: &mut Blender) -> Vec<u8> {
    pending(blender).iter().flat_map(|sum| sum.to_le_bytes()).collect()
}
