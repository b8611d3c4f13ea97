//! Int8 codes of scores: straight from their int32 sums, as between two integer layers.

use super::config::{RequantConfig, RequantMode, ScoreConfig};
use super::scorer::{ScoreScale, Scorer};
use crate::quant::{QuantParams, QuantizedTensor, Requantizer, ValueRange};
use crate::view::View;
use crate::{Error, Result};
use rayon::prelude::*;

/// Rows of scores that a task takes at least.
const ROWS: usize = 16;

impl RequantConfig {
    /// # Errors
    /// [`Error::Contradiction`] if it cannot be with scores of `config`.
    pub(crate) fn check(&self, config: &ScoreConfig) -> Result<()> {
        if let (RequantMode::FixedPoint, Some(found)) = (self.mode, config.adds_floats()) {
            return Err(Error::Contradiction(format!(
                "fixed-point requantization with {found}: what those add to the sums is in f32; turn \
                 them off or requantize in fp32"
            )));
        }
        self.range.check(self.scheme)
    }
}

/// The codes of `q·k^T`, `[B, H, M, N]`.
pub(super) fn requantize(
    q: View<'_>,
    k: View<'_>,
    config: &ScoreConfig,
    to: &RequantConfig,
) -> Result<QuantizedTensor> {
    to.check(config)?;
    let scorer = Scorer::of_all(q, k, config, ScoreScale::RAW)?;
    let dims = scorer.dims();
    if config.adds_floats().is_some() {
        return QuantizedTensor::quantize_slice(&scorer.all_scores(), &dims, &to.to_quant_config());
    }
    let all = Sums {
        dims,
        sums: scorer.all_sums(),
        q_scales: scorer.q.all_scales(&scorer.seen),
        k_scales: scorer.k.all_scales(&scorer.seen),
        k_heads: scorer.k.view().dims()[1],
    };
    all.requantize(to)
}

/// Int32 sums with the scales of the rows that they are products of.
struct Sums {
    /// `[B, H, M, N]`
    dims: [usize; 4],
    sums: Vec<i32>,
    /// `[B, H, M]`
    q_scales: Vec<f32>,
    /// `[B, H_kv, N]`
    k_scales: Vec<f32>,
    k_heads: usize,
}

/// The scores of one query.
struct Row<'a> {
    index: usize,
    sums: &'a [i32],
    q_scale: f32,
    k_scales: &'a [f32],
}

impl Sums {
    fn requantize(&self, to: &RequantConfig) -> Result<QuantizedTensor> {
        let [.., m, n] = self.dims;
        let (groups, given) = to.to_quant_config().groups(&self.dims)?;
        let found = self.ranges()?;
        let params = match given {
            Some(given) => given,
            None => {
                let mut ranges = vec![ValueRange::EMPTY; groups];
                for (row, range) in found.into_iter().enumerate() {
                    let group = to.granularity.group(row / m, row % m, m);
                    ranges[group] = ranges[group].union(range);
                }
                let of_range = |range| QuantParams::from_range(to.scheme, range);
                ranges.into_iter().map(of_range).collect::<Result<_>>()?
            }
        };
        let mut codes = vec![0i8; self.sums.len()];
        if n > 0 {
            let rows = codes.par_chunks_exact_mut(n).enumerate().with_min_len(ROWS);
            rows.try_for_each(|(row, codes)| {
                let output = params[to.granularity.group(row / m, row % m, m)];
                self.row(row).requantize(output, to.mode, codes)
            })?;
        }
        QuantizedTensor::from_parts(codes, self.dims.to_vec(), to.granularity, params)
    }

    /// The range of each row.
    fn ranges(&self) -> Result<Vec<ValueRange>> {
        let [b, h, m, _] = self.dims;
        let rows = (0..b * h * m).into_par_iter().with_min_len(ROWS);
        rows.map(|row| self.row(row).range()).collect()
    }

    fn row(&self, index: usize) -> Row<'_> {
        let [_, h, m, n] = self.dims;
        let head = index / m;
        let k_head = head / h * self.k_heads + head % h * self.k_heads / h;
        Row {
            index,
            sums: &self.sums[index * n..(index + 1) * n],
            q_scale: self.q_scales[index],
            k_scales: &self.k_scales[k_head * n..(k_head + 1) * n],
        }
    }
}

impl Row<'_> {
    /// # Errors
    /// [`Error::NonFinite`] at the first score that is not finite.
    fn range(&self) -> Result<ValueRange> {
        let mut range = ValueRange::EMPTY;
        for (column, (sum, k_scale)) in self.sums.iter().zip(self.k_scales).enumerate() {
            let real = *sum as f32 * self.q_scale * k_scale;
            if !real.is_finite() {
                let index = self.index * self.sums.len() + column;
                return Err(Error::NonFinite { op: "attention_scores", index, value: real });
            }
            range = range.union(ValueRange { min: real, max: real });
        }
        Ok(range)
    }

    fn requantize(&self, output: QuantParams, mode: RequantMode, codes: &mut [i8]) -> Result<()> {
        let mut start = 0;
        // Keys of the same scale have the same multiplier.
        for k_scales in self.k_scales.chunk_by(|a, b| a == b) {
            let keys = start..start + k_scales.len();
            start = keys.end;
            let (codes, sums) = (&mut codes[keys.clone()], &self.sums[keys]);
            let (q_scale, k_scale) = (self.q_scale, k_scales[0]);
            if q_scale * k_scale / output.scale() == 0.0 {
                codes.fill(output.zero_point());
                continue;
            }
            let requantizer = match mode {
                RequantMode::Fp32 => Requantizer::fp32(q_scale, k_scale, output)?,
                RequantMode::FixedPoint => Requantizer::fixed_point(q_scale, k_scale, output)?,
            };
            let pairs = codes.iter_mut().zip(sums);
            pairs.for_each(|(code, &sum)| *code = requantizer.requantize(sum));
        }
        Ok(())
    }
}
