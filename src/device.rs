//! The device that a blender works on.

#[cfg(not(feature = "cuda"))]
use crate::error::Error;
use crate::error::Result;

/// What a blender works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device(pub(crate) Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(i32),
}

impl Device {
    /// The CPU.
    pub fn cpu() -> Self {
        Device(Kind::Cpu)
    }

    /// Ordinal of a CUDA device; `None` for the CPU.
    pub fn ordinal(&self) -> Option<i32> {
        match self.0 {
            Kind::Cpu => None,
            #[cfg(feature = "cuda")]
            Kind::Cuda(ordinal) => Some(ordinal),
        }
    }

    /// The CUDA device with this ordinal, if it can run this build.
    ///
    /// # Errors
    /// [`Error::NotBuilt`] without the feature `cuda`; [`Error::NoDriver`], [`Error::NoDevice`],
    /// [`Error::UnsupportedDevice`]; [`Error::Cuda`].
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: i32) -> Result<Self> {
        crate::backend::cuda::find(ordinal)?;
        Ok(Device(Kind::Cuda(ordinal)))
    }

    /// The CUDA device with this ordinal, in a build with the feature `cuda`.
    ///
    /// # Errors
    /// [`Error::NotBuilt`]: this build has no CUDA backend.
    #[cfg(not(feature = "cuda"))]
    pub fn cuda(ordinal: i32) -> Result<Self> {
        Err(Error::NotBuilt { backend: "CUDA", ordinal })
    }
}
