//! Attention over a cache: what belongs to the call, and the engine over its heads.

use super::Int8KvCache;
use super::head::Head;
use super::source::CacheHead;
use crate::attention::AttentionCall;
use crate::attention::config::{AttentionConfig, Backend, Int8Config, PvPrecision};
use crate::attention::engine::{Doubt, Element, Engine, MaskView, Modifiers, Queries};
use crate::attention::mask::broadcast_mask;
use crate::attention::room::queries_with_room;
use crate::attention::shapes::{check_attention, check_cpu, check_float};
use crate::attention::visible::Visible;
use crate::cpu::Level;
use crate::cpu::contracts::Format;
use crate::memory::written;
use crate::parallel::Work;
use crate::view::{View, cpu};
use crate::{Error, Result};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Storage, Tensor};

const OP: &str = "Int8KvCache::attention";

impl Int8KvCache {
    /// `softmax(scale * q·k^T)·v` over the keys and values in the cache: `q` `[B, H, M, D]`, f32,
    /// f16 or bf16 with any strides, to `[B, H, M, Dv]` in the dtype of `q`. `H_kv` divides `H`.
    ///
    /// In `call`, [`Causal::End`](crate::attention::Causal::End) makes the queries the last `M`
    /// tokens of each sequence, a mask broadcasts to `[B, H, M, N]` with the `N` tokens of the
    /// longest sequence, and `kv_lens` hides the last tokens of sequences.
    ///
    /// All of the model's part of `config` counts, and the P·V precision; how keys and values are
    /// quantized is the cache's own configuration, and queries are quantized to 16 bits. For few
    /// queries P·V is in f32 whatever its precision. The result is the same whatever the number of
    /// threads, and with P·V in int16 on every [level](crate::cpu). It has no gradient. A query that sees no key gives zeros.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Rank`] and [`Error::DType`] for a `q` that does not fit the
    /// cache, or a mask that does not fit them, [`Error::Device`] unless both are on the CPU,
    /// [`Error::Mismatch`] for a cache to which nothing was appended and for lengths, positions or
    /// slopes or sink logits that do not match, [`Error::InvalidArgument`] for a scale, softcap, slope or sink
    /// logit that makes no sense, [`Error::Unsupported`] for fp32, for P·V in int8, and for queries that would see
    /// keys which a window has dropped, [`Error::Level`] if
    /// [`LEVEL_VARIABLE`](crate::cpu::LEVEL_VARIABLE) names a level that cannot be used.
    pub fn attention(
        &self,
        q: &Tensor,
        call: impl Into<AttentionCall>,
        config: &AttentionConfig,
    ) -> Result<Tensor> {
        let call = call.into();
        check_float(OP, &[("q", q)])?;
        check_cpu(OP, &[("q", q)])?;
        let (out, doubt) = self.attend(q, &call, config)?;
        if !doubt.is_beyond() {
            return Ok(out);
        }
        let Some((wide, scale)) = queries_with_room(q, config.spec.scale(q.dim(3)?)?)? else {
            return Ok(out);
        };
        let (out, _) = self.attend(&wide, &call, &config.clone().softmax_scale(scale))?;
        Ok(out.to_dtype(q.dtype())?)
    }

    /// [`Int8KvCache::attention`] of numbers as they are.
    fn attend(
        &self,
        q: &Tensor,
        call: &AttentionCall,
        config: &AttentionConfig,
    ) -> Result<(Tensor, Doubt)> {
        let (storage, layout) = q.storage_and_layout();
        let queries = View::new(OP, "q", cpu(&storage)?, layout)?;
        let mask = call.mask.as_ref().map(|mask| self.whole_mask(mask, &queries)).transpose()?;
        let guard = mask.as_ref().map(Tensor::storage_and_layout);
        let mask = guard.as_ref().map(|(storage, layout)| MaskView::new(cpu(storage)?, layout));
        let mask = mask.transpose()?;
        let (heads, value_dim) = self.check_queries(&queries)?;
        let [b, h, m, d] = queries.dims();
        let (scale, int8) = check_config(h, d, config)?;
        let (level, spec, doubt) = (Level::active()?, &config.spec, Doubt::default());
        let engine = Engine {
            level,
            queries: Queries { heads: h, tokens: m, group: h / heads.max(1), apart: false },
            value_dim,
            visible: Visible::of_cache(&self.lens(), m, call, spec)?,
            sinks: self.config.sinks,
            window: self.config.window,
            modifiers: Modifiers::new(spec, scale, mask),
            seen: None,
            doubt: &doubt,
        };
        self.check_dropped(&engine)?;
        let many = int8.pv.format(level)?;
        let storage = match q.dtype() {
            DType::F16 => CpuStorage::F16(self.run(&engine, &queries, many)),
            DType::BF16 => CpuStorage::BF16(self.run(&engine, &queries, many)),
            _ => CpuStorage::F32(self.run(&engine, &queries, many)),
        };
        let (storage, shape) = (Storage::Cpu(storage), (b, h, m, value_dim));
        Ok((Tensor::from_storage(storage, shape, BackpropOp::none(), false), doubt))
    }

    /// `[B, H, M, Dv]`; values are multiplied in `many` with many rows.
    fn run<T: Element>(&self, engine: &Engine<'_>, queries: &View<'_>, many: Format) -> Vec<T> {
        let ([b, h, m, depth], value_dim) = (queries.dims(), engine.value_dim);
        let len = b * h * m * value_dim;
        if len == 0 || self.is_empty() {
            return vec![T::default(); len];
        }
        let heads = h / engine.queries.group;
        let scores = b * h * m * self.len();
        let work = Work {
            int8_macs: scores.saturating_mul(2 * depth),
            value_macs: scores.saturating_mul(value_dim),
            elements: scores.saturating_add(b * heads * self.len() * (depth + value_dim)),
            ..Work::default()
        };
        // SAFETY: `Engine::run` writes every element, or panics.
        unsafe {
            written(len, |out| {
                engine.run(work, out, |_, index, attend| {
                    attend(&CacheHead {
                        level: engine.level,
                        head: &self.sequences[index / heads].heads[index % heads],
                        queries,
                        shape: engine.queries,
                        factor: engine.modifiers.factor(),
                        many,
                    });
                })
            })
        }
    }

    /// # Errors
    /// [`Error::Unsupported`] if a query sees keys that were dropped.
    fn check_dropped(&self, engine: &Engine<'_>) -> Result<()> {
        let sinks = self.config.sinks;
        for (index, sequence) in self.sequences.iter().enumerate() {
            let Some(kept) = sequence.heads.first().map(Head::kept_from) else { continue };
            // Later queries see later keys.
            if engine.queries.tokens == 0 || kept <= sinks {
                continue;
            }
            let seen = engine.seen(index, 0);
            if seen.start < kept.min(seen.end) {
                return Err(Error::Unsupported(format!(
                    "the first query sees keys from {} on, but the window has dropped those before \
                     {kept}",
                    seen.start
                )));
            }
        }
        Ok(())
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
        let divides = heads != 0 && h.is_multiple_of(heads) || h == heads;
        if !(divides && (b, d) == (keys[0], keys[3])) {
            let expected =
                format!("[{}, a multiple of {heads}, M, {}] to match the cache", keys[0], keys[3]);
            return Err(Error::shape(OP, "q", &[b, h, m, d], expected));
        }
        let values = [keys[0], heads, keys[2], dims.value_dim];
        check_attention(OP, &[b, h, m, d], &keys, &values)?;
        Ok((heads, dims.value_dim))
    }
}

/// The factor on scores, and the choices of the int8 backend.
///
/// # Errors
/// [`Error::Unsupported`], [`Error::InvalidArgument`] and [`Error::Mismatch`] for what cannot be with
/// `heads` query heads of `depth` elements.
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
            "P·V in int8 over a cache, whose values are multiplied in more bits however they are \
             stored; use auto, int16, f32 or bf16"
                .into(),
        ));
    }
    Ok((config.spec.scale(depth)?, int8))
}
