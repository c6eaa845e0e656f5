//! Builds and checks of this repository: `cargo xtask --help`.

mod ci;
mod cuda;
mod emulator;
mod ffi;
mod gpu_bundle;
mod integrations;
mod machine_code;
mod mutants;
mod python;
mod rules;
mod tools;

#[path = "../../kernels/header.rs"]
mod header;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use clap::builder::PossibleValuesParser;

/// Builds and checks this repository.
#[derive(Parser)]
enum Command {
    /// Run what must pass before a change lands, or only the named sections
    Ci {
        /// All sections. Without it, and without names, one third of the slow ones, another third for each commit
        #[arg(long, conflicts_with = "sections")]
        all: bool,
        #[arg(value_parser = PossibleValuesParser::new(ci::sections()))]
        sections: Vec<String>,
    },
    /// Compile the kernels for each architecture; a warning, a spill or a use of local memory is an error
    Cuda,
    /// Build the emulator of the CUDA driver, and print the folder to put into LD_LIBRARY_PATH
    Emulator {
        /// What to detect more, at the cost of time
        #[arg(long, value_enum, default_value = "nothing")]
        detect: emulator::Detect,
        /// Folder to build in [default: target/emulator, target/emulator-sanitize or target/emulator-races]
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Check the machine code of the kernels
    MachineCode {
        /// Images of kernels [default: those of a build]
        images: Vec<PathBuf>,
    },
    /// Build the library for C; run the tests and examples in C and C++
    Ffi,
    /// Run each fuzz target for its part of a time
    Fuzz {
        // 0 would be no limit.
        #[arg(value_parser = clap::value_parser!(u32).range(1..))]
        seconds: u32,
    },
    /// Pack test programs and laboratory for a machine that has a GPU but no Rust; `run.sh` in the folder runs them
    GpuBundle {
        /// Without optimisation: quick to build, slow to run
        #[arg(long)]
        debug: bool,
        /// Folder to write [default: target/gpu-bundle]
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Break the kernels on purpose, one mistake at a time, and fail if no test notices
    Mutants {
        /// Parts of mutants' names [default: all mutants]
        names: Vec<String>,
    },
}

fn main() -> ExitCode {
    sigpipe::reset(); // the end of `cargo xtask | head` is no panic
    match run(Command::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Ci { sections, all } => ci::run(&sections, all)?,
        Command::Ffi => ffi::run(&tools::shell()?)?,
        Command::Fuzz { seconds } => ci::fuzz(seconds)?,
        Command::GpuBundle { debug, out } => gpu_bundle::build(debug, out)?,
        Command::Cuda => drop(cuda::kernels()?),
        Command::Emulator { detect, out } => println!("{}", emulator::build(detect, out)?.display()),
        Command::MachineCode { images } => machine_code::run(&images)?,
        Command::Mutants { names } => mutants::run(&names)?,
    }
    Ok(())
}
