//! Scores of any block of queries against all keys of its head: the engine under the ops.

use super::ScoreConfig;
use super::operand::{BLOCK, Operand, QuantizedRows, blocks};
use super::view::View;
use crate::gemm::{self, Kernel, PackedLhs, PackedRhs, ScoreScales, ZeroCorrection};
use crate::quant::Scheme;
use crate::quant::rows::dots;
use crate::uninit::written;
use crate::{Error, Result};
use rayon::prelude::*;
use std::mem::MaybeUninit;
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

/// Some queries of a head, quantized and packed.
pub(super) struct QueryBlock {
    head: usize,
    lhs: PackedLhs,
    scales: Vec<f32>,
    biases: Vec<f32>,
    zeros: Vec<i32>,
    terms: Vec<i32>,
}

/// What is done to every score on its way out.
#[derive(Clone, Copy)]
pub(super) struct ScoreScale {
    /// Multiplies every score.
    pub factor: f32,
    /// Whether smooth-K's correction, the same for a whole row, is added. A softmax does not see
    /// it, and is more exact without.
    pub row_constants: bool,
}

impl ScoreScale {
    /// `q·k^T` itself.
    pub(super) const RAW: ScoreScale = ScoreScale { factor: 1.0, row_constants: true };
}

/// Queries that are quantized block by block, against keys that are ready.
pub(super) struct Scorer<'a> {
    kernel: &'static dyn Kernel,
    q: Operand<'a>,
    k: Operand<'a>,
    keys: Vec<PackedKeys>,
    /// Query heads that share a key head.
    group: usize,
    scale: ScoreScale,
}

/// The kernel for a product of this depth. Ops ask before Candle calls them too, because Candle
/// turns an error from inside an op into text.
///
/// # Errors
/// [`Error::Kernel`] for a forced kernel that cannot be used, [`Error::Depth`] beyond the limit.
pub(super) fn check_product(depth: usize, config: &ScoreConfig) -> Result<&'static dyn Kernel> {
    let affine = [config.q.scheme, config.k.scheme].contains(&Scheme::Affine);
    let limit = gemm::max_depth(affine);
    if depth > limit {
        return Err(Error::Depth { depth, limit });
    }
    gemm::select()
}

impl<'a> Scorer<'a> {
    /// Quantizes and packs all keys, and finds the ranges and means of the queries.
    ///
    /// # Errors
    /// [`Error::Depth`] beyond the depth limit, [`Error::Config`] for parameters that do not fit
    /// the shapes, [`Error::Kernel`] for a forced kernel that cannot be used.
    pub(super) fn prepare(
        q: View<'a>,
        k: View<'a>,
        config: &ScoreConfig,
        scale: ScoreScale,
    ) -> Result<Self> {
        let kernel = check_product(q.depth(), config)?;
        let (q, k) = (
            Operand::prepare(q, &config.q, config.smooth_q)?,
            Operand::prepare(k, &config.k, config.smooth_k)?,
        );
        let group = (q.view().dims()[1]).checked_div(k.view().dims()[1]).unwrap_or(0);
        let mut scorer = Self { kernel, q, k, keys: Vec::new(), group, scale };
        let heads = scorer.k.view().heads();
        let pack = |head| scorer.pack_keys(head);
        scorer.keys = match scorer.k.view().is_small() {
            true => (0..heads).map(pack).collect(),
            false => (0..heads).into_par_iter().map(pack).collect(),
        };
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
            biases: vec![vec![0.0; padded]; self.group],
        };
        let mut rows = QuantizedRows::default();
        for block in blocks(tokens) {
            self.k.quantize_rows(head, block.clone(), &mut rows);
            keys.rhs.put(block.start, &rows.codes, &rows.sums);
            keys.scales.extend(&rows.scales);
            keys.zeros.extend(&rows.zeros);
            keys.sums.extend(&rows.sums);
            for (query, biases) in queries.clone().zip(&mut keys.biases) {
                if let Some(mean) = self.q.mean(query) {
                    dots(&rows.values, mean, &mut biases[block.clone()]);
                    biases[block.clone()].iter_mut().for_each(|b| *b *= self.scale.factor);
                }
            }
        }
        keys.scales.resize(padded, 0.0);
        keys.zeros.resize(padded, 0);
        keys.sums.resize(padded, 0);
        keys
    }

    /// `D`.
    pub(super) fn depth(&self) -> usize {
        self.q.view().depth()
    }

    /// Query heads that share a key head.
    pub(super) fn group(&self) -> usize {
        self.group
    }

    /// Quantizes and packs queries `tokens` of `head`.
    pub(super) fn query_block(&self, head: usize, tokens: Range<usize>) -> QueryBlock {
        let depth = self.q.view().depth();
        let mut rows = QuantizedRows::default();
        self.q.quantize_rows(head, tokens.clone(), &mut rows);
        let lhs = PackedLhs::new(self.kernel, &rows.codes, tokens.len(), depth);
        let biases = self.row_biases(head, &rows);
        let terms = rows.sums.iter().zip(&rows.zeros).map(|(sum, zero)| sum - depth as i32 * zero);
        let terms = terms.collect();
        rows.scales.iter_mut().for_each(|scale| *scale *= self.scale.factor);
        QueryBlock { head, lhs, scales: rows.scales, biases, zeros: rows.zeros, terms }
    }

    /// Zero points and sums, unless both sides are symmetric.
    fn zeros<'b>(&'b self, block: &'b QueryBlock) -> Option<ZeroCorrection<'b>> {
        let keys = &self.keys[block.head / self.group];
        (!(self.q.is_symmetric() && self.k.is_symmetric())).then_some(ZeroCorrection {
            row_zeros: &block.zeros,
            row_terms: &block.terms,
            column_zeros: &keys.zeros,
            column_sums: &keys.sums,
        })
    }

    /// f32 scores of a block against `keys` of its head, whose start is a multiple of
    /// [`Scorer::key_step`], row-major, rows `stride` elements apart. Where `stride` leaves room,
    /// up to one step more is overwritten behind each row.
    pub(super) fn score(
        &self,
        block: &QueryBlock,
        keys: Range<usize>,
        out: &mut [MaybeUninit<f32>],
        stride: usize,
    ) {
        let packed = &self.keys[block.head / self.group];
        let scales = ScoreScales {
            row_scales: &block.scales,
            row_biases: &block.biases,
            column_scales: &packed.scales,
            column_biases: &packed.biases[block.head % self.group],
            zeros: self.zeros(block),
        };
        gemm::score_tiles(&block.lhs, &packed.rhs, keys, &scales, out, stride);
    }

    /// Keys are scored in steps of this many.
    pub(super) fn key_step(&self) -> usize {
        self.kernel.geometry().nr
    }

    /// Smooth-K's correction of each row, `q·mean(k) = q'·mean(k) + mean(q)·mean(k)`, from the
    /// smoothed queries `q'`.
    fn row_biases(&self, head: usize, rows: &QuantizedRows) -> Vec<f32> {
        let mut biases = vec![0.0; rows.scales.len()];
        if let (Some(mean), true) = (self.k.mean(head / self.group), self.scale.row_constants) {
            dots(&rows.values, mean, &mut biases);
            let mut constant = [0.0];
            if let Some(q_mean) = self.q.mean(head) {
                dots(q_mean, mean, &mut constant);
            }
            biases.iter_mut().for_each(|b| *b = (*b + constant[0]) * self.scale.factor);
        }
        biases
    }

    /// All f32 scores, `[B, H, M, N]`.
    pub(super) fn all_scores(&self) -> Vec<f32> {
        let n = self.k.view().tokens();
        let write = |head, tokens, out: &mut [MaybeUninit<f32>]| {
            self.score(&self.query_block(head, tokens), 0..n, out, n);
        };
        // SAFETY: `score_tiles` writes every score.
        unsafe { self.for_all_blocks(write) }
    }

    /// All int32 sums, `[B, H, M, N]`.
    pub(super) fn all_sums(&self) -> Vec<i32> {
        let write = |head, tokens, out: &mut [MaybeUninit<i32>]| {
            let block = self.query_block(head, tokens);
            let keys = &self.keys[head / self.group].rhs;
            gemm::int_tiles(&block.lhs, keys, self.zeros(&block).as_ref(), out, keys.rows());
        };
        // SAFETY: `int_tiles` writes every sum.
        unsafe { self.for_all_blocks(write) }
    }

    /// Fills `[B, H, M, N]` block by block of queries. Blocks do not depend on each other, so the
    /// result is the same with any number of threads.
    ///
    /// # Safety
    /// `f` writes all of the slice it is given.
    unsafe fn for_all_blocks<T: Send>(
        &self,
        f: impl Fn(usize, Range<usize>, &mut [MaybeUninit<T>]) + Sync,
    ) -> Vec<T> {
        let [b, h, m, n] = self.dims();
        let len = b * h * m * n;
        let of_block = |head: usize, (index, out): (usize, &mut [MaybeUninit<T>])| {
            let start = index * BLOCK;
            f(head, start..start + out.len() / n, out);
        };
        let all = |out: &mut [MaybeUninit<T>]| match (len, len * self.depth() < gemm::SERIAL_BELOW)
        {
            (0, _) => {}
            (_, true) => {
                for (head, out) in out.chunks_mut(m * n).enumerate() {
                    out.chunks_mut(BLOCK * n).enumerate().for_each(|block| of_block(head, block));
                }
            }
            (_, false) => {
                let heads = out.par_chunks_mut(m * n).enumerate();
                heads.for_each(|(head, out)| {
                    let blocks = out.par_chunks_mut(BLOCK * n).enumerate();
                    blocks.for_each(|block| of_block(head, block));
                });
            }
        };
        // SAFETY: the blocks of all heads cover the result, and `f` writes all of each.
        unsafe { written(len, all) }
    }
}
