"""What all contenders have in common."""

import math

ROUNDING = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}  # half the distance from 1 to the next number


class Way:
    """A contender. `run` is timed; all else is not."""

    name = None
    role = "peer"
    cancels = False  # whether d is a difference of two sums
    unsigned_d = False  # whether the signs of d are lost
    shared_bytes = 0  # memory that it uses and that another way has allocated

    def __init__(self, case, layout, place):
        self.case, self.layout, self.place = case, layout, place
        self.dots = case["operation"] != "blend"
        self.blends = case["operation"] != "dot"
        self.prepare()

    def prepare(self):
        """What a training script does once, before its first step."""

    @staticmethod
    def extra(case, layout):
        """Bytes that it may need beside the lists, roughly."""
        raise NotImplementedError

    def first_run(self, x):
        return self.run(x)

    def run(self, x):
        """c and d (None for a blend), and the blended tensors (None for a dot)."""
        c, d = self.sums(x) if self.dots else (None, None)
        blended = self.blend(x) if self.blends else None
        return c, d, blended

    def read_sums(self, c, d):
        """As lists, after a run."""
        return c.tolist(), d.tolist()

    def bound(self, size, exact, n):
        """How far off a sum of n terms may be, that is `exact` and whose terms' absolute values add up to `size`.

        The inputs are random, so the roundings of n terms add up as the root of n, which makes size / sqrt(n). A result
        of 16 bits, of a tensor or of all, is rounded itself. Sums in f32 stay small as they run, so their roundings do
        not grow with n either. Each is allowed a few times over.
        """
        bound = size * 2**-18
        rounding = ROUNDING[self.layout.dtype_name]
        if rounding > 2**-24:
            bound += 16 * rounding * (size / math.sqrt(n) + exact)
        return bound

    def blend_roundings(self):
        """How often a blended element is rounded: each product and each sum."""
        return 2 * self.layout.k

    def close(self):
        pass
