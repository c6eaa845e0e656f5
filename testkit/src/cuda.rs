//! The CUDA driver as a caller of the library uses it: memory, streams, graphs; and the hooks of the driver emulator.

use std::ffi::{CString, c_char, c_int};
use std::io::Write;
use std::ptr::null_mut;
use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::driver::sys;
use gradblend::{Device, Error, Stream};

use crate::{Addresses, Face, Outcome, Output, Result, Sample, Tensor};

impl Face {
    /// The Rust API on CUDA device 0.
    pub const CUDA: Face = Face { c: false, cuda: true };
    /// The C functions on CUDA device 0.
    pub const FFI_CUDA: Face = Face { c: true, cuda: true };
}

/// Runs a body on CUDA device 0. Without one the body is skipped, or fails if `GRADBLEND_REQUIRE_CUDA` is 1.
pub fn on_cuda(body: impl FnOnce(Face) -> Outcome) -> Outcome {
    on_device(Face::CUDA, body)
}

/// As [`on_cuda`], through the C functions.
pub fn on_cuda_through_c(body: impl FnOnce(Face) -> Outcome) -> Outcome {
    on_device(Face::FFI_CUDA, body)
}

fn on_device(face: Face, body: impl FnOnce(Face) -> Outcome) -> Outcome {
    match Device::cuda(0) {
        Ok(_) => body(face),
        Err(Error::NoDriver { .. } | Error::NoDevice { .. }) if !is_set("GRADBLEND_REQUIRE_CUDA") => {
            skip("no CUDA device");
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

fn is_set(variable: &str) -> bool {
    std::env::var(variable).is_ok_and(|value| value == "1")
}

/// Skips a test that needs a part of the emulator which is missing, or fails if `GRADBLEND_REQUIRE_EMULATOR` is 1.
pub fn without_emulator(missing: &str) -> Outcome {
    if is_set("GRADBLEND_REQUIRE_EMULATOR") {
        return Err(format!("GRADBLEND_REQUIRE_EMULATOR is 1, but {missing}").into());
    }
    skip(missing);
    Ok(())
}

/// Reports that a test is skipped, past the output capture of the test harness.
pub fn skip(reason: &str) {
    let name = std::thread::current().name().unwrap_or("").to_owned();
    let _ = writeln!(std::io::stderr(), "{name}: skipped: {reason}");
}

/// Checks that a call of the driver succeeded.
#[track_caller]
pub fn check(result: sys::CUresult) {
    assert_eq!(result, sys::CUresult::CUDA_SUCCESS);
}

/// Calls a function of the driver whose first parameter is an out-pointer, and returns what it wrote.
macro_rules! get {
    ($function:ident, $start:expr $(, $more:expr)*) => {{
        let mut value = $start;
        // SAFETY: `value` is a valid out-pointer, and the tests own every handle among the other arguments.
        check(unsafe { sys::$function(&mut value $(, $more)*) });
        value
    }};
}

/// Runs `work` with the device's primary context current, as a caller of the library would, then restores the context.
pub fn with_context<R>(work: impl FnOnce() -> R) -> R {
    static CONTEXT: OnceLock<usize> = OnceLock::new();
    let context = *CONTEXT.get_or_init(|| {
        // SAFETY: the call takes no pointer.
        check(unsafe { sys::cuInit(0) });
        get!(cuDevicePrimaryCtxRetain, null_mut(), 0) as usize
    });
    // SAFETY: the context is retained for the life of the process.
    check(unsafe { sys::cuCtxPushCurrent_v2(context as sys::CUcontext) });
    let result = work();
    get!(cuCtxPopCurrent_v2, null_mut());
    result
}

/// The context that is current on this thread.
pub fn current_context() -> sys::CUcontext {
    get!(cuCtxGetCurrent, null_mut())
}

/// Numbers in memory of the device.
///
/// # Safety
/// `from` has `len` numbers in memory of the device, which only work on the default stream writes to.
pub unsafe fn read<N: Copy>(from: *const N, len: usize) -> Vec<N> {
    let mut numbers: Vec<N> = Vec::with_capacity(len);
    let (to, bytes) = (numbers.as_mut_ptr(), len * size_of::<N>());
    // SAFETY: `numbers` has room for `bytes` bytes, and `from` has as many on the device.
    unsafe {
        with_context(|| check(sys::cuMemcpyDtoH_v2(to.cast(), from as u64, bytes)));
        numbers.set_len(len);
    }
    numbers
}

/// Replaces numbers in memory of the device.
///
/// # Safety
/// `to` has room for the numbers in memory of the device, which only work on the default stream uses.
pub unsafe fn write<N: Copy>(to: *mut N, numbers: &[N]) {
    let bytes = std::mem::size_of_val(numbers);
    // SAFETY: `numbers` has `bytes` bytes, and `to` has room for as many on the device.
    with_context(|| unsafe {
        check(sys::cuMemcpyHtoD_v2(to as u64, numbers.as_ptr().cast(), bytes));
        // A copy from pageable memory may return before it ends, and other streams do not wait for the default one.
        check(sys::cuStreamSynchronize(null_mut()));
    });
}

/// Memory of the device, aligned to 256 bytes and not a byte longer than its elements.
#[derive(Debug)]
pub struct Memory(sys::CUdeviceptr);

impl Memory {
    /// Memory that holds these elements.
    pub fn of<N: Copy>(elements: &[N]) -> Self {
        let bytes = std::mem::size_of_val(elements);
        let memory = Memory(with_context(|| get!(cuMemAlloc_v2, 0, bytes.max(1))));
        if bytes > 0 {
            // SAFETY: the allocation has `bytes` bytes.
            unsafe { write(memory.address(0), elements) };
        }
        memory
    }

    /// Address of this element.
    pub fn address<N>(&self, element: usize) -> *mut N {
        (self.0 as *mut N).wrapping_add(element)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `of` allocated it, and freeing waits for the device.
        with_context(|| check(unsafe { sys::cuMemFree_v2(self.0) }));
    }
}

/// The buffers of a tensor on the device, at the offsets that they have on the host.
#[derive(Debug)]
pub(crate) struct DeviceTensor {
    train: Memory,
    valid: Memory,
    modalities: Vec<Option<Memory>>,
    blended: Memory,
}

impl DeviceTensor {
    pub(crate) fn of<T: Sample>(tensor: &Tensor<T>) -> Self {
        DeviceTensor {
            train: Memory::of(&tensor.train.memory),
            valid: Memory::of(&tensor.valid.memory),
            modalities: tensor.modalities.iter().map(|v| v.as_ref().map(|v| Memory::of(&v.memory))).collect(),
            blended: Memory::of(&tensor.blended.memory),
        }
    }

    pub(crate) fn addresses<T: Sample>(&self, tensor: &Tensor<T>) -> Addresses {
        let pairs = self.modalities.iter().zip(&tensor.modalities);
        let v: Vec<*mut T> = pairs
            .map(|pair| if let (Some(memory), Some(v)) = pair { memory.address(v.offset) } else { null_mut() })
            .collect();
        let (train, valid) = (self.train.address(tensor.train.offset), self.valid.address(tensor.valid.offset));
        tensor.addresses(train, valid, &v, self.blended.address(tensor.blended.offset))
    }

    /// Copies what was written back to `tensor`, once the default stream is done.
    pub(crate) fn fetch<T: Sample>(&self, tensor: &mut Tensor<T>) {
        let (memory, buffer) = match tensor.output {
            Output::None => return,
            Output::Blended => (Some(&self.blended), Some(&mut tensor.blended)),
            Output::InPlace(k) => (self.modalities[k].as_ref(), tensor.modalities[k].as_mut()),
        };
        if let (Some(memory), Some(buffer)) = (memory, buffer) {
            // The elements before the buffer too, so that tests see a write there.
            let bytes = std::mem::size_of_val(&*buffer.memory);
            let to = buffer.memory.as_mut_ptr().cast();
            // SAFETY: both have `bytes` bytes.
            with_context(|| check(unsafe { sys::cuMemcpyDtoH_v2(to, memory.0, bytes) }));
        }
    }
}

/// A non-blocking stream: the default stream does not wait for it, nor it for the default stream.
#[derive(Debug)]
pub struct OwnStream(sys::CUstream);

impl Default for OwnStream {
    fn default() -> Self {
        let non_blocking = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        OwnStream(with_context(|| get!(cuStreamCreate, null_mut(), non_blocking)))
    }
}

impl OwnStream {
    /// The stream as the library takes it.
    pub fn stream(&self) -> Stream {
        // SAFETY: the stream is live, and dropping it waits for its work.
        unsafe { Stream::from_raw(self.0.cast()) }
    }

    /// Waits for the work on this stream.
    pub fn synchronize(&self) {
        // SAFETY: the stream is live.
        with_context(|| check(unsafe { sys::cuStreamSynchronize(self.0) }));
    }

    /// Captures what `work` puts on this stream.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is live and not capturing.
        with_context(|| check(unsafe { sys::cuStreamBeginCapture_v2(self.0, mode) }));
        let result = work();
        let mut graph = null_mut();
        // SAFETY: the stream is capturing, and `graph` is a valid out-pointer.
        let ended = with_context(|| unsafe { sys::cuStreamEndCapture(self.0, &mut graph) });
        result?;
        check(ended);
        let executable = with_context(|| get!(cuGraphInstantiateWithFlags, null_mut(), graph, 0));
        // SAFETY: the graph was made above, and what was instantiated from it does not need it.
        with_context(|| check(unsafe { sys::cuGraphDestroy(graph) }));
        Ok(Graph(executable))
    }

    /// Replays a graph on this stream.
    pub fn launch(&self, graph: &Graph) {
        // SAFETY: both are live.
        with_context(|| check(unsafe { sys::cuGraphLaunch(graph.0, self.0) }));
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        self.synchronize();
        // SAFETY: the stream is live until now.
        with_context(|| check(unsafe { sys::cuStreamDestroy_v2(self.0) }));
    }
}

/// Captured work that can be replayed.
#[derive(Debug)]
pub struct Graph(sys::CUgraphExec);

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the graph is live until now, and who launched it has waited for its stream.
        with_context(|| check(unsafe { sys::cuGraphExecDestroy(self.0) }));
    }
}

/// The hooks of the driver emulator in tests/emulator.
#[derive(Clone, Copy, Debug)]
pub struct Emulator {
    set: unsafe extern "C" fn(*const c_char, i64),
    fail: unsafe extern "C" fn(*const c_char, c_int, i64),
    count: unsafe extern "C" fn(*const c_char) -> u64,
    reset: unsafe extern "C" fn(),
}

fn text(name: &str) -> CString {
    CString::new(name).unwrap_or_default()
}

impl Emulator {
    /// `None` if the driver is not the emulator, or there is no driver.
    fn find() -> Option<Self> {
        static FOUND: OnceLock<Option<Emulator>> = OnceLock::new();
        *FOUND.get_or_init(|| {
            // SAFETY: the library is a driver and stays loaded; the emulator's hooks have these types.
            unsafe {
                let library = std::mem::ManuallyDrop::new(libloading::Library::new("libcuda.so.1").ok()?);
                Some(Emulator {
                    set: *library.get(b"emulator_set").ok()?,
                    fail: *library.get(b"emulator_fail").ok()?,
                    count: *library.get(b"emulator_count").ok()?,
                    reset: *library.get(b"emulator_reset").ok()?,
                })
            }
        })
    }

    /// Changes a setting.
    pub fn set(self, name: &str, value: i64) {
        // SAFETY: the name is a string that ends with 0.
        unsafe { (self.set)(text(name).as_ptr(), value) };
    }

    /// Makes one call of a function fail, after `after` calls of it that succeed.
    pub fn fail(self, function: &str, result: sys::CUresult, after: i64) {
        // SAFETY: the name is a string that ends with 0.
        unsafe { (self.fail)(text(function).as_ptr(), result as c_int, after) };
    }

    /// The value of a counter.
    pub fn count(self, name: &str) -> u64 {
        // SAFETY: the name is a string that ends with 0.
        unsafe { (self.count)(text(name).as_ptr()) }
    }

    /// What `work` adds to these counters.
    pub fn counted<const N: usize>(self, names: [&str; N], work: impl FnOnce() -> Result<()>) -> Result<[u64; N]> {
        let before = names.map(|name| self.count(name));
        work()?;
        let mut counts = names.map(|name| self.count(name));
        counts.iter_mut().zip(before).for_each(|(count, before)| *count -= before);
        Ok(counts)
    }

    /// Restores the settings that the emulator starts with.
    pub fn reset(self) {
        // SAFETY: the hook takes nothing.
        unsafe { (self.reset)() };
    }
}

/// Runs a body on CUDA device 0 while no other such body of this program runs.
pub fn alone_on_cuda(body: impl FnOnce(Face) -> Outcome) -> Outcome {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    on_cuda(body)
}

/// Runs a body with the emulator, alone and with the settings that it starts with. On any other driver the body is
/// skipped, or fails if `GRADBLEND_REQUIRE_EMULATOR` is 1.
pub fn on_emulator(body: impl FnOnce(Emulator) -> Outcome) -> Outcome {
    alone_on_cuda(|_| {
        let Some(emulator) = Emulator::find() else {
            return without_emulator("the driver is not the emulator");
        };
        emulator.reset();
        let outcome = body(emulator);
        emulator.reset();
        outcome
    })
}
