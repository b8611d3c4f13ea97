//! What one configuration changes in one call of attention.

use super::call::{Dims, Ran, Reference, Rounded, Stages};
use super::state::{HeadStages, HeadState};
use crate::attention::{Int8Config, PvPrecision};
use crate::drift::{Candidate, ErrorSums};
use crate::{Error, Result};
use rayon::prelude::*;

/// The fp32 run of a layer that configurations are compared with.
pub(super) struct Compared<'a> {
    pub reference: &'a Reference,
    pub fp32: &'a Ran,
}

/// Which of the two comparisons a run belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Input {
    /// fp32 input to both paths.
    Same,
    /// Each path on its own input.
    Own,
}

impl Compared<'_> {
    /// Adds a run of the layer by a candidate to the heads, and gives the KL divergence of every query,
    /// `[head][query]`.
    pub fn add(
        &self,
        heads: &mut [HeadState],
        input: Input,
        ran: &Ran,
        candidate: &Candidate,
    ) -> Result<(Vec<Vec<f64>>, Stages)> {
        let (dims, expected) = (ran.call.dims()?, self.reference.dims);
        if dims != expected {
            return Err(Error::Mismatch(format!(
                "a layer called attention with {dims:?}, expected {expected:?} as in fp32"
            )));
        }
        let stages = Stages::of(&ran.call, candidate)?;
        let rows = heads.par_iter_mut().enumerate().map(|(head, state)| {
            let into = match input {
                Input::Same => &mut state.alone,
                Input::Own => &mut state.accumulated,
            };
            self.add_head(into, head, &stages, &ran.output)
        });
        let rows = rows.collect::<Result<_>>()?;
        if input == Input::Same {
            self.count_clipped(heads, &stages);
        }
        Ok((rows, stages))
    }

    fn add_head(
        &self,
        into: &mut HeadStages,
        head: usize,
        stages: &Stages,
        output: &[f32],
    ) -> Result<Vec<f64>> {
        let Dims { queries, keys, depth, value_dim, .. } = self.reference.dims;
        let key_head = self.reference.dims.key_head(head);
        let part = |all: &[f32], head: usize, size: usize| all[head * size..][..size].to_vec();
        let compare = |a: &[f32], b: &[f32], head: usize, size: usize| {
            ErrorSums::of(&a[head * size..][..size], &b[head * size..][..size])
        };
        into.q.push(&compare(&self.reference.q, &stages.q.values, head, queries * depth)?);
        into.k.push(&compare(&self.reference.k, &stages.k.values, key_head, keys * depth)?);

        let size = queries * keys;
        let matrix = head * size..(head + 1) * size;
        let p = &self.reference.probabilities[matrix.clone()];
        // A key that a query does not see has a score all the same; it changes nothing.
        let seen = p.iter().zip(&self.reference.scores[matrix.clone()]);
        let seen = seen.zip(&stages.scores[matrix.clone()]).filter(|((p, _), _)| **p > 0.0);
        let mut scores = ErrorSums::default();
        scores.push_pairs(seen.map(|((_, &a), &b)| (a, b)));
        into.scores.push(&scores);

        let size = queries * value_dim;
        let (a, b) = (part(&self.fp32.output, head, size), part(output, head, size));
        into.push_output(&a, &b, value_dim)?;
        let entropies = &self.reference.entropies[head * queries..][..queries];
        into.probabilities.push(p, entropies, &stages.probabilities[matrix])
    }

    fn count_clipped(&self, heads: &mut [HeadState], stages: &Stages) {
        let Dims { queries, keys, depth, .. } = self.reference.dims;
        for (head, state) in heads.iter_mut().enumerate() {
            state.q_clipped.clipped += stages.q.clipped.get(head).copied().unwrap_or(0);
            state.q_clipped.codes += (queries * depth) as u64;
            let key_head = self.reference.dims.key_head(head);
            state.k_clipped.clipped += stages.k.clipped.get(key_head).copied().unwrap_or(0);
            state.k_clipped.codes += (keys * depth) as u64;
        }
    }

    /// Adds what each source of error alone does to the attention output: queries as their codes
    /// have them with exact keys, the reverse, the step through int8 scores, and P·V.
    pub fn add_sources(
        &self,
        heads: &mut [HeadState],
        stages: &Stages,
        candidate: &Candidate,
    ) -> Result<()> {
        let call = &self.fp32.call;
        let exact = &self.fp32.output;
        let rounded = |q: &Rounded| q.tensor();
        let (q, k) = (rounded(&stages.q)?, rounded(&stages.k)?);
        let only_q = call.output_of(&q, &call.k, None)?;
        let only_k = call.output_of(&call.q, &k, None)?;
        let straight = |pv| {
            let config = Int8Config { pv, ..candidate.config.clone() };
            call.output_of(&call.q, &call.k, Some(&Candidate::new("", config)))
        };
        let in_f32 = if candidate.in_bf16 {
            call.output_of(&q, &k, None)?
        } else {
            straight(PvPrecision::F32)?
        };
        let requantized = match &candidate.requant {
            Some(_) => Some(call.output_of(&call.q, &call.k, Some(candidate))?),
            None => None,
        };
        // Requantized scores leave the fused op, and P·V is f32 there.
        let in_pv = match (candidate.config.pv, &requantized) {
            _ if candidate.in_bf16 => Some(call.output_of(&call.q, &call.k, Some(candidate))?),
            (PvPrecision::F32, _) | (_, Some(_)) => None,
            (pv, None) => Some(straight(pv)?),
        };
        let size = self.reference.dims.queries * self.reference.dims.value_dim;
        let energy = |a: &[f32], b: &[f32], head: usize| {
            let sums = ErrorSums::of(&a[head * size..][..size], &b[head * size..][..size]);
            Ok::<f64, Error>(sums?.error_energy())
        };
        for (head, state) in heads.iter_mut().enumerate() {
            let sources = &mut state.sources;
            sources.q.add(energy(exact, &only_q, head)?);
            sources.k.add(energy(exact, &only_k, head)?);
            let of = |other: &Option<Vec<f32>>| {
                other.as_ref().map_or(Ok(0.0), |other| energy(&in_f32, other, head))
            };
            sources.requantization.add(of(&requantized)?);
            sources.pv.add(of(&in_pv)?);
        }
        Ok(())
    }
}
