//! The faces of the library: one test body makes blenders and plans through [`Face`] and so runs on the CPU, on a CUDA
//! device, and through the C functions.

use std::cell::UnsafeCell;
use std::ffi::c_void;

use gradblend::dlpack::Dlpack;
use gradblend::{
    Blender, Config, DType, Device, GradScale, Pass, Plan, Policy, Report, Solution, Stream, TensorGrads, ffi,
};

use crate::c::{self, CBlender, CPlan};
use crate::failure::Result;
use crate::{Outcome, Sample, Tensor};

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
///
/// # Errors
/// Those of the body.
pub fn cpu(body: impl FnOnce(Face) -> Outcome) -> Outcome {
    body(Face::CPU)
}

/// Runs a body on the CPU through the C functions.
///
/// # Errors
/// Those of the body.
pub fn ffi(body: impl FnOnce(Face) -> Outcome) -> Outcome {
    body(Face::FFI)
}

impl Face {
    /// The Rust API on the CPU.
    pub const CPU: Face = Face { c: false, cuda: false };
    /// The C functions on the CPU.
    pub const FFI: Face = Face { c: true, cuda: false };

    /// The device that blenders of this face work on.
    ///
    /// # Errors
    /// Those of [`Device::cuda`].
    pub fn device(self) -> Result<Device> {
        Ok(if self.cuda { Device::cuda(0)? } else { Device::cpu() })
    }

    /// A blender.
    ///
    /// # Errors
    /// Those of [`Blender::new`].
    pub fn blender_with(self, config: Config) -> Result<TestBlender> {
        self.blender_on(if self.cuda { 0 } else { -1 }, config)
    }

    /// A blender on the device with this number: -1 is the CPU.
    ///
    /// # Errors
    /// Those of [`Blender::new`] and [`Device::cuda`].
    pub fn blender_on(self, device: i32, config: Config) -> Result<TestBlender> {
        let api = if self.c {
            Api::C(CBlender::new(device, &config)?)
        } else {
            Api::Rust(Blender::new(&if device < 0 { Device::cpu() } else { Device::cuda(device)? }, config)?)
        };
        Ok(TestBlender { api, config, face: self, stream: Stream::default() })
    }

    /// A blender with the default configuration and 2 threads.
    ///
    /// # Errors
    /// Those of [`Blender::new`].
    pub fn blender(self, k: usize) -> Result<TestBlender> {
        self.blender_with(Config { threads: 2, ..Config::new(k as u32) })
    }

    /// `solve`.
    ///
    /// # Errors
    /// Those of [`gradblend::solve`].
    pub fn solve(self, numerator: &[f64], second_moment: &[f64], policy: &Policy) -> Result<Solution> {
        match self.c {
            true => c::solve(numerator, second_moment, policy),
            false => Ok(gradblend::solve(numerator, second_moment, policy)?),
        }
    }

    /// A tensor from DLPack arrays, for the device with this number (-1: the CPU), which need not exist in C.
    ///
    /// # Errors
    /// Those of [`TensorGrads::from_dlpack`].
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
            // SAFETY: the caller's promises.
            return unsafe { c::from_dlpack(device, train, valid, modalities, blended) }.map(Input::Addresses);
        }
        let device = if device < 0 { Device::cpu() } else { Device::cuda(device)? };
        // SAFETY: the caller's promises.
        Ok(Input::Slices(unsafe { TensorGrads::from_dlpack(&device, train, valid, modalities, blended) }?))
    }

    /// Puts the buffers of tensors where the device can reach them.
    pub fn place<T: Sample>(self, tensors: &mut [Tensor<T>]) -> Placed<'_, T> {
        Placed {
            face: self,
            #[cfg(feature = "cuda")]
            device: self.cuda.then(|| tensors.iter().map(cuda::DeviceTensor::of).collect()),
            tensors,
        }
    }

    /// Runs one operation on `tensors`, on the default stream, and copies back what it wrote.
    ///
    /// # Errors
    /// Those of the plan and of the operation.
    pub fn run<T: Sample>(
        self,
        blender: &mut TestBlender,
        tensors: &mut [Tensor<T>],
        operation: impl FnOnce(&mut TestBlender, &TestPlan<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut placed = self.place(tensors);
        let plan = blender.plan(placed.inputs())?;
        operation(blender, &plan)?;
        drop(plan);
        placed.fetch();
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
    unsafe fn read<N: Copy>(self, from: *const N, len: usize) -> Vec<N> {
        #[cfg(feature = "cuda")]
        if self.cuda {
            // SAFETY: the caller's promise.
            return unsafe { cuda::read(from, len) };
        }
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(from, len) }.to_vec()
    }

    /// # Safety
    /// `to` has room for the numbers in memory of the device, which only work on the default stream uses.
    unsafe fn write<N: Copy>(self, to: *mut N, numbers: &[N]) {
        #[cfg(feature = "cuda")]
        if self.cuda {
            // SAFETY: the caller's promise.
            return unsafe { cuda::write(to, numbers) };
        }
        // SAFETY: the caller's promise.
        unsafe { to.copy_from_nonoverlapping(numbers.as_ptr(), numbers.len()) }
    }
}

/// A tensor as a plan takes it.
#[derive(Debug)]
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
        // SAFETY: the caller's promise.
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
pub struct Placed<'a, T> {
    face: Face,
    #[cfg(feature = "cuda")]
    device: Option<Vec<cuda::DeviceTensor>>,
    tensors: &'a mut [Tensor<T>],
}

impl<T: Sample> Placed<'_, T> {
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

#[derive(Debug)]
enum Api {
    Rust(Blender),
    C(CBlender),
}

/// A blender of any face. Its calls have the names of [`Blender`]'s and use the stream in `stream`.
#[derive(Debug)]
pub struct TestBlender {
    api: Api,
    config: Config,
    face: Face,
    /// The stream that calls are put on.
    pub stream: Stream,
}

/// A plan of any face.
#[derive(Debug)]
pub enum TestPlan<'a> {
    /// Of the Rust API.
    Rust(Plan<'a>),
    /// Of the C functions.
    C(CPlan<'a>),
}

impl<'a> TestPlan<'a> {
    /// Releases the plan. C has no such call: there the caller sees to it that a plan is updated before it runs.
    pub fn release(self) -> TestPlan<'static> {
        match self {
            TestPlan::Rust(plan) => TestPlan::Rust(plan.release()),
            TestPlan::C(plan) => TestPlan::C(plan.release()),
        }
    }

    /// Gives the plan other buffers; the work is put on `stream`.
    ///
    /// # Errors
    /// Those of [`Plan::update`].
    pub fn update(&mut self, inputs: Vec<Input<'a>>, stream: Stream) -> Result<()> {
        match self {
            TestPlan::Rust(plan) => Ok(plan.update(inputs.into_iter().map(Input::grads), stream)?),
            TestPlan::C(plan) => plan.update(inputs, stream),
        }
    }
}

type RustRun = fn(&mut Blender, &Plan<'_>, Stream) -> gradblend::Result<()>;
type RustCall = fn(&mut Blender, Stream) -> gradblend::Result<()>;

#[allow(clippy::missing_errors_doc, reason = "errors are those of the calls of the same names")]
impl TestBlender {
    /// The configuration that the blender was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    fn k(&self) -> usize {
        self.config.modalities as usize
    }

    /// Makes a plan.
    pub fn plan<'a>(&self, inputs: Vec<Input<'a>>) -> Result<TestPlan<'a>> {
        match &self.api {
            Api::Rust(blender) => Ok(TestPlan::Rust(blender.plan(inputs.into_iter().map(Input::grads))?)),
            Api::C(blender) => Ok(TestPlan::C(blender.plan(inputs)?)),
        }
    }

    fn run(&mut self, plan: &TestPlan<'_>, rust: RustRun, c: c::Run) -> Result<()> {
        match (&mut self.api, plan) {
            (Api::Rust(blender), TestPlan::Rust(plan)) => Ok(rust(blender, plan, self.stream)?),
            (Api::C(blender), TestPlan::C(plan)) => blender.run(plan, c, self.stream),
            _ => unreachable!("a plan of another face"),
        }
    }

    fn call(&mut self, rust: RustCall, c: c::Call) -> Result<()> {
        match &mut self.api {
            Api::Rust(blender) => Ok(rust(blender, self.stream)?),
            Api::C(blender) => blender.call(c, self.stream),
        }
    }

    /// One pass.
    pub fn pass(&mut self, plan: &TestPlan<'_>, what: Pass) -> Result<()> {
        match (&mut self.api, plan) {
            (Api::Rust(blender), TestPlan::Rust(plan)) => Ok(blender.pass(plan, what, self.stream)?),
            (Api::C(blender), TestPlan::C(plan)) => blender.pass(plan, what, self.stream),
            _ => unreachable!("a plan of another face"),
        }
    }

    /// DOT.
    pub fn dot(&mut self, plan: &TestPlan<'_>) -> Result<()> {
        self.run(plan, Blender::dot, ffi::gradblend_dot)
    }

    /// BLEND.
    pub fn blend(&mut self, plan: &TestPlan<'_>) -> Result<()> {
        self.run(plan, Blender::blend, ffi::gradblend_blend)
    }

    /// BLEND with ACCUMULATE.
    pub fn accumulate(&mut self, plan: &TestPlan<'_>) -> Result<()> {
        self.pass(plan, Pass::BLEND | Pass::ACCUMULATE)
    }

    /// DOT, BLEND and OBSERVE.
    pub fn step(&mut self, plan: &TestPlan<'_>) -> Result<()> {
        self.run(plan, Blender::step, ffi::gradblend_step)
    }

    /// Closes the pending sums as an observation.
    pub fn observe(&mut self) -> Result<()> {
        self.call(Blender::observe, ffi::gradblend_observe)
    }

    /// Solves for the weights.
    pub fn reweight(&mut self) -> Result<()> {
        self.call(Blender::reweight, ffi::gradblend_reweight)
    }

    /// Forgets all but the weights.
    pub fn reset(&mut self) -> Result<()> {
        self.call(Blender::reset, ffi::gradblend_reset)
    }

    /// Puts weights in force.
    pub fn set_weights(&mut self, weights: &[f64]) -> Result<()> {
        match &mut self.api {
            Api::Rust(blender) => Ok(blender.set_weights(weights, self.stream)?),
            Api::C(blender) => blender.set_weights(weights, self.stream),
        }
    }

    /// Reads the gradient scale from an address at each observation; NULL is a scale of 1.
    ///
    /// # Safety
    /// As for [`GradScale::from_raw`].
    pub unsafe fn set_grad_scale(&mut self, scale: *const f32) -> Result<()> {
        match &mut self.api {
            // SAFETY: the caller's promise.
            Api::Rust(blender) => Ok(blender.set_grad_scale(unsafe { GradScale::from_raw(scale) })?),
            // SAFETY: the caller's promise.
            Api::C(blender) => unsafe { blender.set_grad_scale(scale) },
        }
    }

    /// Sets a gradient scale by value, which only the Rust API can. `None` through C.
    pub fn set_grad_scale_value(&mut self, scale: f32) -> Option<Result<()>> {
        match &mut self.api {
            Api::Rust(blender) => Some(blender.set_grad_scale(GradScale::value(scale)).map_err(Into::into)),
            Api::C(_) => None,
        }
    }

    /// Reads the report.
    pub fn report(&mut self) -> Result<Report> {
        match &mut self.api {
            Api::Rust(blender) => Ok(blender.report(self.stream)?),
            Api::C(blender) => blender.report(self.stream),
        }
    }

    /// Reads S, K x K.
    pub fn second_moments(&mut self) -> Result<Vec<f64>> {
        let k = self.k();
        match &mut self.api {
            Api::Rust(blender) => Ok(blender.second_moments(self.stream)?),
            Api::C(blender) => blender.second_moments(k, self.stream),
        }
    }

    /// The saved state.
    pub fn save(&mut self) -> Result<Vec<u8>> {
        match &mut self.api {
            Api::Rust(blender) => Ok(blender.save(self.stream)?),
            Api::C(blender) => blender.save(self.stream),
        }
    }

    /// Restores a saved state.
    pub fn load(&mut self, saved: &[u8]) -> Result<()> {
        match &mut self.api {
            Api::Rust(blender) => Ok(blender.load(saved, self.stream)?),
            Api::C(blender) => blender.load(saved, self.stream),
        }
    }

    /// Addresses of the pending sums and of the weights in force.
    pub fn addresses(&self) -> Result<(*mut f64, *const f32)> {
        match &self.api {
            Api::Rust(blender) => Ok((blender.pending_sums(), blender.device_weights())),
            Api::C(blender) => blender.addresses(self.k()),
        }
    }

    /// The pending sums, once the default stream is done.
    pub fn pending(&self) -> Result<Vec<f64>> {
        // SAFETY: 2K numbers, and no call on the blender runs.
        Ok(unsafe { self.face.read(self.addresses()?.0, 2 * self.k()) })
    }

    /// Replaces the pending sums, as a sharded trainer does: K values of c, then of d.
    pub fn set_pending(&mut self, c: &[f64], d: &[f64]) -> Result<()> {
        assert_eq!((c.len(), d.len()), (self.k(), self.k()));
        // SAFETY: 2K numbers, and no call on the blender runs.
        unsafe { self.face.write(self.addresses()?.0, &[c, d].concat()) };
        Ok(())
    }

    /// Replaces the pending sums and closes them as an observation.
    pub fn observe_sums(&mut self, c: &[f64], d: &[f64]) -> Result<()> {
        self.set_pending(c, d)?;
        self.observe()
    }

    /// The weights in force as f32 in memory of the device, once the default stream is done.
    pub fn weights(&self) -> Result<Vec<f32>> {
        // SAFETY: K numbers, and no call on the blender runs.
        Ok(unsafe { self.face.read(self.addresses()?.1, self.k()) })
    }
}

/// Stamps test bodies on every face: `cpu::name`, `ffi::name`, `cuda::name`. Those of `each_dtype` run on every dtype too,
/// as `cpu::f16s::name`; through the C functions, which pass a dtype on as a number, on one. Bodies of `once` also run
/// through the C functions on CUDA; those of `host`, which use addresses of the host, never run on CUDA.
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
