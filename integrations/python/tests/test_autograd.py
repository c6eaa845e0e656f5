"""What autograd may hand out as a gradient: memory that others share, lazy views, gaps; and graphs that it treats apart."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from gradblend import Error, GradBlend
from networks import autograd, check_blend
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def parameter(values: Any) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float32))


def check(params: list[Any], losses: Any, calls: int = 2) -> GradBlend:
    """Compares the first calls, of which only the very first observes, with the plain gradients and uniform weights."""
    plain = [autograd(loss, params) for loss in losses()]
    k = len(plain)
    gb = GradBlend(params, k, every=2, cadence="on_request")
    for call in range(calls):
        for param in params:
            param.grad = None
        gb.backward(losses(), held_out=lambda: losses()[-1])
        for i, param in enumerate(params):
            if call == 0:
                check_blend(param.grad, [1 / k] * k, [v[i] for v in plain])
            else:
                torch.testing.assert_close(param.grad, sum(v[i] for v in plain if v[i] is not None) / k)
    return gb


def test_parameters_whose_gradients_share_memory() -> None:
    a, b, c = parameter([1.0, 2, 3, 4]), parameter([5.0, 6, 7, 8]), torch.tensor([[1.0, 2], [3, 4]])
    # Autograd gives both one storage.
    check([a, b], lambda: [((a.view(2, 2) + b.view(2, 2)) * c).sum(), (a * b).sum()])
    check([a, b], lambda: [(a + b).sum(), (a + b).sum() * 2])


class Saved(torch.autograd.Function):
    """Returns what it has saved as a gradient, which is right for a loss that is differentiated itself."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, saved: Tensor) -> Tensor:
        ctx.save_for_backward(saved)
        return (w * saved).sum()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        (saved,) = ctx.saved_tensors
        return saved.detach(), None


def test_no_tensor_of_the_user_is_overwritten() -> None:
    w, c = parameter([1.0, 2, 3]), torch.tensor([1.0, 2, 3])
    check([w], lambda: [Saved.apply(w, c), (w * w).sum()], calls=1)
    assert c.tolist() == [1, 2, 3]

    logged: list[Tensor] = []
    w.grad = None
    handle = w.register_hook(lambda grad: logged.append(grad.detach()))
    gb = GradBlend([w], 2)
    gb.backward([(2 * w).sum(), (5 * w).sum()], held_out=lambda: w.sum())
    handle.remove()
    assert [grad.tolist() for grad in logged] == [[2] * 3, [5] * 3, [1] * 3] and w.grad.tolist() == [3.5] * 3


def test_a_hook_that_keeps_grad_in_a_buffer() -> None:
    w, buffer = parameter([1.0, 2, 3]), torch.zeros(3)

    def keep(param: Tensor) -> None:
        buffer.copy_(param.grad)
        param.grad = buffer

    w.register_post_accumulate_grad_hook(keep)
    gb = GradBlend([("w", w)], 2)
    with pytest.raises(Error, match="w: gradients of two passes share memory"):
        gb.backward([(2 * w).sum(), (4 * w).sum()], held_out=lambda: w.sum())
    assert gb.report().observed == 0


def test_lazy_negations() -> None:
    a, b, c = parameter([1.0]), parameter([2.0]), torch.tensor([1 + 3j])
    gb = check([a, b], lambda: [(torch.complex(a, b).conj() * c).real.sum()])
    assert gb.copied > 0 and b.grad.tolist() == [3]


@pytest.mark.parametrize("gap", ["expanded", "gaps"])
def test_gradients_with_gaps(gap: str) -> None:
    w = parameter([[1.0, 2, 3], [4, 5, 6]])

    def change(param: Tensor) -> None:
        assert param.grad is not None
        if gap == "expanded":
            param.grad = param.grad[:1].expand(2, 3)
        else:
            wide = torch.zeros(2, 6)
            wide[:, ::2] = param.grad
            param.grad = wide[:, ::2]

    losses = lambda: [(w * torch.tensor([1.0, 2, 3])).sum(), (w * torch.tensor([4.0, 5, 6])).sum()]
    plain = [autograd(loss, [w])[0] for loss in losses()]
    w.register_post_accumulate_grad_hook(change)
    gb = GradBlend([w], 2)
    gb.backward(losses(), held_out=lambda: losses()[0])
    check_blend(w.grad, [0.5, 0.5], plain)
    assert gb.copied == 3 and gb.report().mean == (28, 64)


def test_transposed_and_view_parameters() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    for w in (nn.Parameter(base.t()), nn.Parameter(base[:, ::2]), nn.Parameter(base[1])):
        x = torch.randn(w.shape)
        gb = check([w], lambda w=w, x=x: [(w * x).sum(), (w * w).sum()])  # type: ignore[misc]
        assert gb.copied == 0


def test_checkpoints() -> None:
    trunk, heads = nn.Linear(3, 3), nn.ModuleList(nn.Linear(3, 1) for _ in range(2))
    params, x = [*trunk.parameters(), *heads.parameters()], torch.randn(4, 3)

    def losses(reentrant: bool) -> list[Tensor]:
        features = checkpoint(trunk, x.requires_grad_(), use_reentrant=reentrant)
        return [head(features).mean() for head in heads]

    check(params, lambda: losses(False))
    gb = GradBlend(params, 2)
    with pytest.raises(Error, match=r"losses\[0\] uses torch\.utils\.checkpoint with use_reentrant=True"):
        gb.backward(losses(True), held_out=lambda: losses(False)[-1])
    with pytest.raises(Error, match=r"held_out uses torch\.utils\.checkpoint with use_reentrant=True"):
        gb.backward(losses(False), held_out=lambda: losses(True)[-1])


def test_the_graph_of_the_fused_loss_is_freed() -> None:
    w = parameter([1.0])
    losses = [w.square().sum(), w.pow(3).sum()]
    GradBlend([w], 2).backward(losses, held_out=lambda: w.exp().sum())
    with pytest.raises(RuntimeError, match="second time"):
        losses[-1].backward()


def test_sharded_parameters(tmp_path: pathlib.Path) -> None:
    distributed = pytest.importorskip("torch.distributed.tensor")
    if not hasattr(distributed, "distribute_tensor"):
        pytest.skip("PyTorch 2.2 has no public DTensor")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        w = nn.Parameter(distributed.distribute_tensor(torch.ones(4), mesh, [distributed.Shard(0)]))
        with pytest.raises(Error, match="w is a DTensor: sharded parameters need process_group"):
            GradBlend([("w", w)], 1)
    finally:
        torch.distributed.destroy_process_group()
