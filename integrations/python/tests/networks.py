"""Random late-fusion networks, and what a plain f64 computation says about their gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
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


@dataclass
class Moments:
    """m and S of an EMA in f64, from gradients as they are, with bounds on the errors of the library's f32 products."""

    decay: float
    normaliser: float = 0.0
    mean: list[float] = field(default_factory=list)
    second: list[list[float]] = field(default_factory=list)
    mean_bound: list[float] = field(default_factory=list)
    second_bound: list[list[float]] = field(default_factory=list)

    def observe(self, v: list[list[Tensor | None]], t: list[Tensor | None], g: list[Tensor | None], scale: float = 1) -> None:
        c, d, c_bound, d_bound = [], [], [], []
        for v_k in v:
            sums = [0.0] * 4
            for v_p, t_p, g_p in zip(v_k, t, g):
                if v_p is None or (t_p is None and g_p is None):
                    continue
                zero = torch.zeros_like(v_p, dtype=torch.float64)
                v_p, t_p, g_p = (zero if x is None else x.detach().double() / scale for x in (v_p, t_p, g_p))
                products = g_p * v_p, (t_p - g_p) * v_p
                sums = [a + float(b) for a, b in zip(sums, (p.sum() for p in (*products, *(p.abs() for p in products))))]
            c.append(sums[0])
            d.append(sums[1])
            # |computed - exact| <= 2^-16 sum |a_i b_i|: guarantee 4 of the library.
            c_bound.append(sums[2] * 2**-16)
            d_bound.append(sums[3] * 2**-16)
        k = len(v)
        fresh = not self.mean
        if fresh:
            self.mean, self.mean_bound = [0.0] * k, [0.0] * k
            self.second, self.second_bound = [[0.0] * k for _ in c], [[0.0] * k for _ in c]
        self.normaliser = self.decay * self.normaliser + (1 - self.decay)
        for i in range(k):
            self._update(self.mean, i, c[i])
            self._update(self.mean_bound, i, c_bound[i])
            for j in range(k):
                self._update(self.second[i], j, d[i] * d[j])
                bound = abs(d[i]) * d_bound[j] + abs(d[j]) * d_bound[i] + d_bound[i] * d_bound[j]
                self._update(self.second_bound[i], j, bound)

    def _update(self, values: list[float], i: int, new: float) -> None:
        values[i] = self.decay * values[i] + (1 - self.decay) * new

    def m(self) -> list[float]:
        return [value / self.normaliser for value in self.mean]

    def s(self) -> list[list[float]]:
        return [[value / self.normaliser for value in row] for row in self.second]

    def check(self, m: tuple[float, ...], s: list[list[float]]) -> None:
        """Whether the library's moments are within the bounds."""
        for i in range(len(m)):
            assert abs(m[i] - self.m()[i]) <= self.mean_bound[i] / self.normaliser + 1e-300, (i, m, self.m())
            for j in range(len(m)):
                bound = self.second_bound[i][j] / self.normaliser
                assert abs(s[i][j] - self.s()[i][j]) <= bound + 1e-12 * abs(s[i][j]), (i, j)


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
