//! Gradients as DLPack arrays, the exchange format of array libraries: from any framework, without a copy.
//!
//! Records and names are those of the DLPack specification 1.0. A pointer to another crate's or framework's records of the
//! same specification can be cast to these.

use std::ffi::c_void;
use std::fmt;
use std::ptr::{null, null_mut};

use crate::abi::MAX_MODALITIES;
use crate::device::Device;
use crate::error::{Error, Result, Role};
use crate::tensor::{DType, TensorGrads};

/// Device of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct DLDevice {
    /// 1 is the CPU, 2 CUDA, 3 host memory pinned by CUDA, 13 CUDA's managed memory.
    pub device_type: i32,
    /// Ordinal of the device.
    pub device_id: i32,
}

/// Element type of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct DLDataType {
    /// 2 is IEEE 754, 4 is bfloat.
    pub code: u8,
    /// Bits of an element.
    pub bits: u8,
    /// Numbers in an element; 1 for gradients.
    pub lanes: u16,
}

/// An array.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct DLTensor {
    /// Start of the memory.
    pub data: *mut c_void,
    /// Device of the memory.
    pub device: DLDevice,
    /// Number of dimensions.
    pub ndim: i32,
    /// Type of the elements.
    pub dtype: DLDataType,
    /// Elements in each dimension.
    pub shape: *mut i64,
    /// Elements from one index to the next in each dimension; NULL for a contiguous array in row-major order.
    pub strides: *mut i64,
    /// Bytes from `data` to the first element.
    pub byte_offset: u64,
}

/// An array and its owner.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct DLManagedTensor {
    /// The array.
    pub dl_tensor: DLTensor,
    /// Data of the owner.
    pub manager_ctx: *mut c_void,
    /// Returns the array to its owner. gradblend never calls it.
    pub deleter: Option<unsafe extern "C" fn(*mut DLManagedTensor)>,
}

/// Version of the specification that a record follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct DLPackVersion {
    /// Major version. Only records of version 1 have this layout.
    pub major: u32,
    /// Minor version.
    pub minor: u32,
}

/// An array and its owner, from specification 1.0 on.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct DLManagedTensorVersioned {
    /// Version of the specification.
    pub version: DLPackVersion,
    /// Data of the owner.
    pub manager_ctx: *mut c_void,
    /// Returns the array to its owner. gradblend never calls it.
    pub deleter: Option<unsafe extern "C" fn(*mut DLManagedTensorVersioned)>,
    /// Bit 0: the array must not be written to.
    pub flags: u64,
    /// The array.
    pub dl_tensor: DLTensor,
}

/// An array in either form.
#[derive(Clone, Copy, Debug)]
pub enum Dlpack {
    /// From a capsule named "dltensor".
    Managed(*const DLManagedTensor),
    /// From a capsule named "dltensor_versioned".
    Versioned(*const DLManagedTensorVersioned),
}

const READ_ONLY: u64 = 1;
const CPU: i32 = 1;
const CUDA: i32 = 2;
const CUDA_HOST: i32 = 3;
const CUDA_MANAGED: i32 = 13;

/// The gradients of one tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrays {
    pub(crate) len: u64,
    pub(crate) dtype: DType,
    pub(crate) train: *const c_void,
    pub(crate) valid: *const c_void,
    pub(crate) modalities: [*const c_void; MAX_MODALITIES],
    pub(crate) blended: *mut c_void,
}

impl TensorGrads<'_> {
    /// A tensor from DLPack arrays. `None` is absent, as NULL is in [`from_raw`](Self::from_raw).
    ///
    /// Each array is on `device` (the CPU also takes CUDA's pinned and managed memory, a CUDA device too), float32,
    /// float16 or bfloat16, and dense: its elements fill its memory in any order of the dimensions, transposed or with the
    /// channels last too. All have one dtype, the same number of elements, and the same order of them in memory; shapes may
    /// differ otherwise. Arrays of no elements give an empty tensor without addresses.
    ///
    /// A [`Dlpack::Managed`] record cannot say that its array is read-only: for `blended`, the caller has to know.
    ///
    /// # Errors
    /// [`Error::Dlpack`], which names the role of the array; [`Error::NoArray`] where all are absent; [`Error::Modalities`] for more
    /// than 32.
    ///
    /// # Safety
    /// - each pointer is the address of a record of its type, whose `shape` and `strides` have `ndim` numbers unless they
    ///   are NULL;
    /// - the memory of the arrays fulfils the contract of [`from_raw`](Self::from_raw). Deleters are never called, so the
    ///   caller keeps the arrays alive that long.
    pub unsafe fn from_dlpack(
        device: &Device,
        train: Option<Dlpack>,
        valid: Option<Dlpack>,
        modalities: &[Option<Dlpack>],
        blended: Option<Dlpack>,
    ) -> Result<Self> {
        // SAFETY: the caller fulfils the contract of `from_dlpack`, which has those of `read` and `from_raw`.
        unsafe {
            let arrays = read(device.ordinal(), train, valid, modalities, blended)?;
            let v = &arrays.modalities[..modalities.len()];
            Ok(Self::from_raw(arrays.len, arrays.dtype, arrays.train, arrays.valid, v, arrays.blended))
        }
    }
}

/// Reads the records of one tensor's arrays for a CUDA device with this ordinal, or for the CPU.
///
/// # Safety
/// As of [`TensorGrads::from_dlpack`], for the records.
pub(crate) unsafe fn read(
    ordinal: Option<i32>,
    train: Option<Dlpack>,
    valid: Option<Dlpack>,
    modalities: &[Option<Dlpack>],
    blended: Option<Dlpack>,
) -> Result<Arrays> {
    if modalities.len() > MAX_MODALITIES {
        return Err(Error::Modalities { got: modalities.len() as u64 });
    }
    let mut like: Option<(Role, Layout<'_>, DType)> = None;
    let mut address = |role: Role, array: Option<Dlpack>| {
        let Some(array) = array else { return Ok(null_mut()) };
        // SAFETY: the caller guarantees the records.
        let (address, layout, dtype) = unsafe { check(ordinal, role, array) }?;
        let (first, expected, expected_dtype) = *like.get_or_insert((role, layout, dtype));
        if layout.len != expected.len {
            return Err(bad(role, format!("{} elements, as the {first} has", expected.len), layout.len));
        }
        if layout.len > 0 && !layout.runs().eq(expected.runs()) {
            return Err(bad(role, format!("elements in the order of the {first}, {expected}"), layout));
        }
        if dtype != expected_dtype {
            return Err(bad(role, format!("{expected_dtype}, as the {first} is"), dtype));
        }
        Ok(address)
    };
    let train = address(Role::Train, train)?.cast_const();
    let valid = address(Role::Valid, valid)?.cast_const();
    let mut v = [null(); MAX_MODALITIES];
    for (k, (slot, array)) in v.iter_mut().zip(modalities).enumerate() {
        *slot = address(Role::Modality(k), *array)?.cast_const();
    }
    let blended = address(Role::Blended, blended)?;
    let (_, Layout { len, .. }, dtype) = like.ok_or(Error::NoArray)?;
    if len == 0 {
        // Frameworks give empty arrays any address: NULL, which would mean absent, or an address that several share.
        let modalities = [null(); MAX_MODALITIES];
        return Ok(Arrays { len, dtype, train: null(), valid: null(), modalities, blended: null_mut() });
    }
    Ok(Arrays { len, dtype, train, valid, modalities: v, blended })
}

/// Address, layout and dtype of one array.
///
/// # Safety
/// As of [`read`].
unsafe fn check<'a>(ordinal: Option<i32>, role: Role, array: Dlpack) -> Result<(*mut c_void, Layout<'a>, DType)> {
    let bad = |expected: &str, got: String| Err(bad(role, expected, got));
    let (missing, misaligned) = match array {
        Dlpack::Managed(managed) => (managed.is_null(), !managed.is_aligned()),
        Dlpack::Versioned(versioned) => (versioned.is_null(), !versioned.is_aligned()),
    };
    if missing || misaligned {
        return bad("the address of a record", if missing { "NULL" } else { "one that is not aligned" }.into());
    }
    let tensor = match array {
        // SAFETY: the caller guarantees a record of this type.
        Dlpack::Managed(managed) => unsafe { (*managed).dl_tensor },
        Dlpack::Versioned(versioned) => {
            // SAFETY: `version` and `flags` have the same place in every version of the record.
            let (version, flags) = unsafe { ((*versioned).version, (*versioned).flags) };
            if version.major != 1 {
                return bad("DLPack of major version 1", format!("{}.{}", version.major, version.minor));
            }
            if role == Role::Blended && flags & READ_ONLY != 0 {
                return bad("an array that may be written to", "a read-only one".into());
            }
            // SAFETY: the record has the layout of major version 1.
            unsafe { (*versioned).dl_tensor }
        }
    };
    check_device(ordinal, role, tensor.device)?;
    let DLDataType { code, bits, lanes } = tensor.dtype;
    let dtype = match (code, bits, lanes) {
        (2, 32, 1) => DType::F32,
        (2, 16, 1) => DType::F16,
        (4, 16, 1) => DType::BF16,
        _ => return bad("float32, float16 or bfloat16", type_name(code, bits, lanes)),
    };
    // SAFETY: the caller guarantees `ndim` numbers of shape and strides.
    let layout = unsafe { layout(role, &tensor) }?;
    let len = layout.len;
    if len.checked_mul(dtype.bytes()).is_none_or(|bytes| bytes > isize::MAX as u64) {
        return bad("an array that fits into memory", format!("{len} elements"));
    }
    if len == 0 {
        return Ok((null_mut(), layout, dtype));
    }
    if tensor.data.is_null() {
        return bad("data", "NULL".into());
    }
    let end = (tensor.data.addr() as u64).checked_add(tensor.byte_offset).filter(|end| usize::try_from(*end).is_ok());
    let Some(start) = end else {
        return bad("a byte offset within memory", tensor.byte_offset.to_string());
    };
    if !start.is_multiple_of(dtype.bytes()) {
        return bad(&format!("an address aligned to {} bytes", dtype.bytes()), format!("{start:#x}"));
    }
    Ok((tensor.data.wrapping_byte_add(tensor.byte_offset as usize), layout, dtype))
}

fn bad(role: Role, expected: impl ToString, got: impl ToString) -> Error {
    Error::Dlpack { role, expected: expected.to_string(), got: got.to_string() }
}

fn check_device(ordinal: Option<i32>, role: Role, device: DLDevice) -> Result<()> {
    let fits = match device.device_type {
        CUDA_HOST | CUDA_MANAGED => true,
        CPU => ordinal.is_none(),
        CUDA => ordinal == Some(device.device_id),
        _ => false,
    };
    if fits {
        return Ok(());
    }
    let expected = ordinal.map_or("memory of the CPU".into(), |ordinal| format!("memory of CUDA device {ordinal}"));
    // By the numbers of dlpack.h.
    let got = match device.device_type {
        CPU => "memory of the CPU".into(),
        CUDA => format!("memory of CUDA device {}", device.device_id),
        8 => "memory of Metal".into(),
        10 | 11 => "memory of ROCm".into(),
        14 => "memory of oneAPI".into(),
        other => format!("memory of device type {other}"),
    };
    Err(bad(role, expected, got))
}

/// Name of an element type, by the numbers of dlpack.h.
fn type_name(code: u8, bits: u8, lanes: u16) -> String {
    const NUMBERS: [&str; 6] = ["int", "uint", "float", "handle", "bfloat", "complex"];
    #[rustfmt::skip]
    const OTHERS: [&str; 12] = [
        "bool", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
        "float8_e5m2fnuz", "float8_e8m0fnu", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn",
    ];
    let code = usize::from(code);
    let name = match (NUMBERS.get(code), OTHERS.get(code.wrapping_sub(NUMBERS.len()))) {
        (Some(number), _) => format!("{number}{bits}"),
        (_, Some(other)) => (*other).to_owned(),
        _ => format!("type code {code} of {bits} bits"),
    };
    if lanes == 1 { name } else { format!("vectors of {lanes} {name}") }
}

/// Where the elements of an array are.
#[derive(Clone, Copy)]
struct Layout<'a> {
    /// Number of elements.
    len: u64,
    shape: &'a [i64],
    /// `None` for row-major order.
    strides: Option<&'a [i64]>,
}

impl Layout<'_> {
    /// Size and stride of each dimension, from the last to the first. Dimensions that lie in memory as one are one, and
    /// those of size 1 are left out, so two arrays have the same order of elements if and only if these are equal.
    fn runs(&self) -> impl Iterator<Item = (i64, i64)> {
        let mut row_major = 1_i64;
        let dimensions = self.shape.iter().enumerate().rev().map(move |(i, size)| {
            let stride = self.strides.map_or(row_major, |strides| strides[i]);
            row_major = row_major.saturating_mul(*size);
            (*size, stride)
        });
        let mut dimensions = dimensions.filter(|(size, _)| *size != 1).peekable();
        std::iter::from_fn(move || {
            let (mut size, stride) = dimensions.next()?;
            let adjoins = |size: i64, next: &(i64, i64)| size.checked_mul(stride) == Some(next.1);
            while let Some((more, _)) = dimensions.next_if(|next| adjoins(size, next)) {
                size = size.saturating_mul(more);
            }
            Some((size, stride))
        })
    }

    /// Whether the elements fill their memory: some order of the dimensions has the strides of a row-major array.
    fn is_dense(&self) -> bool {
        let (mut stride, mut found) = (1, 0);
        while let Some((size, _)) = self.runs().find(|(_, of)| *of == stride) {
            stride = stride.saturating_mul(size);
            found += 1;
        }
        found == self.runs().count()
    }
}

impl fmt::Display for Layout<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.strides {
            Some(strides) => write!(f, "shape {:?} with strides {strides:?}", self.shape),
            None => write!(f, "shape {:?} in row-major order", self.shape),
        }
    }
}

/// Layout of an array, if it is dense.
///
/// # Safety
/// `shape` and `strides` have `ndim` numbers where they are not NULL.
unsafe fn layout<'a>(role: Role, tensor: &DLTensor) -> Result<Layout<'a>> {
    let Ok(ndim) = usize::try_from(tensor.ndim) else {
        return Err(bad(role, "a number of dimensions of at least 0", tensor.ndim));
    };
    let numbers = |address: *mut i64| {
        if ndim == 0 || address.is_null() {
            return Ok(None);
        }
        if !address.is_aligned() {
            return Err(bad(role, "an aligned shape and strides", format!("{address:?}")));
        }
        // SAFETY: the caller guarantees `ndim` numbers, and the address is aligned.
        Ok(Some(unsafe { std::slice::from_raw_parts(address, ndim) }))
    };
    let shape = match numbers(tensor.shape)? {
        Some(shape) => shape,
        None if ndim == 0 => &[],
        None => return Err(bad(role, "a shape", "NULL")),
    };
    if let Some(dimension) = shape.iter().find(|dimension| **dimension < 0) {
        return Err(bad(role, "dimensions of at least 0", dimension));
    }
    let mut layout = Layout { len: 0, shape, strides: None };
    if shape.contains(&0) {
        return Ok(layout);
    }
    let len = shape.iter().try_fold(1_i64, |len, dimension| len.checked_mul(*dimension));
    layout.len = len.ok_or_else(|| bad(role, "an array that fits into memory", format!("shape {shape:?}")))? as u64;
    layout.strides = numbers(tensor.strides)?;
    if layout.is_dense() { Ok(layout) } else { Err(bad(role, "a dense array", layout)) }
}
