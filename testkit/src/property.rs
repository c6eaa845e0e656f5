//! Random tests whose failing case proptest shrinks.

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

use crate::Outcome;

/// Runs `body` on values of a strategy: `cases` of them, or `PROPTEST_CASES`. The values are the same in every run.
pub fn property<S: Strategy>(cases: u32, strategy: S, body: impl Fn(S::Value) -> Outcome) -> Outcome {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(cases);
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let result = runner.run(&strategy, |value| body(value).map_err(|error| TestCaseError::fail(error.to_string())));
    result.map_err(|error| error.to_string().into())
}
