//! Where the integer zero lies.

use super::words::words;

/// Where the integer zero lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scheme {
    /// `zero_point = 0`, `q` in `[-127, 127]`, `scale = max|x| / 127`. For signed data around
    /// zero, as queries and keys are; the int8 product then needs no correction.
    #[default]
    Symmetric,
    /// Any zero point, `q` in `[-128, 127]`, `scale = (max(0, max) - min(0, min)) / 255`. Spends
    /// all 256 codes on one-sided data; the int8 product is corrected from row sums.
    Affine,
}

impl Scheme {
    /// The smallest code: -127 for [`Scheme::Symmetric`], -128 for [`Scheme::Affine`].
    pub const fn qmin(self) -> i8 {
        match self {
            Scheme::Symmetric => -127,
            Scheme::Affine => -128,
        }
    }

    /// The largest code, 127 in both schemes.
    pub const fn qmax(self) -> i8 {
        127
    }
}

words!(Scheme, "scheme {:?}", Symmetric = "symmetric", Affine = "affine");
