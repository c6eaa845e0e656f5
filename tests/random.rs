//! Random runs: each pass against the oracle, and bit for bit against the same work done operation by operation, at
//! other addresses, with other threads, and after a stop and a start from a saved state.

use gradblend::{Average, Cadence, Config, Negative, Overfitting, Pass, Policy, bf16, f16};
use gradblend_testkit::proptest::prelude::*;
use gradblend_testkit::{
    DeviceArray, Face, Moments, Outcome, Output, Random, Result, Sample, Sums, Tensor, TestBlender, TestPlan, property,
};

gradblend_testkit::tests! {
    once: random_runs;
}

/// One tensor: its length, dtype, output, and what it lacks.
#[derive(Clone, Debug)]
struct Shape {
    len: usize,
    dtype: usize,
    has_products: bool,
    absent: usize,
    /// 0: not blended. 1 or 2: in place of a random modality, if it is present. Else: blended.
    output: usize,
    /// Once in a while one element is not finite.
    has_nonfinite: bool,
}

#[derive(Clone, Debug)]
struct Round {
    sets_weights: bool,
    /// The gradient scale set before the round.
    scale: Option<f32>,
    /// Whether a buffer becomes absent, and whether all move.
    drops: bool,
    moves: bool,
    what: u32,
    reweights: bool,
    resets: bool,
    restarts: bool,
}

#[derive(Clone, Debug)]
struct Run {
    seed: u64,
    config: Config,
    shapes: Vec<Shape>,
    rounds: Vec<Round>,
}

fn once_in(n: u32) -> impl Strategy<Value = bool> {
    prop_oneof![n - 1 => Just(false), 1 => Just(true)]
}

fn configs() -> impl Strategy<Value = Config> {
    let k = prop_oneof![7 => prop::sample::select(vec![1_u32, 2, 2, 3, 3, 4, 5, 6, 8, 9]), 1 => 1..=32_u32];
    let decay = prop::sample::select(vec![0.0, 0.5, 0.9, 0.99, 0.999_999]);
    let average = prop_oneof![Just(Average::Mean), decay.prop_map(|decay| Average::Ema { decay })];
    let choices = any::<[bool; 3]>();
    let threads = prop_oneof![7 => Just(1_u32), 1 => 2..4_u32];
    let damping = prop::sample::select(vec![1e-12, 0.1]);
    (k, average, choices, threads, damping).prop_map(
        |(modalities, average, [correlated, signed, every], threads, damping)| {
            let overfitting = if correlated { Overfitting::Correlated } else { Overfitting::Uncorrelated };
            let negative = if signed { Negative::Signed } else { Negative::Clamp };
            let cadence = if every { Cadence::EveryObservation } else { Cadence::OnRequest };
            Config {
                modalities,
                average,
                policy: Policy { overfitting, negative, damping, ..Policy::default() },
                cadence,
                threads,
            }
        },
    )
}

fn runs() -> impl Strategy<Value = Run> {
    let lengths = vec![0, 0, 1, 1, 2, 3, 5, 7, 8, 9, 15, 17, 31, 33, 63, 65, 127, 255, 257, 511, 1023];
    let len = prop_oneof![80 => prop::sample::select(lengths), 1 => 65_535..65_538_usize];
    let absent = prop_oneof![2 => Just(0_usize), 1 => Just(3)];
    let has_products = once_in(5).prop_map(|lacks| !lacks);
    let shape = (len, 0..3_usize, has_products, absent, 0..6_usize, once_in(60)).prop_map(
        |(len, dtype, has_products, absent, output, has_nonfinite)| Shape {
            len,
            dtype,
            has_products,
            absent,
            output,
            has_nonfinite,
        },
    );
    let usual = prop::sample::select(vec![1.0, 3.0, 0.125, -65536.0]);
    let scale = prop_oneof![24 => Just(None), 7 => usual.prop_map(Some),
        1 => prop::sample::select(vec![Some(0.0), Some(f32::INFINITY), Some(f32::NAN)])];
    // Half of the rounds are steps. ACCUMULATE needs BLEND.
    let pass = (1..16_u32).prop_filter("ACCUMULATE without BLEND", |what| what & 6 != 4);
    let what = prop_oneof![Just(1 | 2 | 8), pass];
    let round = (once_in(4), scale, once_in(6), once_in(3), what, once_in(6), once_in(12), once_in(4)).prop_map(
        |(sets_weights, scale, drops, moves, what, reweights, resets, restarts)| Round {
            sets_weights,
            scale,
            drops,
            moves,
            what,
            reweights,
            resets,
            restarts,
        },
    );
    let parts = (any::<u64>(), configs(), prop::collection::vec(shape, 0..7), prop::collection::vec(round, 1..5));
    parts.prop_map(|(seed, config, shapes, rounds)| Run { seed, config, shapes, rounds })
}

/// Tensors of all dtypes.
#[derive(Clone, Debug, Default)]
struct Mixed {
    f32s: Vec<Tensor<f32>>,
    f16s: Vec<Tensor<f16>>,
    bf16s: Vec<Tensor<bf16>>,
}

/// Evaluates an expression for the tensors of each dtype.
macro_rules! each {
    ($mixed:expr, $tensors:ident => $do:expr) => {{
        {
            let $tensors = &mut $mixed.f32s;
            $do
        }
        {
            let $tensors = &mut $mixed.f16s;
            $do
        }
        {
            let $tensors = &mut $mixed.bf16s;
            $do
        }
    }};
    ($one:expr, $other:expr, $tensors:ident, $others:ident => $do:expr) => {{
        {
            let ($tensors, $others) = (&$one.f32s, &$other.f32s);
            $do
        }
        {
            let ($tensors, $others) = (&$one.f16s, &$other.f16s);
            $do
        }
        {
            let ($tensors, $others) = (&$one.bf16s, &$other.bf16s);
            $do
        }
    }};
}

impl Shape {
    fn tensor<T: Sample>(&self, random: &mut Random, k: usize) -> Tensor<T> {
        let mut tensor = Tensor::random(random, self.len, k, 0, self.absent).scattered(random);
        tensor.scale([0.125, 0.25, 0.5, 1.0, 2.0][random.below(5)]);
        tensor.has_products = self.has_products;
        let modality = random.below(k);
        tensor.output = match self.output {
            0 => Output::None,
            1 | 2 if tensor.modalities[modality].is_some() => Output::InPlace(modality),
            _ => Output::Blended,
        };
        if self.has_nonfinite && self.len > 0 {
            let (bad, element) = (random.pick(&[f64::NAN, f64::NEG_INFINITY]), random.below(self.len));
            let which = random.below(2 + tensor.present());
            tensor.inputs().skip(which).take(1).for_each(|buffer| buffer[element] = T::round(bad));
        }
        tensor
    }
}

impl Mixed {
    fn new(random: &mut Random, shapes: &[Shape], k: usize) -> Self {
        let mut mixed = Mixed::default();
        for shape in shapes {
            match shape.dtype {
                0 => mixed.f32s.push(shape.tensor(random, k)),
                1 => mixed.f16s.push(shape.tensor(random, k)),
                _ => mixed.bf16s.push(shape.tensor(random, k)),
            }
        }
        mixed
    }

    /// Makes products or a modality absent in one tensor of each dtype.
    fn drop_buffers(&mut self, index: usize, buffer: usize) {
        each!(self, tensors => if let Some(tensor) = tensors.get_mut(index) {
            match buffer.checked_sub(1) {
                None => tensor.has_products = false,
                Some(k) => {
                    if tensor.output == Output::InPlace(k) {
                        tensor.output = Output::None;
                    }
                    tensor.modalities[k] = None;
                }
            }
        });
    }
}

/// One of two blenders that are to stay equal.
struct Side {
    face: Face,
    blender: TestBlender,
    tensors: Mixed,
    /// The plan to update; `None`: each run makes a new one.
    plan: Option<TestPlan<'static>>,
    updates: bool,
}

impl Side {
    fn run(&mut self, operation: impl FnOnce(&mut TestBlender, &TestPlan<'_>) -> Result<()>) -> Result<()> {
        let Mixed { f32s, f16s, bf16s } = &mut self.tensors;
        let (mut f32s, mut f16s, mut bf16s) = (self.face.upload(f32s), self.face.upload(f16s), self.face.upload(bf16s));
        let mut inputs = f32s.inputs();
        inputs.extend(f16s.inputs());
        inputs.extend(bf16s.inputs());
        let plan = match self.plan.take() {
            Some(mut plan) if self.updates => {
                plan.update(inputs, self.blender.stream)?;
                plan
            }
            _ => self.blender.plan(inputs)?,
        };
        operation(&mut self.blender, &plan)?;
        self.plan = Some(plan.release());
        f32s.fetch();
        f16s.fetch();
        bf16s.fetch();
        Ok(())
    }
}

fn check_blends(after: &Mixed, before: &Mixed, weights: &[f32], accumulates: bool, case: &str) {
    each!(after, before, tensors, befores => {
        for (tensor, before) in tensors.iter().zip(befores).filter(|(tensor, _)| tensor.output != Output::None) {
            tensor.check_blend(before, weights, accumulates, case);
        }
    });
}

/// Bits, with one NaN for all: payloads are not promised.
fn comparable<T: Sample>(elements: &[T]) -> Vec<u32> {
    elements.iter().map(|x| if x.exact().is_nan() { u32::MAX } else { x.bits() }).collect()
}

/// Two blenders with the same history: `whole` does each pass at once, `apart` does its operations one by one. And what
/// the oracle expects of both.
struct Pair<'a> {
    config: Config,
    random: Random,
    scale: &'a DeviceArray<f32>,
    scale_in_force: f32,
    whole: Side,
    apart: Side,
    pending: Sums,
    moments: Moments,
}

impl<'a> Pair<'a> {
    fn new(face: Face, run: &Run, scale: &'a DeviceArray<f32>) -> Result<Self> {
        let (k, config) = (run.config.modalities as usize, run.config);
        let mut random = Random(run.seed);
        let tensors = Mixed::new(&mut random, &run.shapes, k);
        let side = |updates| {
            let blender = face.blender_with(config)?;
            Result::Ok(Side { face, blender, tensors: tensors.clone(), plan: None, updates })
        };
        let (whole, apart) = (side(false)?, side(true)?);
        let (pending, moments) = (Sums::new(k), Moments::new(k, config.average));
        Ok(Pair { config, random, scale, scale_in_force: 1.0, whole, apart, pending, moments })
    }

    fn k(&self) -> usize {
        self.config.modalities as usize
    }

    /// Sets weights and the gradient scale, drops and moves buffers.
    fn prepare(&mut self, round: &Round) -> Result<()> {
        let k = self.k();
        if round.sets_weights {
            let random = &mut self.random;
            let weights: Vec<f64> =
                (0..k).map(|_| if random.below(4) == 0 { 0.0 } else { 2.0 * random.number() }).collect();
            self.whole.blender.set_weights(&weights)?;
            self.apart.blender.set_weights(&weights)?;
        }
        if let Some(value) = round.scale {
            self.scale.set(value);
            self.scale_in_force = value;
            for side in [&mut self.whole, &mut self.apart] {
                // SAFETY: `scale` outlives the blenders, and changes between calls only.
                unsafe { side.blender.set_grad_scale(self.scale.address()) }?;
            }
        }
        if round.drops {
            let (index, buffer) = (self.random.below(3), self.random.below(1 + k));
            self.whole.tensors.drop_buffers(index, buffer);
            self.apart.tensors.drop_buffers(index, buffer);
        }
        if round.moves {
            let random = &mut self.random;
            each!(self.apart.tensors, tensors => for tensor in tensors {
                *tensor = tensor.scattered(random);
            });
        }
        Ok(())
    }

    /// Does a pass on both sides, and checks each operation against the oracle.
    fn pass(&mut self, what: Pass, case: &str) -> Result<()> {
        let step = what == Pass::DOT | Pass::BLEND | Pass::OBSERVE;
        self.whole.run(|blender, plan| if step { blender.step(plan) } else { blender.pass(plan, what) })?;
        let before = self.apart.tensors.clone();
        let apart = &mut self.apart;
        if what.contains(Pass::DOT) {
            apart.run(TestBlender::dot)?;
            each!(apart.tensors, tensors => tensors.iter().for_each(|tensor| self.pending.add(tensor)));
        }
        self.pending.check(&apart.blender.pending()?, case);
        if what.contains(Pass::BLEND) {
            let weights = apart.blender.weights()?;
            let accumulates = what.contains(Pass::ACCUMULATE);
            apart.run(if accumulates { TestBlender::accumulate } else { TestBlender::blend })?;
            check_blends(&apart.tensors, &before, &weights, accumulates, case);
        }
        if what.contains(Pass::OBSERVE) {
            self.moments.observe(&apart.blender.pending()?, self.scale_in_force);
            apart.blender.observe()?;
            self.pending = Sums::new(self.k());
        }
        Ok(())
    }

    fn reweight_and_reset(&mut self, round: &Round) -> Result<()> {
        for side in [&mut self.whole, &mut self.apart] {
            if round.reweights {
                side.blender.reweight()?;
            }
            if round.resets {
                let weights = side.blender.report()?.weights;
                side.blender.reset()?;
                assert_eq!(side.blender.report()?.weights, weights);
            }
        }
        if round.resets {
            (self.pending, self.moments) = (Sums::new(self.k()), Moments::new(self.k(), self.config.average));
        }
        Ok(())
    }

    /// Checks that both sides have the same state and the same blended gradients.
    fn compare(&mut self, case: &str) -> Result<()> {
        let (whole, apart) = (&mut self.whole, &mut self.apart);
        self.moments.check(&apart.blender.report()?, &apart.blender.second_moments()?, case);
        assert_eq!(whole.blender.save()?, apart.blender.save()?, "{case}");
        each!(whole.tensors, apart.tensors, tensors, others => for (tensor, other) in tensors.iter().zip(others) {
            assert_eq!(comparable(tensor.written()), comparable(other.written()), "{case}");
        });
        Ok(())
    }

    /// Replaces `apart` with a new blender that restores its state. The gradient scale is not part of a state.
    fn restart(&mut self) -> Result<()> {
        let saved = self.apart.blender.save()?;
        let threads = 1 + self.random.below(2) as u32;
        let mut blender = self.apart.face.blender_with(Config { threads, ..self.config })?;
        blender.load(&saved)?;
        let no_scale = self.scale_in_force == 1.0;
        let scale = if no_scale { std::ptr::null() } else { self.scale.address().cast_const() };
        // SAFETY: `scale` outlives the blender and is not written during an observation; NULL is a scale of 1.
        unsafe { blender.set_grad_scale(scale) }?;
        assert_eq!(blender.save()?, saved);
        (self.apart.blender, self.apart.plan) = (blender, None);
        Ok(())
    }
}

fn random_runs(face: Face) -> Outcome {
    property(if face.cuda { 40 } else { 200 }, runs(), |run| {
        let scale = face.array(vec![1.0_f32]);
        let mut pair = Pair::new(face, &run, &scale)?;
        for (i, round) in run.rounds.iter().enumerate() {
            let case = format!("round {i}");
            pair.prepare(round)?;
            pair.pass(Pass::from_bits_retain(round.what), &case)?;
            pair.reweight_and_reset(round)?;
            pair.compare(&case)?;
            if round.restarts {
                pair.restart()?;
            }
        }
        Ok(())
    })
}
