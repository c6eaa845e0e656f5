"""--test: the inputs, and then all ways once, on tiny lists."""

from check import Wrong
from inputs import ALIGNMENT, DTYPES, Inputs, Layout, Shape, numbers
from measure import WAYS, prepared
from place import Skip
from ways import Compile

# Of losses that reach different tensors, as those of `late fusion` do.
MIXED = {
    "tensors": [
        Shape(700, [0, 2], True),
        Shape(65, [1, 2], True),
        Shape(1, [0, 1, 2], True),
        Shape(33, [0], False),
        Shape(9, [1], False),
    ]
}
LISTS = [({"flat": 3001}, 4), ({"flat": 1}, 1), ({"equal": {"count": 40, "len": 33}}, 8), (MIXED, 3)]  # and K


def test(place):
    test_numbers(place)
    for source, k in LISTS:
        for dtype in DTYPES:
            for odd in (False, True):
                test_case(place, source, k, dtype, odd)
    print("all right")


def test_numbers(place):
    """Some elements, compared with the formula in Python's integers."""
    mask = (1 << 64) - 1
    for which, i in ((0, 0), (1, 7), (2, 12_345), (5, 10**9 + 7), (33, (1 << 40) - 2)):
        x = (((which << 40) + i + 1) * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        known = ((x >> 40) - 2**23) / 2**23
        if numbers(which, i, 1, place.device).item() != known:
            raise Wrong(f"element {i} of list {which} is not {known}")


def test_case(place, source, k, dtype, odd):
    """`odd`: misaligned, and with t near g."""
    case = {"case": f"{source}/K{k}/{dtype}/{odd}", "list": source, "modalities": k, "dtype": dtype}
    case |= {"misaligned": odd, "near": odd, "threads": 2, "weights": [1 / 8 + i / 16 for i in range(k)]}
    layout = Layout(case)
    x = Inputs(layout, place.device)
    for tensor in x.t + x.v[0]:
        if tensor is not None and tensor.data_ptr() % ALIGNMENT != odd * layout.itemsize:
            raise Wrong(f"{case['case']}: alignment")

    case |= exact_sums(x) | {"bytes": 4096}
    for operation in ("dot", "blend", "step"):
        for kind in WAYS:
            if kind is Compile and (dtype == "f16" or not odd or operation != "step"):
                continue  # it takes seconds
            try:
                contender = prepared(kind, case | {"operation": operation}, layout, place, [x])
            except Skip as why:
                print(f"{kind.name:18}{dtype:6} skipped: {why}", flush=True)
                continue
            contender.way.close()
            if odd and source is MIXED and operation == "step":
                print(f"{kind.name:18}{dtype:6}", contender.known, flush=True)
    place.workspace = None


def exact_sums(x):
    """c and d, and what the absolute values of their terms add up to, in f64."""
    layout = x.layout
    sums = {name: [0.0] * layout.k for name in ("c", "d", "c_size", "d_size")}
    for k, indices in enumerate(layout.fused_by):
        for i in indices:
            t, g, v = x.t[i].double(), x.g[i].double(), x.v[k][i].double()
            for name, terms in (("c", g * v), ("d", (t - g) * v)):
                sums[name][k] += terms.sum().item()
                sums[f"{name}_size"][k] += terms.abs().sum().item()
    return sums
