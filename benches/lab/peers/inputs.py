"""The inputs of a case, made from the formula in benches/README.md."""

import json
import math
import pathlib
from typing import NamedTuple

import torch

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
ALIGNMENT = 256  # bytes


class Shape(NamedTuple):
    """One tensor of a network."""

    length: int
    reached_by: list  # modalities whose loss reaches it; for the others its gradient is absent
    fused: bool  # whether the fused loss does, so that t and g exist


def shapes_of(case):
    """The tensors of a case's list."""
    everyone = list(range(case["modalities"]))
    source = case["list"]
    if "flat" in source:
        return [Shape(source["flat"], everyone, True)]
    if "equal" in source:
        return [Shape(source["equal"]["len"], everyone, True)] * source["equal"]["count"]
    if "tensors" in source:  # only in --test
        return source["tensors"]

    shapes = []
    for part in model(source["model"])["parts"]:
        reached_by = everyone if part["reached_by"] is None else part["reached_by"]
        shapes += [Shape(math.prod(shape), reached_by, part["fused"]) for shape in part["tensors"]]
    return shapes


def model(name):
    """A network of shapes.json."""
    above = pathlib.Path(__file__).resolve().parents[1]
    models = json.loads((above / "shapes.json").read_text())["models"]
    return next(model for model in models if model["name"] == name)


def signed(x):
    """The int64 of the same bits."""
    return x - (1 << 64) if x >> 63 else x


def shift_right(x, bits):
    """Brings in zeros. That of int64 brings in copies of the sign, so they are masked."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def numbers(which, first, count, device):
    """Elements first, first + 1, ... of list `which`, in f32."""
    x = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=device)
    x.add_(which << 40).mul_(signed(0x9E3779B97F4A7C15))
    x.bitwise_xor_(shift_right(x, 30)).mul_(signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_(shift_right(x, 27)).mul_(signed(0x94D049BB133111EB))
    return shift_right(x, 40).sub_(1 << 23).to(torch.float32).div_(1 << 23)


def groups(tensors, most):
    """Parts of the tensors, in order, in groups of at most so many elements."""
    group, count = [], 0
    for tensor in tensors:
        for part in tensor.split(most):
            if count + len(part) > most:
                yield group
                group, count = [], 0
            group.append(part)
            count += len(part)
    yield group


class Layout:
    """What the operations of a case have in common: its tensors, and where they lie, the same in every list."""

    def __init__(self, case):
        shapes = shapes_of(case)
        self.k = case["modalities"]
        self.weights = case["weights"]
        self.near = case["near"]
        self.dtype_name = case["dtype"]
        self.dtype = DTYPES[case["dtype"]]
        self.itemsize = self.dtype.itemsize

        self.lengths = [shape.length for shape in shapes]
        self.elements = sum(self.lengths)
        self.present = [shape.reached_by for shape in shapes]
        self.has_fused = [shape.fused for shape in shapes]
        self.place_tensors(offset=case["misaligned"])
        self.index_tensors()

        lists = self.k + 3  # t, g, each v_k, and the blended one
        self.bytes = lists * self.length * self.itemsize

    def place_tensors(self, offset):
        """Every tensor starts at a multiple of ALIGNMENT, or `offset` elements behind it."""
        multiple = ALIGNMENT // self.itemsize
        self.pieces = []  # lengths, in turn of a gap and of a tensor, with a gap at the end
        end = 0
        for length in self.lengths:
            start = math.ceil(end / multiple) * multiple + offset
            self.pieces += [start - end, length]
            end = start + length
        self.pieces.append(-end % multiple)
        self.length = sum(self.pieces)

    def index_tensors(self):
        """Numbers of the tensors that an operation on many of them at once needs together."""
        self.fused = []  # those that add to the sums
        self.fused_by = [[] for _ in range(self.k)]  # of them, those that modality k reaches
        self.first = [[] for _ in range(self.k)]  # those that modality k is the first to reach
        self.rest = [[] for _ in range(self.k)]  # those that k reaches and is not the first
        for i, reached_by in enumerate(self.present):
            if self.has_fused[i] and reached_by:
                self.fused.append(i)
            for k in reached_by:
                if self.has_fused[i]:
                    self.fused_by[k].append(i)
                which = self.first if k == reached_by[0] else self.rest
                which[k].append(i)


class Inputs:
    """One set: the lists t, g and v[k], with None for a tensor that is absent, and `out` for what is blended.

    A list lies in one piece of memory, its arena. What is between tensors, or absent, is zero there.
    """

    def __init__(self, layout, device, like=None):
        self.layout = layout
        self.arenas = [self.arena(device) for _ in range(layout.k + 3)]
        if like is None:
            for which, arena in enumerate(self.arenas[:-1]):
                self.fill(which, arena)
            if layout.near:
                self.bring_near()
        else:
            for arena, source in zip(self.arenas, like.arenas):
                arena.copy_(source)

        t, g, *v, out = self.arenas
        self.t = self.only_present(t, layout.has_fused)
        self.g = self.only_present(g, layout.has_fused)
        self.v = [self.only_present(arena, [k in by for by in layout.present]) for k, arena in enumerate(v)]
        self.out = self.tensors(out)

    def arena(self, device):
        layout = self.layout
        memory = torch.zeros(layout.length + ALIGNMENT // layout.itemsize, dtype=layout.dtype, device=device)
        start = -memory.data_ptr() % ALIGNMENT // layout.itemsize
        return memory[start : start + layout.length]

    def tensors(self, arena):
        return list(arena.split(self.layout.pieces)[1::2])  # between them are the gaps

    def fill(self, which, arena):
        """Numbers are made for many tensors at a time, as there may be 100 000 small ones."""
        most = 1 << (24 if arena.is_cuda else 20)
        first = 0
        for group in groups(self.tensors(arena), most):
            lengths = [len(part) for part in group]
            made = numbers(which, first, sum(lengths), arena.device)
            torch._foreach_copy_(group, list(made.split(lengths)))
            first += sum(lengths)

    def bring_near(self):
        """A part at a time: t and g in f32 may take twice their memory."""
        t, g = self.arenas[:2]
        for t_part, g_part in zip(t.split(1 << 22), g.split(1 << 22)):
            t_part.copy_(g_part.float() + t_part.float() / 64)

    def only_present(self, arena, is_present):
        """Its tensors, with None for the absent, whose elements become zero."""
        tensors = self.tensors(arena)
        for i, tensor in enumerate(tensors):
            if not is_present[i]:
                tensor.zero_()
                tensors[i] = None
        return tensors
