//! What can go wrong, by name. Every error is found before any work is done, so nothing is half finished behind one.

use std::fmt;

/// Result of a gradblend call.
pub type Result<T> = std::result::Result<T, Error>;

/// One of the lists of gradients that belong to a tensor.
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
    /// The tensor itself, where it has no buffer at all: its length and its dtype are checked all the same.
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

/// Everything that a call can refuse. Tensors and modalities are counted from 0.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// K is 0 or larger than [`MAX_MODALITIES`](crate::MAX_MODALITIES).
    #[error("expected 1 to 32 modalities, got {got}")]
    Modalities {
        /// The K asked for.
        got: u64,
    },
    /// The decay of an exponential moving average is not in [0, 1).
    #[error("expected a decay of at least 0 and below 1, got {got}")]
    Decay {
        /// The decay asked for.
        got: f64,
    },
    /// The damping is negative or not finite.
    #[error("expected a finite damping of at least 0, got {got}")]
    Damping {
        /// The damping asked for.
        got: f64,
    },
    /// More CPU threads than the library or the operating system starts.
    #[error("could not start {threads} CPU threads: {reason}")]
    Threads {
        /// Threads asked for.
        threads: u32,
        /// The limit, or what the operating system said.
        reason: String,
    },
    /// The backend of this device is not part of this build.
    #[error(
        "{backend} is not part of this build of gradblend (asked for device {ordinal}): build it with the feature `cuda`"
    )]
    NotBuilt {
        /// The backend's name.
        backend: &'static str,
        /// The device asked for.
        ordinal: i32,
    },
    /// The CUDA driver, or a function of it, is not on this machine.
    #[error("no CUDA driver: {reason}")]
    NoDriver {
        /// What was looked for.
        reason: String,
    },
    /// There is no device with this ordinal.
    #[error("no CUDA device {ordinal}: the driver knows {devices}")]
    NoDevice {
        /// The device asked for.
        ordinal: i32,
        /// How many there are.
        devices: i32,
    },
    /// The device is older than every image in this build, or its driver than the toolkit that built them.
    #[error("CUDA device {ordinal} ({device}) cannot run this build: {reason}")]
    UnsupportedDevice {
        /// The device.
        ordinal: i32,
        /// Its name.
        device: String,
        /// What it has and what is needed.
        reason: String,
    },
    /// A call to the driver failed: a launch, a copy, or work that was put on the stream before.
    #[error("{call} failed: {name} ({code})")]
    Cuda {
        /// The driver's function.
        call: &'static str,
        /// Its result.
        code: u32,
        /// The result's name.
        name: String,
    },
    /// A list is not in memory that the driver knows, and the device cannot read other memory.
    #[error("tensor {tensor}: {list} at {address:#x} is not memory of the device")]
    UnknownMemory {
        /// The tensor.
        tensor: usize,
        /// The list.
        list: Role,
        /// The address that the driver does not know: of its first or of its last byte.
        address: u64,
    },
    /// An array that DLPack hands over cannot be this list.
    #[error("{list}: expected {expected}, got {got}")]
    Dlpack {
        /// The list.
        list: Role,
        /// What it should be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// All arrays of a tensor are absent, so that its length and dtype are unknown.
    #[error("all arrays are absent: expected at least one")]
    NoArray,
    /// A gradient scale is not in memory that the driver knows, and the device cannot read other memory.
    #[error("gradient scale at {address:#x} is not memory of the device")]
    UnknownScale {
        /// The address.
        address: u64,
    },
    /// The stream is being captured into a graph, and what was asked for has to wait or to copy from the host.
    #[error("{what} cannot be captured in a graph")]
    Capturing {
        /// What was asked for.
        what: &'static str,
    },
    /// A dtype code that names no supported dtype.
    #[error("dtype {code} is not supported: expected 0 (f32), 1 (f16) or 2 (bf16)")]
    DType {
        /// The code.
        code: i32,
    },
    /// A tensor has another number of modality gradients (absent ones included) than the blender has modalities.
    #[error("tensor {tensor}: expected {expected} modalities, got {got}")]
    ModalityCount {
        /// The tensor.
        tensor: usize,
        /// The blender's K.
        expected: usize,
        /// The tensor's.
        got: usize,
    },
    /// A list's length is not its tensor's, or not the one that the plan was made for.
    #[error("tensor {tensor}: {list} has {got} elements, expected {expected}")]
    Length {
        /// The tensor.
        tensor: usize,
        /// The list.
        list: Role,
        /// Elements of the tensor's first list, or of the plan's.
        expected: u64,
        /// Elements of this list.
        got: u64,
    },
    /// A list's dtype is not its tensor's, or not the one that the plan was made for.
    #[error("tensor {tensor}: {list} is {got}, expected {expected}")]
    MixedDTypes {
        /// The tensor.
        tensor: usize,
        /// The list.
        list: Role,
        /// The dtype's name in the tensor's first list, or in the plan.
        expected: &'static str,
        /// The dtype's name in this list.
        got: &'static str,
    },
    /// One of the train and validation gradients is there without the other.
    #[error("tensor {tensor}: {missing} is absent while its counterpart is present; give both or neither")]
    Unpaired {
        /// The tensor.
        tensor: usize,
        /// The absent one.
        missing: Role,
    },
    /// An address is not a multiple of the element's size.
    #[error("tensor {tensor}: {list} at {address:#x} is not aligned to its element of {alignment} bytes")]
    Misaligned {
        /// The tensor.
        tensor: usize,
        /// The list.
        list: Role,
        /// Its address.
        address: u64,
        /// The element's size in bytes.
        alignment: u64,
    },
    /// A list would reach past the end of the address space.
    #[error("tensor {tensor}: {list} at {address:#x} with {len} elements reaches past the end of memory")]
    OutOfRange {
        /// The tensor.
        tensor: usize,
        /// The list.
        list: Role,
        /// Its address.
        address: u64,
        /// Its elements.
        len: u64,
    },
    /// A blended gradient shares memory with another list and is not exactly one of its own tensor's modality gradients.
    #[error("tensor {tensor}: blended gradient overlaps the {other} of tensor {other_tensor}")]
    Overlap {
        /// The tensor with the blended gradient.
        tensor: usize,
        /// The other list.
        other: Role,
        /// The other list's tensor.
        other_tensor: usize,
    },
    /// A plan was updated with another number of tensors than it was made for.
    #[error("expected the plan's {expected} tensors, got {got}")]
    PlanTensors {
        /// The plan's tensors.
        expected: usize,
        /// Tensors given.
        got: usize,
    },
    /// The plan was made for another blender.
    #[error("the plan belongs to another blender")]
    ForeignPlan,
    /// The plan is released: it has no addresses until it is updated.
    #[error("the plan is released; update it before running it")]
    ReleasedPlan,
    /// A pass that does nothing, has unknown bits, or accumulates without blending.
    #[error("pass {bits:#x} is not a combination of DOT, BLEND, ACCUMULATE (with BLEND) and OBSERVE")]
    Pass {
        /// The bits.
        bits: u32,
    },
    /// Another number of values than K, or K x K, was given.
    #[error("expected {expected} values of {what}, got {got}")]
    Count {
        /// Which values.
        what: &'static str,
        /// How many.
        expected: usize,
        /// How many were given.
        got: usize,
    },
    /// A weight is not finite as f32, the type that `blend` multiplies by.
    #[error("weight of modality {modality} is {got}, expected a number that is finite as f32")]
    Weight {
        /// The modality.
        modality: usize,
        /// The weight.
        got: f64,
    },
    /// A numerator that is not finite was given to `solve`.
    #[error("numerator of modality {modality} is {got}, expected a finite number")]
    Numerator {
        /// The modality.
        modality: usize,
        /// The number.
        got: f64,
    },
    /// A second moment that is not finite, or a negative one on the diagonal, was given to `solve`.
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
    /// A loss that is not finite was measured.
    #[error("{list} loss of modality {modality} {when} is {got}, expected a finite number")]
    Loss {
        /// The modality.
        modality: usize,
        /// `"training"`, `"validation"` or `"difference of the"`.
        list: &'static str,
        /// `"at the checkpoint"`, `"after training"` or `"before and after training"`.
        when: &'static str,
        /// The loss.
        got: f64,
    },
    /// A super-epoch of zero epochs.
    #[error("a {what} of 0 epochs never ends; expected at least 1")]
    Schedule {
        /// `"warm-up"` or `"super-epoch"`.
        what: &'static str,
    },
    /// The address of a gradient scale is not aligned to an f32.
    #[error("gradient scale at {address:#x} is not aligned to its element of 4 bytes")]
    MisalignedScale {
        /// The address.
        address: u64,
    },
    /// A gradient scale that cannot be divided by.
    #[error("gradient scale is {got}, expected a finite number other than 0")]
    Scale {
        /// The scale.
        got: f32,
    },
    /// A saved state was written by a blender of another configuration.
    #[error("the saved state has {what} {got}, this blender has {expected}")]
    StateMismatch {
        /// What differs.
        what: &'static str,
        /// This blender's.
        expected: String,
        /// The saved one.
        got: String,
    },
    /// A saved state is foreign, truncated, altered or of an unknown version.
    #[error("not a saved state that can be read: {reason}")]
    CorruptState {
        /// What is wrong with it.
        reason: String,
    },
    /// Memory for a plan or a blender is not to be had.
    #[error("out of memory: {bytes} bytes for {what}")]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// How much.
        bytes: u64,
    },
}
