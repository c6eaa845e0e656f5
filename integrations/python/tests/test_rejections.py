"""Bad input: a clear error that names the loss or the parameter, before anything has changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import gradblend
import pytest
import torch
from gradblend import Error, GradBlend, Schedule, Status
from networks import Network, batches, bits
from torch import Tensor, nn


class Trainer:
    """A network after two steps, with gradients in place, and what must not change."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        self.model, self.stream = Network(3).to(device), batches(3, 0, device)
        self.gb = GradBlend(self.model.named_parameters(), 3)
        for _ in range(2):
            self.gb.backward(self.losses(), held_out=self.held_out)

    def losses(self) -> list[Tensor]:
        return self.model.losses(next(self.stream))

    def held_out(self) -> Tensor:
        return self.losses()[-1]

    def state(self) -> list[Any]:
        grads = [None if param.grad is None else (id(param.grad), bits(param.grad)) for param in self.model.parameters()]
        return [grads, self.gb.state_dict()["calls"], self.gb.blender.save(), self.gb.copied]

    def rejects(self, message: str, losses: Any, held_out: Any = None, after: Any = None, **options: Any) -> None:
        before = self.state()
        with pytest.raises(Error) as caught:
            self.gb.backward(losses, held_out or self.held_out, **options)
        assert caught.value.status == Status.INVALID_ARGUMENT and message in str(caught.value), caught.value
        assert self.state() == before
        if after is not None:
            after()
        assert self.gb.backward(self.losses(), self.held_out)


@pytest.fixture
def trainer(device: str) -> Trainer:
    return Trainer(device)


def with_loss(change: Callable[[Tensor], Any]) -> Callable[[list[Tensor]], list[Any]]:
    return lambda losses: [losses[0], change(losses[1]), losses[2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda losses: losses[:2], "there are 2 losses, expected 3"),
        (lambda losses: [*losses, losses[0]], "there are 4 losses, expected 3"),
        (lambda losses: [], "there are 0 losses, expected 3"),
        (lambda losses: losses[0], "losses is Tensor, expected a list of 3 scalar losses"),
        (lambda losses: dict(enumerate(losses)), "losses is dict, expected a list of 3 scalar losses"),
        (lambda losses: None, "losses is NoneType, expected a list of 3 scalar losses"),
        (with_loss(float), "losses[1] is float, expected a scalar tensor"),
        (with_loss(lambda loss: None), "losses[1] is NoneType, expected a scalar tensor"),
        (with_loss(Tensor.detach), "losses[1] has no graph"),
        (with_loss(lambda loss: torch.stack([loss, loss])), "losses[1] has shape [2], expected a scalar"),
        (with_loss(lambda loss: loss.to(torch.complex64)), "losses[1] is complex64, expected a floating-point scalar"),
        (with_loss(lambda loss: torch.ones((), requires_grad=True) * 2), "losses[1] reaches no parameter"),
    ],
)
def test_losses(trainer: Trainer, change: Callable[[list[Tensor]], Any], message: str) -> None:
    trainer.rejects(message, change(trainer.losses()))


@pytest.mark.parametrize("name", ["held_out", "train"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loss: None, "the loss that {} returned is NoneType, expected a scalar tensor"),
        (lambda loss: loss.detach(), "the loss that {} returned has no graph"),
        (lambda loss: loss.repeat(3), "the loss that {} returned has shape [3], expected a scalar"),
        (lambda loss: torch.ones((), requires_grad=True) * 2, "{} reaches no parameter"),
    ],
)
def test_closures(trainer: Trainer, name: str, change: Callable[[Tensor], Any], message: str) -> None:
    functions = {"held_out": trainer.held_out, name: lambda: change(trainer.held_out())}
    trainer.rejects(message.format(name), trainer.losses(), **functions)


def test_missing_closures(trainer: Trainer) -> None:
    before = trainer.state()
    with pytest.raises(Error, match="held_out is missing"):
        trainer.gb.backward(trainer.losses())
    assert trainer.state() == before
    loss = trainer.held_out()
    trainer.rejects("held_out is Tensor, expected a function that returns a loss", trainer.losses(), loss)
    trainer.rejects("train is Tensor, expected a function that returns a loss", trainer.losses(), train=loss)


def test_an_exception_of_a_closure_passes_through(trainer: Trainer) -> None:
    before = trainer.state()

    def fail() -> Tensor:
        raise KeyError("no such batch")

    with pytest.raises(KeyError, match="no such batch"):
        trainer.gb.backward(trainer.losses(), held_out=fail)
    assert trainer.state() == before
    trainer.rejects("held_out raised StopIteration: its batches are used up", trainer.losses(), lambda: next(iter([])))


def test_a_backward_pass_inside_a_closure(trainer: Trainer) -> None:
    """Its gradients are not those of the held-out loss."""
    twin = Trainer(trainer.model.fused.weight.device.type)
    assert twin.gb.blender.save() == trainer.gb.blender.save()

    def held_out() -> Tensor:
        loss = trainer.held_out()
        loss.backward(retain_graph=True)
        return loss

    trainer.gb.backward(trainer.losses(), held_out)
    twin.gb.backward(twin.losses(), twin.held_out)
    assert twin.gb.blender.save() == trainer.gb.blender.save()

    def nested() -> Tensor:
        trainer.gb.backward(trainer.losses(), trainer.held_out)
        return trainer.held_out()

    trainer.rejects("backward was called by held_out or train of another call", trainer.losses(), nested)


def test_a_graph_that_is_gone(trainer: Trainer) -> None:
    losses = trainer.losses()
    losses[-1].backward()
    trainer.rejects("losses[0]: another backward pass has run", [losses[-1], *trainer.losses()[1:]])
    losses = trainer.losses()
    trainer.rejects("held_out: another backward pass has run", losses, lambda: losses[-1])


def test_parameters_that_were_replaced(device: str) -> None:
    """Losses that reach none of the given parameters, in a call that does not observe too."""
    layer = nn.Linear(3, 1).to(device)
    gb = GradBlend(layer.parameters(), 1, every=2)
    x = torch.randn(4, 3, device=device)
    gb.backward([layer(x).sum()], held_out=lambda: layer(x).sum())
    layer.zero_grad()
    other = nn.Linear(3, 1).to(device)
    with pytest.raises(Error, match="losses reach no parameter"):
        gb.backward([other(x).sum()], held_out=lambda: other(x).sum())
    assert gb.state_dict()["calls"] == 1


def test_copies_are_rejected(trainer: Trainer) -> None:
    for function in (copy.copy, copy.deepcopy, pickle.dumps):
        for thing in (trainer.gb, trainer.gb.blender):
            with pytest.raises(Error, match="cannot be copied or pickled"):
                function(thing)
    assert repr(trainer.gb).startswith("GradBlend(10 parameters, weights [")
    assert repr(gradblend.Blender(2)) == "Blender(2, device='cpu')"


def test_sparse_gradients(device: str) -> None:
    table = nn.Embedding(5, 3, sparse=True).to(device)
    layer = nn.Linear(3, 2).to(device)
    params = [*layer.named_parameters(), ("words.weight", table.weight)]
    gb = GradBlend(params, 2)
    words = torch.tensor([1, 2], device=device)

    def losses() -> list[Tensor]:
        outputs = layer(table(words))
        return [outputs[:, 0].sum(), outputs[:, 1].sum()]

    with pytest.raises(Error, match=r"words\.weight: the gradient of losses\[0\] is sparse"):
        gb.backward(losses(), held_out=lambda: losses()[1])
    assert all(param.grad is None for _, param in params) and gb.report().observed == 0
    assert gb.state_dict()["calls"] == 0


def test_a_grad_that_cannot_be_added_to(trainer: Trainer) -> None:
    weight = trainer.model.fused.weight
    weight.grad = torch.zeros_like(weight).to_sparse()
    with pytest.raises(Error, match=r"fused\.weight\.grad is sparse"):
        trainer.gb.backward(trainer.losses(), trainer.held_out)
    assert weight.grad.is_sparse
    with torch.inference_mode():
        inference = torch.zeros_like(weight)
    for grad in (torch.zeros(1, 1, device=weight.device).expand(weight.shape), inference):
        weight.grad = grad
        trainer.rejects(r"fused.weight.grad cannot be added to", trainer.losses(), after=lambda: setattr(weight, "grad", None))


def test_parameters(device: str) -> None:
    def rejects(params: Any, message: str) -> None:
        with pytest.raises(Error) as caught:
            GradBlend(params, 2)
        assert message in str(caught.value), caught.value

    layer = nn.Linear(3, 2).to(device)
    rejects(layer, "params is a module, expected module.named_parameters()")
    rejects(nn.LazyLinear(2).named_parameters(), "weight has no shape yet")
    rejects(layer.weight, "params is Parameter, expected an iterable")
    rejects(3, "params is int, expected an iterable")
    rejects([], "params has no tensor that requires a gradient")
    rejects([layer.weight, "bias"], "params[1] is str, expected a tensor")
    rejects([("double", 3)], "params[0] is int, expected a tensor")
    rejects([layer.weight * 2], "params[0] is no leaf")
    rejects([{"params": [layer.weight, layer.weight * 2]}], "params[0]['params'][1] is no leaf")
    rejects(nn.Linear(3, 2).to(device, torch.float64).named_parameters(), "weight is float64, expected float32, float16")
    rejects(nn.Linear(3, 2).to(device, torch.complex64).parameters(), "params[0] is complex64, expected float32, float16")
    rejects(
        [("a", layer.weight), ("b", nn.Parameter(torch.zeros(2, device="meta")))],
        "b is on meta, expected the CPU or a CUDA device",
    )
    rejects(nn.Linear(3, 2, device="meta").parameters(), "params[0] is on meta, expected the CPU or a CUDA device")
    double = nn.Linear(3, 2, dtype=torch.float64).requires_grad_(False)
    gb = GradBlend([*layer.named_parameters(), ("double.weight", double.weight)], 1)
    double.weight.requires_grad_(True)
    with pytest.raises(Error, match=r"double\.weight is float64 on cpu, expected float32, float16 or bfloat16 on"):
        gb.backward([layer(torch.ones(1, 3, device=device)).sum()], held_out=lambda: None)
    frozen = nn.Linear(3, 2).requires_grad_(False)
    rejects(frozen.parameters(), "params has no tensor that requires a gradient")
    layer.requires_grad_(False)
    gb = GradBlend([("weight", nn.Parameter(torch.zeros(1)))], 1)
    for param in gb._params:
        param.requires_grad_(False)
    with pytest.raises(Error, match="no parameter requires a gradient"):
        gb.backward([torch.ones((), requires_grad=True) * 2], held_out=lambda: None)


def test_a_parameter_that_was_moved(device: str) -> None:
    layer = nn.Linear(3, 2).to(device)
    gb = GradBlend(layer.named_parameters(), 1)
    layer.double()
    x = torch.ones(1, 3, dtype=torch.float64, device=device)
    for _ in range(2):
        with pytest.raises(Error, match=r"weight was float32 \[2, 3\] on .* and is float64 \[2, 3\] on .*: make GradBlend after"):
            gb.backward([layer(x).sum()], held_out=lambda: layer(x).sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_losses": 0}, "num_losses is 0, expected a whole number from 1 to 32"),
        ({"num_losses": 33}, "num_losses is 33, expected a whole number from 1 to 32"),
        ({"num_losses": 2.0}, "num_losses is 2.0, expected a whole number from 1 to 32"),
        ({"every": 0}, "every is 0, expected a whole number from 1"),
        ({"every": 1.5}, "every is 1.5, expected a whole number from 1"),
        ({"decay": 1.0}, "decay"),
        ({"decay": float("nan")}, "decay"),
        ({"decay": "0.9x"}, "decay: expected 1 number"),
        ({"damping": -1}, "damping"),
        ({"overfitting": "none"}, "overfitting is 'none', expected 'uncorrelated' or 'correlated'"),
        ({"negative": None}, "negative is None, expected 'clamp' or 'signed'"),
        ({"average": "median"}, "average is 'median', expected 'mean' or 'ema'"),
        ({"cadence": 1}, "cadence is 1, expected 'on_request' or 'every_observation'"),
        ({"min_weight": [0.5]}, "min_weight has 1 numbers, expected 2"),
        ({"min_weight": [0.6, 0.6]}, "min_weight"),
        ({"min_weight": [-0.1, 0]}, "min_weight"),
        ({"min_weight": 0.1}, "min_weight: expected 2 numbers"),
        ({"min_weight": [0.1, 0], "negative": "signed"}, "min_weight"),
        ({"threads": -1}, "threads is -1, expected a whole number from 0"),
        ({"threads": 5000}, "threads"),
        ({"schedule": 3}, "schedule is int, expected gradblend.Schedule"),
        ({"scaler": 3}, "scaler is 3, expected a torch.amp.GradScaler"),
        ({"scaler": int}, "scaler is <class 'int'>, expected a torch.amp.GradScaler"),
        ({"on_observation": 3}, "on_observation is int, expected a function"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Error) as caught:
        GradBlend([nn.Parameter(torch.zeros(2))], **{"num_losses": 2, **options})
    assert message in str(caught.value), caught.value
    with pytest.raises(TypeError, match="unexpected option 'momentum'"):
        GradBlend([nn.Parameter(torch.zeros(2))], 2, momentum=0.9)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected option 'device'"):
        GradBlend([nn.Parameter(torch.zeros(2))], 2, device="cpu")  # type: ignore[call-arg]


def test_states(trainer: Trainer) -> None:
    before = trainer.state()
    good = trainer.gb.state_dict()
    damaged = good["blender"].clone()
    damaged[60] ^= 1
    other = GradBlend(trainer.model.parameters(), 2).state_dict()
    slower = GradBlend(trainer.model.parameters(), 3, decay=0.5).state_dict()
    for state, status in (
        (None, Status.INVALID_ARGUMENT),
        ({}, Status.INVALID_ARGUMENT),
        ({**good, "calls": -1}, Status.INVALID_ARGUMENT),
        ({**good, "calls": None}, Status.INVALID_ARGUMENT),
        ({**good, "blender": b""}, Status.INVALID_ARGUMENT),
        ({**good, "blender": good["blender"].float()}, Status.INVALID_ARGUMENT),
        ({**good, "blender": good["blender"][:-1]}, Status.CORRUPT_STATE),
        ({**good, "blender": damaged}, Status.CORRUPT_STATE),
        (other, Status.INVALID_ARGUMENT),
        (slower, Status.INVALID_ARGUMENT),
    ):
        with pytest.raises(Error) as caught:
            trainer.gb.load_state_dict(state)
        assert caught.value.status == status and trainer.state() == before
    trainer.gb.load_state_dict(good)
    assert trainer.state() == before


def test_weights_and_epochs(trainer: Trainer) -> None:
    before = trainer.state()
    for weights in ([1.0], [1, 2, float("inf")], "123", None, [1, "x", 2]):
        with pytest.raises(Error, match="weight"):
            trainer.gb.set_weights(weights)
    assert trainer.state() == before
    gb = GradBlend([nn.Parameter(torch.zeros(2))], 2, schedule=Schedule.online(1, 1))
    for epoch in (-1, 0.5, None):
        with pytest.raises(Error, match="epoch is"):
            gb.end_epoch(epoch)  # type: ignore[arg-type]
    for lengths in ((0, 1), (1, 0), (1.5, 1)):
        with pytest.raises(Error, match="expected a whole number from 1"):
            Schedule.online(*lengths)  # type: ignore[arg-type]


def test_errors_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(Error("text", Status.CUDA)))
    assert str(error) == "text" and error.status == Status.CUDA


def test_a_missing_device() -> None:
    with pytest.raises(Error) as caught:
        gradblend.Blender(2, device="cuda:77")
    assert caught.value.status in (Status.NOT_BUILT, Status.NO_DRIVER, Status.NO_DEVICE)
    for device in ("gpu", "cuda:x", "cpu:1", None, 1.5, -2, "cuda:-1", "cuda:99999999999"):
        with pytest.raises(Error, match="device is"):
            gradblend.Blender(2, device=device)
