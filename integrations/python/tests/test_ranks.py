"""`GradBlend` on several ranks, which are processes on this machine with the backend gloo."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest
import torch
from gradblend import Error, GradBlend
from ranks import MISSING, SCENARIOS

HERE = pathlib.Path(__file__).parent


def launch(count: int, *last: str, seconds: int = 600) -> tuple[list[int], list[dict[str, str]]]:
    """Starts the ranks, and returns their exit codes and the outcome of each scenario. None is left running."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "ranks.py"), folder]
        ranks = [subprocess.Popen([*command, str(rank), str(count), *last], env=environment) for rank in range(count)]
        try:
            codes = [rank.wait(seconds) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        files = [pathlib.Path(folder, f"{rank}.json") for rank in range(count)]
        return codes, [json.loads(file.read_text()) if file.exists() else {} for file in files]


@functools.cache
def outcomes(count: int) -> tuple[dict[str, str], ...]:
    return tuple(launch(count)[1])


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_ranks(scenario: str, count: int) -> None:
    for rank, outcome in enumerate(outcomes(count)):
        assert outcome.get(scenario, "not reached") == "", f"rank {rank}: {outcome.get(scenario, 'not reached')}"


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in MISSING])
def test_a_rank_that_is_missing(scenario: str) -> None:
    codes, found = launch(3, scenario, seconds=60)
    for rank in range(2):
        assert codes[rank] == 0 and found[rank].get(scenario) == "", (rank, codes, found)
    assert codes[2] == (3 if scenario == "dies" else 0)


def test_groups() -> None:
    params = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(Error, match="is not initialized"):
        GradBlend(params, num_losses=1, process_group=object())
