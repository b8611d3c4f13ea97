//! Keys and values of past tokens in int8, for models that generate token by token.
//!
//! * `config` says what can be chosen; `head` is the storage of one head, in pages; `values` the
//!   formats of values.
//! * `attend` is attention over a cache, by the engine; `source` is one head of it for the engine.
//! * `file` is how a cache is saved, `stored` what of a head is.

mod attend;
mod config;
mod file;
mod head;
mod source;
mod stored;
mod values;

pub use config::{CacheValues, KeySmoothing, KvCacheConfig};

use super::engine::blocks;
use super::shapes::{check_cpu, check_float};
use crate::cpu::Level;
use crate::memory::check_size;
use crate::parallel::Work;
use crate::product;
use crate::view::{View, cpu};
use crate::{Error, Result};
use candle_core::Tensor;
use head::{Dims, Head, Mark, PAGE, RowsRef};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// A cache of keys and values with int8 keys, for one layer of a model.
///
/// Keys are quantized once, when they are appended, with one scale a token; nothing is quantized
/// twice. Codes do not depend on how the tokens were cut into chunks: a prompt at once, in pieces
/// or token by token gives the same bits. Values are f16, bf16 or int8. Attention reads the codes
/// where they lie.
///
/// Storage grows by pages of 256 tokens a head, and nothing that is there is copied. Clones share
/// pages until one of them writes.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::{AttentionCall, AttentionConfig, Int8KvCache, KvCacheConfig};
///
/// let mut cache = Int8KvCache::new(KvCacheConfig::default());
/// let attention = AttentionConfig::int8();
/// // A prompt of 100 tokens; 8 query heads share 2 heads of keys and values.
/// let q = Tensor::randn(0f32, 1., (1, 8, 100, 64), &Device::Cpu)?;
/// let kv = Tensor::randn(0f32, 1., (1, 2, 100, 64), &Device::Cpu)?;
/// cache.append(&kv, &kv)?;
/// let out = cache.attention(&q, AttentionCall::causal(), &attention)?;
/// assert_eq!(out.dims(), [1, 8, 100, 64]);
/// // One token more.
/// let q = Tensor::randn(0f32, 1., (1, 8, 1, 64), &Device::Cpu)?;
/// let kv = Tensor::randn(0f32, 1., (1, 2, 1, 64), &Device::Cpu)?;
/// cache.append(&kv, &kv)?;
/// let out = cache.attention(&q, AttentionCall::causal(), &attention)?;
/// assert_eq!((out.dims(), cache.len()), ([1, 8, 1, 64].as_slice(), 101));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct Int8KvCache {
    config: KvCacheConfig,
    /// Heads of keys, and their dims; known from the first append on.
    shape: Option<(usize, Dims)>,
    sequences: Vec<Sequence>,
}

/// The heads of one sequence; all of them have the same number of tokens.
#[derive(Clone)]
struct Sequence {
    heads: Vec<Head>,
    len: usize,
}

impl std::fmt::Debug for Int8KvCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Int8KvCache")
            .field("config", &self.config)
            .field("lens", &self.lens())
            .field("memory_bytes", &self.memory_bytes())
            .finish_non_exhaustive()
    }
}

impl Int8KvCache {
    /// An empty cache. The first append decides batch, heads and dims.
    pub fn new(config: KvCacheConfig) -> Self {
        Self { config, shape: None, sequences: Vec::new() }
    }

    /// The configuration.
    pub fn config(&self) -> &KvCacheConfig {
        &self.config
    }

    /// Tokens of the longest sequence.
    pub fn len(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.len).max().unwrap_or(0)
    }

    /// Whether no sequence has a token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of each sequence.
    pub fn lens(&self) -> Vec<usize> {
        self.sequences.iter().map(|sequence| sequence.len).collect()
    }

    /// Bytes that keys and values take: whole pages, scales and what is kept in f32. Pages shared
    /// with clones count in each.
    pub fn memory_bytes(&self) -> usize {
        let heads = self.sequences.iter().flat_map(|sequence| &sequence.heads);
        heads.map(Head::size).sum()
    }

    /// Appends keys `[B, H_kv, S, D]` and values `[B, H_kv, S, Dv]` to all sequences: f32, f16 or
    /// bf16 with any strides, on the CPU.
    ///
    /// A key that holds NaN or infinity has NaN scores, a value its NaN or infinity wherever it is
    /// seen, and neither has an influence on others.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Rank`] and [`Error::DType`] for tensors that do not fit each
    /// other or what is in the cache, [`Error::Device`] unless they are on the CPU,
    /// [`Error::Capacity`] beyond a fixed capacity, [`Error::Mismatch`] for a key smoothing that
    /// does not fit, [`Error::InvalidArgument`] for one that is not finite, [`Error::Depth`] beyond the depth limit, [`Error::Level`] if
    /// [`LEVEL_VARIABLE`](crate::cpu::LEVEL_VARIABLE) names a level that cannot be used. The
    /// cache is then as it was before, and so it is after a panic.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let lens = match k.dims() {
            [b, _, s, _] => vec![*s; *b],
            _ => Vec::new(),
        };
        self.append_lens(k, v, &lens)
    }

    /// [`Int8KvCache::append`] of a different number of tokens for each sequence: the first
    /// `lens[b]` of the `S` are real, the others padding, which is not stored.
    ///
    /// # Errors
    /// Those of [`Int8KvCache::append`], and [`Error::Mismatch`] unless there is one length for each
    /// sequence, none above `S`.
    pub fn append_lens(&mut self, k: &Tensor, v: &Tensor, lens: &[usize]) -> Result<()> {
        const OP: &str = "Int8KvCache::append";
        check_float(OP, &[("k", k), ("v", v)])?;
        check_cpu(OP, &[("k", k), ("v", v)])?;
        let (k, v) = (k.storage_and_layout(), v.storage_and_layout());
        let k = View::new(OP, "k", cpu(&k.0)?, k.1)?;
        let v = View::new(OP, "v", cpu(&v.0)?, v.1)?;
        let empty = self.check_append(&k, &v, lens)?;
        let is_first = self.shape.is_none();
        self.shape = Some((k.dims()[1], Dims { depth: k.depth(), value_dim: v.depth() }));
        self.sequences.extend(empty);
        let heads = || self.sequences.iter().flat_map(|sequence| &sequence.heads);
        let marks: Vec<Mark> = heads().map(Head::mark).collect();
        let ended = catch_unwind(AssertUnwindSafe(|| self.append_rows((&k, &v), lens)));
        if let Err(panic) = ended {
            let heads = self.sequences.iter_mut().flat_map(|sequence| &mut sequence.heads);
            heads.zip(marks).for_each(|(head, mark)| head.restore(mark));
            if is_first {
                self.reset();
            }
            resume_unwind(panic);
        }
        let window = self.config.window;
        for (sequence, &len) in self.sequences.iter_mut().zip(lens) {
            if let Some(window) = window {
                // What the next query does not see, but for a page that a truncation may ask for.
                let unseen = sequence.len.saturating_sub(window.saturating_add(PAGE));
                sequence.heads.iter_mut().for_each(|head| head.drop_before(unseen));
            }
            sequence.len += len;
        }
        Ok(())
    }

    /// Appends to every head, of the first `lens[b]` tokens of a sequence.
    fn append_rows(&mut self, (k, v): (&View<'_>, &View<'_>), lens: &[usize]) {
        let config = &self.config;
        let tasks: Vec<(usize, usize, &mut Head)> = (self.sequences.iter_mut().zip(lens))
            .flat_map(|(sequence, &len)| sequence.heads.iter_mut().map(move |head| (len, head)))
            .enumerate()
            .map(|(index, (len, head))| (index, len, head))
            .collect();
        let append = |(index, len, head): (usize, usize, &mut Head)| {
            let [mut k_gathered, mut v_gathered, mut k_slice, mut v_slice] = Default::default();
            for block in blocks(len) {
                let tokens = block.len();
                let keys = k.rows(index, block.clone(), &mut k_gathered).as_slice(&mut k_slice);
                let values = v.rows(index, block, &mut v_gathered).as_slice(&mut v_slice);
                head.append(RowsRef { keys, values, tokens }, config);
            }
        };
        Work { elements: k.len() + v.len(), ..Work::default() }.for_each(tasks, append);
    }

    /// Everything that can be wrong with an append; the sequences of a cache that has none yet.
    fn check_append(&self, k: &View<'_>, v: &View<'_>, lens: &[usize]) -> Result<Vec<Sequence>> {
        let op = "Int8KvCache::append";
        let ([b, h, s, depth], [.., value_dim]) = (k.dims(), v.dims());
        let shape = |tensor, x: &View<'_>, expected: String| {
            Err(Error::shape(op, tensor, &x.dims(), expected))
        };
        if v.dims()[..3] != k.dims()[..3] {
            return shape("v", v, format!("[{b}, {h}, {s}, Dv] to match k {:?}", k.dims()));
        }
        if lens.len() != b {
            return Err(Error::Mismatch(format!("{} lens for a batch of {b}", lens.len())));
        }
        if let Some(len) = lens.iter().find(|len| **len > s) {
            return Err(Error::Mismatch(format!("lens holds {len}, but there are {s} tokens")));
        }
        product::check_depth(depth, false)?;
        check_size(op, "a page of keys", &[h, PAGE, depth])?;
        check_size(op, "a page of values", &[h, PAGE, value_dim])?;
        let capacity = self.config.capacity.unwrap_or(usize::MAX);
        let held = self.lens().into_iter().chain(std::iter::repeat(0));
        for (held, &added) in held.zip(lens) {
            if held.checked_add(added).is_none_or(|len| len > capacity) {
                return Err(Error::Capacity { held, added, capacity });
            }
        }
        let dims = Dims { depth, value_dim };
        if let Some((heads, held)) = self.shape {
            if (b, h, depth) != (self.sequences.len(), heads, held.depth) {
                let (b, depth) = (self.sequences.len(), held.depth);
                return shape("k", k, format!("[{b}, {heads}, S, {depth}] as in the cache"));
            }
            if value_dim != held.value_dim {
                let held = held.value_dim;
                return shape("v", v, format!("[{b}, {heads}, S, {held}] as in the cache"));
            }
            return Ok(Vec::new());
        }
        self.config.key_smoothing.check(h, depth)?;
        let level = Level::active()?;
        let head = |head| Head::new(&self.config, head, dims, level);
        let sequence = || Sequence { heads: (0..h).map(head).collect(), len: 0 };
        Ok((0..b).map(|_| sequence()).collect())
    }

    /// Shortens every sequence to at most `len` tokens, for example to take back tokens that a
    /// speculation got wrong. Where keys are smoothed by groups and `len` is in the last complete group of 64 or
    /// behind it, that leaves no trace; further back, tokens that stay in a group which is cut stay as they
    /// were quantized with it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if a window has dropped tokens that a query after `len` tokens would see.
    /// The cache is then as it was before.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        self.truncate_lens(&vec![len; self.sequences.len()])
    }

    /// [`Int8KvCache::truncate`] with a length for each sequence.
    ///
    /// # Errors
    /// The same, and [`Error::Mismatch`] unless there is one length for each sequence.
    pub fn truncate_lens(&mut self, lens: &[usize]) -> Result<()> {
        self.check_truncate(lens)?;
        for (sequence, &len) in self.sequences.iter_mut().zip(lens) {
            if len < sequence.len {
                sequence.heads.iter_mut().for_each(|head| head.truncate(len));
                sequence.len = len;
            }
        }
        Ok(())
    }

    /// # Errors
    /// Those of [`Int8KvCache::truncate_lens`].
    pub(crate) fn check_truncate(&self, lens: &[usize]) -> Result<()> {
        if lens.len() != self.sequences.len() {
            let (found, batch) = (lens.len(), self.sequences.len());
            return Err(Error::Mismatch(format!("{found} lens for a batch of {batch}")));
        }
        for (sequence, &len) in self.sequences.iter().zip(lens) {
            let Some(head) = sequence.heads.first().filter(|_| len < sequence.len) else {
                continue;
            };
            let seen_from = self.config.window.map_or(0, |window| len.saturating_sub(window));
            let (sinks, kept) = (self.config.sinks, head.kept_from());
            if len > sinks && seen_from.max(sinks) < kept {
                return Err(Error::Unsupported(format!(
                    "truncating to {len} tokens: the window has dropped those before {kept}, and \
                     the next query would see them from {} on",
                    seen_from.max(sinks)
                )));
            }
        }
        Ok(())
    }

    /// Forgets everything but the configuration: batch, heads, dims and means of keys are open again.
    pub fn reset(&mut self) {
        self.shape = None;
        self.sequences.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{AttentionCall, AttentionConfig};
    use crate::quant::Rotation;
    use crate::testing::{largest_difference, randn};

    /// What a cache holds, as a query sees it.
    fn seen(cache: &Int8KvCache, q: &Tensor) -> Tensor {
        cache.attention(q, AttentionCall::causal(), &AttentionConfig::int8()).unwrap()
    }

    /// Whatever of the heads had been done by then: tokens of others are in pages already.
    #[test]
    fn an_append_that_panics_leaves_the_cache_as_it_was() {
        let q = randn((1, 4, 1, 16));
        for (first, config) in [
            (30, KvCacheConfig::default()),
            (70, KvCacheConfig { sinks: 80, ..KvCacheConfig::default() }),
            (300, KvCacheConfig { sinks: 3, recent: 20, ..KvCacheConfig::int8_values() }),
            (900, KvCacheConfig { window: Some(100), ..KvCacheConfig::default() }),
        ] {
            let mut cache = Int8KvCache::new(config);
            let kv = randn((1, 4, first, 16));
            cache.append(&kv, &kv).unwrap();
            let (before, mut expected) = (cache.memory_bytes(), cache.clone());
            // A rotation of another depth fits no key.
            let rotation = cache.sequences[0].heads[2].rotation.replace(Rotation::new(17));
            let bad = randn((1, 4, 400, 16));
            let failed = catch_unwind(AssertUnwindSafe(|| cache.append(&bad, &bad)));
            assert!(failed.is_err(), "{first}: appended");
            cache.sequences[0].heads[2].rotation = rotation;
            assert!(cache.lens() == expected.lens() && cache.memory_bytes() <= before);
            let more = randn((1, 4, 200, 16));
            for cache in [&mut cache, &mut expected] {
                cache.append(&more, &more).unwrap();
            }
            assert_eq!(largest_difference(&seen(&cache, &q), &seen(&expected, &q)), 0.0, "{first}");
        }
    }
}
