//! A device's primary context, with the kernels in it.

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
use crate::tensor::Stream;

use super::driver::{self, Found, call};

/// An image at an address that its header's fields are aligned at.
#[repr(C, align(16))]
struct Image<T: ?Sized>(T);

/// The images that `build.rs` made.
static PASS: &Image<[u8]> = &Image(*include_bytes!(concat!(env!("OUT_DIR"), "/pass.fatbin")));
static REWEIGHT: &Image<[u8]> = &Image(*include_bytes!(concat!(env!("OUT_DIR"), "/state.fatbin")));

/// A kernel, and how many of its blocks the device runs at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    pub(super) function: CUfunction,
    pub(super) resident: u64,
}

impl Kernel {
    const NONE: Kernel = Kernel { function: std::ptr::null_mut(), resident: 1 };
}

/// All kernels, by name.
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

/// A device's primary context, retained, with what all blenders on the device share.
#[derive(Debug)]
pub(super) struct Context {
    found: Found,
    context: CUcontext,
    modules: Vec<CUmodule>,
    pub(super) kernels: Kernels,
    /// Whether the device reads memory that the driver was never told of.
    pageable: bool,
    /// For what is not ordered by the caller's stream: making a blender or a plan.
    own: CUstream,
    /// Whether work may still be pending that nobody can wait for.
    pub(super) abandoned: AtomicBool,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Context {}
// SAFETY: as above; nothing here but an atomic is written to after `new`.
unsafe impl Sync for Context {}

/// While it lives, the context is current on this thread; and, if it was entered so, calls that a capture on another
/// stream would forbid are allowed, because they touch nothing that is captured. What was current before is current again afterwards.
pub(super) struct Current {
    mode: Option<CUstreamCaptureMode>,
    /// What is current is a thread's own.
    thread: PhantomData<*mut ()>,
}

impl Context {
    /// The device's context, the same for all who hold it at a time: its kernels are loaded once.
    pub(super) fn of(ordinal: i32) -> Result<Arc<Self>> {
        static HELD: Mutex<Vec<(i32, Weak<Context>)>> = Mutex::new(Vec::new());
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
        let multiprocessors = found.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: a place for the context; the device was found.
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
        // From here on, dropping it gives back what it has.
        let (modules, abandoned) = (Vec::new(), AtomicBool::new(false));
        let mut made = Context { found, context, modules, kernels, pageable, own, abandoned };
        {
            let _current = made.enter_relaxed()?;
            let pass = made.load(PASS)?;
            let reweight = made.load(REWEIGHT)?;
            let kernel = |module, name| kernel(module, name, multiprocessors);
            made.kernels = Kernels {
                dot: kernel(pass, c"dot")?,
                blend: kernel(pass, c"blend")?,
                dot_blend: kernel(pass, c"dot_blend")?,
                observe: kernel(reweight, c"observe")?,
                reweight: kernel(reweight, c"reweight")?,
                reset: kernel(reweight, c"reset")?,
                set_weights: kernel(reweight, c"set_weights")?,
            };
            // SAFETY: a place for the stream.
            unsafe { call!(cuStreamCreate(&mut made.own, CUstream_flags::CU_STREAM_NON_BLOCKING as u32)) }?;
        }
        Ok(made)
    }

    fn load(&mut self, image: &'static Image<[u8]>) -> Result<CUmodule> {
        let mut module = std::ptr::null_mut();
        // SAFETY: a place for the module, and a whole image, which says itself how long it is.
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

    /// Makes the context current for calls that allocate, free or wait.
    pub(super) fn enter_relaxed(&self) -> Result<Current> {
        let mut current = self.enter()?;
        let mut mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: a mode to set, and a place for the one that was.
        unsafe { call!(cuThreadExchangeStreamCaptureMode(&mut mode)) }?;
        current.mode = Some(mode);
        Ok(current)
    }

    /// The stream that belongs to nobody else.
    pub(super) fn own(&self) -> Stream {
        // SAFETY: alive as long as this context; its users hold it.
        unsafe { Stream::from_raw(self.own.cast()) }
    }

    /// Whether the device can read this byte: the driver knows it, or needs not.
    pub(super) fn knows(&self, address: u64) -> Result<bool> {
        if self.pageable {
            return Ok(true);
        }
        let mut memory = 0_u32;
        let attribute = CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        // SAFETY: a place for the attribute, which is an int. The address is not read.
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
        // What fails here has failed for good: there is nobody left to tell, and nothing left to do.
        if let Ok(_current) = self.enter_relaxed() {
            // SAFETY: made by `new`, given back once. Plans and blenders, which hold this context, are gone; they have
            // waited for their work, or said that they could not.
            unsafe {
                if !self.own.is_null() {
                    let _ = call!(cuStreamDestroy_v2(self.own));
                }
                let unused = !self.abandoned.load(Ordering::Relaxed);
                for module in self.modules.iter().filter(|_| unused) {
                    let _ = call!(cuModuleUnload(*module));
                }
            }
        }
        // SAFETY: retained by `new`.
        let _ = unsafe { call!(cuDevicePrimaryCtxRelease_v2(self.found.device)) };
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        let mut context = std::ptr::null_mut();
        // SAFETY: undoes what made this value, on the same thread: it is not `Send`.
        unsafe {
            if let Some(mut mode) = self.mode {
                let _ = call!(cuThreadExchangeStreamCaptureMode(&mut mode));
            }
            let _ = call!(cuCtxPopCurrent_v2(&mut context));
        }
    }
}

fn kernel(module: CUmodule, name: &CStr, multiprocessors: i32) -> Result<Kernel> {
    let (mut function, mut blocks) = (std::ptr::null_mut(), 0);
    // SAFETY: places for the function and for an int; the module is loaded.
    unsafe {
        call!(cuModuleGetFunction(&mut function, module, name.as_ptr()))?;
        call!(cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, function, THREADS_PER_BLOCK as i32, 0))?;
    }
    Ok(Kernel { function, resident: (blocks.max(1) as u64) * (multiprocessors.max(1) as u64) })
}

/// Waits for a stream. Its context is current.
pub(super) fn wait(stream: Stream) -> Result<()> {
    // SAFETY: whoever made the `Stream` vouches for it.
    unsafe { call!(cuStreamSynchronize(stream.as_raw() as CUstream)) }
}

/// Whether a stream is being captured into a graph. Its context is current.
pub(super) fn capturing(stream: Stream) -> Result<bool> {
    let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: a place for the status; whoever made the `Stream` vouches for it.
    unsafe { call!(cuStreamIsCapturing(stream.as_raw() as CUstream, &mut status)) }?;
    Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

/// Refuses a stream that is being captured, where `what` has to wait or to copy. Its context is current.
pub(super) fn refuse_capture(stream: Stream, what: &'static str) -> Result<()> {
    if capturing(stream)? { Err(Error::Capturing { what }) } else { Ok(()) }
}
