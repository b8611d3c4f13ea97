//! A level that this machine has, and the choice of the one in use.

use super::contracts::{
    BlockCodes, Condition, F32Exp, Format, Int8Product, Int16Exp, LANES, Panel, PanelProduct,
    RowRanges, Rows, ScoreTile, Scores, Stored, TileInput, Transpose,
};
use super::table::{Bf16, Entry, TABLE};
use crate::{Error, Result};
use pulp::Arch;
use std::sync::OnceLock;

/// Environment variable that forces a level by name for the whole crate, read once per process. A name
/// that does not exist or that this machine cannot run is an error of every call, never a silent
/// fallback.
pub const LEVEL_VARIABLE: &str = "CANDLE_INT8_CPU";

/// An instruction level of the CPU that this machine has: holding one proves that the instructions of
/// its kernels are there.
#[derive(Clone, Copy)]
pub(crate) struct Level {
    entry: &'static Entry,
    /// What the machine has in addition, asked for once.
    bf16: Option<&'static Bf16>,
}

impl PartialEq for Level {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl std::fmt::Debug for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A level as it is reported.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LevelInfo {
    /// Its name, as [`LEVEL_VARIABLE`] takes it.
    pub name: &'static str,
    /// Whether this machine has its instructions.
    pub available: bool,
    /// Which kernel each operation uses in it, on this machine.
    pub kernels: Vec<KernelInfo>,
}

/// A kernel as it is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelInfo {
    /// The operation.
    pub operation: &'static str,
    /// The name of the level, or of the extension, whose instructions it is written for.
    pub kernel: &'static str,
}

/// All levels compiled into this build, best first.
///
/// ```
/// let levels = candle_int8_attention::cpu::levels();
/// let portable = levels.last().unwrap();
/// assert!(portable.name == "portable" && portable.available);
/// ```
pub fn levels() -> Vec<LevelInfo> {
    TABLE.iter().map(Entry::info).collect()
}

/// The name of the level in use: the best that this machine has, or the one that [`LEVEL_VARIABLE`]
/// names.
///
/// # Errors
/// [`Error::Level`] if the variable names a level that cannot be used.
pub fn active_level() -> Result<&'static str> {
    Ok(Level::active()?.name())
}

/// The vectors of plain loops. Whatever needs an answer asks for [`Level::active`] first, so what they are
/// after an error does not matter.
pub(crate) fn vectors() -> Arch {
    static VECTORS: OnceLock<Arch> = OnceLock::new();
    *VECTORS.get_or_init(|| Level::active().map_or(Arch::Scalar, Level::vectors))
}

impl Entry {
    fn info(&self) -> LevelInfo {
        let bf16 = self.bf16.as_ref().filter(|bf16| (bf16.is_available)());
        let mut kernels = vec![
            ("queries times keys, int8", self.int8_product.name),
            ("products, f32", self.float_panels.name),
            ("probabilities times values, int8", self.int8_panels.name),
            ("products, int16", self.int16_panels.name),
            ("probabilities times values of a cache", self.stored.name),
            ("softmax", self.softmax.name),
            ("quantizing", self.rows.name),
            ("plain loops", self.loops()),
        ];
        kernels.extend(bf16.map(|bf16| ("products, bf16", bf16.panels.name)));
        LevelInfo {
            name: self.name,
            available: (self.is_available)(),
            kernels: (kernels.into_iter())
                .map(|(operation, kernel)| KernelInfo { operation, kernel })
                .collect(),
        }
    }

    /// The name of the level whose vectors plain loops are compiled for.
    fn loops(&self) -> &'static str {
        match (self.vectors)() {
            Arch::Scalar => super::portable::NAME,
            #[cfg(target_arch = "x86_64")]
            Arch::V3(_) => super::x86_64::avx2::NAME,
            #[cfg(target_arch = "x86_64")]
            Arch::V4(_) => super::x86_64::avx512_vnni::NAME,
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            _ => super::aarch64::neon::NAME,
            #[cfg(not(all(target_arch = "aarch64", target_endian = "little")))]
            _ => "other vectors",
        }
    }
}

/// Why a name is no level in use.
type Refusal = (String, &'static str);

impl Level {
    /// The level in use.
    ///
    /// # Errors
    /// [`Error::Level`] if [`LEVEL_VARIABLE`] names a level that cannot be used.
    pub(crate) fn active() -> Result<Self> {
        static CHOICE: OnceLock<std::result::Result<Level, Refusal>> = OnceLock::new();
        let choice = CHOICE.get_or_init(|| {
            let forced = std::env::var_os(LEVEL_VARIABLE).filter(|name| !name.is_empty());
            Self::choose(forced.map(|name| name.to_string_lossy().into_owned()))
        });
        choice.clone().map_err(|(name, problem)| {
            let available: Vec<_> = Self::all().map(Self::name).collect();
            Error::Level { name, problem, available: available.join(", ") }
        })
    }

    /// Every level that this machine has, best first.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().filter_map(Self::of)
    }

    /// The only way to one: where its instructions are.
    fn of(entry: &'static Entry) -> Option<Self> {
        let bf16 = entry.bf16.as_ref().filter(|bf16| (bf16.is_available)());
        (entry.is_available)().then_some(Self { entry, bf16 })
    }

    fn choose(forced: Option<String>) -> std::result::Result<Self, Refusal> {
        let Some(name) = forced else {
            return Ok(Self::all().next().expect("the portable level is always available"));
        };
        match TABLE.iter().find(|entry| entry.name == name) {
            Some(entry) => {
                Self::of(entry).ok_or((name, "needs instructions that this machine lacks"))
            }
            None => Err((name, "does not exist")),
        }
    }

    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        self.entry.name
    }

    /// The vectors of its plain loops.
    pub(crate) fn vectors(self) -> Arch {
        (self.entry.vectors)()
    }

    /// The int8 product: layouts and kernels.
    pub(crate) fn int8_product(self) -> &'static Int8Product {
        &self.entry.int8_product
    }

    /// Multiplies with matrices packed in a format; `None` for bf16 where the machine does not.
    pub(crate) fn panels(self, format: Format) -> Option<&'static PanelProduct> {
        match format {
            Format::F32 => Some(&self.entry.float_panels),
            Format::Int8 => Some(&self.entry.int8_panels),
            Format::Int16 => Some(&self.entry.int16_panels),
            Format::Bf16 => self.bf16.map(|bf16| &bf16.panels),
        }
    }

    /// A tile of int32 sums.
    ///
    /// # Safety
    /// That of [`Int8Product::tile`], but for the instructions.
    #[inline(always)]
    pub(crate) unsafe fn int8_tile(self, input: TileInput, out: *mut i32, stride: usize) {
        // SAFETY: by contract; a level is there only with its instructions.
        unsafe { (self.entry.int8_product.tile)(input, out, stride) }
    }

    /// A panel of scores.
    ///
    /// # Safety
    /// That of [`Int8Product::scores`], but for the instructions.
    #[inline(always)]
    pub(crate) unsafe fn int8_scores(self, input: TileInput, scores: ScoreTile) {
        // SAFETY: by contract; a level is there only with its instructions.
        unsafe { (self.entry.int8_product.scores)(input, scores) }
    }

    /// A panel of a packed matrix.
    ///
    /// # Safety
    /// That of [`Multiply`](super::contracts::panel_product::Multiply), but for the instructions.
    ///
    /// # Panics
    /// For a format that the machine does not multiply.
    #[inline(always)]
    pub(crate) unsafe fn multiply(self, format: Format, panel: Panel) {
        let product = self.panels(format).expect("packed in a format that the machine multiplies");
        // SAFETY: by contract; a level is there only with its instructions, as is what it adds.
        unsafe { (product.multiply)(panel) }
    }

    /// Rows of f32 times a matrix as it is stored.
    ///
    /// # Safety
    /// That of [`Multiply`](super::contracts::panel_product::Multiply), but for the instructions.
    #[inline(always)]
    pub(crate) unsafe fn multiply_stored(self, stored: Stored, panel: Panel) {
        // SAFETY: by contract; a level is there only with its instructions.
        unsafe { (self.entry.stored.of(stored))(panel) }
    }

    /// The largest score; NaN does not count.
    pub(crate) fn max(self, scores: &[f32]) -> f32 {
        // SAFETY: a level is there only with its instructions.
        unsafe { (self.entry.softmax.max)(scores) }
    }

    /// Replaces scores by `2^(score - max)`, and writes the sum of each row.
    ///
    /// # Panics
    /// Unless there are up to 16 rows, with a maximum and a place for the sum of each.
    pub(crate) fn exp_f32(self, job: F32Exp<'_>) {
        let F32Exp { len, stride, .. } = job;
        let rows = job.sums.len();
        Scores { data: job.scores, rows, len, stride }.check();
        assert!(rows <= LANES && job.maxes.len() == rows);
        // SAFETY: a level is there only with its instructions.
        unsafe { (self.entry.softmax.exp_f32)(job) }
    }

    /// Writes `2^(score - max)` in bf16; returns the sum of the rounded ones.
    ///
    /// # Panics
    /// Unless there are as many places, or the machine does not multiply bf16.
    pub(crate) fn exp_bf16(self, scores: &[f32], max: f32, probs: &mut [u16]) -> f32 {
        assert_eq!(scores.len(), probs.len());
        let bf16 = self.bf16.expect("a machine that multiplies bf16");
        // SAFETY: a level is there only with its instructions, as is what it adds.
        unsafe { (bf16.exp)(scores, max, probs) }
    }

    /// Writes `255 * 2^(score - max)` rounded; returns the sum of these codes, or NaN if there is a NaN.
    ///
    /// # Panics
    /// Unless there are as many places.
    pub(crate) fn exp_int8(self, scores: &[f32], max: f32, codes: &mut [u8]) -> f32 {
        assert_eq!(scores.len(), codes.len());
        // SAFETY: a level is there only with its instructions.
        unsafe { (self.entry.softmax.exp_int8)(scores, max, codes) }
    }

    /// Writes `2^(score - top)` in int16, and top and sum of each run.
    ///
    /// # Panics
    /// Unless there are rows, with a place for every code and run.
    pub(crate) fn exp_int16(self, job: Int16Exp<'_>) {
        let Scores { rows, len, .. } = job.scores;
        job.scores.check();
        Scores { data: &[], rows, len, stride: job.stride }.check_len(job.codes.len());
        job.runs.check(job.scores.rows, job.scores.runs());
        // SAFETY: a level is there only with its instructions.
        unsafe { (self.entry.softmax.exp_int16)(job) }
    }

    /// Codes with a scale a row, and a zero point if they are affine, with the range of each row where it is
    /// known.
    ///
    /// # Panics
    /// Unless all lengths fit the rows.
    pub(crate) fn quantize(
        self,
        affine: bool,
        rows: Rows<'_>,
        ranges: Option<&RowRanges>,
        out: BlockCodes<'_>,
    ) {
        out.check(rows);
        let fits = |ranges: &RowRanges| [ranges.low.len(), ranges.high.len()] == [rows.count(); 2];
        assert!(ranges.is_none_or(fits));
        // SAFETY: a level is there only with its instructions.
        unsafe { (self.entry.rows.quantize)(affine, rows, ranges, out) }
    }

    /// Subtracts a mean, rotates, and finds the ranges.
    ///
    /// # Panics
    /// Unless all lengths fit the rows, which are not empty.
    pub(crate) fn condition(self, job: Condition<'_>) {
        let (count, depth) = (job.rows.count(), job.rows.depth());
        assert!(depth > 0 && job.mean.is_none_or(|mean| mean.len() == depth));
        assert_eq!(Some(job.values.len()), count.checked_mul(depth));
        job.ranges.resize(count);
        // SAFETY: a level is there only with its instructions.
        unsafe { (self.entry.rows.condition)(job) }
    }

    /// Rows of `depth` elements times the matrix of [`Rotation`](crate::quant::Rotation), in place.
    ///
    /// # Panics
    /// Unless they are whole rows.
    pub(crate) fn rotate(self, depth: usize, rows: &mut [f32]) {
        assert!(rows.len().is_multiple_of(depth), "{} elements in rows of {depth}", rows.len());
        // SAFETY: a level is there only with its instructions.
        unsafe { (self.entry.rows.rotate)(depth, rows) }
    }

    /// The dot product of every vector with every row, `[vectors, rows]`.
    ///
    /// # Panics
    /// Unless all lengths fit the rows.
    pub(crate) fn dots(self, rows: Rows<'_>, vectors: Rows<'_>, out: &mut [f32]) {
        assert_eq!(rows.depth(), vectors.depth());
        assert_eq!(rows.count().checked_mul(vectors.count()), Some(out.len()));
        // SAFETY: a level is there only with its instructions.
        unsafe { (self.entry.rows.dots)(rows, vectors, out) }
    }

    /// Makes columns of rows.
    ///
    /// # Panics
    /// Unless there is a place for everything.
    pub(crate) fn transpose(self, job: Transpose<'_>) {
        job.check();
        // SAFETY: a level is there only with its instructions.
        unsafe { (self.entry.rows.transpose)(job) }
    }
}

/// Every level that this machine has; says aloud, once, which are run and which cannot be, for CI to see.
#[cfg(test)]
pub(crate) fn runnable() -> Vec<Level> {
    use std::io::Write;
    static REPORT: std::sync::Once = std::sync::Once::new();
    REPORT.call_once(|| {
        // Not `eprintln!`, which the test harness keeps to itself while tests pass.
        let mut stderr = std::io::stderr().lock();
        writeln!(stderr).expect("stderr takes a line"); // The harness may have begun one.
        for level in levels() {
            let text = match level.available {
                true => format!("RUN: level {}", level.name),
                false => {
                    format!("NOT RUN: level {} (this machine lacks its instructions)", level.name)
                }
            };
            writeln!(stderr, "{text}").expect("stderr takes a line");
        }
    });
    Level::all().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_portable_comes_last() {
        let infos = levels();
        for (i, info) in infos.iter().enumerate() {
            assert!(infos[..i].iter().all(|other| other.name != info.name), "{}", info.name);
        }
        let last = infos.last().unwrap();
        assert_eq!((last.name, last.available), ("portable", true));
        assert!(last.kernels.iter().all(|kernel| kernel.kernel == "portable"), "{last:?}");
    }

    #[test]
    fn a_forced_level_is_that_one_or_an_error() {
        assert_eq!(Level::choose(Some("portable".into())).ok().unwrap().name(), "portable");
        assert_eq!(Level::choose(Some("abacus".into())).err().unwrap().1, "does not exist");
        assert!(Level::choose(None).is_ok());
    }
}
