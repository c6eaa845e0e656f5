//! The faces of the library: one test body makes blenders and plans through [`Face`] and so runs on the CPU, on a CUDA
//! device, and through the C functions.

use std::cell::UnsafeCell;
use std::ffi::c_void;

use gradblend::dlpack::Dlpack;
use gradblend::{Config, DType, Device, Policy, Solution, TensorGrads};

use crate::c;
use crate::failure::Result;
use crate::{Outcome, Sample, Tensor, TestBlender, TestPlan};

#[cfg(feature = "cuda")]
use crate::cuda;

/// How a test body reaches the library, and the device that it works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Face {
    /// Calls go through the C functions.
    pub c: bool,
    /// Work is done by CUDA device 0.
    pub cuda: bool,
}

/// Runs a body on the CPU.
pub fn cpu(body: impl FnOnce(Face) -> Outcome) -> Outcome {
    body(Face::CPU)
}

/// Runs a body on the CPU through the C functions.
pub fn ffi(body: impl FnOnce(Face) -> Outcome) -> Outcome {
    body(Face::FFI)
}

impl Face {
    /// The Rust API on the CPU.
    pub const CPU: Face = Face { c: false, cuda: false };
    /// The C functions on the CPU.
    pub const FFI: Face = Face { c: true, cuda: false };

    /// The device that blenders of this face work on.
    pub fn device(self) -> Result<Device> {
        Ok(if self.cuda { Device::cuda(0)? } else { Device::cpu() })
    }

    /// A blender.
    pub fn blender_with(self, config: Config) -> Result<TestBlender> {
        self.blender_on(if self.cuda { 0 } else { -1 }, config)
    }

    /// A blender on the device with this number: -1 is the CPU.
    pub fn blender_on(self, device: i32, config: Config) -> Result<TestBlender> {
        TestBlender::new(self, device, config)
    }

    /// A blender with the default configuration and 2 threads.
    pub fn blender(self, k: usize) -> Result<TestBlender> {
        self.blender_with(Config { threads: 2, ..Config::new(k as u32) })
    }

    /// `solve`.
    pub fn solve(self, numerator: &[f64], second_moment: &[f64], policy: &Policy) -> Result<Solution> {
        match self.c {
            true => c::solve(numerator, second_moment, policy),
            false => Ok(gradblend::solve(numerator, second_moment, policy)?),
        }
    }

    /// A tensor from DLPack arrays, for the device with this number (-1: the CPU), which need not exist in C.
    ///
    /// # Safety
    /// As for [`TensorGrads::from_dlpack`].
    pub unsafe fn from_dlpack(
        self,
        device: i32,
        train: Option<Dlpack>,
        valid: Option<Dlpack>,
        modalities: &[Option<Dlpack>],
        blended: Option<Dlpack>,
    ) -> Result<Input<'static>> {
        if self.c {
            // SAFETY: as `TensorGrads::from_dlpack` asks, the records are live, and so is what they describe.
            return unsafe { c::from_dlpack(device, train, valid, modalities, blended) }.map(Input::Addresses);
        }
        let device = if device < 0 { Device::cpu() } else { Device::cuda(device)? };
        // SAFETY: as `TensorGrads::from_dlpack` asks, the records are live, and so is what they describe.
        Ok(Input::Slices(unsafe { TensorGrads::from_dlpack(&device, train, valid, modalities, blended) }?))
    }

    /// Copies the buffers of tensors to the device; the CPU uses them where they are.
    pub fn upload<T: Sample>(self, tensors: &mut [Tensor<T>]) -> Uploaded<'_, T> {
        Uploaded {
            face: self,
            #[cfg(feature = "cuda")]
            device: self.cuda.then(|| tensors.iter().map(cuda::DeviceTensor::of).collect()),
            tensors,
        }
    }

    /// Runs one operation on `tensors`, on the default stream, and copies back what it wrote.
    pub fn run<T: Sample>(
        self,
        blender: &mut TestBlender,
        tensors: &mut [Tensor<T>],
        operation: impl FnOnce(&mut TestBlender, &TestPlan<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut uploaded = self.upload(tensors);
        let plan = blender.plan(uploaded.inputs())?;
        operation(blender, &plan)?;
        drop(plan);
        uploaded.fetch();
        Ok(())
    }

    /// Numbers in memory of the device.
    pub fn array<N: Copy>(self, numbers: Vec<N>) -> DeviceArray<N> {
        DeviceArray {
            face: self,
            len: numbers.len(),
            #[cfg(feature = "cuda")]
            memory: self.cuda.then(|| cuda::Memory::of(&numbers)),
            host: if self.cuda { Vec::new() } else { numbers.into_iter().map(UnsafeCell::new).collect() },
        }
    }

    /// # Safety
    /// `from` has `len` numbers in memory of the device, which only work on the default stream writes to.
    pub(crate) unsafe fn read<N: Copy>(self, from: *const N, len: usize) -> Vec<N> {
        #[cfg(feature = "cuda")]
        if self.cuda {
            // SAFETY: `from` has `len` numbers on the device, which only the default stream writes to.
            return unsafe { cuda::read(from, len) };
        }
        // SAFETY: `from` has `len` numbers in host memory, and the CPU has no work pending.
        unsafe { std::slice::from_raw_parts(from, len) }.to_vec()
    }

    /// # Safety
    /// `to` has room for the numbers in memory of the device, which only work on the default stream uses.
    pub(crate) unsafe fn write<N: Copy>(self, to: *mut N, numbers: &[N]) {
        #[cfg(feature = "cuda")]
        if self.cuda {
            // SAFETY: `to` has room for `numbers` on the device, which only the default stream uses.
            return unsafe { cuda::write(to, numbers) };
        }
        // SAFETY: `to` has room for `numbers` in host memory, and is not part of them.
        unsafe { to.copy_from_nonoverlapping(numbers.as_ptr(), numbers.len()) }
    }
}

/// A tensor as a plan takes it.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "tests make few of them")]
pub enum Input<'a> {
    /// The Rust API's record, of slices or addresses.
    Slices(TensorGrads<'a>),
    /// Addresses, which each face puts into its own record.
    Addresses(Addresses),
}

/// The addresses of one tensor. NULL is absent.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the fields are the parameters of TensorGrads::from_raw")]
pub struct Addresses {
    pub len: u64,
    pub dtype: DType,
    pub train: *const c_void,
    pub valid: *const c_void,
    pub modalities: Vec<*const c_void>,
    pub blended: *mut c_void,
}

impl<'a> Input<'a> {
    /// A tensor at these addresses.
    ///
    /// # Safety
    /// As for [`TensorGrads::from_raw`].
    pub unsafe fn at(len: u64, dtype: DType, train: usize, valid: usize, modalities: &[usize], blended: usize) -> Self {
        let address = |address: usize| address as *const c_void;
        Input::Addresses(Addresses {
            len,
            dtype,
            train: address(train),
            valid: address(valid),
            modalities: modalities.iter().copied().map(address).collect(),
            blended: blended as *mut c_void,
        })
    }

    /// The Rust API's record of this tensor.
    pub fn grads(self) -> TensorGrads<'a> {
        match self {
            Input::Slices(grads) => grads,
            // SAFETY: who made the addresses keeps the contract of `from_raw`.
            Input::Addresses(addresses) => unsafe { addresses.grads() },
        }
    }
}

impl Addresses {
    /// The Rust API's record of this tensor.
    ///
    /// # Safety
    /// As for [`TensorGrads::from_raw`].
    pub unsafe fn grads<'a>(&self) -> TensorGrads<'a> {
        let (train, valid) = (self.train, self.valid);
        // SAFETY: as `from_raw` asks, each address is NULL or has `len` elements of `dtype` for as long as `'a`.
        unsafe { TensorGrads::from_raw(self.len, self.dtype, train, valid, &self.modalities, self.blended) }
    }
}

impl<T: Sample> Tensor<T> {
    /// The addresses to give to the library, of the buffers that are part of the input.
    pub(crate) fn addresses(&self, train: *mut T, valid: *mut T, v: &[*mut T], blended: *mut T) -> Addresses {
        let products = |address: *mut T| if self.has_products { address.cast_const().cast() } else { std::ptr::null() };
        Addresses {
            len: self.len() as u64,
            dtype: T::DTYPE,
            train: products(train),
            valid: products(valid),
            modalities: v.iter().map(|v| v.cast_const().cast()).collect(),
            blended: match self.output {
                crate::Output::None => std::ptr::null_mut(),
                crate::Output::Blended => blended.cast(),
                crate::Output::InPlace(k) => v[k].cast(),
            },
        }
    }

    fn host_addresses(&mut self) -> Addresses {
        let (train, valid) = (self.train.as_mut_ptr(), self.valid.as_mut_ptr());
        let v: Vec<*mut T> =
            self.modalities.iter_mut().map(|v| v.as_mut().map_or(std::ptr::null_mut(), |v| v.as_mut_ptr())).collect();
        let blended = self.blended.as_mut_ptr();
        self.addresses(train, valid, &v, blended)
    }
}

/// Tensors whose buffers the device of a face can reach.
#[derive(Debug)]
pub struct Uploaded<'a, T> {
    face: Face,
    #[cfg(feature = "cuda")]
    device: Option<Vec<cuda::DeviceTensor>>,
    tensors: &'a mut [Tensor<T>],
}

impl<T: Sample> Uploaded<'_, T> {
    /// What a plan takes.
    pub fn inputs(&mut self) -> Vec<Input<'_>> {
        #[cfg(feature = "cuda")]
        if let Some(device) = &self.device {
            let pairs = device.iter().zip(&*self.tensors);
            return pairs.map(|(device, tensor)| Input::Addresses(device.addresses(tensor))).collect();
        }
        let c = self.face.c;
        let input =
            |tensor| if c { Input::Addresses(Tensor::host_addresses(tensor)) } else { Input::Slices(tensor.grads()) };
        self.tensors.iter_mut().map(input).collect()
    }

    /// Copies what was written back to the tensors, once the default stream is done.
    pub fn fetch(self) {
        #[cfg(feature = "cuda")]
        for (device, tensor) in self.device.iter().flatten().zip(self.tensors) {
            device.fetch(tensor);
        }
    }
}

/// Numbers that the device reads.
#[derive(Debug)]
pub struct DeviceArray<N> {
    face: Face,
    len: usize,
    host: Vec<UnsafeCell<N>>,
    #[cfg(feature = "cuda")]
    memory: Option<cuda::Memory>,
}

impl<N: Copy> DeviceArray<N> {
    /// Where the numbers are.
    pub fn address(&self) -> *mut N {
        #[cfg(feature = "cuda")]
        if let Some(memory) = &self.memory {
            return memory.address(0);
        }
        UnsafeCell::raw_get(self.host.as_ptr())
    }

    /// The numbers, once the default stream is done.
    pub fn read(&self) -> Vec<N> {
        // SAFETY: the array's own memory, and no work on it is pending.
        unsafe { self.face.read(self.address(), self.len) }
    }

    /// Replaces the first number, once the default stream is done.
    pub fn set(&self, number: N) {
        // SAFETY: the array's own memory, which observations on the default stream alone read.
        unsafe { self.face.write(self.address(), &[number]) };
    }
}

/// Stamps test bodies on every face: `cpu::name`, `ffi::name`, `cuda::name`. Those of `each_dtype` run on every dtype
/// too, as `cpu::f16s::name`; through the C functions, which pass a dtype on as a number, on one. Bodies of `once` also
/// run through the C functions on CUDA; those of `host`, which use addresses of the host, never run on CUDA.
#[macro_export]
macro_rules! tests {
    ($(each_dtype: $($typed:ident),+ $(,)?;)? $(once: $($once:ident),+ $(,)?;)? $(host: $($host:ident),+ $(,)?;)?) => {
        $crate::tests!(@face cpu: [$($($typed)+)?] [f32s f32] [f16s gradblend::f16] [bf16s gradblend::bf16];
            $($($once)+)? $($($host)+)?);
        $crate::tests!(@face ffi: [$($($typed)+)?] [bf16s gradblend::bf16]; $($($once)+)? $($($host)+)?);
        #[cfg(feature = "cuda")]
        $crate::tests!(@face cuda: [$($($typed)+)?] [f32s f32] [f16s gradblend::f16] [bf16s gradblend::bf16];
            $($($once)+)?);
        #[cfg(feature = "cuda")]
        $crate::tests!(@face ffi_cuda: []; $($($once)+)?);
    };
    (@face $face:ident: $typed:tt $([$module:ident $dtype:ty])*; $($once:ident)*) => {
        mod $face {
            $($crate::tests!(@typed $face $module $dtype: $typed);)*
            $(#[test] fn $once() -> $crate::Outcome { $crate::$face(super::$once) })*
        }
    };
    (@typed $face:ident $module:ident $dtype:ty: []) => {};
    (@typed $face:ident $module:ident $dtype:ty: [$($body:ident)+]) => {
        mod $module { $(#[test] fn $body() -> $crate::Outcome { $crate::$face(super::super::$body::<$dtype>) })+ }
    };
}
