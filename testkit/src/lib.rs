//! Random gradients, an f64 oracle and dtype facts: shared by tests, benchmarks and fuzz targets.
