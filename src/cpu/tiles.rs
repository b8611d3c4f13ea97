//! What repeats between leaves, written once: choosing the function for a number of rows and vectors,
//! for the int8 product the loop over rows and the epilogue, and the products of f32 and of int16 but for their
//! instructions.

/// `for_rows!(rows, f, (arguments))` calls `f::<rows>(arguments)`, for tiles of up to six rows, and
/// `for_rows!(rows, f, (arguments), n)` calls `f::<rows, n>(arguments)`.
macro_rules! for_rows {
    ($rows:expr, $f:ident, $arguments:tt $(, $n:expr)?) => {
        match $rows {
            1 => $f::<1 $(, { $n })?> $arguments,
            2 => $f::<2 $(, { $n })?> $arguments,
            3 => $f::<3 $(, { $n })?> $arguments,
            4 => $f::<4 $(, { $n })?> $arguments,
            5 => $f::<5 $(, { $n })?> $arguments,
            _ => $f::<6 $(, { $n })?> $arguments,
        }
    };
}

/// `for_row_pairs!(rows, f, (arguments))` calls `f::<pairs>(arguments)`, the last pair of an odd
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
/// for up to `MR` rows, which adds the products to what `start` of the same signature gives: the columns'
/// starts, and zero points by an expression that adds to sums `sum` the products of pairs of i16 `x` and `y`.
/// `features` are what all enable; the intrinsics are those of a register of i32, and of f32.
macro_rules! int8_tiles {
    (
        features: $features:literal,
        integers: $register:ty, $load_integers:ident, $splat_integers:ident, $store_integers:ident,
        pairs: |$sum:ident, $x:ident, $y:ident| $add_pairs:expr,
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

        /// # Safety
        /// As for [`Int8Product::tile`].
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn start<const ROWS: usize>(input: TileInput) -> [[$register; VECTORS]; ROWS] {
            let mut init = [$splat_integers(0); VECTORS];
            for (v, init) in init.iter_mut().enumerate() {
                // SAFETY: a start for every column of a tile by contract.
                *init = unsafe { $load_integers(input.init.add(v * LANES).cast()) };
            }
            let mut sums = [init; ROWS];
            for group in 0..input.zero_groups {
                // SAFETY: a pair of each group for every column by contract.
                let columns = unsafe { input.column_zeros.add(group * NR).cast::<i32>() };
                for (row, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: a pair of each group for every row by contract, of 4 bytes.
                    let $x = unsafe {
                        let pair = input.row_zeros.add(row * input.zero_groups + group);
                        $splat_integers(pair.cast::<i32>().read_unaligned())
                    };
                    for (v, sum) in sums.iter_mut().enumerate() {
                        // SAFETY: as above.
                        let $y = unsafe { $load_integers(columns.add(v * LANES).cast()) };
                        let $sum = *sum;
                        *sum = $add_pairs;
                    }
                }
            }
            sums
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
                        let bias = $splat(*scores.row_biases.add(row));
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

/// `for_tile!(tile, f, arguments ..)` calls `f::<rows, vectors>(tile, arguments ..)`, for tiles of up to 6 x 4.
#[cfg(target_arch = "x86_64")]
macro_rules! for_tile {
    ($tile:expr, $f:ident $(, $argument:expr)*) => {
        match $tile.rows {
            1 => for_tile!(@vectors 1, $tile, $f, ($tile $(, $argument)*)),
            2 => for_tile!(@vectors 2, $tile, $f, ($tile $(, $argument)*)),
            3 => for_tile!(@vectors 3, $tile, $f, ($tile $(, $argument)*)),
            4 => for_tile!(@vectors 4, $tile, $f, ($tile $(, $argument)*)),
            5 => for_tile!(@vectors 5, $tile, $f, ($tile $(, $argument)*)),
            _ => for_tile!(@vectors 6, $tile, $f, ($tile $(, $argument)*)),
        }
    };
    (@vectors $rows:literal, $tile:expr, $f:ident, $arguments:tt) => {
        match $tile.vectors {
            1 => $f::<$rows, 1> $arguments,
            2 => $f::<$rows, 2> $arguments,
            3 => $f::<$rows, 3> $arguments,
            _ => $f::<$rows, 4> $arguments,
        }
    };
}

/// The int16 product of a register of i32 as `PANELS`, from an expression that adds to sums `sum` the products of
/// pairs `x` and `y`. A panel is taken 16 columns at a time, which are several registers, and up to `rows` rows.
#[cfg(target_arch = "x86_64")]
macro_rules! int16_panels {
    (
        name: $name:expr,
        features: $features:literal,
        rows: $rows:expr,
        integers: $register:ty, $load_integers:ident, $splat_integers:ident,
        pairs: |$sum:ident, $x:ident, $y:ident| $add:expr,
        convert: $convert:ident,
        floats: $load:ident, $splat:ident, $mul:ident, $add_floats:ident, $store:ident $(,)?
    ) => {
        pub(crate) const PANELS: crate::cpu::contracts::PanelProduct =
            crate::cpu::contracts::PanelProduct {
                name: $name,
                format: crate::cpu::contracts::Format::Int16,
                group: 2,
                vectors: crate::cpu::contracts::VECTORS,
                bias: 0,
                multiply,
            };

        /// Lanes of a register, and registers of 16 columns.
        const WIDTH: usize = size_of::<$register>() / size_of::<i32>();
        const REGISTERS: usize = crate::cpu::contracts::LANES / WIDTH;

        #[target_feature(enable = $features)]
        unsafe fn multiply(panel: crate::cpu::contracts::Panel) {
            // All rows with one run of the matrix, which stays in L1, before the next.
            for (run, groups) in panel.runs(2) {
                for part in panel.parts(1, 4) {
                    for tile in part.tiles($rows) {
                        // SAFETY: the instructions are there and the pointers are valid, by contract.
                        unsafe { for_rows!(tile.rows, add, (tile, run, groups.clone())) }
                    }
                }
            }
        }

        /// Adds one run to 16 columns of `R` rows.
        ///
        /// # Safety
        /// That of the contract, with `R` rows and one vector, and the run is there with its groups.
        #[target_feature(enable = $features)]
        unsafe fn add<const R: usize>(
            tile: crate::cpu::contracts::Panel,
            run: usize,
            groups: std::ops::Range<usize>,
        ) {
            let mut sums = [[$splat_integers(0); REGISTERS]; R];
            for group in groups {
                let mut matrix = [$splat_integers(0); REGISTERS];
                for (i, matrix) in matrix.iter_mut().enumerate() {
                    // SAFETY: the panel holds `groups` pairs of rows of a vector by contract.
                    *matrix = unsafe { $load_integers(tile.group(group, 4 * i * WIDTH).cast()) };
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: `groups` pairs of elements in each of `R` rows by contract.
                    let $x = unsafe { tile.lhs_of::<i32>(row).add(group).read_unaligned() };
                    let $x = $splat_integers($x);
                    for (sum, $y) in sums.iter_mut().zip(matrix) {
                        let $sum = *sum;
                        *sum = $add;
                    }
                }
            }
            for (row, sums) in sums.into_iter().enumerate() {
                // SAFETY: a scale for every run of each of `R` rows by contract.
                let row_scale = $splat(unsafe { *tile.row_scale(row, run) });
                for (i, sum) in sums.into_iter().enumerate() {
                    // SAFETY: a vector of scales for every run, and of sums in each of `R` rows, by
                    // contract.
                    unsafe {
                        let column_scales = $load(tile.column_scale(i * WIDTH, run));
                        let sum = $mul($mul($convert(sum), row_scale), column_scales);
                        let out = tile.sums_of(row, i * WIDTH);
                        $store(out, $add_floats($load(out), sum));
                    }
                }
            }
        }
    };
}

/// The function `multiply` of a matrix of int8 as it is stored, whose left side is int16: from a register of i32, and
/// from expressions that load `WIDTH` columns of two rows `a` and `b` as pairs of i16, and that add to sums `sum` the
/// products of pairs `x` and `y`. `tile` calls `add_run::<rows, registers>(tile, run, keys)`, with up to `vectors`
/// vectors of columns at a time.
#[cfg(target_arch = "x86_64")]
macro_rules! stored_int8 {
    (
        features: $features:literal,
        vectors: $vectors:expr,
        tile: |$tile:ident, $run:ident, $keys:ident| $for_tile:expr,
        integers: $register:ty, $zero:expr, $splat_integers:ident,
        load: |$a:ident, $b:ident| $load:expr,
        pairs: |$sum:ident, $x:ident, $y:ident| $add:expr,
        convert: $convert:ident,
        floats: $load_floats:ident, $splat:ident, $mul:ident, $add_floats:ident, $store:ident $(,)?
    ) => {
        /// Columns of a register.
        const WIDTH: usize = size_of::<$register>() / size_of::<i32>();

        #[target_feature(enable = $features)]
        pub(super) unsafe fn multiply(panel: crate::cpu::contracts::Panel) {
            for part in panel.parts($vectors, 1) {
                for ($run, $keys) in part.runs(1) {
                    for $tile in part.tiles(crate::cpu::contracts::panel_product::ROWS) {
                        // SAFETY: the instructions are there and the pointers are valid, by contract.
                        unsafe { $for_tile }
                    }
                }
            }
        }

        /// Adds one run of keys to `N` registers of columns of `R` rows.
        ///
        /// # Safety
        /// That of the contract, with `R` rows and as many columns, and the run is there with its keys.
        #[target_feature(enable = $features)]
        unsafe fn add_run<const R: usize, const N: usize>(
            tile: crate::cpu::contracts::Panel,
            run: usize,
            keys: std::ops::Range<usize>,
        ) {
            let mut sums = [[$zero; N]; R];
            for key in keys.clone().step_by(2) {
                // The last of an odd number goes with itself, times the zero that fills up the left side.
                let next = (key + 1).min(keys.end - 1);
                prefetch(tile.group(key + AHEAD, 0));
                prefetch(tile.group(key + 1 + AHEAD, 0));
                let mut matrix = [$zero; N];
                for (i, matrix) in matrix.iter_mut().enumerate() {
                    let ($a, $b) = (tile.group(key, i * WIDTH), tile.group(next, i * WIDTH));
                    // SAFETY: `N` registers of columns in each row of the matrix by contract.
                    *matrix = unsafe { $load };
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: whole groups of elements in each of `R` rows by contract.
                    let $x = unsafe { tile.lhs_of::<i32>(row).add(key / 2).read_unaligned() };
                    let $x = $splat_integers($x);
                    for (sum, $y) in sums.iter_mut().zip(matrix) {
                        let $sum = *sum;
                        *sum = $add;
                    }
                }
            }
            for (row, sums) in sums.into_iter().enumerate() {
                // SAFETY: a scale for every run of each of `R` rows by contract.
                let scale = $splat(unsafe { *tile.row_scale(row, run) });
                for (i, sum) in sums.into_iter().enumerate() {
                    let out = tile.sums_of(row, i * WIDTH);
                    // SAFETY: `N` registers of sums in each of `R` rows by contract.
                    unsafe {
                        let sum = $mul($convert(sum), scale);
                        $store(out, $add_floats($load_floats(out), sum));
                    }
                }
            }
        }
    };
}

/// The products of rows in f32 as `PANELS` and `STORED`, with up to `vectors` vectors of columns at a time: `tile`
/// calls `multiply_tile::<rows, registers>(tile)`.
///
/// Each form of a matrix is a module with its bytes an element, how many of its rows are asked for ahead of their
/// use (0 for a matrix that a cache holds), the function that adds products `f(x, y, sum)` up, and an expression that loads a register of it: a target feature is an attribute of a function, so the load
/// stands in the function that enables it.
macro_rules! float_panels {
    (
        name: $name:expr,
        features: $features:literal,
        vectors: $vectors:expr,
        tile: |$tile:ident| $for_tile:expr,
        floats: $register:ty, $zero:expr, |$x:ident| $splat:expr, $load_sums:ident, $add_sums:ident, $store:ident,
        stored_int8: $stored_int8:path,
        $($form:ident: $size:literal, $ahead:expr, $add:ident, |$from:ident| $load:expr;)*
    ) => {
        pub(crate) const PANELS: crate::cpu::contracts::PanelProduct =
            crate::cpu::contracts::PanelProduct {
                name: $name,
                format: crate::cpu::contracts::Format::F32,
                group: 1,
                vectors: $vectors,
                bias: 0,
                multiply: packed::multiply,
            };

        pub(crate) const STORED: crate::cpu::contracts::StoredProduct =
            crate::cpu::contracts::StoredProduct {
                name: $name,
                f32: f32::multiply,
                f16: f16::multiply,
                bf16: bf16::multiply,
                int8: $stored_int8,
            };

        /// Lanes of a register.
        const WIDTH: usize = size_of::<$register>() / size_of::<f32>();

        $(
            mod $form {
                use super::*;
                use crate::cpu::contracts::Panel;
                use crate::cpu::contracts::panel_product::{ROWS};
                use crate::memory::{LINE, prefetch};

                #[target_feature(enable = $features)]
                pub(super) unsafe fn multiply(panel: Panel) {
                    for part in panel.parts($vectors, $size) {
                        for $tile in part.tiles(ROWS) {
                            // SAFETY: a part of what is valid by contract.
                            unsafe { $for_tile }
                        }
                    }
                }

                /// `N` registers of columns of `R` rows.
                ///
                /// # Safety
                /// That of the contract, with `R` rows and as many columns.
                #[target_feature(enable = $features)]
                unsafe fn multiply_tile<const R: usize, const N: usize>(tile: Panel) {
                    let mut sums = [[$zero; N]; R];
                    for k in 0..tile.groups {
                        if $ahead > 0 {
                            for line in (0..N * WIDTH * $size).step_by(LINE) {
                                prefetch(tile.group(k + $ahead, line));
                            }
                        }
                        let mut matrix = [$zero; N];
                        for (i, matrix) in matrix.iter_mut().enumerate() {
                            let $from = tile.group(k, i * WIDTH * $size);
                            // SAFETY: `N` registers in each of `groups` rows of the matrix by contract.
                            *matrix = unsafe { $load };
                        }
                        for (row, sums) in sums.iter_mut().enumerate() {
                            // SAFETY: `groups` elements in each of `R` rows by contract.
                            let $x = unsafe { *tile.lhs_of::<f32>(row).add(k) };
                            let x = $splat;
                            for (sum, matrix) in sums.iter_mut().zip(matrix) {
                                *sum = $add(x, matrix, *sum);
                            }
                        }
                    }
                    for (row, sums) in sums.into_iter().enumerate() {
                        for (i, sum) in sums.into_iter().enumerate() {
                            // SAFETY: `N` registers of sums in each of `R` rows by contract.
                            unsafe {
                                let start = tile.start_of(row, i * WIDTH);
                                let sum = match start.is_null() {
                                    true => sum,
                                    false => $add_sums($load_sums(start), sum),
                                };
                                $store(tile.sums_of(row, i * WIDTH), sum);
                            }
                        }
                    }
                }
            }
        )*
    };
}
