//! WAV files, as encoders and recorders write them. The crates hound and symphonia reject several of these.

use anyhow::{Context, Result, bail, ensure};

/// Programs that write into a pipe cannot go back to fill in the length of the data. They leave 0, or one of several
/// numbers from this one on.
const UNKNOWN: usize = 0x7FFF_0000;
const PCM: u16 = 1;
const EXTENSIBLE: u16 = 0xFFFE;
/// Bytes of the chunk `fmt `; the extensible one has the format proper in its bytes 24 and 25.
const FORMAT: usize = 16;
const EXTENSIBLE_FORMAT: usize = 40;

/// The samples of a file of one channel and 16 bits, from -1 to 1.
pub(crate) fn samples(file: &[u8], rate: u32) -> Result<Vec<f32>> {
    let starts = [b"RIFF", b"RF64", b"BW64"].iter().any(|name| file.starts_with(*name));
    ensure!(starts && file.get(8..12) == Some(b"WAVE"), "not a WAV file: no RIFF and WAVE at its start");
    let (mut at, mut format, mut long) = (12, None, None);
    loop {
        let Some(head) = file.get(at..at + 8) else { bail!("the file ends before its samples") };
        let (name, length) = (&head[..4], u32_at(head, 4) as usize);
        let body = &file[at + 8..];
        if name == b"data" {
            check_format(format.context("the samples come before their format")?, rate)?;
            return decode(data(body, long.filter(|_| length == u32::MAX as usize).unwrap_or(length))?);
        }
        let Some(chunk) = body.get(..length) else {
            let name = name.escape_ascii();
            bail!("the chunk \"{name}\" has {length} bytes, of which the file has {}", body.len())
        };
        match name {
            b"fmt " => format = Some(chunk),
            // Lengths of 64 bits, that of the samples after that of the file.
            b"ds64" if length >= 16 => long = Some(u32_at(chunk, 8) as usize | (u32_at(chunk, 12) as usize) << 32),
            _ => {}
        }
        // A chunk of odd length is followed by a byte of padding, which some programs leave out.
        let padded =
            length % 2 == 1 && (is_chunk(body.get(length + 1..).unwrap_or_default()) || !is_chunk(&body[length..]));
        at += 8 + length + usize::from(padded);
    }
}

/// Whether bytes look like a chunk: a name, and a length that they have, or that its program did not know.
fn is_chunk(bytes: &[u8]) -> bool {
    let named = bytes.len() >= 8 && bytes[..4].iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ');
    named && (u32_at(bytes, 4) as usize <= bytes.len() - 8 || u32_at(bytes, 4) as usize >= UNKNOWN)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn check_format(format: &[u8], rate: u32) -> Result<()> {
    ensure!(format.len() >= FORMAT, "the chunk \"fmt \" has {} bytes, expected at least {FORMAT}", format.len());
    let mut encoding = u16_at(format, 0);
    if encoding == EXTENSIBLE && format.len() >= EXTENSIBLE_FORMAT {
        encoding = u16_at(format, 24);
    }
    let (channels, hertz, bits) = (u16_at(format, 2), u32_at(format, 4), u16_at(format, 14));
    ensure!(
        (encoding, channels, hertz, bits) == (PCM, 1, rate, 16),
        "expected encoding {PCM} (PCM), channels 1, rate {rate} Hz, bits 16; got encoding {encoding}, channels {channels}, \
         rate {hertz} Hz, bits {bits}"
    );
    Ok(())
}

/// The bytes of the samples. `rest` is the file after the head of their chunk, `length` what the head says.
fn data(rest: &[u8], length: usize) -> Result<&[u8]> {
    match rest.get(..length) {
        Some([]) if !rest.is_empty() && !is_chunk(rest) => {}
        Some(data) => {
            ensure!(length.is_multiple_of(2), "its samples have {length} bytes, which is not a multiple of 2");
            return Ok(data);
        }
        None if length >= UNKNOWN => {}
        None => bail!("cut off: its samples have {length} bytes, of which the file has {}", rest.len()),
    }
    // An encoder that was stopped may have written half of its last sample.
    Ok(&rest[..rest.len() / 2 * 2])
}

fn decode(data: &[u8]) -> Result<Vec<f32>> {
    ensure!(!data.is_empty(), "the recording is empty");
    Ok(data.chunks_exact(2).map(|sample| f32::from(u16_at(sample, 0) as i16) / 32_768.0).collect())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const RATE: u32 = 8000;
    const SAMPLES: [i16; 4] = [0, 16_384, -32_768, 32_767];
    const VALUES: [f32; 4] = [0.0, 0.5, -1.0, 32_767.0 / 32_768.0];

    fn chunk(name: &[u8; 4], length: u32, body: &[u8]) -> Vec<u8> {
        [name, &length.to_le_bytes()[..], body].concat()
    }

    fn format(encoding: u16, channels: u16, bits: u16) -> Vec<u8> {
        let frame = channels * bits / 8;
        let mut body = [encoding.to_le_bytes(), channels.to_le_bytes()].concat();
        body.extend([RATE, RATE * u32::from(frame)].map(u32::to_le_bytes).concat());
        body.extend([frame, bits].map(u16::to_le_bytes).concat());
        if encoding == EXTENSIBLE {
            body.extend([22_u16, bits, 4, 0, PCM].map(u16::to_le_bytes).concat());
            body.extend(b"\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71");
        }
        chunk(b"fmt ", body.len() as u32, &body)
    }

    fn bytes(samples: &[i16]) -> Vec<u8> {
        samples.iter().flat_map(|sample| sample.to_le_bytes()).collect()
    }

    /// A file of these chunks; `length` is what its head says instead of its length.
    fn file(chunks: &[Vec<u8>], length: Option<u32>) -> Vec<u8> {
        let body = [b"WAVE", &chunks.concat()[..]].concat();
        chunk(b"RIFF", length.unwrap_or(body.len() as u32), &body)
    }

    /// A plain file.
    pub(crate) fn encode(samples: &[i16]) -> Vec<u8> {
        let samples = bytes(samples);
        file(&[format(PCM, 1, 16), chunk(b"data", samples.len() as u32, &samples)], None)
    }

    #[test]
    fn files_of_all_encoders_are_read() {
        let (plain, data) = (format(PCM, 1, 16), |length| chunk(b"data", length, &bytes(&SAMPLES)));
        let odd = || chunk(b"LIST", 3, b"abc\0");
        let cases = [
            ("plain", encode(&SAMPLES)),
            ("odd chunk before", file(&[odd(), plain.clone(), odd(), data(8)], None)),
            (
                "odd chunks without padding",
                file(
                    &[
                        chunk(b"LIST", 3, b"abc"),
                        plain.clone(),
                        chunk(b"fact", 1, b"a"),
                        chunk(b"LIST", 1, b"a"),
                        data(8),
                    ],
                    None,
                ),
            ),
            ("odd chunk with a printable padding", file(&[chunk(b"LIST", 3, b"abcX"), plain.clone(), data(8)], None)),
            ("chunks after", file(&[plain.clone(), data(8), odd()], None)),
            ("chunk after, cut off", file(&[plain.clone(), data(8), chunk(b"LIST", 9, b"ab")], None)),
            ("a pipe: ffmpeg", file(&[plain.clone(), data(u32::MAX)], Some(u32::MAX))),
            ("a pipe: length of the data alone", file(&[plain.clone(), data(u32::MAX)], None)),
            ("a pipe: SoX", file(&[plain.clone(), data(0x7FFF_F000)], Some(0x7FFF_F024))),
            ("a pipe: arecord", file(&[plain.clone(), data(0x8000_0000)], Some(0x8000_0024))),
            ("a pipe: zeros", file(&[plain.clone(), data(0)], Some(0))),
            ("a pipe: lengths of an empty file", file(&[plain.clone(), data(0)], Some(36))),
            ("a pipe: zero data of an unknown length", file(&[plain.clone(), data(0)], Some(u32::MAX))),
            ("a pipe: zero data in a file of its right length", file(&[plain.clone(), data(0)], None)),
            ("a pipe: stopped within a sample", [file(&[plain.clone(), data(u32::MAX)], None), vec![7]].concat()),
            ("lengths of 64 bits", {
                let lengths =
                    chunk(b"ds64", 28, &[[99_u64, 8, 4, 0].map(u64::to_le_bytes).concat()[..28].to_vec()].concat());
                let mut file = file(&[lengths, plain, data(u32::MAX), chunk(b"LIST", 4, b"abcd")], Some(u32::MAX));
                file[..4].copy_from_slice(b"RF64");
                file
            }),
            ("extensible", file(&[format(EXTENSIBLE, 1, 16), data(8)], None)),
        ];
        for (name, file) in cases {
            let got = samples(&file, RATE).map_err(|error| error.to_string());
            assert_eq!(got.as_deref(), Ok(&VALUES[..]), "{name}");
        }
    }

    #[test]
    fn broken_files_are_rejected() {
        let (plain, data) = (format(PCM, 1, 16), |length| chunk(b"data", length, &bytes(&SAMPLES)));
        let stereo = file(&[format(PCM, 2, 16), data(8)], None);
        for (file, expected) in [
            (Vec::new(), "not a WAV file"),
            (b"RIFF\x04\0\0\0AVI ".to_vec(), "not a WAV file"),
            (encode(&SAMPLES)[..40].to_vec(), "the file ends before its samples"),
            (file(std::slice::from_ref(&plain), None), "the file ends before its samples"),
            (file(&[data(8)], None), "the samples come before their format"),
            (encode(&SAMPLES)[..50].to_vec(), "cut off: its samples have 8 bytes, of which the file has 6"),
            (file(&[chunk(b"LIST", 99, b"abc")], None), "the chunk \"LIST\" has 99 bytes, of which the file has 3"),
            (file(&[chunk(b"fmt ", 2, b"ab"), data(8)], None), "the chunk \"fmt \" has 2 bytes, expected at least 16"),
            (encode(&[]), "the recording is empty"),
            // An empty recording with a chunk after it.
            (
                file(&[plain.clone(), chunk(b"data", 0, b""), chunk(b"LIST", 4, b"abcd")], None),
                "the recording is empty",
            ),
            (file(&[plain.clone(), chunk(b"data", 3, b"abc\0")], None), "3 bytes, which is not a multiple of 2"),
            (stereo, "got encoding 1, channels 2, rate 8000 Hz, bits 16"),
            (file(&[format(3, 1, 32), data(8)], None), "got encoding 3, channels 1, rate 8000 Hz, bits 32"),
        ] {
            let error = samples(&file, RATE).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(error.contains(expected), "{error:?}, expected {expected:?}");
        }
        assert!(samples(&encode(&SAMPLES), 16_000).is_err());
        // No prefix of a file, and no length in it, makes the reader panic.
        let whole = file(&[chunk(b"LIST", 3, b"abc\0"), plain, data(8)], None);
        for at in 0..whole.len() {
            let mut other = whole.clone();
            other[at] = 0xFF;
            let _ = (samples(&whole[..at], RATE), samples(&other, RATE));
        }
    }
}
