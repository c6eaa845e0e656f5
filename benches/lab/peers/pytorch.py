#!/usr/bin/env python3
"""What is written in PyTorch for the sums and the blend of Gradient-Blending, timed on the cases of a results file.

    python3 benches/peers/pytorch.py --results FILE.jsonl [--library libgradblend.so] [--device cpu|cuda]
        [--filter TEXT] [--quick] [--budget SECONDS]
    python3 benches/peers/pytorch.py --test [--library libgradblend.so] [--device cpu|cuda]

FILE, in the format that benches/README.md describes, has `case` lines with exact sums; the inputs are made again from
their formula, and a `run` line and a `case` and `time` (or `skipped`) lines are appended to it. Needs PyTorch, and
TorchJD if it is to take part; shapes.json is in the folder above.

    copy              limit: copy_ of half of the bytes of the floor to the other half
    gradblend         ours, by ctypes (`cargo rustc --release --features capi --crate-type cdylib`): one call a run
    PyTorch dot       a loop over tensors: torch.dot; mul, then add_(alpha=w)
    PyTorch foreach   the _foreach functions, and sums in f32
    PyTorch compile   torch.compile of the obvious loop; up to 1000 tensors
    PyTorch matmul    gradients concatenated, zeros where absent; then (t; g) V' and w V
    TorchJD Gramian   the same, but for TorchJD's compute_gramian of the rows t, g, v_k

Temporaries of PyTorch dot, foreach and compile are fresh tensors, as PyTorch makes them: on the CPU, large ones are
fresh pages each time. `step` is the sums and the blend; none of them updates moments. A result out of bounds ends the
script. On the CPU, there is one set of inputs, and memory is not measured.

The modules beside this one, in the order in which to read them:

    inputs.py    tensors, and the numbers in them
    base.py      what all contenders have in common
    ways.py      what each of them does
    ours.py      gradblend by ctypes
    check.py     whether a result is right
    place.py     the CPU or a GPU: clock and memory
    measure.py   turns
    selftest.py  --test
"""

import argparse
import collections
import ctypes
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time

import torch

from check import Wrong
from measure import Results, run_case
from ours import Gradblend
from place import Cpu, Gpu
from selftest import test
from ways import NO_TORCHJD


def read(path, device, text):
    """The cases of a file that were measured on the device and have a text in operation/name, and the latest commit.

    Each case is a list of its operations' lines.
    """
    cases, commit, here = {}, None, False
    for line in path.read_text().splitlines():
        if not line.strip():
            continue
        line = json.loads(line)
        if line["kind"] == "run":
            here, commit = line["device"] == device, line["commit"]
        if line["kind"] == "case" and here and text in f"{line['operation']}/{line['case']}":
            operations = cases.setdefault(line["case"], {})
            operations[line["operation"]] = line
    return [list(operations.values()) for operations in cases.values()], commit


def quick(cases):
    """Networks, and of flat lists the longest of each dtype, with as many modalities as most of them have."""
    flats = [case for case, *_ in cases if "flat" in case["list"]]
    counts = collections.Counter(case["modalities"] for case in flats)
    usual = max(counts, key=counts.get, default=None)
    longest = {}
    for case in flats:
        if case["modalities"] == usual:
            so_far = longest.setdefault(case["dtype"], case)
            if case["list"]["flat"] > so_far["list"]["flat"]:
                longest[case["dtype"]] = case
    names = {case["case"] for case in longest.values()}
    return [operations for operations in cases if "model" in operations[0]["list"] or operations[0]["case"] in names]


def git_describe():
    """The commit. Results that are being added to change nothing that is measured."""
    here = pathlib.Path(__file__).resolve().parents[2]
    unchanged = ["git", "diff", "--quiet", "HEAD", "--", ".", ":!benches/results"]
    try:
        described = subprocess.run(["git", "describe", "--always"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(unchanged, cwd=here).returncode != 0
    except (OSError, subprocess.CalledProcessError):
        return None  # in the bundle of scripts/gpu-bundle, say
    return described.stdout.strip() + ("-dirty" if dirty else "")


def run_line(device, place, commit):
    name, driver = place.describe()
    software = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    if not NO_TORCHJD:
        software += f", TorchJD {importlib.metadata.version('torchjd')}"
    return {
        "kind": "run",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": os.environ.get("GRADBLEND_COMMIT") or git_describe() or commit,
        "device": device,
        "name": name,
        "driver": driver,
        "cache_bytes": place.cache,
        "software": software,
        "command": "python3 benches/peers/pytorch.py " + shlex.join(sys.argv[1:]),
    }


def measure_all(options, place):
    cases, commit = read(options.results, options.device, options.filter)
    if options.quick:
        cases = quick(cases)
    if not cases:
        sys.exit(f"{options.results} has no such cases")
    place.deadline = time.monotonic() + options.budget
    with options.results.open("a") as file:
        results = Results(file)
        results.write(run_line(options.device, place, commit))
        for operations in cases:
            if time.monotonic() < place.deadline:
                run_case(place, operations, results)
                continue
            for case in operations:
                results.write(case)
                results.skipped(case, None, f"the budget of {options.budget:g} s was over")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=pathlib.Path, metavar="FILE", help="has the cases; results are appended")
    parser.add_argument("--library", metavar="PATH", help="libgradblend.so, to measure beside the others")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases with this in operation/name")
    parser.add_argument("--quick", action="store_true", help="only networks and the longest flat list of each dtype")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="start no case after so long")
    parser.add_argument("--test", action="store_true", help="check all ways on tiny inputs, and measure nothing")
    options = parser.parse_args()
    if not options.test and not options.results:
        parser.error("--results or --test")

    torch.set_grad_enabled(False)
    place = Gpu() if options.device == "cuda" else Cpu()
    if options.library:
        Gradblend.library = ctypes.CDLL(options.library)
    try:
        if options.test:
            test(place)
        else:
            measure_all(options, place)
    except Wrong as error:
        sys.exit(f"wrong: {error}")


if __name__ == "__main__":
    main()
