//! How the product of a linear layer is divided among threads.

use super::weights::Weights;
use crate::cpu::contracts::panel_product::ROWS;
use std::cmp::Reverse;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Rows of a task, at most: a panel of weights, in L2 by then, is used by eight tiles.
pub(super) const BLOCK: usize = 8 * ROWS;

/// How a result is divided: the largest block of it that is one task.
pub(super) struct Grid {
    rows: usize,
    columns: usize,
}

/// A block of the result, which the task has to write.
pub(super) struct Task<'a> {
    /// The number of its block of rows.
    pub block: usize,
    pub rows: Range<usize>,
    pub columns: Range<usize>,
    /// Columns `columns` of each row.
    pub out: Vec<&'a mut [MaybeUninit<f32>]>,
}

impl Grid {
    /// Blocks of rows with all outputs, as many for each thread, where there are rows for that: such rows are
    /// quantized, multiplied and normalized in one go, and stay with their thread, which counts for more where threads
    /// share no L3. Of few rows, threads share the outputs, whole panels, and read each weight once; tasks are then
    /// about as many as are `wanted`.
    pub(super) fn new(rows: usize, weights: &Weights, wanted: usize) -> Self {
        let (outputs, width) = (weights.outputs(), weights.panel_width());
        let (row_blocks, panels) = (rows.div_ceil(BLOCK), outputs.div_ceil(width));
        let threads = wanted.min(rayon::current_num_threads());
        let whole_tiles = rows.div_ceil(row_blocks).next_multiple_of(ROWS);
        // Of many blocks, one thread may have one more than another.
        if threads == 1 || row_blocks >= 4 * threads {
            return Self { rows: whole_tiles, columns: panels * width };
        }
        let even = row_blocks.next_multiple_of(threads);
        if rows >= even * weights.fewest_rows() {
            return Self { rows: rows.div_ceil(even), columns: panels * width };
        }
        let panels = panels_each((row_blocks, panels), wanted, threads);
        Self { rows: whole_tiles, columns: panels * width }
    }

    /// Whether a task has all `outputs` of its rows.
    pub(super) fn has_whole_rows(&self, outputs: usize) -> bool {
        self.columns >= outputs
    }

    /// The rows of each block.
    pub(super) fn row_blocks(&self, rows: usize) -> Vec<Range<usize>> {
        (0..rows).step_by(self.rows).map(|start| start..(start + self.rows).min(rows)).collect()
    }

    /// The tasks that cover all of `out`, row-major `[rows, outputs]`.
    pub(super) fn tasks<'a>(
        &self,
        out: &'a mut [MaybeUninit<f32>],
        outputs: usize,
    ) -> Vec<Task<'a>> {
        let mut tasks = Vec::new();
        for (block, out) in out.chunks_mut(self.rows * outputs).enumerate() {
            let first = tasks.len();
            let (start, len) = (block * self.rows, out.len() / outputs);
            for column in (0..outputs).step_by(self.columns) {
                let columns = column..(column + self.columns).min(outputs);
                let out = Vec::with_capacity(len);
                tasks.push(Task { block, rows: start..start + len, columns, out });
            }
            for row in out.chunks_exact_mut(outputs) {
                let parts = row.chunks_mut(self.columns);
                tasks[first..].iter_mut().zip(parts).for_each(|(task, part)| task.out.push(part));
            }
        }
        tasks
    }
}

/// How many panels a task has: so many that the thread which has the most of them ends first, and of those the
/// most, because a task costs something by itself. From half to twice as many tasks as are wanted.
fn panels_each((row_blocks, panels): (usize, usize), wanted: usize, threads: usize) -> usize {
    let all = row_blocks * panels;
    let range = (all / (2 * wanted)).max(1)..=all.div_ceil(wanted.div_ceil(2)).min(panels);
    let tasks = |each: usize| row_blocks * panels.div_ceil(each);
    let most = |each: usize| tasks(each).div_ceil(threads) * each;
    range.min_by_key(|&each| (most(each), Reverse(each))).unwrap_or(panels)
}

#[cfg(test)]
mod tests {
    use super::super::int8::Int8Weights;
    use super::*;
    use crate::cpu::runnable;

    #[test]
    fn threads_have_as_many_panels() {
        // Two tasks or six, but not three for two threads.
        let of = |wanted| panels_each((1, 6), wanted, 2);
        assert_eq!([2, 3, 4, 6, 12].map(of), [3, 3, 3, 1, 1]);
        assert_eq!(panels_each((1, 18), 11, 2), 3);
        assert_eq!(panels_each((3, 18), 29, 2), 3);
        assert_eq!(panels_each((1, 18), 11, 16), 2);
        // No more than there are, and no fewer.
        assert_eq!(panels_each((1, 3), 64, 16), 1);
        assert_eq!(panels_each((7, 3), 2, 2), 3);
    }

    /// Of each task its rows and columns.
    fn sizes(rows: usize, outputs: usize, wanted: usize, threads: usize) -> Vec<(usize, usize)> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let weights = Int8Weights::new(runnable()[0], &vec![1.0; outputs], (outputs, 1), None);
        let weights = Weights::Int8(weights.unwrap());
        let grid = pool.install(|| Grid::new(rows, &weights, wanted));
        let mut out = vec![MaybeUninit::uninit(); rows * outputs];
        let tasks = grid.tasks(&mut out, outputs);
        tasks.iter().map(|task| (task.rows.len(), task.columns.len())).collect()
    }

    #[test]
    fn rows_stay_with_their_thread_where_there_are_enough() {
        assert_eq!(sizes(32, 384, 12, 2), [(16, 384); 2]);
        assert_eq!(sizes(31, 384, 12, 2), [(31, 64); 6]);
        assert_eq!(sizes(50, 100, 12, 2), [(25, 100); 2]);
        assert_eq!(sizes(128, 384, 32, 2), [(32, 384); 4]);
        assert_eq!(sizes(1, 384, 12, 1), [(1, 384)]);
        // Little work is for one thread.
        assert_eq!(sizes(32, 384, 1, 8), [(32, 384)]);
        // Of many rows, whole tiles.
        assert!(sizes(1000, 64, 32, 2)[..20].iter().all(|&size| size == (48, 64)));
    }
}
