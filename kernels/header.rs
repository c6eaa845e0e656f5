//! Generates `abi.cuh`, the kernels' header, from the constants and records of `src/abi.rs`. `kernels/build.rs` and
//! `cargo xtask` include this file.

#[path = "../src/abi.rs"]
#[allow(unreachable_pub)]
pub(crate) mod abi;

/// The C++ text of the header. The compiler checks that each record has the size and the offsets that it has in Rust.
pub(crate) fn header() -> String {
    let mut text = String::from(
        "// Generated from src/abi.rs, which documents each name.\n#pragma once\n\n#include <stdint.h>\n\n",
    );
    for (name, value) in abi::CONSTANTS {
        text += &format!("constexpr uint32_t {name} = {value};\n");
    }
    for record in abi::RECORDS {
        let name = record.name;
        text += &format!("\nstruct alignas(8) {name} {{\n");
        for (field, kind, _) in record.fields {
            let (element, dimension) =
                match kind.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')?.split_once(';')) {
                    Some((element, len)) => (element, format!("[{}]", len.trim())),
                    None => (*kind, String::new()),
                };
            text += &format!("    {} {field}{dimension};\n", c_type(element));
        }
        text += &format!("}};\nstatic_assert(sizeof({name}) == {}, \"size of {name}\");\n", record.bytes);
        for (field, _, offset) in record.fields {
            text += &format!("static_assert(__builtin_offsetof({name}, {field}) == {offset}, \"{name}.{field}\");\n");
        }
    }
    text
}

/// The C++ type of a field. A type that is missing here does not compile as C++.
fn c_type(rust: &str) -> &str {
    match rust {
        "u64" => "uint64_t",
        "u32" => "uint32_t",
        "f64" => "double",
        "f32" => "float",
        other => other,
    }
}
