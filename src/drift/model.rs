//! What a model must offer to be recorded.

use crate::models::llama::LlamaModel;
use crate::models::{BertModel, WordEmbeddings, mean_pool};
use crate::{AttentionConfig, AttnMask, Result};
use candle_core::{DType, Tensor};

/// The attention function that the recorder hands to a model's layer: the arguments, the layouts
/// and the result of [`attention`](crate::attention()). The recorder replaces the backend that the
/// configuration names; scale, windows, softcap and the rest are kept.
pub type Attend<'a> =
    dyn FnMut(&Tensor, &Tensor, &Tensor, &AttnMask, &AttentionConfig) -> Result<Tensor> + 'a;

/// A model whose attention can be computed by someone else.
///
/// [`BertModel`], [`LlamaModel`] and [`WordEmbeddings`] are recorded as they are. A model of your own needs three
/// short methods, and in its layer `attend(...)` in the place of its attention:
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_int8_attention::drift::{Attend, Candidate, LayeredModel, Recorder};
/// use candle_int8_attention::{AttentionConfig, AttnMask, Result};
/// use candle_nn::{Linear, Module, VarBuilder, linear_no_bias};
///
/// struct Layer {
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
///     fn layers(&self) -> usize {
///         self.layers.len()
///     }
///
///     fn embed(&self, input: &Tensor) -> Result<Tensor> {
///         Ok(input.clone())
///     }
///
///     fn layer(&self, index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor> {
///         let layer = &self.layers[index];
///         let (_, n, width) = hidden.dims3()?;
///         let qkv = layer.qkv.forward(hidden)?.reshape((1, n, 3, 2, width / 2))?;
///         let part = |i: usize| qkv.narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2);
///         let (q, k, v) = (part(0)?, part(1)?, part(2)?);
///         // was: attention(&q, &k, &v, ...)
///         let context = attend(&q, &k, &v, &AttnMask::causal(), &AttentionConfig::default())?;
///         let context = context.transpose(1, 2)?.reshape((1, n, width))?;
///         Ok((layer.out.forward(&context)? + hidden)?)
///     }
/// }
///
/// # let weights = candle_nn::VarMap::new();
/// # let vb = VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu);
/// # let layer = |i: usize| -> Result<Layer> {
/// #     Ok(Layer {
/// #         qkv: linear_no_bias(16, 48, vb.pp(format!("{i}.qkv")))?,
/// #         out: linear_no_bias(16, 16, vb.pp(format!("{i}.out")))?,
/// #     })
/// # };
/// # let model = MyModel { layers: vec![layer(0)?, layer(1)?] };
/// let mut recorder = Recorder::new(vec![Candidate::default()])?;
/// let words: Vec<String> = (0..24).map(|i| format!("word {i}")).collect();
/// let input = Tensor::randn(0f32, 1., (1, 24, 16), &Device::Cpu)?;
/// recorder.record(&model, &input, &words, 0)?;
/// let report = recorder.report();
/// assert_eq!(report.configs[0].layers.len(), 2);
/// assert!(report.configs[0].output.mean_sqnr_db > 20.0);
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
pub trait LayeredModel {
    /// One sequence, as the model's embedding takes it.
    type Input: ?Sized;

    /// Number of layers; each computes attention once.
    fn layers(&self) -> usize;

    /// What enters the first layer, `[1, N, hidden]`.
    ///
    /// # Errors
    /// The model's own.
    fn embed(&self, input: &Self::Input) -> Result<Tensor>;

    /// One layer, `[1, N, hidden]` to the same, with attention computed by `attend`.
    ///
    /// # Errors
    /// The model's own, and those of `attend`.
    fn layer(&self, index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor>;

    /// What the model is used for, from what leaves its last layer; the mean over tokens unless
    /// the model says otherwise.
    ///
    /// # Errors
    /// The model's own.
    fn embedding(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(hidden.mean(1)?)
    }
}

/// The input is token ids, U32 `[1, N]`.
impl LayeredModel for BertModel {
    type Input = Tensor;

    fn layers(&self) -> usize {
        BertModel::layers(self).len()
    }

    fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        BertModel::embed(self, input_ids, None)
    }

    fn layer(&self, index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor> {
        let layer = &BertModel::layers(self)[index];
        let config = layer.attention.config();
        layer.forward_with(hidden, |q, k, v| attend(q, k, v, &AttnMask::None, config))
    }

    fn embedding(&self, hidden: &Tensor) -> Result<Tensor> {
        let (b, n, _) = hidden.dims3()?;
        mean_pool(hidden, &Tensor::ones((b, n), DType::U32, hidden.device())?)
    }
}

/// The input is token ids, U32 `[1, N]`. Attention is causal over the whole sequence, without a
/// cache; the embedding is the normalized state of the last token, which predicts the next one.
impl LayeredModel for LlamaModel {
    type Input = Tensor;

    fn layers(&self) -> usize {
        LlamaModel::layers(self).len()
    }

    fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        LlamaModel::embed(self, input_ids)
    }

    fn layer(&self, index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor> {
        let config = LlamaModel::layers(self)[index].attention.config();
        self.layer_with(index, hidden, |q, k, v| attend(q, k, v, &AttnMask::causal(), config))
    }

    fn embedding(&self, hidden: &Tensor) -> Result<Tensor> {
        let last = hidden.narrow(1, hidden.dim(1)? - 1, 1)?.squeeze(1)?;
        self.normalize(&last)
    }
}

/// The input is rows of the table: words by number. Its one layer is self-attention over them.
impl LayeredModel for WordEmbeddings {
    type Input = [u32];

    fn layers(&self) -> usize {
        1
    }

    fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        Ok(self.lookup(ids)?.unsqueeze(0)?)
    }

    fn layer(&self, _index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor> {
        let x = hidden.unsqueeze(1)?;
        let out = attend(&x, &x, &x, &AttnMask::None, &AttentionConfig::default())?;
        Ok(out.squeeze(1)?)
    }
}
