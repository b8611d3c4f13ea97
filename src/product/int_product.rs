//! The plain triple loop: what the product is, whatever the kernels do.

/// `sum_d (lhs[m, d] - lhs_zero(m)) * (rhs[n, d] - rhs_zero(n))` for all `m`, `n`, row-major, in
/// i64 so that nothing can overflow on the way. `lhs` and `rhs` are row-major with `depth` columns.
pub fn int_product(
    lhs: &[i16],
    rhs: &[i8],
    depth: usize,
    rows: (usize, usize),
    lhs_zero: impl Fn(usize) -> i32,
    rhs_zero: impl Fn(usize) -> i32,
) -> Vec<i64> {
    let (m, n) = rows;
    let mut out = Vec::with_capacity(m * n);
    for i in 0..m {
        for j in 0..n {
            let mut sum = 0i64;
            for d in 0..depth {
                let a = i64::from(lhs[i * depth + d]) - i64::from(lhs_zero(i));
                let b = i64::from(rhs[j * depth + d]) - i64::from(rhs_zero(j));
                sum += a * b;
            }
            out.push(sum);
        }
    }
    out
}
