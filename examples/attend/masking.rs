//! Mask tensor, causal rule, window and lengths, all at once.

use crate::args::{Args, CausalOffset};
use crate::input::Inputs;
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use candle_int8_attention::attention::{position_mask, restrict_mask};
use candle_int8_attention::{AttentionCall, AttentionConfig, Causal};
use std::ops::Range;

/// Which keys every query sees.
pub struct Masking {
    /// `(B, H, M, N)`
    dims: (usize, usize, usize, usize),
    /// Of rank 4.
    mask: Option<Tensor>,
    causal: Option<CausalOffset>,
    window: (Option<usize>, Option<usize>),
    kv_lens: Option<Vec<usize>>,
}

impl Masking {
    pub fn new(inputs: &mut Inputs, args: &Args) -> Result<Self> {
        let dims = inputs.dims()?;
        let (b, _, _, n) = dims;
        if let Some(lens) = &inputs.kv_lens {
            ensure!(lens.len() == b, "kv_lens holds {} lengths for a batch of {b}", lens.len());
            if let Some(len) = lens.iter().find(|&&len| len > n) {
                anyhow::bail!("kv_lens holds {len}, but there are {n} keys");
            }
        }
        let causal = args.attention.causal_offset();
        if inputs.past > 0 && args.attention.causal && args.attention.causal_offset.is_none() {
            inputs.notes.push(format!(
                "--causal counts keys from the first of the past: query 0 sees one key. \
                 --causal-offset {} lets it see the past and itself",
                inputs.past
            ));
        }
        let mask = inputs.mask.as_ref();
        let mask = mask.map(|mask| whole_mask(mask, dims, inputs.kv_lens.as_deref()));
        Ok(Self {
            dims,
            mask: mask.transpose()?,
            causal,
            window: (args.attention.window_left, args.attention.window_right),
            kv_lens: inputs.kv_lens.clone(),
        })
    }

    /// Everything: the call, and the model's part of it in `config`.
    pub fn whole(&self, config: AttentionConfig) -> Result<(AttentionCall, AttentionConfig)> {
        let mut call = AttentionCall::default();
        call.mask = self.mask.clone();
        call.kv_lens = self.kv_lens.clone();
        call.causal = match self.causal {
            None => None,
            Some(CausalOffset::End) => Some(Causal::End),
            Some(CausalOffset::Keys(offset @ 0..)) => Some(Causal::Offset(offset.unsigned_abs())),
            // Queries that stand before the first key, which only a tensor can say.
            Some(CausalOffset::Keys(_)) => {
                call.mask = both(call.mask, self.positions(0, 0..self.dims.2)?)?;
                return Ok((call, config));
            }
        };
        let (left, right) = self.window;
        Ok((call, config.window(left, right)))
    }

    /// The same for some queries of some heads of one sequence, with nothing in the configuration.
    pub fn part(
        &self,
        batch: usize,
        heads: Range<usize>,
        queries: Range<usize>,
    ) -> Result<AttentionCall> {
        let (b, h, m, n) = self.dims;
        let narrow = |mask: &Tensor| {
            mask.broadcast_as((b, h, m, n))?
                .narrow(0, batch, 1)?
                .narrow(1, heads.start, heads.len())?
                .narrow(2, queries.start, queries.len())
        };
        let mask = self.mask.as_ref().map(narrow).transpose()?;
        let mut call = AttentionCall::default();
        call.mask = both(mask, self.positions(batch, queries)?)?;
        call.kv_lens = self.kv_lens.as_ref().map(|lens| vec![lens[batch]]);
        Ok(call)
    }

    /// For each sequence, head of keys (of `h_kv`) and key, whether any query that reads the head
    /// sees it.
    pub fn seen_keys(&self, h_kv: usize) -> Result<Vec<Vec<Vec<bool>>>> {
        let (b, h, m, n) = self.dims;
        let group = h / h_kv.max(1);
        let of_head = |batch: usize, head: usize| -> Result<Vec<bool>> {
            let len = self.kv_lens.as_ref().map_or(n, |lens| lens[batch]);
            let mut seen = vec![false; n];
            for head in head * group..(head + 1) * group {
                let keys = match &self.part(batch, head..head + 1, 0..m)?.mask {
                    Some(mask) => keys_seen_through(mask)?,
                    None => vec![m > 0; n],
                };
                seen.iter_mut().zip(keys).take(len).for_each(|(seen, key)| *seen |= key);
            }
            Ok(seen)
        };
        (0..b).map(|batch| (0..h_kv).map(|head| of_head(batch, head)).collect()).collect()
    }

    /// What positions let some queries of a sequence see, `[1, 1, queries, N]`, if they hide
    /// anything.
    fn positions(&self, batch: usize, queries: Range<usize>) -> Result<Option<Tensor>> {
        let (_, _, m, n) = self.dims;
        let (left, right) = match self.causal {
            Some(_) => (self.window.0, Some(0)),
            None => self.window,
        };
        if left.is_none() && right.is_none() {
            return Ok(None);
        }
        let first = match self.causal {
            Some(CausalOffset::Keys(offset)) => offset,
            Some(CausalOffset::End) => {
                let len = self.kv_lens.as_ref().map_or(n, |lens| lens[batch]);
                len as isize - m as isize
            }
            None => n as isize - m as isize,
        };
        let offset = first.saturating_add_unsigned(queries.start);
        let mask = position_mask((queries.len(), n), offset, left, right, &Device::Cpu)?;
        Ok(Some(mask.reshape((1, 1, queries.len(), n))?))
    }

    /// In words, for the report.
    pub fn describe(&self) -> String {
        let causal = self.causal.map(|offset| match offset {
            CausalOffset::Keys(0) => "causal".to_string(),
            CausalOffset::Keys(offset) => format!("causal with offset {offset}"),
            CausalOffset::End => "causal, aligned to the last key".to_string(),
        });
        let mask = self.mask.as_ref().map(|mask| match mask.dtype() {
            DType::U8 => format!("boolean mask {:?}", mask.dims()),
            _ => format!("additive mask {:?}", mask.dims()),
        });
        let side = |name: &str, keys: Option<usize>| keys.map(|keys| format!("{keys} {name}"));
        let window: Vec<String> = [side("left", self.window.0), side("right", self.window.1)]
            .into_iter()
            .flatten()
            .collect();
        let window = (!window.is_empty()).then(|| format!("window {}", window.join(" and ")));
        let lens = self.kv_lens.as_ref().map(|_| "sequence lengths".to_string());
        let all: Vec<String> = [causal, mask, window, lens].into_iter().flatten().collect();
        if all.is_empty() { "none".to_string() } else { all.join(", ") }
    }
}

/// A mask and what positions add to it.
fn both(mask: Option<Tensor>, keep: Option<Tensor>) -> Result<Option<Tensor>> {
    Ok(match (mask, keep) {
        (Some(mask), Some(keep)) => Some(restrict_mask(&mask, &keep)?),
        (mask, keep) => mask.or(keep),
    })
}

/// For each key, whether any row of a mask `[1, 1, M, N]` lets it through.
fn keys_seen_through(mask: &Tensor) -> Result<Vec<bool>> {
    let (_, _, m, n) = mask.dims4()?;
    if m * n == 0 {
        return Ok(vec![false; n]);
    }
    // Restricting by nothing writes minus infinity for whatever else means masked.
    let mask = restrict_mask(mask, &Tensor::ones(1, DType::U8, &Device::Cpu)?)?;
    let seen = match mask.dtype() {
        DType::U8 => mask,
        dtype => mask.ne(&Tensor::new(f32::NEG_INFINITY, &Device::Cpu)?
            .to_dtype(dtype)?
            .broadcast_as(mask.shape())?)?,
    };
    let seen = seen.max_keepdim(2)?.flatten_all()?.to_vec1::<u8>()?;
    Ok(seen.into_iter().map(|seen| seen != 0).collect())
}

/// The mask with rank 4, and with masked keys where it stops short of keys that `lens` hides.
fn whole_mask(
    mask: &Tensor,
    (b, h, m, n): (usize, usize, usize, usize),
    lens: Option<&[usize]>,
) -> Result<Tensor> {
    let shape = mask.dims().to_vec();
    ensure!(shape.len() <= 4, "mask has shape {shape:?}, expected at most 4 dimensions");
    let mut padded = vec![1; 4 - shape.len()];
    padded.extend(&shape);
    let mut mask = mask.reshape(padded)?;
    let keys = mask.dim(3)?;
    let real = lens.and_then(|lens| lens.iter().max()).copied().unwrap_or(n);
    if keys != 1 && (real..n).contains(&keys) {
        let mut hidden = mask.dims().to_vec();
        hidden[3] = n - keys;
        let masked = if mask.dtype() == DType::U8 { 0.0 } else { f32::NEG_INFINITY };
        let masked = Tensor::full(masked, hidden, &Device::Cpu)?.to_dtype(mask.dtype())?;
        mask = Tensor::cat(&[mask, masked], 3)?;
    }
    mask.broadcast_as((b, h, m, n)).ok().with_context(|| {
        let hint = match shape == [b, n] {
            true => format!("; a mask over keys needs shape [{b}, 1, 1, {n}]"),
            false => String::new(),
        };
        format!(
            "mask has shape {shape:?}, expected to broadcast to [B, H, M, N] = {:?}{hint}",
            [b, h, m, n]
        )
    })?;
    Ok(mask)
}
