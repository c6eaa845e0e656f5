//! A CUDA device as the benchmarks use it: memory, one stream, events, graphs, kernels of the naive way.

use std::ffi::{CString, c_void};
use std::rc::Rc;

use cudarc::driver::result::{self, event, graph, stream};
use cudarc::driver::sys;
use gradblend::{DType, Stream};

use super::super::record::Machine;

/// Machine code of benches/kernels/naive.cu.
static NAIVE: &Image<[u8]> = &Image(*include_bytes!(concat!(env!("OUT_DIR"), "/naive.fatbin")));

/// The driver reads numbers in it, where they are.
#[repr(C, align(16))]
struct Image<Bytes: ?Sized>(Bytes);

/// Threads of a block of these kernels.
const BLOCK: u64 = 256;

/// Device 0, with its primary context current on this thread, and the stream that everything goes to.
pub(crate) struct Device {
    pub(super) stream: sys::CUstream,
    start: sys::CUevent,
    end: sys::CUevent,
    module: sys::CUmodule,
    name: String,
    driver: i32,
    /// Bytes of the second-level cache.
    pub(super) cache: u64,
    multiprocessors: u64,
}

impl Device {
    /// Nothing is freed but by the end of the process.
    pub(super) fn new() -> Rc<Self> {
        let start = "a CUDA device that this crate has found";
        result::init().expect(start);
        let device = result::device::get(0).expect(start);
        // SAFETY: a device of the driver's.
        let attribute = |which| unsafe { result::device::get_attribute(device, which) }.expect(start) as u64;
        // SAFETY: as above; the context is never released.
        unsafe { result::ctx::set_current(result::primary_ctx::retain(device).expect(start)) }.expect(start);
        let mut driver = 0;
        // SAFETY: a place for the number.
        unsafe { sys::cuDriverGetVersion(&mut driver) }.result().expect(start);
        let timed = sys::CUevent_flags::CU_EVENT_DEFAULT;
        Rc::new(Device {
            stream: stream::create(stream::StreamKind::NonBlocking).expect("a stream"),
            start: event::create(timed).expect("an event"),
            end: event::create(timed).expect("an event"),
            // SAFETY: an image that nvcc made.
            module: unsafe { result::module::load_data(NAIVE.0.as_ptr().cast()) }.expect("the naive kernels"),
            name: result::device::get_name(device).expect("its name"),
            driver,
            cache: attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE),
            multiprocessors: attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
        })
    }

    pub(super) fn machine(&self, software: Option<String>) -> Machine {
        Machine {
            device: "cuda",
            name: self.name.clone(),
            driver: Some(self.driver()),
            cache_bytes: Some(self.cache),
            software,
        }
    }

    /// The driver's own version, where the system tells, and that of CUDA.
    fn driver(&self) -> String {
        let cuda = format!("CUDA {}.{}", self.driver / 1000, self.driver % 1000 / 10);
        let about = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
        let number = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
        about.split_whitespace().find(number).map_or(cuda.clone(), |version| format!("{version}, {cuda}"))
    }

    /// The stream as this crate takes it.
    pub(super) fn borrowed(&self) -> Stream {
        // SAFETY: alive until the process ends.
        unsafe { Stream::from_raw(self.stream.cast()) }
    }

    pub(super) fn wait(&self) {
        // SAFETY: alive.
        unsafe { stream::synchronize(self.stream) }.expect("the work on the stream");
    }

    /// Waits for all streams.
    pub(super) fn wait_for_all(&self) {
        result::ctx::synchronize().expect("the work on the device");
    }

    /// # Safety
    /// So many values are there, and the work that wrote them was waited for.
    pub(super) unsafe fn read<T: Copy>(&self, address: u64, values: &mut [T]) {
        // SAFETY: as the caller's.
        unsafe { result::memcpy_dtoh_sync(values, address) }.expect("a copy from the device");
    }

    /// Bytes of memory that are free.
    pub(super) fn free(&self) -> u64 {
        result::mem_get_info().expect("free memory").0 as u64
    }

    /// Seconds between two events around what `work` puts on the stream.
    pub(super) fn seconds(&self, work: impl FnOnce()) -> f64 {
        // SAFETY: all alive, and the second event is waited for before it is asked.
        unsafe {
            event::record(self.start, self.stream).expect("an event");
            work();
            event::record(self.end, self.stream).expect("an event");
            event::synchronize(self.end).expect("the work between two events");
            f64::from(event::elapsed(self.start, self.end).expect("two events")) / 1e3
        }
    }

    /// The graph of what `work` puts on the stream. A call that allocates or waits spoils it.
    pub(super) fn capture(&self, work: impl FnOnce()) -> Option<Graph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
        // SAFETY: alive, and not capturing.
        unsafe { stream::begin_capture(self.stream, mode) }.expect("a capture");
        // A panic is the work's way to say that a call was refused.
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_ok();
        // SAFETY: capturing.
        let graph = unsafe { stream::end_capture(self.stream) };
        graph.ok().filter(|graph| worked && !graph.is_null()).map(Graph)
    }

    /// A kernel of benches/kernels/naive.cu.
    pub(super) fn kernel(&self, name: &str, dtype: Option<DType>) -> sys::CUfunction {
        let name = dtype.map_or(name.to_owned(), |dtype| format!("{name}_{dtype}"));
        let symbol = CString::new(name.as_str()).expect("a name");
        // SAFETY: the module is alive.
        unsafe { result::module::get_function(self.module, symbol) }.unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// # Safety
    /// The parameters are those of the kernel, and point to values; the addresses among them are good for it.
    pub(super) unsafe fn launch(&self, kernel: sys::CUfunction, blocks: u64, parameters: &mut [*mut c_void]) {
        let (grid, block) = ((blocks as u32, 1, 1), (BLOCK as u32, 1, 1));
        // SAFETY: as the caller's.
        unsafe { result::launch_kernel(kernel, grid, block, 0, self.stream, parameters) }.expect("a launch");
    }

    /// Blocks for a thread an element.
    pub(super) fn blocks(len: u64) -> u64 {
        len.div_ceil(BLOCK).max(1)
    }

    /// Blocks that go over their elements in strides: enough to fill the device.
    pub(super) fn resident_blocks(&self, len: u64) -> u64 {
        Device::blocks(len).min(8 * self.multiprocessors)
    }

    /// # Safety
    /// Both are that many bytes long, and nothing else uses them before this is done.
    pub(super) unsafe fn copy(&self, from: u64, to: u64, bytes: u64) {
        // SAFETY: as the caller's.
        unsafe { result::memcpy_dtod_async(to, from, bytes as usize, self.stream) }.expect("a copy");
    }

    /// # Safety
    /// So many bytes are there, and nothing else uses them before this is done.
    pub(super) unsafe fn fill(&self, address: u64, byte: u8, bytes: u64) {
        // SAFETY: as the caller's.
        unsafe { result::memset_d8_async(address, byte, bytes as usize, self.stream) }.expect("memory to be filled");
    }
}

/// A parameter of a kernel, for as long as `value` stays where it is.
pub(super) fn parameter<T>(value: &T) -> *mut c_void {
    (&raw const *value).cast_mut().cast()
}

/// Memory of the device.
pub(super) struct Memory {
    pub(super) address: u64,
    bytes: u64,
}

impl Memory {
    pub(super) fn new(bytes: u64, what: &str) -> Result<Self, String> {
        // SAFETY: what is in it is written before it is read.
        match unsafe { result::malloc_sync(bytes.max(1) as usize) } {
            Ok(address) => Ok(Memory { address, bytes }),
            Err(error) => Err(format!("{:.1} GB for {what}: {error}", bytes as f64 / 1e9)),
        }
    }

    /// Memory with these values in it.
    pub(super) fn of<T: Copy>(values: &[T], what: &str) -> Result<Self, String> {
        let memory = Memory::new(size_of_val(values) as u64, what)?;
        memory.write(0, values);
        Ok(memory)
    }

    /// Nothing on a stream uses the memory meanwhile.
    pub(super) fn write<T: Copy>(&self, at: u64, values: &[T]) {
        assert!(at + size_of_val(values) as u64 <= self.bytes, "room for what is written");
        // SAFETY: there is room. From pageable memory a copy may still be on its way when the call returns.
        unsafe {
            result::memcpy_htod_sync(self.address + at, values).expect("a copy to the device");
            stream::synchronize(std::ptr::null_mut()).expect("a copy to the device");
        }
    }

    /// The work that wrote it was waited for.
    pub(super) fn read<T: Copy>(&self, at: u64, values: &mut [T]) {
        assert!(at + size_of_val(values) as u64 <= self.bytes, "as many values as are read");
        // SAFETY: they are there.
        unsafe { result::memcpy_dtoh_sync(values, self.address + at) }.expect("a copy from the device");
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated by `new`; freeing waits for the device.
        unsafe { result::free_sync(self.address) }.expect("memory to be freed");
    }
}

/// Captured work.
pub(super) struct Graph(sys::CUgraph);

impl Graph {
    /// How many launches, copies and fills it has, and how many allocations.
    pub(super) fn counts(&self) -> [u64; 2] {
        let mut number = 0;
        // SAFETY: alive; a place for the number.
        unsafe { sys::cuGraphGetNodes(self.0, std::ptr::null_mut(), &mut number) }.result().expect("nodes of a graph");
        let mut nodes = vec![std::ptr::null_mut(); number];
        // SAFETY: room for so many.
        unsafe { sys::cuGraphGetNodes(self.0, nodes.as_mut_ptr(), &mut number) }.result().expect("nodes of a graph");
        let kinds = nodes.into_iter().map(|node| {
            let mut kind = sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
            // SAFETY: a node of a live graph.
            unsafe { sys::cuGraphNodeGetType(node, &mut kind) }.result().expect("the type of a node");
            kind
        });
        let allocations = kinds.filter(|kind| *kind == sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEM_ALLOC).count();
        [(number - allocations) as u64, allocations as u64]
    }

    pub(super) fn ready(self) -> ReadyGraph {
        // SAFETY: alive.
        let ready = unsafe {
            graph::instantiate(self.0, sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
        };
        ReadyGraph(ready.expect("a graph that can be launched"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: alive until now; what was instantiated from it stays.
        unsafe { graph::destroy(self.0) }.expect("a graph to be destroyed");
    }
}

/// A graph that can be launched.
pub(super) struct ReadyGraph(sys::CUgraphExec);

impl ReadyGraph {
    pub(super) fn launch(&self, device: &Device) {
        // SAFETY: both alive; what it uses is, too, for as long as its way is.
        unsafe { graph::launch(self.0, device.stream) }.expect("a graph's launch");
    }
}

impl Drop for ReadyGraph {
    fn drop(&mut self) {
        // SAFETY: alive until now.
        unsafe { graph::exec_destroy(self.0) }.expect("a graph to be destroyed");
    }
}
