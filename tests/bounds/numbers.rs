//! Numbers at the end of their range, and NaN in a mask: what is finite in fp32 attention is finite on every
//! path, and NaN is NaN on all of them.

use super::*;
use candle_core::DType;
use candle_int8_attention::quant::{Granularity, QuantConfig, QuantParams, RangeSource, Scheme};
use candle_int8_attention::reference::{tensor_ops, unfused};
use candle_int8_attention::{
    AttentionCall, AttnMask, CacheValues, Causal, Int8Config, Int8KvCache, KvCacheConfig,
    PvPrecision, ScoreConfig, attention,
};
use common::{largest_difference, randn};

type TestResult = Result<(), Box<dyn std::error::Error>>;

/// Precisions of P·V that every machine has.
const PV: [PvPrecision; 3] = [PvPrecision::Auto, PvPrecision::F32, PvPrecision::Int8];

const STORED: [CacheValues; 3] = [CacheValues::F16, CacheValues::Bf16, CacheValues::Int8];

/// Fused configurations, with their names.
fn fused() -> Vec<(String, AttentionConfig)> {
    let int8 = PV.map(|pv| (format!("int8, P·V {pv}"), AttentionConfig::int8().pv(pv)));
    int8.into_iter().chain([("fp32".to_string(), AttentionConfig::fp32())]).collect()
}

fn cache_of(k: &Tensor, v: &Tensor, values: CacheValues) -> Int8KvCache {
    let mut cache = Int8KvCache::new(KvCacheConfig { values, ..KvCacheConfig::default() });
    cache.append(k, v).unwrap();
    cache
}

/// Rows of the output as `[B * H * M, Dv]`.
fn rows(out: &Tensor) -> Vec<Vec<f32>> {
    out.flatten_to(2).unwrap().to_vec2().unwrap()
}

/// What is the same in all attention of one head, in f64 from the definition; queries are the last keys.
struct Definition<'a> {
    tensors: [&'a Tensor; 3],
    scale: f64,
    softcap: Option<f64>,
    slope: f64,
}

impl Definition<'_> {
    /// `[M, Dv]`.
    fn rows(&self) -> Vec<Vec<f64>> {
        let [q, k, v] = self.tensors.map(|x| {
            x.to_dtype(DType::F64).unwrap().flatten_to(2).unwrap().to_vec2::<f64>().unwrap()
        });
        let first = k.len() as f64 - q.len() as f64;
        let attend = |(i, q): (usize, &Vec<f64>)| {
            let score = |(j, k): (usize, &Vec<f64>)| {
                let mut score = q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * self.scale;
                if let Some(cap) = self.softcap {
                    score = cap * (score / cap).tanh();
                }
                score - self.slope * (first + i as f64 - j as f64).abs()
            };
            let scores: Vec<f64> = k.iter().enumerate().map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let probs: Vec<f64> = scores.iter().map(|x| (x - max).exp()).collect();
            let sum: f64 = probs.iter().sum();
            let channel = |c: usize| probs.iter().zip(&v).map(|(p, v)| p / sum * v[c]).sum();
            (0..v[0].len()).map(channel).collect()
        };
        q.iter().enumerate().map(attend).collect()
    }

    /// Compares with `out`, in units of the largest value.
    fn check(&self, what: &str, out: &Tensor, bound: f64) {
        let unit = common::largest(self.tensors[2]).max(f64::MIN_POSITIVE);
        for (i, (found, expected)) in rows(out).iter().zip(self.rows()).enumerate() {
            for (found, expected) in found.iter().zip(expected) {
                let off = (f64::from(*found) - expected).abs() / unit;
                assert!(off <= bound, "{what}, row {i}: {found} {expected}");
            }
        }
    }
}

/// An additive mask `[M, N]` of zeros with NaN at `at`.
fn mask_with_nan(m: usize, n: usize, at: &[(usize, usize)], dtype: DType) -> Tensor {
    let mut mask = vec![0f32; m * n];
    at.iter().for_each(|(i, j)| mask[i * n + j] = f32::NAN);
    Tensor::from_vec(mask, (m, n), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

#[test]
fn nan_in_an_additive_mask_is_nan_on_every_path() -> TestResult {
    for (m, n) in [(1, 20), (3, 20), (60, 700)] {
        let (q, kv) = (randn((1, 2, m, 16)), randn((1, 2, n, 16)));
        let cache = cache_of(&kv, &kv, CacheValues::F16);
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
            let mask = mask_with_nan(m, n, &[(m / 2, n / 3)], dtype);
            let zeros = mask_with_nan(m, n, &[], dtype);
            let (mask, zeros) = (AttnMask::Mask(mask), AttnMask::Mask(zeros));
            let check = |what: &str, attend: &dyn Fn(&AttnMask) -> Tensor| {
                let (found, clean) = (rows(&attend(&mask)), rows(&attend(&zeros)));
                for (i, (found, clean)) in found.iter().zip(clean).enumerate() {
                    let what = format!("{what} {dtype:?} {m} {n}, row {i}");
                    match i % m == m / 2 {
                        true => assert!(found.iter().all(|x| x.is_nan()), "{what}: {found:?}"),
                        false => assert_eq!(*found, clean, "{what}"),
                    }
                }
            };
            for (name, config) in fused() {
                check(&name, &|mask| attention(&q, &kv, &kv, mask, &config).unwrap());
            }
            for (name, config) in backends() {
                let by = |mask: &AttnMask| tensor_ops::attention(&q, &kv, &kv, mask, &config);
                check(&format!("tensor_ops {name}"), &|mask| by(mask).unwrap());
                let by = |mask: &AttnMask| unfused::attention(&q, &kv, &kv, mask, &config);
                check(&format!("unfused {name}"), &|mask| by(mask).unwrap());
            }
            let int8 = AttentionConfig::int8();
            check("cache", &|mask| cache.attention(&q, mask, &int8).unwrap());
        }
    }
    Ok(())
}

#[test]
fn nan_for_a_key_that_positions_hide_changes_nothing() -> TestResult {
    let (m, n) = (12, 40);
    let (q, kv) = (randn((1, 2, m, 16)), randn((1, 2, n, 16)));
    let cache = cache_of(&kv, &kv, CacheValues::F16);
    // The last key of all queries but the last, by the causal rule; the first keys, by the window.
    let hidden: Vec<_> = (0..m - 1).map(|i| (i, n - 1)).chain((0..m).map(|i| (i, 3))).collect();
    let call = |nan: &[(usize, usize)]| {
        AttentionCall::from(Causal::End).with_mask(mask_with_nan(m, n, nan, DType::F32))
    };
    let (with, without) = (call(&hidden), call(&[]));
    for (name, config) in fused() {
        let config = config.window(Some(20), None);
        let of = |call: &AttentionCall| attention(&q, &kv, &kv, call, &config);
        assert_eq!(largest_difference(&of(&with)?, &of(&without)?), 0.0, "{name}");
        let of = |call: &AttentionCall| tensor_ops::attention(&q, &kv, &kv, call, &config);
        assert_eq!(largest_difference(&of(&with)?, &of(&without)?), 0.0, "tensor_ops {name}");
        let of = |call: &AttentionCall| unfused::attention(&q, &kv, &kv, call, &config);
        assert_eq!(largest_difference(&of(&with)?, &of(&without)?), 0.0, "unfused {name}");
    }
    let config = AttentionConfig::int8().window(Some(20), None);
    let of = |call: &AttentionCall| cache.attention(&q, call, &config);
    assert_eq!(largest_difference(&of(&with)?, &of(&without)?), 0.0);
    Ok(())
}

/// Rows of random values, some of them with the largest numbers there are.
fn large_values(n: usize, dv: usize, largest: f32) -> Tensor {
    let mut rows = randn((n, dv)).to_vec2::<f32>().unwrap();
    for (j, row) in rows.iter_mut().enumerate().filter(|(j, _)| j % 3 == 1) {
        row.iter_mut().for_each(|x| *x = if j % 2 == 0 { -largest } else { largest });
    }
    Tensor::new(rows, &Device::Cpu).unwrap().reshape((1, 1, n, dv)).unwrap()
}

/// Of the largest value: scores in int8, and P·V in int8.
const INT8_BOUND: f64 = 0.05;
/// The same for sums in f32 of thousands of terms.
const FP32_BOUND: f64 = 1e-4;

fn bound(config: &AttentionConfig) -> f64 {
    if *config == AttentionConfig::fp32() { FP32_BOUND } else { INT8_BOUND }
}

#[test]
fn values_up_to_the_largest_number_give_their_mean() -> TestResult {
    // All the same, where every sum would overflow; a mean that rounds up would, too.
    for largest in [f32::MAX, 2e38, 1e30] {
        for (m, n, dv) in [(1, 5, 16), (1, 3000, 32), (7, 600, 16), (7, 40, 5), (60, 1100, 24)] {
            let (q, k) = (randn((1, 1, m, 16)), randn((1, 1, n, 16)));
            let same =
                (Tensor::ones((1, 1, n, dv), DType::F32, &Device::Cpu)? * f64::from(largest))?;
            for v in [large_values(n, dv, largest), same] {
                let exact =
                    Definition { tensors: [&q, &k, &v], scale: 0.25, softcap: None, slope: 0.0 };
                for (name, config) in fused() {
                    let out = attention(&q, &k, &v, &AttnMask::None, &config)?;
                    exact.check(&format!("{name} {largest} {m} {n}"), &out, bound(&config));
                }
                for values in STORED {
                    let cache = cache_of(&k, &v, values);
                    let out = cache.attention(&q, &AttnMask::None, &AttentionConfig::int8())?;
                    exact.check(&format!("{values:?} {largest} {m} {n}"), &out, INT8_BOUND);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn large_values_change_no_bit_of_queries_that_do_not_see_them() -> TestResult {
    let (m, n, dv) = (30, 600, 32);
    let (q, k, v) = (randn((1, 1, m, 16)), randn((1, 1, n, 16)), randn((1, 1, n, dv)));
    let ordinary = v.narrow(2, 0, n - 1)?;
    let largest = (Tensor::ones((1, 1, 1, dv), DType::F32, &Device::Cpu)? * f64::from(f32::MAX))?;
    let last_is_large = Tensor::cat(&[&ordinary, &largest], 2)?;
    let call = AttentionCall::causal();
    let but_last = |x: Tensor| x.narrow(2, 0, m - 1);
    // In 16 bits the value that it stands in the place of has a part in the scale of its run.
    for (pv, bound) in [(PvPrecision::Int16, 1e-4), (PvPrecision::F32, 0.0)] {
        let config = AttentionConfig::int8().pv(pv);
        let clean = but_last(attention(&q, &k, &v, &call, &config)?)?;
        let found = but_last(attention(&q, &k, &last_is_large, &call, &config)?)?;
        let difference = largest_difference(&found, &clean);
        assert!(difference <= bound, "{pv}: {difference}");
    }
    for values in STORED {
        let of = |v: &Tensor| {
            cache_of(&k, v, values)
                .attention(&q, &call, &AttentionConfig::int8())
                .and_then(|x| Ok(x.narrow(2, 0, m - 1)?))
        };
        let difference = largest_difference(&of(&last_is_large)?, &of(&v)?);
        assert!(difference < 1e-4, "{values:?}: {difference}");
    }
    Ok(())
}

#[test]
fn scales_up_to_the_largest_number_give_finite_attention() -> TestResult {
    for (m, n, dv) in [(1, 9, 16), (1, 2500, 16), (5, 40, 8), (60, 1100, 16)] {
        let v = randn((1, 1, n, dv));
        for scale in [1e20f32, 1e38, f32::MAX] {
            // Scores of an ordinary size, from small queries and keys.
            let small = (1.0 / f64::from(scale)).sqrt();
            let (q, k) = ((randn((1, 1, m, 16)) * small)?, (randn((1, 1, n, 16)) * small)?);
            let exact = Definition {
                tensors: [&q, &k, &v],
                scale: f64::from(scale),
                softcap: None,
                slope: 0.0,
            };
            // The next-largest score is far away, and the sums of both are finite.
            let (huge_q, huge_k) = (randn((1, 1, m, 1)), randn((1, 1, n, 1)));
            let one = Definition { tensors: [&huge_q, &huge_k, &v], ..exact };
            for (name, config) in fused() {
                let config = config.softmax_scale(scale);
                let what = format!("{name} {scale} {m} {n}");
                let out = attention(&q, &k, &v, &AttnMask::None, &config)?;
                let bound = if name == "fp32" { FP32_BOUND } else { INT8_BOUND };
                exact.check(&what, &out, bound);
                let scale = scale / 32.0;
                let config = config.softmax_scale(scale);
                let out = attention(&huge_q, &huge_k, &v, &AttnMask::None, &config)?;
                assert!(common::largest(&out).is_finite(), "{what}");
                if name == "fp32" {
                    one.check(&what, &out, FP32_BOUND);
                }
            }
            let config = AttentionConfig::int8().softmax_scale(scale);
            let out = cache_of(&k, &v, CacheValues::F16).attention(&q, &AttnMask::None, &config)?;
            exact.check(&format!("cache {scale} {m} {n}"), &out, INT8_BOUND);
        }
    }
    Ok(())
}

/// Rows that are multiples of one direction, all with the same sign unless `signs` says otherwise.
fn along(multiples: &[f32], depth: usize, signs: bool) -> Tensor {
    let sign = |d: usize| if signs && d % 3 == 1 { -1.0 } else { 1.0 };
    let rows = multiples.iter().flat_map(|x| (0..depth).map(move |d| x * sign(d)));
    let shape = (1, 1, multiples.len(), depth);
    Tensor::from_vec(rows.collect::<Vec<f32>>(), shape, &Device::Cpu).unwrap()
}

/// Numbers whose scores are finite as `(q·k^T) * scale`, wherever they are on the way: the largest scores, and
/// queries and keys that are large before they meet.
#[test]
fn scores_up_to_the_largest_number_are_those_of_the_definition() -> TestResult {
    let depth = 16;
    for (q, k, scale) in [
        (3.0, 1e38, 1.0),
        (-3.0, 1e38, 1.0),
        (1e19, 3e19, 1.0),
        (-1e19, 3e19, 1.0),
        (1e-38, 3e38, 1.0),
        (3e38, 1e-38, 1.0),
        (1e-38, f32::MAX, 0.25),
        (1e30, 1e-30, 3e38),
        (-1e30, 1e-30, 3e38),
    ] {
        for (m, n) in [(1, 9), (5, 40), (60, 600)] {
            let v = randn((1, 1, n, 8));
            // Products of a row are one number, and the sum of them is that times the depth.
            let q = q / depth as f32;
            let queries = along(&vec![q; m], depth, true);
            // One score far above the others: many that are nearly the largest are no test of rounded ones.
            let (top, others) = if q > 0.0 { (k, 0.5 * k) } else { (0.5 * k, k) };
            let one = |j: usize| if j == n / 2 { top } else { others };
            for (multiples, is_one) in [(vec![k; n], false), ((0..n).map(one).collect(), true)] {
                let keys = along(&multiples, depth, true);
                let tensors = [&queries, &keys, &v];
                let exact =
                    Definition { tensors, scale: f64::from(scale), softcap: None, slope: 0.0 };
                for (name, config) in fused() {
                    let config = config.softmax_scale(scale);
                    let what = format!("{name} {q} {k} {scale} {m} {n}");
                    let out = attention(&queries, &keys, &v, &AttnMask::None, &config)?;
                    if is_one || name == "fp32" {
                        let bound = if name == "fp32" { FP32_BOUND } else { INT8_BOUND };
                        exact.check(&what, &out, bound);
                    } else {
                        // Rounding tells scores of this size apart, be they equal: any mean of values.
                        let (found, most) = (common::largest(&out), common::largest(&v));
                        assert!(found > 0.0 && found < most * 1.01, "{what}: {found}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// Ranges that are given are those of the numbers as they are.
#[test]
fn scores_of_static_ranges_go_up_to_the_largest_number() -> TestResult {
    let (m, n, depth) = (5, 40, 16);
    let given = |range: f32, granularity| {
        let params = vec![QuantParams::symmetric(range / 127.0)?];
        Ok::<_, candle_int8_attention::Error>(QuantConfig {
            granularity,
            range: RangeSource::Static(params),
            ..QuantConfig::default()
        })
    };
    for granularity in [Granularity::PerTensor, Granularity::PerHead] {
        for (q, k) in [(3f32, 1e38f32), (-3.0, 1e38), (1e19, 3e19), (-1e19, 3e19)] {
            let (q, v) = (q / depth as f32, randn((1, 1, n, 8)));
            let one = |j: usize| if (j == n / 2) == (q > 0.0) { k } else { 0.5 * k };
            let queries = along(&vec![q; m], depth, true);
            let keys = along(&(0..n).map(one).collect::<Vec<_>>(), depth, true);
            let mut scores = ScoreConfig::plain(Scheme::Symmetric, granularity);
            (scores.q, scores.k) = (given(q.abs(), granularity)?, given(k, granularity)?);
            let config = AttentionConfig::from(Int8Config { scores, ..Int8Config::default() });
            let config = config.softmax_scale(1.0);
            let out = attention(&queries, &keys, &v, &AttnMask::None, &config)?;
            let exact = Definition {
                tensors: [&queries, &keys, &v],
                scale: 1.0,
                softcap: None,
                slope: 0.0,
            };
            exact.check(&format!("{granularity} {q} {k}"), &out, INT8_BOUND);
        }
    }
    Ok(())
}

/// In a cache too, but for keys that are large themselves and are rotated as they come.
#[test]
fn scores_of_a_cache_up_to_the_largest_number_are_those_of_the_definition() -> TestResult {
    let depth = 16;
    for (q, k, scale) in [
        (1e19f32, 3e19f32, 1.0f32),
        (-1e19, 3e19, 1.0),
        (3.0, 1e37, 10.0),
        (-3.0, 1e37, 10.0),
        (3e38, 1e-38, 1.0),
        (-3e38, 1e-38, 1.0),
    ] {
        for (m, n) in [(1, 9), (5, 40), (60, 600)] {
            let (q, v) = (q / depth as f32, randn((1, 1, n, 8)));
            let queries = along(&vec![q; m], depth, true);
            // One score far above the others, as above.
            let one = |j: usize| if (j == n / 2) == (q > 0.0) { k } else { 0.5 * k };
            let keys = along(&(0..n).map(one).collect::<Vec<_>>(), depth, true);
            let tensors = [&queries, &keys, &v];
            let exact = Definition { tensors, scale: f64::from(scale), softcap: None, slope: 0.0 };
            let config = AttentionConfig::int8().softmax_scale(scale);
            let out = cache_of(&keys, &v, CacheValues::F16);
            let out = out.attention(&queries, &AttnMask::None, &config)?;
            exact.check(&format!("{q} {k} {scale} {m} {n}"), &out, INT8_BOUND);
        }
    }
    Ok(())
}

/// Ordinary rows beside them keep their bits, and gradients are those of the same numbers.
#[test]
fn ordinary_rows_beside_the_largest_scores_keep_their_bits() -> TestResult {
    let (m, n, depth) = (20, 100, 16);
    let (q, k, v) = (randn((1, 1, m, depth)), randn((1, 1, n, depth)), randn((1, 1, n, 8)));
    let large = along(&[1e37; 2], depth, true);
    let both = Tensor::cat(&[&q, &large], 2)?;
    for (name, config) in fused() {
        let config = config.granularity(Granularity::PerToken);
        let config = if name == "fp32" { AttentionConfig::fp32() } else { config };
        let config = config.softmax_scale(4.0);
        let alone = attention(&q, &k, &v, &AttnMask::None, &config)?;
        let beside = attention(&both, &k, &v, &AttnMask::None, &config)?;
        assert!(common::largest(&beside).is_finite(), "{name}");
        let difference = largest_difference(&beside.narrow(2, 0, m)?, &alone);
        let bound = if name == "fp32" { 0.0 } else { INT8_BOUND };
        assert!(difference <= bound, "{name}: {difference}");
    }
    Ok(())
}

#[test]
fn slopes_and_caps_up_to_the_largest_number_give_finite_attention() -> TestResult {
    for (m, n, dv) in [(1, 9, 16), (1, 2500, 16), (5, 40, 8), (60, 1100, 16)] {
        let (q, k, v) = (randn((1, 1, m, 16)), randn((1, 1, n, 16)), randn((1, 1, n, dv)));
        for (slope, softcap) in [
            (2e38f32, None),
            (f32::MAX, None),
            (1e12, Some(3e38f32)),
            (0.0, Some(f32::MAX)),
            (2e38, Some(5.0)),
        ] {
            let exact = Definition {
                tensors: [&q, &k, &v],
                scale: 0.25,
                softcap: softcap.map(f64::from),
                slope: f64::from(slope),
            };
            let with = |config: AttentionConfig| {
                let config = config.alibi_slopes(vec![slope]);
                softcap.map_or(config.clone(), |cap| config.softcap(cap))
            };
            for (name, config) in fused() {
                let out = attention(&q, &k, &v, &AttnMask::None, &with(config))?;
                let bound = if name == "fp32" { FP32_BOUND } else { INT8_BOUND };
                exact.check(&format!("{name} {slope} {softcap:?} {m} {n}"), &out, bound);
            }
            let cache = cache_of(&k, &v, CacheValues::F16);
            let out = cache.attention(&q, &AttnMask::None, &with(AttentionConfig::int8()))?;
            exact.check(&format!("cache {slope} {softcap:?} {m} {n}"), &out, INT8_BOUND);
        }
    }
    Ok(())
}
