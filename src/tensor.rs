//! Gradients and streams as the caller holds them: dtypes, addresses, and the one unsafe door through which raw
//! addresses come in.

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;

use half::{bf16, f16};

use crate::abi::MAX_MODALITIES;
use crate::error::{Error, Result, Role};

/// Element type of a tensor's gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum DType {
    /// IEEE 754 binary32.
    F32 = 0,
    /// IEEE 754 binary16.
    F16 = 1,
    /// The upper half of a binary32.
    BF16 = 2,
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
            0 => Ok(DType::F32),
            1 => Ok(DType::F16),
            2 => Ok(DType::BF16),
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

/// A Rust type that gradients come in: `f32`, [`half::f16`] or [`half::bf16`].
pub trait Element: Copy + Send + Sync + sealed::Sealed + 'static {
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

/// A list of elements somewhere in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grad {
    pub(crate) address: u64,
    pub(crate) len: u64,
    pub(crate) dtype: DType,
}

impl Grad {
    fn from_slice<T: Element>(slice: &[T]) -> Self {
        Grad { address: slice.as_ptr().expose_provenance() as u64, len: slice.len() as u64, dtype: T::DTYPE }
    }

    fn from_slice_mut<T: Element>(slice: &mut [T]) -> Self {
        Grad { address: slice.as_mut_ptr().expose_provenance() as u64, len: slice.len() as u64, dtype: T::DTYPE }
    }

    fn from_raw(address: u64, len: u64, dtype: DType) -> Option<Self> {
        (address != 0).then_some(Grad { address, len, dtype })
    }
}

/// The gradients of one parameter tensor: train t, validation g, one v_k per modality, and where to write the blend.
///
/// Made from slices it borrows them and needs no `unsafe`; made from raw addresses ([`from_raw`](Self::from_raw)) it
/// borrows nothing. All lists of one tensor have one length and one dtype, which is checked when a plan is made;
/// tensors of one plan may differ in both.
///
/// ```
/// use gradblend::TensorGrads;
/// let (t, g) = ([0.5_f32, 1.0], [0.25, 1.5]);
/// let (video, audio) = ([1.0, 2.0], [3.0, 4.0]);
/// let mut out = [0.0; 2];
/// // Three modalities; the third does not reach this tensor.
/// let tensor = TensorGrads::new(&t, &g, &[Some(&video), Some(&audio), None]).blended(&mut out);
/// # let _ = tensor;
/// ```
#[derive(Debug)]
pub struct TensorGrads<'a> {
    pub(crate) train: Option<Grad>,
    pub(crate) valid: Option<Grad>,
    pub(crate) blended: Option<Grad>,
    modalities: [Option<Grad>; MAX_MODALITIES],
    count: usize,
    /// Length and dtype when no list is there to tell them.
    shape: (u64, DType),
    /// Whether any list is a slice, which must not be in use any more once a call has returned.
    pub(crate) slices: bool,
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
            borrow: PhantomData,
        }
    }

    /// A tensor with a train gradient t, a validation gradient g, and one gradient per modality, `None` for a loss that
    /// does not reach this tensor.
    pub fn new<T: Element>(train: &'a [T], valid: &'a [T], modalities: &[Option<&'a [T]>]) -> Self {
        let mut tensor = Self::blend_only(modalities);
        tensor.shape = (train.len() as u64, T::DTYPE);
        tensor.train = Some(Grad::from_slice(train));
        tensor.valid = Some(Grad::from_slice(valid));
        tensor
    }

    /// A tensor that adds nothing to the sums and is only blended, as with weights that were found offline.
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
    /// A `k` that the tensor does not have is refused, as a wrong number of modalities, when a plan is made.
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

    /// After a slice that may be written to has come in: takes the shape of the first list.
    fn with_slice(mut self) -> Self {
        let first = self.lists().next();
        if let Some((_, grad)) = first {
            self.shape = (grad.len, grad.dtype);
        }
        self.slices = true;
        self
    }

    /// A tensor from raw addresses: the one unsafe door of this crate.
    ///
    /// `len` is in elements. `modalities` has K addresses. A NULL modality is absent; `train` and `valid` may both be
    /// NULL (the tensor is only blended); a NULL `blended` is not written to. Addresses need no more alignment than
    /// their element. They are those of the memory that the blender's device works on. No address is read before an
    /// operation runs.
    ///
    /// # Safety
    /// From the making of a plan with this tensor, or its update, until that plan is dropped, released or updated and the
    /// work that was put on a stream before that is done (dropping a plan waits for it, releasing and updating do not):
    ///
    /// - every address but NULL is the start of `len` elements of `dtype` in one allocation that stays alive;
    /// - while work on the plan is pending, nothing else writes to the inputs, and nothing else reads or writes
    ///   `blended` (on the CPU no work is pending once a call has returned);
    /// - the `len` elements at `blended` may be written to.
    ///
    /// A graph that was captured from work on the plan counts as pending work while it runs, and is not launched any more
    /// once the plan or its blender is dropped.
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

    /// Dtype of the tensor, found like its length.
    pub fn dtype(&self) -> DType {
        self.shape.1
    }

    /// How many modalities were given, absent ones included.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// The modality gradients, absent ones included (at most `MAX_MODALITIES` of them).
    pub(crate) fn modalities(&self) -> &[Option<Grad>] {
        &self.modalities[..self.count.min(MAX_MODALITIES)]
    }

    /// The lists that are there, with their names.
    pub(crate) fn lists(&self) -> impl Iterator<Item = (Role, Grad)> {
        let modalities = self.modalities().iter().enumerate().map(|(k, v)| (Role::Modality(k), *v));
        [(Role::Train, self.train), (Role::Valid, self.valid)]
            .into_iter()
            .chain(modalities)
            .chain([(Role::Blended, self.blended)])
            .filter_map(|(list, grad)| Some((list, grad?)))
    }
}

/// A stream of the device that work is put on: `cudaStream_t` or `CUstream`, borrowed. The CPU ignores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(u64);

impl Stream {
    /// Takes a raw stream handle; NULL is the legacy default stream.
    ///
    /// # Safety
    /// - `stream` is NULL or a live stream of the device of every blender it is used with;
    /// - it is not destroyed while work that was put on it is pending;
    /// - where it is not the only stream that a blender is used with, events order the work of that blender and the
    ///   updates of its plans as the calls are ordered.
    pub unsafe fn from_raw(stream: *mut c_void) -> Self {
        Stream(stream.expose_provenance() as u64)
    }

    /// The raw handle.
    pub fn as_raw(self) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(self.0 as usize)
    }
}

impl Default for Stream {
    /// The default stream; on the CPU, the only one.
    fn default() -> Self {
        Stream(0)
    }
}

/// The factor s that every gradient of an observation was scaled by, as mixed-precision trainers do. It is divided out:
/// c and d by s squared.
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
    /// A scale that stays as it is until another is set.
    pub fn value(scale: f32) -> Self {
        GradScale(Scale::Value(scale))
    }

    /// A scale that is read at each observation from memory of the blender's device. NULL is a scale of 1.
    ///
    /// # Safety
    /// Until another scale is set and the observations before that are done, or the blender is dropped; and as long as a
    /// graph with such an observation is launched:
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
