//! A CUDA device as the laboratory uses it: memory, one stream, two events, the naive kernels.

use std::sync::Arc;

use anyhow::{Result, ensure};
use bytemuck::Pod;
use cudarc::driver::sys::{CUdevice_attribute as Attribute, CUevent_flags, cuDriverGetVersion};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, result};
use cudarc::nvrtc::Ptx;
use gradblend::{DType, Stream};

use crate::record::Machine;

static NAIVE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/naive.fatbin"));

/// Threads of a block of the naive kernels.
pub(super) const BLOCK: u64 = 256;

/// Device 0, with its primary context current on this thread, and the stream that all work is on.
pub(super) struct Device {
    context: Arc<CudaContext>,
    pub(super) stream: Arc<CudaStream>,
    start: CudaEvent,
    end: CudaEvent,
    module: Arc<CudaModule>,
}

impl Device {
    pub(super) fn new() -> Result<Self> {
        let context = CudaContext::new(0)?;
        Ok(Device {
            stream: context.new_stream()?,
            start: context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?,
            end: context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?,
            module: context.load_module(Ptx::from_binary(NAIVE.to_vec()))?,
            context,
        })
    }

    pub(super) fn machine(&self, software: Option<String>) -> Machine {
        let mut version = 0;
        // SAFETY: `version` is a valid out-pointer for one `int`.
        let known = unsafe { cuDriverGetVersion(&mut version) }.result().is_ok();
        let cuda = known.then(|| format!("CUDA {}.{}", version / 1000, version % 1000 / 10));
        let facts = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
        let number = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
        let driver = facts.split_whitespace().find(number).map(str::to_owned);
        let versions: Vec<String> = driver.into_iter().chain(cuda).collect();
        Machine {
            device: "cuda".into(),
            name: self.context.name().unwrap_or_default(),
            driver: Some(versions.join(", ")),
            cache_bytes: self.cache_bytes().ok(),
            software: software.unwrap_or_default(),
        }
    }

    pub(super) fn cache_bytes(&self) -> Result<u64> {
        Ok(self.context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as u64)
    }

    pub(super) fn free_bytes(&self) -> Result<u64> {
        Ok(self.context.mem_get_info()?.0 as u64)
    }

    /// The stream as gradblend takes it.
    pub(super) fn borrowed_stream(&self) -> Stream {
        // SAFETY: the stream lives as long as the device, which every implementation and its inputs keep alive.
        unsafe { Stream::from_raw(self.stream.cu_stream().cast()) }
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        Ok(self.stream.synchronize()?)
    }

    /// Waits for all streams.
    pub(super) fn synchronize_all(&self) -> Result<()> {
        Ok(self.context.synchronize()?)
    }

    /// Seconds between two events around the work that `launch` puts on the stream.
    pub(super) fn seconds(&self, launch: impl FnOnce() -> Result<()>) -> Result<f64> {
        self.start.record(&self.stream)?;
        launch()?;
        self.end.record(&self.stream)?;
        Ok(f64::from(self.start.elapsed_ms(&self.end)?) / 1e3)
    }

    /// A kernel of kernels/naive.cu.
    pub(super) fn kernel(&self, name: &str, dtype: Option<DType>) -> Result<CudaFunction> {
        let name = dtype.map_or(name.into(), |dtype| format!("{name}_{dtype}"));
        Ok(self.module.load_function(&name)?)
    }

    /// Blocks that loop over `len` elements: at most as many as fill the device.
    pub(super) fn looping_blocks(&self, len: u64) -> Result<u64> {
        let sms = self.context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u64;
        Ok(blocks(len).min(8 * sms))
    }

    /// # Safety
    /// Both ranges have `bytes` bytes of device memory, and only work on the stream uses them.
    pub(super) unsafe fn copy(&self, source: u64, target: u64, bytes: u64) -> Result<()> {
        // SAFETY: `source` and `target` have `bytes` bytes of device memory, which only work on the stream uses.
        Ok(unsafe { result::memcpy_dtod_async(target, source, bytes as usize, self.stream.cu_stream()) }?)
    }

    /// # Safety
    /// `bytes` bytes of device memory start at the address, and only work on the stream uses them.
    pub(super) unsafe fn fill(&self, address: u64, byte: u8, bytes: u64) -> Result<()> {
        // SAFETY: `address` has `bytes` bytes of device memory, which only work on the stream uses.
        Ok(unsafe { result::memset_d8_async(address, byte, bytes as usize, self.stream.cu_stream()) }?)
    }
}

/// Blocks for one thread an element.
pub(super) fn blocks(len: u64) -> u64 {
    len.div_ceil(BLOCK).max(1)
}

/// Copies values from the device.
///
/// # Safety
/// The values are at the address, and no pending work writes them.
pub(super) unsafe fn read<T: Pod>(address: u64, out: &mut [T]) -> Result<()> {
    // SAFETY: `out` values lie at `address` in device memory, and no pending work writes them.
    Ok(unsafe { result::memcpy_dtoh_sync(out, address) }?)
}

/// Memory of the device. It comes from the driver and not from a pool, so that the driver's free memory tells its size.
pub(super) struct Memory {
    pub(super) address: u64,
    bytes: u64,
}

impl Memory {
    pub(super) fn new(bytes: u64) -> Result<Self> {
        let bytes = bytes.max(1);
        // SAFETY: nothing reads the memory before something wrote to it.
        let address = unsafe { result::malloc_sync(bytes as usize) }?;
        Ok(Memory { address, bytes })
    }

    /// Zeros.
    pub(super) fn zeros(device: &Device, bytes: u64) -> Result<Self> {
        let memory = Memory::new(bytes)?;
        // SAFETY: the memory has so many bytes, and nothing else has its address yet.
        unsafe { device.fill(memory.address, 0, memory.bytes) }?;
        Ok(memory)
    }

    /// These values.
    pub(super) fn of<T: Pod>(values: &[T]) -> Result<Self> {
        let memory = Memory::new(size_of_val(values) as u64)?;
        memory.write(0, bytemuck::cast_slice(values))?;
        Ok(memory)
    }

    /// No pending work uses the memory.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        ensure!(at + bytes.len() as u64 <= self.bytes, "a write beyond device memory");
        // SAFETY: the range is in the memory. A copy from pageable memory may return before it is done, and is on the
        // default stream.
        unsafe {
            result::memcpy_htod_sync(self.address + at, bytes)?;
            result::stream::synchronize(std::ptr::null_mut())?;
        }
        Ok(())
    }

    /// No pending work writes to the memory.
    pub(super) fn read<T: Pod>(&self, at: u64, out: &mut [T]) -> Result<()> {
        ensure!(at + size_of_val(out) as u64 <= self.bytes, "a read beyond device memory");
        // SAFETY: the range is in the memory, and bytes copied from anything are a valid `T`, which is `Pod`.
        unsafe { read(self.address + at, out) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `malloc_sync` returned the address; freeing waits for pending work. An error would be that of such
        // work, which is reported elsewhere.
        let _ = unsafe { result::free_sync(self.address) };
    }
}
