"""Where the contenders run, the CPU or a GPU: its clock, and what is known of its memory."""

import ctypes as c
import math
import os
import pathlib
import platform
import re
import time

import torch

MOST_SETS = 256


class Skip(Exception):
    """A contender that cannot take part."""


class Place:
    """What both have in common."""

    sets = 1  # of inputs, used in turn
    deadline = math.inf  # of time.monotonic(), for all cases
    workspace = None  # memory for all gradients of a case in one piece, kept from one operation to the next

    def require(self, needed):
        free = self.free() - (1 << 29)  # some for all else
        if needed > free:
            raise Skip(f"needs {needed / 1e9:.1f} GB of memory, {max(free, 0) / 1e9:.1f} GB are free")

    def workspace_bytes(self):
        return 0 if self.workspace is None else self.workspace.nbytes

    def make_workspace(self, layout):
        if self.workspace is None:
            self.workspace = torch.empty(layout.k + 2, layout.elements, dtype=layout.dtype, device=self.device)
        return self.workspace


class Cpu(Place):
    device = torch.device("cpu")
    cuda = False
    cache = None
    turn_ns = 20e6  # a turn takes at least so long

    def describe(self):
        """Name of the processor; it has no driver."""
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(": ")[1], None
        return platform.machine(), None

    def use_threads(self, count):
        torch.set_num_threads(count or os.cpu_count())

    def sets_for(self, bytes_of_case):
        return 1

    def free(self):
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
        raise OSError("/proc/meminfo does not say what is available")

    def wait(self):
        pass

    def clock(self):
        """Seconds since some time, and seconds of processors that other programs have taken since some time.

        Other machines on the same host count as well: they are `steal`.
        """
        with open("/proc/stat") as stat:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.readline().split()[1:9])
        everyone = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), everyone - time.process_time()

    def others(self, since):
        """Processors that other programs took, on average, since clock() gave `since`."""
        now, taken = self.clock()
        then, taken_then = since
        return round(max(taken - taken_then, 0) / (now - then), 2)

    def time(self, way, inputs, repeats):
        """Nanoseconds of a run; of the host's part there is nothing to say."""
        start = time.perf_counter_ns()
        for i in range(repeats):
            way.run(inputs[i % len(inputs)])
        return (time.perf_counter_ns() - start) / repeats, None

    def watch_memory(self):
        pass

    def extra_bytes(self, way):
        return None

    def launches(self, way, x):
        return None


class Gpu(Place):
    device = torch.device("cuda", 0)
    cuda = True
    turn_ns = 5e6

    def __init__(self):
        self.cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.driver = c.CDLL("libcuda.so.1")

    def describe(self):
        """Name of the GPU, and version of its driver."""
        version = c.c_int()
        self.driver.cuDriverGetVersion(c.byref(version))
        driver = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
        about = pathlib.Path("/proc/driver/nvidia/version")
        numbers = re.search(r"\b\d+\.\d+(\.\d+)?\b", about.read_text()) if about.exists() else None
        return torch.cuda.get_device_name(0), f"{numbers.group()}, {driver}" if numbers else driver

    def use_threads(self, count):
        pass

    def sets_for(self, bytes_of_case):
        """So many that none is found in the second-level cache when its turn comes."""
        return min(max(math.ceil(4 * self.cache / bytes_of_case), 1), MOST_SETS)

    def free(self):
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def wait(self):
        torch.cuda.synchronize()

    def clock(self):
        return None

    def others(self, since):
        return None

    def time(self, way, inputs, repeats):
        """Nanoseconds of a run, and of the host's part of it when it does not wait for the device."""
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for i in range(repeats):
            way.run(inputs[i % len(inputs)])
        end.record()
        torch.cuda.synchronize()

        few = min(repeats, 10)  # else the host waits for room in the queue of launches
        start = time.perf_counter_ns()
        for i in range(few):
            way.run(inputs[i % len(inputs)])
        host = (time.perf_counter_ns() - start) / few
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e6 / repeats, host

    def watch_memory(self):
        """From here on, for extra_bytes."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.allocated_before = torch.cuda.memory_allocated()
        self.free_before, _ = torch.cuda.mem_get_info()

    def extra_bytes(self, way):
        """What a way has allocated, at its peak."""
        extra = torch.cuda.max_memory_allocated() - self.allocated_before
        if way.role == "ours":  # allocates by the driver, so that PyTorch does not count it
            free, _ = torch.cuda.mem_get_info()
            extra += max(self.free_before - free, 0)
        return extra + way.shared_bytes

    def launches(self, way, x):
        """Nodes of a CUDA graph captured of a run; None where it cannot be captured."""
        # A graph has memory of its own.
        if len(way.layout.lengths) > 1000 or 2 * way.extra(way.case, way.layout) > self.free():
            return None
        try:
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(graph):
                result = way.run(x)
            count = c.c_size_t()  # PyTorch does not say, but the driver does
            refused = self.driver.cuGraphGetNodes(c.c_void_p(graph.raw_cuda_graph()), None, c.byref(count))
            del result  # not before the graph is read
            return None if refused else count.value
        except (RuntimeError, TypeError, AttributeError):  # the last two: an older PyTorch
            return None
        finally:
            torch.cuda.synchronize()
