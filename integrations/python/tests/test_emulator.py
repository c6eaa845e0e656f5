"""The CUDA path without torch's CUDA, on the emulator of the driver: `cargo xtask ci python` runs it."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import gradblend
import numpy as np
import pytest
from gradblend import Blender, Error, TensorGrads

if os.environ.get("GRADBLEND_REQUIRE_EMULATOR") != "1":
    pytest.skip("skipped: no emulator of the CUDA driver", allow_module_level=True)


class DLTensor(ctypes.Structure):
    """A DLManagedTensor of DLPack before 1.0, flat."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class DeviceArray:
    """Memory that the emulator's device reads: that of the host."""

    def __init__(self, values: list[float], device: int = 0) -> None:
        self.array, self.device, self.shape = np.array(values, dtype=np.float32), device, (ctypes.c_int64 * 1)(len(values))

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device

    def __dlpack__(self, stream: int | None = None) -> Any:
        assert stream == -1  # the caller orders the work
        self.record = DLTensor(self.array.ctypes.data, 2, self.device, 1, 2, 32, 1, self.shape, None, 0, None, None)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.record), b"dltensor", None)


def example(array: Any) -> tuple[list[TensorGrads], Any]:
    blended = array([0, 0])
    return [TensorGrads(array([1, 2]), array([1, 1]), [array([1, 0.5]), array([0.5, 1])], blended)], blended


def test_a_step_and_its_state() -> None:
    blender = Blender(2, device="cuda")
    assert blender.device == 0
    tensors, blended = example(DeviceArray)
    plan = blender.plan(tensors)
    blender.step(plan)
    blender.reweight()
    assert blender.report().weights == pytest.approx((0.8, 0.2)) and blended.array.tolist() == [0.75, 0.75]
    tensors, blended = example(DeviceArray)
    plan.update(tensors)
    blender.blend(plan)
    assert blender.report().observed == 1 and blended.array.tolist() == pytest.approx([0.9, 0.6])

    cpu = Blender(2)
    cpu.load(blender.save())
    assert cpu.report() == blender.report() and cpu.second_moments() == blender.second_moments()
    blender.set_weights([0.25, 0.75])
    assert blender.report().weights == (0.25, 0.75)  # waits for the device
    interface = blender.weights.__cuda_array_interface__
    assert interface["shape"] == (2,) and interface["typestr"] == "<f4"
    assert list((ctypes.c_float * 2).from_address(interface["data"][0])) == [0.25, 0.75]
    assert not hasattr(blender.weights, "__array_interface__")


def test_arrays_elsewhere() -> None:
    blender = Blender(1, device=0)
    for other in (lambda values: np.array(values, dtype=np.float32), lambda values: DeviceArray(values, device=1)):
        with pytest.raises(Error, match="tensor 0: "):
            blender.plan([TensorGrads(DeviceArray([1]), DeviceArray([1]), [other([1])])])
    with pytest.raises(Error) as caught:
        Blender(1, device="cuda:77")
    assert caught.value.status == gradblend.Status.NO_DEVICE
