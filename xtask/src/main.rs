//! Builds and checks of this repository: `cargo xtask --help`.

mod cuda;
mod emulator;
mod machine_code;
mod mutants;
mod tools;

#[path = "../../src/abi.rs"]
#[allow(unreachable_pub)]
mod abi;
#[path = "../../kernels/header.rs"]
mod header;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;

/// Builds and checks this repository.
#[derive(Parser)]
enum Command {
    /// Compile the kernels for each architecture; a warning, a spill or a use of local memory is an error
    Cuda,
    /// Build the emulator of the CUDA driver, and print the folder to put into LD_LIBRARY_PATH
    Emulator {
        /// With AddressSanitizer and UndefinedBehaviorSanitizer
        #[arg(long)]
        sanitize: bool,
        /// Folder to build in [default: target/emulator, or target/emulator-sanitize]
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Check the machine code of the kernels
    MachineCode {
        /// Images of kernels [default: those of a build]
        images: Vec<PathBuf>,
    },
    /// Break the kernels on purpose, one mistake at a time, and fail if no test notices
    Mutants {
        /// Parts of mutants' names [default: all mutants]
        names: Vec<String>,
    },
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Cuda => drop(cuda::kernels()?),
        Command::Emulator { sanitize, out } => drop(emulator::build(sanitize, out)?),
        Command::MachineCode { images } => machine_code::run(&images)?,
        Command::Mutants { names } => mutants::run(&names)?,
    }
    Ok(())
}
