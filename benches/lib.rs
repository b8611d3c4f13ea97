//! What several benches need, and tests against other implementations beside them.

pub mod machine;
pub mod options;
pub mod serve;
pub mod turns;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The folder of the whole project.
pub fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Makes paths on the command line relative to the project's folder, in which one types it: cargo
/// starts a bench in the folder of its package.
pub fn start_in_project() -> std::io::Result<()> {
    if std::env::current_dir()? == Path::new(env!("CARGO_MANIFEST_DIR")) {
        std::env::set_current_dir(project())?;
    }
    Ok(())
}

/// The end of a bench: an error in one line, without a backtrace.
pub fn end(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
