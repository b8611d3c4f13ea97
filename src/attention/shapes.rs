//! What must hold between the tensors of one call.

use crate::memory::check_size;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

const Q: &str = "[B, H, M, D]";
const K: &str = "[B, H_kv, N, D]";
const V: &str = "[B, H_kv, N, Dv]";

fn dims4(
    op: &'static str,
    tensor: &'static str,
    shape: &[usize],
    expected: &'static str,
) -> Result<[usize; 4]> {
    <[usize; 4]>::try_from(shape).map_err(|_| Error::Rank {
        op,
        tensor,
        shape: shape.to_vec(),
        expected,
    })
}

/// `q` against `k`.
pub(crate) fn check_scores(op: &'static str, q: &[usize], k: &[usize]) -> Result<()> {
    let [b, h, m, d] = dims4(op, "q", q, Q)?;
    let [b_k, h_kv, n, d_k] = dims4(op, "k", k, K)?;
    let divides = h_kv != 0 && h.is_multiple_of(h_kv) || h == h_kv;
    if !(b_k == b && d_k == d && divides) {
        let expected = format!("[{b}, H_kv dividing {h}, {n}, {d}] to match q {q:?}");
        return Err(Error::shape(op, "k", k, expected));
    }
    check_size(op, "q", q)?;
    // Keys may be repeated for the query heads that share them.
    check_size(op, "k, a head for each of q,", &[b, h, n, d])?;
    check_size(op, "the scores of q and k", &[b, h, m, n])
}

/// `v` against `k`, which fits `q`.
pub(crate) fn check_attention(
    op: &'static str,
    q: &[usize],
    k: &[usize],
    v: &[usize],
) -> Result<()> {
    check_scores(op, q, k)?;
    let [_, h, m, _] = dims4(op, "q", q, Q)?;
    let [b, h_kv, n, _] = dims4(op, "k", k, K)?;
    let [b_v, h_v, n_v, value_dim] = dims4(op, "v", v, V)?;
    if (b_v, h_v, n_v) != (b, h_kv, n) {
        let expected = format!("[{b}, {h_kv}, {n}, Dv] to match k {k:?}");
        return Err(Error::shape(op, "v", v, expected));
    }
    check_size(op, "v, a head for each of q,", &[b, h, n, value_dim])?;
    check_size(op, "the result", &[b, h, m, value_dim])
}

/// All tensors of a dtype that the kernels read.
pub(crate) fn check_float(op: &'static str, tensors: &[(&'static str, &Tensor)]) -> Result<()> {
    let supported = |dtype| matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
    match tensors.iter().find(|(_, x)| !supported(x.dtype())) {
        None => Ok(()),
        Some((tensor, x)) => {
            Err(Error::DType { op, tensor, dtype: x.dtype(), expected: "F32, F16 or BF16" })
        }
    }
}

/// All tensors on the CPU, where the kernels are.
pub(crate) fn check_cpu(op: &'static str, tensors: &[(&'static str, &Tensor)]) -> Result<()> {
    match tensors.iter().find(|(_, tensor)| !tensor.device().is_cpu()) {
        None => Ok(()),
        Some((name, tensor)) => Err(not_on_cpu(op, name, tensor.device().location())),
    }
}

fn not_on_cpu(
    op: &'static str,
    tensor: &'static str,
    device: candle_core::DeviceLocation,
) -> Error {
    let hint = "move it there, or use `reference::tensor_ops`, which runs on every device";
    Error::Device { op, tensor, device, hint }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DeviceLocation;

    #[test]
    fn messages_name_the_values() {
        let error = check_scores("f", &[1, 4, 8, 64], &[1, 3, 9, 64]).unwrap_err().to_string();
        assert_eq!(
            error,
            "f: k has shape [1, 3, 9, 64], expected [1, H_kv dividing 4, 9, 64] to match q \
             [1, 4, 8, 64]"
        );
        let error = check_scores("f", &[4, 8, 64], &[1, 3, 9, 64]).unwrap_err().to_string();
        assert!(error.contains("rank 3") && error.contains("[B, H, M, D]"), "{error}");
        let (q, k) = ([1, 4, 8, 64], [1, 2, 9, 64]);
        let error = check_attention("f", &q, &k, &[1, 2, 8, 64]).unwrap_err().to_string();
        assert!(error.contains("v has shape [1, 2, 8, 64], expected [1, 2, 9, Dv]"), "{error}");
        let error = not_on_cpu("f", "q", DeviceLocation::Cuda { gpu_id: 0 }).to_string();
        assert!(error.contains("q is on Cuda") && error.contains("tensor_ops"), "{error}");
    }

    #[test]
    fn grouped_and_empty_shapes_pass() {
        assert!(check_scores("f", &[2, 8, 3, 5], &[2, 2, 9, 5]).is_ok());
        assert!(check_scores("f", &[2, 0, 3, 5], &[2, 0, 9, 5]).is_ok());
        assert!(check_scores("f", &[0, 4, 0, 0], &[0, 1, 0, 0]).is_ok());
        assert!(check_scores("f", &[2, 4, 3, 5], &[2, 0, 9, 5]).is_err());
    }
}
