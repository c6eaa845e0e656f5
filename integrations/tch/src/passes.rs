//! Backward passes of PyTorch, and gradients in the memory of its tensors.

use std::ffi::c_void;

use gradblend::trainer::{Error, Loss, Passes, Result, Row};
use gradblend::{DType, Stream, StreamRef, TensorGrads};
use tch::{Device, Kind, TchError, Tensor};

/// A parameter with its name in errors, and the kind, device and size that it was given with.
#[derive(Debug)]
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) var: Tensor,
    given: Like,
}

/// Kind, device and size of a tensor.
type Like = (Kind, Device, Vec<i64>);

fn like(tensor: &Tensor) -> Like {
    (tensor.kind(), tensor.device(), tensor.size())
}

fn described((kind, device, size): &Like) -> String {
    format!("{kind:?} {size:?} on {device:?}")
}

impl Parameter {
    pub(crate) fn new(name: String, var: Tensor) -> Self {
        Parameter { given: like(&var), name, var }
    }

    /// Whether gradblend can blend its gradients, on the device of `first`.
    pub(crate) fn check(&self, first: Device) -> Result<()> {
        let Parameter { name, var, given: (kind, device, _) } = self;
        let expected = if !matches!(kind, Kind::Float | Kind::Half | Kind::BFloat16) {
            "f32, f16 or bf16".to_owned()
        } else if *device != first {
            format!("on {first:?}, as the first one")
        } else if var.is_sparse() {
            "dense".to_owned()
        } else if !var.is_leaf() {
            "a leaf, which is not computed from other tensors".to_owned()
        } else {
            return Ok(());
        };
        let kind = if var.is_sparse() { format!("sparse {kind:?}") } else { format!("{kind:?}") };
        let got = format!("{kind} on {device:?}{}", if var.is_leaf() { "" } else { ", no leaf" });
        Err(Error::Parameter { parameter: name.clone(), expected, got })
    }

    /// Whether both are handles of one tensor, and not two that share their memory.
    pub(crate) fn is(&self, other: &Parameter) -> bool {
        let place = |var: &Tensor| (var.data_ptr(), var.size(), var.stride());
        if self.given != other.given || self.var.is_sparse() || place(&self.var) != place(&other.var) {
            return false;
        }
        // tch does not compare handles. A flag of the tensor shows in all of them.
        let (before, others) = (self.var.requires_grad(), other.var.requires_grad());
        let _ = self.var.set_requires_grad(!before);
        let shown = other.var.requires_grad() != others;
        let _ = self.var.set_requires_grad(before);
        shown
    }

    /// Rejects a `.grad` that cannot be added to.
    fn check_grad(&self) -> Result<()> {
        let grad = self.var.grad();
        if !grad.defined() {
            return Ok(());
        }
        let expanded = || grad.stride().iter().zip(grad.size()).any(|(stride, size)| *stride == 0 && size > 1);
        let fault = if grad.is_sparse() {
            "sparse"
        } else if like(&grad) != self.given {
            "unlike the parameter"
        } else if expanded() {
            "expanded"
        } else {
            return Ok(());
        };
        let (expected, got) = (described(&self.given), format!("{}, {fault}", described(&like(&grad))));
        Err(Error::Parameter { parameter: format!("{}.grad", self.name), expected, got })
    }
}

/// Which parameters require a gradient now.
pub(crate) fn trained(parameters: &[Parameter]) -> Result<Vec<bool>> {
    for parameter in parameters {
        let now = like(&parameter.var);
        if now != parameter.given {
            let (expected, got) = (described(&parameter.given), described(&now));
            return Err(Error::Parameter { parameter: parameter.name.clone(), expected, got });
        }
        parameter.check_grad()?;
    }
    let trained: Vec<bool> = parameters.iter().map(|parameter| parameter.var.requires_grad()).collect();
    if trained.contains(&true) { Ok(trained) } else { Err(Error::NoParameter) }
}

/// For `map_err`: PyTorch failed in work on a loss. Its message, without the calls in PyTorch that follow it.
fn failed(loss: Loss) -> impl FnOnce(TchError) -> Error {
    move |error| {
        let text = error.to_string();
        let message = text.split("\nException raised from").next().unwrap_or_default();
        Error::framework(loss)(message)
    }
}

/// Rejects what a backward pass cannot start from.
pub(crate) fn check_loss(loss: Loss, tensor: &Tensor) -> Result<()> {
    let got = if !tensor.defined() {
        "undefined".to_owned()
    } else if tensor.numel() != 1 {
        format!("of size {:?}", tensor.size())
    } else if !tensor.is_floating_point() {
        format!("{:?}", tensor.kind())
    } else if !tensor.requires_grad() {
        "without a graph".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::Loss { loss, expected: "a floating-point scalar with a graph", got })
}

/// Whether the elements fill their memory, in any order of the dimensions.
fn dense(tensor: &Tensor) -> bool {
    let mut dimensions: Vec<_> =
        tensor.stride().into_iter().zip(tensor.size()).filter(|(_, size)| *size != 1).collect();
    dimensions.sort_unstable();
    let mut expected = 1;
    dimensions.into_iter().all(|(stride, size)| {
        let fits = stride == expected;
        expected *= size;
        fits
    })
}

/// One call of `backward`.
pub(crate) struct Call<'a> {
    device: gradblend::Device,
    parameters: &'a [Parameter],
    trained: Vec<bool>,
    losses: &'a [Tensor],
    copied: &'a mut u64,
    /// Strides of each parameter's gradients: those of the first one that is dense.
    strides: Vec<Option<Vec<i64>>>,
}

impl<'a> Call<'a> {
    pub(crate) fn new(
        device: gradblend::Device,
        parameters: &'a [Parameter],
        trained: Vec<bool>,
        losses: &'a [Tensor],
        copied: &'a mut u64,
    ) -> Self {
        let strides = vec![None; parameters.len()];
        Call { device, parameters, trained, losses, copied, strides }
    }

    /// The gradients of one backward pass, each `None` where the loss does not reach the parameter.
    fn pass(&mut self, loss: Loss, root: &Tensor, keep_graph: bool) -> Result<Vec<Option<Tensor>>> {
        let trained = || self.parameters.iter().zip(&self.trained);
        let inputs: Vec<_> = trained().filter(|(_, trained)| **trained).map(|(parameter, _)| &parameter.var).collect();
        let found = Tensor::f_run_backward(&[root], &inputs, keep_graph, false).map_err(failed(loss))?;
        let mut found = found.into_iter();
        let trained = self.trained.clone();
        let mut all = Vec::with_capacity(trained.len());
        for (i, trained) in trained.into_iter().enumerate() {
            let gradient = if trained { found.next().filter(Tensor::defined) } else { None };
            all.push(gradient.map(|gradient| self.ordered(loss, i, gradient)).transpose()?);
        }
        Ok(all)
    }

    /// A gradient with its elements in the order of the parameter's other gradients.
    fn ordered(&mut self, loss: Loss, i: usize, gradient: Tensor) -> Result<Tensor> {
        let Parameter { name, var, given } = &self.parameters[i];
        let sparse = gradient.is_sparse();
        if sparse || like(&gradient) != *given {
            let got = described(&like(&gradient)) + if sparse { ", sparse" } else { "" };
            return Err(Error::Gradient { parameter: name.clone(), loss, expected: described(given), got });
        }
        let ordered = || -> std::result::Result<Option<Tensor>, TchError> {
            // Addresses do not show the bit of a lazy negation.
            let plain = !gradient.f_is_neg()?;
            match &self.strides[i] {
                Some(strides) if plain && gradient.stride() == *strides => Ok(None),
                None if plain && dense(&gradient) => Ok(None),
                strides => {
                    let strides = strides.clone().unwrap_or_else(|| contiguous(&gradient.size()));
                    let mut copy = empty(var, &strides)?;
                    copy.f_copy_(&gradient)?;
                    Ok(Some(copy))
                }
            }
        };
        let copy = tch::no_grad(ordered).map_err(failed(loss))?;
        *self.copied += u64::from(copy.is_some());
        let gradient = copy.unwrap_or(gradient);
        self.strides[i].get_or_insert_with(|| gradient.stride());
        Ok(gradient)
    }

    /// Adds gradients to `.grad`, or makes them that where there is none.
    fn add(&self, gradients: &[Option<Tensor>]) -> std::result::Result<(), TchError> {
        let mut missing = Vec::new();
        for (Parameter { var, .. }, gradient) in self.parameters.iter().zip(gradients) {
            let Some(gradient) = gradient else { continue };
            let mut grad = var.f_grad()?;
            if grad.defined() {
                let _ = grad.f_add_(gradient)?;
            } else {
                missing.push((var, gradient));
            }
        }
        // tch cannot set `.grad`. The backward pass of a sum makes one, whose memory is exchanged. Several at a time cost fewer
        // passes; together they hold no more memory for a moment than the largest.
        let largest = missing.iter().map(|(var, _)| var.numel()).max().unwrap_or(0);
        let mut rest = &missing[..];
        while !rest.is_empty() {
            let mut elements = 0;
            let fits = |(var, _): &&(&Tensor, &Tensor)| {
                elements += var.numel();
                elements <= largest
            };
            let count = rest.iter().take_while(fits).count();
            let (now, later) = rest.split_at(count.max(1));
            tch::with_grad(|| {
                let sums =
                    now.iter().map(|(var, _)| var.f_sum(Kind::Float)).collect::<std::result::Result<Vec<_>, _>>()?;
                Tensor::f_stack(&sums, 0)?.f_sum(Kind::Float)?.f_backward()
            })?;
            for (var, gradient) in now {
                var.f_grad()?.f_set_data(gradient)?;
            }
            rest = later;
        }
        Ok(())
    }
}

/// Strides of a contiguous tensor.
fn contiguous(size: &[i64]) -> Vec<i64> {
    let mut strides: Vec<i64> = size
        .iter()
        .rev()
        .scan(1, |next, size| {
            let stride = *next;
            *next *= (*size).max(1);
            Some(stride)
        })
        .collect();
    strides.reverse();
    strides
}

/// Copies gradients that overlap others, as those of a sum's terms do: each becomes a `.grad`, which optimisers write to.
fn separate(mut gradients: Vec<Option<Tensor>>) -> std::result::Result<Vec<Option<Tensor>>, TchError> {
    let range = |(i, gradient): (usize, &Option<Tensor>)| {
        let gradient = gradient.as_ref().filter(|gradient| gradient.numel() > 0)?;
        let start = gradient.data_ptr().addr();
        Some((start, start + gradient.numel() * gradient.kind().elt_size_in_bytes(), i))
    };
    let mut ranges: Vec<_> = gradients.iter().enumerate().filter_map(range).collect();
    ranges.sort_unstable();
    let mut end = 0;
    for (start, own_end, i) in ranges {
        if start < end
            && let Some(gradient) = &mut gradients[i]
        {
            let mut copy = empty(gradient, &gradient.stride())?;
            copy.f_copy_(gradient)?;
            *gradient = copy;
        }
        end = end.max(own_end);
    }
    Ok(gradients)
}

fn empty(like: &Tensor, strides: &[i64]) -> std::result::Result<Tensor, TchError> {
    Tensor::f_empty_strided(like.size(), strides, (like.kind(), like.device()))
}

impl Passes for Call<'_> {
    type Loss = Tensor;
    type Gradient = Tensor;
    type Memory = Tensor;
    type Output = ();

    fn device(&self) -> gradblend::Device {
        self.device
    }

    fn shape(&self, parameter: usize) -> (u64, DType) {
        let Parameter { var, given: (kind, ..), .. } = &self.parameters[parameter];
        let dtype = match kind {
            Kind::Half => DType::F16,
            Kind::BFloat16 => DType::BF16,
            _ => DType::F32,
        };
        (var.numel() as u64, dtype)
    }

    fn loss(&mut self, k: usize) -> Result<Tensor> {
        Ok(self.losses[k].shallow_clone())
    }

    fn gradients(&mut self, name: Loss, loss: Tensor, scale: f32) -> Result<Vec<Option<Tensor>>> {
        check_loss(name, &loss)?;
        let root = if scale == 1.0 { Ok(loss) } else { loss.f_mul_scalar(f64::from(scale)) };
        // The losses of a batch share their graph; the fused one comes last.
        let keep_graph = matches!(name, Loss::Given(k) if k + 1 < self.losses.len());
        self.pass(name, &root.map_err(failed(name))?, keep_graph)
    }

    fn weighted(&mut self, terms: &[(usize, f32)]) -> Result<()> {
        let loss = Loss::Sum;
        let device = self.parameters[0].var.device();
        let mut total: Option<Tensor> = None;
        for (k, factor) in terms {
            let term =
                || self.losses[*k].f_to_device(device)?.f_reshape(&[] as &[i64])?.f_mul_scalar(f64::from(*factor));
            let term = term().map_err(failed(loss))?;
            total = Some(match total {
                Some(total) => total.f_add(&term).map_err(failed(loss))?,
                None => term,
            });
        }
        let Some(total) = total else { return Ok(()) };
        let gradients = self.pass(loss, &total, false)?;
        if gradients.iter().all(Option::is_none) {
            return Err(Error::Unreached { loss });
        }
        let gradients = tch::no_grad(|| separate(gradients)).map_err(failed(loss))?;
        self.output(gradients)
    }

    fn zeros(&mut self, like: &Tensor) -> Result<Tensor> {
        let zeros = || empty(like, &like.stride())?.f_zero_();
        tch::no_grad(zeros).map_err(failed(Loss::HeldOut))
    }

    fn memory(&mut self, parameter: usize) -> Result<Tensor> {
        let var = &self.parameters[parameter].var;
        let strides = self.strides[parameter].clone().unwrap_or_else(|| contiguous(&var.size()));
        empty(var, &strides).map_err(failed(Loss::Sum))
    }

    fn bind(
        &mut self,
        rows: &[Row<Tensor>],
        blended: &mut [Option<Tensor>],
        run: &mut dyn FnMut(Vec<TensorGrads<'_>>, StreamRef<'_>) -> gradblend::Result<()>,
    ) -> Result<()> {
        let address = |tensor: Option<&Tensor>| tensor.map_or(std::ptr::null_mut(), Tensor::data_ptr);
        let mut tensors = Vec::with_capacity(rows.len());
        for (row, blended) in rows.iter().zip(blended) {
            let (len, dtype) = row.shape;
            let modalities: Vec<_> = row.modalities.iter().map(|v| address(v.as_ref()) as *const c_void).collect();
            let (t, g, blended) = (address(row.train()), address(row.valid.as_ref()), address(blended.as_ref()));
            // SAFETY: the gradients were checked to be like the parameter and dense, with one order of elements, and outlive
            // `run`, and nobody else has the blended one; the trainer has checked that its device is theirs. On CUDA their memory
            // is reused in the order of the default stream alone.
            tensors.push(unsafe { TensorGrads::from_raw(len, dtype, t, g, &modalities, blended) });
        }
        // tch works on the default stream, and cannot change it.
        Ok(run(tensors, Stream::default())?)
    }

    fn output(&mut self, blended: Vec<Option<Tensor>>) -> Result<()> {
        tch::no_grad(|| self.add(&blended)).map_err(failed(Loss::Sum))
    }
}
