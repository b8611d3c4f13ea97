//! Bit-exact against outputs of ONNX Runtime and gemmlowp (`tests/quantization.safetensors`).

use candle_core::{Device, Tensor};
use candle_int8_attention::attention::attention_scores_int8;
use candle_int8_attention::product::{Lhs, ZeroPoints, matmul_nt};
use candle_int8_attention::quant::{
    Granularity, QuantConfig, QuantParams, QuantizedTensor, RangeSource, Requantizer, Scheme,
};
use candle_int8_attention::{RequantConfig, RequantMode, ScoreConfig};
use safetensors::SafeTensors;
use std::collections::{BTreeMap, BTreeSet};

/// The file's groups: `<op>.<case>` to its tensors.
struct Golden(Vec<u8>);

impl Golden {
    fn open() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/quantization.safetensors");
        Self(std::fs::read(path).expect(path))
    }

    /// Runs `check` on every case of `op`; returns how many there were.
    fn each(&self, op: &str, check: impl Fn(&str, &Case<'_>)) -> usize {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let mut cases: BTreeMap<String, BTreeMap<String, _>> = BTreeMap::new();
        for (key, view) in file.tensors() {
            let (case, name) = key.rsplit_once('.').unwrap();
            if case.split('.').next() == Some(op) {
                cases.entry(case.to_string()).or_default().insert(name.to_string(), view);
            }
        }
        for (name, tensors) in &cases {
            check(name, &Case(tensors));
        }
        cases.len()
    }
}

struct Case<'a>(&'a BTreeMap<String, safetensors::tensor::TensorView<'a>>);

impl Case<'_> {
    fn bytes(&self, name: &str) -> &[u8] {
        self.0[name].data()
    }
    fn shape(&self, name: &str) -> &[usize] {
        self.0[name].shape()
    }
    fn is_u8(&self, name: &str) -> bool {
        self.0[name].dtype() == safetensors::Dtype::U8
    }
    fn i8(&self, name: &str) -> Vec<i8> {
        self.bytes(name).iter().map(|&b| b as i8).collect()
    }
    /// Codes as signed ones: unsigned codes less 128.
    fn codes(&self, name: &str) -> Vec<i8> {
        let flip = if self.is_u8(name) { 0x80 } else { 0 };
        self.bytes(name).iter().map(|&b| (b ^ flip) as i8).collect()
    }
    fn i32(&self, name: &str) -> Vec<i32> {
        self.bytes(name).as_chunks().0.iter().map(|&b| i32::from_le_bytes(b)).collect()
    }
    fn f32(&self, name: &str) -> Vec<f32> {
        self.bytes(name).as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
    }
    /// A zero point, whatever its type, in the numbering of its own type.
    fn zero(&self, name: &str) -> i32 {
        match self.bytes(name) {
            [b] if self.is_u8(name) => i32::from(*b),
            [b] => i32::from(*b as i8),
            _ => self.i32(name)[0],
        }
    }
}

#[test]
fn golden_file_has_no_group_that_is_not_tested() {
    let golden = Golden::open();
    let file = SafeTensors::deserialize(&golden.0).unwrap();
    let ops: BTreeSet<&str> = file.names().iter().map(|k| k.split('.').next().unwrap()).collect();
    let tested = BTreeSet::from([
        "dynamic_quantize",
        "gemmlowp",
        "matmul_integer",
        "qlinear_matmul",
        "quantize",
    ]);
    assert_eq!(ops, tested);
}

#[test]
fn golden_dynamic_quantize() {
    let cases = Golden::open().each("dynamic_quantize", |name, case| {
        let x = case.f32("x");
        let config = QuantConfig {
            scheme: Scheme::Affine,
            granularity: Granularity::PerTensor,
            ..QuantConfig::default()
        };
        let q = QuantizedTensor::quantize_slice(&x, &[1, x.len()], &config).unwrap();
        let params = q.params(0).unwrap();
        assert_eq!(params.scale().to_bits(), case.f32("scale")[0].to_bits(), "{name}");
        assert_eq!(i32::from(params.zero_point()) + 128, case.zero("zero_point"), "{name}");
        assert_eq!(q.values(), case.codes("y"), "{name}");
    });
    assert_eq!(cases, 7);
}

#[test]
fn golden_quantize_with_given_parameters() {
    let cases = Golden::open().each("quantize", |name, case| {
        let shift = if case.is_u8("zero_point") { 128 } else { 0 };
        let params =
            QuantParams::affine(case.f32("scale")[0], case.zero("zero_point") - shift).unwrap();
        let codes: Vec<i8> = case.f32("x").iter().map(|&x| params.quantize(x)).collect();
        assert_eq!(codes, case.codes("y"), "{name}");
    });
    assert_eq!(cases, 4);
}

#[test]
fn golden_matmul_integer() {
    let cases = Golden::open().each("matmul_integer", |name, case| {
        let (m, n, d) = (case.shape("a")[0], case.shape("b")[0], case.shape("a")[1]);
        let out = matmul_nt(
            Lhs::U8(case.bytes("a")),
            ZeroPoints::Uniform(case.zero("a_zero_point")),
            &case.i8("b"),
            ZeroPoints::Uniform(case.zero("b_zero_point")),
            (m, n, d),
        );
        assert_eq!(out.unwrap(), case.i32("y"), "{name}");
    });
    assert_eq!(cases, 4);
}

#[test]
fn golden_qlinear_matmul() {
    let cases = Golden::open().each("qlinear_matmul", |name, case| {
        let (m, n, d) = (case.shape("a")[0], case.shape("b")[0], case.shape("a")[1]);
        let acc = matmul_nt(
            Lhs::I8(&case.i8("a")),
            ZeroPoints::Uniform(case.zero("a_zero_point")),
            &case.i8("b"),
            ZeroPoints::Uniform(case.zero("b_zero_point")),
            (m, n, d),
        )
        .unwrap();
        assert_eq!(acc, case.i32("acc"), "{name}");
        let output =
            QuantParams::affine(case.f32("y_scale")[0], case.zero("y_zero_point")).unwrap();
        let requantizer =
            Requantizer::fp32(case.f32("a_scale")[0], case.f32("b_scale")[0], output).unwrap();
        assert_eq!(requantizer.requantize_all(&acc), case.i8("y"), "{name}");
    });
    assert_eq!(cases, 2);
}

#[test]
fn golden_gemmlowp_fixed_point() {
    let cases = Golden::open().each("gemmlowp", |name, case| {
        let output = QuantParams::affine(1.0, case.zero("zero_point")).unwrap();
        let requantizer = Requantizer::fixed_point(case.f32("scale")[0], 1.0, output).unwrap();
        let multiplier = requantizer.multiplier().unwrap();
        assert_eq!(multiplier.mantissa(), case.i32("multiplier")[0], "{name}");
        assert_eq!(multiplier.right_shift(), case.i32("right_shift")[0], "{name}");
        assert_eq!(requantizer.requantize_all(&case.i32("acc")), case.i8("y"), "{name}");
    });
    assert_eq!(cases, 7);
}

/// The op on tensors whose codes are those of a case, in its own layout `[1, 1, S, D]`.
fn codes_of_scores(
    (q, q_params): (Vec<f32>, QuantParams),
    (k, k_params): (Vec<f32>, QuantParams),
    depth: usize,
    (output, mode): (QuantParams, RequantMode),
) -> Vec<i8> {
    let tensor = |x: Vec<f32>| Tensor::from_vec(x, (1, 1, (), depth), &Device::Cpu).unwrap();
    let per_tensor = |params: QuantParams| QuantConfig {
        scheme: params.scheme(),
        granularity: Granularity::PerTensor,
        range: RangeSource::Static(vec![params]),
    };
    let config = ScoreConfig {
        q: per_tensor(q_params),
        k: per_tensor(k_params),
        ..ScoreConfig::plain(Scheme::Symmetric, Granularity::PerTensor)
    };
    let QuantConfig { scheme, granularity, range } = per_tensor(output);
    let to = RequantConfig { scheme, granularity, range, mode };
    attention_scores_int8(&tensor(q), &tensor(k), &config, &to).unwrap().values().to_vec()
}

#[test]
fn golden_qlinear_matmul_by_the_op_end_to_end() {
    let cases = Golden::open().each("qlinear_matmul", |name, case| {
        let side = |name: &str| {
            let params = QuantParams::affine(
                case.f32(&format!("{name}_scale"))[0],
                case.zero(&format!("{name}_zero_point")),
            );
            let params = params.unwrap();
            (case.i8(name).iter().map(|&code| params.dequantize(code)).collect(), params)
        };
        let output =
            QuantParams::affine(case.f32("y_scale")[0], case.zero("y_zero_point")).unwrap();
        let depth = case.shape("a")[1];
        let codes = codes_of_scores(side("a"), side("b"), depth, (output, RequantMode::Fp32));
        assert_eq!(codes, case.i8("y"), "{name}");
    });
    assert_eq!(cases, 2);
}

/// One query of 512 times 127 and a 1, and for each sum a key that gives it with that query.
#[test]
fn golden_gemmlowp_by_the_op_end_to_end() {
    const LARGEST: i32 = 512 * 127 * 127;
    let cases = Golden::open().each("gemmlowp", |name, case| {
        let scale = case.f32("scale")[0];
        let (all, codes) = (case.i32("acc"), case.i8("y"));
        let reached: Vec<(i32, i8)> = all
            .into_iter()
            .zip(codes)
            .filter(|(acc, _)| acc.unsigned_abs() <= LARGEST as u32)
            .collect();
        assert!(reached.len() > 3400, "{name}: {} sums", reached.len());
        let query = [[127.0f32; 512].as_slice(), &[1.0]].concat();
        let key = |acc: i32| {
            let rest = (acc + 63 * acc.signum()) / 127;
            let mut left = rest;
            let mut key: Vec<f32> = (0..512)
                .map(|_| {
                    let code = left.clamp(-127, 127);
                    left -= code;
                    code as f32
                })
                .collect();
            key.push((acc - 127 * rest) as f32);
            key
        };
        let keys = reached.iter().flat_map(|(acc, _)| key(*acc)).collect();
        let q_params = QuantParams::symmetric(scale).unwrap();
        let query = query.into_iter().map(|code| code * scale).collect();
        let output = QuantParams::affine(1.0, case.zero("zero_point")).unwrap();
        let found = codes_of_scores(
            (query, q_params),
            (keys, QuantParams::symmetric(1.0).unwrap()),
            513,
            (output, RequantMode::FixedPoint),
        );
        let expected: Vec<i8> = reached.iter().map(|(_, code)| *code).collect();
        assert_eq!(found, expected, "{name}");
    });
    assert_eq!(cases, 7);
}
