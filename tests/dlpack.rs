//! Tensors from DLPack arrays: every shape, dtype and device that is accepted, and every fault that is not, in both
//! forms of the record.

use std::ffi::c_void;
use std::ptr::null_mut;

use gradblend::dlpack::{
    DLDataType, DLDevice, DLManagedTensor, DLManagedTensorVersioned, DLPackVersion, DLTensor, Dlpack,
};
use gradblend::{DType, Device, Error, Role};
use gradblend_testkit::{Face, Input, Outcome, Random, Result, Sample, bits, rejected, rejected_as};

gradblend_testkit::tests! {
    each_dtype: converted_tensors_work;
    host: faults, versions_and_flags, shapes, dtypes, devices, arrays_that_differ, empty_and_absent;
}

const F32: DLDataType = DLDataType { code: 2, bits: 32, lanes: 1 };
const ROLES: [Role; 5] = [Role::Train, Role::Valid, Role::Modality(0), Role::Modality(1), Role::Blended];
const INVALID_ARGUMENT: i32 = 1;

/// Arrays stay those of the framework: a call of a deleter ends the test program.
unsafe extern "C" fn managed_deleter(_: *mut DLManagedTensor) {
    std::process::abort();
}

/// As `managed_deleter`.
unsafe extern "C" fn versioned_deleter(_: *mut DLManagedTensorVersioned) {
    std::process::abort();
}

/// An array as a framework has it. `tensor.shape` and `tensor.strides` are set from the vectors, displaced by some
/// bytes.
struct Array {
    shape: Vec<i64>,
    strides: Option<Vec<i64>>,
    displaced: [usize; 2],
    tensor: DLTensor,
    major: u32,
    flags: u64,
    is_versioned: bool,
    managed: DLManagedTensor,
    versioned: DLManagedTensorVersioned,
}

impl Array {
    /// Six f32 numbers of shape 2 x 3 at `data` on the CPU.
    fn new(data: *mut c_void) -> Box<Self> {
        let (device, dtype) = (DLDevice { device_type: 1, device_id: 0 }, F32);
        let tensor = DLTensor { data, device, ndim: 2, dtype, shape: null_mut(), strides: null_mut(), byte_offset: 0 };
        let (manager_ctx, version) = (null_mut(), DLPackVersion { major: 1, minor: 7 });
        let managed = DLManagedTensor { dl_tensor: tensor, manager_ctx, deleter: Some(managed_deleter) };
        let versioned = DLManagedTensorVersioned {
            version,
            manager_ctx,
            deleter: Some(versioned_deleter),
            flags: 0,
            dl_tensor: tensor,
        };
        let (shape, strides) = (vec![2, 3], Some(vec![3, 1]));
        Box::new(Array {
            shape,
            strides,
            displaced: [0; 2],
            tensor,
            major: 1,
            flags: 0,
            is_versioned: false,
            managed,
            versioned,
        })
    }

    fn record(&mut self) -> Dlpack {
        if !self.shape.is_empty() {
            self.tensor.shape = self.shape.as_mut_ptr().wrapping_byte_add(self.displaced[0]);
        }
        if let Some(strides) = &mut self.strides {
            self.tensor.strides = strides.as_mut_ptr().wrapping_byte_add(self.displaced[1]);
        }
        self.managed.dl_tensor = self.tensor;
        self.versioned.dl_tensor = self.tensor;
        (self.versioned.version.major, self.versioned.flags) = (self.major, self.flags);
        if self.is_versioned { Dlpack::Versioned(&self.versioned) } else { Dlpack::Managed(&self.managed) }
    }

    fn address(&self) -> *const c_void {
        self.tensor.data.wrapping_byte_add(self.tensor.byte_offset as usize)
    }
}

/// The arrays of a tensor of two modalities, in the order of [`ROLES`]; `None` is absent.
type Arrays = [Option<Box<Array>>; 5];

fn convert_for(face: Face, device: i32, arrays: &mut Arrays) -> Result<Input<'static>> {
    let [train, valid, v0, v1, blended] = arrays.each_mut().map(|array| array.as_mut().map(|array| array.record()));
    // SAFETY: live records with shapes and strides of `ndim` numbers; where a plan is made of the result, its memory lives
    // until the plan is dropped.
    unsafe { face.from_dlpack(device, train, valid, &[v0, v1], blended) }
}

/// Converts one array in this role, the others absent, and checks the length and the address.
fn convert_one(face: Face, role: usize, is_versioned: bool, change: &dyn Fn(&mut Array)) -> Result<(u64, DType)> {
    let mut memory = [0.0_f32; 64];
    let mut array = Array::new(memory.as_mut_ptr().cast());
    array.is_versioned = is_versioned;
    change(&mut array);
    let mut arrays = [None, None, None, None, None];
    arrays[role] = Some(array);
    let input = convert_for(face, -1, &mut arrays)?;
    if let Input::Addresses(a) = &input {
        let got = [a.train, a.valid, a.modalities[0], a.modalities[1], a.blended.cast_const()];
        for (got, array) in got.iter().zip(&arrays) {
            let want = array.as_ref().filter(|_| a.len > 0).map_or(std::ptr::null(), |array| array.address());
            assert_eq!(*got, want);
        }
    }
    let grads = input.grads();
    Ok((grads.len(), grads.dtype()))
}

/// Checks that a change of an array is rejected in every role and form, by a message that names the role.
#[track_caller]
fn check_rejected(face: Face, words: &str, change: &dyn Fn(&mut Array)) {
    for (i, role) in ROLES.into_iter().enumerate() {
        for is_versioned in [false, true] {
            let result = convert_one(face, i, is_versioned, change);
            let failure = rejected_as(result, INVALID_ARGUMENT, &format!("{role}: |{words}"));
            if let Some(error) = failure.error {
                assert!(matches!(error, Error::Dlpack { role: got, .. } if got == role), "{error:?}");
            }
        }
    }
}

/// Checks that a change of an array is accepted in every role and form.
#[track_caller]
fn check_accepted(face: Face, len: u64, change: &dyn Fn(&mut Array)) -> Outcome {
    for (i, is_versioned) in (0..5).flat_map(|i| [(i, false), (i, true)]) {
        assert_eq!(convert_one(face, i, is_versioned, change)?, (len, DType::F32));
    }
    Ok(())
}

fn faults(face: Face) -> Outcome {
    check_accepted(face, 6, &|_| ())?;
    check_rejected(face, "data|NULL", &|a| a.tensor.data = null_mut());
    check_rejected(face, "shape|NULL", &|a| a.shape.clear());
    check_rejected(face, "aligned", &|a| a.displaced[0] = 4);
    check_rejected(face, "aligned", &|a| a.displaced[1] = 4);
    for ndim in [-1, i32::MIN] {
        check_rejected(face, &format!("number of dimensions|{ndim}"), &|a| a.tensor.ndim = ndim);
    }
    for byte_offset in [1, 2, 1023] {
        check_rejected(face, "aligned to 4 bytes", &|a| a.tensor.byte_offset = byte_offset);
    }
    for byte_offset in [u64::MAX, u64::MAX - 1, 1 << 63 | 2] {
        check_rejected(face, "", &|a| a.tensor.byte_offset = byte_offset);
    }
    check_rejected(face, "byte offset", &|a| a.tensor.byte_offset = (a.tensor.data as u64).wrapping_neg());
    // The first element is what must be aligned.
    let displaced = |a: &mut Array, byte_offset| {
        a.tensor.data = a.tensor.data.wrapping_byte_add(2);
        a.tensor.byte_offset = byte_offset;
    };
    check_accepted(face, 6, &|a| displaced(a, 6))?;
    check_rejected(face, "aligned to 4 bytes", &|a| displaced(a, 8));
    for device_type in [0, 4, 7, 8, 10, 11, 12, 14, 16, -1] {
        let name = match device_type {
            8 => "memory of Metal".into(),
            10 | 11 => "memory of ROCm".into(),
            14 => "memory of oneAPI".into(),
            _ => format!("memory of device type {device_type}"),
        };
        check_rejected(face, &name, &|a| a.tensor.device.device_type = device_type);
    }
    for lanes in [0, 2, 257] {
        check_rejected(face, &format!("vectors of {lanes} float32"), &|a| a.tensor.dtype.lanes = lanes);
    }
    Ok(())
}

fn versions_and_flags(face: Face) -> Outcome {
    for (i, role) in ROLES.into_iter().enumerate() {
        for major in [0, 2, 3] {
            let result = convert_one(face, i, true, &|a| a.major = major);
            rejected_as(
                result,
                INVALID_ARGUMENT,
                &format!("{role}: expected DLPack of major version 1, got {major}.7"),
            );
        }
        // Bit 0: read-only, which only the blended gradient may not be. Bit 1: the array is a copy. Others are to come.
        for flags in 0..8 {
            let result = convert_one(face, i, true, &|a| a.flags = flags);
            match role == Role::Blended && flags & 1 != 0 {
                true => drop(rejected_as(result, INVALID_ARGUMENT, &format!("{role}: |read-only"))),
                false => assert_eq!(result?, (6, DType::F32)),
            }
        }
    }
    Ok(())
}

/// Shape, strides, and the number of elements if the array is accepted.
type Shape<'a> = (&'a [i64], Option<&'a [i64]>, Option<u64>);

const SHAPES: [Shape<'_>; 39] = [
    (&[], None, Some(1)),
    (&[], Some(&[5]), Some(1)),
    (&[6], None, Some(6)),
    (&[6], Some(&[1]), Some(6)),
    (&[6], Some(&[2]), None),
    (&[6], Some(&[0]), None),
    (&[6], Some(&[-1]), None),
    // A dimension of one element may have any stride.
    (&[1], Some(&[99]), Some(1)),
    (&[1], Some(&[i64::MIN]), Some(1)),
    (&[0], None, Some(0)),
    (&[0], Some(&[77]), Some(0)),
    (&[-1], None, None),
    (&[i64::MIN], None, None),
    (&[i64::MAX], None, None),
    (&[1 << 61], None, None),
    (&[2, 3], Some(&[3, 1]), Some(6)),
    (&[2, 3], Some(&[1, 2]), Some(6)),
    (&[2, 3], Some(&[1, 1]), None),
    (&[2, 3], Some(&[1, 3]), None),
    (&[2, 3], Some(&[4, 1]), None),
    (&[2, 3], Some(&[3, 2]), None),
    (&[2, 3], Some(&[0, 1]), None),
    (&[2, 3], Some(&[-3, 1]), None),
    (&[1, 6], Some(&[99, 1]), Some(6)),
    (&[6, 1], Some(&[1, -7]), Some(6)),
    (&[2, 0], Some(&[8, 8]), Some(0)),
    (&[0, -1], None, None),
    (&[-2, -3], None, None),
    (&[3, -2], Some(&[-2, 1]), None),
    (&[1 << 32, 1 << 32], None, None),
    (&[1 << 32, 1 << 32], Some(&[1 << 32, 1]), None),
    (&[1 << 62, 4, 0], None, Some(0)),
    (&[2, 1, 3], Some(&[3, 1000, 1]), Some(6)),
    (&[1, 2, 1, 3], Some(&[0, 3, 0, 1]), Some(6)),
    (&[2, 3, 2, 2], Some(&[12, 4, 2, 1]), Some(24)),
    (&[2, 3, 2, 2], Some(&[12, 2, 4, 1]), None),
    // Channels last.
    (&[2, 3, 2, 2], Some(&[12, 1, 6, 3]), Some(24)),
    (&[2, 3, 1, 2], Some(&[6, 1, 99, 3]), Some(12)),
    (&[1, 1, 1, 1], Some(&[-1, 0, 7, 9]), Some(1)),
];

fn shapes(face: Face) -> Outcome {
    for (shape, strides, len) in SHAPES {
        let change = |a: &mut Array| {
            (a.shape, a.strides, a.tensor.ndim) = (shape.to_vec(), strides.map(<[i64]>::to_vec), shape.len() as i32);
        };
        match len {
            Some(len) => check_accepted(face, len, &change)?,
            None => check_rejected(face, "expected", &change),
        }
        // An array without elements may have any address, NULL included.
        if len == Some(0) {
            check_accepted(face, 0, &|a| {
                change(a);
                a.tensor.data = null_mut();
            })?;
        }
    }
    check_rejected(face, "a dense array, got shape [2, 3] with strides [1, 1]", &|a| a.strides = Some(vec![1, 1]));
    Ok(())
}

fn dtypes(face: Face) -> Outcome {
    let mut accepted = 0;
    for code in 0..=255_u8 {
        for bits in (0..=248).step_by(if code < 8 { 8 } else { 16 }).chain([31]) {
            let role = usize::from(code) % 5;
            let result =
                convert_one(face, role, bits % 64 == 0, &|a| a.tensor.dtype = DLDataType { code, bits, lanes: 1 });
            let want = match (code, bits) {
                (2, 32) => DType::F32,
                (2, 16) => DType::F16,
                (4, 16) => DType::BF16,
                _ => {
                    let names = ["int", "uint", "float", "handle", "bfloat", "complex"];
                    let name = match code {
                        6 => "got bool".into(),
                        // As PyTorch calls them, from dlpack.h.
                        8 => "got float8_e4m3".into(),
                        10 => "got float8_e4m3fn".into(),
                        12 => "got float8_e5m2".into(),
                        17 => "got float4_e2m1fn".into(),
                        7..17 => "got float".into(),
                        18.. => format!("got type code {code} of {bits} bits"),
                        _ => format!("got {}{bits}", names[usize::from(code)]),
                    };
                    let words = format!("{}: |{name}", ROLES[role]);
                    rejected_as(result, INVALID_ARGUMENT, &words);
                    continue;
                }
            };
            assert_eq!(result?, (6, want));
            accepted += 1;
        }
    }
    assert_eq!(accepted, 3);
    Ok(())
}

/// Where an array may lie, by the device asked for. C converts for devices that are not there.
fn devices(face: Face) -> Outcome {
    let (cpu, cuda, pinned, managed) = (1, 2, 3, 13);
    for (device, device_type, device_id, accepted) in [
        (-1, cpu, 0, true),
        (-1, cuda, 0, false),
        (-1, cuda, -1, false),
        (-1, pinned, 0, true),
        (-1, managed, 3, true),
        (0, cpu, 0, false),
        (0, cuda, 0, true),
        (0, cuda, 1, false),
        (0, pinned, 0, true),
        (0, managed, 0, true),
        (0, 10, 0, false),
        (1, cuda, 0, false),
        (1, cuda, 1, true),
        (1, cuda, -1, false),
    ] {
        if !face.c && device >= 0 && Device::cuda(device).is_err() {
            continue;
        }
        let mut memory = [0.0_f32; 6];
        let mut arrays = [(); 5].map(|()| Some(Array::new(memory.as_mut_ptr().cast())));
        for array in arrays.iter_mut().flatten() {
            array.tensor.device = DLDevice { device_type, device_id };
        }
        match convert_for(face, device, &mut arrays) {
            Ok(_) => assert!(accepted, "device type {device_type}, id {device_id} for device {device}"),
            other => {
                assert!(!accepted, "{other:?}");
                rejected_as(other, INVALID_ARGUMENT, "train gradient: |expected memory of");
            }
        }
    }
    if face.c {
        for device in [-2, i32::MIN] {
            let mut arrays = [None, None, Some(Array::new(null_mut())), None, None];
            rejected_as(convert_for(face, device, &mut arrays), INVALID_ARGUMENT, "device");
        }
    }
    Ok(())
}

/// The array that is named is the one that differs from those before it.
fn arrays_that_differ(face: Face) -> Outcome {
    let mut memory = [0.0_f32; 6];
    let data = memory.as_mut_ptr().cast();
    let convert = |i: usize, change: &dyn Fn(&mut Array)| {
        let mut arrays = [(); 5].map(|()| Some(Array::new(data)));
        arrays[i].iter_mut().for_each(|array| change(array));
        convert_for(face, -1, &mut arrays)
    };
    for (i, role) in ROLES.into_iter().enumerate().skip(1) {
        for rows in [0, 1] {
            let words = format!("{role}: expected 6 elements, as the train gradient has, got {}", 3 * rows);
            rejected_as(convert(i, &|a| a.shape[0] = rows), INVALID_ARGUMENT, &words);
        }
        let words = format!("{role}: expected f32, as the train gradient is, got f16");
        rejected_as(convert(i, &|a| a.tensor.dtype.bits = 16), INVALID_ARGUMENT, &words);
        let words = format!(
            "{role}: expected elements in the order of the train gradient, shape [2, 3] with strides [3, 1], \
             got shape [2, 3] with strides [1, 2]"
        );
        rejected_as(convert(i, &|a| a.strides = Some(vec![1, 2])), INVALID_ARGUMENT, &words);
        // The shape may differ.
        convert(i, &|a| (a.shape, a.strides, a.tensor.ndim, a.tensor.strides) = (vec![6], None, 1, null_mut()))?;
    }
    Ok(())
}

fn empty_and_absent(face: Face) -> Outcome {
    rejected(convert_for(face, -1, &mut [None, None, None, None, None]), &Error::NoArray, "absent");
    // SAFETY: there is no record.
    let too_many = unsafe { face.from_dlpack(-1, None, None, &[None; 33], None) };
    rejected(too_many, &Error::Modalities { got: 33 }, "33");
    if !face.c {
        for record in [Dlpack::Managed(std::ptr::null()), Dlpack::Versioned(std::ptr::null())] {
            // SAFETY: NULL is rejected, not read.
            let result = unsafe { face.from_dlpack(-1, Some(record), None, &[None], None) };
            rejected_as(result, INVALID_ARGUMENT, "train gradient: expected the address of a record, got NULL");
        }
    }
    // Empty arrays have no address, so they may all have the same one.
    let mut arrays = [(); 5].map(|()| Some(Array::new(std::ptr::without_provenance_mut(64))));
    arrays.iter_mut().flatten().for_each(|array| array.shape[0] = 0);
    face.blender(2)?.plan(vec![convert_for(face, -1, &mut arrays)?])?;
    Ok(())
}

/// A step on the converted tensor has the bits of one on the same addresses.
fn converted_tensors_work<T: Sample>(face: Face) -> Outcome {
    let mut random = Random(7);
    let (code, bits_of_dtype) = match T::DTYPE {
        DType::F32 => (2, 32),
        DType::F16 => (2, 16),
        DType::BF16 => (4, 16),
    };
    for round in 0..20 {
        let (rows, offset) = (round % 4, random.below(8));
        let mut blends = Vec::new();
        let elements: [Vec<T>; 5] = [(); 5].map(|()| random.numbers(30).into_iter().map(T::round).collect());
        let present = [true, true, random.below(4) != 0, random.below(4) != 0, random.below(4) != 0];
        let forms = [(); 5].map(|()| (random.below(2) == 0, random.below(2) == 0));
        let transposed = round >= 10;
        for by_address in [false, true] {
            let memory = elements.clone().map(|elements| face.array(elements));
            let mut arrays: Arrays = std::array::from_fn(|i| {
                let mut array = Array::new(memory[i].address().cast());
                array.tensor.device.device_type = if face.cuda { 2 } else { 1 };
                array.tensor.dtype = DLDataType { code, bits: bits_of_dtype, lanes: 1 };
                array.tensor.byte_offset = (offset * size_of::<T>()) as u64;
                array.shape[0] = rows;
                array.is_versioned = forms[i].0;
                array.strides = array.strides.filter(|_| forms[i].1);
                if transposed {
                    // An axis of one element between them has any stride.
                    (array.shape, array.tensor.ndim) = (vec![rows, 1, 3], 3);
                    array.strides = Some(vec![1, i as i64, rows]);
                }
                present[i].then_some(array)
            });
            let input = if by_address {
                let at = |i: usize| arrays[i].as_ref().filter(|_| rows > 0).map_or(0, |array| array.address() as usize);
                // SAFETY: the memory holds 30 elements and lives until the plan is dropped.
                unsafe { Input::at(3 * rows as u64, T::DTYPE, at(0), at(1), &[at(2), at(3)], at(4)) }
            } else {
                convert_for(face, if face.cuda { 0 } else { -1 }, &mut arrays)?
            };
            let mut blender = face.blender(2)?;
            let plan = blender.plan(vec![input])?;
            blender.step(&plan)?;
            drop(plan);
            blends.push((bits(&memory[4].read()), blender.save()?));
        }
        assert_eq!(blends[0], blends[1], "round {round}");
    }
    Ok(())
}
