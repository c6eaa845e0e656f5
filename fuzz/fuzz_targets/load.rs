//! `gradblend_load` of arbitrary bytes and of changed states, with and without a matching checksum: a typed error that
//! changes nothing, or a finite state that is saved again as the same bytes.

#![no_main]

use gradblend_fuzz::{blender, check_state, number, numbers, run};

libfuzzer_sys::fuzz_target!(|data: &[u8]| run(data, |u| {
    let (Some(mut blender), Some(mut other)) = (blender(u)?, blender(u)?) else { return Ok(Ok(())) };
    let (k, scale) = (blender.k(), number(u)?);
    let (c, d) = (numbers(u, k)?, numbers(u, k)?);
    let bytes: Option<Vec<u8>> = if u.ratio(1, 8)? { Some(u.arbitrary()?) } else { None };
    let (own, changes, sealed): (bool, [(u16, u8); 4], bool) = u.arbitrary()?;
    let changes = &changes[..u.int_in_range(0..=4)?];
    let test = || {
        if scale > 0.0 {
            blender.observe_sums(&c, &d)?;
            blender.set_pending(&d, &c)?;
        }
        let before = blender.save()?;
        let mut saved = bytes.unwrap_or(if own { before.clone() } else { other.save()? });
        for (at, byte) in changes {
            saved.iter_mut().skip(usize::from(*at)).take(1).for_each(|old| *old = *byte);
        }
        if let (true, Some(end)) = (sealed, saved.len().checked_sub(4)) {
            let checksum = crc32fast::hash(&saved[..end]).to_le_bytes();
            saved[end..].copy_from_slice(&checksum);
        }
        // 1 is INVALID_ARGUMENT, 8 CORRUPT_STATE.
        let status = blender.load(&saved).map_or_else(|failure| failure.status, |()| 0);
        assert!([0, 1, 8].contains(&status), "status {status}");
        assert!(blender.save()? == if status == 0 { saved } else { before });
        check_state(&mut blender)
    };
    Ok(test())
}));
