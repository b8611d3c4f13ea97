//! The loops of fused attention.

use super::mask::MaskView;
use super::softmax::{Probs, Running, Tile, softmax_tile};
use crate::attention::config::{AttentionConfig, Int8Config, PvPrecision};
use crate::attention::operand::{BLOCK, blocks};
use crate::attention::scorer::{QueryBlock, ScoreScale, Scorer};
use crate::attention::view::View;
use crate::attention::visible::Visible;
use crate::gemm::SERIAL_BELOW;
use crate::pv::{self, Int8Row, KEY_GROUP, PackedValues, PvKernel, ValueFormat};
use crate::uninit::overwrite;
use crate::{Error, Result};
use candle_nn::attention::AttnMask;
use rayon::prelude::*;
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Keys of a tile. 48 rows of scores and probabilities, with the keys and values of the tile, stay
/// in a 1 MiB L2; smaller tiles rescale the sums more often.
const TILE: usize = 512;

/// Everything that is ready before the first query.
pub(super) struct Engine<'a> {
    scorer: Scorer<'a>,
    values: Vec<PackedValues>,
    format: ValueFormat,
    visible: Visible,
    mask: Option<MaskView<'a>>,
    softcap: Option<f32>,
    slopes: Option<Vec<f32>>,
    value_dim: usize,
}

/// A block of queries of one head.
struct Queries<'a> {
    head: usize,
    tokens: Range<usize>,
    block: QueryBlock,
    /// The keys that each query sees.
    visible: Vec<Range<usize>>,
    values: &'a PackedValues,
}

/// Buffers of one worker.
struct Scratch {
    /// Elements from one row of scores, or of probabilities, to the next.
    stride: usize,
    scores: Vec<f32>,
    /// Probabilities in bf16.
    probs: Vec<u16>,
    /// Probabilities in int8, and what they stand for.
    codes: Vec<u8>,
    rows: Vec<Int8Row>,
    sums: Vec<f32>,
}

impl<'a> Engine<'a> {
    /// Quantizes and packs keys and values.
    pub(super) fn prepare(
        q: View<'a>,
        k: View<'a>,
        v: View<'a>,
        (attn_mask, mask): (&AttnMask, Option<MaskView<'a>>),
        config: &AttentionConfig,
        int8: &Int8Config,
    ) -> Result<Self> {
        let ([b, _, m, d], n) = (q.dims(), k.tokens());
        let kernel = value_kernel(int8.pv)?;
        let scale = config.scale(d)?;
        // A softcap bends the true score, so the row's constant matters, and log2(e) comes after.
        let scale = match config.softcap {
            Some(_) => ScoreScale { factor: scale, row_constants: true },
            None => ScoreScale { factor: scale * LOG2_E, row_constants: false },
        };
        Ok(Self {
            value_dim: v.depth(),
            values: pack_values(kernel, &v),
            format: kernel.format(),
            visible: Visible::new((b, m, n), attn_mask, config)?,
            mask,
            softcap: config.softcap,
            slopes: config.alibi_slopes.clone(),
            scorer: Scorer::prepare(q, k, &int8.scores, scale)?,
        })
    }

    /// The output `[B, H, M, Dv]`, each element through `convert`. Blocks of queries do not depend
    /// on each other, so the result is the same with any number of threads.
    pub(super) fn run<T: Default + Clone + Send>(
        &self,
        convert: impl Fn(f32) -> T + Sync,
    ) -> Vec<T> {
        let [b, h, m, n] = self.scorer.dims();
        let mut out = vec![T::default(); b * h * m * self.value_dim];
        if out.is_empty() || n == 0 {
            return out;
        }
        let per_head = m.div_ceil(BLOCK);
        let mut tasks: Vec<(usize, Range<usize>, &mut [T])> = Vec::with_capacity(b * h * per_head);
        for (head, mut rest) in out.chunks_exact_mut(m * self.value_dim).enumerate() {
            for tokens in blocks(m) {
                let (rows, after) = rest.split_at_mut(tokens.len() * self.value_dim);
                tasks.push((head, tokens, rows));
                rest = after;
            }
        }
        let scratch = || self.scratch(m.min(BLOCK));
        let attend = |scratch: &mut Scratch,
                      (head, tokens, out): (usize, Range<usize>, &mut [T])| {
            self.attend(head, tokens, scratch, out, &convert);
        };
        if b * h * m * n * (self.scorer.depth() + self.value_dim) < SERIAL_BELOW {
            let mut scratch = scratch();
            tasks.into_iter().for_each(|task| attend(&mut scratch, task));
        } else {
            tasks.into_par_iter().for_each_init(scratch, attend);
        }
        out
    }

    fn scratch(&self, rows: usize) -> Scratch {
        let [_, _, _, n] = self.scorer.dims();
        // Whole steps, so that a step that reaches over the last key has room.
        let stride = n.min(TILE).next_multiple_of(self.scorer.key_step().max(KEY_GROUP));
        let room = |format| if self.format == format { rows * stride } else { 0 };
        Scratch {
            stride,
            scores: vec![0.0; rows * stride],
            probs: vec![0; room(ValueFormat::Bf16)],
            codes: vec![0; room(ValueFormat::Int8)],
            rows: vec![Int8Row::default(); rows],
            sums: vec![0.0; rows * self.value_dim.next_multiple_of(16)],
        }
    }

    /// Attention of queries `tokens` of `head`.
    fn attend<T>(
        &self,
        head: usize,
        tokens: Range<usize>,
        scratch: &mut Scratch,
        out: &mut [T],
        convert: impl Fn(f32) -> T,
    ) {
        let [_, h, _, n] = self.scorer.dims();
        let queries = Queries {
            head,
            block: self.scorer.query_block(head, tokens.clone()),
            visible: tokens.clone().map(|query| self.visible.range(head / h, query)).collect(),
            values: &self.values[head / self.scorer.group()],
            tokens,
        };
        let mut running = vec![Running::START; queries.tokens.len()];
        let width = queries.values.width();
        scratch.sums[..running.len() * width].fill(0.0);
        let first = queries.visible.iter().map(|keys| keys.start).min().unwrap_or(0);
        let end = queries.visible.iter().map(|keys| keys.end).max().unwrap_or(0);
        for start in (first / TILE * TILE..end).step_by(TILE) {
            self.tile(&queries, start..(start + TILE).min(n), scratch, &mut running);
        }
        let sums = scratch.sums.chunks_exact(width).zip(out.chunks_exact_mut(self.value_dim));
        for ((sums, out), running) in sums.zip(running) {
            // No key was seen: zeros. A NaN sum stays NaN.
            let inverse = if running.sum == 0.0 { 0.0 } else { 1.0 / running.sum };
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = convert(sum * inverse));
        }
    }

    /// Adds one tile of keys to the sums of a block of queries.
    fn tile(
        &self,
        queries: &Queries<'_>,
        keys: Range<usize>,
        scratch: &mut Scratch,
        running: &mut [Running],
    ) {
        let (stride, width) = (scratch.stride, queries.values.width());
        self.scorer.score(&queries.block, keys.clone(), overwrite(&mut scratch.scores), stride);
        let inside = |seen: &Range<usize>| {
            let clamp = |x: usize| x.clamp(keys.start, keys.end) - keys.start;
            clamp(seen.start)..clamp(seen.end)
        };
        let visible: Vec<Range<usize>> = queries.visible.iter().map(inside).collect();
        for ((row, query), visible) in queries.tokens.clone().enumerate().zip(&visible) {
            let scores = &mut scratch.scores[row * stride..][visible.clone()];
            let seen = keys.start + visible.start..keys.start + visible.end;
            self.modify(queries.head, query, seen, scores);
        }
        let probs = match self.format {
            ValueFormat::F32 => Probs::F32,
            ValueFormat::Bf16 => Probs::Bf16(&mut scratch.probs),
            ValueFormat::Int8 => Probs::Int8 { codes: &mut scratch.codes, rows: &mut scratch.rows },
        };
        let scores = &mut scratch.scores;
        softmax_tile(Tile { scores, stride, keys: keys.len(), visible: &visible, probs }, running);
        let sums = &mut scratch.sums[..running.len() * width];
        for (sums, running) in sums.chunks_exact_mut(width).zip(running.iter()) {
            if running.rescale != 1.0 {
                sums.iter_mut().for_each(|sum| *sum *= running.rescale);
            }
        }
        let (scores, probs) = (&scratch.scores, &scratch.probs);
        match self.format {
            ValueFormat::F32 => queries.values.accumulate_f32(keys.clone(), scores, stride, sums),
            ValueFormat::Bf16 => queries.values.accumulate_bf16(keys.clone(), probs, stride, sums),
            ValueFormat::Int8 => {
                let rows = &scratch.rows[..running.len()];
                queries.values.accumulate_int8(keys.clone(), &scratch.codes, stride, rows, sums);
            }
        }
        self.add_exceptions(queries.values, keys, scratch);
    }

    /// Adds the values that the packed format cannot hold, where a query sees their key.
    fn add_exceptions(&self, values: &PackedValues, keys: Range<usize>, scratch: &mut Scratch) {
        for (key, value) in values.exceptions().iter().filter(|(key, _)| keys.contains(key)) {
            for (row, sums) in scratch.sums.chunks_exact_mut(values.width()).enumerate() {
                let at = row * scratch.stride + key - keys.start;
                let p = match self.format {
                    ValueFormat::F32 => scratch.scores[at],
                    ValueFormat::Bf16 => f32::from_bits(u32::from(scratch.probs[at]) << 16),
                    ValueFormat::Int8 => f32::from(scratch.codes[at]) * scratch.rows[row].scale,
                };
                if p != 0.0 {
                    sums.iter_mut().zip(value).for_each(|(sum, x)| *sum += p * x);
                }
            }
        }
    }

    /// Softcap, ALiBi and mask tensor on the scores of one query; leaves them in units of log2.
    fn modify(&self, head: usize, query: usize, keys: Range<usize>, scores: &mut [f32]) {
        let [_, h, _, _] = self.scorer.dims();
        if let Some(cap) = self.softcap {
            scores.iter_mut().for_each(|s| *s = (*s / cap).tanh() * (cap * LOG2_E));
        }
        if let Some(slopes) = &self.slopes {
            let (slope, position) = (slopes[head % h] * LOG2_E, self.visible.position(query));
            for (score, key) in scores.iter_mut().zip(keys.clone()) {
                *score -= slope * (position - key as isize).unsigned_abs() as f32;
            }
        }
        if let Some(mask) = &self.mask {
            mask.apply([head / h, head % h, query], keys, scores);
        }
    }
}

/// The kernel for a precision.
fn value_kernel(precision: PvPrecision) -> Result<&'static dyn PvKernel> {
    let kernel = match precision {
        PvPrecision::Auto => pv::select(ValueFormat::Bf16).or_else(|| pv::select(ValueFormat::F32)),
        PvPrecision::F32 => pv::select(ValueFormat::F32),
        PvPrecision::Bf16 => pv::select(ValueFormat::Bf16),
        PvPrecision::Int8 => pv::select(ValueFormat::Int8),
    };
    kernel.ok_or_else(|| {
        Error::Config(format!(
            "P·V precision {precision:?}: this machine has no instruction for it; use Auto, F32 or Int8"
        ))
    })
}

/// The values of every head, packed.
fn pack_values(kernel: &'static dyn PvKernel, v: &View<'_>) -> Vec<PackedValues> {
    let pack = |head: usize| {
        let mut packed = PackedValues::new(kernel, v.tokens(), v.depth());
        let mut buffer = Vec::new();
        if packed.needs_ranges() {
            for block in blocks(v.tokens()) {
                packed.observe(v.rows(head, block, &mut buffer));
            }
        }
        for block in blocks(v.tokens()) {
            packed.put(block.start, v.rows(head, block.clone(), &mut buffer));
        }
        packed
    };
    match v.is_small() {
        true => (0..v.heads()).map(pack).collect(),
        false => (0..v.heads()).into_par_iter().map(pack).collect(),
    }
}
