#!/usr/bin/env python3
"""GradBlend in a LightningModule with manual optimisation, on the six views of handwritten digits of late_fusion.py.

    python examples/lightning_late_fusion.py [--epochs N]

Writes weights, ratios and skipped observations to lightning_logs/version_N/metrics.csv. Needs lightning.
"""

from __future__ import annotations

import argparse
import itertools

import lightning.pytorch as pl
import torch
from gradblend import GradBlend
from gradblend.lightning import GradBlendCallback
from late_fusion import VIEWS, Network, Task
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class LateFusion(pl.LightningModule):
    def __init__(self, sizes: list[int], held_out: TensorDataset) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network, self.held_out = Network(sizes), held_out

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Here the module is on its device.
        self.gb = GradBlend(self.named_parameters(), num_losses=len(VIEWS) + 1, every=5)
        loader = DataLoader(self.held_out, batch_size=60, shuffle=True)
        self.held_out_batches = itertools.chain.from_iterable(itertools.repeat(loader))
        return torch.optim.Adam(self.parameters(), lr=2e-3)

    def losses(self, batch: list[Tensor]) -> list[Tensor]:
        *views, labels = (tensor.to(self.device) for tensor in batch)
        return self.network.losses(views, labels)

    def training_step(self, batch: list[Tensor], _: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.gb.backward(self.losses(batch), held_out=lambda: self.losses(next(self.held_out_batches))[-1])
        optimizer.step()

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        *views, labels = batch
        accuracy = (self.network(views)[-1].argmax(1) == labels).float().mean()
        self.log("test_accuracy", accuracy, prog_bar=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error("--epochs is at least 1")
    pl.seed_everything(0)
    task = Task(seed=0, nuisance=None, noise=1.5)
    train, held_out, test = (TensorDataset(*views, labels) for views, labels in (task.train, task.held_out, task.test))
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        callbacks=[GradBlendCallback(names=[*VIEWS, "fused"])],
        logger=CSVLogger(".", name="lightning_logs"),
        log_every_n_steps=5,
        accelerator="auto",
        devices=1,
    )
    module = LateFusion(task.sizes, held_out)
    trainer.fit(module, DataLoader(train, batch_size=40, shuffle=True), DataLoader(test, batch_size=340))
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in zip([*VIEWS, "fused"], module.gb.weights.tolist()))
    print(f"weights: {weights}")


if __name__ == "__main__":
    main()
