//! Levels of instructions: which there are, that one is used for everything, and that scores, attention and
//! the cache have the same bits on all of them. A level is chosen once per process, so this program starts
//! itself again.

use candle_core::{DType, Device, Result, Tensor};
use candle_int8_attention::attention::{
    CacheValues, KeySmoothing, attention_scores, attention_scores_int32,
};
use candle_int8_attention::cpu::{LEVEL_VARIABLE, active_level, levels};
use candle_int8_attention::quant::{Granularity, Scheme};
use candle_int8_attention::{
    AttentionCall, AttentionConfig, AttnMask, Int8KvCache, KvCacheConfig, PvPrecision, ScoreConfig,
    attention,
};
use std::process::{Command, Output};

/// Runs one test of this program again with a level forced.
fn again(test: &str, level: &str) -> Output {
    let program = std::env::current_exe().expect("the path of this program");
    let mut command = Command::new(program);
    command.args(["--exact", test, "--nocapture", "--test-threads", "1"]);
    command.env(LEVEL_VARIABLE, level).env("LEVELS_CHILD", "1").output().expect("it starts")
}

fn is_child() -> bool {
    std::env::var_os("LEVELS_CHILD").is_some()
}

/// Numbers that look random, the same everywhere.
fn numbers(shape: &[usize], seed: u32) -> Tensor {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    };
    let numbers: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
}

/// What `test` prints on every level that this machine has.
fn on_every_level(test: &str) -> Vec<(&'static str, String)> {
    let available = levels().into_iter().filter(|level| level.available);
    let of_level = |name| {
        let output = again(test, name);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{name}: {text}");
        let bits = text.lines().filter_map(|line| line.split_once("BITS ")).map(|(_, bits)| bits);
        let bits = bits.collect::<Vec<_>>().join("\n");
        assert!(!bits.is_empty(), "{name}: {text}");
        (name, bits)
    };
    available.map(|level| of_level(level.name)).collect()
}

/// FNV-1a of the bytes of some numbers.
fn hash(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Whether this process is the one to compare levels, which it then has done.
fn compared(test: &str) -> bool {
    if is_child() {
        return false;
    }
    let all = on_every_level(test);
    for (level, bits) in &all {
        for (found, first) in bits.lines().zip(all[0].1.lines()) {
            assert_eq!(found, first, "{level} and {}", all[0].0);
        }
        assert_eq!(bits, &all[0].1, "{level} and {}", all[0].0);
    }
    true
}

/// A line for [`compared`].
fn print_bits(numbers: &Tensor, what: &str) -> Result<()> {
    let numbers = numbers.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let bits = hash(numbers.iter().flat_map(|x| x.to_bits().to_le_bytes()));
    println!("BITS {bits:016x} {what}");
    Ok(())
}

#[test]
fn scores_have_the_same_bits_on_every_level() -> Result<()> {
    if compared("scores_have_the_same_bits_on_every_level") {
        return Ok(());
    }
    for (m, n, depth) in [(1, 1, 1), (5, 7, 33), (49, 130, 64), (64, 65, 80), (3, 300, 128)] {
        let (q, k) = (numbers(&[2, 4, m, depth], 1), numbers(&[2, 2, n, depth], 2));
        for scheme in [Scheme::Symmetric, Scheme::Affine] {
            for granularity in
                [Granularity::PerToken, Granularity::PerHead, Granularity::PerBlock(16)]
            {
                let plain = ScoreConfig::plain(scheme, granularity);
                let whole = ScoreConfig {
                    q: plain.q.clone(),
                    k: plain.k.clone(),
                    ..ScoreConfig::default()
                };
                for config in [plain.clone(), whole] {
                    let scores =
                        attention_scores(&q, &k, &config)?.flatten_all()?.to_vec1::<f32>()?;
                    let bits = hash(scores.iter().flat_map(|x| x.to_bits().to_le_bytes()));
                    println!("BITS {bits:016x} {m} {n} {depth} {config:?}");
                }
                let sums =
                    attention_scores_int32(&q, &k, &plain)?.flatten_all()?.to_vec1::<i32>()?;
                println!("BITS {:016x}", hash(sums.iter().flat_map(|x| x.to_le_bytes())));
            }
        }
    }
    Ok(())
}

/// Numbers with what tells levels apart: channels and tokens of other sizes, and a token that is far larger.
fn rough(shape: [usize; 4], seed: u32) -> Result<Tensor> {
    let [_, _, tokens, depth] = shape;
    let channels: Vec<f32> = (0..depth).map(|i| 1.0 + (i % 5) as f32 * 0.7).collect();
    let sizes = (0..tokens).map(|i| if i == 7 { 90.0 } else { 1.0 + (i % 3) as f32 });
    let sizes = Tensor::from_iter(sizes, &Device::Cpu)?.reshape((tokens, 1))?;
    let scaled = numbers(&shape, seed).broadcast_mul(&Tensor::new(channels, &Device::Cpu)?)?;
    scaled.broadcast_mul(&sizes)
}

/// The calls that are compared for `[B, H, M]` queries and `N` keys.
fn calls(
    [b, h, m]: [usize; 3],
    n: usize,
) -> Result<Vec<(&'static str, AttentionCall, AttentionConfig)>> {
    let int8 = AttentionConfig::int8().pv(PvPrecision::Int16);
    let causal = AttentionCall::causal();
    let lens = (0..b).map(|i| (n - i).max(1)).collect();
    let lens = AttentionCall::default().with_kv_lens(lens);
    let slopes = (0..h).map(|i| 0.1 * (i + 1) as f32).collect();
    let additive = AttnMask::Mask(numbers(&[b, 1, m, n], 9));
    let boolean = AttnMask::Mask(numbers(&[1, h, m, n], 8).gt(-0.6)?);
    Ok(vec![
        ("plain", AttentionCall::default(), int8.clone()),
        ("causal", causal.clone(), int8.clone()),
        ("window", causal.clone(), int8.clone().window(Some(20), None)),
        ("lengths", lens, int8.clone()),
        ("softcap", causal, int8.clone().softcap(5.0)),
        ("alibi", AttentionCall::default(), int8.clone().alibi_slopes(slopes)),
        ("additive mask", additive.into(), int8.clone()),
        ("boolean mask", boolean.into(), int8.clone().granularity(Granularity::PerHead)),
        ("affine", AttentionCall::default(), int8.scheme(Scheme::Affine)),
    ])
}

#[test]
fn attention_has_the_same_bits_on_every_level() -> Result<()> {
    if compared("attention_has_the_same_bits_on_every_level") {
        return Ok(());
    }
    for (m, n, depth, value_dim) in
        [(1, 1, 1, 1), (1, 600, 64, 64), (5, 7, 33, 20), (49, 130, 64, 80), (70, 1100, 32, 96)]
    {
        let q = rough([2, 4, m, depth], 1)?;
        let (k, v) = (rough([2, 2, n, depth], 2)?, rough([2, 2, n, value_dim], 3)?);
        for (what, call, config) in calls([2, 4, m], n)? {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let [q, k, v] = [&q, &k, &v].map(|x| x.to_dtype(dtype));
                let out = attention(&q?, &k?, &v?, call.clone(), &config)?;
                print_bits(&out, &format!("{m} {n} {depth} {value_dim} {what} {dtype:?}"))?;
            }
        }
    }
    Ok(())
}

/// Few queries and many, every format of values, tokens that stay in f32, and those that are far larger or
/// not finite.
#[test]
fn the_cache_has_the_same_bits_on_every_level() -> Result<()> {
    if compared("the_cache_has_the_same_bits_on_every_level") {
        return Ok(());
    }
    for values in [CacheValues::F16, CacheValues::Bf16, CacheValues::Int8] {
        for (n, depth, value_dim) in [(90, 32, 20), (700, 64, 64)] {
            let plain = KvCacheConfig { values, ..KvCacheConfig::default() };
            let floats = KvCacheConfig {
                sinks: 4,
                recent: 30,
                key_smoothing: KeySmoothing::FirstTokens(16),
                ..plain.clone()
            };
            for (which, config) in [("plain", plain), ("floats", floats)] {
                let (k, v) = (rough([2, 2, n, depth], 2)?, rough([2, 2, n, value_dim], 3)?);
                let mut cache = Int8KvCache::new(config);
                cache.append(&k, &v)?;
                for m in [1, 3, 40] {
                    let q = rough([2, 4, m, depth], 1)?;
                    for (what, call, config) in calls([2, 4, m], n)? {
                        let out = cache.attention(&q, call, &config)?;
                        print_bits(&out, &format!("{values:?} {which} {n} {m} {what}"))?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// A forced level leaves no operation on another one: each has its own kernels, or those of levels that are
/// part of it.
#[test]
fn a_level_uses_the_kernels_of_that_level() {
    if !is_child() {
        for level in levels().into_iter().filter(|level| level.available) {
            let output = again("a_level_uses_the_kernels_of_that_level", level.name);
            assert!(output.status.success(), "{}: {output:?}", level.name);
        }
        return;
    }
    let name = active_level().unwrap();
    assert_eq!(std::env::var(LEVEL_VARIABLE).unwrap(), name);
    let parts: &[&str] = match name {
        "x86_64-avx512-vnni" => &["x86_64-avx512-vnni"],
        "x86_64-avx-vnni" => &["x86_64-avx-vnni", "x86_64-avx2"],
        "aarch64-dotprod" => &["aarch64-dotprod", "aarch64-neon"],
        "aarch64-i8mm" => &["aarch64-i8mm", "aarch64-neon", "aarch64-bf16"],
        "x86_64-avx2" => &["x86_64-avx2"],
        "aarch64-neon" => &["aarch64-neon"],
        "portable" => &["portable"],
        other => panic!("level {other:?} has no row here"),
    };
    let info = levels().into_iter().find(|level| level.name == name).unwrap();
    assert!(info.kernels.len() >= 7, "{info:?}");
    for kernel in info.kernels {
        assert!(parts.contains(&kernel.kernel), "{name}: {kernel:?}");
    }
}

#[test]
fn a_level_that_cannot_be_used_is_an_error_of_every_call() -> Result<()> {
    if !is_child() {
        for name in ["abacus", "X86_64-AVX2"] {
            let test = "a_level_that_cannot_be_used_is_an_error_of_every_call";
            let output = again(test, name);
            assert!(output.status.success(), "{output:?}");
        }
        return Ok(());
    }
    let name = std::env::var(LEVEL_VARIABLE).unwrap();
    let x = numbers(&[1, 2, 3, 16], 1);
    let mut cache = Int8KvCache::new(KvCacheConfig::default());
    let errors = [
        active_level().map(|_| ()),
        attention_scores(&x, &x, &ScoreConfig::default()).map(|_| ()),
        attention(&x, &x, &x, AttentionCall::default(), &AttentionConfig::int8()).map(|_| ()),
        attention(&x, &x, &x, AttentionCall::default(), &AttentionConfig::fp32()).map(|_| ()),
        cache.append(&x, &x),
    ];
    let available: Vec<_> = levels().into_iter().filter(|level| level.available).collect();
    let available: Vec<_> = available.iter().map(|level| level.name).collect();
    for error in errors {
        let error = error.unwrap_err().to_string();
        assert!(error.contains(&format!("{name:?}")), "{error}");
        assert!(error.contains(&available.join(", ")) && error.lines().count() == 1, "{error}");
    }
    Ok(())
}
