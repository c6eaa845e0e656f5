//! Random gradients, and the oracle: naive loops in f64 that share nothing with the library.
#![allow(dead_code)]

use gradblend::{Blender, Config, Device, Element, Stream, TensorGrads, bf16, f16};

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

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub(crate) fn list<T: Sample>(&mut self, len: usize) -> Vec<T> {
        (0..len).map(|_| T::round(self.number())).collect()
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

/// The gradients of one tensor, starting `offset` elements into their memory.
#[derive(Clone)]
pub(crate) struct Tensor<T> {
    pub(crate) offset: usize,
    pub(crate) train: Vec<T>,
    pub(crate) valid: Vec<T>,
    pub(crate) modalities: Vec<Option<Vec<T>>>,
    pub(crate) blended: Vec<T>,
}

impl<T: Sample> Tensor<T> {
    /// `len` random elements a list; each modality is absent once in `absent` (0: never).
    pub(crate) fn random(random: &mut Random, len: usize, k: usize, offset: usize, absent: usize) -> Self {
        let list = |random: &mut Random| random.list(len + offset);
        let train = list(random);
        let valid = list(random);
        let modalities = (0..k)
            .map(|_| {
                let v = list(random);
                (absent == 0 || random.below(absent) != 0).then_some(v)
            })
            .collect();
        let blended = list(random);
        Tensor { offset, train, valid, modalities, blended }
    }

    pub(crate) fn len(&self) -> usize {
        self.train.len() - self.offset
    }

    pub(crate) fn grads(&mut self) -> TensorGrads<'_> {
        let at = self.offset;
        let refs: Vec<Option<&[T]>> = self.modalities.iter().map(|v| v.as_ref().map(|v| &v[at..])).collect();
        TensorGrads::new(&self.train[at..], &self.valid[at..], &refs).blended(&mut self.blended[at..])
    }

    /// c_k and d_k with the sums of the magnitudes of their terms, added to `sums`.
    pub(crate) fn dot_oracle(&self, sums: &mut Sums) {
        for (k, v) in self.modalities.iter().enumerate() {
            let Some(v) = v else { continue };
            for i in self.offset..self.train.len() {
                let (t, g, v) = (self.train[i].exact(), self.valid[i].exact(), v[i].exact());
                sums.value[k] += g * v;
                sums.size[k] += (g * v).abs();
                let k = sums.value.len() / 2 + k;
                sums.value[k] += (t - g) * v;
                sums.size[k] += ((t - g) * v).abs();
            }
        }
        sums.elements += self.len();
    }

    /// Checks the blend of this tensor: 2K roundings in f32 and one to the dtype.
    pub(crate) fn check_blend(&self, weights: &[f32], before: Option<&[T]>, case: &str) {
        for i in self.offset..self.train.len() {
            let start = before.map_or(0.0, |before| before[i].exact());
            let (mut want, mut size) = (start, start.abs());
            for (w, v) in weights.iter().zip(&self.modalities) {
                let term = v.as_ref().map_or(0.0, |v| f64::from(*w) * v[i].exact());
                want += term;
                size += term.abs();
            }
            let f32_part = 2.0 * (weights.len() + 1) as f64 * f32::EPS * size;
            let bound = f32_part + T::EPS * (want.abs() + f32_part) + T::TINY;
            let got = self.blended[i].exact();
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
    pub(crate) fn of<T: Sample>(k: usize, tensors: &[Tensor<T>]) -> Self {
        let mut sums = Sums { value: vec![0.0; 2 * k], size: vec![0.0; 2 * k], elements: 0 };
        tensors.iter().for_each(|tensor| tensor.dot_oracle(&mut sums));
        sums
    }

    /// Checks pending sums: 2^-16 is guaranteed; this backend's 130 roundings of 2^-24 are about half of it.
    pub(crate) fn check(&self, got: &[f64], case: &str) {
        for (k, got) in got.iter().enumerate() {
            let bound = 131.0 * f32::EPS * self.size[k] + f32::TINY * self.elements as f64;
            let want = self.value[k];
            assert!((got - want).abs() <= bound, "{case}: sum {k} is {got}, expected {want} +- {bound}");
        }
    }
}

/// A blender on the CPU with `threads` threads.
pub(crate) fn blender(k: usize, threads: u32) -> gradblend::Result<Blender> {
    Blender::new(&Device::cpu(), Config { threads, ..Config::new(k as u32) })
}

/// The pending sums of K modalities.
pub(crate) fn pending(blender: &Blender) -> Vec<f64> {
    let count = 2 * blender.config().modalities as usize;
    // SAFETY: 2K numbers, and no call on the blender runs.
    unsafe { std::slice::from_raw_parts(blender.pending_sums(), count) }.to_vec()
}

/// Puts numbers where `dot` would have left them.
pub(crate) fn set_pending(blender: &mut Blender, c: &[f64], d: &[f64]) {
    let k = blender.config().modalities as usize;
    assert_eq!((c.len(), d.len()), (k, k));
    // SAFETY: 2K numbers, and no call on the blender runs.
    let pending = unsafe { std::slice::from_raw_parts_mut(blender.pending_sums(), 2 * k) };
    pending[..k].copy_from_slice(c);
    pending[k..].copy_from_slice(d);
}

/// The weights in force as f32.
pub(crate) fn weights(blender: &Blender) -> Vec<f32> {
    let count = blender.config().modalities as usize;
    // SAFETY: K numbers, and no call on the blender runs.
    unsafe { std::slice::from_raw_parts(blender.device_weights(), count) }.to_vec()
}

/// Bits of a list, for comparisons that must not forgive a sign of zero.
pub(crate) fn bits<T: Sample>(list: &[T]) -> Vec<u32> {
    list.iter().map(|x| x.bits()).collect()
}

/// Bits of f64s.
pub(crate) fn bits64(list: &[f64]) -> Vec<u64> {
    list.iter().map(|x| x.to_bits()).collect()
}

/// Stamps one generic test body on every dtype.
#[macro_export]
macro_rules! each_dtype {
    ($($body:ident),+ $(,)?) => {
        mod f32s { $(#[test] fn $body() -> super::common::Outcome { super::$body::<f32>() })+ }
        mod f16s { $(#[test] fn $body() -> super::common::Outcome { super::$body::<gradblend::f16>() })+ }
        mod bf16s { $(#[test] fn $body() -> super::common::Outcome { super::$body::<gradblend::bf16>() })+ }
    };
}

/// Lengths at which something changes: vectors of 8, blocks of 1,024, chunks of 65,536.
pub(crate) const LENGTHS: [usize; 14] = [0, 1, 7, 8, 9, 63, 1023, 1024, 1025, 4099, 65_535, 65_536, 65_537, 131_080];
