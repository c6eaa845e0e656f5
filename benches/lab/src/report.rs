use clap::Args;
#[derive(Args)]
pub(crate) struct Options {}
pub(crate) fn report(_: &Options) -> anyhow::Result<()> { Ok(()) }
pub(crate) fn median(v: &[f64]) -> Option<f64> { v.first().copied() }
