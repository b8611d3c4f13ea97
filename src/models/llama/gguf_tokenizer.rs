//! A tokenizer from the metadata of a GGUF file.

use super::gguf::Gguf;
use crate::Result;
use crate::files::corrupt;
use crate::models::tokenizer_file;
use candle_core::quantized::gguf_file::Value;
use std::collections::HashMap;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::strip::Strip;
use tokenizers::decoders::{DecoderWrapper, sequence::Sequence as Decoders};
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, NormalizerWrapper, SplitDelimiterBehavior, Tokenizer};

const MODEL: &str = "tokenizer.ggml.model";
const TOKENS: &str = "tokenizer.ggml.tokens";
const PRE: &str = "tokenizer.ggml.pre";

const TYPES: &str = "tokenizer.ggml.token_type";

/// The type of tokens that are not text.
const CONTROL: i32 = 3;
/// The type of tokens that somebody added to the vocabulary.
const USER_DEFINED: i32 = 4;

/// How text is split before its pieces are merged, by `tokenizer.ggml.pre`. The expressions are
/// those of the models' own tokenizers.
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The tokenizer that the file describes.
///
/// # Errors
/// [`Error::Corrupt`](crate::Error::Corrupt) for keys that are missing, contradict each other, or
/// name a kind of tokenizer that is not known.
pub(super) fn from_gguf(file: &Gguf) -> Result<Tokenizer> {
    let tokens = file.strings(TOKENS)?;
    check_tokens(file, &tokens)?;
    let mut tokenizer = match file.string(MODEL)? {
        "gpt2" => byte_level_bpe(file, &tokens)?,
        "llama" => sentence_piece(file, &tokens)?,
        other => {
            let problem = format!("{MODEL} {other:?}, expected \"gpt2\" or \"llama\"");
            return Err(corrupt(file.path(), problem));
        }
    };
    add_special_tokens(file, &tokens, &mut tokenizer)?;
    add_start(file, &tokens, &mut tokenizer)?;
    tokenizer_file::probe(file.path(), &tokenizer)?;
    Ok(tokenizer)
}

/// The longest token, in bytes. How a SentencePiece token is made is found by trying each of its
/// cuts, so time grows with the square of its length; the longest of Gemma, 31 spaces, has 93.
const LONGEST: usize = 512;

/// Each text is one token: of two with the same text, one could never be reached, and ids would not
/// come back from their text.
fn check_tokens(file: &Gguf, tokens: &[&str]) -> Result<()> {
    let mut ids = HashMap::new();
    for (id, &token) in tokens.iter().enumerate() {
        let len = token.len();
        if len > LONGEST {
            let problem = format!("token {id} of {len} bytes, expected at most {LONGEST}");
            return Err(corrupt(file.path(), problem));
        }
        if let Some(first) = ids.insert(token, id) {
            let problem = format!("tokens {first} and {id} are both {token:?}, expected one");
            return Err(corrupt(file.path(), problem));
        }
    }
    Ok(())
}

/// Byte pair encoding over bytes, as GPT-2 introduced it.
fn byte_level_bpe(file: &Gguf, tokens: &[&str]) -> Result<Tokenizer> {
    let key = "tokenizer.ggml.merges";
    let ids = ids_by_text(tokens);
    let merges = file.strings(key)?.into_iter().map(|merge| {
        let pair = merge.split_once(' ').filter(|(left, right)| {
            let whole = format!("{left}{right}");
            [*left, *right, &whole].iter().all(|part| ids.contains_key(*part))
        });
        pair.map(|(left, right)| (left.to_string(), right.to_string())).ok_or_else(|| {
            corrupt(file.path(), format!("{key} holds {merge:?}, expected two tokens of {TOKENS}"))
        })
    });
    let merges = merges.collect::<Result<Vec<_>>>()?;
    let pre = file.text(PRE)?.unwrap_or("gpt-2");
    let splitter = pre_tokenizer(pre).ok_or_else(|| {
        let known = "gpt-2, default, smollm, llama-bpe, qwen2 or tekken";
        corrupt(file.path(), format!("{PRE} {pre:?}, expected {known}"))
    })?;
    let model = BPE::builder()
        .vocab_and_merges(vocabulary(tokens), merges)
        .ignore_merges(takes_whole_words(pre))
        .build()
        .map_err(|e| corrupt(file.path(), e))?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(splitter));
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
    Ok(tokenizer)
}

/// Llama 3 and later models take a word that is a token as it is. They also begin with a token.
fn takes_whole_words(pre: &str) -> bool {
    matches!(pre, "llama-bpe" | "llama3" | "llama-v3" | "tekken")
}

fn pre_tokenizer(name: &str) -> Option<PreTokenizerWrapper> {
    let bytes = |use_regex| ByteLevel::new(false, true, use_regex).into();
    let by_regex = |regex: &str| -> Option<PreTokenizerWrapper> {
        let pattern = SplitPattern::Regex(regex.to_string());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).ok()?;
        Some(PreTokenizers::new(vec![split.into(), bytes(false)]).into())
    };
    match name {
        "default" | "gpt2" | "gpt-2" => Some(bytes(true)),
        "smollm" => Some(PreTokenizers::new(vec![Digits::new(true).into(), bytes(true)]).into()),
        "llama-bpe" | "llama3" | "llama-v3" | "smaug-bpe" => by_regex(LLAMA_3),
        "qwen2" | "deepseek-r1-qwen" => by_regex(QWEN_2),
        "tekken" => by_regex(TEKKEN),
        _ => None,
    }
}

/// SentencePiece's byte pair encoding, whose merges are not in the file: the score of a token says
/// how early it is made, from any two tokens that make it.
fn sentence_piece(file: &Gguf, tokens: &[&str]) -> Result<Tokenizer> {
    let model = BPE::builder()
        .vocab_and_merges(vocabulary(tokens), merges_by_score(tokens, &scores(file, tokens)?))
        .byte_fallback(true)
        .fuse_unk(true);
    let unknown = file.token_id("tokenizer.ggml.unknown_token_id", tokens.len())?.unwrap_or(0);
    let model = match tokens.get(unknown as usize) {
        Some(unknown) => model.unk_token(unknown.to_string()),
        None => model,
    };
    let mut tokenizer = Tokenizer::new(model.build().map_err(|e| corrupt(file.path(), e))?);
    let failed = |e: tokenizers::Error| corrupt(file.path(), e);
    let prefix = file.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if prefix {
        normalizers.push(Prepend::new("▁".into()).into());
    }
    normalizers.push(Replace::new(" ", "▁").map_err(failed)?.into());
    tokenizer.with_normalizer(Some(Normalizers::new(normalizers))).map_err(failed)?;
    let mut decoders: Vec<DecoderWrapper> = vec![
        Replace::new("▁", " ").map_err(failed)?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(Decoders::new(decoders)));
    Ok(tokenizer)
}

fn scores(file: &Gguf, tokens: &[&str]) -> Result<Vec<f32>> {
    let key = "tokenizer.ggml.scores";
    let scores: Vec<f32> = file
        .array(key)?
        .ok_or_else(|| file.missing(key, "an array"))?
        .iter()
        .filter_map(|value| match value {
            Value::F32(score) => Some(*score),
            _ => None,
        })
        .collect();
    if scores.len() != tokens.len() {
        let problem = format!("{key} holds {} numbers, expected {}", scores.len(), tokens.len());
        return Err(corrupt(file.path(), problem));
    }
    Ok(scores)
}

/// All pairs of tokens that make a token, those of the highest score first.
fn merges_by_score(tokens: &[&str], scores: &[f32]) -> Vec<(String, String)> {
    let ids = ids_by_text(tokens);
    let mut merges = Vec::new();
    for (token, score) in tokens.iter().zip(scores) {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if ids.contains_key(left) && ids.contains_key(right) {
                merges.push((*score, left, right));
            }
        }
    }
    // The order that Hugging Face's converter gives them.
    merges.sort_by(|x, y| y.0.total_cmp(&x.0).then(y.1.len().cmp(&x.1.len())));
    merges.into_iter().map(|(_, left, right)| (left.to_string(), right.to_string())).collect()
}

fn ids_by_text<'a>(tokens: &[&'a str]) -> HashMap<&'a str, usize> {
    tokens.iter().enumerate().map(|(id, &token)| (token, id)).collect()
}

fn vocabulary(tokens: &[&str]) -> tokenizers::models::bpe::Vocab {
    (0u32..).zip(tokens).map(|(id, token)| (token.to_string(), id)).collect()
}

/// Tokens that stand for themselves in a text: control tokens, which decoding leaves out, and those
/// that a user added.
fn add_special_tokens(file: &Gguf, tokens: &[&str], tokenizer: &mut Tokenizer) -> Result<()> {
    let Some(types) = file.array(TYPES)? else { return Ok(()) };
    if types.len() != tokens.len() {
        let problem = format!("{TYPES} holds {} numbers, expected {}", types.len(), tokens.len());
        return Err(corrupt(file.path(), problem));
    }
    let of_type = |wanted: i32| {
        let matches = move |value: &Value| {
            matches!(value, Value::I32(x) if *x == wanted)
                || matches!(value, Value::U32(x) if i32::try_from(*x) == Ok(wanted))
        };
        let tokens = tokens.iter().zip(types).filter(move |(_, value)| matches(value));
        tokens.map(move |(token, _)| {
            AddedToken::from(token.to_string(), wanted == CONTROL).normalized(false)
        })
    };
    let failed = |e: tokenizers::Error| corrupt(file.path(), e);
    tokenizer.add_tokens(of_type(USER_DEFINED)).map_err(failed)?;
    tokenizer.add_special_tokens(of_type(CONTROL)).map_err(failed)?;
    Ok(())
}

/// A token before every text, if the model expects one.
fn add_start(file: &Gguf, tokens: &[&str], tokenizer: &mut Tokenizer) -> Result<()> {
    let key = "tokenizer.ggml.bos_token_id";
    let usual = file.string(MODEL)? == "llama"
        || matches!(file.get(PRE), Some(Value::String(pre)) if takes_whole_words(pre));
    if !file.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(usual) {
        return Ok(());
    }
    let id = file.token_id(key, tokens.len())?.ok_or_else(|| file.missing(key, "a token"))?;
    let start = tokens[id as usize];
    let template = TemplateProcessing::builder()
        .try_single(vec![start.to_string(), "$A".to_string()])
        .map(|builder| builder.special_tokens(vec![(start.to_string(), id)]).build());
    match template {
        Ok(Ok(template)) => tokenizer.with_post_processor(Some(template)),
        Ok(Err(e)) => return Err(corrupt(file.path(), e)),
        Err(e) => return Err(corrupt(file.path(), e)),
    };
    Ok(())
}
