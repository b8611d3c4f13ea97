//! The quantized tensor type: edge cases, files, misuse.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_int8_attention::Error;
use candle_int8_attention::quant::{
    CodeStorage, Granularity, QuantConfig, QuantParams, QuantizedTensor, RangeSource, Scheme,
};
use common::randn;

type TestResult = Result<(), Box<dyn std::error::Error>>;

const GRANULARITIES: [Granularity; 4] =
    [Granularity::PerTensor, Granularity::PerHead, Granularity::PerToken, Granularity::PerBlock(3)];

fn configs() -> impl Iterator<Item = QuantConfig> {
    let schemes = [Scheme::Symmetric, Scheme::Affine];
    schemes.into_iter().flat_map(|scheme| {
        GRANULARITIES.map(|granularity| QuantConfig {
            scheme,
            granularity,
            range: RangeSource::Dynamic,
        })
    })
}

#[test]
fn error_is_at_most_half_a_step() -> TestResult {
    let x = randn((2, 3, 10, 17)).affine(2., 0.7)?;
    let real = x.flatten_all()?.to_vec1::<f32>()?;
    for config in configs() {
        let q = QuantizedTensor::quantize(&x, &config)?;
        assert_eq!(q.all_params().len(), config.granularity.groups(6, 10)?);
        let back = q.dequantize(&Device::Cpu)?;
        assert_eq!(back.dims(), x.dims());
        for (i, (x, y)) in real.iter().zip(back.flatten_all()?.to_vec1::<f32>()?).enumerate() {
            // Affine ends of a range can be off by the rounding of the zero point as well.
            let steps = if config.scheme == Scheme::Affine { 1.0 } else { 0.5 };
            assert!(
                (x - y).abs() <= q.params(i / 17).unwrap().scale() * (steps + 1e-4),
                "{config:?}"
            );
        }
        for (row, sum) in q.row_sums().iter().enumerate() {
            let codes = &q.values()[row * 17..(row + 1) * 17];
            assert_eq!(*sum, codes.iter().map(|&q| i32::from(q)).sum::<i32>());
        }
    }
    Ok(())
}

#[test]
fn groups_have_their_own_scales() -> TestResult {
    let x = Tensor::new(&[[[1f32, -1.0], [2.0, 0.0]], [[4.0, 0.0], [0.0, -8.0]]], &Device::Cpu)?;
    let scales = |granularity| -> Result<Vec<f32>, Error> {
        let config = QuantConfig { granularity, ..QuantConfig::default() };
        let q = QuantizedTensor::quantize(&x, &config)?;
        Ok(q.all_params().iter().map(|p| p.scale() * 127.0).collect())
    };
    assert_eq!(scales(Granularity::PerTensor)?, [8.0]);
    assert_eq!(scales(Granularity::PerHead)?, [2.0, 8.0]);
    assert_eq!(scales(Granularity::PerToken)?, [1.0, 2.0, 4.0, 8.0]);
    assert_eq!(scales(Granularity::PerBlock(5))?, [2.0, 8.0]);
    Ok(())
}

#[test]
fn zeros_constants_and_single_elements_come_back() -> TestResult {
    for value in [0.0, 3.25, -3.25, 1e-41, f32::MAX, f32::MIN] {
        for shape in [(1, 1), (4, 5)] {
            let x = Tensor::full(value, shape, &Device::Cpu)?;
            for config in configs() {
                let q = QuantizedTensor::quantize(&x, &config)?;
                for y in q.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()? {
                    let bound = value.abs() * 1e-6 + f32::MIN_POSITIVE / 2.0;
                    assert!((value - y).abs() <= bound, "{value} came back as {y}: {config:?}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn empty_tensors() -> TestResult {
    for shape in [(0, 2, 3), (2, 0, 3), (2, 3, 0)] {
        let x = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
        for config in configs() {
            let q = QuantizedTensor::quantize(&x, &config)?;
            assert!(q.values().is_empty());
            assert_eq!(q.dequantize(&Device::Cpu)?.dims(), x.dims());
        }
    }
    Ok(())
}

#[test]
fn bad_elements_are_reported_with_their_place() -> TestResult {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let x = Tensor::new(&[[1f32, 2.0], [3.0, bad]], &Device::Cpu)?;
        let error = QuantizedTensor::quantize(&x, &QuantConfig::default()).unwrap_err();
        assert!(matches!(error, Error::NonFinite { index: 3, .. }), "{error}");
    }
    let x = Tensor::new(&[1f32], &Device::Cpu)?;
    let error = QuantizedTensor::quantize(&x, &QuantConfig::default()).unwrap_err().to_string();
    assert!(error.contains("[1]") && error.contains("[.., S, D]"), "{error}");
    let x = Tensor::new(&[[1u32]], &Device::Cpu)?;
    let error = QuantizedTensor::quantize(&x, &QuantConfig::default()).unwrap_err().to_string();
    assert!(error.contains("U32"), "{error}");
    Ok(())
}

#[test]
fn static_ranges_saturate_and_repeat_over_the_batch() -> TestResult {
    let x = Tensor::new(&[[[[0.5f32]], [[9.0]]], [[[-9.0]], [[0.25]]]], &Device::Cpu)?;
    let given = vec![QuantParams::symmetric(0.01)?, QuantParams::symmetric(0.02)?];
    let config = QuantConfig {
        granularity: Granularity::PerHead,
        range: RangeSource::Static(given),
        ..QuantConfig::default()
    };
    let q = QuantizedTensor::quantize(&x, &config)?;
    assert_eq!(q.values(), [50, 127, -127, 12]);
    let config = QuantConfig { granularity: Granularity::PerToken, ..config };
    let error = QuantizedTensor::quantize(&x, &config).unwrap_err().to_string();
    assert!(error.contains("2 static parameters for 4 groups (per-token"), "{error}");
    Ok(())
}

/// As attention refuses them: neither scheme is what was asked for.
#[test]
fn static_parameters_of_another_scheme_are_refused() -> TestResult {
    let x = Tensor::new(&[[0.5f32, -1.0]], &Device::Cpu)?;
    for (scheme, given) in [
        (Scheme::Affine, QuantParams::symmetric(0.01)?),
        (Scheme::Symmetric, QuantParams::affine(0.01, 3)?),
    ] {
        let range = RangeSource::Static(vec![given]);
        let config = QuantConfig { scheme, range, ..QuantConfig::default() };
        let error = QuantizedTensor::quantize(&x, &config).unwrap_err();
        assert!(matches!(error, Error::Contradiction(_)), "{error}");
        let text = error.to_string();
        let expected = format!("are {}, but the scheme is {scheme}", given.scheme());
        assert!(text.contains(&expected), "{text}");
    }
    Ok(())
}

#[test]
fn files_come_back_bit_for_bit() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("q.safetensors");
    let x = (randn((2, 5, 7)) + 0.3)?;
    for config in configs() {
        for storage in [CodeStorage::I8, CodeStorage::U8] {
            let q = QuantizedTensor::quantize(&x, &config)?;
            q.save(&path, storage)?;
            assert_eq!(QuantizedTensor::load(&path)?, q);
        }
    }
    // Candle's own loader reads the U8 storage.
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu)?;
    assert_eq!(tensors["values"].dtype(), DType::U8);
    Ok(())
}

#[test]
fn bad_files_are_named() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("q.safetensors");
    let message = || QuantizedTensor::load(&path).unwrap_err().to_string();
    assert!(message().contains("quantized tensor not found"), "{}", message());

    let x = randn((4, 6));
    let q = QuantizedTensor::quantize(&x, &QuantConfig::default())?;
    let bytes = q.to_safetensors(CodeStorage::I8)?;
    for len in [0, 7, 40, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..len])?;
        assert!(message().contains("q.safetensors: "), "{len}: {}", message());
    }
    candle_core::safetensors::save(&[("values", x)].into(), &path)?;
    assert!(message().contains("metadata"), "{}", message());
    let nowhere = folder.path().join("no/such/folder/q.safetensors");
    assert!(matches!(q.save(&nowhere, CodeStorage::I8), Err(Error::Io { .. })));
    Ok(())
}

#[test]
fn parts_that_do_not_fit_are_refused() -> TestResult {
    let p = QuantParams::symmetric(1.0)?;
    let parts = |values: Vec<i8>, groups: usize| {
        QuantizedTensor::from_parts(values, vec![2, 2], Granularity::PerToken, vec![p; groups])
            .map_err(|e| e.to_string())
    };
    assert!(parts(vec![1; 4], 2).is_ok());
    assert!(parts(vec![1; 3], 2).unwrap_err().contains("4 elements of [2, 2]"));
    assert!(parts(vec![1; 4], 3).unwrap_err().contains("3 static parameters for 2 groups"));
    assert!(parts(vec![-128; 4], 2).unwrap_err().contains("code -128"));
    Ok(())
}
