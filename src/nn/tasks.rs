//! How the product of a linear layer is divided among threads.

use super::product::ROWS;
use rayon::prelude::*;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Rows of a task, at most: a panel of weights, in L2 by then, is used by eight tiles.
pub(super) const BLOCK: usize = 8 * ROWS;
/// Tasks a thread, so that threads end at about the same time.
const TASKS_PER_THREAD: usize = 16;
/// Below this many multiplications, waking another thread costs more than it saves.
const SERIAL_BELOW: usize = 1 << 20;
/// Multiply-accumulates of a task, at least: some 10 microseconds.
const TASK: usize = 1 << 19;

/// A product `[rows, depth] x [depth, outputs]`.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub rows: usize,
    pub outputs: usize,
    pub depth: usize,
}

/// Runs tasks that cover all of `out`, row-major `[rows, outputs]`, in whole panels of `panel`
/// outputs; little work in this thread alone. `run` gets a buffer that is its thread's own.
pub(super) fn in_tasks<B: Default>(
    shape: Shape,
    panel: usize,
    out: &mut [MaybeUninit<f32>],
    run: impl Fn(&mut B, Task<'_>) + Send + Sync,
) {
    let Shape { rows, outputs, depth } = shape;
    assert_eq!(out.len(), rows * outputs);
    if out.is_empty() {
        return;
    }
    let work = rows.saturating_mul(outputs).saturating_mul(depth);
    if work < SERIAL_BELOW {
        let mut buffer = B::default();
        let grid = Grid { rows: BLOCK, columns: outputs };
        grid.tasks(out, outputs).into_iter().for_each(|task| run(&mut buffer, task));
    } else {
        let tasks = Grid::new((rows, outputs), panel, work).tasks(out, outputs);
        tasks.into_par_iter().with_max_len(1).for_each_init(B::default, run);
    }
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
    fn new((rows, outputs): (usize, usize), width: usize, work: usize) -> Self {
        let wanted = (TASKS_PER_THREAD * rayon::current_num_threads()).min(work.div_ceil(TASK));
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
