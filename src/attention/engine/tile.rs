//! A tile of scores on its way to probabilities, and what the softmax keeps of each of its rows.

use crate::cpu::contracts::{Format, Int8Run, Int16Runs, RUN};
use crate::cpu::plain::softmax::exp2;
use std::ops::Range;

/// What the softmax of one query has seen so far.
#[derive(Debug, Clone, Copy)]
pub(in crate::attention) struct Running {
    /// The largest score.
    pub max: f32,
    /// The sum of `2^(score - max)`.
    pub sum: f32,
    /// What the sums of values so far must be multiplied by after this tile.
    pub rescale: f32,
}

impl Running {
    pub(in crate::attention) const START: Running =
        Running { max: f32::NEG_INFINITY, sum: 0.0, rescale: 1.0 };

    /// What `score` adds to the sum.
    fn probability(&self, score: f32) -> f32 {
        exp2(score - self.max_or_zero())
    }

    /// Any finite maximum gives zeros for minus infinity, without the NaN of -inf - (-inf).
    fn max_or_zero(&self) -> f32 {
        if self.max == f32::NEG_INFINITY { 0.0 } else { self.max }
    }

    /// Takes in the maximum of a tile; returns what to subtract from its scores.
    pub(super) fn advance(&mut self, tile_max: f32, scores: &[f32]) -> f32 {
        let old = self.max;
        self.max = if tile_max > old { tile_max } else { old };
        if self.max == f32::NEG_INFINITY && scores.iter().any(|x| x.is_nan()) {
            self.sum = f32::NAN;
        }
        let subtract = self.max_or_zero();
        // Of a row that has seen nothing there is nothing to rescale.
        let same = self.max == old || old == f32::NEG_INFINITY;
        self.rescale = if same { 1.0 } else { exp2(old - subtract) };
        subtract
    }

    /// Takes in the sum of a tile.
    pub(super) fn add(&mut self, sum: f32) {
        self.sum = self.sum * self.rescale + sum;
    }
}

/// Where the probabilities of a tile go: row-major, rows `stride` elements apart.
pub(in crate::attention) enum Probs<'a> {
    /// In the place of the scores.
    F32 {
        /// The largest score of each row.
        maxes: &'a mut [f32],
    },
    /// Rounded to bf16.
    Bf16(&'a mut [u16]),
    /// Rounded to 1/255 of the largest of a run of [`RUN`](crate::cpu::contracts::RUN) keys.
    Int8 {
        codes: &'a mut [u8],
        /// What the codes stand for: all runs of a row before those of the next.
        runs: &'a mut [Int8Run],
    },
    /// Rounded to 1/4096 of the largest of a run of [`RUN`](crate::cpu::contracts::RUN) keys.
    Int16(Words<'a>),
}

/// Probabilities in int16, and of each run of all rows, one run after the other, its largest score, the sum of its
/// codes, and what a code of 1 stands for.
pub(in crate::attention) struct Words<'a> {
    /// Row-major, rows `stride` elements apart.
    pub codes: &'a mut [i16],
    pub stride: usize,
    pub tops: &'a mut [f32],
    pub counts: &'a mut [f32],
    pub scales: &'a mut [f32],
}

impl Words<'_> {
    /// From a row of so many on.
    pub(in crate::attention) fn at_row(
        &mut self,
        row: usize,
        rows: usize,
    ) -> (&mut [i16], Int16Runs<'_>) {
        let (tops, counts) = (&mut self.tops[row..], &mut self.counts[row..]);
        (&mut self.codes[row * self.stride..], Int16Runs { tops, counts, stride: rows })
    }

    /// From a run on, of so many rows.
    pub(in crate::attention) fn at_run(&mut self, run: usize, rows: usize) -> Words<'_> {
        let at = run * rows;
        Words {
            codes: &mut self.codes[run * RUN..],
            stride: self.stride,
            tops: &mut self.tops[at..],
            counts: &mut self.counts[at..],
            scales: &mut self.scales[at..],
        }
    }
}

impl Probs<'_> {
    /// What they are multiplied in.
    pub(in crate::attention) fn format(&self) -> Format {
        match self {
            Probs::F32 { .. } => Format::F32,
            Probs::Bf16(_) => Format::Bf16,
            Probs::Int8 { .. } => Format::Int8,
            Probs::Int16(_) => Format::Int16,
        }
    }
}

/// Scores of some queries against a tile of keys.
pub(in crate::attention) struct Tile<'a> {
    /// Row-major, rows `stride` elements apart. Where codes were written run by run, nothing but what the last run left.
    pub scores: &'a mut [f32],
    pub stride: usize,
    /// Keys in the tile; probabilities are written for these, and zeros up to whole groups.
    pub keys: usize,
    /// The keys of the tile that each query sees.
    pub visible: &'a [Range<usize>],
    pub probs: Probs<'a>,
    /// Keys whose values are [large](super::KeyValues::large), counted from the first of the tile.
    pub large: &'a [usize],
}

impl Tile<'_> {
    /// A run of so many keys as a tile, in which each row sees some of them. Its scores are where those of any other run
    /// are.
    ///
    /// # Panics
    /// Unless probabilities are in int16.
    pub(super) fn run<'a>(
        &'a mut self,
        run: usize,
        keys: usize,
        visible: &'a [Range<usize>],
    ) -> Tile<'a> {
        let Probs::Int16(words) = &mut self.probs else { unreachable!("a tile in int16") };
        let probs = Probs::Int16(words.at_run(run, visible.len()));
        let stride = self.stride.min(RUN);
        Tile { scores: &mut *self.scores, stride, keys, visible, probs, large: &[] }
    }

    /// Adds a value that stands beside the others, where a row sees its key, which is counted from the
    /// tile's first. `sums` is `[rows, width]`.
    pub(in crate::attention) fn add_exception(
        &self,
        key: usize,
        value: &[f32],
        running: &[Running],
        sums: &mut [f32],
    ) {
        let width = (sums.len() / running.len().max(1)).max(1);
        for (row, sums) in sums.chunks_exact_mut(width).enumerate() {
            let at = row * self.stride + key;
            let p = match &self.probs {
                Probs::F32 { .. } => self.scores[at],
                Probs::Bf16(halves) => f32::from_bits(u32::from(halves[at]) << 16),
                // Not the code, which may have been rounded to 0, while a NaN must be seen.
                Probs::Int8 { .. } | Probs::Int16(_) if self.visible[row].contains(&key) => {
                    running[row].probability(self.scores[at])
                }
                Probs::Int8 { .. } | Probs::Int16(_) => 0.0,
            };
            if p != 0.0 {
                sums.iter_mut().zip(value).for_each(|(sum, x)| *sum += p * x);
            }
        }
    }
}
