//! Saved states, changed: what `load` must reject, and those of an earlier version.

/// `saved` with bytes replaced at some positions and a new checksum, so that the checks after the checksum are reached.
pub fn forged(saved: &[u8], changes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut forged = saved.to_vec();
    changes.iter().for_each(|(at, bytes)| forged[*at..*at + bytes.len()].copy_from_slice(bytes));
    let body = forged.len() - 4;
    let checksum = crc32fast::hash(&forged[..body]).to_le_bytes();
    forged[body..].copy_from_slice(&checksum);
    forged
}

/// A saved state of K modalities as version 1 has it: without the means of squares and `floored`.
pub fn version_1(saved: &[u8], k: usize) -> Vec<u8> {
    let first = &saved[..saved.len() - (8 * k + 4)];
    forged(first, &[(8, &[1])])
}
