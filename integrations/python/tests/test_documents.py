"""The code of the README and of docs/pytorch.md runs: each diff in its old form and in its new one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pathlib
import re
from typing import Any

import gradblend
import pytest
import torch
from gradblend._library import Options, Policy
from torch.utils.data import TensorDataset

PACKAGE = pathlib.Path(__file__).parents[1]
README = (PACKAGE / "README.md").read_text()
PAGE = (PACKAGE / "../../docs/pytorch.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def side(diff: str, sign: str) -> str:
    """The lines of a diff that one side has."""
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] in (sign, " ", ""))


def run(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, "document", "exec"), names)


@pytest.fixture
def program() -> dict[str, Any]:
    """The names of the page's program, after it has run."""
    names: dict[str, Any] = {}
    run(side(blocks(PAGE, "diff")[0], "+"), names)
    return names


def test_the_program_before_and_after() -> None:
    run(side(blocks(PAGE, "diff")[0], "-"), {})
    names: dict[str, Any] = {}
    run(side(blocks(PAGE, "diff")[0], "+"), names)
    assert names["gb"].observations == 3 and names["gb"].weights.tolist() != [1 / 3] * 3


@pytest.mark.parametrize("index", range(1, len(blocks(PAGE, "diff"))))
@pytest.mark.parametrize("sign", ["-", "+"])
def test_variants(program: dict[str, Any], index: int, sign: str, tmp_path: pathlib.Path) -> None:
    names = {**program, "path": tmp_path / "checkpoint.pt", "Schedule": gradblend.Schedule}
    observed = program["gb"].observations
    run(side(blocks(PAGE, "diff")[index], sign), names)
    if sign == "+" and names["gb"] is not program["gb"]:
        assert names["gb"].observations > 0
    elif sign == "-":
        assert program["gb"].observations == observed


def test_readme(program: dict[str, Any]) -> None:
    names = {**program, "gradblend": gradblend, "dataset": TensorDataset(torch.randn(40, 20), torch.randn(40, 30))}
    (held_out,) = blocks(README, "python")
    run(held_out, names)
    first, second = next(names["held_out_batches"]), next(names["held_out_batches"])
    assert len(first[0]) == len(second[0]) == 4
    names.update({key: program[key] for key in ("batches", "held_out_batches")}, losses=lambda _, batch: program["losses"](batch))
    run(side(blocks(README, "diff")[0], "+"), names)
    assert names["gb"].observations == 1


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 100


def test_the_table_names_all_options() -> None:
    known = {*inspect.signature(gradblend.GradBlend).parameters, *Options.__annotations__, *Policy.__annotations__}
    rows = re.findall(r"^\| (`\w+.*?) \|", README.split("| option |")[1].split("\n\n")[0], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)", row)} - {"backward"}
    assert named - known == set()
    assert known - named == {"params", "num_losses", "options"}


@pytest.mark.parametrize("name", ["losses", "schedule"])
def test_docstrings(name: str) -> None:
    tried = doctest.testmod(importlib.import_module(f"gradblend.{name}"))
    assert tried.attempted > 0 and tried.failed == 0
