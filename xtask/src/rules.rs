//! Rules that a search of the sources can check.

use std::fs;

use anyhow::{Result, ensure};
use regex::Regex;
use xshell::cmd;

use crate::tools;

/// What a rule says; a pattern; the folder and the extensions of the files that must not have it, but for those allowed.
type Rule = (&'static str, &'static str, &'static str, &'static [&'static str], &'static [&'static str]);

const RUST: &[&str] = &["rs"];
const CUDA: &[&str] = &["cu", "cuh"];
const TEXT: &[&str] = &["rs", "cu", "cuh", "c", "h", "cpp", "hpp", "py", "sh", "md", "toml", "cmake", "run"];
const DEVICE: &[&str] = &["kernels/common.cuh", "kernels/vec128.cuh"];
const HERE: &str = "xtask/src/rules.rs";
const RULES: [Rule; 9] = [
    ("only the CUDA backend names cudarc", "cudarc", "src/", RUST, &["src/backend/cuda/"]),
    ("only the C functions are exported", "no_mangle", "src/", RUST, &["src/ffi/"]),
    ("intrinsics and assembly have a file each", r"(std|core)::arch|\basm!", "src/", RUST, ARCHITECTURE),
    ("a module imports by `crate::` or `super::`", "super::super", "src/", RUST, &[]),
    ("no stubs", r"\b(todo|unimplemented)!", "", RUST, &[HERE]),
    ("no float atomics, no launch syntax", r"atomicAdd *\(|<<<", "kernels/", CUDA, &[]),
    ("inline PTX stands in one place", r"\basm\b", "kernels/", CUDA, DEVICE),
    ("shuffles and casts stand in one place", "__shfl|reinterpret_cast", "kernels/", CUDA, DEVICE),
    ("no word that CUB, BLAS or PyTorch do not have", WORDS, "", TEXT, &[HERE]),
];
const ARCHITECTURE: &[&str] = &["src/backend/cpu/vector.rs", "src/ffi/environment.rs"];

/// Words of earlier versions that readers of CUB, BLAS or PyTorch do not know.
const WORDS: &str = concat!(
    r"(?i)stand-?in\b|\bcontenders?\b|naive way|slips in print|unsafe door|look_back|past the cache|\bmultiprocessors?\b|",
    r"rules of the house|\b(is|be) to be had\b|told from|\brefused\b|goes on from a saved|better told than"
);

/// Modules of `src`, from the lowest layer to the highest. A module imports from its own layer and from lower ones.
const LAYERS: [&[&str]; 9] = [
    &["abi", "error"],
    &["process", "gradient", "tensor", "ranks"],
    &["state", "table", "solve"],
    &["config", "report", "losses", "schedule"],
    &["backend"],
    &["device", "checkpoint"],
    &["blender"],
    &["dlpack", "trainer"],
    &["ffi"],
];
const LINES_OF_FILE: usize = 400;
const LINES_OF_KERNEL_FUNCTION: usize = 80;
const FILES_WITH_CFG_CUDA: usize = 3;

/// Prints every place where a rule is broken, and fails if there is one.
pub(crate) fn check() -> Result<()> {
    let sh = tools::shell()?;
    let listed = cmd!(sh, "git ls-files --cached --others --exclude-standard").quiet().read()?;
    let mut files = Vec::new();
    for name in listed.lines() {
        if let Ok(text) = fs::read_to_string(tools::root().join(name)) {
            files.push((name, text));
        }
    }
    let mut broken = Vec::new();
    for (rule, pattern, inside, extensions, allowed) in RULES {
        let pattern = Regex::new(pattern)?;
        for (name, text) in &files {
            let extension = name.rsplit(['.', '/']).next().unwrap_or_default();
            let allowed = allowed.iter().any(|path| name.starts_with(path));
            if name.starts_with(inside) && !allowed && extensions.contains(&extension) {
                let lines = text.lines().enumerate().filter(|(_, line)| pattern.is_match(line));
                broken.extend(lines.map(|(at, line)| format!("{rule}: {name}:{}: {}", at + 1, line.trim())));
            }
        }
    }
    let mut with_cfg = Vec::new();
    let (cfg, import) = (Regex::new(r#"cfg.*feature = "cuda""#)?, Regex::new(r"\bcrate::(\w+)")?);
    for (name, text) in files.iter().filter(|(name, _)| name.starts_with("src/") && name.ends_with(".rs")) {
        let lines = text.lines().count();
        if lines > LINES_OF_FILE {
            broken.push(format!("a file has at most {LINES_OF_FILE} lines: {name}: {lines}"));
        }
        if cfg.is_match(text) {
            with_cfg.push(*name);
        }
        let module = name.split(['/', '.']).nth(1).unwrap_or_default();
        if module != "lib" && layer(module).is_none() {
            broken.push(format!("every module has a layer: {name}: LAYERS lacks {module}"));
        }
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        for used in code.flat_map(|line| import.captures_iter(line)).map(|found| found[1].to_owned()) {
            if let (Some(from), Some(to)) = (layer(module), layer(&used))
                && from < to
            {
                broken.push(format!("imports point down: {name} uses crate::{used}"));
            }
        }
        for (own, other) in [("cpu", "cuda"), ("cuda", "cpu")] {
            if name.starts_with(&format!("src/backend/{own}/")) && text.contains(&format!("{other}::")) {
                broken.push(format!("backends do not know each other: {name} names {other}"));
            }
        }
    }
    if with_cfg.len() > FILES_WITH_CFG_CUDA {
        broken.push(format!("at most {FILES_WITH_CFG_CUDA} files ask for the feature cuda: {with_cfg:?}"));
    }
    for (name, text) in files.iter().filter(|(name, _)| name.starts_with("kernels/") && name.contains(".cu")) {
        let mut start = 0;
        for (at, line) in text.lines().enumerate() {
            if line == "}" && at - start >= LINES_OF_KERNEL_FUNCTION {
                let lines = at - start + 1;
                broken
                    .push(format!("a kernel's function has at most {LINES_OF_KERNEL_FUNCTION} lines: {name}: {lines}"));
            }
            // The last line of a signature that starts in the first column; bodies are indented, but for directives.
            if !line.is_empty() && !line.starts_with([' ', '}', '#', '/']) {
                start = at;
            }
        }
    }
    broken.iter().for_each(|line| println!("{line}"));
    ensure!(broken.is_empty(), "rules are broken in {} places", broken.len());
    Ok(())
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

/// Checks that a page of the package links to files or folders of the package, or to other sites. `package` lists its files.
pub(crate) fn check_links(package: &str) -> Result<()> {
    let link = Regex::new(r"\]\(([^)#:]+)(#[^)]*)?\)")?;
    for page in package.lines().filter(|file| file.ends_with(".md")) {
        for found in link.captures_iter(&fs::read_to_string(tools::root().join(page))?) {
            let mut path: Vec<&str> = page.split('/').collect();
            path.pop();
            for part in found[1].trim_end_matches('/').split('/') {
                match part {
                    ".." => drop(path.pop()),
                    _ => path.push(part),
                }
            }
            let path = path.join("/");
            let has = package
                .lines()
                .any(|file| file.strip_prefix(&path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')));
            ensure!(has, "{page}: the package lacks {path}, to which it links");
        }
    }
    Ok(())
}
