//! Heads of keys and values that several heads share.

use crate::memory::check_size;
use crate::{Error, Result};
use candle_core::Tensor;

/// Repeats every head of `x` `[B, H_kv, S, D]` for the query heads that share it.
pub(crate) fn repeat_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, h_kv, s, d) = x.dims4()?;
    if h_kv == heads {
        return Ok(x.clone());
    }
    let group = heads / h_kv;
    let grouped = x.unsqueeze(2)?.expand((b, h_kv, group, s, d))?;
    Ok(grouped.reshape((b, heads, s, d))?)
}

/// Keys and values with as many heads: Candle lets them differ, if one is a multiple of the other.
pub(super) fn same_heads(op: &'static str, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
    let (h_k, h_v) = (k.dim(1)?, v.dim(1)?);
    let most = h_k.max(h_v);
    if h_k == h_v {
        return Ok((k, v));
    }
    if h_k.min(h_v) == 0 || !most.is_multiple_of(h_k.min(h_v)) {
        let expected = format!("a number of heads that divides, or is divided by, the {h_k} of k");
        return Err(Error::shape(op, "v", v.dims(), expected));
    }
    let repeat = |tensor, x: &Tensor| {
        let (b, _, n, d) = x.dims4()?;
        check_size(op, tensor, &[b, most, n, d])?;
        repeat_heads(x, most)
    };
    Ok((repeat("k, a head for each of v,", &k)?, repeat("v, a head for each of k,", &v)?))
}
