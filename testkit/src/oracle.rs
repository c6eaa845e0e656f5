//! The oracle: naive loops in f64, and error bounds that come from the data.

use crate::{Sample, Tensor};

/// The exact products c_0..c_K, d_0..d_K of tensors, with what their error bound needs.
#[derive(Clone, Debug)]
pub struct Sums {
    /// The products: c, then d.
    pub value: Vec<f64>,
    /// Sums of the magnitudes of the terms of each product.
    pub magnitude: Vec<f64>,
    /// Elements that took part.
    pub elements: usize,
}

impl Sums {
    /// Zeros, for K modalities.
    pub fn new(k: usize) -> Self {
        Sums { value: vec![0.0; 2 * k], magnitude: vec![0.0; 2 * k], elements: 0 }
    }

    /// The products of `tensors`.
    pub fn of<T: Sample>(k: usize, tensors: &[Tensor<T>]) -> Self {
        let mut sums = Sums::new(k);
        tensors.iter().for_each(|tensor| sums.add(tensor));
        sums
    }

    /// Adds the products of `tensor`.
    pub fn add<T: Sample>(&mut self, tensor: &Tensor<T>) {
        let half = self.value.len() / 2;
        for (k, v) in tensor.modalities.iter().enumerate().filter(|_| tensor.has_products) {
            for ((t, g), v) in tensor.train.iter().zip(&*tensor.valid).zip(v.iter().flat_map(|v| &**v)) {
                let (t, g, v) = (t.exact(), g.exact(), v.exact());
                for (index, term) in [(k, g * v), (half + k, (t - g) * v)] {
                    self.value[index] += term;
                    self.magnitude[index] += term.abs();
                }
            }
        }
        self.elements += tensor.len();
    }

    /// Checks pending sums. The library guarantees an error of 2^-16 of the magnitude; both backends round at most 130
    /// times by 2^-24, about half of that. A product that is not finite must not be finite in `got` either.
    #[track_caller]
    pub fn check(&self, got: &[f64], case: &str) {
        assert_eq!(got.len(), self.value.len());
        for (index, got) in got.iter().enumerate() {
            let bound = 131.0 * f32::EPS * self.magnitude[index] + f32::TINY * self.elements as f64;
            let want = self.value[index];
            if want.is_finite() {
                assert!((got - want).abs() <= bound, "{case}: sum {index} is {got}, expected {want} +- {bound}");
            } else {
                assert!(!got.is_finite(), "{case}: sum {index} is {got}, expected {want}");
            }
        }
    }
}

impl<T: Sample> Tensor<T> {
    /// Checks the blended gradient of this tensor against `before`, the tensor before the blend: 2K roundings in f32, then
    /// one to the dtype. `accumulate` says whether the blend was added to what the buffer held.
    #[track_caller]
    pub fn check_blend(&self, before: &Self, weights: &[f32], accumulate: bool, case: &str) {
        let old = before.written();
        for (i, got) in self.written().iter().enumerate() {
            let start = if accumulate { old[i].exact() } else { 0.0 };
            let (mut want, mut magnitude) = (start, start.abs());
            for (w, v) in weights.iter().zip(&before.modalities) {
                let term = v.as_ref().map_or(0.0, |v| f64::from(*w) * v[i].exact());
                want += term;
                magnitude += term.abs();
            }
            let f32_part = 2.0 * (weights.len() + 1) as f64 * f32::EPS * magnitude;
            let bound = f32_part + T::EPS * (want.abs() + f32_part) + T::TINY;
            let got = got.exact();
            if !want.is_finite() {
                assert!(!got.is_finite(), "{case}: element {i} is {got}, expected {want}");
            } else if !(got.is_infinite() && got.signum() == want.signum() && want.abs() + bound > T::LARGEST) {
                assert!((got - want).abs() <= bound, "{case}: element {i} is {got}, expected {want} +- {bound}");
            }
        }
    }
}
