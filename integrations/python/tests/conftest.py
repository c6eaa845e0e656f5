"""Devices of the tests: the CPU, and a GPU where there is one."""

from __future__ import annotations

import os

import gradblend
import pytest
import torch


def _cuda() -> str | None:
    """Why no test runs on a GPU, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        gradblend.Blender(1, device="cuda")
    except gradblend.Error as error:
        return str(error)
    return None


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """With GRADBLEND_REQUIRE_CUDA=1 a missing GPU is an error."""
    reason = _cuda() if request.param == "cuda" else None
    if reason is not None:
        if os.environ.get("GRADBLEND_REQUIRE_CUDA") == "1":
            pytest.fail(reason)
        pytest.skip(f"skipped: {reason}")
    return str(request.param)
