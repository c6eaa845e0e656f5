//! Where the operations run.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
