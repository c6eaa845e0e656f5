//! cuBLAS: its calls for vectors on each tensor, and for matrices where all gradients of a loss lie in one piece.

use std::ffi::c_void;

use anyhow::Result;
use cudarc::cublas::{result, sys};
use cudarc::driver::CudaFunction;
use gradblend::DType;
use gradblend_testkit::Sample;

use super::Inputs;
use super::device::Memory;
use super::naive::launch;
use crate::backend::{Implementation, Missing};
use crate::case::Operation;
use crate::inputs::{Buffer, with_dtype};
use crate::oracle::Sums;
use crate::per_tensor::{At, PerTensor, Steps};

/// The version, if the library is found.
pub(super) fn version() -> Option<String> {
    let handle = create().ok()?;
    let mut version = 0;
    // SAFETY: a live handle, and a valid out-pointer for one `int`.
    let known = unsafe { sys::cublasGetVersion_v2(handle, &mut version) }.result();
    // SAFETY: the handle is not used again.
    unsafe { result::destroy_handle(handle) }.ok()?;
    known.ok().map(|()| format!("cuBLAS {}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
}

fn create() -> Result<sys::cublasHandle_t> {
    // SAFETY: loading runs the initialisers of NVIDIA's library. cudarc panics where it is missing.
    if !unsafe { sys::is_culib_present() } {
        return Err(Missing("the cuBLAS library was not found".into()).into());
    }
    Ok(result::create_handle()?)
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::F32 => sys::cudaDataType::CUDA_R_32F,
        DType::F16 => sys::cudaDataType::CUDA_R_16F,
        DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
    }
}

/// A handle that works on the device's stream.
struct Blas {
    handle: sys::cublasHandle_t,
    /// Instead of cuBLAS's own, so that it counts as the implementation's memory.
    _workspace: Memory,
    dtype: sys::cudaDataType,
}

impl Blas {
    /// `mode`: where scalars are.
    fn new(inputs: &Inputs, mode: sys::cublasPointerMode_t) -> Result<Self> {
        // NVIDIA's documentation recommends this size for newer GPUs.
        const WORKSPACE: u64 = 32 << 20;
        let workspace = Memory::new(WORKSPACE)?;
        let address = workspace.address as *mut c_void;
        let blas = Blas { handle: create()?, _workspace: workspace, dtype: data_type(inputs.host.dtype) };
        // SAFETY: a live handle; stream and workspace outlive it. The stream is first, as setting it resets the workspace.
        unsafe {
            result::set_stream(blas.handle, inputs.device.stream.cu_stream().cast())?;
            sys::cublasSetPointerMode_v2(blas.handle, mode).result()?;
            sys::cublasSetWorkspace_v2(blas.handle, address, WORKSPACE as usize).result()?;
        }
        Ok(blas)
    }

    /// result = <a, b>, rounded to the dtype.
    ///
    /// # Safety
    /// `a` and `b` have `len` elements on the device, and `result` has one.
    unsafe fn dot(&self, len: u64, a: u64, b: u64, result: u64) -> Result<()> {
        let (kind, wide, len) = (self.dtype, sys::cudaDataType::CUDA_R_32F, len as i32);
        let (a, b, result) = (a as *const c_void, b as *const c_void, result as *mut c_void);
        // SAFETY: a live handle; `a` and `b` have `len` elements on the device, and `result` has one.
        Ok(unsafe { sys::cublasDotEx(self.handle, len, a, kind, 1, b, kind, 1, result, kind, wide) }.result()?)
    }

    /// y += alpha x
    ///
    /// # Safety
    /// `x` and `y` have `len` elements on the device, and `alpha` is an f32 there.
    unsafe fn axpy(&self, len: u64, alpha: u64, x: u64, y: u64) -> Result<()> {
        let (kind, wide, len) = (self.dtype, sys::cudaDataType::CUDA_R_32F, len as i32);
        let (alpha, x, y) = (alpha as *const c_void, x as *const c_void, y as *mut c_void);
        // SAFETY: a live handle; `x` and `y` have `len` elements on the device, and `alpha` is an f32 there.
        Ok(unsafe { sys::cublasAxpyEx(self.handle, len, alpha, wide, x, kind, 1, y, kind, 1, wide) }.result()?)
    }

    /// C (m x n) = A B, column by column, with A given as its transpose if `transposed`, and k the shared dimension. A
    /// matrix is its address and the elements from one column to the next.
    ///
    /// # Safety
    /// The matrices are in device memory, A and B of the dtype, C of `out`.
    unsafe fn gemm(
        &self,
        transposed: bool,
        [m, n, k]: [usize; 3],
        [a, b, c]: [(u64, usize); 3],
        out: sys::cudaDataType,
    ) -> Result<()> {
        use sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        use sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
        let operation = if transposed { CUBLAS_OP_T } else { CUBLAS_OP_N };
        let [m, n, k, a_step, b_step, c_step] = [m, n, k, a.1, b.1, c.1].map(|size| size as i32);
        let [a, b, c] = [a, b, c].map(|matrix| matrix.0 as *mut c_void);
        let (one, zero) = ((&raw const ONE).cast(), (&raw const ZERO).cast());
        static ONE: f32 = 1.0;
        static ZERO: f32 = 0.0;
        // SAFETY: a live handle; the matrices are in device memory, A and B of the dtype, C of `out`. The scalars are statics
        // in f32 on the host.
        #[rustfmt::skip]
        let done = unsafe {
            result::gemm_ex(
                self.handle, operation, CUBLAS_OP_N, m, n, k, one, a, self.dtype, a_step, b, self.dtype, b_step,
                zero, c, out, c_step, CUBLAS_COMPUTE_32F, sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        Ok(done?)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: the handle is not used again; destroying it waits for its work.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// The naive steps by the calls for vectors. None computes t - g, so t is copied and -g added; none computes w v, so v is
/// added to zeros.
pub(super) struct Vectors {
    blas: Blas,
    /// In f32: -1, then the weights. On the device, like the results, so that no call waits.
    scalars: Memory,
    total: CudaFunction,
    /// t - g of one tensor at a time.
    buffer: Memory,
    /// 2K results a tensor, of the dtype: no call adds to what its result holds. Those of absent gradients stay zero.
    results: Memory,
    /// Their sums, in f64.
    sums: Memory,
}

impl Vectors {
    pub(super) fn new(inputs: &Inputs, operation: Operation) -> Result<PerTensor<Self>> {
        let columns = 2 * inputs.host.modalities as u64;
        let bytes = inputs.host.tensors.len() as u64 * columns * inputs.host.dtype.bytes();
        let scalars: Vec<f32> = [-1.0].into_iter().chain(inputs.host.weights.iter().copied()).collect();
        let steps = Vectors {
            blas: Blas::new(inputs, sys::cublasPointerMode_t::CUBLAS_POINTER_MODE_DEVICE)?,
            scalars: Memory::of(&scalars)?,
            total: inputs.device.kernel("total", Some(inputs.host.dtype))?,
            buffer: Memory::new(if operation.dots() { inputs.longest() } else { 0 })?,
            results: Memory::zeros(&inputs.device, bytes)?,
            sums: Memory::new(8 * columns)?,
        };
        Ok(PerTensor { operation, steps })
    }
}

impl Steps<Inputs> for Vectors {
    fn difference(&mut self, inputs: &mut Inputs, at: At) -> Result<()> {
        let (len, out) = (inputs.len(at), self.buffer.address);
        let [t, g] = [Buffer::Train, Buffer::Valid].map(|buffer| inputs.tensor(at, buffer));
        // SAFETY: t and g have `len` elements, and the buffer those of the longest tensor. The first scalar is -1.
        unsafe {
            inputs.device.copy(t, out, len * inputs.host.dtype.bytes())?;
            self.blas.axpy(len, self.scalars.address, g, out)
        }
    }

    fn dots(&mut self, inputs: &mut Inputs, at: At, k: usize) -> Result<()> {
        let (len, modalities) = (inputs.len(at), inputs.host.modalities);
        let [g, v] = [Buffer::Valid, Buffer::Modality(k)].map(|buffer| inputs.tensor(at, buffer));
        for (factor, column) in [(g, k), (self.buffer.address, modalities + k)] {
            let result = (at.tensor * 2 * modalities + column) as u64 * inputs.host.dtype.bytes();
            // SAFETY: both factors have `len` elements, and there are 2K results for each tensor.
            unsafe { self.blas.dot(len, factor, v, self.results.address + result) }?;
        }
        Ok(())
    }

    fn blend(&mut self, inputs: &mut Inputs, at: At, k: usize, first: bool) -> Result<()> {
        let (len, weight) = (inputs.len(at), self.scalars.address + 4 * (1 + k as u64));
        let [v, out] = [Buffer::Modality(k), Buffer::Blended].map(|buffer| inputs.tensor(at, buffer));
        // SAFETY: both buffers have `len` elements, and the weight of each modality is an f32.
        unsafe {
            if first {
                inputs.device.fill(out, 0, len * inputs.host.dtype.bytes())?;
            }
            self.blas.axpy(len, weight, v, out)
        }
    }

    fn finish_sums(&mut self, inputs: &mut Inputs) -> Result<()> {
        let (rows, columns) = (inputs.host.tensors.len() as u64, 2 * inputs.host.modalities as u64);
        let (results, sums) = (self.results.address, self.sums.address);
        // SAFETY: the kernel takes results, rows, columns, sums. There are rows x columns results and `columns` sums.
        unsafe { launch(&inputs.device, &self.total, columns, results, [rows, columns, sums]) }
    }

    fn sums(&mut self, inputs: &mut Inputs) -> Result<Sums> {
        inputs.sums(&self.sums)
    }
}

/// Products of matrices whose columns are whole buffers: [t g]' V for the sums, V w for the blend. d is a difference of
/// sums. Elements that are absent are zero, so they change no sum.
pub(super) struct Matrices {
    operation: Operation,
    blas: Blas,
    /// Of the dtype: the call has one dtype for both factors.
    weights: Memory,
    /// <t, v_k> and <g, v_k> of each modality, in f32.
    products: Memory,
}

impl Matrices {
    pub(super) fn new(inputs: &Inputs, operation: Operation) -> Result<Self> {
        fn weights<T: Sample>(weights: &[f32]) -> Result<Memory> {
            Memory::of(&weights.iter().map(|w| T::round(f64::from(*w))).collect::<Vec<T>>())
        }
        Ok(Matrices {
            operation,
            blas: Blas::new(inputs, sys::cublasPointerMode_t::CUBLAS_POINTER_MODE_HOST)?,
            weights: with_dtype!(inputs.host.dtype, T => weights::<T>(&inputs.host.weights))?,
            products: Memory::new(2 * 4 * inputs.host.modalities as u64)?,
        })
    }
}

impl Implementation<Inputs> for Matrices {
    fn run(&mut self, inputs: &mut Inputs, set: usize) -> Result<()> {
        let modalities = inputs.host.modalities;
        let len = inputs.host.buffer_bytes / inputs.host.dtype.bytes() as usize;
        let buffer = |buffer| (inputs.buffer(set, buffer), len);
        let v = buffer(Buffer::Modality(0));
        // SAFETY: the buffers have `len` elements each and lie one after another in device memory.
        unsafe {
            if self.operation.dots() {
                let matrices = [buffer(Buffer::Train), v, (self.products.address, 2)];
                self.blas.gemm(true, [2, modalities, len], matrices, sys::cudaDataType::CUDA_R_32F)?;
            }
            if self.operation.blends() {
                let matrices = [v, (self.weights.address, modalities), buffer(Buffer::Blended)];
                self.blas.gemm(false, [len, 1, modalities], matrices, self.blas.dtype)?;
            }
        }
        Ok(())
    }

    fn sums(&mut self, inputs: &mut Inputs) -> Result<Option<Sums>> {
        inputs.device.synchronize()?;
        let mut products = vec![0.0_f32; 2 * inputs.host.modalities];
        self.products.read(0, &mut products)?;
        let pairs = products.chunks_exact(2).map(|pair| (f64::from(pair[1]), f64::from(pair[0] - pair[1])));
        let (c, d) = pairs.unzip();
        Ok(Some(Sums { c, d, unsigned: false }))
    }
}
