//! What is measured: operations on the parameter tensors of a network.

use std::fmt;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use gradblend::DType;
use serde::{Deserialize, Serialize};

/// An operation of gradblend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Operation {
    /// Both sums of each modality.
    Dot,
    /// The blended gradient.
    Blend,
    /// Both in one pass, and the observation.
    Step,
}

impl Operation {
    pub(crate) const ALL: [Operation; 3] = [Operation::Dot, Operation::Blend, Operation::Step];

    pub(crate) fn dots(self) -> bool {
        self != Operation::Blend
    }

    pub(crate) fn blends(self) -> bool {
        self != Operation::Dot
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(["dot", "blend", "step"][*self as usize])
    }
}

/// Where the lengths of the tensors come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Shapes {
    /// One tensor of this length.
    Flat(usize),
    /// Tensors of one length.
    Equal { count: usize, len: usize },
    /// A network of shapes.json, by name.
    Model(String),
}

/// One tensor of a case.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tensor {
    pub(crate) len: usize,
    /// Bit k: the loss of modality k reaches it.
    reached_by: u32,
    /// Whether the fused loss reaches it, so that t and g exist.
    fused: bool,
}

impl Tensor {
    pub(crate) fn present(&self, k: usize) -> bool {
        self.reached_by >> k & 1 != 0
    }

    pub(crate) fn has_fused(&self) -> bool {
        self.fused
    }

    /// Whether it contributes to the sums.
    pub(crate) fn dots(&self, operation: Operation) -> bool {
        operation.dots() && self.fused && self.reached_by != 0
    }

    /// Buffers that the operation must read or write once.
    fn buffers(&self, operation: Operation) -> u64 {
        let dots = self.dots(operation);
        let modalities = if dots || operation.blends() { self.reached_by.count_ones() } else { 0 };
        u64::from(modalities) + 2 * u64::from(dots) + u64::from(operation.blends())
    }
}

/// The tensors of a network, its modalities and its dtype.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) shapes: Shapes,
    pub(crate) modalities: usize,
    pub(crate) dtype: DType,
    /// Tensors start one element after an aligned address.
    pub(crate) misaligned: bool,
}

impl Case {
    fn new(shapes: Shapes, modalities: usize, dtype: DType) -> Self {
        Case { shapes, modalities, dtype, misaligned: false }
    }

    fn flat(len: usize, modalities: usize, dtype: DType) -> Self {
        Case::new(Shapes::Flat(len), modalities, dtype)
    }

    fn equal(count: usize, len: usize, modalities: usize) -> Self {
        Case::new(Shapes::Equal { count, len }, modalities, DType::F32)
    }

    fn model(name: &str, dtype: DType) -> Self {
        Case::new(Shapes::Model(name.into()), 3, dtype)
    }

    fn misaligned(self) -> Self {
        Case { misaligned: true, ..self }
    }

    pub(crate) fn tensors(&self) -> Result<Vec<Tensor>> {
        let all = u32::MAX >> (32 - self.modalities);
        let whole = |len| Tensor { len, reached_by: all, fused: true };
        Ok(match &self.shapes {
            Shapes::Flat(len) => vec![whole(*len)],
            Shapes::Equal { count, len } => vec![whole(*len); *count],
            Shapes::Model(name) => {
                let model = models()?.iter().find(|model| model.name == *name);
                let model = model.with_context(|| format!("shapes.json has no network {name}"))?;
                let part = |part: &'static Part| {
                    let bits = |ks: &Vec<u32>| ks.iter().fold(0, |bits, k| bits | 1 << k);
                    let reached_by = part.reached_by.as_ref().map_or(all, bits);
                    let tensor = move |shape: &Vec<usize>| Tensor {
                        reached_by,
                        fused: part.fused,
                        ..whole(shape.iter().product())
                    };
                    part.tensors.iter().map(tensor)
                };
                model.parts.iter().flat_map(part).collect()
            }
        })
    }
}

/// The bytes of each buffer that takes part in an operation, once.
pub(crate) fn minimum_traffic(tensors: &[Tensor], dtype: DType, operation: Operation) -> u64 {
    tensors.iter().map(|tensor| tensor.len as u64 * tensor.buffers(operation)).sum::<u64>() * dtype.bytes()
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.shapes {
            Shapes::Flat(len) => write!(f, "flat {:.0e}", *len as f64)?,
            Shapes::Equal { count, .. } => write!(f, "{count} tensors")?,
            Shapes::Model(name) => f.write_str(name)?,
        }
        write!(f, "/K{}/{}{}", self.modalities, self.dtype, if self.misaligned { "/misaligned" } else { "" })
    }
}

/// A network of shapes.json.
#[derive(Deserialize)]
struct Model {
    name: String,
    elements: usize,
    parts: Vec<Part>,
}

/// Parameters that the same losses reach.
#[derive(Deserialize)]
struct Part {
    /// Modalities; all of them without this.
    reached_by: Option<Vec<u32>>,
    fused: bool,
    tensors: Vec<Vec<usize>>,
}

fn models() -> Result<&'static [Model]> {
    #[derive(Deserialize)]
    struct File {
        models: Vec<Model>,
    }
    static MODELS: OnceLock<Vec<Model>> = OnceLock::new();
    if let Some(models) = MODELS.get() {
        return Ok(models);
    }
    let file: File = serde_json::from_str(include_str!("../shapes.json"))?;
    for model in &file.models {
        let tensors = model.parts.iter().flat_map(|part| &part.tensors);
        let elements: usize = tensors.map(|shape| shape.iter().product::<usize>()).sum();
        ensure!(elements == model.elements, "shapes.json: {} has {elements} elements", model.name);
    }
    Ok(MODELS.get_or_init(|| file.models))
}

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Tiny inputs, for `--test`: every dtype, absent gradients, many tensors, misaligned ones.
pub(crate) fn test_cases() -> Vec<Case> {
    let flat = DTYPES.map(|dtype| Case::flat(1_000, 4, dtype));
    let misaligned = DTYPES.map(|dtype| Case::flat(3_001, 2, dtype).misaligned());
    let mixed = DTYPES.map(|dtype| Case::model("mixed", dtype));
    [flat, misaligned, mixed].concat().into_iter().chain([Case::equal(40, 33, 8)]).collect()
}

/// The large cases that the summary of a report shows.
pub(crate) fn quick_cases() -> Vec<Case> {
    vec![
        Case::flat(100_000_000, 4, DType::F32),
        Case::flat(100_000_000, 4, DType::BF16),
        Case::model("ResNet-50", DType::F32),
        Case::model("ResNet-50", DType::BF16),
        Case::model("ViT-B/16", DType::BF16),
        Case::model("late fusion", DType::BF16),
    ]
}

/// All cases: the large ones, then sizes, modalities and dtypes, many tensors, misaligned tensors.
pub(crate) fn full_cases() -> Vec<Case> {
    let mut cases = quick_cases();
    for len in [10_000, 1_000_000] {
        cases.extend([DType::F32, DType::BF16].map(|dtype| Case::flat(len, 4, dtype)));
    }
    cases.extend([Case::flat(100_000_000, 4, DType::F16), Case::flat(100_000_000, 2, DType::BF16)]);
    cases.push(Case::flat(100_000_000, 8, DType::BF16));
    cases.extend([Case::equal(1_000, 10_000, 4), Case::equal(10_000, 1_000, 4)]);
    cases.push(Case::flat(100_000_000, 4, DType::F32).misaligned());
    cases.push(Case::model("ResNet-50", DType::BF16).misaligned());
    cases
}

/// Whether the summary has a row for this: a step of each quick case, and the other operations of two of them.
pub(crate) fn in_summary(operation: Operation, case: &str) -> bool {
    let all_operations = [Case::flat(100_000_000, 4, DType::F32), Case::model("ResNet-50", DType::BF16)];
    let cases = if operation == Operation::Step { quick_cases() } else { all_operations.to_vec() };
    cases.iter().any(|one| one.to_string() == case)
}
