//! How the examples cut a text into passages for a decoder.

use crate::common::tiny::{CONTEXT, GgufFile, Tiny, sentence_piece};
use crate::parts::cutter::decoder::DecoderCutter;
use crate::parts::cutter::{Cutter, Passage};
use anyhow::Result;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use candle_int8_attention::models::llama::LlamaTokenizer;

fn tokenizer(change: impl Fn(GgufFile) -> GgufFile) -> Result<LlamaTokenizer> {
    let folder = tempfile::tempdir()?;
    let file = change(Tiny::new(true)?.gguf(GgmlDType::Q8_0)?).write(folder.path())?;
    Ok(LlamaTokenizer::load(file)?)
}

/// The passages of a text that comes in pieces of about `piece` bytes.
fn passages(cutter: &mut dyn Cutter, text: &str, piece: usize) -> Result<Vec<Passage>> {
    let (mut found, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let space = rest.bytes().skip(piece).position(|b| b.is_ascii_whitespace());
        let (part, later) = rest.split_at(space.map_or(rest.len(), |at| piece + at + 1));
        rest = later;
        cutter.push(part)?;
        while let Some(passage) = cutter.next(rest.is_empty())? {
            found.push(passage);
        }
    }
    cutter.check()?;
    Ok(found)
}

/// Words, lines, and signs of up to four tokens.
fn text() -> String {
    let lines = [
        "The cat and the dog,\n",
        "\u{1f980}\u{1f980} crabs \u{e9}t\u{e9}\r\n\n",
        "then the end. ",
    ];
    (0..200).map(|i| lines[i * i % 3]).collect()
}

#[test]
fn passages_hold_all_of_the_text_in_order() -> Result<()> {
    let tokenizer = tokenizer(|file| file)?;
    let text = text();
    for tokens in [8, 9, 10, 11, 64, CONTEXT] {
        let mut cutter = DecoderCutter::new(&tokenizer, CONTEXT, Some(tokens))?;
        let found = passages(&mut cutter, &text, text.len())?;
        let mut joined = String::new();
        for Passage { ids, words } in &found {
            let ids = ids.squeeze(0)?.to_vec1::<u32>()?;
            assert!(ids.len() <= tokens && ids.len() == words.len(), "{} {tokens}", ids.len());
            // Whole signs, and the tokens that the tokenizer gives this part alone.
            let part = tokenizer.decode(&ids)?;
            assert_eq!(tokenizer.encode(&part, false)?, ids, "{part:?}");
            assert_eq!(words.concat(), part.replace('\r', "").replace('\n', "\u{23ce}"));
            joined += &part;
        }
        assert!(joined == text, "passages of {tokens} tokens lose text");
        // A sign of four tokens may wait for the next passage, no more.
        let (_, full) = found.split_last().expect("passages");
        assert!(full.iter().all(|passage| passage.words.len() + 3 >= tokens), "{tokens}");
    }
    Ok(())
}

#[test]
fn how_the_text_arrives_does_not_show() -> Result<()> {
    let tokenizer = tokenizer(|file| file)?;
    let text = text();
    let ids = |piece: usize| -> Result<Vec<Vec<u32>>> {
        let mut cutter = DecoderCutter::new(&tokenizer, CONTEXT, Some(50))?;
        let found = passages(&mut cutter, &text, piece)?;
        found.iter().map(|passage| Ok(passage.ids.squeeze(0)?.to_vec1()?)).collect()
    };
    let whole = ids(text.len())?;
    assert!(whole.len() > 20);
    for piece in [0, 1, 100, 1000] {
        assert_eq!(ids(piece)?, whole, "pieces of {piece} bytes");
    }
    Ok(())
}

#[test]
fn every_passage_begins_with_the_token_that_the_model_expects() -> Result<()> {
    let tokenizer = tokenizer(|file| file.set("tokenizer.ggml.add_bos_token", Value::Bool(true)))?;
    let start = tokenizer.encode("", true)?;
    assert_eq!(start.len(), 1);
    let mut cutter = DecoderCutter::new(&tokenizer, CONTEXT, Some(20))?;
    assert_eq!((cutter.special_tokens(), cutter.passage_tokens()), (1, 20));
    for Passage { ids, words } in passages(&mut cutter, &text(), 100)? {
        assert_eq!(ids.squeeze(0)?.to_vec1::<u32>()?[0], start[0]);
        assert_eq!(words[0], "<|start|>");
    }
    Ok(())
}

/// Which puts a space before every text, and writes what it does not know as bytes.
#[test]
fn passages_of_sentence_piece_hold_all_of_the_text() -> Result<()> {
    let tokenizer = sentence_piece()?;
    let text = "abc ab a\u{e9} \u{1f980}b  c".repeat(40);
    for tokens in [9, 10, 11, 12, 13, 100] {
        let mut cutter = DecoderCutter::new(&tokenizer, CONTEXT, Some(tokens))?;
        let found = passages(&mut cutter, &text, 64)?;
        assert!(found.iter().all(|passage| passage.words.len() <= tokens), "{tokens}");
        let words = found.iter().flat_map(|passage| &passage.words[1..]);
        assert_eq!(words.map(String::as_str).collect::<String>(), text);
        assert!(found.iter().all(|passage| passage.words[0] == "<s>"));
    }
    Ok(())
}

#[test]
fn what_makes_no_passage_is_an_error() -> Result<()> {
    let tokenizer = tokenizer(|file| file)?;
    for tokens in [0, 7, CONTEXT + 1] {
        let error = DecoderCutter::new(&tokenizer, CONTEXT, Some(tokens)).err();
        let message = error.map(|error| error.to_string()).unwrap_or_default();
        let expected = format!("passages of {tokens} tokens; expected 8 to {CONTEXT}");
        assert!(message.contains(&expected), "{message:?}");
    }
    for blank in ["", " \n\t"] {
        let mut cutter = DecoderCutter::new(&tokenizer, CONTEXT, None)?;
        let error = passages(&mut cutter, blank, 1).err();
        // Nothing is pushed of an empty text.
        let message = error.map(|error| error.to_string()).unwrap_or_default();
        assert!(message.contains("no word or sign"), "{message:?}");
    }
    Ok(())
}
