"""The operations, on torch tensors and numpy arrays."""

from __future__ import annotations

import gc
import math
import pathlib
import re
import subprocess
import sys
import threading
import weakref
from typing import Any

import gradblend
import numpy as np
import pytest
import torch
from gradblend import Blender, Error, Flags, Pass, Status, TensorGrads
from gradblend._gradients import DTYPES
from gradblend._library import CHOICES, ffi, lib

HEADER = pathlib.Path(__file__).parents[3] / "include/gradblend.h"


def numpy_array(values: list[float]) -> Any:
    return np.array(values, dtype=np.float32)


def example(array: Any) -> tuple[list[TensorGrads], Any]:
    """c = (1.5, 1.5) and d = (0.5, 1), so the weights are as 1 / 0.25 to 1 / 1."""
    blended = array([0, 0])
    return [
        TensorGrads(array([1, 2]), array([1, 1]), [array([1, 0.5]), array([0.5, 1])], blended),
        TensorGrads(None, None, [array([3, 4, 5]), None]),
    ], blended


def test_step_on_torch_tensors_and_numpy_arrays(device: str) -> None:
    arrays = [lambda values: torch.tensor(values, dtype=torch.float32, device=device)]
    for array in [*arrays, numpy_array] if device == "cpu" else arrays:
        blender = Blender(2, device=device)
        tensors, blended = example(array)
        plan = blender.plan(tensors)
        blender.step(plan)
        blender.reweight()
        report = blender.report()
        assert report.weights == pytest.approx((0.8, 0.2)) and blended.tolist() == [0.75, 0.75]
        assert report.mean == (1.5, 1.5) and report.second_moment == (0.25, 1.0) and report.observed == 1
        assert blender.second_moments() == [[0.25, 0.5], [0.5, 1.0]]
        assert report.ogr == pytest.approx((1 / 3, 2 / 3)) and report.ogr_uniform == pytest.approx(0.5)
        assert report.standard_error == (math.inf, math.inf) and report.signal_to_noise == (0, 0)
        assert list(report.to_dict()) == list(report.__dataclass_fields__) and report.to_dict()["flags"] == []
        blender.blend(plan)
        assert blended.tolist() == pytest.approx([0.9, 0.6])


def test_passes_equal_the_step_and_a_state_moves(device: str) -> None:
    def array(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    one, other = Blender(2, device=device, decay=0.5), Blender(2, device=device, decay=0.5)
    for scale in (1, -2, 3):
        tensors, blended = example(lambda values: array(values) * scale)
        its, its_blended = example(lambda values: array(values) * scale)
        one.step(one.plan(tensors))
        plan = other.plan(its)
        other.dot(plan)
        sums = other.pending_sums.torch().tolist()
        assert sums == [1.5 * scale**2, 1.5 * scale**2, 0.5 * scale**2, scale**2]
        other.run(plan, Pass.BLEND)
        other.observe()
        assert other.save() == one.save() and torch.equal(blended, its_blended)
    third = Blender(2, decay=0.5)
    third.load(one.save())
    third.reweight()
    one.reweight()
    assert third.report() == one.report()
    third.reset()
    assert third.report().observed == 0 and third.report().weights == one.report().weights
    third.set_weights(np.array([0.25, 0.75]))
    assert third.weights.torch().tolist() == [0.25, 0.75]


def test_update_binds_other_arrays(device: str) -> None:
    blender = Blender(2, device=device)
    tensors, first = example(lambda values: torch.tensor(values, dtype=torch.float32, device=device))
    plan = blender.plan(tensors)
    again, second = example(lambda values: torch.tensor(values, dtype=torch.float32, device=device))
    plan.update(again)
    blender.blend(plan)
    assert first.tolist() == [0, 0] and second.tolist() == [0.75, 0.75]


def test_grad_scale(device: str) -> None:
    blender, scale = Blender(2, device=device), torch.full((), 4.0, device=device)
    tensors, _ = example(lambda values: torch.tensor(values, dtype=torch.float32, device=device))
    blender.set_grad_scale(scale.data_ptr())
    blender.step(blender.plan(tensors))
    assert blender.report().mean == (1.5 / 16, 1.5 / 16)
    blender.set_grad_scale(None)


def test_memory_outlives_what_made_it() -> None:
    weights = Blender(3).weights.torch()
    array = np.asarray(Blender(3).weights)
    arrays = [numpy_array([1, 2]) for _ in range(3)]
    blender = Blender(1)
    plan = blender.plan([TensorGrads(arrays[0], arrays[1], [arrays[2]])])
    references = [weakref.ref(array_) for array_ in arrays]
    del arrays
    gc.collect()
    assert all(reference() is not None for reference in references)
    owner = Blender(3)
    alive, kept = weakref.ref(owner), owner.weights.torch()
    del owner
    gc.collect()
    assert alive() is not None
    del kept
    gc.collect()
    assert alive() is None
    assert weights.tolist() == pytest.approx([1 / 3] * 3) and array.tolist() == pytest.approx([1 / 3] * 3)
    blender.dot(plan)
    assert blender.pending_sums.torch().tolist() == [5, 0]
    del blender
    gc.collect()
    with pytest.raises(Error):
        Blender(1).dot(plan)


def test_a_blender_that_is_dropped_ends_its_threads() -> None:
    def threads() -> int:
        status = pathlib.Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("Threads"))

    before = threads()
    blenders = [Blender(1, threads=3) for _ in range(5)]
    assert threads() >= before + 10
    del blenders
    gc.collect()
    assert threads() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: TensorGrads(a(2), a(2), [a(2), torch._neg_view(a(2))]), "tensor 1, modality 1 is a lazy negation"),
        (lambda a: TensorGrads(a(2), a(2), None), "tensor 1: modalities is NoneType, expected a list of 2"),
        (lambda a: TensorGrads(a(2), None, [a(2), None]), "tensor 1"),
        (lambda a: TensorGrads(a(2), a(2), [a(2)]), "tensor 1 has 1 modalities, expected 2"),
        (lambda a: TensorGrads(a(2), a(2), [a(2), a(3)]), "tensor 1: "),
        (lambda a: TensorGrads(a(2), a(2), [a(2), a(2).double()]), "tensor 1: "),
        (lambda a: TensorGrads(a(2), a(2), [a(2), a(2).half()]), "tensor 1: "),
        (lambda a: TensorGrads(a(2), a(2), [a(2), a(4)[::2]]), "tensor 1: "),
        (lambda a: TensorGrads(a(2), a(2), [a(2), [1.0, 2.0]]), "tensor 1, modality 1 is list, expected a tensor"),
        (
            lambda a: TensorGrads(a(2), a(2), [a(2), a(2).to_sparse()]),
            "tensor 1, modality 1 cannot be exported by DLPack",
        ),
        (lambda a: TensorGrads(a(2), a(2), [a(2), a(2)], np.broadcast_to(np.float32(1), 2)), "tensor 1"),
        (lambda a: TensorGrads(None, None, [None, None]), "tensor 1: "),
        (lambda a: a(2), "tensor 1 is Tensor, expected TensorGrads"),
        (lambda a: None, "tensor 1 is NoneType, expected TensorGrads"),
    ],
)
def test_rejections_name_the_tensor(change: Any, message: str) -> None:
    good = TensorGrads(*(torch.ones(2) for _ in range(2)), [torch.ones(2), None])
    with pytest.raises(Error) as caught:
        Blender(2).plan([good, change(torch.ones)])
    assert caught.value.status == Status.INVALID_ARGUMENT and message in str(caught.value), caught.value


def test_rejections_of_calls() -> None:
    blender = Blender(1)
    with pytest.raises(Error, match="tensors is TensorGrads, expected a list"):
        blender.plan(TensorGrads(None, None, [torch.ones(2)]))  # type: ignore[arg-type]
    with pytest.raises(Error, match="plan is NoneType, expected Plan"):
        blender.step(None)  # type: ignore[arg-type]
    with pytest.raises(Error, match="state is str, expected bytes"):
        blender.load("state")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected option 'decay', expected overfitting"):
        gradblend.solve([1], [[1]], decay=0.9)  # type: ignore[call-arg]
    with pytest.raises(Error, match="the losses of modality 1 are tuple, expected Losses"):
        gradblend.ogr([gradblend.Losses(1, 1)] * 2, [gradblend.Losses(1, 1), (1, 1)])  # type: ignore[list-item]
    with pytest.raises(Error, match="valid: expected 1 number"):
        gradblend.Losses(1, None)  # type: ignore[arg-type]


def test_solve_and_losses() -> None:
    assert gradblend.solve([1, 1], [[1, 0], [0, 3]]).weights == pytest.approx((0.75, 0.25))
    assert gradblend.solve(torch.tensor([2.0, 1.0]), np.eye(2)).weights == pytest.approx((2 / 3, 1 / 3))
    held = gradblend.solve([-1, -1], np.eye(2), in_force=[0.1, 0.9])
    assert held.weights == (0.1, 0.9) and Flags.HELD in held.flags
    assert gradblend.solve([3, 1], np.eye(2), min_weight=[0, 0.5]).weights == pytest.approx((0.5, 0.5))
    for m, s in (
        ([1, 2], [[1, 0]]),
        ([1], [[1, 0]]),
        ([1, 2], 3),
        (3, [[1]]),
        ([1, "x"], np.eye(2)),
        ([], []),
        ([math.nan], [[1]]),
    ):
        with pytest.raises(Error):
            gradblend.solve(m, s)
    before = [gradblend.Losses(2, 2)] * 2
    estimate = gradblend.ogr(before, [gradblend.Losses(1, 1.5), gradblend.Losses(0.5, 1.5)])
    assert estimate.weights == pytest.approx((0.8, 0.2)) and estimate.ogr == (1, 2)
    assert estimate.delta_g == (0.5, 0.5) and estimate.delta_o == (0.5, 1)
    with pytest.raises(Error, match="modality 1: losses are not finite"):
        gradblend.ogr(before, [gradblend.Losses(1, 1.5), gradblend.Losses(math.nan, 1)])
    mean = gradblend.MeanLoss()
    assert math.isnan(mean.mean())
    mean.add(1.0, 3)
    mean.add(5.0, 1)
    mean.add(math.nan, 0)
    assert mean.mean() == 2


class Trainee:
    """Modality k's training loss falls by k + 1 an epoch, and its validation loss by 1."""

    modalities = 2

    def __init__(self) -> None:
        self.state, self.fails = [5.0, 5.0], False

    def save(self) -> list[float]:
        return list(self.state)

    def restore(self, checkpoint: list[float]) -> None:
        self.state = list(checkpoint)

    def train_modality(self, modality: int, epochs: int) -> None:
        self.state[modality] -= epochs * (modality + 1)
        if self.fails:
            raise KeyError("broken")

    def losses(self, modality: int) -> gradblend.Losses:
        fallen = (5 - self.state[modality]) / (modality + 1)
        return gradblend.Losses(self.state[modality], 5 - 0.5 * fallen)


def test_gb_estimate() -> None:
    trainee = Trainee()
    estimate = gradblend.gb_estimate(trainee, 2)
    assert estimate.delta_g == (1, 1) and estimate.delta_o == (1, 3) and trainee.state == [5, 5]
    assert estimate.weights == pytest.approx((0.9, 0.1))
    trainee.fails = True
    with pytest.raises(KeyError, match="broken"):
        gradblend.gb_estimate(trainee, 2)
    assert trainee.state == [5, 5]
    with pytest.raises(Error, match="overfitting is"):
        gradblend.gb_estimate(trainee, 2, overfitting="x")  # type: ignore[arg-type]


def test_codes_are_those_of_the_header() -> None:
    codes = {name: int(value) for name, value in re.findall(r"GRADBLEND_([A-Z0-9_]+) = (\d+)", HEADER.read_text())}
    assert {status.name: int(status) for status in Status}.items() <= codes.items()
    assert {f"FLAG_{flag.name}": int(flag) for flag in Flags}.items() <= codes.items()
    assert {str(part.name): int(part) for part in Pass}.items() <= codes.items()
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    assert {name: DTYPES[dtype] for name, dtype in dtypes.items()}.items() <= codes.items()
    for names in CHOICES.values():
        assert {name.upper(): code for code, name in enumerate(names)}.items() <= codes.items()
    assert int(re.findall(r"GRADBLEND_MAX_MODALITIES (\d+)", HEADER.read_text())[0]) == lib.MAX_MODALITIES
    # Every status of the header has a name here.
    statuses = re.findall(r"GRADBLEND_([A-Z_]+) = \d", HEADER.read_text().split("GRADBLEND_OK = 0")[1].split("};")[0])
    assert set(statuses) == {status.name for status in Status}


def test_records_are_those_of_the_header(tmp_path: pathlib.Path) -> None:
    """Sizes and offsets of all fields, from a C compiler."""
    records = ["config", "tensor", "report", "dlpack"]
    fields = [(record, name) for record in records for name, _ in ffi.typeof(f"struct gradblend_{record}").fields]
    lines = [f'printf("%zu ", sizeof(gradblend_{record}));' for record in records]
    lines += [f'printf("%zu ", offsetof(gradblend_{record}, {name}));' for record, name in fields]
    source = tmp_path / "records.c"
    source.write_text('#include <stdio.h>\n#include "gradblend.h"\nint main(void) {' + "\n".join(lines) + "}")
    program = tmp_path / "records"
    subprocess.run(["cc", f"-I{HEADER.parent}", str(source), "-c", "-o", f"{program}.o"], check=True)
    # No call of the library is linked: the inline function of the header is left out.
    subprocess.run(["cc", f"{program}.o", "-o", str(program), "-Wl,--unresolved-symbols=ignore-all"], check=True)
    said = [int(word) for word in subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()]
    mine = [ffi.sizeof(f"struct gradblend_{record}") for record in records]
    mine += [ffi.offsetof(f"struct gradblend_{record}", name) for record, name in fields]
    assert said == mine


def test_version_and_import_without_torch() -> None:
    assert gradblend.__version__ == "{}.{}.{}".format(
        *(re.findall(rf"GRADBLEND_VERSION_{part} (\d+)", HEADER.read_text())[0] for part in ("MAJOR", "MINOR", "PATCH"))
    )
    code = "import sys; sys.modules['torch'] = None; import gradblend; gradblend.Blender(2).report(); gradblend.GradBlend"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1 and "import of torch halted" in ended.stderr
    with pytest.raises(AttributeError, match="no attribute 'Blend'"):
        gradblend.Blend  # type: ignore[attr-defined]  # noqa: B018


def test_threads_have_messages_of_their_own() -> None:
    messages: list[str] = []

    def reject(k: int) -> None:
        for _ in range(200):
            with pytest.raises(Error) as caught:
                Blender(2).set_weights([math.inf, k])
            messages.append(str(caught.value))

    threads = [threading.Thread(target=reject, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(messages) == 800 and len(set(messages)) == 1
