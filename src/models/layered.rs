//! What tools need of a model: its layers one by one, with attention that is computed by someone
//! else.

use crate::Result;
use crate::attention::{AttentionCall, QuantizedAttention};
use crate::nn::{Linear, Precision};
use candle_core::Tensor;

/// The attention that a layer is handed: queries `[B, H, M, D]`, keys `[B, H_kv, N, D]`, values
/// `[B, H_kv, N, Dv]` and the call, to `[B, H, M, Dv]`. Scale, windows and softcap are those of the
/// layer's own [`QuantizedAttention`].
pub type Attend<'a> = dyn FnMut(&Tensor, &Tensor, &Tensor, &AttentionCall) -> Result<Tensor> + 'a;

/// A model that holds one [`QuantizedAttention`] a layer, and whose attention can be computed by
/// someone else.
///
/// Calibration, search and the recorder of drift work with any model that implements it, as
/// [`BertModel`](super::BertModel), [`LlamaModel`](super::llama::LlamaModel) and
/// [`WordEmbeddings`](super::WordEmbeddings) do. A model of your own names its attention, and calls
/// `attend(...)` in its layer where it would call that:
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_int8_attention::models::{Attend, CalibrationConfig, LayeredModel, calibrate};
/// use candle_int8_attention::{AttentionCall, QuantizedAttention, Result};
/// use candle_nn::{Linear, Module, VarBuilder, linear_no_bias};
///
/// struct Layer {
///     attention: QuantizedAttention,
///     qkv: Linear,
///     out: Linear,
/// }
///
/// struct MyModel {
///     layers: Vec<Layer>,
/// }
///
/// impl LayeredModel for MyModel {
///     type Input = Tensor; // whatever your `embed` takes
///
///     fn attention(&self) -> Vec<&QuantizedAttention> {
///         self.layers.iter().map(|layer| &layer.attention).collect()
///     }
///
///     fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention> {
///         self.layers.iter_mut().map(|layer| &mut layer.attention).collect()
///     }
///
///     fn embed(&self, input: &Tensor) -> Result<Tensor> {
///         Ok(input.clone())
///     }
///
///     fn layer(&self, index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor> {
///         let layer = &self.layers[index];
///         let (b, n, width) = hidden.dims3()?;
///         let qkv = layer.qkv.forward(hidden)?.reshape((b, n, 3, 2, width / 2))?;
///         let part = |i: usize| qkv.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2);
///         // was: layer.attention.forward(&part(0)?, &part(1)?, &part(2)?, AttentionCall::causal())
///         let context = attend(&part(0)?, &part(1)?, &part(2)?, &AttentionCall::causal())?;
///         let context = context.transpose(1, 2)?.reshape((b, n, width))?;
///         Ok((layer.out.forward(&context)? + hidden)?)
///     }
/// }
///
/// # let weights = candle_nn::VarMap::new();
/// # let vb = VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu);
/// # let layer = |i: usize| -> Result<Layer> {
/// #     Ok(Layer {
/// #         attention: QuantizedAttention::default(),
/// #         qkv: linear_no_bias(16, 48, vb.pp(format!("{i}.qkv")))?,
/// #         out: linear_no_bias(16, 16, vb.pp(format!("{i}.out")))?,
/// #     })
/// # };
/// # let model = MyModel { layers: vec![layer(0)?, layer(1)?] };
/// let passage = Tensor::randn(0f32, 1., (1, 24, 16), &Device::Cpu)?;
/// let ranges = calibrate(&model, &[passage], CalibrationConfig::default())?;
/// assert_eq!((ranges.layers.len(), ranges.layers[0].q.len()), (2, 2));
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
pub trait LayeredModel {
    /// Sequences of one length, as the model's embedding takes them.
    type Input: ?Sized;

    /// The attention of every layer, first to last; each layer computes attention once.
    fn attention(&self) -> Vec<&QuantizedAttention>;

    /// The same, to switch it.
    fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention>;

    /// The linear layers whose precision can be chosen, in the order in which they are multiplied; none
    /// unless the model says otherwise.
    fn linear_mut(&mut self) -> Vec<NamedLinear<'_>> {
        Vec::new()
    }

    /// What enters the first layer, `[B, N, hidden_size]`.
    ///
    /// # Errors
    /// The model's own.
    fn embed(&self, input: &Self::Input) -> Result<Tensor>;

    /// What enters the first layer for some inputs, `[B, N, hidden_size]`: weights in [`Precision::Int8`] are
    /// rounded to suit what they meet on its way through the model ([`Linear::to_int8_for`]); to the nearest codes
    /// if there is none, which is so unless the model says otherwise.
    ///
    /// # Errors
    /// The model's own.
    fn sample(&self) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// One layer, `[B, N, hidden_size]` to the same, with attention computed by `attend`.
    ///
    /// # Errors
    /// The model's own, and those of `attend`.
    fn layer(&self, index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor>;

    /// What the model is used for, `[B, size]`, from what leaves its last layer; the mean over
    /// tokens unless the model says otherwise.
    ///
    /// # Errors
    /// The model's own.
    fn embedding(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(hidden.mean(1)?)
    }

    /// The numbers of query heads and of key heads, which are those of every layer. With them, a
    /// calibration of another model is refused before anything is computed; without them (the
    /// default), when attention is.
    fn head_counts(&self) -> Option<[usize; 2]> {
        None
    }
}

/// A linear layer of a model.
pub struct NamedLinear<'a> {
    /// The layer of the model that it is in, counted from 0.
    pub layer: usize,
    /// Which of its products.
    pub name: &'static str,
    /// The layer itself.
    pub linear: &'a mut Linear,
}

/// The linear layers of every layer, by the names that they have in it.
pub(super) fn named<'a, const N: usize>(
    layers: impl Iterator<Item = [(&'static str, &'a mut Linear); N]>,
) -> Vec<NamedLinear<'a>> {
    let of_layer =
        |(layer, of): (usize, [_; N])| of.map(|(name, linear)| NamedLinear { layer, name, linear });
    layers.enumerate().flat_map(of_layer).collect()
}

/// The linear layers of a model in other precisions, one for each in the order of
/// [`LayeredModel::linear_mut`], int8 rounded to suit the model's sample. Afterwards the model is as it was.
///
/// # Errors
/// Those of [`Linear::to_precision`] and of the model.
pub(crate) fn linear_in<M: LayeredModel + ?Sized>(
    model: &mut M,
    precisions: &[Precision],
) -> Result<Vec<Linear>> {
    let mut packed: Vec<Option<Linear>> = precisions.iter().map(|_| None).collect();
    let int8 = |of: usize| precisions[of] == Precision::Int8;
    let rounded = |(index, of): (usize, NamedLinear<'_>)| int8(index) && of.linear.is_packed();
    let mut entering = match model.linear_mut().into_iter().enumerate().any(rounded) {
        true => model.sample()?,
        false => None,
    };
    for layer in 0..model.attention().len() {
        let Some(hidden) = &entering else { break };
        let of_layer = model.linear_mut().into_iter().enumerate();
        let of_layer = of_layer.filter(|(index, of)| of.layer == layer && int8(*index));
        of_layer.for_each(|(_, of)| of.linear.watch());
        let leaving = forward(model, layer, hidden);
        let seen: Vec<_> = model.linear_mut().into_iter().map(|of| of.linear.unwatch()).collect();
        entering = Some(leaving?);
        for ((of, seen), packed) in model.linear_mut().into_iter().zip(seen).zip(&mut packed) {
            if !seen.is_empty() {
                *packed = Some(of.linear.to_int8_for(&seen)?);
            }
        }
    }
    let rest = model.linear_mut().into_iter().zip(precisions).zip(packed);
    rest.map(|((of, &precision), packed)| {
        packed.map_or_else(|| of.linear.to_precision(precision), Ok)
    })
    .collect()
}

/// One layer with its own attention.
///
/// # Errors
/// Those of the model.
pub(crate) fn forward<M: LayeredModel + ?Sized>(
    model: &M,
    layer: usize,
    hidden: &Tensor,
) -> Result<Tensor> {
    let attention = model.attention()[layer];
    model.layer(layer, hidden, &mut |q, k, v, call| attention.forward(q, k, v, call))
}

/// What enters the attention of a layer.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct AttentionInput<'a> {
    /// `[B, H, M, D]`
    pub q: &'a Tensor,
    /// `[B, H_kv, N, D]`
    pub k: &'a Tensor,
    /// `[B, H_kv, N, Dv]`
    pub v: &'a Tensor,
    /// Which keys are seen.
    pub call: &'a AttentionCall,
}

/// Runs a model with its own attention, shows what enters that of each layer, first to last, and
/// gives what leaves the last one, `[B, N, hidden_size]`.
///
/// # Errors
/// Those of the model, and whatever `see` returns.
pub fn run_layers<M: LayeredModel + ?Sized>(
    model: &M,
    input: &M::Input,
    see: &mut dyn FnMut(usize, AttentionInput<'_>) -> Result<()>,
) -> Result<Tensor> {
    let mut hidden = model.embed(input)?;
    for (index, attention) in model.attention().into_iter().enumerate() {
        hidden = model.layer(index, &hidden, &mut |q, k, v, call| {
            see(index, AttentionInput { q, k, v, call })?;
            attention.forward(q, k, v, call)
        })?;
    }
    Ok(hidden)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{largest_difference, randn};

    /// One layer with one product, which fails if it is told to.
    struct Model {
        attention: QuantizedAttention,
        linear: Linear,
        sample: Option<Tensor>,
        fails: bool,
    }

    impl Model {
        fn new(sample: Option<Tensor>) -> Self {
            let linear = Linear::new(&randn(&[30, 20]), None, Precision::F32).unwrap();
            Self { attention: QuantizedAttention::default(), linear, sample, fails: false }
        }
    }

    impl LayeredModel for Model {
        type Input = Tensor;

        fn attention(&self) -> Vec<&QuantizedAttention> {
            vec![&self.attention]
        }

        fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention> {
            vec![&mut self.attention]
        }

        fn linear_mut(&mut self) -> Vec<NamedLinear<'_>> {
            vec![NamedLinear { layer: 0, name: "all", linear: &mut self.linear }]
        }

        fn embed(&self, input: &Tensor) -> Result<Tensor> {
            Ok(input.clone())
        }

        fn sample(&self) -> Result<Option<Tensor>> {
            Ok(self.sample.clone())
        }

        fn layer(&self, _: usize, hidden: &Tensor, _: &mut Attend<'_>) -> Result<Tensor> {
            let x = self.linear.forward(hidden)?;
            if self.fails { Ok(x.reshape(7)?) } else { Ok(x) }
        }
    }

    #[test]
    fn int8_suits_what_enters_a_layer() {
        let (x, sample) = (randn(&[1, 9, 20]), (randn(&[1, 50, 20]) + 2.0).unwrap());
        for sample in [Some(sample), None] {
            let mut model = Model::new(sample);
            let found = linear_in(&mut model, &[Precision::Int8]).unwrap().remove(0);
            let expected = match &model.sample {
                Some(sample) => model.linear.to_int8_for(std::slice::from_ref(sample)).unwrap(),
                None => model.linear.to_precision(Precision::Int8).unwrap(),
            };
            let (found, expected) = (found.forward(&x).unwrap(), expected.forward(&x).unwrap());
            assert_eq!(largest_difference(&found, &expected), 0.0);
        }
    }

    #[test]
    fn a_model_that_fails_is_left_as_it_was() {
        let mut model = Model { fails: true, ..Model::new(Some(randn(&[1, 5, 20]))) };
        assert!(linear_in(&mut model, &[Precision::Int8]).is_err());
        model.linear.forward(&randn(&[1, 5, 20])).unwrap();
        assert!(model.linear.unwatch().is_empty());
    }
}
