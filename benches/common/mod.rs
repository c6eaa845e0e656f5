//! What the benchmarks of `dot`, `blend` and `step` share: inputs, their minimum traffic, and the loop over cases.

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use gradblend::{Blender, Config, Device, Plan, Result, bf16, f16};
use gradblend_testkit::{Random, Sample, Tensor, resnet_50};

/// Elements whose buffers fit into a second-level cache.
const SMALL: usize = 1 << 14;
/// Elements whose buffers exceed most third-level caches: 384 MiB in all for three modalities in f32.
const LARGE: usize = 1 << 24;

/// Benchmarks `call` on every case. `extra_buffers`: those that it reads and writes besides the modalities'.
pub(crate) fn run(
    c: &mut Criterion,
    operation: &str,
    extra_buffers: usize,
    call: fn(&mut Blender, &Plan<'_>) -> Result<()>,
) {
    sigpipe::reset(); // the end of `cargo bench | head` is no panic
    let mut group = Group { criterion: c.benchmark_group(operation), extra_buffers, call };
    group.criterion.sample_size(20);
    for (size, len) in [("cache", SMALL), ("memory", LARGE)] {
        group.bench::<f32>(size, &[len], 3);
        group.bench::<f16>(size, &[len], 3);
        group.bench::<bf16>(size, &[len], 3);
    }
    for k in [1, 2, 4, 8] {
        group.bench::<f32>("memory", &[LARGE / 4], k);
    }
    group.bench::<f32>("ResNet-50", &resnet_50(), 3);
    group.bench::<bf16>("ResNet-50", &resnet_50(), 3);
}

struct Group<'a> {
    criterion: BenchmarkGroup<'a, WallTime>,
    extra_buffers: usize,
    call: fn(&mut Blender, &Plan<'_>) -> Result<()>,
}

impl Group<'_> {
    fn bench<T: Sample>(&mut self, name: &str, lengths: &[usize], k: usize) {
        let random = &mut Random(1);
        let mut tensors: Vec<Tensor<T>> = lengths.iter().map(|len| Tensor::random(random, *len, k, 0, 0)).collect();
        let elements: usize = lengths.iter().sum();
        let bytes = elements * size_of::<T>() * (k + self.extra_buffers);
        let mut blender = Blender::new(&Device::cpu(), Config::new(k as u32)).expect("a blender");
        let plan = blender.plan(tensors.iter_mut().map(Tensor::grads)).expect("a plan");

        let dtype = std::any::type_name::<T>().rsplit("::").next().unwrap_or_default();
        let id = BenchmarkId::new(format!("{name}/{elements}/K{k}"), dtype);
        self.criterion.throughput(Throughput::Bytes(bytes as u64));
        self.criterion.bench_function(id, |b| b.iter(|| (self.call)(&mut blender, &plan).expect("the operation")));
    }
}
