//! What can be chosen about a cache, and which keys a query sees.

use crate::memory::check_size;
use crate::quant::mean_of_rows;
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// How an [`Int8KvCache`](super::Int8KvCache) stores what is appended.
///
/// More fields may be added: end an expression in `..KvCacheConfig::default()`.
#[derive(Debug, Clone, PartialEq)]
pub struct KvCacheConfig {
    /// What is subtracted from keys before they are quantized.
    pub key_smoothing: KeySmoothing,
    /// Whether keys and queries are multiplied by the same orthogonal matrix before they are quantized, as
    /// [`ScoreConfig::rotate`](crate::ScoreConfig::rotate) says.
    pub rotate: bool,
    /// Whether keys that stand out of their group are kept in f32, as
    /// [`ScoreConfig::outliers`](crate::ScoreConfig::outliers) says; with smoothing by groups only.
    pub outliers: bool,
    /// How values are stored.
    pub values: CacheValues,
    /// The first tokens of every sequence, kept in f32. Some models give their first tokens huge
    /// keys and attend to them from everywhere (attention sinks, Xiao et al. 2023,
    /// arXiv:2309.17453).
    pub sinks: usize,
    /// The last tokens of every sequence, kept in f32 until newer ones take their place.
    pub recent: usize,
    /// Sliding window: a query sees at most this many keys to the left of its position, and the
    /// sinks. What no later query can see is dropped.
    pub window: Option<usize>,
    /// Most tokens of a sequence; without it only the memory is a limit.
    pub capacity: Option<usize>,
}

impl Default for KvCacheConfig {
    /// Keys smoothed by groups, rotated, outliers apart; values in f16; in f32 only the tokens of the last
    /// group that is complete and of the one that is not; no limits.
    fn default() -> Self {
        Self {
            key_smoothing: KeySmoothing::default(),
            rotate: true,
            outliers: true,
            values: CacheValues::default(),
            sinks: 0,
            recent: 0,
            window: None,
            capacity: None,
        }
    }
}

impl KvCacheConfig {
    /// The default with values in int8, one scale a token: half the memory of f16. Few queries multiply them by
    /// probabilities of 13 bits with a scale for 64 keys, in exact sums, whatever precision of P·V is asked for.
    pub fn int8_values() -> Self {
        Self { values: CacheValues::Int8, ..Self::default() }
    }
}

/// A vector for each head that is subtracted from its keys before they are quantized (smooth-K,
/// Zhang et al. 2024, arXiv:2410.02367); its exact effect is added back to the scores. It takes out
/// of the codes what all keys of a head share, a bias for example.
///
/// It is known before a key is quantized, and stays: no key is ever quantized twice, and codes do not
/// depend on how tokens were cut into chunks.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub enum KeySmoothing {
    /// Nothing.
    None,
    /// The mean over this many tokens, the first ones after the sinks. They wait in f32 until all
    /// of them are there.
    FirstTokens(usize),
    /// For each group of 64 tokens its own mean: they wait in f32 until the group is complete. It follows
    /// what changes with the position, as rotary embeddings make a bias do, for `D` numbers a group.
    #[default]
    Groups,
    /// Known from calibration: one vector of `D` elements for each of `H_kv` heads.
    Given(Vec<Vec<f32>>),
}

impl KeySmoothing {
    /// The mean over batch and tokens of keys `[B, H_kv, S, D]` seen in calibration. Tokens that
    /// hold NaN or infinity do not count.
    ///
    /// # Errors
    /// [`Error::Shape`] for keys that memory has no addresses for; Candle's own, unless they are of rank 4 and
    /// float.
    pub fn calibrated(keys: &Tensor) -> Result<Self> {
        let (_, _, _, depth) = keys.dims4()?;
        check_size("KeySmoothing::calibrated", "keys", keys.dims())?;
        // `[H_kv, B * S * D]`
        let heads = keys.transpose(0, 1)?.flatten_from(1)?.to_dtype(DType::F32)?.to_vec2()?;
        Ok(KeySmoothing::Given(heads.iter().map(|head| mean_of_rows(head, depth)).collect()))
    }

    /// # Errors
    /// [`Error::Mismatch`] unless given smoothing has one vector of `depth` elements for each head,
    /// [`Error::InvalidArgument`] unless all of them are finite.
    pub(super) fn check(&self, heads: usize, depth: usize) -> Result<()> {
        let KeySmoothing::Given(given) = self else { return Ok(()) };
        let fits = given.len() == heads && given.iter().all(|offset| offset.len() == depth);
        if !fits {
            let found = (given.len(), given.first().map_or(0, Vec::len));
            return Err(Error::Mismatch(format!(
                "key smoothing of {} vectors of {} elements, expected {heads} of {depth}",
                found.0, found.1
            )));
        }
        match given.iter().flatten().find(|x| !x.is_finite()) {
            Some(x) => Err(Error::InvalidArgument(format!("key smoothing {x}, expected finite"))),
            None => Ok(()),
        }
    }
}

/// How the cache stores values. The values of a token stay in f32 where one of them is NaN, infinite,
/// larger than f16 holds as a finite number, or beyond 2^95.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum CacheValues {
    /// f16: 11 bits, 2 bytes.
    #[default]
    F16,
    /// bf16: 8 bits, 2 bytes.
    Bf16,
    /// int8, symmetric, one scale a token.
    Int8,
}
