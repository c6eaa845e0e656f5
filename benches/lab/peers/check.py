"""Whether a result is right.

What a way computes is compared with f64. What is within its bound of that is within two bounds of gradblend, so the two
are not compared again.
"""

import torch

from base import ROUNDING

PIECE = 1 << 20  # elements whose blend is compared at a time
PIECES = 16  # that are compared on the CPU; on a GPU, all are


class Wrong(Exception):
    """A result that is further off than its arithmetic explains."""


def check(way, x, result):
    """The largest errors, by the names of the raw results."""
    c, d, blended = result
    errors = {"error_c": None, "error_d": None, "error_blend": None}
    if way.dots:
        c, d = way.read_sums(c, d)
        errors["error_c"] = error_of_sums(way, "c", c)
        errors["error_d"] = error_of_sums(way, "d", d)
    if way.blends:
        errors["error_blend"] = error_of_blend(way, x, blended)
    return errors


def error_of_sums(way, name, computed):
    """`name` is c or d. In parts of what the absolute values of a sum's terms add up to."""
    case, layout = way.case, way.layout
    worst = 0
    for k, got in enumerate(computed):
        want = case[name][k]
        if name == "d" and way.unsigned_d:
            want = abs(want)
        terms = size = case[f"{name}_size"][k]
        exact = abs(want)
        if name == "d" and way.cancels:
            # The terms of <t,v> - <g,v> are |t v| and |g v|, together at most |(t - g) v| + 2 |g v|.
            terms += 2 * case["c_size"][k]
            exact += 2 * abs(case["c"][k])

        n = sum(layout.lengths[i] for i in layout.fused_by[k])
        off = abs(got - want)
        if not off <= way.bound(terms, exact, max(n, 1)):  # `not`, as it may be NaN
            raise Wrong(f"{way.name}: {name}_{k} is {got}, not {want}; its terms add up to {size}")
        worst = max(worst, off / size if size else 0)
    return worst


def error_of_blend(way, x, blended):
    """In parts of sum_k |w_k v_k|, or of 2^-12 where that is less."""
    layout = way.layout
    if blended is not x.out:
        torch._foreach_copy_(x.out, list(blended))
    pieces = list(zip(*(arena.split(PIECE) for arena in x.arenas[2:])))  # of each v_k, and of the blended list
    if not way.place.cuda and len(pieces) > PIECES:
        pieces = [pieces[i * (len(pieces) - 1) // (PIECES - 1)] for i in range(PIECES)]

    in_f32 = (2 * layout.k + 1) * 2**-24
    part = in_f32 + way.blend_roundings() * ROUNDING[layout.dtype_name]
    least = way.blend_roundings() * 2**-25  # below the normal numbers of f16
    worst = 0
    for *v, got in pieces:
        terms = [v_k.double() * w_k for v_k, w_k in zip(v, layout.weights)]
        size = sum(term.abs() for term in terms)
        off = (got.double() - sum(terms)).abs()
        bad = ~(off <= size * part + least)  # NaN is bad
        if bad.any():
            raise Wrong(f"{way.name}: {int(bad.sum())} blended elements are wrong, one by {off[bad].max().item()}")
        worst = max(worst, (off / size.clamp(min=2**-12)).max().item())
    return worst
