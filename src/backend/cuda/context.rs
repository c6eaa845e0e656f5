//! Primary context of a device, and the kernels loaded in it.

use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cudarc::driver::sys::{
    CUcontext, CUdevice_attribute, CUfunction, CUmodule, CUpointer_attribute, CUresult, CUstream, CUstream_flags,
    CUstreamCaptureMode, CUstreamCaptureStatus,
};

use crate::abi::THREADS_PER_BLOCK;
use crate::error::{Error, Result};
use crate::tensor::{Stream, StreamRef};

use super::driver::{self, Found, call};
use super::library;

/// A fat binary, aligned as the fields of its header are.
#[repr(C, align(16))]
struct Image<T: ?Sized>(T);

/// The images that `kernels/build.rs` compiled.
static PASS: &Image<[u8]> = &Image(*include_bytes!(concat!(env!("OUT_DIR"), "/pass.fatbin")));
static STATE: &Image<[u8]> = &Image(*include_bytes!(concat!(env!("OUT_DIR"), "/state.fatbin")));

/// A kernel, and the number of its thread blocks that the device holds at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    pub(super) function: CUfunction,
    pub(super) resident_blocks: u64,
}

impl Kernel {
    const NONE: Kernel = Kernel { function: std::ptr::null_mut(), resident_blocks: 1 };
}

/// All kernels by name.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernels {
    pub(super) dot: Kernel,
    pub(super) blend: Kernel,
    pub(super) dot_blend: Kernel,
    pub(super) observe: Kernel,
    pub(super) reweight: Kernel,
    pub(super) reset: Kernel,
    pub(super) set_weights: Kernel,
}

/// The retained primary context of a device, and what all blenders on the device share.
#[derive(Debug)]
pub(super) struct Context {
    found: Found,
    context: CUcontext,
    modules: Vec<CUmodule>,
    pub(super) kernels: Kernels,
    /// Whether the device can access pageable host memory, which the driver does not know.
    pageable: bool,
    /// For work that no stream of the caller orders: making a blender or a plan.
    own: CUstream,
    /// Whether memory leaked because its pending work could not be waited for. The kernels must then stay loaded.
    pub(super) leaked: AtomicBool,
}

// SAFETY: any thread may use the driver's handles.
unsafe impl Send for Context {}
// SAFETY: any thread may use the driver's handles; after `new` only an atomic changes.
unsafe impl Sync for Context {}

/// Guard: while it lives, the context is current on this thread. With `mode`, calls that a capture on another stream would
/// forbid are allowed, because they do not touch captured work. Dropping it restores what was current before.
pub(super) struct Current {
    mode: Option<CUstreamCaptureMode>,
    /// The current context belongs to a thread, so the guard is not `Send`.
    thread: PhantomData<*mut ()>,
}

impl Context {
    /// The device's context. All who hold it at the same time share it, so the kernels are loaded once.
    pub(super) fn of(ordinal: i32) -> Result<Arc<Self>> {
        static HELD: Mutex<Vec<(i32, Weak<Context>)>> = Mutex::new(Vec::new());
        // A forked process would find its parent's contexts.
        library::load()?;
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(context) = held.iter().find(|(of, _)| *of == ordinal).and_then(|(_, context)| context.upgrade()) {
            return Ok(context);
        }
        let context = Arc::new(Self::new(ordinal)?);
        held.retain(|(of, _)| *of != ordinal);
        held.push((ordinal, Arc::downgrade(&context)));
        Ok(context)
    }

    fn new(ordinal: i32) -> Result<Self> {
        let found = driver::find(ordinal)?;
        let pageable = found.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS)? != 0;
        let sms = found.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: `context` is a valid out-pointer for one handle; `found.device` is a device.
        unsafe { call!(cuDevicePrimaryCtxRetain(&mut context, found.device)) }?;
        let (none, own) = (Kernel::NONE, std::ptr::null_mut());
        let kernels = Kernels {
            dot: none,
            blend: none,
            dot_blend: none,
            observe: none,
            reweight: none,
            reset: none,
            set_weights: none,
        };
        // From here on, drop releases what `made` has.
        let (modules, leaked) = (Vec::new(), AtomicBool::new(false));
        let mut made = Context { found, context, modules, kernels, pageable, own, leaked };
        {
            let _current = made.enter_relaxed()?;
            let pass = made.load(PASS)?;
            let state = made.load(STATE)?;
            let kernel = |module, name| kernel(module, name, sms);
            made.kernels = Kernels {
                dot: kernel(pass, c"dot")?,
                blend: kernel(pass, c"blend")?,
                dot_blend: kernel(pass, c"dot_blend")?,
                observe: kernel(state, c"observe")?,
                reweight: kernel(state, c"reweight")?,
                reset: kernel(state, c"reset")?,
                set_weights: kernel(state, c"set_weights")?,
            };
            // SAFETY: `made.own` is a valid out-pointer for one handle; the context is current.
            unsafe { call!(cuStreamCreate(&mut made.own, CUstream_flags::CU_STREAM_NON_BLOCKING as u32)) }?;
        }
        Ok(made)
    }

    fn load(&mut self, image: &'static Image<[u8]>) -> Result<CUmodule> {
        let mut module = std::ptr::null_mut();
        // SAFETY: `module` is a valid out-pointer for one handle; the image is complete, and its header has its length.
        let loaded = unsafe { call!(cuModuleLoadData(&mut module, image.0.as_ptr().cast::<c_void>())) };
        use CUresult::*;
        let mismatch = [
            CUDA_ERROR_INVALID_IMAGE,
            CUDA_ERROR_NO_BINARY_FOR_GPU,
            CUDA_ERROR_INVALID_PTX,
            CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
            CUDA_ERROR_JIT_COMPILER_NOT_FOUND,
            CUDA_ERROR_JIT_COMPILATION_DISABLED,
        ];
        match loaded {
            Ok(()) => self.modules.push(module),
            Err(error) if mismatch.iter().any(|code| driver::code(&error) == *code as u32) => {
                return Err(self.found.unsupported(&error));
            }
            Err(error) => return Err(error),
        }
        Ok(module)
    }

    /// Makes the context current.
    pub(super) fn enter(&self) -> Result<Current> {
        // SAFETY: the context is retained.
        unsafe { call!(cuCtxPushCurrent_v2(self.context)) }?;
        Ok(Current { mode: None, thread: PhantomData })
    }

    /// Makes the context current for calls that allocate, free or synchronize.
    pub(super) fn enter_relaxed(&self) -> Result<Current> {
        let mut current = self.enter()?;
        let mut mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: `mode` is a valid in- and out-pointer for one mode.
        unsafe { call!(cuThreadExchangeStreamCaptureMode(&mut mode)) }?;
        current.mode = Some(mode);
        Ok(current)
    }

    /// The driver's handle, for comparison.
    pub(super) fn handle(&self) -> CUcontext {
        self.context
    }

    /// The context's own stream.
    pub(super) fn own(&self) -> Stream {
        // SAFETY: the stream lives as long as this context, which its users hold.
        unsafe { Stream::from_raw(self.own.cast()) }
    }

    /// Whether the device can access this byte.
    pub(super) fn knows(&self, address: u64) -> Result<bool> {
        if self.pageable {
            return Ok(true);
        }
        let mut memory = 0_u32;
        let attribute = CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        // SAFETY: `memory` is a valid out-pointer for this attribute, an unsigned int. The driver does not read the address.
        let known = unsafe { call!(cuPointerGetAttribute((&raw mut memory).cast(), attribute, address)) };
        match known {
            Ok(()) => Ok(memory != 0),
            Err(error) if driver::code(&error) == CUresult::CUDA_ERROR_INVALID_VALUE as u32 => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // Failures are ignored: a drop cannot report them.
        if let Ok(_current) = self.enter_relaxed() {
            // SAFETY: `new` made these handles, and each is released once. Plans and blenders, which hold this context, are
            // gone; each has waited for its work or set `leaked`.
            unsafe {
                if !self.own.is_null() {
                    let _ = call!(cuStreamDestroy_v2(self.own));
                }
                let unused = !self.leaked.load(Ordering::Relaxed);
                for module in self.modules.iter().filter(|_| unused) {
                    let _ = call!(cuModuleUnload(*module));
                }
            }
        }
        // SAFETY: `new` retained the context.
        let _ = unsafe { call!(cuDevicePrimaryCtxRelease_v2(self.found.device)) };
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        let mut context = std::ptr::null_mut();
        // SAFETY: `mode` and the context were set on this thread, because this value is not `Send`.
        unsafe {
            if let Some(mut mode) = self.mode {
                let _ = call!(cuThreadExchangeStreamCaptureMode(&mut mode));
            }
            let _ = call!(cuCtxPopCurrent_v2(&mut context));
        }
    }
}

fn kernel(module: CUmodule, name: &CStr, sms: i32) -> Result<Kernel> {
    let (mut function, mut blocks) = (std::ptr::null_mut(), 0);
    // SAFETY: `function` and `blocks` are valid out-pointers; the module is loaded.
    unsafe {
        call!(cuModuleGetFunction(&mut function, module, name.as_ptr()))?;
        call!(cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, function, THREADS_PER_BLOCK as i32, 0))?;
    }
    Ok(Kernel { function, resident_blocks: (blocks.max(1) as u64) * (sms.max(1) as u64) })
}

/// Synchronizes a stream. Its context must be current.
pub(super) fn synchronize(stream: StreamRef<'_>) -> Result<()> {
    // SAFETY: `Stream::from_raw` requires a live stream.
    unsafe { call!(cuStreamSynchronize(stream.as_raw() as CUstream)) }
}

/// Whether a stream is being captured. Its context must be current.
pub(super) fn capturing(stream: StreamRef<'_>) -> Result<bool> {
    let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: `status` is a valid out-pointer for one status; `Stream::from_raw` requires a live stream.
    unsafe { call!(cuStreamIsCapturing(stream.as_raw() as CUstream, &mut status)) }?;
    Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

/// Rejects a stream that is being captured, for a call that synchronizes or copies. Its context must be current.
pub(super) fn reject_capture(stream: StreamRef<'_>, what: &'static str) -> Result<()> {
    if capturing(stream)? { Err(Error::Capturing { what }) } else { Ok(()) }
}
