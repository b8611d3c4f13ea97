//! Embeddings into a file, one after the other.

use anyhow::{Result, bail};
use serde::Serialize;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

/// Bytes before the numbers of a safetensors file, filled up with spaces: how many texts there are is known
/// at the end.
const HEADER: usize = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Safetensors,
    Jsonl,
}

impl Format {
    /// By the end of the name.
    pub fn of(path: &Path) -> Result<Self> {
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("safetensors") => Ok(Self::Safetensors),
            Some("jsonl") => Ok(Self::Jsonl),
            _ => bail!(
                "cannot write {}: expected a name that ends in .safetensors or .jsonl",
                path.display()
            ),
        }
    }
}

/// A file that is filled.
pub struct Embeddings<W: Write + Seek> {
    out: BufWriter<W>,
    format: Format,
    /// Elements of an embedding.
    size: usize,
    /// Where the line of each text begins.
    places: Vec<u64>,
}

#[derive(Serialize)]
struct Line<'a> {
    byte: u64,
    embedding: &'a [f32],
}

impl<W: Write + Seek> Embeddings<W> {
    pub fn new(out: W, format: Format, size: usize) -> Result<Self> {
        let mut out = BufWriter::with_capacity(1 << 16, out);
        if format == Format::Safetensors {
            out.write_all(&[b' '; HEADER])?;
        }
        Ok(Self { out, format, size, places: Vec::new() })
    }

    /// The embedding of the text whose line begins at this byte.
    pub fn write(&mut self, place: u64, embedding: &[f32]) -> Result<()> {
        match self.format {
            Format::Safetensors => {
                self.places.push(place);
                for x in embedding {
                    self.out.write_all(&x.to_le_bytes())?;
                }
            }
            Format::Jsonl => {
                serde_json::to_writer(&mut self.out, &Line { byte: place, embedding })?;
                self.out.write_all(b"\n")?;
            }
        }
        Ok(())
    }

    pub fn finish(mut self) -> Result<()> {
        if self.format == Format::Safetensors {
            let (texts, numbers) = (self.places.len(), self.places.len() * self.size * 4);
            for place in &self.places {
                self.out.write_all(&place.to_le_bytes())?;
            }
            let mut header = serde_json::to_vec(&serde_json::json!({
                "embeddings": {
                    "dtype": "F32", "shape": [texts, self.size], "data_offsets": [0, numbers],
                },
                "bytes": {
                    "dtype": "I64", "shape": [texts],
                    "data_offsets": [numbers, numbers + 8 * texts],
                },
            }))?;
            header.resize(HEADER - 8, b' ');
            self.out.seek(SeekFrom::Start(0))?;
            self.out.write_all(&(header.len() as u64).to_le_bytes())?;
            self.out.write_all(&header)?;
        }
        self.out.flush()?;
        Ok(())
    }
}
