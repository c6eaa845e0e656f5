//! The CUDA driver: its devices, and its results as errors.

use std::ffi::CStr;

use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};

use super::library;
use crate::error::{Error, Result};

/// Version of the toolkit that compiled the images, and the compute capabilities that they have machine code for.
pub(super) const TOOLKIT: &str = env!("GRADBLEND_TOOLKIT");
pub(super) const ARCHITECTURES: &str = env!("GRADBLEND_ARCHITECTURES");

/// Calls a driver function and converts its result to an [`Error`].
macro_rules! call {
    ($function:ident($($argument:expr),* $(,)?)) => {
        $crate::backend::cuda::driver::check(stringify!($function), ::cudarc::driver::sys::$function($($argument),*))
    };
}
pub(super) use call;

/// Converts a driver result.
pub(super) fn check(call: &'static str, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut name = std::ptr::null();
    // SAFETY: `name` is a valid out-pointer for the address of a static string.
    let known = unsafe { sys::cuGetErrorName(result, &mut name) } == CUresult::CUDA_SUCCESS && !name.is_null();
    let name = if known {
        // SAFETY: the driver's strings are static and end in NUL.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    } else {
        "an unknown error".into()
    };
    Err(Error::Cuda { call, code: result as u32, name })
}

/// `CUresult` code of a driver error; 0 for other errors.
pub(super) fn code(error: &Error) -> u32 {
    if let Error::Cuda { code, .. } = error { *code } else { 0 }
}

/// Loads the driver and initialises it.
fn initialise() -> Result<()> {
    library::load()?;
    // SAFETY: the library has the function. Initialising twice has no effect.
    unsafe { call!(cuInit(0)) }
}

/// A device that can run the images of this build.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) device: sys::CUdevice,
    pub(super) ordinal: i32,
    pub(super) name: String,
}

impl Found {
    pub(super) fn attribute(&self, attribute: CUdevice_attribute) -> Result<i32> {
        let mut value = 0;
        // SAFETY: `value` is a valid out-pointer for one int; `self.device` is a device.
        unsafe { call!(cuDeviceGetAttribute(&mut value, attribute, self.device)) }?;
        Ok(value)
    }

    /// The error for an image that does not load, with the versions of driver and toolkit.
    pub(super) fn unsupported(&self, error: &Error) -> Error {
        let mut version = 0;
        // SAFETY: the argument is a valid out-pointer for one int.
        let known = unsafe { call!(cuDriverGetVersion(&mut version)) };
        let driver = match known {
            Ok(()) => format!("{}.{}", version / 1000, version % 1000 / 10),
            Err(_) => "an unknown version".into(),
        };
        let reason = format!(
            "its driver is for CUDA {driver}; the kernels were built by toolkit {TOOLKIT} for compute capabilities \
             {ARCHITECTURES} and up ({error}). Update the driver or build with a toolkit that is not newer than it"
        );
        Error::UnsupportedDevice { ordinal: self.ordinal, device: self.name.clone(), reason }
    }
}

/// Finds a device, and checks that it can run the images of this build.
pub(super) fn find(ordinal: i32) -> Result<Found> {
    match initialise() {
        Err(error) if code(&error) == CUresult::CUDA_ERROR_NO_DEVICE as u32 => {
            return Err(Error::NoDevice { ordinal, devices: 0 });
        }
        Err(error) if code(&error) == CUresult::CUDA_ERROR_STUB_LIBRARY as u32 => {
            // cudarc was linked to a stub, or loaded one before `library::load` could prevent it.
            let reason = "cudarc uses the stub of a toolkit; its folder must not be on the library path".into();
            return Err(Error::NoDriver { reason });
        }
        other => other?,
    }
    let mut devices = 0;
    // SAFETY: the argument is a valid out-pointer for one int.
    unsafe { call!(cuDeviceGetCount(&mut devices)) }?;
    if ordinal < 0 || ordinal >= devices {
        return Err(Error::NoDevice { ordinal, devices });
    }
    let (mut device, mut name) = (0, [0; 128]);
    // SAFETY: `device` is a valid out-pointer, and `name` has 128 bytes, of which the last stays NUL.
    unsafe {
        call!(cuDeviceGet(&mut device, ordinal))?;
        call!(cuDeviceGetName(name.as_mut_ptr(), 127, device))?;
    }
    // SAFETY: the last byte of `name` is NUL.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    let found = Found { device, ordinal, name };
    let major = found.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = found.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let lowest = ARCHITECTURES.split(' ').next().and_then(|lowest| lowest.parse::<i32>().ok()).unwrap_or(i32::MAX);
    if major * 10 + minor < lowest {
        let reason =
            format!("its compute capability is {major}.{minor}; this build has kernels for {ARCHITECTURES} and up");
        return Err(Error::UnsupportedDevice { ordinal, device: found.name, reason });
    }
    Ok(found)
}
