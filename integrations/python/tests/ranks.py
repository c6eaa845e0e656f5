"""What test_ranks.py runs on each rank: every scenario raises where something is wrong."""

from __future__ import annotations

import contextlib
import copy
import datetime
import gc
import json
import os
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import gradblend
import torch
import torch.distributed as dist
from gradblend import Error, ExchangeError, GradBlend
from networks import BATCH, Moments, Network, autograd, batches, bits, weighted
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

K = 3
DECAY = 0.9
STEPS = 5

Batch = tuple[Tensor, Tensor]


class Run:
    """The batches of all ranks, and a network that starts equal everywhere."""

    def __init__(self, seed: int = 0, sizes: list[int] | None = None) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(seed)
        self.model = Network(K, shared=True)
        self.alone = copy.deepcopy(self.model)
        self._training, self._held_out = batches(K, seed + 1), batches(K, seed + 2)
        self._sizes = sizes or [BATCH] * self.count

    def draw(self) -> tuple[list[Batch], list[Batch]]:
        """A training and a held-out batch of each rank."""
        pairs = [(next(self._training), next(self._held_out)) for _ in range(self.count)]
        cut = [[(x[:size], y[:size]) for x, y in pair] for pair, size in zip(pairs, self._sizes)]
        return [pair[0] for pair in cut], [pair[1] for pair in cut]


def whole(of_ranks: list[Batch]) -> Batch:
    return torch.cat([x for x, _ in of_ranks]), torch.cat([y for _, y in of_ranks])


def same_bits(what: str, *tensors: Tensor) -> None:
    """Whether all ranks have these bits."""
    own = [bits(tensor) for tensor in tensors]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    assert all(other == own for other in every), f"{what} differ between the ranks"


def same_state(gb: GradBlend, *tensors: Tensor) -> None:
    same_bits("states", torch.frombuffer(bytearray(gb.blender.save()), dtype=torch.uint8), gb.weights, *tensors)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def blender(**options: Any) -> Any:
    return {"num_losses": K, "decay": DECAY, **options}


def step(model: nn.Module, rate: float = 0.1) -> None:
    with torch.no_grad():
        for param in model.parameters():
            if param.grad is not None:
                param -= rate * param.grad
                param.grad = None


def train(
    run: Run,
    model: nn.Module,
    gb: GradBlend,
    losses: Callable[[Any, Batch], list[Tensor]],
    every: int,
    by: list[int] | None = None,
) -> None:
    """Trains on several ranks and, with the whole batches, on one; their moments, weights and parameters must be the same."""
    alone = run.alone
    reference = GradBlend(alone.named_parameters(), every=every, **blender())
    for call in range(STEPS):
        training, held_out = run.draw()
        own, own_held_out = training[run.rank], held_out[run.rank]
        share = {} if by is None else {"samples": by[run.rank]}

        def held_out_loss(batch: Batch = own_held_out) -> Any:
            loss = losses(model, batch)[-1]
            return loss if by is None else (loss, by[run.rank])

        observed = gb.backward(losses(model, own), held_out=held_out_loss, **share)
        assert observed == (call % every == 0)
        reference.backward(alone.losses(whole(training)), held_out=lambda: alone.losses(whole(held_out))[-1])
        for got, expected in zip(model.parameters(), alone.parameters()):
            assert (got.grad is None) == (expected.grad is None)
            if got.grad is not None and expected.grad is not None:
                close(full(got.grad), expected.grad)
        got_report, report = gb.report(), reference.report()
        close(torch.tensor(got_report.mean), torch.tensor(report.mean))
        close(torch.tensor(got_report.second_moment).sqrt(), torch.tensor(report.second_moment).sqrt())
        same_state(gb)
        step(model)
        step(alone)
    for got, expected in zip(model.parameters(), alone.parameters()):
        close(full(got), expected.detach())
    same_bits("parameters", *(full(param) for param in model.parameters()))


def full(tensor: Tensor) -> Tensor:
    """A tensor without its mesh."""
    with torch.no_grad():
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def of_network(model: Any, batch: Batch) -> list[Tensor]:
    return model.losses(batch)


def of_module(model: Any, batch: Batch) -> list[Tensor]:
    """Losses by the forward pass of a module that wraps a network."""
    return [F.cross_entropy(logits.float(), batch[1]) for logits in model(batch[0])]


def copies() -> None:
    for every in (1, 3):
        run = Run()
        gb = GradBlend(run.model.named_parameters(), every=every, process_group=dist.group.WORLD, **blender())
        train(run, run.model, gb, of_network, every)


def uneven_batches() -> None:
    for every in (1, 2):
        sizes = [BATCH - 2 * rank for rank in range(dist.get_world_size())]
        run = Run(sizes=sizes)
        gb = GradBlend(run.model.named_parameters(), every=every, process_group=dist.group.WORLD, **blender())
        train(run, run.model, gb, of_network, every, by=sizes)


def empty_batches() -> None:
    """A rank without samples is left out; if all are, or one does not say how many it has, the call is an error."""
    last = dist.get_world_size() - 1
    for exact in (True, False):
        run = Run()
        gb = GradBlend(run.model.named_parameters(), process_group=dist.group.WORLD, exact=exact, **blender())
        training, held_out = run.draw()

        def call(
            of: Callable[[Tensor], Any], samples: int = BATCH, run: Run = run, gb: GradBlend = gb, own: Any = (training, held_out)
        ) -> None:
            losses = run.model.losses(own[0][run.rank])
            gb.backward(losses, held_out=lambda: of(run.model.losses(own[1][run.rank])[-1]), samples=samples)

        state = gb.blender.save()
        same_error("no rank has a sample of held_out", lambda call=call: call(lambda loss: (loss, 0)))
        same_error("no rank has a sample of the call", lambda call=call: call(lambda loss: (loss, BATCH), samples=0))
        try:
            call(lambda loss: loss if run.rank == 0 else (loss, BATCH))
            raise AssertionError("no error")
        except Error as error:
            assert "held_out returned no number of samples, but samples is given" in str(error), error
        assert gb.blender.save() == state and gb.report().observed == 0
        call(lambda loss: (loss * 1e6, 0) if run.rank == last else (loss, BATCH))
        expected = Moments(DECAY)
        params = list(run.model.parameters())
        v = [[autograd(loss, params) for loss in run.model.losses(batch)] for batch in training]
        g = [autograd(run.model.losses(batch)[-1], params) for batch in held_out[:last]]
        if exact:
            mean = [tuple(means(grads) for grads in zip(*of_ranks)) for of_ranks in zip(*v)]
            expected.observe(mean, mean[-1], tuple(means(grads) for grads in zip(*g)))
        else:
            for of_rank, g_of_rank in zip(v, g):
                expected.observe(of_rank, of_rank[-1], g_of_rank)
        expected.check(gb.report().mean, gb.blender.second_moments())
        assert gb.report().observed == (1 if exact else last)
        same_state(gb)


def ddp() -> None:
    for every in (1, 3):
        run = Run()
        model = DistributedDataParallel(run.model)
        gb = GradBlend(model.named_parameters(), every=every, process_group=dist.group.WORLD, **blender())
        train(run, model, gb, of_module, every)
        same_bits("buffers", *(buffer for buffer in model.buffers()))


def each_rank() -> None:
    """`exact=False`: the products of each rank are an observation, in the order of the ranks; the blend is a mean."""
    for wrap in (lambda model: model, DistributedDataParallel):
        for every in (1, 2):
            run = Run()
            model = wrap(run.model)
            params = list(run.model.parameters())
            group = dist.group.WORLD
            gb = GradBlend(model.named_parameters(), every=every, process_group=group, exact=False, **blender())
            moments = Moments(DECAY)
            for call in range(STEPS):
                training, held_out = run.draw()
                weights = gb.weights.tolist()
                v = [[autograd(loss, params) for loss in run.model.losses(batch)] for batch in training]
                g = [autograd(run.model.losses(batch)[-1], params) for batch in held_out]
                losses = of_module(model, training[run.rank])
                observed = gb.backward(losses, held_out=lambda: of_module(model, held_out[run.rank])[-1])
                if observed:
                    for of_rank, g_of_rank in zip(v, g):
                        moments.observe(of_rank, of_rank[-1], g_of_rank)
                    moments.check(gb.report().mean, gb.blender.second_moments())
                    assert gb.report().observed == (call // every + 1) * run.count
                mean = [[means(grads) for grads in zip(*of_ranks)] for of_ranks in zip(*v)]
                for i, param in enumerate(params):
                    terms = [w * of_loss[i] for w, of_loss in zip(weights, mean) if w != 0 and of_loss[i] is not None]
                    if terms:
                        assert param.grad is not None
                        close(param.grad, sum(terms, torch.zeros(())))
                same_state(gb, *(param.grad for param in params if param.grad is not None))
                step(run.model)


def means(grads: tuple[Tensor | None, ...]) -> Tensor | None:
    present = [grad for grad in grads if grad is not None]
    return sum(present, torch.zeros(())) / len(grads) if present else None


def micro_batches() -> None:
    """Calls in `no_sync` and one outside: the mean of all, by one exchange of the gradients that are left."""
    for wrap in (lambda model: model, DistributedDataParallel):
        for exact in (True, False):
            for every in (1, 3):
                run = Run()
                model = wrap(run.model)
                options = blender(average="mean", cadence="on_request")  # the weights stay at 1/K
                group = dist.group.WORLD
                gb = GradBlend(model.named_parameters(), every=every, process_group=group, exact=exact, **options)
                reference = GradBlend(run.alone.named_parameters(), every=every, **options)
                for _ in range(2):
                    for last in (False, False, True):
                        training, held_out = run.draw()
                        with contextlib.nullcontext() if last else gb.no_sync():
                            losses = of_module(model, training[run.rank])
                            gb.backward(losses, held_out=lambda: of_module(model, held_out[run.rank])[-1])
                        all_losses = run.alone.losses(whole(training))
                        reference.backward(all_losses, held_out=lambda: run.alone.losses(whole(held_out))[-1])
                    for got, expected in zip(run.model.parameters(), run.alone.parameters()):
                        assert got.grad is not None and expected.grad is not None
                        close(got.grad, expected.grad)
                    same_bits("gradients", *(param.grad for param in run.model.parameters() if param.grad is not None))
                    if exact:
                        close(torch.tensor(gb.report().mean), torch.tensor(reference.report().mean))
                    run.model.zero_grad()
                    run.alone.zero_grad()


def sharded(mesh: Any = None) -> None:
    """`fully_shard`: each rank has a part of each parameter, and none of some."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for every in (1, 3):
        for sizes in (None, [BATCH - 2 * rank for rank in range(dist.get_world_size())]):
            run = Run(sizes=sizes)
            for layer in (*run.model.encoders, run.model.heads[0]):
                fully_shard(layer, mesh=mesh)
            fully_shard(run.model, mesh=mesh)
            gb = GradBlend(run.model.named_parameters(), every=every, process_group=dist.group.WORLD, **blender())
            train(run, run.model, gb, of_module, every, by=sizes)


def sharded_and_replicated() -> None:
    """A mesh of copies of shards: products of copies count once."""
    count = dist.get_world_size()
    if count % 2 == 0:
        sharded(init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("copies", "shards")))


def placed() -> None:
    """DTensors as tensor parallelism has them: a sharded matrix, and a bias of which each rank has a copy."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    matrix, bias, x = torch.randn(7, 5), torch.randn(7), torch.randn(6, 5)
    losses = lambda m, b, y: [((y @ m.T).tanh() ** 2).mean(), ((y @ m.T + b) ** 2).mean(), (y @ m.T + b).sin().sum()]
    alone = [matrix.clone().requires_grad_(), bias.clone().requires_grad_()]
    placed = [
        distribute_tensor(tensor, mesh, [place]).requires_grad_() for tensor, place in ((matrix, Shard(0)), (bias, Replicate()))
    ]
    gb = GradBlend(placed, process_group=dist.group.WORLD, **blender())
    reference = GradBlend(alone, **blender())
    for shift in range(3):
        inputs = distribute_tensor(x + shift, mesh, [Replicate()]), distribute_tensor(x - shift, mesh, [Replicate()])
        to_loss = lambda losses: [loss.full_tensor() for loss in losses]
        gb.backward(to_loss(losses(*placed, inputs[0])), held_out=lambda: to_loss(losses(*placed, inputs[1]))[-1])
        reference.backward(losses(*alone, x + shift), held_out=lambda: losses(*alone, x - shift)[-1])
        close(torch.tensor(gb.report().mean), torch.tensor(reference.report().mean))
        close(gb.weights, reference.weights)
        for got, expected in zip(placed, alone):
            assert got.grad is not None and expected.grad is not None
            close(full(got.grad), expected.grad)
    same_state(gb)
    # A batch in parts: autograd leaves sums that are still to be made (Partial), which an observing call adds to.
    weight = nn.Parameter(distribute_tensor(torch.randn(5, 2), mesh, [Replicate()]))
    plain = nn.Parameter(full(weight))
    both = lambda y: [(y[:, 0] ** 2).mean(), (y**2).mean()]
    placed_losses = lambda inputs: [loss.full_tensor() for loss in both(distribute_tensor(inputs, mesh, [Shard(0)]) @ weight)]
    inputs = torch.randn(4, dist.get_world_size() * 2, 5)
    uniform: dict[str, Any] = {"num_losses": 2, "every": 2, "cadence": "on_request"}
    gb = GradBlend([weight], process_group=dist.group.WORLD, **uniform)
    reference = GradBlend([plain], **uniform)
    for call in range(3):
        gb.backward(placed_losses(inputs[call]), held_out=lambda: placed_losses(inputs[3])[-1])
        reference.backward(both(inputs[call] @ plain), held_out=lambda: both(inputs[3] @ plain)[-1])
        if call == 0:
            weight.grad = plain.grad = None
            continue
        assert weight.grad is not None and plain.grad is not None
        close(full(weight.grad), plain.grad)


def not_finite() -> None:
    """A NaN of one rank: all ranks skip the observation and name the rank; the next observation counts."""
    from torch.distributed.fsdp import fully_shard

    bad = dist.get_world_size() - 1
    for name, options in (("copies", {}), ("each", {"exact": False}), ("shards", {})):
        run = Run()
        if name == "shards":
            fully_shard(run.model, mesh=init_device_mesh("cpu", (run.count,)))
        gb = GradBlend(run.model.named_parameters(), process_group=dist.group.WORLD, **options, **blender())
        for call in range(2):
            training, held_out = run.draw()
            losses = of_module(run.model, training[run.rank])
            if run.rank == bad and call == 0:
                losses[1] = losses[1] * float("nan")
            gb.backward(losses, held_out=lambda: of_module(run.model, held_out[run.rank])[-1])
            run.model.zero_grad()
            assert gb.nonfinite_ranks == ((bad,) if call == 0 else ()), (name, gb.nonfinite_ranks)
        expected = run.count * 2 - 1 if name == "each" else 1
        assert gb.report().skipped == 1 and gb.report().observed == expected, gb.report()
        same_state(gb)


def same_error(match: str, function: Callable[[], object]) -> None:
    """Whether all ranks raise an error with these words."""
    try:
        function()
        said = "no error"
    except Error as error:
        said = str(error)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, said)
    assert all(re.search(match, text) for text in every), every
    assert len(set(every)) == 1, every


def disagreement() -> None:
    """What differs between ranks is an error of all of them, before anything has changed."""
    run = Run()
    training, held_out = run.draw()
    odd = run.count - 1
    here = run.rank == odd

    def call(gb: GradBlend, losses: list[Tensor] | None = None, **closures: Any) -> None:
        closures.setdefault("held_out", lambda: run.model.losses(held_out[run.rank])[-1])
        gb.backward(losses or run.model.losses(training[run.rank]), **closures)

    def made(params: Any = None, **options: Any) -> GradBlend:
        params = run.model.named_parameters() if params is None else params
        return GradBlend(params, process_group=dist.group.WORLD, **blender(**options))

    for options, name in (
        ({"decay": 0.5}, "set of options"),
        ({"every": 2}, "set of options"),
        ({"min_weight": [0.1, 0, 0]}, "set of options"),
        ({"exact": False}, "set of options"),
    ):
        gb = made(**(options if here else {}))
        same_error(f"rank {odd} has another {name} than rank 0", lambda: call(gb))
        assert gb.report().observed == 0 and all(param.grad is None for param in run.model.parameters())
    gb = made(num_losses=2) if here else made()
    losses = run.model.losses(training[run.rank])
    same_error(f"rank {odd} has another number of losses than rank 0 .2, not 3", lambda: call(gb, losses[1:] if here else losses))
    params = list(run.model.named_parameters())
    gb = made(params[1:] if here else params)
    same_error(f"rank {odd} has another number of parameters", lambda: call(gb))
    gb = made(params[::-1] if here else params)
    same_error(f"rank {odd} has another list of parameters", lambda: call(gb))
    gb = made()
    moved = params[-1][1].detach()[0]
    moved += int(here)
    same_error(f"rank {odd} has another set of parameter values", lambda: call(gb))
    moved -= int(here)
    gb = made()
    train_loss = {"train": lambda: run.model.losses(held_out[run.rank])[-1]} if here else {}
    same_error(f"rank {odd} has another set of arguments", lambda: call(gb, **train_loss))
    if here:
        gb.set_weights([0.5, 0.25, 0.25])
    same_error(f"rank {odd} has another state", lambda: call(gb))
    gb = made()
    saved = gb.state_dict()
    gb.load_state_dict({**saved, "calls": 3} if here else saved)
    same_error(f"rank {odd} has another number of calls than rank 0 .3, not 0", lambda: call(gb))


def errors_of_one_rank() -> None:
    """An error of one rank is one of all, `.grad` and state are unchanged, and the next call is as if nothing had been."""
    run = Run()
    bad = run.count - 1
    here = run.rank == bad
    gb = GradBlend(run.model.named_parameters(), every=2, process_group=dist.group.WORLD, **blender(cadence="on_request"))
    training, held_out = run.draw()
    params = list(run.model.parameters())

    def losses() -> list[Tensor]:
        return run.model.losses(training[run.rank])

    def of_held_out() -> Tensor:
        return run.model.losses(held_out[run.rank])[-1]

    def fails() -> Tensor:
        raise ZeroDivisionError("of a loader")

    other = torch.ones(1, requires_grad=True)
    for arguments, match in (
        (lambda: {"samples": 3}, "rank 0 has no number of samples of the call, but other ranks have"),
        (lambda: {"losses": losses()[1:]}, f"rank {bad} raised Error: there are 2 losses, expected 3"),
        (lambda: {"held_out": None}, f"rank {bad} raised Error: this call observes .* held_out is missing"),
        (lambda: {"held_out": fails}, f"rank {bad} raised ZeroDivisionError: of a loader"),
        (lambda: {"train": fails}, f"rank {bad} has another set of arguments than rank 0"),
        (lambda: {"samples": -1}, f"rank {bad} raised Error: samples is -1"),
        (lambda: {"held_out": lambda: (of_held_out(), 3)}, "rank 0 has no number of samples of held_out"),
        (lambda: {"losses": [other.sum(), *losses()[1:]]}, f"rank {bad} raised Error: losses.0. reaches no parameter"),
        (lambda: {"held_out": other.sum}, f"rank {bad} raised Error: held_out reaches no parameter"),
    ):
        given = {"losses": losses(), "held_out": of_held_out, **(arguments() if here else {})}
        state = gb.blender.save()
        try:
            gb.backward(**given)
            raise AssertionError("no error")
        except (Error, ZeroDivisionError) as error:
            assert re.search(match.split("raised ")[-1].split(": ")[-1] if here else match, str(error)), (match, error)
        assert gb.blender.save() == state and all(param.grad is None for param in params)
    gb.backward(losses(), of_held_out)
    run.model.zero_grad()
    try:  # of a call that does not observe
        gb.backward(losses()[1:] if here else losses())
        raise AssertionError("no error")
    except Error as error:
        assert "there are 2 losses, expected 3" in str(error), error
    gb.backward(losses())
    check_mean(run, gb, training)
    same_error("give it in all calls, or in none", lambda: gb.backward(losses(), of_held_out, samples=3))
    for param in run.model.encoders[0].parameters():
        param.requires_grad_(not here)
    same_error(f"rank {bad} has another set of trained parameters", lambda: gb.backward(losses(), of_held_out))


def check_mean(run: Run, gb: GradBlend, *batches_of_ranks: list[Batch], weights: list[float] | None = None) -> None:
    """Whether `.grad` is the sum over calls of sum_k w_k L_k's gradients on whole batches, and takes them away."""
    alone = list(run.alone.parameters())
    with torch.no_grad():
        for param, copied in zip(alone, run.model.parameters()):
            param.copy_(copied)
    expected: list[Tensor | None] = [None] * len(alone)
    for of_ranks in batches_of_ranks:
        grads = weighted(run.alone.losses(whole(of_ranks)), gb.weights.tolist() if weights is None else weights, alone)
        expected = [new if old is None else old if new is None else old + new for old, new in zip(expected, grads)]
    for param, grad in zip(run.model.parameters(), expected):
        assert (param.grad is None) == (grad is None)
        if param.grad is not None and grad is not None:
            close(param.grad, grad)
    same_bits("gradients", *(param.grad for param in run.model.parameters() if param.grad is not None))
    run.model.zero_grad()


def weights_of_zero() -> None:
    """The mean is that of all parameters that are reached now, whatever earlier calls reached."""
    for wrap in (lambda model: model, DistributedDataParallel):
        run = Run()
        model = wrap(run.model)
        gb = GradBlend(model.named_parameters(), every=100, process_group=dist.group.WORLD, **blender(cadence="on_request"))
        training, held_out = run.draw()
        own = training[run.rank]
        call = lambda: gb.backward(of_module(model, own), held_out=lambda: of_module(model, held_out[run.rank])[-1])
        call()
        run.model.zero_grad()
        for weights in ([1, 0, 0], [0.2, 0.3, 0.5], [0, 0, 1], None):
            if weights is None:
                gb.reweight()
            else:
                gb.set_weights(weights)
            call()
            check_mean(run, gb, training)
        # Between the forward and the backward pass.
        gb.set_weights([0.5, 0.25, 0.25])
        losses = of_module(model, own)
        gb.set_weights([0.5, 0, 0.5])
        gb.backward(losses)
        check_mean(run, gb, training)
        losses = of_module(model, own)
        gb.set_weights([0.5, 0.25, 0.25])
        gb.backward(losses)
        check_mean(run, gb, training)
        # What is left in .grad counts while it is there.
        with gb.no_sync():
            call()
        run.model.zero_grad()
        gb.set_weights([1, 0, 0])
        call()
        check_mean(run, gb, training)

    run.model.extra = nn.Parameter(torch.ones(3))
    gb = GradBlend(run.model.named_parameters(), every=2, process_group=dist.group.WORLD, **blender())
    losses = lambda extra=0.0: [loss + extra for loss in run.model.losses(own)]
    for extra in (0.0, run.model.extra.sum(), 0.0):
        with gb.no_sync() if isinstance(extra, Tensor) else contextlib.nullcontext():
            gb.backward(losses(extra), held_out=lambda: losses()[-1])
        run.model.zero_grad() if isinstance(extra, Tensor) else None
    assert run.model.extra.grad is None


def a_modality_that_comes_later() -> None:
    """A loss that reaches its encoder in some batches only, on some ranks only."""
    run = Run()
    gb = GradBlend(run.model.named_parameters(), every=100, process_group=dist.group.WORLD, **blender(cadence="on_request"))
    training, held_out = run.draw()
    cut = [(x * torch.tensor([1.0, 0.0])[:, None], y) for x, y in training]
    params = list(run.model.parameters())
    for with_it in ([], [run.count - 1], list(range(run.count))):
        losses = run.model.losses(training[run.rank] if run.rank in with_it else cut[run.rank])
        if run.rank not in with_it:
            losses[1] = losses[0] * 1.0
        gb.backward(losses, held_out=lambda: run.model.losses(held_out[run.rank])[-1])
        expected: list[Tensor] = []
        for rank in range(run.count):
            of_rank = run.alone.losses(training[rank] if rank in with_it else cut[rank])
            if rank not in with_it:
                of_rank[1] = of_rank[0] * 1.0
            grads = weighted(of_rank, gb.weights.tolist(), list(run.alone.parameters()))
            grads = [torch.zeros_like(param) if grad is None else grad for grad, param in zip(grads, params)]
            expected = grads if not expected else [one + other for one, other in zip(expected, grads)]
        for param, grad in zip(params, expected):
            close(torch.zeros_like(grad) if param.grad is None else param.grad, grad / run.count)
        same_bits("gradients", *(param.grad for param in params if param.grad is not None))
        run.model.zero_grad()


def forward_passes_from_before() -> None:
    """A DistributedDataParallel forgets the forward passes that came before GradBlend, or before its state was loaded."""
    for every in (1, 100):
        run = Run()
        training, held_out = run.draw()
        own = training[run.rank]
        model = DistributedDataParallel(run.model)
        losses = of_module(model, own)
        gb = GradBlend(model.named_parameters(), every=every, process_group=dist.group.WORLD, **blender(cadence="on_request"))
        state = gb.state_dict()
        held_out_loss = lambda model=model, batch=held_out[run.rank]: of_module(model, batch)[-1]
        for _ in range(2):
            gb.backward(losses, held_out_loss)
            check_mean(run, gb, training)
            losses = of_module(model, own)
            gb.load_state_dict(state)
        gb.backward(losses, held_out_loss)
        check_mean(run, gb, training)
        # A forward pass without a backward pass, and one in no_sync.
        of_module(model, own)
        losses = of_module(model, own)
        with gb.no_sync():
            of_module(model, own)
        gb.backward(losses, held_out_loss)
        check_mean(run, gb, training)
        run = Run()
        gb = GradBlend(run.model.named_parameters(), every=every, process_group=dist.group.WORLD, **blender(cadence="on_request"))
        later = DistributedDataParallel(run.model)
        gb.backward(of_module(later, own), lambda later=later: held_out_loss(later))
        check_mean(run, gb, training)


def ignored_by_the_module() -> None:
    """A parameter that DistributedDataParallel ignores is averaged by GradBlend, in all calls."""
    run = Run()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(run.model, ["trunk.weight"])
    model = DistributedDataParallel(run.model)
    gb = GradBlend(model.named_parameters(), every=2, process_group=dist.group.WORLD, **blender(cadence="on_request"))
    for _call in range(3):
        training, held_out = run.draw()
        run.model.zero_grad()
        gb.backward(of_module(model, training[run.rank]), lambda: of_module(model, held_out[run.rank])[-1])
        check_mean(run, gb, training)


def another_trainer() -> None:
    """The latest GradBlend of a DistributedDataParallel has it, an earlier one says so; without one, it averages by itself."""
    run = Run()
    training, held_out = run.draw()
    own = training[run.rank]
    model = DistributedDataParallel(run.model)
    options = {"every": 3, "process_group": dist.group.WORLD, **blender(cadence="on_request")}
    call = lambda gb: gb.backward(of_module(model, own), held_out=lambda: of_module(model, held_out[run.rank])[-1])
    first = GradBlend(model.named_parameters(), **options)
    call(first)
    check_mean(run, first, training)
    second = GradBlend(model.named_parameters(), **options)
    for _ in range(4):
        call(second)
        check_mean(run, second, training)
        same_error("another GradBlend was made for this DistributedDataParallel", lambda old=first: call(old))
    copied = copy.deepcopy(model)
    of_module(copied, own)
    del first, second
    sum(of_module(model, own), torch.zeros(())).backward()
    uniform = GradBlend([torch.nn.Parameter(torch.ones(1))], num_losses=K)  # for its weights of 1/K
    for param in run.model.parameters():
        assert param.grad is not None
        param.grad /= K
    check_mean(run, uniform, training)


def other_leaves() -> None:
    """`fully_shard`: what a loss reaches besides the parameters keeps its `.grad`."""
    from torch.distributed.fsdp import fully_shard

    run = Run()
    fully_shard(run.model, mesh=init_device_mesh("cpu", (run.count,)))
    training, held_out = run.draw()
    temperature = torch.ones((), requires_grad=True)
    temperature.grad = torch.tensor(5.0)
    gb = GradBlend(run.model.named_parameters(), every=2, process_group=dist.group.WORLD, **blender())
    losses = lambda batch: [loss * temperature for loss in of_module(run.model, batch)]
    for _ in range(2):
        gb.backward(losses(training[run.rank]), held_out=lambda: losses(held_out[run.rank])[-1])
        assert temperature.grad.item() == 5


def failed_exchanges() -> None:
    """Whichever exchange of an observing call fails, `.grad`, state and number of calls are as before."""
    from torch.distributed.fsdp import fully_shard

    for name, options in (("copies", {}), ("each", {"exact": False}), ("shards", {})):
        run = Run()
        if name == "shards":
            fully_shard(run.model, mesh=init_device_mesh("cpu", (run.count,)))
        else:
            run.model.extra = nn.Parameter(torch.ones(3))  # that no loss reaches
            run.model.extra.grad = torch.full((3,), 1.0 + run.rank)
        gb = GradBlend(run.model.named_parameters(), every=2, process_group=dist.group.WORLD, **options, **blender())
        training, held_out = run.draw()

        def call(run: Run = run, gb: GradBlend = gb, of: tuple[list[Batch], list[Batch]] = (training, held_out)) -> None:
            gb.backward(of_module(run.model, of[0][run.rank]), held_out=lambda: of_module(run.model, of[1][run.rank])[-1])

        call()
        with contextlib.nullcontext() if name == "shards" else gb.no_sync():
            call()  # leaves gradients of this rank
        params = list(run.model.parameters())
        before, state = [bits(full(param.grad)) for param in params if param.grad is not None], gb.state_dict()
        exchange, calls = gb._ranks._call, []

        def counted(what: str, *arguments: Any, exchange: Any = exchange, calls: list[str] = calls, **options: Any) -> Any:
            calls.append(what)
            return exchange(what, *arguments, **options)

        gb._ranks._call = counted
        call()
        after = [bits(full(param.grad)) for param in params if param.grad is not None]
        assert after != before
        if name != "shards":
            close(run.model.extra.grad, torch.full((3,), (1 + run.count) / 2))
        for failing in range(len(calls)):
            gb.load_state_dict(state)
            gb._left = [name != "shards"] * len(params)
            if name != "shards":
                run.model.extra.grad = torch.full((3,), 1.0 + run.rank)
            left = iter(range(failing))

            def fails(what: str, *arguments: Any, exchange: Any = exchange, left: Any = left, **options: Any) -> Any:
                if next(left, None) is None:
                    raise ExchangeError(f"no {what}")
                return exchange(what, *arguments, **options)

            grads = [None if param.grad is None else param.grad.clone() for param in params]
            gb._ranks._call = fails
            try:
                call()
                raise AssertionError("no error")
            except ExchangeError as error:
                assert str(error) == f"no {calls[failing]}"
            assert gb.blender.save() == state["blender"].numpy().tobytes() and gb.state_dict()["calls"] == state["calls"]
            assert bool((gb.blender.pending_sums.torch() == 0).all())
            for param, grad in zip(params, grads):
                assert param.grad is not None and grad is not None
                assert bits(full(param.grad)) == bits(full(grad))


def scaled() -> None:
    """A `GradScaler`: gradients and moments as without one; an overflow of one rank skips the step on all of them."""
    for wrap in (lambda model: model, DistributedDataParallel):
        run = Run()
        model, params = wrap(run.model), list(run.model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer = torch.optim.SGD(params, 0.1)
        options = blender(cadence="on_request")
        gb = GradBlend(model.named_parameters(), every=2, scaler=scaler, process_group=dist.group.WORLD, **options)
        reference = GradBlend(run.alone.named_parameters(), every=2, **options)
        for call in range(4):
            training, held_out = run.draw()
            losses = of_module(model, training[run.rank])
            if call == 3 and run.rank == run.count - 1:
                losses[0] = losses[0] * float("inf")
            gb.backward(losses, held_out=lambda: of_module(model, held_out[run.rank])[-1])
            reference.backward(run.alone.losses(whole(training)), held_out=lambda: run.alone.losses(whole(held_out))[-1])
            close(torch.tensor(gb.report().mean), torch.tensor(reference.report().mean))
            before = [param.detach().clone() for param in params]
            scaler.unscale_(optimizer)
            if call < 3:
                for param, expected in zip(params, run.alone.parameters()):
                    assert param.grad is not None and expected.grad is not None
                    close(param.grad, expected.grad)
            scaler.step(optimizer)
            scaler.update()
            assert all(torch.equal(old, param) == (call == 3) for old, param in zip(before, params))
            assert scaler.get_scale() == (4.0 if call == 3 else 8.0)
            step(run.alone)
            run.model.zero_grad()
        same_state(gb, *params)


def modules_that_cannot_be() -> None:
    """Modules of FSDP that GradBlend cannot observe, and meshes that are not of the group's ranks, are errors by name."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    group = dist.group.WORLD
    make = lambda model: GradBlend(model.named_parameters(), process_group=group, **blender())
    for original in (True, False):
        wrapped = FullyShardedDataParallel(Run().model, device_id=torch.device("cpu"), use_orig_params=original)
        same_error("is of FullyShardedDataParallel, .* expected fully_shard", lambda wrapped=wrapped: make(wrapped))
        del wrapped
    run = Run()
    mesh = init_device_mesh("cpu", (run.count, 1), mesh_dim_names=("copies", "shards"))
    fully_shard(run.model, mesh=mesh["shards"])
    try:
        make(run.model)
        raise AssertionError("no error")
    except Error as error:
        assert f"trunk.weight is on a mesh of the ranks [{run.rank}], but process_group has" in str(error), error
    run = Run()
    fully_shard(run.model, mesh=init_device_mesh("cpu", (run.count,)))
    with torch.no_grad():
        run.model(run.draw()[0][run.rank][0])
    same_error("trunk.weight is a plain tensor, expected a DTensor: .* needs reshard", lambda: make(run.model))
    run.model.reshard()
    make(run.model)
    placed = nn.Linear(2, 2)
    mesh = init_device_mesh("cpu", (run.count,))
    placed.weight = nn.Parameter(distribute_tensor(placed.weight.detach(), mesh, [Replicate()]))
    placed.bias = nn.Parameter(distribute_tensor(placed.bias.detach(), mesh, [Replicate()]))
    model = object.__new__(DistributedDataParallel)
    nn.Module.__init__(model)
    model.module = placed
    same_error("weight is a DTensor in DistributedDataParallel", lambda: make(model))
    params = [nn.Parameter(torch.ones(3))]
    same_error(
        "no backend for tensors on cpu", lambda: GradBlend(params, 1, process_group=dist.ProcessGroup(dist.HashStore(), 0, 1))
    )
    model = DistributedDataParallel(Run().model)
    again = DistributedDataParallel(model.module)
    same_error("trunk.weight is in two DistributedDataParallel modules", lambda: make(again))
    gc.disable()
    try:
        network = Run().model
        model = DistributedDataParallel(network)
        model.cycle = [model]
        del model
        make(DistributedDataParallel(network))  # though the deleted one is not collected yet
    finally:
        gc.enable()
    network = Run().model
    for _ in range(2):
        model = DistributedDataParallel(network)
        model.cycle = [model]
        replaced = make(model)  # the earlier one is still there
    del replaced
    group = dist.new_group([0])
    if run.rank == 0:
        try:
            GradBlend(model.named_parameters(), process_group=group, **blender())
            raise AssertionError("no error")
        except Error as error:
            assert "trunk.weight is of the ranks [0, 1" in str(error) and "process_group has [0]" in str(error), error
    if run.rank > 0:
        try:
            GradBlend(params, 1, process_group=group)
            raise AssertionError("no error")
        except Error as error:
            assert "expected a group of torch.distributed that has this rank" in str(error)


def frozen() -> None:
    """Parameters that are frozen get no gradient, and those that are trained again get means."""
    run = Run()
    gb = GradBlend(run.model.named_parameters(), every=10, process_group=dist.group.WORLD, **blender(cadence="on_request"))
    for trained in (True, False, True):
        for param in run.model.encoders[0].parameters():
            param.requires_grad_(trained)
        training, held_out = run.draw()
        gb.backward(run.model.losses(training[run.rank]), held_out=lambda: run.model.losses(held_out[run.rank])[-1])
        assert all((param.grad is not None) == trained for param in run.model.encoders[0].parameters())
        same_state(gb, *(param.grad for param in run.model.parameters() if param.grad is not None))
        run.model.zero_grad()


def checkpoints() -> None:
    """A state of these ranks goes on in one process, and the reverse."""
    run = Run()
    gb = GradBlend(run.model.named_parameters(), process_group=dist.group.WORLD, **blender())
    alone = GradBlend(run.alone.named_parameters(), **blender())
    for source, target in ((gb, alone), (alone, gb)):
        training, held_out = run.draw()
        gb.backward(run.model.losses(training[run.rank]), held_out=lambda: run.model.losses(held_out[run.rank])[-1])
        alone.backward(run.alone.losses(whole(training)), held_out=lambda: run.alone.losses(whole(held_out))[-1])
        target.load_state_dict(source.state_dict())
        assert target.blender.save() == source.blender.save()
    same_state(gb)
    noisy = GradBlend(run.model.named_parameters(), process_group=dist.group.WORLD, exact=False, **blender())
    same_error("observations are of the gradients of each rank's batch", lambda: gb.load_state_dict(noisy.state_dict()))
    same_error("here they are of the gradients of each rank's batch", lambda: noisy.load_state_dict(gb.state_dict()))


def exchanged() -> None:
    """Bytes of each mode: K + 1 sets of gradients, or one, or the products alone."""
    run = Run()
    training, held_out = run.draw()
    own = training[run.rank]
    sizes = [
        [grad.numel() if grad is not None else 0 for grad in autograd(loss, list(run.model.parameters()))]
        for loss in run.model.losses(own)
    ]
    parameters = sum(param.numel() for param in run.model.parameters())
    facts, passes = 11 * 8, 2 * 8  # each call that exchanges; each part of it in which a rank can fail
    for exact, observing in (
        (True, 4 * (sum(map(sum, sizes)) + sum(sizes[-1]))),
        (False, 4 * parameters + 8 * (2 * K + 1)),
    ):
        options = blender(cadence="on_request")  # the weights stay at 1/K
        gb = GradBlend(run.model.named_parameters(), every=2, process_group=dist.group.WORLD, exact=exact, **options)
        before = 0
        # And a byte for each parameter and set of gradients, and for what is left in .grad.
        for expected in (
            observing + facts + 2 * passes + len(sizes[0]) * (K + 2),
            4 * parameters + facts + passes + len(sizes[0]),
        ):
            gb.backward(run.model.losses(own), held_out=lambda: run.model.losses(held_out[run.rank])[-1])
            assert gb.exchanged - before == expected, (exact, gb.exchanged - before, expected)
            before = gb.exchanged
        with gb.no_sync():
            gb.backward(run.model.losses(own), held_out=lambda: run.model.losses(held_out[run.rank])[-1])
            before = gb.exchanged
            gb.backward(run.model.losses(own))
            assert gb.exchanged == before
    model = DistributedDataParallel(run.model)
    gb = GradBlend(model.named_parameters(), every=2, process_group=dist.group.WORLD, **options)
    gb.backward(of_module(model, own), held_out=lambda: of_module(model, held_out[run.rank])[-1])
    before = gb.exchanged
    gb.backward(of_module(model, own))
    assert gb.exchanged == before


def documented() -> None:
    """The programs of docs/distributed.md."""
    from torch.distributed.fsdp import fully_shard

    page = (pathlib.Path(__file__).resolve().parents[3] / "docs" / "distributed.md").read_text()
    programs = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(programs) == 2
    for program in programs:
        run = Run()
        batches_of_rank = [next(batches(K, seed)) for seed in range(run.rank * 3, run.rank * 3 + 3)]
        names: dict[str, Any] = {
            **{"network": run.model, "losses": of_module, "batches": batches_of_rank, "batch": batches_of_rank[0]},
            **{"held_out_batches": batches(K, 100 + run.rank), "optimizer": torch.optim.SGD(run.model.parameters(), 0.1)},
            **{"dist": dist, "GradBlend": GradBlend, "fully_shard": fully_shard},
            "DistributedDataParallel": DistributedDataParallel,
        }
        exec(program, names)
        same_state(names["gb"])
        assert names["gb"].observations == 1


def no_drift() -> None:
    """10,000 observations of sharded gradients: the same states, bit for bit. Fewer of 4 ranks, which wait for two cores."""
    steps = 10_000 if dist.get_world_size() == 2 else 1_000
    rank, blend = dist.get_rank(), gradblend.Blender(K, cadence="every_observation", threads=1)
    generator = torch.Generator().manual_seed(rank)
    buffers = [torch.empty(5 + rank) for _ in range(K + 2)]
    plan = blend.plan([gradblend.TensorGrads(buffers[0], buffers[1], buffers[2:])])
    pending = blend.pending_sums.torch()
    for _ in range(steps):
        for buffer in buffers:
            buffer.normal_(0.3, generator=generator)
        blend.dot(plan)
        dist.all_reduce(pending)
        blend.observe()
    assert blend.report().observed == steps
    same_bits("states", torch.frombuffer(bytearray(blend.save()), dtype=torch.uint8))


SCENARIOS = [
    copies,
    uneven_batches,
    empty_batches,
    ddp,
    each_rank,
    micro_batches,
    sharded,
    sharded_and_replicated,
    placed,
    not_finite,
    disagreement,
    errors_of_one_rank,
    weights_of_zero,
    a_modality_that_comes_later,
    forward_passes_from_before,
    ignored_by_the_module,
    another_trainer,
    other_leaves,
    failed_exchanges,
    scaled,
    modules_that_cannot_be,
    frozen,
    checkpoints,
    exchanged,
    documented,
    no_drift,
]


def leaves(dies: bool) -> None:
    """The last rank makes one call less: the others get an error, not a hang, and their `.grad` and state are unchanged."""
    run = Run()
    gb = GradBlend(run.model.named_parameters(), process_group=dist.group.WORLD, exact=dies, **blender())
    training, held_out = run.draw()
    own = training[run.rank]
    gb.backward(run.model.losses(own), held_out=lambda: run.model.losses(held_out[run.rank])[-1])
    grads, state = [bits(param.grad) for param in run.model.parameters() if param.grad is not None], gb.blender.save()
    if run.rank == run.count - 1:
        if dies:
            os._exit(3)
        time.sleep(2 * PATIENCE)
        return
    try:
        gb.backward(run.model.losses(own), held_out=lambda: run.model.losses(held_out[run.rank])[-1])
        raise AssertionError("no error")
    except ExchangeError as error:
        assert f"rank {run.rank} of {run.count} could not exchange" in str(error)
    assert grads == [bits(param.grad) for param in run.model.parameters() if param.grad is not None]
    assert state == gb.blender.save()


def dies() -> None:
    leaves(dies=True)


def is_late() -> None:
    leaves(dies=False)


def fails_where_others_exchange() -> None:
    """With `fully_shard`, the last rank raises before the forward pass in which the others exchange parameters: it has its own
    error, and they do not hang."""
    from torch.distributed.fsdp import fully_shard

    run = Run()
    fully_shard(run.model, mesh=init_device_mesh("cpu", (run.count,)))
    gb = GradBlend(run.model.named_parameters(), process_group=dist.group.WORLD, **blender())
    training, held_out = run.draw()
    state, last = gb.blender.save(), run.rank == run.count - 1

    def of_held_out() -> Tensor:
        if last:
            raise ZeroDivisionError("of a loader")
        return of_module(run.model, held_out[run.rank])[-1]

    def call(of_held_out: Callable[[], Any]) -> None:
        gb.backward(of_module(run.model, training[run.rank]), held_out=of_held_out)

    # After its forward pass, where the others are in an exchange of GradBlend: an error of all.
    same = lambda: of_module(run.model, held_out[run.rank])
    expected = "is list" if last else f"rank {run.count - 1} raised Error: the loss that held_out returned is list"
    try:
        call(same if last else lambda: same()[-1])
        raise AssertionError("no error")
    except Error as error:
        assert expected in str(error), error
    start = time.perf_counter()
    try:
        call(of_held_out)
        raise AssertionError("no error")
    except ZeroDivisionError:
        assert last and time.perf_counter() - start < PATIENCE
        time.sleep(2 * PATIENCE)
    except RuntimeError as error:  # of the module or, in an exchange of GradBlend, `ExchangeError`
        assert not last, error
    assert gb.blender.save() == state
    assert all(param.grad is None for param in run.model.parameters())


#: Scenarios after which the group is of no more use.
MISSING = [dies, is_late, fails_where_others_exchange]

#: Seconds that ranks wait for each other, where one of them does not come.
PATIENCE = 4


def main() -> None:
    """Arguments: folder, rank, count; and the name of one of `MISSING`."""
    folder, rank, count, *last = sys.argv[1:]
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=PATIENCE if last else 120)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=int(rank), world_size=int(count), timeout=timeout)
    outcomes = {}
    for scenario in SCENARIOS if not last else [scenario for scenario in MISSING if scenario.__name__ == last[0]]:
        start = time.perf_counter()
        try:
            scenario()
            outcomes[scenario.__name__] = ""
        except Exception:
            outcomes[scenario.__name__] = traceback.format_exc()
        print(f"{scenario.__name__}: {time.perf_counter() - start:.1f} s")
        pathlib.Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))
        if not last:
            dist.barrier()
    # Without the group's destructor, which waits for ranks that are gone.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
