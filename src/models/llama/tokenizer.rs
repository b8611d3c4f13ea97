//! Text to ids and back.

use super::gguf::Gguf;
use super::gguf_tokenizer;
use crate::Result;
use crate::files::{corrupt, read_text};
use crate::models::tokenizer_file;
use serde::Deserialize;
use serde_json::Value as Json;
use std::path::Path;
use tokenizers::Tokenizer;

/// A tokenizer with what generating text needs besides: the tokens after which to stop, and the
/// template of a chat.
#[derive(Debug, Clone)]
pub struct LlamaTokenizer {
    tokenizer: Tokenizer,
    stop_tokens: Vec<u32>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    chat_template: Option<String>,
}

/// Control tokens that end a text or a turn of a chat, in the vocabularies that have them. Files
/// often name one and use another.
const STOP_WORDS: [&str; 6] =
    ["<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "</s>"];

impl LlamaTokenizer {
    /// Loads the tokenizer of a GGUF file or of a folder.
    ///
    /// # Errors
    /// Those of [`LlamaTokenizer::from_gguf`] and [`LlamaTokenizer::from_folder`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if path.is_dir() { Self::from_folder(path) } else { Self::from_gguf(&Gguf::open(path)?) }
    }

    /// Builds the tokenizer that a GGUF file describes: byte-level BPE (`gpt2`) or SentencePiece
    /// BPE (`llama`).
    ///
    /// # Errors
    /// [`Error::Corrupt`](crate::Error::Corrupt) for keys that are missing, contradict each other, or name a kind of
    /// tokenizer that is not known.
    pub fn from_gguf(file: &Gguf) -> Result<Self> {
        let tokens = file.strings("tokenizer.ggml.tokens")?;
        let id = |name: &str| file.token_id(&format!("tokenizer.ggml.{name}"), tokens.len());
        let text = |name: &str| -> Result<Option<String>> {
            Ok(id(name)?.map(|id| tokens[id as usize].to_string()))
        };
        let mut named = Vec::new();
        for name in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            named.extend(id(name)?);
        }
        let tokenizer = gguf_tokenizer::from_gguf(file)?;
        Ok(Self {
            stop_tokens: stop_tokens(&tokenizer, named.into_iter()),
            tokenizer,
            bos_token: text("bos_token_id")?,
            eos_token: text("eos_token_id")?,
            chat_template: file.text("tokenizer.chat_template")?.map(str::to_string),
        })
    }

    /// Loads `tokenizer.json` of a folder, and where they are there: `tokenizer_config.json` and
    /// `chat_template.jinja` for chats, `generation_config.json` and `config.json` for where to
    /// stop.
    ///
    /// # Errors
    /// [`Error::MissingFile`](crate::Error::MissingFile) without `tokenizer.json`,
    /// [`Error::Io`](crate::Error::Io), [`Error::Corrupt`](crate::Error::Corrupt) for a
    /// file that is not what its name promises.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let tokenizer = tokenizer_file::load(&folder.join("tokenizer.json"))?;
        let chat: ChatConfig = read_json(&folder.join("tokenizer_config.json"))?;
        let mut named = Vec::new();
        for name in ["generation_config.json", "config.json"] {
            let config: StopConfig = read_json(&folder.join(name))?;
            named.extend(config.eos_token_id.map(Ids::into_vec).unwrap_or_default());
        }
        let eos_token = chat.eos_token.map(AddedToken::into_text);
        named.extend(eos_token.as_ref().and_then(|token| tokenizer.token_to_id(token)));
        let template = folder.join("chat_template.jinja");
        Ok(Self {
            stop_tokens: stop_tokens(&tokenizer, named.into_iter()),
            tokenizer,
            bos_token: chat.bos_token.map(AddedToken::into_text),
            eos_token,
            chat_template: match template.is_file() {
                true => Some(read_text("chat template", &template)?),
                false => chat.chat_template.and_then(default_template),
            },
        })
    }

    /// The tokenizer itself, for example for its
    /// [`decode_stream`](tokenizers::TokenizerImpl::decode_stream).
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Text to ids. Text of special tokens (`<|im_end|>`) becomes those tokens. With `whole`, the
    /// text is a beginning, and gets the token in front that the model expects there, if it expects
    /// one; a chat by the model's template has it already.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the tokenizer fails.
    pub fn encode(&self, text: &str, whole: bool) -> Result<Vec<u32>> {
        let encoding = tokenizer_file::run(|| self.tokenizer.encode_fast(text, whole))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids to text, without special tokens.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        tokenizer_file::run(|| self.tokenizer.decode(ids, true))
    }

    /// Whether a text ends with this token.
    pub fn stops_at(&self, id: u32) -> bool {
        self.stop_tokens.contains(&id)
    }

    /// The Jinja template that makes a text of a chat's messages.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The token that begins a text, which templates ask for.
    pub fn bos_token(&self) -> Option<&str> {
        self.bos_token.as_deref()
    }

    /// The token that ends a text, which templates ask for.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos_token.as_deref()
    }
}

/// The tokens that the files name, and those known by their text.
fn stop_tokens(tokenizer: &Tokenizer, named: impl Iterator<Item = u32>) -> Vec<u32> {
    let special = tokenizer.get_added_tokens_decoder();
    let is_special = |id: &u32| special.get(id).is_some_and(|token| token.special);
    let known = STOP_WORDS.iter().filter_map(|word| tokenizer.token_to_id(word)).filter(is_special);
    let mut ids: Vec<u32> = named.chain(known).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// A JSON file that need not be there.
fn read_json<T: Default + for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    if !path.is_file() {
        return Ok(T::default());
    }
    serde_json::from_str(&read_text("configuration", path)?).map_err(|e| corrupt(path, e))
}

/// Of `tokenizer_config.json`.
#[derive(Deserialize, Default)]
struct ChatConfig {
    bos_token: Option<AddedToken>,
    eos_token: Option<AddedToken>,
    chat_template: Option<Json>,
}

/// Of `generation_config.json` and `config.json`.
#[derive(Deserialize, Default)]
struct StopConfig {
    eos_token_id: Option<Ids>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl Ids {
    fn into_vec(self) -> Vec<u32> {
        match self {
            Ids::One(id) => vec![id],
            Ids::Many(ids) => ids,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum AddedToken {
    Text(String),
    Object { content: String },
}

impl AddedToken {
    fn into_text(self) -> String {
        match self {
            AddedToken::Text(text) | AddedToken::Object { content: text } => text,
        }
    }
}

/// A template is a string, or one of a list with names.
fn default_template(template: Json) -> Option<String> {
    match template {
        Json::String(text) => Some(text),
        Json::Array(templates) => {
            let named = |wanted: &str| templates.iter().find(|t| t["name"] == wanted);
            named("default").or(templates.first())?["template"].as_str().map(str::to_string)
        }
        _ => None,
    }
}
