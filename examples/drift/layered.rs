//! What the recorder needs of a model.

use crate::common::text_model::TextModel;
use candle_core::Tensor;
use candle_int8_attention::Result;
use candle_int8_attention::drift::{Attend, LayeredModel};

impl TextModel {
    fn layered(&self) -> &dyn LayeredModel<Input = Tensor> {
        match self {
            TextModel::Encoder(encoder) => &encoder.model,
            TextModel::Decoder(decoder) => &decoder.model,
        }
    }
}

/// The input is token ids, U32 `[1, N]`.
impl LayeredModel for TextModel {
    type Input = Tensor;

    fn layers(&self) -> usize {
        self.layered().layers()
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        self.layered().embed(ids)
    }

    fn layer(&self, index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor> {
        self.layered().layer(index, hidden, attend)
    }

    fn embedding(&self, hidden: &Tensor) -> Result<Tensor> {
        self.layered().embedding(hidden)
    }
}
