//! This crate: its calls, and graphs of them.

use gradblend::{Blender, Device, Plan, TensorGrads};

use super::super::naive::Naive;
use super::super::oracle::Sums;
use super::super::ours;
use super::super::{Operation, Way};
use super::Inputs;
use super::device::ReadyGraph;

/// The calls.
pub(super) struct Calls {
    operation: Operation,
    apart: bool,
    blender: Blender,
    /// Of raw addresses, one for each set.
    plans: Vec<Plan<'static>>,
}

impl Calls {
    /// Ready for the first set.
    pub(super) fn new<T: Naive>(inputs: &Inputs<T>, apart: bool) -> Result<Self, String> {
        let device = Device::cuda(0).map_err(|error| error.to_string())?;
        let blender = ours::blender(&device, ours::config(inputs.weights.len()), &inputs.weights)?;
        // Its weights were put on the default stream, which ours does not wait for.
        inputs.device.wait_for_all();
        let mut calls = Calls { operation: inputs.operation, apart, blender, plans: Vec::new() };
        calls.plan(inputs)?;
        Ok(calls)
    }

    /// Makes the plan of the next set.
    fn plan<T: Naive>(&mut self, inputs: &Inputs<T>) -> Result<(), String> {
        let set = self.plans.len();
        let grads: Vec<TensorGrads<'static>> = (inputs.lists.tensors.iter().enumerate())
            .map(|(index, (tensor, _))| {
                let at = |which| std::ptr::without_provenance(inputs.at(set, which, index) as usize);
                // SAFETY: the inputs outlive every way; what writes to them is on the same stream.
                unsafe { ours::grads::<T>(inputs.operation, tensor, inputs.weights.len(), at) }
            })
            .collect();
        self.plans.push(self.blender.plan(&grads).map_err(|error| error.to_string())?);
        Ok(())
    }
}

impl<T: Naive> Way<Inputs<T>> for Calls {
    fn run(&mut self, inputs: &mut Inputs<T>, set: usize) {
        let stream = inputs.device.borrowed();
        ours::call(self.operation, self.apart, &mut self.blender, &self.plans[set], stream).expect("the operation");
    }

    fn ready(&mut self, inputs: &mut Inputs<T>) -> Result<(), String> {
        while self.plans.len() < inputs.sets {
            self.plan(inputs)?;
        }
        Ok(())
    }

    fn sums(&mut self, inputs: &mut Inputs<T>) -> Option<Sums> {
        if self.operation == Operation::Step {
            return Some(ours::observed(&mut self.blender, inputs.device.borrowed()));
        }
        let mut pending = vec![0.0; 2 * inputs.weights.len()];
        inputs.device.wait();
        // SAFETY: 2K sums that are there for the blender's life, and no call on it runs.
        unsafe { inputs.device.read(self.blender.pending_sums() as u64, &mut pending) };
        Some(Sums::of(pending))
    }
}

/// A graph of the call, for each set.
pub(super) struct Replay {
    /// Before the calls, as it is dropped first.
    graphs: Vec<ReadyGraph>,
    calls: Calls,
}

impl Replay {
    pub(super) fn new<T: Naive>(inputs: &mut Inputs<T>) -> Result<Self, String> {
        let mut replay = Replay { graphs: Vec::new(), calls: Calls::new(inputs, false)? };
        replay.capture(inputs)?;
        Ok(replay)
    }

    fn capture<T: Naive>(&mut self, inputs: &mut Inputs<T>) -> Result<(), String> {
        for set in self.graphs.len()..self.calls.plans.len() {
            let device = inputs.device.clone();
            let graph = device.capture(|| self.calls.run(inputs, set)).ok_or("the call cannot be captured")?;
            self.graphs.push(graph.ready());
        }
        Ok(())
    }
}

impl<T: Naive> Way<Inputs<T>> for Replay {
    fn run(&mut self, inputs: &mut Inputs<T>, set: usize) {
        self.graphs[set].launch(&inputs.device);
    }

    fn ready(&mut self, inputs: &mut Inputs<T>) -> Result<(), String> {
        self.calls.ready(inputs)?;
        self.capture(inputs)
    }

    fn sums(&mut self, inputs: &mut Inputs<T>) -> Option<Sums> {
        Way::<Inputs<T>>::sums(&mut self.calls, inputs)
    }
}
