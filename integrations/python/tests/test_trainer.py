"""GradBlend against a plain recomputation from PyTorch's own gradients, and against the raw operations."""

from __future__ import annotations

import copy
import io
from typing import Any

import gradblend
import pytest
import torch
from gradblend import GradBlend, Schedule
from networks import CLASSES, Moments, Network, autograd, batches, bits, check_blend, clamped, weighted
from torch import nn
from torch.nn import functional as F


def weights_in_force(gb: GradBlend) -> list[float]:
    return [float(weight) for weight in gb.weights.tolist()]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("modalities", range(1, 9))
@pytest.mark.parametrize("independent", [False, True])
def test_equals_plain_recomputation(device: str, modalities: int, shared: bool, independent: bool) -> None:
    torch.manual_seed(modalities)
    model = Network(modalities, shared).to(device)
    params = list(model.parameters())
    gb = GradBlend(model.named_parameters(), modalities, every=2, decay=0.8)
    stream, moments = batches(modalities, 7, device), Moments(decay=0.8)
    optimizer = torch.optim.SGD(params, lr=0.3)
    for step in range(8):
        batch, held_out, other = next(stream), next(stream), next(stream)
        losses = model.losses(batch)
        v = [autograd(loss, params) for loss in losses]
        t = autograd(model.losses(other)[-1], params) if independent else v[-1]
        g = autograd(model.losses(held_out)[-1], params)
        in_force = weights_in_force(gb)
        plain = weighted(losses, in_force, params)

        optimizer.zero_grad()
        observed = gb.backward(
            losses,
            held_out=lambda: model.losses(held_out)[-1],
            train=(lambda: model.losses(other)[-1]) if independent else None,
        )
        assert observed == (step % 2 == 0)
        for i, param in enumerate(params):
            if observed:
                check_blend(param.grad, in_force, [v_k[i] for v_k in v])
            else:
                torch.testing.assert_close(param.grad, plain[i])
        if observed:
            moments.observe(v, t, g)
            report = gb.report()
            moments.check(report.mean, gb.blender.second_moments())
            expected = clamped(report.mean, gb.blender.second_moments())
            assert weights_in_force(gb) == pytest.approx(expected or in_force, rel=1e-6, abs=1e-12)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_1_equals_raw_operations(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    model = Network(4, shared=True).to(device)
    model.encoders[1].to(dtype)
    model.heads[1].to(dtype)
    model.encoders[1].register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
    model.fused.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    twin = copy.deepcopy(model)
    gb = GradBlend(model.parameters(), 4, decay=0.9)
    blender, params, plan = gradblend.Blender(4, device=device, decay=0.9), list(twin.parameters()), None
    mine, its = torch.optim.Adam(model.parameters()), torch.optim.Adam(twin.parameters())
    stream = batches(4, 5, device)
    for _ in range(12):
        batch, held_out = next(stream), next(stream)
        mine.zero_grad()
        assert gb.backward(model.losses(batch), held_out=lambda: model.losses(held_out)[-1])
        mine.step()

        v = [autograd(loss, params) for loss in twin.losses(batch)]
        g = autograd(twin.losses(held_out)[-1], params)
        blended = [torch.empty_like(param) for param in params]
        tensors = [
            gradblend.TensorGrads(v[-1][i] if g[i] is not None else None, g[i], [v_k[i] for v_k in v], blended[i])
            if g[i] is not None
            else gradblend.TensorGrads(None, None, [v_k[i] for v_k in v], blended[i])
            for i in range(len(params))
        ]
        if plan is None:
            plan = blender.plan(tensors)
        else:
            plan.update(tensors)
        blender.step(plan)
        blender.reweight()
        for param, grad in zip(params, blended):
            param.grad = grad
        its.step()
        for a, b in zip(model.parameters(), params):
            assert bits(a) == bits(b)
        assert gb.blender.save() == blender.save()
    assert weights_in_force(gb) != [0.25] * 4


def test_no_gradient_is_copied(device: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 4)).to(device)
    model = model.to(memory_format=torch.channels_last)
    head = nn.Linear(64, 4).to(device)
    made: dict[int, list[int]] = {}
    params = [*model.parameters(), *head.parameters()]
    for param in params:
        param.register_post_accumulate_grad_hook(lambda p: made.setdefault(id(p), []).append(p.grad.data_ptr()))
    gb = GradBlend(params, 2)

    def losses() -> list[torch.Tensor]:
        features = model[:4](torch.randn(5, 3, 8, 8, device=device).contiguous(memory_format=torch.channels_last))
        return [F.cross_entropy(layer(features), torch.arange(5, device=device) % 4) for layer in (head, model[4])]

    for _ in range(3):
        made.clear()
        model.zero_grad()
        head.zero_grad()
        gb.backward(losses(), held_out=lambda: losses()[-1])
        for param in params[:4]:
            # v_0, v_1 and g; the blend is in place of v_0.
            assert len(made[id(param)]) == 3 and param.grad.data_ptr() == made[id(param)][0]
            assert param.grad.stride() == param.stride()
        for param in params[4:6]:  # reached by the fused loss alone, whose gradient is t too
            assert len(made[id(param)]) == 2 and param.grad.data_ptr() not in made[id(param)]
    assert gb.copied == 0


def test_gradients_in_different_orders_are_copied_and_counted(device: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 5).to(device)
    calls = []

    def transpose(param: torch.Tensor) -> None:
        calls.append(param)
        if len(calls) == 1:  # of v_0 only
            param.grad = param.grad.t().contiguous().t()

    layer.weight.register_post_accumulate_grad_hook(transpose)
    x = torch.randn(4, 3, device=device)
    gb = GradBlend(layer.parameters(), 2)
    v = [autograd(layer(x)[:, k].square().sum(), list(layer.parameters())) for k in range(2)]
    gb.backward([layer(x)[:, k].square().sum() for k in range(2)], held_out=lambda: layer(x)[:, 1].sum())
    assert gb.copied == 1
    for i, param in enumerate(layer.parameters()):
        check_blend(param.grad, [0.5, 0.5], [v_k[i] for v_k in v])


def test_accumulates_as_backward_does(device: str) -> None:
    torch.manual_seed(1)
    model = Network(3).to(device)
    params, stream = list(model.parameters()), batches(3, 1, device)
    gb = GradBlend(params, 3, every=2)
    sums: list[torch.Tensor | None] = [None for _ in params]
    for _ in range(4):
        losses, held_out = model.losses(next(stream)), next(stream)
        plain = weighted(losses, weights_in_force(gb), params)
        before = [param.grad for param in params]
        gb.backward(losses, held_out=lambda: model.losses(held_out)[-1])
        for i, param in enumerate(params):
            if plain[i] is not None:
                sums[i] = plain[i] if sums[i] is None else sums[i] + plain[i]
                torch.testing.assert_close(param.grad, sums[i])
            assert before[i] is None or param.grad is before[i]


def test_frozen_unused_and_tied_parameters(device: str) -> None:
    model = Network(3).to(device)
    empty = nn.Parameter(torch.zeros(0, 3, device=device))
    unused, frozen = nn.Linear(2, 2).to(device), model.encoders[0].weight.requires_grad_(False)
    integers = nn.Parameter(torch.zeros(3, dtype=torch.int8, device=device), requires_grad=False)
    model.heads[1].weight = model.heads[0].weight  # tied
    stream = batches(3, 2, device)
    gb = GradBlend([*model.parameters(), *unused.parameters(), *model.parameters(), integers, empty], 3)
    tied = model.heads[0].weight
    for _ in range(3):
        losses = [loss + empty.sum() for loss in model.losses(next(stream))]
        v = [autograd(loss, [tied])[0] for loss in losses]
        in_force = weights_in_force(gb)
        model.zero_grad()
        held_out = next(stream)
        gb.backward(losses, held_out=lambda: model.losses(held_out)[-1])
        check_blend(tied.grad, in_force, v)
        assert empty.grad is not None and empty.grad.shape == (0, 3)
        assert frozen.grad is None and integers.grad is None and all(param.grad is None for param in unused.parameters())
    frozen.requires_grad_(True)  # and it trains from then on
    gb.backward(model.losses(next(stream)), held_out=lambda: model.losses(next(stream))[-1])
    assert frozen.grad is not None


def test_a_held_out_loss_may_reach_other_parameters(device: str) -> None:
    model = Network(2).to(device)
    extra = nn.Parameter(torch.ones(CLASSES, device=device))
    stream = batches(2, 3, device)
    params = [*model.parameters(), extra]
    gb, moments = GradBlend(params, 2), Moments(decay=0.99)
    batch, held_out = next(stream), next(stream)

    def validation() -> torch.Tensor:
        return F.cross_entropy(model.heads[0](model.encoders[0](held_out[0][:, 0])) + extra, held_out[1])

    losses = model.losses(batch)
    v, g = [autograd(loss, params) for loss in losses], autograd(validation(), params)
    gb.backward(losses, held_out=validation)
    assert extra.grad is None and model.fused.weight.grad is not None
    moments.observe(v, v[-1], g)
    moments.check(gb.report().mean, gb.blender.second_moments())


def test_weight_0_leaves_a_loss_out(device: str) -> None:
    """An infinity in the gradient of a loss of weight 0 reaches no other parameter's gradient, observing or not."""
    layer = nn.Linear(3, 2).to(device)
    x = torch.randn(4, 3, device=device)
    gb = GradBlend(layer.parameters(), 2, every=2)
    gb.set_weights([0.0, 1.0])
    for observes in (True, False):
        layer.zero_grad()
        outputs = layer(x)
        bad = (outputs[:, 0] * torch.tensor(float("inf"), device=device)).sum()
        good = outputs[:, 1].sum()
        expected = autograd(good, list(layer.parameters()))
        assert gb.backward([bad, good], held_out=lambda: layer(x)[:, 1].sum()) == observes
        for param, grad in zip(layer.parameters(), expected):
            assert torch.equal(param.grad, grad)
    report = gb.report()
    assert report.skipped == 1 and report.observed == 0 and gradblend.Flags.NONFINITE in report.flags
    assert report.nonfinite == (0,) and report.to_dict()["flags"][0] == "NONFINITE"


def test_state_dict_resumes_bit_for_bit(device: str) -> None:
    def run(steps: int, model: Network, gb: GradBlend, optimizer: Any, stream: Any) -> None:
        for _ in range(steps):
            batch, held_out = next(stream), next(stream)
            optimizer.zero_grad()
            gb.backward(model.losses(batch), held_out=lambda: model.losses(held_out)[-1])
            optimizer.step()

    torch.manual_seed(4)
    model = Network(4).to(device)
    gb, optimizer = GradBlend(model.parameters(), 4, every=3), torch.optim.Adam(model.parameters())
    stream = batches(4, 4, device)
    run(5, model, gb, optimizer, stream)
    checkpoint = copy.deepcopy((model.state_dict(), gb.state_dict(), optimizer.state_dict()))
    torch.save(checkpoint[1], buffer := io.BytesIO())
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    rest = [next(stream) for _ in range(14)]
    run(7, model, gb, optimizer, iter(rest))

    other = Network(4).to(device)
    again, its = GradBlend(other.parameters(), 4, every=3), torch.optim.Adam(other.parameters())
    other.load_state_dict(checkpoint[0])
    again.load_state_dict(saved)
    its.load_state_dict(checkpoint[2])
    run(7, other, again, its, iter(rest))
    for a, b in zip(model.parameters(), other.parameters()):
        assert bits(a) == bits(b)
    assert gb.state_dict()["calls"] == again.state_dict()["calls"] == 12
    assert bits(gb.state_dict()["blender"]) == bits(again.state_dict()["blender"])


def test_schedule_reweights_at_the_end_of_a_super_epoch(device: str) -> None:
    model = Network(3).to(device)
    stream = batches(3, 6, device)
    gb = GradBlend(model.parameters(), 3, schedule=Schedule.online(2, 1), average="mean")
    uniform = weights_in_force(gb)
    for epoch in range(3):
        for _ in range(4):
            gb.backward(model.losses(next(stream)), held_out=lambda: model.losses(next(stream))[-1])
        report = gb.report()
        assert report.observed == (8 if epoch == 1 else 4)
        assert (weights_in_force(gb) == uniform) == (epoch < 2)
        expected = clamped(report.mean, gb.blender.second_moments())
        ended = gb.end_epoch(epoch)
        assert (ended is None) == (epoch == 0)
        if ended is not None:
            assert ended.weights == pytest.approx(expected, rel=1e-6, abs=1e-12) and ended.mean == report.mean
            assert weights_in_force(gb) == pytest.approx(ended.weights) and gb.report().observed == 0
    assert GradBlend(model.parameters(), 3).end_epoch(0) is None


def test_reweights_on_request(device: str) -> None:
    model = Network(3).to(device)
    stream = batches(3, 6, device)
    gb = GradBlend(model.parameters(), 3, cadence="on_request")
    for _ in range(4):
        gb.backward(model.losses(next(stream)), held_out=lambda: model.losses(next(stream))[-1])
    assert weights_in_force(gb) == pytest.approx([1 / 3] * 3)
    gb.reweight()
    report = gb.report()
    assert weights_in_force(gb) == pytest.approx(clamped(report.mean, gb.blender.second_moments()), rel=1e-6, abs=1e-12)


def test_runs_where_gradients_are_switched_off(device: str) -> None:
    model = Network(3).to(device)
    stream = batches(3, 6, device)
    gb = GradBlend(model.parameters(), 3, every=2)
    for observes in (True, False):
        losses = model.losses(next(stream))
        with torch.no_grad():
            assert gb.backward(losses, held_out=lambda: model.losses(next(stream))[-1]) == observes


def test_offline_never_observes(device: str) -> None:
    model = Network(3).to(device)
    params, stream = list(model.parameters()), batches(3, 6, device)
    gb = GradBlend(params, 3, schedule=Schedule.offline())
    gb.set_weights(torch.tensor([0.25, 0.0, 0.75]))
    for _ in range(2):
        losses = model.losses(next(stream))
        plain = weighted(losses, [0.25, 0.0, 0.75], params)
        model.zero_grad()
        assert not gb.backward(losses)
        for param, grad in zip(params, plain):
            if grad is None:  # only losses[1] reaches it
                assert param.grad is None
            else:
                torch.testing.assert_close(param.grad, grad)


def test_on_observation_gets_each_report(device: str) -> None:
    model = Network(2).to(device)
    stream, reports = batches(2, 6, device), []
    gb = GradBlend(model.parameters(), 2, every=3, on_observation=reports.append)
    for _ in range(7):
        gb.backward(model.losses(next(stream)), held_out=lambda: model.losses(next(stream))[-1])
    assert [report.observed for report in reports] == [1, 2, 3] and reports[-1] == gb.report()


def test_min_weight_and_other_options_reach_the_solver(device: str) -> None:
    model = Network(3).to(device)
    stream = batches(3, 8, device)
    gb = GradBlend(model.parameters(), 3, min_weight=[0.1, 0.0, 0.5], overfitting="correlated", decay=0.5)
    for _ in range(6):
        gb.backward(model.losses(next(stream)), held_out=lambda: model.losses(next(stream))[-1])
        report = gb.report()
        solution = gradblend.solve(
            report.mean,
            gb.blender.second_moments(),
            overfitting="correlated" if report.observed >= 3 else "uncorrelated",
            min_weight=[0.1, 0.0, 0.5],
        )
        if gradblend.Flags.HELD not in report.flags:
            assert report.weights == solution.weights
            assert report.weights[0] >= 0.1 and report.weights[2] >= 0.5


def test_clipping_and_any_optimiser_after_it(device: str) -> None:
    model = Network(3).to(device)
    stream = batches(3, 9, device)
    gb = GradBlend(model.parameters(), 3, every=2)
    for make in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad):
        optimizer = make(model.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            gb.backward(model.losses(next(stream)), held_out=lambda: model.losses(next(stream))[-1])
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            assert float(norm) > 0
            optimizer.step()
    total = sum(float(param.grad.square().sum()) for param in model.parameters() if param.grad is not None)
    assert total <= 0.01**2 * 1.001


def test_compiled_modules(device: str) -> None:
    torch.manual_seed(2)
    model = Network(3).to(device)
    twin = copy.deepcopy(model)
    gb, its = GradBlend(model.parameters(), 3, every=2), GradBlend(twin.parameters(), 3, every=2)
    assert not getattr(torch._functorch.config, "donated_buffer", False)
    compiled = torch.compile(model)
    stream = batches(3, 2, device)
    for _ in range(4):
        batch, held_out = next(stream), next(stream)
        for network, forward, blend in ((model, compiled, gb), (twin, twin, its)):

            def losses(b: Any, forward: Any = forward) -> list[torch.Tensor]:
                return [F.cross_entropy(logits, b[1]) for logits in forward(b[0])]

            network.zero_grad()
            blend.backward(losses(batch), held_out=lambda losses=losses: losses(held_out)[-1])
        for a, b in zip(model.parameters(), twin.parameters()):
            # A compiled backward pass gives zeros where a plain one gives None.
            grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in (a, b)]
            torch.testing.assert_close(*grads)


def test_autocast(device: str) -> None:
    model = Network(3).to(device)
    params, stream = list(model.parameters()), batches(3, 2, device)
    gb, moments = GradBlend(params, 3, decay=0.9), Moments(decay=0.9)
    for _ in range(3):
        batch, held_out = next(stream), next(stream)

        def fused(held_out: Any = held_out) -> torch.Tensor:
            with torch.autocast(device, dtype=torch.bfloat16):
                return model.losses(held_out)[-1]

        with torch.autocast(device, dtype=torch.bfloat16):
            losses = model.losses(batch)
        v, g = [autograd(loss, params) for loss in losses], autograd(fused(), params)
        gb.backward(losses, held_out=fused)
        moments.observe(v, v[-1], g)
        moments.check(gb.report().mean, gb.blender.second_moments())


needs_scaler = pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="PyTorch 2.2 has a GradScaler for CUDA only")


@needs_scaler
@pytest.mark.parametrize("every", [1, 2])
def test_grad_scaler(device: str, every: int) -> None:
    torch.manual_seed(5)
    model = Network(3).to(device)
    params, stream = list(model.parameters()), batches(3, 2, device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=2)
    optimizer = torch.optim.SGD(params, lr=0.1)
    gb, moments = GradBlend(params, 3, every=every, decay=0.9, scaler=scaler), Moments(decay=0.9)
    for step in range(6):
        batch, held_out = next(stream), next(stream)
        losses = model.losses(batch)
        v, g = [autograd(loss, params) for loss in losses], autograd(model.losses(held_out)[-1], params)
        in_force, scale = weights_in_force(gb), scaler.get_scale()
        plain = weighted(losses, in_force, params)
        optimizer.zero_grad()
        before, poisoned = [param.detach().clone() for param in params], step == 4
        if poisoned:
            losses = [loss * float("inf") for loss in losses]
        observed = gb.backward(losses, held_out=lambda: model.losses(held_out)[-1])
        scaler.unscale_(optimizer)
        if not poisoned and not observed:
            for param, grad in zip(params, plain):
                torch.testing.assert_close(param.grad, grad)
        elif not poisoned:
            for i, param in enumerate(params):
                # A power of 2 changes no bit.
                check_blend(param.grad, in_force, [v_k[i] for v_k in v])
            moments.observe(v, v[-1], g)
            moments.check(gb.report().mean, gb.blender.second_moments())
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(a, b) for a, b in zip(params, before))
        assert moved != poisoned and gb.report().skipped == (step >= 4)
        assert (scaler.get_scale() < scale) == poisoned
    assert scaler.get_scale() != 2.0**10


@needs_scaler
def test_a_scaler_that_is_off(device: str) -> None:
    model = Network(2).to(device)
    gb = GradBlend(model.parameters(), 2, scaler=torch.amp.GradScaler(device, enabled=False))
    stream = batches(2, 2, device)
    gb.backward(model.losses(next(stream)), held_out=lambda: model.losses(next(stream))[-1])
    assert gb.report().observed == 1


def test_weights_are_copies_on_the_device(device: str) -> None:
    model = Network(2).to(device)
    gb, stream = GradBlend(model.parameters(), 2), batches(2, 1, device)
    first = gb.weights
    for _ in range(5):
        gb.backward(model.losses(next(stream)), held_out=lambda: model.losses(next(stream))[-1])
    assert first.tolist() == [0.5, 0.5] and gb.weights.tolist() != [0.5, 0.5]
    assert first.device.type == device and first.dtype == torch.float32 and first.shape == (2,)
