"""Weights from moments (`solve`), and from losses (`ogr`, `gb_estimate`: GB_Estimate of the paper)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ._library import Error, Flags, Policy, call, config, ffi, floats, lib, number

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Estimate", "Losses", "MeanLoss", "Solution", "Trainee", "gb_estimate", "ogr", "solve"]

Checkpoint = TypeVar("Checkpoint")


@dataclass(frozen=True)
class Solution:
    """Result of `solve`."""

    #: w_k, K values with the sum 1; with `Flags.HELD` those that were in force.
    weights: tuple[float, ...]
    flags: Flags


def _config(modalities: int, policy: Policy) -> Any:
    unknown = [name for name in policy if name not in Policy.__annotations__]
    if unknown:
        raise TypeError(f"unexpected option {unknown[0]!r}, expected {', '.join(Policy.__annotations__)}")
    return config(modalities, **policy)


def solve(
    numerator: Any,
    second_moment: Any,
    *,
    in_force: Any = None,
    **policy: Unpack[Policy],
) -> Solution:
    """Weights that minimise OGR^2 = w'Sw / (w'm)^2 under sum w = 1 and w >= `min_weight`.

    `numerator` has K numbers (m, or dG), `second_moment` K x K (S, or dO^2 on the diagonal): sequences, arrays or
    tensors. If there are no such weights, they are `in_force` (by default 1/K each), and `flags` has HELD.
    `Error` for other counts, a number that is not finite, a negative diagonal, or an option out of range.
    Source: CVPR 2020 paper, proposition 1; docs/method.md for bounds and correlated overfitting.

    >>> [round(weight, 9) for weight in solve([1, 1], [[1, 0], [0, 3]]).weights]
    [0.75, 0.25]
    """
    try:
        k = len(numerator)
        rows = list(second_moment.tolist() if hasattr(second_moment, "tolist") else second_moment)
    except TypeError as error:
        raise Error(f"numerator and second_moment: expected K and K x K numbers: {error}") from None
    record = _config(k, policy)
    if len(rows) != k:
        raise Error(f"second_moment has {len(rows)} rows, expected {k}")
    square = [value for i, row in enumerate(rows) for value in floats(f"second_moment[{i}]", row, k)]
    weights, flags = ffi.new("double[]", k), ffi.new("uint32_t *")
    held = ffi.NULL if in_force is None else floats("in_force", in_force, k)
    call(lib.gradblend_solve, record, floats("numerator", numerator, k), square, held, weights, flags)
    return Solution(tuple(weights), Flags(flags[0]))


@dataclass(frozen=True)
class Losses:
    """Mean losses of one modality at one point of training."""

    train: float
    valid: float

    def __post_init__(self) -> None:
        for name in ("train", "valid"):
            object.__setattr__(self, name, floats(name, [getattr(self, name)], 1)[0])


class MeanLoss:
    """Mean loss over samples in batches of any sizes: a mean and not a sum, so that loaders of different length compare."""

    def __init__(self) -> None:
        self._sum, self._samples = 0.0, 0

    def add(self, mean: float, samples: int) -> None:
        """Adds a batch of `samples` with this mean loss. An empty batch changes nothing."""
        if number("samples", samples, 0, 2**63 - 1) > 0:
            self._sum += float(mean) * samples
            self._samples += samples

    def mean(self) -> float:
        """The mean over all samples; NaN without any."""
        return self._sum / self._samples if self._samples else math.nan


@dataclass(frozen=True)
class Estimate:
    """Result of `ogr` and `gb_estimate`, K values each."""

    #: dG_k = V_N - V_{N+n}: decrease of the validation loss; negative if it rose.
    delta_g: tuple[float, ...]
    #: dO_k = (V_{N+n} - T_{N+n}) - (V_N - T_N): growth of the gap between the two losses.
    delta_o: tuple[float, ...]
    #: |dO_k / dG_k|; 0 / 0 is NaN.
    ogr: tuple[float, ...]
    #: w_k, for `GradBlend.set_weights`; with `Flags.HELD` in `flags`, 1/K or what `in_force` was.
    weights: tuple[float, ...]
    flags: Flags


def ogr(before: Sequence[Losses], after: Sequence[Losses], **policy: Unpack[Policy]) -> Estimate:
    """Weights from the losses of each modality at a checkpoint and after training it alone: w_k = (1/Z) dG_k / dO_k^2.

    `policy` are options of `solve`. `Error` unless both have K entries and all losses are finite.
    Source: CVPR 2020 paper, section 3.
    """
    k = number("the number of modalities", len(before), 1, lib.MAX_MODALITIES)
    if len(after) != k:
        raise Error(f"there are losses of {len(after)} modalities after training, expected {k}")
    for i, losses in enumerate((*before, *after)):
        if not isinstance(losses, Losses):
            raise Error(f"the losses of modality {i % k} are {type(losses).__name__}, expected Losses")
    delta_g = [n.valid - m.valid for n, m in zip(before, after)]
    delta_o = [(m.valid - m.train) - (n.valid - n.train) for n, m in zip(before, after)]
    for i, pair in enumerate(zip(before, after)):
        # Finite losses can have a difference that is not.
        if not all(map(math.isfinite, [delta_g[i], delta_o[i]])):
            raise Error(f"modality {i}: losses are not finite: {pair[0]} before, {pair[1]} after training")
    # Scaling all gaps does not change the weights; near 1 their squares neither underflow nor overflow.
    largest = max(map(abs, delta_o)) or 1.0
    square = [[(o / largest) ** 2 if i == j else 0.0 for j in range(k)] for i, o in enumerate(delta_o)]
    solution = solve(delta_g, square, **policy)
    ratios = [abs(o / g) if g else (math.nan if o == 0 else math.inf) for o, g in zip(delta_o, delta_g)]
    return Estimate(tuple(delta_g), tuple(delta_o), tuple(ratios), solution.weights, solution.flags)


class Trainee(Protocol[Checkpoint]):
    """A network that `gb_estimate` trains one modality at a time. Modalities are counted from 0, the fused one included."""

    #: K.
    modalities: int

    def save(self) -> Checkpoint:
        """A copy of all that training changes: weights, optimiser state, random state."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restores a checkpoint, which stays as it is."""

    def train_modality(self, modality: int, epochs: int) -> None:
        """Trains on the loss of one modality alone."""

    def losses(self, modality: int) -> Losses:
        """Mean losses of one modality now."""


def gb_estimate(trainee: Trainee[Any], epochs: int, **policy: Unpack[Policy]) -> Estimate:
    """GB_Estimate, algorithm 1 of the paper: trains each modality alone for `epochs` from the current state, measures
    losses before and after, and returns the weights. Restores the state, after an exception too.

    `policy` are options of `solve`. `Error` as `ogr`; exceptions of the trainee pass through.
    """
    k = number("trainee.modalities", trainee.modalities, 1, lib.MAX_MODALITIES)
    epochs = number("epochs", epochs, 0, 2**63 - 1)
    solve([0.0] * k, [[0.0] * k] * k, **policy)  # rejects a bad policy before any training
    checkpoint = trainee.save()
    try:
        before = [trainee.losses(modality) for modality in range(k)]
    finally:
        # Measuring can change a trainee too (its random state, say), and each modality must start from the same state.
        trainee.restore(checkpoint)
    after = []
    for modality in range(k):
        try:
            trainee.train_modality(modality, epochs)
            after.append(trainee.losses(modality))
        finally:
            trainee.restore(checkpoint)
    return ogr(before, after, **policy)
