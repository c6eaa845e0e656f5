//! Gradients and streams as the caller holds them: dtypes, addresses, and the only unsafe constructor of a tensor.

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;

use half::{bf16, f16};

use crate::abi::{self, MAX_MODALITIES};
use crate::error::{Error, Result, Role};
use crate::gradient::{Grad, Gradient, GradientMut, Tracked};

/// Element type of a tensor's gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum DType {
    /// IEEE 754 binary32.
    F32 = abi::F32,
    /// IEEE 754 binary16.
    F16 = abi::F16,
    /// bfloat16: the upper half of a binary32.
    BF16 = abi::BF16,
}

impl DType {
    /// Size of an element, and its alignment, in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// `"f32"`, `"f16"` or `"bf16"`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
        }
    }

    /// The dtype of a record that a table wrote.
    pub(crate) fn of_record(code: u32) -> Self {
        match code {
            abi::F32 => DType::F32,
            abi::F16 => DType::F16,
            _ => DType::BF16,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl TryFrom<i32> for DType {
    type Error = Error;

    /// The dtype with this code: 0 is f32, 1 is f16, 2 is bf16.
    ///
    /// # Errors
    /// [`Error::DType`] for any other code.
    fn try_from(code: i32) -> Result<Self> {
        match code {
            code if code == abi::F32 as i32 => Ok(DType::F32),
            code if code == abi::F16 as i32 => Ok(DType::F16),
            code if code == abi::BF16 as i32 => Ok(DType::BF16),
            code => Err(Error::DType { code }),
        }
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// Rust type of a gradient's elements: `f32`, [`half::f16`] or [`half::bf16`].
pub trait Element: bytemuck::Pod + Send + Sync + sealed::Sealed {
    /// The dtype of this type.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for f16 {
    const DTYPE: DType = DType::F16;
}
impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
}

/// The gradients of one parameter tensor: t (train), g (validation), one v_k per modality, and the blended gradient to
/// write.
///
/// Made from slices it borrows them and needs no `unsafe`. Made from raw addresses ([`from_raw`](Self::from_raw)) it
/// borrows nothing. All gradients of one tensor have one length and one dtype, which [`Blender::plan`](crate::Blender::plan)
/// checks; the tensors of one plan may differ in both.
///
/// ```
/// use gradblend::TensorGrads;
/// let (t, g) = ([0.5_f32, 1.0], [0.25, 1.5]);
/// let (video, audio) = ([1.0, 2.0], [3.0, 4.0]);
/// let mut blended = [0.0; 2];
/// // Three modalities; the loss of the third does not reach this tensor.
/// let tensor = TensorGrads::new(&t, &g, &[Some(&video), Some(&audio), None]).blended(&mut blended);
/// # let _ = tensor;
/// ```
#[derive(Debug)]
pub struct TensorGrads<'a> {
    pub(crate) train: Option<Grad>,
    pub(crate) valid: Option<Grad>,
    pub(crate) blended: Option<Grad>,
    modalities: [Option<Grad>; MAX_MODALITIES],
    count: usize,
    /// Length and dtype of the first gradient, or as given where all are absent.
    shape: (u64, DType),
    /// Whether a gradient is a slice. A call that uses a slice synchronizes before it returns.
    pub(crate) slices: bool,
    /// Gradients in memory that its owner tracks.
    pub(crate) tracked: Vec<Tracked<'a>>,
    borrow: PhantomData<&'a mut [u8]>,
}

impl<'a> TensorGrads<'a> {
    fn empty(shape: (u64, DType)) -> Self {
        TensorGrads {
            train: None,
            valid: None,
            blended: None,
            modalities: [None; MAX_MODALITIES],
            count: 0,
            shape,
            slices: false,
            tracked: Vec::new(),
            borrow: PhantomData,
        }
    }

    /// A tensor of gradients whose dtypes are known at run time: elements and dtype, t, g, one v_k per modality, and the blended
    /// gradient to write. Gradients of another length or dtype, and one of t and g alone, are errors of
    /// [`Blender::plan`](crate::Blender::plan).
    pub fn from_gradients(
        shape: (u64, DType),
        train: Option<Gradient<'a>>,
        valid: Option<Gradient<'a>>,
        modalities: impl IntoIterator<Item = Option<Gradient<'a>>>,
        blended: Option<GradientMut<'a>>,
    ) -> Self {
        let mut tensor = Self::empty(shape);
        tensor.train = train.map(|gradient| tensor.take(gradient));
        tensor.valid = valid.map(|gradient| tensor.take(gradient));
        for (k, gradient) in modalities.into_iter().enumerate() {
            let grad = gradient.map(|gradient| tensor.take(gradient));
            tensor.count = k + 1;
            if let Some(slot) = tensor.modalities.get_mut(k) {
                *slot = grad;
            }
        }
        tensor.blended = blended.map(|gradient| tensor.take(gradient.0));
        tensor
    }

    fn take(&mut self, gradient: Gradient<'a>) -> Grad {
        self.slices |= gradient.slice;
        self.tracked.extend(gradient.tracked);
        gradient.grad
    }

    /// A tensor with a train gradient t, a validation gradient g, and one gradient per modality; `None` for a loss that
    /// does not reach this tensor.
    pub fn new<T: Element>(train: &'a [T], valid: &'a [T], modalities: &[Option<&'a [T]>]) -> Self {
        let mut tensor = Self::blend_only(modalities);
        tensor.shape = (train.len() as u64, T::DTYPE);
        tensor.train = Some(Grad::from_slice(train));
        tensor.valid = Some(Grad::from_slice(valid));
        tensor
    }

    /// A tensor that is blended and adds nothing to the sums: for weights that were found offline.
    pub fn blend_only<T: Element>(modalities: &[Option<&'a [T]>]) -> Self {
        let len = modalities.iter().flatten().next().map_or(0, |v| v.len() as u64);
        let mut tensor = Self::empty((len, T::DTYPE));
        tensor.slices = true;
        tensor.count = modalities.len();
        for (slot, v) in tensor.modalities.iter_mut().zip(modalities) {
            *slot = v.map(Grad::from_slice);
        }
        tensor
    }

    /// Writes the blended gradient to `blended`.
    #[must_use]
    pub fn blended<T: Element>(mut self, blended: &'a mut [T]) -> Self {
        self.blended = Some(Grad::from_slice_mut(blended));
        self.with_slice()
    }

    /// Takes `gradient` as the gradient of modality `k` and writes the blended gradient over it.
    ///
    /// Modalities before `k` that were not given are absent. If the plan has no modality `k`, making it returns
    /// [`Error::ModalityCount`].
    #[must_use]
    pub fn in_place<T: Element>(mut self, k: usize, gradient: &'a mut [T]) -> Self {
        let grad = Some(Grad::from_slice_mut(gradient));
        self.blended = grad;
        self.count = self.count.max(k.saturating_add(1));
        if let Some(slot) = self.modalities.get_mut(k) {
            *slot = grad;
        }
        self.with_slice()
    }

    fn with_slice(mut self) -> Self {
        let first = self.buffers().next();
        if let Some((_, grad)) = first {
            self.shape = (grad.len, grad.dtype);
        }
        self.slices = true;
        self
    }

    /// A tensor from raw addresses: the only unsafe constructor.
    ///
    /// `len` is in elements. `modalities` has K addresses. A NULL modality is absent; `train` and `valid` may both be
    /// NULL (the tensor is only blended); a NULL `blended` is not written. Addresses need only the alignment of their
    /// element. They belong to memory that the blender's device can access. No operation reads them before it runs.
    ///
    /// # Safety
    /// From making a plan with this tensor, or updating a plan with it, until that plan is dropped, released or updated
    /// and all work submitted before that has finished (dropping a plan waits for it, releasing and updating do not):
    ///
    /// - every address other than NULL is the start of `len` elements of `dtype` in one allocation that stays alive;
    /// - while work on the plan is pending, nothing else writes to the inputs, and nothing else reads or writes
    ///   `blended` (on the CPU no work is pending after a call returns);
    /// - the `len` elements at `blended` may be written.
    ///
    /// A graph captured from work on the plan counts as pending work while it runs, and is not launched after the plan or
    /// its blender is dropped.
    pub unsafe fn from_raw(
        len: u64,
        dtype: DType,
        train: *const c_void,
        valid: *const c_void,
        modalities: &[*const c_void],
        blended: *mut c_void,
    ) -> Self {
        let mut tensor = Self::empty((len, dtype));
        tensor.train = Grad::from_raw(train.expose_provenance() as u64, len, dtype);
        tensor.valid = Grad::from_raw(valid.expose_provenance() as u64, len, dtype);
        tensor.blended = Grad::from_raw(blended.expose_provenance() as u64, len, dtype);
        tensor.count = modalities.len();
        for (slot, v) in tensor.modalities.iter_mut().zip(modalities) {
            *slot = Grad::from_raw(v.expose_provenance() as u64, len, dtype);
        }
        tensor
    }

    /// Elements of the tensor: of its train gradient, else of its first modality, else of its blended gradient.
    pub fn len(&self) -> u64 {
        self.shape.0
    }

    /// Whether the tensor has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Dtype of the tensor, taken from the same gradient as its length.
    pub fn dtype(&self) -> DType {
        self.shape.1
    }

    /// Number of modalities given, absent ones included.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// The modality gradients, absent ones included; at most `MAX_MODALITIES`.
    pub(crate) fn modalities(&self) -> &[Option<Grad>] {
        &self.modalities[..self.count.min(MAX_MODALITIES)]
    }

    /// The gradients that are present, with their roles.
    pub(crate) fn buffers(&self) -> impl Iterator<Item = (Role, Grad)> {
        let modalities = self.modalities().iter().enumerate().map(|(k, v)| (Role::Modality(k), *v));
        [(Role::Train, self.train), (Role::Valid, self.valid)]
            .into_iter()
            .chain(modalities)
            .chain([(Role::Blended, self.blended)])
            .filter_map(|(role, grad)| Some((role, grad?)))
    }
}

/// A borrowed stream of a device, on which operations submit their work: `cudaStream_t` or `CUstream`. The CPU ignores it.
///
/// With the feature `cuda`, a `&CudaStream` converts to one: `blender.step(&plan, (&stream).into())`. A blender
/// that is used with several streams makes each wait for its work on the one before; in a capture it does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamRef<'a>(u64, PhantomData<&'a ()>);

/// A stream that the caller keeps alive: [`from_raw`](StreamRef::from_raw) says how long.
pub type Stream = StreamRef<'static>;

impl StreamRef<'_> {
    /// A stream from its raw handle; NULL is the legacy default stream.
    ///
    /// # Safety
    /// - `stream` is NULL or a live stream of the device of every blender that it is used with;
    /// - it is not destroyed while work submitted to it is pending.
    pub unsafe fn from_raw(stream: *mut c_void) -> Self {
        StreamRef(stream.expose_provenance() as u64, PhantomData)
    }

    /// The raw handle.
    pub fn as_raw(self) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(self.0 as usize)
    }
}

impl Default for StreamRef<'_> {
    /// The legacy default stream; the CPU ignores it.
    fn default() -> Self {
        StreamRef(0, PhantomData)
    }
}

/// The factor s by which all gradients of an observation were scaled, as mixed-precision trainers do. Observing divides c
/// and d by s squared.
#[derive(Clone, Copy, Debug, Default)]
pub struct GradScale(pub(crate) Scale);

#[derive(Clone, Copy, Debug)]
pub(crate) enum Scale {
    Value(f32),
    Address(u64),
}

impl Default for Scale {
    fn default() -> Self {
        Scale::Value(1.0)
    }
}

impl GradScale {
    /// A scale given by its value.
    pub fn value(scale: f32) -> Self {
        GradScale(Scale::Value(scale))
    }

    /// A scale that each observation reads from memory of the blender's device. NULL is a scale of 1.
    ///
    /// # Safety
    /// Until another scale is set and all observations before that have finished, or the blender is dropped, and as long
    /// as a graph with such an observation is launched:
    ///
    /// - `scale` is NULL or the address of an `f32` that stays alive;
    /// - nothing writes to it while an observation is pending.
    pub unsafe fn from_raw(scale: *const f32) -> Self {
        match scale.expose_provenance() as u64 {
            0 => GradScale::default(),
            address => GradScale(Scale::Address(address)),
        }
    }
}
