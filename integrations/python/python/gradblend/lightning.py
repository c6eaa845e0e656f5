"""A callback for Lightning that logs what GradBlend finds, ends its super-epochs, and keeps it in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._library import Error
from .trainer import GradBlend

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl  # type: ignore[no-redef]  # the same library under its older name

__all__ = ["GradBlendCallback"]


class GradBlendCallback(pl.Callback):
    """For a LightningModule with manual optimisation that makes its `GradBlend` in `configure_optimizers`, where it is on
    its device. With `precision="16-mixed"`, give it `scaler=self.trainer.precision_plugin.scaler`.

    After each observation it logs, to all loggers of the trainer, `gradblend/weight/NAME` and `gradblend/ogr/NAME` of
    each loss, `gradblend/ogr_blend`, `gradblend/ogr_uniform` and `gradblend/skipped`. At the end of each epoch it calls
    `GradBlend.end_epoch`. Checkpoints have the state of GradBlend.

    Args:
        names: Of the losses, in their order. By default their numbers.
        attribute: Name of the module's attribute that is the `GradBlend`.
    """

    def __init__(self, names: Sequence[str] | None = None, attribute: str = "gb") -> None:
        self._names, self._attribute = names, attribute
        self._gb: GradBlend | None = None
        self._loaded: dict[str, Any] | None = None
        self._logged = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gb = getattr(pl_module, self._attribute, None)
        if not isinstance(gb, GradBlend):
            raise Error(f"{type(pl_module).__name__}.{self._attribute} is {type(gb).__name__}, expected GradBlend")
        if pl_module.automatic_optimization:
            raise Error(f"{type(pl_module).__name__}.automatic_optimization is True, expected False: call backward and step")
        k = gb.blender.modalities
        if self._names is not None and len(self._names) != k:
            raise Error(f"names has {len(self._names)} entries, expected {k}")
        if self._loaded is not None:
            gb.load_state_dict(self._loaded)
            self._loaded = None
        self._gb, self._logged = gb, gb.observations

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._gb is None or self._gb.observations == self._logged:
            return
        self._logged = self._gb.observations
        report = self._gb.report()
        names = self._names or [str(k) for k in range(len(report.weights))]
        values = {f"gradblend/weight/{name}": weight for name, weight in zip(names, report.weights)}
        values |= {f"gradblend/ogr/{name}": ratio for name, ratio in zip(names, report.ogr)}
        for name in ("ogr_blend", "ogr_uniform", "skipped"):
            values[f"gradblend/{name}"] = getattr(report, name)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._gb is not None:
            self._gb.end_epoch(trainer.current_epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"gradblend": self._loaded if self._gb is None else self._gb.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning restores callbacks before it calls configure_optimizers, so there is no GradBlend yet.
        self._loaded = state_dict.get("gradblend")
