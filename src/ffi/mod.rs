//! C ABI: the functions of `include/gradblend.h`, which documents them. Each checks what only C can get wrong and leaves
//! the rest to the crate.

// Types have their names in C.
#![allow(non_camel_case_types)]
#![allow(missing_docs, clippy::missing_safety_doc, reason = "include/gradblend.h documents the functions and records")]

mod argument;
mod blender;
mod environment;
mod general;
mod handle;
mod plan;
mod record;
mod status;
#[cfg(test)]
mod tests;

pub use blender::*;
pub use general::*;
pub use plan::*;
pub use record::{gradblend_config, gradblend_dlpack, gradblend_report, gradblend_tensor};
pub use status::Status;
