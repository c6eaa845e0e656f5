//! What is measured: parameter lists, modalities and dtypes.

use std::fmt;
use std::sync::OnceLock;

use gradblend::DType;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Extent, Operation};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Where the tensors of a case come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// One tensor.
    Flat { len: usize },
    /// Tensors of one length.
    Equal { count: usize, len: usize },
    /// A network of shapes.json, by its number there. `small`: every 16th tensor of a part, a ten-thousandth of it, for tests.
    Model { index: usize, small: bool },
}

/// One tensor of a case.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tensor {
    pub(crate) len: usize,
    /// Bit k: modality k's loss reaches it.
    pub(crate) reached_by: u32,
    /// Whether the fused loss does, so that t and g exist.
    pub(crate) fused: bool,
}

impl Tensor {
    pub(crate) fn present(&self, k: usize) -> bool {
        self.reached_by >> k & 1 != 0
    }

    /// Whether it adds to the sums.
    pub(crate) fn dots(&self, operation: Operation) -> bool {
        operation.dots() && self.fused && self.reached_by != 0
    }

    /// Lists that must be moved once.
    pub(crate) fn lists(&self, operation: Operation) -> u64 {
        u64::from(self.reached_by.count_ones()) * u64::from(self.dots(operation) || operation.blends())
            + if self.dots(operation) { 2 } else { 0 }
            + u64::from(operation.blends())
    }
}

/// One list of tensors.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) source: Source,
    pub(crate) modalities: usize,
    pub(crate) dtype: DType,
    /// Lists start one element behind their alignment.
    pub(crate) misaligned: bool,
    /// t is close to g.
    pub(crate) near: bool,
    /// On the CPU: 0 is all.
    pub(crate) threads: usize,
}

impl Case {
    fn new(source: Source, modalities: usize, dtype: DType) -> Self {
        Case { source, modalities, dtype, misaligned: false, near: false, threads: 0 }
    }

    fn flat(len: usize, modalities: usize, dtype: DType) -> Self {
        Case::new(Source::Flat { len }, modalities, dtype)
    }

    /// # Panics
    /// If shapes.json has no such network.
    fn model(name: &str, modalities: usize, dtype: DType) -> Self {
        let index = models().iter().position(|model| model.name == name).expect("a network of shapes.json");
        assert!(models()[index].modalities.is_none_or(|k| k == modalities), "{name} has its own number of modalities");
        Case::new(Source::Model { index, small: false }, modalities, dtype)
    }

    fn misaligned(self) -> Self {
        Case { misaligned: true, ..self }
    }

    fn near(self) -> Self {
        Case { near: true, ..self }
    }

    fn one_thread(self) -> Self {
        Case { threads: 1, ..self }
    }

    pub(crate) fn tensors(&self) -> Vec<Tensor> {
        let all = u32::MAX >> (32 - self.modalities);
        let whole = |len| Tensor { len, reached_by: all, fused: true };
        match self.source {
            Source::Flat { len } => vec![whole(len)],
            Source::Equal { count, len } => vec![whole(len); count],
            Source::Model { index, small } => {
                let (every, shrink) = if small { (16, 10_000) } else { (1, 1) };
                let tensors = models()[index].parts.iter().flat_map(|part| {
                    let bits = |ks: &Vec<u32>| ks.iter().fold(0, |bits, k| bits | 1 << k);
                    let reached_by = part.reached_by.as_ref().map_or(all, bits);
                    part.tensors.iter().step_by(every).map(move |shape| Tensor {
                        len: (shape.iter().product::<usize>() / shrink).max(1),
                        reached_by,
                        fused: part.fused,
                    })
                });
                tensors.collect()
            }
        }
    }

    /// Bytes of the floor.
    pub(crate) fn bytes(&self, operation: Operation) -> u64 {
        let lists = self.tensors().iter().map(|tensor| tensor.len as u64 * tensor.lists(operation)).sum::<u64>();
        lists * self.dtype.bytes()
    }

    /// Bytes of all lists, absent ones included.
    pub(crate) fn memory(&self, operation: Operation) -> u64 {
        let elements = self.tensors().iter().map(|tensor| tensor.len as u64).sum::<u64>();
        elements * self.dtype.bytes() * operation.lists(self.modalities) as u64
    }

    pub(crate) fn source(&self) -> Value {
        match self.source {
            Source::Flat { len } => json!({"flat": len}),
            Source::Equal { count, len } => json!({"equal": {"count": count, "len": len}}),
            Source::Model { index, .. } => json!({"model": models()[index].name}),
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.source {
            Source::Flat { len } => write!(f, "flat {len:.0e}", len = len as f64)?,
            Source::Equal { count, .. } => write!(f, "{count} tensors")?,
            Source::Model { index, .. } => f.write_str(&models()[index].name)?,
        }
        write!(f, "/K{}/{}", self.modalities, self.dtype)?;
        for (is, name) in [(self.near, "near"), (self.misaligned, "misaligned"), (self.threads == 1, "1 thread")] {
            if is {
                write!(f, "/{name}")?;
            }
        }
        Ok(())
    }
}

/// A network of shapes.json.
#[derive(Debug, Deserialize)]
struct Model {
    name: String,
    modalities: Option<usize>,
    elements: usize,
    parts: Vec<Part>,
}

/// Parameters that the same losses reach.
#[derive(Debug, Deserialize)]
struct Part {
    reached_by: Option<Vec<u32>>,
    fused: bool,
    tensors: Vec<Vec<usize>>,
}

fn models() -> &'static [Model] {
    #[derive(Deserialize)]
    struct Shapes {
        models: Vec<Model>,
    }
    static MODELS: OnceLock<Vec<Model>> = OnceLock::new();
    MODELS.get_or_init(|| {
        let shapes: Shapes = serde_json::from_str(include_str!("../shapes.json")).expect("shapes.json");
        for model in &shapes.models {
            let tensors = model.parts.iter().flat_map(|part| &part.tensors);
            let elements: usize = tensors.map(|shape| shape.iter().product::<usize>()).sum();
            assert_eq!(elements, model.elements, "elements of {}", model.name);
        }
        shapes.models
    })
}

/// All cases.
pub(crate) fn cases(extent: Extent) -> Vec<Case> {
    let mut cases = Vec::new();
    if extent == Extent::Test {
        cases.extend(DTYPES.map(|dtype| Case::flat(1_000, 4, dtype)));
        cases.extend(DTYPES.map(|dtype| Case::flat(3_001, 2, dtype).near().misaligned()));
        cases.push(Case::new(Source::Equal { count: 40, len: 33 }, 3, DType::F32).one_thread());
        for dtype in [DType::F32, DType::BF16] {
            let mut model = Case::model("late fusion", 3, dtype);
            if let Source::Model { small, .. } = &mut model.source {
                *small = true;
            }
            cases.push(model);
        }
        return cases;
    }
    let (f32, bf16) = (DType::F32, DType::BF16);
    cases.extend([Case::flat(100_000_000, 4, f32), Case::flat(100_000_000, 4, bf16)]);
    cases.extend([Case::model("ResNet-50", 3, f32), Case::model("ResNet-50", 3, bf16)]);
    cases.extend([Case::model("ViT-B/16", 3, bf16), Case::model("late fusion", 3, bf16)]);
    if extent == Extent::Quick {
        return cases;
    }
    // Sizes.
    for dtype in [f32, bf16] {
        for len in [1_000, 10_000, 100_000, 1_000_000, 10_000_000] {
            cases.push(Case::flat(len, 4, dtype));
        }
        for len in [1_000, 100_000, 100_000_000] {
            cases.push(Case::flat(len, 4, dtype).one_thread());
        }
    }
    // Modalities and dtypes.
    cases.push(Case::flat(100_000_000, 4, DType::F16));
    for dtype in DTYPES {
        cases.extend([2, 3, 8].map(|k| Case::flat(100_000_000, k, dtype)));
    }
    // Parameter lists of networks.
    cases.extend([Case::model("ResNet-50", 4, f32), Case::model("ViT-B/16", 3, f32)]);
    cases.push(Case::model("late fusion", 3, f32));
    // Equal bytes, more and more tensors.
    let equal = |count| Case::new(Source::Equal { count, len: 10_000_000 / count }, 4, f32);
    cases.extend([1, 10, 100, 1_000].map(equal));
    cases.push(Case::flat(100_000_000, 4, f32).misaligned());
    cases.push(Case::flat(100_000_000, 4, bf16).misaligned());
    cases.push(Case::model("ResNet-50", 3, bf16).misaligned());
    // Where t - g cancels.
    cases.extend(DTYPES.map(|dtype| Case::flat(10_000_000, 4, dtype).near()));
    // What takes longest comes last: if time runs out, the rest is there.
    cases.extend([equal(10_000), Case::model("TinyLlama-1.1B", 3, bf16)]);
    cases.extend([Case::flat(1_000_000_000, 2, bf16), Case::flat(1_000_000_000, 2, bf16).near()]);
    cases.extend([bf16, f32].map(|dtype| Case::flat(1_000_000_000, 4, dtype)));
    cases.push(equal(100_000));
    cases
}
