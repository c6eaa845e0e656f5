//! Unit tests of the C ABI: the header, which is written by hand, agrees with this source; handles and messages.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::mem::{offset_of, size_of};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::blender::{gradblend_blender_create, gradblend_blender_destroy, gradblend_observe, with};
use super::general::{gradblend_last_error, gradblend_version};
use super::handle::Handles;
use super::record::{self, gradblend_config, gradblend_dlpack, gradblend_report, gradblend_tensor};
use super::status::{self, Fault, Outcome, call};
use crate::abi;
use crate::config::Config;
use crate::dlpack::{DLManagedTensor, DLManagedTensorVersioned};

const HEADER: &str = include_str!("../../include/gradblend.h");
const SOURCES: &str = concat!(include_str!("general.rs"), include_str!("blender.rs"), include_str!("plan.rs"));

/// Compiles `assertions` after the header; the error has the compiler's messages.
fn compile(language: &str, standard: &str, assertions: &str) -> std::result::Result<(), String> {
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let include = concat!(env!("CARGO_MANIFEST_DIR"), "/include");
    let mut child = Command::new(&compiler)
        .args(["-x", language, standard])
        .args("-Wall -Wextra -Wpedantic -Werror -fsyntax-only -I".split(' '))
        .args([include, "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{compiler}: {error}"))?;
    let program = format!("#include \"gradblend.h\"\n#include <assert.h>\n{assertions}");
    let written = child.stdin.take().map(|mut input| input.write_all(program.as_bytes()));
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    match (output.status.success(), written) {
        (true, Some(Ok(()))) => Ok(()),
        _ => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// Asserts the size of a record, and the offset and size of each field.
macro_rules! record {
    ($out:ident, $record:ident { $($field:ident),* }) => {
        // Names all fields, so that a new field does not compile without an assertion.
        let _ = |$record { $($field),* }: $record| ($($field,)*);
        writeln!($out, "static_assert(sizeof({0}) == {1}, \"{0}\");", stringify!($record), size_of::<$record>())?;
        $(
            let (record, field) = (stringify!($record), stringify!($field));
            let offset = offset_of!($record, $field);
            let bytes = field_bytes(|r: &$record| size_of_val(&r.$field));
            writeln!($out, "static_assert(offsetof({record}, {field}) == {offset}, \"{record}.{field}\");")?;
            writeln!($out, "static_assert(sizeof((({record} *)0)->{field}) == {bytes}, \"{record}.{field}\");")?;
        )*
    };
}

fn field_bytes<T: bytemuck::Zeroable>(bytes: impl Fn(&T) -> usize) -> usize {
    bytes(&T::zeroed())
}

type Checked<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Assertions about the layout of each record of the header.
fn record_assertions() -> Checked<String> {
    let mut out = String::new();
    record!(
        out,
        gradblend_config {
            size,
            modalities,
            average,
            overfitting,
            negative,
            cadence,
            threads,
            reserved,
            decay,
            damping,
            min_weight
        }
    );
    record!(out, gradblend_tensor { len, dtype, train, valid, modalities, blended });
    record!(
        out,
        gradblend_report {
            size,
            modalities,
            observed,
            skipped,
            flags,
            nonfinite,
            weights,
            mean,
            second_moment,
            ogr,
            ogr_blend,
            ogr_uniform,
            floored,
            reserved,
            effective,
            standard_error
        }
    );
    record!(out, gradblend_dlpack { managed, versioned });
    Ok(out)
}

/// Codes of DType, Pass and Config, which are those of the kernels.
const OF_KERNELS: [&str; 16] = [
    "F32",
    "F16",
    "BF16",
    "MEAN",
    "EMA",
    "UNCORRELATED",
    "CORRELATED",
    "CLAMP",
    "SIGNED",
    "ON_REQUEST",
    "EVERY_OBSERVATION",
    "DOT",
    "BLEND",
    "ACCUMULATE",
    "OBSERVE",
    "MAX_MODALITIES",
];

/// The constants of the header, with their values in this source.
fn constants() -> Checked<Vec<(String, i64)>> {
    let mut constants: Vec<(String, i64)> = Vec::new();
    for (code, name) in status::NAMES.iter().enumerate() {
        constants.push((name.to_str()?.into(), code as i64));
    }
    for (name, value) in abi::CONSTANTS.iter().filter(|(name, _)| OF_KERNELS.contains(name)) {
        constants.push((format!("GRADBLEND_{name}"), *value as i64));
    }
    for (name, value) in [
        ("CPU", i64::from(record::CPU)),
        ("FLAG_HELD", i64::from(abi::HELD)),
        ("FLAG_NONFINITE", i64::from(abi::NONFINITE)),
        ("FLAG_CLAMPED", i64::from(abi::CLAMPED)),
        ("FLAG_FLOORED", i64::from(abi::FLOORED)),
        ("FLAG_INEXACT", i64::from(abi::INEXACT)),
        ("VERSION", i64::from(gradblend_version())),
    ] {
        constants.push((format!("GRADBLEND_{name}"), value));
    }
    assert_eq!(constants.len(), status::NAMES.len() + OF_KERNELS.len() + 7);
    Ok(constants)
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
}

/// Records of the header have the layout of this source, and constants its values, in C and in C++.
#[test]
fn layout() -> Checked<()> {
    let (mut out, constants) = (record_assertions()?, constants()?);
    for (name, value) in &constants {
        writeln!(out, "static_assert({name} == {value}, \"{name}\");")?;
        assert!(words(HEADER).any(|word| word == name), "{name} is not in the header");
    }
    // No constant of the header is missing here.
    for word in words(&comments_stripped(HEADER)) {
        let own = word.strip_prefix("GRADBLEND_").is_some_and(|word| word != "H" && !word.starts_with("VERSION_"));
        assert!(!own || constants.iter().any(|(name, _)| name == word), "{word} is checked nowhere");
    }
    compile("c", "-std=c11", &out)?;
    compile("c++", "-std=c++17", &out)?;
    // A wrong assertion fails.
    let wrong = "static_assert(sizeof(gradblend_config) == 1, \"\");";
    assert!(compile("c", "-std=c11", wrong).is_err());
    Ok(())
}

/// The version is that of Cargo.toml, composed.
#[test]
fn version() {
    let mut composed = 0;
    for number in env!("CARGO_PKG_VERSION").split('.') {
        composed = composed << 8 | number.parse::<u32>().unwrap_or(u32::MAX);
    }
    assert_eq!(gradblend_version(), composed);
}

fn comments_stripped(c: &str) -> String {
    let mut parts = c.split("/*");
    let mut out = parts.next().unwrap_or_default().to_string();
    parts.filter_map(|part| part.split_once("*/")).for_each(|(_, code)| out.push_str(code));
    out
}

/// Types of each function in C without spaces, the result first.
type Signatures = BTreeMap<String, Vec<String>>;

fn header_signatures() -> Signatures {
    let code = comments_stripped(HEADER);
    let lines: String = code
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .map(|line| line.trim().to_owned() + " ")
        .collect();
    let mut all = Signatures::new();
    // The inline function is no part of the ABI.
    let (before, inline) = lines.split_once("static inline").unwrap_or((&lines, ""));
    let lines = format!("{before}{}", inline.split_once("return status; }").map_or("", |(_, after)| after));
    for statement in lines.split([';', '{', '}']) {
        let Some((head, parameters)) = statement.trim().split_once('(') else { continue };
        let at = head.rfind(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).map_or(0, |at| at + 1);
        let mut types = vec![head[..at].replace(' ', "")];
        for parameter in parameters.trim_end_matches(')').split(',').map(str::trim).filter(|word| *word != "void") {
            // The name is the last word, unless the type stands alone.
            let unnamed = parameter.trim_end_matches(|c: char| c.is_ascii_alphanumeric() || c == '_').trim();
            types.push(if unnamed.is_empty() { parameter } else { unnamed }.replace(' ', ""));
        }
        all.insert(head[at..].to_string(), types);
    }
    all
}

/// A Rust type in C.
fn c_type(rust: &str) -> String {
    let rust = rust.trim();
    if let Some(inner) = rust.strip_prefix("*const ") {
        let inner = c_type(inner);
        return if inner.ends_with('*') { format!("{inner}const*") } else { format!("const{inner}*") };
    }
    if let Some(inner) = rust.strip_prefix("*mut ") {
        return c_type(inner) + "*";
    }
    let names = [
        ("u32", "uint32_t"),
        ("u64", "uint64_t"),
        ("i32", "int32_t"),
        ("usize", "size_t"),
        ("f32", "float"),
        ("f64", "double"),
        ("c_char", "char"),
        ("c_void", "void"),
        ("Status", "gradblend_status"),
        ("", "void"),
    ];
    names.iter().find(|(name, _)| *name == rust).map_or(rust, |(_, c)| *c).to_string()
}

fn source_signatures() -> Signatures {
    let mut all = Signatures::new();
    for function in SOURCES.split("#[unsafe(no_mangle)]").skip(1) {
        let Some((_, function)) = function.split_once("extern \"C\" fn ") else { continue };
        let Some((signature, _)) = function.split_once('{') else { continue };
        let Some((name, rest)) = signature.split_once('(') else { continue };
        let Some((parameters, result)) = rest.rsplit_once(')') else { continue };
        let mut types = vec![c_type(result.trim().trim_start_matches("->"))];
        let named = parameters.split(',').filter_map(|parameter| parameter.split_once(':'));
        types.extend(named.map(|(_, rust)| c_type(rust)));
        all.insert(name.to_string(), types);
    }
    all
}

/// Functions of the header have the names and types of this source.
#[test]
fn signatures() {
    let (header, source) = (header_signatures(), source_signatures());
    assert_eq!(header, source);
    // Both parsers found every function.
    assert_eq!(source.len(), SOURCES.matches("no_mangle").count());
    assert_eq!(header["gradblend_device_weights"], ["gradblend_status", "constgradblend_blender*", "constfloat**"]);
    assert_eq!(header["gradblend_blender_destroy"], ["void", "gradblend_blender*"]);
}

/// The DLPack records have the layout of the specification on a 64-bit machine.
#[test]
fn dlpack_layout() {
    use crate::dlpack::DLTensor;
    assert_eq!(
        (size_of::<DLTensor>(), size_of::<DLManagedTensor>(), size_of::<DLManagedTensorVersioned>()),
        (48, 64, 80)
    );
    let offsets = [
        (offset_of!(DLTensor, device), 8),
        (offset_of!(DLTensor, ndim), 16),
        (offset_of!(DLTensor, dtype), 20),
        (offset_of!(DLTensor, shape), 24),
        (offset_of!(DLTensor, strides), 32),
        (offset_of!(DLTensor, byte_offset), 40),
        (offset_of!(DLManagedTensor, manager_ctx), 48),
        (offset_of!(DLManagedTensorVersioned, manager_ctx), 8),
        (offset_of!(DLManagedTensorVersioned, flags), 24),
        (offset_of!(DLManagedTensorVersioned, dl_tensor), 32),
    ];
    assert!(offsets.iter().all(|(got, expected)| got == expected), "{offsets:?}");
}

fn last() -> String {
    let mut buffer = [0_u8; 256];
    // SAFETY: the buffer has this many bytes.
    let len = unsafe { gradblend_last_error(buffer.as_mut_ptr().cast(), buffer.len()) };
    String::from_utf8_lossy(&buffer[..len.min(buffer.len() - 1)]).into_owned()
}

/// A panic does not cross the C ABI, and its blender is not used again.
#[test]
fn panics() -> Checked<()> {
    let mut blender = std::ptr::null_mut();
    // SAFETY: the addresses are those of values of the right types.
    unsafe {
        let config = gradblend_config { threads: 1, ..gradblend_config::of(&Config::new(2)) };
        assert_eq!(gradblend_blender_create(record::CPU, &config, &mut blender), status::OK, "{}", last());
        let panicked = with(blender, |_| std::panic::panic_any("on purpose"));
        assert_eq!((panicked, last().as_str()), (status::INTERNAL, "a bug of gradblend: on purpose"));
        assert_eq!(gradblend_observe(blender, std::ptr::null_mut()), status::INTERNAL);
        assert!(last().contains("an earlier call"), "{}", last());
        gradblend_blender_destroy(blender);
        assert_eq!(gradblend_observe(blender, std::ptr::null_mut()), status::INVALID_ARGUMENT);
        assert!(last().contains("destroyed"), "{}", last());
    }
    Ok(())
}

/// A message that does not fit is cut between characters and ends in 0.
#[test]
fn cut_message() {
    call(|| Err(Fault::Argument("aé".into())));
    for (room, expected) in [(0, None), (1, Some("")), (2, Some("a")), (3, Some("a")), (4, Some("aé")), (9, Some("aé"))]
    {
        let mut buffer = [b'?'; 9];
        // SAFETY: the buffer has this many bytes.
        assert_eq!(unsafe { gradblend_last_error(buffer.as_mut_ptr().cast(), room) }, 3);
        let text = expected.map(|text| [text.as_bytes(), &[0]].concat()).unwrap_or_default();
        assert_eq!(&buffer[..text.len()], text, "{room}");
        assert!(buffer[room.max(text.len())..].iter().all(|byte| *byte == b'?'), "{room}");
    }
}

/// Destroying waits for the running call. A call that waits too runs before the destruction or gets an error.
#[test]
fn destroyed_while_it_runs() -> Outcome {
    let numbers: Handles<u32> = Handles::new(3, "number");
    let handle = numbers.insert(1)?;
    let (running, ended, destroyed) = (Barrier::new(2), AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            numbers.write(handle, |_| {
                running.wait();
                std::thread::sleep(Duration::from_millis(50));
                ended.store(true, Ordering::SeqCst);
                Ok(())
            })
        });
        running.wait();
        let late = scope.spawn(|| numbers.write(handle, |_| Ok(destroyed.load(Ordering::SeqCst))));
        numbers.destroy(handle);
        destroyed.store(true, Ordering::SeqCst);
        assert!(ended.load(Ordering::SeqCst));
        assert!(!matches!(late.join(), Ok(Ok(true)) | Err(_)));
    });
    Ok(())
}

/// A handle is valid for one value only, and never again after its destruction.
#[test]
fn handles() -> Outcome {
    let numbers: Handles<u32> = Handles::new(3, "number");
    let other: Handles<u32> = Handles::new(5, "other");
    let value = |handle| numbers.read(handle, |number| Ok(*number));
    let (first, second) = (numbers.insert(1)?, numbers.insert(2)?);
    assert_eq!((value(first)?, value(second)?), (1, 2));
    other.destroy(first);
    assert!(other.read(first, |_| Ok(())).is_err() && value(first)? == 1);
    assert_eq!(numbers.write(first, |number| Ok(std::mem::replace(number, 7)))?, 1);
    assert_eq!(value(first)?, 7);
    numbers.destroy(first);
    for _ in 0..1000 {
        let third = numbers.insert(3)?;
        numbers.destroy(first);
        assert!(third != first && value(third)? == 3 && value(first).is_err());
        numbers.destroy(third);
    }
    assert_eq!(value(second)?, 2);
    for foreign in [0, 3, usize::MAX, first ^ 8, second + 1] {
        numbers.destroy(foreign);
        assert!(value(foreign).is_err(), "{foreign:#x}");
    }
    assert_eq!(value(second)?, 2);
    Ok(())
}
