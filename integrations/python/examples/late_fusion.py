#!/usr/bin/env python3
"""Trains a late-fusion network on six views of handwritten digits with the fused loss alone, with uniform weights, and with
GradBlend at each step and at every tenth.

    python examples/late_fusion.py [--nuisance shortcut] [--seeds N] [--plot FILE] [--json FILE]

Prints test accuracies and final weights, and plots the weights over the steps. Needs torch; the plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import pathlib
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from gradblend import GradBlend
from torch import Tensor, nn
from torch.nn import functional as F

DATA = pathlib.Path(__file__).parent / "data"
VIEWS = ["fou", "fac", "kar", "pix", "zer", "mor"]
TRAINING, HELD_OUT = 200, 60  # of 600; the rest is for the test
METHODS = ["naive", "uniform", "gradblend, every=1", "gradblend, every=10"]


def load(names: list[str]) -> tuple[list[Tensor], Tensor]:
    """Each view, [600, features], and the labels."""
    views, labels = [], torch.empty(0)
    for view in names:
        with gzip.open(DATA / f"{view}.csv.gz", "rt") as file:
            table = torch.tensor([[float(cell) for cell in row] for row in csv.reader(file)])
        views.append(table[:, :-1])
        labels = table[:, -1].long()
    return views, labels


class Task:
    """A split of the digits, with noise on all features, and what a nuisance modality adds."""

    def __init__(self, seed: int, nuisance: str | None, noise: float, names: list[str] = VIEWS) -> None:
        views, labels = load(names)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=generator)
        train, held, test = order.split([TRAINING, HELD_OUT, len(order) - TRAINING - HELD_OUT])
        scaled = []
        for view in views:
            mean, std = view[train].mean(0), view[train].std(0).clamp(min=1e-3)
            scaled.append((view - mean) / std + noise * torch.randn(view.shape, generator=generator))
        if nuisance is not None:
            extra = torch.randn(len(labels), 20, generator=generator)
            if nuisance == "shortcut":  # the label in training samples, any other label in the others
                shown = torch.randint(10, labels.shape, generator=generator)
                shown[train] = labels[train]
                extra += 10 * F.one_hot(shown, 20)
            scaled.append(extra)
        self.sizes = [view.shape[1] for view in scaled]
        self.train, self.held_out, self.test = (([view[rows] for view in scaled], labels[rows]) for rows in (train, held, test))


class Network(nn.Module):
    """An encoder and a head for each view, and a head on all features."""

    def __init__(self, sizes: list[int], width: int = 24) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Sequential(nn.Linear(size, width), nn.ReLU()) for size in sizes)
        self.heads = nn.ModuleList(nn.Linear(width, 10) for _ in sizes)
        self.fused = nn.Linear(width * len(sizes), 10)

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        features = [encoder(view) for encoder, view in zip(self.encoders, views)]
        return [*(head(x) for head, x in zip(self.heads, features)), self.fused(torch.cat(features, dim=1))]

    def losses(self, views: list[Tensor], labels: Tensor) -> list[Tensor]:
        return [F.cross_entropy(logits, labels) for logits in self(views)]


def batches(data: tuple[list[Tensor], Tensor], size: int, generator: torch.Generator) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Batches of all samples in random order, again and again."""
    views, labels = data
    while True:
        for rows in torch.randperm(len(labels), generator=generator).split(size):
            yield [view[rows] for view in views], labels[rows]


def train(method: str, task: Task, seed: int, epochs: int, min_fused: float) -> dict[str, Any]:
    """Test accuracy of the fused head, the weights after each step, and seconds."""
    torch.manual_seed(seed)
    model = Network(task.sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    k = len(task.sizes) + 1
    generator = torch.Generator().manual_seed(seed)
    train_batches, held_out_batches = batches(task.train, 40, generator), batches(task.held_out, 60, generator)
    gb = None
    if method.startswith("gradblend"):
        every = int(method.rpartition("=")[2])
        floors = [0.0] * (k - 1) + [min_fused]
        gb = GradBlend(model.named_parameters(), num_losses=k, every=every, min_weight=floors)

    weights, started = [], time.perf_counter()
    for _ in range(epochs * TRAINING // 40):
        losses = model.losses(*next(train_batches))
        optimizer.zero_grad()
        if gb is not None:
            gb.backward(losses, held_out=lambda: model.losses(*next(held_out_batches))[-1])
            weights.append(gb.weights.tolist())
        else:
            (losses[-1] if method == "naive" else sum(losses, torch.zeros(())) / k).backward()
        optimizer.step()
    taken = time.perf_counter() - started
    with torch.no_grad():
        accuracy = (model(task.test[0])[-1].argmax(1) == task.test[1]).float().mean().item()
    return {"accuracy": accuracy, "weights": weights, "seconds": taken}


def plot(path: pathlib.Path, names: list[str], runs: dict[str, list[dict[str, Any]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = [method for method in METHODS if method.startswith("gradblend")]
    figure, axes = pyplot.subplots(1, len(methods), figsize=(11, 4), sharey=True, layout="constrained")
    for axis, method in zip(axes, methods):
        # Mean over the seeds.
        series = torch.tensor([run["weights"] for run in runs[method]]).mean(0)
        for k, name in enumerate(names):
            axis.plot(series[:, k], label=name, linewidth=2 if name == "fused" else 1)
        axis.set(title=method, xlabel="step", ylim=(0, None))
    axes[0].set_ylabel("weight, mean of all seeds")
    axes[-1].legend(fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="[4]")
    parser.add_argument("--epochs", type=int, help="[40]")
    parser.add_argument("--noise", type=float, default=1.5, help="standard deviation of the noise on all features [1.5]")
    parser.add_argument("--views", default=",".join(VIEWS), help="views to use [all: %(default)s]")
    parser.add_argument("--nuisance", choices=["noise", "shortcut"], help="add a bad modality")
    parser.add_argument("--min-fused", type=float, default=0.0, help="least weight of the fused loss [0]")
    parser.add_argument("--plot", type=pathlib.Path, help="write a plot of the weights (SVG, PNG or PDF)")
    parser.add_argument("--json", type=pathlib.Path, help="write all runs")
    parser.add_argument("--quick", action="store_true", help="by default 1 seed of 10 epochs")
    options = parser.parse_args()
    seeds, epochs = (1, 10) if options.quick else (4, 40)
    options.seeds = seeds if options.seeds is None else options.seeds
    options.epochs = epochs if options.epochs is None else options.epochs
    if options.seeds < 1 or options.epochs < 1:
        parser.error("--seeds and --epochs are at least 1")
    views = options.views.split(",")
    if not set(views) <= set(VIEWS) or len(set(views)) < len(views):
        parser.error(f"--views is {options.views}, expected some of {','.join(VIEWS)}, each once")
    if not 0 <= options.noise < float("inf"):
        parser.error("--noise is a number from 0")
    if not 0 <= options.min_fused < 1:
        parser.error("--min-fused is in [0, 1)")
    if options.plot and options.plot == options.json:
        parser.error("--plot and --json are the same file")
    try:
        if options.plot:
            from matplotlib.backend_bases import FigureCanvasBase

            kinds = FigureCanvasBase.get_supported_filetypes()
            if options.plot.suffix[1:] not in kinds:
                parser.error(f"--plot is {options.plot}, expected a name that ends in one of {', '.join(sorted(kinds))}")
        for path in filter(None, (options.plot, options.json)):
            path.open("ab").close()
    except (OSError, ImportError) as error:
        parser.error(str(error))

    names = [*views, *([options.nuisance] if options.nuisance else []), "fused"]
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for seed in range(options.seeds):
        task = Task(seed, options.nuisance, options.noise, views)
        for method in METHODS:
            runs[method].append(train(method, task, seed, options.epochs, options.min_fused))
        print(f"seed {seed + 1} of {options.seeds}", file=sys.stderr)

    print(f"| method | test accuracy | minus naive | minus uniform | seconds | final weights ({', '.join(names)}) |")
    print("|---|---|---|---|---:|---|")
    for method in METHODS:
        accuracies = [run["accuracy"] for run in runs[method]]
        cells = [method, spread(accuracies)]
        for other in ("naive", "uniform"):
            # Differences of the same seed.
            pairs = zip(accuracies, (run["accuracy"] for run in runs[other]))
            cells.append("" if method == other else spread([a - b for a, b in pairs], sign="+", of_mean=True))
        cells.append(f"{statistics.mean(run['seconds'] for run in runs[method]):.1f}")
        last = [run["weights"][-1] for run in runs[method] if run["weights"]]
        cells.append(", ".join(f"{statistics.mean(column):.2f}" for column in zip(*last)))
        print("| " + " | ".join(cells) + " |")
    try:
        if options.json:
            options.json.write_text(json.dumps({"losses": names, "runs": runs}) + "\n")
        if options.plot:
            plot(options.plot, names, runs)
            print(f"weights over the steps: {options.plot}", file=sys.stderr)
    except OSError as error:
        sys.exit(f"error: {error}")


def spread(values: list[float], sign: str = "", of_mean: bool = False) -> str:
    """Mean and, of several seeds, standard deviation or standard error of the mean."""
    if len(values) == 1:
        return f"{values[0]:{sign}.3f}"
    deviation = statistics.stdev(values)
    return f"{statistics.mean(values):{sign}.3f} ± {deviation / (len(values) ** 0.5 if of_mean else 1):.3f}"


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the end of `late_fusion.py | head` is no traceback
    main()
