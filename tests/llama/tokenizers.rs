//! Tokenizers from GGUF metadata and from a folder, stop tokens, chat templates.

use super::tiny::{GgufFile, Tiny, VOCAB, sentence_piece, strings, tokens};
use anyhow::Result;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use candle_int8_attention::models::llama::LlamaTokenizer;

const START: u32 = VOCAB as u32 - 2;
const END: u32 = VOCAB as u32 - 1;

fn file() -> Result<GgufFile> {
    Tiny::new(true)?.gguf(GgmlDType::F32)
}

fn tokenizer(file: &GgufFile) -> Result<LlamaTokenizer> {
    let folder = tempfile::tempdir()?;
    Ok(LlamaTokenizer::load(file.write(folder.path())?)?)
}

fn pieces(tokenizer: &LlamaTokenizer, text: &str) -> Result<Vec<String>> {
    let ids = tokenizer.encode(text, false)?;
    Ok(ids.iter().filter_map(|&id| tokenizer.tokenizer().id_to_token(id)).collect())
}

#[test]
fn bytes_are_merged_in_the_order_of_the_file() -> Result<()> {
    let tokenizer = tokenizer(&file()?)?;
    assert_eq!(pieces(&tokenizer, "the the he 12")?, ["t", "he", "Ġthe", "Ġ", "he", "Ġ", "1", "2"]);
    Ok(())
}

#[test]
fn every_text_comes_back() -> Result<()> {
    for pre in ["gpt-2", "default", "smollm", "llama-bpe", "qwen2", "tekken"] {
        let tokenizer = tokenizer(&file()?.set("tokenizer.ggml.pre", Value::String(pre.into())))?;
        for text in ["", " ", "the  the\n\n\tend ", "naïve — “1813” 𝄞 日本", "it's I'LL\r\n"]
        {
            assert_eq!(tokenizer.decode(&tokenizer.encode(text, false)?)?, text, "{pre}");
        }
    }
    Ok(())
}

#[test]
fn digits_are_split_as_the_model_was_trained() -> Result<()> {
    let mut words = tokens();
    words[0] = "12".into();
    words[1] = "123".into();
    for (pre, expected) in [
        ("smollm", vec!["1", "2", "3", "4"]),
        ("qwen2", vec!["1", "2", "3", "4"]),
        ("llama-bpe", vec!["123", "4"]),
        ("gpt-2", vec!["123", "4"]),
    ] {
        let file = file()?
            .set("tokenizer.ggml.tokens", strings(&words))
            .set("tokenizer.ggml.merges", strings(&["1 2", "12 3"]))
            .set("tokenizer.ggml.pre", Value::String(pre.into()));
        assert_eq!(pieces(&tokenizer(&file)?, "1234")?, expected, "{pre}");
    }
    Ok(())
}

#[test]
fn control_tokens_are_found_in_text_and_left_out_of_it() -> Result<()> {
    let tokenizer = tokenizer(&file()?)?;
    let ids = tokenizer.encode("<|start|>h<|im_end|>", false)?;
    assert_eq!(ids.len(), 3);
    assert_eq!((ids[0], ids[2]), (START, END));
    assert_eq!(tokenizer.decode(&ids)?, "h");
    assert!(tokenizer.stops_at(END) && !tokenizer.stops_at(START));
    assert_eq!(tokenizer.bos_token(), Some("<|start|>"));
    assert_eq!(tokenizer.eos_token(), Some("<|im_end|>"));
    assert!(tokenizer.chat_template().is_some_and(|template| template.contains("messages")));
    Ok(())
}

#[test]
fn a_start_token_is_added_where_the_model_expects_one() -> Result<()> {
    let encode = |file: &GgufFile| tokenizer(file)?.encode("h", true).map_err(Into::into);
    let without: Result<Vec<u32>> = encode(&file()?);
    assert_eq!(without?.len(), 1);
    let with = file()?.set("tokenizer.ggml.add_bos_token", Value::Bool(true));
    assert_eq!(encode(&with)?[0], START);
    assert_eq!(tokenizer(&with)?.encode("h", false)?.len(), 1);
    let llama_3 = file()?.set("tokenizer.ggml.pre", Value::String("llama-bpe".into()));
    assert_eq!(encode(&llama_3)?[0], START);
    Ok(())
}

#[test]
fn sentence_piece_merges_by_score() -> Result<()> {
    let tokenizer = sentence_piece()?;
    assert_eq!(pieces(&tokenizer, "abc ab")?, ["▁abc", "▁", "ab"]);
    assert_eq!(pieces(&tokenizer, "aé")?, ["▁", "a", "<0xC3>", "<0xA9>"]);
    assert_eq!(tokenizer.encode("a", true)?[0], 1);
    for text in ["abc ab", "aé  b", " a"] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text, true)?)?, text);
    }
    assert!(tokenizer.stops_at(2));
    Ok(())
}

#[test]
fn a_folder_has_its_own_files_for_all_that() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let from_gguf = tokenizer(&file()?)?;
    let path = |name: &str| folder.path().join(name);
    from_gguf.tokenizer().save(path("tokenizer.json"), false).map_err(anyhow::Error::msg)?;
    std::fs::write(path("config.json"), super::tiny::config(true).to_string())?;
    let plain = LlamaTokenizer::load(folder.path())?;
    assert!(plain.stops_at(END) && plain.chat_template().is_none());
    assert_eq!(plain.encode("the <|start|>", true)?, from_gguf.encode("the <|start|>", true)?);

    let config = serde_json::json!({
        "bos_token": {"content": "<|start|>"}, "eos_token": "<|im_end|>",
        "chat_template": [
            {"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chat"},
        ],
    });
    std::fs::write(path("tokenizer_config.json"), config.to_string())?;
    std::fs::write(path("generation_config.json"), r#"{"eos_token_id": [3, 4]}"#)?;
    let full = LlamaTokenizer::load(folder.path())?;
    assert!([3, 4, END].iter().all(|&id| full.stops_at(id)));
    assert_eq!(full.chat_template(), Some("chat"));
    assert_eq!((full.bos_token(), full.eos_token()), (Some("<|start|>"), Some("<|im_end|>")));
    std::fs::write(path("chat_template.jinja"), "newer")?;
    assert_eq!(LlamaTokenizer::load(folder.path())?.chat_template(), Some("newer"));
    std::fs::write(path("tokenizer_config.json"), "{")?;
    let error = LlamaTokenizer::load(folder.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json"), "{error}");
    Ok(())
}
