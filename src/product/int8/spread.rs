//! Rows of codes in the order of panels.
//!
//! ```text
//! [rows][D / group][group]  ->  [rows / panel][D / group][panel][group]
//! ```
//!
//! Where it can, it takes 16 rows with as many groups at a time, which change places by shuffles of whole
//! vectors; one group after the other takes four times as long.

use crate::cpu::plain::widest;

/// Rows, from one on, and the panel of that one, with those behind it.
pub(super) struct Spread<'a> {
    /// Row-major, whole rows of `depth`.
    pub codes: &'a [i8],
    pub depth: usize,
    /// The first row.
    pub first: usize,
    /// Rows of a panel.
    pub panel: usize,
    pub out: &'a mut [u8],
}

/// Puts rows in order, `group` elements at a time. Padding at the end of the depth stays as it is.
pub(super) fn spread(group: usize, job: Spread<'_>) {
    match group {
        2 => widest!(spread_groups::<2>, job, Spread<'_> => ()),
        4 => widest!(spread_groups::<4>, job, Spread<'_> => ()),
        8 => widest!(spread_groups::<8>, job, Spread<'_> => ()),
        _ => unreachable!("no kernel sums {group} elements a step"),
    }
}

#[inline(always)]
fn spread_groups<const GROUP: usize>(job: Spread<'_>) {
    let Spread { codes, depth, first, panel, out } = job;
    if depth == 0 {
        return;
    }
    let (codes, out) = (as_bytes(codes), out.as_chunks_mut().0);
    let groups = depth.div_ceil(GROUP);
    let place = |row: usize| row / panel * groups * panel + row % panel;
    let whole = panel.is_multiple_of(BLOCK) && first.is_multiple_of(BLOCK);
    let in_blocks = match whole && depth.is_multiple_of(GROUP) {
        true => codes.len() / depth / BLOCK * BLOCK,
        false => 0,
    };
    let (blocks, rows) = codes.split_at(in_blocks * depth);
    for (row, rows) in (first..).step_by(BLOCK).zip(blocks.chunks_exact(BLOCK * depth)) {
        spread_block::<GROUP>(rows, depth, panel, &mut out[place(row)..]);
    }
    for (row, codes) in (first + in_blocks..).zip(rows.chunks_exact(depth)) {
        spread_row::<GROUP>(codes, panel, &mut out[place(row)..]);
    }
}

/// One group every `panel` groups.
#[inline(always)]
fn spread_row<const GROUP: usize>(codes: &[u8], panel: usize, out: &mut [[u8; GROUP]]) {
    let (whole, tail) = codes.as_chunks();
    let mut places = out.iter_mut().step_by(panel);
    whole.iter().zip(&mut places).for_each(|(group, place)| *place = *group);
    if let (false, Some(place)) = (tail.is_empty(), places.next()) {
        place[..tail.len()].copy_from_slice(tail);
    }
}

/// Rows and groups of a block.
const BLOCK: usize = 16;

/// Aligned, so that no vector of it lies in two cache lines.
#[repr(align(64))]
struct Block<const GROUP: usize>([[[u8; GROUP]; BLOCK]; BLOCK]);

/// As many rows as a block has.
#[inline(always)]
fn spread_block<const GROUP: usize>(
    rows: &[u8],
    depth: usize,
    panel: usize,
    out: &mut [[u8; GROUP]],
) {
    let nothing = || Block([[[0; GROUP]; BLOCK]; BLOCK]);
    let (mut block, mut other) = (nothing(), nothing());
    for start in (0..depth / GROUP).step_by(BLOCK) {
        let found = start..(depth / GROUP).min(start + BLOCK);
        for (to, row) in block.0.iter_mut().zip(rows.chunks_exact(depth)) {
            let row = &row.as_chunks().0[found.clone()];
            // A copy of a length that is known is one instruction.
            match row.try_into() {
                Ok(row) => *to = row,
                Err(_) => to[..row.len()].copy_from_slice(row),
            }
        }
        // Twice is the transpose.
        shuffle(&block, &mut other);
        shuffle(&other, &mut block);
        let groups = block.0[..found.len()].iter();
        for (group, out) in groups.zip(out[start * panel..].chunks_mut(panel)) {
            out[..BLOCK].copy_from_slice(group);
        }
    }
}

/// Rows `i`, `i + 4`, `i + 8` and `i + 12`, a group of each in turns, become rows `4 i` to `4 i + 3`.
#[inline(always)]
fn shuffle<const GROUP: usize>(Block(from): &Block<GROUP>, Block(to): &mut Block<GROUP>) {
    for (i, to) in to.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        for (quarter, to) in to.iter_mut().enumerate() {
            for (lane, to) in to.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let at = 4 * quarter + lane;
                *to = [from[i][at], from[i + 4][at], from[i + 8][at], from[i + 12][at]];
            }
        }
    }
}

fn as_bytes(codes: &[i8]) -> &[u8] {
    // SAFETY: as many bytes, each of which is a u8.
    unsafe { std::slice::from_raw_parts(codes.as_ptr().cast(), codes.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_in_its_place() {
        for (group, panel) in [(2, 8), (2, 16), (4, 6), (4, 16), (4, 64), (8, 8)] {
            for depth in [1usize, 2, 7, 8, 24, 32, 63, 64, 80, 96, 128, 200] {
                for (first, rows) in [(0, 1), (0, 64), (0, 83), (16, 33), (panel, 40)] {
                    let codes: Vec<i8> = (0..rows * depth).map(|i| (i * 89 % 251) as i8).collect();
                    let groups = depth.div_ceil(group);
                    let size = (first + rows).next_multiple_of(panel) * groups * group;
                    let mut out = vec![0x55; size];
                    spread(group, Spread { codes: &codes, depth, first, panel, out: &mut out });
                    let mut expected = vec![0x55; size];
                    for (i, &code) in codes.iter().enumerate() {
                        let (row, at) = (first + i / depth, i % depth);
                        let place = (row / panel * groups + at / group) * panel + row % panel;
                        expected[place * group + at % group] = code as u8;
                    }
                    assert!(out == expected, "{group} {panel} {depth} {first} {rows}");
                }
            }
        }
    }
}
