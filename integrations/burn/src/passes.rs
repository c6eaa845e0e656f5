//! Backward passes of burn, and gradients as the data of its tensors.

use std::collections::HashMap;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{DType, DataError, Tensor, TensorData};
use gradblend::trainer::{Error, Loss, Passes, Result, Row};
use gradblend::{Device, Gradient, GradientMut, Stream, StreamRef, TensorGrads, bf16, f16};

use crate::visitors::{self, Parameter, described};

/// One call of `backward`.
pub(crate) struct Call<'a, M> {
    pub(crate) module: &'a M,
    pub(crate) parameters: &'a [Parameter],
    pub(crate) losses: &'a mut dyn FnMut() -> Result<Vec<Tensor<1>>>,
}

/// Rejects what a backward pass cannot start from.
pub(crate) fn check_loss(loss: Loss, tensor: &Tensor<1>) -> Result<()> {
    let got = if tensor.dims() != [1] {
        format!("of shape {:?}", tensor.dims())
    } else if !tensor.is_tracked() {
        "without a graph".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::Loss { loss, expected: "a tensor of one element with a graph", got })
}

impl<M: Module> Call<'_, M> {
    /// The gradients of one backward pass that belong to the parameters.
    fn pass(&mut self, loss: Loss, root: Tensor<1>) -> Result<Vec<Option<TensorData>>> {
        let gradients = root.backward();
        // The graph, and what it keeps of the gradients.
        drop(root);
        let mut taken = visitors::take(self.module, gradients);
        let mut all = Vec::with_capacity(self.parameters.len());
        for parameter in self.parameters {
            let gradient = taken.remove(&parameter.id);
            if let Some(data) = &gradient {
                if (data.dtype(), data.shape().as_slice()) != (parameter.dtype, &parameter.shape) {
                    let (expected, got) = (parameter.described(), described(data.dtype(), data.shape().as_slice()));
                    return Err(Error::Gradient { parameter: parameter.path.clone(), loss, expected, got });
                }
                elements(data).map_err(Error::framework(loss))?;
            }
            all.push(gradient);
        }
        Ok(all)
    }

    fn params(&self, gradients: Vec<Option<TensorData>>) -> GradientsParams {
        let ids = self.parameters.iter().map(|parameter| parameter.id);
        let present: HashMap<_, _> = ids.zip(gradients).filter_map(|(id, gradient)| Some((id, gradient?))).collect();
        visitors::for_optimizer(self.module, present)
    }
}

fn zeros(dtype: DType, shape: &[usize]) -> TensorData {
    match dtype {
        DType::F16 => TensorData::zeros::<f16, _>(shape),
        DType::BF16 => TensorData::zeros::<bf16, _>(shape),
        _ => TensorData::zeros::<f32, _>(shape),
    }
}

/// The elements of a gradient, where burn keeps them.
fn elements(data: &TensorData) -> std::result::Result<Gradient<'_>, DataError> {
    Ok(match data.dtype() {
        DType::F16 => data.as_slice::<f16>()?.into(),
        DType::BF16 => data.as_slice::<bf16>()?.into(),
        _ => data.as_slice::<f32>()?.into(),
    })
}

fn elements_mut(data: &mut TensorData) -> std::result::Result<GradientMut<'_>, DataError> {
    Ok(match data.dtype() {
        DType::F16 => data.as_mut_slice::<f16>()?.into(),
        DType::BF16 => data.as_mut_slice::<bf16>()?.into(),
        _ => data.as_mut_slice::<f32>()?.into(),
    })
}

impl<M: Module> Passes for Call<'_, M> {
    type Loss = Tensor<1>;
    type Gradient = TensorData;
    type Memory = TensorData;
    type Output = GradientsParams;

    fn device(&self) -> Device {
        Device::cpu()
    }

    fn shape(&self, parameter: usize) -> (u64, gradblend::DType) {
        let Parameter { dtype, shape, .. } = &self.parameters[parameter];
        let dtype = match dtype {
            DType::F16 => gradblend::DType::F16,
            DType::BF16 => gradblend::DType::BF16,
            _ => gradblend::DType::F32,
        };
        (shape.iter().product::<usize>() as u64, dtype)
    }

    fn loss(&mut self, k: usize) -> Result<Tensor<1>> {
        Ok((self.losses)()?.swap_remove(k))
    }

    fn gradients(&mut self, name: Loss, loss: Tensor<1>, scale: f32) -> Result<Vec<Option<TensorData>>> {
        check_loss(name, &loss)?;
        self.pass(name, if scale == 1.0 { loss } else { loss * scale })
    }

    fn weighted(&mut self, terms: &[(usize, f32)]) -> Result<GradientsParams> {
        let losses = (self.losses)()?;
        let terms = terms.iter().map(|(k, factor)| losses[*k].clone() * *factor);
        let Some(total) = terms.reduce(|total, term| total + term) else { return Ok(GradientsParams::new()) };
        drop(losses);
        let gradients = self.pass(Loss::Sum, total)?;
        match gradients.iter().any(Option::is_some) {
            true => Ok(self.params(gradients)),
            false => Err(Error::Unreached { loss: Loss::Sum }),
        }
    }

    fn zeros(&mut self, like: &TensorData) -> Result<TensorData> {
        Ok(zeros(like.dtype(), like.shape().as_slice()))
    }

    fn memory(&mut self, parameter: usize) -> Result<TensorData> {
        let parameter = &self.parameters[parameter];
        Ok(zeros(parameter.dtype, &parameter.shape))
    }

    fn bind(
        &mut self,
        rows: &[Row<TensorData>],
        blended: &mut [Option<TensorData>],
        run: &mut dyn FnMut(Vec<TensorGrads<'_>>, StreamRef<'_>) -> gradblend::Result<()>,
    ) -> Result<()> {
        let mut tensors = Vec::with_capacity(rows.len());
        for (row, blended) in rows.iter().zip(blended) {
            let blended = blended.as_mut().map(elements_mut).transpose().map_err(Error::framework(Loss::Sum))?;
            // `pass` has read the elements of each.
            tensors.push(row.tensor(|data| elements(data).ok(), blended));
        }
        Ok(run(tensors, Stream::default())?)
    }

    fn output(&mut self, blended: Vec<Option<TensorData>>) -> Result<GradientsParams> {
        Ok(self.params(blended))
    }
}
