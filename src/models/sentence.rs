//! What sentence-transformers stores beside a model, and obeys: how an embedding is made of hidden
//! states, how long a text may be, and what is put in front of it.
//!
//! ```text
//! modules.json                      the modules, first to last: Transformer, Pooling, Dense, Normalize
//!   1_Pooling/config.json           mean, cls, max or lasttoken
//!   2_Dense/config.json, model.safetensors
//! sentence_bert_config.json         max_seq_length, do_lower_case
//! config_sentence_transformers.json prompts, default_prompt_name
//! ```

use super::Weights;
use super::pooling::PoolingConfig;
use crate::files::{corrupt, read_text};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use candle_nn::{Linear, Module as _};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

/// The files beside a model that are read, but for those that `modules.json` names.
pub(crate) const FILES: [&str; 4] = [
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
];

/// A line of `modules.json`.
#[derive(Deserialize)]
pub(crate) struct Module {
    #[serde(rename = "type")]
    class: String,
    /// The module's folder.
    path: String,
}

/// `sentence_bert_config.json`.
#[derive(Deserialize, Default)]
struct TextConfig {
    max_seq_length: Option<usize>,
    #[serde(default)]
    do_lower_case: bool,
}

/// `config_sentence_transformers.json`.
#[derive(Deserialize, Default)]
struct PromptConfig {
    #[serde(default)]
    prompts: BTreeMap<String, String>,
    default_prompt_name: Option<String>,
}

/// How text becomes an embedding, but for tokenizer and model.
pub(super) struct SentenceConfig {
    /// The most tokens of a text, where there is a limit other than the model's.
    pub(super) max_tokens: Option<usize>,
    pub(super) lower_case: bool,
    /// What may be put in front of a text, by name.
    pub(super) prompts: BTreeMap<String, String>,
    /// The one that is put there where none is asked for.
    pub(super) default_prompt: Option<String>,
    pub(super) pooling: PoolingConfig,
    after: Vec<After>,
    /// Elements of an embedding.
    pub(super) width: usize,
}

/// What follows the pooling.
enum After {
    Dense { linear: Linear, activation: Activation },
    Normalize,
}

/// What is done to every element.
type Activation = fn(&Tensor) -> candle_core::Result<Tensor>;

/// By the names of PyTorch's classes.
const ACTIVATIONS: [(&str, Activation); 5] = [
    ("Identity", |x| Ok(x.clone())),
    ("Tanh", Tensor::tanh),
    ("ReLU", Tensor::relu),
    ("GELU", Tensor::gelu_erf),
    ("Sigmoid", candle_nn::ops::sigmoid),
];

impl SentenceConfig {
    /// Reads what is in `folder` beside a model whose states have `hidden` elements. A folder
    /// without any of it means the mean over tokens.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a file that is not what its name promises, [`Error::Unsupported`] for a
    /// module that is not implemented, [`Error::Mismatch`] and [`Error::MissingFile`] for files that
    /// contradict each other, and those of [`Weights`].
    pub(super) fn load(folder: &Path, hidden: usize, device: &Device) -> Result<Self> {
        let path = folder.join("sentence_bert_config.json");
        let text: TextConfig = read_if_there(&path)?.unwrap_or_default();
        if text.max_seq_length == Some(0) {
            return Err(corrupt(&path, "max_seq_length 0, expected at least 1"));
        }
        let path = folder.join("config_sentence_transformers.json");
        let PromptConfig { prompts, default_prompt_name } =
            read_if_there(&path)?.unwrap_or_default();
        if let Some(name) = default_prompt_name.as_ref().filter(|name| !prompts.contains_key(*name))
        {
            let names: Vec<&String> = prompts.keys().collect();
            let problem = format!("default_prompt_name {name:?}, expected one of {names:?}");
            return Err(corrupt(&path, problem));
        }
        let mut config = Self {
            max_tokens: text.max_seq_length,
            lower_case: text.do_lower_case,
            prompts,
            default_prompt: default_prompt_name,
            pooling: PoolingConfig::default(),
            after: Vec::new(),
            width: hidden,
        };
        config.read_modules(folder, hidden, device)?;
        Ok(config)
    }

    fn read_modules(&mut self, folder: &Path, hidden: usize, device: &Device) -> Result<()> {
        let path = folder.join("modules.json");
        if !path.is_file() {
            let pooling = folder.join("1_Pooling").join("config.json");
            if pooling.is_file() {
                self.read_pooling(&pooling, hidden)?;
            }
            return Ok(());
        }
        let modules = read_modules(&path)?;
        let mut pooled = false;
        for (index, module) in modules.iter().enumerate() {
            let own = folder.join(&module.path);
            match (module.name(), index, pooled) {
                ("Transformer", 0, _) if module.path.is_empty() || module.path == "." => {}
                ("Transformer", 0, _) => {
                    return Err(Error::Unsupported(format!(
                        "{}: the Transformer is in {:?}, expected it beside modules.json",
                        path.display(),
                        module.path
                    )));
                }
                ("Pooling", 1, _) => {
                    self.read_pooling(&own.join("config.json"), hidden)?;
                    pooled = true;
                }
                ("Dense", _, true) => self.read_dense(&own, device)?,
                ("Normalize", _, true) => self.after.push(After::Normalize),
                // Of training alone.
                ("Dropout", _, true) => {}
                _ => {
                    return Err(Error::Unsupported(format!(
                        "{}: module {index} is {:?}, expected Transformer, Pooling, and then Dense \
                         and Normalize",
                        path.display(),
                        module.class
                    )));
                }
            }
        }
        match pooled {
            true => Ok(()),
            false => Err(corrupt(&path, "names no Pooling")),
        }
    }

    fn read_pooling(&mut self, path: &Path, hidden: usize) -> Result<()> {
        self.pooling = PoolingConfig::load(path, hidden)?;
        self.width = hidden * self.pooling.modes.len();
        Ok(())
    }

    fn read_dense(&mut self, folder: &Path, device: &Device) -> Result<()> {
        #[derive(Deserialize)]
        struct Config {
            in_features: usize,
            out_features: usize,
            #[serde(default = "yes")]
            bias: bool,
            activation_function: Option<String>,
        }
        let path = folder.join("config.json");
        let config: Config = read("configuration of a dense layer", &path)?;
        let (inputs, outputs) = (config.in_features, config.out_features);
        if inputs != self.width {
            return Err(Error::Mismatch(format!(
                "{}: in_features {inputs}, but what comes before gives {}",
                path.display(),
                self.width
            )));
        }
        let activation = activation(config.activation_function.as_deref(), &path)?;
        let weights = folder.join("model.safetensors");
        if !weights.is_file() {
            return Err(Error::MissingFile { what: "weights of a dense layer", path: weights });
        }
        let weights = Weights::open(weights)?;
        let weight = weights.get("linear.weight", &[outputs, inputs], device)?;
        let bias = match config.bias {
            true => Some(weights.get("linear.bias", &[outputs], device)?),
            false => None,
        };
        self.after.push(After::Dense { linear: Linear::new(weight, bias), activation });
        self.width = outputs;
        Ok(())
    }

    /// The name of the prompt that is meant, and its text.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a name that no prompt has.
    pub(super) fn prompt(&self, name: Option<&str>) -> Result<&str> {
        let Some(name) = name.or(self.default_prompt.as_deref()) else { return Ok("") };
        self.prompts.get(name).map(String::as_str).ok_or_else(|| {
            let names: Vec<&String> = self.prompts.keys().collect();
            Error::InvalidArgument(format!("prompt {name:?}, expected one of {names:?}"))
        })
    }

    /// Hidden states `[B, N, hidden]` to embeddings `[B, width]`; `mask` as in
    /// [`Pooling::forward`](super::Pooling::forward).
    pub(super) fn forward(&self, hidden: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let mut x = self.pooling.forward(hidden, mask)?;
        for after in &self.after {
            x = match after {
                After::Dense { linear, activation } => activation(&linear.forward(&x)?)?,
                After::Normalize => normalized(&x)?,
            };
        }
        Ok(x)
    }
}

fn yes() -> bool {
    true
}

/// That of a class, without which it is tanh.
fn activation(class: Option<&str>, path: &Path) -> Result<Activation> {
    let Some(class) = class else { return Ok(Tensor::tanh) };
    let name = class.rsplit('.').next();
    match ACTIVATIONS.iter().find(|(known, _)| Some(*known) == name) {
        Some((_, activation)) => Ok(*activation),
        None => Err(Error::Unsupported(format!(
            "{}: activation_function {class:?}, expected Identity, Tanh, ReLU, GELU or Sigmoid",
            path.display()
        ))),
    }
}

/// Rows of length 1; one of zeros stays.
fn normalized(x: &Tensor) -> Result<Tensor> {
    let length = x.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(1e-12)?;
    Ok(x.broadcast_div(&length)?)
}

impl Module {
    /// The last part of the class.
    fn name(&self) -> &str {
        self.class.rsplit('.').next().unwrap_or_default()
    }

    /// The files of the module, behind the name of its folder.
    pub(crate) fn files(&self) -> Vec<String> {
        let files: &[&str] = match self.name() {
            "Pooling" => &["config.json"],
            "Dense" => &["config.json", "model.safetensors"],
            _ => &[],
        };
        files.iter().map(|file| format!("{}/{file}", self.path)).collect()
    }
}

/// Reads a `modules.json`.
///
/// # Errors
/// [`Error::Corrupt`] for what is none, leads out of its folder, or has two dense layers in one folder: memory
/// would grow with their number, not with the files.
pub(crate) fn read_modules(path: &Path) -> Result<Vec<Module>> {
    let modules: Vec<Module> = read("modules", path)?;
    let inside = |module: &&Module| {
        let mut parts = Path::new(&module.path).components();
        parts.all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
    };
    if let Some(Module { path: found, .. }) = modules.iter().find(|module| !inside(module)) {
        let problem = format!("names the folder {found:?}, expected one beside it");
        return Err(corrupt(path, problem));
    }
    let mut folders = BTreeSet::new();
    let parts = |module: &Module| {
        let parts = Path::new(&module.path).components();
        parts.filter(|part| *part != Component::CurDir).collect::<PathBuf>()
    };
    let mut dense = modules.iter().filter(|module| module.name() == "Dense");
    match dense.find(|module| !folders.insert(parts(module))) {
        Some(twice) => {
            Err(corrupt(path, format!("has two dense layers in the folder {:?}", twice.path)))
        }
        None => Ok(modules),
    }
}

fn read_if_there<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if path.is_file() { Ok(Some(read("configuration", path)?)) } else { Ok(None) }
}

fn read<T: DeserializeOwned>(what: &'static str, path: &Path) -> Result<T> {
    serde_json::from_str(&read_text(what, path)?).map_err(|e| corrupt(path, e))
}
