//! A GGUF file: metadata by key, tensors by name.

use super::config::{LlamaConfig, RopeConfig, RopePairs, RopeScaling};
use super::gguf_header::{self, Positioned};
use crate::files::{corrupt, unreadable};
use crate::{Error, Result};
use candle_core::Device;
use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

/// An opened GGUF file. Tensors are read when they are asked for, by several threads at once if they
/// like.
///
/// ```no_run
/// use candle_int8_attention::models::llama::Gguf;
///
/// let file = Gguf::open("SmolLM2-135M-Instruct.Q4_1.gguf")?;
/// println!("{} layers", file.llama_config()?.num_hidden_layers);
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
pub struct Gguf {
    path: PathBuf,
    file: File,
    size: u64,
    content: Content,
}

impl Gguf {
    /// Reads the header, and checks that all tensors it names are in the file.
    ///
    /// # Errors
    /// [`Error::MissingFile`], [`Error::Io`], or [`Error::Corrupt`] for a file that is truncated
    /// or is not GGUF.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let io = |problem| unreadable("GGUF file", path, problem);
        let file = File::open(path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        check_start(path, Positioned::new(&file, size))?;
        if let Some(problem) = gguf_header::problem(&file, size) {
            return Err(corrupt(path, problem));
        }
        let mut reader = BufReader::new(Positioned::new(&file, size));
        let content = Content::read(&mut reader).map_err(|e| {
            corrupt(path, format!("cannot be read as GGUF ({size} bytes): {}", reason(e)))
        })?;
        for (name, tensor) in &content.tensor_infos {
            let end = content.tensor_data_offset.saturating_add(tensor.offset);
            let end = bytes(tensor).and_then(|bytes| end.checked_add(bytes));
            if end.is_none_or(|end| end > size) {
                return Err(corrupt(
                    path,
                    format!("truncated: tensor {name:?} reaches beyond the file's {size} bytes"),
                ));
            }
        }
        Ok(Self { path: path.to_path_buf(), file, size, content })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration of a file with `general.architecture` `llama`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another architecture, those of [`LlamaConfig::check`], and
    /// [`Error::Corrupt`] for a key that is missing or of another type.
    pub fn llama_config(&self) -> Result<LlamaConfig> {
        let architecture = self.string("general.architecture")?;
        if architecture != "llama" {
            return Err(Error::Unsupported(format!(
                "{}: general.architecture {architecture:?}, expected \"llama\"",
                self.path.display()
            )));
        }
        if let Some(experts) = self.size("llama.expert_count")?.filter(|&experts| experts > 0) {
            return Err(Error::Unsupported(format!(
                "llama.expert_count {experts}, expected 0: mixtures of experts are not supported"
            )));
        }
        let need = |key: &'static str| {
            self.size(key)?.ok_or_else(|| self.missing(key, "an unsigned integer"))
        };
        let heads = need("llama.attention.head_count")?;
        let hidden = need("llama.embedding_length")?;
        let head_dim = match self.size("llama.attention.key_length")? {
            Some(head_dim) => head_dim,
            None => hidden / heads.max(1),
        };
        let config = LlamaConfig {
            vocab_size: self.vocab_size()?,
            hidden_size: hidden,
            intermediate_size: need("llama.feed_forward_length")?,
            num_hidden_layers: need("llama.block_count")?,
            num_attention_heads: heads,
            num_key_value_heads: self.size("llama.attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            max_position_embeddings: need("llama.context_length")?,
            rms_norm_eps: {
                let key = "llama.attention.layer_norm_rms_epsilon";
                f64::from(self.float(key)?.ok_or_else(|| self.missing(key, "a number"))?)
            },
            rope: self.rope()?,
            tie_word_embeddings: !self.has("output.weight"),
        };
        config.check()?;
        let key = "llama.rope.dimension_count";
        match self.size(key)?.filter(|&dim| dim != head_dim) {
            Some(dim) => {
                Err(Error::Unsupported(format!("{key} {dim}, expected the head dim {head_dim}")))
            }
            None => Ok(config),
        }
    }

    fn rope(&self) -> Result<RopeConfig> {
        let factor = self.rope_factor()?;
        let scaling = match factor {
            _ if self.has("rope_freqs.weight") => {
                let divisors = self.rope_divisors()?.into_iter();
                RopeScaling::Divisors(divisors.map(|x| x * factor.unwrap_or(1.0)).collect())
            }
            Some(factor) => RopeScaling::Linear { factor },
            None => RopeScaling::None,
        };
        let theta = self.float("llama.rope.freq_base")?.unwrap_or(10_000.0);
        Ok(RopeConfig { theta, pairs: RopePairs::Interleaved, scaling })
    }

    /// The factor of linear scaling, under its key or its old one. As in llama.cpp, a factor alone
    /// means linear scaling, and 0 none.
    fn rope_factor(&self) -> Result<Option<f32>> {
        let (kind, key) = ("llama.rope.scaling.type", "llama.rope.scaling.factor");
        let factor = match self.float(key)? {
            Some(factor) => Some(factor),
            None => self.float("llama.rope.scale_linear")?,
        };
        let factor = factor.filter(|&factor| factor != 0.0);
        match self.text(kind)? {
            None => Ok(factor),
            Some("none") => Ok(None),
            Some("linear") => Ok(Some(factor.ok_or_else(|| self.missing(key, "a number"))?)),
            Some(other) => Err(Error::Unsupported(format!(
                "llama.rope.scaling.type {other:?}, expected \"none\" or \"linear\""
            ))),
        }
    }

    fn rope_divisors(&self) -> Result<Vec<f32>> {
        let tensor = self.tensor("rope_freqs.weight", None, &Device::Cpu)?;
        Ok(tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?)
    }

    /// Rows of the embedding table; `llama.vocab_size` and the number of tokens must agree with it.
    fn vocab_size(&self) -> Result<usize> {
        let name = "token_embd.weight";
        let info = self.info(name)?;
        let rows = match *info.shape.dims() {
            [rows, _] => rows,
            ref shape => {
                return Err(corrupt(
                    &self.path,
                    format!("tensor {name:?} has shape {shape:?}, expected two dimensions"),
                ));
            }
        };
        let tokens = match self.get("tokenizer.ggml.tokens") {
            Some(Value::Array(tokens)) => Some(tokens.len()),
            _ => None,
        };
        let key = "llama.vocab_size";
        for (name, size) in [(key, self.size(key)?), ("tokenizer.ggml.tokens", tokens)] {
            if let Some(size) = size.filter(|&size| size != rows) {
                return Err(corrupt(
                    &self.path,
                    format!(
                        "vocabulary size {size} by {name}, but the embedding table has {rows} rows"
                    ),
                ));
            }
        }
        Ok(rows)
    }

    /// The value of a key.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    /// The value of a key, where it is there, as `read` takes it.
    fn get_as<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(self.mistyped(key, value, expected)),
        }
    }

    /// The value of a key that must be a string where it is there.
    pub(super) fn text(&self, key: &str) -> Result<Option<&str>> {
        self.get_as(key, "a string", |value| value.to_string().ok().map(String::as_str))
    }

    /// The value of a key that must be a string.
    pub(super) fn string(&self, key: &str) -> Result<&str> {
        self.text(key)?.ok_or_else(|| self.missing(key, "a string"))
    }

    /// The value of a key that must be a non-negative integer where it is there.
    pub(super) fn size(&self, key: &str) -> Result<Option<usize>> {
        self.get_as(key, "an unsigned integer", |value| match *value {
            Value::U8(x) => Some(usize::from(x)),
            Value::U16(x) => Some(usize::from(x)),
            Value::U32(x) => usize::try_from(x).ok(),
            Value::U64(x) => usize::try_from(x).ok(),
            Value::I32(x) => usize::try_from(x).ok(),
            Value::I64(x) => usize::try_from(x).ok(),
            _ => None,
        })
    }

    /// The value of a key that must be the number of one of `count` tokens where it is there.
    pub(super) fn token_id(&self, key: &str, count: usize) -> Result<Option<u32>> {
        let Some(id) = self.size(key)? else { return Ok(None) };
        match u32::try_from(id) {
            Ok(small) if id < count => Ok(Some(small)),
            _ => Err(corrupt(&self.path, format!("{key} is {id}, expected less than {count}"))),
        }
    }

    /// The value of a key that must be a number where it is there.
    pub(super) fn float(&self, key: &str) -> Result<Option<f32>> {
        self.get_as(key, "a number", |value| match *value {
            Value::F32(x) => Some(x),
            Value::F64(x) => Some(x as f32),
            _ => None,
        })
    }

    /// The value of a key that must be a boolean where it is there.
    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.get_as(key, "a boolean", |value| value.to_bool().ok())
    }

    /// The value of a key that must be an array where it is there.
    pub(super) fn array(&self, key: &str) -> Result<Option<&[Value]>> {
        self.get_as(key, "an array", |value| value.to_vec().ok().map(Vec::as_slice))
    }

    /// The value of a key that must be an array of strings.
    pub(super) fn strings(&self, key: &str) -> Result<Vec<&str>> {
        let values = self.array(key)?.ok_or_else(|| self.missing(key, "an array"))?;
        let text = values.iter().map(|value| match value {
            Value::String(text) => Ok(text.as_str()),
            other => Err(self.mistyped(key, other, "an array of strings")),
        });
        text.collect()
    }

    /// Whether there is a tensor of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// Whether there is a tensor whose name starts with `start`.
    pub(super) fn has_any(&self, start: &str) -> bool {
        self.content.tensor_infos.keys().any(|name| name.starts_with(start))
    }

    /// The tensor `name`, of this shape if one is given.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::ModelShape`], or [`Error::Corrupt`] if it cannot be read.
    pub(super) fn tensor(
        &self,
        name: &str,
        shape: Option<&[usize]>,
        device: &Device,
    ) -> Result<QTensor> {
        let info = self.info(name)?;
        if let Some(shape) = shape.filter(|&shape| shape != info.shape.dims()) {
            return Err(Error::ModelShape {
                path: self.path.clone(),
                name: name.to_string(),
                found: info.shape.dims().to_vec(),
                expected: shape.to_vec(),
            });
        }
        let mut reader = Positioned::new(&self.file, self.size);
        info.read(&mut reader, self.content.tensor_data_offset, device)
            .map_err(|e| corrupt(&self.path, format!("tensor {name:?}: {}", reason(e))))
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.content.tensor_infos.get(name).ok_or_else(|| Error::MissingTensor {
            path: self.path.clone(),
            name: name.to_string(),
            hint: format!(" (it holds {} tensors)", self.content.tensor_infos.len()),
        })
    }

    pub(super) fn missing(&self, key: &str, expected: &str) -> Error {
        corrupt(&self.path, format!("no metadata key {key:?}, expected {expected}"))
    }

    fn mistyped(&self, key: &str, found: &Value, expected: &str) -> Error {
        let found = match found {
            Value::Array(values) => format!("an array of {}", values.len()),
            other => format!("{other:?}"),
        };
        corrupt(&self.path, format!("metadata key {key:?} is {found}, expected {expected}"))
    }
}

/// Tells what is no GGUF file from one that is damaged.
fn check_start(path: &Path, file: impl Read) -> Result<()> {
    let mut start = Vec::new();
    file.take(32)
        .read_to_end(&mut start)
        .map_err(|problem| unreadable("GGUF file", path, problem))?;
    if start.starts_with(b"version https://git-lfs") {
        return Err(corrupt(path, "a Git LFS pointer; fetch the file itself (git lfs pull)"));
    }
    if !start.starts_with(b"GGUF") {
        let found = String::from_utf8_lossy(&start[..start.len().min(4)]).into_owned();
        return Err(corrupt(path, format!("not a GGUF file: it starts with {found:?}")));
    }
    Ok(())
}

/// The size of a tensor in the file; none if it has no meaning.
fn bytes(tensor: &TensorInfo) -> Option<u64> {
    let elements = tensor.shape.dims().iter().try_fold(1usize, |n, &dim| n.checked_mul(dim))?;
    let blocks = elements.checked_div(tensor.ggml_dtype.block_size())?;
    u64::try_from(blocks.checked_mul(tensor.ggml_dtype.type_size())?).ok()
}

/// What Candle says, without the backtrace that it may add.
fn reason(error: candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}
