"""Modules that average or shard the gradients of parameters: DistributedDataParallel and `fully_shard`."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ._gradients import is_sharded
from ._library import Error

__all__ = ["Wrapped", "check_sharding", "counted_here", "wrappers"]

#: The latest `Wrapped` of each module, by weak references: the module does not keep a trainer, nor the reverse.
_latest: weakref.WeakKeyDictionary[DistributedDataParallel, weakref.ref[Wrapped]] = weakref.WeakKeyDictionary()


class Wrapped:
    """The DistributedDataParallel modules that have the parameters of a trainer. They average gradients in their one backward
    pass for each forward pass: in calls that do not observe. Before others, their forward pass must not expect a backward pass.
    """

    def __init__(self, modules: list[DistributedDataParallel], params: list[Tensor], may_average: Any) -> None:
        inside = {
            id(param)
            for module in modules
            for name, param in module.module.named_parameters()
            if name not in module.parameters_to_ignore
        }
        # Weak references: a trainer that is replaced does not keep the module of a group that is gone.
        self.modules = weakref.WeakSet(modules)
        #: Whether each parameter is one of these modules.
        self.has = [id(param) in inside for param in params]
        #: A weak reference to a method.
        self._may_average = may_average
        #: The modules with a forward pass that expects a backward pass.
        self._expecting: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
        #: Whether others can have one, from before this object was made.
        self._unknown = True
        #: For each forward pass with gradients since the latest call: whether it was outside of `no_sync`.
        self._outside: list[bool] = []
        #: Whether gradients are to be averaged after the backward pass of the latest call.
        self.synchronizes = True
        for module in modules:
            if module.static_graph:
                raise Error("DistributedDataParallel with static_graph=True allows one backward pass for each forward pass")
        for module in modules:
            if module not in _latest:
                module.register_forward_pre_hook(_before)
                module.register_forward_hook(_after, always_call=True)
            _latest[module] = weakref.ref(self)

    def average(self, may_average: bool) -> bool:
        """Whether the modules average in the coming backward pass. If not, they forget their forward passes."""
        if any(_latest[module]() is not self for module in self.modules):
            raise Error("another GradBlend was made for this DistributedDataParallel since: go on with that one")
        self.synchronizes = not self._outside or any(self._outside)
        expecting, self._expecting = self._expecting, weakref.WeakSet()
        unknown, self._unknown = self._unknown, False
        if may_average and len(expecting) == len(self.modules):
            return True
        for module in self.modules if unknown else expecting:
            module.reducer._reset_state()
        return False

    def end_call(self) -> None:
        """Forgets the forward passes of a call, those of `held_out` and `train` too."""
        self._outside = []

    def before(self, module: DistributedDataParallel) -> None:
        outside = module.require_backward_grad_sync
        self._outside.append(outside)
        may_average = self._may_average()
        module.require_backward_grad_sync = expects = outside and may_average is not None and may_average()
        if expects:
            self._expecting.add(module)

    def after(self, module: DistributedDataParallel) -> None:
        module.require_backward_grad_sync = self._outside[-1]
        # Of the next forward pass: to broadcast buffers as after any pass that synchronizes.
        module.require_forward_param_sync = module.require_forward_param_sync or self._outside[-1]


def _owner(module: DistributedDataParallel) -> Wrapped | None:
    """Whom the hooks of a module work for; also of a copy of a module, which has its hooks and no owner."""
    latest = _latest.get(module)
    return None if latest is None or not torch.is_grad_enabled() else latest()


def _before(module: Any, _inputs: Any) -> None:
    owner = _owner(module)
    if owner is not None:
        owner.before(module)


def _after(module: Any, _inputs: Any, _outputs: Any) -> None:
    owner = _owner(module)
    if owner is not None:
        owner.after(module)


def wrappers(named: list[tuple[str, Tensor]], group: Any) -> list[DistributedDataParallel]:
    """The DistributedDataParallel modules of parameters. `Error` for one of another group, and for a parameter of two modules."""
    found: list[DistributedDataParallel] = []
    seen: set[int] = set()
    for module, own in _modules(named, "DistributedDataParallel"):
        twice = [name for name, param in own if id(param) in seen]
        if twice:
            raise Error(f"{twice[0]} is in two DistributedDataParallel modules: delete the one that is not used")
        seen |= {id(param) for _, param in own}
        sharded = [name for name, param in own if is_sharded(param)]
        if sharded:
            raise Error(f"{sharded[0]} is a DTensor in DistributedDataParallel, expected fully_shard on a mesh of all ranks")
        if group is None:
            raise Error("params are those of a DistributedDataParallel, and process_group is missing")
        of_module, ranks = (dist.get_process_group_ranks(of) for of in (module.process_group, group))
        if of_module != ranks:
            raise Error(f"the DistributedDataParallel of {own[0][0]} is of the ranks {of_module}, but process_group has {ranks}")
        found.append(module)
    return found


def check_sharding(named: list[tuple[str, Tensor]]) -> None:
    """Rejects parameters of FSDP that are incomplete, or cannot be observed as they are."""
    for _, own in _modules(named, "FullyShardedDataParallel"):
        raise Error(f"{own[0][0]} is of FullyShardedDataParallel, which flattens parameters, expected fully_shard (FSDP2)")
    for _, own in _modules(named, "FSDPModule"):
        plain = [name for name, param in own if not is_sharded(param)]
        if plain:
            why = "its module of fully_shard has run a forward pass, and needs reshard(), or ignores it"
            raise Error(f"{plain[0]} is a plain tensor, expected a DTensor: {why}")


def _modules(named: list[tuple[str, Tensor]], base: str) -> Iterator[tuple[Any, list[tuple[str, Tensor]]]]:
    """The modules of a kind that have some of these parameters, with those. `Error` if a backward pass through one reaches a
    parameter that is missing."""
    names = {id(param): name for name, param in named}
    if not _find(base, names):
        return
    gc.collect()  # A module is in a cycle of references, which can outlive its last user.
    for module in _find(base, names):
        own = list(module.named_parameters())
        missing = [name for name, param in own if param.requires_grad and id(param) not in names]
        if missing:
            raise Error(f"params lacks {missing[0]} of the {base}: give all of its parameters")
        yield module, [(names[id(param)], param) for _, param in own if id(param) in names]


def _find(base: str, names: dict[int, str]) -> list[Any]:
    """The modules of a kind with one of these parameters: among all objects, as parameters do not know their modules."""
    is_kind: dict[type, bool] = {}
    found = []
    for item in gc.get_objects():
        kind = type(item)
        if kind not in is_kind:
            is_kind[kind] = any(of.__name__ == base for of in kind.__mro__)
        if is_kind[kind] and any(id(param) in names for param in item.parameters()):
            found.append(item)
    return found


def counted_here(params: list[Tensor], names: list[str], group: Any) -> list[bool] | None:
    """Whether this rank counts the products of each sharded parameter; None for plain tensors."""
    sharded = [is_sharded(param) for param in params]
    if not any(sharded):
        return None
    if not all(sharded):
        plain, other = names[sharded.index(False)], names[sharded.index(True)]
        raise Error(f"{plain} is a plain tensor, but {other} is a DTensor: shard or replicate all on a mesh")
    counts = []
    ranks = sorted(dist.get_process_group_ranks(group))
    for name, param in zip(names, params):
        mesh: Any = param.device_mesh  # type: ignore[attr-defined]
        on_mesh = sorted(mesh.mesh.flatten().tolist())
        if on_mesh != ranks:
            raise Error(f"{name} is on a mesh of the ranks {on_mesh}, but process_group has {ranks}: use a mesh of all of them")
        # A parameter that several ranks hold counts once: on the first of them.
        placements = zip(param.placements, mesh.get_coordinate())  # type: ignore[attr-defined]
        counts.append(all(place.is_shard() or at == 0 for place, at in placements))
    return counts
