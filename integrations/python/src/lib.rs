//! The shared library of the Python package: the C functions of gradblend, and nothing else.

pub use gradblend::ffi;
