//! The loops of fused attention.

use super::between::Between;
use super::mask::MaskView;
use super::output::Element;
use super::softmax::{Probs, Running, Tile, softmax_tile};
use crate::Result;
use crate::attention::AttentionSpec;
use crate::attention::config::Int8Config;
use crate::attention::keys::PackedKeys;
use crate::attention::operand::{BLOCK, blocks};
use crate::attention::pace::{Pace, Work};
use crate::attention::scorer::{QueryBlock, ScoreScale, Scorer};
use crate::attention::view::View;
use crate::attention::visible::Visible;
use crate::pv::{Int8Run, KEY_GROUP, PackedValues, PvKernel, RUN, ValueFormat};
use crate::uninit::{overwrite, written};
use std::cell::{Cell, RefCell};
use std::f32::consts::LOG2_E;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Keys of a tile. 48 rows of scores and probabilities, with the keys and values of the tile, stay
/// in a 1 MiB L2; smaller tiles rescale the sums more often.
const TILE: usize = 512;

/// Everything that is known before the first head.
pub(super) struct Engine<'a> {
    scorer: Scorer<'a>,
    values: View<'a>,
    kernel: &'static dyn PvKernel,
    visible: &'a Visible,
    between: Between<'a>,
}

/// Keys and values of one head, packed.
struct KeyHead {
    keys: PackedKeys,
    values: PackedValues,
}

/// A block of queries of one head.
struct Queries<'a> {
    head: usize,
    tokens: Range<usize>,
    from: &'a KeyHead,
}

/// What a thread works in, kept so that a block of queries allocates nothing.
#[derive(Default)]
struct Scratch {
    block: QueryBlock,
    /// The keys that each query sees: all of them, and those of the tile.
    visible: Vec<Range<usize>>,
    visible_in_tile: Vec<Range<usize>>,
    running: Vec<Running>,
    /// Elements from one row of scores, or of probabilities, to the next.
    stride: usize,
    scores: Vec<f32>,
    /// Probabilities in bf16.
    probs: Vec<u16>,
    /// Probabilities in int8, and what they stand for.
    codes: Vec<u8>,
    runs: Vec<Int8Run>,
    sums: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    static KEY_HEAD: Cell<Option<KeyHead>> = const { Cell::new(None) };
    /// Where values are gathered that do not lie together.
    static PACKING: RefCell<(Vec<f32>, Vec<f32>)> = RefCell::default();
}

impl<'a> Engine<'a> {
    /// Checks the configuration and finds the ranges of queries and keys.
    pub(super) fn prepare(
        q: View<'a>,
        k: View<'a>,
        v: View<'a>,
        (visible, mask): (&'a Visible, Option<MaskView<'a>>),
        spec: &AttentionSpec,
        int8: &Int8Config,
    ) -> Result<Self> {
        let scale = spec.scale(q.depth())?;
        // A softcap bends the true score, so the row's constant matters, and log2(e) comes after.
        let scale = match spec.softcap {
            Some(_) => ScoreScale { factor: scale, row_constants: true },
            None => ScoreScale { factor: scale * LOG2_E, row_constants: false },
        };
        Ok(Self {
            values: v,
            kernel: int8.pv.kernel()?,
            visible,
            between: Between { softcap: spec.softcap, slopes: spec.alibi_slopes.clone(), mask },
            scorer: Scorer::prepare(q, k, &int8.scores, scale)?,
        })
    }

    /// The output `[B, H, M, Dv]`. Heads and blocks of queries do not depend on each other, so the
    /// result is the same with any number of threads.
    pub(super) fn run<T: Element>(&self) -> Vec<T> {
        let [b, h, m, n] = self.scorer.dims();
        let (depth, value_dim) = (self.scorer.depth(), self.values.depth());
        let len = b * h * m * value_dim;
        if len == 0 || n == 0 {
            return vec![T::default(); len];
        }
        let (rows, scores) = (b * h * m + self.values.heads() * n, b * h * m * n);
        let work = Work {
            int8_macs: scores * depth,
            value_macs: scores * value_dim,
            elements: scores + rows * (depth + value_dim),
        };
        let per_key_head = self.scorer.query_heads(0).len() * m * value_dim;
        // SAFETY: the key heads cover the output, and `attend_head` writes all of its part.
        unsafe {
            written(len, |out| {
                work.for_each_chunk(out, per_key_head, |pace, head, out| {
                    self.attend_head::<T>(pace, head, out);
                });
            })
        }
    }

    /// Writes the output of all query heads that share key head `head`.
    fn attend_head<T: Element>(&self, pace: Pace, head: usize, out: &mut [MaybeUninit<T>]) {
        let ([_, _, m, _], value_dim) = (self.scorer.dims(), self.values.depth());
        let mut from = self.key_head();
        self.scorer.pack_keys(head, pace, &mut from.keys);
        self.pack_values(head, &mut from.values);
        let outs = self.scorer.query_heads(head).zip(out.chunks_exact_mut(m * value_dim));
        let blocks = outs.flat_map(|(head, out)| {
            let (from, outs) = (&from, out.chunks_mut(BLOCK * value_dim));
            blocks(m).zip(outs).map(move |(tokens, out)| (Queries { head, tokens, from }, out))
        });
        pace.for_each(blocks, |(queries, out)| {
            SCRATCH.with_borrow_mut(|scratch| self.attend::<T>(&queries, scratch, out));
        });
        if from.keys.memory() + from.values.memory() <= PackedKeys::KEPT {
            KEY_HEAD.set(Some(from));
        }
    }

    /// Memory for the keys and values of a head.
    fn key_head(&self) -> KeyHead {
        let name = self.kernel.name();
        let kept = KEY_HEAD.take().filter(|kept| kept.values.kernel().name() == name);
        kept.unwrap_or_else(|| KeyHead {
            keys: PackedKeys::new(self.scorer.kernel),
            values: PackedValues::new(self.kernel, 0, 0),
        })
    }

    fn pack_values(&self, head: usize, packed: &mut PackedValues) {
        packed.reset(self.values.tokens(), self.values.depth());
        PACKING.with_borrow_mut(|(gathered, buffer)| {
            let tokens = self.values.tokens();
            if packed.needs_ranges() {
                for block in blocks(tokens) {
                    let rows = self.values.rows(head, block, gathered);
                    packed.observe(rows.as_slice(buffer));
                }
            }
            for block in blocks(tokens) {
                let rows = self.values.rows(head, block.clone(), gathered);
                packed.put(block.start, rows.as_slice(buffer));
            }
        });
    }

    /// Attention of a block of queries.
    fn attend<T: Element>(
        &self,
        queries: &Queries<'_>,
        scratch: &mut Scratch,
        out: &mut [MaybeUninit<T>],
    ) {
        let [_, h, _, n] = self.scorer.dims();
        let width = queries.from.values.width();
        let seen = |query| self.visible.range(queries.head / h, query);
        scratch.start(queries.tokens.clone().map(seen), n, self.scorer.key_step(), width);
        let at = (queries.head, queries.tokens.clone());
        self.scorer.quantize_queries(&queries.from.keys, at, &mut scratch.block);
        let first = scratch.visible.iter().map(|keys| keys.start).min().unwrap_or(0);
        let end = scratch.visible.iter().map(|keys| keys.end).max().unwrap_or(0);
        // Only what some query of the block sees, from a whole step on.
        let step = self.scorer.key_step().next_multiple_of(KEY_GROUP);
        for start in (first / step * step..end).step_by(TILE) {
            self.tile(queries, start..(start + TILE).min(end), scratch);
        }
        let outs = out.chunks_exact_mut(self.values.depth());
        let rows = scratch.sums.chunks_exact_mut(width).zip(outs);
        for ((sums, out), running) in rows.zip(&scratch.running) {
            // No key was seen: zeros. A NaN sum stays NaN.
            let inverse = if running.sum == 0.0 { 0.0 } else { 1.0 / running.sum };
            T::write_scaled(&sums[..out.len()], inverse, out);
        }
    }

    /// Adds one tile of keys to the sums of a block of queries.
    fn tile(&self, queries: &Queries<'_>, keys: Range<usize>, scratch: &mut Scratch) {
        let (from, stride) = (queries.from, scratch.stride);
        // SAFETY: `Scorer::score` writes numbers.
        let scores = unsafe { overwrite(&mut scratch.scores) };
        self.scorer.score(&from.keys, &scratch.block, keys.clone(), scores, stride);
        let clamp = |x: usize| x.clamp(keys.start, keys.end) - keys.start;
        let inside = scratch.visible.iter().map(|seen| clamp(seen.start)..clamp(seen.end));
        scratch.visible_in_tile.clear();
        scratch.visible_in_tile.extend(inside);
        if !self.between.is_nothing() {
            let [_, h, _, _] = self.scorer.dims();
            let rows = scratch.scores.chunks_mut(stride).zip(&scratch.visible_in_tile);
            for (query, (scores, visible)) in queries.tokens.clone().zip(rows) {
                let seen = keys.start + visible.start..keys.start + visible.end;
                let at = [queries.head / h, queries.head % h, query];
                let position = self.visible.position(at[0], query);
                self.between.apply(at, position, seen, &mut scores[visible.clone()]);
            }
        }
        let probs = match self.kernel.format() {
            ValueFormat::F32 => Probs::F32,
            ValueFormat::Bf16 => Probs::Bf16(&mut scratch.probs),
            ValueFormat::Int8 => Probs::Int8 { codes: &mut scratch.codes, runs: &mut scratch.runs },
        };
        let (scores, visible) = (&mut scratch.scores, &scratch.visible_in_tile);
        let tile = Tile { scores, stride, keys: keys.len(), visible, probs };
        softmax_tile(tile, &mut scratch.running);
        scratch.rescale_sums(from.values.width());
        let Scratch { scores, probs, codes, runs, sums, running, .. } = &mut *scratch;
        let (values, tile) = (&from.values, keys.clone());
        match self.kernel.format() {
            ValueFormat::F32 => values.accumulate_f32(tile, scores, stride, sums),
            ValueFormat::Bf16 => values.accumulate_bf16(tile, probs, stride, sums),
            ValueFormat::Int8 => {
                let runs = &runs[..running.len() * keys.len().div_ceil(RUN)];
                values.accumulate_int8(tile, codes, stride, runs, sums);
            }
        }
        self.add_exceptions(values, keys, scratch);
    }

    /// Adds the values that the packed format cannot hold, where a query sees their key.
    fn add_exceptions(&self, values: &PackedValues, keys: Range<usize>, scratch: &mut Scratch) {
        for (key, value) in values.exceptions().iter().filter(|(key, _)| keys.contains(key)) {
            for (row, sums) in scratch.sums.chunks_exact_mut(values.width()).enumerate() {
                let at = row * scratch.stride + key - keys.start;
                let p = match self.kernel.format() {
                    ValueFormat::F32 => scratch.scores[at],
                    ValueFormat::Bf16 => f32::from_bits(u32::from(scratch.probs[at]) << 16),
                    // Not the code, which may have been rounded to 0, while a NaN must be seen.
                    ValueFormat::Int8
                        if scratch.visible_in_tile[row].contains(&(key - keys.start)) =>
                    {
                        scratch.running[row].probability(scratch.scores[at])
                    }
                    ValueFormat::Int8 => 0.0,
                };
                if p != 0.0 {
                    sums.iter_mut().zip(value).for_each(|(sum, x)| *sum += p * x);
                }
            }
        }
    }
}

impl Scratch {
    /// For queries that see these ranges of `keys` keys, which are scored in steps of `step`, and
    /// sums of `width` channels.
    fn start(
        &mut self,
        visible: impl Iterator<Item = Range<usize>>,
        keys: usize,
        step: usize,
        width: usize,
    ) {
        self.visible.clear();
        self.visible.extend(visible);
        let rows = self.visible.len();
        self.running.clear();
        self.running.resize(rows, Running::START);
        // Whole steps, so that a step that reaches over the last key has room.
        self.stride = keys.min(TILE).next_multiple_of(step.max(KEY_GROUP));
        let grow = self.scores.len().max(rows * self.stride);
        self.scores.resize(grow, 0.0);
        self.probs.resize(grow, 0);
        self.codes.resize(grow, 0);
        // Every row has runs of its own, also where it is shorter than one.
        let runs = self.runs.len().max(rows * self.stride.div_ceil(RUN));
        self.runs.resize(runs, Int8Run::default());
        self.sums.clear();
        self.sums.resize(rows * width, 0.0);
    }

    /// To the new maxima of their rows.
    fn rescale_sums(&mut self, width: usize) {
        for (sums, running) in self.sums.chunks_exact_mut(width).zip(&self.running) {
            if running.rescale != 1.0 {
                sums.iter_mut().for_each(|sum| *sum *= running.rescale);
            }
        }
    }
}
