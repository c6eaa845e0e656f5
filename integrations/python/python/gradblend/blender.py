"""The operations on gradients: `Blender` and `Plan`, on torch tensors and any other DLPack arrays."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ._library import Error, Flags, Options, call, config, ffi, floats, lib, number

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Blender", "DeviceArray", "Pass", "Plan", "Report", "TensorGrads"]


class Pass(enum.IntFlag):
    """Parts of `Blender.run`."""

    DOT = 1  # add <g, v_k> and <t - g, v_k> to the pending sums
    BLEND = 2  # write sum_k w_k v_k to each `blended`
    ACCUMULATE = 4  # with BLEND: add to `blended` instead of replacing it
    OBSERVE = 8  # then take the pending sums as one observation


@dataclasses.dataclass(frozen=True)
class TensorGrads:
    """The gradients of one parameter tensor: arrays of the same length, dtype and order of elements in memory.

    Arrays are torch tensors or others with `__dlpack__` (numpy, CuPy, JAX): float32, float16 or bfloat16, dense, on the
    blender's device. They are not copied; a `Plan` keeps them alive.
    """

    #: t and g, gradients of the fused loss. Both None: the tensor is only blended.
    train: Any
    valid: Any
    #: v_k, K of them; None where loss k does not reach the tensor.
    modalities: Sequence[Any]
    #: Output, sum_k w_k v_k: one of `modalities` (in place) or memory of its own. None: the tensor is not blended.
    blended: Any = None


@dataclasses.dataclass(frozen=True)
class Report:
    """State of a blender at one moment. Tuples have K entries; the last loss is the fused one by convention."""

    #: n: observations in the moments since the last reset.
    observed: int
    #: Observations skipped since the last reset because a product was not finite.
    skipped: int
    flags: Flags
    #: Modalities with a product that was not finite in the latest observation.
    nonfinite: tuple[int, ...]
    #: Modalities to which the latest reweight gave their `min_weight`, where less would give a smaller OGR.
    floored: tuple[int, ...]
    #: w_k in force.
    weights: tuple[float, ...]
    #: m_k; 0 before the first observation.
    mean: tuple[float, ...]
    #: Of m_k; infinite where it is unknown, as before the second observation.
    standard_error: tuple[float, ...]
    #: n_eff: observations of equal weight whose mean is as uncertain as m_k.
    effective: float
    #: sigma^2_k; 0 before the first observation.
    second_moment: tuple[float, ...]
    #: Overfitting-to-generalisation ratio of each modality, sigma_k / |m_k|; 0 / 0 is NaN.
    ogr: tuple[float, ...]
    #: The same of the blend, sqrt(w'Sw) / |w'm|, and with uniform weights.
    ogr_blend: float
    ogr_uniform: float

    @property
    def signal_to_noise(self) -> tuple[float, ...]:
        """m_k over its standard error. Between -2 and 2, whether loss k gets a weight is chance."""
        return tuple(
            m / e if e else math.copysign(math.inf, m) if m else math.nan for m, e in zip(self.mean, self.standard_error)
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, with `flags` as a list of names."""
        fields = dataclasses.asdict(self)
        return {**fields, "flags": [flag.name for flag in Flags if flag in self.flags]}


class DeviceArray:
    """Memory of a blender, which it keeps alive: read it between calls on the blender, on CUDA on the blender's stream.

    numpy (on the CPU) and CuPy, Numba or torch (on CUDA) take it as an array; `torch` makes a tensor of it.
    """

    def __init__(self, blender: Blender, address: int, count: int, dtype: str) -> None:
        self._blender, self.address, self.shape, self.dtype = blender, address, (count,), dtype
        interface = {"shape": self.shape, "typestr": {"float32": "<f4", "float64": "<f8"}[dtype], "version": 3}
        name = "__array_interface__" if blender.device < 0 else "__cuda_array_interface__"
        setattr(self, name, {**interface, "data": (address, False)})

    def torch(self) -> Any:
        """A tensor of shape [count] on this memory."""
        import torch

        if self._blender.device >= 0:
            return torch.as_tensor(self, device=f"cuda:{self._blender.device}")
        dtype = getattr(torch, self.dtype)
        # The buffer owns a reference to the blender, and the tensor one to the buffer.
        memory = (ctypes.c_char * (self.shape[0] * dtype.itemsize)).from_address(self.address)
        memory._blender = self._blender
        return torch.frombuffer(memory, dtype=dtype)


def ordinal(device: Any) -> int:
    """-1 for the CPU, or the number of a CUDA device, from a torch.device, its name, or such a number."""
    if isinstance(device, int) and not isinstance(device, bool):
        return number("device", device, -1, 2**31 - 1)
    kind, _, index = str(device).partition(":")
    if str(device) in ("cpu", "cpu:0"):
        return -1
    if kind == "cuda" and (index.isdigit() or not index):
        if index:
            return number("the number of the device", int(index), 0, 2**31 - 1)
        cuda = _torch_cuda()
        return int(cuda.current_device()) if cuda else 0
    raise Error(f"device is {device!r}, expected 'cpu', 'cuda' or 'cuda:N'")


def _torch_cuda() -> Any:
    """torch.cuda, if this process uses it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


class _Capsule:
    """A DLPack capsule and the record in it. The array stays the caller's."""

    # Prototypes of our own: other packages set those of ctypes.pythonapi.
    _name = staticmethod(ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi)))
    _pointer = staticmethod(
        ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
    )

    def __init__(self, array: Any, what: str, record: Any) -> None:
        if not hasattr(array, "__dlpack__"):
            raise Error(f"{what} is {type(array).__name__}, expected a tensor or an array with __dlpack__")
        # -1: no synchronization. The caller orders the work, as for all other calls.
        stream = {"stream": -1} if hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] == 2 else {}
        if hasattr(array, "is_neg") and array.is_neg():
            raise Error(f"{what} is a lazy negation, expected resolve_neg() of it")
        if hasattr(array, "requires_grad") and hasattr(array, "detach"):
            array = array.detach()  # torch exports no tensor that requires a gradient
        try:
            try:
                self.capsule = array.__dlpack__(max_version=(1, 0), **stream)
            except TypeError:  # older than DLPack 1.0
                self.capsule = array.__dlpack__(**stream)
        except Exception as error:
            raise Error(f"{what} cannot be exported by DLPack: {error}") from error
        name = self._name(self.capsule)
        pointer = ffi.cast("void *", self._pointer(self.capsule, name))
        if name == b"dltensor":
            record.managed = ffi.cast("struct DLManagedTensor *", pointer)
        else:
            record.versioned = ffi.cast("struct DLManagedTensorVersioned *", pointer)


def _records(blender: Blender, tensors: Sequence[TensorGrads]) -> tuple[Any, list[Any]]:
    """The `gradblend_tensor` of each, and what must live as long as they do."""
    k = blender.modalities
    records = ffi.new("struct gradblend_tensor[]", len(tensors))
    addresses = ffi.new("void *[]", len(tensors) * k)
    keep: list[Any] = [addresses]
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, TensorGrads):
            raise Error(f"tensor {i} is {type(tensor).__name__}, expected TensorGrads")
        if not isinstance(tensor.modalities, (list, tuple)):
            raise Error(f"tensor {i}: modalities is {type(tensor.modalities).__name__}, expected a list of {k}")
        if len(tensor.modalities) != k:
            raise Error(f"tensor {i} has {len(tensor.modalities)} modalities, expected {k}; None is an absent one")
        roles = ["train", "valid", "blended", *(f"modality {m}" for m in range(k))]
        arrays = ffi.new("struct gradblend_dlpack[]", len(roles))
        for j, array in enumerate([tensor.train, tensor.valid, tensor.blended, *tensor.modalities]):
            if array is not None:
                keep += [_Capsule(array, f"tensor {i}, {roles[j]}", arrays[j]), array]
        train, valid, blended, gradients = (arrays + j for j in range(4))
        out = addresses + i * k, records + i
        function = lib.gradblend_tensor_from_dlpack
        call(function, blender.device, k, train, valid, gradients, blended, *out, what=f"tensor {i}: ")
    return records, keep


class Plan:
    """A checked list of tensors, made by `Blender.plan`. It keeps the arrays alive that are bound to it."""

    def __init__(self, blender: Blender, records: Any, keep: Any) -> None:
        plan = ffi.new("struct gradblend_plan **")
        call(lib.gradblend_plan_create, blender._handle, records, len(records), plan)
        self._blender, self._handle, self._keep = blender, ffi.gc(plan[0], lib.gradblend_plan_destroy), keep

    def __getstate__(self) -> object:
        raise Error("Plan cannot be copied or pickled")

    def update(self, tensors: Iterable[TensorGrads]) -> None:
        """Binds other arrays of the same lengths and dtypes. Neither allocates on the device nor synchronizes.

        `Error` as `Blender.plan`, or for another count, length or dtype; the plan is then unchanged.
        """
        self._bind(*_records(self._blender, list(tensors)))

    def _bind(self, records: Any, keep: Any) -> None:
        call(lib.gradblend_plan_update, self._handle, records, len(records), self._blender._stream())
        self._keep = keep


def _handle(plan: Any) -> Any:
    if not isinstance(plan, Plan):
        raise Error(f"plan is {type(plan).__name__}, expected Plan")
    return plan._handle


class Blender:
    """Running moments and weights of K losses, on one device.

    Options have the names and defaults of the C ABI's `gradblend_config`; `min_weight` has K numbers. `device` is
    "cpu", "cuda", "cuda:N", a torch.device or an ordinal. On CUDA, calls submit work to `stream` and return; `report`,
    `second_moments` and `save` synchronize it.

    `Error` for an option out of range, and for a device that is missing or not built in.
    """

    def __init__(self, modalities: int, *, device: Any = "cpu", **options: Unpack[Options]) -> None:
        record = config(modalities, **options)
        blender = ffi.new("struct gradblend_blender **")
        #: -1: the CPU, or the number of a CUDA device.
        self.device = ordinal(device)
        call(lib.gradblend_blender_create, self.device, record, blender)
        self._handle = ffi.gc(blender[0], lib.gradblend_blender_destroy)
        #: K.
        self.modalities = int(record.modalities)
        #: Address of the CUDA stream for all calls. None: torch's current stream, or the default one without torch. Leave
        #: that of a `GradBlend` alone: torch's own work on its gradients is in torch's stream.
        self.stream: int | None = None

    def __repr__(self) -> str:
        return f"Blender({self.modalities}, device={'cpu' if self.device < 0 else f'cuda:{self.device}'!r})"

    def __getstate__(self) -> object:
        raise Error("Blender cannot be copied or pickled: make another one, and use save() and load()")

    def _stream(self) -> Any:
        if self.device < 0:
            return ffi.NULL
        stream, cuda = self.stream, _torch_cuda()
        if stream is None:
            stream = cuda.current_stream(self.device).cuda_stream if cuda else 0
        return ffi.cast("void *", stream)

    def plan(self, tensors: Iterable[TensorGrads]) -> Plan:
        """Checks the tensors and makes a plan for them. Reads no gradient.

        `Error` names the tensor and the array's role: another device, dtype, length or order of elements, `train`
        without `valid` or the reverse, a `blended` that overlaps another array.
        """
        if isinstance(tensors, TensorGrads):
            raise Error("tensors is TensorGrads, expected a list of them")
        return Plan(self, *_records(self, list(tensors)))

    def run(self, plan: Plan, what: Pass) -> None:
        """Any combination of parts in one pass over memory (the C ABI's `gradblend_pass`)."""
        call(lib.gradblend_pass, self._handle, _handle(plan), number("what", what, 0, 2**32 - 1), self._stream())

    def dot(self, plan: Plan) -> None:
        """Adds c_k = <g, v_k> and d_k = <t - g, v_k> to the pending sums. Callable many times before `observe`."""
        call(lib.gradblend_dot, self._handle, _handle(plan), self._stream())

    def observe(self) -> None:
        """Takes the pending sums as one observation: n, m and S. Skips one that is not finite."""
        call(lib.gradblend_observe, self._handle, self._stream())

    def reweight(self) -> None:
        """Solves for the weights of the moments and puts them in force."""
        call(lib.gradblend_reweight, self._handle, self._stream())

    def blend(self, plan: Plan) -> None:
        """Writes sum_k w_k v_k to each `blended`. Does not read gradients of weight 0."""
        call(lib.gradblend_blend, self._handle, _handle(plan), self._stream())

    def step(self, plan: Plan) -> None:
        """dot, blend and observe in one pass over memory, bit for bit."""
        call(lib.gradblend_step, self._handle, _handle(plan), self._stream())

    def reset(self) -> None:
        """Starts a new super-epoch: forgets the moments and the pending sums, keeps the weights."""
        call(lib.gradblend_reset, self._handle, self._stream())

    def set_weights(self, weights: Any) -> None:
        """Puts K weights in force as given. `Error` for another count or a weight that is not finite."""
        given = floats("weights", weights, self.modalities)
        call(lib.gradblend_set_weights, self._handle, given, self.modalities, self._stream())

    def set_grad_scale(self, address: int | None) -> None:
        """Sets the device address of the f32 factor by which gradients are scaled, read at each observe; None is 1.

        The memory stays the caller's and must stay valid.
        """
        call(lib.gradblend_set_grad_scale, self._handle, ffi.cast("float *", address or 0))

    def report(self) -> Report:
        """Reads the state."""
        record = ffi.new("struct gradblend_report *")
        record.size = ffi.sizeof(record[0])
        call(lib.gradblend_get_report, self._handle, record, self._stream())
        k = self.modalities

        def values(name: str) -> tuple[float, ...]:
            return tuple(getattr(record, name)[0:k])

        def bits(mask: int) -> tuple[int, ...]:
            return tuple(i for i in range(k) if mask >> i & 1)

        return Report(
            observed=record.observed,
            skipped=record.skipped,
            flags=Flags(record.flags),
            nonfinite=bits(record.nonfinite),
            floored=bits(record.floored),
            weights=values("weights"),
            mean=values("mean"),
            standard_error=values("standard_error"),
            effective=record.effective,
            second_moment=values("second_moment"),
            ogr=values("ogr"),
            ogr_blend=record.ogr_blend,
            ogr_uniform=record.ogr_uniform,
        )

    def second_moments(self) -> list[list[float]]:
        """S, K x K; zeros before the first observation."""
        k = self.modalities
        square = ffi.new("double[]", k * k)
        call(lib.gradblend_get_second_moments, self._handle, square, self._stream())
        return [list(square[i * k : i * k + k]) for i in range(k)]

    @property
    def weights(self) -> DeviceArray:
        """The K weights in force as float32, in the blender's memory."""
        address = ffi.new("float **")
        call(lib.gradblend_device_weights, self._handle, address)
        return DeviceArray(self, int(ffi.cast("uintptr_t", address[0])), self.modalities, "float32")

    @property
    def pending_sums(self) -> DeviceArray:
        """c_0 .. c_K-1, d_0 .. d_K-1 as float64, in the blender's memory: what ranks with shards of tensors all-reduce."""
        address, count = ffi.new("double **"), ffi.new("uint32_t *")
        call(lib.gradblend_pending_sums, self._handle, address, count)
        return DeviceArray(self, int(ffi.cast("uintptr_t", address[0])), count[0], "float64")

    def save(self) -> bytes:
        """The whole state, for `load`."""
        size = ffi.new("size_t *")
        call(lib.gradblend_save, self._handle, ffi.NULL, size, self._stream())
        state = ffi.new("char[]", size[0])
        call(lib.gradblend_save, self._handle, state, size, self._stream())
        return bytes(ffi.buffer(state, size[0]))

    def load(self, state: bytes) -> None:
        """Restores a state of `save`, of any device, bit for bit.

        `Error` for a state that is damaged or of another K, average or decay; the blender is then unchanged.
        """
        if not isinstance(state, (bytes, bytearray, memoryview)):
            raise Error(f"state is {type(state).__name__}, expected bytes")
        state = bytes(state)
        call(lib.gradblend_load, self._handle, state, len(state), self._stream())
