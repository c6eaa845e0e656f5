//! Every error, provoked once by name; each leaves everything as it was.
#![allow(clippy::panic)]

use std::ffi::c_void;

use gradblend_testkit::{Outcome, Face, Random, STREAM, Tensor, bits};
use gradblend::{
    Average, Blender, Config, DType, Device, Error, GradScale, List, Losses, Pass, Policy, Schedule, TensorGrads, f16,
    ogr, solve,
};

gradblend_testkit::tests! {
    once: plans, weights_and_scales, saved_states;
}

const A: [f32; 4] = [1.0, 2.0, 3.0, 4.0];

fn refused<T: std::fmt::Debug>(result: Result<T>, want: &Error, message: &str) {
    match result {
        // A NaN inside an error differs from itself; its text does not.
        Err(got) => assert!(got == *want || got.to_string() == want.to_string(), "{got:?} against {want:?}"),
        Ok(got) => panic!("{got:?} instead of {want:?}"),
    }
    assert!(want.to_string().contains(message), "{want} does not say {message:?}");
}

/// A tensor at made-up addresses; plans do not read them.
fn raw(
    len: u64,
    dtype: DType,
    train: usize,
    valid: usize,
    modalities: &[usize],
    blended: usize,
) -> TensorGrads<'static> {
    let modalities: Vec<*const c_void> = modalities.iter().map(|v| *v as *const c_void).collect();
    // SAFETY: the plans of these tests are refused or dropped without having run.
    unsafe { TensorGrads::from_raw(len, dtype, train as *const _, valid as *const _, &modalities, blended as *mut _) }
}

#[test]
fn every_variant_is_named_here() {
    let source = include_str!("../src/error.rs");
    // What only a CUDA device or DLPack refuses is provoked there.
    let tests = concat!(
        include_str!("invalid.rs"),
        include_str!("driver.rs"),
        include_str!("graph.rs"),
        include_str!("dlpack.rs")
    );
    let body = source.split("pub enum Error {").nth(1).unwrap_or("");
    let named = |line: &str| line.strip_prefix("    ")?.split([' ', ',']).next().map(str::to_owned);
    let variants: Vec<String> = body
        .lines()
        .filter(|line| line.starts_with("    ") && line[4..].starts_with(char::is_uppercase))
        .filter_map(named)
        .collect();
    assert!(variants.len() > 25, "{variants:?}");
    for variant in variants {
        assert!(tests.contains(&format!("Error::{variant}")), "no test provokes Error::{variant}");
    }
}

#[test]
fn configuration() {
    let new = |config| Blender::new(&Device::cpu(), config).map(drop);
    for got in [0, 33, u32::MAX] {
        let want = Error::Modalities { got: u64::from(got) };
        refused(new(Config::new(got)), &want, &format!("got {got}"));
    }
    for got in [1.0, -0.1, 2.0, f64::NAN, f64::INFINITY] {
        let config = Config { average: Average::Ema { decay: got }, ..Config::new(2) };
        refused(new(config), &Error::Decay { got }, "decay");
    }
    for got in [-1e-9, f64::NAN, f64::INFINITY] {
        let policy = Policy { damping: got, ..Policy::default() };
        refused(new(Config { policy, ..Config::new(2) }), &Error::Damping { got }, "damping");
        refused(solve(&[1.0], &[1.0], &policy), &Error::Damping { got }, "damping");
    }
    let threads = u32::MAX;
    let want = Error::Threads { threads, reason: "expected at most 4096".into() };
    refused(new(Config { threads, ..Config::new(2) }), &want, "4294967295");
    #[cfg(not(feature = "cuda"))]
    refused(Device::cuda(3), &Error::NotBuilt { backend: "CUDA", ordinal: 3 }, "not part of this build");
    refused(DType::try_from(7), &Error::DType { code: 7 }, "dtype 7");
    assert_eq!(DType::try_from(2), Ok(DType::BF16));
}

#[test]
fn tensors() -> Outcome {
    let blender = Face::CPU.blender(2)?;
    let good = || TensorGrads::new(&A, &A, &[Some(&A[..]), None]);
    let mut out = A;
    let check = |bad: TensorGrads<'_>, want: Error, message: &str| {
        refused(blender.plan(&[good(), bad]), &want, message);
    };
    check(TensorGrads::new(&A, &A, &[None]), Error::ModalityCount { tensor: 1, expected: 2, got: 1 }, "tensor 1");
    let many = vec![None; 40];
    check(TensorGrads::new(&A, &A, &many), Error::ModalityCount { tensor: 1, expected: 2, got: 40 }, "got 40");
    check(
        TensorGrads::new(&A, &A, &[None, None]).in_place(5, &mut out),
        Error::ModalityCount { tensor: 1, expected: 2, got: 6 },
        "got 6",
    );
    let short = |list, got| Error::Length { tensor: 1, list, expected: 4, got };
    check(TensorGrads::new(&A, &A[1..], &[None, None]), short(Role::Valid, 3), "validation gradient has 3");
    check(TensorGrads::new(&A, &A, &[None, Some(&A[2..])]), short(Role::Modality(1), 2), "modality 1 has 2");
    check(TensorGrads::new(&A, &A, &[None, None]).blended(&mut out[1..]), short(Role::Blended, 3), "blended gradient");
    let mut halves = [f16::ONE; 4];
    check(
        TensorGrads::new(&A, &A, &[None, None]).blended(&mut halves),
        Error::MixedDTypes { tensor: 1, role: Role::Blended, expected: "f32", got: "f16" },
        "blended gradient is f16, expected f32",
    );
    let unpaired = |missing| Error::Unpaired { tensor: 1, missing };
    check(raw(4, DType::F32, 64, 0, &[0, 0], 0), unpaired(Role::Valid), "validation gradient is absent");
    check(raw(4, DType::F32, 0, 64, &[0, 0], 0), unpaired(Role::Train), "train gradient is absent");
    let misaligned = |list, address, alignment| Error::Misaligned { tensor: 1, list, address, alignment };
    check(raw(4, DType::F32, 64, 66, &[64, 0], 0), misaligned(Role::Valid, 66, 4), "0x42");
    check(raw(4, DType::F32, 64, 64, &[0, 65], 0), misaligned(Role::Modality(1), 65, 4), "modality 1");
    check(raw(4, DType::BF16, 64, 64, &[0, 66], 129), misaligned(Role::Blended, 129, 2), "2 bytes");
    let (address, len) = (usize::MAX - 15, 8);
    let far = Error::OutOfRange { tensor: 1, role: Role::Modality(0), address: address as u64, len };
    check(raw(len, DType::F32, 0, 0, &[address, 0], 0), far, "past the end of memory");
    let len = u64::MAX / 2;
    let far = Error::OutOfRange { tensor: 1, role: Role::Train, address: 64, len };
    check(raw(len, DType::F16, 64, 64, &[0, 0], 0), far, "tensor 1: train gradient");
    Ok(())
}

#[test]
fn overlap() -> Outcome {
    let blender = Face::CPU.blender(2)?;
    // Tensors of 4 f32 take 16 bytes.
    let at = |train, modalities: &[usize], blended| raw(4, DType::F32, train, train, modalities, blended);
    let first = || at(0x1000, &[0x2000, 0x3000], 0x4000);
    let cases = [
        (at(0x5000, &[0x6000, 0x7000], 0x6004), (1, Role::Modality(0), 1), "part of a modality"),
        (at(0x5000, &[0x6000, 0x7000], 0x5000), (1, Role::Train, 1), "the train gradient"),
        (at(0x5000, &[0x6000, 0x7000], 0x2000), (1, Role::Modality(0), 0), "another tensor's modality"),
        (at(0x5000, &[0x4004, 0x7000], 0), (0, Role::Modality(0), 1), "read over another tensor's blend"),
        (at(0x5000, &[0x6000, 0x7000], 0x400c), (0, Role::Blended, 1), "two blends"),
        (at(0x5000, &[0x6000, 0x6000], 0x6000), (1, Role::Modality(1), 1), "two modalities, one blend"),
    ];
    for (bad, (tensor, other, other_tensor), case) in cases {
        let want = Error::Overlap { tensor, other, other_tensor };
        assert_eq!(blender.plan(&[first(), bad]).map(drop), Err(want), "{case}");
    }
    for (good, case) in [
        (at(0x5000, &[0x6000, 0x7000], 0x6000), "in face"),
        (at(0x5000, &[0x6000, 0x7000], 0x6010), "right behind"),
        (at(0x5000, &[0x4010, 0x7000], 0), "an input right behind another tensor's blend"),
        (at(0x2000, &[0x2000, 0x2008], 0), "inputs may share memory"),
        (raw(0, DType::F32, 0x4000, 0x4000, &[0x4000, 0], 0x4000), "an empty tensor overlaps nothing"),
    ] {
        assert_eq!(blender.plan(&[first(), good]).map(drop), Ok(()), "{case}");
    }
    Ok(())
}

fn plans(face: Face) -> Outcome {
    let (mut own, mut other) = (face.blender(2)?, face.blender(2)?);
    let mut tensors = [Tensor::<f32>::random(&mut Random(61), 4, 2, 0, 0)];
    let before = tensors.clone();
    let mut lists = face.place(&mut tensors);
    let mut plan = own.plan(&lists.grads())?;
    let saved = own.save()?;
    let other_saved = other.save()?;
    refused(other.step(&plan), &Error::ForeignPlan, "another blender");
    assert_eq!(other.save()?, other_saved);
    for bits in [0, 4, 5, 16, 4 | 8] {
        let what = Pass::from_bits_retain(bits);
        refused(own.pass(&plan, what), &Error::Pass { bits }, &format!("{bits:#x}"));
    }
    refused(plan.update(&[]), &Error::PlanTensors { expected: 1, got: 0 }, "plan's 1");
    let length = Error::Length { tensor: 0, role: Role::Train, expected: 4, got: 3 };
    let short = [TensorGrads::new(&A[1..], &A[1..], &[None, None])];
    refused(plan.update(&short), &length, "expected 4");
    let halves = [f16::ONE; 4];
    let dtype = Error::MixedDTypes { tensor: 0, role: Role::Train, expected: "f32", got: "f16" };
    refused(plan.update(&[TensorGrads::new(&halves, &halves, &[None, None])]), &dtype, "f16");
    assert_eq!(own.save()?, saved, "nothing changed");
    own.blend(&plan)?;
    refused(own.dot(&plan.release()), &Error::ReleasedPlan, "released");
    lists.fetch();
    tensors[0].check_blend(&[0.5; 2], None, "the plan ran as it was");
    assert_eq!(bits(&tensors[0].train), bits(&before[0].train));
    // A tensor without any list has a length and a dtype all the same.
    let mut unlisted = own.plan(&[raw(4, DType::F32, 0, 0, &[0, 0], 0)])?;
    let length = Error::Length { tensor: 0, role: Role::Tensor, expected: 4, got: 3 };
    refused(unlisted.update(&[raw(3, DType::F32, 0, 0, &[0, 0], 0)]), &length, "each absent list has 3");
    let dtype = Error::MixedDTypes { tensor: 0, role: Role::Tensor, expected: "f32", got: "bf16" };
    refused(unlisted.update(&[raw(4, DType::BF16, 0, 0, &[0, 0], 0)]), &dtype, "bf16");
    unlisted.update(&[raw(4, DType::F32, 0, 0, &[0, 0], 0)])?;
    let huge = raw(1 << 60, DType::F32, 0, 0, &[0, 0], 0);
    let bytes = (1_u64 << 44) * 16;
    refused(own.plan(&[huge]), &Error::OutOfMemory { what: "the plan", bytes }, "out of memory");
    Ok(())
}

/// A tensor that is lent stays lent, whatever is added to it; a refused plan takes nothing.
#[test]
fn lent_slices() -> Outcome {
    let (one, two) = (Face::CPU.blender(1)?, Face::CPU.blender(1)?);
    let (mut v, mut w, mut x) = (A, A, A);
    let first = [TensorGrads::new(&A, &A, &[None]).in_place(0, &mut v)];
    let plan = one.plan(&first)?;
    let [first] = first;
    let free = TensorGrads::new(&A, &A, &[Some(&A[..])]).blended(&mut x);
    let both = [free, first.blended(&mut w)];
    refused(two.plan(&both), &Error::ForeignTensor { tensor: 1 }, "tensor 1");
    one.plan(&both)?;
    drop(plan);
    // A list that was replaced leaves no shape behind.
    let mut longer = [1.0_f32; 5];
    two.plan(&[TensorGrads::blend_only(&[Some(&A[..])]).in_place(0, &mut longer)])?;
    Ok(())
}

fn weights_and_scales(face: Face) -> Outcome {
    let mut blender = face.blender(2)?;
    let saved = blender.save()?;
    let count = Error::Count { what: "the weights", expected: 2, got: 3 };
    refused(blender.set_weights(&[1.0; 3]), &count, "got 3");
    for got in [f64::NAN, f64::INFINITY, 1e300] {
        refused(blender.set_weights(&[1.0, got]), &Error::Weight { modality: 1, got }, "modality 1");
    }
    // SAFETY: a misaligned scale is refused, not read.
    let scale = unsafe { GradScale::from_raw(0x1002 as *const f32) };
    refused(blender.set_grad_scale(scale), &Error::MisalignedScale { address: 0x1002 }, "0x1002");
    for got in [0.0, f32::NAN, f32::INFINITY] {
        refused(blender.set_grad_scale(GradScale::value(got)), &Error::Scale { got }, "gradient scale");
    }
    assert_eq!(blender.save()?, saved, "nothing changed");
    Ok(())
}

#[test]
fn numbers() -> Outcome {
    let policy = Policy::default();
    refused(solve(&[], &[], &policy), &Error::Modalities { got: 0 }, "got 0");
    refused(solve(&[1.0; 33], &[1.0; 33 * 33], &policy), &Error::Modalities { got: 33 }, "got 33");
    let count = Error::Count { what: "the second moment", expected: 4, got: 2 };
    refused(solve(&[1.0; 2], &[1.0; 2], &policy), &count, "expected 4");
    let got = f64::NAN;
    refused(solve(&[1.0, got], &[1.0; 4], &policy), &Error::Numerator { modality: 1, got }, "modality 1");
    for (face, got) in [(1, f64::INFINITY), (3, -1.0)] {
        let mut s = [1.0, 0.0, 0.0, 1.0];
        s[face] = got;
        let want = Error::SecondMoment { row: face / 2, column: 1, got };
        refused(solve(&[1.0; 2], &s, &policy), &want, "and 1");
    }
    let (good, bad) = (Losses { train: 1.0, valid: 1.0 }, Losses { train: 1.0, valid: f64::NAN });
    let want = Error::Loss { modality: 1, list: "validation", when: "at the checkpoint", got: f64::NAN };
    refused(ogr(&[good, bad], &[good; 2], &policy), &want, "validation loss of modality 1");
    let (up, down) = (Losses { train: 1.0, valid: 1e308 }, Losses { train: 1.0, valid: -1e308 });
    let (list, when) = ("difference of the", "before and after training");
    let want = Error::Loss { modality: 1, list, when, got: f64::INFINITY };
    refused(ogr(&[good, up], &[good, down], &policy), &want, "modality 1");
    let count = Error::Count { what: "the losses after training", expected: 2, got: 1 };
    refused(ogr(&[good; 2], &[good], &policy), &count, "got 1");
    refused(Schedule::online(0, 5), &Error::Schedule { what: "warm-up" }, "warm-up");
    refused(Schedule::online(5, 0), &Error::Schedule { what: "super-epoch" }, "super-epoch");
    Ok(())
}

fn saved_states(face: Face) -> Outcome {
    let mut blender = face.blender(2)?;
    let mut saved = blender.save()?;
    let other = |config| face.blender_with(config)?.save();
    let mismatch =
        |what, expected: &str, got: &str| Error::StateMismatch { what, expected: expected.into(), got: got.into() };
    let three = other(Config::new(3))?;
    refused(blender.load(&three), &mismatch("modalities", "2", "3"), "this blender has 2");
    let mean = other(Config { average: Average::Mean, ..Config::new(2) })?;
    refused(blender.load(&mean), &mismatch("average", "ema", "mean"), "mean");
    let slow = other(Config { average: Average::Ema { decay: 0.5 }, ..Config::new(2) })?;
    refused(blender.load(&slow), &mismatch("decay", "0.99", "0.5"), "0.5");
    let corrupt = |reason: &str| Error::CorruptState { reason: reason.into() };
    refused(blender.load(&[]), &corrupt("shorter than a header"), "shorter");
    let foreign = corrupt("does not start with the mark of a gradblend state");
    refused(blender.load(&[0; 400]), &foreign, "mark");
    let last = saved.len() - 20;
    saved[last] ^= 1;
    refused(blender.load(&saved), &corrupt("checksum differs"), "checksum");
    // Where the checksum was made anew, for K = 2: the normaliser is at 36, n at 44, the first mean at 108.
    let forge = |changes: &[(usize, u64)]| {
        let mut forged = saved.clone();
        forged[last] ^= 1;
        let body = forged.len() - 4;
        changes.iter().for_each(|(at, word)| forged[*at..*at + 8].copy_from_slice(&word.to_le_bytes()));
        let sum = crc32fast::hash(&forged[..body]).to_le_bytes();
        forged[body..].copy_from_slice(&sum);
        forged
    };
    blender.load(&forge(&[]))?;
    let weight = corrupt("observations without a weight, or with too much");
    let moment = corrupt("a moment is not finite, or there without an observation");
    let number = |x: f64| x.to_bits();
    for (changes, want) in [
        (&[(44, 1)][..], &weight),
        (&[(36, number(0.5))], &weight),
        (&[(36, number(2.0)), (44, 1)], &weight),
        (&[(36, number(-1.0)), (44, 1)], &weight),
        (&[(108, number(1.0))], &moment),
        (&[(36, number(1e-300)), (44, 1), (108, number(1e300))], &moment),
    ] {
        refused(blender.load(&forge(changes)), want, "not a saved state");
    }
    // -0 is the same decay as 0.
    let decay = |decay| Config { average: Average::Ema { decay }, ..Config::new(2) };
    let minus = face.blender_with(decay(-0.0))?.save()?;
    face.blender_with(decay(0.0))?.load(&minus)?;
    Ok(())
}
