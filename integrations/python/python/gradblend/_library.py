"""The C functions of gradblend, as gradblend.h documents them: the only module that calls the shared library.

maturin generates the declarations in `_native` from the C functions of the crate, records included.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from ._native import ffi, lib

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Error",
    "ExchangeError",
    "Flags",
    "Options",
    "Policy",
    "Status",
    "call",
    "config",
    "ffi",
    "floats",
    "lib",
    "number",
    "version",
]


class Status(enum.IntEnum):
    """Why a call failed: the codes of `gradblend_status`."""

    INVALID_ARGUMENT = 1
    NOT_BUILT = 2
    NO_DRIVER = 3
    NO_DEVICE = 4
    UNSUPPORTED_DEVICE = 5
    OUT_OF_MEMORY = 6
    CUDA = 7
    CORRUPT_STATE = 8
    INTERNAL = 9


class Flags(enum.IntFlag):
    """Conditions of the latest reweight, and (NONFINITE) of the latest observation."""

    HELD = 1  # there was no observation, or the solver found no weights: those in force stay
    NONFINITE = 2  # a product was not finite, and the observation was skipped
    CLAMPED = 4  # a weight is 0 that would be negative without that bound
    FLOORED = 8  # a weight is at its min_weight and would be smaller without it
    INEXACT = 16  # the weights may not be the minimum: S is no second moment, or the solver reached its bound


class Error(RuntimeError):
    """A call was rejected or failed. Its message names the tensor, loss or parameter at fault.

    After a rejected call the blender, the plan or the `GradBlend` is unchanged.
    """

    def __init__(self, message: str, status: Status = Status.INVALID_ARGUMENT) -> None:
        super().__init__(message)
        #: Why.
        self.status = status

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.status)


class ExchangeError(Error):
    """Ranks could not exchange numbers: one is gone, or did not come within the time-out of the process group."""


class Policy(TypedDict, total=False):
    """How weights follow from moments: options of `solve`, `ogr` and `gb_estimate`, and of a blender."""

    #: By default "uncorrelated": only the diagonal of S counts.
    overfitting: Literal["uncorrelated", "correlated"]
    #: By default "clamp": w_k >= min_weight[k]. "signed": weights of any sign.
    negative: Literal["clamp", "signed"]
    #: damping * trace(S) / K is added to the diagonal of S; 1e-12 by default.
    damping: float
    #: Least weight of each loss, K numbers >= 0 with a sum below 1; zeros by default.
    min_weight: Sequence[float]


class Options(Policy, total=False):
    """Options of a blender."""

    #: By default "ema": the exponential moving average of `decay`. "mean": the plain mean since the last reset.
    average: Literal["mean", "ema"]
    #: b of the EMA, in [0, 1); 0.99 by default.
    decay: float
    #: When to solve for new weights: "on_request" (by `reweight`), the default of `Blender`, or "every_observation".
    cadence: Literal["on_request", "every_observation"]
    #: CPU threads; 0 is all, which is the default of `Blender`. `GradBlend` has torch's number. No result depends on it.
    threads: int


#: Values of options; the position of each is its code.
CHOICES = {
    "average": ("mean", "ema"),
    "overfitting": ("uncorrelated", "correlated"),
    "negative": ("clamp", "signed"),
    "cadence": ("on_request", "every_observation"),
}


def call(function: Any, *arguments: Any, what: str = "") -> None:
    """Calls a function that returns a status. An `Error` carries the library's message, after `what`."""
    status = function(*arguments)
    if status != 0:
        length = lib.gradblend_last_error(ffi.NULL, 0) + 1
        message = ffi.new("char[]", length)
        lib.gradblend_last_error(message, length)
        known = status in Status._value2member_map_
        raise Error(what + ffi.string(message).decode(), Status(status) if known else Status.INTERNAL)


def version() -> str:
    """Version of the library."""
    code = lib.gradblend_version()
    return f"{code >> 16}.{code >> 8 & 255}.{code & 255}"


def number(name: str, value: Any, least: int, largest: int) -> int:
    """A whole number from `least` to `largest`."""
    if not hasattr(value, "__index__") or isinstance(value, bool) or not least <= value.__index__() <= largest:
        raise Error(f"{name} is {value!r}, expected a whole number from {least} to {largest}")
    return int(value.__index__())


def floats(name: str, values: Any, count: int) -> list[float]:
    """`count` numbers, from a sequence, an array or a tensor."""
    try:
        if isinstance(values, (str, bytes)):
            raise TypeError(f"not {values!r}")
        found = [float(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]
    except (TypeError, ValueError) as error:
        raise Error(f"{name}: expected {count} numbers: {error}") from None
    if len(found) != count:
        raise Error(f"{name} has {len(found)} numbers, expected {count}")
    return found


def config(modalities: int, **options: Unpack[Options]) -> Any:
    """A `gradblend_config` with these options, the others at their defaults. The library checks ranges of numbers."""
    modalities = number("modalities", modalities, 1, lib.MAX_MODALITIES)
    record = ffi.new("struct gradblend_config *")
    # Fills the fields of version 0.1.0; the others are zeros already, which are their defaults.
    call(lib.gradblend_config_default, modalities, record)
    record.size = ffi.sizeof(record[0])
    for name, value in options.items():
        if name in CHOICES:
            if value not in CHOICES[name]:
                raise Error(f"{name} is {value!r}, expected {' or '.join(map(repr, CHOICES[name]))}")
            setattr(record, name, CHOICES[name].index(str(value)))
        elif name == "min_weight":
            record.min_weight[0:modalities] = floats(name, value, modalities)
        elif name == "threads":
            record.threads = number(name, value, 0, 2**32 - 1)
        elif name in ("decay", "damping"):
            setattr(record, name, floats(name, [value], 1)[0])
        else:
            raise TypeError(f"unexpected option {name!r}")
    return record
