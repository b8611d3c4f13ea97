//! Rotary position embeddings.

use super::config::{RopeConfig, RopePairs, RopeScaling};
use crate::Result;
use candle_core::{Device, Tensor};

/// The frequencies of a model. Angles are computed for the positions of each call: a table for all
/// of a long context would be large, and the time for one position does not show.
#[derive(Debug, Clone)]
pub(in crate::models) struct Rope {
    frequencies: Vec<f32>,
    pairs: RopePairs,
}

/// Cosines and sines of some consecutive positions, `[N, head_dim / 2]`.
#[derive(Clone)]
pub(in crate::models) struct Rotation {
    cos: Tensor,
    sin: Tensor,
    pairs: RopePairs,
}

impl Rope {
    pub(in crate::models) fn new(config: &RopeConfig, head_dim: usize) -> Self {
        let frequency = |i: usize| {
            let plain = config.theta.powf(-(2.0 * i as f32) / head_dim as f32);
            scaled(plain, i, &config.scaling)
        };
        Self { frequencies: (0..head_dim / 2).map(frequency).collect(), pairs: config.pairs }
    }

    /// The rotation of positions `start .. start + len`.
    pub(in crate::models) fn at(
        &self,
        start: usize,
        len: usize,
        device: &Device,
    ) -> Result<Rotation> {
        // In f32, like the implementations with which such models were trained.
        let angle = |position: usize| self.frequencies.iter().map(move |f| position as f32 * f);
        let angles: Vec<f32> = (start..start + len).flat_map(angle).collect();
        let angles = Tensor::from_vec(angles, (len, self.frequencies.len()), device)?;
        Ok(Rotation { cos: angles.cos()?, sin: angles.sin()?, pairs: self.pairs })
    }
}

/// Frequency `i` after scaling.
fn scaled(plain: f32, i: usize, scaling: &RopeScaling) -> f32 {
    match scaling {
        RopeScaling::None => plain,
        RopeScaling::Linear { factor } => plain / factor,
        RopeScaling::Divisors(divisors) => plain / divisors[i],
        &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let turns = original_context as f32 * plain / (2.0 * std::f32::consts::PI);
            let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
            let kept = kept.clamp(0.0, 1.0);
            plain * (kept + (1.0 - kept) / factor)
        }
    }
}

impl Rotation {
    /// How many positions there are.
    pub(in crate::models) fn len(&self) -> usize {
        self.cos.dims()[0]
    }

    /// The first `len` positions of these.
    pub(in crate::models) fn first(&self, len: usize) -> Result<Self> {
        let first = |x: &Tensor| x.narrow(0, 0, len);
        Ok(Self { cos: first(&self.cos)?, sin: first(&self.sin)?, pairs: self.pairs })
    }

    /// Rotates `[B, H, N, head_dim]`, with any strides.
    pub(in crate::models) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.contiguous()?;
        Ok(match self.pairs {
            RopePairs::Interleaved => candle_nn::rotary_emb::rope_i(&x, &self.cos, &self.sin)?,
            RopePairs::HalfSplit => candle_nn::rotary_emb::rope(&x, &self.cos, &self.sin)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        let config = RopeConfig { theta: 500_000.0, pairs: RopePairs::HalfSplit, scaling };
        Rope::new(&config, 128)
    }

    fn llama3() -> RopeScaling {
        RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        }
    }

    /// The published rule: by wavelength, in three cases.
    #[test]
    fn llama3_scaling_equals_its_definition_by_wavelength() {
        let (plain, scaled) = (rope(RopeScaling::None), rope(llama3()));
        let mut seen = [0; 3];
        for (&plain, &scaled) in plain.frequencies.iter().zip(&scaled.frequencies) {
            let wave = 2.0 * std::f32::consts::PI / plain;
            let (case, expected) = if wave < 8192.0 / 4.0 {
                (0, plain)
            } else if wave > 8192.0 {
                (1, plain / 8.0)
            } else {
                let smooth = (8192.0 / wave - 1.0) / 3.0;
                (2, (1.0 - smooth) * plain / 8.0 + smooth * plain)
            };
            seen[case] += 1;
            assert!((scaled - expected).abs() <= 1e-6 * expected, "{scaled} is not {expected}");
        }
        assert!(seen.iter().all(|&count| count > 0), "{seen:?}");
    }

    #[test]
    fn divisors_divide_each_frequency() {
        let plain = rope(RopeScaling::None).frequencies;
        let divisors: Vec<f32> = (0..64).map(|i| 1.0 + i as f32).collect();
        let divided = rope(RopeScaling::Divisors(divisors.clone())).frequencies;
        let linear = rope(RopeScaling::Linear { factor: 2.0 }).frequencies;
        for i in 0..64 {
            assert_eq!(divided[i], plain[i] / divisors[i]);
            assert_eq!(linear[i], plain[i] / 2.0);
        }
    }

    /// Both conventions rotate the same pairs, if the elements are in the order they ask for.
    #[test]
    fn conventions_differ_in_the_order_of_elements_only() -> Result<()> {
        let x: Vec<f32> = (0..5 * 8).map(|i| (i as f32).sin()).collect();
        let interleave =
            |x: &[f32]| -> Vec<f32> { (0..8).map(|i| x[i / 2 + (i % 2) * 4]).collect() };
        let rotated = |x: Vec<f32>, pairs| -> Result<Vec<f32>> {
            let config = RopeConfig { theta: 100.0, pairs, scaling: RopeScaling::None };
            let x = Tensor::from_vec(x, (1, 1, 5, 8), &Device::Cpu)?;
            let rotated = Rope::new(&config, 8).at(3, 5, &Device::Cpu)?.apply(&x)?;
            Ok(rotated.flatten_all()?.to_vec1()?)
        };
        let half = rotated(x.clone(), RopePairs::HalfSplit)?;
        let mixed = rotated(x.chunks(8).flat_map(interleave).collect(), RopePairs::Interleaved)?;
        assert_eq!(half.chunks(8).flat_map(interleave).collect::<Vec<_>>(), mixed);
        assert!(half.iter().zip(&x).any(|(a, b)| (a - b).abs() > 0.1));
        Ok(())
    }
}
