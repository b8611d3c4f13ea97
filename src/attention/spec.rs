//! What of attention belongs to the model, whoever computes it and in which precision.

use crate::{Error, Result};

/// The attention that a model was trained with, whatever the backend.
///
/// Windows and ALiBi go by the position of a query among the keys, which belongs to the call: it is
/// that of its [`Causal`](super::Causal) where there is one; otherwise the queries are the last `M`
/// of the `N` keys.
///
/// More fields may be added: end an expression in `..AttentionSpec::default()`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AttentionSpec {
    /// Factor on the scores before everything else; `None` means `1 / sqrt(D)`.
    pub softmax_scale: Option<f32>,
    /// Bends scaled scores: `cap * tanh(score / cap)` (Gemma 2).
    pub softcap: Option<f32>,
    /// One slope for each query head: `-slope * |position - key|` is added to the scores (Press et
    /// al. 2021, arXiv:2108.12409). [`alibi_slopes`] are those of the paper;
    /// [`flash_attn`](crate::flash_attn) has Candle's, which differ where heads are no power of two.
    pub alibi_slopes: Option<Vec<f32>>,
    /// Sliding window: a query sees at most this many keys to the left of its position. The
    /// `sliding_window` of W of a Hugging Face configuration counts the query's own key: it is
    /// `window_left = W - 1`.
    pub window_left: Option<usize>,
    /// Sliding window: a query sees at most this many keys to the right of its position.
    pub window_right: Option<usize>,
    /// One learned logit for each query head, which takes part in the softmax as a key without a value would
    /// (gpt-oss: OpenAI 2025, arXiv:2508.10925):
    ///
    /// ```text
    /// p[j] = exp(s[j]) / (exp(sink) + sum over keys i of exp(s[i]))
    /// ```
    ///
    /// It is no score: neither scale, softcap, slopes nor mask change it. Minus infinity is none. A query that sees
    /// no key gives zeros, as without. It is a number, which is not trained: gradients flow past it to q, k and v.
    /// One that is to be trained is the additive mask of one more key, whose row in k and in v is 0.
    pub sink_logits: Option<Vec<f32>>,
}

/// The ALiBi slopes of Press et al. (2021, arXiv:2108.12409) for any number of heads: for a power of two `n`
/// the powers of `2^(-8 / n)`; for others those of the power of two below, then every second one of the power
/// of two above.
///
/// ```
/// use candle_int8_attention::attention::alibi_slopes;
/// assert_eq!(alibi_slopes(2), [0.0625, 0.00390625]);
/// assert_eq!(alibi_slopes(3), [0.0625, 0.00390625, 0.25]);
/// ```
pub fn alibi_slopes(heads: usize) -> Vec<f32> {
    let below = if heads == 0 { 1 } else { 1 << heads.ilog2() };
    let powers = |n: usize| (1..=n).map(move |i| (-8.0 * i as f32 / n as f32).exp2());
    powers(below).chain(powers(2 * below).step_by(2)).take(heads).collect()
}

impl AttentionSpec {
    /// The factor on scores of `depth` elements.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless it is finite.
    pub(crate) fn scale(&self, depth: usize) -> Result<f32> {
        let scale = self.softmax_scale.unwrap_or(1.0 / (depth.max(1) as f32).sqrt());
        if !scale.is_finite() {
            let problem = format!("softmax scale {scale}, expected a finite number");
            return Err(Error::InvalidArgument(problem));
        }
        Ok(scale)
    }

    /// # Errors
    /// [`Error::InvalidArgument`] for numbers that make no sense, [`Error::Mismatch`] unless there
    /// is one slope, and one sink logit, for each of `heads` query heads.
    pub(crate) fn check(&self, heads: usize) -> Result<()> {
        if let Some(cap) = self.softcap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
            let problem = format!("softcap {cap}, expected finite and positive");
            return Err(Error::InvalidArgument(problem));
        }
        let none_below = f32::NEG_INFINITY;
        let for_each_head = [
            ("ALiBi slope", &self.alibi_slopes, f32::MIN, "finite"),
            ("sink logit", &self.sink_logits, none_below, "finite, or minus infinity for none"),
        ];
        for (name, numbers, least, expected) in for_each_head {
            let Some(numbers) = numbers else { continue };
            if numbers.len() != heads {
                let found = numbers.len();
                return Err(Error::Mismatch(format!("{found} {name}s for {heads} heads")));
            }
            if let Some(x) = numbers.iter().find(|x| !(least..=f32::MAX).contains(x)) {
                let problem = format!("{name} {x}, expected {expected}");
                return Err(Error::InvalidArgument(problem));
            }
        }
        Ok(())
    }
}
