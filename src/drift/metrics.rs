//! The metrics, one pure function each.
//!
//! In the formulas `a` is the reference, `b` the candidate, `p` and `q` the same for
//! probabilities. Everything is accumulated in f64, so an f32 tensor of a billion elements loses
//! nothing that shows; [`ErrorSums`] computes the same over data that comes in pieces. NaN in either slice gives NaN, never a good-looking number.
//!
//! Every function of two slices gives [`Error::Mismatch`](crate::Error::Mismatch) if they differ in
//! length: no number would describe that.

use super::sums::{ErrorSums, same_len};
use crate::Result;

/// The elements of both slices in f64, side by side.
///
/// # Errors
/// Those of [`same_len`].
pub(super) fn pairs<'a>(
    reference: &'a [f32],
    candidate: &'a [f32],
) -> Result<impl Iterator<Item = (f64, f64)> + 'a> {
    same_len(reference, candidate)?;
    Ok(reference.iter().zip(candidate).map(|(&a, &b)| (f64::from(a), f64::from(b))))
}

/// Cosine similarity `sum(a·b) / (|a| |b|)`: 1 for the same direction, whatever the lengths.
///
/// Two zero vectors (or two empty ones) are equal: 1. If only one is zero: 0.
///
/// Source: the accuracy column of SageAttention (Zhang et al. 2024, arXiv:2410.02367, section 4.1).
pub fn cosine(reference: &[f32], candidate: &[f32]) -> Result<f64> {
    Ok(ErrorSums::of(reference, candidate)?.cosine())
}

/// Relative L1 distance `sum|a - b| / sum|a|`.
///
/// If the reference is all zeros: 0 when the candidate is too, infinity otherwise.
///
/// Source: SageAttention (arXiv:2410.02367, section 4.1).
pub fn relative_l1(reference: &[f32], candidate: &[f32]) -> Result<f64> {
    Ok(ErrorSums::of(reference, candidate)?.relative_l1())
}

/// Root mean square error `sqrt(mean((a - b)^2))`, in the unit of the data; 0 for empty slices.
///
/// Source: textbook definition; also used by SageAttention (arXiv:2410.02367, section 4.1).
pub fn rmse(reference: &[f32], candidate: &[f32]) -> Result<f64> {
    Ok(ErrorSums::of(reference, candidate)?.rmse())
}

/// Largest absolute difference `max|a - b|`; 0 for empty slices.
///
/// Source: textbook definition (the Chebyshev distance).
pub fn max_abs(reference: &[f32], candidate: &[f32]) -> Result<f64> {
    Ok(ErrorSums::of(reference, candidate)?.max_abs())
}

/// Signal-to-quantization-noise ratio in decibel, `10 log10(sum(a^2) / sum((a - b)^2))`.
///
/// Every 6 dB halve the error: 20 dB is an error of 10 % of the signal, 40 dB of 1 %. Equal slices
/// (empty ones too) give infinity; a zero reference with a candidate that is not gives minus
/// infinity.
///
/// Source: Widrow and Kollár, Quantization Noise, 2008; Nagel et al. 2021, arXiv:2106.08295,
/// section 2.
pub fn sqnr_db(reference: &[f32], candidate: &[f32]) -> Result<f64> {
    Ok(ErrorSums::of(reference, candidate)?.sqnr_db())
}

/// Kullback-Leibler divergence of one row, `sum(p ln(p/q) - p + q)`, in nats.
///
/// The two extra terms cancel for rows that sum to exactly 1. Rows of f32 do so only to 1e-7 or
/// so, and there they keep the result from going below 0 (`scipy.special.kl_div` is the same).
///
/// `0 ln 0` is 0. Where `q = 0 < p` the mathematical answer is infinity; here `q` counts as
/// [`f32::MIN_POSITIVE`], because a zero that a softmax gives in f32 means "too small to be held".
/// A weight `p = 0.5` that got lost this way still adds 43 nats.
///
/// Source: Kullback and Leibler, On Information and Sufficiency, 1951.
pub fn kl_divergence(p: &[f32], q: &[f32]) -> Result<f64> {
    let floor = f64::from(f32::MIN_POSITIVE);
    let term = |p: f64, q: f64| {
        if p == 0.0 {
            return q;
        }
        let q = if q < floor { floor } else { q };
        p * (p / q).ln() - p + q
    };
    Ok(pairs(p, q)?.map(|(p, q)| term(p, q)).sum())
}

/// Total variation distance of one row, `sum|p - q| / 2`: the probability that went elsewhere, 0
/// to 1.
///
/// Source: textbook definition.
pub fn total_variation(p: &[f32], q: &[f32]) -> Result<f64> {
    Ok(pairs(p, q)?.map(|(p, q)| (p - q).abs()).sum::<f64>() / 2.0)
}

/// Whether both rows have their largest value at the same place; among equals the first counts.
/// Empty rows agree; a row with NaN agrees with none.
///
/// Source: textbook definition; averaged over rows it is the top-1 agreement.
pub fn same_top1(p: &[f32], q: &[f32]) -> Result<bool> {
    same_len(p, q)?;
    Ok(match (top1(p), top1(q)) {
        (Some(p), Some(q)) => p == q,
        _ => p.is_empty(),
    })
}

/// How much of the `k` largest values both rows have at the same places: the number of places that
/// are among the `k` largest of both, over `min(k, row length)`. Among equals the first count.
/// Empty rows agree; a row with NaN agrees with none.
///
/// Source: the overlap measure of Fagin, Kumar and Sivakumar, Comparing Top k Lists, 2003.
pub fn topk_agreement(p: &[f32], q: &[f32], k: usize) -> Result<f64> {
    same_len(p, q)?;
    let k = k.min(p.len());
    if k == 0 {
        return Ok(1.0);
    }
    if p.iter().chain(q).any(|x| x.is_nan()) {
        return Ok(0.0);
    }
    let (p, q) = (top_k(p, k), top_k(q, k));
    Ok(p.iter().filter(|place| q.contains(place)).count() as f64 / k as f64)
}

/// Places of the `k` largest values, largest first, the first of equals first. NaN counts as
/// smallest.
pub fn top_k(row: &[f32], k: usize) -> Vec<usize> {
    let key = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x };
    let k = k.min(row.len());
    let mut best: Vec<usize> = Vec::with_capacity(k + 1);
    for (place, &x) in row.iter().enumerate() {
        let worse = |&other: &usize| key(row[other]) < key(x);
        if best.len() < k || best.last().is_some_and(worse) {
            let at = best.partition_point(|other| !worse(other));
            best.insert(at, place);
            best.truncate(k);
        }
    }
    best
}

/// Shannon entropy of one row, `-sum(p ln p)`, in nats: 0 when one key has everything, `ln N` when
/// all keys share equally. `0 ln 0` is 0.
///
/// Source: Shannon, A Mathematical Theory of Communication, 1948. The entropy change of a row is
/// that of the candidate minus that of the reference.
pub fn entropy(p: &[f32]) -> f64 {
    p.iter().map(|&p| f64::from(p)).map(|p| if p == 0.0 { 0.0 } else { -p * p.ln() }).sum()
}

/// Index of the first largest value; none in an empty row or beside NaN.
fn top1(row: &[f32]) -> Option<usize> {
    if row.iter().any(|x| x.is_nan()) {
        return None;
    }
    let largest = row.iter().copied().reduce(f32::max)?;
    row.iter().position(|&x| x == largest)
}

/// The lowest of some values; NaN if one is NaN (`f64::min` would drop it), infinite if there is
/// none.
pub fn lowest(values: impl IntoIterator<Item = f64>) -> f64 {
    let lower = |a: f64, b: f64| if a.is_nan() || a <= b { a } else { b };
    values.into_iter().fold(f64::INFINITY, lower)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    const A: [f32; 6] = [0.5, -1.25, 2.0, 3.75, -0.125, 1.0];
    const B: [f32; 6] = [0.5, -1.0, 2.25, 3.5, 0.0, 1.0625];

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-9, "found {found}, expected {expected}");
    }

    /// Expected values: numpy 2 and scipy 1 in f64, on the same (exactly representable) data.
    #[test]
    fn distances_equal_numpy_and_scipy() {
        close(cosine(&A, &B).unwrap(), 0.995_333_123_179_986);
        close(relative_l1(&A, &B).unwrap(), 0.108_695_652_173_913_04);
        close(rmse(&A, &B).unwrap(), 0.185_755_776_042_989_68);
        close(max_abs(&A, &B).unwrap(), 0.25);
        close(sqnr_db(&A, &B).unwrap(), 20.039_155_289_891_575);
    }

    #[test]
    fn divergences_equal_scipy() {
        let (p, q) = ([0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.375, 0.125]);
        close(kl_divergence(&p, &q).unwrap(), 0.209_247_054_196_458_9);
        close(total_variation(&p, &q).unwrap(), 0.25);
        let (p, q) = ([0.75, 0.25, 0.0, 0.0], [0.625, 0.25, 0.125, 0.0]);
        close(kl_divergence(&p, &q).unwrap(), 0.136_741_167_595_465_95);
        close(total_variation(&p, &q).unwrap(), 0.125);
    }

    #[test]
    fn a_lost_probability_is_expensive_but_finite() {
        close(kl_divergence(&[0.5, 0.5], &[1.0, 0.0]).unwrap(), 42.975_125_194_716_61);
        assert!(kl_divergence(&[1.0, 1e-44], &[1.0, 0.0]).unwrap() < 1e-30);
        assert_eq!(kl_divergence(&[0.0, 1.0], &[0.0, 1.0]).unwrap(), 0.0);
    }

    #[test]
    fn rounding_of_the_rows_does_not_turn_the_divergence_negative() {
        let p = [1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0];
        let q = p.map(|x: f32| x.next_up());
        assert!(kl_divergence(&p, &q).unwrap() >= 0.0);
    }

    #[test]
    fn equal_slices_have_no_drift() {
        close(cosine(&A, &A).unwrap(), 1.0);
        assert_eq!(relative_l1(&A, &A).unwrap(), 0.0);
        assert_eq!(rmse(&A, &A).unwrap(), 0.0);
        assert_eq!(max_abs(&A, &A).unwrap(), 0.0);
        assert_eq!(sqnr_db(&A, &A).unwrap(), f64::INFINITY);
        assert_eq!(total_variation(&A, &A).unwrap(), 0.0);
        assert!(same_top1(&A, &A).unwrap());
    }

    #[test]
    fn zeros_and_empty_slices_are_defined() {
        for empty in [&[][..], &[0.0; 3][..]] {
            assert_eq!(cosine(empty, empty).unwrap(), 1.0);
            assert_eq!(relative_l1(empty, empty).unwrap(), 0.0);
            assert_eq!(rmse(empty, empty).unwrap(), 0.0);
            assert_eq!(max_abs(empty, empty).unwrap(), 0.0);
            assert_eq!(sqnr_db(empty, empty).unwrap(), f64::INFINITY);
            assert_eq!(kl_divergence(empty, empty).unwrap(), 0.0);
            assert_eq!(total_variation(empty, empty).unwrap(), 0.0);
            assert!(same_top1(empty, empty).unwrap());
        }
        let (zeros, ones) = ([0.0; 3], [1.0; 3]);
        assert_eq!(cosine(&zeros, &ones).unwrap(), 0.0);
        assert_eq!(cosine(&ones, &zeros).unwrap(), 0.0);
        assert_eq!(relative_l1(&zeros, &ones).unwrap(), f64::INFINITY);
        assert_eq!(relative_l1(&ones, &zeros).unwrap(), 1.0);
        assert_eq!(sqnr_db(&zeros, &ones).unwrap(), f64::NEG_INFINITY);
        assert_eq!(sqnr_db(&ones, &zeros).unwrap(), 0.0);
    }

    #[test]
    fn opposite_vectors_have_cosine_minus_one() {
        close(cosine(&A, &A.map(|x| -x)).unwrap(), -1.0);
        close(cosine(&A, &A.map(|x| 3.0 * x)).unwrap(), 1.0);
    }

    #[test]
    fn squares_beyond_the_range_of_f32_are_kept() {
        let unit = 2f32.powi(100);
        let (a, b) = ([3.0 * unit, 4.0 * unit], [3.0 * unit, 3.0 * unit]);
        close(sqnr_db(&a, &b).unwrap(), 10.0 * 25f64.log10());
        close(rmse(&a, &b).unwrap() / f64::from(unit), 0.5f64.sqrt());
    }

    #[test]
    fn the_first_of_equals_is_the_top() {
        assert!(same_top1(&[0.5, 0.5, 0.0], &[0.6, 0.2, 0.2]).unwrap());
        assert!(!same_top1(&[0.5, 0.5, 0.0], &[0.2, 0.6, 0.2]).unwrap());
        assert!(!same_top1(&[f32::NAN, 0.5], &[f32::NAN, 0.5]).unwrap());
    }

    #[test]
    fn top_places_are_those_of_a_stable_sort() {
        let row = [0.1, 0.4, 0.4, 0.0, 0.1];
        assert_eq!(top_k(&row, 3), [1, 2, 0]);
        assert_eq!(top_k(&row, 9), [1, 2, 0, 4, 3]);
        assert_eq!(top_k(&[f32::NAN, 0.5, f32::NAN], 2), [1, 0]);
        assert_eq!(topk_agreement(&row, &[0.4, 0.4, 0.1, 0.0, 0.1], 2).unwrap(), 0.5);
        assert_eq!(topk_agreement(&row, &row, 5).unwrap(), 1.0);
        assert_eq!(topk_agreement(&[f32::NAN, 1.0], &[f32::NAN, 1.0], 1).unwrap(), 0.0);
        assert_eq!(topk_agreement(&[], &[], 5).unwrap(), 1.0);
    }

    #[test]
    fn entropy_is_zero_for_one_key_and_largest_for_equal_shares() {
        assert_eq!(entropy(&[0.0, 1.0, 0.0]), 0.0);
        close(entropy(&[0.25; 4]), 4f64.ln());
        assert_eq!(entropy(&[]), 0.0);
    }

    #[test]
    fn more_places_than_a_row_has_are_all_of_it() {
        assert_eq!(top_k(&[0.1, 0.4], usize::MAX), [1, 0]);
    }

    #[test]
    fn slices_of_different_length_are_an_error() {
        let (short, long) = ([1.0], [1.0, 2.0]);
        for (a, b) in [(&short[..], &long[..]), (&long, &short), (&[], &short)] {
            let metrics = [cosine, relative_l1, rmse, max_abs, sqnr_db, kl_divergence];
            for found in metrics.map(|metric| metric(a, b)) {
                assert!(matches!(found, Err(Error::Mismatch(_))), "{found:?}");
            }
            assert!(matches!(total_variation(a, b), Err(Error::Mismatch(_))));
            assert!(matches!(same_top1(a, b), Err(Error::Mismatch(_))));
            assert!(matches!(topk_agreement(a, b, 1), Err(Error::Mismatch(_))));
        }
    }
}
