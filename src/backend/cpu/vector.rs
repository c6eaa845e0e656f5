//! Vectors of eight f32 lanes, portable and by AVX2. The only intrinsics of the crate.
//!
//! Every instruction set multiplies and adds the same eight lanes by separate instructions (not every processor has a
//! fused one), so the bits of a result do not depend on the processor.

use half::{bf16, f16};

use crate::tensor::Element;

/// Lanes of a vector.
pub(super) const LANES: usize = 8;

/// Alignment in bytes that non-temporal stores need.
pub(super) const NON_TEMPORAL_ALIGNMENT: u64 = 16;

/// An instruction set.
///
/// # Safety
/// - All functions: the processor has the instruction set. They are inlined into a function compiled for it, because a
///   call per vector would be slow.
/// - Pointers: valid for the elements named, aligned to the element.
pub(super) trait Isa: Copy {
    /// Eight f32.
    type Lanes: Copy;

    unsafe fn splat(x: f32) -> Self::Lanes;
    unsafe fn add(a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    unsafe fn sub(a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    unsafe fn mul(a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// Sum of the lanes in f64: ((0+4) + (2+6)) + ((1+5) + (3+7)).
    unsafe fn fold(a: Self::Lanes) -> f64;

    /// Reads 8 elements.
    unsafe fn load_f32(from: *const f32) -> Self::Lanes;
    unsafe fn load_f16(from: *const f16) -> Self::Lanes;
    unsafe fn load_bf16(from: *const bf16) -> Self::Lanes;
    /// Writes 8 elements, rounded to nearest, ties to even. NON_TEMPORAL: by a non-temporal store, for which
    /// `to` is aligned to [`NON_TEMPORAL_ALIGNMENT`].
    unsafe fn store_f32<const NON_TEMPORAL: bool>(to: *mut f32, a: Self::Lanes);
    unsafe fn store_f16<const NON_TEMPORAL: bool>(to: *mut f16, a: Self::Lanes);
    unsafe fn store_bf16<const NON_TEMPORAL: bool>(to: *mut bf16, a: Self::Lanes);
    /// Prefetches the cache line of `at`, which may be any address.
    unsafe fn prefetch(at: *const u8);
    /// Orders non-temporal stores before all later stores.
    unsafe fn fence();
}

/// An element type that vectors are loaded from and stored to.
///
/// # Safety
/// As [`Isa`].
pub(super) trait VectorElement: Element {
    const ZERO: Self;
    unsafe fn load<I: Isa>(from: *const Self) -> I::Lanes;
    unsafe fn store<I: Isa, const NON_TEMPORAL: bool>(to: *mut Self, a: I::Lanes);
}

macro_rules! load {
    ($element:ty, $zero:expr, $load:ident, $store:ident) => {
        impl VectorElement for $element {
            const ZERO: Self = $zero;
            #[inline(always)]
            unsafe fn load<I: Isa>(from: *const Self) -> I::Lanes {
                // SAFETY: this method and `I`'s have the same contract.
                unsafe { I::$load(from) }
            }
            #[inline(always)]
            unsafe fn store<I: Isa, const NON_TEMPORAL: bool>(to: *mut Self, a: I::Lanes) {
                // SAFETY: this method and `I`'s have the same contract.
                unsafe { I::$store::<NON_TEMPORAL>(to, a) }
            }
        }
    };
}
load!(f32, 0.0, load_f32, store_f32);
load!(f16, f16::ZERO, load_f16, store_f16);
load!(bf16, bf16::ZERO, load_bf16, store_bf16);

/// Plain Rust for every processor: loops over eight lanes.
#[derive(Clone, Copy)]
pub(super) struct Portable;

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Isa for Portable {
    type Lanes = [f32; LANES];

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::Lanes {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn add(a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Self::Lanes, b: Self::Lanes) -> Self::Lanes {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn fold(a: Self::Lanes) -> f64 {
        let pair = |i: usize| f64::from(a[i]) + f64::from(a[i + 4]);
        (pair(0) + pair(2)) + (pair(1) + pair(3))
    }
    #[inline(always)]
    unsafe fn load_f32(from: *const f32) -> Self::Lanes {
        // SAFETY: the caller guarantees 8 elements at `from`.
        unsafe { from.cast::<[f32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::Lanes {
        // SAFETY: the caller guarantees 8 elements at `from`.
        unsafe { from.cast::<[f16; LANES]>().read_unaligned() }.map(f16::to_f32_const)
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::Lanes {
        // SAFETY: the caller guarantees 8 elements at `from`.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    unsafe fn store_f32<const NON_TEMPORAL: bool>(to: *mut f32, a: Self::Lanes) {
        // SAFETY: the caller guarantees 8 elements at `to`.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(a) }
    }
    #[inline(always)]
    unsafe fn store_f16<const NON_TEMPORAL: bool>(to: *mut f16, a: Self::Lanes) {
        // SAFETY: the caller guarantees 8 elements at `to`.
        unsafe { to.cast::<[f16; LANES]>().write_unaligned(a.map(f16::from_f32_const)) }
    }
    #[inline(always)]
    unsafe fn store_bf16<const NON_TEMPORAL: bool>(to: *mut bf16, a: Self::Lanes) {
        // SAFETY: the caller guarantees 8 elements at `to`.
        unsafe { to.cast::<[bf16; LANES]>().write_unaligned(a.map(bf16::from_f32_const)) }
    }
    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}
    #[inline(always)]
    unsafe fn fence() {}
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::Avx2;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::Isa;

    /// AVX2 with F16C.
    #[derive(Clone, Copy)]
    pub(in crate::backend::cpu) struct Avx2;

    impl Avx2 {
        pub(in crate::backend::cpu) fn detected() -> bool {
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")
        }

        #[inline(always)]
        unsafe fn store_bits<const NON_TEMPORAL: bool>(to: *mut __m128i, bits: __m128i) {
            // SAFETY: the caller guarantees 16 bytes at `to`, aligned to 16 if NON_TEMPORAL.
            unsafe { if NON_TEMPORAL { _mm_stream_si128(to, bits) } else { _mm_storeu_si128(to, bits) } }
        }
    }

    // SAFETY of all blocks below: the contract of `Isa`. The processor has AVX2 and F16C; at each pointer there are 8
    // elements; and where NON_TEMPORAL, `to` is aligned to 16 bytes, which is what the streaming stores need.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Isa for Avx2 {
        type Lanes = __m256;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fold(a: __m256) -> f64 {
            unsafe {
                let low = _mm256_cvtps_pd(_mm256_castps256_ps128(a));
                let high = _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(a));
                let four = _mm256_add_pd(low, high);
                let two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd::<1>(four));
                _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two))
            }
        }
        #[inline(always)]
        unsafe fn load_f32(from: *const f32) -> __m256 {
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> __m256 {
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> __m256 {
            unsafe {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn store_f32<const NON_TEMPORAL: bool>(to: *mut f32, a: __m256) {
            unsafe {
                if NON_TEMPORAL {
                    // In halves, because allocators align to 16 bytes only.
                    _mm_stream_ps(to, _mm256_castps256_ps128(a));
                    _mm_stream_ps(to.add(4), _mm256_extractf128_ps::<1>(a));
                } else {
                    _mm256_storeu_ps(to, a);
                }
            }
        }
        #[inline(always)]
        unsafe fn store_f16<const NON_TEMPORAL: bool>(to: *mut f16, a: __m256) {
            unsafe { Self::store_bits::<NON_TEMPORAL>(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a)) }
        }
        #[inline(always)]
        unsafe fn store_bf16<const NON_TEMPORAL: bool>(to: *mut bf16, a: __m256) {
            unsafe {
                // Adding 0x7fff, and 1 more if the last bit kept is odd, carries into the upper half exactly when the
                // number is rounded up. A NaN could become infinity, so its quiet bit is set instead.
                let bits = _mm256_castps_si256(a);
                let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                let round = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
                let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
                let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(a, a);
                let chosen = _mm256_blendv_ps(_mm256_castsi256_ps(round), _mm256_castsi256_ps(quiet), nan);
                let upper = _mm256_srli_epi32::<16>(_mm256_castps_si256(chosen));
                let packed = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256::<1>(upper));
                Self::store_bits::<NON_TEMPORAL>(to.cast(), packed);
            }
        }
        #[inline(always)]
        unsafe fn prefetch(at: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }
        #[inline(always)]
        unsafe fn fence() {
            unsafe { _mm_sfence() }
        }
    }
}
