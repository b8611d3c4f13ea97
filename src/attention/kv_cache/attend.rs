//! Attention over the pages of a cache.
//!
//! ```text
//! for each head of keys, for some rows of the queries that share it:
//!   quantize and pack the rows
//!   for each span of up to 1024 keys:                        spans may run in parallel
//!     int8 scores page by page, or f32 scores of what is kept in f32
//!     softcap, ALiBi; softmax of the span on its own; times its values
//!   merge the spans in their order, divide by the sum
//! ```
//!
//! A row is one query of one head. Queries are two int8 codes an element, the second for what the
//! first leaves over: a query is practically exact, and since a decode step waits for keys from
//! memory, the second product is nearly free. What is left of the error is that of the keys.

use super::Int8KvCache;
use super::head::{Head, PAGE};
use super::span::Partial;
use crate::attention::config::{AttentionConfig, Backend, Int8Config, PvPrecision};
use crate::attention::fused::{Between, MaskView};
use crate::attention::mask::broadcast_mask;
use crate::attention::shapes::{check_cpu, check_float, check_scores};
use crate::attention::view::{View, cpu};
use crate::attention::visible::Visible;
use crate::attention::{AttentionCall, AttentionSpec, Causal};
use crate::gemm::{self, Kernel, PackedLhs};
use crate::pv::PvKernel;
use crate::quant::Scheme;
use crate::quant::rows::{BlockCodes, RowParams, Rows, dots, quantize_block};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use std::f32::consts::LOG2_E;
use std::ops::Range;

const OP: &str = "Int8KvCache::attention";

/// Rows of a block; two rows of codes each.
const ROWS: usize = 48;

/// Keys of a span. The cut into spans does not depend on the number of threads, so neither does
/// the result.
const SPAN: usize = 4 * PAGE;

impl Int8KvCache {
    /// `softmax(scale * q·k^T)·v` over the keys and values in the cache: `q` `[B, H, M, D]`, f32,
    /// f16 or bf16 with any strides, to `[B, H, M, Dv]` in the dtype of `q`. `H_kv` divides `H`.
    ///
    /// In `call`, [`Causal::End`](crate::attention::Causal::End) makes the queries the last `M`
    /// tokens of each sequence, a mask broadcasts to `[B, H, M, N]` with the `N` tokens of the
    /// longest sequence, and `kv_lens` hides the last tokens of sequences.
    ///
    /// All of the model's part of `config` counts, and the P·V precision; how keys and values are
    /// quantized is the cache's own configuration, and queries are quantized to 16 bits. For few queries P·V is in f32 whatever its precision. The result is the same
    /// whatever the number of threads. It has no gradient. A query that sees no key gives zeros.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Rank`] and [`Error::DType`] for a `q` that does not fit the
    /// cache, or a mask that does not fit them, [`Error::Device`] unless both are on the CPU,
    /// [`Error::Mismatch`] for a cache to which nothing was appended and for lengths, positions or
    /// slopes that do not match, [`Error::InvalidArgument`] for a scale, softcap or slope that makes
    /// no sense, [`Error::Unsupported`] for fp32, for P·V in int8, and for queries that would see
    /// keys which a window has dropped, [`Error::Kernel`] if
    /// [`KERNEL_VARIABLE`](crate::gemm::KERNEL_VARIABLE) names a kernel that cannot be used.
    pub fn attention(
        &self,
        q: &Tensor,
        call: impl Into<AttentionCall>,
        config: &AttentionConfig,
    ) -> Result<Tensor> {
        let call = call.into();
        check_float(OP, &[("q", q)])?;
        check_cpu(OP, &[("q", q)])?;
        let (storage, layout) = q.storage_and_layout();
        let queries = View::new(OP, "q", cpu(&storage)?, layout)?;
        let mask = call.mask.as_ref().map(|mask| self.whole_mask(mask, &queries)).transpose()?;
        let guard = mask.as_ref().map(Tensor::storage_and_layout);
        let mask = match &guard {
            Some((storage, layout)) => Some(MaskView::new(cpu(storage)?, layout)?),
            None => None,
        };
        let engine = Engine::prepare(self, queries, (&call, mask), config)?;
        let [b, h, m, _] = engine.queries.dims();
        let out = engine.run();
        let out = Tensor::from_vec(out, (b, h, m, engine.value_dim), &Device::Cpu)?;
        Ok(if q.dtype() == DType::F32 { out } else { out.to_dtype(q.dtype())? })
    }

    /// # Errors
    /// Those of [`Int8KvCache::attention`] that concern only the configuration, for queries of
    /// `heads` heads of `depth` elements.
    pub(crate) fn check_config(heads: usize, depth: usize, config: &AttentionConfig) -> Result<()> {
        check_config(heads, depth, config).map(|_| ())
    }

    /// A mask as `[B, H, M, N]`.
    fn whole_mask(&self, mask: &Tensor, queries: &View<'_>) -> Result<Tensor> {
        check_cpu(OP, &[("mask", mask)])?;
        let [b, h, m, _] = queries.dims();
        broadcast_mask(&mask.detach(), &[b, h, m, self.len()])
    }

    /// # Errors
    /// Those of [`Int8KvCache::attention`] that concern the shape of `q`.
    fn check_queries(&self, queries: &View<'_>) -> Result<(usize, usize)> {
        let Some((heads, dims)) = self.shape else {
            let problem = "attention over a cache to which nothing was appended";
            return Err(Error::Mismatch(problem.into()));
        };
        let [b, h, m, d] = queries.dims();
        let keys = [self.sequences.len(), heads, self.len(), dims.depth];
        if check_scores(OP, &[b, h, m, d], &keys).is_err() {
            let shape = vec![b, h, m, d];
            let expected =
                format!("[{}, a multiple of {heads}, M, {}] to match the cache", keys[0], keys[3]);
            return Err(Error::Shape { op: OP, tensor: "q", shape, expected });
        }
        Ok((heads, dims.value_dim))
    }
}

/// Everything that is known before the first row.
pub(super) struct Engine<'a> {
    pub cache: &'a Int8KvCache,
    kernel: &'static dyn Kernel,
    queries: View<'a>,
    /// What the queries of each sequence see.
    visible: Vec<Visible>,
    /// Query heads that share a head of keys.
    group: usize,
    pub value_dim: usize,
    /// Multiplies values with many rows of probabilities.
    pub many: &'static dyn PvKernel,
    /// Multiplies every score.
    pub factor: f32,
    pub between: Between<'a>,
}

/// Some rows of the queries that share a head of keys.
pub(super) struct Block<'a> {
    pub sequence: usize,
    pub head: &'a Head,
    /// What the queries of the sequence see.
    pub positions: &'a Visible,
    /// The query head and the query of each row.
    pub rows: Vec<(usize, usize)>,
    /// `[rows, D]`.
    pub queries: Vec<f32>,
    /// Codes of all rows, then those of what they leave over.
    pub codes: PackedLhs,
    pub scales: Vec<f32>,
    /// What smoothing of the keys adds to all scores of a row.
    pub biases: Vec<f32>,
    /// The keys that each row sees, but for the sinks.
    pub visible: Vec<Range<usize>>,
}

/// Keys that are in the same kind of memory.
#[derive(Clone, Debug)]
pub(super) enum Span {
    Sinks,
    Pages(Range<usize>),
    Recent,
}

impl<'a> Engine<'a> {
    fn prepare(
        cache: &'a Int8KvCache,
        queries: View<'a>,
        (call, mask): (&AttentionCall, Option<MaskView<'a>>),
        config: &AttentionConfig,
    ) -> Result<Self> {
        let (heads, value_dim) = cache.check_queries(&queries)?;
        let [_, h, m, d] = queries.dims();
        let (scale, int8) = check_config(h, d, config)?;
        let spec = &config.spec;
        let engine = Self {
            kernel: gemm::select()?,
            visible: visible(cache, m, call, spec)?,
            group: h / heads.max(1),
            value_dim,
            many: int8.pv.kernel()?,
            // A softcap bends the score itself; log2(e) comes after it.
            factor: if spec.softcap.is_some() { scale } else { scale * LOG2_E },
            between: Between { softcap: spec.softcap, slopes: spec.alibi_slopes.clone(), mask },
            cache,
            queries,
        };
        engine.check_dropped()?;
        Ok(engine)
    }

    /// # Errors
    /// [`Error::Unsupported`] if a query sees keys that were dropped.
    fn check_dropped(&self) -> Result<()> {
        let sinks = self.cache.config.sinks;
        for (sequence, visible) in self.cache.sequences.iter().zip(&self.visible) {
            let Some(kept) = sequence.heads.first().map(Head::kept_from) else { continue };
            // Later queries see later keys.
            if self.queries.tokens() == 0 || kept <= sinks {
                continue;
            }
            let seen = self.seen(visible, 0);
            if seen.start.max(sinks) < kept.min(seen.end) {
                return Err(Error::Unsupported(format!(
                    "the first query sees keys from {} on, but the window has dropped those before \
                     {kept}",
                    seen.start.max(sinks)
                )));
            }
        }
        Ok(())
    }

    /// The keys that query `query` of a sequence sees, the sinks left out.
    fn seen(&self, visible: &Visible, query: usize) -> Range<usize> {
        let Range { start, end } = visible.range(0, query);
        let Some(window) = self.cache.config.window else { return start..end };
        let position = usize::try_from(visible.position(0, query)).unwrap_or(0);
        start.max(position.saturating_sub(window)).min(end)..end
    }

    /// `[B, H, M, Dv]`.
    fn run(&self) -> Vec<f32> {
        let [b, h, m, _] = self.queries.dims();
        let mut out = vec![0f32; b * h * m * self.value_dim];
        if out.is_empty() || self.cache.is_empty() {
            return out;
        }
        let rows = self.group * m;
        let of_head = |(sequence, head): (usize, usize)| {
            (0..rows)
                .step_by(ROWS)
                .map(move |start| (sequence, head, start..(start + ROWS).min(rows)))
        };
        let heads = h / self.group;
        let all = (0..b).flat_map(|sequence| (0..heads).map(move |head| (sequence, head)));
        let blocks: Vec<_> = all.flat_map(of_head).collect();
        let work = b * h * m * self.cache.len() * (self.queries.depth() + self.value_dim);
        let prepare =
            |&(sequence, head, ref rows): &_| self.block(sequence, head, Range::clone(rows));
        // Rows of the same head of keys lie together in the result, one after the other.
        let outs = out.chunks_mut(rows * self.value_dim);
        let outs = outs.flat_map(|out| out.chunks_mut(ROWS * self.value_dim));
        if work < gemm::SERIAL_BELOW {
            for (block, out) in blocks.iter().zip(outs) {
                self.attend(&prepare(block), out);
            }
        } else if blocks.len() >= 4 * rayon::current_num_threads() {
            let tasks: Vec<_> = blocks.iter().zip(outs).collect();
            tasks.into_par_iter().for_each(|(block, out)| self.attend(&prepare(block), out));
        } else {
            let blocks: Vec<Block<'_>> = blocks.par_iter().map(prepare).collect();
            self.attend_in_spans(&blocks, outs);
        }
        out
    }

    /// The spans of few blocks in parallel.
    fn attend_in_spans<'o>(&self, blocks: &[Block<'_>], outs: impl Iterator<Item = &'o mut [f32]>) {
        let spans: Vec<Vec<Span>> = blocks.iter().map(|block| self.spans(block)).collect();
        let tasks: Vec<(&Block<'_>, &Span)> = (blocks.iter().zip(&spans))
            .flat_map(|(block, spans)| spans.iter().map(move |span| (block, span)))
            .collect();
        let partials: Vec<Partial> =
            tasks.into_par_iter().map(|(block, span)| Partial::over(self, block, span)).collect();
        let mut partials = partials.into_iter();
        for ((block, spans), out) in blocks.iter().zip(&spans).zip(outs) {
            let mut merged = Partial::nothing(block.rows.len(), self.value_dim);
            partials.by_ref().take(spans.len()).for_each(|partial| merged.merge(&partial));
            merged.finish(out);
        }
    }

    /// All spans of a block, one after the other.
    fn attend(&self, block: &Block<'_>, out: &mut [f32]) {
        let mut merged = Partial::nothing(block.rows.len(), self.value_dim);
        for span in self.spans(block) {
            merged.merge(&Partial::over(self, block, &span));
        }
        merged.finish(out);
    }

    /// Quantizes and packs rows.
    fn block(&self, sequence: usize, head: usize, rows: Range<usize>) -> Block<'_> {
        let [_, h, m, depth] = self.queries.dims();
        let rows: Vec<_> = rows.map(|row| (head * self.group + row / m, row % m)).collect();
        let mut queries = Vec::with_capacity(rows.len() * depth);
        let mut buffer = Vec::new();
        for &(query_head, query) in &rows {
            let head = sequence * h + query_head;
            let row = self.queries.rows(head, query..query + 1, &mut buffer);
            row.iter().for_each(|row| queries.extend_from_slice(row));
        }
        let head = &self.cache.sequences[sequence].heads[head];
        let (codes, mut scales) = two_codes(&queries, rows.len(), depth);
        let mut packed = PackedLhs::new(self.kernel);
        packed.put(&codes, 2 * rows.len(), depth);
        scales.iter_mut().for_each(|x| *x *= self.factor);
        let mut biases = vec![0f32; 2 * rows.len()];
        if let Some(offset) = &head.offset {
            self.bias(&queries, offset, &mut biases[..rows.len()]);
        }
        let positions = &self.visible[sequence];
        let visible = rows.iter().map(|&(_, query)| self.seen(positions, query)).collect();
        Block { sequence, head, positions, rows, queries, codes: packed, scales, biases, visible }
    }

    /// What an offset that was subtracted from keys adds to the scores of each query.
    pub(super) fn bias(&self, queries: &[f32], offset: &[f32], biases: &mut [f32]) {
        if offset.is_empty() {
            return;
        }
        biases.fill(0.0);
        let depth = offset.len();
        dots(Rows::new(queries, queries.len() / depth, depth, depth), None, offset, biases);
        biases.iter_mut().for_each(|bias| *bias *= self.factor);
    }

    /// The spans in which a row of the block sees a key, in order.
    fn spans(&self, block: &Block<'_>) -> Vec<Span> {
        let first = block.visible.iter().map(|seen| seen.start).min().unwrap_or(0);
        let end = block.visible.iter().map(|seen| seen.end).max().unwrap_or(0);
        let packed = block.head.kept_from().max(first)..block.head.packed.min(end);
        let mut spans = Vec::new();
        if block.head.sinks.tokens > 0 {
            spans.push(Span::Sinks);
        }
        if !packed.is_empty() {
            let starts = (packed.start / SPAN * SPAN..packed.end).step_by(SPAN);
            spans.extend(starts.map(|start| {
                Span::Pages(start.max(packed.start / PAGE * PAGE)..(start + SPAN).min(packed.end))
            }));
        }
        if block.head.recent.tokens > 0 && end > block.head.packed {
            spans.push(Span::Recent);
        }
        spans
    }
}

/// The factor on scores, and the choices of the int8 backend.
///
/// # Errors
/// [`Error::Unsupported`], [`Error::InvalidArgument`] and [`Error::Mismatch`] for what cannot be with `heads` query heads of `depth` elements.
fn check_config(
    heads: usize,
    depth: usize,
    config: &AttentionConfig,
) -> Result<(f32, &Int8Config)> {
    config.spec.check(heads)?;
    let Backend::Int8(int8) = &config.backend else {
        return Err(Error::Unsupported("fp32 attention over a cache of int8 keys".into()));
    };
    if int8.pv == PvPrecision::Int8 {
        return Err(Error::Unsupported(
            "P·V in int8 over a cache, whose values are multiplied in f32 or bf16 however they are \
             stored; use Auto, F32 or Bf16"
                .into(),
        ));
    }
    Ok((config.spec.scale(depth)?, int8))
}

/// What the queries of each sequence see by their positions.
fn visible(
    cache: &Int8KvCache,
    queries: usize,
    call: &AttentionCall,
    spec: &AttentionSpec,
) -> Result<Vec<Visible>> {
    let held = cache.lens();
    let (batch, keys) = (held.len(), cache.len());
    // Checks what there must be one of for each sequence.
    Visible::new((batch, queries, keys), call, spec)?;
    let of_sequence = |(sequence, &len): (usize, &usize)| {
        let causal = match &call.causal {
            Some(Causal::From(starts)) => Some(Causal::From(vec![starts[sequence]])),
            other => other.clone(),
        };
        let kv_lens = call.kv_lens.as_ref().map(|lens| vec![lens[sequence]]);
        Visible::new((1, queries, len), &AttentionCall { mask: None, causal, kv_lens }, spec)
    };
    held.iter().enumerate().map(of_sequence).collect()
}

/// Rows in two int8 codes an element, `x ~ scale * code + scale' * code'`: codes and scales of all
/// rows, then those of what the first codes leave over.
fn two_codes(values: &[f32], rows: usize, depth: usize) -> (Vec<i8>, Vec<f32>) {
    let mut codes = vec![0i8; 2 * values.len()];
    let mut scales = vec![1f32; 2 * rows];
    if depth == 0 {
        return (codes, scales);
    }
    let (mut zeros, mut sums) = (vec![0i32; rows], vec![0i32; rows]);
    let mut quantize = |values: &[f32], codes: &mut [i8], scales: &mut [f32]| {
        let out = BlockCodes { codes, scales, zeros: &mut zeros, sums: &mut sums };
        let params = RowParams::Own(Scheme::Symmetric);
        quantize_block(Rows::contiguous(values, depth), None, params, out);
    };
    let (first, second) = codes.split_at_mut(values.len());
    let (first_scales, second_scales) = scales.split_at_mut(rows);
    quantize(values, first, first_scales);
    let mut left_over = values.to_vec();
    let of_rows = left_over.chunks_exact_mut(depth).zip(first.chunks_exact(depth));
    for ((left_over, codes), &scale) in of_rows.zip(&*first_scales) {
        left_over.iter_mut().zip(codes).for_each(|(x, &code)| *x -= scale * f32::from(code));
    }
    quantize(&left_over, second, second_scales);
    (codes, scales)
}

#[cfg(test)]
mod tests {
    use super::two_codes;

    #[test]
    fn two_codes_are_sixteen_bits() {
        let values: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let (codes, scales) = two_codes(&values, 2, 50);
        for (i, x) in values.iter().enumerate() {
            let row = i / 50;
            let rounded =
                scales[row] * f32::from(codes[i]) + scales[2 + row] * f32::from(codes[100 + i]);
            assert!((x - rounded).abs() < 3.0 / 127.0 / 127.0 / 3.0, "{x} {rounded}");
        }
        // Zeros, and what has no codes.
        assert_eq!(two_codes(&[0.0; 4], 1, 4).0, [0; 8]);
        assert!(two_codes(&[1.0, f32::NAN], 1, 2).1[0].is_nan());
        assert!(two_codes(&[], 3, 0).0.is_empty());
    }
}
