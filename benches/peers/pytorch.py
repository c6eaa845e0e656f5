#!/usr/bin/env python3
"""What is written in PyTorch for the sums and the blend of Gradient-Blending, timed on the cases of a results file.

    python3 benches/peers/pytorch.py --results FILE.jsonl [--library libgradblend.so] [--device cpu|cuda]
        [--filter TEXT] [--quick] [--budget SECONDS]
    python3 benches/peers/pytorch.py --test [--library libgradblend.so] [--device cpu|cuda]

FILE, in the format that benches/README.md describes, has `case` lines with exact sums; the inputs are made again from
their formula, and a `run` line and a `case` and `time` (or `skipped`) lines are appended to it. Needs PyTorch, and TorchJD
if it is to take part; shapes.json in the folder above or beside. Every gradient is a tensor of one dimension, on the CPU
in one set of inputs.

    copy              limit: copy_ of half of the bytes of the floor to the other half
    gradblend         ours, by ctypes (`cargo rustc --release --features capi --crate-type cdylib`): one call a run
    PyTorch dot       tensor by tensor: t - g, two torch.dot a modality, added up in f32; mul, then add_(alpha=w)
    PyTorch foreach   _foreach_sub, _foreach_mul, sums in f32 of each tensor (of all at once where they are small: they
                      are concatenated, as there is no _foreach_sum or _foreach_dot); _foreach_mul, _foreach_add_
    PyTorch compile   torch.compile of the obvious loop over tensors; up to 1000 tensors
    PyTorch matmul    gradients concatenated, zeros where absent, into memory that is kept; then (t; g) V' and w V
    TorchJD Gramian   the same concatenation, then TorchJD's compute_gramian of the rows t, g, v_k, as its jac_to_grad does
                      by default; blend as above. Not for `blend` alone, which would be the same as matmul

Temporaries of PyTorch dot, foreach and compile are fresh tensors, as PyTorch makes them: on the CPU, large ones are
fresh pages each time. `step` is the sums and the blend; none of them updates moments. What a way computes is compared
with the exact sums, and the blend with f64: all of it on a GPU, 16 pieces of 2^20 elements on the CPU. What is within
its bound of f64 is within two bounds of gradblend, so they are not compared again. A result out of bounds ends the
script. On the CPU, memory is not measured, and turns in which other programs were busy are repeated.
"""

import argparse
import ctypes as c
import datetime
import gc
import json
import math
import os
import pathlib
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time

import torch

try:
    from torchjd._linalg import compute_gramian  # what torchjd.aggregation calls; there is no public name
except Exception as error:  # also where TorchJD does not fit this PyTorch
    compute_gramian, NO_TORCHJD = None, f"TorchJD: {error}"

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
ROUNDING = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}  # half the distance from 1 to the next number
ALIGNMENT = 256  # bytes
TURNS, SLOW_TURNS, SLOW = 9, 3, 0.5  # turns; turns of a contender that takes longer than so many seconds
OTHERS = 0.1  # processors that other programs may take during a turn on the CPU, else it is repeated, up to TURNS times
COMPILATION = 180  # seconds that it may take
TOO_LONG = f"to compile takes more than {COMPILATION} s"
PIECE, PIECES = 1 << 20, 16  # elements whose blend is compared at a time, and how often on the CPU


class Wrong(Exception):
    """A result that is further off than its arithmetic explains."""


class Skip(Exception):
    """A contender that cannot take part."""


# Inputs ---------------------------------------------------------------------------------------------------------------


def signed(x):
    return x - (1 << 64 if x >> 63 else 0)


def numbers(which, first, count, device):
    """Elements first, first + 1, ... of a list, in f32. int64 wraps; a shift that brings in signs is masked."""
    x = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=device)
    x.add_(which << 40).mul_(signed(0x9E3779B97F4A7C15))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(signed(factor))
    x.bitwise_right_shift_(40).bitwise_and_((1 << 24) - 1).sub_(1 << 23)
    return x.to(torch.float32).div_(1 << 23)


def tensors_of(case):
    """(length, modalities that reach it, whether t and g exist) of each tensor."""
    k, source = list(range(case["modalities"])), case["list"]
    if "flat" in source:
        return [(source["flat"], k, True)]
    if "equal" in source:
        return [(source["equal"]["len"], k, True)] * source["equal"]["count"]
    if "tensors" in source:  # of --test
        return [tuple(tensor) for tensor in source["tensors"]]
    here = pathlib.Path(__file__).resolve().parent
    path = next(path for path in (here.parent / "shapes.json", here / "shapes.json") if path.exists())
    model = next(m for m in json.loads(path.read_text())["models"] if m["name"] == source["model"])
    parts = [(p["tensors"], k if p["reached_by"] is None else p["reached_by"], p["fused"]) for p in model["parts"]]
    return [(math.prod(shape), reached, fused) for shapes, reached, fused in parts for shape in shapes]


class Layout:
    """Where each tensor lies: the same in every list. What is between them, or absent, is zero."""

    def __init__(self, case):
        self.case, self.tensors, self.dtype = case, tensors_of(case), DTYPES[case["dtype"]]
        self.k, self.size, self.lens = case["modalities"], self.dtype.itemsize, [t[0] for t in self.tensors]
        step, end, self.pieces = ALIGNMENT // self.size, 0, []
        for length in self.lens:
            start = -(-end // step) * step + case["misaligned"]
            self.pieces += [start - end, length]
            end = start + length
        self.pieces.append(-end % step)
        self.len, self.elements = end + self.pieces[-1], sum(self.lens)
        self.present = [reached for _, reached, _ in self.tensors]
        self.fused = [i for i, (_, reached, fused) in enumerate(self.tensors) if fused and reached]
        self.fused_by = [[i for i in self.fused if k in self.present[i]] for k in range(self.k)]
        first = [min(reached, default=0) for reached in self.present]
        self.first = [[i for i, p in enumerate(self.present) if k in p and k == first[i]] for k in range(self.k)]
        self.rest = [[i for i, p in enumerate(self.present) if k in p and k != first[i]] for k in range(self.k)]
        self.bytes = (self.k + 3) * self.len * self.size  # t, g, v_k, and the blended one
        self.too_long = None  # why torch.compile is not tried again


class Inputs:
    """One set: lists t, g and v[k] of tensors, None where absent, and the blended list."""

    def __init__(self, layout, device, like=None):
        self.layout, self.w = layout, layout.case["weights"]
        self.arenas = [self.arena(device, arena) for arena in like.arenas if like] if like else []
        if not like:
            self.arenas = [self.arena(device) for _ in range(layout.k + 3)]
            is_fused = [fused for _, _, fused in layout.tensors]
            for which, arena in enumerate(self.arenas[:-1]):
                there = is_fused if which < 2 else [which - 2 in p for p in layout.present]
                self.fill(which, self.views(arena), there, device)
            if layout.case["near"]:
                for t, g in zip(self.arenas[0].split(1 << 22), self.arenas[1].split(1 << 22)):
                    t.copy_(g.float() + t.float() / 64)
        t, g, *v, out = map(self.views, self.arenas)
        absent = lambda views, there: [view if is_there else None for view, is_there in zip(views, there)]
        self.t, self.g = (absent(views, [f for _, _, f in layout.tensors]) for views in (t, g))
        self.v = [absent(views, [k in p for p in layout.present]) for k, views in enumerate(v)]
        self.out = list(out)

    def arena(self, device, like=None):
        layout = self.layout
        memory = torch.zeros(layout.len + ALIGNMENT // layout.size, dtype=layout.dtype, device=device)
        memory = memory[-memory.data_ptr() % ALIGNMENT // layout.size :][: layout.len]
        return memory if like is None else memory.copy_(like)

    def views(self, arena):
        return arena.split(self.layout.pieces)[1::2]

    def fill(self, which, views, there, device):
        first, most, batch, count = 0, 1 << (24 if device.type == "cuda" else 20), [], 0
        for view, is_there in zip(views, there):
            for piece in view.split(most):
                if batch and (count + len(piece) > most or not is_there):
                    made = numbers(which, first - count, count, device).split([len(x) for x in batch])
                    torch._foreach_copy_(batch, list(made))
                    batch, count = [], 0
                if is_there:
                    batch.append(piece)
                    count += len(piece)
                first += len(piece)
        if batch:
            made = numbers(which, first - count, count, device).split([len(x) for x in batch])
            torch._foreach_copy_(batch, list(made))


# Ways: run(inputs) gives c and d (None for a blend), and the blended tensors (None for a dot) -----------------------


class Dot:
    """What a user writes first."""

    # Whether d is a difference of two sums.
    name, role, cancels = "PyTorch dot", "peer", False

    def __init__(self, layout, operation, place):
        self.layout, self.operation, self.place = layout, operation, place
        self.dots, self.blends = operation != "blend", operation != "dot"
        self.shared = 0  # bytes of what another way has allocated
        self.prepare()

    def prepare(self):
        pass

    @staticmethod
    def extra(layout, operation):
        """Bytes that it may need beside the lists, roughly."""
        return max(layout.lens) * layout.size

    def run(self, x):
        c = d = blended = None
        if self.dots:
            c, d = torch.zeros(2, self.layout.k, device=self.place.device)
            c_k, d_k = c.unbind(), d.unbind()
            for i in self.layout.fused:
                difference = x.t[i] - x.g[i]
                for k in self.layout.present[i]:
                    c_k[k].add_(torch.dot(x.g[i], x.v[k][i]))
                    d_k[k].add_(torch.dot(difference, x.v[k][i]))
        if self.blends:
            blended = x.out
            for i, out in enumerate(blended):
                first, *rest = self.layout.present[i]
                torch.mul(x.v[first][i], x.w[first], out=out)
                for k in rest:
                    out.add_(x.v[k][i], alpha=x.w[k])
        return c, d, blended

    def sums(self, c, d):
        return c.tolist(), d.tolist()

    def bound(self, size, exact, n):
        """How far off c or d may be. The inputs are random: roundings of n elements add up as the root of n, which is the
        size / sqrt(n); a result of 16 bits, a tensor's or the whole, is rounded too. Sums in f32 stay small as they run,
        so their roundings do not grow with n either. Each a few times over."""
        u = ROUNDING[self.layout.case["dtype"]]
        of_16_bits = 16 * u * (size / math.sqrt(n) + exact) if u > 2**-24 else 0
        return size * 2**-18 + of_16_bits

    def blend_roundings(self):
        return 2 * self.layout.k  # of each product and each sum


class Foreach(Dot):
    name = "PyTorch foreach"

    def prepare(self):
        mean = self.layout.elements / len(self.layout.lens)
        self.concatenate = len(self.layout.lens) > 1 and mean < (1 << 20 if self.place.cuda else 1 << 12)

    @staticmethod
    def extra(layout, operation):
        return {"dot": 3, "blend": 1, "step": 3}[operation] * layout.elements * layout.size

    def total(self, products):
        if not products:
            return torch.zeros((), device=self.place.device)
        if self.concatenate:
            return torch.cat(products).sum(dtype=torch.float32)
        return torch.stack([product.sum(dtype=torch.float32) for product in products]).sum()

    def run(self, x):
        layout, c, d, blended = self.layout, None, None, None
        pick = lambda tensors, indices: [tensors[i] for i in indices]
        if self.dots:
            difference = [None] * len(layout.lens)
            for i, tensor in zip(layout.fused, torch._foreach_sub(pick(x.t, layout.fused), pick(x.g, layout.fused))):
                difference[i] = tensor
            products = lambda a, k, by: torch._foreach_mul(pick(a, by), pick(x.v[k], by)) if by else []
            total = lambda a: torch.stack([self.total(products(a, k, by)) for k, by in enumerate(layout.fused_by)])
            c, d = total(x.g), total(difference)
        if self.blends:
            blended = [None] * len(layout.lens)
            for k, first in enumerate(layout.first):
                for i, tensor in zip(first, torch._foreach_mul(pick(x.v[k], first), x.w[k]) if first else []):
                    blended[i] = tensor
            for k, rest in enumerate(layout.rest):
                if rest:
                    torch._foreach_add_(pick(blended, rest), pick(x.v[k], rest), alpha=x.w[k])
        return c, d, blended


def obvious(t, g, v, w, present, fused, dots, blends):
    """For torch.compile."""
    c, d, blended = [0 for _ in v], [0 for _ in v], []
    for i in fused if dots else []:
        for k in present[i]:
            c[k] = c[k] + (g[i] * v[k][i]).sum(dtype=torch.float32)
            d[k] = d[k] + ((t[i] - g[i]) * v[k][i]).sum(dtype=torch.float32)
    for i, reached in enumerate(present if blends else []):
        blended.append(sum(v[k][i] * w[k] for k in reached))
    return torch.stack(c) if dots else None, torch.stack(d) if dots else None, blended if blends else None


class Compile(Dot):
    name, extra = "PyTorch compile", Foreach.extra

    def prepare(self):
        if len(self.layout.lens) > 1000 or self.layout.too_long:
            raise Skip(self.layout.too_long or "not tried for more than 1000 tensors")
        torch._dynamo.reset()  # else a new case counts as a recompilation, and after a few of them nothing is compiled
        self.compiled = torch.compile(obvious, dynamic=False, fullgraph=True)

    def run(self, x):
        return self.compiled(x.t, x.g, x.v, x.w, self.layout.present, self.layout.fused, self.dots, self.blends)


class Matmul(Dot):
    name, cancels = "PyTorch matmul", True

    def prepare(self):
        layout, device = self.layout, self.place.device
        self.zeros = torch.zeros(max(layout.lens), dtype=layout.dtype, device=device)
        self.matrix, self.shared = self.place.workspace(layout)
        self.weights = torch.tensor(layout.case["weights"], dtype=layout.dtype, device=device)

    @staticmethod
    def extra(layout, operation):
        return (layout.k + 3) * layout.elements * layout.size

    def concatenate(self, x):
        lists = [x.t, x.g, *x.v] if self.dots else x.v
        matrix = self.matrix[: len(lists)]
        for row, tensors in zip(matrix, lists):
            there = [self.zeros[:n] if tensor is None else tensor for n, tensor in zip(self.layout.lens, tensors)]
            torch.cat(there, out=row)
        return matrix, matrix[2:] if self.dots else matrix

    def products(self, matrix, v):
        return matrix[:2] @ v.T

    def run(self, x):
        c = d = blended = None
        matrix, v = self.concatenate(x)
        if self.dots:
            t, c = self.products(matrix, v).float()
            d = t - c
        if self.blends:
            blended = (self.weights @ v).split(self.layout.lens)
        return c, d, blended


class Gramian(Matmul):
    name = "TorchJD Gramian"

    def prepare(self):
        if compute_gramian is None:
            raise Skip(NO_TORCHJD)
        super().prepare()

    def products(self, matrix, v):
        return compute_gramian(matrix)[:2, 2:]


class Copy(Dot):
    name, role = "copy", "limit"

    def prepare(self):
        half = self.layout.case["bytes"] // 2
        memory = torch.empty(self.place.sets, 2, half, dtype=torch.uint8, device=self.place.device)
        self.memory, self.turn = list(memory.fill_(1)), 0

    @staticmethod
    def extra(layout, operation):
        return layout.case["bytes"]

    def run(self, x):
        source, target = self.memory[self.turn]
        self.turn = (self.turn + 1) % len(self.memory)
        target.copy_(source)
        return None, None, None


class Config(c.Structure):
    _fields_ = [(name, c.c_uint32) for name in ("size", "modalities", "average", "overfitting", "negative", "cadence")]
    _fields_ += [("threads", c.c_uint32), ("reserved", c.c_uint32), ("decay", c.c_double), ("damping", c.c_double)]


class Tensor(c.Structure):
    _fields_ = [("len", c.c_uint64), ("dtype", c.c_int32), ("train", c.c_void_p), ("valid", c.c_void_p)]
    _fields_ += [("modalities", c.c_void_p), ("blended", c.c_void_p)]


class Report(c.Structure):
    _fields_ = [("head", c.c_uint64 * 4)]
    _fields_ += [(name, c.c_double * 32) for name in ("weights", "mean", "second_moment", "ogr")]
    _fields_ += [("ogr_blend", c.c_double), ("ogr_uniform", c.c_double)]


class Gradblend(Dot):
    name, role, library = "gradblend", "ours", None

    def prepare(self):
        if self.library is None:
            raise Skip("no --library")
        layout, self.blender, self.plans = self.layout, c.c_void_p(), {}
        config, weights = Config(), (c.c_double * layout.k)(*layout.case["weights"])
        self.call("config_default", c.c_uint32(layout.k), c.byref(config))
        config.average, config.threads = 0, layout.case["threads"]  # the plain mean: after one observation it is c
        device = c.c_int32(0 if self.place.cuda else -1)
        self.call("blender_create", device, c.byref(config), c.byref(self.blender))
        self.call("set_weights", self.blender, weights, c.c_uint32(layout.k), self.stream())
        self.function = getattr(self.library, "gradblend_" + self.operation)

    def stream(self):
        return c.c_void_p(torch.cuda.current_stream().cuda_stream) if self.place.cuda else None

    def call(self, name, *arguments):
        if getattr(self.library, "gradblend_" + name)(*arguments):
            message = c.create_string_buffer(512)
            self.library.gradblend_last_error(message, c.c_size_t(512))
            raise Wrong(f"{name}: {message.value.decode()}")

    def plan(self, x):
        layout, k, plan = self.layout, self.layout.k, c.c_void_p()
        address = lambda tensor: tensor.data_ptr() if tensor is not None else 0
        records, dtype = (Tensor * len(layout.lens))(), list(DTYPES).index(layout.case["dtype"])
        v = (c.c_void_p * (k * len(layout.lens)))(*(address(tensor) for row in zip(*x.v) for tensor in row))
        for i, (t, g, out) in enumerate(zip(x.t, x.g, x.out)):
            modalities = c.addressof(v) + 8 * k * i
            records[i] = Tensor(layout.lens[i], dtype, address(t) or None, address(g) or None, modalities, address(out))
        self.call("plan_create", self.blender, records, c.c_uint64(len(records)), c.byref(plan))
        return plan

    def run(self, x):
        if id(x) not in self.plans:
            self.plans[id(x)] = self.plan(x)
        if self.function(self.blender, self.plans[id(x)], self.stream()):
            self.call(self.operation, self.blender, self.plans[id(x)], self.stream())
        return None, None, x.out

    def sums(self, c_, d_):
        """After one run. What a step observed is c and d squared: the d are without signs."""
        k, report = self.layout.k, Report()
        if self.operation == "dot":
            address, count = c.POINTER(c.c_double)(), c.c_uint32()
            self.call("pending_sums", self.blender, c.byref(address), c.byref(count))
            if self.place.cuda:
                there, address = c.cast(address, c.c_void_p), (c.c_double * (2 * k))()
                if self.place.driver.cuMemcpyDtoH_v2(address, there, c.c_size_t(16 * k)):
                    raise Wrong("the sums cannot be read")
            return address[:k], address[k : 2 * k]
        self.call("get_report", self.blender, c.byref(report), self.stream())
        return report.mean[:k], [math.sqrt(s) for s in report.second_moment[:k]]

    def bound(self, size, exact, n):
        return size * 2**-16  # as it promises

    def blend_roundings(self):
        return 1

    def close(self):
        for plan in self.plans.values():
            self.library.gradblend_plan_destroy(plan)
        self.library.gradblend_blender_destroy(self.blender)


WAYS = (Copy, Gradblend, Dot, Foreach, Compile, Matmul, Gramian)


def check(way, x, result):
    """What the sums and the blend are off by, in parts of their sizes."""
    layout, case, (c_, d_, blended) = way.layout, way.layout.case, result
    errors = {"error_c": None, "error_d": None, "error_blend": None}
    if way.dots:
        computed = dict(zip("cd", way.sums(c_, d_)))
        unsigned = way.role == "ours" and way.operation == "step"
        for which in "cd":
            worst = 0
            for k, (got, want, size) in enumerate(zip(computed[which], case[which], case[which + "_size"])):
                n, exact = sum(layout.lens[i] for i in layout.fused_by[k]), abs(want)
                off = abs(got - (exact if unsigned and which == "d" else want))
                # <t,v> - <g,v> cancels: |t v| + |g v| is at most |(t - g) v| + 2 |g v|.
                cancelled = 2 * case["c_size"][k] if which == "d" and way.cancels else 0
                of_both = 2 * abs(case["c"][k]) if cancelled else 0
                if not off <= way.bound(size + cancelled, exact + of_both, max(n, 1)):
                    raise Wrong(f"{way.name}: {which}_{k} is {got}, not {want}; its terms add up to {size}")
                worst = max(worst, off / size if size else 0)
            errors["error_" + which] = worst
    if way.blends:
        if blended is not x.out:
            torch._foreach_copy_(x.out, list(blended))
        pieces = list(zip(*(arena.split(PIECE) for arena in x.arenas[2:])))
        if not way.place.cuda and len(pieces) > PIECES:
            pieces = [pieces[j * (len(pieces) - 1) // (PIECES - 1)] for j in range(PIECES)]
        part = (2 * layout.k + 1) * 2**-24 + way.blend_roundings() * ROUNDING[case["dtype"]]
        least, worst = way.blend_roundings() * 2**-25, 0  # least: below the normal numbers of f16
        for *v, got in pieces:
            terms = [a.double() * w for a, w in zip(v, x.w)]
            want, size = sum(terms), sum(term.abs() for term in terms)
            off = (got.double() - want).abs()
            bad = ~(off <= size * part + least)
            if bad.any():
                raise Wrong(f"{way.name}: {int(bad.sum())} blended elements are wrong, one by {off[bad].max().item()}")
            worst = max(worst, (off / size.clamp(min=2**-12)).max().item())
        errors["error_blend"] = worst
    return errors


# Where it runs --------------------------------------------------------------------------------------------------------


class Place:
    def __init__(self, device):
        self.cuda, self.device = device == "cuda", torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
        self.sets, self.kept, self.cache = 1, None, None
        self.turn_ns = 5e6 if self.cuda else 20e6
        if self.cuda:
            self.cache = torch.cuda.get_device_properties(0).L2_cache_size
            self.driver = c.CDLL("libcuda.so.1")

    def describe(self):
        """Name and driver."""
        if self.cuda:
            version = c.c_int()
            self.driver.cuDriverGetVersion(c.byref(version))
            return torch.cuda.get_device_name(0), f"{version.value // 1000}.{version.value % 1000 // 10}"
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine()), None

    def free(self):
        if self.cuda:
            return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024

    def require(self, need):
        free = self.free() - (1 << 29)
        if need > free:
            raise Skip(f"needs {need / 1e9:.1f} GB of memory, {max(free, 0) / 1e9:.1f} GB are free")

    def workspace(self, layout):
        """Memory for all gradients in one piece, and its bytes if it was there already."""
        if self.kept is not None:
            return self.kept, self.kept.nbytes
        self.kept = torch.empty(layout.k + 2, layout.elements, dtype=layout.dtype, device=self.device)
        return self.kept, 0

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def clock(self):
        """Seconds since some time, of processor time of all programs, and of this one."""
        with open("/proc/stat") as stat:
            user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
        of_all = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), of_all, time.process_time()

    def time(self, way, inputs, repeats):
        """Nanoseconds of a run, and on a GPU of the host when it does not wait."""
        count, start = len(inputs), time.perf_counter_ns()
        if not self.cuda:
            for i in range(repeats):
                way.run(inputs[i % count])
            return (time.perf_counter_ns() - start) / repeats, None
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for i in range(repeats):
            way.run(inputs[i % count])
        end.record()
        torch.cuda.synchronize()
        # Few at a time, so that they do not wait for room in the queue of launches.
        some, start = min(repeats, 10), time.perf_counter_ns()
        for i in range(some):
            way.run(inputs[i % count])
        host = (time.perf_counter_ns() - start) / some
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e6 / repeats, host

    def launches(self, way, x):
        """Kernels in a CUDA graph captured of a run, by the driver's API; None where it cannot be captured."""
        if not self.cuda or len(way.layout.lens) > 1000 or 2 * way.extra(way.layout, way.operation) > self.free():
            return None
        try:
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(graph):
                result = way.run(x)
            count, kind = c.c_size_t(), c.c_int()
            handle = c.c_void_p(graph.raw_cuda_graph())
            if self.driver.cuGraphGetNodes(handle, None, c.byref(count)):
                return None
            nodes = (c.c_void_p * count.value)()
            self.driver.cuGraphGetNodes(handle, nodes, c.byref(count))
            kinds = [self.driver.cuGraphNodeGetType(c.c_void_p(node), c.byref(kind)) or kind.value for node in nodes]
            del result
            return kinds.count(0)  # CU_GRAPH_NODE_TYPE_KERNEL
        except (RuntimeError, TypeError, AttributeError):
            return None
        finally:
            torch.cuda.synchronize()


def prepared(kind, layout, operation, place, inputs):
    """A way that has run and was found right, with what is known of it."""
    there = place.kept.nbytes if issubclass(kind, Matmul) and place.kept is not None else 0
    place.require(kind.extra(layout, operation) - there)
    allocated = free = 0
    if place.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        allocated, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    if operation != "dot":
        torch._foreach_add_(inputs[0].out, math.nan)
    try:
        way = kind(layout, operation, place)
        if kind is Compile:
            signal.alarm(COMPILATION)
        result = way.run(inputs[0])
        signal.alarm(0)
        place.wait()
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if kind is Compile:
            # Raised anywhere in the compiler, which may wrap it.
            layout.too_long = TOO_LONG if TOO_LONG in str(error) else layout.too_long
            raise Skip(layout.too_long or text) from error
        known = ("enough memory", "not implemented")
        if isinstance(error, (torch.OutOfMemoryError, NotImplementedError)) or any(part in text for part in known):
            raise Skip(text) from error
        raise
    finally:
        signal.alarm(0)
    known = {"extra_bytes": None, **dict.fromkeys(("error_c", "error_d", "error_blend"))}
    if place.cuda and way.role != "limit":
        of_ours = max(free - torch.cuda.mem_get_info()[0], 0) if way.role == "ours" else 0
        known["extra_bytes"] = torch.cuda.max_memory_allocated() - allocated + of_ours + way.shared
    if way.role != "limit":
        known.update(check(way, inputs[0], result))
    return way, known


def measure(place, case, layout, inputs, write):
    """Times all ways of an operation in turns."""
    name, ready = {"operation": case["operation"], "case": case["case"]}, []
    skip = lambda kind, why: write({"kind": "skipped", **name, "contender": kind and kind.name, "reason": str(why)})
    write(case)
    for kind in WAYS:
        if (kind is Gramian and case["operation"] == "blend") or (kind is Gradblend and kind.library is None):
            continue
        try:
            way, known = prepared(kind, layout, case["operation"], place, inputs)
        except Skip as why:
            skip(kind, why)
            continue
        for x in inputs[1:] if len(inputs) > 1 else inputs:
            way.run(x)
        once, _ = place.time(way, inputs, 1)
        once = min([once] + [place.time(way, inputs, 1)[0] for _ in range(3) if once < place.turn_ns])
        repeats = min(max(math.ceil(place.turn_ns / max(once, 1)), 1), 10_000)
        ready.append((way, known, once > SLOW * 1e9, repeats, [], []))
    for way, *_ in ready:  # what the memory was emptied of for the next one
        way.run(inputs[0])
    busy = again = turn = 0
    while ready and turn < TURNS:
        first, before = turn % len(ready), place.clock()
        taking_part = [one for one in ready[first:] + ready[:first] if not one[2] or turn % (TURNS // SLOW_TURNS) == 0]
        for way, _, _, repeats, times, host in taking_part:
            of_device, of_host = place.time(way, inputs, repeats)
            times.append(round(of_device, 1))
            host.append(of_host and round(of_host, 1))
        wall, of_all, own = (after - start for after, start in zip(place.clock(), before))
        others = max(of_all - own, 0) / wall
        if not place.cuda and others > OTHERS and again < TURNS:
            # A loop split into equal parts waits for the one whose processor is taken: 20 times as long, at worst.
            again += 1
            for *_, times, host in taking_part:
                times.pop(), host.pop()
            time.sleep(1)
            continue
        turn, busy = turn + 1, max(busy, others)
    if not place.cuda and busy > OTHERS:
        print(f"NOT IDLE: other programs took {busy:.2f} processors during {case['operation']} {case['case']}", flush=True)
    for way, known, _, repeats, times, host in ready:
        line = {"kind": "time", **name, "contender": way.name, "role": way.role, "times_ns": times, "repeats": repeats}
        line |= {"sets": len(inputs), "host_ns": host if place.cuda else None, "launches": place.launches(way, inputs[0])}
        write(line | {"allocations": None} | known)
        speed = f"{case['bytes'] / statistics.median(times):8.2f} GB/s"
        label = f"{case['operation']:6}{case['case']:32}{way.name:18}"
        print(f"{label}{statistics.median(times) / 1e3:14.1f} us {speed}", flush=True)
        if way.role == "ours":
            way.close()


def run_case(place, cases, write):
    """All operations of one name."""
    try:
        layout = Layout(cases[0])
        place.sets = 1
        if place.cuda:
            place.sets = min(max(math.ceil(2 * place.cache / min(case["bytes"] for case in cases)), 1), 64)
        place.require(place.sets * layout.bytes)
        inputs = [Inputs(layout, place.device)]
        inputs += [Inputs(layout, place.device, inputs[0]) for _ in range(place.sets - 1)]
    except (Skip, torch.OutOfMemoryError) as why:
        for case in cases:
            write(case)
            skipped = {"operation": case["operation"], "case": case["case"], "contender": None, "reason": str(why)}
            write({"kind": "skipped", **skipped})
            print(f"{case['operation']:6}{case['case']:32}skipped: {why}", flush=True)
        return
    for case in cases:
        layout.case = case  # what differs: bytes and exact sums
        if not place.cuda:
            torch.set_num_threads(case["threads"] or os.cpu_count())
        measure(place, case, layout, inputs, write)
    place.kept = None
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()


def git(*arguments):
    here = pathlib.Path(__file__).resolve().parent
    try:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def measured(options, place):
    """Reads the cases of a file, measures them, and appends to it."""
    cases, here, commit = {}, None, None
    for line in map(json.loads, filter(str.strip, options.results.read_text().splitlines())):
        if line["kind"] == "run":
            here, commit = line["device"] == options.device, line["commit"]
        if line["kind"] == "case" and here and options.filter in f"{line['operation']}/{line['case']}":
            cases.setdefault(line["case"], {})[line["operation"]] = line
    if options.quick:
        of = lambda by_name: next(iter(by_name.values()))["list"]
        largest = max((of(case).get("flat", 0) for case in cases.values()), default=0)
        cases = {name: case for name, case in cases.items() if "model" in of(case) or of(case).get("flat") == largest}
    if not cases:
        sys.exit(f"{options.results} has no such cases")
    name, driver = place.describe()
    software = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    if compute_gramian is not None:
        from importlib.metadata import version

        software += f", TorchJD {version('torchjd')}"
    commit = os.environ.get("GRADBLEND_COMMIT") or git("describe", "--always", "--dirty") or commit
    start = time.monotonic()
    with options.results.open("a") as file:

        def write(line):
            file.write(json.dumps(line) + "\n")
            file.flush()

        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        run = {"kind": "run", "date": now, "commit": commit, "device": options.device, "name": name, "driver": driver}
        command = "python3 benches/peers/pytorch.py " + shlex.join(sys.argv[1:])
        write(run | {"cache_bytes": place.cache, "software": software, "command": command})
        for case in cases.values():
            if time.monotonic() - start < options.budget:
                run_case(place, list(case.values()), write)
                continue
            for line in case.values():
                write(line)
                skipped = {"operation": line["operation"], "case": line["case"], "contender": None}
                write({"kind": "skipped", **skipped, "reason": f"the budget of {options.budget:g} s was over"})


def tested(place):
    """All ways once, on tiny inputs, after the inputs themselves."""
    mask, known = (1 << 64) - 1, []
    for which, i in ((0, 0), (1, 7), (2, 12_345), (5, 10**9 + 7), (33, (1 << 40) - 2)):
        x = ((which << 40) + i + 1) * 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        known.append(((x >> 40) - 2**23) / 2**23)
        if numbers(which, i, 1, place.device).item() != known[-1]:
            raise Wrong(f"element {i} of list {which} is not {known[-1]}")
    mixed = [(700, [0, 2], True), (65, [1, 2], True), (1, [0, 1, 2], True), (33, [0], False), (9, [1], False)]
    mixed = {"tensors": mixed}
    lists = [({"flat": 3001}, 4), ({"flat": 1}, 1), ({"equal": {"count": 40, "len": 33}}, 8), (mixed, 3)]
    for source, k in lists:
        for dtype in DTYPES:
            for odd in (False, True):
                case = {"case": f"{source}/K{k}/{dtype}/{odd}", "list": source, "modalities": k, "dtype": dtype}
                case |= {"misaligned": odd, "near": odd, "threads": 2, "weights": [1 / 8 + i / 16 for i in range(k)]}
                layout = Layout(case)
                x = Inputs(layout, place.device)
                if any(view.data_ptr() % ALIGNMENT != odd * layout.size for view in x.t + x.v[0] if view is not None):
                    raise Wrong(f"{case['case']}: alignment")
                f64 = lambda tensors, i: tensors[i].double()
                terms = [[(f64(x.t, i), f64(x.g, i), f64(x.v[j], i)) for i in layout.fused_by[j]] for j in range(k)]
                add = lambda f: [sum(f(*three).sum().item() for three in of_j) for of_j in terms]
                case |= {"c": add(lambda t, g, v: g * v), "c_size": add(lambda t, g, v: (g * v).abs())}
                case |= {"d": add(lambda t, g, v: (t - g) * v), "d_size": add(lambda t, g, v: ((t - g) * v).abs())}
                case["bytes"] = 4096
                for operation in ("dot", "blend", "step"):
                    for kind in WAYS:
                        # To compile takes seconds.
                        if kind is Compile and (dtype == "f16" or not odd or operation != "step"):
                            continue
                        try:
                            way, known = prepared(kind, layout, operation, place, [x])
                            if odd and source is mixed and operation == "step":
                                print(f"{kind.name:18}{dtype:6}", known, flush=True)
                        except Skip as why:
                            print(f"{kind.name:18}{dtype:6} skipped: {why}", flush=True)
                place.kept = None
    print("all right")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, metavar="FILE", help="has the cases; results are appended")
    parser.add_argument("--library", metavar="PATH", help="libgradblend.so, to measure beside the others")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases with this in operation/name")
    parser.add_argument("--quick", action="store_true", help="only networks and the largest flat list")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="start no case after so long")
    parser.add_argument("--test", action="store_true", help="check all ways on tiny inputs, and measure nothing")
    options = parser.parse_args()
    if not options.test and not options.results:
        parser.error("--results or --test")
    torch.set_grad_enabled(False)

    def too_long(*_):
        raise Skip(TOO_LONG)

    signal.signal(signal.SIGALRM, too_long)
    place = Place(options.device)
    Gradblend.library = c.CDLL(options.library) if options.library else None
    try:
        tested(place) if options.test else measured(options, place)
    except Wrong as error:
        sys.exit(f"wrong: {error}")


if __name__ == "__main__":
    main()
