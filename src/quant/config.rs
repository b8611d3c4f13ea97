//! The choices of a quantization: granularity, source of the range, and with the scheme all of them.

use super::{QuantParams, Scheme};
use crate::{Error, Result};

/// What shares one scale (and zero point), for a tensor `[.., S, D]` of `S` tokens.
///
/// Each `[S, D]` matrix at the end of the shape is called a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Granularity {
    /// The whole tensor.
    PerTensor,
    /// Each `[S, D]` matrix.
    PerHead,
    /// Each row of `D` elements.
    #[default]
    PerToken,
    /// Each run of this many rows of a head; the last run of a head may be shorter.
    PerBlock(usize),
}

impl Granularity {
    /// How many groups a tensor of `heads` matrices with `tokens` rows each has.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a block of 0 tokens, and more groups than can be counted.
    pub fn groups(self, heads: usize, tokens: usize) -> Result<usize> {
        let in_head = match self {
            Granularity::PerTensor => return Ok(usize::from(heads > 0 && tokens > 0)),
            Granularity::PerHead => usize::from(tokens > 0),
            Granularity::PerToken => tokens,
            Granularity::PerBlock(0) => {
                let problem = "a block of 0 tokens; per-block needs at least 1";
                return Err(Error::InvalidArgument(problem.into()));
            }
            Granularity::PerBlock(n) => tokens.div_ceil(n),
        };
        heads.checked_mul(in_head).ok_or_else(|| {
            Error::InvalidArgument(format!("{heads} heads of {in_head} groups, which overflows"))
        })
    }

    /// The group of row `token` in matrix `head`.
    pub(crate) fn group(self, head: usize, token: usize, tokens: usize) -> usize {
        match self {
            Granularity::PerTensor => 0,
            Granularity::PerHead => head,
            Granularity::PerToken => head * tokens + token,
            Granularity::PerBlock(n) => head * tokens.div_ceil(n) + token / n,
        }
    }
}

impl std::str::FromStr for Granularity {
    type Err = Error;

    /// `tensor`, `head`, `token` or `block:N`, each with or without `per-` in front.
    fn from_str(text: &str) -> Result<Self> {
        let name = text.strip_prefix("per-").unwrap_or(text);
        let unknown = || {
            Error::InvalidArgument(format!(
                "granularity {text:?}, expected tensor, head, token or block:N (N >= 1)"
            ))
        };
        match name {
            "tensor" => Ok(Granularity::PerTensor),
            "head" => Ok(Granularity::PerHead),
            "token" => Ok(Granularity::PerToken),
            _ => match name.strip_prefix("block:").and_then(|n| n.parse().ok()) {
                Some(n) if n > 0 => Ok(Granularity::PerBlock(n)),
                _ => Err(unknown()),
            },
        }
    }
}

impl std::fmt::Display for Granularity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Granularity::PerTensor => f.write_str("per-tensor"),
            Granularity::PerHead => f.write_str("per-head"),
            Granularity::PerToken => f.write_str("per-token"),
            Granularity::PerBlock(n) => write!(f, "per-block:{n}"),
        }
    }
}

/// Where the range of a group comes from.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub enum RangeSource {
    /// From the data of this very call ("dynamic quantization").
    #[default]
    Dynamic,
    /// Given, one entry a group in row-major order of the groups ("static quantization"). With
    /// [`Granularity::PerHead`], as many entries as heads of one batch element also fit: they are
    /// shared by the whole batch. Data outside the range saturates.
    Static(Vec<QuantParams>),
}

impl RangeSource {
    /// # Errors
    /// [`Error::Contradiction`] for given parameters of another scheme.
    pub(crate) fn check(&self, scheme: Scheme) -> Result<()> {
        let Self::Static(given) = self else { return Ok(()) };
        match given.iter().map(QuantParams::scheme).find(|found| *found != scheme) {
            None => Ok(()),
            Some(found) => Err(Error::Contradiction(format!(
                "static parameters are {found}, but the scheme is {scheme}"
            ))),
        }
    }
}

/// How one tensor is quantized.
///
/// More fields may be added: end an expression in `..QuantConfig::default()`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct QuantConfig {
    /// Symmetric or affine.
    pub scheme: Scheme,
    /// What shares one scale.
    pub granularity: Granularity,
    /// Dynamic or static range.
    pub range: RangeSource,
}

impl QuantConfig {
    /// The number of groups of a tensor of this shape, `[.., S, D]`, and their parameters where they are given.
    ///
    /// # Errors
    /// Those of [`Granularity::groups`]; [`Error::Contradiction`] for parameters of another scheme,
    /// [`Error::Mismatch`] for another number of them.
    pub(crate) fn groups(&self, shape: &[usize]) -> Result<(usize, Option<Vec<QuantParams>>)> {
        let [heads @ .., tokens, _] = shape else { return Ok((0, None)) };
        let groups = self.granularity.groups(heads.iter().product(), *tokens)?;
        self.range.check(self.scheme)?;
        let RangeSource::Static(given) = &self.range else { return Ok((groups, None)) };
        Ok((groups, Some(static_params(given, self.granularity, shape, groups)?)))
    }
}

/// Given parameters, one a group; those of one batch element are repeated for the others.
pub(super) fn static_params(
    given: &[QuantParams],
    granularity: Granularity,
    shape: &[usize],
    groups: usize,
) -> Result<Vec<QuantParams>> {
    if let Some(other) = given.iter().find(|p| p.scheme() != given[0].scheme()) {
        return Err(Error::Contradiction(format!(
            "static parameters of two schemes, {} and {}; expected one",
            given[0].scheme(),
            other.scheme()
        )));
    }
    if given.len() == groups {
        return Ok(given.to_vec());
    }
    let per_batch = granularity == Granularity::PerHead && shape.len() == 4 && !given.is_empty();
    if per_batch && given.len() == shape[1] {
        return Ok(given.iter().copied().cycle().take(groups).collect());
    }
    Err(Error::Mismatch(format!(
        "{} static parameters for {groups} groups ({granularity}, shape {shape:?})",
        given.len()
    )))
}
