//! What both examples need: random numbers, training by each method, runs in parallel whose results are kept, statistics
//! over seeds, and plots.

pub(crate) mod adam;
pub(crate) mod arguments;
pub(crate) mod drawing;
pub(crate) mod outputs;
pub(crate) mod peers;
pub(crate) mod random;
pub(crate) mod runs;
pub(crate) mod statistics;
pub(crate) mod train;
pub(crate) mod weights;
