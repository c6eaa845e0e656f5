//! The oracle: naive loops in f64, and error bounds that come from the data.

use gradblend::{Average, Flags, Report};

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
    /// one to the dtype. A modality of weight 0 is absent, whatever it holds. `accumulate` says whether the blend was added
    /// to what the buffer held.
    #[track_caller]
    pub fn check_blend(&self, before: &Self, weights: &[f32], accumulate: bool, case: &str) {
        let old = before.written();
        for (i, got) in self.written().iter().enumerate() {
            let start = if accumulate { old[i].exact() } else { 0.0 };
            let (mut want, mut magnitude) = (start, start.abs());
            for (w, v) in weights.iter().zip(&before.modalities) {
                let term = v.as_ref().filter(|_| *w != 0.0).map_or(0.0, |v| f64::from(*w) * v[i].exact());
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

/// The observations since the last reset, and the moments that they define.
#[derive(Clone, Debug)]
pub struct Moments {
    average: Average,
    k: usize,
    /// The products of each observation that was not skipped: K values of c, then of d.
    pub products: Vec<Vec<f64>>,
    /// Observations that were skipped.
    pub skipped: u64,
    /// Bit k: modality k made the latest observation not finite.
    pub nonfinite: u32,
}

impl Moments {
    /// Before any observation.
    pub fn new(k: usize, average: Average) -> Self {
        Moments { average, k, products: Vec::new(), skipped: 0, nonfinite: 0 }
    }

    /// Adds an observation of these pending sums under a gradient scale.
    pub fn observe(&mut self, sums: &[f64], scale: f32) {
        // A scale that is not finite makes the observation not finite, which a division by infinity would hide.
        let factor = if scale.is_finite() { f64::from(scale) * f64::from(scale) } else { f64::NAN };
        let products: Vec<f64> = sums.iter().map(|sum| sum / factor).collect();
        self.nonfinite = (0..self.k).filter(|k| !enters(products[*k], products[self.k + k])).map(|k| 1 << k).sum();
        match self.nonfinite {
            0 => self.products.push(products),
            _ => self.skipped += 1,
        }
    }

    /// The mean of `value` over the observations, and of its magnitude; 0 before the first.
    fn mean(&self, value: impl Fn(&[f64]) -> f64) -> (f64, f64) {
        let decay = if let Average::Ema { decay } = self.average { decay } else { 1.0 };
        let (mut sum, mut magnitude, mut shares, mut share) = (0.0, 0.0, 0.0, 1.0);
        for products in self.products.iter().rev() {
            let value = value(products);
            sum += share * value;
            magnitude += share * value.abs();
            shares += share;
            share *= decay;
        }
        if shares > 0.0 { (sum / shares, magnitude / shares) } else { (0.0, 0.0) }
    }

    /// Checks a report and S: counters, moments and ratios.
    #[track_caller]
    pub fn check(&self, report: &Report, s: &[f64], case: &str) {
        let (k, seen) = (self.k, self.products.len());
        let counters = (report.observed, report.skipped, report.nonfinite);
        assert_eq!(counters, (seen as u64, self.skipped, self.nonfinite), "{case}");
        assert_eq!(report.flags.contains(Flags::NONFINITE), self.nonfinite != 0, "{case}");
        // Each observation rounds a few times, here and in the library.
        let eps = 8.0 * (seen + 4) as f64 * f64::EPSILON / 2.0;
        let near = |got: f64, (want, magnitude): (f64, f64), what: &str| {
            assert!((got - want).abs() <= eps * magnitude, "{case}: {what} is {got}, expected {want}");
        };
        for i in 0..k {
            near(report.mean[i], self.mean(|products| products[i]), "a mean");
            assert_eq!(report.second_moment[i].to_bits(), s[i * k + i].to_bits(), "{case}");
            for j in 0..k {
                near(s[i * k + j], self.mean(|products| products[k + i] * products[k + j]), "a second moment");
            }
            let ogr = s[i * k + i].sqrt() / report.mean[i].abs();
            let same = (report.ogr[i] - ogr).abs() <= 4.0 * f64::EPSILON * ogr;
            assert!(same || report.ogr[i] == ogr || (ogr.is_nan() && report.ogr[i].is_nan()), "{case}: OGR {i}");
        }
        self.check_errors(report, eps, case);
        let uniform = vec![1.0 / k as f64; k];
        check_ratio(report.ogr_blend, &report.weights, &report.mean, s, case);
        check_ratio(report.ogr_uniform, &uniform, &report.mean, s, case);
    }

    /// Checks the standard errors, whose squares round by `eps` of the mean of c^2.
    #[track_caller]
    fn check_errors(&self, report: &Report, eps: f64, case: &str) {
        let decay = if let Average::Ema { decay } = self.average { decay } else { 1.0 };
        let shares = (0..self.products.len()).map(|i| decay.powi(i as i32));
        let (sum, squares) = shares.fold((0.0, 0.0), |(sum, squares), share| (sum + share, squares + share * share));
        let effective = if sum > 0.0 { sum * sum / squares } else { 0.0 };
        let near = (report.effective - effective).abs() <= eps * effective / (1.0 - decay).max(eps);
        assert!(near, "{case}: effective observations: {}, expected {effective}", report.effective);
        for (i, error) in report.standard_error.iter().enumerate() {
            let (mean, (square, _)) = (self.mean(|products| products[i]).0, self.mean(|products| products[i].powi(2)));
            let (variance, _) = self.mean(|products| (products[i] - mean).powi(2));
            let (got, want) = (error * error * (report.effective - 1.0), variance);
            let known = self.products.len() > 1 && report.effective > 1.0;
            let near = (got - want).abs() <= 4.0 * eps * square;
            let right = if known { near } else { *error == f64::INFINITY };
            assert!(right, "{case}: standard error {i} is {error}, squared {got}, expected {want}");
        }
    }
}

/// Whether c and d of a modality enter the moments: what is stored is c and the square of d.
fn enters(c: f64, d: f64) -> bool {
    c.is_finite() && (d * d).is_finite()
}

/// Checks sqrt(w'Sw) / |w'm| within the roundings of numerator and denominator.
#[track_caller]
fn check_ratio(got: f64, w: &[f64], m: &[f64], s: &[f64], case: &str) {
    let k = w.len();
    let eps = 4.0 * (k * k + 4) as f64 * f64::EPSILON / 2.0;
    let (mut variance, mut variance_size, mut gain, mut gain_size) = (0.0, 0.0, 0.0, 0.0);
    for i in 0..k {
        gain += w[i] * m[i];
        gain_size += (w[i] * m[i]).abs();
        for j in 0..k {
            let term = w[i] * w[j] * s[i * k + j];
            variance += term;
            variance_size += term.abs();
        }
    }
    if got.is_nan() {
        let zero = variance <= eps * variance_size && f64::abs(gain) <= eps * gain_size;
        return assert!(zero, "{case}: a ratio is NaN, which only 0 / 0 is");
    }
    let low = f64::max(variance - eps * variance_size, 0.0).sqrt() / (f64::abs(gain) + eps * gain_size);
    let high = f64::max(variance + eps * variance_size, 0.0).sqrt() / f64::max(f64::abs(gain) - eps * gain_size, 0.0);
    let above = low.is_nan() || got >= low * (1.0 - eps);
    let below = high.is_nan() || got <= high * (1.0 + eps);
    assert!(above && below, "{case}: a ratio is {got}, expected {low} to {high}");
}
