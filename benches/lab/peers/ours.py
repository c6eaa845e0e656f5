"""gradblend itself, called as Python would: its C interface (include/gradblend.h) by ctypes."""

import ctypes as c
import math

import torch

from base import Way
from check import Wrong
from inputs import DTYPES
from place import Skip


class Config(c.Structure):
    _fields_ = [(name, c.c_uint32) for name in ("size", "modalities")]
    _fields_ += [(name, c.c_int32) for name in ("average", "overfitting", "negative", "cadence")]
    _fields_ += [("threads", c.c_uint32), ("reserved", c.c_uint32), ("decay", c.c_double), ("damping", c.c_double)]


class Tensor(c.Structure):
    _fields_ = [("len", c.c_uint64), ("dtype", c.c_int32), ("train", c.c_void_p), ("valid", c.c_void_p)]
    _fields_ += [("modalities", c.c_void_p), ("blended", c.c_void_p)]


class Report(c.Structure):
    _fields_ = [("size", c.c_uint32), ("modalities", c.c_uint32), ("observed", c.c_uint64), ("skipped", c.c_uint64)]
    _fields_ += [("flags", c.c_uint32), ("nonfinite", c.c_uint32)]
    _fields_ += [(name, c.c_double * 32) for name in ("weights", "mean", "second_moment", "ogr")]
    _fields_ += [("ogr_blend", c.c_double), ("ogr_uniform", c.c_double)]


MEAN = 0  # GRADBLEND_MEAN


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


class Gradblend(Way):
    """One call of dot, blend or step, with plans made before."""

    name = "gradblend"
    role = "ours"
    library = None  # set by whoever has one

    @staticmethod
    def extra(case, layout):
        return max(layout.lengths) * layout.itemsize

    def prepare(self):
        if self.library is None:
            raise Skip("no --library")
        operation, k = self.case["operation"], self.layout.k
        self.function = getattr(self.library, "gradblend_" + operation)
        self.unsigned_d = operation == "step"
        self.plans = {}  # by the id of the inputs

        config = Config()
        self.call("config_default", c.c_uint32(k), c.byref(config))
        config.average = MEAN  # after one observation it is c
        config.threads = self.case["threads"]
        self.blender = c.c_void_p()
        device = c.c_int32(0 if self.place.cuda else -1)
        self.call("blender_create", device, c.byref(config), c.byref(self.blender))
        weights = (c.c_double * k)(*self.layout.weights)
        self.call("set_weights", self.blender, weights, c.c_uint32(k), self.stream())

    def stream(self):
        return c.c_void_p(torch.cuda.current_stream().cuda_stream) if self.place.cuda else None

    def call(self, name, *arguments):
        if getattr(self.library, "gradblend_" + name)(*arguments):
            self.fail(name)

    def fail(self, name):
        message = c.create_string_buffer(512)
        self.library.gradblend_last_error(message, c.c_size_t(512))
        raise Wrong(f"{name}: {message.value.decode()}")

    def plan(self, x):
        layout, k = self.layout, self.layout.k
        count = len(layout.lengths)
        dtype = list(DTYPES).index(layout.dtype_name)  # in the header's order
        gradients = (c.c_void_p * (count * k))(*(address(v[i]) for i in range(count) for v in x.v))
        tensors = (Tensor * count)()
        for i in range(count):
            tensors[i] = Tensor(
                len=layout.lengths[i],
                dtype=dtype,
                train=address(x.t[i]),
                valid=address(x.g[i]),
                modalities=c.addressof(gradients) + i * k * c.sizeof(c.c_void_p),
                blended=address(x.out[i]),
            )
        plan = c.c_void_p()
        self.call("plan_create", self.blender, tensors, c.c_uint64(count), c.byref(plan))
        return plan

    def run(self, x):
        plan = self.plans.get(id(x))
        if plan is None:
            plan = self.plans[id(x)] = self.plan(x)
        if self.function(self.blender, plan, self.stream()):
            self.fail(self.case["operation"])
        return None, None, x.out

    def read_sums(self, _c, _d):
        if self.case["operation"] == "dot":
            return self.pending_sums()
        # After one observation, the mean is c, and the second moment is d squared.
        k, report = self.layout.k, Report()
        self.call("get_report", self.blender, c.byref(report), self.stream())
        return report.mean[:k], [math.sqrt(moment) for moment in report.second_moment[:k]]

    def pending_sums(self):
        """Where the blender adds them up: on its device, c before d."""
        k = self.layout.k
        sums, count = c.POINTER(c.c_double)(), c.c_uint32()
        self.call("pending_sums", self.blender, c.byref(sums), c.byref(count))
        if self.place.cuda:
            on_device, sums = c.cast(sums, c.c_void_p), (c.c_double * (2 * k))()
            if self.place.driver.cuMemcpyDtoH_v2(sums, on_device, c.c_size_t(16 * k)):
                raise Wrong("the sums cannot be read")
        return sums[:k], sums[k : 2 * k]

    def bound(self, size, exact, n):
        return size * 2**-16  # as it promises

    def blend_roundings(self):
        return 1

    def close(self):
        for plan in self.plans.values():
            self.library.gradblend_plan_destroy(plan)
        self.library.gradblend_blender_destroy(self.blender)
