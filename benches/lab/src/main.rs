//! Compares implementations of dot, blend and step in rounds, and reports the results.

mod backend;
mod case;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod heap;
mod inputs;
mod naive;
mod oracle;
mod ours;
mod per_tensor;
mod plot;
mod record;
mod report;
mod results;
mod run;

use std::process::ExitCode;

use clap::Parser;

/// The laboratory of gradblend: benches/README.md describes the implementations, the inputs and the raw results.
#[derive(Parser)]
enum Command {
    /// Check implementations against f64 and time them in rounds
    Run(run::Options),
    /// Write a table and a plot beside each file of raw results, and a summary into a document
    Report(report::Options),
}

fn main() -> ExitCode {
    sigpipe::reset(); // the end of `gradblend-lab | head` is no panic
    let result = match Command::parse() {
        Command::Run(options) => run::run(&options),
        Command::Report(options) => report::report(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
