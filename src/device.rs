//! The device that a blender works on.

use crate::backend::cuda;
use crate::error::Result;

/// The CPU, or one CUDA device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    ordinal: Option<i32>,
}

impl Device {
    /// The CPU.
    pub fn cpu() -> Self {
        Device { ordinal: None }
    }

    /// The CUDA device with this ordinal.
    ///
    /// # Errors
    /// [`Error::NotBuilt`](crate::Error::NotBuilt) without the feature `cuda`;
    /// [`Error::NoDriver`](crate::Error::NoDriver); [`Error::NoDevice`](crate::Error::NoDevice);
    /// [`Error::UnsupportedDevice`](crate::Error::UnsupportedDevice) if it cannot run the kernels of this build;
    /// [`Error::Forked`](crate::Error::Forked) in a process whose parent has made a CUDA device;
    /// [`Error::Cuda`](crate::Error::Cuda).
    pub fn cuda(ordinal: i32) -> Result<Self> {
        cuda::find(ordinal)?;
        Ok(Device { ordinal: Some(ordinal) })
    }

    /// Ordinal of a CUDA device; `None` for the CPU.
    pub fn ordinal(&self) -> Option<i32> {
        self.ordinal
    }
}
