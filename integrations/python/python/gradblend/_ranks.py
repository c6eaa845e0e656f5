"""Ranks that train one model: what they compare, add up and average, by `torch.distributed`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ._gradients import Gradients, owns_memory
from ._library import Error, ExchangeError
from .blender import Blender

__all__ = ["Masks", "Ranks", "fingerprint", "finite"]

Result = TypeVar("Result")

#: Bytes of one all-reduce of gradients, as DistributedDataParallel has them by default.
BUCKET = 25 << 20

#: Bytes of the text of an error that other ranks get.
TEXT = 300

#: Whether each parameter has a gradient, for each set of gradients.
Masks = list[list[bool]]


class Ranks:
    """A process group, this rank in it, and what it has exchanged."""

    def __init__(self, group: Any, device: torch.device) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise Error("process_group: torch.distributed is not initialized")
        if not isinstance(group, dist.ProcessGroup):
            raise Error(f"process_group is {group!r}, expected a group of torch.distributed that has this rank")
        try:
            group._get_backend(device)
        except RuntimeError as error:
            raise Error(f"process_group has no backend for tensors on {device}: {error}") from error
        self.group, self._device = group, device
        self.rank, self.count = group.rank(), group.size()
        #: Whether an error is one in `exchanging`.
        self._exchanging = False
        #: Bytes that this rank gave to collective operations.
        self.bytes = 0
        #: For each rank, not 0 if its part of the latest observation was not finite.
        self.nonfinite = torch.zeros(self.count, device=device)

    def nonfinite_ranks(self) -> tuple[int, ...]:
        return tuple(rank for rank, flag in enumerate(self.nonfinite.tolist()) if flag != 0)

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, group=self.group, **options)
        except RuntimeError as error:  # of the backend: a time-out, or a rank that is gone
            raise ExchangeError(f"rank {self.rank} of {self.count} could not exchange {what}: {error}") from error

    def _sum(self, what: str, tensor: Tensor) -> Tensor:
        self.bytes += tensor.numel() * tensor.element_size()
        self._call(what, dist.all_reduce, tensor)
        return tensor

    def _gather(self, what: str, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, [ranks, len(tensor)]."""
        self.bytes += tensor.numel() * tensor.element_size()
        all_ranks = [torch.empty_like(tensor) for _ in range(self.count)]
        self._call(what, dist.all_gather, all_ranks, tensor)
        return torch.stack(all_ranks)

    def on_all(self, function: Callable[[], tuple[Result, int]], facts: dict[str, int]) -> tuple[Result, list[int]]:
        """Runs a function that returns a result and a number, and returns this rank's result and the numbers of all ranks.

        Facts are the same on all ranks, else all raise the same `Error`, which names the first rank that differs from rank 0.
        An error that the function raises on one rank is an `Error` on the others; but not one of `exchanging`.
        """
        error: Exception | None = None
        number = 0
        try:
            result, number = function()
        except ExchangeError:
            raise
        except Exception as caught:
            if self._exchanging:
                raise
            error = caught
        finally:
            self._exchanging = False
        own = torch.tensor([int(error is not None), number, *facts.values()], dtype=torch.int64, device=self._device)
        # If that fails, others are in an exchange that the function would have come to: its error says why.
        why = "" if error is None else f" after {type(error).__name__}: {error}"
        every = self._gather(f"what they are to agree on{why}", own).tolist()
        failed = [rank for rank, of_rank in enumerate(every) if of_rank[0] != 0]
        if failed:
            raise self._failed(failed[0], error) from error
        for rank, of_rank in enumerate(every):
            for (name, expected), got in zip(zip(facts, every[0][2:]), of_rank[2:]):
                if expected != got:
                    values = f" ({got}, not {expected})" if name.startswith("number") else ""
                    raise Error(f"rank {rank} has another {name} than rank 0{values}")
        return result, [of_rank[1] for of_rank in every]

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """For a part of a function of `on_all` in which other ranks may be in exchanges of its own, as those of `fully_shard`: an
        error in it is raised on this rank alone, as an exchange of another kind could end the process."""
        self._exchanging = True  # and stays so after an error
        yield
        self._exchanging = False

    def _failed(self, rank: int, error: Exception | None) -> Exception:
        """The error of this rank, or one that has the text of a rank's."""
        text = "" if error is None else f"{type(error).__name__}: {error}"
        own = torch.zeros(TEXT, dtype=torch.uint8)
        start = text.encode()[:TEXT]
        own[: len(start)] = torch.tensor(list(start), dtype=torch.uint8)
        every = self._gather("the text of an error", own.to(self._device)).tolist()
        if error is not None:
            return error
        return Error(f"rank {rank} raised {bytes(every[rank]).rstrip(bytes(1)).decode(errors='replace')}")

    def share(self, what: str, samples: list[int]) -> float | None:
        """What this rank multiplies its mean loss by, so that the plain mean over ranks is that over the samples of all. None
        if no rank gave a number (-1)."""
        if len({number < 0 for number in samples}) > 1:
            without = next(rank for rank, number in enumerate(samples) if number < 0)
            raise Error(f"rank {without} has no number of samples of {what}, but other ranks have: give it on all ranks")
        if samples[self.rank] < 0:
            return None
        if sum(samples) == 0:
            raise Error(f"no rank has a sample of {what}")
        return samples[self.rank] * self.count / sum(samples)

    def masks(self, sets: Masks) -> Masks:
        """Flags that any rank has set."""
        own = torch.tensor(sets, dtype=torch.uint8, device=self._device)
        self.bytes += own.numel()
        self._call("which gradients there are", dist.all_reduce, own, op=dist.ReduceOp.MAX)
        return [[bool(flag) for flag in row] for row in own.tolist()]

    def average(self, sets: Sequence[Gradients], masks: Masks, params: list[Tensor]) -> None:
        """Replaces gradients by their means over the ranks. One that is missing here and not elsewhere counts as zero."""
        bucket: list[tuple[Gradients, int]] = []
        for grads, mask in zip(sets, masks):
            for i in (i for i, reached in enumerate(mask) if reached and params[i].numel() > 0):
                first = params[bucket[0][1]] if bucket else params[i]
                size = sum(params[j].numel() for _, j in bucket) * first.element_size()
                if bucket and (params[i].dtype != first.dtype or size >= BUCKET):
                    self._average(bucket, params)
                    bucket = []
                bucket.append((grads, i))
        if bucket:
            self._average(bucket, params)

    def _average(self, bucket: list[tuple[Gradients, int]], params: list[Tensor]) -> None:
        with torch.no_grad():
            own = [grads[i] for grads, i in bucket]
            parts = (params[i].new_zeros(params[i].numel()) if grad is None else grad for grad, (_, i) in zip(own, bucket))
            flat = torch.cat([part.reshape(-1) for part in parts])
            # Divided first, as f16 could overflow.
            self._sum("gradients", flat.div_(self.count))
            for (grads, i), grad, mean in zip(bucket, own, torch.split(flat, [params[i].numel() for _, i in bucket])):
                if grad is None or not owns_memory(grad):
                    grad = torch.empty_like(params[i] if grad is None else grad, requires_grad=False)
                grads[i] = grad.copy_(mean.view(grad.shape))

    def sum_products(self, blender: Blender) -> None:
        """Adds the pending sums of all ranks up."""
        pending = blender.pending_sums.torch()
        # A sum of its own for each rank: a flag that its products are not finite.
        flags = torch.zeros(self.count, dtype=pending.dtype, device=pending.device)
        flags[self.rank] = (~torch.isfinite(pending).all()).to(flags.dtype)
        sums = self._sum("products", torch.cat([pending, flags]))
        pending.copy_(sums[: len(pending)])
        # A loss that is not finite spreads to the shards of all ranks, so the losses say more than the products.
        self.nonfinite = torch.where(self.nonfinite.any(), self.nonfinite.to(sums.dtype), sums[len(pending) :])

    def observe_each(self, blender: Blender, counts: bool) -> None:
        """Observes the products of each rank that counts, in the order of the ranks."""
        pending = blender.pending_sums.torch()
        counted = torch.tensor([float(counts)], dtype=pending.dtype, device=pending.device)
        every = self._gather("products", torch.cat([pending, counted]))
        self.nonfinite = (~torch.isfinite(every).all(dim=1)).to(pending.dtype)
        for row in every[every[:, -1] != 0]:
            pending.copy_(row[:-1])
            blender.observe()
        pending.zero_()


def fingerprint(*parts: object) -> int:
    """Equal for equal parts."""
    return zlib.crc32(b"".join(part if isinstance(part, bytes) else repr(part).encode() for part in parts))


def finite(sets: Sequence[Gradients]) -> bool:
    """Whether all gradients are finite. Synchronizes."""
    present = [grad for grads in sets for grad in grads if grad is not None and grad.numel() > 0]
    largest = torch._foreach_norm(present, float("inf")) if present else ()
    return all(bool(torch.isfinite(norm)) for norm in largest)
