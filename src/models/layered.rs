//! What tools need of a model: its layers one by one, with attention that is computed by someone
//! else.

use crate::Result;
use crate::attention::{AttentionCall, QuantizedAttention};
use crate::nn::Linear;
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
