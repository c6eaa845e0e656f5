"""What cuobjdump says of the kernels: resources, instructions, and the loops among them.

Read by scripts/roofline and .ci/check_machine_code.py. Loops are found on the control-flow graph, not by the span of
their addresses: the compiler puts rarely taken blocks of a loop elsewhere, and blocks of others in between.
"""

import re
import subprocess
from collections import namedtuple

# The kernels that read gradients, and the main loops of each: one for each number of modalities that has a body of its
# own (1, 2, 3, 4, up to 8) and for each dtype.
PASSES = ["dot", "blend", "dot_blend"]
MAIN_LOOPS = 5 * 3
# Loads of 128 bits: of gradients, and of partial sums, which other blocks write and which are therefore loaded STRONG.
WIDE = re.compile(r"\bLDG(?!\S*STRONG)\S*\.128\S* R(\d+)")
PARTIAL = re.compile(r"\bLDG\S*\.128\.STRONG\S* R(\d+)")

Resources = namedtuple("Resources", "registers stack shared local")
# A loop's first address, the instructions of all its blocks in the order of addresses, and its paths: see `Graph.paths`.
Loop = namedtuple("Loop", "address instructions graph body latches")


class Unreadable(Exception):
    """The machine code is not what this reader knows."""


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(text):
    """(architecture, kernel) -> Resources, from `cuobjdump --dump-resource-usage`."""
    found, arch, kernel = {}, None, None
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line.strip()):
            arch = match[1]
        elif match := re.match(r"Function (\w+):", line.strip()):
            kernel = match[1]
        elif kernel and (match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) .*?LOCAL:(\d+)", line)):
            found[arch, kernel] = Resources(*map(int, match.groups()))
    return found


def instructions(text):
    """(architecture, kernel) -> [(address, instruction)], from `cuobjdump -sass`."""
    found, arch, listing = {}, None, None
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line.strip()):
            arch = match[1]
        elif match := re.match(r"Function : (\w+)", line.strip()):
            listing = found.setdefault((arch, match[1]), [])
        elif listing is not None and (match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line)):
            listing.append((int(match[1], 16), match[2].strip()))
    return found


def opcode(text):
    """`LDG.E.128` of `@!P0 LDG.E.128 R4, ...`."""
    words = text.split()
    return words[1] if words[0].startswith("@") else words[0]


def registers(text):
    return {int(number) for number in re.findall(r"\bR(\d+)\b", text)}


def waits(listing, wide=WIDE):
    """Walks instructions, and yields each such load as (True, instruction) and each first use of one that is on its way
    as (False, instruction). A thread waits there, and by the time it goes on all earlier loads may have come."""
    pending = set()
    for _, text in listing:
        operands = text.split(",", 1)[-1] if "," in text else ""
        if registers(operands) & pending:
            pending.clear()
            yield False, text
        if match := wide.search(text):
            pending |= set(range(int(match[1]), int(match[1]) + 4))
            yield True, text


class Graph:
    """The control-flow graph of a kernel: blocks by the address of their first instruction."""

    def __init__(self, listing):
        self.blocks, self.successors = {}, {}
        after = dict(zip((address for address, _ in listing), [address for address, _ in listing[1:]] + [None]))
        leaders, ends = {listing[0][0]}, {}
        for address, text in listing:
            name, target = opcode(text), re.search(r"(?:^|[\s,])(0x[0-9a-f]+)$", text)
            always = not text.startswith("@")
            # A call that keeps no return address is a jump; where it comes back, if at all, a register tells RET.
            if re.match(r"(BRA|JMP)\b|CALL\..*NOINC", name):
                if not target or int(target[1], 16) not in after:
                    raise Unreadable(f"{address:#x}: no target of `{text}`")
                # A predicate or a condition among the operands makes it a branch that may not be taken.
                always = always and text.split(None, 1)[1] == target[1]
                ends[address] = [int(target[1], 16)] + ([] if always else [after[address]])
            elif re.match(r"(BRX|BRXU|JMX|EXIT|RET|KILL)\b", name):
                # Where an indirect jump goes is not in its text: its targets are blocks that nothing else enters.
                ends[address] = [] if always else [after[address]]
        for address, targets in ends.items():
            leaders |= {*targets, after[address]} - {None}
        for address, text in listing:
            if address in leaders:
                block = address
                self.blocks[block] = []
            self.blocks[block].append((address, text))
        for block, items in self.blocks.items():
            last = items[-1][0]
            self.successors[block] = [a for a in ends.get(last, [after[last]]) if a is not None]
        self.predecessors = {block: [] for block in self.blocks}
        for block, targets in self.successors.items():
            for target in targets:
                self.predecessors[target].append(block)
        self.order()

    def order(self):
        """Numbers the blocks in reverse postorder, from the entry and from each block that nothing else enters, and
        finds each one's immediate dominator (Cooper, Harvey and Kennedy)."""
        done, seen, roots = [], set(), set()
        for root in sorted(self.blocks, key=lambda block: (bool(self.predecessors[block]), block)):
            if root in seen:
                continue
            roots.add(root)
            seen.add(root)
            stack = [(root, iter(self.successors[root]))]
            while stack:
                block, targets = stack[-1]
                target = next((t for t in targets if t not in seen), None)
                if target is None:
                    done.append(stack.pop()[0])
                else:
                    seen.add(target)
                    stack.append((target, iter(self.successors[target])))
        self.number = {block: i for i, block in enumerate(reversed(done), 1)}
        self.number[None] = 0  # stands before all roots
        self.dominator = {root: None for root in roots}
        self.dominator[None] = None
        changed = True
        while changed:
            changed = False
            for block in reversed(done):
                if block in roots:
                    continue
                known = [p for p in self.predecessors[block] if p in self.dominator]
                best = known[0]
                for other in known[1:]:
                    while best != other:
                        if self.number[best] > self.number[other]:
                            best = self.dominator[best]
                        else:
                            other = self.dominator[other]
                if self.dominator.get(block, block) != best:
                    self.dominator[block] = best
                    changed = True

    def dominates(self, block, other):
        while self.number[other] > self.number[block]:
            other = self.dominator[other]
        return other == block

    def loops(self):
        """Natural loops, smallest first."""
        latches = {}
        for block, targets in self.successors.items():
            for target in targets:
                if self.dominates(target, block):
                    latches.setdefault(target, []).append(block)
        found = []
        for head, ends in latches.items():
            body, stack = {head}, list(ends)
            while stack:
                block = stack.pop()
                if block not in body:
                    body.add(block)
                    stack += self.predecessors[block]
            items = sorted(item for block in body for item in self.blocks[block])
            found.append(Loop(head, items, self, body, ends))
        return sorted(found, key=lambda loop: len(loop.instructions))


def main_loops(listing):
    """The innermost loops around loads of 128 bits, by address. None stands for loads outside of all loops."""
    loops = Graph(listing).loops()
    wide = {address for address, text in listing if WIDE.search(text)}
    main = {}
    for loop in loops:
        inside = wide & {address for address, _ in loop.instructions}
        if inside:
            main[loop.address] = loop
            wide -= inside
    if wide:
        raise Unreadable(f"{min(wide):#x}: a load of 128 bits outside of all loops")
    return [main[address] for address in sorted(main)]


def paths(loop, weigh):
    """The best path of an iteration for each key, from the loop's head back to it and once through each inner loop:
    key -> (score, [(address, instruction)]). `weigh` gives a block's key and score, tuples that add up along a path."""
    graph = loop.graph
    add = lambda a, b: tuple(x + y for x, y in zip(a, b))
    best, found = {}, {}
    for block in sorted(loop.body, key=graph.number.get):
        key, score = weigh(graph.blocks[block])
        entries = {None: ((), None, None)} if block == loop.address else {}
        for before in graph.predecessors[block]:
            if before not in loop.body or graph.dominates(block, before):
                continue
            if before not in best:
                raise Unreadable(f"{loop.address:#x}: a loop with two entries, at {block:#x}")
            for other, (total, *_) in best[before].items():
                if other not in entries or total > entries[other][0]:
                    entries[other] = (total, before, other)
        best[block] = {}
        for other, (total, before, _) in entries.items():
            start = other is None
            here = key if start else add(other, key)
            sum_ = score if start else add(total, score)
            if here not in best[block] or sum_ > best[block][here][0]:
                best[block][here] = (sum_, before, other)
    for latch in loop.latches:
        for key, (score, *_) in best[latch].items():
            if key not in found or score > found[key][0]:
                found[key] = (score, latch)
    result = {}
    for key, (score, block) in found.items():
        trail, at = [], key
        while block is not None:
            trail.append(block)
            _, block, at = best[block][at]
        result[key] = (score, [item for block in reversed(trail) for item in graph.blocks[block]])
    return result
