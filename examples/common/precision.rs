//! The flag that says in which numbers an encoder computes.

use candle_int8_attention::nn;
use clap::ValueEnum;

/// What the linear layers of an encoder multiply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Precision {
    /// f32
    #[default]
    F32,
    /// int16 rows and weights, near exact
    Int16,
    /// int8 rows and weights, rotated, with exact sums
    Int8,
}

impl Precision {
    /// As the flag takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Int16 => "int16",
            Self::Int8 => "int8",
        }
    }
}

impl From<Precision> for nn::Precision {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => nn::Precision::F32,
            Precision::Int16 => nn::Precision::Int16,
            Precision::Int8 => nn::Precision::Int8,
        }
    }
}
