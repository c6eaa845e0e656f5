"""What is written in PyTorch for the sums c_k = <g, v_k> and d_k = <t - g, v_k>, and for the blend sum_k w_k v_k.

Each way is a class, whose `sums` and `blend` are what a user would write. t, g and each v_k are lists of tensors of one
dimension, with None where a gradient is absent; layout.present[i] are the modalities that reach tensor i.
"""

import signal
import time

import torch

from base import Way
from place import Skip

try:
    from torchjd._linalg import compute_gramian  # what torchjd.aggregation calls; there is no public name

    NO_TORCHJD = None
except Exception as error:  # not only ImportError: it may not fit this PyTorch
    NO_TORCHJD = f"TorchJD: {error}"

COMPILATION = 180  # seconds that it may take, if the budget has as many
TOO_LONG = "to compile takes too long"


def pick(tensors, indices):
    return [tensors[i] for i in indices]


class Copy(Way):
    """copy_ of half of the bytes of the floor to the other half."""

    name = "copy"
    role = "limit"

    def prepare(self):
        half = self.case["bytes"] // 2
        memory = torch.empty(self.place.sets, 2, half, dtype=torch.uint8, device=self.place.device)
        self.pairs = list(memory.random_())  # written to, so that the pages exist
        self.turn = 0

    @staticmethod
    def extra(case, layout):
        return case["bytes"]

    def run(self, x):
        source, target = self.pairs[self.turn]
        self.turn = (self.turn + 1) % len(self.pairs)
        target.copy_(source)
        return None, None, None


class Dot(Way):
    """What one writes first: a loop over tensors and modalities, with torch.dot, mul and add_(alpha=w)."""

    name = "PyTorch dot"

    @staticmethod
    def extra(case, layout):
        return max(layout.lengths) * layout.itemsize

    def sums(self, x):
        c, d = torch.zeros(2, self.layout.k, device=self.place.device)
        c_k, d_k = c.unbind(), d.unbind()
        for i in self.layout.fused:
            difference = x.t[i] - x.g[i]
            for k in self.layout.present[i]:
                c_k[k].add_(torch.dot(x.g[i], x.v[k][i]))
                d_k[k].add_(torch.dot(difference, x.v[k][i]))
        return c, d

    def blend(self, x):
        w = self.layout.weights
        for i, out in enumerate(x.out):
            first, *rest = self.layout.present[i]
            torch.mul(x.v[first][i], w[first], out=out)
            for k in rest:
                out.add_(x.v[k][i], alpha=w[k])
        return x.out


class Foreach(Way):
    """The _foreach functions, which take all tensors in one call, as PyTorch's optimisers do.

    There is no _foreach_dot or _foreach_sum. So products are made, and summed in f32: each tensor's, or all at once
    after torch.cat, where tensors are small.
    """

    name = "PyTorch foreach"

    def prepare(self):
        small = 1 << 20 if self.place.cuda else 1 << 12  # where torch.cat is faster
        count = len(self.layout.lengths)
        self.concatenates = count > 1 and self.layout.elements / count < small

    @staticmethod
    def extra(case, layout):
        lists = 1 if case["operation"] == "blend" else 3
        return lists * layout.elements * layout.itemsize

    def sums(self, x):
        fused = self.layout.fused
        differences = torch._foreach_sub(pick(x.t, fused), pick(x.g, fused))
        differences = dict(zip(fused, differences))
        return self.dots_with(x.g, x.v), self.dots_with(differences, x.v)

    def dots_with(self, list_, v):
        sums = []
        for k, indices in enumerate(self.layout.fused_by):
            products = torch._foreach_mul(pick(list_, indices), pick(v[k], indices)) if indices else []
            sums.append(self.total(products))
        return torch.stack(sums)

    def total(self, products):
        if not products:
            return torch.zeros((), device=self.place.device)
        if self.concatenates:
            return torch.cat(products).sum(dtype=torch.float32)
        return torch.stack([product.sum(dtype=torch.float32) for product in products]).sum()

    def blend(self, x):
        layout = self.layout
        blended = [None] * len(layout.lengths)
        for v, w, first, rest in zip(x.v, layout.weights, layout.first, layout.rest):
            if first:
                for i, tensor in zip(first, torch._foreach_mul(pick(v, first), w)):
                    blended[i] = tensor
            if rest:
                torch._foreach_add_(pick(blended, rest), pick(v, rest), alpha=w)
        return blended


def obvious(t, g, v, w, present, fused, dots, blends):
    """What torch.compile is given."""
    c, d, blended = [0 for _ in v], [0 for _ in v], []
    for i in fused if dots else []:
        for k in present[i]:
            c[k] = c[k] + (g[i] * v[k][i]).sum(dtype=torch.float32)
            d[k] = d[k] + ((t[i] - g[i]) * v[k][i]).sum(dtype=torch.float32)
    for i, reached_by in enumerate(present if blends else []):
        blended.append(sum(v[k][i] * w[k] for k in reached_by))
    return torch.stack(c) if dots else None, torch.stack(d) if dots else None, blended if blends else None


class Compile(Way):
    """torch.compile of the obvious loop over tensors."""

    name = "PyTorch compile"
    took_too_long = set()  # names of cases whose other operations are not tried

    def prepare(self):
        if self.case["case"] in self.took_too_long:
            raise Skip(TOO_LONG)
        if len(self.layout.lengths) > 1000:
            raise Skip("not tried for more than 1000 tensors")
        self.seconds = int(min(COMPILATION, self.place.deadline - time.monotonic()))
        if self.seconds < 10:
            raise Skip("no time left to compile")
        torch._dynamo.reset()  # else a new case counts as a recompilation, and after a few of them nothing is compiled
        self.compiled = torch.compile(obvious, dynamic=False, fullgraph=True)

    @staticmethod
    def extra(case, layout):
        return Foreach.extra(case, layout)

    def first_run(self, x):
        """Compiles, for so long and no longer. Whatever the compiler raises, it cannot take part."""

        def too_long(*_):
            raise Skip(TOO_LONG)

        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(self.seconds)
        try:
            return self.run(x)
        except Exception as error:
            if TOO_LONG in str(error):  # the compiler may have wrapped it
                self.took_too_long.add(self.case["case"])
                raise Skip(TOO_LONG) from error
            raise Skip(first_line(error)) from error
        finally:
            signal.alarm(0)

    def run(self, x):
        layout = self.layout
        return self.compiled(x.t, x.g, x.v, layout.weights, layout.present, layout.fused, self.dots, self.blends)


def first_line(error):
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


class Matmul(Way):
    """All gradients concatenated, zeros where absent, into memory that is kept; then products of matrices."""

    name = "PyTorch matmul"
    cancels = True

    def prepare(self):
        layout, device = self.layout, self.place.device
        self.shared_bytes = self.place.workspace_bytes()
        self.matrix = self.place.make_workspace(layout)
        self.zeros = torch.zeros(max(layout.lengths), dtype=layout.dtype, device=device)
        self.weights = torch.tensor(layout.weights, dtype=layout.dtype, device=device)

    @staticmethod
    def extra(case, layout):
        return (layout.k + 3) * layout.elements * layout.itemsize  # t, g, each v_k, and the blended one

    def concatenate(self, lists):
        """Each list as a row."""
        matrix = self.matrix[: len(lists)]
        for row, tensors in zip(matrix, lists):
            there = [self.zeros[:n] if tensor is None else tensor for n, tensor in zip(self.layout.lengths, tensors)]
            torch.cat(there, out=row)
        return matrix

    def products(self, matrix):
        """<t, v_k> and <g, v_k>, from the rows t, g and v_k."""
        return matrix[:2] @ matrix[2:].T

    def run(self, x):
        c = d = blended = None
        if self.dots:
            matrix = self.concatenate([x.t, x.g, *x.v])
            v = matrix[2:]
            t_v, c = self.products(matrix).float()
            d = t_v - c
        else:
            v = self.concatenate(x.v)
        if self.blends:
            blended = (self.weights @ v).split(self.layout.lengths)
        return c, d, blended


class Gramian(Matmul):
    """The same, but for TorchJD's compute_gramian of the rows, as its jac_to_grad does by default.

    Not for `blend` alone, which would be the same as matmul.
    """

    name = "TorchJD Gramian"

    def prepare(self):
        if NO_TORCHJD:
            raise Skip(NO_TORCHJD)
        super().prepare()

    def products(self, matrix):
        return compute_gramian(matrix)[:2, 2:]
