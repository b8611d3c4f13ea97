//! How far a decoder's predictions of the next token move: perplexity and KL divergence over a
//! text, as language models are compared.

use super::sums::nan_max;
use crate::{Error, Result};
use serde::Serialize;

/// What becomes of the prediction of one token.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct TokenDrift {
    /// `-ln p` of the token that came, by the reference.
    pub nll_reference: f64,
    /// The same by the candidate.
    pub nll_candidate: f64,
    /// KL divergence of the candidate's distribution from the reference's, in nats.
    pub kl: f64,
    /// Whether both find the same token likeliest.
    pub same_top: bool,
}

impl TokenDrift {
    /// From the logits of both for one position, and the token that came there. NaN in a logit
    /// gives NaN.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the lengths differ, [`Error::InvalidArgument`] if `token` is not one of them.
    pub fn of_logits(reference: &[f32], candidate: &[f32], token: usize) -> Result<Self> {
        let (found, expected) = (candidate.len(), reference.len());
        if found != expected {
            let problem = format!("{found} logits, expected {expected} as in the reference");
            return Err(Error::Mismatch(problem));
        }
        if token >= expected {
            let problem = format!("token {token}, expected less than {expected}");
            return Err(Error::InvalidArgument(problem));
        }
        let (top_a, top_b) = (top(reference), top(candidate));
        let largest = |of: &[f32], top: Option<usize>| top.map_or(f64::NAN, |i| f64::from(of[i]));
        let (max_a, max_b) = (largest(reference, top_a), largest(candidate, top_b));
        let (mut sum_a, mut sum_b, mut moved) = (0.0, 0.0, 0.0);
        for (&a, &b) in reference.iter().zip(candidate) {
            let (a, b) = (f64::from(a), f64::from(b));
            let (exp_a, exp_b) = ((a - max_a).exp(), (b - max_b).exp());
            sum_a += exp_a;
            sum_b += exp_b;
            // A token of probability 0 adds nothing, whatever its logits are.
            if exp_a != 0.0 {
                moved += exp_a * (a - b);
            }
        }
        let (ln_sum_a, ln_sum_b) = (max_a + sum_a.ln(), max_b + sum_b.ln());
        let kl = moved / sum_a - ln_sum_a + ln_sum_b;
        Ok(Self {
            nll_reference: ln_sum_a - f64::from(reference[token]),
            nll_candidate: ln_sum_b - f64::from(candidate[token]),
            // Rounding can push the divergence of equal rows below 0; NaN stays.
            kl: if kl < 0.0 { 0.0 } else { kl },
            same_top: top_a.is_some() && top_a == top_b,
        })
    }

    /// How much the probability of the token that came rose.
    fn probability_change(&self) -> f64 {
        (-self.nll_candidate).exp() - (-self.nll_reference).exp()
    }
}

/// Index of the first largest logit; none among NaN.
fn top(logits: &[f32]) -> Option<usize> {
    let mut top = None;
    let mut largest = f32::NEG_INFINITY;
    for (index, &logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return None;
        }
        if top.is_none() || logit > largest {
            (top, largest) = (Some(index), logit);
        }
    }
    top
}

/// A mean over tokens, or a function of one, with its standard error.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Estimate {
    /// The value.
    pub value: f64,
    /// Its standard error: of tokens as independent draws, so that it is too small where errors
    /// come in clusters. NaN (`null` in JSON) for less than two tokens.
    pub error: f64,
}

impl Estimate {
    fn mean(values: impl Iterator<Item = f64> + Clone) -> Self {
        let count = values.clone().count() as f64;
        let mean = values.clone().sum::<f64>() / count;
        let squares: f64 = values.map(|x| (x - mean) * (x - mean)).sum();
        Self { value: mean, error: (squares / (count - 1.0) / count).sqrt() }
    }

    /// `f` of it, whose slope there is `slope`.
    fn map(self, f: impl Fn(f64) -> f64, slope: f64) -> Self {
        Self { value: f(self.value), error: self.error * slope.abs() }
    }
}

/// How values are spread.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Percentiles {
    /// The largest.
    pub max: f64,
    /// 99.9 % are not larger, and so on.
    pub p999: f64,
    /// 99 %.
    pub p99: f64,
    /// 95 %.
    pub p95: f64,
    /// 90 %.
    pub p90: f64,
    /// Half.
    pub median: f64,
    /// 10 %.
    pub p10: f64,
    /// 5 %.
    pub p05: f64,
    /// 1 %.
    pub p01: f64,
    /// The smallest.
    pub min: f64,
}

impl Percentiles {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.collect();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().saturating_sub(1) as f64;
        // Linear between the two values next to it.
        let at = |part: f64| {
            let place = part * last;
            let value = |index: f64| sorted.get(index as usize).copied().unwrap_or(f64::NAN);
            let (low, high) = (value(place.floor()), value(place.ceil()));
            if low == high { low } else { low + (high - low) * place.fract() }
        };
        Self {
            max: sorted.iter().copied().reduce(nan_max).unwrap_or(f64::NAN),
            p999: at(0.999),
            p99: at(0.99),
            p95: at(0.95),
            p90: at(0.9),
            median: at(0.5),
            p10: at(0.1),
            p05: at(0.05),
            p01: at(0.01),
            min: at(0.0),
        }
    }
}

/// [`TokenDrift`] over a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct TextDrift {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// `exp` of the mean of `-ln p`, by the reference.
    pub perplexity_reference: Estimate,
    /// The same by the candidate.
    pub perplexity_candidate: Estimate,
    /// Candidate over reference. Its error is that of the differences token by token, and much
    /// smaller than the errors of both.
    pub perplexity_ratio: Estimate,
    /// Mean KL divergence, in nats.
    pub mean_kl: Estimate,
    /// How the divergences are spread.
    pub kl: Percentiles,
    /// Share of tokens for which both find the same one likeliest.
    pub same_top: Estimate,
    /// Mean change of the probability of the token that came; rises are positive.
    pub mean_probability_change: Estimate,
    /// Root mean square of these changes.
    pub rms_probability_change: Estimate,
    /// How they are spread.
    pub probability_change: Percentiles,
}

impl TextDrift {
    /// The summary of all tokens.
    pub fn of(tokens: &[TokenDrift]) -> Self {
        let exp = |ln: Estimate| ln.map(f64::exp, ln.value.exp());
        let changes = tokens.iter().map(TokenDrift::probability_change);
        let mean_square = Estimate::mean(changes.clone().map(|x| x * x));
        let rms = mean_square.value.sqrt();
        Self {
            tokens: tokens.len(),
            perplexity_reference: exp(Estimate::mean(tokens.iter().map(|t| t.nll_reference))),
            perplexity_candidate: exp(Estimate::mean(tokens.iter().map(|t| t.nll_candidate))),
            perplexity_ratio: exp(Estimate::mean(
                tokens.iter().map(|t| t.nll_candidate - t.nll_reference),
            )),
            mean_kl: Estimate::mean(tokens.iter().map(|t| t.kl)),
            kl: Percentiles::of(tokens.iter().map(|t| t.kl)),
            same_top: Estimate::mean(tokens.iter().map(|t| f64::from(u8::from(t.same_top)))),
            mean_probability_change: Estimate::mean(changes.clone()),
            rms_probability_change: match rms > 0.0 {
                true => mean_square.map(f64::sqrt, 0.5 / rms),
                false => mean_square,
            },
            probability_change: Percentiles::of(changes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "found {found}, expected {expected}");
    }

    /// Logits whose softmax is `p`, moved by a constant, which softmax does not see.
    fn logits(p: &[f64], constant: f64) -> Vec<f32> {
        p.iter().map(|p| (p.ln() + constant) as f32).collect()
    }

    #[test]
    fn a_token_equals_its_definition() {
        let (p, q) = ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]);
        let drift = TokenDrift::of_logits(&logits(&p, 3.0), &logits(&q, -2.0), 1).unwrap();
        let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-6, "{found}");
        near(drift.nll_reference, 4f64.ln());
        near(drift.nll_candidate, 2f64.ln());
        near(drift.kl, 0.5 * 2f64.ln() + 0.25 * 0.5f64.ln());
        near(drift.probability_change(), 0.25);
        assert!(!drift.same_top);
    }

    #[test]
    fn logits_that_do_not_fit_are_an_error() {
        assert!(matches!(TokenDrift::of_logits(&[0.0], &[0.0; 2], 0), Err(Error::Mismatch(_))));
        for (row, token) in [(&[][..], 0), (&[0.0; 3][..], 3), (&[0.0; 3][..], usize::MAX)] {
            let drift = TokenDrift::of_logits(row, row, token);
            assert!(matches!(drift, Err(Error::InvalidArgument(_))), "{drift:?}");
        }
    }

    #[test]
    fn equal_logits_do_not_drift() {
        let row: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin() * 20.0).collect();
        let drift = TokenDrift::of_logits(&row, &row, 17).unwrap();
        assert!(drift.kl < 1e-12 && drift.same_top);
        assert_eq!(drift.nll_reference, drift.nll_candidate);
    }

    #[test]
    fn impossible_tokens_do_not_count_and_nan_does() {
        let (impossible, nan) = ([0.0, f32::NEG_INFINITY], [0.0, f32::NAN]);
        close(TokenDrift::of_logits(&impossible, &[0.0, 0.0], 0).unwrap().kl, 2f64.ln());
        assert_eq!(TokenDrift::of_logits(&impossible, &impossible, 0).unwrap().kl, 0.0);
        assert!(TokenDrift::of_logits(&nan, &[0.0, 0.0], 0).unwrap().kl.is_nan());
        assert!(TokenDrift::of_logits(&[0.0, 0.0], &nan, 0).unwrap().kl.is_nan());
    }

    /// Expected values: the formulas in Python; standard errors are `stdev / sqrt(n)`.
    #[test]
    fn a_text_equals_its_definition() {
        let token = |nll: f64, moved: f64, kl: f64| TokenDrift {
            nll_reference: nll,
            nll_candidate: nll + moved,
            kl,
            same_top: moved < 0.2,
        };
        let tokens = [
            token(1.0, 0.1, 0.01),
            token(2.0, -0.1, 0.02),
            token(0.5, 0.3, 0.04),
            token(4.0, 0.0, 0.0),
        ];
        let drift = TextDrift::of(&tokens);
        assert_eq!(drift.tokens, 4);
        close(drift.perplexity_reference.value, 6.520_819_120_330_112_5);
        close(drift.perplexity_reference.error, 5.046_618_313_909_583);
        close(drift.perplexity_ratio.value, 1.077_884_150_884_631_5);
        close(drift.perplexity_ratio.error, 0.092_041_881_879_358_23);
        close(drift.mean_kl.value, 0.0175);
        close(drift.mean_kl.error, 0.008_539_125_638_299_666);
        close(drift.kl.median, 0.015);
        close(drift.kl.p90, 0.034);
        close(drift.kl.p01, 0.000_3);
        close(drift.kl.max, 0.04);
        close(drift.same_top.value, 0.75);
        close(drift.same_top.error, 0.25);
        close(drift.rms_probability_change.value, 0.080_840_191_186_603_3);
        close(drift.rms_probability_change.error, 0.037_512_355_668_793_365);
    }

    #[test]
    fn nan_and_nothing_are_not_hidden() {
        let token = TokenDrift { nll_reference: 1.0, nll_candidate: 1.0, kl: 0.0, same_top: true };
        let drift = TextDrift::of(&[token, TokenDrift { kl: f64::NAN, ..token }]);
        assert!(drift.mean_kl.value.is_nan() && drift.kl.max.is_nan());
        let none = TextDrift::of(&[]);
        assert!(none.tokens == 0 && none.mean_kl.value.is_nan() && none.kl.max.is_nan());
    }
}
