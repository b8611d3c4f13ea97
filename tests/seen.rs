//! What a query does not see has no part in its answer: the same bits as without it.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_int8_attention::quant::{Granularity, Scheme, Smoothing};
use candle_int8_attention::{AttentionCall, AttentionConfig, Causal, PvPrecision, attention};
use common::{largest_difference, randn};

const CPU: Device = Device::Cpu;

/// What may stand where nobody looks.
const HIDDEN: [f32; 7] = [0.0, 30.0, 1e4, 1e10, f32::MAX, f32::NAN, f32::INFINITY];

fn bits(x: &Tensor) -> Vec<u32> {
    x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// Every granularity, scheme, smoothing and P·V, one or two at a time.
fn configs() -> Vec<AttentionConfig> {
    let int8 = AttentionConfig::int8;
    let smoothings = [Smoothing::None, Smoothing::Head, Smoothing::Block];
    let granularities = [
        Granularity::PerTensor,
        Granularity::PerHead,
        Granularity::PerBlock(10),
        Granularity::PerToken,
    ];
    let mut all = vec![AttentionConfig::fp32()];
    for scheme in [Scheme::Symmetric, Scheme::Affine] {
        all.extend(granularities.map(|granularity| int8().scheme(scheme).granularity(granularity)));
    }
    all.extend(smoothings.map(|smoothing| int8().smoothing(smoothing, smoothing)));
    all.push(int8().with_scores(|scores| (scores.rotate, scores.outliers) = (false, false)));
    let precisions = [PvPrecision::F32, PvPrecision::Int16, PvPrecision::Int8];
    all.extend(precisions.map(|pv| int8().pv(pv)));
    all
}

struct Case {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Case {
    fn new((m, n): (usize, usize)) -> Self {
        let (q, kv) = ((1, 4, m, 24), (1, 2, n, 24));
        // Keys with a bias, as models have them.
        let k = (randn(kv) + 3.0).unwrap();
        Self { q: randn(q), k, v: randn(kv) }
    }

    /// The keys and values that are seen, with others where they are not.
    fn hide(&self, seen: &[bool], hidden: f32) -> (Tensor, Tensor) {
        let n = seen.len();
        let mark: Vec<u8> = seen.iter().map(|&seen| u8::from(seen)).collect();
        let mark = Tensor::from_vec(mark, (1, 1, n, 1), &CPU).unwrap();
        let fill = |x: &Tensor| {
            let other = Tensor::full(hidden, x.shape(), &CPU).unwrap();
            mark.broadcast_as(x.shape()).unwrap().where_cond(x, &other).unwrap()
        };
        (fill(&self.k), fill(&self.v))
    }

    /// Those that are seen alone.
    fn only(&self, seen: &[bool]) -> (Tensor, Tensor) {
        let places = (0..seen.len() as u32).filter(|&key| seen[key as usize]).collect::<Vec<_>>();
        let places = Tensor::new(places, &CPU).unwrap();
        let pick = |x: &Tensor| x.index_select(&places, 2).unwrap();
        (pick(&self.k), pick(&self.v))
    }

    /// The call with hidden keys gives the bits of `alone` without them.
    fn check(&self, name: &str, seen: &[bool], call: &AttentionCall, alone: &AttentionCall) {
        for config in configs() {
            let (k, v) = self.only(seen);
            let expected = bits(&attention(&self.q, &k, &v, alone, &config).unwrap());
            for hidden in HIDDEN {
                let (k, v) = self.hide(seen, hidden);
                let found = bits(&attention(&self.q, &k, &v, call, &config).unwrap());
                assert!(found == expected, "{name} hides {hidden}: {:?}", config.backend);
            }
        }
    }
}

fn everything() -> AttentionCall {
    AttentionCall::default()
}

#[test]
fn keys_behind_a_mask_take_no_part() {
    let n = 150;
    let case = Case::new((60, n));
    let all = |sees: fn(usize) -> bool| (0..n).map(sees).collect::<Vec<bool>>();
    for (name, seen) in [
        ("a mask of the end", all(|key| key < 97)),
        ("a mask of the start", all(|key| key >= 41)),
        ("a mask with holes", all(|key| key % 7 != 3 && !(50..90).contains(&key))),
    ] {
        let boolean: Vec<u8> = seen.iter().map(|&seen| u8::from(seen)).collect();
        let boolean = Tensor::from_vec(boolean, (1, 1, 1, n), &CPU).unwrap();
        case.check(name, &seen, &everything().with_mask(boolean.clone()), &everything());
        // The same for each query and head apart.
        let whole = boolean.broadcast_as((1, 4, 60, n)).unwrap().contiguous().unwrap();
        case.check(name, &seen, &everything().with_mask(whole), &everything());
        for hides in [f32::NEG_INFINITY, f32::MIN] {
            let additive: Vec<f32> =
                seen.iter().map(|&seen| if seen { 0.0 } else { hides }).collect();
            let mask = Tensor::from_vec(additive, (n,), &CPU).unwrap();
            case.check(name, &seen, &everything().with_mask(mask), &everything());
        }
    }
}

#[test]
fn keys_beyond_a_length_the_future_and_a_window_take_no_part() {
    let n = 150;
    let case = Case::new((60, n));
    let seen =
        |keys: std::ops::Range<usize>| (0..n).map(|key| keys.contains(&key)).collect::<Vec<_>>();
    case.check("a length", &seen(0..97), &everything().with_kv_lens(vec![97]), &everything());
    let from = |start| AttentionCall::from(Causal::From(vec![start]));
    case.check("the future", &seen(0..70), &from(10), &from(10));
    // Queries 0..60 stand at keys 80..140 and see 20 keys before them and 5 behind.
    for (left, right, keys, first) in
        [(Some(20), Some(5), 60..145, 20), (Some(20), None, 60..150, 20)]
    {
        for config in configs() {
            let spec = config.window(left, right);
            let (k, v) = case.only(&seen(keys.clone()));
            // The same positions among fewer keys.
            let alone = Causal::Offset(first);
            let expected = match right {
                Some(_) => continue_without(&case, (&k, &v), first, &spec),
                None => bits(&attention(&case.q, &k, &v, alone, &spec).unwrap()),
            };
            let call = match right {
                Some(_) => None,
                None => Some(AttentionCall::from(Causal::Offset(80))),
            };
            for hidden in HIDDEN {
                let (k, v) = case.hide(&seen(keys.clone()), hidden);
                let found = match &call {
                    Some(call) => bits(&attention(&case.q, &k, &v, call, &spec).unwrap()),
                    None => continue_without(&case, (&k, &v), 80, &spec),
                };
                assert!(found == expected, "a window hides {hidden}: {:?}", spec.backend);
            }
        }
    }
}

/// Without a causal mask queries stand at the last keys: a mask of positions says where else.
fn continue_without(
    case: &Case,
    (k, v): (&Tensor, &Tensor),
    first: usize,
    config: &AttentionConfig,
) -> Vec<u32> {
    let (m, n) = (case.q.dim(2).unwrap(), k.dim(2).unwrap());
    let (left, right) = (config.spec.window_left.unwrap(), config.spec.window_right.unwrap());
    let sees =
        |query: usize, key: usize| key + left >= first + query && key <= first + query + right;
    let mask = (0..m * n).map(|i| u8::from(sees(i / n, i % n))).collect();
    let mask = Tensor::from_vec(mask, (m, n), &CPU).unwrap();
    let config = config.clone().window(None, None);
    bits(&attention(&case.q, k, v, everything().with_mask(mask), &config).unwrap())
}

/// In fp32 a row has the same bits wherever its keys lie: those before them may be seen by other rows or by none.
#[test]
fn keys_that_others_see_take_no_part_in_fp32() {
    let tokens = 60;
    let [q, k, v] = [(); 3].map(|()| randn((1, 2, tokens, 16)));
    for window in 0..20 {
        let config = AttentionConfig::fp32().window(Some(window), Some(0));
        let of = |call| attention(&q, &k, &v, call, &config).unwrap();
        let all = of(AttentionCall::default());
        for hidden in 1..20 {
            let mask = (0..tokens).map(|key| u8::from(key >= hidden)).collect::<Vec<_>>();
            let mask = Tensor::from_vec(mask, (1, 1, 1, tokens), &Device::Cpu).unwrap();
            let found = of(AttentionCall::default().with_mask(mask));
            // From here on no row sees a key that is hidden.
            let rest = |x: &Tensor| bits(&x.narrow(2, hidden + window, 20).unwrap());
            assert!(rest(&found) == rest(&all), "a window of {window}, {hidden} hidden");
        }
    }
}

/// A few queries take another way through the engine than many, with the same bits where nothing is shared: the
/// whole tile at once instead of run by run.
#[test]
fn a_few_queries_have_the_bits_of_many() -> Result<()> {
    const FEW: usize = 5;
    let (m, n) = (40, 300);
    let [q, k] = [m, n].map(|tokens| randn((1, 2, tokens, 24)));
    // Of one magnitude, so that the scale of a run is that of any of its keys.
    let v = (randn((1, 2, n, 24)).ge(0f64)?.to_dtype(DType::F32)? * 2.0)?.affine(1.0, -1.0)?;
    // Any few queries see all of the keys.
    let mask = (0..m * n).map(|i| u8::from(!(i / n + i % n).is_multiple_of(FEW))).collect();
    let mask = Tensor::from_vec(mask, (m, n), &CPU)?;
    let none = Smoothing::None;
    let plain = AttentionConfig::int8().pv(PvPrecision::Int16).smoothing(none, none);
    let plain = plain.with_scores(|scores| scores.outliers = false);
    let configs = [plain.clone(), plain.clone().alibi_slopes(vec![0.5, 0.25]), plain.softcap(2.0)];
    let masked =
        |start: usize, rows| mask.narrow(0, start, rows).map(|x| everything().with_mask(x));
    for config in &configs {
        let of = |q: &Tensor, call: AttentionCall| attention(q, &k, &v, call, config);
        let causal = |start: usize| AttentionCall::from(Causal::Offset(200 + start));
        let all = [of(&q, causal(0))?, of(&q, masked(0, m)?)?];
        for start in (0..m).step_by(FEW) {
            let few = q.narrow(2, start, FEW)?;
            let mut calls = vec![(&all[0], causal(start))];
            // With a mask alone, positions are counted from the first query of the call.
            if config.spec.alibi_slopes.is_none() {
                calls.push((&all[1], masked(start, FEW)?));
            }
            for (all, call) in calls {
                let (found, expected) = (of(&few, call)?, all.narrow(2, start, FEW)?);
                assert!(bits(&found) == bits(&expected), "{config:?} from {start} on");
            }
        }
    }
    Ok(())
}

#[test]
fn padded_queries_take_no_part() {
    let case = Case::new((60, 80));
    for config in configs() {
        let real = case.q.narrow(2, 0, 37).unwrap();
        let expected = attention(&real, &case.k, &case.v, everything(), &config).unwrap();
        for hidden in HIDDEN {
            let other = Tensor::full(hidden, (1, 4, 23, 24), &CPU).unwrap();
            let q = Tensor::cat(&[&real, &other], 2).unwrap();
            let call = everything().with_q_lens(vec![37]);
            let found = attention(&q, &case.k, &case.v, call, &config).unwrap();
            let (rows, padding) =
                (found.narrow(2, 0, 37).unwrap(), found.narrow(2, 37, 23).unwrap());
            assert!(bits(&rows) == bits(&expected), "{hidden}: {:?}", config.backend);
            assert!(bits(&padding).iter().all(|&bits| bits == 0), "{hidden}: {:?}", config.backend);
        }
    }
}

/// Nor do they bring tiles of keys into a block that its other queries do not see: those of the block that the
/// padding begins in see keys around a multiple of the tile.
#[test]
fn padded_queries_bring_no_keys_into_a_window() {
    let (m, n, padding) = (530, 540, 10);
    let case = Case::new((m, n));
    for config in configs() {
        let config = config.window(Some(100), Some(0));
        let call = || AttentionCall::from(Causal::From(vec![0]));
        let expected = attention(&case.q, &case.k, &case.v, call(), &config).unwrap();
        let q = Tensor::cat(&[&case.q, &randn((1, 4, padding, 24))], 2).unwrap();
        let call = call().with_q_lens(vec![m]);
        let found = attention(&q, &case.k, &case.v, call, &config).unwrap();
        let rows = found.narrow(2, 0, m).unwrap();
        assert!(bits(&rows) == bits(&expected), "{:?}", config.backend);
    }
}

#[test]
fn a_sequence_is_the_same_alone_and_at_any_place_of_a_batch() -> Result<()> {
    let (long, short) = (Case::new((128, 128)), Case::new((70, 70)));
    let pad = |x: &Tensor| x.pad_with_zeros(2, 0, 58);
    for config in configs() {
        if let candle_int8_attention::Backend::Int8(int8) = &config.backend
            && int8.scores.q.granularity == Granularity::PerTensor
        {
            continue; // One scale for the whole batch.
        }
        let alone = attention(&short.q, &short.k, &short.v, everything(), &config)?;
        for at in [0, 1, 2] {
            let batch = |short: &Tensor, long: &Tensor| {
                let mut parts = [long, long, long];
                let short = pad(short).unwrap();
                parts[at] = &short;
                Tensor::cat(&parts, 0).unwrap()
            };
            let (q, k) = (batch(&short.q, &long.q), batch(&short.k, &long.k));
            let v = batch(&short.v, &long.v);
            let mut lens = vec![128; 3];
            lens[at] = 70;
            let call = everything().with_kv_lens(lens.clone()).with_q_lens(lens);
            let found =
                attention(&q, &k, &v, &call, &config)?.narrow(0, at, 1)?.narrow(2, 0, 70)?;
            assert!(bits(&found) == bits(&alone), "at {at}: {:?}", config.backend);
        }
    }
    Ok(())
}

/// Whole blocks, of 48 queries and 64 keys, do not depend on what follows. In the last ones, part-filled, a
/// prefix differs as much as int8 does from fp32.
#[test]
fn a_prefix_is_the_start_of_the_whole_in_whole_blocks() -> Result<()> {
    let case = Case::new((384, 384));
    let config = AttentionConfig::int8();
    let causal = || AttentionCall::from(Causal::Offset(0));
    let whole = attention(&case.q, &case.k, &case.v, causal(), &config)?;
    let exact = attention(&case.q, &case.k, &case.v, causal(), &AttentionConfig::fp32())?;
    let error = largest_difference(&whole, &exact);
    for len in [192, 200, 250] {
        let of = |x: &Tensor| x.narrow(2, 0, len);
        let prefix = attention(&of(&case.q)?, &of(&case.k)?, &of(&case.v)?, causal(), &config)?;
        let start = of(&whole)?;
        // Queries before the last whole blocks of both see whole blocks of keys alone.
        let blocks = len / 64 * 64 / 48 * 48;
        let (a, b) = (prefix.narrow(2, 0, blocks)?, start.narrow(2, 0, blocks)?);
        assert!(bits(&a) == bits(&b), "{len}");
        let difference = largest_difference(&prefix, &start);
        assert!(difference <= 2.0 * error, "{len}: {difference}, int8 itself {error}");
    }
    Ok(())
}

/// The largest error of the rows whose answer is not the outlier.
fn error_of_others(case: &Case, outlier: Option<usize>, query: Option<usize>) -> Result<f64> {
    let run = |config| attention(&case.q, &case.k, &case.v, everything(), &config);
    let (exact, int8) = (run(AttentionConfig::fp32())?, run(AttentionConfig::int8())?);
    let (_, h, m, d) = case.q.dims4()?;
    let (exact, int8) =
        (exact.flatten_all()?.to_vec1::<f32>()?, int8.flatten_all()?.to_vec1::<f32>()?);
    let mut error = 0f64;
    for row in 0..h * m {
        let elements = row * d..(row + 1) * d;
        if let Some(key) = outlier {
            let head = row / m / 2;
            let value = case.v.get(0)?.get(head)?.get(key)?.to_vec1::<f32>()?;
            let same =
                exact[elements.clone()].iter().zip(&value).all(|(a, b)| (a - b).abs() < 1e-3);
            if same {
                continue;
            }
        }
        if query == Some(row % m) {
            continue;
        }
        for at in elements {
            error = error.max(f64::from((exact[at] - int8[at]).abs()));
        }
    }
    Ok(error)
}

/// The largest error, but in the channel in which one value is an outlier.
fn error_of_unmoved(case: &Case, clean: &Case, token: usize) -> Result<f64> {
    let run = |case: &Case, config| attention(&case.q, &case.k, &case.v, everything(), &config);
    let (exact, int8) = (run(case, AttentionConfig::fp32())?, run(case, AttentionConfig::int8())?);
    let moved = run(clean, AttentionConfig::fp32())?;
    assert!(largest_difference(&moved, &exact) > 1.0, "value {token} is seen by none");
    let others = |x: &Tensor| Tensor::cat(&[&x.narrow(3, 0, 5)?, &x.narrow(3, 6, 18)?], 3);
    Ok(largest_difference(&others(&exact)?, &others(&int8)?))
}

#[test]
fn an_outlier_that_is_seen_does_not_spoil_the_others() -> Result<()> {
    for n in [64, 66, 150] {
        let case = Case::new((60, n));
        let before = error_of_others(&case, None, None)?;
        for at in [0, n / 2, n - 1] {
            let set = |x: &Tensor, token: usize, number: f32| -> Result<Tensor> {
                let (_, h, s, d) = x.dims4()?;
                let mut data = x.flatten_all()?.to_vec1::<f32>()?;
                (0..h).for_each(|head| data[(head * s + token) * d + 5] = number);
                Tensor::from_vec(data, x.shape(), &CPU)
            };
            let key = Case { k: set(&case.k, at, 3e4)?, q: case.q.clone(), v: case.v.clone() };
            let found = error_of_others(&key, Some(at), None)?;
            assert!(found <= 2.0 * before, "key {at} of {n}: {found}, {before} without");
            let query = at.min(59);
            let q = set(&case.q, query, 3e4)?;
            let spoiled = Case { q, k: case.k.clone(), v: case.v.clone() };
            let found = error_of_others(&spoiled, None, Some(query))?;
            assert!(found <= 2.0 * before, "query {query} of {n}: {found}, {before} without");
            let v = set(&case.v, at, 3e4)?;
            let value = Case { v, q: case.q.clone(), k: case.k.clone() };
            let found = error_of_unmoved(&value, &case, at)?;
            assert!(found <= 2.0 * before, "value {at} of {n}: {found}, {before} without");
        }
    }
    Ok(())
}

/// What people trip over between libraries.
#[test]
fn a_sliding_window_of_w_is_w_minus_one_keys_to_the_left() -> Result<()> {
    let case = Case::new((9, 9));
    let (w, n) = (4usize, 9usize);
    // Hugging Face: key j is seen where i - j < W and j <= i.
    let sees = |i: usize, j: usize| j <= i && i - j < w;
    let mask = (0..n * n).map(|at| u8::from(sees(at / n, at % n))).collect();
    let mask = Tensor::from_vec(mask, (n, n), &CPU)?;
    let config = AttentionConfig::fp32();
    let of = |call: AttentionCall, config: &AttentionConfig| {
        attention(&case.q, &case.k, &case.v, call, config)
    };
    let expected = of(everything().with_mask(mask), &config)?;
    let window = config.clone().window(Some(w - 1), None);
    let found = of(AttentionCall::causal(), &window)?;
    assert!(largest_difference(&found, &expected) < 1e-6);
    Ok(())
}

#[test]
fn causal_is_aligned_at_the_start_with_an_offset_and_at_the_end_by_name() -> Result<()> {
    let case = Case::new((3, 7));
    let config = AttentionConfig::fp32();
    let of = |call: AttentionCall| attention(&case.q, &case.k, &case.v, call, &config);
    // Top left, as a square mask that was cut off: query 0 sees key 0 alone.
    let first = of(Causal::Offset(0).into())?.narrow(2, 0, 1)?;
    for head in 0..4 {
        let (found, value) = (first.narrow(1, head, 1)?, case.v.narrow(1, head / 2, 1)?);
        assert!(largest_difference(&found, &value.narrow(2, 0, 1)?) < 1e-6);
    }
    // At the end, as in decoding: the last query sees all keys.
    let (end, offset) = (of(AttentionCall::causal())?, of(Causal::Offset(4).into())?);
    assert!(bits(&end) == bits(&offset));
    let last = attention(&case.q.narrow(2, 2, 1)?, &case.k, &case.v, everything(), &config)?;
    assert!(largest_difference(&end.narrow(2, 2, 1)?, &last) < 1e-6);
    Ok(())
}

#[test]
fn rows_of_only_the_smallest_number_give_zeros() -> Result<()> {
    let case = Case::new((3, 7));
    let mask = Tensor::full(f32::MIN, (3, 7), &CPU)?;
    for config in [AttentionConfig::fp32(), AttentionConfig::int8()] {
        let call = everything().with_mask(mask.clone());
        let out = attention(&case.q, &case.k, &case.v, call, &config)?;
        assert!(bits(&out).iter().all(|&bits| bits == 0));
    }
    Ok(())
}
