"""`GradBlend`: Gradient-Blending in place of `loss.backward()` in a PyTorch training loop."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor

from ._gradients import (
    Gradients,
    Table,
    backward_pass,
    check_gradient,
    check_graph,
    check_loss,
    is_sharded,
    like,
    local,
    parameters,
    placed_like,
    short,
)
from ._library import Error, Options, config, ffi, lib, number
from ._modules import Wrapped, check_sharding, counted_here, wrappers
from ._ranks import Ranks, fingerprint, finite
from .blender import Blender, Pass, Report
from .schedule import Schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GradBlend"]

#: A fused loss, or one and the number of samples that it is the mean of.
HeldOut = Union[Tensor, tuple[Tensor, int]]


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
        process_group: The ranks that train this model, a group of `torch.distributed`; all make the same calls, and have
            the same weights, bit for bit. Parameters are those of a module in DistributedDataParallel, or of one that
            each rank has a copy of, or all DTensors (`fully_shard`). `.grad` gets the mean over the ranks.
        exact: Observe the gradients' means over the ranks (of copies: K + 1 times the traffic of a call that does not
            observe). False: observe the products of each rank's own gradients, one observation a rank, noisier; only
            the blend is averaged. Sharded gradients are means already.
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
        process_group: Any = None,
        exact: bool = True,
        **options: Unpack[Options],
    ) -> None:
        named, self._untrainable = parameters(params, process_group is not None)
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
        self._list = fingerprint([(name, short(param.dtype), tuple(param.shape)) for name, param in named])
        record = config(num_losses, **options)
        record.threads = 0  # may differ between ranks
        self._options = bytes(ffi.buffer(record)) + repr((self._every, schedule)).encode()
        self._exact = exact
        self._ranks: Ranks | None = None
        self._wrapped: Wrapped | None = None
        #: On several ranks: whether the gradients of a parameter in `.grad` are those of this rank alone.
        self._left = [False] * len(self._params)
        #: Whether calls are in `no_sync`.
        self._accumulates = False
        #: Whether `samples` is given; None before the first call.
        self._has_samples: bool | None = None
        #: The losses of an observing call.
        self._values: Gradients = []
        if process_group is not None:
            self._ranks = Ranks(process_group, self._device)
            check_sharding(named)
        self._find_modules()
        counted = None if self._ranks is None else counted_here(self._params, self._names, self._ranks.group)
        self._table = Table(self._names, self._params, self.blender, counted)
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
    def nonfinite_ranks(self) -> tuple[int, ...]:
        """Ranks whose gradients, or products of sharded ones, were not finite in the latest observing call."""
        return () if self._ranks is None else self._ranks.nonfinite_ranks()

    @property
    def exchanged(self) -> int:
        """Bytes that this rank gave to collective operations of this object so far. DistributedDataParallel and
        `fully_shard` exchange more."""
        return 0 if self._ranks is None else self._ranks.bytes

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
        blender = torch.frombuffer(bytearray(self.blender.save()), dtype=torch.uint8)
        return {"calls": self._calls, "each_rank": self._observes_each_rank(), "blender": blender}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state of `state_dict`, of any device and any number of ranks.

        `Error` for another K, average or decay, a state that is damaged, or one of `exact=False` where this is another, or
        the reverse: the variance of an observation differs. Nothing has changed then.
        """
        if not isinstance(state, dict) or not _is_bytes(state.get("blender")) or "calls" not in state:
            raise Error("state: expected what GradBlend.state_dict() returned")
        calls = number("state['calls']", state["calls"], 0, 2**63 - 1)
        kinds = ("gradients of the whole batch", "gradients of each rank's batch (exact=False)")
        own, got = self._observes_each_rank(), bool(state.get("each_rank", False))
        if own != got:
            raise Error(f"state: its observations are of the {kinds[got]}, here they are of the {kinds[own]}")
        self.blender.load(bytes(state["blender"].tolist()))
        self._calls = calls
        self._host.refresh()

    def backward(
        self,
        losses: Sequence[Tensor] | Tensor,
        held_out: Callable[[], HeldOut] | None = None,
        train: Callable[[], HeldOut] | None = None,
        samples: int | None = None,
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
            samples: On several ranks with batches of different sizes: how many samples the losses are means of. Ranks
                then count by their samples. All ranks give it in all calls, or none does; `held_out` and `train` then
                return (loss, samples). A rank that has run out of batches gives any finite losses and 0.

        Raises:
            ExchangeError: A rank is gone, or did not make this call within the time-out of the process group.
            Error: Wrong number of losses, one that is no scalar or has no graph, `held_out` or `train` that returns no
                such loss, a loss that reaches no parameter, or a gradient that is sparse or of another dtype. Names the
                loss or the parameter; `.grad` and the state are unchanged. Calls that do not observe leave gradients to
                autograd, and check the losses and parameters alone. On several ranks, where they exchange anything, also
                an error of another rank, or an option, argument or state that differs from those of rank 0.
        """
        if self._running:
            raise Error("backward was called by held_out or train of another call: return the loss instead")
        self._running = True
        try:
            # As `backward` does, also where gradients are switched off.
            with torch.enable_grad():
                observes = self._backward(losses, held_out, train, samples)
        finally:
            self._running = False
            if self._wrapped is not None:
                self._wrapped.end_call()
        if observes and self._on_observation is not None:
            self._on_observation(self.report())
        return observes

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Micro-batches on several ranks: calls in this context leave gradients of one rank in `.grad`, which the next call
        outside averages, all at once. Forward passes of DistributedDataParallel belong into it too."""
        if self._ranks is not None and self._sharded:
            raise Error("no_sync: sharded gradients are means over the ranks already")
        before, self._accumulates = self._accumulates, True
        try:
            with ExitStack() as contexts:
                for module in self._wrapped.modules if self._wrapped is not None else []:
                    contexts.enter_context(module.no_sync())
                yield
        finally:
            self._accumulates = before

    def _find_modules(self) -> None:
        """Finds the modules that average the gradients of the parameters."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return
        modules = wrappers(list(zip(self._names, self._params)), None if self._ranks is None else self._ranks.group)
        if set(modules) != set([] if self._wrapped is None else self._wrapped.modules):
            self._wrapped = Wrapped(modules, self._params, weakref.WeakMethod(self._may_average))

    @property
    def _sharded(self) -> bool:
        return is_sharded(self._params[0])

    def _observes_each_rank(self) -> bool:
        return self._ranks is not None and not self._exact and not self._sharded

    def _observes(self) -> bool:
        """Whether the next call observes."""
        return self._schedule != Schedule.offline() and self._calls % self._every == 0

    def _may_average(self) -> bool:
        """Whether a DistributedDataParallel can average the gradients of the next call: one backward pass reaches all."""
        return not self._observes() and all(weight != 0 for weight in self._host.read())

    def _backward(
        self,
        losses: Sequence[Tensor] | Tensor,
        held_out: Callable[[], HeldOut] | None,
        train: Callable[[], HeldOut] | None,
        samples: int | None,
    ) -> bool:
        observes, first, ranks = self._observes(), self._has_samples is None, self._ranks
        if self._scaler is not None:
            # The scale by the scaler's public interface, which also makes it initialise itself.
            self._scale = self._scaler.scale(torch.ones((), device=self._device))
        if first:
            self._find_modules()  # that were made since
        by_module = [False] * len(self._params)
        if self._wrapped is not None and self._wrapped.average(self._may_average()):
            by_module = self._wrapped.has
        averages = ranks is not None and not self._sharded and self._synchronizes() and not all(by_module)
        prepare = partial(self._prepare, observes, losses, held_out, train, samples)
        if observes or first or averages or samples is not None:
            (roots, trained, before), share = self._shared("the call", prepare, self._facts(train is not None))
        else:
            ((roots, trained, before), _), share = prepare(), None
        self._has_samples = samples is not None
        if observes:
            closures = [(name, function) for name, function in (("held_out", held_out), ("train", train)) if function is not None]
            self._observe(roots, trained, before, closures, share)
        else:
            weighted = partial(self._weighted, roots, trained, share)
            if averages:
                self._on_all(weighted, {})
            else:
                weighted()
            if ranks is not None and not self._sharded:
                self._average_rest(by_module, averages)
        self._calls += 1
        self._observations += observes
        return observes

    def _on_all(self, function: Callable[[], tuple[Any, int]], facts: dict[str, int]) -> tuple[Any, list[int]]:
        if self._ranks is not None:
            return self._ranks.on_all(function, facts)
        result, number = function()
        return result, [number]

    def _passes(self) -> AbstractContextManager[None]:
        """Around passes of the model, in which sharded modules exchange parameters and gradients."""
        return self._ranks.exchanging() if self._ranks is not None and self._sharded else nullcontext()

    def _shared(self, what: str, function: Callable[[], tuple[Any, int]], facts: dict[str, int]) -> tuple[Any, float | None]:
        """The result of a function that also returns a number of samples, or -1; and this rank's share of the samples, times
        the number of ranks."""
        result, samples = self._on_all(function, facts)
        return result, None if self._ranks is None else self._ranks.share(what, samples)

    def _prepare(
        self,
        observes: bool,
        losses: Sequence[Tensor] | Tensor,
        held_out: Callable[[], HeldOut] | None,
        train: Callable[[], HeldOut] | None,
        samples: int | None,
    ) -> tuple[tuple[list[Tensor], list[Tensor], Gradients], int]:
        """What can be checked before the first backward pass. Returns the losses, the parameters that are trained, and what is
        in their `.grad` if the call observes; and the number of samples, or -1."""
        roots, trained = self._roots(losses), self._trained()
        count = -1 if samples is None else number("samples", samples, 0, 2**53)
        if self._ranks is not None and self._has_samples not in (None, samples is not None):
            raise Error(f"samples is {samples}: give it in all calls, or in none")
        if not observes:
            return (roots, trained, []), count
        if held_out is None:
            raise Error(f"this call observes (call {self._calls}, every {self._every}): held_out is missing")
        for name, function in (("held_out", held_out), ("train", train)):
            if function is not None and not callable(function):
                raise Error(f"{name} is {type(function).__name__}, expected a function that returns a loss")
        before = [placed_like(param, param.grad) for param in self._params]
        for name, param, grad in zip(self._names, self._params, before):
            if grad is not None:
                check_gradient(f"{name}.grad", local(grad), local(param))
                if grad.is_inference() or any(s == 0 and n > 1 for s, n in zip(grad.stride(), grad.shape)):
                    raise Error(f"{name}.grad cannot be added to: it is expanded, or an inference tensor")
        seen: set[Any] = set()
        for k, loss in enumerate(roots):
            check_graph(loss, f"losses[{k}]", seen)
        return (roots, trained, before), count

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

    def _weighted(self, losses: list[Tensor], trained: list[Tensor], share: float | None) -> tuple[None, int]:
        """One backward pass on sum_k w_k L_k. Leaves out losses of weight 0: 0 times an infinity is NaN."""
        in_force = self._host.read()
        weights = self._weights
        for factor in (self._scale, share):
            weights = weights if factor is None else weights * factor
        terms = [weights[k] * loss.reshape(()).to(self._device) for k, loss in enumerate(losses) if in_force[k] != 0]
        if terms:
            # One root: with several, autograd holds on to more gradients.
            backward_pass(torch.stack(terms).sum(), "losses", trained, retain=False)
            if all(param.grad is None for param in trained):
                raise Error("losses reach no parameter: all gradients are None")
        return None, 0

    def _synchronizes(self) -> bool:
        return not self._accumulates and (self._wrapped is None or self._wrapped.synchronizes)

    def _average_rest(self, by_module: list[bool], averages: bool) -> None:
        """Averages what is in `.grad` over the ranks where no module has, or notes that this is still to do."""
        assert self._ranks is not None
        grads = [param.grad for param in self._params]
        # Autograd does not tell what is new. What was averaged before is the same on all ranks, and so is its mean.
        self._left = [
            grad is not None and (left or param.requires_grad) and not done
            for param, grad, left, done in zip(self._params, grads, self._left, by_module)
        ]
        if averages:
            self._ranks.average([grads], self._ranks.masks([self._left]), self._params)
            for param, grad in zip(self._params, grads):
                param.grad = grad
            self._left = [False] * len(grads)

    def _facts(self, has_train: bool) -> dict[str, int]:
        """What must be the same on all ranks."""
        if self._ranks is None:
            return {}
        scale = None if self._scale is None else float(self._scale)
        return {
            "number of losses": self.blender.modalities,
            "number of parameters": len(self._params),
            "list of parameters": self._list,
            "set of parameter values at the first call": self._parameter_bits() if self._has_samples is None else 0,
            "set of trained parameters": fingerprint([param.requires_grad for param in self._params]),
            "set of options": fingerprint(self._options, self._exact, self._sharded, self._wrapped is not None),
            "set of arguments": fingerprint(has_train, self._synchronizes()),
            "number of calls": self._calls,
            # Without its checksum: one of both would be the same for all states.
            "state": fingerprint(self.blender.save()[:-4], scale),
        }

    def _parameter_bits(self) -> int:
        """Equal for equal copies; 0 for shards."""
        if self._sharded:
            return 0
        integers = {2: torch.int16, 4: torch.int32}
        sums = [param.detach().view(integers[param.element_size()]).sum() for param in self._params]
        return fingerprint(torch.stack(sums).tolist())

    def _observe(
        self,
        losses: list[Tensor],
        trained: list[Tensor],
        before: Gradients,
        closures: list[tuple[str, Callable[[], HeldOut]]],
        share: float | None,
    ) -> None:
        each_rank, last = self._observes_each_rank(), len(losses) - 1
        after: Gradients = [param.grad for param in self._params]
        self._values = []
        try:
            for param in self._params:
                param.grad = None
            # The products of one rank are those of its own mean loss.
            factor = None if each_rank else share
            passes = [partial(self._gradients, loss, f"losses[{k}]", trained, k < last, factor) for k, loss in enumerate(losses)]
            sets: list[Gradients] = []
            counts = share != 0
            for name, function in closures:
                loss, of_samples = self._shared(name, partial(self._next_loss, passes, sets, name, function, trained), {})
                counts = counts and of_samples != 0
                passes = [partial(self._gradients, loss, name, trained, False, None if each_rank else of_samples)]
            _, finite_flags = self._on_all(partial(self._last_passes, passes, sets), {})
            if self._ranks is not None:
                self._ranks.nonfinite = torch.tensor([1.0 - flag for flag in finite_flags], device=self._device)
            parts = [None if grad is None else local(grad) for grad in before]
            total = self._step(sets, len(losses), parts, share, counts)
            self._host.refresh()
            after = [
                old if old is not None and part is new else None if new is None else like(param, new)
                for param, old, part, new in zip(self._params, before, parts, total)
            ]
        finally:
            for param, grad in zip(self._params, after):
                param.grad = grad

    def _next_loss(
        self,
        passes: Sequence[Callable[[], Gradients]],
        sets: list[Gradients],
        name: str,
        function: Callable[[], HeldOut],
        trained: list[Tensor],
    ) -> tuple[Tensor, int]:
        """Runs backward passes that are due, then computes a loss. Returns it with its number of samples, or -1."""
        sets += [gradients() for gradients in passes]
        try:
            with self._passes():
                returned = function()
        except StopIteration as error:
            # It would end a generator or a loop around this call without a word.
            raise Error(f"{name} raised StopIteration: its batches are used up") from error
        samples = -1
        if isinstance(returned, tuple) and len(returned) == 2:
            returned, samples = returned
            samples = number(f"the number of samples that {name} returned", samples, 0, 2**53)
        elif self._ranks is not None and self._has_samples:
            raise Error(f"{name} returned no number of samples, but samples is given: return (loss, samples)")
        loss = check_loss(f"the loss that {name} returned", returned)
        check_graph(loss, name, set())
        for param in trained:
            param.grad = None  # that a backward pass inside the function has left
        return loss, samples

    def _last_passes(self, passes: Sequence[Callable[[], Gradients]], sets: list[Gradients]) -> tuple[None, int]:
        """Runs the last backward passes. Returns whether this rank's part of the observation is finite."""
        sets += [gradients() for gradients in passes]
        if self._ranks is None or self._observes_each_rank():
            return None, 1
        return None, int(finite([self._values] if self._sharded else sets))

    def _step(self, sets: list[Gradients], k: int, before: Gradients, share: float | None, counts: bool) -> Gradients:
        """Observes and blends, on several ranks the products or the gradients of all. Returns what is in `.grad` then."""
        left = [False] * len(before)
        if self._ranks is not None and not self._sharded:
            left = [to_do and grad is not None for to_do, grad in zip(self._left, before)]
            *masks, left = self._ranks.masks([*([grad is not None for grad in grads] for grads in sets), left])
            if self._exact:
                self._ranks.average(sets, masks, self._params)
            else:
                left = [any(flags) for flags in zip(left, *masks[:k])]
        # t is the gradient of the fused loss in `losses` where there is no other.
        blended, _bound = self._table.bind(sets[:k], sets[-1] if len(sets) > k + 1 else sets[k - 1], sets[k])
        if self._scale is not None:
            self.blender.set_grad_scale(self._scale.data_ptr())
        try:
            if self._ranks is None:
                self.blender.step(self._table.plan)
                return [old if new is None else new if old is None else _add(old, new) for old, new in zip(before, blended)]
            self.blender.run(self._table.plan, Pass.DOT | Pass.BLEND)
            return self._observe_on_ranks(self._ranks, before, blended, left, share, counts)
        finally:
            self.blender.set_grad_scale(None)  # the address was that of this call's tensor

    def _observe_on_ranks(
        self, ranks: Ranks, before: Gradients, blended: Gradients, left: list[bool], share: float | None, counts: bool
    ) -> Gradients:
        """Observes the pending sums, once it has averaged what is left to average. All exchanges come before the observation,
        and what they change is not `.grad`: if one fails, both are as before."""
        each_rank = self._observes_each_rank()
        try:
            if each_rank and share is not None:
                for grad in blended:
                    if grad is not None:
                        grad.mul_(share)
            total = [
                (old.clone() if to_do and old is not None else old) if new is None else new if old is None else _add(new, old)
                for old, new, to_do in zip(before, blended, left)
            ]
            if self._synchronizes():
                ranks.average([total], [left], self._params)
                left = [False] * len(left)
            if each_rank:
                ranks.observe_each(self.blender, counts)
            else:
                if self._sharded:
                    ranks.sum_products(self.blender)
                self.blender.observe()
        except BaseException:
            self.blender.pending_sums.torch().zero_()
            raise
        self._left = left
        return total

    def _gradients(self, loss: Tensor, what: str, trained: list[Tensor], retain: bool, factor: float | None) -> Gradients:
        """The gradient of a loss for each parameter. By way of `.grad`, so autograd gives each a buffer of its own in the
        parameter's layout, and does not copy it."""
        self._values.append(loss.detach().reshape(()).float())
        root = loss if self._scale is None else loss * self._scale.to(loss.device)
        root = root if factor is None else root * factor
        with self._passes():
            backward_pass(root, what, trained, retain)
        placed = [placed_like(param, param.grad) for param in self._params]
        grads = [None if grad is None else local(grad) for grad in placed]
        for param in trained:
            param.grad = None
        if all(grad is None for grad in grads):
            raise Error(f"{what} reaches no parameter: all its gradients are None")
        for name, param, grad in zip(self._names, self._params, grads):
            if grad is not None:
                check_gradient(f"{name}: the gradient of {what}", grad, local(param))
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
