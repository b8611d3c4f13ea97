//! The cache: what it holds does not depend on how it was filled.

use super::tiny::{CONTEXT, Tiny, VOCAB};
use super::{batch, relative_difference};
use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_int8_attention::models::llama::LlamaModel;
use candle_int8_attention::{AttentionConfig, Error};

/// Sums in another order.
const ROUNDING: f32 = 2e-5;
/// Int8 with other means taken from queries and keys, because other tokens are there.
const INT8: f32 = 0.05;

fn model() -> Result<LlamaModel> {
    let folder = tempfile::tempdir()?;
    Tiny::new(false)?.write_folder(folder.path())?;
    Ok(LlamaModel::from_folder(folder.path(), &Device::Cpu)?)
}

/// More tokens than the cache holds at first, and than one block of queries.
fn tokens() -> Vec<u32> {
    (0..600).map(|i| (i * i + 3 * i) % VOCAB as u32).collect()
}

/// The hidden states of all tokens, given in pieces of these lengths in turn.
fn in_pieces(model: &LlamaModel, ids: &[u32], lengths: &[usize]) -> Result<Tensor> {
    let mut cache = model.new_cache(1, CONTEXT)?;
    let (mut start, mut hidden) = (0, Vec::new());
    for len in lengths.iter().cycle() {
        let end = ids.len().min(start + len);
        hidden.push(model.hidden_states(&batch(&ids[start..end])?, &mut cache)?);
        start = end;
        if start == ids.len() {
            break;
        }
    }
    assert_eq!(cache.len(), ids.len());
    Ok(Tensor::cat(&hidden, 1)?)
}

#[test]
fn pieces_of_any_length_give_the_same() -> Result<()> {
    let (mut model, ids) = (model()?, tokens());
    for (config, tolerance) in
        [(AttentionConfig::fp32(), ROUNDING), (AttentionConfig::int8(), INT8)]
    {
        model.set_attention(&config);
        let whole = in_pieces(&model, &ids, &[600])?;
        for lengths in [&[1][..], &[256, 1, 7], &[300]] {
            let difference = relative_difference(&in_pieces(&model, &ids, lengths)?, &whole)?;
            assert!(difference <= tolerance, "{lengths:?}: {difference}");
        }
    }
    Ok(())
}

#[test]
fn a_batch_equals_its_sequences() -> Result<()> {
    let (mut model, ids) = (model()?, tokens());
    let rows = [&ids[0..40], &ids[40..80], &ids[300..340]];
    let together = Tensor::cat(&rows.map(|row| batch(row).unwrap()), 0)?;
    for config in [AttentionConfig::fp32(), AttentionConfig::int8()] {
        model.set_attention(&config);
        let mut cache = model.new_cache(3, 64)?;
        model.forward(&together.narrow(1, 0, 39)?, &mut cache)?;
        let found = model.forward(&together.narrow(1, 39, 1)?, &mut cache)?;
        for (row, ids) in rows.iter().enumerate() {
            let mut cache = model.new_cache(1, 64)?;
            model.forward(&batch(&ids[..39])?, &mut cache)?;
            let expected = model.forward(&batch(&ids[39..])?, &mut cache)?;
            let difference = relative_difference(&found.narrow(0, row, 1)?, &expected)?;
            assert!(difference <= ROUNDING, "row {row}: {difference}");
        }
    }
    Ok(())
}

#[test]
fn what_is_cut_off_is_forgotten() -> Result<()> {
    let (model, ids) = (model()?, tokens());
    let mut cache = model.new_cache(1, 64)?;
    let first = model.forward(&batch(&ids[..10])?, &mut cache)?;
    model.forward(&batch(&ids[200..220])?, &mut cache)?;
    cache.truncate(9)?;
    let again = model.forward(&batch(&ids[9..10])?, &mut cache)?;
    assert!(relative_difference(&again, &first)? <= ROUNDING);
    cache.truncate(0)?;
    assert!(cache.is_empty());
    assert_eq!(relative_difference(&model.forward(&batch(&ids[..10])?, &mut cache)?, &first)?, 0.0);
    Ok(())
}

#[test]
fn memory_is_that_of_keys_and_values_and_grows_with_them() -> Result<()> {
    let (model, ids) = (model()?, tokens());
    let mut cache = model.new_cache(1, CONTEXT)?;
    let config = model.config();
    let bytes_a_token = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim;
    assert!(cache.memory_bytes() <= 256 * bytes_a_token);
    model.forward(&batch(&ids)?, &mut cache)?;
    assert!(
        (600..=CONTEXT).contains(&(cache.memory_bytes() / bytes_a_token)),
        "{}",
        cache.memory_bytes()
    );
    Ok(())
}

/// A refused call leaves the cache as it was, whatever it was refused for.
#[test]
fn errors_leave_the_cache_as_it_was() -> Result<()> {
    let (model, ids) = (model()?, tokens());
    let mut cache = model.new_cache(1, 20)?;
    let expected = model.forward(&batch(&ids[..10])?, &mut cache)?;
    cache.truncate(9)?;
    let refuse = |ids: &Tensor, cache: &mut _, message: &str| {
        let error = model.forward(ids, cache).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
        error
    };
    let error =
        refuse(&batch(&ids[..12])?, &mut cache, "12 tokens do not fit: 9 of the context's 20");
    assert!(matches!(error, Error::ContextLength { tokens: 12, used: 9, context: 20 }));
    refuse(&batch(&[VOCAB as u32])?, &mut cache, "261, expected less than 261");
    refuse(&batch(&[])?, &mut cache, "at least one token");
    refuse(&Tensor::zeros((2, 3), candle_core::DType::U32, &Device::Cpu)?, &mut cache, "[1, N]");
    refuse(&Tensor::new(&[[1f32]], &Device::Cpu)?, &mut cache, "U32");
    assert_eq!(cache.len(), 9);
    let again = model.forward(&batch(&ids[9..10])?, &mut cache)?;
    assert!(relative_difference(&again, &expected)? <= ROUNDING);
    Ok(())
}

/// An error in the middle of the layers: the ones before it have added their keys already.
#[test]
fn an_error_in_a_late_layer_leaves_the_cache_as_it_was() -> Result<()> {
    let (mut model, ids) = (model()?, tokens());
    let mut cache = model.new_cache(1, 20)?;
    model.forward(&batch(&ids[..5])?, &mut cache)?;
    let broken = AttentionConfig { softcap: Some(-1.0), ..AttentionConfig::int8() };
    model.layers_mut()[1].attention.set_config(broken);
    assert!(model.forward(&batch(&ids[5..8])?, &mut cache).is_err());
    assert_eq!(cache.len(), 5);
    model.set_attention(&AttentionConfig::fp32());
    model.forward(&batch(&ids[5..8])?, &mut cache)?;
    assert_eq!(cache.len(), 8);
    Ok(())
}

#[test]
fn a_context_that_the_model_was_not_trained_for_is_refused() -> Result<()> {
    let model = model()?;
    for context in [0, CONTEXT + 1] {
        let error = model.new_cache(1, context).unwrap_err().to_string();
        assert!(error.contains(&format!("context of {context} tokens")), "{error}");
        assert!(error.contains("1 to 640"), "{error}");
    }
    Ok(())
}
