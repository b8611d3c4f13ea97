//! How the product of a linear layer is divided among threads.

use crate::cpu::contracts::panel_product::ROWS;
use crate::parallel::Work;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Rows of a task, at most: a panel of weights, in L2 by then, is used by eight tiles.
pub(super) const BLOCK: usize = 8 * ROWS;

/// Runs tasks that cover all of `out`, row-major `[rows, outputs]`, in whole panels of `panel`
/// outputs; little work in this thread alone. The shape is `[rows, depth] x [depth, outputs]`.
pub(super) fn in_tasks(
    (rows, outputs, depth): (usize, usize, usize),
    panel: usize,
    out: &mut [MaybeUninit<f32>],
    run: impl Fn(Task<'_>) + Send + Sync,
) {
    assert_eq!(out.len(), rows * outputs);
    if out.is_empty() {
        return;
    }
    let float_macs = rows.saturating_mul(outputs).saturating_mul(depth);
    let work = Work { float_macs, ..Work::default() };
    work.for_each(Grid::new((rows, outputs), panel, work.parts()).tasks(out, outputs), run);
}

/// How a result is divided: the largest block of it that is one task.
struct Grid {
    rows: usize,
    columns: usize,
}

/// A block of the result, which the task has to write.
pub(super) struct Task<'a> {
    pub rows: Range<usize>,
    pub columns: Range<usize>,
    /// Columns `columns` of each row.
    pub out: Vec<&'a mut [MaybeUninit<f32>]>,
}

impl Grid {
    /// Blocks of whole tiles and whole panels: rows first, columns only as far as every thread
    /// needs its share.
    fn new((rows, outputs): (usize, usize), width: usize, wanted: usize) -> Self {
        let row_blocks = rows.div_ceil(BLOCK);
        let panels = outputs.div_ceil(width);
        let column_blocks = wanted.div_ceil(row_blocks).clamp(1, panels);
        Self {
            rows: rows.div_ceil(row_blocks).next_multiple_of(ROWS),
            columns: panels.div_ceil(column_blocks) * width,
        }
    }

    fn tasks<'a>(&self, out: &'a mut [MaybeUninit<f32>], outputs: usize) -> Vec<Task<'a>> {
        let mut tasks = Vec::new();
        for (block, out) in out.chunks_mut(self.rows * outputs).enumerate() {
            let first = tasks.len();
            let (start, len) = (block * self.rows, out.len() / outputs);
            for column in (0..outputs).step_by(self.columns) {
                let columns = column..(column + self.columns).min(outputs);
                let out = Vec::with_capacity(len);
                tasks.push(Task { rows: start..start + len, columns, out });
            }
            for row in out.chunks_exact_mut(outputs) {
                let parts = row.chunks_mut(self.columns);
                tasks[first..].iter_mut().zip(parts).for_each(|(task, part)| task.out.push(part));
            }
        }
        tasks
    }
}
