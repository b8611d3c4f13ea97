//! What holds for everything that a recorder gathered, checked when it comes from a file: the parts
//! of a report are of one size, and each was measured in every passage.

use super::Recorder;
use super::state::{CandidateState, HeadStages, HeadState, Probabilities, Stage};
use super::words::{KEPT, MovedWord, Worst};
use crate::drift::sums::LARGEST_COUNT;
use crate::drift::{ErrorSums, Summary};

type Checked = Result<(), String>;

impl Recorder {
    /// # Errors
    /// A sentence on the first thing that cannot be.
    pub(super) fn check(&self) -> Checked {
        let Self { passages, tokens, shapes, .. } = self;
        if self.candidates.is_empty() {
            return Err("no configuration was measured".into());
        }
        if [passages, tokens].into_iter().any(|count| *count > LARGEST_COUNT) {
            return Err(format!("{passages} passages of {tokens} tokens"));
        }
        // A gate over no layer would hold whatever it asks for.
        if (*passages == 0) != shapes.is_empty() || (*passages == 0 && *tokens > 0) {
            let layers = shapes.len();
            return Err(format!("{passages} passages of {tokens} tokens in {layers} layers"));
        }
        if let Some(layer) = shapes.iter().position(Vec::is_empty) {
            return Err(format!("layer {layer} has no head"));
        }
        for state in &self.candidates {
            self.check_candidate(state)
                .map_err(|problem| format!("{:?}: {problem}", state.name))?;
        }
        for shape in shapes.iter().flatten() {
            shape.check()?;
        }
        if let Some(linear) = &self.linear {
            linear.check(*passages, shapes.len())?;
        }
        self.check_worst()?;
        self.subject.check()
    }

    fn check_candidate(&self, state: &CandidateState) -> Checked {
        let heads: Vec<usize> = state.layers.iter().map(|layer| layer.heads.len()).collect();
        let expected: Vec<usize> = self.shapes.iter().map(Vec::len).collect();
        if heads != expected {
            return Err(format!("layers with {heads:?} heads, expected {expected:?}"));
        }
        let passages = self.passages;
        for layer in &state.layers {
            check_stage(&layer.alone, passages)?;
            check_stage(&layer.accumulated, passages)?;
            for HeadState { alone, accumulated, q_clipped, k_clipped, .. } in &layer.heads {
                check_stages(alone, passages)?;
                check_stages(accumulated, passages)?;
                for clipped in [q_clipped, k_clipped] {
                    if clipped.clipped > clipped.codes || clipped.codes > LARGEST_COUNT {
                        return Err(format!("{} of {} codes", clipped.clipped, clipped.codes));
                    }
                }
            }
        }
        check_stage(&state.embedding, passages)
    }

    fn check_worst(&self) -> Checked {
        let Worst { words, sentences } = &self.worst;
        if words.len() > KEPT || sentences.len() > KEPT {
            return Err(format!("{} words and {} sentences", words.len(), sentences.len()));
        }
        let known = |word: &MovedWord| {
            self.shapes.get(word.layer).is_some_and(|heads| word.head < heads.len())
        };
        let all = words.iter().chain(sentences.iter().map(|sentence| &sentence.worst));
        match all.into_iter().find(|word| !known(word)) {
            Some(word) => Err(format!("a word in head {} of layer {}", word.head, word.layer)),
            None => Ok(()),
        }
    }
}

/// A stage has one value a passage.
fn check_stage(stage: &Stage, passages: u64) -> Checked {
    let Stage { pooled, sqnr_db, cosine_loss } = stage;
    ErrorSums::check(pooled)?;
    for summary in [sqnr_db, cosine_loss] {
        summary.check()?;
        if summary.count() != passages {
            return Err(format!("{} values of {passages} passages", summary.count()));
        }
    }
    Ok(())
}

fn check_stages(stages: &HeadStages, passages: u64) -> Checked {
    let HeadStages { q, k, scores, probabilities, output, .. } = stages;
    [q, k, scores, output].into_iter().try_for_each(|stage| check_stage(stage, passages))?;
    // Distributions were checked when they were read.
    let Probabilities { kl, total_variation, top1, top5, entropy_change } = probabilities;
    for summary in [total_variation, top1, top5, entropy_change] {
        summary.check()?;
        let (found, expected) = (summary.count(), Summary::count(kl.summary()));
        if found != expected {
            return Err(format!("{found} and {expected} values of the same queries"));
        }
    }
    Ok(())
}
