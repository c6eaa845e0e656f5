//! `TensorGrads::from_dlpack`: arrays of other frameworks without a copy, and what cannot be one.

use std::ffi::c_void;
use std::ptr::null_mut;

use gradblend_testkit::{Outcome, STREAM};
use gradblend::dlpack::{
    DLDataType, DLDevice, DLManagedTensor, DLManagedTensorVersioned, DLPackVersion, DLTensor, Dlpack,
};
use gradblend::{Blender, Config, DType, Device, Error, List, TensorGrads};

const CPU: DLDevice = DLDevice { device_type: 1, device_id: 0 };
const F32: DLDataType = DLDataType { code: 2, bits: 32, lanes: 1 };

/// An array with its shape and strides.
struct Array {
    shape: Vec<i64>,
    strides: Vec<i64>,
    tensor: DLTensor,
    versioned: DLManagedTensorVersioned,
    managed: DLManagedTensor,
}

impl Array {
    fn new(data: *mut c_void, dtype: DLDataType, shape: &[i64]) -> Box<Self> {
        let tensor = DLTensor {
            data,
            device: CPU,
            ndim: shape.len() as i32,
            dtype,
            shape: null_mut(),
            strides: null_mut(),
            byte_offset: 0,
        };
        let managed = DLManagedTensor { dl_tensor: tensor, manager_ctx: null_mut(), deleter: None };
        let version = DLPackVersion { major: 1, minor: 3 };
        let versioned =
            DLManagedTensorVersioned { version, manager_ctx: null_mut(), deleter: None, flags: 0, dl_tensor: tensor };
        let mut strides = vec![1; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i];
        }
        Box::new(Array { shape: shape.to_vec(), strides, tensor, versioned, managed })
    }

    fn of(values: &mut [f32], shape: &[i64]) -> Box<Self> {
        Self::new(values.as_mut_ptr().cast(), F32, shape)
    }

    /// The record with what was changed in `tensor`, and with this array's shape and strides unless they were set.
    fn finished(&mut self) -> DLTensor {
        let mut tensor = self.tensor;
        if tensor.shape.is_null() {
            tensor.shape = self.shape.as_mut_ptr();
        }
        if tensor.strides.is_null() && !self.strides.is_empty() {
            tensor.strides = self.strides.as_mut_ptr();
        }
        tensor
    }

    fn managed(&mut self) -> Option<Dlpack> {
        self.managed.dl_tensor = self.finished();
        Some(Dlpack::Managed(&self.managed))
    }

    fn versioned(&mut self) -> Option<Dlpack> {
        self.versioned.dl_tensor = self.finished();
        Some(Dlpack::Versioned(&self.versioned))
    }
}

/// The numbers of the example in the crate's documentation, in both forms of record and an offset.
#[test]
fn steps() -> Outcome {
    let (mut t, mut g) = ([9.0_f32, 1.0, 2.0], [1.0_f32, 1.0]);
    let (mut video, mut audio, mut out) = ([1.0_f32, 0.5], [0.5_f32, 1.0], [0.0_f32; 2]);
    let mut arrays = [
        Array::of(&mut t, &[2]),
        Array::of(&mut g, &[1, 2]),
        Array::of(&mut video, &[2, 1]),
        Array::of(&mut audio, &[2]),
        Array::of(&mut out, &[1, 2, 1]),
    ];
    arrays[0].tensor.byte_offset = 4;
    // A dimension of one element may have any stride.
    arrays[4].strides = vec![77, 1, -5];
    let [t, g, video, audio, blended] = &mut arrays;
    // SAFETY: arrays of this test, alive until its end and used by nothing else.
    let tensor = unsafe {
        let modalities = [video.versioned(), audio.managed()];
        TensorGrads::from_dlpack(&Device::cpu(), t.managed(), g.versioned(), &modalities, blended.versioned())
    }?;
    assert_eq!((tensor.len(), tensor.dtype()), (2, DType::F32));
    let mut blender = Blender::new(&Device::cpu(), Config::new(2))?;
    let plan = blender.plan(&[tensor])?;
    blender.step(&plan)?;
    blender.reweight()?;
    assert!((blender.report()?.weights[0] - 0.8).abs() < 1e-9);
    drop(plan);
    assert_eq!(out, [0.75, 0.75]);
    Ok(())
}

/// What one array as the train gradient comes to.
fn train(array: Option<Dlpack>, device: &Device) -> Result<(), Error> {
    // SAFETY: records of the caller, alive; no plan is made.
    unsafe { TensorGrads::from_dlpack(device, array, None, &[None], None) }.map(|_| ())
}

#[test]
fn refused() -> Outcome {
    let mut values = [0.0_f32; 8];
    let mut array = |change: &dyn Fn(&mut Array)| {
        let mut array = Array::of(&mut values, &[2, 4]);
        change(&mut array);
        train(array.managed(), &Device::cpu())
    };
    assert_eq!(array(&|_| ()), Ok(()));
    let dtype = |code, bits, lanes| DLDataType { code, bits, lanes };
    type Case<'a> = (&'a str, &'a dyn Fn(&mut Array));
    let cases: [Case<'_>; 15] = [
        ("expected memory of the CPU, got memory of CUDA device 0", &|a| a.tensor.device.device_type = 2),
        ("got device type 10", &|a| a.tensor.device.device_type = 10),
        ("got type code 0, 32 bits, 1 lanes", &|a| a.tensor.dtype = dtype(0, 32, 1)),
        ("got type code 2, 64 bits, 1 lanes", &|a| a.tensor.dtype = dtype(2, 64, 1)),
        ("got type code 4, 32 bits, 1 lanes", &|a| a.tensor.dtype = dtype(4, 32, 1)),
        ("got type code 2, 32 bits, 2 lanes", &|a| a.tensor.dtype = dtype(2, 32, 2)),
        ("shape [2, 4] with strides [1, 2]", &|a| a.strides = vec![1, 2]),
        ("shape [2, 4] with strides [8, 1]", &|a| a.strides = vec![8, 1]),
        ("shape [2, 4] with strides [-4, 1]", &|a| a.strides = vec![-4, 1]),
        ("expected dimensions of at least 0, got -2", &|a| a.shape = vec![-2, 4]),
        ("expected a number of dimensions of at least 0, got -1", &|a| a.tensor.ndim = -1),
        ("fits into memory", &|a| (a.shape, a.strides) = (vec![i64::MAX, 4], vec![4, 1])),
        ("expected data, got NULL", &|a| a.tensor.data = null_mut()),
        ("aligned to 4 bytes", &|a| a.tensor.byte_offset = 2),
        ("byte offset within memory", &|a| a.tensor.byte_offset = u64::MAX),
    ];
    for (expected, change) in cases {
        match array(change) {
            Err(error @ Error::Dlpack { role: Role::Train, .. }) => {
                let message = error.to_string();
                assert!(message.starts_with("train gradient: ") && message.contains(expected), "{message}");
            }
            other => panic!("{expected}: {other:?}"),
        }
    }
    Ok(())
}

#[test]
fn refused_versions() -> Outcome {
    let mut values = [0.0_f32; 2];
    let mut array = Array::of(&mut values, &[2]);
    array.versioned.version.major = 2;
    let message = |result: Result<(), Error>| result.map_err(|error| error.to_string());
    let expected = Err("train gradient: expected DLPack of major version 1, got 2.3".to_string());
    assert_eq!(message(train(array.versioned(), &Device::cpu())), expected);
    array.versioned.version.major = 1;
    array.versioned.flags = 1;
    // To be read from, a read-only array is as good as any.
    assert_eq!(message(train(array.versioned(), &Device::cpu())), Ok(()));
    // SAFETY: as above.
    let blended = unsafe { TensorGrads::from_dlpack(&Device::cpu(), None, None, &[None], array.versioned()) };
    let expected = Err("blended gradient: expected an array that may be written to, got a read-only one".to_string());
    assert_eq!(message(blended.map(|_| ())), expected);
    for null in [Dlpack::Managed(std::ptr::null()), Dlpack::Versioned(std::ptr::null())] {
        let expected = Err("train gradient: expected the address of a record, got NULL".to_string());
        assert_eq!(message(train(Some(null), &Device::cpu())), expected);
    }
    assert_eq!(train(None, &Device::cpu()), Err(Error::NoArray));
    Ok(())
}

#[test]
fn lists_differ() -> Outcome {
    let (mut a, mut b) = ([0.0_f32; 4], [0.0_f32; 4]);
    let (mut first, mut second) = (Array::of(&mut a, &[4]), Array::of(&mut b, &[3]));
    // SAFETY: as above.
    let mut message = |second: &mut Array| unsafe {
        let modalities = [None, first.managed(), second.managed()];
        TensorGrads::from_dlpack(&Device::cpu(), None, None, &modalities, None).map(|_| ()).map_err(|e| e.to_string())
    };
    let expected = "gradient of modality 2: expected 4 elements, as the gradient of modality 1 has, got 3";
    assert_eq!(message(&mut second), Err(expected.into()));
    (second.shape, second.tensor.dtype) = (vec![2, 2], DLDataType { code: 4, bits: 16, lanes: 1 });
    (second.strides, second.tensor.ndim) = (vec![2, 1], 2);
    let expected = "gradient of modality 2: expected f32, as the gradient of modality 1 is, got bf16";
    assert_eq!(message(&mut second), Err(expected.into()));
    second.tensor.dtype = F32;
    assert_eq!(message(&mut second), Ok(()));
    Ok(())
}

/// An array of no elements may have any address, NULL among them; a single number has no dimensions.
#[test]
fn empty_and_scalar() -> Outcome {
    let mut empty = Array::new(null_mut(), F32, &[3, 0]);
    let mut other = Array::new(std::ptr::without_provenance_mut(64), F32, &[0]);
    // SAFETY: as above; nothing is read of no elements.
    let tensor = unsafe {
        TensorGrads::from_dlpack(&Device::cpu(), empty.managed(), other.managed(), &[other.managed()], empty.managed())
    }?;
    assert!(tensor.is_empty());
    Blender::new(&Device::cpu(), Config::new(1))?.plan(&[tensor])?;
    let mut value = [1.0_f32];
    let mut scalar = Array::of(&mut value, &[]);
    // SAFETY: as above.
    let tensor = unsafe { TensorGrads::from_dlpack(&Device::cpu(), None, None, &[scalar.managed()], None) }?;
    assert_eq!(tensor.len(), 1);
    Ok(())
}

/// More modalities than there can be are refused, not cut.
#[test]
fn too_many() {
    // SAFETY: no record at all.
    let tensor = unsafe { TensorGrads::from_dlpack(&Device::cpu(), None, None, &[None; 33], None) };
    assert!(matches!(tensor, Err(Error::Modalities { got: 33 })));
}
