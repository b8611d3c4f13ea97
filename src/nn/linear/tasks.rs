//! How the product of a linear layer is divided among threads.

use crate::cpu::contracts::panel_product::ROWS;
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
    /// Blocks of whole tiles and whole panels of `width` outputs: rows first, columns only as far as there
    /// are parts wanted. Of few rows, threads share the outputs, and read each weight once.
    pub(super) fn new((rows, outputs): (usize, usize), width: usize, wanted: usize) -> Self {
        let row_blocks = rows.div_ceil(BLOCK);
        let panels = outputs.div_ceil(width);
        // Whole rows are quantized and normalized in one go; a quarter of the parts is enough of them.
        let column_blocks = match 4 * row_blocks >= wanted {
            true => 1,
            false => wanted.div_ceil(row_blocks).clamp(1, panels),
        };
        Self {
            rows: rows.div_ceil(row_blocks).next_multiple_of(ROWS),
            columns: panels.div_ceil(column_blocks) * width,
        }
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
