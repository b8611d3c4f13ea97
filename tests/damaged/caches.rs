//! Saved caches: each thing that holds for a cache is checked when one is loaded.

use super::{corrupt, numbers};
use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_int8_attention::attention::AttentionCall;
use candle_int8_attention::{
    AttentionConfig, CacheValues, Int8KvCache, KeySmoothing, KvCacheConfig,
};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

const KEY: &str = "int8-kv-cache";

/// A saved cache, taken apart.
struct Parts {
    header: Value,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl Parts {
    fn of(bytes: &[u8]) -> Result<Self> {
        let (_, metadata) = SafeTensors::read_metadata(bytes)?;
        let all = metadata.metadata().clone().unwrap_or_default();
        let file = SafeTensors::deserialize(bytes)?;
        let part = |(name, view): (String, TensorView<'_>)| {
            (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        };
        let tensors = file.tensors().into_iter().map(part).collect();
        Ok(Self { header: serde_json::from_str(&all[KEY])?, tensors })
    }

    fn bytes(&self) -> Result<Vec<u8>> {
        let views = self.tensors.iter().map(|(name, (dtype, shape, data))| {
            Ok((name.clone(), TensorView::new(*dtype, shape.clone(), data)?))
        });
        let views = views.collect::<Result<Vec<_>>>()?;
        let metadata = HashMap::from([(KEY.to_string(), self.header.to_string())]);
        Ok(safetensors::serialize(views, Some(metadata))?)
    }

    fn place(&mut self) -> &mut Value {
        &mut self.header["sequences"][0]
    }

    /// Changes the numbers of a tensor of f32.
    fn set(&mut self, name: &str, at: usize, number: f32) {
        let (_, _, data) = self.tensors.get_mut(name).expect(name);
        data[4 * at..4 * at + 4].copy_from_slice(&number.to_le_bytes());
    }
}

fn tensor(shape: (usize, usize, usize, usize), seed: usize) -> Result<Tensor> {
    let data = numbers(shape.0 * shape.1 * shape.2 * shape.3, seed);
    Ok(Tensor::from_vec(data, shape, &Device::Cpu)?)
}

fn saved(config: KvCacheConfig, folder: &Path) -> Result<Parts> {
    Parts::of(&bytes(config, folder)?)
}

/// A saved cache of 2 heads of 16 elements that holds 600 tokens; of token 100 no format holds the
/// values of the first head.
pub fn bytes(config: KvCacheConfig, folder: &Path) -> Result<Vec<u8>> {
    let mut cache = Int8KvCache::new(config);
    let (k, v) = (tensor((1, 2, 600, 16), 1)?, tensor((1, 2, 600, 16), 2)?);
    let mut data = v.flatten_all()?.to_vec1::<f32>()?;
    data[100 * 16] = f32::INFINITY;
    let v = Tensor::from_vec(data, (1, 2, 600, 16), &Device::Cpu)?;
    for start in (0..600).step_by(100) {
        cache.append(&k.narrow(2, start, 100)?, &v.narrow(2, start, 100)?)?;
    }
    if cache.config().window.is_some() {
        // Enough for it to drop a page.
        let part = |x: &Tensor| x.narrow(2, 0, 150);
        (0..2).try_for_each(|_| cache.append(&part(&k)?, &part(&v)?))?;
    }
    let path = folder.join("good");
    cache.save(&path)?;
    Ok(std::fs::read(path)?)
}

fn default(folder: &Path) -> Result<Parts> {
    saved(KvCacheConfig::default(), folder)
}

type Change = fn(&mut Parts);

/// What is said of a cache with each change.
fn check(parts: fn(&Path) -> Result<Parts>, cases: &[(Change, &str)]) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("cache");
    let load = |parts: &Parts| -> Result<Result<Int8KvCache, candle_int8_attention::Error>> {
        std::fs::write(&path, parts.bytes()?)?;
        Ok(Int8KvCache::load(&path))
    };
    load(&parts(folder.path())?)??;
    for (number, (change, says)) in cases.iter().enumerate() {
        let mut parts = parts(folder.path())?;
        change(&mut parts);
        let problem = corrupt(&path, load(&parts)?);
        assert!(problem.contains(says), "case {number}: {says:?} is not in: {problem}");
    }
    Ok(())
}

/// Attention read the scores of another call for tokens in no page.
#[test]
fn every_token_is_in_a_page_or_in_f32() -> Result<()> {
    // Other tensors for other places, so that only the places are wrong.
    fn short(parts: &mut Parts, first: u64, packed: u64, len: u64) {
        *parts.place() = json!({"len": len, "first": first, "packed": packed});
        for (name, (_, shape, data)) in &mut parts.tensors {
            let tokens = match name.as_str() {
                "0.keys" | "0.key_scales" | "0.values" => (packed - first) as usize,
                "0.recent.keys" | "0.recent.values" => (len - packed) as usize,
                "0.offsets" => 0,
                _ => continue,
            };
            shape[1] = tokens;
            let size = if name == "0.keys" {
                1
            } else if name == "0.values" {
                2
            } else {
                4
            };
            data.clear();
            data.resize(shape.iter().product::<usize>() * size, 0);
        }
        parts.tensors.remove("0.offsets");
        parts.tensors.remove("0.exceptions");
        parts.tensors.remove("0.exceptions_at");
    }
    check(
        default,
        &[
            (|parts| short(parts, 256, 256, 300), "300 tokens with 256..256 in pages"),
            (|parts| short(parts, 100, 100, 300), "300 tokens with 100..100 in pages"),
            (|parts| short(parts, 512, 512, 512), "512 tokens with 512..512 in pages"),
            (|parts| *parts.place() = json!({"len": 600, "first": 256, "packed": 600}), "256..600"),
            (|parts| *parts.place() = json!({"len": 600, "first": 1, "packed": 600}), "1..600"),
            (|parts| *parts.place() = json!({"len": 599, "first": 0, "packed": 600}), "0..600"),
            (|parts| *parts.place() = json!({"len": 600, "first": 600, "packed": 0}), "600..0"),
        ],
    )?;
    // A window may have dropped what no query sees, and no more.
    fn windowed(folder: &Path) -> Result<Parts> {
        saved(KvCacheConfig { window: Some(50), ..KvCacheConfig::default() }, folder)
    }
    check(
        windowed,
        &[
            (|parts| parts.header["window"] = Value::Null, "256..896 in pages"),
            (|parts| parts.header["window"] = 700.into(), "256..896 in pages"),
            (|parts| parts.header["sinks"] = 3.into(), "expected (F32, [2, 3, 16])"),
        ],
    )
}

/// `u64::MAX - 15` tokens loaded, and the next append panicked.
#[test]
fn lengths_beyond_any_cache_are_refused() -> Result<()> {
    check(
        default,
        &[
            (
                |parts| {
                    let number = u64::MAX - 15;
                    parts.header["sinks"] = number.into();
                    *parts.place() = json!({"len": number, "first": number, "packed": number});
                },
                "expected fewer",
            ),
            (
                |parts| {
                    parts.header["dims"] = json!([1, 2, 0, 0]);
                    *parts.place() = json!({"len": 1u64 << 31, "first": 0, "packed": 0});
                },
                "expected fewer",
            ),
            (
                |parts| {
                    parts.header["dims"] = json!([1, 0, 16, 16]);
                    *parts.place() = json!({"len": u64::MAX, "first": 0, "packed": 0});
                },
                "expected fewer",
            ),
            (|parts| parts.header["capacity"] = 599.into(), "expected fewer"),
            (|parts| parts.header["dims"] = json!([1, 1 << 20, 16, 16]), "heads"),
            (|parts| parts.header["dims"] = json!([1, 2, 1u64 << 40, 16]), "expected at most"),
            (|parts| parts.header["dims"] = json!([1, 2, 16, 1u64 << 60]), "expected at most"),
            (|parts| parts.header["dims"] = json!([0, 2, 16, 16]), "1 sequences"),
            (|parts| parts.header["dims"] = Value::Null, "without dims"),
            (|parts| parts.header["version"] = 2.into(), "format version 2"),
            (|parts| parts.header["other"] = 2.into(), "unknown field"),
        ],
    )
}

/// A sequence that ends before its sinks do has nothing else.
#[test]
fn tokens_in_f32_are_those_of_the_configuration() -> Result<()> {
    fn with_sinks(folder: &Path) -> Result<Parts> {
        let key_smoothing = KeySmoothing::FirstTokens(64);
        let config = KvCacheConfig { key_smoothing, sinks: 4, recent: 8, ..Default::default() };
        saved(config, folder)
    }
    check(
        with_sinks,
        &[
            (|parts| parts.header["recent"] = 7.into(), "8 tokens in f32, expected at most 7"),
            (|parts| parts.header["sinks"] = 900.into(), "4..592 in pages"),
        ],
    )
}

#[test]
fn codes_scales_and_values_are_those_that_quantizing_gives() -> Result<()> {
    fn int8(folder: &Path) -> Result<Parts> {
        saved(KvCacheConfig::int8_values(), folder)
    }
    fn bf16(folder: &Path) -> Result<Parts> {
        let values = CacheValues::Bf16;
        saved(KvCacheConfig { values, ..KvCacheConfig::default() }, folder)
    }
    let half: Change = |parts| {
        let (_, _, data) = parts.tensors.get_mut("0.values").expect("values");
        data[40..42].copy_from_slice(&[0xff, 0xff]);
    };
    check(
        default,
        &[
            (|parts| parts.tensors.get_mut("0.keys").expect("keys").2[5] = 0x80, "code of -128"),
            (|parts| parts.set("0.key_scales", 5, -1.0), "key scale of -1"),
            (|parts| parts.set("0.key_scales", 5, 0.0), "key scale of 0"),
            (|parts| parts.set("0.key_scales", 5, f32::INFINITY), "key scale of inf"),
            (half, "F16 does not hold"),
        ],
    )?;
    check(bf16, &[(half, "Bf16 does not hold")])?;
    check(
        int8,
        &[
            (|parts| parts.set("0.value_scales", 5, f32::NAN), "Int8 does not hold"),
            (|parts| parts.set("0.value_scales", 5, -1.0), "Int8 does not hold"),
            (
                |parts| parts.tensors.get_mut("0.values").expect("values").2[5] = 0x80,
                "Int8 does not hold",
            ),
        ],
    )
}

#[test]
fn offsets_are_there_and_those_of_the_configuration() -> Result<()> {
    fn none(folder: &Path) -> Result<Parts> {
        let key_smoothing = KeySmoothing::None;
        saved(KvCacheConfig { key_smoothing, ..KvCacheConfig::default() }, folder)
    }
    fn given(folder: &Path) -> Result<Parts> {
        let key_smoothing = KeySmoothing::Given(vec![vec![0.5; 16], vec![0.25; 16]]);
        saved(KvCacheConfig { key_smoothing, ..KvCacheConfig::default() }, folder)
    }
    fn first(folder: &Path) -> Result<Parts> {
        let key_smoothing = KeySmoothing::FirstTokens(64);
        saved(KvCacheConfig { key_smoothing, ..KvCacheConfig::default() }, folder)
    }
    let missing: Change = |parts| drop(parts.tensors.remove("0.offset"));
    let other: Change = |parts| parts.set("0.offset", 3, 7.0);
    check(
        default,
        &[
            (|parts| parts.set("0.offsets", 3, f32::NAN), "key offset of NaN"),
            (|parts| drop(parts.tensors.remove("0.offsets")), "0.offsets"),
        ],
    )?;
    check(
        first,
        &[
            (missing, "another key offset"),
            (|parts| parts.set("0.offset", 3, f32::NAN), "key offset of NaN"),
        ],
    )?;
    check(none, &[(missing, "another key offset"), (other, "another key offset")])?;
    check(
        given,
        &[
            (missing, "another key offset"),
            (other, "another key offset"),
            (|parts| parts.set("key_smoothing", 3, f32::NAN), "expected finite"),
            (|parts| drop(parts.tensors.remove("key_smoothing")), "key_smoothing"),
        ],
    )
}

/// Under another name, or without it, infinity became zero.
#[test]
fn exceptions_are_known_and_are_some() -> Result<()> {
    fn rename(parts: &mut Parts, from: &str, to: &str) {
        let tensor = parts.tensors.remove(from).expect(from);
        parts.tensors.insert(to.into(), tensor);
    }
    fn at(parts: &mut Parts, head: u32, token: u32) {
        let bytes = [head.to_le_bytes(), token.to_le_bytes()].concat();
        parts.tensors.get_mut("0.exceptions_at").expect("exceptions").2 = bytes;
    }
    check(
        default,
        &[
            (|parts| rename(parts, "0.exceptions_at", "0.exceptions_xx"), "which no cache has"),
            (|parts| rename(parts, "0.exceptions", "0.exceptionz"), "0.exceptions"),
            (|parts| drop(parts.tensors.remove("0.exceptions_at")), "which no cache has"),
            (|parts| at(parts, 2, 100), "names head 2, token 100"),
            (|parts| at(parts, 0, 600), "names head 0, token 600"),
            (|parts| at(parts, 0, 101), "token 101 has a value and an exception"),
            (|parts| parts.set("0.exceptions", 0, 1.0), "the exception of token 100 is none"),
            (
                |parts| {
                    for name in ["0.exceptions", "0.exceptions_at"] {
                        let (_, shape, data) = parts.tensors.get_mut(name).expect(name);
                        shape[0] = 2;
                        data.extend_from_within(..);
                    }
                },
                "not in the order",
            ),
        ],
    )
}

/// The way from a page that is not there to another call's scores.
#[test]
fn what_loads_can_be_used() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("cache");
    std::fs::write(&path, default(folder.path())?.bytes()?)?;
    let mut cache = Int8KvCache::load(&path)?;
    let k = tensor((1, 2, 70, 16), 3)?;
    cache.append(&k, &k)?;
    let q = tensor((1, 4, 3, 16), 4)?;
    let out = cache.attention(&q, AttentionCall::causal(), &AttentionConfig::int8())?;
    assert_eq!(out.dims(), [1, 4, 3, 16]);
    Ok(())
}

#[test]
fn keys_that_stand_out_and_the_last_group_are_those_of_their_places() -> Result<()> {
    fn outliers(folder: &Path) -> Result<Parts> {
        let mut cache = Int8KvCache::new(KvCacheConfig::default());
        let (k, v) = (tensor((1, 2, 320, 16), 1)?, tensor((1, 2, 320, 16), 2)?);
        let mut data = k.flatten_all()?.to_vec1::<f32>()?;
        data[100 * 16] = 3e4;
        data[200 * 16] = 3e4;
        cache.append(&Tensor::from_vec(data, (1, 2, 320, 16), &Device::Cpu)?, &v)?;
        let path = folder.join("good");
        cache.save(&path)?;
        Parts::of(&std::fs::read(path)?)
    }
    fn at(parts: &mut Parts, token: u32) {
        let data = &mut parts.tensors.get_mut("0.outliers_at").expect("outliers").2;
        // The second: the first key of a sequence always stands out.
        data[12..16].copy_from_slice(&token.to_le_bytes());
    }
    check(
        outliers,
        &[
            (|parts| at(parts, 101), "token 101 has codes and a key in f32"),
            (|parts| at(parts, 320), "names head 0, token 320"),
            (|parts| at(parts, 200), "not in the order of their tokens"),
            (|parts| parts.header["outliers"] = false.into(), "token 0 has codes and a key"),
            (|parts| drop(parts.tensors.remove("0.last.keys")), "0.last.keys"),
            (|parts| parts.header["key_smoothing"] = "none".into(), "another key offset"),
        ],
    )
}
