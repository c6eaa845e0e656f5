//! What can be wrong with a driver or a device, each as a typed error that leaves everything usable.
#![cfg(feature = "cuda")]
#![allow(clippy::panic)]

use std::process::Command;

use cudarc::driver::sys::{self, CUresult};
use gradblend::{Blender, Device, Error, GradScale, List, TensorGrads};
use gradblend_testkit::cuda::{Memory, alone_on_cuda, current, done, on_emulator, skip, within};
use gradblend_testkit::{Face, Outcome, Random, STREAM, Tensor, bits};

/// The error, which says all of these.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, says: &[&str]) -> Error {
    match result {
        Ok(got) => panic!("{got:?} instead of an error"),
        Err(error) => {
            says.iter().for_each(|words| assert!(error.to_string().contains(words), "{error} does not say {words:?}"));
            error
        }
    }
}

/// That a step goes through and is right.
fn works() -> Outcome {
    let mut tensors = [Tensor::<f32>::random(&mut Random(301), 5000, 2, 0, 0)];
    let mut blender = Face::CUDA.blender(2)?;
    Face::CUDA.run(&mut blender, &mut tensors, TestBlender::step)?;
    tensors[0].check_blend(&[0.5; 2], None, "afterwards");
    assert_eq!(blender.report()?.observed, 1);
    Ok(())
}

#[test]
fn no_such_device() -> Outcome {
    alone_on_cuda(|_| {
        for ordinal in [-1, i32::MIN, 99, i32::MAX] {
            let error = refused(Device::cuda(ordinal), &[&format!("device {ordinal}")]);
            assert!(matches!(error, Error::NoDevice { ordinal: o, devices: 1.. } if o == ordinal), "{error:?}");
        }
        Ok(())
    })
}

#[test]
fn no_device_at_all() -> Outcome {
    on_emulator(|emulator| {
        emulator.set("devices", 0);
        assert_eq!(Device::cuda(0), Err(Error::NoDevice { ordinal: 0, devices: 0 }));
        emulator.set("devices", 1);
        works()
    })
}

const CHILD: &str = "GRADBLEND_TEST_WITHOUT_DRIVER";

/// Not a test: what `no_driver` runs in a process of its own, whose driver is another.
#[test]
fn without_driver() {
    if std::env::var_os(CHILD).is_some() {
        for _ in 0..2 {
            let found = Device::cuda(0);
            assert!(matches!(found, Err(Error::NoDriver { .. })), "{found:?}");
            println!("{CHILD}: {found:?}");
        }
    }
}

/// What a process says that finds its driver in `folder`.
fn with_driver_in(folder: &std::path::Path) -> Result<String, Box<dyn std::error::Error>> {
    let output = Command::new(std::env::current_exe()?)
        .args(["--exact", "without_driver", "--nocapture"])
        .env(CHILD, "1")
        .env("LD_LIBRARY_PATH", folder)
        .env_remove("LD_PRELOAD")
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && said.matches(CHILD).count() == 2, "{output:?}");
    Ok(said)
}

/// A library that is none, and one that lacks functions.
#[test]
fn no_driver() -> Outcome {
    let folder = std::env::temp_dir().join(format!("gradblend-no-driver-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    for name in ["libcuda.so", "libcuda.so.1"] {
        std::fs::write(folder.join(name), "")?;
    }
    let said = with_driver_in(&folder)?;
    std::fs::remove_dir_all(&folder)?;
    assert!(said.contains("libcuda.so.1"), "{said}");
    let path = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let incomplete =
        std::env::split_paths(&path).map(|folder| folder.join("incomplete")).find(|folder| folder.exists());
    let Some(incomplete) = incomplete else {
        skip("no incomplete driver beside the stand-in");
        return Ok(());
    };
    let said = with_driver_in(&incomplete)?;
    assert!(said.contains(" has no cu"), "{said}");
    Ok(())
}

#[test]
fn old_device() -> Outcome {
    on_emulator(|emulator| {
        emulator.set("major", 7);
        emulator.set("minor", 5);
        let error = refused(Device::cuda(0), &["device 0", "Stand-in 0", "7.5", "kernels for"]);
        assert!(matches!(error, Error::UnsupportedDevice { ordinal: 0, .. }), "{error:?}");
        emulator.reset();
        works()
    })
}

#[test]
fn old_driver() -> Outcome {
    on_emulator(|emulator| {
        for result in [CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION, CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU] {
            emulator.set("image", result as i64);
            emulator.set("driver_version", 11_080);
            let error = refused(Face::CUDA.blender(2), &["Stand-in 0", "CUDA 11.8", "toolkit", &format!("{result:?}")]);
            assert!(matches!(error, Error::UnsupportedDevice { ordinal: 0, .. }), "{error:?}");
            emulator.reset();
            works()?;
        }
        Ok(())
    })
}

#[test]
fn out_of_memory() -> Outcome {
    on_emulator(|emulator| {
        emulator.set("memory", 4096);
        let error = refused(Face::CUDA.blender(2), &["for the blender"]);
        assert!(matches!(error, Error::OutOfMemory { what: "the blender", bytes: 4096.. }), "{error:?}");
        emulator.reset();
        let blender = Face::CUDA.blender(2)?;
        emulator.set("memory", emulator.count("live_bytes") as i64 + 1000);
        let tensors: Vec<TensorGrads<'_>> = (0..100).map(|_| TensorGrads::blend_only::<f32>(&[None, None])).collect();
        let error = refused(blender.plan(&tensors), &["for the plan"]);
        assert!(matches!(error, Error::OutOfMemory { what: "the plan", bytes: 1000.. }), "{error:?}");
        emulator.reset();
        blender.plan(&tensors)?;
        works()
    })
}

#[test]
fn launch_that_fails() -> Outcome {
    on_emulator(|emulator| {
        let mut blender = Face::CUDA.blender(2)?;
        let saved = blender.save()?;
        let code = CUresult::CUDA_ERROR_LAUNCH_FAILED;
        emulator.fail("cuLaunchKernel", code, 0);
        let name = format!("{code:?}");
        let error = refused(blender.observe(), &["cuLaunchKernel", &name, "719"]);
        assert_eq!(error, Error::Cuda { call: "cuLaunchKernel", code: code as u32, name });
        assert_eq!(blender.save()?, saved);
        blender.observe()?;
        works()
    })
}

/// Whichever call of the driver fails, it is named, nothing stays behind, and the next try goes through.
#[test]
fn any_call_that_fails() -> Outcome {
    on_emulator(|emulator| {
        let names = ["live", "streams", "modules", "contexts"];
        let mut tensors = [Tensor::<f32>::random(&mut Random(302), 5000, 2, 0, 0)];
        let mut lists = Face::CUDA.put(&mut tensors);
        let grads = lists.grads();
        let mut failures = 0;
        for function in [
            "cuInit",
            "cuDeviceGetCount",
            "cuDeviceGet",
            "cuDeviceGetName",
            "cuDeviceGetAttribute",
            "cuDevicePrimaryCtxRetain",
            "cuCtxPushCurrent_v2",
            "cuThreadExchangeStreamCaptureMode",
            "cuModuleLoadData",
            "cuModuleGetFunction",
            "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            "cuStreamCreate",
            "cuMemAlloc_v2",
            "cuMemcpyHtoDAsync_v2",
            "cuMemcpyDtoHAsync_v2",
            "cuStreamSynchronize",
            "cuStreamIsCapturing",
            "cuLaunchKernel",
        ] {
            for after in 0..20 {
                let before = names.map(|name| emulator.count(name));
                emulator.fail(function, CUresult::CUDA_ERROR_UNKNOWN, after);
                let all = || {
                    let mut blender = Face::CUDA.blender(2)?;
                    let mut plan = blender.plan(&grads)?;
                    plan.update(&grads)?;
                    blender.step(&plan)?;
                    blender.report().map(drop)
                };
                match all() {
                    Err(Error::Cuda { call, code: 999, .. }) => assert_eq!(call, function),
                    Err(other) => return Err(format!("{function}: {other:?}").into()),
                    // It was not called so often; or failed where there is nobody to tell, in a drop.
                    Ok(()) => {}
                }
                failures += u32::from(emulator.count(function) > 0);
                emulator.reset();
                let after_it = names.map(|name| emulator.count(name));
                // A call that fails while something is dropped may keep that from being freed, but nothing else does.
                if !["cuCtxPushCurrent_v2", "cuThreadExchangeStreamCaptureMode"].contains(&function) {
                    assert_eq!(after_it, before, "{function} fails after {after}: {names:?}");
                }
                assert!(current().is_null(), "{function} fails after {after}");
            }
        }
        assert!(failures > 100);
        works()
    })
}

/// Memory that the driver was never told of, where the device cannot read it.
#[test]
fn unknown_memory() -> Outcome {
    on_emulator(|emulator| {
        emulator.set("pageable", 0);
        let mut tensors = [Tensor::<f32>::random(&mut Random(303), 100, 2, 0, 0)];
        let mut lists = Face::CUDA.put(&mut tensors);
        let mut blender = Face::CUDA.blender(2)?;
        let mut plan = blender.plan(&lists.grads())?;
        let (host, device) = (vec![0.0_f32; 100], Memory::of(&[0.0_f32; 100]));
        let at = |list: &[f32]| list.as_ptr() as u64;
        let v = Some(&host[..]);
        let own = |len: u64, offset: usize| {
            let at = device.address::<f32>(offset).cast_const().cast();
            // SAFETY: plans of it are refused, or do not run.
            unsafe { TensorGrads::from_raw(len, gradblend::DType::F32, at, at, &[at, at], std::ptr::null_mut()) }
        };
        let unknown = |tensor, list, address| Error::UnknownMemory { tensor, list, address };
        let slices = [own(100, 0), TensorGrads::new(&host, &host, &[v, v])];
        let want = unknown(1, Role::Train, at(&host));
        assert_eq!(refused(blender.plan(&slices), &["tensor 1", "train gradient"]), want);
        let past = device.address::<u8>(0) as u64 + 404 - 1;
        assert_eq!(refused(blender.plan(&[own(101, 0)]), &["tensor 0"]), unknown(0, Role::Train, past));
        assert_eq!(refused(blender.plan(&[own(100, 1)]), &["tensor 0"]), unknown(0, Role::Train, past));
        let mixed = [TensorGrads::blend_only(&[None, v])];
        let want = unknown(0, Role::Modality(1), at(&host));
        assert_eq!(refused(blender.plan(&mixed), &["gradient of modality 1"]), want);
        assert_eq!(refused(plan.update(&mixed), &["modality 1"]), want);
        blender.plan(&[own(100, 0), own(99, 1), TensorGrads::new::<f32>(&[], &[], &[None, None])])?;
        let cell = Box::new(1.0_f32);
        // SAFETY: refused.
        let scale = unsafe { GradScale::from_raw(&raw const *cell) };
        let address = (&raw const *cell) as u64;
        assert_eq!(refused(blender.set_grad_scale(scale), &["scale"]), Error::UnknownScale { address });
        // The plan is as it was.
        blender.step(&plan)?;
        assert_eq!(blender.report()?.observed, 1);
        drop(plan);
        lists.fetch();
        tensors[0].check_blend(&[0.5; 2], None, "after refused updates");
        Ok(())
    })
}

/// Another device's context is current again after each call.
#[test]
fn another_device_stays_current() -> Outcome {
    on_emulator(|emulator| {
        emulator.set("devices", 2);
        let mut other = std::ptr::null_mut();
        // SAFETY: a face for the context of a device that is there.
        within(|| done(unsafe { sys::cuDevicePrimaryCtxRetain(&mut other, 1) }));
        // SAFETY: retained.
        done(unsafe { sys::cuCtxPushCurrent_v2(other) });
        works()?;
        assert_eq!(current(), other);
        assert!(Device::cuda(2).is_err());
        assert_eq!(current(), other);
        // SAFETY: what was pushed and retained above.
        unsafe {
            done(sys::cuCtxPopCurrent_v2(&mut other));
            done(sys::cuDevicePrimaryCtxRelease_v2(1));
        }
        let mut second = [Tensor::<f32>::random(&mut Random(304), 5000, 2, 0, 0)];
        let mut first = second.clone();
        // A device is chosen by its ordinal, whatever is current. Both read the host's memory here.
        let mut blenders = [Face::CUDA.blender(2)?, Blender::new(&Device::cuda(1)?, *Face::CUDA.blender(2)?.config())?];
        for (blender, tensors) in blenders.iter_mut().zip([&mut first, &mut second]) {
            let plan = blender.plan(&[tensors[0].grads()])?;
            blender.step(&plan)?;
        }
        assert_eq!(bits(&first[0].blended), bits(&second[0].blended));
        Ok(())
    })
}
