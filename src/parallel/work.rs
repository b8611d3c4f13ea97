//! How much work an op is, and whether other threads are worth waking for it.

use super::share;
use rayon::prelude::*;

/// The parts of an op that take time.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Work {
    /// Multiplications of codes.
    pub int8_macs: usize,
    /// Multiplications of probabilities with values.
    pub value_macs: usize,
    /// Multiplications in f32.
    pub float_macs: usize,
    /// Elements that are read, quantized, packed or written, and exponentials.
    pub elements: usize,
}

/// What one core of a recent machine does in a nanosecond; only orders of magnitude matter.
const INT8_MACS_PER_NS: usize = 128;
const VALUE_MACS_PER_NS: usize = 64;
const FLOAT_MACS_PER_NS: usize = 48;
const ELEMENTS_PER_NS: usize = 3;

/// Calling a sleeping thread takes some µs, and as many pass before it can help.
const WAKE_NS: usize = 15_000;
/// One that lingers begins at once.
const OFFER_NS: usize = 5_000;
/// Waking is paid once; after that a piece of work must only be worth taking.
const PIECE_NS: usize = 2_000;
/// From here on, of work that is divided again, it costs nothing that the caller sleeps, and it saves having one
/// thread more than there are cores.
const LONG_NS: usize = 1_000_000;
/// Parts of a product.
const PART_NS: usize = 10_000;
const PARTS_PER_THREAD: usize = 16;
/// Pieces that are to be divided again, if a thread runs out of them, unless there are many for each.
const DIVIDED_NS: usize = 40_000;
const MANY: usize = 4;

impl Work {
    /// Both pieces of work, as one.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            int8_macs: self.int8_macs.saturating_add(other.int8_macs),
            value_macs: self.value_macs.saturating_add(other.value_macs),
            float_macs: self.float_macs.saturating_add(other.float_macs),
            elements: self.elements.saturating_add(other.elements),
        }
    }

    fn nanoseconds(self) -> usize {
        self.int8_macs / INT8_MACS_PER_NS
            + self.value_macs / VALUE_MACS_PER_NS
            + self.float_macs / FLOAT_MACS_PER_NS
            + self.elements / ELEMENTS_PER_NS
    }

    /// Into how many parts the work may be cut: each is worth some 10 µs by this count, and every thread has enough of them
    /// for all to end at about the same time.
    pub(crate) fn parts(self) -> usize {
        let most = PARTS_PER_THREAD * rayon::current_num_threads();
        (self.nanoseconds() / PART_NS).clamp(1, most)
    }

    /// Calls `f` for all parts of this work, which do not depend on each other.
    pub(crate) fn for_each<T: Send>(self, parts: Vec<T>, f: impl Fn(T) + Sync + Send) {
        match self.nanoseconds() < shared_from() {
            true => parts.into_iter().for_each(f),
            false => share::for_each(parts, f),
        }
    }

    /// Calls `f(pace, index, chunk)` for every `size` elements of `out`, each of which is the same
    /// part of this work; `pace` is how the parts of a chunk are to be done.
    pub(crate) fn for_each_chunk<T: Send>(
        self,
        out: &mut [T],
        size: usize,
        f: impl Fn(Pace, usize, &mut [T]) + Sync,
    ) {
        let (chunks, whole) = (out.len().div_ceil(size).max(1), self.nanoseconds());
        let threads = rayon::current_num_threads();
        if whole < shared_from() || threads == 1 {
            let chunks = out.chunks_mut(size).enumerate();
            return chunks.for_each(|(index, chunk)| f(Pace::Serial, index, chunk));
        }
        let each = whole / chunks;
        // Where some threads would wait for others, or for long, they take parts of the chunks that are left.
        let even =
            chunks >= MANY * threads && 10 * (chunks.next_multiple_of(threads) - chunks) <= chunks;
        let pace = match each {
            ..DIVIDED_NS => Pace::Serial,
            ..LONG_NS if even => Pace::Serial,
            _ => Pace::Parallel,
        };
        let at_once = (PIECE_NS / each.max(1)).clamp(1, chunks.div_ceil(threads));
        let group = |(group, chunks): (usize, &mut [T])| {
            for (index, chunk) in chunks.chunks_mut(size).enumerate() {
                f(pace, group * at_once + index, chunk);
            }
        };
        match pace == Pace::Serial || whole < LONG_NS {
            true => share::for_each(out.chunks_mut(at_once * size).enumerate(), group),
            false => out.par_chunks_mut(at_once * size).enumerate().for_each(group),
        }
    }
}

/// The nanoseconds from which on work is worth another thread.
fn shared_from() -> usize {
    if share::is_anyone_lingering() { OFFER_NS } else { WAKE_NS }
}

/// How independent parts of a piece of work are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// One after the other.
    Serial,
    /// By whoever is idle.
    Parallel,
}

impl Pace {
    /// Calls `f` for all parts.
    pub(crate) fn for_each<T: Send>(
        self,
        parts: impl Iterator<Item = T>,
        f: impl Fn(T) + Sync + Send,
    ) {
        match self {
            Pace::Serial => parts.for_each(f),
            Pace::Parallel => share::for_each(parts, f),
        }
    }

    /// The results of `f` for all parts, in their order.
    pub(crate) fn map<T: Send, U: Send>(
        self,
        parts: impl Iterator<Item = T>,
        f: impl Fn(T) -> U + Sync + Send,
    ) -> Vec<U> {
        match self {
            Pace::Serial => parts.map(f).collect(),
            Pace::Parallel => share::map(parts, f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::{ThreadId, current};

    /// Who did each of 30 chunks of 4, and at what pace.
    fn who(work: Work) -> Vec<(ThreadId, Pace)> {
        let mut out = vec![None; 118]; // the last chunk is shorter
        work.for_each_chunk(&mut out, 4, |pace, index, chunk| {
            assert_eq!(chunk.len(), if index == 29 { 2 } else { 4 });
            chunk.fill(Some((current().id(), pace)));
        });
        out.into_iter().map(|done| done.expect("every chunk is done")).collect()
    }

    #[test]
    fn small_work_wakes_nobody() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let work = Work { int8_macs: 1000, value_macs: 1000, elements: 10_000, ..Work::default() };
        let done = pool.install(|| {
            let me = (current().id(), Pace::Serial);
            who(work).into_iter().all(|by| by == me)
        });
        assert!(done);
        // The same outside of any pool.
        assert!(who(work).into_iter().all(|by| by == (current().id(), Pace::Serial)));
    }

    #[test]
    fn large_work_is_shared() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let huge = Work { int8_macs: 1 << 40, ..Work::default() };
        assert!(pool.install(|| who(huge)).iter().all(|(_, pace)| *pace == Pace::Parallel));
        let many_small = Work { elements: 3 * 30 * 5_000, ..Work::default() };
        assert!(pool.install(|| who(many_small)).iter().all(|(_, pace)| *pace == Pace::Serial));
    }
}
