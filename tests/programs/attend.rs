//! The example `attend`: ONNX's own cases of its Attention operator, and everything that can be
//! wrong with dumped tensors.

use super::start::{self, assert_narrow};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A tensor to be dumped, or one that was read.
#[derive(Clone)]
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Stored {
    fn f32(shape: &[usize], values: impl IntoIterator<Item = f32>) -> Self {
        let bytes = values.into_iter().flat_map(f32::to_le_bytes).collect();
        Self { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
    }

    fn bytes(dtype: Dtype, shape: &[usize], bytes: &[u8]) -> Self {
        Self { dtype, shape: shape.to_vec(), bytes: bytes.to_vec() }
    }

    fn lens(lens: &[i64]) -> Self {
        let bytes: Vec<u8> = lens.iter().copied().flat_map(i64::to_le_bytes).collect();
        Self::bytes(Dtype::I64, &[lens.len()], &bytes)
    }

    /// Smooth numbers that differ everywhere, and from one `seed` to another.
    fn waves(shape: &[usize], seed: f32) -> Self {
        let len: usize = shape.iter().product();
        Self::f32(shape, (0..len).map(|i| (i as f32 * 0.7 + seed).sin()))
    }

    /// The same with one value replaced.
    fn with(mut self, index: usize, value: f32) -> Self {
        self.bytes[4 * index..4 * index + 4].copy_from_slice(&value.to_le_bytes());
        self
    }

    fn values(&self) -> Vec<f32> {
        let pairs = self.bytes.as_chunks::<2>().0.iter();
        match self.dtype {
            Dtype::F16 => pairs.map(|&b| half::f16::from_le_bytes(b).to_f32()).collect(),
            Dtype::BF16 => pairs.map(|&b| half::bf16::from_le_bytes(b).to_f32()).collect(),
            Dtype::F32 => self.bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            other => panic!("{other:?} is not expected here"),
        }
    }
}

type Tensors = BTreeMap<String, Stored>;

fn view(x: &Stored) -> TensorView<'_> {
    TensorView::new(x.dtype, x.shape.clone(), &x.bytes).unwrap()
}

fn serialize(tensors: &Tensors) -> Vec<u8> {
    safetensors::serialize(tensors.iter().map(|(name, x)| (name, view(x))), None).unwrap()
}

fn deserialize(bytes: &[u8]) -> Tensors {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let stored = |x: TensorView<'_>| Stored::bytes(x.dtype(), x.shape(), x.data());
    file.tensors().into_iter().map(|(name, view)| (name, stored(view))).collect()
}

/// A folder with a dump in it, which goes away with it.
struct Dump(tempfile::TempDir);

impl Dump {
    fn new(bytes: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("in.safetensors"), bytes).unwrap();
        Self(folder)
    }

    fn of(tensors: &Tensors) -> Self {
        Self::new(&serialize(tensors))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn command(&self) -> Command {
        let mut command = start::command("attend");
        command.arg("--input").arg(self.path("in.safetensors"));
        command
    }

    fn run(&self, flags: &[&str]) -> Output {
        self.command().args(flags).output().unwrap()
    }

    /// The report as JSON, and the tensors that were written.
    fn attend(&self, flags: &[&str]) -> (Value, Tensors) {
        let out = self.path("out.safetensors");
        let all = [&["--json", "--output", out.to_str().unwrap()], flags].concat();
        let output = self.run(&all);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{flags:?}: {stderr}");
        let written = deserialize(&std::fs::read(out).unwrap());
        (serde_json::from_slice(&output.stdout).unwrap(), written)
    }

    /// Fails with status 1 and a message that contains `expected`, and writes nothing.
    fn fail(&self, flags: &[&str], expected: &str) {
        let before = self.files();
        let out = self.path("out.safetensors");
        let output = self.run(&[&["--output", out.to_str().unwrap()], flags].concat());
        start::expect_failure(&output, &[expected]);
        assert_eq!(self.files(), before, "{expected}");
    }
}

fn largest_difference(a: &Stored, b: &Stored) -> f32 {
    assert_eq!(a.shape, b.shape);
    let pairs = a.values().into_iter().zip(b.values());
    pairs
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |max, x| if x > max || x.is_nan() { x } else { max })
}

/// Two sequences, four query heads on two key heads.
fn qkv() -> Tensors {
    let tensors = [
        ("q", Stored::waves(&[2, 4, 3, 8], 0.0)),
        ("k", Stored::waves(&[2, 2, 5, 8], 1.0)),
        ("v", Stored::waves(&[2, 2, 5, 6], 2.0)),
    ];
    tensors.into_iter().map(|(name, x)| (name.to_string(), x)).collect()
}

fn with(name: &str, tensor: Stored) -> Tensors {
    let mut tensors = qkv();
    tensors.insert(name.to_string(), tensor);
    tensors
}

/// Error of the f32 computation itself, and of the expected values where ONNX rounds them to f16
/// or bf16 (whose results are below 2).
fn tolerance(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F16 => 2f32.powi(-10),
        Dtype::BF16 => 2f32.powi(-7),
        _ => 1e-6,
    }
}

/// Inputs and outputs of ONNX 1.23.2's test cases for its Attention operator (made by running
/// `onnx/backend/test/case/node/attention.py`; Apache-2.0, ONNX Project Contributors), keys
/// `<case>.<tensor>`; the flags of each case are in the metadata.
#[test]
fn onnx_cases_have_onnx_results() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/onnx_attention.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let flags = header.metadata().clone().unwrap();
    let mut cases: BTreeMap<String, Tensors> = BTreeMap::new();
    for (key, tensor) in deserialize(&bytes) {
        let (case, name) = key.rsplit_once('.').unwrap();
        cases.entry(case.to_string()).or_default().insert(name.to_string(), tensor);
    }
    assert_eq!(cases.len(), 23);
    for (case, mut tensors) in cases {
        let (out, scores) = (tensors.remove("out").unwrap(), tensors.remove("scores"));
        let dump = Dump::of(&tensors);
        let flags: Vec<&str> = flags[&case].split_whitespace().collect();
        let run =
            |backend| dump.attend(&[&flags[..], &["--save-scores", "--backend", backend]].concat());
        let limit = tolerance(out.dtype);
        let (report, exact) = run("fp32");
        let error = largest_difference(&exact["out"], &out);
        assert!(error <= limit, "{case}: {error}");
        assert_eq!(report["drift"]["max_abs"], 0.0, "{case}");
        let (report, int8) = run("int8");
        let error = largest_difference(&int8["out"], &out);
        // All data are in [0, 1) but the poison, which must not show.
        assert!(error <= 5e-3 + limit, "{case}: {error}");
        let drift = largest_difference(&int8["out"], &exact["out"]);
        assert!((report["drift"]["max_abs"].as_f64().unwrap() - f64::from(drift)).abs() < 1e-9);
        assert!(report["drift"]["cosine"].as_f64().unwrap() > 0.9999, "{case}: {report}");
        if let Some(scores) = scores {
            assert!(largest_difference(&exact["scores"], &scores) <= 1e-6, "{case}");
            assert!(largest_difference(&int8["scores"], &scores) <= 1e-2, "{case}");
        }
    }
}

#[test]
fn all_conditions_hold_at_once() {
    // Of 3 past and 5 new keys, query i of either sequence may see: 1 to 4 by the mask, up to
    // i + 2 by the causal rule, from i + 1 on by the window, below the length.
    let mut tensors = qkv();
    tensors.insert("past_k".into(), Stored::waves(&[2, 2, 3, 8], 3.0));
    tensors.insert("past_v".into(), Stored::waves(&[2, 2, 3, 6], 4.0));
    tensors.insert("mask".into(), Stored::bytes(Dtype::BOOL, &[8], &[0, 1, 1, 1, 1, 0, 0, 0]));
    tensors.insert("kv_lens".into(), Stored::lens(&[8, 3]));
    let flags = ["--causal-offset", "2", "--window-left", "1", "--backend"];
    let seen = |sequence: usize, query: usize| -> Vec<usize> {
        let len = [8, 3][sequence];
        (0..8).filter(|&j| (1..=4).contains(&j) && j <= query + 2 && j > query && j < len).collect()
    };
    let mut mask = vec![0u8; 2 * 3 * 8];
    for (row, keys) in mask.chunks_exact_mut(8).enumerate() {
        seen(row / 3, row % 3).into_iter().for_each(|key| keys[key] = 1);
    }
    let mut plain = tensors.clone();
    plain.remove("kv_lens");
    plain.insert("mask".into(), Stored::bytes(Dtype::U8, &[2, 1, 3, 8], &mask));
    for backend in ["fp32", "int8"] {
        let (_, all) = Dump::of(&tensors).attend(&[&flags[..], &[backend]].concat());
        let (_, one) = Dump::of(&plain).attend(&["--backend", backend]);
        assert!(largest_difference(&all["out"], &one["out"]) < 1e-6, "{backend}");
        // Query 2 of the second sequence sees no key.
        let values = all["out"].values();
        let rows: Vec<_> = values.chunks_exact(6).collect();
        assert_eq!(seen(1, 2), [0usize; 0]);
        for head in 0..4 {
            assert_eq!(rows[(4 + head) * 3 + 2], [0.0; 6], "{backend}");
            assert_ne!(rows[(4 + head) * 3], [0.0; 6], "{backend}");
        }
    }
}

#[test]
fn flags_of_int8_change_the_numbers() {
    let dump = Dump::of(&qkv());
    let rmse = |flags: &[&str]| dump.attend(flags).0["drift"]["rmse"].as_f64().unwrap();
    let all = [
        rmse(&[]),
        rmse(&["--scheme", "symmetric"]),
        rmse(&["--granularity", "block:2"]),
        rmse(&["--no-smooth-k"]),
        rmse(&["--no-smooth-q"]),
    ];
    for (i, a) in all.iter().enumerate() {
        assert!(*a > 0.0 && *a < 0.01, "{all:?}");
        assert!(all[..i].iter().all(|b| a != b), "{all:?}");
    }
    let (report, _) = dump.attend(&["--pv", "f32", "--smooth-k", "--softcap", "0"]);
    assert!(report["config"].as_str().unwrap().ends_with("P·V f32"), "{report}");
    assert_eq!(report["heads"].as_array().unwrap().len(), 8);
}

#[test]
fn every_dtype_is_read() {
    let halves: Vec<u8> =
        qkv()["q"].values().iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
    let doubles: Vec<u8> =
        qkv()["q"].values().iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect();
    let (_, expected) = Dump::of(&qkv()).attend(&["--backend", "fp32"]);
    let run = |q: Stored| Dump::of(&with("q", q)).attend(&["--backend", "fp32"]);
    let (report, out) = run(Stored::bytes(Dtype::F64, &[2, 4, 3, 8], &doubles));
    assert_eq!(largest_difference(&out["out"], &expected["out"]), 0.0);
    assert!(report["notes"][0].as_str().unwrap().contains("q is F64"), "{report}");
    let (_, out) = run(Stored::bytes(Dtype::F16, &[2, 4, 3, 8], &halves));
    let error = largest_difference(&out["out"], &expected["out"]);
    assert!(error > 0.0 && error < 1e-3, "{error}");

    let (_, expected) = Dump::of(&with("kv_lens", Stored::lens(&[5, 3]))).attend(&[]);
    for (dtype, bytes) in [(Dtype::U8, &[5u8, 3][..]), (Dtype::I32, &[5, 0, 0, 0, 3, 0, 0, 0])] {
        let lens = Stored::bytes(dtype, &[2], bytes);
        let (_, out) = Dump::of(&with("kv_lens", lens)).attend(&[]);
        assert_eq!(largest_difference(&out["out"], &expected["out"]), 0.0, "{dtype:?}");
    }
}

#[test]
fn numbers_that_nobody_sees_need_not_be_finite() {
    let clean = with("kv_lens", Stored::lens(&[5, 3]));
    let mut dirty = clean.clone();
    // Key 4 of the second sequence, behind its 3 real ones.
    dirty.insert("k".into(), clean["k"].clone().with((2 * 5 + 4) * 8 + 1, f32::NAN));
    dirty.insert("v".into(), clean["v"].clone().with((2 * 5 + 4) * 6, f32::INFINITY));
    for flags in [&["--backend", "fp32"][..], &["--granularity", "head", "--no-smooth-k"]] {
        let (_, expected) = Dump::of(&clean).attend(flags);
        let (report, out) = Dump::of(&dirty).attend(flags);
        let error = largest_difference(&out["out"], &expected["out"]);
        assert!(error < 5e-3, "{flags:?}: {error}");
        assert!(report["notes"][0].as_str().unwrap().contains("no query sees"), "{report}");
    }
    dirty.insert("kv_lens".into(), Stored::lens(&[5, 5]));
    Dump::of(&dirty).fail(&[], "k holds NaN at [1, 0, 4, 1], which a query sees");
    let hidden = Stored::f32(&[5], [0.0, 0.0, 0.0, 0.0, f32::MIN]);
    dirty.insert("mask".into(), hidden);
    Dump::of(&dirty).attend(&[]);
    // A key of the first head, which the first two query heads read, may be hidden from those two
    // alone.
    let mask = |hiding: std::ops::Range<usize>| {
        let hide = |head, key| if hiding.contains(&head) && key == 4 { f32::MIN } else { 0.0 };
        let values: Vec<f32> = (0..20).map(|i| hide(i / 5, i % 5)).collect();
        Stored::f32(&[1, 4, 1, 5], values)
    };
    let mut dirty = with("k", qkv()["k"].clone().with(4 * 8, f32::NAN));
    for (heads, seen) in [(0..2, false), (0..1, true), (2..4, true)] {
        dirty.insert("mask".into(), mask(heads));
        match seen {
            true => Dump::of(&dirty).fail(&[], "k holds NaN at [0, 0, 4, 0], which a query sees"),
            false => drop(Dump::of(&dirty).attend(&[])),
        }
    }
    Dump::of(&with("q", qkv()["q"].clone().with(9, f32::INFINITY)))
        .fail(&[], "q holds inf at [0, 0, 1, 1]");
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let zeros = |shape: &[usize]| Stored::f32(shape, vec![0.0; shape.iter().product()]);
    let cases: [(&str, Stored, &str); 16] = [
        ("q", zeros(&[4, 3, 8]), "q has shape [4, 3, 8], expected [B, H, M, D]"),
        ("k", zeros(&[2, 2, 5, 7]), "k has shape [2, 2, 5, 7], expected [2, H_kv, N, 8]"),
        ("k", zeros(&[2, 3, 5, 8]), "k has 3 heads, expected a number that divides the 4 heads"),
        ("v", zeros(&[2, 2, 4, 6]), "v has shape [2, 2, 4, 6], expected [2, 2, 5, Dv]"),
        ("q", Stored::bytes(Dtype::I8, &[2, 4, 3, 8], &[0; 192]), "q has dtype I8"),
        ("past_k", zeros(&[2, 2, 3, 8]), "past_k and past_v belong together"),
        ("mask", zeros(&[4, 5]), "mask has shape [4, 5], expected to broadcast"),
        ("mask", zeros(&[2, 5]), "needs shape [2, 1, 1, 5]"),
        ("mask", zeros(&[1, 1, 1, 3, 5]), "at most 4 dimensions"),
        ("mask", zeros(&[5]).with(3, f32::NAN), "mask holds NaN at element 3"),
        ("mask", zeros(&[5]).with(0, f32::INFINITY), "mask holds inf at element 0"),
        ("mask", Stored::bytes(Dtype::I64, &[1], &[0; 8]), "mask has dtype I64"),
        ("kv_lens", Stored::lens(&[1]), "kv_lens holds 1 lengths for a batch of 2"),
        ("kv_lens", Stored::lens(&[5, 6]), "kv_lens holds 6, but there are 5 keys"),
        ("kv_lens", Stored::lens(&[5, -1]), "kv_lens holds -1"),
        ("kv_lens", zeros(&[2]), "kv_lens has dtype F32"),
    ];
    for (name, tensor, expected) in cases {
        Dump::of(&with(name, tensor)).fail(&[], expected);
    }
    let mut past = with("past_k", zeros(&[2, 2, 3, 8]));
    past.insert("past_v".into(), zeros(&[2, 2, 2, 6]));
    Dump::of(&past).fail(&[], "past_k has 3 keys, but past_v has 2 values");
    past.insert("past_v".into(), zeros(&[2, 2, 3, 5]));
    Dump::of(&past).fail(&[], "past_v has shape [2, 2, 3, 5], expected [2, 2, P, 6]");
}

#[test]
fn files_and_flags_that_cannot_be_used_are_named() {
    let mut missing = qkv();
    missing.remove("v");
    Dump::of(&missing).fail(&[], "no tensor named \"v\"; it holds [\"k\", \"q\"]");
    let whole = serialize(&qkv());
    for len in [0, 4, 40, whole.len() - 1] {
        Dump::new(&whole[..len]).fail(&[], "is not a whole safetensors file");
    }
    let dump = Dump::new(&whole);
    dump.fail(&["--softcap", "-1"], "softcap -1");
    dump.fail(&["--scale", "nan"], "scale NaN");
    let int8 = ["--backend", "fp32", "--granularity", "head", "--no-smooth-k", "--pv", "f32"];
    dump.fail(&int8, "--granularity, --no-smooth-k, --pv: for int8 attention only");
    std::fs::remove_file(dump.path("in.safetensors")).unwrap();
    dump.fail(&[], "in.safetensors");
}

#[test]
fn the_output_is_complete_or_not_there() {
    let dump = Dump::of(&qkv());
    let refuse = |path: &Path, expected: &str| {
        let output = dump.run(&["--output", path.to_str().unwrap()]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("cannot write") && stderr.contains(expected), "{stderr}");
        assert!(stderr.matches("os error").count() <= 1, "a cause is told twice: {stderr}");
    };
    refuse(&dump.path("no/such/folder/out"), "no/such/folder");
    refuse(dump.0.path(), "it is a folder");
    refuse(&dump.path("in.safetensors"), "it is the input");
    refuse(&dump.path("new/"), "name of a file");
    refuse(&dump.path("new/."), "name of a file");
    #[cfg(unix)]
    {
        refuse(Path::new("/dev/null"), "a regular file");
        std::os::unix::fs::symlink("nothing", dump.path("link")).unwrap();
        refuse(&dump.path("link"), "a link to what does not exist");
        std::fs::remove_file(dump.path("link")).unwrap();
    }
    assert_eq!(dump.files(), ["in.safetensors"]);

    // An earlier result is replaced by a whole new one, and survives a run that fails.
    dump.attend(&[]);
    let (_, written) = dump.attend(&["--save-scores"]);
    assert_eq!(written["out"].shape, [2, 4, 3, 6]);
    assert_eq!(written["scores"].shape, [2, 4, 3, 5]);
    assert_eq!(dump.files(), ["in.safetensors", "out.safetensors"]);
    let first = std::fs::read(dump.path("out.safetensors")).unwrap();
    std::fs::write(dump.path("in.safetensors"), b"nothing").unwrap();
    dump.fail(&[], "is not a whole safetensors file");
    assert_eq!(std::fs::read(dump.path("out.safetensors")).unwrap(), first);
}

/// In JSON a name that is not UTF-8 is written with replacement characters.
#[cfg(target_os = "linux")]
#[test]
fn names_that_are_not_utf8_are_reported() {
    use std::os::unix::ffi::OsStringExt;
    let dump = Dump::of(&qkv());
    let out = dump.0.path().join(std::ffi::OsString::from_vec(b"out-\xff".to_vec()));
    let output = dump.command().arg("--json").arg("--output").arg(&out).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["output"].as_str().unwrap().ends_with("out-\u{fffd}"), "{report}");
    assert!(out.exists());
}

#[test]
fn empty_tensors_have_an_empty_or_zero_output() {
    for (m, n) in [(0, 5), (3, 0), (0, 0)] {
        let mut tensors = qkv();
        tensors.insert("q".into(), Stored::waves(&[2, 4, m, 8], 0.0));
        tensors.insert("k".into(), Stored::waves(&[2, 2, n, 8], 0.0));
        tensors.insert("v".into(), Stored::waves(&[2, 2, n, 6], 0.0));
        for backend in ["fp32", "int8"] {
            let flags = ["--save-scores", "--causal", "--backend", backend];
            let (_, written) = Dump::of(&tensors).attend(&flags);
            assert_eq!(written["out"].values(), vec![0.0; 2 * 4 * m * 6], "{m} {n} {backend}");
            assert_eq!(written["scores"].shape, [2, 4, m, n]);
        }
    }
}

#[test]
fn the_report_says_what_was_done_and_is_narrow() {
    let mut tensors = with("bias", Stored::waves(&[3], 0.0));
    tensors.insert("past_k".into(), Stored::waves(&[2, 2, 3, 8], 3.0));
    tensors.insert("past_v".into(), Stored::waves(&[2, 2, 3, 6], 4.0));
    let run = |tensors: &Tensors, flags: &[&str]| {
        let report = String::from_utf8(Dump::of(tensors).run(flags).stdout).unwrap();
        assert_narrow(&report);
        report
    };
    let report = run(&tensors, &["--causal"]);
    for expected in ["not used: bias", "--causal-offset 3", "k [2, 2, 8, 8] (3 past)", "sequence 1"]
    {
        assert!(report.contains(expected), "no {expected:?} in {report}");
    }

    // Everything that can stand in a line.
    tensors.insert("mask".into(), Stored::bytes(Dtype::BOOL, &[2, 4, 3, 8], &[1; 2 * 4 * 3 * 8]));
    tensors.insert("kv_lens".into(), Stored::lens(&[8, 8]));
    tensors.insert("k".into(), Stored::waves(&[2, 2, 5, 8], 1.0).with(0, f32::NAN));
    tensors.insert("past_k".into(), Stored::waves(&[2, 2, 3, 8], 3.0).with(0, f32::NAN));
    let flags =
        ["--causal-offset", "end", "--window-left", "0", "--pv", "int8", "--scheme", "affine"];
    let window = [
        "--window-right",
        "1000000000",
        "--scale",
        "0.12345678",
        "--granularity",
        "block:1000000000",
    ];
    let report = run(&tensors, &[&flags[..], &window].concat());
    for expected in ["sequence lengths", "k: 2 rows with NaN or infinity counted as 0"] {
        assert!(report.contains(expected), "no {expected:?} in {report}");
    }
}
