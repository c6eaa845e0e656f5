//! Invalid input: a rejected call returns the expected error and leaves everything as it was.

use gradblend::{Average, Blender, Config, DType, Device, Error, Pass, Policy, Role, TensorGrads, f16};
use gradblend_testkit::{
    Face, Input, Outcome, Random, Result, Tensor, TestBlender, TestPlan, bits, rejected, rejected_as,
};

gradblend_testkit::tests! {
    once: plans, passes, tensors_without_buffers, weights, scales, configurations;
    host: buffers, accepted_buffers, lengths_and_dtypes;
}

const A: [f32; 4] = [1.0, 2.0, 3.0, 4.0];

/// A search of the sources: no variant of [`Error`] is missing from the tests. That they provoke it is theirs to check.
#[test]
fn every_error_is_named_in_a_test() {
    let source = include_str!("../src/error.rs");
    let tests = concat!(
        include_str!("checkpoint.rs"),
        include_str!("cudarc.rs"),
        include_str!("dlpack.rs"),
        include_str!("driver.rs"),
        include_str!("fork.rs"),
        include_str!("graph.rs"),
        include_str!("losses.rs"),
        include_str!("plan.rs"),
        include_str!("ranks.rs"),
        include_str!("solve.rs"),
        include_str!("step.rs"),
        include_str!("trainer.rs"),
    );
    let body = source.split("pub enum Error {").nth(1).unwrap_or("");
    let body = body.split("\n}").next().unwrap_or("");
    let variants =
        body.lines().filter_map(|line| line.strip_prefix("    ")).filter(|line| line.starts_with(char::is_uppercase));
    let variants: Vec<&str> = variants.filter_map(|line| line.split([' ', ',']).next()).collect();
    assert!(variants.len() > 25, "{variants:?}");
    for variant in variants {
        // With its fields, or before the end of an argument.
        let named = [" {", ",", ")"].iter().any(|end| tests.contains(&format!("Error::{variant}{end}")));
        assert!(named, "no test names Error::{variant}");
    }
}

fn configurations(face: Face) -> Outcome {
    for got in [0, 33, 34, u32::MAX] {
        let want = Error::Modalities { got: u64::from(got) };
        rejected(face.blender_with(Config::new(got)), &want, &format!("got {got}"));
    }
    for got in [1.0, -1e-9, 1.5, f64::NAN, f64::INFINITY] {
        let config = Config { average: Average::Ema { decay: got }, ..Config::new(2) };
        rejected(face.blender_with(config), &Error::Decay { got }, "decay");
    }
    for got in [-1e-300, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let policy = Policy { damping: got, ..Policy::default() };
        rejected(face.blender_with(Config { policy, ..Config::new(2) }), &Error::Damping { got }, "damping");
    }
    for threads in [4097, u32::MAX] {
        let result = face.blender_with(Config { threads, ..Config::new(2) });
        if !face.cuda {
            let want = Error::Threads { threads, reason: "expected at most 4096".into() };
            rejected(result, &want, &threads.to_string());
        }
    }
    #[cfg(not(feature = "cuda"))]
    {
        let want = Error::NotBuilt { backend: "CUDA", ordinal: 3 };
        rejected(face.blender_on(3, Config::new(2)), &want, "not part of this build|3");
    }
    rejected(DType::try_from(7), &Error::DType { code: 7 }, "dtype 7");
    assert_eq!(DType::try_from(2), Ok(DType::BF16));
    Ok(())
}

/// What only slices can get wrong: their number, lengths and dtypes.
#[test]
fn slices() -> Outcome {
    let blender = Blender::new(&Device::cpu(), Config { threads: 1, ..Config::new(2) })?;
    let (mut out, mut halves, many) = (A, [f16::ONE; 4], vec![None; 40]);
    let good = || TensorGrads::new(&A, &A, &[Some(&A[..]), None]);
    let none = || TensorGrads::new(&A, &A, &[None, None]);
    let length = |role, got| Error::Length { tensor: 1, role, expected: 4, got };
    let count = |got| Error::ModalityCount { tensor: 1, expected: 2, got };
    let check = |bad: TensorGrads<'_>, want: Error, words: &str| rejected(blender.plan([good(), bad]), &want, words);
    check(TensorGrads::new(&A, &A, &[None]), count(1), "tensor 1|got 1");
    check(TensorGrads::new(&A, &A, &many), count(40), "tensor 1|got 40");
    check(none().in_place(5, &mut out), count(6), "tensor 1|got 6");
    check(TensorGrads::new(&A, &A[1..], &[None, None]), length(Role::Valid, 3), "validation gradient has 3");
    check(TensorGrads::new(&A, &A, &[None, Some(&A[2..])]), length(Role::Modality(1), 2), "modality 1 has 2");
    check(none().blended(&mut out[1..]), length(Role::Blended, 3), "blended gradient has 3");
    let want = Error::MixedDTypes { tensor: 1, role: Role::Blended, expected: "f32", got: "f16" };
    check(none().blended(&mut halves), want, "blended gradient is f16, expected f32");
    // A buffer that was replaced leaves no shape behind.
    let (one, mut longer) = (Blender::new(&Device::cpu(), Config { threads: 1, ..Config::new(1) })?, [1.0_f32; 5]);
    one.plan([TensorGrads::blend_only(&[Some(&A[..])]).in_place(0, &mut longer)])?;
    Ok(())
}

/// Three tensors of 4 f32 and two modalities. Each buffer has 64 bytes of `memory` for itself.
struct Fixture {
    memory: Vec<[f32; 16]>,
    blender: TestBlender,
    plan: Option<TestPlan<'static>>,
}

const TRAIN: usize = 0;
const VALID: usize = 1;
const FIRST: usize = 2;
const SECOND: usize = 3;
const BLENDED: usize = 4;

/// An address: a number, or so many bytes from the start of the buffer of a tensor and a role.
#[derive(Clone, Copy, Debug)]
enum Address {
    Number(usize),
    At(usize, usize, isize),
}
use Address::{At, Number};

/// What happens to tensor 1: the buffer of a role moves to an address.
type Change = (usize, Address);

impl Fixture {
    fn new(face: Face) -> Result<Self> {
        let mut random = Random(61);
        let memory = (0..15).map(|_| [(); 16].map(|()| random.number() as f32)).collect();
        let mut fixture =
            Fixture { memory, blender: face.blender_with(Config { threads: 1, ..Config::new(2) })?, plan: None };
        let inputs = fixture.inputs(&[]);
        let mut plan = fixture.blender.plan(inputs)?;
        for _ in 0..3 {
            fixture.blender.step(&plan)?;
        }
        fixture.blender.reweight()?;
        fixture.blender.dot(&plan)?;
        plan.update(fixture.inputs(&[]), fixture.blender.stream)?;
        fixture.plan = Some(plan);
        Ok(fixture)
    }

    fn address(&mut self, address: Address) -> usize {
        match address {
            Number(number) => number,
            At(tensor, role, bytes) => self
                .memory
                .as_mut_ptr()
                .expose_provenance()
                .wrapping_add((tensor * 5 + role) * 64)
                .wrapping_add_signed(bytes),
        }
    }

    fn inputs(&mut self, changes: &[Change]) -> Vec<Input<'static>> {
        let mut input = |tensor: usize| {
            let mut at = [0, 1, 2, 3, 4].map(|role| self.address(At(tensor, role, 0)));
            for (role, address) in changes.iter().filter(|_| tensor == 1) {
                at[*role] = self.address(*address);
            }
            // SAFETY: 4 elements of `memory`, which outlives the plan; plans at other addresses are rejected.
            unsafe { Input::at(4, DType::F32, at[0], at[1], &[at[2], at[3]], at[4]) }
        };
        vec![input(0), input(1), input(2)]
    }

    /// Checks that a plan and an update of these inputs are rejected, and change nothing.
    #[track_caller]
    fn check(&mut self, changes: &[Change], want: &Error, words: &str) -> Outcome {
        let (saved, memory) = (self.blender.save()?, self.memory.clone());
        let inputs = self.inputs(changes);
        rejected(self.blender.plan(inputs), want, words);
        let (inputs, stream) = (self.inputs(changes), self.blender.stream);
        let plan = self.plan.as_mut().ok_or("no plan")?;
        rejected(plan.update(inputs, stream), want, words);
        assert_eq!((self.blender.save()?, &self.memory), (saved.clone(), &memory), "nothing has changed");
        // The plan runs on the buffers that it had.
        self.blender.blend(plan)?;
        assert_ne!(self.memory[9][..4], memory[9][..4]);
        self.memory = memory;
        let inputs = self.inputs(&[]);
        let plan = self.plan.as_mut().ok_or("no plan")?;
        plan.update(inputs, stream)?;
        self.blender.load(&saved)?;
        Ok(())
    }
}

fn buffers(face: Face) -> Outcome {
    let mut fixture = Fixture::new(face)?;
    let role = |role| match role {
        TRAIN => Role::Train,
        VALID => Role::Valid,
        BLENDED => Role::Blended,
        _ => Role::Modality(role - FIRST),
    };
    for missing in [TRAIN, VALID] {
        let want = Error::Unpaired { tensor: 1, missing: role(missing) };
        fixture.check(&[(missing, Number(0))], &want, &format!("tensor 1|{} is absent", role(missing)))?;
    }
    for (index, bytes) in [(TRAIN, 1), (VALID, 2), (FIRST, 3), (SECOND, 1), (BLENDED, 2)] {
        let to = At(1, index, bytes);
        let (role, address) = (role(index), fixture.address(to) as u64);
        let want = Error::Misaligned { tensor: 1, role, address, alignment: 4 };
        fixture.check(&[(index, to)], &want, &format!("tensor 1|{role}|{address:#x}|4 bytes"))?;
    }
    for (index, address) in [(TRAIN, usize::MAX - 15), (SECOND, usize::MAX - 3), (BLENDED, usize::MAX - 11)] {
        let role = role(index);
        let want = Error::OutOfRange { tensor: 1, role, address: address as u64, len: 4 };
        fixture.check(&[(index, Number(address))], &want, &format!("tensor 1|{role}|past the end of memory"))?;
    }
    // The moved buffer and its new address; the tensor whose blended gradient overlaps which buffer of which tensor.
    for (index, to, tensor, other, other_tensor) in [
        (BLENDED, At(1, TRAIN, 0), 1, TRAIN, 1),
        (BLENDED, At(1, VALID, 0), 1, VALID, 1),
        (BLENDED, At(1, TRAIN, 12), 1, TRAIN, 1),
        (BLENDED, At(1, FIRST, 4), 1, FIRST, 1),
        (BLENDED, At(1, SECOND, -12), 1, SECOND, 1),
        (BLENDED, At(0, SECOND, 0), 1, SECOND, 0),
        (BLENDED, At(2, TRAIN, 0), 1, TRAIN, 2),
        (BLENDED, At(0, BLENDED, 0), 0, BLENDED, 1),
        (BLENDED, At(2, BLENDED, 8), 2, BLENDED, 1),
        (TRAIN, At(0, BLENDED, 0), 0, TRAIN, 1),
        (FIRST, At(2, BLENDED, 12), 2, FIRST, 1),
        (SECOND, At(0, BLENDED, -4), 0, SECOND, 1),
    ] {
        let want = Error::Overlap { tensor, other: role(other), other_tensor };
        let words = format!("tensor {tensor}: blended gradient overlaps|{}|tensor {other_tensor}", role(other));
        fixture.check(&[(index, to)], &want, &words)?;
    }
    // In place of two modalities at once.
    let want = Error::Overlap { tensor: 1, other: Role::Modality(1), other_tensor: 1 };
    fixture.check(&[(FIRST, At(1, SECOND, 0)), (BLENDED, At(1, SECOND, 0))], &want, "modality 1")?;
    Ok(())
}

/// What resembles an overlap and is none. The plan runs.
fn accepted_buffers(face: Face) -> Outcome {
    let mut fixture = Fixture::new(face)?;
    let memory = fixture.memory.clone();
    for change in [
        (BLENDED, At(1, FIRST, 0)),
        (BLENDED, At(1, SECOND, 0)),
        (BLENDED, At(1, SECOND, 16)),
        (SECOND, At(0, BLENDED, 16)),
        (VALID, At(1, TRAIN, 0)),
        (FIRST, At(1, TRAIN, 4)),
        (SECOND, At(0, SECOND, 0)),
        (SECOND, Number(0)),
        (BLENDED, Number(0)),
    ] {
        let (inputs, again, stream) = (fixture.inputs(&[change]), fixture.inputs(&[change]), fixture.blender.stream);
        fixture.blender.plan(inputs)?;
        let plan = fixture.plan.as_mut().ok_or("no plan")?;
        plan.update(again, stream)?;
        fixture.blender.step(plan)?;
        fixture.memory.copy_from_slice(&memory);
    }
    // An empty tensor overlaps nothing.
    let at = fixture.address(At(0, BLENDED, 0));
    let mut inputs = fixture.inputs(&[]);
    // SAFETY: no elements.
    inputs.push(unsafe { Input::at(0, DType::F32, at, at, &[at, 0], at) });
    fixture.blender.plan(inputs)?;
    Ok(())
}

fn lengths_and_dtypes(face: Face) -> Outcome {
    let mut fixture = Fixture::new(face)?;
    let stream = fixture.blender.stream;
    let changed = |fixture: &mut Fixture, len: u64, dtype: DType| {
        let mut inputs = fixture.inputs(&[]);
        if let Input::Addresses(addresses) = &mut inputs[1] {
            (addresses.len, addresses.dtype) = (len, dtype);
        }
        inputs
    };
    for len in [1 << 61, 1 << 62, 1 << 63, u64::MAX] {
        let address = fixture.address(At(1, TRAIN, 0)) as u64;
        let want = Error::OutOfRange { tensor: 1, role: Role::Train, address, len };
        let inputs = changed(&mut fixture, len, DType::F32);
        rejected(fixture.blender.plan(inputs), &want, "tensor 1|train gradient");
    }
    for len in [0, 3, 5] {
        let inputs = changed(&mut fixture, len, DType::F32);
        let want = Error::Length { tensor: 1, role: Role::Train, expected: 4, got: len };
        let plan = fixture.plan.as_mut().ok_or("no plan")?;
        rejected(plan.update(inputs, stream), &want, &format!("tensor 1|{len} elements, expected 4"));
    }
    let inputs = changed(&mut fixture, 4, DType::BF16);
    let want = Error::MixedDTypes { tensor: 1, role: Role::Train, expected: "f32", got: "bf16" };
    rejected(fixture.plan.as_mut().ok_or("no plan")?.update(inputs, stream), &want, "tensor 1|bf16|f32");
    for got in [0, 1, 2, 4] {
        let mut inputs = fixture.inputs(&[]);
        inputs.extend(fixture.inputs(&[]));
        inputs.truncate(got);
        let plan = fixture.plan.as_mut().ok_or("no plan")?;
        rejected(plan.update(inputs, stream), &Error::PlanTensors { expected: 3, got }, "plan's 3 tensors");
    }
    Ok(())
}

/// A tensor at no address.
fn without_buffers(len: u64, dtype: DType) -> Vec<Input<'static>> {
    // SAFETY: there is no address.
    vec![unsafe { Input::at(len, dtype, 0, 0, &[0, 0], 0) }]
}

/// A tensor without any buffer still has a length and a dtype.
fn tensors_without_buffers(face: Face) -> Outcome {
    let mut blender = face.blender(2)?;
    let (role, stream) = (Role::Tensor, blender.stream);
    let mut plan = blender.plan(without_buffers(4, DType::F32))?;
    let want = Error::Length { tensor: 0, role, expected: 4, got: 3 };
    rejected(plan.update(without_buffers(3, DType::F32), stream), &want, "tensor 0|3 elements");
    let want = Error::MixedDTypes { tensor: 0, role, expected: "f32", got: "bf16" };
    rejected(plan.update(without_buffers(4, DType::BF16), stream), &want, "tensor 0|bf16");
    plan.update(without_buffers(4, DType::F32), stream)?;
    blender.step(&plan)?;
    let huge = blender.plan(without_buffers(1 << 60, DType::F32));
    let failure = rejected_as(huge, 6, "out of memory|the plan");
    assert!(matches!(failure.error, None | Some(Error::OutOfMemory { what: "the plan", .. })));
    let mut none = blender.plan(Vec::new())?;
    none.update(Vec::new(), stream)?;
    blender.step(&none)?;
    Ok(())
}

/// Plans of other blenders and released plans.
fn plans(face: Face) -> Outcome {
    let (mut own, mut other, mut three) = (face.blender(2)?, face.blender(2)?, face.blender(3)?);
    let mut tensors = [Tensor::<f32>::random(&mut Random(61), 4, 2, 0, 0)];
    let before = tensors.clone();
    let mut uploaded = face.upload(&mut tensors);
    let plan = own.plan(uploaded.inputs())?;
    let saved = [own.save()?, other.save()?, three.save()?];
    for blender in [&mut other, &mut three] {
        for result in
            [blender.step(&plan), blender.dot(&plan), blender.blend(&plan), blender.pass(&plan, Pass::OBSERVE)]
        {
            rejected(result, &Error::ForeignPlan, "another blender");
        }
    }
    assert_eq!([own.save()?, other.save()?, three.save()?], saved, "nothing has changed");
    own.blend(&plan)?;
    let released = plan.release();
    if !face.c {
        rejected(own.dot(&released), &Error::ReleasedPlan, "released");
    }
    uploaded.fetch();
    tensors[0].check_blend(&before[0], &[0.5; 2], false, "the plan runs as it was");
    assert_eq!(bits(&tensors[0].train), bits(&before[0].train));
    // Neither a plan of a dropped blender nor one of its successor's memory is taken for the other's.
    drop(own);
    rejected(face.blender(2)?.pass(&released, Pass::DOT), &Error::ForeignPlan, "another blender");
    Ok(())
}

fn passes(face: Face) -> Outcome {
    let mut blender = face.blender(2)?;
    let plan = blender.plan(without_buffers(4, DType::F32))?;
    let saved = blender.save()?;
    for bits in [0, 4, 4 | 1, 4 | 8, 16, 16 | 3, 1 << 31, u32::MAX] {
        let what = Pass::from_bits_retain(bits);
        rejected(blender.pass(&plan, what), &Error::Pass { bits }, &format!("{bits:#x}"));
    }
    assert_eq!(blender.save()?, saved, "nothing has changed");
    Ok(())
}

fn weights(face: Face) -> Outcome {
    let mut blender = face.blender(2)?;
    let saved = blender.save()?;
    for got in [0, 1, 3, 32, 64] {
        let count = Error::Count { what: "the weights", expected: 2, got };
        rejected(blender.set_weights(&vec![1.0; got]), &count, &format!("got {got}"));
    }
    // Halfway to 2^128 from the largest f32 rounds to infinity.
    let halfway = f64::from(f32::MAX) + 2.0_f64.powi(103);
    for got in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e39, halfway, -halfway, f64::MAX] {
        for modality in 0..2 {
            let mut weights = [1.0; 2];
            weights[modality] = got;
            let want = Error::Weight { modality, got };
            rejected(blender.set_weights(&weights), &want, &format!("modality {modality}"));
        }
    }
    assert_eq!(blender.save()?, saved, "nothing has changed");
    for weight in [f64::from(f32::MAX), f64::from(f32::MIN), halfway.next_down(), 1e-300, 0.0, -3.0] {
        blender.set_weights(&[0.25, weight])?;
        assert_eq!(blender.report()?.weights, [0.25, weight]);
        assert_eq!(blender.weights()?, [0.25, weight as f32]);
    }
    Ok(())
}

fn scales(face: Face) -> Outcome {
    let mut blender = face.blender(2)?;
    let scale = face.array(vec![2.0_f32]);
    for bytes in 1..4 {
        let misaligned = scale.address().wrapping_byte_add(bytes);
        let want = Error::MisalignedScale { address: misaligned as u64 };
        // SAFETY: a misaligned scale is rejected, not read.
        rejected(unsafe { blender.set_grad_scale(misaligned) }, &want, &format!("{misaligned:?}"));
    }
    for got in [0.0, f32::NAN, f32::INFINITY] {
        if let Some(result) = blender.set_grad_scale_value(got) {
            rejected(result, &Error::Scale { got }, "gradient scale");
        }
    }
    // The scale in force is still the one before: none.
    blender.observe_sums(&[8.0, 4.0], &[1.0, 1.0])?;
    assert_eq!(blender.report()?.mean, [8.0, 4.0]);
    Ok(())
}
