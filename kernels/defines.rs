//! Hands `src/layout.rs` to a C++ compiler: each constant, and the size and offsets of each record, as a macro that
//! `common.cuh` asserts. Used by `build.rs`, and by the stand-in driver of the tests as a program of its own.

#[allow(dead_code, unreachable_pub)]
#[path = "../src/layout.rs"]
mod layout;

use layout::{ACCUMULATE, BLEND, CLAMPED, DOT, HELD, NONFINITE, OBSERVE};
use layout::{
    ALIGNMENT, CHUNK, Chunk, FOLD, LOADS, Launch, MAX_MODALITIES, Progress, RESIDENT, SMALL, Span, State, THREADS,
    TensorRecord, Weights,
};
use std::mem::{offset_of, size_of};

/// Compiler arguments.
pub(crate) fn defines() -> Vec<String> {
    let mut defines = Vec::new();
    let mut define = |name: String, value: u64| defines.push(format!("-D{name}={value}"));
    for (name, value) in [
        ("MAX_MODALITIES", MAX_MODALITIES as u64),
        ("CHUNK", CHUNK),
        ("ALIGNMENT", ALIGNMENT),
        ("THREADS", THREADS),
        ("RESIDENT", RESIDENT),
        ("LOADS", LOADS),
        ("SMALL", SMALL),
        ("FOLD", FOLD),
    ] {
        define(format!("GRADBLEND_{name}"), value);
    }
    macro_rules! bits {
        ($($name:ident)+) => { $(define(format!("GRADBLEND_{}", stringify!($name)), u64::from($name));)+ };
    }
    bits!(DOT BLEND ACCUMULATE OBSERVE HELD NONFINITE CLAMPED);
    macro_rules! record {
        ($record:ident: $($field:ident)+) => {
            define(format!("GRADBLEND_SIZE_{}", stringify!($record)), size_of::<$record>() as u64);
            $(define(
                format!("GRADBLEND_OFFSET_{}_{}", stringify!($record), stringify!($field)),
                offset_of!($record, $field) as u64,
            );)+
        };
    }
    record!(TensorRecord: train valid blended len dtype present alignment reserved);
    record!(Chunk: start tensor len);
    record!(Span: first end);
    record!(Progress: taken done);
    record!(State: pending weights_f32 weights mean second_moment normaliser observed skipped flags nonfinite);
    record!(Launch: tensors addresses indices chunks spans count partials state progress zeros scale_address decay damping scale
        modalities what average overfitting negative cadence reserved);
    record!(Weights: values);
    defines
}

/// Prints them, a line each.
#[allow(dead_code)]
fn main() {
    for define in defines() {
        println!("{define}");
    }
}
