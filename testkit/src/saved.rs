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

/// A saved state of K modalities with other second moments: K x K f64 in little-endian order.
pub fn forged_second_moments(saved: &[u8], k: usize, moments: &[u8]) -> Vec<u8> {
    assert_eq!(moments.len(), 8 * k * k, "K x K numbers");
    // What follows them: the means of squares, `floored`, and the checksum.
    forged(saved, &[(saved.len() - (8 * k + 4 + 4) - moments.len(), moments)])
}

/// A saved state of K modalities as version 1 has it: without the means of squares and `floored`.
pub fn version_1(saved: &[u8], k: usize) -> Vec<u8> {
    let first = &saved[..saved.len() - (8 * k + 4)];
    forged(first, &[(8, &[1])])
}
