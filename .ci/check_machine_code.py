"""Reads the machine code of the kernels' images and fails on what would make them slow or wrong.

    check_machine_code.py CUOBJDUMP "80 90 ..." IMAGE...

Fails unless each kernel has code for each of the architectures; on a stack or local memory (spills) in any kernel, on a main loop of the pass kernels that does not load 128 bits at
a time or that uses one of its loads before all are on their way; on a ticket that is taken without a fence before it; and on PTX that
leaves a compiler the choice of fusing a multiplication with an addition. With cuobjdump from NVIDIA's toolkit.
"""

import re
import subprocess
import sys

# One main loop for each number of modalities that has a body of its own (1, 2, 3, 4, up to 8) and for each dtype.
MAIN_LOOPS = 5 * 3
PASSES = ["dot", "blend", "dot_blend"]
WIDE = re.compile(r"\bLDG\S*\.128\S* R(\d+)")

failures = []


def fail(text):
    failures.append(text)
    print("FAIL", text)


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(text):
    """(architecture, kernel) -> registers; fails on memory that stands in for registers."""
    found, arch, kernel = {}, None, None
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line.strip()):
            arch = match[1]
        elif match := re.match(r"Function (\w+):", line.strip()):
            kernel = match[1]
        elif kernel and (match := re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", line)):
            registers, stack, local = map(int, match.groups())
            found[arch, kernel] = registers
            if stack or local:
                fail(f"{arch} {kernel}: {stack} bytes of stack, {local} of local memory")
    return found


def instructions(text):
    """(architecture, kernel) -> [(address, instruction)]."""
    found, arch, listing = {}, None, None
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line.strip()):
            arch = match[1]
        elif match := re.match(r"Function : (\w+)", line.strip()):
            listing = found.setdefault((arch, match[1]), [])
        elif listing is not None and (match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line)):
            listing.append((int(match[1], 16), match[2].strip()))
    return found


def loops(listing):
    """Spans of addresses that a branch closes, smallest first."""
    spans = set()
    for address, text in listing:
        if match := re.search(r"\bBRA\S*\s+(?:\S+,\s*)*(0x[0-9a-f]+)", text):
            target = int(match[1], 16)
            if target < address:
                spans.add((target, address))
    return sorted(spans, key=lambda span: span[1] - span[0])


def registers(text):
    return {int(number) for number in re.findall(r"\bR(\d+)\b", text)}


def early_use(loop):
    """The first instruction of a loop that waits for a wide load while others are still to be issued."""
    left = sum(bool(WIDE.search(text)) for _, text in loop)
    pending = set()
    for _, text in loop:
        operands = text.split(",", 1)[-1] if "," in text else ""
        if registers(operands) & pending and left:
            return text
        if match := WIDE.search(text):
            pending |= set(range(int(match[1]), int(match[1]) + 4))
            left -= 1
    return None


def check(arch, kernel, listing):
    if any(re.search(r"\b(LDL|STL)\b", text) for _, text in listing):
        fail(f"{arch} {kernel}: reads or writes local memory")
    if kernel in PASSES:
        spans = loops(listing)
        wide = [address for address, text in listing if WIDE.search(text)]
        main = {next((span for span in spans if span[0] <= address <= span[1]), None) for address in wide} - {None}
        if len(main) != MAIN_LOOPS:
            fail(f"{arch} {kernel}: {len(main)} main loops with 128-bit loads, expected {MAIN_LOOPS}")
        for start, end in sorted(main):
            if use := early_use([item for item in listing if start <= item[0] <= end]):
                fail(f"{arch} {kernel}: the loop at {start:#x} waits at `{use}` before all its loads are on their way")
        print(f"     {arch} {kernel}: {len(main)} main loops, {len(wide)} loads of 128 bits")
        fences = [address for address, text in listing if text.startswith("MEMBAR") or " MEMBAR" in text]
        tickets = [address for address, text in listing if "ATOMG" in text and ".INC" in text]
        if len(tickets) != 1 or not any(fence < tickets[0] for fence in fences):
            fail(f"{arch} {kernel}: {len(tickets)} tickets, fences at {fences}")


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
        for (arch, kernel), registers in resources(run(cuobjdump, "--dump-resource-usage", image)).items():
            seen.setdefault(kernel, {})[arch] = registers
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
