//! Which keys and which queries of a call take part in it.
//!
//! ```text
//! keys of a head      0 1 2 3 4 5 6 7 8 9        some query sees    0 1 2 . . 5 6 7 . .
//! as they are packed                                                0 1 2     3 4 5
//! ```
//!
//! A key that no query sees is not packed: it has a part in no mean, range, scale or sum, and the output is
//! that of a call without it. A query that sees no key has a part in no mean and no range.

use super::engine::MaskView;
use super::visible::Visible;
use crate::cpu::contracts::Rows;
use crate::view::View;
use std::ops::Range;

/// The keys of a head that some query sees, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SeenKeys {
    /// Runs of keys that follow each other, each with its place among the keys that are seen.
    runs: Vec<(usize, Range<usize>)>,
    len: usize,
}

impl SeenKeys {
    /// All of a range.
    pub(super) fn of_range(keys: Range<usize>) -> Self {
        Self { len: keys.len(), runs: vec![(0, keys)] }
    }

    /// Those that are marked.
    fn of_marks(marks: &[u8]) -> Self {
        let (mut runs, mut len, mut start) = (Vec::new(), 0, 0);
        for run in marks.chunk_by(|a, b| a == b) {
            if run[0] != 0 {
                runs.push((len, start..start + run.len()));
                len += run.len();
            }
            start += run.len();
        }
        Self { runs, len }
    }

    /// How many.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Those of a range, as places among the keys that are seen.
    pub(super) fn places(&self, keys: Range<usize>) -> Range<usize> {
        self.before(keys.start)..self.before(keys.end.max(keys.start))
    }

    /// The key at a place.
    pub(super) fn key(&self, place: usize) -> usize {
        self.runs(place..place + 1).next().map_or(place, |(_, keys)| keys.start)
    }

    /// How many there are before a key.
    fn before(&self, key: usize) -> usize {
        let run = self.runs.partition_point(|(_, run)| run.end <= key);
        match self.runs.get(run) {
            Some((place, run)) => place + key.saturating_sub(run.start),
            None => self.len,
        }
    }

    /// The keys at some places: where each run of them starts, counted from the first place, and the keys.
    pub(super) fn runs(
        &self,
        places: Range<usize>,
    ) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
        let first = self.runs.partition_point(|(place, run)| place + run.len() <= places.start);
        self.runs[first..].iter().map_while(move |(place, run)| {
            let from = places.start.max(*place);
            let to = places.end.min(place + run.len());
            let keys =
                run.start + from.saturating_sub(*place)..run.start + to.saturating_sub(*place);
            (from < to).then_some((from - places.start, keys))
        })
    }

    /// The rows of a head at some places as f32: where they lie, if they follow each other, else gathered
    /// into `gathered`.
    pub(super) fn rows<'b>(
        &self,
        view: &'b View<'_>,
        head: usize,
        places: Range<usize>,
        buffer: &'b mut Vec<f32>,
        gathered: &'b mut Vec<f32>,
    ) -> Rows<'b> {
        let mut runs = self.runs(places.clone());
        if let (Some((_, keys)), None) = (runs.next(), runs.next()) {
            return view.rows(head, keys, buffer);
        }
        if places.is_empty() || view.depth() == 0 {
            return Rows::new(&[], places.len(), view.depth(), 0);
        }
        gathered.clear();
        for (_, keys) in self.runs(places) {
            view.rows(head, keys, buffer).iter().for_each(|row| gathered.extend_from_slice(row));
        }
        Rows::contiguous(gathered, view.depth())
    }
}

/// What takes part in a call.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    /// One for every sequence, or for every head of keys where a mask tells heads apart.
    keys: Vec<SeenKeys>,
    /// The queries that see a key, of each of those; empty where all of them do.
    queries: Vec<Vec<bool>>,
    /// Heads of keys that share one.
    shared: usize,
    /// Query heads that share a head of keys.
    group: usize,
}

impl Seen {
    /// Everything.
    pub(super) fn all(heads: usize, group: usize, keys: usize) -> Self {
        let keys = vec![SeenKeys::of_range(0..keys)];
        Self { keys, queries: vec![Vec::new()], shared: heads.max(1), group }
    }

    /// What positions and a mask say of `[B, H, M, N]` scores, where `group` query heads share a head of
    /// keys.
    pub(super) fn of(
        visible: &Visible,
        mask: Option<&MaskView<'_>>,
        [b, h, m, n]: [usize; 4],
        group: usize,
    ) -> Self {
        let key_heads = h.checked_div(group).unwrap_or(0);
        if mask.is_none() && visible.is_everything() {
            return Self::all(b * key_heads, group, n);
        }
        let apart = mask.is_some_and(MaskView::tells_heads_apart);
        let shared = if apart { 1 } else { key_heads };
        let (mut keys, mut queries) = (Vec::new(), Vec::new());
        for part in 0..if apart { b * key_heads } else { b } {
            let (batch, heads) = match apart {
                true => {
                    (part / key_heads, part % key_heads * group..(part % key_heads + 1) * group)
                }
                false => (part, 0..1),
            };
            let (seen, asking) = match mask {
                None => by_position(visible, batch, m),
                Some(mask) => by_mask(visible, mask, (batch, heads), (m, n)),
            };
            keys.push(seen);
            queries.push(if asking.iter().all(|&sees| sees) { Vec::new() } else { asking });
        }
        Self { keys, queries, shared: shared.max(1), group }
    }

    /// The keys of a head, counted over the batch.
    pub(super) fn keys(&self, head: usize) -> &SeenKeys {
        &self.keys[head / self.shared]
    }

    /// How many of the queries of the query heads that share a head of keys see a key.
    pub(super) fn asking(&self, head: usize, queries: usize) -> usize {
        let part = &self.queries[head / self.shared];
        let of_one = if part.is_empty() { queries } else { part.iter().filter(|x| **x).count() };
        of_one * self.group
    }

    /// Whether all queries of a query head, counted over the batch, see a key.
    pub(super) fn all_ask(&self, head: usize) -> bool {
        self.queries[head / self.group.max(1) / self.shared].is_empty()
    }

    /// Whether a query of a query head, counted over the batch, sees a key.
    pub(super) fn asks(&self, head: usize, query: usize) -> bool {
        let part = &self.queries[head / self.group.max(1) / self.shared];
        part.is_empty() || part[query]
    }
}

/// Ranges of neighbouring queries overlap or touch, so their union is a range.
fn by_position(visible: &Visible, batch: usize, queries: usize) -> (SeenKeys, Vec<bool>) {
    let mut union = None::<Range<usize>>;
    let mut asking = Vec::with_capacity(queries);
    for query in 0..queries {
        let range = visible.range(batch, query);
        asking.push(!range.is_empty());
        if !range.is_empty() {
            let all = union.get_or_insert(range.clone());
            *all = all.start.min(range.start)..all.end.max(range.end);
        }
    }
    (SeenKeys::of_range(union.unwrap_or(0..0)), asking)
}

fn by_mask(
    visible: &Visible,
    mask: &MaskView<'_>,
    (batch, heads): (usize, Range<usize>),
    (queries, keys): (usize, usize),
) -> (SeenKeys, Vec<bool>) {
    let mut marks = vec![0u8; keys];
    let mut asking = vec![false; queries];
    // Where all queries see the same, one says it.
    let same = mask.is_one_for_all_queries() && visible.is_one_for_all_queries(batch, queries);
    for head in heads {
        let one_or_all = if same { queries.min(1) } else { queries };
        for (query, asks) in asking.iter_mut().enumerate().take(one_or_all) {
            let range = visible.range(batch, query);
            *asks |= mask.mark([batch, head, query], range.clone(), &mut marks[range]);
        }
    }
    if same && let Some(&sees) = asking.first() {
        asking.fill(sees);
    }
    (SeenKeys::of_marks(&marks), asking)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_and_keys_of_runs() {
        let seen = SeenKeys::of_marks(&[1, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0]);
        assert_eq!(seen.len(), 7);
        assert_eq!(seen.places(0..11), 0..7);
        assert_eq!(seen.places(3..5), 3..3);
        assert_eq!(seen.places(4..9), 3..6);
        assert_eq!(seen.places(10..11), 7..7);
        let runs = |places| seen.runs(places).collect::<Vec<_>>();
        assert_eq!(runs(0..7), [(0, 0..3), (3, 5..8), (6, 9..10)]);
        assert_eq!(runs(2..5), [(0, 2..3), (1, 5..7)]);
        assert_eq!(runs(6..7), [(0, 9..10)]);
        assert_eq!(runs(3..3), []);
        assert_eq!(SeenKeys::of_marks(&[0, 0]).len(), 0);
        assert_eq!(SeenKeys::of_marks(&[0, 0]).places(0..2), 0..0);
        assert_eq!(SeenKeys::of_range(2..5).places(0..9), 0..3);
    }
}
