//! As many elements as the widest vector holds, as plain loops take them.

/// Elements that a loop takes at a time: enough for the widest vectors.
pub(crate) const LANES: usize = 16;

/// `[f(0), f(1), ..]`. The standard library's `array::map` and `array::from_fn` are not always
/// inlined into a body, and are then compiled for the baseline.
#[inline(always)]
pub(crate) fn each_lane<T: Copy + Default>(f: impl Fn(usize) -> T) -> [T; LANES] {
    let mut lanes = [T::default(); LANES];
    for (i, lane) in lanes.iter_mut().enumerate() {
        *lane = f(i);
    }
    lanes
}

/// The lanes of a row from `start` on, filled up with zeros.
#[inline(always)]
pub(crate) fn lanes(row: &[f32], start: usize) -> [f32; LANES] {
    match row[start..].first_chunk() {
        Some(lanes) => *lanes,
        None => {
            let mut lanes = [0.0; LANES];
            lanes[..row.len() - start].copy_from_slice(&row[start..]);
            lanes
        }
    }
}

/// All lanes in one: within quarters of four first, then over the quarters, which is the order of
/// shuffles that folds 16 vectors at once. One after the other they would wait for each other 15 times,
/// which in a short row costs more than the row.
///
/// LLVM must not see where the lanes come from: it would move those of every vector of the loop before to where
/// this order wants them, in several times the time.
#[inline(always)]
pub(crate) fn fold_lanes(lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let lanes = std::hint::black_box(lanes);
    let mut quarters = [0.0; LANES / 4];
    for (quarter, lanes) in quarters.iter_mut().zip(lanes.as_chunks::<4>().0) {
        *quarter = f(f(lanes[0], lanes[2]), f(lanes[1], lanes[3]));
    }
    f(f(quarters[0], quarters[1]), f(quarters[2], quarters[3]))
}

/// The sum of all lanes.
#[inline(always)]
pub(crate) fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    fold_lanes(lanes, |a, b| a + b)
}
