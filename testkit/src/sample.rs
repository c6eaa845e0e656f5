//! The dtypes as the oracle sees them.

use gradblend::{Element, bf16, f16};

/// A dtype: how it rounds, and what its bits mean.
pub trait Sample: Element + std::fmt::Debug + PartialEq {
    /// Largest relative error of one rounding.
    const EPS: f64;
    /// Smallest positive number.
    const TINY: f64;
    /// Largest finite number.
    const LARGEST: f64;
    /// The nearest number of this dtype.
    fn round(x: f64) -> Self;
    /// The same number as f64.
    fn exact(self) -> f64;
    /// The bits of the number.
    fn bits(self) -> u32;
}

macro_rules! sample {
    ($dtype:ty, $round:expr, eps: $eps:expr, tiny: $tiny:expr, largest: $largest:expr) => {
        impl Sample for $dtype {
            const EPS: f64 = $eps;
            const TINY: f64 = $tiny;
            const LARGEST: f64 = $largest;
            fn round(x: f64) -> Self {
                $round(x)
            }
            fn exact(self) -> f64 {
                f64::from(self)
            }
            fn bits(self) -> u32 {
                u32::from(self.to_bits())
            }
        }
    };
}

sample!(f32, |x| x as f32, eps: 1.0 / (1 << 24) as f64, tiny: 1.401_298_464_324_817e-45, largest: f32::MAX as f64);
sample!(f16, f16::from_f64, eps: 1.0 / (1 << 11) as f64, tiny: 5.960_464_477_539_063e-8, largest: 65504.0);
sample!(bf16, bf16::from_f64, eps: 1.0 / (1 << 8) as f64, tiny: 9.183_549_615_799_121e-41,
    largest: 3.389_531_389_251_535_5e38);
