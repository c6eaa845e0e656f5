//! Backward passes of PyTorch, and gradients in the memory of its tensors.

use std::ffi::c_void;

use gradblend::trainer::{Error, Loss, Passes, Result, Row};
use gradblend::{DType, Stream, StreamRef, TensorGrads};
use tch::{Kind, TchError, Tensor};

/// A parameter with its name in errors, and the kind, device and size that it was given with.
#[derive(Debug)]
pub(crate) struct Parameter {
    pub(crate) name: String,
    pub(crate) var: Tensor,
    given: String,
}

impl Parameter {
    pub(crate) fn new(name: String, var: Tensor) -> Result<Self> {
        if var.is_sparse() {
            return Err(Error::Parameter { parameter: name, expected: "dense".into(), got: "sparse".into() });
        }
        Ok(Parameter { given: described(&var), name, var })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.var.numel() == 0
    }

    /// Handles of one parameter have one address.
    pub(crate) fn memory(&self) -> (usize, Vec<i64>, Vec<i64>) {
        (self.var.data_ptr().addr(), self.var.size(), self.var.stride())
    }
}

fn described(tensor: &Tensor) -> String {
    format!("{:?} {:?} on {:?}", tensor.kind(), tensor.size(), tensor.device())
}

/// Which parameters require a gradient now.
pub(crate) fn trained(parameters: &[Parameter]) -> Result<Vec<bool>> {
    for Parameter { name, var, given } in parameters {
        let got = described(var);
        if got != *given {
            return Err(Error::Parameter { parameter: name.clone(), expected: given.clone(), got });
        }
    }
    let trained: Vec<bool> = parameters.iter().map(|parameter| parameter.var.requires_grad()).collect();
    if trained.contains(&true) { Ok(trained) } else { Err(Error::NoParameter) }
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

/// Computes a loss, once.
pub(crate) type Closure<'a> = Box<dyn FnOnce() -> Result<Tensor> + 'a>;

/// One call of `backward`.
pub(crate) struct Call<'a> {
    parameters: &'a [Parameter],
    trained: Vec<bool>,
    losses: &'a [Tensor],
    held_out: Option<Closure<'a>>,
    independent: Option<Closure<'a>>,
    copied: &'a mut u64,
    /// Strides of each parameter's gradients: those of the first one that is dense.
    strides: Vec<Option<Vec<i64>>>,
}

impl<'a> Call<'a> {
    pub(crate) fn new(
        parameters: &'a [Parameter],
        trained: Vec<bool>,
        losses: &'a [Tensor],
        held_out: Closure<'a>,
        independent: Option<Closure<'a>>,
        copied: &'a mut u64,
    ) -> Self {
        let strides = vec![None; parameters.len()];
        Call { parameters, trained, losses, held_out: Some(held_out), independent, copied, strides }
    }

    /// The gradients of one backward pass, each `None` where the loss does not reach the parameter.
    fn pass(&mut self, loss: Loss, root: &Tensor, keep_graph: bool) -> Result<Vec<Option<Tensor>>> {
        let trained = || self.parameters.iter().zip(&self.trained);
        let inputs: Vec<_> = trained().filter(|(_, trained)| **trained).map(|(parameter, _)| &parameter.var).collect();
        let found = Tensor::f_run_backward(&[root], &inputs, keep_graph, false).map_err(Error::framework(loss))?;
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
        let Parameter { name, var, .. } = &self.parameters[i];
        let sparse = gradient.is_sparse();
        let same = gradient.kind() == var.kind() && gradient.device() == var.device() && gradient.size() == var.size();
        if sparse || !same {
            let got = described(&gradient) + if sparse { ", sparse" } else { "" };
            return Err(Error::Gradient { parameter: name.clone(), loss, expected: described(var), got });
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
        let copy = tch::no_grad(ordered).map_err(Error::framework(loss))?;
        *self.copied += u64::from(copy.is_some());
        let gradient = copy.unwrap_or(gradient);
        self.strides[i].get_or_insert_with(|| gradient.stride());
        Ok(gradient)
    }

    /// Adds a gradient to `.grad`, or makes it that.
    fn add(&self, i: usize, gradient: &Tensor) -> std::result::Result<(), TchError> {
        let var = &self.parameters[i].var;
        let mut grad = var.f_grad()?;
        if grad.defined() {
            return grad.f_add_(gradient).map(drop);
        }
        // tch cannot set `.grad`. The backward pass of the sum makes one, whose memory is exchanged.
        tch::with_grad(|| var.f_sum(var.kind())?.f_backward())?;
        var.f_grad()?.f_set_data(gradient)
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
    type Gradient = Tensor;
    type Memory = Tensor;
    type Output = ();

    fn has_independent(&self) -> bool {
        self.independent.is_some()
    }

    fn gradients(&mut self, loss: Loss, scale: f32) -> Result<Vec<Option<Tensor>>> {
        let closure = match loss {
            Loss::HeldOut => self.held_out.take(),
            Loss::Independent => self.independent.take(),
            Loss::Train(_) | Loss::Sum => None,
        };
        let tensor = match (loss, closure) {
            (Loss::Train(k), _) => self.losses[k].shallow_clone(),
            (_, Some(closure)) => closure()?,
            (_, None) => return Ok(Vec::new()),
        };
        check_loss(loss, &tensor)?;
        let root = if scale == 1.0 { Ok(tensor) } else { tensor.f_mul_scalar(f64::from(scale)) };
        // The losses of a batch share their graph; the fused one comes last.
        let keep_graph = matches!(loss, Loss::Train(k) if k + 1 < self.losses.len());
        self.pass(loss, &root.map_err(Error::framework(loss))?, keep_graph)
    }

    fn weighted(&mut self, terms: &[(usize, f32)]) -> Result<()> {
        let loss = Loss::Sum;
        let device = self.parameters[0].var.device();
        let mut total: Option<Tensor> = None;
        for (k, factor) in terms {
            let term =
                || self.losses[*k].f_to_device(device)?.f_reshape(&[] as &[i64])?.f_mul_scalar(f64::from(*factor));
            let term = term().map_err(Error::framework(loss))?;
            total = Some(match total {
                Some(total) => total.f_add(&term).map_err(Error::framework(loss))?,
                None => term,
            });
        }
        let Some(total) = total else { return Ok(()) };
        let gradients = self.pass(loss, &total, false)?;
        if gradients.iter().all(Option::is_none) {
            return Err(Error::Unreached { loss });
        }
        let gradients = tch::no_grad(|| separate(gradients)).map_err(Error::framework(loss))?;
        self.output(gradients)
    }

    fn zeros(&mut self, like: &Tensor) -> Result<Tensor> {
        let zeros = || empty(like, &like.stride())?.f_zero_();
        tch::no_grad(zeros).map_err(Error::framework(Loss::HeldOut))
    }

    fn memory(&mut self, parameter: usize) -> Result<Tensor> {
        let var = &self.parameters[parameter].var;
        let strides = self.strides[parameter].clone().unwrap_or_else(|| contiguous(&var.size()));
        empty(var, &strides).map_err(Error::framework(Loss::Sum))
    }

    fn bind(
        &mut self,
        rows: &[Row<Tensor>],
        blended: &mut [Option<Tensor>],
        run: &mut dyn FnMut(Vec<TensorGrads<'_>>, StreamRef<'_>) -> gradblend::Result<()>,
    ) -> Result<()> {
        let address = |tensor: Option<&Tensor>| tensor.map_or(std::ptr::null_mut(), Tensor::data_ptr);
        let mut tensors = Vec::with_capacity(rows.len());
        for ((Parameter { var, .. }, row), blended) in self.parameters.iter().zip(rows).zip(blended) {
            let dtype = match var.kind() {
                Kind::Half => DType::F16,
                Kind::BFloat16 => DType::BF16,
                _ => DType::F32,
            };
            let modalities: Vec<_> = row.modalities.iter().map(|v| address(v.as_ref()) as *const c_void).collect();
            let (t, g, blended) = (address(row.train()), address(row.valid.as_ref()), address(blended.as_ref()));
            // SAFETY: the gradients were checked to be like the parameter and dense, with one order of elements, and outlive
            // `run`; nobody else has the blended one. On CUDA their memory is reused in the order of the default stream alone.
            tensors.push(unsafe { TensorGrads::from_raw(var.numel() as u64, dtype, t, g, &modalities, blended) });
        }
        // tch works on the default stream, and cannot change it.
        Ok(run(tensors, Stream::default())?)
    }

    fn output(&mut self, blended: Vec<Option<Tensor>>) -> Result<()> {
        let add = || {
            let mut present = blended.iter().enumerate().filter_map(|(i, gradient)| Some((i, gradient.as_ref()?)));
            present.try_for_each(|(i, gradient)| self.add(i, gradient))
        };
        tch::no_grad(add).map_err(Error::framework(Loss::Sum))
    }
}
