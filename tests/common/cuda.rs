//! The CUDA driver as a caller of the library uses it: memory, streams, graphs; and the hooks of the stand-in driver.

use std::ffi::{CString, c_char, c_int, c_void};
use std::io::Write;
use std::ptr::{null, null_mut};
use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::driver::sys;
use gradblend::{Device, Error, Stream, TensorGrads};

use super::{Outcome, Place, Sample, Target, Tensor};

/// Runs a body on CUDA device 0; without one it is skipped, or fails if `GRADBLEND_REQUIRE_CUDA` is 1.
pub(crate) fn on_cuda(body: impl FnOnce(Place) -> Outcome) -> Outcome {
    match Device::cuda(0) {
        Ok(_) => body(Place::Cuda),
        Err(Error::NoDriver { .. } | Error::NoDevice { .. }) if !required() => {
            skip("no CUDA device");
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

pub(crate) fn required() -> bool {
    std::env::var("GRADBLEND_REQUIRE_CUDA").is_ok_and(|value| value == "1")
}

/// Says so where the test harness does not swallow it.
pub(crate) fn skip(reason: &str) {
    let name = std::thread::current().name().unwrap_or("").to_owned();
    let _ = writeln!(std::io::stderr(), "{name}: skipped: {reason}");
}

#[track_caller]
pub(crate) fn done(result: sys::CUresult) {
    assert_eq!(result, sys::CUresult::CUDA_SUCCESS);
}

/// Calls a function of the driver that gives something.
macro_rules! given {
    ($function:ident, $start:expr $(, $more:expr)*) => {{
        let mut value = $start;
        // SAFETY: as the driver's documentation asks of these arguments, all of which the tests own.
        done(unsafe { sys::$function(&mut value $(, $more)*) });
        value
    }};
}

/// Does something with the device's primary context current, as a caller of the library would, and puts back what was.
pub(crate) fn within<R>(work: impl FnOnce() -> R) -> R {
    static CONTEXT: OnceLock<usize> = OnceLock::new();
    let context = *CONTEXT.get_or_init(|| {
        // SAFETY: plain calls.
        done(unsafe { sys::cuInit(0) });
        given!(cuDevicePrimaryCtxRetain, null_mut(), 0) as usize
    });
    // SAFETY: retained for the life of the process.
    done(unsafe { sys::cuCtxPushCurrent_v2(context as sys::CUcontext) });
    let result = work();
    given!(cuCtxPopCurrent_v2, null_mut());
    result
}

/// The context that is current on this thread.
pub(crate) fn current() -> sys::CUcontext {
    given!(cuCtxGetCurrent, null_mut())
}

/// # Safety
/// `from` has `len` numbers in memory of the device, which only work on the default stream writes to.
pub(crate) unsafe fn read<N: Copy + Default>(from: *const N, len: usize) -> Vec<N> {
    let mut numbers = vec![N::default(); len];
    let bytes = std::mem::size_of_val(&*numbers);
    // SAFETY: as the caller's.
    within(|| done(unsafe { sys::cuMemcpyDtoH_v2(numbers.as_mut_ptr().cast(), from as u64, bytes) }));
    numbers
}

/// # Safety
/// `to` has room for the numbers in memory of the device, which only work on the default stream uses.
pub(crate) unsafe fn write<N: Copy>(to: *mut N, numbers: &[N]) {
    let bytes = std::mem::size_of_val(numbers);
    // SAFETY: as the caller's.
    within(|| unsafe {
        done(sys::cuMemcpyHtoD_v2(to as u64, numbers.as_ptr().cast(), bytes));
        // From pageable memory the copy may still be on its way, and streams of our own do not wait for the default one.
        done(sys::cuStreamSynchronize(null_mut()));
    });
}

/// Memory of the device, aligned to 256 bytes and not a byte longer than its list.
pub(crate) struct Memory(sys::CUdeviceptr);

impl Memory {
    pub(crate) fn of<N: Copy>(list: &[N]) -> Self {
        let bytes = std::mem::size_of_val(list);
        let memory = Memory(within(|| given!(cuMemAlloc_v2, 0, bytes.max(1))));
        if bytes > 0 {
            // SAFETY: it is as long as the list.
            unsafe { write(memory.address(0), list) };
        }
        memory
    }

    /// Of this element.
    pub(crate) fn address<N>(&self, element: usize) -> *mut N {
        (self.0 as *mut N).wrapping_add(element)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated by `of`. Freeing waits for the device.
        within(|| done(unsafe { sys::cuMemFree_v2(self.0) }));
    }
}

/// The lists of a tensor on the device, each as far from its alignment as it is in the host's memory.
pub(crate) struct Gradients {
    train: Memory,
    valid: Memory,
    modalities: Vec<Option<Memory>>,
    blended: Memory,
}

impl Gradients {
    pub(crate) fn of<T: Sample>(tensor: &Tensor<T>) -> Self {
        Gradients {
            train: Memory::of(&tensor.train.memory),
            valid: Memory::of(&tensor.valid.memory),
            modalities: tensor.modalities.iter().map(|v| v.as_ref().map(|v| Memory::of(&v.memory))).collect(),
            blended: Memory::of(&tensor.blended.memory),
        }
    }

    pub(crate) fn grads<T: Sample>(&self, tensor: &Tensor<T>) -> TensorGrads<'_> {
        let (mut train, mut valid) = (null::<c_void>(), null::<c_void>());
        if tensor.dots {
            train = self.train.address::<T>(tensor.train.offset).cast_const().cast();
            valid = self.valid.address::<T>(tensor.valid.offset).cast_const().cast();
        }
        let modalities: Vec<*const c_void> = (self.modalities.iter().zip(&tensor.modalities))
            .map(|pair| match pair {
                (Some(memory), Some(list)) => memory.address::<T>(list.offset).cast_const().cast(),
                _ => null(),
            })
            .collect();
        let blended = match tensor.target {
            Target::Nowhere => null_mut(),
            Target::Blended => self.blended.address::<T>(tensor.blended.offset).cast(),
            Target::Modality(k) => modalities[k].cast_mut(),
        };
        // SAFETY: each list is as long as the tensor, from its offset on; the tensor borrows this memory, nothing else
        // uses it before `fetch`, and freeing it waits for the device.
        unsafe { TensorGrads::from_raw(tensor.len() as u64, T::DTYPE, train, valid, &modalities, blended) }
    }

    /// Brings back what was written, once the default stream is done.
    pub(crate) fn fetch<T: Sample>(&self, tensor: &mut Tensor<T>) {
        let (memory, list) = match tensor.target {
            Target::Nowhere => return,
            Target::Blended => (Some(&self.blended), Some(&mut tensor.blended)),
            Target::Modality(k) => (self.modalities[k].as_ref(), tensor.modalities[k].as_mut()),
        };
        if let (Some(memory), Some(list)) = (memory, list) {
            // The elements before the list too: nobody may have written there.
            let bytes = std::mem::size_of_val(&*list.memory);
            let to = list.memory.as_mut_ptr().cast();
            // SAFETY: both are as long as the list.
            within(|| done(unsafe { sys::cuMemcpyDtoH_v2(to, memory.0, bytes) }));
        }
    }
}

/// A stream that no other waits for.
pub(crate) struct Own(sys::CUstream);

impl Own {
    pub(crate) fn new() -> Self {
        let free = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        Own(within(|| given!(cuStreamCreate, null_mut(), free)))
    }

    pub(crate) fn stream(&self) -> Stream {
        // SAFETY: alive; dropping it waits for its work.
        unsafe { Stream::from_raw(self.0.cast()) }
    }

    pub(crate) fn wait(&self) {
        // SAFETY: alive.
        within(|| done(unsafe { sys::cuStreamSynchronize(self.0) }));
    }

    /// The graph of what `work` puts on this stream.
    pub(crate) fn capture(&self, work: impl FnOnce(Stream) -> gradblend::Result<()>) -> gradblend::Result<Graph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: alive, and not capturing.
        within(|| done(unsafe { sys::cuStreamBeginCapture_v2(self.0, mode) }));
        let result = work(self.stream());
        let mut graph = null_mut();
        // SAFETY: capturing.
        let ended = within(|| unsafe { sys::cuStreamEndCapture(self.0, &mut graph) });
        result?;
        done(ended);
        let run = within(|| given!(cuGraphInstantiateWithFlags, null_mut(), graph, 0));
        // SAFETY: made above; what was instantiated from it stays.
        within(|| done(unsafe { sys::cuGraphDestroy(graph) }));
        Ok(Graph(run))
    }

    pub(crate) fn launch(&self, graph: &Graph) {
        // SAFETY: both alive.
        within(|| done(unsafe { sys::cuGraphLaunch(graph.0, self.0) }));
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.wait();
        // SAFETY: alive until now.
        within(|| done(unsafe { sys::cuStreamDestroy_v2(self.0) }));
    }
}

/// Captured work, ready to run.
pub(crate) struct Graph(sys::CUgraphExec);

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: alive until now, and whoever launched it has waited.
        within(|| done(unsafe { sys::cuGraphExecDestroy(self.0) }));
    }
}

/// The hooks of the stand-in driver of tests/standin.
#[derive(Clone, Copy)]
pub(crate) struct Standin {
    set: unsafe extern "C" fn(*const c_char, i64),
    fail: unsafe extern "C" fn(*const c_char, c_int, i64),
    count: unsafe extern "C" fn(*const c_char) -> u64,
    reset: unsafe extern "C" fn(),
}

fn text(name: &str) -> CString {
    CString::new(name).unwrap_or_default()
}

impl Standin {
    /// None if the driver is another, or there is none.
    pub(crate) fn find() -> Option<Self> {
        static FOUND: OnceLock<Option<Standin>> = OnceLock::new();
        *FOUND.get_or_init(|| {
            // SAFETY: a driver's library, which stays loaded; the hooks have these types.
            unsafe {
                let library = std::mem::ManuallyDrop::new(libloading::Library::new("libcuda.so.1").ok()?);
                Some(Standin {
                    set: *library.get(b"standin_set").ok()?,
                    fail: *library.get(b"standin_fail").ok()?,
                    count: *library.get(b"standin_count").ok()?,
                    reset: *library.get(b"standin_reset").ok()?,
                })
            }
        })
    }

    pub(crate) fn set(self, name: &str, value: i64) {
        // SAFETY: a setting's name.
        unsafe { (self.set)(text(name).as_ptr(), value) };
    }

    /// Makes a call of a function fail, once, after `after` that do not.
    pub(crate) fn fail(self, function: &str, result: sys::CUresult, after: i64) {
        // SAFETY: a name.
        unsafe { (self.fail)(text(function).as_ptr(), result as c_int, after) };
    }

    pub(crate) fn count(self, name: &str) -> u64 {
        // SAFETY: a counter's name.
        unsafe { (self.count)(text(name).as_ptr()) }
    }

    /// Back to how it started.
    pub(crate) fn reset(self) {
        // SAFETY: a plain call.
        unsafe { (self.reset)() };
    }
}

/// Runs a body with the stand-in driver, alone among all that do and with its settings as they were at the start; with
/// another driver it is skipped.
pub(crate) fn on_standin(body: impl FnOnce(Standin) -> Outcome) -> Outcome {
    alone_on_cuda(|_| {
        let Some(standin) = Standin::find() else {
            skip("not the stand-in driver");
            return Ok(());
        };
        standin.reset();
        let outcome = body(standin);
        standin.reset();
        outcome
    })
}

/// Runs a body on CUDA device 0 while no other body of this program runs there.
pub(crate) fn alone_on_cuda(body: impl FnOnce(Place) -> Outcome) -> Outcome {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    on_cuda(body)
}
