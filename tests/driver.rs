//! Faults of a driver or a device: each is a typed error that leaves everything usable.
#![cfg(feature = "cuda")]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::sys::{self, CUresult};
use gradblend::{Config, DType, Device, Error, Role, TensorGrads};
use gradblend_testkit::cuda::{
    Memory, alone_on_cuda, check, current_context, on_emulator, with_context, without_emulator,
};
use gradblend_testkit::{
    Face, Failure, Input, Outcome, Random, Result, Tensor, TestBlender, bits, rejected, rejected_as,
};

const FACE: Face = Face::CUDA;

/// Checks that a step is right.
fn check_step() -> Outcome {
    let mut tensors = [Tensor::<f32>::random(&mut Random(301), 5000, 2, 0, 0)];
    let (before, mut blender) = (tensors[0].clone(), FACE.blender(2)?);
    FACE.run(&mut blender, &mut tensors, TestBlender::step)?;
    tensors[0].check_blend(&before, &[0.5; 2], false, "afterwards");
    assert_eq!(blender.report()?.observed, 1);
    Ok(())
}

/// The error behind a call that was rejected with this status, whose message has each of the `words`.
#[track_caller]
fn error<T: std::fmt::Debug>(result: std::result::Result<T, impl Into<Failure>>, status: i32, words: &str) -> Error {
    rejected_as(result.map_err(Into::into), status, words).error.unwrap_or(Error::ForeignPlan)
}

#[test]
fn no_such_device() -> Outcome {
    alone_on_cuda(|_| {
        for ordinal in [-1, i32::MIN, 99, i32::MAX] {
            let error = error(Device::cuda(ordinal), 4, &format!("device {ordinal}"));
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
        check_step()
    })
}

const CHILD: &str = "GRADBLEND_TEST_ANOTHER_DRIVER";

/// Does nothing unless `with_drivers` runs it in a process of its own, with other drivers: looks for a device, and takes a
/// step on it, beside another user of cudarc.
#[test]
fn with_another_driver() -> Outcome {
    if std::env::var_os(CHILD).is_some() {
        for _ in 0..2 {
            let found = Device::cuda(0);
            println!("{CHILD}: {found:?}");
            if found.is_ok() {
                let context = cudarc::driver::CudaContext::new(0);
                assert!(context.is_ok(), "{context:?}");
                check_step()?;
            } else {
                assert!(matches!(found, Err(Error::NoDriver { .. })), "{found:?}");
            }
        }
    }
    Ok(())
}

/// A folder of links, which is removed by the drop.
struct Folder(PathBuf);

impl Folder {
    fn new(links: &[(&str, PathBuf)]) -> std::io::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("gradblend-driver-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        for (name, file) in links {
            std::os::unix::fs::symlink(file, folder.join(name))?;
        }
        Ok(Folder(folder))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Output of `with_another_driver` in a process that looks for its driver in these folders.
fn with_drivers(folders: &[&Folder], loaded: &[&Path]) -> std::result::Result<String, Box<dyn std::error::Error>> {
    with_search(&std::env::join_paths(folders.iter().map(|folder| &folder.0))?, loaded)
}

/// The same, of these folders as the loader reads them. The process has loaded some libraries before.
fn with_search(folders: &OsStr, loaded: &[&Path]) -> std::result::Result<String, Box<dyn std::error::Error>> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--exact", "with_another_driver", "--nocapture"]).env(CHILD, "1");
    command.env("LD_LIBRARY_PATH", folders);
    // After the runtime of a sanitizer.
    let mut first = std::env::var_os("LD_PRELOAD").unwrap_or_default();
    for library in loaded {
        first.push(" ");
        first.push(library);
    }
    command.env("LD_PRELOAD", first);
    let output = command.output()?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && printed.matches(CHILD).count() == 2, "{output:?}");
    Ok(printed)
}

/// The emulator, and the drivers beside it that do not work.
struct Drivers {
    emulator: PathBuf,
    incomplete: PathBuf,
    stub: PathBuf,
}

impl Drivers {
    fn find() -> Option<Self> {
        let path = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let library = |folder: PathBuf| folder.join("libcuda.so.1").canonicalize().ok();
        std::env::split_paths(&path).find_map(|folder| {
            let [incomplete, stub] = ["incomplete", "stub"].map(|name| library(folder.join(name)));
            Some(Drivers { emulator: library(folder)?, incomplete: incomplete?, stub: stub? })
        })
    }
}

/// Files that are not libraries, libraries that lack functions, and stubs: the error names each.
#[test]
fn no_driver() -> Outcome {
    let folder = Folder::new(&[])?;
    for name in ["libcuda.so", "libcuda.so.1"] {
        std::fs::write(folder.0.join(name), "")?;
    }
    let printed = with_drivers(&[&folder], &[])?;
    assert!(printed.contains("libcuda.so.1"), "{printed}");
    let Some(Drivers { incomplete, stub, .. }) = Drivers::find() else {
        return without_emulator("no drivers that do not work lie beside the driver");
    };
    let both = |library: &PathBuf| Folder::new(&[("libcuda.so", library.clone()), ("libcuda.so.1", library.clone())]);
    let (incomplete, both, one) = (both(&incomplete)?, both(&stub)?, Folder::new(&[("libcuda.so", stub)])?);
    for stub in [&both, &one] {
        let printed = with_drivers(&[stub, &incomplete], &[])?;
        let named = format!("{} is the stub of a toolkit", stub.0.join("libcuda.so").display());
        assert!(printed.contains(&named) || printed.contains(&named.replace(".so", ".so.1")), "{printed}");
        assert!(printed.contains(&format!("{}/libcuda.so.1 has no cu", incomplete.0.display())), "{printed}");
    }
    Ok(())
}

/// The crate and cudarc use the driver, whatever else has its names, before it or after it.
#[test]
fn driver_among_others() -> Outcome {
    let Some(Drivers { emulator, incomplete, stub }) = Drivers::find() else {
        return without_emulator("no drivers that do not work lie beside the driver");
    };
    let folder = |library: &PathBuf, names: &[&'static str]| {
        Folder::new(&names.iter().map(|name| (*name, library.clone())).collect::<Vec<_>>())
    };
    let names: [&[&str]; 3] = [&["libcuda.so"], &["libcuda.so.1"], &["libcuda.so", "libcuda.so.1"]];
    for driver_names in names {
        let driver = folder(&emulator, driver_names)?;
        let mut cases = vec![("alone".to_owned(), with_drivers(&[&driver], &[])?)];
        for (what, file) in [("stub", &stub), ("incomplete", &incomplete)] {
            for other_names in names {
                let other = folder(file, other_names)?;
                let case = format!("{driver_names:?} with {what} {other_names:?}");
                cases.push((format!("{case} after it"), with_drivers(&[&driver, &other], &[])?));
                cases.push((format!("{case} loaded before"), with_drivers(&[&other], &[&emulator])?));
                cases.push((format!("{case} before it, and loaded"), with_drivers(&[&other, &driver], &[file])?));
                cases.push((format!("{case} loaded before it"), with_drivers(&[&other], &[file, &emulator])?));
                for separator in [":", ";"] {
                    let folders = [other.0.as_os_str(), driver.0.as_os_str()].join(OsStr::new(separator));
                    cases.push((format!("{case} and {separator}"), with_search(&folders, &[])?));
                }
            }
        }
        for (case, printed) in cases {
            assert_eq!(printed.matches("Ok(").count(), 2, "{case}: {printed}");
        }
    }
    Ok(())
}

#[test]
fn old_device() -> Outcome {
    on_emulator(|emulator| {
        emulator.set("major", 7);
        emulator.set("minor", 5);
        let error = error(Device::cuda(0), 5, "device 0|Emulator 0|7.5|kernels for");
        assert!(matches!(error, Error::UnsupportedDevice { ordinal: 0, .. }), "{error:?}");
        emulator.reset();
        check_step()
    })
}

#[test]
fn old_driver() -> Outcome {
    on_emulator(|emulator| {
        for result in [CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION, CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU] {
            emulator.set("image", result as i64);
            emulator.set("driver_version", 11_080);
            let words = format!("Emulator 0|CUDA 11.8|toolkit|{result:?}");
            let error = error(FACE.blender(2), 5, &words);
            assert!(matches!(error, Error::UnsupportedDevice { ordinal: 0, .. }), "{error:?}");
            emulator.reset();
            check_step()?;
        }
        Ok(())
    })
}

#[test]
fn out_of_memory() -> Outcome {
    on_emulator(|emulator| {
        emulator.set("memory", 4096);
        let blender = error(FACE.blender(2), 6, "for the blender");
        assert!(matches!(blender, Error::OutOfMemory { what: "the blender", bytes: 4096.. }), "{blender:?}");
        emulator.reset();
        let blender = FACE.blender(2)?;
        emulator.set("memory", emulator.count("live_bytes") as i64 + 1000);
        let inputs = || (0..100).map(|_| Input::Slices(TensorGrads::blend_only::<f32>(&[None, None]))).collect();
        let plan = error(blender.plan(inputs()), 6, "for the plan");
        assert!(matches!(plan, Error::OutOfMemory { what: "the plan", bytes: 1000.. }), "{plan:?}");
        emulator.reset();
        blender.plan(inputs())?;
        check_step()
    })
}

#[test]
fn launch_that_fails() -> Outcome {
    on_emulator(|emulator| {
        let mut blender = FACE.blender(2)?;
        let saved = blender.save()?;
        let code = CUresult::CUDA_ERROR_LAUNCH_FAILED;
        emulator.fail("cuLaunchKernel", code, 0);
        let want = Error::Cuda { call: "cuLaunchKernel", code: code as u32, name: format!("{code:?}") };
        rejected(blender.observe(), &want, "cuLaunchKernel|CUDA_ERROR_LAUNCH_FAILED|719");
        assert_eq!(blender.save()?, saved);
        blender.observe()?;
        check_step()
    })
}

/// The functions of the driver that a blender, a plan and a step call.
const FUNCTIONS: &str = "
    cuInit cuDeviceGetCount cuDeviceGet cuDeviceGetName cuDeviceGetAttribute cuDevicePrimaryCtxRetain
    cuCtxPushCurrent_v2 cuThreadExchangeStreamCaptureMode cuModuleLoadData cuModuleGetFunction
    cuOccupancyMaxActiveBlocksPerMultiprocessor cuStreamCreate cuMemAlloc_v2 cuMemcpyHtoDAsync_v2
    cuMemcpyDtoHAsync_v2 cuStreamSynchronize cuStreamIsCapturing cuLaunchKernel
";

/// Whichever call of the driver fails, the error names it, nothing leaks, and the next attempt succeeds.
#[test]
fn any_call_that_fails() -> Outcome {
    fn all_calls(uploaded: &mut gradblend_testkit::Uploaded<'_, f32>) -> Result<()> {
        let mut blender = FACE.blender(2)?;
        // A plan takes the buffers once; an update takes them again.
        let plan = blender.plan(uploaded.inputs())?;
        let mut plan = plan.release();
        plan.update(uploaded.inputs(), blender.stream)?;
        blender.step(&plan)?;
        blender.report().map(drop)
    }
    on_emulator(|emulator| {
        let names = ["live", "streams", "modules", "contexts"];
        let mut tensors = [Tensor::<f32>::random(&mut Random(302), 5000, 2, 0, 0)];
        let mut uploaded = FACE.upload(&mut tensors);
        for function in FUNCTIONS.split_whitespace() {
            let mut failures = 0;
            for after in 0..20 {
                let before = names.map(|name| emulator.count(name));
                emulator.fail(function, CUresult::CUDA_ERROR_UNKNOWN, after);
                match all_calls(&mut uploaded) {
                    Ok(()) => {} // It was called less often, or failed in a drop, which cannot report it.
                    Err(Failure { error: Some(Error::Cuda { call, code: 999, .. }), .. }) => {
                        assert_eq!(call, function);
                        failures += 1;
                    }
                    Err(other) => return Err(format!("{function}: {other:?}").into()),
                }
                emulator.reset();
                let after_it = names.map(|name| emulator.count(name));
                // Only these two, when they fail in a drop, keep something from being freed.
                if !["cuCtxPushCurrent_v2", "cuThreadExchangeStreamCaptureMode"].contains(&function) {
                    assert_eq!(after_it, before, "{function} fails after {after}: {names:?}");
                }
                assert!(current_context().is_null(), "{function} fails after {after}");
            }
            assert!(failures > 0, "{function} was never seen to fail");
        }
        check_step()
    })
}

/// Memory that the driver does not know, where the device cannot read the host's memory.
#[test]
fn unknown_memory() -> Outcome {
    on_emulator(|emulator| {
        emulator.set("pageable", 0);
        let host = vec![0.0_f32; 100];
        let mut tensors = [Tensor::<f32>::random(&mut Random(303), 100, 2, 0, 0)];
        let before = tensors[0].clone();
        let mut uploaded = FACE.upload(&mut tensors);
        let mut blender = FACE.blender(2)?;
        let stream = blender.stream;
        let mut plan = blender.plan(uploaded.inputs())?;
        let device = Memory::of(&[0.0_f32; 100]);
        let at_host = host.as_ptr() as u64;
        let v = Some(&host[..]);
        let own = |len: u64, offset: usize| {
            let at = device.address::<f32>(offset) as usize;
            // SAFETY: plans of it are rejected, or do not run.
            unsafe { Input::at(len, DType::F32, at, at, &[at, at], 0) }
        };
        let unknown = |tensor, role, address| Error::UnknownMemory { tensor, role, address };
        let slices = vec![own(100, 0), Input::Slices(TensorGrads::new(&host, &host, &[v, v]))];
        rejected(blender.plan(slices), &unknown(1, Role::Train, at_host), "tensor 1|train gradient");
        let past = unknown(0, Role::Train, device.address::<u8>(0) as u64 + 404 - 1);
        rejected(blender.plan(vec![own(101, 0)]), &past, "tensor 0");
        rejected(blender.plan(vec![own(100, 1)]), &past, "tensor 0");
        let mixed = || vec![Input::Slices(TensorGrads::blend_only(&[None, v]))];
        let want = unknown(0, Role::Modality(1), at_host);
        rejected(blender.plan(mixed()), &want, "gradient of modality 1");
        rejected(plan.update(mixed(), stream), &want, "modality 1");
        let empty = Input::Slices(TensorGrads::new::<f32>(&[], &[], &[None, None]));
        blender.plan(vec![own(100, 0), own(99, 1), empty])?;
        let scale = Box::new(1.0_f32);
        let address = (&raw const *scale) as u64;
        // SAFETY: rejected, not read.
        rejected(unsafe { blender.set_grad_scale(&raw const *scale) }, &Error::UnknownScale { address }, "scale");
        // The plan is as it was.
        blender.step(&plan)?;
        assert_eq!(blender.report()?.observed, 1);
        drop(plan);
        uploaded.fetch();
        tensors[0].check_blend(&before, &[0.5; 2], false, "after rejected updates");
        Ok(())
    })
}

/// A current context of another device stays current after each call.
#[test]
fn another_device_stays_current() -> Outcome {
    on_emulator(|emulator| {
        emulator.set("devices", 2);
        let mut other = std::ptr::null_mut();
        // SAFETY: `other` is a valid out-pointer, and device 1 exists.
        with_context(|| check(unsafe { sys::cuDevicePrimaryCtxRetain(&mut other, 1) }));
        // SAFETY: the context is retained.
        check(unsafe { sys::cuCtxPushCurrent_v2(other) });
        check_step()?;
        assert_eq!(current_context(), other);
        assert!(Device::cuda(2).is_err());
        assert_eq!(current_context(), other);
        // SAFETY: the context was pushed and retained above.
        unsafe {
            check(sys::cuCtxPopCurrent_v2(&mut other));
            check(sys::cuDevicePrimaryCtxRelease_v2(1));
        }
        let mut second = [Tensor::<f32>::random(&mut Random(304), 5000, 2, 0, 0)];
        let mut first = second.clone();
        // A device is chosen by its ordinal, whatever context is current. Both read the host's memory here.
        for (ordinal, tensors) in [(0, &mut first), (1, &mut second)] {
            let mut blender = FACE.blender_on(ordinal, Config::new(2))?;
            let plan = blender.plan(vec![Input::Slices(tensors[0].grads())])?;
            blender.step(&plan)?;
        }
        assert_eq!(bits(&first[0].blended), bits(&second[0].blended));
        Ok(())
    })
}
