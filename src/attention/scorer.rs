//! Scores of any block of queries against all keys of its head: the engine under the ops.

use super::ScoreConfig;
use super::operand::{BLOCK, Operand, QuantizedRows, blocks};
use super::view::View;
use crate::gemm::{self, Kernel, PackedLhs, PackedRhs, ScoreScales, ZeroCorrection};
use crate::quant::rows::dot;
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

/// The keys of one head, quantized, packed and shared by its query heads. All vectors are padded
/// to whole panels of the kernel.
struct PackedKeys {
    rhs: PackedRhs,
    scales: Vec<f32>,
    zeros: Vec<i32>,
    sums: Vec<i32>,
    /// Smooth-Q's correction, one vector for each query head that shares these keys.
    biases: Vec<Vec<f32>>,
}

/// Queries that are quantized block by block, against keys that are ready.
pub(super) struct Scorer<'a> {
    kernel: &'static dyn Kernel,
    q: Operand<'a>,
    k: Operand<'a>,
    keys: Vec<PackedKeys>,
    /// Query heads that share a key head.
    group: usize,
}

impl<'a> Scorer<'a> {
    /// Quantizes and packs all keys, and finds the ranges and means of the queries.
    ///
    /// # Errors
    /// [`Error::Depth`] beyond the depth limit, [`Error::Config`] for parameters that do not fit
    /// the shapes, [`Error::Kernel`] for a forced kernel that cannot be used.
    pub(super) fn prepare(q: View<'a>, k: View<'a>, config: &ScoreConfig) -> Result<Self> {
        let kernel = gemm::select()?;
        let (q, k) = (
            Operand::prepare(q, &config.q, config.smooth_q)?,
            Operand::prepare(k, &config.k, config.smooth_k)?,
        );
        let symmetric = q.is_symmetric() && k.is_symmetric();
        let (depth, limit) = (q.view().depth(), gemm::max_depth(!symmetric));
        if depth > limit {
            return Err(Error::Depth { depth, limit });
        }
        let group = (q.view().dims()[1]).checked_div(k.view().dims()[1]).unwrap_or(0);
        let mut scorer = Self { kernel, q, k, keys: Vec::new(), group };
        let heads = scorer.k.view().heads();
        scorer.keys = (0..heads).into_par_iter().map(|head| scorer.pack_keys(head)).collect();
        Ok(scorer)
    }

    /// `[B, H, M, N]`.
    pub(super) fn dims(&self) -> [usize; 4] {
        let [b, h, m, _] = self.q.view().dims();
        [b, h, m, self.k.view().tokens()]
    }

    fn pack_keys(&self, head: usize) -> PackedKeys {
        let (tokens, depth) = (self.k.view().tokens(), self.k.view().depth());
        let padded = tokens.next_multiple_of(self.kernel.geometry().nr);
        let queries = head * self.group..(head + 1) * self.group;
        let mut keys = PackedKeys {
            rhs: PackedRhs::new(self.kernel, tokens, depth),
            scales: Vec::with_capacity(padded),
            zeros: Vec::with_capacity(padded),
            sums: Vec::with_capacity(padded),
            biases: vec![Vec::with_capacity(padded); self.group],
        };
        let mut rows = QuantizedRows::default();
        for block in blocks(tokens) {
            self.k.quantize_rows(head, block.clone(), &mut rows);
            keys.rhs.put(block.start, &rows.codes, &rows.sums);
            keys.scales.extend(&rows.scales);
            keys.zeros.extend(&rows.zeros);
            keys.sums.extend(&rows.sums);
            for (query, biases) in queries.clone().zip(&mut keys.biases) {
                if let (Some(mean), 1..) = (self.q.mean(query), depth) {
                    biases.extend(rows.values.chunks_exact(depth).map(|key| dot(mean, key)));
                }
            }
        }
        keys.scales.resize(padded, 0.0);
        keys.zeros.resize(padded, 0);
        keys.sums.resize(padded, 0);
        keys.biases.iter_mut().for_each(|biases| biases.resize(padded, 0.0));
        keys
    }

    /// Quantizes a block of queries and hands it, with the keys of its head, to `f`.
    fn with_block<R>(
        &self,
        head: usize,
        tokens: Range<usize>,
        f: impl FnOnce(&PackedLhs, &PackedKeys, &QuantizedRows, Option<&ZeroCorrection<'_>>) -> R,
    ) -> R {
        let depth = self.q.view().depth();
        let mut rows = QuantizedRows::default();
        self.q.quantize_rows(head, tokens.clone(), &mut rows);
        let lhs = PackedLhs::new(self.kernel, &rows.codes, tokens.len(), depth);
        let keys = &self.keys[head / self.group];
        if self.q.is_symmetric() && self.k.is_symmetric() {
            return f(&lhs, keys, &rows, None);
        }
        let terms = rows.sums.iter().zip(&rows.zeros).map(|(sum, zero)| sum - depth as i32 * zero);
        let zeros = ZeroCorrection {
            row_zeros: &rows.zeros,
            row_terms: &terms.collect::<Vec<_>>(),
            column_zeros: &keys.zeros,
            column_sums: &keys.sums,
        };
        f(&lhs, keys, &rows, Some(&zeros))
    }

    /// f32 scores of queries `tokens` of `head` against all keys: `[tokens, N]`, row-major.
    fn scores(&self, head: usize, tokens: Range<usize>, out: &mut [f32]) {
        self.with_block(head, tokens, |lhs, keys, rows, zeros| {
            let scales = ScoreScales {
                row_scales: &rows.scales,
                row_biases: &self.row_biases(head, rows),
                column_scales: &keys.scales,
                column_biases: &keys.biases[head % self.group],
                zeros,
            };
            gemm::score_tiles(lhs, &keys.rhs, &scales, out, keys.rhs.rows());
        });
    }

    /// Smooth-K's correction of each row, `q·mean(k) = q'·mean(k) + mean(q)·mean(k)`, from the
    /// smoothed queries `q'`.
    fn row_biases(&self, head: usize, rows: &QuantizedRows) -> Vec<f32> {
        let (Some(mean), depth @ 1..) = (self.k.mean(head / self.group), self.q.view().depth())
        else {
            return vec![0.0; rows.scales.len()];
        };
        let constant = self.q.mean(head).map_or(0.0, |q| dot(q, mean));
        rows.values.chunks_exact(depth).map(|q| dot(q, mean) + constant).collect()
    }

    /// Exact int32 sums of queries `tokens` of `head` against all keys, zero points corrected.
    fn sums(&self, head: usize, tokens: Range<usize>, out: &mut [i32]) {
        self.with_block(head, tokens, |lhs, keys, _, zeros| {
            gemm::int_tiles(lhs, &keys.rhs, zeros, out, keys.rhs.rows());
        });
    }

    /// All f32 scores, `[B, H, M, N]`.
    pub(super) fn all_scores(&self) -> Vec<f32> {
        self.for_all_blocks(|head, tokens, out| self.scores(head, tokens, out))
    }

    /// All int32 sums, `[B, H, M, N]`.
    pub(super) fn all_sums(&self) -> Vec<i32> {
        self.for_all_blocks(|head, tokens, out| self.sums(head, tokens, out))
    }

    /// Fills `[B, H, M, N]` block by block of queries. Blocks do not depend on each other, so the
    /// result is the same with any number of threads.
    fn for_all_blocks<T: Clone + Default + Send>(
        &self,
        f: impl Fn(usize, Range<usize>, &mut [T]) + Sync,
    ) -> Vec<T> {
        let [b, h, m, n] = self.dims();
        let mut out = vec![T::default(); b * h * m * n];
        if out.is_empty() {
            return out;
        }
        let of_block = |head: usize, (index, out): (usize, &mut [T])| {
            let start = index * BLOCK;
            f(head, start..start + out.len() / n, out);
        };
        if b * h * m * n * self.q.view().depth() < gemm::SERIAL_BELOW {
            for (head, out) in out.chunks_mut(m * n).enumerate() {
                out.chunks_mut(BLOCK * n).enumerate().for_each(|block| of_block(head, block));
            }
        } else {
            out.par_chunks_mut(m * n).enumerate().for_each(|(head, out)| {
                out.par_chunks_mut(BLOCK * n).enumerate().for_each(|block| of_block(head, block));
            });
        }
        out
    }
}
