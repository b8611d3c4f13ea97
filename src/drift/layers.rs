//! The error of every layer of a model, for many configurations in one pass.

use super::metrics::{lowest, pairs};
use crate::attention::{AttentionConfig, Backend, attention};
use crate::models::{LayeredModel, run_layers};
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// Energy of a reference and of what a candidate differs by, over any number of slices.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Energy {
    /// `sum(a^2)`
    pub signal: f64,
    /// `sum((a - b)^2)`
    pub noise: f64,
}

impl Energy {
    /// Adds the elements of two slices.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if their lengths differ; nothing is added then.
    pub fn add(&mut self, reference: &[f32], candidate: &[f32]) -> Result<()> {
        for (a, b) in pairs(reference, candidate)? {
            self.signal += a * a;
            self.noise += (a - b) * (a - b);
        }
        Ok(())
    }

    /// The ratio of both in decibel, as [`metrics::sqnr_db`](super::metrics::sqnr_db) has it.
    pub fn sqnr_db(&self) -> f64 {
        if self.noise == 0.0 { f64::INFINITY } else { 10.0 * (self.signal / self.noise).log10() }
    }
}

/// The error of the attention output of one layer over all passages, one entry a head.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LayerErrors {
    /// First head first.
    pub heads: Vec<Energy>,
}

impl LayerErrors {
    /// Mean over heads of the signal-to-noise ratio, in dB. Heads without any error, whose ratio is
    /// infinite, count only if all are such.
    pub fn mean_sqnr_db(&self) -> f64 {
        let ratios = self.heads.iter().map(Energy::sqnr_db);
        let (mut sum, mut count) = (0.0, 0);
        for ratio in ratios.filter(|&ratio| ratio != f64::INFINITY) {
            sum += ratio;
            count += 1;
        }
        if count == 0 { f64::INFINITY } else { sum / f64::from(count) }
    }

    /// The lowest ratio of any head, in dB.
    pub fn worst_head_db(&self) -> f64 {
        lowest(self.heads.iter().map(Energy::sqnr_db))
    }

    /// The energy of the error of all heads.
    pub fn noise(&self) -> f64 {
        self.heads.iter().map(|head| head.noise).sum()
    }

    /// Compares outputs `[B, H, M, Dv]`.
    fn add(&mut self, reference: &Tensor, candidate: &Tensor) -> Result<()> {
        let (_, heads, m, dv) = reference.dims4()?;
        let (reference, candidate) = (flat(reference)?, flat(candidate)?);
        self.heads.resize(heads, Energy::default());
        let len = (m * dv).max(1);
        let pairs = reference.chunks_exact(len).zip(candidate.chunks_exact(len));
        for (index, (a, b)) in pairs.enumerate() {
            self.heads[index % heads].add(a, b)?;
        }
        Ok(())
    }
}

/// The numbers of a tensor in row-major order.
pub(super) fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// What each configuration does to the attention output of every layer, alone: `[config][layer]`.
///
/// All see the same input, that of the model with the attention it has now (fp32, as a rule), and
/// are compared with fp32. A configuration is one [`AttentionConfig`] a layer.
///
/// # Errors
/// [`Error::Mismatch`] for a configuration that does not have as many layers as the model; those of
/// the model and of [`attention()`].
pub fn attention_errors<'a, M: LayeredModel<Input: 'a>>(
    model: &M,
    passages: impl IntoIterator<Item = &'a M::Input>,
    configs: &[Vec<AttentionConfig>],
) -> Result<Vec<Vec<LayerErrors>>> {
    let layers = model.attention().len();
    if let Some(other) = configs.iter().find(|config| config.len() != layers) {
        let found = other.len();
        return Err(Error::Mismatch(format!("configurations of {found} layers for {layers}")));
    }
    let mut errors = vec![vec![LayerErrors::default(); layers]; configs.len()];
    for passage in passages {
        run_layers(model, passage, &mut |layer, input| {
            let (q, k, v, call) = (input.q, input.k, input.v, input.call);
            let exact = fp32(model.attention()[layer].config());
            let reference = attention(q, k, v, call, &exact)?;
            for (config, errors) in configs.iter().zip(&mut errors) {
                errors[layer].add(&reference, &attention(q, k, v, call, &config[layer])?)?;
            }
            Ok(())
        })?;
    }
    Ok(errors)
}

/// The same configuration in fp32.
pub(super) fn fp32(config: &AttentionConfig) -> AttentionConfig {
    config.with_backend(Backend::Fp32)
}

/// What the model says of each passage, `[B * size]` numbers:
/// [`LayeredModel::embedding`] of what leaves its last layer.
///
/// # Errors
/// Those of the model.
pub fn embeddings<'a, M: LayeredModel<Input: 'a>>(
    model: &M,
    passages: impl IntoIterator<Item = &'a M::Input>,
) -> Result<Vec<Vec<f32>>> {
    let embed = |passage| {
        let hidden = run_layers(model, passage, &mut |_, _| Ok(()))?;
        flat(&model.embedding(&hidden)?)
    };
    passages.into_iter().map(embed).collect()
}

/// How far embeddings are from their reference.
///
/// # Errors
/// [`Error::Mismatch`] unless there are as many of both, each as long as its reference.
pub fn embedding_error(reference: &[Vec<f32>], candidate: &[Vec<f32>]) -> Result<Energy> {
    let lens = |all: &[Vec<f32>]| all.iter().map(Vec::len).collect::<Vec<_>>();
    if lens(reference) != lens(candidate) {
        return Err(Error::Mismatch(format!(
            "embeddings of {:?} numbers, expected {:?} as in the reference",
            lens(candidate),
            lens(reference)
        )));
    }
    let mut energy = Energy::default();
    reference.iter().zip(candidate).try_for_each(|(a, b)| energy.add(a, b))?;
    Ok(energy)
}

#[cfg(test)]
mod tests {
    use super::super::metrics::sqnr_db;
    use super::*;
    use candle_core::Device;

    #[test]
    fn energies_in_parts_are_the_metric() {
        let (a, b) = ([0.5, -1.25, 2.0, 3.75], [0.5, -1.0, 2.25, 3.5]);
        let mut energy = Energy::default();
        assert_eq!(energy.sqnr_db(), f64::INFINITY);
        energy.add(&a[..1], &b[..1]).unwrap();
        energy.add(&a[1..], &b[1..]).unwrap();
        assert!((energy.sqnr_db() - sqnr_db(&a, &b).unwrap()).abs() < 1e-12);
        let before = energy;
        assert!(matches!(energy.add(&a, &b[1..]), Err(Error::Mismatch(_))));
        assert_eq!(energy, before);
    }

    #[test]
    fn heads_are_told_apart_over_the_batch() {
        let reference = Tensor::ones((2, 2, 3, 1), DType::F32, &Device::Cpu).unwrap();
        let off = Tensor::new(&[[[1f32], [1.1]]], &Device::Cpu).unwrap().reshape((1, 2, 1, 1));
        let candidate = reference.broadcast_mul(&off.unwrap()).unwrap();
        let mut errors = LayerErrors::default();
        errors.add(&reference, &candidate).unwrap();
        assert_eq!(errors.heads[0], Energy { signal: 6.0, noise: 0.0 });
        assert!((errors.worst_head_db() - 20.0).abs() < 1e-5, "{errors:?}");
        assert!((errors.mean_sqnr_db() - 20.0).abs() < 1e-5, "a head without error does not count");
        assert!((errors.noise() - 0.06).abs() < 1e-7);
    }
}
