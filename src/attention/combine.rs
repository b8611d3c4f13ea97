//! Several conditions on the same scores as one mask tensor: `AttnMask` holds one at a time.

use super::mask::{attended, unsupported};
use super::visible::Visible;
use crate::memory::check_size;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// Which keys a query sees by its position, as a boolean mask `[M, N]` (U8, 1 = attend): query `i`
/// stands at the position of key `i + offset` and sees at most `left` keys before and `right` keys
/// after it; `None` is no limit.
///
/// A causal mask is `right = Some(0)`. Aligned to the first key its offset is 0, aligned to the
/// last it is `N - M`, which may be negative: then the first queries see nothing.
///
/// # Errors
/// [`Error::Shape`] for a mask larger than the address space; Candle's own, if the device cannot hold it.
pub fn position_mask(
    (queries, keys): (usize, usize),
    offset: isize,
    left: Option<usize>,
    right: Option<usize>,
    device: &Device,
) -> Result<Tensor> {
    check_size("position_mask", "the mask", &[queries, keys])?;
    let mask = Visible::around(keys, offset, left, right).to_tensor(1, queries, device)?;
    Ok(mask.reshape((queries, keys))?)
}

/// `mask` where `keep` (U8, 0 = masked) agrees, masked elsewhere. Both broadcast.
///
/// A boolean mask stays boolean, U8; an additive one keeps its dtype and gets minus infinity where
/// a score is masked.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::attention::{position_mask, restrict_mask};
/// use candle_int8_attention::{AttentionConfig, AttnMask, attention};
///
/// // Causal attention over two sequences, the second of which has a key of padding.
/// let q = Tensor::randn(0f32, 1., (2, 4, 3, 32), &Device::Cpu)?;
/// let padding = Tensor::new(&[[1u8, 1, 1], [1, 1, 0]], &Device::Cpu)?.reshape((2, 1, 1, 3))?;
/// let causal = position_mask((3, 3), 0, None, Some(0), &Device::Cpu)?;
/// let mask = AttnMask::Mask(restrict_mask(&padding, &causal)?);
/// let out = attention(&q, &q, &q, &mask, &AttentionConfig::int8())?;
/// # assert_eq!(out.dims(), [2, 4, 3, 32]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// [`Error::DType`] for a mask that is neither U8 nor a float, or a `keep` that is not U8;
/// [`Error::Shape`] if they do not broadcast, or to more than memory has addresses.
pub fn restrict_mask(mask: &Tensor, keep: &Tensor) -> Result<Tensor> {
    if keep.dtype() != DType::U8 {
        return Err(unsupported(keep.dtype()));
    }
    let shape = mask.shape().broadcast_shape_binary_op(keep.shape(), "restrict_mask");
    let shape = shape.map_err(|_| {
        let expected = format!("something that broadcasts with the mask {:?}", mask.dims());
        Error::shape("restrict_mask", "keep", keep.dims(), expected)
    })?;
    check_size("restrict_mask", "the mask with keep", shape.dims())?;
    let (mask, keep) = (mask.broadcast_as(&shape)?, keep.broadcast_as(&shape)?);
    let both = (attended(&mask)? * keep.ne(0u8)?)?;
    match mask.dtype() {
        DType::U8 => Ok(both),
        dtype => {
            let masked = Tensor::new(f32::NEG_INFINITY, mask.device())?.to_dtype(dtype)?;
            Ok(both.where_cond(&mask, &masked.broadcast_as(&shape)?)?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;

    #[test]
    fn positions_are_those_of_the_offset() {
        let mask = |offset, left, right| {
            let mask = position_mask((3, 4), offset, left, right, &Device::Cpu).unwrap();
            mask.to_vec2::<u8>().unwrap()
        };
        assert_eq!(mask(0, None, None), [[1; 4]; 3]);
        assert_eq!(mask(0, None, Some(0)), [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]);
        assert_eq!(mask(1, None, Some(0)), [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]);
        assert_eq!(mask(-2, None, Some(0)), [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]);
        assert_eq!(mask(1, Some(1), Some(1)), [[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]);
        assert_eq!(mask(isize::MAX, Some(1), Some(1)), [[0; 4]; 3]);
        assert_eq!(mask(isize::MIN, Some(1), None), [[1; 4]; 3]);
    }

    #[test]
    fn a_score_is_seen_where_both_masks_see_it() {
        let keep = Tensor::new(&[[1u8, 0], [7, 1]], &Device::Cpu).unwrap();
        let boolean = Tensor::new(&[3u8, 1], &Device::Cpu).unwrap();
        let both = restrict_mask(&boolean, &keep).unwrap();
        assert_eq!(both.to_vec2::<u8>().unwrap(), [[1, 0], [1, 1]]);

        // The smallest number of the dtype means masked, and stays so.
        let (low, masked) = (f16::MIN, f16::NEG_INFINITY);
        let bias = Tensor::new(&[[f16::from_f32(0.5), low]], &Device::Cpu).unwrap();
        let both = restrict_mask(&bias, &keep).unwrap().to_vec2::<f16>().unwrap();
        assert_eq!(both, [[f16::from_f32(0.5), masked], [f16::from_f32(0.5), masked]]);
    }

    #[test]
    fn masks_that_do_not_fit_are_errors() {
        let (two, three) = (
            Tensor::ones(2, DType::U8, &Device::Cpu).unwrap(),
            Tensor::ones(3, DType::U8, &Device::Cpu).unwrap(),
        );
        let error = restrict_mask(&two, &three).unwrap_err().to_string();
        assert!(error.contains("[3]") && error.contains("[2]"), "{error}");
        for (mask, keep) in [(DType::U32, DType::U8), (DType::U8, DType::F32)] {
            let ones = |dtype| Tensor::ones(2, dtype, &Device::Cpu).unwrap();
            let error = restrict_mask(&ones(mask), &ones(keep)).unwrap_err().to_string();
            assert!(error.contains("U8 (boolean"), "{error}");
        }
    }
}
