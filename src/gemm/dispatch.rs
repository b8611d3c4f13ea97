//! The one ordered table of kernels, and the choice among them.

use super::kernel::Kernel;
use super::kernels;
use crate::{Error, Result};
use std::sync::OnceLock;

/// Environment variable that forces a kernel by name, read once per process. A name that does not
/// exist or that this machine cannot run is an error of every call, never a silent fallback.
pub const KERNEL_VARIABLE: &str = "CANDLE_INT8_KERNEL";

/// Every kernel compiled for this architecture, best first. Constructor, dispatch, tests and
/// benches all read this table.
pub(crate) static TABLE: &[&dyn Kernel] = &[
    #[cfg(target_arch = "x86_64")]
    &kernels::avx512_vnni::Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    &kernels::avx_vnni::AvxVnni::NEW,
    #[cfg(all(target_arch = "x86_64", test))]
    &kernels::avx_vnni::Vnni256::<kernels::avx_vnni::Evex>::NEW,
    #[cfg(target_arch = "x86_64")]
    &kernels::avx2::Avx2,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    &kernels::neon_i8mm::NeonI8mm,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    &kernels::neon_dotprod::NeonDotprod,
    &kernels::portable::Portable,
];

/// A kernel as it is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelInfo {
    /// Its name, as [`KERNEL_VARIABLE`] takes it.
    pub name: &'static str,
    /// Whether this machine has its instructions.
    pub available: bool,
}

/// All kernels compiled into this build, best first.
pub fn all_kernels() -> Vec<KernelInfo> {
    TABLE.iter().map(|k| KernelInfo { name: k.name(), available: k.is_available() }).collect()
}

/// The name of the kernel in use: the first available one, or the one that [`KERNEL_VARIABLE`]
/// names.
///
/// # Errors
/// [`Error::Kernel`] if the variable names a kernel that cannot be used.
pub fn active_kernel() -> Result<&'static str> {
    Ok(select()?.name())
}

/// The kernel in use.
pub(crate) fn select() -> Result<&'static dyn Kernel> {
    static CHOICE: OnceLock<std::result::Result<&'static dyn Kernel, (String, &'static str)>> =
        OnceLock::new();
    let choice = CHOICE.get_or_init(|| {
        let forced = std::env::var_os(KERNEL_VARIABLE).filter(|name| !name.is_empty());
        choose(forced.map(|name| name.to_string_lossy().into_owned()))
    });
    choice.clone().map_err(|(name, problem)| {
        let available: Vec<_> =
            TABLE.iter().filter(|k| k.is_available()).map(|k| k.name()).collect();
        Error::Kernel { name, problem, available: available.join(", ") }
    })
}

fn choose(
    forced: Option<String>,
) -> std::result::Result<&'static dyn Kernel, (String, &'static str)> {
    let Some(name) = forced else {
        let first = TABLE.iter().find(|k| k.is_available());
        return Ok(*first.expect("the portable kernel is always available"));
    };
    match TABLE.iter().find(|k| k.name() == name) {
        Some(kernel) if kernel.is_available() => Ok(*kernel),
        Some(_) => Err((name, "needs instructions that this machine lacks")),
        None => Err((name, "does not exist")),
    }
}

/// Every kernel that this machine can run; says aloud, once, which it cannot, for CI to see.
#[cfg(test)]
pub(super) fn runnable() -> Vec<&'static dyn Kernel> {
    use std::io::Write;
    static REPORT: std::sync::Once = std::sync::Once::new();
    let (run, not_run): (Vec<_>, Vec<_>) = TABLE.iter().copied().partition(|k| k.is_available());
    REPORT.call_once(|| {
        // Not `eprintln!`, which the test harness keeps to itself while tests pass.
        let mut stderr = std::io::stderr().lock();
        let lacks = "(this machine lacks its instructions)";
        let mut say = |text: String| writeln!(stderr, "{text}").expect("stderr takes a line");
        run.iter().for_each(|kernel| say(format!("RUN: kernel {}", kernel.name())));
        not_run.iter().for_each(|kernel| say(format!("NOT RUN: kernel {} {lacks}", kernel.name())));
    });
    run
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_portable_comes_last() {
        let infos = all_kernels();
        for (i, info) in infos.iter().enumerate() {
            assert!(infos[..i].iter().all(|other| other.name != info.name), "{}", info.name);
        }
        assert_eq!(infos.last().unwrap(), &KernelInfo { name: "portable", available: true });
    }

    #[test]
    fn a_forced_kernel_is_that_one_or_an_error() {
        assert_eq!(choose(Some("portable".into())).ok().unwrap().name(), "portable");
        assert_eq!(choose(Some("abacus".into())).err().unwrap().1, "does not exist");
        assert!(choose(None).is_ok());
    }
}
