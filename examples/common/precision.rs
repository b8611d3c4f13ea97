//! The flag that says in which numbers an encoder computes.

use anyhow::{Result, ensure};
use candle_int8_attention::models::{LayerSettings, TextEncoder};
use candle_int8_attention::nn::Precision;
use std::path::Path;

/// The flag, which every example takes that runs an encoder.
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

    /// Switches an encoder to the attention and the linear layers of a file that `search` has written. The
    /// precision of linear layers may be named there or by the flag, not both.
    pub fn apply_layers(self, file: &Path, encoder: &mut TextEncoder) -> Result<()> {
        let settings = LayerSettings::load(file)?;
        ensure!(
            settings.linear.is_empty() || self.precision == Precision::F32,
            "--precision {}, but {} has the precision of each linear layer; expected one of the two",
            self.precision,
            file.display()
        );
        encoder.model.set_linear(self.precision)?;
        Ok(settings.apply(encoder)?)
    }
}
