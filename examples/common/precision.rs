//! The flag that says in which numbers an encoder computes.

use candle_int8_attention::nn;
use clap::ValueEnum;

/// The flag, which every example takes that runs an encoder.
#[derive(Debug, Clone, Copy, clap::Args)]
#[command(next_help_heading = "Model")]
pub struct PrecisionArgs {
    /// In which numbers the linear layers of the encoder compute
    #[arg(long, value_enum, default_value_t)]
    pub precision: Precision,
}

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

impl Precision {
    /// What stands behind the name of a model or a configuration: nothing for f32.
    pub fn suffix(self) -> String {
        match self {
            Self::F32 => String::new(),
            other => format!(", linear layers in {}", other.name()),
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
