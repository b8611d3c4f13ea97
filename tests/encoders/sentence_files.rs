//! What sentence-transformers stores beside a model is obeyed, or refused by name.

use super::*;
use serde_json::Value;
use std::path::Path;

/// A BERT in a folder of its own, beside which the tests put files.
struct Beside {
    folder: tempfile::TempDir,
    files: ModelFiles,
}

impl Beside {
    fn new() -> TestResult<Self> {
        let folder = tempfile::tempdir()?;
        let files = TinyEncoder::new("bert", "").write(folder.path())?;
        Ok(Self { folder, files })
    }

    fn put(&self, name: &str, content: &Value) -> TestResult {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new("")))?;
        Ok(std::fs::write(path, content.to_string())?)
    }

    /// Names these modules, each with a folder as sentence-transformers has it.
    fn put_modules(&self, names: &[&str]) -> TestResult {
        let module = |(i, name): (usize, &&str)| {
            let path = if i == 0 { String::new() } else { format!("{i}_{name}") };
            let class = format!("sentence_transformers.models.{name}");
            json!({"idx": i, "name": i.to_string(), "path": path, "type": class})
        };
        self.put("modules.json", &names.iter().enumerate().map(module).collect())
    }

    fn put_dense(&self, folder: &str, config: &Value) -> TestResult<[Tensor; 2]> {
        let tensors = [randn((6, HIDDEN)), randn(6)];
        let named = [("linear.weight", &tensors[0]), ("linear.bias", &tensors[1])];
        self.put(&format!("{folder}/config.json"), config)?;
        let path = self.folder.path().join(folder).join("model.safetensors");
        safetensors::serialize_to_file(named, None, &path)?;
        Ok(tensors)
    }

    fn load(&self) -> Result<TextEncoder, Error> {
        TextEncoder::load_in(&self.files, &CPU, Precision::F32)
    }

    fn embed(&self, texts: &[&str]) -> TestResult<Tensor> {
        Ok(self.load()?.embed_sentences(texts)?)
    }

    fn error(&self) -> Error {
        self.load().err().expect("it was loaded")
    }
}

const TEXTS: [&str; 2] = ["the sea is wide", "a ship sails far and the storm comes"];

/// The hidden states of the texts, each alone, `[N, HIDDEN]`.
fn states(encoder: &TextEncoder) -> TestResult<Vec<Tensor>> {
    let of_text = |text: &&str| -> TestResult<Tensor> {
        let ids = encoder.tokenize(&[text])?.input_ids;
        Ok(encoder.model.forward(&ids, None, None)?.squeeze(0)?)
    };
    TEXTS.iter().map(of_text).collect()
}

fn assert_close(found: &Tensor, expected: &[Tensor], what: &str) -> TestResult {
    let difference = largest_difference(found, &Tensor::stack(expected, 0)?);
    assert!(difference < ROUNDING, "{what}: {difference}");
    Ok(())
}

/// The states of a text, `[N, HIDDEN]`, to one vector.
type Pool = fn(&Tensor) -> candle_core::Result<Tensor>;

#[test]
fn every_pooling_in_either_spelling_is_its_definition() -> TestResult {
    let beside = Beside::new()?;
    let states = states(&beside.load()?)?;
    let cls: Pool = |x| x.get(0);
    let max: Pool = |x| x.max(0);
    let mean: Pool = |x| x.mean(0);
    let last: Pool = |x| x.get(x.dim(0)? - 1);
    let all: [(&str, &str, Pool); 4] = [
        ("cls_token", "cls", cls),
        ("max_tokens", "max", max),
        ("mean_tokens", "mean", mean),
        ("lasttoken", "lasttoken", last),
    ];
    for with_modules in [false, true] {
        if with_modules {
            beside.put_modules(&["Transformer", "Pooling"])?;
        }
        for (old, new, pool) in all {
            let expected = states.iter().map(pool).collect::<candle_core::Result<Vec<_>>>()?;
            let switch = format!("pooling_mode_{old}");
            let off = format!(
                "pooling_mode_{}",
                if old == "cls_token" { "max_tokens" } else { "cls_token" }
            );
            for config in [
                json!({"word_embedding_dimension": HIDDEN, (switch): true, (off): false}),
                json!({"embedding_dimension": HIDDEN, "pooling_mode": new}),
            ] {
                beside.put("1_Pooling/config.json", &config)?;
                assert_close(&beside.embed(&TEXTS)?, &expected, &config.to_string())?;
            }
        }
    }
    // Several are put one after the other, the first token's first.
    beside.put(
        "1_Pooling/config.json",
        &json!({
            "word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": true,
            "pooling_mode_cls_token": true,
        }),
    )?;
    let both = |x: &Tensor| -> TestResult<Tensor> { Ok(Tensor::cat(&[cls(x)?, mean(x)?], 0)?) };
    let expected = states.iter().map(both).collect::<TestResult<Vec<_>>>()?;
    assert_close(&beside.embed(&TEXTS)?, &expected, "cls and mean")
}

#[test]
fn without_any_file_the_mean_is_taken() -> TestResult {
    let beside = Beside::new()?;
    let encoder = beside.load()?;
    let expected: Vec<Tensor> =
        states(&encoder)?.iter().map(|x| x.mean(0)).collect::<Result<_, _>>()?;
    assert_close(&encoder.embed_sentences(&TEXTS)?, &expected, "mean")?;
    assert_eq!(encoder.max_tokens(), TOKENS);
    assert!(encoder.prompts().is_empty() && encoder.warnings().is_empty());
    // The drift of an embedding is that of the pooled one.
    let ids = encoder.tokenize(&TEXTS[..1])?.input_ids;
    let hidden = run_layers(&encoder, &ids, &mut |_, _| Ok(()))?;
    assert_close(&encoder.embedding(&hidden)?, &expected[..1], "layered")
}

#[test]
fn dense_layers_and_norms_follow_in_their_order() -> TestResult {
    let beside = Beside::new()?;
    beside.put("1_Pooling/config.json", &json!({"pooling_mode": "cls"}))?;
    beside.put_modules(&["Transformer", "Pooling", "Dense", "Normalize"])?;
    let config = |activation: Value| {
        json!({"in_features": HIDDEN, "out_features": 6, "bias": true,
               "activation_function": activation})
    };
    let states = states(&{
        beside.put_dense("2_Dense", &config(Value::Null))?;
        beside.load()?
    })?;
    for (name, act) in [
        ("torch.nn.modules.activation.Tanh", Tensor::tanh as fn(&Tensor) -> _),
        ("torch.nn.modules.linear.Identity", |x| Ok(x.clone())),
        ("torch.nn.modules.activation.ReLU", Tensor::relu),
        ("torch.nn.modules.activation.GELU", Tensor::gelu_erf),
        ("torch.nn.modules.activation.Sigmoid", candle_nn::ops::sigmoid),
    ] {
        let [weight, bias] = beside.put_dense("2_Dense", &config(json!(name)))?;
        let expected = states.iter().map(|x| {
            let x = act(&(x.get(0)?.unsqueeze(0)?.matmul(&weight.t()?)?.squeeze(0)? + &bias)?)?;
            x.broadcast_div(&x.sqr()?.sum_all()?.sqrt()?)
        });
        let expected = expected.collect::<candle_core::Result<Vec<_>>>()?;
        assert_close(&beside.embed(&TEXTS)?, &expected, name)?;
    }
    let all = beside.files.all()?;
    for name in ["modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"] {
        assert!(all.contains(&beside.folder.path().join(name)), "{name} is not in {all:?}");
    }
    let length = beside.embed(&TEXTS)?.sqr()?.sum(1)?.to_vec1::<f32>()?;
    assert!(length.iter().all(|length| (length - 1.0).abs() < 1e-6), "{length:?}");
    Ok(())
}

#[test]
fn the_limit_of_length_and_lower_case_are_obeyed() -> TestResult {
    let beside = Beside::new()?;
    let tokens = |text: &str| -> TestResult<Vec<String>> {
        Ok(beside.load()?.tokenize(&[text])?.tokens.remove(0))
    };
    let text = "Sea the sea is wide";
    assert_eq!(tokens(text)?, ["[CLS]", "Sea", "the", "sea", "is", "wide", "[SEP]"]);
    beside
        .put("sentence_bert_config.json", &json!({"max_seq_length": 5, "do_lower_case": true}))?;
    assert_eq!(tokens(text)?, ["[CLS]", "sea", "the", "sea", "[SEP]"]);
    let encoder = beside.load()?;
    assert_eq!(encoder.tokenize(&[text, "sea"])?.truncated, [2, 0]);
    assert_eq!(encoder.max_tokens(), 5);
    let limit =
        |limit: Value| beside.put("sentence_bert_config.json", &json!({"max_seq_length": limit}));
    limit(Value::Null)?;
    assert_eq!(beside.load()?.max_tokens(), TOKENS);
    for (limited, message) in [
        (TOKENS + 1, "max_seq_length 25, but the model has positions for 24 tokens"),
        (1, "inputs of at most 1 tokens, but the tokenizer adds 2"),
        (0, "max_seq_length 0, expected at least 1"),
    ] {
        limit(json!(limited))?;
        let error = beside.error().to_string();
        assert!(error.contains(message), "{error}");
    }
    Ok(())
}

#[test]
fn prompts_stand_before_the_text_and_may_be_left_out_of_the_pooling() -> TestResult {
    let beside = Beside::new()?;
    let prompts = json!({"query": "query : ", "passage": "passage : "});
    beside.put("config_sentence_transformers.json", &json!({"prompts": prompts}))?;
    let encoder = beside.load()?;
    let same = |a: Tensor, b: Tensor| -> bool { largest_difference(&a, &b) == 0.0 };
    let behind = encoder.embed_sentences(&["query : the sea"])?;
    assert!(same(encoder.embed_with_prompt(&["the sea"], "query")?, behind.clone()));
    assert!(!same(encoder.embed_sentences(&["the sea"])?, behind.clone()));
    assert_eq!(encoder.tokenize(&["the sea"])?.tokens[0].len(), 4);
    let error = encoder.embed_with_prompt(&["the sea"], "document").unwrap_err().to_string();
    assert!(error.contains("\"document\", expected one of [\"passage\", \"query\"]"), "{error}");

    let default = |name: &str| json!({"prompts": prompts, "default_prompt_name": name});
    beside.put("config_sentence_transformers.json", &default("query"))?;
    assert!(same(beside.embed(&["the sea"])?, behind));
    beside
        .put("1_Pooling/config.json", &json!({"pooling_mode": "mean", "include_prompt": false}))?;
    let ids = encoder.tokenize(&["query : the sea"])?.input_ids;
    let states = encoder.model.forward(&ids, None, None)?.squeeze(0)?;
    // [CLS] query : | the sea [SEP]
    let expected = states.narrow(0, 3, 3)?.mean(0)?;
    assert_close(&beside.embed(&["the sea"])?, &[expected], "without the prompt")?;
    beside.put("config_sentence_transformers.json", &default("document"))?;
    let error = beside.error().to_string();
    assert!(error.contains("default_prompt_name \"document\", expected one of"), "{error}");
    Ok(())
}

#[test]
fn what_is_not_implemented_is_refused_by_name() -> TestResult {
    let beside = Beside::new()?;
    beside.put("1_Pooling/config.json", &json!({"pooling_mode": "cls"}))?;
    for (modules, named) in [
        (&["Transformer", "Pooling", "LSTM"][..], "models.LSTM"),
        (&["Transformer", "WeightedLayerPooling"], "models.WeightedLayerPooling"),
        (&["Transformer", "Dense"], "models.Dense"),
        (&["CLIPModel"], "models.CLIPModel"),
        (&["Transformer", "Pooling", "LayerNorm"], "models.LayerNorm"),
        (&["Transformer", "Pooling", "Pooling"], "models.Pooling"),
    ] {
        beside.put_modules(modules)?;
        let error = beside.error();
        assert!(matches!(error, Error::Unsupported(_)), "{error:?}");
        assert!(error.to_string().contains(named), "{error}");
    }
    beside.put_modules(&["Transformer"])?;
    assert!(beside.error().to_string().contains("names no Pooling"));
    let elsewhere = json!([{"type": "sentence_transformers.models.Transformer", "path": "0_BERT"}]);
    beside.put("modules.json", &elsewhere)?;
    assert!(beside.error().to_string().contains("the Transformer is in \"0_BERT\""));
    for path in ["../other", "/etc"] {
        let outside = json!([{"type": "sentence_transformers.models.Transformer", "path": path}]);
        beside.put("modules.json", &outside)?;
        assert!(beside.error().to_string().contains("expected one beside it"));
    }
    beside.put_modules(&["Transformer", "Pooling"])?;
    for (config, message) in [
        (json!({"pooling_mode_weightedmean_tokens": true}), "pooling by \"weightedmean_tokens\""),
        (json!({"pooling_mode": "weightedmean"}), "pooling by \"weightedmean\""),
        (json!({"pooling_mode_cls_token": false}), "chooses no pooling"),
    ] {
        beside.put("1_Pooling/config.json", &config)?;
        let error = beside.error().to_string();
        assert!(error.contains(message), "{error}");
    }
    Ok(())
}

/// A line of text each would load the same weights again and again.
#[test]
fn a_folder_that_two_dense_layers_share_is_refused() -> TestResult {
    let beside = Beside::new()?;
    beside.put("1_Pooling/config.json", &json!({"pooling_mode": "cls"}))?;
    let config = json!({"in_features": HIDDEN, "out_features": 6});
    beside.put_dense("2_Dense", &config)?;
    let module = |path: &str, name: &str| json!({"path": path, "type": format!("models.{name}")});
    for path in ["2_Dense", "./2_Dense", "2_Dense/.", "2_Dense//"] {
        let modules = json!([
            module("", "Transformer"),
            module("1_Pooling", "Pooling"),
            module("2_Dense", "Dense"),
            module(path, "Dense"),
        ]);
        beside.put("modules.json", &modules)?;
        let error = beside.error();
        assert!(matches!(error, Error::Corrupt { .. }), "{error:?}");
        assert!(error.to_string().contains("two dense layers in the folder"), "{error}");
    }
    Ok(())
}

#[test]
fn files_that_contradict_each_other_are_named() -> TestResult {
    let beside = Beside::new()?;
    beside.put_modules(&["Transformer", "Pooling", "Dense"])?;
    assert!(matches!(beside.error(), Error::MissingFile { what: "pooling", .. }));
    for name in ["word_embedding_dimension", "embedding_dimension"] {
        beside.put("1_Pooling/config.json", &json!({(name): 384, "pooling_mode": "mean"}))?;
        let error = beside.error();
        assert!(matches!(error, Error::Mismatch(_)), "{error:?}");
        let message = format!("{name} 384, but the model's hidden states have 16 elements");
        assert!(error.to_string().contains(&message), "{error}");
    }
    beside.put("1_Pooling/config.json", &json!({"pooling_mode": "mean"}))?;
    let config = |inputs: usize, act: &str| json!({"in_features": inputs, "out_features": 6, "activation_function": act});
    assert!(beside.error().to_string().contains("configuration of a dense layer not found"));
    beside.put("2_Dense/config.json", &config(HIDDEN, "Tanh"))?;
    let error = beside.error().to_string();
    assert!(error.contains("weights of a dense layer not found"), "{error}");
    beside.put_dense("2_Dense", &config(8, "Tanh"))?;
    assert!(beside.error().to_string().contains("in_features 8, but what comes before gives 16"));
    beside.put_dense("2_Dense", &config(HIDDEN, "torch.nn.SiLU"))?;
    assert!(beside.error().to_string().contains("\"torch.nn.SiLU\", expected Identity, Tanh"));
    beside.put_dense("2_Dense", &json!({"in_features": HIDDEN, "out_features": 7}))?;
    assert!(matches!(beside.error(), Error::ModelShape { .. }));
    for name in ["modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"] {
        let broken = Beside::new()?;
        broken.put(name, &json!("no such thing"))?;
        let error = broken.error();
        assert!(matches!(error, Error::Corrupt { .. }), "{name}: {error:?}");
        assert!(error.to_string().contains(name), "{error}");
    }
    Ok(())
}
