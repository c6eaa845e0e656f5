"""Reads the machine code of the kernels' images and fails on what would make them slow or wrong.

    check_machine_code.py CUOBJDUMP "80 90 ..." IMAGE...

Fails unless each kernel has code for each of the architectures; on a stack or local memory (spills) in any kernel; on a
main loop of the pass kernels that does not load 128 bits at a time; on a round of one, or of the fold, that uses one of
its loads before all are on their way; on a ticket that is taken without a fence before it; on waiting for the number of
the next span before this one is looked up; and on PTX that leaves a compiler the choice of fusing a multiplication with an
addition. With cuobjdump from NVIDIA's toolkit.
"""

import re
import sys
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from machine_code import MAIN_LOOPS, PARTIAL, PASSES, WIDE, Unreadable, instructions, main_loops, registers, resources, run, waits

failures = []


def fail(text):
    failures.append(text)
    print("FAIL", text)


def early_use(block, wide):
    """The first instruction of a block that waits for such a load while others are still to be issued."""
    left = sum(bool(wide.search(text)) for _, text in block)
    for load, text in waits(block, wide):
        left -= load
        if not load and left:
            return text
    return None


def soon_used(listing, address):
    """The instruction that uses what the one at an address brings before anything else is loaded, if there is one."""
    after = [text for at, text in listing if at >= address]
    brought = {int(re.search(r"\bR(\d+)\b", after[0])[1])}
    for text in after[1:]:
        if registers(text) & brought:
            return text
        if re.search(r"\bLDG\b", text):
            return None
    return None


def check(arch, kernel, listing):
    if any(re.search(r"\b(LDL|STL)\b", text) for _, text in listing):
        fail(f"{arch} {kernel}: reads or writes local memory")
    if kernel in PASSES:
        try:
            main = main_loops(listing)
        except Unreadable as reason:
            fail(f"{arch} {kernel}: {reason}")
            return
        wide = [address for address, text in listing if WIDE.search(text)]
        if len(main) != MAIN_LOOPS:
            fail(f"{arch} {kernel}: {len(main)} main loops with 128-bit loads, expected {MAIN_LOOPS}")
        # Whole rounds of a loop and its last one have loads of their own, each in one block.
        for loop in main:
            for block in loop.body:
                if use := early_use(loop.graph.blocks[block], WIDE):
                    fail(f"{arch} {kernel}: the loop at {loop.address:#x} waits at `{use}` before all its loads are on their way")
        blocks = main[0].graph.blocks.values() if main else []
        folds = [block for block in blocks if any(PARTIAL.search(text) for _, text in block)]
        if len(folds) != ("dot" in kernel):
            fail(f"{arch} {kernel}: partial sums are loaded in {len(folds)} blocks, expected them together in one")
        for block in folds:
            if use := early_use(block, PARTIAL):
                fail(f"{arch} {kernel}: the fold waits at `{use}` before all its loads are on their way")
        print(f"     {arch} {kernel}: {len(main)} main loops, {len(wide)} loads of 128 bits")
        fences = [address for address, text in listing if text.startswith("MEMBAR") or " MEMBAR" in text]
        tickets = [address for address, text in listing if "ATOMG" in text and ".INC" in text]
        if len(tickets) != 1 or not any(fence < tickets[0] for fence in fences):
            fail(f"{arch} {kernel}: {len(tickets)} tickets, fences at {fences}")
        spans = [address for address, text in listing if "ATOMG" in text and ".ADD" in text]
        if len(spans) != 1:
            fail(f"{arch} {kernel}: {len(spans)} places where a span is taken")
        elif use := soon_used(listing, spans[0]):
            fail(f"{arch} {kernel}: waits for the next span at `{use}`, before it looks this one up")


def check_ptx(image, text):
    """Bits may not depend on who compiles the PTX: every operation rounds by itself, and only f32 is fused, on purpose."""
    if "fma.rn.f32" not in text and "add.rn.f64" not in text and "mul.rn.f64" not in text:
        fail(f"{image}: no PTX to be read")
    for operation in sorted(set(re.findall(r"\b(?:add|sub|mul|fma|mad)\.(?:\w+\.)*f(?:32|64)\b", text))):
        if ".rn." not in operation or operation == "fma.rn.f64":
            fail(f"{image}: PTX has {operation}")


def main():
    cuobjdump, architectures, images = sys.argv[1], sys.argv[2].split(), sys.argv[3:]
    seen, read = {}, set()
    for image in images:
        check_ptx(image, run(cuobjdump, "-ptx", image))
        for (arch, kernel), used in resources(run(cuobjdump, "--dump-resource-usage", image)).items():
            seen.setdefault(kernel, {})[arch] = used.registers
            if used.stack or used.local:
                fail(f"{arch} {kernel}: {used.stack} bytes of stack, {used.local} of local memory")
        for (arch, kernel), listing in instructions(run(cuobjdump, "-sass", image)).items():
            check(arch, kernel, listing)
            if len(listing) > 20:
                read.add((arch, kernel))
    for kernel, registers in sorted(seen.items()):
        print(f"     {kernel}: registers", ", ".join(f"{arch} {count}" for arch, count in registers.items()))
    for kernel in [*PASSES, "observe", "reweight", "reset", "set_weights"]:
        for arch in (f"sm_{architecture}" for architecture in architectures):
            if arch not in seen.get(kernel, {}) or (arch, kernel) not in read:
                fail(f"{arch} {kernel}: not there, or not to be read")
    sys.exit(bool(failures))


main()
