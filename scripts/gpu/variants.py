#!/usr/bin/env python3
"""The variants of the tuning constants that scripts/gpu-variants builds, and the sources of one.

    scripts/gpu/variants.py list [NAME...]      the names of those, or of all, once every edit is known to apply
    scripts/gpu/variants.py make NAME FOLDER    makes FOLDER the sources as they stand, with the edits of a variant
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
BASE = "as-it-stands"


def constant(name, value, other):
    return ("src/layout.rs", f"const {name}: u64 = {value};", f"const {name}: u64 = {other};")


def chunk(elements):
    return constant("CHUNK", "1 << 16", elements)


def threads(count):
    return constant("THREADS", 256, count)


def resident(blocks):
    return constant("RESIDENT", 2, blocks)


def loads(least):
    return constant("LOADS", 8, least)


def hint(now, then):
    return ("kernels/common.cuh", now, then)


LOAD = "return __ldcs(at<const uint4>(address));"
STORE = "__stcs(at<uint4>(address), unit);"

# name: edits, each a file, what stands there once, what stands there then. More loads, or three
# blocks, need more registers than there are. At most 128 elements may enter a sum (pass.cu
# asserts it), so fewer threads need shorter chunks. The hints are those of whole units: misaligned lists keep theirs.
VARIANTS = {
    BASE: [],
    "chunk-32k": [chunk("1 << 15")],
    "chunk-16k": [chunk("1 << 14")],
    "loads-4": [loads(4)],
    "threads-512": [threads(512), resident(1)],
    "threads-128": [threads(128), resident(4), chunk("1 << 15")],
    "spans-in-turns": [("kernels/pass.cu", "next = atomicInc(&at<Progress>(launch.progress)->taken, UINT32_MAX);", "next = shared.span;")],
    "load-default": [hint(LOAD, "return *at<const uint4>(address);")],
    "load-cg": [hint(LOAD, "return __ldcg(at<const uint4>(address));")],
    "store-default": [hint(STORE, "*at<uint4>(address) = unit;")],
}


def edited(name):
    """The files that a variant changes, as bytes by name."""
    texts = {}
    for file, old, new in VARIANTS[name]:
        text = texts.setdefault(file, (ROOT / file).read_text())
        if text.count(old) != 1:
            sys.exit(f"{name}: {file}: {old!r} stands there {text.count(old)} times, expected once")
        texts[file] = text.replace(old, new)
    return {file: text.encode() for file, text in texts.items()}


def as_other_package():
    """A version of its own: cargo tells packages of one target folder apart by name and version, not by where they lie,
    and would take what it built of the copy for what it is to build of the working tree."""
    manifest, lock = (ROOT / "Cargo.toml").read_text(), (ROOT / "Cargo.lock").read_text()
    line = re.search(r'^name = ".*"\nversion = ".*"\n', manifest, re.MULTILINE).group()
    other = line.removesuffix('"\n') + '+variant"\n'
    assert manifest.count(line) == 1 and lock.count(line) == 1, line
    return {"Cargo.toml": manifest.replace(line, other).encode(), "Cargo.lock": lock.replace(line, other).encode()}


def make(name, folder):
    """Writes only what differs, so that cargo builds only what changed; a file's date is that of its last change here."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    files = [file for file in listed.stdout.decode().split("\0") if (ROOT / file).is_file()]
    changed = edited(name) | as_other_package()
    for file in files:
        source, copy = ROOT / file, folder / file
        content = changed.get(file) or source.read_bytes()
        if not copy.is_file() or copy.read_bytes() != content:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
            copy.chmod(source.stat().st_mode)
    for copy in folder.rglob("*"):
        if copy.is_file() and str(copy.relative_to(folder)) not in files:
            copy.unlink()


def main():
    what, *arguments = sys.argv[1:] or ["help"]
    if what == "list":
        unknown = [name for name in arguments if name not in VARIANTS]
        if unknown:
            sys.exit(f"there is no variant {unknown[0]}; there are: {', '.join(VARIANTS)}")
        for name in VARIANTS:
            edited(name)
        print("\n".join(name for name in VARIANTS if name == BASE or not arguments or name in arguments))
    elif what == "make":
        make(arguments[0], pathlib.Path(arguments[1]))
    else:
        sys.exit(__doc__)


main()
