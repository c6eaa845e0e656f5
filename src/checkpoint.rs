//! Saved state: a header, the numbers, and a CRC-32 of both. All in little-endian order.

use bytemuck::{Pod, Zeroable};

use crate::abi::{EMA, MAX_MODALITIES, MEAN, State};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::state::Flags;

const MAGIC: [u8; 8] = *b"gradblnd";
const VERSION: u32 = 1;

/// What precedes the numbers. Packed, because format version 1 has the 64-bit fields at an offset of 28 bytes.
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

/// Length in bytes of a saved state of K modalities: header; pending sums, weights, means and second moments; CRC.
pub(crate) fn bytes(modalities: usize) -> usize {
    size_of::<Header>() + (2 * modalities + modalities + modalities + modalities * modalities) * 8 + 4
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
    let numbers = [&state.pending[..2 * k], &state.weights[..k], &state.mean[..k], &state.second_moment[..k * k]];
    for number in numbers.into_iter().flatten() {
        out.extend(number.to_le_bytes());
    }
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
    for (to, bits) in targets.into_iter().flatten().zip(&mut numbers) {
        *to = f64::from_bits(u64::from_le(bits));
    }
    for (rounded, weight) in state.weights_f32.iter_mut().zip(&state.weights[..k]) {
        *rounded = *weight as f32;
    }
    check(&state, k)?;
    if average > EMA || Flags::from_bits(state.flags).is_none() || u64::from(state.nonfinite) >> k != 0 {
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
    if version != VERSION {
        return Err(corrupt(format!("version {version}, expected {VERSION}")));
    }
    if modalities == 0 || modalities as usize > MAX_MODALITIES {
        return Err(corrupt(format!("{modalities} modalities")));
    }
    let expected = bytes(modalities as usize);
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
    Ok(())
}

fn corrupt(reason: impl Into<String>) -> Error {
    Error::CorruptState { reason: reason.into() }
}
