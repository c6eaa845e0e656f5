//! Saved state: a header, the numbers, and a CRC-32 of both. All in little-endian order.
//!
//! Version 1 lacks the running means of c_k^2 and `floored`. It is still read.

use bytemuck::{Pod, Zeroable};

use crate::abi::{EMA, MAX_MODALITIES, MEAN, State};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::state::Flags;

const MAGIC: [u8; 8] = *b"gradblnd";
const VERSION: u32 = 2;

/// What precedes the numbers. Packed, because the format has the 64-bit fields at an offset of 28 bytes.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, packed)]
struct Header {
    magic: [u8; 8],
    version: u32,
    modalities: u32,
    average: u32,
    flags: u32,
    nonfinite: u32,
    /// Bits of an f64, as is `normaliser`.
    decay: u64,
    normaliser: u64,
    observed: u64,
    skipped: u64,
}

/// Length in bytes of a saved state of K modalities.
pub(crate) fn bytes(modalities: usize) -> usize {
    bytes_of_version(VERSION, modalities)
}

/// Header; pending sums, weights, means and second moments; from version 2 on means of squares and `floored`; CRC.
fn bytes_of_version(version: u32, modalities: usize) -> usize {
    let added = if version > 1 { 8 * modalities + 4 } else { 0 };
    size_of::<Header>() + (2 * modalities + modalities + modalities + modalities * modalities) * 8 + added + 4
}

/// The saved form of a state.
pub(crate) fn write(state: &State, config: &Config) -> Vec<u8> {
    let k = config.k();
    let (average, decay) = config.average.coded();
    let header = Header {
        magic: MAGIC,
        version: VERSION.to_le(),
        modalities: config.modalities.to_le(),
        average: average.to_le(),
        flags: state.flags.to_le(),
        nonfinite: state.nonfinite.to_le(),
        decay: decay.to_bits().to_le(),
        normaliser: state.normaliser.to_bits().to_le(),
        observed: state.observed.to_le(),
        skipped: state.skipped.to_le(),
    };
    let mut out = Vec::with_capacity(bytes(k));
    out.extend(bytemuck::bytes_of(&header));
    let moments = [&state.mean[..k], &state.second_moment[..k * k], &state.mean_square[..k]];
    for number in [&state.pending[..2 * k], &state.weights[..k]].into_iter().chain(moments).flatten() {
        out.extend(number.to_le_bytes());
    }
    out.extend(state.floored.to_le_bytes());
    out.extend(crc32fast::hash(&out).to_le_bytes());
    out
}

/// The state of a saved form that `write` wrote for a blender with this K, average and decay.
///
/// # Errors
/// [`Error::CorruptState`], [`Error::StateMismatch`].
pub(crate) fn read(saved: &[u8], config: &Config) -> Result<State> {
    let header = header(saved)?;
    let (modalities, average) = (u32::from_le(header.modalities), u32::from_le(header.average));
    let k = modalities as usize;
    let mut state = State {
        flags: u32::from_le(header.flags),
        nonfinite: u32::from_le(header.nonfinite),
        normaliser: f64::from_bits(u64::from_le(header.normaliser)),
        observed: u64::from_le(header.observed),
        skipped: u64::from_le(header.skipped),
        ..State::zeroed()
    };
    let mut numbers = saved[size_of::<Header>()..].chunks_exact(8).map(bytemuck::pod_read_unaligned);
    let targets =
        [&mut state.pending[..2 * k], &mut state.weights[..k], &mut state.mean[..k], &mut state.second_moment[..k * k]];
    let mut fill = |targets: &mut [f64]| {
        for (to, bits) in targets.iter_mut().zip(&mut numbers) {
            *to = f64::from_bits(u64::from_le(bits));
        }
    };
    targets.into_iter().for_each(&mut fill);
    if u32::from_le(header.version) > 1 {
        fill(&mut state.mean_square[..k]);
        let floored = saved[saved.len() - 8..].first_chunk().copied().unwrap_or_default();
        state.floored = u32::from_le_bytes(floored);
    } else if state.observed > 0 {
        state.mean_square[..k].fill(f64::INFINITY);
    }
    for (rounded, weight) in state.weights_f32.iter_mut().zip(&state.weights[..k]) {
        *rounded = *weight as f32;
    }
    check(&state, k)?;
    let unknown = u64::from(state.nonfinite | state.floored) >> k != 0;
    if average > EMA || Flags::from_bits(state.flags).is_none() || unknown {
        return Err(corrupt("an unknown average, flag or modality"));
    }
    let mismatch = |what, expected: String, got: String| Err(Error::StateMismatch { what, expected, got });
    if modalities != config.modalities {
        return mismatch("modalities", config.modalities.to_string(), modalities.to_string());
    }
    let (own_average, own_decay) = config.average.coded();
    if average != own_average {
        let name = |code| if code == MEAN { "mean" } else { "ema" }.to_string();
        return mismatch("average", name(own_average), name(average));
    }
    let decay = f64::from_bits(u64::from_le(header.decay));
    if decay.to_bits() != own_decay.to_bits() {
        return mismatch("decay", own_decay.to_string(), decay.to_string());
    }
    Ok(state)
}

/// The header of a saved state whose length and checksum are right.
fn header(saved: &[u8]) -> Result<Header> {
    let header = saved.get(..size_of::<Header>()).ok_or_else(|| corrupt("shorter than a header"))?;
    let header: Header = bytemuck::pod_read_unaligned(header);
    if header.magic != MAGIC {
        return Err(corrupt("does not start with the magic number of a gradblend state"));
    }
    let (version, modalities) = (u32::from_le(header.version), u32::from_le(header.modalities));
    if version == 0 || version > VERSION {
        return Err(corrupt(format!("version {version}, expected 1 to {VERSION}")));
    }
    if modalities == 0 || modalities as usize > MAX_MODALITIES {
        return Err(corrupt(format!("{modalities} modalities")));
    }
    let expected = bytes_of_version(version, modalities as usize);
    if saved.len() != expected {
        return Err(corrupt(format!("{} bytes, expected {expected}", saved.len())));
    }
    let (body, crc) = saved.split_at(saved.len() - 4);
    if crc32fast::hash(body).to_le_bytes() != crc {
        return Err(corrupt("checksum differs"));
    }
    Ok(header)
}

/// Rejects numbers that no blender can have: a checksum does not protect against a forged state.
fn check(state: &State, k: usize) -> Result<()> {
    let moments = || state.mean.iter().chain(&state.second_moment);
    let finite = moments().chain([&state.normaliser]).all(|x| x.is_finite());
    if !finite || state.weights_f32.iter().any(|x| !x.is_finite()) {
        return Err(corrupt("a moment or a weight is not finite"));
    }
    // The sum of the weights of all observations: 1 and a few roundings at most.
    if !(0.0..1.5).contains(&state.normaliser) || (state.observed > 0) != (state.normaliser > 0.0) {
        return Err(corrupt("observations without a weight, or with too much"));
    }
    let impossible = |x: &f64| if state.observed > 0 { !(x / state.normaliser).is_finite() } else { *x != 0.0 };
    if moments().any(impossible) {
        return Err(corrupt("a moment is not finite, or present without an observation"));
    }
    if (0..k).any(|i| state.second_moment[i * k + i] < 0.0) {
        return Err(corrupt("a second moment is negative"));
    }
    // Infinite where it is unknown.
    let possible = |square: &f64| *square >= 0.0 && (state.observed > 0 || *square == 0.0);
    if !state.mean_square.iter().all(possible) {
        return Err(corrupt("a mean of squares is negative, NaN, or present without an observation"));
    }
    Ok(())
}

fn corrupt(reason: impl Into<String>) -> Error {
    Error::CorruptState { reason: reason.into() }
}
