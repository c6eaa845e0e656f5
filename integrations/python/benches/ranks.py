#!/usr/bin/env python3
"""What several ranks cost, and what a mean of products costs: processes on this machine with the backend gloo.

Three tables: the time of one exchange of products; the time and the bytes of a step in each mode; and the moments and weights
that follow from the mean of the ranks' products, in place of the products of mean gradients.

    python benches/ranks.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any

import gradblend
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import processor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

CLASSES, MODALITIES = 5, 2


class Network(nn.Module):
    """Two encoders with a head each, and a head on both: K = 3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(
            nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()) for _ in range(MODALITIES)
        )
        self.heads = nn.ModuleList(nn.Linear(width * n, CLASSES) for n in (1, 1, MODALITIES))

    def forward(self, inputs: Tensor) -> list[Tensor]:
        features = [encoder(x) for encoder, x in zip(self.encoders, inputs.unbind(1))]
        return [head(x) for head, x in zip(self.heads, [*features, torch.cat(features, dim=1)])]


def batch(generator: torch.Generator, samples: int) -> tuple[Tensor, Tensor]:
    """Samples whose class the first modality shows better than the second."""
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    means = F.one_hot(labels, 20).float()
    noise = torch.randn(samples, MODALITIES, 20, generator=generator)
    return means[:, None] + noise * torch.tensor([0.5, 1.5])[None, :, None], labels


def losses(model: nn.Module, of: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [F.cross_entropy(logits, of[1]) for logits in model(of[0])]


def exchange(repeats: int) -> list[dict[str, Any]]:
    """Median time of a sum of the products, which carries a flag of each rank."""
    rows = []
    for k in (2, 4, 8, 32):
        numbers, times = torch.zeros(2 * k + dist.get_world_size(), dtype=torch.float64), []
        for _ in range(repeats):
            start = time.perf_counter()
            dist.all_reduce(numbers)
            times.append(time.perf_counter() - start)
        rows.append({"k": k, "bytes": 8 * len(numbers), "us": 1e6 * statistics.median(times)})
    return rows


def steps(width: int, rounds: int) -> list[dict[str, Any]]:
    """Median time of a step of each mode, in turn, and the bytes that a rank gives to collective operations."""
    group, modes = dist.group.WORLD, []
    for name, wraps, every, exact in (
        ("uniform weights, DDP", True, 0, True),
        ("DDP, every=10", True, 10, True),
        ("DDP, every=10, exact=False", True, 10, False),
        ("DDP, every=1", True, 1, True),
        ("DDP, every=1, exact=False", True, 1, False),
        ("copies, every=10", False, 10, True),
    ):
        torch.manual_seed(0)
        model: Any = Network(width)
        sizes = sum(param.numel() for param in model.parameters())
        model = DistributedDataParallel(model) if wraps else model
        options: Any = {"every": every or 1, "exact": exact, "min_weight": [0.1] * 3, "process_group": group}
        gb = gradblend.GradBlend(model.named_parameters(), num_losses=3, **options) if every else None
        modes.append((name, model, gb, 4 * sizes if wraps else 0, []))
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(rounds):
        for _, model, gb, _, times in modes:
            start = time.perf_counter()
            for _ in range(10):
                of, held_out = batch(generator, 32), batch(generator, 32)
                model.zero_grad()
                if gb is None:
                    torch.stack(losses(model, of)).mean().backward()
                else:
                    gb.backward(losses(model, of), held_out=lambda model=model, of=held_out: losses(model, of)[-1])
            times.append((time.perf_counter() - start) / 10)
    rows = []
    for name, _, gb, by_module, times in modes:
        calls = 10 * rounds
        observing = 0 if gb is None else gb.observations
        total = (0 if gb is None else gb.exchanged) + by_module * (calls - observing)
        over = [own / uniform for own, uniform in zip(times, modes[0][-1])]
        rows.append(
            {
                "mode": name,
                "ms": 1e3 * statistics.median(times),
                "over_uniform": statistics.median(over),
                "mib_per_step": total / calls / 2**20,
            }
        )
    return rows


def work(rank: int, count: int, folder: str, quick: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=count)
    found = {"ranks": count, "exchange": exchange(50 if quick else 2000), "steps": steps(64 if quick else 512, 1 if quick else 5)}
    if rank == 0:
        pathlib.Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def launch(count: int, quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(count, folder, quick), nprocs=count)
        found: dict[str, Any] = json.loads(pathlib.Path(folder, "found.json").read_text())
        return found


def products(v: list[list[Tensor]], t: list[Tensor], g: list[Tensor]) -> Tensor:
    """c_k and d_k, in f64."""

    def flat(grads: list[Tensor]) -> Tensor:
        return torch.cat([grad.double().reshape(-1) for grad in grads])

    d = flat(t) - flat(g)
    return torch.tensor([[float(flat(g) @ flat(v_k)), float(d @ flat(v_k))] for v_k in v])


def wrong(observations: int) -> list[dict[str, Any]]:
    """Moments of a network after a few steps, from the products of mean gradients, and from other things of the same batches."""
    rows = []
    for ranks in (2, 4, 8):
        torch.manual_seed(0)
        model, generator = Network(32), torch.Generator().manual_seed(1)
        params = list(model.parameters())
        optimizer = torch.optim.SGD(params, lr=0.1)
        for _ in range(50):
            optimizer.zero_grad()
            torch.stack(losses(model, batch(generator, 32))).sum().backward()
            optimizer.step()

        def gradient(loss: Tensor, params: list[Tensor] = params) -> list[Tensor]:
            found = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
            return [torch.zeros_like(param) if grad is None else grad for param, grad in zip(params, found)]

        def mean(sets: list[list[Tensor]]) -> list[Tensor]:
            return [torch.stack(grads).mean(0) for grads in zip(*sets)]

        right, of_means, each = [], [], []
        for _ in range(observations):
            of_ranks = []
            for _ in range(ranks):
                v = [gradient(loss) for loss in losses(model, batch(generator, 8))]
                of_ranks.append((v, v[-1], gradient(losses(model, batch(generator, 8))[-1])))
            own = [products(*of_rank) for of_rank in of_ranks]
            v = [mean([of_rank[0][k] for of_rank in of_ranks]) for k in range(3)]
            right.append(products(v, v[-1], mean([of_rank[2] for of_rank in of_ranks])))
            of_means.append(torch.stack(own).mean(0))
            each += own
        row: dict[str, Any] = {"ranks": ranks}
        for name, found in (("exact", right), ("each", each), ("mean_of_products", of_means)):
            m, sigma = torch.stack(found)[..., 0].mean(0), torch.stack(found)[..., 1].square().mean(0)
            weights = gradblend.solve(m.tolist(), torch.diag(sigma).tolist()).weights
            row[name] = {"m": m.tolist(), "sigma": sigma.sqrt().tolist(), "weights": weights}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network, few repeats")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    arguments = parser.parse_args()
    found = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "groups": [launch(count, arguments.quick) for count in ((2,) if arguments.quick else (2, 4))],
        "wrong": wrong(20 if arguments.quick else 400),
    }
    for group in found["groups"]:
        print(f"{group['ranks']} ranks")
        for row in group["exchange"]:
            print(f"  K = {row['k']:2}: {row['bytes']:4} bytes, {row['us']:7.0f} us an exchange")
        for row in group["steps"]:
            print(
                f"  {row['mode']:28} {row['ms']:8.2f} ms, {row['over_uniform']:5.2f} of uniform, {row['mib_per_step']:7.2f} MiB"
            )
    for row in found["wrong"]:
        print(f"{row['ranks']} ranks of 8 samples")
        for name in ("exact", "each", "mean_of_products"):
            figures = "; ".join(f"{what} " + " ".join(f"{x:.3g}" for x in row[name][what]) for what in ("m", "sigma", "weights"))
            print(f"  {name:17} {figures}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
