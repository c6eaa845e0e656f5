//! The CPU's contenders: this crate, plain reading, the naive way, ndarray.

mod limit;
mod naive;
mod ours;

use std::time::{Duration, Instant};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::cases::Case;
use super::heap;
use super::lists::Lists;
use super::naive::Naive;
use super::oracle::Bound;
use super::ours::BOUND;
use super::record::Machine;
use super::{Contender, Made, Measured, Operation, Place, Role, Way};

use limit::Read;
use naive::Separately;
use ours::Calls;

/// The CPU, on as many threads as a case asks for.
pub(crate) struct Cpu;

/// A case in the host's memory.
pub(crate) struct Inputs<T> {
    operation: Operation,
    threads: usize,
    pool: ThreadPool,
    weights: Vec<f32>,
    /// Of the floor.
    bytes: u64,
    lists: Lists<T>,
}

impl<T: Naive> Place<T> for Cpu {
    type Inputs = Inputs<T>;
    const ROUNDS: usize = 9;
    const TURN: Duration = Duration::from_millis(10);

    fn machine(&self) -> Machine {
        let about = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = about.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1));
        let name = format!("{}, {} threads", model.unwrap_or(std::env::consts::ARCH).trim(), all());
        Machine { device: "cpu", name, driver: None, cache_bytes: None, software: None }
    }

    fn threads(&self, case: &Case) -> usize {
        if case.threads == 0 { all() } else { case.threads }
    }

    fn free(&self) -> u64 {
        heap::free()
    }

    fn load(
        &self,
        operation: Operation,
        case: &Case,
        lists: Lists<T>,
        weights: Vec<f32>,
        _: usize,
    ) -> Result<Inputs<T>, String> {
        let threads = Place::<T>::threads(self, case);
        let pool = ThreadPoolBuilder::new().num_threads(threads).build().map_err(|error| error.to_string())?;
        Ok(Inputs { operation, threads, pool, weights, bytes: case.bytes(operation), lists })
    }

    fn contenders(&self, operation: Operation, case: &Case) -> Vec<Contender<Inputs<T>>> {
        let plain = Bound { roundings: 1.0, blend: case.modalities as f64 + 1.0, sums: 1.0 / 8192.0, ..BOUND };
        let limit = |name, make| Contender { name, role: Role::Limit, bound: None, make };
        let ours = |name, make| Contender { name, role: Role::Ours, bound: Some(BOUND), make };
        let peer = |name, make| Contender { name, role: Role::Peer, bound: Some(plain), make };
        let mut contenders = vec![
            limit("read", |inputs| Ok(Box::new(Read::new(inputs, false)))),
            ours("gradblend", |inputs| Ok(Box::new(Calls::new(inputs, false)?))),
            limit("read abreast", |inputs| Ok(Box::new(Read::new(inputs, true)))),
        ];
        if operation == Operation::Step {
            contenders.push(ours("gradblend, calls apart", |inputs| Ok(Box::new(Calls::new(inputs, true)?))));
        }
        contenders.push(peer("naive", |inputs| Ok(Box::new(Separately::new(inputs, &T::PLAIN)?))));
        if T::NDARRAY.is_some() {
            contenders.push(peer("ndarray", |inputs| {
                Ok(Box::new(Separately::new(inputs, T::NDARRAY.as_ref().ok_or("no kernels")?)?))
            }));
        }
        contenders
    }

    fn sets(&self, _: &Inputs<T>) -> usize {
        1
    }

    fn lists<'a>(&self, inputs: &'a mut Inputs<T>) -> &'a Lists<T> {
        &inputs.lists
    }

    fn poison(&self, inputs: &mut Inputs<T>) {
        inputs.lists.blended.par_iter_mut().for_each(|x| *x = T::from_f32(7.0));
    }

    fn prepare(&self, contender: &Contender<Inputs<T>>, inputs: &mut Inputs<T>) -> (Made<Inputs<T>>, u64) {
        heap::peak(|| {
            let mut way = (contender.make)(inputs)?;
            way.run(inputs, 0);
            Ok(way)
        })
    }

    fn seconds(&self, way: &mut dyn Way<Inputs<T>>, inputs: &mut Inputs<T>, repeats: usize) -> f64 {
        let start = Instant::now();
        for _ in 0..repeats {
            way.run(inputs, 0);
        }
        start.elapsed().as_secs_f64() / repeats as f64
    }

    fn host(&self, _: &Measured, _: &mut dyn Way<Inputs<T>>, _: &mut Inputs<T>, _: usize) -> Option<Vec<f64>> {
        None
    }

    fn counts(&self, _: Role, way: &mut dyn Way<Inputs<T>>, inputs: &mut Inputs<T>) -> [Option<u64>; 2] {
        let before = heap::calls();
        way.run(inputs, 0);
        [None, Some(heap::calls() - before)]
    }
}

fn all() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
