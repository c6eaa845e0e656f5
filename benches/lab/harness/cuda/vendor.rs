//! cuBLAS: its calls for vectors on each tensor, and for matrices where the gradients lie in one piece.

use std::ffi::c_void;

use cudarc::cublas::{result, sys};
use gradblend::DType;

use super::super::Way;
use super::super::naive::Naive;
use super::super::oracle::Sums;
use super::super::ours::Which;
use super::Inputs;
use super::device::{Device, Memory, parameter};

/// cuBLAS's version, where there is one.
pub(super) fn version() -> Option<String> {
    let handle = create().ok()?;
    let mut version = 0;
    // SAFETY: a live handle, and a place for the number.
    let known = unsafe { sys::cublasGetVersion_v2(handle, &mut version) }.result();
    // SAFETY: not used any more.
    unsafe { result::destroy_handle(handle) }.ok()?;
    known.ok().map(|()| format!("cuBLAS {}.{}.{}", version / 10_000, version / 100 % 100, version % 100))
}

fn create() -> Result<sys::cublasHandle_t, String> {
    // SAFETY: the initialisers of NVIDIA's library. The binding panics where there is none.
    if !unsafe { sys::is_culib_present() } {
        return Err("the cuBLAS library was not found".into());
    }
    result::create_handle().map_err(|error| format!("cuBLAS: {error:?}"))
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
    /// In place of one of cuBLAS's own, so that it is counted, and so that a graph of the calls has no allocation.
    _workspace: Memory,
    dtype: DType,
}

impl Blas {
    /// `mode`: where the numbers are that calls take or give.
    fn new<T: Naive>(inputs: &Inputs<T>, mode: sys::cublasPointerMode_t) -> Result<Self, String> {
        // What NVIDIA's documentation recommends for its newer GPUs.
        const WORKSPACE: u64 = 32 << 20;
        let workspace = Memory::new(WORKSPACE, "cuBLAS")?;
        let blas = Blas { handle: create()?, _workspace: workspace, dtype: T::DTYPE };
        // SAFETY: a live handle; the stream and the workspace outlive it. Setting a stream forgets the workspace.
        unsafe {
            result::set_stream(blas.handle, inputs.device.stream.cast()).expect("cuBLAS on the stream");
            sys::cublasSetPointerMode_v2(blas.handle, mode).result().expect("cuBLAS's mode for numbers");
            let memory = blas._workspace.address as *mut c_void;
            sys::cublasSetWorkspace_v2(blas.handle, memory, WORKSPACE as usize).result().expect("cuBLAS's workspace");
        }
        Ok(blas)
    }

    /// result = <a, b>, rounded to the dtype.
    ///
    /// # Safety
    /// `a` and `b` have `len` elements on the device, and `result` has room for one.
    unsafe fn dot(&self, len: u64, a: u64, b: u64, result: u64) {
        let (kind, wide, len) = (data_type(self.dtype), sys::cudaDataType::CUDA_R_32F, len as i32);
        let (a, b, result) = (a as *const c_void, b as *const c_void, result as *mut c_void);
        // SAFETY: as the caller's.
        let done = unsafe { sys::cublasDotEx(self.handle, len, a, kind, 1, b, kind, 1, result, kind, wide) };
        done.result().expect("cublasDotEx");
    }

    /// y += alpha x
    ///
    /// # Safety
    /// `x` and `y` have `len` elements on the device, and `alpha` is an f32 there.
    unsafe fn axpy(&self, len: u64, alpha: u64, x: u64, y: u64) {
        let (kind, wide, len) = (data_type(self.dtype), sys::cudaDataType::CUDA_R_32F, len as i32);
        let (alpha, x, y) = (alpha as *const c_void, x as *const c_void, y as *mut c_void);
        // SAFETY: as the caller's.
        let done = unsafe { sys::cublasAxpyEx(self.handle, len, alpha, wide, x, kind, 1, y, kind, 1, wide) };
        done.result().expect("cublasAxpyEx");
    }

    /// C (m x n) = A B, all column by column, with A given as its transpose if `transposed`, and k what they share.
    ///
    /// # Safety
    /// The matrices are there, with so many elements from column to column, A and B of the dtype and C of `out`.
    unsafe fn gemm(&self, transposed: bool, [m, n, k]: [usize; 3], a: [u64; 2], b: [u64; 2], c: [u64; 2], out: DType) {
        let (kind, out) = (data_type(self.dtype), data_type(out));
        let plain = sys::cublasOperation_t::CUBLAS_OP_N;
        let operation = if transposed { sys::cublasOperation_t::CUBLAS_OP_T } else { plain };
        let [m, n, k] = [m, n, k].map(|size| size as i32);
        let at = |matrix: [u64; 2]| (matrix[0] as *const c_void, matrix[1] as i32);
        let ((a, a_step), (b, b_step), (c, c_step)) = (at(a), at(b), at(c));
        let (one, zero) = (1.0_f32, 0.0_f32);
        // SAFETY: as the caller's.
        let done = unsafe {
            sys::cublasGemmEx(
                self.handle,
                operation,
                plain,
                m,
                n,
                k,
                (&raw const one).cast(),
                a,
                kind,
                a_step,
                b,
                kind,
                b_step,
                (&raw const zero).cast(),
                c.cast_mut(),
                out,
                c_step,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        done.result().expect("cublasGemmEx");
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: not used any more; destroying it waits for its work.
        unsafe { result::destroy_handle(self.handle) }.expect("cuBLAS to end");
    }
}

/// The naive way by the calls for vectors. There is none for t - g, so t is copied and g taken off.
pub(super) struct Vectors {
    blas: Blas,
    /// In f32: -1, then the weights. On the device, like the results, so that no call waits.
    numbers: Memory,
    total: cudarc::driver::sys::CUfunction,
    /// Room for t - g of the longest tensor, used again for each.
    buffer: Memory,
    /// 2K results a tensor, of the dtype; no call adds to what is there.
    results: Memory,
    /// Their sums, in f64.
    sums: Memory,
}

impl Vectors {
    pub(super) fn new<T: Naive>(inputs: &Inputs<T>) -> Result<Self, String> {
        let columns = 2 * inputs.weights.len() as u64;
        let bytes = inputs.lists.tensors.len() as u64 * columns * size_of::<T>() as u64;
        let results = Memory::new(bytes, "results")?;
        // SAFETY: it is that long. What is absent stays zero.
        unsafe { inputs.device.fill(results.address, 0, bytes) };
        let numbers: Vec<f32> = [-1.0].into_iter().chain(inputs.weights.iter().copied()).collect();
        Ok(Vectors {
            blas: Blas::new(inputs, sys::cublasPointerMode_t::CUBLAS_POINTER_MODE_DEVICE)?,
            numbers: Memory::of(&numbers, "the weights")?,
            total: inputs.device.kernel("total", Some(T::DTYPE)),
            buffer: Memory::new(inputs.longest() * size_of::<T>() as u64, "t - g")?,
            results,
            sums: Memory::new(8 * columns, "the sums")?,
        })
    }
}

impl<T: Naive> Way<Inputs<T>> for Vectors {
    fn run(&mut self, inputs: &mut Inputs<T>, set: usize) {
        let (device, blas) = (&inputs.device, &self.blas);
        let (modalities, size, buffer) = (inputs.weights.len(), size_of::<T>() as u64, self.buffer.address);
        for (index, (tensor, range)) in inputs.lists.tensors.iter().enumerate() {
            let len = range.len() as u64;
            let at = |which| inputs.at(set, which, index);
            let present = || (0..modalities).filter(|k| tensor.present(*k));
            if tensor.dots(inputs.operation) {
                let (t, g) = (at(Which::Train), at(Which::Valid));
                // SAFETY: all as long as the tensor, and a result for each.
                unsafe {
                    device.copy(t, buffer, len * size);
                    blas.axpy(len, self.numbers.address, g, buffer);
                    for k in present() {
                        let v = at(Which::Modality(k));
                        let result = self.results.address + (index * 2 * modalities + k) as u64 * size;
                        blas.dot(len, g, v, result);
                        blas.dot(len, buffer, v, result + modalities as u64 * size);
                    }
                }
            }
            if inputs.operation.blends() {
                let out = at(Which::Blended);
                // SAFETY: all as long as the tensor.
                unsafe {
                    device.fill(out, 0, len * size);
                    let weight = |k: usize| self.numbers.address + 4 * (1 + k as u64);
                    present().for_each(|k| blas.axpy(len, weight(k), at(Which::Modality(k)), out));
                }
            }
        }
        if inputs.operation.dots() {
            let (rows, columns) = (inputs.lists.tensors.len() as u64, 2 * modalities as u64);
            let (results, sums) = (self.results.address, self.sums.address);
            let mut parameters = [parameter(&results), parameter(&rows), parameter(&columns), parameter(&sums)];
            // SAFETY: results, rows, columns, sums; a block for each column.
            unsafe { device.launch(self.total, columns, &mut parameters) };
        }
    }

    fn sums(&mut self, inputs: &mut Inputs<T>) -> Option<Sums> {
        inputs.device.wait();
        let mut sums = vec![0.0; 2 * inputs.weights.len()];
        self.sums.read(0, &mut sums);
        Some(Sums::of(sums))
    }
}

/// Products of matrices whose columns are whole lists: [t g]' V for the sums, V w for the blend. d is a difference of sums.
pub(super) struct Matrices {
    blas: Blas,
    /// Of the dtype, as the call has one for both factors.
    weights: Memory,
    /// <t, v_k> and <g, v_k> in f32, by modality.
    products: Memory,
    /// A set of lists to copy the tensors into first.
    concatenated: Option<Memory>,
}

impl Matrices {
    pub(super) fn new<T: Naive>(inputs: &Inputs<T>, concatenate: bool) -> Result<Self, String> {
        let weights: Vec<T> = inputs.weights.iter().map(|w| T::from_f32(*w)).collect();
        let concatenated = match concatenate {
            true => Some(Memory::new(inputs.set_bytes(), "the concatenated gradients")?),
            false => None,
        };
        if let Some(memory) = &concatenated {
            // SAFETY: it is that long. What is absent stays zero.
            unsafe { inputs.device.fill(memory.address, 0, inputs.set_bytes()) };
        }
        Ok(Matrices {
            blas: Blas::new(inputs, sys::cublasPointerMode_t::CUBLAS_POINTER_MODE_HOST)?,
            weights: Memory::of(&weights, "the weights")?,
            products: Memory::new(2 * 4 * inputs.weights.len() as u64, "the products")?,
            concatenated,
        })
    }
}

/// Copies each tensor's list between a set and the concatenated lists; `back` from there.
///
/// # Safety
/// `by` is how far these are from the set.
unsafe fn copies<T: Naive>(
    inputs: &Inputs<T>,
    set: usize,
    by: u64,
    which: Which,
    there: impl Fn(usize) -> bool,
    back: bool,
) {
    let device: &Device = &inputs.device;
    for (index, (_, range)) in inputs.lists.tensors.iter().enumerate().filter(|(index, _)| there(*index)) {
        let at = inputs.at(set, which, index);
        let (from, to) = if back { (at.wrapping_add(by), at) } else { (at, at.wrapping_add(by)) };
        // SAFETY: a tensor of a list, and its place in the other.
        unsafe { device.copy(from, to, (range.len() * size_of::<T>()) as u64) };
    }
}

impl<T: Naive> Way<Inputs<T>> for Matrices {
    fn run(&mut self, inputs: &mut Inputs<T>, set: usize) {
        let (operation, modalities, len) = (inputs.operation, inputs.weights.len(), inputs.lists.len);
        let first = inputs.memory.address + set as u64 * inputs.set_bytes();
        // How far the lists that are multiplied are from the set's own.
        let by = self.concatenated.as_ref().map_or(0, |memory| memory.address.wrapping_sub(first));
        let list = |which| inputs.list(set, which).wrapping_add(by);
        let tensor = |index: usize| &inputs.lists.tensors[index].0;
        if self.concatenated.is_some() {
            // SAFETY: as far as computed above.
            unsafe {
                if operation.dots() {
                    copies(inputs, set, by, Which::Train, |index| tensor(index).dots(operation), false);
                    copies(inputs, set, by, Which::Valid, |index| tensor(index).dots(operation), false);
                }
                for k in 0..modalities {
                    copies(inputs, set, by, Which::Modality(k), |index| tensor(index).present(k), false);
                }
            }
        }
        let (step, v) = (len as u64, list(Which::Modality(0)));
        // SAFETY: lists of `len` elements, one behind the other; what is absent in them is zero.
        unsafe {
            if operation.dots() {
                let (pair, out) = ([list(Which::Train), step], [self.products.address, 2]);
                self.blas.gemm(true, [2, modalities, len], pair, [v, step], out, DType::F32);
            }
            if operation.blends() {
                let (weights, out) = ([self.weights.address, modalities as u64], [list(Which::Blended), step]);
                self.blas.gemm(false, [len, 1, modalities], [v, step], weights, out, T::DTYPE);
                if self.concatenated.is_some() {
                    copies(inputs, set, by, Which::Blended, |_| true, true);
                }
            }
        }
    }

    fn sums(&mut self, inputs: &mut Inputs<T>) -> Option<Sums> {
        inputs.device.wait();
        let mut products = vec![0.0_f32; 2 * inputs.weights.len()];
        self.products.read(0, &mut products);
        let pairs = products.chunks_exact(2).map(|pair| (f64::from(pair[1]), f64::from(pair[0] - pair[1])));
        let (c, d) = pairs.unzip();
        Some(Sums { c, d, unsigned: false })
    }
}
