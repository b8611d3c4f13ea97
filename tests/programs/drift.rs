//! The example `drift`, run as a user and as a CI job run it.

use super::start::{self, assert_narrow};
use crate::common::json::assert_same;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Output;

const NAME: &str = "drift";

fn drift(args: &[&str]) -> Output {
    start::run(NAME, args)
}

fn succeed(args: &[&str]) -> String {
    start::succeed(NAME, args)
}

fn json(args: &[&str]) -> Value {
    start::json(NAME, args)
}

fn fail(args: &[&str], expected: &str) {
    start::fail(NAME, args, expected);
}

/// A folder for files, which goes away with the test.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_string()
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        std::fs::write(self.0.path().join(name), content).unwrap();
        self.path(name)
    }

    fn names(&self) -> Vec<PathBuf> {
        std::fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
    }
}

/// Passages that are short enough for a build without optimization.
const SHORT: [&str; 2] = ["--passage-tokens", "48"];

/// Results without what differs from run to run, and without what only `merge` reads.
fn figures(mut report: Value) -> Value {
    for config in report["configs"].as_array_mut().unwrap() {
        config.as_object_mut().unwrap().remove("timing");
    }
    report.as_object_mut().unwrap().remove("state");
    report
}

/// The configuration that the flags describe; others may be more accurate, and come before it.
fn main_config(report: &Value) -> &Value {
    let configs = report["configs"].as_array().unwrap();
    configs.iter().find(|config| config["main"] == true).unwrap()
}

#[test]
fn the_report_is_complete_and_narrow() {
    let report = json(&[]);
    assert_eq!(report["passages"], 1);
    let main = main_config(&report);
    assert_eq!(main["layers"].as_array().unwrap().len(), 3);
    for layer in main["layers"].as_array().unwrap() {
        let heads = layer["heads"].as_array().unwrap();
        assert_eq!(heads.len(), 12);
        for head in heads {
            for stage in ["q", "k", "scores", "output"] {
                assert!(head["alone"][stage]["sqnr_db"]["mean"].as_f64().unwrap() > 30.0, "{head}");
            }
            assert!(head["accumulated"]["probabilities"]["kl"]["mean"].as_f64().unwrap() < 1e-3);
        }
    }
    assert!(main["output"]["worst_head"]["value"].as_f64().unwrap() > 35.0, "{main}");
    assert_eq!(report["words"].as_array().unwrap().len(), 10);
    let text = succeed(&[]);
    assert_narrow(&text);
    for part in ["## Layers", "worst head is head", "## Where attention moved most"] {
        assert!(text.contains(part), "no {part:?}");
    }
}

#[test]
fn parts_that_are_merged_give_the_figures_of_one_run() {
    let folder = Folder::new();
    let text = folder.file("text.txt", include_str!("../../examples/data/pride-and-prejudice.txt"));
    let base = [&["--file", &text, "--compare", "token", "--json"][..], &SHORT].concat();
    let mut parts = Vec::new();
    for shard in ["3/3", "1/3", "2/3"] {
        let part = succeed(&[&base[..], &["--shard", shard]].concat());
        parts.push(folder.file(&format!("part-{}.json", parts.len()), part));
    }
    let whole: Value = serde_json::from_str(&succeed(&base)).unwrap();
    assert!(whole["passages"].as_u64().unwrap() > 8);
    let all = ["merge", &parts[0], &parts[1], &parts[2], "--json"];
    let merged = succeed(&all);
    assert_same(&figures(serde_json::from_str(&merged).unwrap()), &figures(whole.clone()));

    // In a tree, with a part missing on the way, and in another order.
    let two = succeed(&["merge", &parts[2], &parts[1], "--json"]);
    let two = folder.file("two.json", two);
    assert!(succeed(&["merge", &two]).contains("only part 1, 2 of 3"));
    let merged = json(&["merge", &two, &parts[0]]);
    assert_same(&figures(merged), &figures(whole));

    fail(&["merge", &two, &parts[1]], "is there twice");
    let other = folder.file("other.json", succeed(&[&base[..3], &["--json"], &SHORT].concat()));
    fail(&["merge", &two, &other], "different configurations");
}

#[test]
fn results_of_different_models_and_damaged_results_are_not_merged() {
    let folder = Folder::new();
    let own = succeed(&[&["--json"][..], &SHORT].concat());
    // Another model's checksum; a whole second model would be needed otherwise.
    let report: Value = serde_json::from_str(&own).unwrap();
    let other = own.replace(report["fingerprint"].as_str().unwrap(), "00000000-1");
    let (own, other) = (folder.file("own.json", &own), folder.file("other.json", other));
    fail(&["merge", &own, &other], "different models");
    let half = std::fs::read(&own).unwrap();
    let half = folder.file("half.json", &half[..half.len() / 2]);
    fail(&["merge", &half], "half.json");
    let empty = folder.file("empty.json", "");
    fail(&["merge", &own, &empty], "is empty");
    let foreign = folder.file("foreign.json", "{\"a\": 1}");
    fail(&["merge", &foreign], "no result of drift --json");
    fail(&["merge", "no/such/file.json"], "no/such/file.json");
    fail(&["merge"], "FILE");
}

#[test]
fn a_gate_exits_with_2_and_names_the_place() {
    let folder = Folder::new();
    let holds = folder.file("holds.toml", "min_head_sqnr_db = 20\nmax_head_kl = 0.1\n");
    let text = succeed(&[&["--gate", &holds][..], &SHORT].concat());
    assert!(text.contains("every threshold holds"), "{text}");
    let text = succeed(&[&["--min-head-sqnr-db", "-3"][..], &SHORT].concat());
    assert!(text.contains("every threshold holds"), "{text}");

    let report = json(&SHORT);
    let worst = &main_config(&report)["output"]["worst_head"];
    let limit = format!("{}", worst["value"].as_f64().unwrap() + 0.001);
    let output = drift(&[&["--gate", &holds, "--min-head-sqnr-db", &limit][..], &SHORT].concat());
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8(output.stderr).unwrap();
    let place = format!("layer {} head {}: min_head_sqnr_db", worst["layer"], worst["head"]);
    assert!(stderr.contains(&place), "no {place:?} in {stderr:?}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(!output.stdout.is_empty(), "the report is printed all the same");

    for (content, expected) in [
        ("min_head_sqnr = 3", "unknown field `min_head_sqnr`"),
        ("", "without a threshold"),
        ("min_head_sqnr_db = \"x\"", "expected"),
    ] {
        fail(&["--gate", &folder.file("bad.toml", content)], expected);
    }
    fail(&["--gate", "no/such/gate.toml"], "no/such/gate.toml");
    fail(&["--max-head-kl", "nan"], "finite");
}

#[test]
fn configurations_are_ranked() {
    let args = [&["--compare", "tensor,token", "sage"][..], &SHORT].concat();
    let report = json(&args);
    let configs = report["configs"].as_array().unwrap();
    let names: Vec<&str> = configs.iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["bf16", "default", "token", "SageAttention's recipe", "tensor"]);
    let main: Vec<bool> = configs.iter().map(|c| c["main"].as_bool().unwrap()).collect();
    assert_eq!(main, [false, true, false, false, false]);
    fail(&["--compare", "token+smoth-k"], "smoth-k");
    fail(&["--compare", "token+head"], "\"token\" and \"head\"");
    let twice = ["--compare", "token,sage,f32+token", "sage", "default", "bf16"];
    let twice = json(&[&twice[..], &SHORT].concat());
    assert_eq!(twice["configs"].as_array().unwrap().len(), 4, "each configuration runs once");
}

/// Product by product in every form of the report, the same in parts, and held by a gate.
#[test]
fn linear_layers_are_measured_merged_and_held() {
    let folder = Folder::new();
    let (page, gate) =
        (folder.path("report.html"), folder.file("gate.toml", "min_linear_sqnr_db = 20"));
    let chapter = include_str!("../../examples/data/pride-and-prejudice.txt");
    let text = folder.file("text.txt", &chapter[..400]);
    let plain = [&["--file", &text][..], &SHORT].concat();
    let base = [&plain[..], &["--linear", "int8"]].concat();
    let report = json(&base);
    assert_eq!(report["linear"]["precision"], "int8");
    let products = report["linear"]["products"].as_array().unwrap();
    assert_eq!(products.len(), 12);
    for product in products {
        let db = product["alone"]["sqnr_db"].as_f64().unwrap();
        assert!((25.0..70.0).contains(&db), "{product}");
    }
    assert_eq!((&products[5]["layer"], &products[5]["product"]), (&1.into(), &"output".into()));
    let text = succeed(&[&base[..], &["--html", &page, "--gate", &gate]].concat());
    assert_narrow(&text);
    assert!(text.contains("## Linear layers in int8") && text.contains("every threshold holds"));
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(html.contains("<h2>Linear layers in int8</h2>"), "{html}");

    let parts = ["1/2", "2/2"].map(|shard| {
        let part = succeed(&[&base[..], &["--shard", shard, "--json"]].concat());
        folder.file(&format!("part-{}.json", &shard[..1]), part)
    });
    assert_same(&figures(json(&["merge", &parts[1], &parts[0]])), &figures(report));
    let without =
        folder.file("without.json", succeed(&[&plain[..], &["--shard", "2/2", "--json"]].concat()));
    fail(&["merge", &parts[0], &without], "only one of the results has measured linear layers");
    let damaged = std::fs::read_to_string(&parts[0]).unwrap();
    let damaged = damaged.replacen("\"product\":\"output\"", "\"product\":\"qkv\"", 1);
    fail(&["merge", &folder.file("damaged.json", damaged)], "a linear layer \"qkv\" in layer 0");

    let high = ["--min-linear-sqnr-db", "99", "--min-linear-embedding-cosine", "1"];
    let output = drift(&[&["merge", &parts[0], &parts[1]][..], &high].concat());
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("layer 2 down: min_linear_sqnr_db is 99"), "{stderr}");
    assert_eq!(stderr.lines().count(), 13, "{stderr}");
    let output = drift(&[&["merge", &without][..], &high].concat());
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("no linear layer was measured"));

    fail(&["--min-linear-sqnr-db", "20"], "measured with --linear int8");
    fail(&["--linear", "int8", "--precision", "int16"], "expected one of the two");
    fail(&["--linear", "f32"], "compared with f32");
    fail(&["--linear", "int4"], "expected f32, int16 or int8");
}

/// bf16 has every figure but a speed, because it is computed in f32.
#[test]
fn bf16_is_beside_every_configuration() {
    let report = json(&SHORT);
    let configs = report["configs"].as_array().unwrap();
    assert_eq!(configs.len(), 2);
    let bf16 = configs.iter().find(|config| config["name"] == "bf16").unwrap();
    assert_eq!((&bf16["main"], &bf16["timing"]), (&Value::Bool(false), &Value::Null));
    for layer in bf16["layers"].as_array().unwrap() {
        for head in layer["heads"].as_array().unwrap() {
            // A rounding error of 2^-9 at most; its mean square is 53 dB below numbers of one power of two.
            for side in ["q", "k"] {
                let db = head["alone"][side]["sqnr_db"]["mean"].as_f64().unwrap();
                assert!((53.0..60.0).contains(&db), "{side}: {db}");
            }
            assert_eq!((&head["q_clipped"], &head["k_clipped"]), (&0.0.into(), &0.0.into()));
        }
    }
    let text = succeed(&SHORT);
    let row = text.lines().find(|line| line.starts_with("| bf16 ")).unwrap();
    assert!(row.trim_end_matches([' ', '|']).ends_with('-'), "{row}");
}

#[test]
fn the_page_is_whole_and_needs_nothing_from_outside() {
    let folder = Folder::new();
    let text =
        folder.file("text.txt", "<script>alert(1)</script> is what a text may hold & more. ");
    let page = folder.path("report.html");
    succeed(&["--file", &text, "--compare", "token", "--html", &page]);
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(html.trim_end().ends_with("</html>") && html.contains("<svg"), "{html}");
    assert!(html.contains(">bf16</td>"), "what int8 is seen beside");
    for outside in ["http:", "https:", "<script", "src=", "@import", "url("] {
        assert!(!html.contains(outside), "{outside}");
    }
    assert!(html.contains("script&gt;"), "the text is shown, not run");
    assert_eq!(folder.names().len(), 2, "{:?}", folder.names());

    let nowhere = folder.path("no/such/report.html");
    fail(&["--html", &nowhere], "report.html");
    fail(&["--html", folder.0.path().to_str().unwrap()], "it is a folder");
    fail(&["--html", &folder.path("new/")], "name of a file");
    for file in [&["--file", &text][..], &["--pairs", &text], &["--gate", &text], &["merge", &text]]
    {
        // A gate is read before.
        let expected = if file[0] == "--gate" { "text.txt" } else { "it is the input" };
        fail(&[file, &["--html", &text]].concat(), expected);
    }
    #[cfg(unix)]
    {
        fail(&["--html", "/dev/null"], "a regular file");
        // What a link points to is replaced, not the link.
        let link = folder.path("link.html");
        std::os::unix::fs::symlink(&text, &link).unwrap();
        fail(&["--file", &text, "--html", &link], "it is the input");
        std::fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("page.html", &link).unwrap();
        fail(&["--file", &text, "--html", &link], "a link to what does not exist");
        let page = folder.file("page.html", "old");
        succeed(&["--file", &text, "--html", &link]);
        assert!(Path::new(&link).is_symlink());
        assert!(std::fs::read_to_string(&page).unwrap().contains("</html>"));
        std::fs::remove_file(&link).unwrap();
        std::fs::remove_file(&page).unwrap();
    }
    // A run that fails leaves no page behind.
    let page = folder.path("failed.html");
    fail(&["--html", &page, "--file", &folder.file("blank.txt", " \n")], "no word or sign");
    assert!(!Path::new(&page).exists());
    assert_eq!(folder.names().len(), 3, "{:?}", folder.names());
}

#[test]
fn pairs_are_correlated_with_their_scores() {
    let folder = Folder::new();
    let content = "5\tA cat sleeps.\tA cat is sleeping.\r\n\n3\tA dog runs.\tA man runs.\n\
                   0\tIt rains.\tShe sells books.\n";
    let pairs = folder.file("pairs.tsv", content);
    let report = json(&["--pairs", &pairs]);
    let similarity = &report["similarity"][0];
    assert_eq!(similarity["pairs"], 3);
    assert_eq!(similarity["spearman_fp32"], 1.0);
    assert_eq!(similarity["spearman_int8"], 1.0);
    assert!(similarity["max_change"].as_f64().unwrap() < 1e-3);
    assert_eq!(report["passages"], 6);

    let parts = ["1/2", "2/2"].map(|shard| {
        let part = succeed(&["--pairs", &pairs, "--shard", shard, "--json"]);
        // Without its numbers, a pair made merging panic.
        let mut damaged: Value = serde_json::from_str(&part).unwrap();
        for pair in damaged["state"]["pairs"].as_array_mut().unwrap() {
            pair["int8"] = Value::Array(Vec::new());
        }
        if damaged["state"]["pairs"].as_array().is_some_and(|pairs| !pairs.is_empty()) {
            let damaged = folder.file("damaged.json", damaged.to_string());
            fail(&["merge", &damaged], "its state is damaged: a pair without its numbers");
        }
        folder.file(&format!("part-{}.json", &shard[..1]), part)
    });
    let merged = json(&["merge", &parts[1], &parts[0]]);
    assert_same(&figures(merged), &figures(report));

    for (content, expected) in [
        (&b"A cat sleeps.\tA dog sleeps.\n"[..], ":1: 2 columns, so there is no score"),
        (b"1\ta\tb\nhigh\ta\tb\n", ":2: score \"high\""),
        (b"1\ta\t \n", ":1: an empty sentence"),
        (b"1\ta\tb\n2\t\xff\tb\n", ":2: not UTF-8"),
        (b"", "no pairs in it"),
        ("1\t\u{1f980}\t\u{1f980} \u{1f980}\n".as_bytes(), "bad.tsv: the model knows no word"),
    ] {
        fail(&["--pairs", &folder.file("bad.tsv", content)], expected);
    }

    // Words that the model does not know, and more than it reads.
    let long = format!("3\t\u{1f980}\tIt rains.\n4\tIt rains.\t{}\n", "word ".repeat(600));
    let report = succeed(&["--pairs", &folder.file("odd.tsv", long)]);
    for expected in ["the model's limit cuts the end of 1", "in 1 every token is unknown"] {
        assert!(report.contains(expected), "no {expected:?} in {report}");
    }
    assert_narrow(&report);
}

#[test]
fn small_and_long_texts_work_and_bad_ones_are_errors() {
    let folder = Folder::new();
    let one = json(&["--file", &folder.file("one.txt", "word")]);
    assert_eq!((one["passages"].as_u64(), one["tokens"].as_u64()), (Some(1), Some(3)));
    let long = folder.file("long.txt", "a ".repeat(700));
    let report = json(&["--file", &long]);
    assert_eq!(report["passages"], 2);
    let note = report["notes"][0].as_str().unwrap();
    assert!(note.contains("cut into 2 passages of at most 512 tokens, as many as"), "{note}");

    fail(&["--file", &folder.file("empty.txt", "")], "no word or sign in it");
    fail(&["--file", &folder.file("bytes.txt", b"a b\nc \xff\n")], "bytes.txt:2: not UTF-8");
    fail(&["--file", "no/such/file.txt"], "no/such/file.txt");
    fail(&["--file", &folder.file("alien.txt", "\u{1f980}")], "no word");
    fail(&["--model", "no/such/folder"], "no/such/folder");
    fail(&["--passage-tokens", "2"], "passages of 2 tokens");
    fail(&["--passage-tokens", "513"], "3 (two are special) to 512");
    fail(&["--shard", "0/3"], "expected I/N");
    fail(&["--shard", "4/3"], "expected I/N");
    fail(&["--pv", "f16"], "auto, f32, bf16, int16 or int8");
    fail(&["--frobnicate"], "--frobnicate");
    assert!(succeed(&["--help"]).contains("--compare"));
}
