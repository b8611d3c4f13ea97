//! What tools need of a model: its attention, layer by layer, and what enters it.

use super::BertModel;
use super::llama::LlamaModel;
use crate::{AttnMask, QuantizedAttention, Result};
use candle_core::Tensor;

/// What enters the attention of a layer.
#[derive(Clone, Copy)]
pub struct AttentionInput<'a> {
    /// `[B, H, M, D]`
    pub q: &'a Tensor,
    /// `[B, H_kv, N, D]`
    pub k: &'a Tensor,
    /// `[B, H_kv, N, Dv]`
    pub v: &'a Tensor,
    /// The mask that the layer applies.
    pub mask: &'a AttnMask,
}

/// A model that holds one [`QuantizedAttention`] a layer.
///
/// Calibration and search work with any model that implements it; for a model of your own:
///
/// ```
/// use candle_core::Tensor;
/// use candle_int8_attention::models::{AttentionInput, AttentionLayers};
/// use candle_int8_attention::{AttnMask, QuantizedAttention, Result};
///
/// struct MyModel {
///     layers: Vec<MyLayer>,
/// }
///
/// struct MyLayer {
///     attention: QuantizedAttention,
///     // and its weights
/// }
///
/// # impl MyLayer {
/// #     fn qkv(&self, x: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
/// #         Ok((x.clone(), x.clone(), x.clone()))
/// #     }
/// #     fn forward(&self, x: &Tensor) -> Result<Tensor> {
/// #         self.attention.forward(x, x, x, &AttnMask::None)
/// #     }
/// # }
/// # impl MyModel {
/// #     fn embed(&self, ids: &Tensor) -> Result<Tensor> {
/// #         Ok(ids.to_dtype(candle_core::DType::F32)?.reshape((1, 1, (), 1))?)
/// #     }
/// # }
/// impl AttentionLayers for MyModel {
///     fn attention(&self) -> Vec<&QuantizedAttention> {
///         self.layers.iter().map(|layer| &layer.attention).collect()
///     }
///
///     fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention> {
///         self.layers.iter_mut().map(|layer| &mut layer.attention).collect()
///     }
///
///     fn run(
///         &self,
///         ids: &Tensor,
///         see: &mut dyn FnMut(usize, AttentionInput<'_>) -> Result<()>,
///     ) -> Result<Tensor> {
///         let mut hidden = self.embed(ids)?;
///         for (index, layer) in self.layers.iter().enumerate() {
///             let (q, k, v) = layer.qkv(&hidden)?;
///             see(index, AttentionInput { q: &q, k: &k, v: &v, mask: &AttnMask::None })?;
///             hidden = layer.forward(&hidden)?;
///         }
///         Ok(hidden)
///     }
/// }
/// ```
pub trait AttentionLayers {
    /// The attention of every layer, first to last.
    fn attention(&self) -> Vec<&QuantizedAttention>;

    /// The same, to switch it.
    fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention>;

    /// The numbers of query heads and of key heads, which are those of every layer. With them, a
    /// calibration of another model is refused before anything is computed; without them (the
    /// default), when attention is.
    fn head_counts(&self) -> Option<[usize; 2]> {
        None
    }

    /// Runs the model on token ids `[B, N]` U32 without padding, shows what enters the attention of
    /// each layer, first to last, and gives the last hidden states `[B, N, hidden_size]`.
    ///
    /// # Errors
    /// Those of the model, and whatever `see` returns.
    fn run(
        &self,
        ids: &Tensor,
        see: &mut dyn FnMut(usize, AttentionInput<'_>) -> Result<()>,
    ) -> Result<Tensor>;
}

impl AttentionLayers for BertModel {
    fn attention(&self) -> Vec<&QuantizedAttention> {
        self.layers().iter().map(|layer| &layer.attention).collect()
    }

    fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention> {
        self.layers_mut().iter_mut().map(|layer| &mut layer.attention).collect()
    }

    fn head_counts(&self) -> Option<[usize; 2]> {
        Some([self.config().num_attention_heads; 2])
    }

    fn run(
        &self,
        ids: &Tensor,
        see: &mut dyn FnMut(usize, AttentionInput<'_>) -> Result<()>,
    ) -> Result<Tensor> {
        let mut hidden = self.embed(ids, None)?;
        for (index, layer) in self.layers().iter().enumerate() {
            let (q, k, v) = layer.qkv(&hidden)?;
            see(index, AttentionInput { q: &q, k: &k, v: &v, mask: &AttnMask::None })?;
            hidden = layer.forward(&hidden, &AttnMask::None)?;
        }
        Ok(hidden)
    }
}

impl AttentionLayers for LlamaModel {
    fn attention(&self) -> Vec<&QuantizedAttention> {
        self.layers().iter().map(|layer| &layer.attention).collect()
    }

    fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention> {
        self.layers_mut().iter_mut().map(|layer| &mut layer.attention).collect()
    }

    fn head_counts(&self) -> Option<[usize; 2]> {
        let config = self.config();
        Some([config.num_heads, config.num_kv_heads])
    }

    fn run(
        &self,
        ids: &Tensor,
        see: &mut dyn FnMut(usize, AttentionInput<'_>) -> Result<()>,
    ) -> Result<Tensor> {
        let mask = AttnMask::causal();
        let mut hidden = self.embed(ids)?;
        for (index, layer) in self.layers().iter().enumerate() {
            hidden = self.layer_with(index, &hidden, |q, k, v| {
                see(index, AttentionInput { q, k, v, mask: &mask })?;
                layer.attention.forward(q, k, v, &mask)
            })?;
        }
        self.normalize(&hidden)
    }
}
