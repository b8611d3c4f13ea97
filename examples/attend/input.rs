//! The dumped tensors.

use crate::common::print::count;
use crate::masking::Masking;
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use std::path::Path;

const NAMES: [&str; 7] = ["q", "k", "v", "past_k", "past_v", "mask", "kv_lens"];

/// What is computed with: `q` `[B, H, M, D]`, `k` `[B, H_kv, N, D]`, `v` `[B, H_kv, N, Dv]`, f32,
/// the past before the new keys.
pub struct Inputs {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    /// How many of the keys are past ones.
    pub past: usize,
    /// U8 or float, any rank.
    pub mask: Option<Tensor>,
    pub kv_lens: Option<Vec<usize>>,
    /// What was done that nobody asked for.
    pub notes: Vec<String>,
}

impl Inputs {
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {path:?}"))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| {
            anyhow::anyhow!("{path:?} is not a whole safetensors file ({} bytes): {e}", bytes.len())
        })?;
        Self::of(&Dump { file, path: path.display().to_string() })
    }

    fn of(dump: &Dump<'_>) -> Result<Self> {
        let mut notes = Vec::new();
        let mut ignored = dump.file.names();
        ignored.retain(|name| !NAMES.contains(name));
        ignored.sort_unstable();
        if !ignored.is_empty() {
            notes.push(format!("tensors of the input that are not used: {}", ignored.join(", ")));
        }
        let q = dump.required("q", &mut notes)?;
        let (past_k, past_v) =
            (dump.floats("past_k", &mut notes)?, dump.floats("past_v", &mut notes)?);
        ensure!(
            past_k.is_some() == past_v.is_some(),
            "past_k and past_v belong together, but {} holds only one of them",
            dump.path
        );
        let mut k = dump.required("k", &mut notes)?;
        let mut v = dump.required("v", &mut notes)?;
        check_shapes(&q, &k, &v)?;
        let mut past = 0;
        if let (Some(past_k), Some(past_v)) = (past_k, past_v) {
            past = past_k.dim(2)?;
            let len = past_v.dim(2)?;
            ensure!(past == len, "past_k has {past} keys, but past_v has {len} values");
            k = after(("past_k", past_k), ("k", k))?;
            v = after(("past_v", past_v), ("v", v))?;
        }
        Ok(Self { mask: dump.mask()?, kv_lens: dump.kv_lens()?, q, k, v, past, notes })
    }

    /// `(B, H, M, N)`.
    pub fn dims(&self) -> Result<(usize, usize, usize, usize)> {
        let (b, h, m, _) = self.q.dims4()?;
        Ok((b, h, m, self.k.dim(2)?))
    }

    /// Refuses NaN and infinity. In keys and values that no query sees they are replaced by 0.
    pub fn check_finite(&mut self, masking: &Masking) -> Result<()> {
        if let Some(at) = bad_rows(&self.q)?.first() {
            bail!("q holds {}", at.describe());
        }
        let (mut seen, h_kv) = (None, self.k.dim(1)?);
        for (name, tensor) in [("k", &mut self.k), ("v", &mut self.v)] {
            let bad = bad_rows(tensor)?;
            if bad.is_empty() {
                continue;
            }
            let seen = match &mut seen {
                Some(seen) => seen,
                none => none.insert(masking.seen_keys(h_kv)?),
            };
            if let Some(at) = bad.iter().find(|at| seen[at.batch][at.head][at.token]) {
                let past = if self.past > 0 { " (counted from the first past one)" } else { "" };
                bail!("{name} holds {}, which a query sees{past}", at.describe());
            }
            *tensor = without(tensor, &bad)?;
            self.notes.push(format!(
                "{name}: {} with NaN or infinity counted as 0, because no query sees them",
                count(bad.len(), "row")
            ));
        }
        Ok(())
    }
}

fn check_shapes(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
    let ((b, h, _, d), (b_k, h_kv, n, d_k)) = (q.dims4()?, k.dims4()?);
    let (q, k) = (q.dims(), k.dims());
    ensure!(
        b_k == b && d_k == d,
        "k has shape {k:?}, expected [{b}, H_kv, N, {d}] to match q {q:?}"
    );
    ensure!(
        h == h_kv || (h_kv != 0 && h.is_multiple_of(h_kv)),
        "k has {h_kv} heads, expected a number that divides the {h} heads of q"
    );
    let (b_v, h_v, n_v, _) = v.dims4()?;
    ensure!(
        (b_v, h_v, n_v) == (b, h_kv, n),
        "v has shape {:?}, expected [{b}, {h_kv}, {n}, Dv] to match k {k:?}",
        v.dims()
    );
    Ok(())
}

/// `past` and then `new`, along the tokens.
fn after((past_name, past): (&str, Tensor), (name, new): (&str, Tensor)) -> Result<Tensor> {
    let (b, h, _, d) = new.dims4()?;
    let found = past.dims4()?;
    ensure!(
        (found.0, found.1, found.3) == (b, h, d),
        "{past_name} has shape {:?}, expected [{b}, {h}, P, {d}] to match {name} {:?}",
        past.dims(),
        new.dims()
    );
    Ok(Tensor::cat(&[past, new], 2)?)
}

/// A row with NaN or infinity in it.
struct BadRow {
    batch: usize,
    head: usize,
    token: usize,
    /// Where in the row.
    index: usize,
    value: f32,
}

impl BadRow {
    fn describe(&self) -> String {
        let Self { batch, head, token, index, value } = self;
        format!("{value} at [{batch}, {head}, {token}, {index}]")
    }
}

fn bad_rows(tensor: &Tensor) -> Result<Vec<BadRow>> {
    let (_, heads, tokens, depth) = tensor.dims4()?;
    let data = tensor.flatten_all()?.to_vec1::<f32>()?;
    let rows = data.chunks_exact(depth.max(1)).enumerate();
    let bad = rows.filter_map(|(row, data)| {
        let index = data.iter().position(|x| !x.is_finite())?;
        Some(BadRow {
            batch: row / tokens / heads,
            head: row / tokens % heads,
            token: row % tokens,
            index,
            value: data[index],
        })
    });
    Ok(bad.collect())
}

/// The tensor with zeros in these rows.
fn without(tensor: &Tensor, rows: &[BadRow]) -> Result<Tensor> {
    let (_, heads, tokens, depth) = tensor.dims4()?;
    let mut data = tensor.flatten_all()?.to_vec1::<f32>()?;
    for at in rows {
        let row = (at.batch * heads + at.head) * tokens + at.token;
        data[row * depth..(row + 1) * depth].fill(0.0);
    }
    Ok(Tensor::from_vec(data, tensor.shape(), &Device::Cpu)?)
}

/// The file, read by name.
struct Dump<'a> {
    file: SafeTensors<'a>,
    path: String,
}

impl Dump<'_> {
    fn required(&self, name: &str, notes: &mut Vec<String>) -> Result<Tensor> {
        self.floats(name, notes)?.with_context(|| {
            let mut names = self.file.names();
            names.sort_unstable();
            format!("{}: no tensor named {name:?}; it holds {names:?}", self.path)
        })
    }

    /// A tensor of rank 4 as f32.
    fn floats(&self, name: &str, notes: &mut Vec<String>) -> Result<Option<Tensor>> {
        let Ok(view) = self.file.tensor(name) else { return Ok(None) };
        let dtype = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::F64 => {
                notes.push(format!("{name} is F64 and was rounded to F32"));
                DType::F64
            }
            other => bail!("{name} has dtype {other:?}, expected F32, F16, BF16 or F64"),
        };
        let shape = view.shape();
        ensure!(shape.len() == 4, "{name} has shape {shape:?}, expected {}", layout(name));
        let tensor = Tensor::from_raw_buffer(view.data(), dtype, shape, &Device::Cpu)?;
        Ok(Some(tensor.to_dtype(DType::F32)?))
    }

    /// U8 or float.
    fn mask(&self) -> Result<Option<Tensor>> {
        let Ok(view) = self.file.tensor("mask") else { return Ok(None) };
        let dtype = match view.dtype() {
            Dtype::BOOL | Dtype::U8 => DType::U8,
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            Dtype::F64 => DType::F64,
            other => bail!(
                "mask has dtype {other:?}, expected BOOL or U8 (non-zero = attend), or F32, F16, \
                 BF16 or F64 (added to the scaled scores)"
            ),
        };
        let mask = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu)?;
        if dtype.is_float() {
            let values = mask.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            let bad = values.iter().position(|x| x.is_nan() || *x == f32::INFINITY);
            if let Some(index) = bad {
                bail!(
                    "mask holds {} at element {index}, expected a finite number or -inf",
                    values[index]
                );
            }
        }
        Ok(Some(mask))
    }

    fn kv_lens(&self) -> Result<Option<Vec<usize>>> {
        let Ok(view) = self.file.tensor("kv_lens") else { return Ok(None) };
        let dtype = view.dtype();
        let signed = matches!(dtype, Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64);
        let unsigned = matches!(dtype, Dtype::U8 | Dtype::U16 | Dtype::U32 | Dtype::U64);
        ensure!(signed || unsigned, "kv_lens has dtype {dtype:?}, expected I64, I32, U32 or U8");
        let shape = view.shape();
        ensure!(shape.len() == 1, "kv_lens has shape {shape:?}, expected [B]");
        let lens = view.data().chunks_exact(dtype.bitsize() / 8).map(|bytes| {
            let fill = if signed && bytes[bytes.len() - 1] >= 0x80 { 0xff } else { 0 };
            let mut wide = [fill; 16];
            wide[..bytes.len()].copy_from_slice(bytes);
            let len = i128::from_le_bytes(wide);
            usize::try_from(len).ok().with_context(|| format!("kv_lens holds {len}"))
        });
        Ok(Some(lens.collect::<Result<_>>()?))
    }
}

fn layout(name: &str) -> &'static str {
    match name {
        "q" => "[B, H, M, D]",
        "k" => "[B, H_kv, N, D]",
        "v" => "[B, H_kv, N, Dv]",
        "past_k" => "[B, H_kv, P, D]",
        _ => "[B, H_kv, P, Dv]",
    }
}
