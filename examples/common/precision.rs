//! The flag that says in which numbers an encoder computes.

use candle_int8_attention::nn::Precision;

/// The flag, which every example takes that compares an encoder with itself.
#[derive(Debug, Clone, Copy, clap::Args)]
#[command(next_help_heading = "Model")]
pub struct PrecisionArgs {
    /// In which numbers the linear layers of the encoder compute: f32; int16, near exact; or int8, with rotated
    /// rows and weights
    #[arg(long, value_name = "PRECISION", default_value = "f32")]
    pub precision: Precision,
}

impl PrecisionArgs {
    /// What stands behind the name of a model or a configuration: nothing for f32.
    pub fn suffix(self) -> String {
        match self.precision {
            Precision::F32 => String::new(),
            other => format!(", linear layers in {other}"),
        }
    }
}
