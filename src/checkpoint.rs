//! The saved state: a header, the numbers in little-endian order, and a CRC-32 over all of it.

use crate::abi::{MAX_MODALITIES, State};
use crate::error::{Error, Result};
use crate::state::{EMPTY, Flags};

use crate::config::Config;

const MAGIC: [u8; 8] = *b"gradblnd";
const VERSION: u32 = 1;

/// Bytes of a state of K modalities: magic, version, K, average, flags, non-finite bits; decay, normaliser, n, skipped;
/// pending sums, weights, means, second moments; CRC.
pub(crate) fn bytes(modalities: usize) -> usize {
    8 + 5 * 4 + 4 * 8 + (2 * modalities + modalities + modalities + modalities * modalities) * 8 + 4
}

pub(crate) fn write(state: &State, config: &Config) -> Vec<u8> {
    let modalities = config.modalities as usize;
    let (average, decay) = config.average.coded();
    let mut out = Vec::with_capacity(bytes(modalities));
    out.extend(MAGIC);
    for word in [VERSION, config.modalities, average, state.flags, state.nonfinite] {
        out.extend(word.to_le_bytes());
    }
    for word in [decay.to_bits(), state.normaliser.to_bits(), state.observed, state.skipped] {
        out.extend(word.to_le_bytes());
    }
    let lists = [
        &state.pending[..2 * modalities],
        &state.weights[..modalities],
        &state.mean[..modalities],
        &state.second_moment[..modalities * modalities],
    ];
    for number in lists.into_iter().flatten() {
        out.extend(number.to_le_bytes());
    }
    out.extend(crc32fast::hash(&out).to_le_bytes());
    out
}

/// Takes numbers off the front of a buffer whose length was checked.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk().ok_or_else(|| corrupt("truncated"))?;
        self.0 = rest;
        Ok(*head)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    fn numbers(&mut self, to: &mut [f64]) -> Result<()> {
        for number in to {
            *number = f64::from_bits(self.u64()?);
        }
        Ok(())
    }
}

fn corrupt(reason: impl Into<String>) -> Error {
    Error::CorruptState { reason: reason.into() }
}

pub(crate) fn read(saved: &[u8], config: &Config) -> Result<State> {
    let mut reader = Reader(saved);
    if reader.take::<8>().map_err(|_| corrupt("shorter than a header"))? != MAGIC {
        return Err(corrupt("does not start with the mark of a gradblend state"));
    }
    let version = reader.u32()?;
    if version != VERSION {
        return Err(corrupt(format!("version {version}, expected {VERSION}")));
    }
    let modalities = reader.u32()?;
    if modalities == 0 || modalities as usize > MAX_MODALITIES {
        return Err(corrupt(format!("{modalities} modalities")));
    }
    let k = modalities as usize;
    if saved.len() != bytes(k) {
        return Err(corrupt(format!("{} bytes, expected {}", saved.len(), bytes(k))));
    }
    let (body, crc) = saved.split_at(saved.len() - 4);
    if crc32fast::hash(body).to_le_bytes() != crc {
        return Err(corrupt("checksum differs"));
    }
    let average = reader.u32()?;
    let mut state = State { flags: reader.u32()?, nonfinite: reader.u32()?, ..EMPTY };
    let decay = f64::from_bits(reader.u64()?);
    state.normaliser = f64::from_bits(reader.u64()?);
    state.observed = reader.u64()?;
    state.skipped = reader.u64()?;
    reader.numbers(&mut state.pending[..2 * k])?;
    reader.numbers(&mut state.weights[..k])?;
    reader.numbers(&mut state.mean[..k])?;
    reader.numbers(&mut state.second_moment[..k * k])?;
    for (rounded, weight) in state.weights_f32.iter_mut().zip(&state.weights[..k]) {
        *rounded = *weight as f32;
    }
    let moments = state.mean.iter().chain(&state.second_moment).chain([&state.normaliser]);
    let weights = state.weights_f32.iter();
    if moments.into_iter().any(|x| !x.is_finite()) || weights.into_iter().any(|x| !x.is_finite()) {
        return Err(corrupt("a moment or a weight is not finite"));
    }
    // It is the sum of the weights of all observations: 1 and a few roundings at most.
    if !(0.0..1.5).contains(&state.normaliser) || (state.observed > 0) != (state.normaliser > 0.0) {
        return Err(corrupt("observations without a weight, or with too much"));
    }
    let mut moments = state.mean.iter().chain(&state.second_moment);
    if moments.any(|x| if state.observed > 0 { !(x / state.normaliser).is_finite() } else { *x != 0.0 }) {
        return Err(corrupt("a moment is not finite, or there without an observation"));
    }
    if (0..k).any(|i| state.second_moment[i * k + i] < 0.0) {
        return Err(corrupt("a second moment is negative"));
    }
    if average > 1 || Flags::from_bits(state.flags).is_none() || u64::from(state.nonfinite) >> k != 0 {
        return Err(corrupt("an unknown average, flag or modality"));
    }
    let mismatch = |what, expected: String, got: String| Err(Error::StateMismatch { what, expected, got });
    if modalities != config.modalities {
        return mismatch("modalities", config.modalities.to_string(), modalities.to_string());
    }
    let (own_average, own_decay) = config.average.coded();
    if average != own_average {
        let name = |code| if code == 0 { "mean" } else { "ema" }.to_string();
        return mismatch("average", name(own_average), name(average));
    }
    if decay.to_bits() != own_decay.to_bits() {
        return mismatch("decay", own_decay.to_string(), decay.to_string());
    }
    Ok(state)
}
