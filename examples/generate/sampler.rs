//! How the next token is chosen from the model's logits.

use anyhow::{Result, ensure};
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand::{SeedableRng, rngs::StdRng};

/// Below this temperature the likeliest token is taken: logits over it are no longer finite.
const COLD: f64 = 1e-7;

/// Chooses tokens, the same ones for the same seed.
pub struct Sampler {
    rng: StdRng,
    temperature: f64,
    top_p: Option<f32>,
}

impl Sampler {
    /// `temperature` 0 takes the likeliest token; `top_p` in `(0, 1]` leaves only the likeliest
    /// tokens that have this probability together.
    pub fn new(seed: u64, temperature: f64, top_p: Option<f64>) -> Self {
        let top_p = top_p.filter(|&p| p < 1.0).map(|p| p as f32);
        Self { rng: StdRng::seed_from_u64(seed), temperature, top_p }
    }

    /// The id of the next token, of logits `[vocabulary]` without NaN.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        ensure!(!logits.is_empty(), "the model has no logits, expected one for each token");
        // The first of equals.
        let likeliest =
            (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
        if self.temperature < COLD {
            return Ok(likeliest as u32);
        }
        let probability = |x: &f32| (f64::from(x - logits[likeliest]) / self.temperature).exp();
        let mut weights: Vec<f32> = logits.iter().map(|x| probability(x) as f32).collect();
        if let Some(p) = self.top_p {
            keep_top(&mut weights, p);
        }
        Ok(WeightedIndex::new(&weights)?.sample(&mut self.rng) as u32)
    }
}

/// Leaves the largest weights that make up the part `p` of their sum, one at least; others become 0.
fn keep_top(weights: &mut [f32], p: f32) {
    let enough = p * weights.iter().sum::<f32>();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&i, &j| weights[j].total_cmp(&weights[i]));
    let mut sum = 0.0;
    for i in order {
        if sum >= enough && sum > 0.0 {
            weights[i] = 0.0;
        }
        sum += weights[i];
    }
}
