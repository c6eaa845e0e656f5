"""Ranks that train one model: what they compare, add up and average, by `torch.distributed`."""

from __future__ import annotations

import gc
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ._gradients import Gradients, is_sharded, owns_memory
from ._library import Error, ExchangeError
from .blender import Blender

__all__ = ["Masks", "Ranks", "Wrapped", "counted_here", "fingerprint", "finite", "wrappers"]

#: Bytes of one all-reduce of gradients, as DistributedDataParallel has them by default.
BUCKET = 25 << 20

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
        self._group, self._device = group, device
        self.rank, self.count = group.rank(), group.size()
        #: Bytes that this rank gave to collective operations.
        self.bytes = 0
        #: For each rank, not 0 if its part of the latest observation was not finite.
        self.nonfinite = torch.zeros(self.count, device=device)

    def nonfinite_ranks(self) -> tuple[int, ...]:
        return tuple(rank for rank, flag in enumerate(self.nonfinite.tolist()) if flag != 0)

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, group=self._group, **options)
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

    def agree(self, facts: dict[str, int], finite: bool) -> None:
        """Compares facts between the ranks. All raise the same `Error`, which names the first that differs from rank 0."""
        own = torch.tensor([*facts.values(), int(finite)], dtype=torch.int64, device=self._device)
        every = self._gather("what they are to agree on", own).tolist()
        for rank, (*of_rank, _) in enumerate(every):
            for name, first, got in zip(facts, every[0], of_rank):
                if first != got:
                    values = "" if abs(first) >= 1 << 31 or abs(got) >= 1 << 31 else f" ({got}, not {first})"
                    raise Error(f"rank {rank} has another {name} than rank 0{values}")
        flags = [0.0 if of_rank[-1] else 1.0 for of_rank in every]
        self.nonfinite = torch.tensor(flags, device=self._device)

    def share(self, samples: int) -> Tensor:
        """What a rank multiplies its mean loss by, so that the plain mean over ranks is that over all samples."""
        own = torch.tensor(float(samples), dtype=torch.float64, device=self._device)
        total = self._sum("the numbers of samples", own.clone())
        return torch.where(total > 0, own * self.count / total, own).float()

    def masks(self, sets: Sequence[Gradients]) -> Masks:
        """Which gradients any rank has."""
        words = [[grad is not None for grad in grads] for grads in sets]
        own = torch.tensor(words, dtype=torch.uint8, device=self._device)
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


class Wrapped:
    """The DistributedDataParallel modules that have the parameters. They average gradients in their one backward pass for each
    forward pass: in calls that do not observe. Before others, their forward pass must not expect a backward pass."""

    def __init__(self, modules: list[DistributedDataParallel], params: list[Tensor], may_average: Any) -> None:
        inside = {id(param) for module in modules for param in module.parameters()}
        self.modules = modules
        #: Whether each parameter is one of these modules.
        self.has = [id(param) in inside for param in params]
        #: A weak reference to a method: the modules, which keep this object, do not keep its trainer.
        self._may_average = may_average
        #: Whether the latest forward pass with gradients has set the modules up to average.
        self.averages = False
        #: Whether that pass was outside of `no_sync`.
        self.synchronizes = True
        for module in modules:
            if module.static_graph:
                raise Error("DistributedDataParallel with static_graph=True allows one backward pass for each forward pass")
            module.register_forward_pre_hook(self._before)
            module.register_forward_hook(self._after, always_call=True)

    def _before(self, module: Any, _: Any) -> None:
        may_average = self._may_average()
        if torch.is_grad_enabled() and may_average is not None:
            self.synchronizes = module.require_backward_grad_sync
            module.require_backward_grad_sync = self.averages = self.synchronizes and may_average()

    def _after(self, module: Any, _inputs: Any, _outputs: Any) -> None:
        if torch.is_grad_enabled() and self._may_average() is not None:
            module.require_backward_grad_sync = self.synchronizes
            # Of the next forward pass: to broadcast buffers as after any pass that synchronizes.
            module.require_forward_param_sync = module.require_forward_param_sync or self.synchronizes


def wrappers(named: list[tuple[str, Tensor]]) -> list[DistributedDataParallel]:
    """The DistributedDataParallel modules of parameters, which leave no trace on the parameters themselves.

    `Error` if one, or a module of `fully_shard`, has a parameter that is not among these: backward passes reach it too.
    """
    ids = {id(param) for _, param in named}
    found = []
    for item in gc.get_objects():
        kinds = [kind.__name__ for kind in type(item).__mro__]
        if "DistributedDataParallel" in kinds or "FSDPModule" in kinds:
            own = list(item.named_parameters())
            if any(id(param) in ids for _, param in own):
                missing = [name for name, param in own if param.requires_grad and id(param) not in ids]
                if missing:
                    raise Error(f"params lacks {missing[0]} of the {kinds[0]}: give all of its parameters")
                found += [item] if isinstance(item, DistributedDataParallel) else []
    return found


def counted_here(params: list[Tensor], names: list[str], group: Ranks) -> list[bool] | None:
    """Whether this rank counts the products of each sharded parameter; None for plain tensors."""
    sharded = [is_sharded(param) for param in params]
    if not any(sharded):
        return None
    if not all(sharded):
        plain, other = names[sharded.index(False)], names[sharded.index(True)]
        raise Error(f"{plain} is a plain tensor, but {other} is a DTensor: shard or replicate all on a mesh")
    counts = []
    for name, param in zip(names, params):
        mesh: Any = param.device_mesh  # type: ignore[attr-defined]
        ranks = set(dist.get_process_group_ranks(group._group))
        if not set(mesh.mesh.flatten().tolist()) <= ranks:
            raise Error(f"{name} is on ranks {sorted(mesh.mesh.flatten().tolist())}, but process_group has {sorted(ranks)}")
        coordinate = mesh.get_coordinate()
        # A parameter that several ranks hold counts once: on the first of them.
        placements = zip(param.placements, coordinate or ())  # type: ignore[attr-defined]
        counts.append(coordinate is not None and all(place.is_shard() or at == 0 for place, at in placements))
    return counts


def fingerprint(*parts: object) -> int:
    """Equal for equal parts."""
    return zlib.crc32(b"".join(part if isinstance(part, bytes) else repr(part).encode() for part in parts))


def finite(sets: Sequence[Gradients]) -> bool:
    """Whether all gradients are finite. Synchronizes."""
    present = [grad for grads in sets for grad in grads if grad is not None and grad.numel() > 0]
    largest = torch._foreach_norm(present, float("inf")) if present else ()
    return all(bool(torch.isfinite(norm)) for norm in largest)
