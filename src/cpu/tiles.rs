//! What repeats between leaves, written once: choosing the function for a number of rows and vectors,
//! and for the int8 product the loop over rows and the epilogue.

/// `for_rows!(rows, f, (arguments))` calls `f::<rows>(arguments)`, for tiles of up to six rows.
macro_rules! for_rows {
    ($rows:expr, $f:ident, $arguments:tt) => {
        match $rows {
            1 => $f::<1> $arguments,
            2 => $f::<2> $arguments,
            3 => $f::<3> $arguments,
            4 => $f::<4> $arguments,
            5 => $f::<5> $arguments,
            _ => $f::<6> $arguments,
        }
    };
}

/// `for_row_pairs!(rows, most, f, (arguments))` calls `f::<pairs>(arguments)`, the last pair of an odd
/// number of rows included.
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
macro_rules! for_row_pairs {
    ($rows:expr, $f:ident, $arguments:tt) => {
        match $rows.div_ceil(2) {
            1 => $f::<1> $arguments,
            2 => $f::<2> $arguments,
            3 => $f::<3> $arguments,
            _ => $f::<4> $arguments,
        }
    };
}

/// The functions `tile` and `scores` of an [`Int8Product`](super::contracts::Int8Product) whose
/// registers hold one row of neighbouring columns each, from a function in scope
///
/// ```text
/// unsafe fn sums<const ROWS: usize>(input: TileInput) -> [[integers; VECTORS]; ROWS]
/// ```
///
/// for up to `MR` rows. `features` are what both enable; the intrinsics are those of a register of f32.
macro_rules! int8_tiles {
    (
        features: $features:literal,
        store: $store_integers:ident,
        convert: $convert:ident,
        floats: $load:ident, $splat:ident, $mul:ident, $add:ident, $store:ident $(,)?
    ) => {
        #[target_feature(enable = $features)]
        unsafe fn tile(input: TileInput, out: *mut i32, stride: usize) {
            // SAFETY: by contract.
            unsafe { for_rows!(input.rows, store_sums, (input, out, stride)) }
        }

        #[target_feature(enable = $features)]
        unsafe fn scores(input: TileInput, scores: ScoreTile) {
            for row in (0..input.rows).step_by(MR) {
                // SAFETY: rows that are there, by contract.
                unsafe {
                    let (input, scores) = (input.rows_from(row, MR), scores.rows_from(row));
                    for_rows!(input.rows, store_scores, (input, scores));
                }
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn store_sums<const ROWS: usize>(input: TileInput, out: *mut i32, stride: usize) {
            // SAFETY: by contract.
            let sums = unsafe { sums::<ROWS>(input) };
            for (row, sums) in sums.into_iter().enumerate() {
                for (v, sum) in sums.into_iter().enumerate() {
                    // SAFETY: row `row` of the output is valid for a tile's columns by contract.
                    unsafe { $store_integers(out.add(row * stride + v * LANES).cast(), sum) };
                }
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn store_scores<const ROWS: usize>(input: TileInput, scores: ScoreTile) {
            // SAFETY: by contract.
            let sums = unsafe { sums::<ROWS>(input) };
            for v in 0..VECTORS {
                // SAFETY: scales and biases of a tile's columns by contract.
                let (column_scale, column_bias) = unsafe {
                    (
                        $load(scores.column_scales.add(v * LANES)),
                        $load(scores.column_biases.add(v * LANES)),
                    )
                };
                for (row, sums) in sums.iter().enumerate() {
                    // SAFETY: `rows` scales and biases, and the columns of row `row`, by contract.
                    unsafe {
                        let scale = $splat(*scores.row_scales.add(row));
                        let bias = $splat(*scores.row_biases.add(row * scores.bias_stride));
                        // Products and sums apart: see `ScoreTile` on why none may be fused.
                        let x = $mul($mul($convert(sums[v]), scale), column_scale);
                        let x = $add($add(x, column_bias), bias);
                        $store(scores.out.add(row * scores.stride + v * LANES), x);
                    }
                }
            }
        }
    };
}

/// `for_tile!(tile, f)` calls `f::<rows, vectors>(tile)`, for tiles of up to 6 x 4.
#[cfg(target_arch = "x86_64")]
macro_rules! for_tile {
    ($tile:expr, $f:ident) => {
        match $tile.rows {
            1 => for_tile!(@vectors 1, $tile, $f),
            2 => for_tile!(@vectors 2, $tile, $f),
            3 => for_tile!(@vectors 3, $tile, $f),
            4 => for_tile!(@vectors 4, $tile, $f),
            5 => for_tile!(@vectors 5, $tile, $f),
            _ => for_tile!(@vectors 6, $tile, $f),
        }
    };
    (@vectors $rows:literal, $tile:expr, $f:ident) => {
        match $tile.vectors {
            1 => $f::<$rows, 1>($tile),
            2 => $f::<$rows, 2>($tile),
            3 => $f::<$rows, 3>($tile),
            _ => $f::<$rows, 4>($tile),
        }
    };
}
