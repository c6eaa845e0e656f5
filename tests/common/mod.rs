//! Random gradients, the places that work on them, and the oracle: naive loops in f64 that share nothing with the library.
#![allow(dead_code, unused_imports)]

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod place;

use std::ops::{Deref, DerefMut};

use gradblend::{Element, Stream, TensorGrads, bf16, f16};

pub(crate) use place::{Place, cpu};

#[cfg(feature = "cuda")]
pub(crate) use cuda::on_cuda as cuda;

/// Tests pass errors on, so that a failure names itself.
pub(crate) type Outcome = Result<(), Box<dyn std::error::Error>>;

pub(crate) const STREAM: fn() -> Stream = Stream::default;

/// SplitMix64 (Steele, Lea, Flood 2014): a few lines, and the same numbers for ever, which golden bits need.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    pub(crate) fn number(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
    }

    pub(crate) fn numbers(&mut self, count: usize) -> Vec<f64> {
        (0..count).map(|_| self.number()).collect()
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// A dtype as the oracle sees it.
pub(crate) trait Sample: Element + std::fmt::Debug + PartialEq {
    /// Largest relative error of one rounding.
    const EPS: f64;
    /// Smallest positive number.
    const TINY: f64;
    fn round(x: f64) -> Self;
    fn exact(self) -> f64;
    fn bits(self) -> u32;
}

impl Sample for f32 {
    const EPS: f64 = 1.0 / (1 << 24) as f64;
    const TINY: f64 = 1.401_298_464_324_817e-45;
    fn round(x: f64) -> Self {
        x as f32
    }
    fn exact(self) -> f64 {
        f64::from(self)
    }
    fn bits(self) -> u32 {
        self.to_bits()
    }
}

impl Sample for f16 {
    const EPS: f64 = 1.0 / (1 << 11) as f64;
    const TINY: f64 = 5.960_464_477_539_063e-8;
    fn round(x: f64) -> Self {
        f16::from_f64(x)
    }
    fn exact(self) -> f64 {
        self.to_f64()
    }
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
}

impl Sample for bf16 {
    const EPS: f64 = 1.0 / (1 << 8) as f64;
    const TINY: f64 = 9.183_549_615_799_121e-41;
    fn round(x: f64) -> Self {
        bf16::from_f64(x)
    }
    fn exact(self) -> f64 {
        self.to_f64()
    }
    fn bits(self) -> u32 {
        u32::from(self.to_bits())
    }
}

/// The elements of a list, which start `offset` elements into their memory.
#[derive(Clone, Debug)]
pub(crate) struct List<T> {
    pub(crate) offset: usize,
    pub(crate) memory: Vec<T>,
}

impl<T: Sample> List<T> {
    fn random(random: &mut Random, len: usize, offset: usize) -> Self {
        List { offset, memory: (0..len + offset).map(|_| T::round(random.number())).collect() }
    }

    /// These elements at another offset.
    pub(crate) fn moved(&self, offset: usize) -> Self {
        let before = std::iter::repeat_n(T::round(0.0), offset);
        List { offset, memory: before.chain(self.iter().copied()).collect() }
    }
}

impl<T> From<Vec<T>> for List<T> {
    fn from(memory: Vec<T>) -> Self {
        List { offset: 0, memory }
    }
}

impl<T> Deref for List<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.memory[self.offset..]
    }
}

impl<T> DerefMut for List<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.offset..]
    }
}

/// Where the blend of a tensor goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Nowhere,
    /// To a list of its own.
    Blended,
    /// Over the gradient of this modality.
    Modality(usize),
}

/// The gradients of one tensor.
#[derive(Clone, Debug)]
pub(crate) struct Tensor<T> {
    pub(crate) train: List<T>,
    pub(crate) valid: List<T>,
    pub(crate) modalities: Vec<Option<List<T>>>,
    pub(crate) blended: List<T>,
    /// Whether the train and validation gradients are given.
    pub(crate) dots: bool,
    pub(crate) target: Target,
}

impl<T: Sample> Tensor<T> {
    /// `len` random elements a list; each modality is absent once in `absent` (0: never).
    pub(crate) fn random(random: &mut Random, len: usize, k: usize, offset: usize, absent: usize) -> Self {
        let list = |random: &mut Random| List::random(random, len, offset);
        let train = list(random);
        let valid = list(random);
        let modalities = (0..k)
            .map(|_| {
                let v = list(random);
                (absent == 0 || random.below(absent) != 0).then_some(v)
            })
            .collect();
        let blended = list(random);
        Tensor { train, valid, modalities, blended, dots: true, target: Target::Blended }
    }

    pub(crate) fn len(&self) -> usize {
        self.train.len()
    }

    pub(crate) fn present(&self) -> usize {
        self.modalities.iter().flatten().count()
    }

    /// All lists but `blended`.
    pub(crate) fn inputs(&mut self) -> impl Iterator<Item = &mut List<T>> {
        [&mut self.train, &mut self.valid].into_iter().chain(self.modalities.iter_mut().flatten())
    }

    /// The same elements, each list moved by 0 to 3 elements of its own.
    pub(crate) fn scattered(&self, random: &mut Random) -> Self {
        let mut tensor = self.clone();
        for list in tensor.inputs() {
            *list = list.moved(random.below(4));
        }
        tensor.blended = tensor.blended.moved(random.below(4));
        tensor
    }

    /// The list that the blend goes to.
    pub(crate) fn target(&self) -> &List<T> {
        match self.target {
            Target::Modality(k) => self.modalities[k].as_ref().unwrap_or(&self.blended),
            _ => &self.blended,
        }
    }

    /// As slices.
    pub(crate) fn grads(&mut self) -> TensorGrads<'_> {
        let mut over = None;
        let mut refs: Vec<Option<&[T]>> = Vec::with_capacity(self.modalities.len());
        for (k, v) in self.modalities.iter_mut().enumerate() {
            if self.target == Target::Modality(k) {
                over = v.as_deref_mut();
                refs.push(None);
            } else {
                refs.push(v.as_deref());
            }
        }
        let grads =
            if self.dots { TensorGrads::new(&self.train, &self.valid, &refs) } else { TensorGrads::blend_only(&refs) };
        match (self.target, over) {
            (Target::Modality(k), Some(over)) => grads.in_place(k, over),
            (Target::Blended, _) => grads.blended(&mut self.blended),
            _ => grads,
        }
    }

    /// c_k and d_k with the sums of the magnitudes of their terms, added to `sums`.
    pub(crate) fn dot_oracle(&self, sums: &mut Sums) {
        let half = sums.value.len() / 2;
        for (k, v) in self.modalities.iter().enumerate().filter(|_| self.dots) {
            for ((t, g), v) in self.train.iter().zip(&*self.valid).zip(v.iter().flat_map(|v| &**v)) {
                let (t, g, v) = (t.exact(), g.exact(), v.exact());
                for (place, term) in [(k, g * v), (half + k, (t - g) * v)] {
                    sums.value[place] += term;
                    sums.size[place] += term.abs();
                }
            }
        }
        sums.elements += self.len();
    }

    /// Checks the blend of this tensor: 2K roundings in f32 and one to the dtype.
    pub(crate) fn check_blend(&self, weights: &[f32], before: Option<&[T]>, case: &str) {
        for (i, got) in self.blended.iter().enumerate() {
            let start = before.map_or(0.0, |before| before[i].exact());
            let (mut want, mut size) = (start, start.abs());
            for (w, v) in weights.iter().zip(&self.modalities) {
                let term = v.as_ref().map_or(0.0, |v| f64::from(*w) * v[i].exact());
                want += term;
                size += term.abs();
            }
            let f32_part = 2.0 * (weights.len() + 1) as f64 * f32::EPS * size;
            let bound = f32_part + T::EPS * (want.abs() + f32_part) + T::TINY;
            let got = got.exact();
            assert!((got - want).abs() <= bound, "{case}: element {i} is {got}, expected {want} +- {bound}");
        }
    }
}

/// Sums of the oracle: c, then d.
pub(crate) struct Sums {
    pub(crate) value: Vec<f64>,
    pub(crate) size: Vec<f64>,
    pub(crate) elements: usize,
}

impl Sums {
    pub(crate) fn new(k: usize) -> Self {
        Sums { value: vec![0.0; 2 * k], size: vec![0.0; 2 * k], elements: 0 }
    }

    pub(crate) fn of<T: Sample>(k: usize, tensors: &[Tensor<T>]) -> Self {
        let mut sums = Sums::new(k);
        tensors.iter().for_each(|tensor| tensor.dot_oracle(&mut sums));
        sums
    }

    /// Checks pending sums: 2^-16 is guaranteed; the at most 130 roundings of 2^-24 of each backend are about half of it.
    pub(crate) fn check(&self, got: &[f64], case: &str) {
        assert_eq!(got.len(), self.value.len());
        for (k, got) in got.iter().enumerate() {
            let bound = 131.0 * f32::EPS * self.size[k] + f32::TINY * self.elements as f64;
            let want = self.value[k];
            assert!((got - want).abs() <= bound, "{case}: sum {k} is {got}, expected {want} +- {bound}");
        }
    }
}

/// Bits of a list, for comparisons that must not forgive a sign of zero.
pub(crate) fn bits<T: Sample>(list: &[T]) -> Vec<u32> {
    list.iter().map(|x| x.bits()).collect()
}

/// Bits of f64s.
pub(crate) fn bits64(list: &[f64]) -> Vec<u64> {
    list.iter().map(|x| x.to_bits()).collect()
}

/// Stamps test bodies on every place, and those of `each_dtype` on every dtype too: `cpu::name`, `cuda::bf16s::name`.
#[macro_export]
macro_rules! tests {
    ($(each_dtype: $($typed:ident),+ $(,)?;)? $(once: $($once:ident),+ $(,)?;)?) => {
        $crate::tests!(@place cpu: [$($($typed)+)?] [$($($once)+)?]);
        #[cfg(feature = "cuda")]
        $crate::tests!(@place cuda: [$($($typed)+)?] [$($($once)+)?]);
    };
    (@place $place:ident: [] $once:tt) => { mod $place { $crate::tests!(@once $place: $once); } };
    (@place $place:ident: $typed:tt $once:tt) => {
        mod $place {
            mod f32s { $crate::tests!(@typed $place f32: $typed); }
            mod f16s { $crate::tests!(@typed $place gradblend::f16: $typed); }
            mod bf16s { $crate::tests!(@typed $place gradblend::bf16: $typed); }
            $crate::tests!(@once $place: $once);
        }
    };
    (@typed $place:ident $dtype:ty: [$($body:ident)+]) => {
        $(#[test] fn $body() -> $crate::common::Outcome { $crate::common::$place($crate::$body::<$dtype>) })+
    };
    (@once $place:ident: [$($body:ident)*]) => {
        $(#[test] fn $body() -> $crate::common::Outcome { $crate::common::$place($crate::$body) })*
    };
}

/// Lengths at which something changes: vectors of 4 and 8, a warp's and a block's round, the chunk of a warp (8,192) and
/// of a block (65,536).
pub(crate) const LENGTHS: [usize; 24] = [
    0, 1, 3, 4, 5, 7, 8, 9, 63, 255, 256, 257, 1023, 1024, 1025, 4099, 8191, 8192, 8193, 65_535, 65_536, 65_537,
    131_080, 200_000,
];
