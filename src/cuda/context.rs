//! A device's primary context with the kernels in it; the work of a blender there, and its memory.

use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cudarc::driver::sys::{
    CUcontext, CUdevice_attribute, CUevent, CUevent_flags, CUfunction, CUmodule, CUpointer_attribute, CUresult,
    CUstream, CUstream_flags, CUstreamCaptureMode, CUstreamCaptureStatus,
};

use crate::error::{Error, Result};
use crate::grad::Stream;
use crate::layout::THREADS;

use super::driver::{self, Found, call};

/// An image at an address that its header's fields are aligned at.
#[repr(C, align(16))]
struct Image<T: ?Sized>(T);

/// The images that `build.rs` made.
static PASS: &Image<[u8]> = &Image(*include_bytes!(concat!(env!("OUT_DIR"), "/pass.fatbin")));
static REWEIGHT: &Image<[u8]> = &Image(*include_bytes!(concat!(env!("OUT_DIR"), "/reweight.fatbin")));

/// A kernel, and how many of its blocks the device runs at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    function: CUfunction,
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
    abandoned: AtomicBool,
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
        call!(cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, function, THREADS as i32, 0))?;
    }
    Ok(Kernel { function, resident: (blocks.max(1) as u64) * (multiprocessors.max(1) as u64) })
}

/// A parameter of a kernel, for as long as `value` stays where it is.
pub(super) fn parameter<T>(value: &T) -> *mut c_void {
    (&raw const *value).cast_mut().cast()
}

/// An event of the driver's, which comes after what was put on a stream before it was recorded.
#[derive(Debug)]
struct Event(CUevent);

impl Event {
    /// The context is current, here and below.
    fn new() -> Result<Self> {
        let mut event = std::ptr::null_mut();
        // SAFETY: a place for the event.
        unsafe { call!(cuEventCreate(&mut event, CUevent_flags::CU_EVENT_DISABLE_TIMING as u32)) }?;
        Ok(Event(event))
    }

    fn record(&self, stream: Stream) -> Result<()> {
        // SAFETY: the event is alive; whoever made the `Stream` vouches for it.
        unsafe { call!(cuEventRecord(self.0, stream.as_raw() as CUstream)) }
    }

    fn wait(&self) -> Result<()> {
        // SAFETY: the event is alive, and never recorded in a capture.
        unsafe { call!(cuEventSynchronize(self.0)) }
    }

    fn destroy(&self) {
        // SAFETY: made by `new`; whoever owns it calls this once, last.
        let _ = unsafe { call!(cuEventDestroy_v2(self.0)) };
    }
}

/// The work of one blender on a device, which its plans share.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) context: Arc<Context>,
    /// Comes after the latest work on the state. All of that is ordered, so it comes after all of it.
    done: Event,
    /// Whether there may be work that `done` does not speak of: that of graphs, which others launch.
    replayed: AtomicBool,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Work {}
// SAFETY: as above; nothing here but an atomic is written to after `new`.
unsafe impl Sync for Work {}

impl Work {
    pub(super) fn new(ordinal: i32) -> Result<Arc<Self>> {
        let context = Context::of(ordinal)?;
        let done = {
            let _current = context.enter_relaxed()?;
            Event::new()?
        };
        Ok(Arc::new(Work { context, done, replayed: AtomicBool::new(false) }))
    }

    /// Puts a kernel on a stream, with parameters that the driver copies. The context is current.
    ///
    /// # Safety
    /// The parameters are those of the kernel, and what they hold the addresses of stays alive until the work is done.
    pub(super) unsafe fn launch(
        &self,
        kernel: Kernel,
        blocks: u64,
        parameters: &mut [*mut c_void],
        stream: Stream,
    ) -> Result<()> {
        let (threads, blocks) = (THREADS as u32, blocks as u32);
        let (handle, parameters) = (stream.as_raw() as CUstream, parameters.as_mut_ptr());
        let none = std::ptr::null_mut();
        // SAFETY: as the caller's.
        unsafe { call!(cuLaunchKernel(kernel.function, blocks, 1, 1, threads, 1, 1, 0, handle, parameters, none)) }?;
        self.follow(stream);
        Ok(())
    }

    /// Notes that work on the state was put on a stream.
    pub(super) fn follow(&self, stream: Stream) {
        self.follow_with(&self.done, stream);
    }

    fn follow_with(&self, event: &Event, stream: Stream) {
        // An event that is recorded in a capture could not be waited for any more.
        let recorded = capturing(stream).is_ok_and(|capturing| !capturing) && event.record(stream).is_ok();
        if !recorded {
            self.replayed.store(true, Ordering::Relaxed);
        }
    }

    /// Waits for all work on the state; says whether it is done. The context is current.
    pub(super) fn idle(&self) -> bool {
        // The context as a whole is waited for only if it must be: that spoils whatever is being captured in it.
        // SAFETY: the context is current.
        self.done.wait().is_ok()
            && (!self.replayed.load(Ordering::Relaxed) || unsafe { call!(cuCtxSynchronize()) }.is_ok())
    }

    /// Memory on the device. The context is current.
    pub(super) fn allocate(self: &Arc<Self>, bytes: u64, what: &'static str) -> Result<Buffer> {
        let mut address = 0;
        let out_of_memory = || Error::OutOfMemory { what, bytes };
        let size = usize::try_from(bytes.max(1)).map_err(|_| out_of_memory())?;
        let written = Event::new()?;
        // SAFETY: a place for the address.
        let allocated = unsafe { call!(cuMemAlloc_v2(&mut address, size)) };
        if let Err(error) = allocated {
            written.destroy();
            let memory = driver::code(&error) == CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32;
            return Err(if memory { out_of_memory() } else { error });
        }
        Ok(Buffer { work: self.clone(), address, bytes, written })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Ok(_current) = self.context.enter_relaxed() {
            self.done.destroy();
        }
    }
}

/// Waits for a stream. Its context is current.
pub(super) fn wait(stream: Stream) -> Result<()> {
    // SAFETY: whoever made the `Stream` vouches for it.
    unsafe { call!(cuStreamSynchronize(stream.as_raw() as CUstream)) }
}

/// Whether a stream is being captured into a graph. Its context is current.
fn capturing(stream: Stream) -> Result<bool> {
    let mut status = CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: a place for the status; whoever made the `Stream` vouches for it.
    unsafe { call!(cuStreamIsCapturing(stream.as_raw() as CUstream, &mut status)) }?;
    Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

/// Refuses a stream that is being captured, where `what` has to wait or to copy. Its context is current.
pub(super) fn refuse_capture(stream: Stream, what: &'static str) -> Result<()> {
    if capturing(stream)? { Err(Error::Capturing { what }) } else { Ok(()) }
}

/// Bytes that one copy has at the most: the driver takes so few along with the command, whereas it may wait for the
/// stream before it copies more from memory that is not pinned (CUDA driver API, "API synchronization behavior").
const PIECE: usize = 32 << 10;

/// Memory on the device.
#[derive(Debug)]
pub(super) struct Buffer {
    pub(super) work: Arc<Work>,
    pub(super) address: u64,
    bytes: u64,
    /// Comes after the latest copy to it, which need not be ordered with the work of kernels.
    written: Event,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Buffer {}
// SAFETY: as above; nothing here is written to after `allocate`.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Copies to the memory from `offset` on, in the order of the stream. The bytes may change once this returns: the
    /// driver has copied them. Its context is current.
    pub(super) fn write<T: Copy>(&self, offset: u64, from: &[T], stream: Stream) -> Result<()> {
        let bytes = size_of_val(from);
        debug_assert!(offset + bytes as u64 <= self.bytes);
        let (handle, start) = (stream.as_raw() as CUstream, from.as_ptr().cast::<u8>());
        let mut copied = Ok(());
        for piece in (0..bytes).step_by(PIECE) {
            let to = self.address + offset + piece as u64;
            let len = PIECE.min(bytes - piece);
            // SAFETY: as many bytes are there on both sides.
            copied = unsafe { call!(cuMemcpyHtoDAsync_v2(to, start.add(piece).cast::<c_void>(), len, handle)) };
            if copied.is_err() {
                break;
            }
        }
        self.work.follow_with(&self.written, stream);
        copied
    }

    /// Copies from the start of the memory, and waits for the stream. Its context is current.
    ///
    /// # Safety
    /// The memory holds a `T`.
    pub(super) unsafe fn read<T>(&self, to: &mut T, stream: Stream) -> Result<()> {
        debug_assert!(size_of::<T>() as u64 <= self.bytes);
        let handle = stream.as_raw() as CUstream;
        // SAFETY: as many bytes are there on both sides, and `to` outlives the wait.
        let copied =
            unsafe { call!(cuMemcpyDtoHAsync_v2((&raw mut *to).cast(), self.address, size_of::<T>(), handle)) };
        // Even where the copy failed, nothing may write to `to` once it is out of reach.
        let waited = wait(stream);
        copied.and(waited)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // Work that is pending, on whatever stream or in a graph, may use the memory. Where there is no telling that it
        // is done, the memory is not given back.
        let context = &self.work.context;
        let Ok(_current) = context.enter_relaxed() else { return };
        if self.written.wait().is_ok() && self.work.idle() {
            // SAFETY: made by `allocate`, given back once, and nothing uses it.
            let _ = unsafe { call!(cuMemFree_v2(self.address)) };
        } else {
            context.abandoned.store(true, Ordering::Relaxed);
        }
        self.written.destroy();
    }
}
