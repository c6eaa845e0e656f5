#!/usr/bin/env python3
"""Gradient-Blending from Python without a build step: the shared library by ctypes, arrays by DLPack.

    cargo rustc --release --features capi --crate-type cdylib
    python3 examples/python/step.py [--torch] [--device N]

Arrays are from numpy (1.23 or later) or, with --torch, from PyTorch, which may be on a GPU. Any object with
`__dlpack__` works.
"""

import argparse
import ctypes as c
import pathlib
import signal

K = 2  # modalities
LIBRARY = str(pathlib.Path(__file__).parents[2] / "target/release/libgradblend.so")


class Config(c.Structure):
    _fields_ = [(name, c.c_uint32) for name in ("size", "modalities")]
    _fields_ += [(name, c.c_int32) for name in ("average", "overfitting", "negative", "cadence")]
    _fields_ += [("threads", c.c_uint32), ("reserved", c.c_uint32), ("decay", c.c_double), ("damping", c.c_double)]
    _fields_ += [("min_weight", c.c_double * 32)]


class Tensor(c.Structure):
    _fields_ = [("len", c.c_uint64), ("dtype", c.c_int32), ("train", c.c_void_p), ("valid", c.c_void_p)]
    _fields_ += [("modalities", c.POINTER(c.c_void_p)), ("blended", c.c_void_p)]


class Report(c.Structure):
    _fields_ = [("size", c.c_uint32), ("modalities", c.c_uint32), ("observed", c.c_uint64), ("skipped", c.c_uint64)]
    _fields_ += [("flags", c.c_uint32), ("nonfinite", c.c_uint32)]
    _fields_ += [(name, c.c_double * 32) for name in ("weights", "mean", "second_moment", "ogr")]
    _fields_ += [("ogr_blend", c.c_double), ("ogr_uniform", c.c_double), ("floored", c.c_uint32)]
    _fields_ += [("reserved", c.c_uint32), ("effective", c.c_double), ("standard_error", c.c_double * 32)]


class Dlpack(c.Structure):
    """A DLPack array, and the capsule that keeps it alive."""

    _fields_ = [("managed", c.c_void_p), ("versioned", c.c_void_p)]

    def __init__(self, array=None):
        super().__init__()
        if array is None:
            return
        try:
            self.capsule = array.__dlpack__(max_version=(1, 0))
        except TypeError:  # older than DLPack 1.0
            self.capsule = array.__dlpack__()
        name = c.pythonapi.PyCapsule_GetName
        pointer = c.pythonapi.PyCapsule_GetPointer
        name.restype, name.argtypes = c.c_char_p, [c.py_object]
        pointer.restype, pointer.argtypes = c.c_void_p, [c.py_object, c.c_char_p]
        kind = name(self.capsule)
        field = {b"dltensor": "managed", b"dltensor_versioned": "versioned"}[kind]
        setattr(self, field, pointer(self.capsule, kind))


class Gradblend:
    """The library. A call that fails raises RuntimeError with the library's message."""

    # Parameter types of the functions used here, as in gradblend.h.
    CALLS = {
        "config_default": [c.c_uint32, c.c_void_p],
        "blender_create": [c.c_int32, c.c_void_p, c.c_void_p],
        "plan_create": [c.c_void_p, c.c_void_p, c.c_uint64, c.c_void_p],
        "step": [c.c_void_p, c.c_void_p, c.c_void_p],
        "reweight": [c.c_void_p, c.c_void_p],
        "get_report": [c.c_void_p, c.c_void_p, c.c_void_p],
        "tensor_from_dlpack": [c.c_int32, c.c_uint32] + [c.c_void_p] * 6,
    }

    def __init__(self, path):
        library = c.CDLL(path)
        for name, parameters in self.CALLS.items():
            function = getattr(library, "gradblend_" + name)
            function.argtypes, function.restype = parameters, self.check
            setattr(self, name, function)
        for name in ("blender_destroy", "plan_destroy"):
            function = getattr(library, "gradblend_" + name)
            function.argtypes, function.restype = [c.c_void_p], None
            setattr(self, name, function)
        self.last_error = library.gradblend_last_error
        self.last_error.argtypes, self.last_error.restype = [c.c_char_p, c.c_size_t], c.c_size_t

    def check(self, status):
        if status != 0:
            message = c.create_string_buffer(512)
            self.last_error(message, len(message))
            raise RuntimeError(message.value.decode())

    def tensor(self, device, train, valid, gradients, blended):
        """A Tensor from arrays, which it keeps alive; None is an absent gradient."""
        if len(gradients) != K:
            raise ValueError(f"{len(gradients)} gradients, expected {K}; None is an absent one")
        t, g, *v, out = arrays = [Dlpack(array) for array in (train, valid, *gradients, blended)]
        listed, addresses, tensor = (Dlpack * K)(*v), (c.c_void_p * K)(), Tensor()
        t, g, out = map(c.byref, (t, g, out))
        self.tensor_from_dlpack(device, K, t, g, listed, out, addresses, c.byref(tensor))
        # The capsules own the arrays; copying the record does not copy them.
        tensor.alive = [arrays, addresses]
        return tensor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", default=LIBRARY, help=f"path of libgradblend.so (default: {LIBRARY})")
    parser.add_argument("--torch", action="store_true", help="use PyTorch arrays, not numpy arrays")
    parser.add_argument("--device", type=int, default=-1, help="a CUDA device; with --torch")
    options = parser.parse_args()
    try:
        gradblend = Gradblend(options.library)
    except OSError as error:
        parser.error(f"cannot load the library: {error}")
    if options.torch:
        import torch

        place = "cpu" if options.device < 0 else f"cuda:{options.device}"
        array = lambda values: torch.tensor(values, dtype=torch.float32, device=place)
    else:
        import numpy

        array = lambda values: numpy.array(values, dtype=numpy.float32)

    config, blender, plan, report = Config(), c.c_void_p(), c.c_void_p(), Report()
    gradblend.config_default(K, c.byref(config))
    # The library fills the fields of version 0.1.0; the others are zeros already.
    config.size, report.size = c.sizeof(Config), c.sizeof(Report)
    gradblend.blender_create(options.device, c.byref(config), c.byref(blender))

    # Gradients of one parameter: t, g, and v_k of two losses, in the shape of the framework.
    blended = array([[0, 0], [0, 0]])
    v = [array([[1, 0.5], [0, 0]]), array([[0.5, 1], [0, 0]])]
    shared = gradblend.tensor(options.device, array([[1, 2], [0, 0]]), array([[1, 1], [0, 0]]), v, blended)
    # A second parameter, which the second loss does not reach and which is only blended, in place.
    own = array([3, 4, 5])
    other = gradblend.tensor(options.device, None, None, [own, None], own)

    tensors = (Tensor * 2)(shared, other)  # copies the records; `shared` and `other` keep the arrays
    gradblend.plan_create(blender, tensors, 2, c.byref(plan))
    gradblend.step(blender, plan, None)
    gradblend.reweight(blender, None)
    gradblend.get_report(blender, c.byref(report), None)
    print("weights", report.weights[:K], "OGR", report.ogr[:K])
    print("blended", blended.tolist(), own.tolist())
    # c = (1.5, 1.5) and d = (0.5, 1), so the weights are as 1 / 0.25 to 1 / 1; the step blended with 1/2 each.
    assert max(abs(report.weights[0] - 0.8), abs(report.weights[1] - 0.2)) < 1e-9
    assert blended.tolist() == [[0.75, 0.75], [0, 0]] and own.tolist() == [1.5, 2, 2.5]

    try:
        gradblend.tensor(options.device, None, None, [v[0], v[1].T], None)
        raise AssertionError("arrays with their elements in different orders were accepted")
    except RuntimeError as error:
        print("rejected:", error)
    gradblend.plan_destroy(plan)
    gradblend.blender_destroy(blender)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the end of `step.py | head` is no traceback
    main()
