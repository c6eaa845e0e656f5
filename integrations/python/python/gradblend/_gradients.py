"""Parameters, losses and gradients as autograd has them: their checks, and the plan over them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional

import torch
from torch import Tensor

from ._library import Error, ffi
from .blender import Blender, Plan

__all__ = [
    "Gradients",
    "Table",
    "backward_pass",
    "check_gradient",
    "check_graph",
    "check_loss",
    "is_sharded",
    "like",
    "local",
    "owns_memory",
    "parameters",
    "placed_like",
    "short",
]

#: Codes of `gradblend_tensor.dtype`.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

#: One gradient for each parameter; None where a loss does not reach it.
Gradients = list[Optional[Tensor]]


class Table:
    """The plan over all parameters. Their gradients have other addresses at each observing call."""

    def __init__(self, names: list[str], params: list[Tensor], blender: Blender, counted: list[bool] | None) -> None:
        """`counted` says which products this rank counts; None: all."""
        self._names, self._counted = names, counted
        self._modalities = k = blender.modalities
        self._records = ffi.new("struct gradblend_tensor[]", len(params))
        self._addresses = ffi.new("uintptr_t[]", len(params) * k)
        rows = ffi.cast("void **", self._addresses)
        for i, param in enumerate(params):
            record = self._records[i]
            record.len, record.dtype, record.modalities = local(param).numel(), DTYPES[param.dtype], rows + i * k
        self.plan = Plan(blender, self._records, None)
        self.copied = 0

    def bind(self, grads: list[Gradients], t: Gradients, g: Gradients) -> tuple[Gradients, list[Gradients]]:
        """Binds v_k, t and g of each parameter. Returns where its blended gradient will be, and all that is bound.

        The blend is in place of a v_k that is not t as well and whose memory nobody else has, or in new memory. None if no
        loss reaches the parameter.
        """
        blended: Gradients = []
        bound: list[Gradients] = []
        for i, (t_i, g_i, *v) in enumerate(zip(t, g, *grads)):
            reached = any(grad is not None for grad in v)
            if not reached or (self._counted is not None and not self._counted[i]):
                # The held-out loss alone does not make a product, and another rank makes one of what it holds as well.
                t_i = g_i = None
            elif t_i is None and g_i is not None:
                t_i = torch.zeros_like(g_i)
            elif g_i is None and t_i is not None:
                g_i = torch.zeros_like(t_i)
            t_i, g_i, *v = self._in_one_order([t_i, g_i, *v])
            separate = [grad for grad in (g_i, *v) if grad is not None and grad.numel() > 0]
            if len({grad.data_ptr() for grad in separate}) < len(separate):
                why = "a hook keeps .grad in a buffer, or a function returns one tensor in both"
                raise Error(f"{self._names[i]}: gradients of two passes share memory: {why}")
            out = next((grad for grad in v if grad is not None and grad is not t_i and owns_memory(grad)), None)
            if out is None and reached:
                out = torch.empty_like(next(grad for grad in v if grad is not None))
            blended.append(out)
            row = [t_i, g_i, out, *v]
            bound.append(row)
            # A tensor without elements has no address.
            addresses = [0 if grad is None or grad.numel() == 0 else grad.data_ptr() for grad in row]
            record = self._records[i]
            record.train, record.valid, record.blended = (ffi.cast("void *", address) for address in addresses[:3])
            self._addresses[i * self._modalities : (i + 1) * self._modalities] = addresses[3:]
        self.plan._bind(self._records, None)
        return blended, bound

    def _in_one_order(self, grads: Gradients) -> Gradients:
        """Gradients of one parameter, copied if they are not dense with their elements in the same order."""
        present = [grad for grad in grads if grad is not None]
        if all(grad.is_contiguous() and not grad.is_neg() for grad in present):
            return grads
        strides = present[0].stride()
        if dense(present[0]) and all(grad.stride() == strides and not grad.is_neg() for grad in present):
            return grads
        # `contiguous` keeps the bit of a lazy negation, which addresses do not show.
        distinct = {id(grad): grad for grad in present}  # t may be v_k
        copies = {key: grad.resolve_neg().contiguous() for key, grad in distinct.items()}
        self.copied += sum(copies[key] is not grad for key, grad in distinct.items())
        return [None if grad is None else copies[id(grad)] for grad in grads]


def parameters(params: Iterable[Any], sharded: bool) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """Names and tensors of what an optimiser takes, without duplicates; and those that must stay frozen."""
    if isinstance(params, torch.nn.Module):
        raise Error("params is a module, expected module.named_parameters()")
    if isinstance(params, (Tensor, dict, str)) or not hasattr(params, "__iter__"):
        raise Error(f"params is {type(params).__name__}, expected an iterable of tensors, (name, tensor) pairs or groups")
    found: dict[int, tuple[str, Tensor]] = {}

    def add(entry: Any, default: str) -> None:
        if isinstance(entry, dict) and "params" in entry:
            group = entry["params"]
            for i, inner in enumerate([group] if isinstance(group, Tensor) else group):
                add(inner, f"{default}['params'][{i}]")
            return
        name, param = entry if isinstance(entry, tuple) and len(entry) == 2 else (default, entry)
        if not isinstance(param, Tensor):
            raise Error(f"{default} is {type(param).__name__}, expected a tensor or a (name, tensor) pair")
        if torch.nn.parameter.is_lazy(param):
            raise Error(f"{name} has no shape yet: run a batch through the lazy module first")
        if not param.is_leaf:
            raise Error(f"{name} is no leaf: it is computed from other tensors, so it has no .grad")
        found.setdefault(id(param), (str(name), param))

    for i, entry in enumerate(params):
        add(entry, f"params[{i}]")
    trained = [(name, param) for name, param in found.values() if param.requires_grad]
    if not trained:
        raise Error("params has no tensor that requires a gradient")
    for name, param in trained:
        if param.dtype not in DTYPES:
            raise Error(f"{name} is {short(param.dtype)}, expected float32, float16 or bfloat16")
        if param.device.type not in ("cpu", "cuda"):
            raise Error(f"{name} is on {param.device}, expected the CPU or a CUDA device")
        if param.device != trained[0][1].device:
            raise Error(f"{name} is on {param.device}, but {trained[0][0]} is on {trained[0][1].device}: use one device")
        if is_sharded(param) and not sharded:
            raise Error(f"{name} is a {type(param).__name__}: sharded parameters need process_group")
        if not is_sharded(param) and param.numel() > 0 and param.data_ptr() == 0:
            raise Error(f"{name} is a {type(param).__name__} without an address, expected a plain tensor")
    device = trained[0][1].device
    kept: list[tuple[str, Tensor]] = []
    others: list[tuple[str, Tensor]] = []
    for pair in found.values():
        (kept if pair[1].dtype in DTYPES and pair[1].device == device else others).append(pair)
    return kept, others


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: each rank of a mesh holds a part of it, or a copy."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor on this rank."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return part


def placed_like(param: Tensor, grad: Tensor | None) -> Tensor | None:
    """A gradient with the placements of its parameter."""
    placed: Any = grad
    if grad is None or not is_sharded(grad) or placed.placements == param.placements:  # type: ignore[attr-defined]
        return grad
    with torch.no_grad():
        placed = placed.redistribute(placements=param.placements)  # type: ignore[attr-defined]
        return placed  # type: ignore[no-any-return]


def like(param: Tensor, part: Tensor) -> Tensor:
    """The gradient of a parameter from its part on this rank."""
    if not is_sharded(param):
        return part
    placed: Any = param
    shape = {"shape": param.shape, "stride": param.stride()}
    whole: Tensor = type(placed).from_local(part, placed.device_mesh, placed.placements, run_check=False, **shape)
    return whole


def backward_pass(root: Tensor, what: str, trained: list[Tensor], retain: bool) -> None:
    """A backward pass that names the loss if its graph is gone."""
    try:
        if any(map(is_sharded, trained)):
            _whole_backward_pass(root, trained, retain)
        else:
            torch.autograd.backward(root, retain_graph=retain, inputs=trained)
    except RuntimeError as error:
        if "second time" in str(error):
            raise Error(f"{what}: another backward pass has run through this graph and freed it") from error
        raise


def _whole_backward_pass(root: Tensor, trained: list[Tensor], retain: bool) -> None:
    """A backward pass through modules of `fully_shard`, whose graphs have other leaves than the parameters."""
    own = {id(param) for param in trained}
    leaves = [node.variable for node in _nodes(root, set()) if hasattr(node, "variable")]
    others = [(leaf, leaf.grad) for leaf in leaves if id(leaf) not in own]
    try:
        for leaf, _ in others:
            leaf.grad = None
        torch.autograd.backward(root, retain_graph=retain)
    finally:
        for leaf, grad in others:
            leaf.grad = grad


def check_loss(what: str, loss: Any) -> Tensor:
    """A loss that a backward pass can start from."""
    if not isinstance(loss, Tensor):
        raise Error(f"{what} is {type(loss).__name__}, expected a scalar tensor")
    if loss.numel() != 1:
        raise Error(f"{what} has shape {list(loss.shape)}, expected a scalar")
    if not loss.is_floating_point():
        raise Error(f"{what} is {short(loss.dtype)}, expected a floating-point scalar")
    if not loss.requires_grad:
        raise Error(f"{what} has no graph: it is detached, or was computed without gradients")
    return loss


def _nodes(root: Tensor, seen: set[Any]) -> Iterable[Any]:
    """The nodes of a graph that are not in `seen`, which gets them."""
    nodes = [root.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            nodes += [following for following, _ in node.next_functions]


def check_graph(root: Tensor, what: str, seen: set[Any]) -> None:
    """Rejects reentrant checkpoints, which cannot run in a backward pass for given parameters: they get no gradient, or torch's
    error does not say which loss it is."""
    for node in _nodes(root, seen):
        if node.name() == "CheckpointFunctionBackward":
            raise Error(f"{what} uses torch.utils.checkpoint with use_reentrant=True, expected use_reentrant=False")


def check_gradient(what: str, grad: Tensor, param: Tensor) -> None:
    """Rejects a gradient that cannot be read as plain memory of the parameter's shape."""
    if grad.layout != torch.strided:
        raise Error(f"{what} is sparse ({short(grad.layout)}), expected a dense one")
    if grad.numel() > 0 and grad.data_ptr() == 0:
        raise Error(f"{what} is a {type(grad).__name__} without an address, expected a plain tensor")
    if grad.dtype not in DTYPES or grad.dtype != param.dtype:
        raise Error(f"{what} is {short(grad.dtype)}, expected {short(param.dtype)} like the parameter")
    if grad.device != param.device or grad.shape != param.shape:
        got, expected = (f"{list(of.shape)} on {of.device}" for of in (grad, param))
        raise Error(f"{what} is {got}, expected {expected}")


def short(of: torch.dtype | torch.layout) -> str:
    return str(of).removeprefix("torch.")


def users_of_memory(tensor: Tensor) -> int:
    count: Any = getattr(torch._C, "_storage_Use_Count", None)
    return -1 if count is None else int(count(tensor.untyped_storage()._cdata))


#: Of a tensor whose memory no other tensor, graph or hook has.
_ALONE = users_of_memory(torch.empty(1, device="cpu"))


def owns_memory(grad: Tensor) -> bool:
    """Whether nobody else sees a write to a gradient: a custom function may return what it has saved, a hook may keep
    a view of it. (A hook that keeps `.grad` itself sees later writes, as with any optimiser.)"""
    return _ALONE > 0 and users_of_memory(grad) == _ALONE


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
