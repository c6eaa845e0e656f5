//! Reads the machine code of the kernels' images, and fails on what would make them slow or wrong.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::LazyLock;

use anyhow::{Context, Result, anyhow, bail, ensure};
use petgraph::Direction::Incoming;
use petgraph::algo::dominators::{Dominators, simple_fast};
use petgraph::graph::{DiGraph, NodeIndex};
use petgraph::visit::EdgeRef;
use regex::Regex;
use xshell::cmd;

use crate::header::abi;
use crate::{cuda, tools};

const ARCHITECTURES: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"];
const KERNELS: [&str; 7] = ["dot", "blend", "dot_blend", "observe", "reweight", "reset", "set_weights"];
/// Kernels that read gradients.
const PASSES: [&str; 3] = [KERNELS[0], KERNELS[1], KERNELS[2]];
/// Main loops of a pass: for each dtype, one for 1, 2, 3, 4, and up to 8 modalities.
const MAIN_LOOPS: usize = 3 * 5;

/// Bytes in flight that CUB's tuning of cub::DeviceTransform (`arch_to_min_bytes_in_flight`) asks of an SM of a B200, the
/// most of all GPUs that it names.
const BYTES_IN_FLIGHT: u64 = 64 << 10;
const THREADS_PER_SM: u64 = abi::THREADS_PER_BLOCK * abi::MIN_BLOCKS_PER_SM;
const _: () = assert!(abi::LOADS_IN_FLIGHT * abi::ALIGNMENT * THREADS_PER_SM >= BYTES_IN_FLIGHT);
const _: () = assert!(abi::PARTIALS_IN_FLIGHT * 16 * abi::THREADS_PER_BLOCK >= BYTES_IN_FLIGHT);

/// A regular expression that is compiled once.
macro_rules! regex {
    ($name:ident = $pattern:expr) => {
        #[allow(clippy::expect_used, reason = "the pattern is a literal")]
        static $name: LazyLock<Regex> = LazyLock::new(|| Regex::new($pattern).expect("a valid pattern"));
    };
}
regex!(RESOURCES = r"REG:\d+ STACK:\d+ .*LOCAL:\d+");
regex!(INSTRUCTION = r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);");
regex!(FLOAT_OPERATION = r"\b(?:add|sub|mul|fma|mad)\.(?:\w+\.)*f(?:32|64)\b");
regex!(REGISTER = r"\bR(\d+)\b");
regex!(TARGET = r"(?:^|[\s,])(0x[0-9a-f]+)$");
// A call that keeps no return address is a jump.
regex!(BRANCH = r"^(BRA|JMP)\b|^CALL\..*NOINC");
// The targets of an indirect jump are blocks that nothing else enters.
regex!(END = r"^(BRX|BRXU|JMX|EXIT|RET|KILL)\b");
regex!(LOAD = r"\bLDG");
regex!(WIDE = r"\bLDG\S*\.128\S* R(\d+)");
regex!(LOCAL = r"\b(LDL|STL)\b");

type Graph<'a> = DiGraph<&'a [Instruction<'a>], ()>;

struct Instruction<'a> {
    address: u64,
    text: &'a str,
}

impl<'a> Instruction<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let (_, [address, text]) = INSTRUCTION.captures(line)?.extract();
        Some(Self { address: u64::from_str_radix(address, 16).ok()?, text: text.trim() })
    }

    /// `LDG.E.128` of `@!P0 LDG.E.128 R4, ...`.
    fn opcode(&self) -> &str {
        self.text.split_whitespace().nth(usize::from(self.is_conditional())).unwrap_or_default()
    }

    fn is_conditional(&self) -> bool {
        self.text.starts_with('@')
    }

    fn has(&self, parts: &[&str]) -> bool {
        parts.iter().all(|part| self.text.contains(part))
    }

    /// The first register of a load of 128 bits: of gradients, or of partial sums, which other blocks write and which
    /// are therefore loaded STRONG.
    fn wide_load(&self, partials: bool) -> Option<u32> {
        let register = WIDE.captures(self.text).and_then(|found| found[1].parse().ok());
        register.filter(|_| self.text.contains("STRONG") == partials)
    }
}

fn registers(text: &str) -> HashSet<u32> {
    REGISTER.captures_iter(text).filter_map(|found| found[1].parse().ok()).collect()
}

/// Checks images: of kernels that were just built, unless some are given.
pub(crate) fn run(images: &[PathBuf]) -> Result<()> {
    for image in images {
        ensure!(image.is_file(), "{} is not a file", image.display());
    }
    let sh = tools::shell()?;
    let cuobjdump = tools::nvcc(&sh)?.with_file_name("cuobjdump");
    let images = if images.is_empty() { cuda::kernels()?.images()? } else { images.to_vec() };
    let (mut failures, mut checked) = (Vec::new(), BTreeSet::new());
    for image in &images {
        let dump = |what: &str| cmd!(sh, "{cuobjdump} {what} {image}").quiet().read();
        failures.extend(check_ptx(&dump("-ptx")?).err());
        for (kernel, lines) in by_kernel(&dump("--dump-resource-usage")?, &RESOURCES) {
            let used =
                lines[0].split_whitespace().filter(|word| word.starts_with("STACK:") || word.starts_with("LOCAL:"));
            failures.extend(used.filter(|word| !word.ends_with(":0")).map(|word| anyhow!("{kernel}: {word} bytes")));
        }
        for (kernel, lines) in by_kernel(&dump("-sass")?, &INSTRUCTION) {
            let listing: Vec<_> = lines.iter().filter_map(|line| Instruction::parse(line)).collect();
            let name = kernel.split(' ').nth(1).unwrap_or_default();
            failures.extend(check_kernel(name, &listing).context(kernel.clone()).err());
            println!("{kernel}: {} instructions", listing.len());
            checked.insert(kernel);
        }
    }
    let expected = ARCHITECTURES.iter().flat_map(|arch| KERNELS.map(|kernel| format!("{arch} {kernel}")));
    failures.extend(expected.filter(|kernel| !checked.contains(kernel)).map(|kernel| anyhow!("no code: {kernel}")));
    failures.iter().for_each(|failure| println!("FAILED {failure:#}"));
    ensure!(failures.is_empty(), "the machine code breaks {} rules", failures.len());
    Ok(())
}

/// The lines that match a pattern, by "ARCHITECTURE KERNEL".
fn by_kernel<'a>(text: &'a str, pattern: &Regex) -> BTreeMap<String, Vec<&'a str>> {
    let mut found = BTreeMap::<_, Vec<&str>>::new();
    let (mut arch, mut kernel) = ("", "");
    for line in text.lines() {
        let mut words = line.trim().split([' ', ':', '=']).filter(|word| !word.is_empty());
        match (words.next(), words.next()) {
            (Some("arch"), Some(name)) => arch = name,
            (Some("Function"), Some(name)) => kernel = name,
            _ if pattern.is_match(line) => found.entry(format!("{arch} {kernel}")).or_default().push(line),
            _ => {}
        }
    }
    found
}

/// PTX leaves no rounding to its compiler: each operation names one, and only f32 is fused, by `fmaf` in the sources.
fn check_ptx(text: &str) -> Result<()> {
    let operations: BTreeSet<_> = FLOAT_OPERATION.find_iter(text).map(|found| found.as_str()).collect();
    ensure!(!operations.is_empty(), "PTX has no operation on floating-point numbers");
    for operation in operations {
        ensure!(operation.contains(".rn.") && operation != "fma.rn.f64", "PTX has {operation}");
    }
    Ok(())
}

fn check_kernel(kernel: &str, listing: &[Instruction<'_>]) -> Result<()> {
    if let Some(found) = listing.iter().find(|instruction| LOCAL.is_match(instruction.text)) {
        bail!("local memory: {}", found.text);
    }
    if !PASSES.contains(&kernel) {
        return Ok(());
    }
    let graph = control_flow(listing)?;
    let dominators = simple_fast(&graph, NodeIndex::new(0));
    let main = main_loops(&graph, &dominators)?;
    ensure!(main.len() == MAIN_LOOPS, "{} loops around loads of 128 bits, expected {MAIN_LOOPS}", main.len());
    for body in main {
        // A loop has blocks for whole rounds and for its last one, each with all of its loads.
        let mut most = 0;
        for block in body {
            most = most.max(check_loads(graph[block], false)?);
        }
        ensure!(most as u64 >= abi::LOADS_IN_FLIGHT, "{most} loads in flight, expected {}", abi::LOADS_IN_FLIGHT);
    }
    let partials = graph.node_weights().map(|block| check_loads(block, true)).collect::<Result<Vec<_>>>()?;
    let blocks = partials.iter().filter(|loads| **loads > 0).count();
    ensure!(blocks == usize::from(kernel.contains("dot")), "partial sums are loaded in {blocks} blocks, expected one");

    let ticket = only(listing, &["ATOM", ".INC"])?;
    check_fence(&graph, &dominators, &listing[ticket])?;
    let claim = only(listing, &["ATOMG", ".ADD"])?;
    let claimed = REGISTER.captures(listing[claim].text).and_then(|found| found[1].parse().ok());
    let claimed: u32 = claimed.context("a claim without a register")?;
    for instruction in &listing[claim + 1..] {
        let used = registers(instruction.text).contains(&claimed);
        ensure!(!used, "waits for the number of the next span before it loads this one: {}", instruction.text);
        if LOAD.is_match(instruction.text) {
            break;
        }
    }
    Ok(())
}

/// The partial sums of a block are visible to the GPU before its ticket: every path to the ticket passes a fence.
fn check_fence(graph: &Graph<'_>, dominators: &Dominators<NodeIndex>, ticket: &Instruction<'_>) -> Result<()> {
    let holds_ticket = |block: &NodeIndex| graph[*block].iter().any(|one| one.address == ticket.address);
    let block = graph.node_indices().find(holds_ticket).context("a ticket outside of all blocks")?;
    let passed = dominators.dominators(block).context("a ticket that nothing reaches")?;
    let mut before = passed.flat_map(|passed| graph[passed].iter().take_while(|one| one.address != ticket.address));
    let fence = before.any(|one| !one.is_conditional() && one.has(&["MEMBAR", "GPU"]));
    ensure!(fence, "a path to the ticket passes no fence of the GPU");
    Ok(())
}

/// The index of the only instruction with these parts.
fn only(listing: &[Instruction<'_>], parts: &[&str]) -> Result<usize> {
    let found: Vec<_> = (0..listing.len()).filter(|&index| listing[index].has(parts)).collect();
    ensure!(found.len() == 1, "{} instructions {parts:?}, expected one", found.len());
    Ok(found[0])
}

/// The number of loads of 128 bits in a block, all of which are issued before the first of them is used.
fn check_loads(block: &[Instruction<'_>], partials: bool) -> Result<usize> {
    let total = block.iter().filter(|instruction| instruction.wide_load(partials).is_some()).count();
    let (mut issued, mut pending) = (0, HashSet::new());
    for instruction in block {
        let operands = instruction.text.split_once(',').map_or("", |(_, operands)| operands);
        if issued < total && !registers(operands).is_disjoint(&pending) {
            bail!("waits when {issued} of {total} loads are issued: {:#x} {}", instruction.address, instruction.text);
        }
        if let Some(first) = instruction.wide_load(partials) {
            pending.extend(first..first + 4);
            issued += 1;
        }
    }
    Ok(total)
}

/// The control-flow graph. Its first node is empty and leads to all blocks that nothing else enters.
fn control_flow<'a>(listing: &'a [Instruction<'a>]) -> Result<Graph<'a>> {
    let index: HashMap<_, _> = listing.iter().enumerate().map(|(i, instruction)| (instruction.address, i)).collect();
    let mut ends = HashMap::new();
    for (i, instruction) in listing.iter().enumerate() {
        if BRANCH.is_match(instruction.opcode()) {
            let target = TARGET.captures(instruction.text).map(|found| found[1].to_owned());
            let target = target.with_context(|| format!("no target: {}", instruction.text))?;
            let to = index.get(&u64::from_str_radix(&target[2..], 16)?).context("a target outside of the kernel")?;
            // A condition can be a predicate before the opcode or among the operands.
            let always = instruction.text.split_whitespace().eq([instruction.opcode(), &target]);
            ends.insert(i, if always { vec![*to] } else { vec![*to, i + 1] });
        } else if END.is_match(instruction.opcode()) {
            ends.insert(i, if instruction.is_conditional() { vec![i + 1] } else { vec![] });
        }
    }
    let mut leaders: BTreeSet<usize> =
        ends.iter().flat_map(|(i, targets)| targets.iter().copied().chain([i + 1])).collect();
    leaders.extend([0, listing.len()]);
    let leaders: Vec<usize> = leaders.into_iter().filter(|leader| *leader <= listing.len()).collect();
    let mut graph = DiGraph::new();
    let entry = graph.add_node(&listing[..0]);
    let blocks: HashMap<usize, NodeIndex> =
        leaders.windows(2).map(|ends| (ends[0], graph.add_node(&listing[ends[0]..ends[1]]))).collect();
    for ends_of in leaders.windows(2) {
        let targets = ends.get(&(ends_of[1] - 1)).cloned().unwrap_or_else(|| vec![ends_of[1]]);
        for target in targets.iter().filter_map(|target| blocks.get(target)) {
            graph.add_edge(blocks[&ends_of[0]], *target, ());
        }
    }
    for block in blocks.values() {
        if graph.neighbors_directed(*block, Incoming).next().is_none() {
            graph.add_edge(entry, *block, ());
        }
    }
    Ok(graph)
}

/// The bodies of the innermost loops around loads of 128 bits.
fn main_loops(graph: &Graph<'_>, dominators: &Dominators<NodeIndex>) -> Result<Vec<HashSet<NodeIndex>>> {
    // A natural loop: what reaches a back edge without passing the loop's head.
    let mut loops = BTreeMap::<NodeIndex, HashSet<NodeIndex>>::new();
    for edge in graph.edge_references() {
        let (from, head) = (edge.source(), edge.target());
        if dominators.dominators(from).is_some_and(|mut all| all.any(|one| one == head)) {
            let body = loops.entry(head).or_insert_with(|| HashSet::from([head]));
            let mut open = vec![from];
            while let Some(block) = open.pop() {
                if body.insert(block) {
                    open.extend(graph.neighbors_directed(block, Incoming));
                }
            }
        }
    }
    let mut main = BTreeSet::new();
    for block in graph.node_indices() {
        if graph[block].iter().any(|instruction| instruction.wide_load(false).is_some()) {
            let around = loops.iter().filter(|(_, body)| body.contains(&block));
            let (head, _) =
                around.min_by_key(|(_, body)| body.len()).context("a load of 128 bits outside of all loops")?;
            main.insert(*head);
        }
    }
    Ok(main.iter().map(|head| loops[head].clone()).collect())
}
