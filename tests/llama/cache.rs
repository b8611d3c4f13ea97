//! The cache: what it holds does not depend on how it was filled.

use super::tiny::{CONTEXT, Tiny, VOCAB};
use super::{batch, relative_difference};
use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_int8_attention::models::llama::{LayerCache, LlamaCache, LlamaModel};
use candle_int8_attention::{
    AttentionConfig, CacheValues, Error, KeySmoothing, KvCacheConfig, PvPrecision,
};

/// Sums in another order.
const ROUNDING: f32 = 2e-5;
/// The same, where a sum may round a query or a key to another int8 code.
const SUMS: f32 = 2e-3;
/// The same for values: a step of their codes, which the first tokens see whole, and what probabilities lose in
/// 16 bits.
const VALUE_CODE: f32 = 1.1 / 127.;
/// Int8 with other means taken from queries and keys, because other tokens are there.
const INT8: f32 = 0.05;
/// An int8 cache: token by token, the first queries see keys that wait in f32 for the offset; at
/// once, all see them quantized.
const INT8_CACHE: f32 = 0.05;

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
fn in_pieces(
    model: &LlamaModel,
    mut cache: LlamaCache,
    ids: &[u32],
    lengths: &[usize],
) -> Result<Tensor> {
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
        let full = || LlamaCache::full(model.config(), 1, CONTEXT, &Device::Cpu);
        let whole = in_pieces(&model, full()?, &ids, &[600])?;
        for lengths in [&[1][..], &[256, 1, 7], &[300]] {
            let pieces = in_pieces(&model, full()?, &ids, lengths)?;
            let difference = relative_difference(&pieces, &whole)?;
            assert!(difference <= tolerance, "{lengths:?}: {difference}");
        }
    }
    Ok(())
}

/// Caches of all kinds. What waits for no offset and is not kept in f32 has the same codes for
/// every query, however the tokens came: only sums differ.
fn kv_caches() -> Vec<(KvCacheConfig, f32)> {
    let at_once = KvCacheConfig { key_smoothing: KeySmoothing::None, ..Default::default() };
    let int8 = KvCacheConfig { values: CacheValues::Int8, ..at_once.clone() };
    vec![
        (KvCacheConfig { sinks: 4, ..at_once.clone() }, SUMS),
        (KvCacheConfig { values: CacheValues::Bf16, ..at_once }, SUMS),
        (int8, VALUE_CODE),
        (KvCacheConfig::default(), INT8_CACHE),
        (KvCacheConfig { sinks: 4, recent: 32, ..KvCacheConfig::int8_values() }, INT8_CACHE),
    ]
}

#[test]
fn token_by_token_is_as_at_once_with_an_int8_cache() -> Result<()> {
    let (mut model, ids) = (model()?, tokens());
    let fp32 = in_pieces(&model, model.new_cache(1, CONTEXT)?, &ids, &[600])?;
    // P·V in f32, because few queries have it so whatever the precision of many.
    let attention = AttentionConfig::int8().pv(PvPrecision::F32);
    model.set_attention(&attention);
    for (config, tolerance) in kv_caches() {
        model.set_kv_cache(&config);
        let new_cache = || model.new_cache(1, CONTEXT);
        let whole = in_pieces(&model, new_cache()?, &ids, &[600])?;
        let difference = relative_difference(&whole, &fp32)?;
        assert!(difference > 0.0 && difference <= INT8_CACHE, "{config:?}: {difference} from fp32");
        for lengths in [&[1][..], &[256, 1, 7]] {
            let pieces = in_pieces(&model, new_cache()?, &ids, lengths)?;
            let difference = relative_difference(&pieces, &whole)?;
            assert!(difference <= tolerance, "{lengths:?}, {config:?}: {difference}");
        }
    }
    Ok(())
}

fn bits(x: &Tensor) -> Result<Vec<u32>> {
    Ok(x.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

/// As a speculation that was wrong is taken back.
#[test]
fn an_int8_cache_that_is_cut_off_goes_on_as_if_nothing_had_been_there() -> Result<()> {
    let (mut model, ids) = (model()?, tokens());
    model.set_attention(&AttentionConfig::int8());
    for (config, _) in kv_caches().into_iter().filter(|(config, _)| config.recent == 0) {
        model.set_kv_cache(&config);
        for kept in [0, 64, 256, 300] {
            let mut straight = model.new_cache(1, CONTEXT)?;
            let mut cut = model.new_cache(1, CONTEXT)?;
            for cache in [&mut straight, &mut cut] {
                if kept > 0 {
                    model.forward(&batch(&ids[..kept])?, cache)?;
                }
            }
            model.forward(&batch(&ids[310..350])?, &mut cut)?;
            model.forward(&batch(&ids[3..4])?, &mut cut)?;
            cut.truncate(kept)?;
            assert_eq!(cut.len(), kept);
            for next in [400..440, 440..441, 441..442] {
                let next = batch(&ids[next])?;
                let expected = model.forward(&next, &mut straight)?;
                let found = model.forward(&next, &mut cut)?;
                assert_eq!(bits(&found)?, bits(&expected)?, "{kept} kept, {config:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn each_layer_has_the_cache_of_its_attention() -> Result<()> {
    let (mut model, ids) = (model()?, tokens());
    let fp32 = in_pieces(&model, model.new_cache(1, CONTEXT)?, &ids, &[600])?;
    let int8_values = KvCacheConfig::int8_values();
    model.layers_mut()[1].attention.set_config(AttentionConfig::int8());
    model.layers_mut()[1].kv_cache = int8_values.clone();
    let mut cache = model.new_cache(1, CONTEXT)?;
    let mixed = model.hidden_states(&batch(&ids)?, &mut cache)?;
    match cache.layers() {
        [LayerCache::Full(_), LayerCache::Int8(int8)] => assert_eq!(int8.config(), &int8_values),
        layers => panic!("{layers:?}"),
    }
    assert_eq!(cache.layers().iter().map(LayerCache::len).collect::<Vec<_>>(), [600; 2]);
    let difference = relative_difference(&mixed, &fp32)?;
    assert!(difference > 0.0 && difference <= INT8_CACHE, "{difference}");
    let pieces = in_pieces(&model, model.new_cache(1, CONTEXT)?, &ids, &[1])?;
    let difference = relative_difference(&pieces, &mixed)?;
    assert!(difference <= INT8_CACHE, "{difference}");
    // Heads are so small here that scales take as much as codes, and places come by whole pages.
    let [full, int8] = [0, 1].map(|layer| cache.layers()[layer].memory_bytes());
    assert!(int8 < full, "{int8} {full}");
    Ok(())
}

/// The window of one layer has dropped what would be seen again: no layer is cut.
#[test]
fn a_cut_that_a_window_forbids_leaves_the_cache_as_it_was() -> Result<()> {
    let (mut model, ids) = (model()?, tokens());
    model.set_attention(&AttentionConfig::int8());
    model.layers_mut()[1].kv_cache.window = Some(20);
    let new_cache = || -> Result<LlamaCache> {
        let mut cache = model.new_cache(1, CONTEXT)?;
        model.forward(&batch(&ids[..590])?, &mut cache)?;
        model.forward(&batch(&ids[590..599])?, &mut cache)?;
        Ok(cache)
    };
    let (mut untouched, mut cache) = (new_cache()?, new_cache()?);
    let error = cache.truncate(100).unwrap_err().to_string();
    assert!(error.contains("truncating to 100 tokens"), "{error}");
    assert_eq!(cache.layers().iter().map(LayerCache::len).collect::<Vec<_>>(), [599; 2]);
    let next = batch(&ids[599..])?;
    let expected = model.forward(&next, &mut untouched)?;
    assert_eq!(bits(&model.forward(&next, &mut cache)?)?, bits(&expected)?);
    cache.truncate(598)?;
    cache.reset();
    assert!(cache.is_empty());
    Ok(())
}

/// All that can be wrong with a call is found before a layer adds its keys.
#[test]
fn errors_leave_an_int8_cache_as_it_was_bit_for_bit() -> Result<()> {
    let (mut model, ids) = (model()?, tokens());
    model.set_attention(&AttentionConfig::int8());
    // The offset is not frozen yet, and recent tokens are still in f32.
    model.set_kv_cache(&KvCacheConfig { recent: 8, ..Default::default() });
    let mut untouched = model.new_cache(1, 100)?;
    let mut cache = model.new_cache(1, 100)?;
    for cache in [&mut untouched, &mut cache] {
        model.forward(&batch(&ids[..50])?, cache)?;
    }
    let error = model.forward(&batch(&ids[..51])?, &mut cache).unwrap_err();
    assert!(matches!(error, Error::ContextLength { tokens: 51, used: 50, context: 100 }));
    let mut other = model.clone();
    for (config, message) in [
        (AttentionConfig::int8().softcap(-1.0), "softcap -1"),
        (AttentionConfig::fp32(), "fp32 attention in layer 1, whose cache is int8"),
        (AttentionConfig::int8().alibi_slopes(vec![0.5]), "1 ALiBi slopes"),
        (AttentionConfig::int8().softmax_scale(f32::NAN), "softmax scale NaN"),
    ] {
        other.layers_mut()[1].attention.set_config(config);
        let error = other.forward(&batch(&ids[50..90])?, &mut cache).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    for next in [50..90, 90..91] {
        let next = batch(&ids[next])?;
        let expected = model.forward(&next, &mut untouched)?;
        assert_eq!(bits(&model.forward(&next, &mut cache)?)?, bits(&expected)?);
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
    let bytes_a_token =
        2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim;
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
    let broken = AttentionConfig::int8().softcap(-1.0);
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
