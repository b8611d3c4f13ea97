//! Sizes that are known to fit the address space before anything is allocated.

use crate::{Error, Result};

/// Whole panels of every kernel: what the last two dims of an operand are padded to, at most.
const PADDED: usize = 64;

/// Whether a tensor of these dims, in f64 and with its last two padded to whole panels, is smaller than
/// the address space. Then no product of some of its dims overflows, nor does the size in bytes of a
/// buffer for it: views whose strides are 0 may have any dims without any memory. Dims of 0 count as 1,
/// because buffers for the others may be made all the same.
fn addressable(dims: &[usize]) -> bool {
    let padded = dims.len().saturating_sub(2);
    let bytes = dims.iter().enumerate().try_fold(size_of::<f64>(), |bytes, (i, &dim)| {
        let dim = dim.max(1);
        let dim = if i < padded { Some(dim) } else { dim.checked_next_multiple_of(PADDED) };
        bytes.checked_mul(dim?)
    });
    bytes.is_some_and(|bytes| bytes <= isize::MAX as usize)
}

/// That memory has addresses for a tensor of `shape`, as [`addressable`] says it; `tensor` is what it is.
///
/// # Errors
/// [`Error::Shape`] unless it has.
pub(crate) fn check_size(op: &'static str, tensor: &'static str, shape: &[usize]) -> Result<()> {
    if addressable(shape) {
        return Ok(());
    }
    Err(Error::shape(op, tensor, shape, "less than memory has addresses"))
}

#[cfg(test)]
mod tests {
    use super::addressable;

    #[test]
    fn what_overflows_is_not_addressable() {
        assert!(addressable(&[]) && addressable(&[0, 0]) && addressable(&[2, 8, 1 << 20, 128]));
        assert!(addressable(&[1 << 20, 1 << 20, 1, 1]));
        // Beyond the address space, or behind it again, also where one of the dims is 0.
        for dims in [
            [1, 1, 1 << 62, 1],
            [1, 1, usize::MAX, 1],
            [1, 1, 18_446_744_073_709_552, 1000],
            [1, 1, 1 << 40, 1 << 24],
            [1 << 40, 1 << 40, 0, 5],
            [usize::MAX, 1, 1, 1],
        ] {
            assert!(!addressable(&dims), "{dims:?}");
        }
    }
}
