//! The parameters of a module, their gradients, and gradients for its optimiser. burn gives the rank of a parameter as a
//! constant, to visitors alone.

use std::collections::HashMap;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Gradients, Tensor, TensorData};
use gradblend::trainer::{Error, Result};

/// A parameter, and its path in the module.
#[derive(Debug)]
pub(crate) struct Parameter {
    pub(crate) path: String,
    pub(crate) id: ParamId,
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: DType,
}

impl Parameter {
    pub(crate) fn described(&self) -> String {
        described(self.dtype, &self.shape)
    }
}

pub(crate) fn described(dtype: DType, shape: &[usize]) -> String {
    format!("{dtype:?} {shape:?}")
}

/// Whether gradblend reads the memory of this device.
fn is_cpu(device: &Device) -> bool {
    #[cfg(feature = "ndarray")]
    #[allow(deprecated, reason = "as long as burn has it")]
    if *device == Device::ndarray() {
        return true;
    }
    *device == Device::flex()
}

/// The parameters of a module, frozen ones too: they can be trained later. A shared one once.
pub(crate) fn parameters<M: Module>(module: &M) -> Result<Vec<Parameter>> {
    let list = list(module)?;
    if list.trained.is_empty() {
        return Err(Error::NoParameter);
    }
    Ok(list.found)
}

fn list<M: Module>(module: &M) -> Result<List> {
    let mut list = List::default();
    module.visit(&mut list);
    match list.rejected.take() {
        Some(error) => Err(error),
        None => Ok(list),
    }
}

/// Rejects a module that trains other parameters than `expected`, or none.
pub(crate) fn check<M: Module>(module: &M, expected: &[Parameter]) -> Result<()> {
    let list = list(module)?;
    for id in &list.trained {
        let Some(now) = list.found.iter().find(|found| found.id == *id) else { continue };
        let given = expected.iter().find(|given| given.id == *id);
        let expected = match given {
            Some(given) if (given.dtype, &given.shape) == (now.dtype, &now.shape) => continue,
            Some(given) => given.described(),
            None => "a parameter that GradBlend was made with".to_owned(),
        };
        let got = if given.is_some() { now.described() } else { "another one".to_owned() };
        return Err(Error::Parameter { parameter: now.path.clone(), expected, got });
    }
    if list.trained.is_empty() { Err(Error::NoParameter) } else { Ok(()) }
}

/// Lists parameters.
#[derive(Default)]
struct List {
    path: Vec<String>,
    found: Vec<Parameter>,
    /// Those that require a gradient now.
    trained: Vec<ParamId>,
    rejected: Option<Error>,
}

impl ModuleVisitor for List {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let (tensor, path) = (param.val(), self.path.join("."));
        if self.found.iter().any(|found| found.id == param.id) {
            return;
        }
        let (dtype, device, trained) = (tensor.dtype(), tensor.device(), tensor.is_require_grad());
        let expected = if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            "F32, F16 or BF16"
        } else if !is_cpu(&device) {
            "on a CPU device: burn does not give the address and the stream of other tensors"
        } else {
            let shape = tensor.dims().to_vec();
            self.found.push(Parameter { path, id: param.id, shape, dtype });
            self.trained.extend(trained.then_some(param.id));
            return;
        };
        if trained {
            let got = format!("{dtype:?} on {device:?}");
            self.rejected.get_or_insert(Error::Parameter { parameter: path, expected: expected.to_owned(), got });
        }
    }
}

/// Takes the gradients of the parameters out of those of a backward pass.
pub(crate) fn take<M: Module>(module: &M, gradients: Gradients) -> HashMap<ParamId, TensorData> {
    let mut taken = Take { gradients, taken: HashMap::new() };
    module.visit(&mut taken);
    taken.taken
}

struct Take {
    gradients: Gradients,
    taken: HashMap<ParamId, TensorData>,
}

impl ModuleVisitor for Take {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        if tensor.is_require_grad()
            && let Some(gradient) = tensor.grad_remove(&mut self.gradients)
        {
            self.taken.insert(param.id, gradient.into_data());
        }
    }
}

/// Gradients for the optimiser of a module.
pub(crate) fn for_optimizer<M: Module>(module: &M, gradients: HashMap<ParamId, TensorData>) -> GradientsParams {
    let mut given = Give { gradients, given: GradientsParams::new() };
    module.visit(&mut given);
    given.given
}

struct Give {
    gradients: HashMap<ParamId, TensorData>,
    given: GradientsParams,
}

impl ModuleVisitor for Give {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(data) = self.gradients.remove(&param.id) {
            let options = (&param.val().device().inner(), data.dtype());
            self.given.register::<D>(param.id, Tensor::from_data(data, options));
        }
    }
}
