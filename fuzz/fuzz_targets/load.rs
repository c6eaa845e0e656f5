//! `gradblend_load` of arbitrary bytes and of changed states, with and without a matching checksum: a typed error that
//! changes nothing, or a state that is finite and saved again as the same bytes.

#![no_main]

use gradblend_fuzz::{CBlender, CORRUPT_STATE, INVALID_ARGUMENT, OK, config};
use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;

fn run(mut u: Unstructured<'_>) -> Result<()> {
    let (Some(blender), Some(other)) = (CBlender::new(&config(&mut u)?), CBlender::new(&config(&mut u)?)) else {
        return Ok(());
    };
    let before = blender.save();
    let mut saved = if u.arbitrary()? { before.clone() } else { other.save() };
    if u.ratio(1, 8)? {
        saved = u.arbitrary()?;
    }
    for _ in 0..u.int_in_range(0..=4)? {
        let at = u.arbitrary::<u16>()? as usize;
        if let Some(byte) = saved.get_mut(at) {
            *byte = u.arbitrary()?;
        }
    }
    if let (true, Some(end)) = (u.arbitrary()?, saved.len().checked_sub(4)) {
        let checksum = crc32fast::hash(&saved[..end]).to_le_bytes();
        saved[end..].copy_from_slice(&checksum);
    }
    let status = blender.load(&saved);
    assert!([OK, INVALID_ARGUMENT, CORRUPT_STATE].contains(&status));
    assert!(blender.save() == if status == OK { saved } else { before });
    blender.report();
    Ok(())
}

fuzz_target!(|data: &[u8]| run(Unstructured::new(data)).unwrap_or_default());
