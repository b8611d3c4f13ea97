//! A text word by word, as the tokenizers of encoders split it anyway.

/// The words of a text, long ones in parts, each with whether a word starts there.
pub fn parts(text: &str) -> Vec<(&str, bool)> {
    let of_word = |word| split_long(word).into_iter().enumerate().map(|(i, part)| (part, i == 0));
    text.split_whitespace().flat_map(of_word).collect()
}

/// What a tokenizer is given for a part. The space before a word is a part of its first token in
/// byte-level ones (RoBERTa's, ModernBERT's); the others pass over it.
pub fn spaced(part: &str, starts: bool) -> String {
    if starts { format!(" {part}") } else { part.to_string() }
}

/// Whether this is what a tokenizer writes for a word that it cannot spell.
pub fn is_unknown(token: &str) -> bool {
    ["[UNK]", "<unk>"].contains(&token)
}

/// The letters of a token, without the mark of a word that goes on (`##`) or begins.
pub fn bare(token: &str) -> &str {
    let marks = ["##", "\u{120}", "\u{2581}"];
    marks.iter().find_map(|mark| token.strip_prefix(mark)).unwrap_or(token)
}

/// A word as it is, or, if it is long, in parts that are not, cut where BERT's tokenizer splits
/// anyway: beside a sign, and beside a letter of a script without case, which may be a word of its
/// own. What has no such place stays whole.
fn split_long(word: &str) -> Vec<&str> {
    const LONG: usize = 200;
    let is_apart = |c: char| !c.is_alphanumeric() || !(c.is_ascii() || c.is_lowercase());
    let (mut parts, mut start, mut before) = (Vec::new(), 0, None);
    for (at, c) in word.char_indices() {
        let may_cut = before.is_some_and(is_apart) || is_apart(c);
        if at - start >= LONG && may_cut {
            parts.push(&word[start..at]);
            start = at;
        }
        before = Some(c);
    }
    parts.push(&word[start..]);
    parts
}

#[cfg(test)]
mod tests {
    use super::{bare, parts, spaced, split_long};

    #[test]
    fn a_text_is_its_parts_with_a_space_before_words() {
        let long = "a,".repeat(150);
        let text = format!("One {long}\n two");
        let spaced: String =
            parts(&text).iter().map(|&(part, starts)| spaced(part, starts)).collect();
        assert!(parts(&text).len() > 3);
        assert_eq!(spaced, format!(" One {long} two"));
        for token in ["##ton", "\u{120}ton", "\u{2581}ton", "ton"] {
            assert_eq!(bare(token), "ton");
        }
    }

    #[test]
    fn long_words_are_cut_beside_signs_and_letters_without_case() {
        let word = |part: &str, count: usize| part.repeat(count);
        assert_eq!(split_long("Mr."), ["Mr."]);
        assert_eq!(split_long(""), [""]);
        // Nowhere to cut.
        assert_eq!(split_long(&word("a", 1000)).len(), 1);
        for long in [word("word,", 300), word("\u{6f22}", 500), word("a\u{6f22}b", 200)] {
            let parts = split_long(&long);
            assert!(parts.len() > 1 && parts.iter().all(|part| part.len() < 210), "{parts:?}");
            assert_eq!(parts.concat(), long);
        }
    }
}
