"""Gradient-Blending for multi-modal networks: loss weights from how each modality overfits.

`GradBlend` is what a PyTorch trainer calls in place of `loss.backward()`. `Blender` has the operations that it is made
of, on torch tensors and any other DLPack arrays; `solve` and `gb_estimate` find weights from moments and from losses.

Source: Wang, Tran, Feiszli, "What Makes Training Multi-Modal Classification Networks Hard?", CVPR 2020.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._library import Error, ExchangeError, Flags, Status, version
from .blender import Blender, DeviceArray, Pass, Plan, Report, TensorGrads
from .losses import Estimate, Losses, MeanLoss, Solution, Trainee, gb_estimate, ogr, solve
from .schedule import Schedule

if TYPE_CHECKING:
    from .trainer import GradBlend as GradBlend

__all__ = [
    "Blender",
    "DeviceArray",
    "Error",
    "Estimate",
    "ExchangeError",
    "Flags",
    "GradBlend",
    "Losses",
    "MeanLoss",
    "Pass",
    "Plan",
    "Report",
    "Schedule",
    "Solution",
    "Status",
    "TensorGrads",
    "Trainee",
    "gb_estimate",
    "ogr",
    "solve",
]
__version__ = version()


def __getattr__(name: str) -> Any:
    # The only part that needs torch, which takes seconds to import.
    if name == "GradBlend":
        from .trainer import GradBlend

        return GradBlend
    raise AttributeError(f"module 'gradblend' has no attribute {name!r}")
