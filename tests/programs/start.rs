//! How the programs are started, here and nowhere else, and what every test of them expects.

use serde_json::Value;
use std::process::{Command, Output, Stdio};

/// The program `name`: `cargo test` builds the examples next to the folder of this test's own
/// executable.
pub fn command(name: &str) -> Command {
    let own = std::env::current_exe().unwrap();
    let profile = own.ancestors().nth(2).unwrap();
    let path = profile.join("examples").join(name).with_extension(std::env::consts::EXE_EXTENSION);
    assert!(path.exists(), "{name} is not built: run `cargo test` or `cargo build --examples`");
    Command::new(path)
}

pub fn run(name: &str, args: &[&str]) -> Output {
    command(name).args(args).output().unwrap()
}

/// What it wrote to stdout and to stderr.
pub fn texts(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// What it prints; the exit status is `status`, and nothing is on stderr: no warning, and no
/// progress bar where nobody looks.
pub fn report(name: &str, args: &[&str], status: i32) -> String {
    let output = run(name, args);
    let (stdout, stderr) = texts(&output);
    assert_eq!(output.status.code(), Some(status), "{name} {args:?}: {stderr}");
    assert!(stderr.is_empty(), "{name} {args:?}: {stderr}");
    stdout
}

pub fn succeed(name: &str, args: &[&str]) -> String {
    report(name, args, 0)
}

/// What it prints with `--json`.
pub fn json(name: &str, args: &[&str]) -> Value {
    serde_json::from_str(&succeed(name, &[args, &["--json"]].concat())).unwrap()
}

/// Fails with a message that contains `expected`.
pub fn fail(name: &str, args: &[&str], expected: &str) {
    expect_failure(&run(name, args), &[expected]);
}

/// It failed with status 1 (2 says that a gate or a budget does not hold) and a message that
/// contains all of `parts`, told each cause once, printed no report and did not panic.
pub fn expect_failure(output: &Output, parts: &[&str]) {
    let (stdout, stderr) = texts(output);
    assert_eq!(output.status.code(), Some(1), "{parts:?}: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "no {part:?} in {stderr:?}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert!(stderr.matches("os error").count() <= 1, "a cause is told twice: {stderr}");
    assert!(stdout.is_empty(), "{parts:?}: it printed a report all the same: {stdout}");
}

/// A reader that closes the pipe before anything is written is no error.
pub fn leave_early(name: &str, args: &[&str]) {
    let mut command = command(name);
    let command = command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let (_, stderr) = texts(&output);
    assert!(output.status.success() && stderr.is_empty(), "{name}: {stderr}");
}

/// No line is folded by a terminal of 100 columns.
pub fn assert_narrow(report: &str) {
    for line in report.lines() {
        assert!(line.chars().count() <= 100, "wider than 100 columns: {line}");
    }
}
