#!/usr/bin/env python3
"""Times PyTorch implementations of the sums and the blend of Gradient-Blending, on the cases of a results file.

FILE is what `gradblend-lab run --results FILE` wrote. Its `case` records give shapes, exact sums and weights; the inputs
are made from the formula in benches/README.md. Records of the same kinds are appended, with the commit of the last run.
Every result is checked before it is timed: equal sums also show that the inputs are the same. gradblend, called through
its C functions, takes part in the rounds, as only times of one run can be compared. Needs PyTorch, and no Rust.

    PyTorch loop      for each tensor: torch.dot; torch.mul, then add_(alpha=w)
    PyTorch foreach   the _foreach functions, and sums in f32
    PyTorch compile   torch.compile of the loop, for up to 1,000 tensors
    PyTorch matmul    gradients concatenated, zeros where absent; then [t g]' V and V w

None updates moments or solves for weights. On the CPU, memory is not measured.
"""

import argparse
import ctypes as c
import datetime
import json
import math
import pathlib
import platform
import shlex
import signal
import sys
import time

import torch

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}  # in the order of gradblend.h
ROUNDING = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}  # half the distance from 1 to the next number
ALIGNMENT = 256  # bytes
SLOW = 0.4  # seconds: a baseline that takes longer has SLOW_ROUNDS
SLOW_ROUNDS = 3
MOST_REPEATS, MOST_SETS = 10_000, 256
COMPILATION = 120  # seconds that torch.compile may take
CHECKED = 1 << 24  # elements of a blend that are compared on the CPU; on a GPU, all are


class Skip(Exception):
    """An implementation that cannot take part."""


# ---- Inputs ----


def shapes_of(case):
    """Of each tensor: elements, modalities whose loss reaches it, whether the fused loss does."""
    everyone = list(range(case["modalities"]))
    (kind, value), = case["shapes"].items()
    if kind == "flat":
        return [(value, everyone, True)]
    if kind == "equal":
        return [(value["len"], everyone, True)] * value["count"]
    models = json.loads(pathlib.Path(__file__).with_name("shapes.json").read_text())["models"]
    parts = next(model for model in models if model["name"] == value)["parts"]
    return [
        (math.prod(shape), everyone if part["reached_by"] is None else part["reached_by"], part["fused"])
        for part in parts
        for shape in part["tensors"]
    ]


def numbers(buffer, first, count, device):
    """Elements first, first + 1, ... of a buffer, in f32. int64 arithmetic wraps; its shifts bring in the sign."""

    def signed(x):
        return x - (1 << 64) if x >> 63 else x

    def shift_right(x, bits):
        return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)

    x = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=device)
    x.add_(buffer << 40).mul_(signed(0x9E3779B97F4A7C15))
    x.bitwise_xor_(shift_right(x, 30)).mul_(signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_(shift_right(x, 27)).mul_(signed(0x94D049BB133111EB))
    return shift_right(x, 40).sub_(1 << 23).to(torch.float32).div_(1 << 23)


class Inputs:
    """One set: t, g, v[k] and out have one entry for each tensor, None where a gradient is absent. out is written."""

    def __init__(self, case, device):
        self.k, self.weights, self.dtype = case["modalities"], case["weights"], case["dtype"]
        shapes = shapes_of(case)
        self.lengths = [length for length, _, _ in shapes]
        self.present = [present for _, present, _ in shapes]
        self.fused = [i for i, (_, present, fused) in enumerate(shapes) if fused and present]
        has_fused = [fused for _, _, fused in shapes]
        itemsize = DTYPES[self.dtype].itemsize
        starts, end = [], 0
        for length in self.lengths:
            starts.append(-(-end * itemsize // ALIGNMENT) * ALIGNMENT // itemsize + case["misaligned"])
            end = starts[-1] + length
        self.arenas, buffers = [], []
        for buffer in range(self.k + 3):
            memory = torch.zeros(end + ALIGNMENT // itemsize, dtype=DTYPES[self.dtype], device=device)
            arena = memory[-memory.data_ptr() % ALIGNMENT // itemsize :]
            tensors, first = [arena[start : start + n] for start, n in zip(starts, self.lengths)], 0
            for i, tensor in enumerate(tensors):
                if not (has_fused[i] if buffer < 2 else buffer == self.k + 2 or buffer - 2 in self.present[i]):
                    tensors[i] = None
                elif buffer < self.k + 2:
                    for at in range(0, len(tensor), 1 << 22):
                        part = tensor[at : at + (1 << 22)]
                        part.copy_(numbers(buffer, first + at, len(part), device))
                first += self.lengths[i]
            self.arenas.append(arena)
            buffers.append(tensors)
        self.t, self.g, *self.v, self.out = buffers

    def bytes(self):
        return sum(arena.nbytes for arena in self.arenas)


# ---- Implementations. `run` returns c, d and the blended tensors, each None where the operation has none. ----


class Implementation:
    kind = "baseline"
    cancels = False  # whether d is a difference of two sums

    def __init__(self, case, x):
        self.case, self.dots, self.blends = case, case["operation"] != "blend", case["operation"] != "dot"
        self.prepare(x)

    def prepare(self, x):
        """What a training script does once, before its first step."""

    def run(self, x):
        c_and_d = self.sums(x) if self.dots else (None, None)
        return *c_and_d, self.blend(x) if self.blends else None

    def read_sums(self, c, d):
        return c.tolist(), d.tolist()


class Loop(Implementation):
    name = "PyTorch loop"

    def sums(self, x):
        c, d = torch.zeros(2, x.k, device=x.arenas[0].device)
        for i in x.fused:
            difference = x.t[i] - x.g[i]
            for k in x.present[i]:
                c[k].add_(torch.dot(x.g[i], x.v[k][i]))
                d[k].add_(torch.dot(difference, x.v[k][i]))
        return c, d

    def blend(self, x):
        for i, out in enumerate(x.out):
            first, *rest = x.present[i]
            torch.mul(x.v[first][i], x.weights[first], out=out)
            for k in rest:
                out.add_(x.v[k][i], alpha=x.weights[k])
        return x.out


class Foreach(Implementation):
    """There is no _foreach_dot, so products are made, and summed in f32: all at once where tensors are small."""

    name = "PyTorch foreach"

    def prepare(self, x):
        self.small = sum(x.lengths) / len(x.lengths) < (1 << 20 if x.arenas[0].is_cuda else 1 << 12)

    def sums(self, x):
        differences = torch._foreach_sub([x.t[i] for i in x.fused], [x.g[i] for i in x.fused])
        return self.products(x, x.g), self.products(x, dict(zip(x.fused, differences)))

    def products(self, x, factors):
        sums = []
        for k in range(x.k):
            indices = [i for i in x.fused if k in x.present[i]]
            products = torch._foreach_mul([factors[i] for i in indices], [x.v[k][i] for i in indices])
            if self.small:
                products = [torch.cat(products)]
            sums.append(torch.stack([product.sum(dtype=torch.float32) for product in products]).sum())
        return torch.stack(sums)

    def blend(self, x):
        blended = [None] * len(x.lengths)
        for k, (v, w) in enumerate(zip(x.v, x.weights)):
            first = [i for i, present in enumerate(x.present) if present[0] == k]
            rest = [i for i, present in enumerate(x.present) if k in present[1:]]
            if first:
                for i, tensor in zip(first, torch._foreach_mul([v[i] for i in first], w)):
                    blended[i] = tensor
            if rest:
                torch._foreach_add_([blended[i] for i in rest], [v[i] for i in rest], alpha=w)
        return blended


def obvious(t, g, v, w, present, fused, dots, blends):
    """What torch.compile is given."""
    c, d, blended = [0 for _ in v], [0 for _ in v], []
    for i in fused if dots else []:
        for k in present[i]:
            c[k] = c[k] + (g[i] * v[k][i]).sum(dtype=torch.float32)
            d[k] = d[k] + ((t[i] - g[i]) * v[k][i]).sum(dtype=torch.float32)
    for i, modalities in enumerate(present if blends else []):
        blended.append(sum(v[k][i] * w[k] for k in modalities))
    return torch.stack(c) if dots else None, torch.stack(d) if dots else None, blended if blends else None


class Compile(Implementation):
    name = "PyTorch compile"

    def prepare(self, x):
        if len(x.lengths) > 1000:
            raise Skip("not compiled for more than 1,000 tensors")
        torch._dynamo.reset()  # else a new case counts as a recompilation, and after a few none is compiled
        self.compiled = torch.compile(obvious, dynamic=False, fullgraph=True)

        def stop(*_):
            raise Skip(f"compilation took more than {COMPILATION} s")

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(COMPILATION)
        try:
            self.run(x)
        except Exception as error:  # whatever the compiler raises, it cannot take part
            raise Skip(str(error).strip().splitlines()[0][:200]) from error
        finally:
            signal.alarm(0)

    def run(self, x):
        return self.compiled(x.t, x.g, x.v, x.weights, x.present, x.fused, self.dots, self.blends)


class Matmul(Implementation):
    name = "PyTorch matmul"
    cancels = True

    def prepare(self, x):
        like = x.arenas[0]
        self.matrix = torch.empty(x.k + 2, sum(x.lengths), dtype=like.dtype, device=like.device)
        self.zeros = torch.zeros(max(x.lengths), dtype=like.dtype, device=like.device)
        self.weights = torch.tensor(x.weights, dtype=like.dtype, device=like.device)

    def run(self, x):
        buffers = [x.t, x.g, *x.v] if self.dots else x.v
        matrix = self.matrix[: len(buffers)]
        for row, tensors in zip(matrix, buffers):
            there = [self.zeros[:n] if tensor is None else tensor for n, tensor in zip(x.lengths, tensors)]
            torch.cat(there, out=row)
        sums, blended = (None, None), None
        if self.dots:
            t_v, g_v = (matrix[:2] @ matrix[2:].T).float()
            sums = g_v, t_v - g_v
        if self.blends:
            blended = (self.weights @ matrix[len(matrix) - x.k :]).split(x.lengths)
        return *sums, blended


class Tensor(c.Structure):
    _fields_ = [("len", c.c_uint64), ("dtype", c.c_int32), ("train", c.c_void_p), ("valid", c.c_void_p)]
    _fields_ += [("modalities", c.c_void_p), ("blended", c.c_void_p)]


class Report(c.Structure):
    _fields_ = [(name, c.c_uint32) for name in ("size", "modalities")]
    _fields_ += [(name, c.c_uint64) for name in ("observed", "skipped")]
    _fields_ += [(name, c.c_uint32) for name in ("flags", "nonfinite")]
    _fields_ += [(name, c.c_double * 32) for name in ("weights", "mean", "second_moment", "ogr")]
    _fields_ += [(name, c.c_double) for name in ("ogr_blend", "ogr_uniform")]


class Gradblend(Implementation):
    """One call of a C function of include/gradblend.h."""

    name, kind = "gradblend", "ours"
    library = None

    def prepare(self, x):
        cuda, self.plans = x.arenas[0].is_cuda, {}
        self.stream = c.c_void_p(torch.cuda.current_stream().cuda_stream) if cuda else None
        config = (c.c_int32 * 256)()  # larger than gradblend_config, whose size its default sets
        self.call("config_default", c.c_uint32(x.k), config)
        config[2] = 0  # average: GRADBLEND_MEAN, which is c after one observation
        self.blender = c.c_void_p()
        self.call("blender_create", c.c_int32(0 if cuda else -1), config, c.byref(self.blender))
        self.call("set_weights", self.blender, (c.c_double * x.k)(*x.weights), c.c_uint32(x.k), self.stream)

    def call(self, name, *arguments):
        if getattr(self.library, "gradblend_" + name)(*arguments):
            message = c.create_string_buffer(512)
            self.library.gradblend_last_error(message, c.c_size_t(512))
            raise RuntimeError(f"{name}: {message.value.decode()}")

    def plan(self, x):
        def address(tensor):
            return None if tensor is None else tensor.data_ptr()

        count, tensors = len(x.lengths), (Tensor * len(x.lengths))()
        gradients = (c.c_void_p * (count * x.k))(*(address(v[i]) for i in range(count) for v in x.v))
        for i in range(count):
            modalities = c.addressof(gradients) + i * x.k * c.sizeof(c.c_void_p)
            fields = address(x.t[i]), address(x.g[i]), modalities, address(x.out[i])
            tensors[i] = Tensor(x.lengths[i], list(DTYPES).index(x.dtype), *fields)
        plan = c.c_void_p()
        self.call("plan_create", self.blender, tensors, c.c_uint64(count), c.byref(plan))
        return plan

    def run(self, x):
        plan = self.plans.get(id(x)) or self.plans.setdefault(id(x), self.plan(x))
        self.call(self.case["operation"], self.blender, plan, self.stream)
        return None, None, x.out

    def read_sums(self, _c, _d):
        if not self.blends:  # dot leaves its sums pending, so they are observed here; step observes by itself
            self.call("observe", self.blender, self.stream)
        # After one observation the mean is c, and the second moment is the square of d.
        k, report = self.case["modalities"], Report(size=c.sizeof(Report))
        self.call("get_report", self.blender, c.byref(report), self.stream)
        return report.mean[:k], [math.sqrt(moment) for moment in report.second_moment[:k]]

    def __del__(self):
        for plan in getattr(self, "plans", {}).values():
            self.library.gradblend_plan_destroy(plan)
        if hasattr(self, "blender"):
            self.library.gradblend_blender_destroy(self.blender)


IMPLEMENTATIONS = (Gradblend, Loop, Foreach, Compile, Matmul)


# ---- Checks ----


def check(implementation, x, result):
    """The largest errors, relative to the sum of the absolute terms. ValueError: a result is out of bounds."""
    case, ours = implementation.case, implementation.kind == "ours"
    c_got, d_got, blended = result
    errors = {"error_c": None, "error_d": None, "error_blend": None}
    if implementation.dots:
        c_got, d_got = implementation.read_sums(c_got, d_got)
        d_want = [abs(d) for d in case["d"]] if ours else case["d"]
        for name, got, want in (("c", c_got, case["c"]), ("d", d_got, d_want)):
            errors[f"error_{name}"] = 0.0
            for k in range(x.k):
                size, exact = case[f"{name}_size"][k], abs(want[k])
                terms = size
                if name == "d" and implementation.cancels:  # |t v| + |g v| <= |(t - g) v| + 2 |g v|
                    terms, exact = size + 2 * case["c_size"][k], exact + 2 * abs(case["c"][k])
                # Roundings of n random terms add up as the root of n; a result of 16 bits is rounded itself.
                n = max(sum(x.lengths[i] for i in x.fused if k in x.present[i]), 1)
                bound = terms * (2**-16 if ours else 2**-18)
                if not ours and x.dtype != "f32":
                    bound += 16 * ROUNDING[x.dtype] * (terms / math.sqrt(n) + exact)
                error = abs(got[k] - want[k])
                if not error <= bound:  # `not`: it may be NaN
                    raise ValueError(f"{name}_{k} is {got[k]}, not {want[k]}")
                errors[f"error_{name}"] = max(errors[f"error_{name}"], error / size)
    if implementation.blends:
        roundings = 1 if ours else 2 * x.k
        part, least = (2 * x.k + 1) * 2.0**-24 + roundings * ROUNDING[x.dtype], roundings * 2.0**-25
        worst, left = 0.0, math.inf if x.arenas[0].is_cuda else CHECKED
        for i, got in enumerate(blended):
            for at in range(0, x.lengths[i], 1 << 20):
                if left <= 0:
                    break
                piece = slice(at, at + (1 << 20))
                terms = [x.v[k][i][piece].double() * x.weights[k] for k in x.present[i]]
                size, error = sum(term.abs() for term in terms), (got[piece].double() - sum(terms)).abs()
                if not bool((error <= size * part + least).all()):
                    raise ValueError(f"tensor {i} of the blend is wrong by {error.max().item()}")
                worst, left = max(worst, (error / size.clamp(min=2.0**-12)).max().item()), left - len(error)
        errors["error_blend"] = worst
    return errors


# ---- Devices ----


# Each has as many rounds of as many seconds at least as gradblend-lab gives it.


class Cpu:
    device, cache_bytes, driver = torch.device("cpu"), None, None
    rounds, round_seconds = 9, 0.01

    def name(self):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
        return f"{model}, {torch.get_num_threads()} threads"

    def free_bytes(self):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))

    def time(self, implementation, inputs, repeats):
        """Nanoseconds of one execution."""
        start = time.perf_counter_ns()
        for i in range(repeats):
            implementation.run(inputs[i % len(inputs)])
        return (time.perf_counter_ns() - start) / repeats

    def memory(self, work):
        return work(), None


class Gpu:
    device = torch.device("cuda", 0)
    rounds, round_seconds = 15, 0.005

    def __init__(self):
        self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self.driver = f"CUDA {torch.version.cuda}"

    def name(self):
        return torch.cuda.get_device_name(0)

    def free_bytes(self):
        return torch.cuda.mem_get_info()[0]

    def time(self, implementation, inputs, repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(repeats):
            implementation.run(inputs[i % len(inputs)])
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e6 / repeats

    def memory(self, work):
        """What `work` returns, and the bytes that it allocated at its peak, by PyTorch or by the driver."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        allocated, free = torch.cuda.memory_allocated(), self.free_bytes() + torch.cuda.memory_reserved()
        result = work()
        torch.cuda.synchronize()
        by_driver = free - self.free_bytes() - torch.cuda.memory_reserved()
        return result, torch.cuda.max_memory_allocated() - allocated + max(by_driver, 0)


# ---- Rounds ----


def measure(device, case, inputs, test, write):
    """Checks all implementations on a case, and times them one after another in each round."""
    running = []
    for kind in IMPLEMENTATIONS:
        if kind is Gradblend and kind.library is None:
            continue
        if test and kind is Compile and (case["operation"], case["case"]) != ("step", "flat 1e3/K4/f32"):
            continue  # each compilation takes seconds
        for tensor in inputs[0].out if case["operation"] != "dot" else []:
            tensor.fill_(math.nan)  # what is not written shows

        def prepare():
            implementation = kind(case, inputs[0])
            return implementation, implementation.run(inputs[0])

        try:
            (implementation, result), extra_bytes = device.memory(prepare)
            errors = check(implementation, inputs[0], result)
        except (Skip, ValueError, RuntimeError) as error:  # RuntimeError: no memory, or a dtype that has no kernel
            if kind.kind == "ours" or test and isinstance(error, ValueError):
                raise
            reason = str(error).splitlines()[0][:200]
            print(f"{case['operation']:6}{case['case']:28}{kind.name} skipped: {reason}", flush=True)
            known = {"operation": case["operation"], "case": case["case"], "implementation": kind.name}
            write({"record": "skipped", **known, "reason": reason})
            continue
        del result
        seconds = min(device.time(implementation, inputs, 1) for _ in range(1 if test else 3)) / 1e9
        line = {"record": "time", "operation": case["operation"], "case": case["case"], "implementation": kind.name}
        line |= {"kind": kind.kind, "times_ns": [], "sets": len(inputs), "host_ns": None, "extra_bytes": extra_bytes}
        line["repeats"] = 1 if test else min(math.ceil(device.round_seconds / seconds), MOST_REPEATS)
        slow = seconds > SLOW and kind.kind == "baseline"
        running.append((implementation, 1 if test else SLOW_ROUNDS if slow else device.rounds, line | errors))
    for r in range(device.rounds):
        for nth in range(len(running)):  # each round starts with another one
            implementation, rounds, line = running[(r + nth) % len(running)]
            if r < rounds:
                line["times_ns"].append(round(device.time(implementation, inputs, line["repeats"]), 1))
    write(case)
    for _, _, line in running:
        write(line)
    medians = {line["implementation"]: sorted(line["times_ns"])[rounds // 2] / 1e3 for _, rounds, line in running}
    text = ", ".join(f"{name} {time:.0f} us" for name, time in medians.items())
    print(f"{case['operation']:6}{case['case']:28}{text}", flush=True)


def is_cut_off(line):
    return line.startswith("{") and line.count("{") > line.count("}")


def records(path, lines):
    """As the laboratory reads them: the last line of the file or of a run may be cut off."""
    numbered = [(number, line.strip("\0 ")) for number, line in enumerate(lines, 1) if line.strip("\0 ")]
    for i, (number, line) in enumerate(numbered):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "record" not in record:
                sys.exit(f"{path}: line {number} is not a record")
            yield record
        except ValueError as error:
            following = numbered[i + 1][1] if i + 1 < len(numbered) else None
            at_the_end = following is None or '"run"' in following[:20] or is_cut_off(following)
            if not is_cut_off(line) or not at_the_end:
                sys.exit(f"{path}: line {number}: {error}")
            print(f"warning: {path}: line {number} is cut off, and left out", file=sys.stderr)


def seconds(text):
    if not float(text) >= 0:
        raise ValueError
    return float(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path, metavar="FILE", help="gives the cases; records are appended")
    parser.add_argument("--library", metavar="PATH", help="libgradblend.so, without which no ratio can be reported")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", action="append", metavar="FILTER", help="only cases whose name contains this")
    parser.add_argument("--budget", type=seconds, default=math.inf, metavar="SECONDS", help="start no case after this")
    parser.add_argument("--test", action="store_true", help="check and time once; such times mean nothing")
    options = parser.parse_args()

    torch.set_grad_enabled(False)
    device = Gpu() if options.device == "cuda" else Cpu()
    try:
        if options.library:
            Gradblend.library = c.CDLL(options.library)
            Gradblend.library.gradblend_step  # of another library there is none
        text = options.results.read_text(encoding="utf-8-sig", errors="replace")
        file = options.results.open("a")
    except (AttributeError, OSError) as error:
        parser.error(str(error))
    cases, commit = {}, None
    for line in records(options.results, text.split("\n")):
        if line["record"] == "run":
            commit = line["commit"]
        elif line["record"] == "case" and (not options.case or any(text in line["case"] for text in options.case)):
            cases.setdefault(line["case"], {})[line["operation"]] = line
    for wanted in options.case or [""]:
        if not any(wanted in case for case in cases):
            sys.exit(f"{options.results} has no case whose name contains {wanted!r}")
    deadline = time.monotonic() + options.budget
    with file:

        def write(record):
            print(json.dumps(record), file=file, flush=True)

        if not text.endswith("\n"):  # after a line that is cut off
            print(file=file)
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        command = "python3 benches/lab/pytorch.py " + shlex.join(sys.argv[1:])
        machine = {"device": options.device, "name": device.name(), "driver": device.driver}
        machine |= {"cache_bytes": device.cache_bytes, "software": f"PyTorch {torch.__version__}"}
        write({"record": "run", "date": date, "commit": commit, "command": command, **machine})
        for operations in cases.values():
            if time.monotonic() > deadline:
                break
            first = next(iter(operations.values()))
            inputs = [Inputs(first, device.device)]
            if device.free_bytes() < 1.2 * inputs[0].bytes():  # matmul holds as much again
                print(f"{first['case']}: skipped: no memory", flush=True)
                continue
            # Four times a GPU's cache, so that no set is still in it when its turn comes.
            sets = min(math.ceil(4 * (device.cache_bytes or 0) / inputs[0].bytes()), MOST_SETS)
            inputs += [Inputs(first, device.device) for _ in range(sets - 1)]
            for case in operations.values():
                measure(device, case, inputs, options.test, write)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the end of `pytorch.py | head` is no traceback
    main()
