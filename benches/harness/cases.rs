//! What is measured: sizes, numbers of tensors, modalities and dtypes.

use gradblend::DType;

use super::{Extent, Operation};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// One list of tensors.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) name: String,
    /// Elements of each tensor.
    pub(crate) lens: Vec<usize>,
    pub(crate) modalities: usize,
    pub(crate) dtype: DType,
    pub(crate) threads: usize,
    /// Criterion samples the naive way and ndarray as well; the table always has them.
    pub(crate) thorough: bool,
}

impl Case {
    fn new(name: &str, lens: Vec<usize>, modalities: usize, dtype: DType) -> Self {
        let name = format!("{name}/K{modalities}/{dtype}");
        Case { name, lens, modalities, dtype, threads: all(), thorough: false }
    }

    fn one_thread(mut self) -> Self {
        self.name.push_str("/1 thread");
        self.threads = 1;
        self
    }

    fn thorough(mut self) -> Self {
        self.thorough = true;
        self
    }

    /// Bytes of the floor.
    pub(crate) fn bytes(&self, operation: Operation) -> u64 {
        let elements = self.lens.iter().map(|len| *len as u64).sum::<u64>();
        elements * self.dtype.bytes() * operation.lists(self.modalities) as u64
    }
}

fn all() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// All cases of an operation.
pub(crate) fn cases(operation: Operation, extent: Extent) -> Vec<Case> {
    let resnet = resnet_50();
    assert_eq!((resnet.len(), resnet.iter().sum::<usize>()), (161, 25_557_032));
    // Elements of a tensor that moves `bytes`.
    let len = |bytes: usize, k: usize, dtype: DType| bytes / operation.lists(k) / dtype.bytes() as usize;
    let flat = |name: &str, bytes: usize, k: usize, dtype: DType| {
        Case::new(&format!("flat {name}"), vec![len(bytes, k, dtype)], k, dtype)
    };
    let mut cases = Vec::new();
    if extent == Extent::Test {
        cases.extend(DTYPES.map(|dtype| flat("60kB", 60_000, 4, dtype).thorough()));
        cases.push(Case::new("40 tensors", split(len(60_000, 3, DType::F32), 40), 3, DType::F32).one_thread());
        return cases;
    }
    cases.push(flat("1GB", 1_000_000_000, 4, DType::F32).thorough());
    cases.push(Case::new("ResNet-50", resnet, 4, DType::F32).thorough());
    if extent == Extent::Quick {
        cases.push(flat("1GB", 1_000_000_000, 4, DType::BF16));
        return cases;
    }
    // Sizes, down to what one core's first-level and second-level cache hold.
    for (name, bytes) in [("256MB", 256_000_000), ("64MB", 64_000_000), ("16MB", 16_000_000), ("4MB", 4_000_000)] {
        cases.push(flat(name, bytes, 4, DType::F32));
    }
    for dtype in DTYPES {
        for (name, bytes) in [("1MB", 1_000_000), ("32kB", 32_000)] {
            cases.push(flat(name, bytes, 4, dtype).one_thread());
        }
    }
    // Modalities and dtypes.
    for dtype in DTYPES {
        for k in [2, 4, 8] {
            if (k, dtype) != (4, DType::F32) {
                cases.push(flat("1GB", 1_000_000_000, k, dtype));
            }
        }
    }
    // Equal bytes, more and more tensors.
    for count in [1, 10, 100, 1_000, 5_000] {
        let lens = split(len(240_000_000, 4, DType::F32), count);
        cases.push(Case::new(&format!("240MB in {count}"), lens, 4, DType::F32));
    }
    cases
}

/// `elements` in `count` tensors of nearly one length.
fn split(elements: usize, count: usize) -> Vec<usize> {
    (0..count).map(|i| elements * (i + 1) / count - elements * i / count).collect()
}

/// Parameters of ResNet-50 in order, as elements.
fn resnet_50() -> Vec<usize> {
    // A convolution without bias, then the scale and shift of its batch norm.
    let conv_bn = |out: usize, into: usize, kernel: usize| [out * into * kernel * kernel, out, out];
    let mut lens = conv_bn(64, 3, 7).to_vec();
    let mut into = 64;
    for (planes, blocks) in [(64, 3), (128, 4), (256, 6), (512, 3)] {
        let out = 4 * planes;
        for block in 0..blocks {
            lens.extend(conv_bn(planes, into, 1));
            lens.extend(conv_bn(planes, planes, 3));
            lens.extend(conv_bn(out, planes, 1));
            if block == 0 {
                lens.extend(conv_bn(out, into, 1));
            }
            into = out;
        }
    }
    lens.extend([1000 * 2048, 1000]);
    lens
}
