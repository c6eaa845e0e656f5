"""Random late-fusion networks, and what a plain f64 computation says about their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 4
BATCH = 12


class Network(nn.Module):
    """M encoders with a head each, and a head on all features: K = M + 1 losses. The encoders share a trunk if asked."""

    def __init__(self, modalities: int, shared: bool = False, width: int = 9) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, 6) if shared else nn.Identity()
        self.encoders = nn.ModuleList(nn.Linear(6 if shared else 5, width) for _ in range(modalities - 1))
        self.heads = nn.ModuleList(nn.Linear(width, CLASSES) for _ in range(modalities - 1))
        self.fused = nn.Linear(width * max(modalities - 1, 1), CLASSES)
        self.alone = nn.Linear(6 if shared else 5, width) if modalities == 1 else None

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """Logits of each head, the fused one last, from inputs [batch, modalities, 5]."""
        if self.alone is not None:
            return [self.fused(self.alone(self.trunk(inputs[:, 0])).tanh())]
        features = [encoder(self.trunk(inputs[:, i])).tanh() for i, encoder in enumerate(self.encoders)]
        heads = [head(feature) for head, feature in zip(self.heads, features)]
        return [*heads, self.fused(torch.cat(features, dim=1))]

    def losses(self, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [F.cross_entropy(logits.float(), batch[1]) for logits in self(batch[0])]


def batches(modalities: int, seed: int, device: str = "cpu") -> Any:
    """An endless stream of random batches, with labels that the inputs say something of."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(CLASSES, max(modalities - 1, 1), 5, generator=generator)
    while True:
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, max(modalities - 1, 1), 5, generator=generator)
        yield (means[labels] + noise).to(device), labels.to(device)


def autograd(loss: Tensor, params: list[Tensor]) -> list[Tensor | None]:
    """Gradients of a loss, in the plain way."""
    return list(torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True))


def weighted(losses: list[Tensor], weights: list[float], params: list[Tensor]) -> list[Tensor | None]:
    """Gradients of sum_k w_k L_k without losses of weight 0, in the plain way."""
    return autograd(sum((w * loss for w, loss in zip(weights, losses) if w != 0), torch.zeros(())), params)


class Moments:
    """m and S of an EMA in f64, from gradients as they are, with bounds on the errors of the library's f32 products."""

    def __init__(self, decay: float) -> None:
        self.decay, self.normaliser = decay, 0.0
        self.sums: list[Tensor] = []

    def observe(self, v: list[list[Tensor | None]], t: list[Tensor | None], g: list[Tensor | None]) -> None:
        rows = []
        for v_k in v:
            sums = torch.zeros(4, dtype=torch.float64)
            for v_p, t_p, g_p in zip(v_k, t, g):
                if v_p is None or (t_p is None and g_p is None):
                    continue
                zero = torch.zeros_like(v_p, dtype=torch.float64)
                v_p, t_p, g_p = (zero if x is None else x.detach().double() for x in (v_p, t_p, g_p))
                products = g_p * v_p, (t_p - g_p) * v_p
                sums += torch.stack([p.sum() for p in (*products, *(p.abs() for p in products))]).cpu()
            rows.append(sums)
        c, d, c_bound, d_bound = torch.stack(rows, dim=1)
        # |computed - exact| <= 2^-16 sum |a_i b_i|: guarantee 4 of the library.
        c_bound, d_bound = c_bound * 2**-16, d_bound * 2**-16
        errors = torch.outer(d.abs(), d_bound)
        new = [c, torch.outer(d, d), c_bound, errors + errors.T + torch.outer(d_bound, d_bound)]
        old = self.sums or [torch.zeros_like(x) for x in new]
        self.sums = [self.decay * x + (1 - self.decay) * y for x, y in zip(old, new)]
        self.normaliser = self.decay * self.normaliser + (1 - self.decay)

    def check(self, m: tuple[float, ...], s: list[list[float]]) -> None:
        """Whether the library's moments are within the bounds."""
        got_m, got_s = (torch.tensor(x, dtype=torch.float64) for x in (m, s))
        exact_m, exact_s, m_bound, s_bound = (x / self.normaliser for x in self.sums)
        assert bool(((got_m - exact_m).abs() <= m_bound + 1e-300).all()), (got_m, exact_m)
        assert bool(((got_s - exact_s).abs() <= s_bound + 1e-12 * got_s.abs()).all()), (got_s, exact_s)


def clamped(m: Any, s: Any) -> list[float] | None:
    """w_k = (1/Z) max(m_k, 0) / sigma^2_k; None if there is nothing to go by."""
    damping = 1e-12 * sum(s[k][k] for k in range(len(m))) / len(m)
    a = [max(m[k], 0.0) / (s[k][k] + damping) for k in range(len(m))]
    return [value / sum(a) for value in a] if sum(a) > 0 else None


def check_blend(grad: Tensor | None, weights: list[float], v: list[Tensor | None]) -> None:
    """Whether a blended gradient is sum_k w_k v_k, with a rounding for each term and one at the end."""
    present = [(w, x.detach().double()) for w, x in zip(weights, v) if x is not None]
    if not present:
        assert grad is None
        return
    assert grad is not None
    exact = sum((w * x for w, x in present if w != 0), torch.zeros_like(present[0][1]))
    terms = sum((abs(w) * x.abs() for w, x in present if w != 0), torch.zeros_like(exact))
    bound = len(weights) * 2**-23 * terms + torch.finfo(grad.dtype).eps * exact.abs() + 1e-37
    if grad.dtype == torch.float16:
        bound = bound + 2**-25  # half of the least subnormal
    error = (grad.double() - exact).abs()
    assert bool((error <= bound).all()), float((error - bound).max())


def bits(tensor: Tensor) -> list[int]:
    """The bits of a tensor, as numbers that compare equal only if the bits do."""
    return list(tensor.detach().cpu().contiguous().view(torch.uint8).flatten().tolist())
