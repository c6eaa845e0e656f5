#!/usr/bin/env python3
"""A table of the variants that run.sh of scripts/gpu-variants timed.

    table.py RESULTS    the folder that run.sh wrote
"""

import json
import math
import pathlib
import statistics
import sys


def median(times):
    return statistics.median([time for time in times if time is not None] or [math.nan])


def read(path):
    """The run, and by operation and case: the time of ours, and that of the faster limit."""
    run, ours, limit = None, {}, {}
    for line in path.open(encoding="utf-8"):
        record = json.loads(line)
        if record["kind"] == "run":
            run = record
        elif record["kind"] == "time":
            case, time = f"{record['operation']} {record['case']}", median(record["times_ns"])
            if record["role"] == "limit":
                limit[case] = min(time, limit.get(case, math.inf))
            elif record["contender"] == "gradblend":
                ours[case] = time
    return run, ours, limit


def write(title, names, rows):
    """Columns as wide as what is in them."""
    rows = [["", *names], *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(f"\n{title}\n")
    for first, *rest in rows:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]).rstrip())


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    left_out = (folder / "left-out.txt").read_text().splitlines()
    names = (folder / "variants.txt").read_text().split()
    names = [name for name in names if not any(line.startswith(f"{name}: ") for line in left_out)]
    rounds = [
        {name: read(path / f"{name}.jsonl") for name in names if (path / f"{name}.jsonl").exists()}
        for path in sorted(folder.glob("round-*"), key=lambda path: int(path.name.split("-")[1]))
    ]
    print("\n".join(["left out:", *left_out]) if left_out else "no variant was left out")
    if not names or not any(rounds):
        sys.exit("no results")

    base = names[0]
    run = next(run for results in rounds for run, _, _ in results.values())
    cases = list(dict.fromkeys(case for results in rounds for _, ours, _ in results.values() for case in ours))

    def over_rounds(name, case, number):
        """A number of each round that has it, by what `read` found."""
        return [
            number(results, *results[name][1:])
            for results in rounds
            if name in results and base in results and case in results[name][1] and case in results[base][1]
        ]

    def ratio(name, case):
        return median(over_rounds(name, case, lambda results, ours, _: ours[case] / results[base][1][case]))

    def share(name, case):
        return median(over_rounds(name, case, lambda _, ours, limit: limit.get(case, math.nan) / ours[case]))

    def spread(case):
        times = over_rounds(base, case, lambda _, ours, __: ours[case])
        return f"±{50 * (max(times) - min(times)) / median(times):.1f} %" if len(times) > 1 else "-"

    def cell(number):
        return "-" if math.isnan(number) else f"{number:.3f}"

    def mean(name):
        """Of cases that all variants have, so that columns can be compared."""
        common = [case for case in cases if not any(math.isnan(ratio(other, case)) for other in names)]
        return math.exp(statistics.mean(math.log(ratio(name, case)) for case in common)) if common else math.nan

    print(f"{run['name']}, {run['driver']}, commit {run['commit'].split(',')[0]}, rounds: {len(rounds)}")
    if " --test" in run["command"]:
        print("Tiny inputs, once: these times mean nothing.")
    rows = [[case, spread(case), *(cell(ratio(name, case)) for name in names[1:])] for case in cases]
    rows.append(["geometric mean", "", *(cell(mean(name)) for name in names[1:])])
    write(f"Time over that of {base}, whose column has half of what its rounds are apart by:", names, rows)
    rows = [[case, *(cell(share(name, case)) for name in names)] for case in cases]
    write("Share of the limit:", names, rows)


main()
