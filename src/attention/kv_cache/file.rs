//! A cache in a safetensors file, bit for bit.
//!
//! ```text
//! metadata  "int8-kv-cache"    JSON: configuration, dims, lengths
//! tensors   "<b>.keys"         I8   [H_kv, T, D]     T tokens in pages, from token `first` on
//!           "<b>.key_scales"   F32  [H_kv, T]
//!           "<b>.values"       F16, BF16 or I8 [H_kv, T, Dv]
//!           "<b>.value_scales" F32  [H_kv, T]        of int8 values only
//!           "<b>.sinks.keys"   F32  [H_kv, S, D]     and values, for tokens kept in f32
//!           "<b>.recent.keys"  F32  [H_kv, R, D]     and values
//!           "<b>.last.keys"    F32  [H_kv, L, D]     and values, of the last group in pages
//!           "<b>.offset"       F32  [H_kv, D]        of all keys, once it is known
//!           "<b>.offsets"      F32  [H_kv, G, D]     of the groups in pages, where each has its own
//!           "<b>.outliers"     F32  [E, D]           keys that stand out of their group,
//!           "<b>.outliers_at"  U32  [E, 2]           with their heads and tokens
//!           "<b>.exceptions"   F32  [E, Dv]          values that their format cannot hold,
//!           "<b>.exceptions_at" U32 [E, 2]           with their heads and tokens
//!           "key_smoothing"       F32  [H_kv, D]        if the configuration gives one
//! ```

use super::config::{CacheValues, KeySmoothing, KvCacheConfig};
use super::head::{Dims, Head};
use super::stored::Stored;
use super::{Int8KvCache, Sequence};
use crate::cpu::Level;
use crate::files;
use crate::product;
use crate::{Error, Result};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;

/// The key of the metadata, and what says that a file is a cache.
const KEY: &str = "int8-kv-cache";

/// Of this version of the format.
const VERSION: u32 = 1;

/// Tokens in f32, by what keeps them.
const ROWS: [&str; 3] = ["sinks", "recent", "last"];

/// More heads than any model has: a number beyond is a damaged file.
const MAX_HEADS: usize = 1 << 16;

/// Likewise, elements of a value.
const MAX_VALUE_DIM: usize = 1 << 20;

/// Likewise, tokens of a sequence: their numbers fit into 32 bits, on all targets.
const MAX_TOKENS: usize = u32::MAX as usize;

/// The same where a token has no bytes in the file that would bear it out.
const MAX_TOKENS_WITHOUT_BYTES: usize = 1 << 20;

/// What is not in the tensors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    version: u32,
    key_smoothing: SmoothingKind,
    rotate: bool,
    outliers: bool,
    values: CacheValues,
    sinks: usize,
    recent: usize,
    window: Option<usize>,
    capacity: Option<usize>,
    /// `[B, H_kv, D, Dv]`, unless nothing was ever appended.
    dims: Option<[usize; 4]>,
    sequences: Vec<SequenceHeader>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum SmoothingKind {
    None,
    FirstTokens(usize),
    Groups,
    Given,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SequenceHeader {
    len: usize,
    /// The first token in pages.
    first: usize,
    /// The first token after the pages.
    packed: usize,
}

impl Int8KvCache {
    /// Writes a safetensors file that holds everything, bit for bit: configuration, codes, scales
    /// and what is kept in f32. It does not depend on the machine's kernels.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written; what was there before is still there then.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        files::write(path.as_ref(), &self.to_bytes()?)
    }

    /// Reads what [`Int8KvCache::save`] wrote.
    ///
    /// # Errors
    /// [`Error::MissingFile`] or [`Error::Io`] if the file cannot be read, [`Error::Corrupt`] if it
    /// is not such a file, [`Error::Level`] for a forced level that cannot be used.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = files::read("key and value cache", path)?;
        Reader::cache(&bytes, Level::active()?).map_err(|problem| files::corrupt(path, problem))
    }

    fn header(&self) -> Header {
        let config = &self.config;
        let of_sequence = |sequence: &Sequence| {
            let packed = sequence.heads.first().map_or(0, |head| head.packed);
            let first = sequence.heads.first().map_or(0, Head::kept_from).min(packed);
            SequenceHeader { len: sequence.len, first, packed }
        };
        Header {
            version: VERSION,
            key_smoothing: match config.key_smoothing {
                KeySmoothing::None => SmoothingKind::None,
                KeySmoothing::FirstTokens(tokens) => SmoothingKind::FirstTokens(tokens),
                KeySmoothing::Groups => SmoothingKind::Groups,
                KeySmoothing::Given(_) => SmoothingKind::Given,
            },
            rotate: config.rotate,
            outliers: config.outliers,
            values: config.values,
            sinks: config.sinks,
            recent: config.recent,
            window: config.window,
            capacity: config.capacity,
            dims: self
                .shape
                .map(|(heads, dims)| [self.sequences.len(), heads, dims.depth, dims.value_dim]),
            sequences: self.sequences.iter().map(of_sequence).collect(),
        }
    }

    fn to_bytes(&self) -> Result<Vec<u8>> {
        let header = self.header();
        let mut writer = Writer::default();
        if let KeySmoothing::Given(vectors) = &self.config.key_smoothing {
            let depth = vectors.first().map_or(0, Vec::len);
            writer.f32("key_smoothing", &[vectors.len(), depth], vectors.concat());
        }
        for (b, (sequence, place)) in self.sequences.iter().zip(&header.sequences).enumerate() {
            let stored = sequence.heads.iter().map(|head| Stored::of(head, place.first));
            writer.sequence(b, &stored.collect::<Vec<_>>(), self.config.values);
        }
        let refused = |e: &dyn std::fmt::Display| Error::Unsupported(format!("safetensors: {e}"));
        let json = serde_json::to_string(&header).map_err(|e| refused(&e))?;
        let views: Vec<(String, TensorView<'_>)> = (writer.tensors.iter())
            .map(|(name, dtype, shape, bytes)| {
                Ok((name.clone(), TensorView::new(*dtype, shape.clone(), bytes)?))
            })
            .collect::<std::result::Result<_, safetensors::SafeTensorError>>()
            .map_err(|e| refused(&e))?;
        let metadata = HashMap::from([(KEY.to_string(), json)]);
        safetensors::serialize(views, Some(metadata)).map_err(|e| refused(&e))
    }
}

impl CacheValues {
    fn dtype(self) -> Dtype {
        match self {
            CacheValues::F16 => Dtype::F16,
            CacheValues::Bf16 => Dtype::BF16,
            CacheValues::Int8 => Dtype::I8,
        }
    }
}

/// Tensors on their way into a file: name, dtype, shape, bytes.
#[derive(Default)]
struct Writer {
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
}

impl Writer {
    fn bytes(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) {
        self.tensors.push((name.to_string(), dtype, shape.to_vec(), bytes));
    }

    fn f32(&mut self, name: &str, shape: &[usize], numbers: Vec<f32>) {
        let bytes = numbers.into_iter().flat_map(f32::to_le_bytes).collect();
        self.bytes(name, Dtype::F32, shape, bytes);
    }

    fn sequence(&mut self, b: usize, heads: &[Stored], format: CacheValues) {
        let Some(Stored { dims, tokens, .. }) = heads.first() else { return };
        let (h, tokens, Dims { depth, value_dim }) = (heads.len(), *tokens, *dims);
        let name = |of: &str| format!("{b}.{of}");
        let codes = heads.iter().flat_map(|head| &head.keys).map(|&code| code as u8).collect();
        self.bytes(&name("keys"), Dtype::I8, &[h, tokens, depth], codes);
        let scales = heads.iter().flat_map(|head| head.key_scales.iter().copied()).collect();
        self.f32(&name("key_scales"), &[h, tokens], scales);
        let values = heads.iter().flat_map(|head| head.values.bytes.iter().copied()).collect();
        self.bytes(&name("values"), format.dtype(), &[h, tokens, value_dim], values);
        if format == CacheValues::Int8 {
            let scales = heads.iter().flat_map(|head| head.values.scales.iter().copied());
            self.f32(&name("value_scales"), &[h, tokens], scales.collect());
        }
        for (index, which) in ROWS.into_iter().enumerate() {
            let rows: Vec<_> = heads.iter().map(|head| &head.rows[index]).collect();
            let keys = rows.iter().flat_map(|rows| rows.keys.iter().copied()).collect();
            let values = rows.iter().flat_map(|rows| rows.values.iter().copied()).collect();
            let tokens = rows[0].tokens;
            self.f32(&name(&format!("{which}.keys")), &[h, tokens, depth], keys);
            self.f32(&name(&format!("{which}.values")), &[h, tokens, value_dim], values);
        }
        let offsets: Option<Vec<Vec<f32>>> = heads.iter().map(|head| head.offset.clone()).collect();
        if let Some(offsets) = offsets {
            self.f32(&name("offset"), &[h, depth], offsets.concat());
        }
        let offsets: Vec<f32> = heads.iter().flat_map(|head| &head.offsets).copied().collect();
        if !offsets.is_empty() {
            let groups = offsets.len() / (h * depth);
            self.f32(&name("offsets"), &[h, groups, depth], offsets);
        }
        self.rows_apart(&name("exceptions"), value_dim, heads, |head| &head.exceptions);
        self.rows_apart(&name("outliers"), depth, heads, |head| &head.outliers);
    }

    /// Rows of some tokens, and whose they are.
    fn rows_apart(
        &mut self,
        name: &str,
        width: usize,
        heads: &[Stored],
        of: impl Fn(&Stored) -> &Vec<(usize, Vec<f32>)>,
    ) {
        let found = |(head, stored)| {
            let at = move |(token, _): &(usize, _)| [head as u32, *token as u32];
            of(stored).iter().map(at).collect::<Vec<_>>()
        };
        let at: Vec<[u32; 2]> = heads.iter().enumerate().flat_map(found).collect();
        if !at.is_empty() {
            let bytes = at.iter().flatten().flat_map(|x| x.to_le_bytes()).collect();
            self.bytes(&format!("{name}_at"), Dtype::U32, &[at.len(), 2], bytes);
            let rows = heads.iter().flat_map(of);
            let rows = rows.flat_map(|(_, row)| row.iter().copied()).collect();
            self.f32(name, &[at.len(), width], rows);
        }
    }
}

/// A file that is read. Problems are sentences without the path.
struct Reader<'a> {
    tensors: SafeTensors<'a>,
    /// The names of tensors that were asked for, and are there.
    known: RefCell<HashSet<String>>,
}

type Checked<T> = std::result::Result<T, String>;

impl<'a> Reader<'a> {
    fn cache(bytes: &'a [u8], level: Level) -> Checked<Int8KvCache> {
        let text = |e: safetensors::SafeTensorError| e.to_string();
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(text)?;
        let json = (metadata.metadata().as_ref().and_then(|all| all.get(KEY)))
            .ok_or_else(|| format!("no {KEY:?} in the metadata: not a saved cache"))?;
        let header: Header = serde_json::from_str(json).map_err(|e| e.to_string())?;
        if header.version != VERSION {
            return Err(format!("format version {}, expected {VERSION}", header.version));
        }
        let tensors = SafeTensors::deserialize(bytes).map_err(text)?;
        let reader = Self { tensors, known: RefCell::default() };
        let key_smoothing = match header.key_smoothing {
            SmoothingKind::None => KeySmoothing::None,
            SmoothingKind::FirstTokens(tokens) => KeySmoothing::FirstTokens(tokens),
            SmoothingKind::Groups => KeySmoothing::Groups,
            SmoothingKind::Given => KeySmoothing::Given(reader.key_smoothing()?),
        };
        let Header { rotate, outliers, values, sinks, recent, window, capacity, .. } = header;
        let config = KvCacheConfig {
            key_smoothing,
            rotate,
            outliers,
            values,
            sinks,
            recent,
            window,
            capacity,
        };
        let Some([batch, heads, depth, value_dim]) = header.dims else {
            if !header.sequences.is_empty() {
                return Err(format!("{} sequences without dims", header.sequences.len()));
            }
            reader.check_names()?;
            return Ok(Int8KvCache::new(config));
        };
        let limit = product::max_depth(false);
        if depth > limit || value_dim > MAX_VALUE_DIM {
            return Err(format!(
                "keys of {depth} elements and values of {value_dim}, expected at most {limit} and \
                 {MAX_VALUE_DIM}"
            ));
        }
        if header.sequences.len() != batch || heads > MAX_HEADS {
            let found = header.sequences.len();
            return Err(format!("{found} sequences of {heads} heads for a batch of {batch}"));
        }
        config.key_smoothing.check(heads, depth).map_err(|e| e.to_string())?;
        let dims = Dims { depth, value_dim };
        let mut sequences = Vec::new();
        for (b, place) in header.sequences.iter().enumerate() {
            let stored = reader.sequence(b, place, heads, dims, &config)?;
            let restore =
                |(h, stored)| Head::new(&config, h, dims, level).restored(place.first, stored);
            let heads = stored.into_iter().enumerate().map(restore).collect();
            sequences.push(Sequence { heads, len: place.len });
        }
        reader.check_names()?;
        Ok(Int8KvCache { config, shape: Some((heads, dims)), sequences })
    }

    /// Refuses a tensor that nothing asked for: it may be one that is not there, under a damaged
    /// name.
    fn check_names(&self) -> Checked<()> {
        let known = self.known.borrow();
        match self.tensors.names().into_iter().find(|name| !known.contains(*name)) {
            Some(name) => Err(format!("a tensor {name:?}, which no cache has")),
            None => Ok(()),
        }
    }

    /// The bytes of a tensor that has this dtype and shape.
    fn bytes(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Checked<&'a [u8]> {
        let tensor = self.tensors.tensor(name).map_err(|e| e.to_string())?;
        self.known.borrow_mut().insert(name.to_string());
        if tensor.dtype() != dtype || tensor.shape() != shape {
            let found = (tensor.dtype(), tensor.shape());
            return Err(format!("tensor {name:?} is {found:?}, expected {:?}", (dtype, shape)));
        }
        Ok(tensor.data())
    }

    fn f32(&self, name: &str, shape: &[usize]) -> Checked<Vec<f32>> {
        let bytes = self.bytes(name, Dtype::F32, shape)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect())
    }

    /// The shape of a tensor, if it is there.
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.tensor(name).ok().map(|tensor| tensor.shape().to_vec())
    }

    fn key_smoothing(&self) -> Checked<Vec<Vec<f32>>> {
        let shape = self.shape("key_smoothing").ok_or("no tensor \"key_smoothing\"")?;
        let all = self.f32("key_smoothing", &shape)?;
        // Vectors without elements take no bytes that would bound their number.
        let &[heads @ ..=MAX_HEADS, depth] = shape.as_slice() else {
            return Err(format!("key smoothing of shape {shape:?}, expected [H_kv, D]"));
        };
        Ok((0..heads).map(|head| all[head * depth..][..depth].to_vec()).collect())
    }

    /// The heads of a sequence.
    fn sequence(
        &self,
        b: usize,
        place: &SequenceHeader,
        heads: usize,
        dims: Dims,
        config: &KvCacheConfig,
    ) -> Checked<Vec<Stored>> {
        let &SequenceHeader { len, first, packed } = place;
        let Dims { depth, value_dim } = dims;
        let wrong = |what| Err(format!("sequence {b}: {len} tokens{what}"));
        let limit = match heads * (depth + value_dim) {
            0 => MAX_TOKENS_WITHOUT_BYTES,
            _ => MAX_TOKENS,
        };
        if len > limit.min(config.capacity.unwrap_or(limit)) {
            return wrong(", expected fewer".to_string());
        }
        if heads == 0 {
            return match (first, packed) {
                (0, 0) => Ok(Vec::new()),
                _ => wrong(format!(" with {first}..{packed} in pages of no head")),
            };
        }
        if !Stored::fits(len, first..packed, config) {
            return wrong(format!(" with {first}..{packed} in pages"));
        }
        let tokens = packed - first;
        let name = |of: &str| format!("{b}.{of}");
        let format = config.values;
        let mut all: Vec<Stored> = (0..heads).map(|_| Stored::empty(dims, tokens)).collect();

        let keys = self.bytes(&name("keys"), Dtype::I8, &[heads, tokens, depth])?;
        let scales = self.f32(&name("key_scales"), &[heads, tokens])?;
        let values = self.bytes(&name("values"), format.dtype(), &[heads, tokens, value_dim])?;
        for (h, head) in all.iter_mut().enumerate() {
            head.keys = part(keys, heads, h).iter().map(|&code| code as i8).collect();
            head.key_scales = part(&scales, heads, h).to_vec();
            head.values.bytes = part(values, heads, h).to_vec();
        }
        if format == CacheValues::Int8 {
            let scales = self.f32(&name("value_scales"), &[heads, tokens])?;
            all.iter_mut().enumerate().for_each(|(h, head)| {
                head.values.scales = part(&scales, heads, h).to_vec();
            });
        }
        let last = self.shape(&name("last.keys")).and_then(|shape| shape.get(1).copied());
        let kept = [len.min(config.sinks), len.saturating_sub(packed), last.unwrap_or(0)];
        for ((index, which), tokens) in ROWS.into_iter().enumerate().zip(kept) {
            let keys = self.f32(&name(&format!("{which}.keys")), &[heads, tokens, depth])?;
            let shape = [heads, tokens, value_dim];
            let values = self.f32(&name(&format!("{which}.values")), &shape)?;
            for (h, head) in all.iter_mut().enumerate() {
                let rows = &mut head.rows[index];
                rows.keys = part(&keys, heads, h).to_vec();
                rows.values = part(&values, heads, h).to_vec();
                rows.tokens = tokens;
            }
        }
        if self.shape(&name("offset")).is_some() {
            let offsets = self.f32(&name("offset"), &[heads, depth])?;
            all.iter_mut().enumerate().for_each(|(h, head)| {
                head.offset = Some(part(&offsets, heads, h).to_vec());
            });
        }
        if config.key_smoothing == KeySmoothing::Groups && tokens > 0 && depth > 0 {
            let groups = Stored::groups(first..packed).len();
            let offsets = self.f32(&name("offsets"), &[heads, groups, depth])?;
            all.iter_mut().enumerate().for_each(|(h, head)| {
                head.offsets = part(&offsets, heads, h).to_vec();
            });
        }
        let pages = first..packed;
        for (head, token, row) in self.rows_apart(&name("exceptions"), value_dim, heads, &pages)? {
            all[head].exceptions.push((token, row));
        }
        for (head, token, row) in self.rows_apart(&name("outliers"), depth, heads, &pages)? {
            all[head].outliers.push((token, row));
        }
        for (h, head) in all.iter().enumerate() {
            head.check(h, first, config)
                .map_err(|problem| format!("sequence {b}, head {h}: {problem}"))?;
        }
        Ok(all)
    }

    /// Rows of some tokens in pages: head, token, row of each.
    fn rows_apart(
        &self,
        name: &str,
        width: usize,
        heads: usize,
        tokens: &Range<usize>,
    ) -> Checked<Vec<(usize, usize, Vec<f32>)>> {
        let at_name = format!("{name}_at");
        let Some(shape) = self.shape(&at_name) else { return Ok(Vec::new()) };
        let count = shape.first().copied().unwrap_or(0);
        let at = self.bytes(&at_name, Dtype::U32, &[count, 2])?;
        let rows = self.f32(name, &[count, width])?;
        let numbers = at.as_chunks::<4>().0.iter().map(|x| u32::from_le_bytes(*x) as usize);
        let numbers: Vec<usize> = numbers.collect();
        let rows = numbers.chunks_exact(2).zip(rows.chunks_exact(width.max(1)));
        rows.map(|(at, row)| match (at[0], at[1]) {
            (head, token) if head >= heads || !tokens.contains(&token) => {
                Err(format!("{at_name} names head {head}, token {token}"))
            }
            (head, token) => Ok((head, token, row.to_vec())),
        })
        .collect()
    }
}

/// The part of head `h` in a tensor `[heads, ..]`.
fn part<T>(all: &[T], heads: usize, h: usize) -> &[T] {
    let len = all.len() / heads;
    &all[h * len..(h + 1) * len]
}
