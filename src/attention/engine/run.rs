//! The loops of the engine.

use super::doubt::Doubt;
use super::int16_tile::{settle, write_all, write_codes};
use super::key_values::{KeyValues, QueryBlock};
use super::modifiers::Modifiers;
use super::output::Element;
use super::partial::Partial;
use super::queries::{Block, Queries, Rows, TOGETHER, pieces, together};
use super::softmax::softmax_tile;
use super::tile::{Probs, Tile, Words};
use crate::attention::seen::Seen;
use crate::attention::visible::Visible;
use crate::cpu::Level;
use crate::cpu::contracts::{Format, Int8Run, LANES, RUN};
use crate::memory::{Aligned, Footprint, Kept, footprint};
use crate::parallel::{Pace, Work};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Keys of a tile. 48 rows of scores and probabilities, with the keys and values of the tile, stay
/// in a 1 MiB L2; smaller tiles rescale the sums more often.
pub(in crate::attention) const TILE: usize = 512;

/// Up to this many rows, the keys are computed in spans that threads share. The cut depends on shapes
/// alone, never on threads, so neither does the result.
const FEW: usize = 8;

/// Tiles of a span.
const SPAN: usize = 2;

/// The queries of a call, and what lies between their scores and their probabilities.
pub(in crate::attention) struct Engine<'a> {
    pub level: Level,
    pub queries: Queries,
    /// `Dv`.
    pub value_dim: usize,
    /// What each query sees by its position.
    pub visible: Visible,
    /// The first keys of every sequence that are seen whatever a window of the keys says, as far as
    /// positions let them.
    pub sinks: usize,
    /// Keys to the left of its position that a query sees at most, the sinks apart.
    pub window: Option<usize>,
    pub modifiers: Modifiers<'a>,
    /// The keys that take part, where keys and values are those alone; `None` where they are all.
    pub seen: Option<&'a Seen>,
    /// What the rows met.
    pub doubt: &'a Doubt,
}

/// What a row of a block sees.
struct Row {
    /// The keys, the sinks left out, and those of the sinks.
    seen: Range<usize>,
    sinks: Range<usize>,
}

/// What the rows of a block see.
struct Sight {
    /// What each of them sees, or one that says it of all.
    rows: Vec<Row>,
    count: usize,
}

impl Sight {
    fn iter(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().cycle().take(self.count)
    }
}

/// What a thread works in, kept so that a block allocates nothing.
#[derive(Default)]
struct Scratch {
    queries: [QueryBlock; TOGETHER],
    buffers: Buffers,
    partial: Partial,
}

#[derive(Default)]
struct Buffers {
    /// Elements from one row of scores, or of probabilities, to the next.
    stride: usize,
    scores: Aligned<f32>,
    /// The keys of a tile that each row sees.
    inside: Vec<Range<usize>>,
    /// The same of a run.
    inside_run: Vec<Range<usize>>,
    /// Probabilities in bf16.
    halves: Aligned<u16>,
    /// Probabilities in int8, and what they stand for.
    codes: Aligned<u8>,
    runs: Vec<Int8Run>,
    /// The largest scores: of rows where probabilities are in f32, of runs where they are in int16.
    tops: Aligned<f32>,
    /// Probabilities in int16; of their runs the sums, and what a 1 stands for.
    words: Aligned<i16>,
    counts: Aligned<f32>,
    scales: Aligned<f32>,
}

footprint!(Scratch: queries, buffers, partial);

impl Footprint for Buffers {
    fn footprint(&self) -> usize {
        let Self { scores, halves, codes, runs, words, tops, counts, scales, .. } = self;
        let runs = runs.footprint() + tops.footprint() + counts.footprint() + scales.footprint();
        let probs = halves.footprint() + codes.footprint() + words.footprint() + runs;
        // A range is not `Copy`.
        let ranges = self.inside.capacity() + self.inside_run.capacity();
        scores.footprint() + ranges * size_of::<Range<usize>>() + probs
    }
}

thread_local! {
    static SCRATCH: Kept<Scratch> = const { Kept::new() };
}

/// Bytes that a thread keeps for the next block.
const KEPT: usize = 4 << 20;

impl Engine<'_> {
    /// Fills the output, `[B, H, M, Dv]`, of all key heads: every element is written. `with_head` brings the
    /// keys and values of a head into their form and calls what it is given with them. Heads and blocks do
    /// not depend on each other, so the result is the same with any number of threads.
    ///
    /// # Panics
    /// Unless the output is that of whole heads, and where `with_head` does not make the call.
    pub(in crate::attention) fn run<T: Element>(
        &self,
        work: Work,
        out: &mut [MaybeUninit<T>],
        with_head: impl Fn(Pace, usize, &mut dyn FnMut(&dyn KeyValues)) + Sync,
    ) {
        if out.is_empty() {
            return;
        }
        let per_head = self.queries.rows() * self.value_dim;
        assert!(out.len().is_multiple_of(per_head), "the output of whole heads");
        work.for_each_chunk(out, per_head, |pace, head, out| {
            let mut written = false;
            with_head(pace, head, &mut |from| {
                self.attend_head::<T>(pace, from, head, &mut *out);
                written = true;
            });
            assert!(written, "head {head} was left out");
        });
    }

    /// Writes the output of all rows that share a key head.
    fn attend_head<T: Element>(
        &self,
        pace: Pace,
        from: &dyn KeyValues,
        head: usize,
        mut out: &mut [MaybeUninit<T>],
    ) {
        let blocks = self.queries.blocks().map(|range| {
            let (block, rest) = std::mem::take(&mut out).split_at_mut(range.len() * self.value_dim);
            out = rest;
            (Rows { head, range }, block)
        });
        let mut blocks: Vec<_> = blocks.collect();
        let together = together(pace, blocks.len());
        pace.for_each(blocks.chunks_mut(together), |blocks| {
            self.attend_blocks::<T>(pace, from, blocks);
        });
    }

    /// Writes the output of some blocks.
    fn attend_blocks<T: Element>(
        &self,
        pace: Pace,
        from: &dyn KeyValues,
        blocks: &mut [(Rows, &mut [MaybeUninit<T>])],
    ) {
        let (mut whole, mut of_whole) = (Vec::new(), Vec::new());
        for (rows, out) in blocks {
            let seen = self.rows(rows);
            let block = Block { rows: rows.clone(), tiles: self.tiles(from, &seen) };
            // Rows of padding do not make it another computation.
            let rows_that_see = seen.iter().filter(|row| !row.seen.is_empty()).count();
            if rows_that_see > FEW || block.tiles.len() <= SPAN {
                whole.push(block);
                of_whole.push((seen, out));
            } else {
                self.attend_spans::<T>(pace, from, &block, &seen, out);
            }
        }
        with_scratch(|Scratch { queries, buffers, partial }| {
            from.prepare(&whole, &mut queries[..whole.len()]);
            for ((block, queries), (seen, out)) in whole.iter().zip(queries).zip(of_whole) {
                self.attend_tiles(from, block, queries, &seen, (buffers, partial));
                self.finish((&block.rows, &seen), partial, out);
            }
        });
    }

    /// Writes the output of a block of few rows, whose keys threads share.
    fn attend_spans<T: Element>(
        &self,
        pace: Pace,
        from: &dyn KeyValues,
        block: &Block,
        seen: &Sight,
        out: &mut [MaybeUninit<T>],
    ) {
        let parts = pace.map(block.tiles.chunks(SPAN), |tiles| {
            with_scratch(|Scratch { queries, buffers, partial }| {
                let span = [Block { rows: block.rows.clone(), tiles: tiles.to_vec() }];
                from.prepare(&span, &mut queries[..1]);
                self.attend_tiles(from, &span[0], &queries[0], seen, (buffers, partial));
                std::mem::take(partial)
            })
        });
        let mut merged = Partial::default();
        merged.start(seen.count, from.width());
        parts.iter().for_each(|part| merged.merge(part, self.modifiers.unit()));
        self.finish((&block.rows, seen), &mut merged, out);
    }

    /// The tiles of keys of which rows see some.
    fn tiles(&self, from: &dyn KeyValues, seen: &Sight) -> Vec<Range<usize>> {
        // What is empty is somewhere, which says nothing.
        let some = || seen.rows.iter().map(|row| &row.seen).filter(|seen| !seen.is_empty());
        let start = some().map(|seen| seen.start).min().unwrap_or(0);
        let end = some().map(|seen| seen.end).max().unwrap_or(0);
        let sinks = seen.rows.iter().map(|row| row.sinks.end).max().unwrap_or(0);
        let mut tiles = from.tiles(0..sinks);
        tiles.extend(from.tiles(start.max(self.sinks)..end.max(self.sinks)));
        tiles
    }

    /// Writes the output of rows that have seen all of their keys.
    fn finish<T: Element>(
        &self,
        (rows, seen): (&Rows, &Sight),
        partial: &mut Partial,
        out: &mut [MaybeUninit<T>],
    ) {
        let all_at = || self.queries.all_at(rows);
        if !partial.running.iter().all(Doubt::is_none) {
            for (running, (at, row)) in partial.running.iter().zip(all_at().zip(seen.iter())) {
                self.doubt.add(running, || self.sees_a_key(rows.head, at, row));
            }
        }
        if let Some(logits) = self.modifiers.sink_logits() {
            for (index, at) in all_at().enumerate() {
                partial.add_logit(index, logits[at[1]], self.modifiers.unit());
            }
        }
        partial.finish(self.value_dim, out);
    }

    /// Whether the mask leaves a row one of the keys at its places.
    fn sees_a_key(&self, head: usize, at: [usize; 3], row: &Row) -> bool {
        let lets_see = |keys| self.modifiers.let_see(at, keys);
        [&row.sinks, &row.seen].into_iter().any(|places| match self.seen {
            None => lets_see(places.clone()),
            Some(seen) => seen.keys(head).runs(places.clone()).any(|(_, keys)| lets_see(keys)),
        })
    }

    /// What each row of a block sees.
    fn rows(&self, rows: &Rows) -> Sight {
        // All are of the sequence of their key head.
        let alike = self.window.is_none() && self.visible.is_the_same_for_all_queries();
        let count = rows.range.len();
        let distinct = self.queries.all_at(rows).take(if alike { 1 } else { count });
        Sight { rows: distinct.map(|at| self.row(rows.head, at)).collect(), count }
    }

    /// What a row sees.
    fn row(&self, head: usize, at: [usize; 3]) -> Row {
        let mut range = self.visible.range(at[0], at[2]);
        if let Some(seen) = self.seen {
            range = seen.keys(head).places(range);
        }
        let sinks = range.start.min(self.sinks)..range.end.min(self.sinks);
        Row { seen: self.behind_sinks(range, at[0], at[2]), sinks }
    }

    /// The keys that a query of a sequence sees, the sinks left out.
    pub(in crate::attention) fn seen(&self, sequence: usize, query: usize) -> Range<usize> {
        self.behind_sinks(self.visible.range(sequence, query), sequence, query)
    }

    fn behind_sinks(&self, range: Range<usize>, sequence: usize, query: usize) -> Range<usize> {
        let Range { mut start, end } = range;
        if let Some(window) = self.window {
            let position = usize::try_from(self.visible.position(sequence, query)).unwrap_or(0);
            start = start.max(position.saturating_sub(window));
        }
        let end = end.max(self.sinks);
        start.clamp(self.sinks, end)..end
    }

    /// Attention of a block, prepared, over its tiles, into the partial.
    fn attend_tiles(
        &self,
        from: &dyn KeyValues,
        block: &Block,
        queries: &QueryBlock,
        seen: &Sight,
        (buffers, partial): (&mut Buffers, &mut Partial),
    ) {
        partial.start(seen.count, from.width());
        if block.tiles.is_empty() {
            return;
        }
        buffers.start(from, seen.count, &block.tiles);
        for tile in &block.tiles {
            self.tile(from, queries, (&block.rows, seen), tile.clone(), (buffers, partial));
        }
    }

    /// Adds one tile of keys.
    fn tile(
        &self,
        from: &dyn KeyValues,
        queries: &QueryBlock,
        (rows, seen): (&Rows, &Sight),
        keys: Range<usize>,
        (buffers, partial): (&mut Buffers, &mut Partial),
    ) {
        buffers.find_inside(seen, &keys, self.sinks);
        let mut large = from.large(keys.clone());
        large.iter_mut().for_each(|key| *key -= keys.start);
        let format = from.format(seen.count);
        let mut inside = std::mem::take(&mut buffers.inside_run);
        let mut tile = buffers.tile(format, keys.len(), &large);
        let unit = self.modifiers.unit() == 1.0;
        if format == Format::Int16 && seen.count > FEW && unit && !from.needs_scores(&keys) {
            self.write_codes(from, queries, (rows, keys.clone()), (&mut tile, &mut inside));
            settle(&mut tile, &mut partial.running);
        } else {
            from.score(queries, keys.clone(), tile.scores, tile.stride);
            self.modify(rows, keys.start, &mut tile);
            self.refer(&mut tile, partial);
            softmax_tile(self.level, &mut tile, &mut partial.running);
        }
        partial.rescale();
        from.accumulate(keys, &mut tile, &partial.running, &mut partial.sums);
        buffers.inside_run = inside;
    }

    /// Writes the probabilities of a tile run by run, so that scores stay in L1 on their way. (Codes straight from the
    /// registers of the product, without scores in memory, take longer: an exponential is a chain of steps, and no
    /// registers are left for those of other rows beside it.)
    fn write_codes(
        &self,
        from: &dyn KeyValues,
        queries: &QueryBlock,
        (rows, keys): (&Rows, Range<usize>),
        (tile, inside): (&mut Tile<'_>, &mut Vec<Range<usize>>),
    ) {
        let whole = tile.visible.iter().all(|seen| *seen == (0..tile.keys));
        inside.clear();
        for (index, run) in pieces(keys.clone(), RUN).enumerate() {
            if !(whole && run.len() == RUN && index > 0) {
                let start = run.start - keys.start;
                let clamp = |x: usize| x.clamp(start, start + run.len()) - start;
                inside.clear();
                inside.extend(tile.visible.iter().map(|seen| clamp(seen.start)..clamp(seen.end)));
            }
            let mut tile = tile.run(index, run.len(), inside);
            from.score(queries, run.clone(), tile.scores, tile.stride);
            self.modify(rows, run.start, &mut tile);
            match whole {
                true => write_all(self.level, &mut tile),
                false => write_codes(self.level, &mut tile),
            }
        }
    }

    /// What keeps numbers finite that are close to the end of their range, row by row: scores in units beyond
    /// log2 become distances from the largest so far, and sums make room for large values.
    fn refer(&self, tile: &mut Tile<'_>, partial: &mut Partial) {
        let (unit, large) = (self.modifiers.unit(), tile.large);
        if unit == 1.0 && large.is_empty() {
            return;
        }
        let rows = tile.scores.chunks_mut(tile.stride).zip(tile.visible);
        for (row, (scores, inside)) in rows.enumerate() {
            let seen = &mut scores[inside.clone()];
            if unit != 1.0 {
                partial.refer(row, self.level.max(seen), unit, seen);
            }
            let sees = |key: &usize| inside.contains(key) && scores[*key] != f32::NEG_INFINITY;
            if large.iter().any(sees) {
                partial.make_room(row, self.level.max(&scores[inside.clone()]));
            }
        }
    }

    /// Softcap, ALiBi and mask of the scores that are seen.
    fn modify(&self, block: &Rows, first: usize, tile: &mut Tile<'_>) {
        if self.modifiers.is_nothing() {
            return;
        }
        let rows = tile.scores.chunks_mut(tile.stride).zip(tile.visible);
        for (at, (scores, inside)) in self.queries.all_at(block).zip(rows) {
            let position = self.visible.position(at[0], at[2]);
            let places = first + inside.start..first + inside.end;
            let scores = &mut scores[inside.clone()];
            match self.seen {
                None => self.modifiers.apply(at, position, places, scores),
                Some(seen) => {
                    for (start, keys) in seen.keys(block.head).runs(places) {
                        let scores = &mut scores[start..start + keys.len()];
                        self.modifiers.apply(at, position, keys, scores);
                    }
                }
            }
        }
    }
}

fn with_scratch<T>(f: impl FnOnce(&mut Scratch) -> T) -> T {
    Kept::with(&SCRATCH, KEPT, f)
}

impl Buffers {
    /// For rows and the tiles that they see.
    fn start(&mut self, from: &dyn KeyValues, rows: usize, tiles: &[Range<usize>]) {
        let longest = tiles.iter().map(Range::len).max().unwrap_or(0);
        // Whole steps, so that a step that reaches over the last key has room; and whole vectors.
        self.stride = longest.next_multiple_of(from.step().next_multiple_of(LANES));
        if from.format(rows) == Format::F32 {
            // Vectors may start with any key.
            self.stride += LANES;
        }
        let len = rows * self.stride;
        self.scores.grow(len * from.rows_of_scores());
        match from.format(rows) {
            Format::F32 => self.tops.grow(rows),
            Format::Bf16 => self.halves.grow(len),
            Format::Int8 => {
                self.codes.grow(len);
                // Every row has runs of its own, also where it is shorter than one.
                let runs = rows * self.stride.div_ceil(RUN);
                self.runs.resize(runs.max(self.runs.len()), Int8Run::default());
            }
            Format::Int16 => {
                self.words.grow(len);
                let scales = rows * self.stride.div_ceil(RUN);
                self.tops.grow(scales);
                self.counts.grow(scales);
                self.scales.grow(scales);
            }
        }
    }

    /// Finds the keys of a tile that each row sees, counted from the first of them.
    fn find_inside(&mut self, seen: &Sight, keys: &Range<usize>, sinks: usize) {
        let clamp = |x: usize| x.clamp(keys.start, keys.end) - keys.start;
        self.inside.clear();
        self.inside.extend(seen.rows.iter().map(|row| {
            let seen = if keys.end <= sinks { &row.sinks } else { &row.seen };
            clamp(seen.start)..clamp(seen.end)
        }));
        if let Some(last) = self.inside.last().cloned() {
            self.inside.resize(seen.count, last);
        }
    }

    /// A tile of so many keys.
    fn tile<'a>(&'a mut self, format: Format, keys: usize, large: &'a [usize]) -> Tile<'a> {
        let Self { scores, inside, halves, codes, runs, tops, words, counts, scales, .. } = self;
        let stride = self.stride;
        let probs = match format {
            Format::F32 => Probs::F32 { maxes: tops },
            Format::Bf16 => Probs::Bf16(halves),
            Format::Int8 => Probs::Int8 { codes, runs },
            Format::Int16 => Probs::Int16(Words { codes: words, stride, tops, counts, scales }),
        };
        Tile { scores, stride, keys, visible: inside, probs, large }
    }
}
