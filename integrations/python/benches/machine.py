"""The machine that a benchmark runs on."""

from __future__ import annotations

import pathlib
import platform


def processor() -> str:
    """Name of the processor."""
    text = pathlib.Path("/proc/cpuinfo").read_text()
    return next((line.split(": ")[1] for line in text.splitlines() if line.startswith("model name")), platform.processor())
