"""`GradBlend`: Gradient-Blending in place of `loss.backward()` in a PyTorch training loop."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._gradients import Gradients, Table, backward_pass, check_gradient, check_graph, check_loss, parameters, short
from ._library import Error, Options, lib, number
from .blender import Blender, Report
from .schedule import Schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GradBlend"]


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
        named, self._untrainable = parameters(params)
        self._names, self._params = [name for name, _ in named], [param for _, param in named]
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
        options.setdefault("threads", torch.get_num_threads())
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
        self._table = Table(self._names, self._params, self.blender)
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
        if not isinstance(state, dict) or not _is_bytes(state.get("blender")) or "calls" not in state:
            raise Error("state: expected what GradBlend.state_dict() returned")
        calls = number("state['calls']", state["calls"], 0, 2**63 - 1)
        self.blender.load(bytes(state["blender"].tolist()))
        self._calls = calls
        self._host.refresh()

    def backward(
        self,
        losses: Sequence[Tensor] | Tensor,
        held_out: Callable[[], Tensor] | None = None,
        train: Callable[[], Tensor] | None = None,
    ) -> bool:
        """Adds the gradient of sum_k w_k L_k to `.grad`. Returns whether the call observed.

        A parameter that only losses of weight 0 reach gets a gradient of 0 from a call that observes, and none from others.

        Args:
            losses: K scalars with graphs, or one tensor of shape [K]; the last is the fused loss, whose graph is freed.
            held_out: Computes the fused loss on a held-out batch, with the model in the mode that it is in. Called by
                observing calls only.
            train: Computes the fused loss on a training batch drawn independently of the one behind `losses`. Called by
                observing calls only, which then run one more backward pass. Without it t is the gradient of the fused
                loss in `losses`: cheaper, but the noise of that batch counts as overfitting of the fused loss, which
                lowers its weight.

        Raises:
            Error: Wrong number of losses, one that is no scalar or has no graph, `held_out` or `train` that returns no
                such loss, a loss that reaches no parameter, or a gradient that is sparse or of another dtype. Names the
                loss or the parameter; `.grad` and the state are unchanged. Calls that do not observe leave gradients to
                autograd, and check the losses and parameters alone.
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
        offline = self._schedule == Schedule.offline()
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

    def _roots(self, losses: Sequence[Tensor] | Tensor) -> list[Tensor]:
        k = self.blender.modalities
        if not isinstance(losses, (list, tuple, Tensor)) or (isinstance(losses, Tensor) and losses.dim() == 0):
            raise Error(f"losses is {type(losses).__name__}, expected a list of {k} scalar losses")
        if len(losses) != k:
            raise Error(f"there are {len(losses)} losses, expected {k}")
        return [check_loss(f"losses[{i}]", loss) for i, loss in enumerate(losses)]

    def _trained(self) -> list[Tensor]:
        for name, param, kind in zip(self._names, self._params, self._kinds):
            now = (param.dtype, param.device, param.shape)
            if now != kind:
                was, now_is = (f"{short(dtype)} {list(shape)} on {device}" for dtype, device, shape in (kind, now))
                raise Error(f"{name} was {was} and is {now_is}: make GradBlend after moving or converting parameters")
        for name, param in self._untrainable:
            if param.requires_grad:
                got = f"{short(param.dtype)} on {param.device}"
                raise Error(f"{name} is {got}, expected float32, float16 or bfloat16 on {self._device}")
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
            backward_pass(torch.stack(terms).sum(), "losses", trained, retain=False)
            if all(param.grad is None for param in trained):
                raise Error("losses reach no parameter: all gradients are None")

    def _observe(self, losses: list[Tensor], held_out: Callable[[], Tensor] | None, train: Callable[[], Tensor] | None) -> None:
        if held_out is None:
            raise Error(f"this call observes (call {self._calls}, every {self._every}): held_out is missing")
        for name, function in (("held_out", held_out), ("train", train)):
            if function is not None and not callable(function):
                raise Error(f"{name} is {type(function).__name__}, expected a function that returns a loss")
        trained = self._trained()
        before = [param.grad for param in self._params]
        for name, param, grad in zip(self._names, self._params, before):
            if grad is not None:
                check_gradient(f"{name}.grad", grad, param)
                if grad.is_inference() or any(s == 0 and n > 1 for s, n in zip(grad.stride(), grad.shape)):
                    raise Error(f"{name}.grad cannot be added to: it is expanded, or an inference tensor")
        after: Gradients = before
        try:
            for param in self._params:
                param.grad = None
            last = len(losses) - 1
            seen: set[Any] = set()
            for k, loss in enumerate(losses):
                check_graph(loss, f"losses[{k}]", seen)
            grads = [self._gradients(loss, f"losses[{k}]", trained, k < last) for k, loss in enumerate(losses)]
            g = self._closure("held_out", held_out, trained)
            t = grads[last] if train is None else self._closure("train", train, trained)
            blended, _bound = self._table.bind(grads, t, g)  # bound until the step is submitted
            if self._scale is not None:
                self.blender.set_grad_scale(self._scale.data_ptr())
            try:
                self.blender.step(self._table.plan)
            finally:
                self.blender.set_grad_scale(None)  # the address was that of this call's tensor
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
        loss = check_loss(f"the loss that {name} returned", returned)
        check_graph(loss, name, set())
        for param in trained:
            param.grad = None  # that a backward pass inside the function has left
        return self._gradients(loss, name, trained, retain=False)

    def _gradients(self, loss: Tensor, what: str, trained: list[Tensor], retain: bool) -> Gradients:
        """The gradient of a loss for each parameter. By way of `.grad`, so autograd gives each a buffer of its own in the
        parameter's layout, and does not copy it."""
        root = loss if self._scale is None else loss * self._scale.to(loss.device)
        backward_pass(root, what, trained, retain)
        grads = [param.grad for param in self._params]
        for param in trained:
            param.grad = None
        if all(grad is None for grad in grads):
            raise Error(f"{what} reaches no parameter: all its gradients are None")
        for name, param, grad in zip(self._names, self._params, grads):
            if grad is not None:
                check_gradient(f"{name}: the gradient of {what}", grad, param)
        return grads


class _HostCopy:
    """The weights where the host can read them. On CUDA, reading synchronizes with the latest copy only, which was
    enqueued at least a step ago."""

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


def _is_bytes(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() == 1


def _add(grad: Tensor, blended: Tensor) -> Tensor:
    with torch.no_grad():
        return grad.add_(blended)


def _keep_graphs_of_compiled_modules() -> None:
    """Lets several backward passes run through a module of `torch.compile`.

    Since PyTorch 2.6 its backward pass reuses the memory of saved tensors by default, and then rejects `retain_graph`.
    The option counts where a module is compiled, at its first forward pass after this.
    """
    try:
        options: Any = importlib.import_module("torch._functorch.config")
    except ImportError:
        return
    if hasattr(options, "donated_buffer"):
        options.donated_buffer = False
