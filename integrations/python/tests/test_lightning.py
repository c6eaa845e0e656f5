"""The callback for Lightning."""

from __future__ import annotations

import csv
import itertools
import pathlib
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from gradblend import Error, GradBlend, Schedule
from gradblend.lightning import GradBlendCallback
from lightning.pytorch.loggers import CSVLogger
from networks import Network, batches, bits
from torch.utils.data import DataLoader


class Module(pl.LightningModule):
    def __init__(self, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network, self.schedule = Network(3), schedule

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.gb = GradBlend(self.named_parameters(), 3, every=2, schedule=self.schedule)
        return torch.optim.Adam(self.parameters())

    def training_step(self, pair: Any, _: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        batch, held_out = pair
        self.gb.backward(self.network.losses(batch), held_out=lambda: self.network.losses(held_out)[-1])
        optimizer.step()


def fit(module: Module, folder: pathlib.Path, epochs: int, resume: Any = None, **options: Any) -> pl.Trainer:
    stream = batches(3, 0)
    data = [(next(stream), next(stream)) for _ in range(6)]
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[GradBlendCallback(**options)],
        logger=CSVLogger(folder, name="log", version=epochs),
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=None), ckpt_path=resume)
    return trainer


def test_logs_each_observation(tmp_path: pathlib.Path) -> None:
    module = Module()
    fit(module, tmp_path, 1, names=["audio", "video", "fused"])
    with (tmp_path / "log/version_1/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 == module.gb.observations
    report = module.gb.report()
    for name, weight, ratio in zip(["audio", "video", "fused"], report.weights, report.ogr):
        assert float(rows[-1][f"gradblend/weight/{name}"]) == pytest.approx(weight)
        assert float(rows[-1][f"gradblend/ogr/{name}"]) == pytest.approx(ratio)
    assert float(rows[-1]["gradblend/skipped"]) == 0 and float(rows[-1]["gradblend/ogr_blend"]) > 0


def test_checkpoints_have_the_state(tmp_path: pathlib.Path) -> None:
    pl.seed_everything(1, verbose=False)
    once = Module()
    start = {name: value.clone() for name, value in once.state_dict().items()}
    fit(once, tmp_path, 2)

    first, second = Module(), Module()
    first.load_state_dict(start)
    fit(first, tmp_path, 1).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, tmp_path, 2, resume=tmp_path / "half.ckpt")
    assert bits(second.gb.state_dict()["blender"]) == bits(once.gb.state_dict()["blender"])
    assert second.gb.state_dict()["calls"] == once.gb.state_dict()["calls"] == 12
    for a, b in itertools.zip_longest(once.parameters(), second.parameters()):
        assert bits(a) == bits(b)


def test_ends_super_epochs(tmp_path: pathlib.Path) -> None:
    module = Module(Schedule.online(2, 1))
    fit(module, tmp_path, 1)
    assert module.gb.report().observed == 3 and module.gb.weights.tolist() == pytest.approx([1 / 3] * 3)
    module = Module(Schedule.online(2, 1))
    fit(module, tmp_path, 2)
    assert module.gb.report().observed == 0 and module.gb.weights.tolist() != pytest.approx([1 / 3] * 3)


def test_rejections(tmp_path: pathlib.Path) -> None:
    with pytest.raises(Error, match=r"Module\.blend is NoneType, expected GradBlend"):
        fit(Module(), tmp_path, 1, attribute="blend")
    with pytest.raises(Error, match="names has 1 entries, expected 3"):
        fit(Module(), tmp_path, 1, names=["audio"])
    automatic = Module()
    automatic.automatic_optimization = True
    with pytest.raises(Error, match=r"Module\.automatic_optimization is True, expected False"):
        fit(automatic, tmp_path, 1)
