//! Errors, and the roles of a tensor's buffers. Every error but [`Error::Cuda`] is returned before any work is done.

use std::fmt;

use crate::abi::MAX_MODALITIES;

/// Result of a gradblend call.
pub type Result<T> = std::result::Result<T, Error>;

/// Role of a tensor's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The train gradient t.
    Train,
    /// The validation gradient g.
    Valid,
    /// The gradient v_k of modality k, counted from 0.
    Modality(usize),
    /// The blended gradient.
    Blended,
    /// The tensor itself, where all its buffers are absent: its length and dtype are still checked.
    Tensor,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Role::Train => write!(f, "train gradient"),
            Role::Valid => write!(f, "validation gradient"),
            Role::Modality(k) => write!(f, "gradient of modality {k}"),
            Role::Blended => write!(f, "blended gradient"),
            Role::Tensor => write!(f, "tensor without a buffer"),
        }
    }
}

/// Everything that a call rejects. Tensors and modalities are counted from 0.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// K is 0 or larger than [`MAX_MODALITIES`](crate::MAX_MODALITIES).
    #[error("expected 1 to {MAX_MODALITIES} modalities, got {got}")]
    Modalities {
        /// The K given.
        got: u64,
    },
    /// The decay of an exponential moving average is outside [0, 1).
    #[error("expected a decay of at least 0 and below 1, got {got}")]
    Decay {
        /// The decay given.
        got: f64,
    },
    /// The damping is negative or not finite.
    #[error("expected a finite damping of at least 0, got {got}")]
    Damping {
        /// The damping given.
        got: f64,
    },
    /// A least weight of a policy is out of range, or not 0 where it must be.
    #[error("min_weight of modality {modality} is {got}, expected {expected}")]
    MinWeight {
        /// The modality.
        modality: usize,
        /// What is expected of it.
        expected: &'static str,
        /// The least weight given.
        got: f64,
    },
    /// The least weights of a policy leave nothing to choose.
    #[error("min_weight sums to {got}, expected less than 1")]
    MinWeightSum {
        /// The sum.
        got: f64,
    },
    /// The CPU threads could not be started.
    #[error("could not start {threads} CPU threads: {reason}")]
    Threads {
        /// Threads asked for.
        threads: u32,
        /// The library's limit, or the operating system's message.
        reason: String,
    },
    /// This build does not have the backend of this device.
    #[error(
        "{backend} is not part of this build of gradblend (asked for device {ordinal}): build it with the feature `cuda`"
    )]
    NotBuilt {
        /// Name of the backend.
        backend: &'static str,
        /// Ordinal of the device asked for.
        ordinal: i32,
    },
    /// The value needs threads or a device context, which this process lacks: it was forked from the one that made them.
    #[error("the {what} before this process was forked, and cannot be used here")]
    Forked {
        /// `"blender was made"`, `"plan was made"` or `"CUDA driver was initialised"`.
        what: &'static str,
    },
    /// The CUDA driver, or a function of it, was not found.
    #[error("no CUDA driver: {reason}")]
    NoDriver {
        /// The names tried, each with the loader's message.
        reason: String,
    },
    /// The CUDA device does not exist.
    #[error("no CUDA device {ordinal}: the driver knows {devices}")]
    NoDevice {
        /// Ordinal of the device asked for.
        ordinal: i32,
        /// Number of devices.
        devices: i32,
    },
    /// The device is older than every image of this build, or its driver is older than the toolkit of the build.
    #[error("CUDA device {ordinal} ({device}) cannot run this build: {reason}")]
    UnsupportedDevice {
        /// Ordinal of the device.
        ordinal: i32,
        /// Name of the device.
        device: String,
        /// The versions found and needed.
        reason: String,
    },
    /// A driver function failed: a launch, a copy, or work submitted to the stream before.
    #[error("{call} failed: {name} ({code})")]
    Cuda {
        /// Name of the driver function.
        call: &'static str,
        /// `CUresult` code.
        code: u32,
        /// Name of the code.
        name: String,
    },
    /// A buffer is in memory that the driver does not know, and the device cannot access such memory.
    #[error("tensor {tensor}: {role} at {address:#x} is not memory of the device")]
    UnknownMemory {
        /// Index of the tensor.
        tensor: usize,
        /// Role of the buffer.
        role: Role,
        /// The unknown address: of the buffer's first or last byte.
        address: u64,
    },
    /// A blender of the CPU cannot read a gradient in a `CudaSlice`.
    #[error("a gradient at {address:#x} is memory of a CUDA device, which the CPU cannot read")]
    DeviceMemory {
        /// Address of the gradient.
        address: u64,
    },
    /// A DLPack array does not fit its role.
    #[error("{role}: expected {expected}, got {got}")]
    Dlpack {
        /// Role of the array.
        role: Role,
        /// What the role needs.
        expected: String,
        /// What the array has.
        got: String,
    },
    /// All arrays of a tensor are absent, so its length and dtype are unknown.
    #[error("all arrays are absent: expected at least one")]
    NoArray,
    /// A gradient scale is in memory that the driver does not know, and the device cannot access such memory.
    #[error("gradient scale at {address:#x} is not memory of the device")]
    UnknownScale {
        /// Address of the scale.
        address: u64,
    },
    /// The stream is being captured, and the call has to synchronize or to copy from host memory.
    #[error("{what} cannot be captured in a graph")]
    Capturing {
        /// What the call does.
        what: &'static str,
    },
    /// The dtype code is unknown.
    #[error("dtype {code} is not supported: expected 0 (f32), 1 (f16) or 2 (bf16)")]
    DType {
        /// The code.
        code: i32,
    },
    /// The number of modality gradients of a tensor (absent ones included) is not the blender's K.
    #[error("tensor {tensor}: expected {expected} modalities, got {got}")]
    ModalityCount {
        /// Index of the tensor.
        tensor: usize,
        /// The blender's K.
        expected: usize,
        /// The number given.
        got: usize,
    },
    /// The length of a buffer is not that of its tensor, or not that of the plan.
    #[error("tensor {tensor}: {role} has {got} elements, expected {expected}")]
    Length {
        /// Index of the tensor.
        tensor: usize,
        /// Role of the buffer.
        role: Role,
        /// Elements of the tensor's first buffer, or of the plan's tensor.
        expected: u64,
        /// Elements of this buffer.
        got: u64,
    },
    /// The dtype of a buffer is not that of its tensor, or not that of the plan.
    #[error("tensor {tensor}: {role} is {got}, expected {expected}")]
    MixedDTypes {
        /// Index of the tensor.
        tensor: usize,
        /// Role of the buffer.
        role: Role,
        /// Dtype of the tensor's first buffer, or of the plan's tensor.
        expected: &'static str,
        /// Dtype of this buffer.
        got: &'static str,
    },
    /// Only one of the train and the validation gradient is present.
    #[error("tensor {tensor}: {missing} is absent while its counterpart is present; give both or neither")]
    Unpaired {
        /// Index of the tensor.
        tensor: usize,
        /// Role of the absent one.
        missing: Role,
    },
    /// An address is not a multiple of the element's size.
    #[error("tensor {tensor}: {role} at {address:#x} is not aligned to its element of {alignment} bytes")]
    Misaligned {
        /// Index of the tensor.
        tensor: usize,
        /// Role of the buffer.
        role: Role,
        /// Address of the buffer.
        address: u64,
        /// Size of an element in bytes.
        alignment: u64,
    },
    /// A buffer would extend past the end of the address space.
    #[error("tensor {tensor}: {role} at {address:#x} with {len} elements reaches past the end of memory")]
    OutOfRange {
        /// Index of the tensor.
        tensor: usize,
        /// Role of the buffer.
        role: Role,
        /// Address of the buffer.
        address: u64,
        /// Elements of the buffer.
        len: u64,
    },
    /// A blended gradient overlaps another buffer and is not exactly one of its own tensor's modality gradients.
    #[error("tensor {tensor}: blended gradient overlaps the {other} of tensor {other_tensor}")]
    Overlap {
        /// Index of the tensor with the blended gradient.
        tensor: usize,
        /// Role of the other buffer.
        other: Role,
        /// Index of the other buffer's tensor.
        other_tensor: usize,
    },
    /// The number of tensors in an update is not that of the plan.
    #[error("expected the plan's {expected} tensors, got {got}")]
    PlanTensors {
        /// Tensors of the plan.
        expected: usize,
        /// Tensors given.
        got: usize,
    },
    /// The plan was made by another blender.
    #[error("the plan belongs to another blender")]
    ForeignPlan,
    /// The plan is released: it has no addresses until it is updated.
    #[error("the plan is released; update it before running it")]
    ReleasedPlan,
    /// A plan of `CudaSlice`s has two streams, or runs on another stream than that of its gradients, or the stream belongs to
    /// another `CudaContext` than the memory, or to another device than the blender.
    #[error("the gradients belong to another stream: make, update and run the plan on one stream of their context")]
    ForeignStream,
    /// The pass has no bit, an unknown bit, or ACCUMULATE without BLEND.
    #[error("pass {bits:#x} is not a combination of DOT, BLEND, ACCUMULATE (with BLEND) and OBSERVE")]
    Pass {
        /// The bits.
        bits: u32,
    },
    /// The number of values is not K, or not K x K.
    #[error("expected {expected} values of {what}, got {got}")]
    Count {
        /// Name of the values.
        what: &'static str,
        /// Number expected.
        expected: usize,
        /// Number given.
        got: usize,
    },
    /// A weight is not finite as f32, the type of the factors of `blend`.
    #[error("weight of modality {modality} is {got}, expected a number that is finite as f32")]
    Weight {
        /// The modality.
        modality: usize,
        /// The weight.
        got: f64,
    },
    /// A numerator of `solve` is not finite.
    #[error("numerator of modality {modality} is {got}, expected a finite number")]
    Numerator {
        /// The modality.
        modality: usize,
        /// The number.
        got: f64,
    },
    /// A second moment of `solve` is not finite, or negative on the diagonal.
    #[error(
        "second moment of modalities {row} and {column} is {got}, expected a finite number, at least 0 on the diagonal"
    )]
    SecondMoment {
        /// The first modality.
        row: usize,
        /// The second modality.
        column: usize,
        /// The number.
        got: f64,
    },
    /// A measured loss is not finite.
    #[error("{which} loss of modality {modality} {when} is {got}, expected a finite number")]
    Loss {
        /// The modality.
        modality: usize,
        /// `"training"`, `"validation"` or `"difference of the"`.
        which: &'static str,
        /// `"at the checkpoint"`, `"after training"` or `"before and after training"`.
        when: &'static str,
        /// The loss.
        got: f64,
    },
    /// A trainer would never observe.
    #[error("every is 0, expected at least 1")]
    Every,
    /// A super-epoch has no epoch.
    #[error("a {what} of 0 epochs never ends; expected at least 1")]
    Schedule {
        /// `"warm-up"` or `"super-epoch"`.
        what: &'static str,
    },
    /// The address of a gradient scale is not aligned to an f32.
    #[error("gradient scale at {address:#x} is not aligned to its element of 4 bytes")]
    MisalignedScale {
        /// Address of the scale.
        address: u64,
    },
    /// A gradient scale is 0 or not finite, so nothing can be divided by it.
    #[error("gradient scale is {got}, expected a finite number other than 0")]
    Scale {
        /// The scale.
        got: f32,
    },
    /// The ranks count themselves differently, or do not number themselves from 0 on.
    #[error("the ranks are no group: {reason}")]
    Group {
        /// What was found.
        reason: String,
    },
    /// A rank has another K, configuration or state than rank 0.
    #[error("rank {rank} has another {what} than rank 0")]
    RankDiffers {
        /// The first such rank.
        rank: usize,
        /// `"number of modalities"`, `"configuration"` or `"state"`.
        what: &'static str,
    },
    /// The engine failed to add numbers up over the ranks.
    #[error("the exchange between ranks failed: {reason}")]
    Exchange {
        /// The engine's message.
        reason: String,
    },
    /// A saved state was written by a blender with another configuration.
    #[error("the saved state has {what} {got}, this blender has {expected}")]
    StateMismatch {
        /// Name of what differs.
        what: &'static str,
        /// This blender's value.
        expected: String,
        /// The saved value.
        got: String,
    },
    /// A saved state is foreign, truncated, altered, or of an unknown version.
    #[error("not a saved state that can be read: {reason}")]
    CorruptState {
        /// The first check that failed.
        reason: String,
    },
    /// An allocation failed.
    #[error("out of memory: {bytes} bytes for {what}")]
    OutOfMemory {
        /// What the memory was for.
        what: &'static str,
        /// Size of the allocation.
        bytes: u64,
    },
}
