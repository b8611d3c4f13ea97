//! The rule that chose the default P·V precision: the fastest whose attention output stays within
//! 1.5 times the error that int8 scores alone cause. Measured on the queries, keys and values of a
//! real encoder over real prose; from fast to slow: int8, bf16 and int16, f32.

use candle_core::{Device, Tensor};
use candle_int8_attention::models::{AttentionInput, ModelFiles, TextEncoder, run_layers};
use candle_int8_attention::nn::Precision;
use candle_int8_attention::{AttentionConfig, AttnMask, PvPrecision, attention};
use std::path::{Path, PathBuf};

type TestResult<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// How much more error than from the scores alone the default may have.
const ALLOWED: f64 = 1.5;

fn config(pv: PvPrecision) -> AttentionConfig {
    AttentionConfig::int8().pv(pv)
}

/// The shipped encoder, and any other that `CANDLE_INT8_TEST_MODEL` names.
fn encoders() -> TestResult<Vec<(PathBuf, TextEncoder)>> {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/paraphrase-MiniLM-L3-v2");
    let other = std::env::var_os("CANDLE_INT8_TEST_MODEL").map(PathBuf::from);
    let folders = std::iter::once(shipped).chain(other);
    let load = |folder: PathBuf| -> TestResult<(PathBuf, TextEncoder)> {
        let encoder =
            TextEncoder::load_in(&ModelFiles::from_dir(&folder)?, &Device::Cpu, Precision::F32)?;
        Ok((folder, encoder))
    };
    folders.map(load).collect()
}

/// Queries, keys and values of every layer in fp32, over a page and its first paragraphs.
fn blocks(encoder: &mut TextEncoder) -> TestResult<Vec<[Tensor; 3]>> {
    let text = include_str!("../examples/data/pride-and-prejudice.txt");
    encoder.model.set_attention(&AttentionConfig::fp32());
    let mut blocks = Vec::new();
    for passage in [text, &text[..text.len() / 4]] {
        let batch = encoder.tokenize(&[passage])?;
        run_layers(&encoder.model, &batch.input_ids, &mut |_, AttentionInput { q, k, v, .. }| {
            blocks.push([q, k, v].map(Tensor::clone));
            Ok(())
        })?;
    }
    Ok(blocks)
}

/// The root mean square of the error of each block's output, against fp32.
fn errors(blocks: &[[Tensor; 3]], pv: PvPrecision) -> TestResult<Vec<f64>> {
    let error = |[q, k, v]: &[Tensor; 3]| -> TestResult<f64> {
        let exact = attention(q, k, v, &AttnMask::None, &AttentionConfig::fp32())?;
        let found = attention(q, k, v, &AttnMask::None, &config(pv))?;
        Ok((found - exact)?.sqr()?.mean_all()?.to_scalar::<f32>()?.sqrt().into())
    };
    blocks.iter().map(error).collect()
}

/// By how much `errors` exceed those of the scores: the geometric mean, and the worst block.
fn ratios(errors: &[f64], scores: &[f64]) -> (f64, f64) {
    let ratios: Vec<f64> = errors.iter().zip(scores).map(|(e, s)| e / s).collect();
    let mean = (ratios.iter().map(|r| r.ln()).sum::<f64>() / ratios.len() as f64).exp();
    (mean, ratios.iter().copied().max_by(f64::total_cmp).unwrap_or(f64::NAN))
}

fn has_bf16() -> bool {
    let x = Tensor::zeros((1, 1, 1, 1), candle_core::DType::F32, &Device::Cpu).expect("a tensor");
    attention(&x, &x, &x, &AttnMask::None, &config(PvPrecision::Bf16)).is_ok()
}

#[test]
fn the_default_is_the_fastest_within_the_error_allowed() -> TestResult {
    let bf16 = has_bf16();
    if !bf16 {
        eprintln!("NOT RUN: P·V in bf16 (there is no kernel for it on this machine)");
    }
    for (folder, mut encoder) in encoders()? {
        let blocks = blocks(&mut encoder)?;
        let scores = errors(&blocks, PvPrecision::F32)?;
        let report = |pv: PvPrecision| -> TestResult<f64> {
            let (mean, worst) = ratios(&errors(&blocks, pv)?, &scores);
            eprintln!("{}: {pv:?} {mean:.3}, worst layer {worst:.3}", folder.display());
            Ok(worst)
        };
        let int8 = report(PvPrecision::Int8)?;
        assert!(int8 > ALLOWED, "int8 would be the default: {int8}");
        // What the scores cost hides the rest.
        let int16 = report(PvPrecision::Int16)?;
        assert!(int16 < 1.02, "int16 must not be the default: {int16}");
        let mut chosen = PvPrecision::Int16;
        if bf16 {
            let bf16 = report(PvPrecision::Bf16)?;
            assert!(bf16 <= ALLOWED, "bf16 must not be the default: {bf16}");
            chosen = PvPrecision::Bf16;
        }
        let [q, k, v] = &blocks[0];
        let outputs = [PvPrecision::Auto, chosen].map(|pv| -> TestResult<Vec<f32>> {
            let out = attention(q, k, v, &AttnMask::None, &config(pv))?;
            Ok(out.flatten_all()?.to_vec1()?)
        });
        let [default, chosen] = outputs;
        assert!(default? == chosen?, "Auto is not the precision chosen");
    }
    Ok(())
}

/// P·V alone, `[1, 1, 256, 1024]` by 64 channels, as signal to noise in dB against f32: with scores as they
/// are and far apart, with a token and with a channel of values that is larger than the rest. All have
/// the same int8 scores.
#[test]
fn p_times_v_in_int16_has_twelve_bits_wherever_values_are_large() -> TestResult {
    let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu);
    let (q, k, v) =
        (random(&[1, 1, 256, 32])?, random(&[1, 1, 1024, 32])?, random(&[1, 1, 1024, 64])?);
    let row = |from: usize, to: f64| -> candle_core::Result<Tensor> {
        let sizes = (0..1024).map(|i| if i == from { to as f32 } else { 1.0 });
        Tensor::from_iter(sizes, &Device::Cpu)?.reshape((1024, 1))
    };
    let column =
        Tensor::from_iter((0..64).map(|i| if i == 9 { 30f32 } else { 1.0 }), &Device::Cpu)?;
    let cases = [
        ("plain", 1.0, v.clone(), 65.0),
        ("scores x 4", 4.0, v.clone(), 65.0),
        ("a token x 50", 1.0, v.broadcast_mul(&row(300, 50.0)?)?, 65.0),
        ("a token x 10^4", 1.0, v.broadcast_mul(&row(300, 1e4)?)?, 65.0),
        ("a channel x 30", 1.0, v.broadcast_mul(&column)?, 65.0),
    ];
    for (what, factor, v, least) in cases {
        let q = (&q * factor)?;
        let out = |pv| attention(&q, &k, &v, &AttnMask::None, &config(pv));
        let (exact, found) = (out(PvPrecision::F32)?, out(PvPrecision::Int16)?);
        let energy = |x: &Tensor| -> TestResult<f64> {
            Ok(x.to_dtype(candle_core::DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?)
        };
        let noise = energy(&(found - &exact)?)?;
        let decibels = 10.0 * (energy(&exact)? / noise).log10();
        eprintln!("{what}: {decibels:.1} dB");
        assert!(decibels > least, "{what}: {decibels:.1} dB");
    }
    Ok(())
}
