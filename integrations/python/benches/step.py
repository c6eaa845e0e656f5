#!/usr/bin/env python3
"""Time and peak memory of a training step: GradBlend against uniform weights, its own backward passes, plain PyTorch and
TorchJD.

A ResNet-18 sees images, a small network hears spectrograms, and a head reads both: K = 3 losses, random data. All
implementations run in each round, so that other load on the machine meets them alike: 10 steps each. A ratio is of two
implementations in one round.

    python benches/step.py [--rounds N] [--quick] [--json FILE]

Needs torchvision, and torchjd with qpsolvers and quadprog.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import gradblend
import torch
import torchvision
from machine import processor
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, STEPS = 10, 10


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = torchvision.models.resnet18(num_classes=CLASSES)
        self.image.fc = nn.Identity()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.audio = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.heads = nn.ModuleList([nn.Linear(64, CLASSES), nn.Linear(512, CLASSES), nn.Linear(64 + 512, CLASSES)])

    def features(self, batch: tuple[Tensor, ...]) -> list[Tensor]:
        return [self.audio(batch[0]), self.image(batch[1])]

    def losses(self, features: list[Tensor], labels: Tensor) -> list[Tensor]:
        inputs = [*features, torch.cat(features, dim=1)]
        return [F.cross_entropy(head(x), labels) for head, x in zip(self.heads, inputs)]


class Bench:
    def __init__(self, size: int, batch: int) -> None:
        torch.manual_seed(0)
        self.model = Network()
        self.params = list(self.model.parameters())
        self.batches = [
            (torch.randn(batch, 1, 64, 64), torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))) for _ in range(4)
        ]
        self.optimizer = torch.optim.SGD(self.params, lr=1e-3, momentum=0.9)
        self.steps = 0

    def next(self) -> tuple[Tensor, ...]:
        self.steps += 1
        return self.batches[self.steps % len(self.batches)]

    def losses(self) -> list[Tensor]:
        batch = self.next()
        return self.model.losses(self.model.features(batch), batch[2])

    def uniform(self) -> Iterator[None]:
        while True:
            sum(self.losses(), torch.zeros(())).div(3).backward()
            yield

    def gradblend(self, every: int) -> Iterator[None]:
        gb = gradblend.GradBlend(self.params, 3, every=every)
        while True:
            gb.backward(self.losses(), held_out=lambda: self.losses()[-1])
            yield

    def passes(self) -> Iterator[None]:
        """Forward and backward passes of an observing call, and nothing else. One loss's gradients stay."""
        while True:
            losses = self.losses()
            for k, loss in enumerate(losses):
                self.optimizer.zero_grad()
                loss.backward(retain_graph=k < 2, inputs=self.params)
            self.optimizer.zero_grad()
            self.losses()[-1].backward(inputs=self.params)
            yield

    def textbook(self, every: int) -> Iterator[None]:
        """Gradient-Blending as one writes it in plain PyTorch."""
        decay, z, m, s, weights = 0.99, 0.0, torch.zeros(3), torch.zeros(3), torch.full((3,), 1 / 3)
        step = 0
        while True:
            losses = self.losses()
            if step % every == 0:
                v = [torch.autograd.grad(loss, self.params, retain_graph=True, allow_unused=True) for loss in losses]
                g = torch.autograd.grad(self.losses()[-1], self.params, allow_unused=True)
                pairs = [(t_p, g_p) for t_p, g_p in zip(v[-1], g)]
                c, d = torch.zeros(3), torch.zeros(3)
                for k in range(3):
                    for v_p, (t_p, g_p) in zip(v[k], pairs):
                        if v_p is not None and t_p is not None and g_p is not None:
                            c[k] += (g_p * v_p).sum()
                            d[k] += ((t_p - g_p) * v_p).sum()
                for p, *v_p in zip(self.params, *v):
                    present = [w * x for w, x in zip(weights, v_p) if x is not None]
                    p.grad = torch.stack(present).sum(0) if present else None
                z = decay * z + 1 - decay
                m, s = decay * m + (1 - decay) * c, decay * s + (1 - decay) * d.square()
                a = (m / z).clamp(min=0) / (s / z + 1e-12)
                weights = a / a.sum() if a.sum() > 0 else weights
            else:
                (weights * torch.stack(losses)).sum().backward()
            step += 1
            yield

    def torchjd(self) -> Iterator[None]:
        """UPGrad on the encoders' Jacobian, as TorchJD's multi-task example has it."""
        from torchjd.aggregation import UPGrad
        from torchjd.autojac import jac_to_grad, mtl_backward

        aggregator = UPGrad()
        shared = [*self.model.audio.parameters(), *self.model.image.parameters()]
        while True:
            batch = self.next()
            features = self.model.features(batch)
            mtl_backward(self.model.losses(features, batch[2]), features=features)
            jac_to_grad(shared, aggregator)
            yield

    def implementations(self) -> dict[str, Callable[[], Iterator[None]]]:
        return {
            "uniform weights": self.uniform,
            "GradBlend, every=10": lambda: self.gradblend(10),
            "GradBlend, every=1": lambda: self.gradblend(1),
            "its backward passes alone": self.passes,
            "plain PyTorch, every=10": lambda: self.textbook(10),
            "plain PyTorch, every=1": lambda: self.textbook(1),
            "TorchJD mtl_backward": self.torchjd,
        }


def seconds(bench: Bench, running: Iterator[None], steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        bench.optimizer.zero_grad()
        next(running)
        bench.optimizer.step()
    return (time.perf_counter() - started) / steps


def commit() -> str:
    """The commit of the clone that this file is in, with `-dirty` if files have changed since."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
    ended = subprocess.run(command, capture_output=True, text=True)
    return ended.stdout.strip() or "unknown"


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its peak."""
    status = pathlib.Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(field))


def peak(name: str, arguments: list[str]) -> float:
    """MiB that 3 steps of an implementation add to a process, the optimiser's state included."""
    command = [sys.executable, __file__, *arguments, "--peak-of", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small images, one round: whether all runs, not how fast")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch [default: its own]")
    parser.add_argument("--json", type=pathlib.Path, help="write raw results to this file")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1 or (options.threads or 1) < 1:
        parser.error("--rounds and --threads are at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    size, batch = (32, 2) if options.quick else (64, 8)
    bench = Bench(size, batch)
    if options.peak_of:
        before = memory("VmRSS")
        seconds(bench, bench.implementations()[options.peak_of](), 3)
        print(memory("VmHWM") - before)
        return

    if options.json:
        options.json.touch()  # an unwritable path is an error now, not after minutes
    running = {name: make() for name, make in bench.implementations().items()}
    times_of: dict[str, list[float]] = {name: [] for name in running}
    rounds = 1 if options.quick else options.rounds
    for index in range(rounds + 1):
        for name, steps in running.items():
            taken = seconds(bench, steps, STEPS)
            if index > 0 or options.quick:  # the first round warms up
                times_of[name].append(taken)
        print(f"round {index} of {rounds}", file=sys.stderr)
    arguments = ["--quick"] if options.quick else []
    arguments += ["--threads", str(torch.get_num_threads())]
    peaks = {name: peak(name, arguments) for name in running}
    machine: dict[str, Any] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "gradblend": gradblend.__version__,
        "images": [batch, 3, size, size],
    }
    print(f"\n{machine['processor']}, {machine['threads']} threads, PyTorch {machine['torch']}, {machine['date']}\n")
    print("| implementation | ms a step | over uniform | over its passes | peak MiB |")
    print("|---|---:|---:|---:|---:|")
    for name, times in times_of.items():
        bases = (times_of[base] for base in ("uniform weights", "its backward passes alone"))
        uniform, alone = (statistics.median(a / b for a, b in zip(times, base)) for base in bases)
        print(f"| {name} | {statistics.median(times) * 1e3:.0f} | {uniform:.2f} | {alone:.2f} | {peaks[name]:.0f} |")
    if options.json:
        result = {"machine": machine, "seconds": times_of, "peak_mib": peaks}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
