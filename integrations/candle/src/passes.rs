//! Backward passes of candle, and gradients in the memory of its tensors.

use std::ops::Range;

use candle_core::backend::BackendDevice;
use candle_core::backprop::GradStore;
use candle_core::cpu_backend::CpuDevice;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, Device, Storage, StorageRef, Tensor, Var};
use gradblend::trainer::{Error, Loss, Passes, Result, Row};
use gradblend::{DType, Gradient, GradientMut, StreamRef, TensorGrads};

use crate::cuda;

/// A variable with its name in errors.
#[derive(Debug)]
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) var: Var,
}

/// One call of `backward`.
pub(crate) struct Call<'a> {
    pub(crate) parameters: &'a [Parameter],
    pub(crate) losses: &'a [Tensor],
    pub(crate) device: gradblend::Device,
    pub(crate) stream: &'a cuda::Stream,
    pub(crate) copied: &'a mut u64,
}

/// Rejects what a backward pass cannot start from.
pub(crate) fn check_loss(loss: Loss, tensor: &Tensor) -> Result<()> {
    let got = if tensor.elem_count() != 1 {
        format!("of shape {:?}", tensor.dims())
    } else if !tensor.dtype().is_float() {
        tensor.dtype().as_str().to_owned()
    } else {
        return Ok(());
    };
    Err(Error::Loss { loss, expected: "a floating-point scalar", got })
}

impl Call<'_> {
    /// The gradients of one backward pass that belong to the parameters.
    fn pass(&mut self, loss: Loss, root: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let mut store = root.backward().map_err(Error::framework(loss))?;
        let mut gradients = Vec::with_capacity(self.parameters.len());
        for parameter in self.parameters {
            let gradient = store.remove(&parameter.var);
            gradients.push(gradient.map(|gradient| self.contiguous(loss, parameter, gradient)).transpose()?);
        }
        Ok(gradients)
    }

    fn contiguous(&mut self, loss: Loss, parameter: &Parameter, gradient: Tensor) -> Result<Tensor> {
        let Parameter { name, var } = parameter;
        let same = gradient.dtype() == var.dtype() && gradient.shape() == var.shape();
        if !same || !gradient.device().same_device(var.device()) {
            let [expected, got] = [var.as_tensor(), &gradient]
                .map(|t| format!("{} {:?} on {:?}", t.dtype().as_str(), t.dims(), t.device().location()));
            return Err(Error::Gradient { parameter: name.clone(), loss, expected, got });
        }
        if gradient.is_contiguous() {
            return Ok(gradient);
        }
        *self.copied += 1;
        gradient.contiguous().map_err(Error::framework(loss))
    }

    /// A loss times its factor, as f32: losses may differ in their dtypes and devices.
    fn term(&self, loss: &Tensor, factor: f32) -> candle_core::Result<Tensor> {
        let device = self.parameters[0].var.device();
        loss.reshape(())?.to_device(device)?.to_dtype(candle_core::DType::F32)? * f64::from(factor)
    }

    fn store(&self, gradients: impl Iterator<Item = Option<Tensor>>) -> GradStore {
        let mut store = GradStore::default();
        for (Parameter { var, .. }, gradient) in self.parameters.iter().zip(gradients) {
            if let Some(gradient) = gradient {
                store.insert(var, gradient);
            }
        }
        store
    }
}

/// The dtype of a variable, which was checked.
fn gradblend_dtype(var: &Var) -> DType {
    match var.dtype() {
        candle_core::DType::F16 => DType::F16,
        candle_core::DType::BF16 => DType::BF16,
        _ => DType::F32,
    }
}

impl Passes for Call<'_> {
    type Loss = Tensor;
    type Gradient = Tensor;
    type Memory = Storage;
    type Output = GradStore;

    fn device(&self) -> gradblend::Device {
        self.device
    }

    fn shape(&self, parameter: usize) -> (u64, DType) {
        let var = &self.parameters[parameter].var;
        (var.elem_count() as u64, gradblend_dtype(var))
    }

    fn loss(&mut self, k: usize) -> Result<Tensor> {
        Ok(self.losses[k].clone())
    }

    fn gradients(&mut self, name: Loss, loss: Tensor, scale: f32) -> Result<Vec<Option<Tensor>>> {
        check_loss(name, &loss)?;
        let root = if scale == 1.0 { Ok(loss) } else { loss * f64::from(scale) };
        self.pass(name, &root.map_err(Error::framework(name))?)
    }

    fn weighted(&mut self, terms: &[(usize, f32)]) -> Result<GradStore> {
        let loss = Loss::Sum;
        let mut total: Option<Tensor> = None;
        for (k, factor) in terms {
            let term = self.term(&self.losses[*k], *factor);
            let sum = match (total, term) {
                (Some(total), Ok(term)) => total + term,
                (_, term) => term,
            };
            total = Some(sum.map_err(Error::framework(loss))?);
        }
        let gradients = total.map(|total| self.pass(loss, &total)).transpose()?.unwrap_or_default();
        if !terms.is_empty() && gradients.iter().all(Option::is_none) {
            return Err(Error::Unreached { loss });
        }
        Ok(self.store(gradients.into_iter()))
    }

    fn zeros(&mut self, like: &Tensor) -> Result<Tensor> {
        like.zeros_like().map_err(Error::framework(Loss::HeldOut))
    }

    fn memory(&mut self, parameter: usize) -> Result<Storage> {
        let var = &self.parameters[parameter].var;
        let (shape, dtype) = (var.shape(), var.dtype());
        let storage = match var.device() {
            Device::Cuda(device) => device.zeros_impl(shape, dtype).map(Storage::Cuda),
            _ => CpuDevice.zeros_impl(shape, dtype).map(Storage::Cpu),
        };
        storage.map_err(Error::framework(Loss::Sum))
    }

    fn bind(
        &mut self,
        rows: &[Row<Tensor>],
        blended: &mut [Option<Storage>],
        run: &mut dyn FnMut(Vec<TensorGrads<'_>>, StreamRef<'_>) -> gradblend::Result<()>,
    ) -> Result<()> {
        let locked = rows.iter().map(|row| row.map(Locked::new)).collect::<Result<Vec<_>>>()?;
        let mut tensors = Vec::with_capacity(rows.len());
        for (row, blended) in locked.iter().zip(blended) {
            let blended = blended.as_mut().and_then(|blended| gradient_mut(blended, self.stream));
            tensors.push(row.tensor(|locked| locked.gradient(self.stream), blended));
        }
        Ok(run(tensors, cuda::handle(self.stream))?)
    }

    fn output(&mut self, blended: Vec<Option<Storage>>) -> Result<GradStore> {
        let shapes = self.parameters.iter().map(|parameter| parameter.var.shape());
        let adopt = |storage, shape| Tensor::from_storage(storage, shape, BackpropOp::none(), false);
        let tensors = blended.into_iter().zip(shapes).map(|(storage, shape)| Some(adopt(storage?, shape)));
        Ok(self.store(tensors))
    }
}

/// A gradient whose memory is locked against writes by other threads while gradblend reads it.
pub(crate) struct Locked<'g> {
    storage: StorageRef<'g>,
    /// Its elements in the storage.
    range: Range<usize>,
}

impl<'g> Locked<'g> {
    pub(crate) fn new(gradient: &'g Tensor) -> Result<Self> {
        let (storage, layout) = gradient.storage_and_layout();
        let start = layout.start_offset();
        Ok(Locked { storage, range: start..start + gradient.elem_count() })
    }

    /// The elements, where candle keeps them.
    #[cfg(test)]
    pub(crate) fn elements(&self) -> candle_core::Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(&storage.as_slice::<f32>()?[self.range.clone()]),
            _ => candle_core::bail!("not on the CPU"),
        }
    }

    pub(crate) fn gradient<'a>(&'a self, stream: &'a cuda::Stream) -> Option<Gradient<'a>> {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(elements)) => Some(Gradient::from(&elements[self.range.clone()])),
            Storage::Cpu(CpuStorage::F16(elements)) => Some(Gradient::from(&elements[self.range.clone()])),
            Storage::Cpu(CpuStorage::BF16(elements)) => Some(Gradient::from(&elements[self.range.clone()])),
            Storage::Cuda(storage) => cuda::gradient(storage, self.range.clone(), stream),
            // Parameters have none of these, and gradients are like their parameters.
            Storage::Cpu(_) | Storage::Metal(_) => None,
        }
    }
}

fn gradient_mut<'a>(storage: &'a mut Storage, stream: &'a cuda::Stream) -> Option<GradientMut<'a>> {
    match storage {
        Storage::Cpu(CpuStorage::F32(elements)) => Some(GradientMut::from(&mut elements[..])),
        Storage::Cpu(CpuStorage::F16(elements)) => Some(GradientMut::from(&mut elements[..])),
        Storage::Cpu(CpuStorage::BF16(elements)) => Some(GradientMut::from(&mut elements[..])),
        Storage::Cuda(storage) => cuda::gradient_mut(storage, stream),
        Storage::Cpu(_) | Storage::Metal(_) => None,
    }
}
