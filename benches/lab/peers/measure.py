"""Times the contenders of a case in turns, after checking what they compute."""

import gc
import json
import math
import statistics
import sys
from dataclasses import dataclass, field

import torch

from base import Way
from check import Wrong, check
from inputs import Inputs, Layout
from ours import Gradblend
from place import Skip
from ways import Compile, Copy, Dot, Foreach, Gramian, Matmul, first_line

WAYS = (Copy, Gradblend, Dot, Foreach, Compile, Matmul, Gramian)
TURNS, SLOW_TURNS = 9, 3
SLOW = 0.5  # seconds: a contender that takes longer has SLOW_TURNS
MOST_REPEATS = 10_000  # runs in a turn
BUSY = 0.1  # processors: where other programs took more, the times are not to be trusted


@dataclass
class Contender:
    """A way that has run and was found right."""

    way: Way
    known: dict  # its fields of the raw results that are not times
    slow: bool = False
    repeats: int = 1
    times: list = field(default_factory=list)
    host: list = field(default_factory=list)


class Results:
    """Appends lines to the raw results."""

    def __init__(self, file):
        self.file = file

    def write(self, line):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def skipped(self, case, contender, reason):
        line = {"kind": "skipped", "operation": case["operation"], "case": case["case"]}
        self.write(line | {"contender": contender, "reason": str(reason)})


def prepared(kind, case, layout, place, inputs):
    """A contender, from its class. Raises Skip where it cannot take part, and Wrong where it is wrong."""
    there = place.workspace_bytes() if issubclass(kind, Matmul) else 0
    place.require(kind.extra(case, layout) - there)
    place.watch_memory()
    x = inputs[0]
    if case["operation"] != "dot":
        torch._foreach_add_(x.out, math.nan)  # what is not written shows
    try:
        way = kind(case, layout, place)
        result = way.first_run(x)
        place.wait()
    except (torch.OutOfMemoryError, NotImplementedError) as error:
        raise Skip(first_line(error)) from error
    except RuntimeError as error:
        text = first_line(error)
        if "enough memory" in text or "not implemented" in text:  # on the CPU, there are no classes for these
            raise Skip(text) from error
        raise

    known = {"extra_bytes": None, "error_c": None, "error_d": None, "error_blend": None}
    if way.role != "limit":
        known["extra_bytes"] = place.extra_bytes(way)
        known.update(check(way, x, result))
    return Contender(way, known)


def contenders_of(case, layout, place, inputs, results):
    """All that can take part."""
    contenders = []
    for kind in WAYS:
        if kind is Gradblend and kind.library is None:
            continue
        if kind is Gramian and case["operation"] == "blend":
            continue
        try:
            contender = prepared(kind, case, layout, place, inputs)
        except Skip as why:
            results.skipped(case, kind.name, why)
            continue
        except (Wrong, RuntimeError) as why:
            # Somebody else's mistake is worth knowing, and no reason to measure nothing.
            if kind.role != "peer":
                raise
            wrong = "wrong: " if isinstance(why, Wrong) else ""
            results.skipped(case, kind.name, wrong + first_line(why))
            print(f"{case['operation']:6}{case['case']:32}{kind.name:18}{wrong}{first_line(why)}", flush=True)
            continue
        choose_repeats(contender, place, inputs)
        contenders.append(contender)
    return contenders


def choose_repeats(contender, place, inputs):
    """So many runs that a turn is long enough to be measured."""
    way = contender.way
    for x in inputs[1:] or inputs:  # to warm up
        way.run(x)
    once, _ = place.time(way, inputs, 1)
    if once < place.turn_ns:
        more = [place.time(way, inputs, 1) for _ in range(3)]
        once = min([once] + [of_device for of_device, _ in more])
    contender.slow = once > SLOW * 1e9
    contender.repeats = min(math.ceil(place.turn_ns / max(once, 1)), MOST_REPEATS)


def take_turns(contenders, place, inputs):
    """Each turn begins with another contender."""
    for turn in range(TURNS):
        first = turn % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            if contender.slow and turn % (TURNS // SLOW_TURNS) != 0:
                continue
            of_device, of_host = place.time(contender.way, inputs, contender.repeats)
            contender.times.append(round(of_device, 1))
            if of_host is not None:
                contender.host.append(round(of_host, 1))


def measure(place, case, layout, inputs, results):
    """An operation of a case."""
    results.write(case)
    contenders = contenders_of(case, layout, place, inputs, results)
    for contender in contenders:  # to warm up again what was given back when the next one was prepared
        contender.way.run(inputs[0])

    if not contenders:
        return
    start = place.clock()
    take_turns(contenders, place, inputs)
    others = place.others(start)
    if others is not None and others > BUSY:
        # A loop in equal parts waits for the one whose processor is taken: 20 times as long, at worst.
        text = f"NOT IDLE: other programs took {others:.2f} processors during {case['operation']} {case['case']}"
        print(text, flush=True)

    for contender in contenders:
        report(contender, place, case, inputs, others, results)
        contender.way.close()


def report(contender, place, case, inputs, others, results):
    way, times = contender.way, contender.times
    line = {
        "kind": "time",
        "operation": case["operation"],
        "case": case["case"],
        "contender": way.name,
        "role": way.role,
        "times_ns": times,
        "repeats": contender.repeats,
        "sets": len(inputs),
        "host_ns": contender.host if place.cuda else None,
        "launches": place.launches(way, inputs[0]),
        "allocations": None,
        "others": others,
    }
    results.write(line | contender.known)
    median = statistics.median(times)
    label = f"{case['operation']:6}{case['case']:32}{way.name:18}"
    print(f"{label}{median / 1e3:14.1f} us {case['bytes'] / median:8.2f} GB/s", flush=True)


def run_case(place, cases, results):
    """All operations of one case: the same inputs, but for the exact sums."""
    try:
        layout = Layout(cases[0])
        place.sets = place.sets_for(min(case["bytes"] for case in cases))
        place.require(place.sets * layout.bytes)
        inputs = [Inputs(layout, place.device)]
        while len(inputs) < place.sets:
            inputs.append(Inputs(layout, place.device, like=inputs[0]))
    except (Skip, torch.OutOfMemoryError) as why:
        for case in cases:
            results.write(case)
            results.skipped(case, None, why)
            print(f"{case['operation']:6}{case['case']:32}skipped: {why}", flush=True)
        return

    for case in cases:
        place.use_threads(case["threads"])
        measure(place, case, layout, inputs, results)

    place.workspace = None
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
