"""`GradBlend`: Gradient-Blending in place of `loss.backward()` in a PyTorch training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from ._library import Error, Options, ffi, lib, number
from .blender import Blender, Plan, Report
from .schedule import Schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GradBlend"]

#: Codes of `gradblend_tensor.dtype`.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

#: One gradient for each parameter; None where a loss does not reach it.
Gradients = list[Optional[Tensor]]


class GradBlend:
    """Weights the K losses of a multi-modal network by how each overfits, and leaves the blended gradient in `.grad`.

    ::

        gb = GradBlend(model.named_parameters(), num_losses=3, every=10)
        ...
        gb.backward([audio_loss, video_loss, fused_loss], held_out=lambda: fused_loss_of(next(held_out_batches)))
        optimizer.step()

    An *observing* call (the first, then each `every`-th) runs one backward pass for each loss and one for the held-out
    loss, writes sum_k w_k v_k with the weights in force, and updates the moments and the weights. Any other call runs
    one backward pass on sum_k w_k L_k, without the losses of weight 0. Either adds to `.grad` as `backward` does.

    Args:
        params: What an optimiser takes: tensors, (name, tensor) pairs, or groups. With names, errors have them. Leaves
            of dtype float32, float16 or bfloat16 on one device. Only these get gradients.
        num_losses: K, the number of losses, from 1 to 32. The last is the fused one.
        every: Observe at every `every`-th call.
        schedule: Reweight at the end of a super-epoch, in `end_epoch`, not at each observation. With
            `Schedule.offline()` no call observes: the weights are those of `set_weights`.
        scaler: The `torch.amp.GradScaler` of the loop. Losses are scaled by it, and its scale is divided out of the
            moments. Go on with `scaler.step(optimizer)` and `scaler.update()`.
        on_observation: Called with a `Report` after each observation. On CUDA the report synchronizes the stream.
        options: Of `Blender`: `decay`, `min_weight`, `overfitting`, `negative`, `average`, `damping`, `cadence`,
            `threads`. The weights start at 1/K; `min_weight` bounds those that are found. `cadence` is
            "every_observation" unless there is a schedule.

    Raises:
        Error: An option is out of range, or a parameter has another dtype or device, or is no leaf.
    """

    def __init__(
        self,
        params: Iterable[Any],
        num_losses: int,
        *,
        every: int = 1,
        schedule: Schedule | None = None,
        scaler: Any = None,
        on_observation: Callable[[Report], object] | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._names, self._params = _parameters(params)
        if "device" in options:
            raise TypeError("unexpected option 'device': it is that of the parameters")
        number("num_losses", num_losses, 1, lib.MAX_MODALITIES)
        self._every = number("every", every, 1, 2**63 - 1)
        if schedule is not None and not isinstance(schedule, Schedule):
            raise Error(f"schedule is {type(schedule).__name__}, expected gradblend.Schedule")
        if scaler is not None and (isinstance(scaler, type) or not callable(getattr(scaler, "scale", None))):
            raise Error(f"scaler is {scaler!r}, expected a torch.amp.GradScaler")
        if on_observation is not None and not callable(on_observation):
            raise Error(f"on_observation is {type(on_observation).__name__}, expected a function")
        self._schedule, self._scaler, self._on_observation = schedule, scaler, on_observation
        options.setdefault("cadence", "every_observation" if schedule is None else "on_request")
        self._device = self._params[0].device
        self._kinds = [(param.dtype, param.device, param.shape) for param in self._params]
        #: The operations that this object is made of.
        self.blender = Blender(num_losses, device=self._device, **options)
        self._calls = self._observations = 0
        self._running = False
        self._weights: Tensor = self.blender.weights.torch()
        self._host = _HostCopy(self._weights)
        self._scale: Tensor | None = None
        self._table = _Table(self._params, self.blender)
        _keep_graphs_of_compiled_modules()

    @property
    def weights(self) -> Tensor:
        """w_k in force: a new float32 tensor of shape [K] on the parameters' device."""
        return self._weights.clone()

    @property
    def observations(self) -> int:
        """Calls of this object that observed, skipped observations included."""
        return self._observations

    @property
    def copied(self) -> int:
        """Gradients that were copied so far: those of one parameter that are not dense, or differ in their strides."""
        return self._table.copied

    def report(self) -> Report:
        """Moments, weights, ratios and counters, by name. On CUDA it synchronizes the stream."""
        return self.blender.report()

    def set_weights(self, weights: Any) -> None:
        """Puts K weights in force as given, until the next reweight: with `Schedule.offline()`, for good."""
        self.blender.set_weights(weights)
        self._host.refresh()

    def reweight(self) -> None:
        """Solves for the weights of the moments now; for `cadence="on_request"`, as after a number of observations."""
        self.blender.reweight()
        self._host.refresh()

    def end_epoch(self, epoch: int) -> Report | None:
        """Tells the schedule that this epoch, counted from 0, has ended.

        At the end of a super-epoch reweights from its observations, starts the next one, and returns the report of the
        one that ended, with the new weights. `Flags.HELD` in it: the weights are the old ones. None at other epochs.
        """
        epoch = number("epoch", epoch, 0, 2**63 - 2)
        if self._schedule is None or not self._schedule.ends(epoch):
            return None
        self.reweight()
        report = self.report()
        self.blender.reset()
        return report

    def __repr__(self) -> str:
        weights = ", ".join(f"{weight:.3f}" for weight in self._host.read())
        return f"GradBlend({len(self._params)} parameters, weights [{weights}], {self._calls} calls)"

    def __getstate__(self) -> object:
        raise Error("GradBlend cannot be copied or pickled: make another one, and use state_dict() and load_state_dict()")

    def state_dict(self) -> dict[str, Any]:
        """The moments, the weights and the position among calls, for `load_state_dict`: continues bit for bit."""
        return {"calls": self._calls, "blender": torch.frombuffer(bytearray(self.blender.save()), dtype=torch.uint8)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state of `state_dict`, of any device.

        `Error` for another K, average or decay, or a state that is damaged; nothing has changed then.
        """
        if not isinstance(state, dict) or not isinstance(state.get("blender"), Tensor) or "calls" not in state:
            raise Error("state: expected what GradBlend.state_dict() returned")
        calls = number("state['calls']", state["calls"], 0, 2**63 - 1)
        self.blender.load(bytes(state["blender"].to(device="cpu", dtype=torch.uint8).tolist()))
        self._calls = calls
        self._host.refresh()

    def backward(
        self,
        losses: Sequence[Tensor],
        held_out: Callable[[], Tensor] | None = None,
        train: Callable[[], Tensor] | None = None,
    ) -> bool:
        """Adds the gradient of sum_k w_k L_k to `.grad`. Returns whether the call observed.

        A parameter that only losses of weight 0 reach gets a gradient of 0 from a call that observes, and none from others.

        Args:
            losses: K scalars with a graph, which is freed; the last is the fused loss.
            held_out: Computes the fused loss on a held-out batch, with the model in the mode that it is in. Called by
                observing calls only.
            train: Computes the fused loss on a training batch drawn independently of the one behind `losses`. Called by
                observing calls only, which then run one more backward pass. Without it t is the gradient of the fused
                loss in `losses`: cheaper, but the noise of that batch counts as overfitting of the fused loss, which
                lowers its weight.

        Raises:
            Error: Wrong number of losses, one that is no scalar or has no graph, `held_out` or `train` that returns no
                such loss, a loss that reaches no parameter, or a gradient that is sparse or of another dtype. Names the
                loss or the parameter; `.grad` and the state are unchanged.
        """
        if self._running:
            raise Error("backward was called by held_out or train of another call: return the loss instead")
        self._running = True
        try:
            # As `backward` does, also where gradients are switched off.
            with torch.enable_grad():
                observes = self._backward(self._roots(losses), held_out, train)
        finally:
            self._running = False
        if observes and self._on_observation is not None:
            self._on_observation(self.report())
        return observes

    def _backward(self, roots: list[Tensor], held_out: Callable[[], Tensor] | None, train: Callable[[], Tensor] | None) -> bool:
        offline = self._schedule is not None and self._schedule == Schedule.offline()
        observes = not offline and self._calls % self._every == 0
        if self._scaler is not None:
            # The scale by the scaler's public interface, which also makes it initialise itself.
            self._scale = self._scaler.scale(torch.ones((), device=self._device))
        if observes:
            self._observe(roots, held_out, train)
        else:
            self._weighted(roots)
        self._calls += 1
        self._observations += observes
        return observes

    def _roots(self, losses: Sequence[Tensor]) -> list[Tensor]:
        k = self.blender.modalities
        if not isinstance(losses, (list, tuple, Tensor)) or (isinstance(losses, Tensor) and losses.dim() == 0):
            raise Error(f"losses is {type(losses).__name__}, expected {k} scalar losses")
        if len(losses) != k:
            raise Error(f"there are {len(losses)} losses, expected {k}")
        return [_root(f"losses[{i}]", loss) for i, loss in enumerate(losses)]

    def _trained(self) -> list[Tensor]:
        for name, param, kind in zip(self._names, self._params, self._kinds):
            now = (param.dtype, param.device, param.shape)
            if now != kind:
                was, now_is = (f"{_name(dtype)} {list(shape)} on {device}" for dtype, device, shape in (kind, now))
                raise Error(f"{name} was {was} and is {now_is}: make GradBlend after moving or converting parameters")
        trained = [param for param in self._params if param.requires_grad]
        if not trained:
            raise Error("no parameter requires a gradient")
        return trained

    def _weighted(self, losses: list[Tensor]) -> None:
        """One backward pass on sum_k w_k L_k. Leaves out losses of weight 0: 0 times an infinity is NaN."""
        in_force = self._host.read()
        weights = self._weights if self._scale is None else self._weights * self._scale
        terms = [weights[k] * loss.reshape(()).to(self._device) for k, loss in enumerate(losses) if in_force[k] != 0]
        trained = self._trained()
        if terms:
            # One root: with several, autograd holds on to more gradients.
            _run(torch.stack(terms).sum(), "losses", trained, retain=False)
            if all(param.grad is None for param in trained):
                raise Error("losses reach no parameter: all gradients are None")

    def _observe(self, losses: list[Tensor], held_out: Callable[[], Tensor] | None, train: Callable[[], Tensor] | None) -> None:
        for name, function in (("held_out", held_out), ("train", train)):
            if function is None and name == "held_out":
                raise Error(f"this call observes (call {self._calls}, every {self._every}): held_out is missing")
            if function is not None and not callable(function):
                raise Error(f"{name} is {type(function).__name__}, expected a function that returns a loss")
        trained = self._trained()
        before = [param.grad for param in self._params]
        for name, param, grad in zip(self._names, self._params, before):
            if grad is not None:
                _check(f"{name}.grad", grad, param)
        after: Gradients = before
        try:
            for param in self._params:
                param.grad = None
            last = len(losses) - 1
            grads = [self._gradients(loss, f"losses[{k}]", trained, k < last) for k, loss in enumerate(losses)]
            g = self._closure("held_out", held_out, trained)
            t = grads[last] if train is None else self._closure("train", train, trained)
            blended, _bound = self._table.bind(grads, t, g)  # bound until the step is submitted
            if self._scale is not None:
                self.blender.set_grad_scale(self._scale.data_ptr())
            self.blender.step(self._table.plan)
            self._host.refresh()
            after = [old if new is None else new if old is None else _add(old, new) for old, new in zip(before, blended)]
        finally:
            for param, grad in zip(self._params, after):
                param.grad = grad

    def _closure(self, name: str, function: Any, trained: list[Tensor]) -> Gradients:
        try:
            returned = function()
        except StopIteration as error:
            # It would end a generator or a loop around this call without a word.
            raise Error(f"{name} raised StopIteration: its batches are used up") from error
        for param in trained:
            param.grad = None  # that a backward pass inside the function has left
        return self._gradients(_root(f"the loss that {name} returned", returned), name, trained, retain=False)

    def _gradients(self, loss: Tensor, what: str, trained: list[Tensor], retain: bool) -> Gradients:
        """The gradient of a loss for each parameter. By way of `.grad`, so autograd gives each a buffer of its own in the
        parameter's layout, and does not copy it."""
        root = loss if self._scale is None else loss * self._scale.to(loss.device)
        _run(root, what, trained, retain)
        grads = [param.grad for param in self._params]
        for param in trained:
            param.grad = None
        if all(grad is None for grad in grads):
            raise Error(f"{what} reaches no parameter: all its gradients are None")
        for name, param, grad in zip(self._names, self._params, grads):
            if grad is not None:
                _check(f"{name}: the gradient of {what}", grad, param)
        return grads


class _HostCopy:
    """The weights where the host can read them. Reading waits for the latest copy only: on CUDA, for work enqueued a
    step ago."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        self._copy = torch.empty(weights.shape, pin_memory=True) if weights.is_cuda else weights
        self._event: Any = torch.cuda.Event() if weights.is_cuda else None  # type: ignore[no-untyped-call]
        self.refresh()

    def refresh(self) -> None:
        if self._event is not None:
            self._copy.copy_(self._weights, non_blocking=True)
            self._event.record(torch.cuda.current_stream(self._weights.device))

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return [float(weight) for weight in self._copy.tolist()]


class _Table:
    """The plan over all parameters. Their gradients have other addresses at each observing call."""

    def __init__(self, params: list[Tensor], blender: Blender) -> None:
        self._modalities = k = blender.modalities
        self._records = ffi.new("struct gradblend_tensor[]", len(params))
        self._addresses = ffi.new("uintptr_t[]", len(params) * k)
        rows = ffi.cast("void **", self._addresses)
        for i, param in enumerate(params):
            record = self._records[i]
            record.len, record.dtype, record.modalities = param.numel(), DTYPES[param.dtype], rows + i * k
        self.plan = Plan(blender, self._records, None)
        self.copied = 0

    def bind(self, grads: list[Gradients], t: Gradients, g: Gradients) -> tuple[Gradients, list[Gradients]]:
        """Binds v_k, t and g of each parameter. Returns where its blended gradient will be, and all that is bound.

        The blend is in place of a v_k that is not t as well, or in new memory; None if no loss reaches the parameter.
        """
        blended: Gradients = []
        bound: list[Gradients] = []
        for i, (t_i, g_i, *v) in enumerate(zip(t, g, *grads)):
            out = next((grad for grad in v if grad is not None and grad is not t_i), None)
            reached = any(grad is not None for grad in v)
            if not reached:
                # The held-out loss alone does not make a product.
                t_i = g_i = None
            elif t_i is None and g_i is not None:
                t_i = torch.zeros_like(g_i)
            elif g_i is None and t_i is not None:
                g_i = torch.zeros_like(t_i)
            row = self._in_one_order([t_i, g_i, out, *v])
            if reached and row[0] is not None and out is None:
                row[2] = torch.empty_like(row[0])
            blended.append(row[2])
            bound.append(row)
            record = self._records[i]
            # A tensor without elements has no address.
            addresses = [0 if grad is None or grad.numel() == 0 else grad.data_ptr() for grad in row]
            record.train, record.valid, record.blended = (ffi.cast("void *", address) for address in addresses[:3])
            self._addresses[i * self._modalities : (i + 1) * self._modalities] = addresses[3:]
        self.plan._bind(self._records, None)
        return blended, bound

    def _in_one_order(self, grads: Gradients) -> Gradients:
        """Gradients of one parameter, copied if they do not all have their elements in the same order without gaps."""
        present = [grad for grad in grads if grad is not None]
        if all(grad.is_contiguous() for grad in present):
            return grads
        strides = present[0].stride()
        if _dense(present[0]) and all(grad.stride() == strides for grad in present):
            return grads
        copies = {id(grad): grad if grad.is_contiguous() else grad.contiguous() for grad in present}
        self.copied += sum(not grad.is_contiguous() for grad in {id(grad): grad for grad in present}.values())
        return [None if grad is None else copies[id(grad)] for grad in grads]


def _parameters(params: Iterable[Any]) -> tuple[list[str], list[Tensor]]:
    """Names and tensors of what an optimiser takes, without duplicates and without frozen ones that could not train."""
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
            raise Error(f"{name} is {_name(param.dtype)}, expected float32, float16 or bfloat16")
        if param.device != trained[0][1].device:
            raise Error(f"{name} is on {param.device}, but {trained[0][0]} is on {trained[0][1].device}: use one device")
    device = trained[0][1].device
    kept = [pair for pair in found.values() if pair[1].dtype in DTYPES and pair[1].device == device]
    return [name for name, _ in kept], [param for _, param in kept]


def _run(root: Tensor, what: str, trained: list[Tensor], retain: bool) -> None:
    """A backward pass that names the loss if its graph is gone."""
    try:
        torch.autograd.backward(root, retain_graph=retain, inputs=trained)
    except RuntimeError as error:
        if "second time" in str(error):
            raise Error(f"{what}: another backward pass has run through this graph and freed it") from error
        raise


def _root(what: str, loss: Any) -> Tensor:
    """A loss that a backward pass can start from."""
    if not isinstance(loss, Tensor):
        raise Error(f"{what} is {type(loss).__name__}, expected a scalar tensor")
    if loss.numel() != 1:
        raise Error(f"{what} has shape {list(loss.shape)}, expected a scalar")
    if not loss.is_floating_point():
        raise Error(f"{what} is {_name(loss.dtype)}, expected a floating-point scalar")
    if not loss.requires_grad:
        raise Error(f"{what} has no graph: it is detached, or was computed without gradients")
    return loss


def _check(what: str, grad: Tensor, param: Tensor) -> None:
    """Rejects a gradient that cannot be read as plain memory of the parameter's shape."""
    if grad.layout != torch.strided:
        raise Error(f"{what} is sparse ({_name(grad.layout)}), expected a dense one")
    if grad.dtype not in DTYPES or grad.dtype != param.dtype:
        raise Error(f"{what} is {_name(grad.dtype)}, expected {_name(param.dtype)} as the parameter")
    if grad.device != param.device or grad.shape != param.shape:
        got, expected = (f"{list(of.shape)} on {of.device}" for of in (grad, param))
        raise Error(f"{what} is {got}, expected {expected}")


def _name(of: torch.dtype | torch.layout) -> str:
    return str(of).removeprefix("torch.")


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _add(grad: Tensor, blended: Tensor) -> Tensor:
    with torch.no_grad():
        return grad.add_(blended)


def _keep_graphs_of_compiled_modules() -> None:
    """Lets several backward passes run through a module of `torch.compile`.

    Since PyTorch 2.6 its backward pass reuses the memory of saved tensors by default, and then rejects `retain_graph`.
    The option counts where a module is compiled, at its first forward pass after this.
    """
    options: Any = getattr(getattr(torch, "_functorch", None), "config", None)
    if hasattr(options, "donated_buffer"):
        options.donated_buffer = False
