//! Embeddings of tokens: rows of tables, added up and normalized.
//!
//! ```text
//! norm((words[word] + types[type]) + positions[position])      for each token
//! ```

use super::layer_norm::{FusedNorm, LayerNorm};
use super::plain::is_plain_f32;
use crate::memory::written;
use crate::parallel::Work;
use crate::view::cpu;
use crate::{Error, Result};
use candle_core::{CpuStorage, Device, Layout, Storage, Tensor};
use pulp::{Simd, WithSimd};
use std::mem::MaybeUninit;
use std::ops::Deref;

/// Elements of a task, at least.
const TASK: usize = 1 << 13;

/// Tables `[rows, width]` of words and, where a model has them, of token types and positions, and the norm of
/// their sum.
///
/// In f32 on a CPU each row is looked up, added up and normalized while it is in L1; on other devices and for
/// other dtypes, with Candle's operations. The bits are the same.
pub(crate) struct Embeddings {
    words: Tensor,
    types: Option<Tensor>,
    positions: Option<Tensor>,
    norm: LayerNorm,
    /// Whether the fused form can read the tables.
    plain: bool,
}

/// Tokens one after the other, as rows that the tables have.
#[derive(Clone, Copy)]
pub(crate) struct Tokens<'a> {
    pub words: &'a [u32],
    /// As many; without them all are of type 0.
    pub types: Option<&'a [u32]>,
    /// As many, where there is a table of positions.
    pub positions: &'a [u32],
}

impl Embeddings {
    /// Tables of one width, which is that of the norm.
    pub(crate) fn new(
        words: Tensor,
        types: Option<Tensor>,
        positions: Option<Tensor>,
        norm: LayerNorm,
    ) -> Self {
        let is_plain = |table: &Tensor| is_plain_f32(&[table]) && table.is_contiguous();
        let plain = is_plain(&words)
            && [&types, &positions].iter().all(|table| table.as_ref().is_none_or(is_plain));
        Self { words, types, positions, norm, plain }
    }

    /// The table of words.
    pub(crate) fn words(&self) -> &Tensor {
        &self.words
    }

    /// The embeddings of tokens, `[leading.., width]`; `leading` multiplied is how many they are.
    ///
    /// # Errors
    /// Candle's own, for tables and a norm that do not fit each other.
    pub(crate) fn forward(&self, tokens: Tokens<'_>, leading: &[usize]) -> Result<Tensor> {
        let width = self.words.dim(1)?;
        let shape = [leading, &[width]].concat();
        match self.norm.fused().filter(|norm| self.plain && norm.width() == width) {
            Some(norm) => Ok(Tensor::from_vec(self.fused(norm, tokens)?, shape, &Device::Cpu)?),
            None => Ok(self.of_tensor(tokens)?.reshape(shape)?),
        }
    }

    /// With Candle's operations, `[tokens, width]`.
    fn of_tensor(&self, tokens: Tokens<'_>) -> Result<Tensor> {
        let look_up = |table: &Tensor, rows: &[u32]| {
            table.index_select(&Tensor::from_slice(rows, rows.len(), table.device())?, 0)
        };
        let mut sum = look_up(&self.words, tokens.words)?;
        if let Some(types) = &self.types {
            sum = match tokens.types {
                Some(rows) => (sum + look_up(types, rows)?)?,
                None => sum.broadcast_add(&types.narrow(0, 0, 1)?)?,
            };
        }
        if let Some(positions) = &self.positions {
            sum = (sum + look_up(positions, tokens.positions)?)?;
        }
        self.norm.forward(&sum)
    }

    /// In one pass over the result, row-major `[tokens, width]`.
    fn fused<'a>(&'a self, norm: &FusedNorm, tokens: Tokens<'_>) -> Result<Vec<f32>> {
        let (width, count) = (norm.width(), tokens.words.len());
        let stored = |table: &'a Option<Tensor>| table.as_ref().map(Tensor::storage_and_layout);
        let (types, positions) = (stored(&self.types), stored(&self.positions));
        let words = self.words.storage_and_layout();
        let words = Rows::new(&words, Some(tokens.words), width)?;
        let of = |table, rows| Rows::new(table, rows, width);
        let types = types.as_ref().map(|types| of(types, tokens.types)).transpose()?;
        let positions = positions.as_ref().map(|table| of(table, Some(tokens.positions)));
        let added = [types, positions.transpose()?];
        let fill = |out: &mut [MaybeUninit<f32>]| {
            if out.is_empty() {
                return;
            }
            let rows = TASK.div_ceil(width);
            // Words are read and rows written; all else is in L1, and takes no longer than they do.
            let work = Work { elements: out.len(), ..Work::default() };
            work.for_each_chunk(out, rows * width, |_, index, out| {
                norm.vectors().dispatch(Embed { words, added, norm, first: index * rows, out });
            });
        };
        // SAFETY: each chunk is whole rows, all elements of which are written.
        Ok(unsafe { written(count * width, fill) })
    }
}

/// A table, and which of its rows are the tokens'.
#[derive(Clone, Copy)]
struct Rows<'a> {
    table: &'a [f32],
    /// Row 0 for all without.
    rows: Option<&'a [u32]>,
    width: usize,
}

impl<'a> Rows<'a> {
    fn new(
        (storage, layout): &'a (impl Deref<Target = Storage>, &Layout),
        rows: Option<&'a [u32]>,
        width: usize,
    ) -> Result<Self> {
        match (cpu(storage)?, layout.contiguous_offsets()) {
            (CpuStorage::F32(data), Some((start, end))) => {
                Ok(Self { table: &data[start..end], rows, width })
            }
            _ => Err(Error::Mismatch("a table of embeddings that is not contiguous f32".into())),
        }
    }

    #[inline(always)]
    fn of(&self, token: usize) -> &'a [f32] {
        let row = match self.rows {
            Some(rows) => rows[token] as usize,
            None => 0,
        };
        &self.table[row * self.width..][..self.width]
    }
}

/// Tokens from `first` on, as many as `out` has rows.
struct Embed<'a> {
    words: Rows<'a>,
    added: [Option<Rows<'a>>; 2],
    norm: &'a FusedNorm,
    first: usize,
    out: &'a mut [MaybeUninit<f32>],
}

impl WithSimd for Embed<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { words, added, norm, first, out } = self;
        for (token, out) in (first..).zip(out.chunks_exact_mut(norm.width())) {
            match added {
                [Some(a), Some(b)] => write_sum3(words.of(token), a.of(token), b.of(token), out),
                [Some(a), None] | [None, Some(a)] => write_sum2(words.of(token), a.of(token), out),
                [None, None] => {
                    out.write_copy_of_slice(words.of(token));
                }
            }
            // SAFETY: the row was just written, all of it.
            norm.normalize_row(simd, unsafe { out.assume_init_mut() });
        }
    }
}

#[inline(always)]
fn write_sum2(a: &[f32], b: &[f32], out: &mut [MaybeUninit<f32>]) {
    assert!(a.len() == out.len() && b.len() == out.len());
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        out.write(a + b);
    }
}

#[inline(always)]
fn write_sum3(a: &[f32], b: &[f32], c: &[f32], out: &mut [MaybeUninit<f32>]) {
    assert!(a.len() == out.len() && b.len() == out.len() && c.len() == out.len());
    for (((out, a), b), c) in out.iter_mut().zip(a).zip(b).zip(c) {
        out.write((a + b) + c);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{all_vectors, assert_threads_change_nothing};
    use super::*;
    use crate::testing::{largest_difference, randn};
    use candle_core::{DType, Var};
    use pulp::Arch;

    const WORDS: usize = 50;
    const TYPES: usize = 3;
    const POSITIONS: usize = 40;

    /// Which of the tables of types and of positions are there.
    const TABLES: [[bool; 2]; 4] = [[false, false], [false, true], [true, false], [true, true]];

    fn embeddings(width: usize, [types, positions]: [bool; 2], arch: Arch) -> Embeddings {
        let norm = LayerNorm::new(randn(&[width]), randn(&[width]), 1e-5).unwrap();
        let table = |rows: usize| (randn(&[rows, width]) * 3.0).unwrap();
        Embeddings::new(
            table(WORDS),
            types.then(|| table(TYPES)),
            positions.then(|| table(POSITIONS)),
            norm.with_vectors(arch),
        )
    }

    /// As many tokens: words, types, positions. The first are the last rows of their tables.
    fn ids(count: usize) -> [Vec<u32>; 3] {
        [WORDS, TYPES, POSITIONS].map(|rows| {
            (0..count).map(|i| ((rows - 1 + i * (rows / 2 + 1)) % rows) as u32).collect()
        })
    }

    fn bits(x: &Tensor) -> Vec<u32> {
        let x = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        x.into_iter().map(f32::to_bits).collect()
    }

    fn check(embeddings: &Embeddings, count: usize, what: &str) {
        let [words, types, positions] = ids(count);
        for types in [None, Some(types.as_slice())] {
            let tokens = Tokens { words: &words, types, positions: &positions };
            let found = embeddings.forward(tokens, &[1, count]).unwrap();
            let width = embeddings.words.dim(1).unwrap();
            assert_eq!(found.dims(), [1, count, width], "{what}");
            if count > 0 {
                assert!(embeddings.plain, "{what}");
                let expected = embeddings.of_tensor(tokens).unwrap();
                assert_eq!(bits(&found), bits(&expected), "{what}, types {}", types.is_some());
            }
        }
    }

    #[test]
    fn the_bits_are_those_of_tensor_operations() {
        for arch in all_vectors() {
            for width in [1, 7, 8, 15, 16, 17, 64, 100, 384, 1000] {
                for tables in TABLES {
                    let embeddings = embeddings(width, tables, arch);
                    // Of the narrow ones many are one task.
                    for count in [0, 1, 5, TASK.div_ceil(width) + 1] {
                        check(&embeddings, count, &format!("{arch:?} {width} {tables:?} {count}"));
                    }
                }
            }
        }
    }

    #[test]
    fn a_token_has_the_same_bits_alone() {
        let embeddings = embeddings(24, [true, true], crate::cpu::vectors());
        let [words, types, positions] = ids(30);
        let all = Tokens { words: &words, types: Some(&types), positions: &positions };
        let all = embeddings.forward(all, &[2, 15]).unwrap().flatten(0, 1).unwrap();
        for i in 0..30 {
            let (words, types) = (&words[i..=i], Some(&types[i..=i]));
            let one = Tokens { words, types, positions: &positions[i..=i] };
            let one = embeddings.forward(one, &[1]).unwrap();
            assert_eq!(bits(&one), bits(&all.get(i).unwrap()), "{i}");
        }
    }

    #[test]
    fn threads_change_nothing() {
        let embeddings = embeddings(40, [true, true], crate::cpu::vectors());
        let [words, types, positions] = ids(3000);
        let tokens = Tokens { words: &words, types: Some(&types), positions: &positions };
        assert_threads_change_nothing(|| embeddings.forward(tokens, &[3000]).unwrap());
    }

    #[test]
    fn a_row_that_is_not_finite_spoils_its_tokens_alone() {
        let mut embeddings = embeddings(20, [false, true], crate::cpu::vectors());
        let row = Tensor::full(f32::NAN, (1, 20), &Device::Cpu).unwrap();
        embeddings.words = Tensor::cat(&[&embeddings.words, &row], 0).unwrap();
        let words = [1, WORDS as u32, 2];
        let tokens = Tokens { words: &words, types: None, positions: &[0, 1, 2] };
        let rows = embeddings.forward(tokens, &[3]).unwrap().to_vec2::<f32>().unwrap();
        let is_nan = |row: &Vec<f32>| row.iter().all(|x| x.is_nan());
        let is_finite = |row: &Vec<f32>| row.iter().all(|x| x.is_finite());
        assert!(is_finite(&rows[0]) && is_nan(&rows[1]) && is_finite(&rows[2]), "{rows:?}");
    }

    #[test]
    fn what_the_fused_form_cannot_read_is_left_to_candle() {
        let Embeddings { words, types, positions, norm, .. } =
            embeddings(20, [true, true], crate::cpu::vectors());
        let (types, positions) = (types.unwrap(), positions.unwrap());
        let [of_words, of_types, of_positions] = ids(9);
        let tokens = Tokens { words: &of_words, types: Some(&of_types), positions: &of_positions };
        let forward = |words: &Tensor, norm: LayerNorm| {
            let (types, positions) =
                (types.to_dtype(words.dtype()), positions.to_dtype(words.dtype()));
            let (types, positions) = (Some(types.unwrap()), Some(positions.unwrap()));
            let embeddings = Embeddings::new(words.clone(), types, positions, norm);
            (embeddings.plain, embeddings.forward(tokens, &[3, 3]).unwrap())
        };
        let norm_in = |dtype| {
            let part = |x: f64| Tensor::full(x, 20, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            LayerNorm::new(part(0.5), part(2.0), 1e-5).unwrap()
        };
        let (plain, expected) = forward(&words, norm_in(DType::F32));
        assert!(plain && expected.dims() == [3, 3, 20]);
        // Codes of 11 bits, of rows that are some units wide.
        let (plain, half) = forward(&words.to_dtype(DType::F16).unwrap(), norm_in(DType::F16));
        let half = half.to_dtype(DType::F32).unwrap();
        assert!(!plain && largest_difference(&half, &expected) < 1e-2);
        let var = Var::from_tensor(&words).unwrap();
        let (plain, tracked) = forward(&var, norm);
        let grads = tracked.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        assert!(!plain && grads.get(&var).is_some());
    }
}
