//! Words that are longer than a model reads.

/// A word as it is, or, if it is long, in parts that are not, cut where BERT's tokenizer splits
/// anyway: beside a sign, and beside a letter of a script without case, which may be a word of its
/// own. What has no such place stays whole.
pub fn split_long(word: &str) -> Vec<&str> {
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
    use super::split_long;

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
