//! A `tokenizer.json`, checked before the tokenizers crate reads it.
//!
//! That crate panics on some files, in its reader and later, when a text is encoded: on JSON that
//! ends inside the decoder, on a merged token that is shorter than the prefix of continued words,
//! on a merge to a token longer than all of the vocabulary, on a template that names a token it
//! does not define. What is known to do so is refused before. What is not known is caught: a panic
//! becomes an error that names the file. Its message still goes to the panic hook, which prints it
//! unless the program says otherwise; a library must not replace the hook of its program, and a
//! program that is built to abort on panics aborts here too.

use crate::files::{corrupt, read};
use crate::{Error, Result};
use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value as Json;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use tokenizers::Tokenizer;

/// Texts that every part of a tokenizer sees once when it is loaded.
const PROBES: [&str; 4] = ["", "a", "Two words, 12 é.", "\u{1d11e}\n\t  "];

/// Reads the tokenizer of a model. Padding and truncation that the file asks for are turned off:
/// they are for whoever knows the model's input.
///
/// # Errors
/// [`Error::MissingFile`], [`Error::Io`], or [`Error::Corrupt`] for what is no tokenizer.
pub(crate) fn load(path: &Path) -> Result<Tokenizer> {
    let bytes = read("tokenizer", path)?;
    let not_one = |problem: String| corrupt(path, format!("not a tokenizer: {problem}"));
    let outline: Outline = serde_json::from_slice(&bytes).map_err(|e| not_one(e.to_string()))?;
    outline.check().map_err(not_one)?;
    let parsed = contained(|| {
        let mut tokenizer = Tokenizer::from_bytes(&bytes)?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None)?;
        Ok(tokenizer)
    });
    let tokenizer = parsed.map_err(not_one)?;
    probe(path, &tokenizer)?;
    Ok(tokenizer)
}

/// Encodes some texts and decodes them again, for what a tokenizer does wrong whatever the text.
///
/// # Errors
/// [`Error::Corrupt`] with the path of the file that the tokenizer is from.
pub(crate) fn probe(path: &Path, tokenizer: &Tokenizer) -> Result<()> {
    let works = contained(|| {
        for text in PROBES {
            for special in [false, true] {
                // A text that the tokenizer cannot encode is an error when it is encoded.
                if let Ok(encoding) = tokenizer.encode(text, special) {
                    tokenizer.decode(encoding.get_ids(), special).ok();
                }
            }
        }
        Ok(())
    });
    works.map_err(|problem| corrupt(path, format!("a tokenizer that does not work: {problem}")))
}

/// What the tokenizers crate says, a panic in it included.
pub(crate) fn contained<T>(
    work: impl FnOnce() -> std::result::Result<T, tokenizers::Error>,
) -> std::result::Result<T, String> {
    // What a panic leaves half done is given up with the error, or is a cache behind a lock.
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => {
            let message = panic.downcast_ref::<String>().map(String::as_str);
            let message = message.or_else(|| panic.downcast_ref::<&str>().copied());
            Err(format!("the tokenizers crate panicked: {}", message.unwrap_or("no message")))
        }
    }
}

/// [`contained`] for a text that is encoded or decoded.
///
/// # Errors
/// [`Error::InvalidArgument`] with what the tokenizer says.
pub(crate) fn run<T>(
    work: impl FnOnce() -> std::result::Result<T, tokenizers::Error>,
) -> Result<T> {
    contained(work)
        .map_err(|problem| Error::InvalidArgument(format!("the tokenizer failed: {problem}")))
}

/// The parts of the file that its reader does not check. Of the vocabulary, which is most of it, the
/// longest token alone is kept.
#[derive(Deserialize)]
struct Outline {
    #[serde(default, rename = "normalizer")]
    _normalizer: Json,
    #[serde(default, rename = "pre_tokenizer")]
    _pre_tokenizer: Json,
    #[serde(default)]
    post_processor: Json,
    /// Its reader panics on what is no JSON value, so it is read as one first.
    #[serde(default, rename = "decoder")]
    _decoder: Json,
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    vocab: Longest,
}

/// Two tokens that become one, in either form.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Text(String),
}

impl Merge {
    fn tokens(&self) -> (&str, &str) {
        match self {
            Merge::Pair(first, second) => (first, second),
            Merge::Text(both) => both.split_once(' ').unwrap_or((both, "")),
        }
    }
}

/// Bytes of the longest key of a map; 0 for anything else.
#[derive(Default)]
struct Longest(usize);

impl<'de> Deserialize<'de> for Longest {
    fn deserialize<D: Deserializer<'de>>(source: D) -> std::result::Result<Self, D::Error> {
        source.deserialize_any(LongestVisitor)
    }
}

struct LongestVisitor;

impl<'de> Visitor<'de> for LongestVisitor {
    type Value = Longest;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a vocabulary")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Longest, A::Error> {
        let mut longest = 0;
        while let Some((token, IgnoredAny)) = map.next_entry::<String, _>()? {
            longest = longest.max(token.len());
        }
        Ok(Longest(longest))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Longest, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Longest(0))
    }
}

impl Outline {
    fn check(&self) -> std::result::Result<(), String> {
        self.model.check()?;
        check_processor(&self.post_processor)
    }
}

impl Model {
    /// The reader cuts the prefix off the second token without looking, and writes both where the longest token
    /// has room.
    fn check(&self) -> std::result::Result<(), String> {
        let prefix = self.continuing_subword_prefix.as_deref().unwrap_or("");
        let Longest(longest) = self.vocab;
        for (first, second) in self.merges.iter().map(Merge::tokens) {
            let Some(rest) = second.strip_prefix(prefix) else {
                return Err(format!(
                    "a merge with {second:?}, expected it to begin with the continuing_subword_prefix \
                     {prefix:?}"
                ));
            };
            let len = first.len() + rest.len();
            if len > longest {
                return Err(format!(
                    "a merge of {first:?} and {second:?} to a token of {len} bytes, but the longest of the \
                     vocabulary has {longest}"
                ));
            }
        }
        Ok(())
    }
}

/// A template, or a sequence of processors that may hold one.
fn check_processor(processor: &Json) -> std::result::Result<(), String> {
    for inner in processor["processors"].as_array().into_iter().flatten() {
        check_processor(inner)?;
    }
    if processor["type"] != "TemplateProcessing" {
        return Ok(());
    }
    let defined = &processor["special_tokens"];
    for token in defined.as_object().into_iter().flat_map(|tokens| tokens.values()) {
        let count = |part: &str| token[part].as_array().map(Vec::len);
        if count("ids") != count("tokens") {
            return Err(format!("a token {} with another number of ids and tokens", token["id"]));
        }
    }
    for (template, texts) in [("single", &["A"][..]), ("pair", &["A", "B"])] {
        for piece in processor[template].as_array().into_iter().flatten() {
            let named = &piece["SpecialToken"]["id"];
            if named.as_str().is_some_and(|id| defined.get(id).is_none()) {
                return Err(format!("the template {template:?} names {named}, but not its ids"));
            }
            let text = &piece["Sequence"]["id"];
            if text.as_str().is_some_and(|id| !texts.contains(&id)) {
                return Err(format!("the template {template:?} names text {text} of {texts:?}"));
            }
        }
    }
    Ok(())
}
