//! The report: what was measured, and how it reads in a terminal.

use crate::attended::{Attended, Target};
use crate::common::print::{decibel, scientific, table};
use crate::heads::{HeadDrift, worst_head};
use crate::stages::Stage;
use candle_int8_attention::drift::Drift;
use serde::Serialize;
use std::fmt::Write;

/// What the report is about.
#[derive(Debug, Serialize)]
pub struct Subject {
    pub text: String,
    /// Tokens used, the two special ones included.
    pub tokens: usize,
    /// Tokens beyond the model's limit, left out.
    pub tokens_cut: usize,
    /// Pieces that the model reads one by one.
    pub windows: usize,
    pub model: String,
    pub layers: usize,
    pub heads: usize,
    pub head_dim: usize,
}

/// One attention block, fp32 against int8.
#[derive(Debug, Serialize)]
pub struct Block {
    pub stages: Vec<Stage>,
    pub heads: Vec<HeadDrift>,
    pub attended: Option<Attended>,
}

/// Static word embeddings and the words they do not know.
#[derive(Debug, Serialize)]
pub struct StaticWords {
    pub source: String,
    pub words: usize,
    pub unknown: usize,
    /// Known words beyond the first 512, left out.
    pub cut: usize,
    #[serde(flatten)]
    pub block: Option<Block>,
}

/// The encoder's answer with int8 attention in every layer.
#[derive(Debug, Serialize)]
pub struct Final {
    /// The lowest cosine of any token's embedding.
    pub worst_token_cosine: f64,
    /// All token embeddings.
    pub tokens: Drift,
    /// Their mean, the embedding of the text.
    pub text: Drift,
}

/// Everything this example prints.
#[derive(Debug, Serialize)]
pub struct Report {
    #[serde(flatten)]
    pub subject: Subject,
    pub config: String,
    pub layer: usize,
    #[serde(flatten)]
    pub block: Block,
    pub encoder: Final,
    pub static_words: StaticWords,
}

impl Subject {
    /// The first lines of every report.
    pub fn render(&self) -> String {
        let mut out = String::new();
        let Self { text, tokens, model, layers, heads, head_dim, .. } = self;
        let _ =
            writeln!(out, "Text   {text}; {tokens} tokens (words, parts of words, punctuation)");
        if self.windows > 1 {
            let _ = writeln!(
                out,
                "       in {} windows, which the model reads one by one",
                self.windows
            );
        }
        if self.tokens_cut > 0 {
            let cut = self.tokens_cut;
            let _ = writeln!(
                out,
                "       The model reads no more; the last {cut} tokens are left out."
            );
        }
        let _ = writeln!(
            out,
            "Model  {model}; {layers} layers, {heads} heads each, {head_dim} numbers a head"
        );
        out
    }
}

impl Report {
    pub fn render(&self) -> String {
        let mut out = self.subject.render();
        let _ = writeln!(out, "Int8   {}", self.config);
        out.push_str(
            "\nThe same weights and the same text, once with queries and keys as f32, once as int8.\n",
        );
        self.render_stages(&mut out);
        self.render_heads(&mut out);
        self.render_attended(&mut out);
        self.render_final(&mut out);
        self.static_words.render(&mut out);
        out
    }

    fn render_stages(&self, out: &mut String) {
        let _ = write!(
            out,
            "\n## 1. Each stage of layer {} (of 0..={}), then the whole encoder\n\n\
             The layer makes a query, a key and a value of every token. A query or key becomes int8 by\n\
             dividing it by a step and rounding; the sum of products of two such rows is exact in int32,\n\
             and times both steps it is the score in f32. Softmax turns scores into probabilities, and\n\
             these weigh the values. Smoothing takes the mean off before rounding and puts it back after.\n\n\
             `step`: real size of one integer step, smallest and largest. SQNR: ratio of signal to error\n\
             against f32 in decibel; at 20 dB the error is 10 % of the signal, at 40 dB 1 %, and 6 dB\n\
             more halve it. `-`: nothing is rounded up to here, or the result is exact.\n\n",
            self.layer,
            self.subject.layers - 1
        );
        let _ = writeln!(out, "{}", stage_table(&self.block.stages));
    }

    fn render_heads(&self, out: &mut String) {
        let _ = write!(
            out,
            "\n## 2. Each head: what int8 changes in the output of layer {}'s attention\n\n\
             Cosine: 1 is the same direction. Relative L1: sum of errors over sum of values. KL: how\n\
             far the attention probabilities are apart, in nats, mean over tokens; 0 is equal.\n\
             Top-1: how many of 100 tokens attend most to the same token as in f32.\n\n",
            self.layer
        );
        let _ = writeln!(out, "{}", head_table(&self.block.heads));
    }

    fn render_attended(&self, out: &mut String) {
        let Some(attended) = &self.block.attended else { return };
        let why = match worst_head(&self.block.heads) {
            Some(worst) if worst.head == attended.head => ", the head int8 hurts most",
            _ => "",
        };
        let _ = write!(
            out,
            "\n## 3. One word: where \"{}\" (token {}) looks in head {}{why}\n\n",
            attended.word, attended.position, attended.head
        );
        let _ = writeln!(out, "{}", attended_table(attended));
    }

    fn render_final(&self, out: &mut String) {
        let Final { worst_token_cosine, tokens, text } = &self.encoder;
        let _ = write!(
            out,
            "\n## 4. The encoder's answer, with int8 attention in all {} layers\n\n\
             Embedding of the text (mean of its tokens): cosine {:.6}, SQNR {} dB.\n\
             Embeddings of the tokens: SQNR {} dB; the token that moved most has cosine {:.6}.\n",
            self.subject.layers,
            text.cosine,
            decibel(text.sqnr_db),
            decibel(tokens.sqnr_db),
            worst_token_cosine
        );
    }
}

impl StaticWords {
    fn render(&self, out: &mut String) {
        let Self { source, words, unknown, cut, .. } = self;
        let _ = write!(
            out,
            "\n## 5. The same with static word embeddings ({source})\n\n\
             Whole words, one head, and the embeddings themselves as queries, keys and values.\n\
             {words} words and signs of the text are used; {unknown} are unknown and left out.\n\
             A word that occurs again is an equal key: which of them comes first is chance, in top-1 too.\n"
        );
        if *cut > 0 {
            let _ = writeln!(
                out,
                "The last {cut} are left out as well, to keep the tables of one size."
            );
        }
        let Some(block) = &self.block else {
            out.push_str("None of them is known, so there is nothing to compare.\n");
            return;
        };
        let _ = write!(out, "\n{}\n\n{}\n", stage_table(&block.stages), head_table(&block.heads));
        if let Some(attended) = &block.attended {
            let _ = write!(
                out,
                "\nWhere \"{}\" (word {}) looks:\n\n",
                attended.word, attended.position
            );
            let _ = writeln!(out, "{}", attended_table(attended));
        }
    }
}

fn stage_table(stages: &[Stage]) -> String {
    let mut out = table(&["stage", "shape", "smallest", "largest", "step", "SQNR dB"]);
    for stage in stages {
        out.add_row([
            stage.name.clone(),
            stage.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" x "),
            number(stage.min),
            number(stage.max),
            step(stage),
            stage.sqnr_db.map_or("-".into(), decibel),
        ]);
    }
    out.to_string()
}

/// Whole numbers as they are, others with three decimals.
fn number(x: f64) -> String {
    if x.fract() == 0.0 {
        format!("{x}")
    } else if x.abs() < 0.001 {
        scientific(x)
    } else {
        format!("{x:.3}")
    }
}

fn step(stage: &Stage) -> String {
    let Some([low, high]) = stage.scale else { return String::new() };
    let scale = if low == high { format!("{low:.4}") } else { format!("{low:.4}..{high:.4}") };
    match stage.zero_point {
        Some([low, high]) => format!("{scale}\nzero at {low}..{high}"),
        None => scale,
    }
}

fn head_table(heads: &[HeadDrift]) -> String {
    let mut out =
        table(&["head", "cosine", "relative L1", "largest error", "SQNR dB", "KL", "top-1 of 100"]);
    for HeadDrift { head, output, probabilities } in heads {
        out.add_row([
            head.to_string(),
            format!("{:.6}", output.cosine),
            format!("{:.5}", output.relative_l1),
            format!("{:.5}", output.max_abs),
            decibel(output.sqnr_db),
            scientific(probabilities.mean_kl),
            format!("{:.1}", 100.0 * probabilities.top1_agreement),
        ]);
    }
    out.to_string()
}

fn attended_table(attended: &Attended) -> String {
    let mut out = table(&["rank", "in f32", "share", "in int8", "share"]);
    let cells = |t: &Target| {
        [format!("{} ({})", t.token, t.position), format!("{:.2} %", 100.0 * t.probability)]
    };
    for (rank, (fp32, int8)) in attended.fp32.iter().zip(&attended.int8).enumerate() {
        let ([a, share_a], [b, share_b]) = (cells(fp32), cells(int8));
        out.add_row([(rank + 1).to_string(), a, share_a, b, share_b]);
    }
    out.to_string()
}
