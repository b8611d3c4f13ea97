//! Choices that have a word each, on command lines and in files.

use crate::Error;

/// The error for a word that is none of those expected; `choice` says which one was read.
pub(crate) fn unknown(choice: &str, expected: &[&str]) -> Error {
    let expected = match expected {
        [words @ .., last] if !words.is_empty() => format!("{} or {last}", words.join(", ")),
        words => words.concat(),
    };
    Error::InvalidArgument(format!("{choice}, expected {expected}"))
}

/// `words!(Type, "its name {:?}", Variant = "word", ..)` reads a choice from its word and writes it; the name
/// is that of a message, with the word that was found.
macro_rules! words {
    ($type:ident, $name:literal, $($variant:ident = $word:literal),+ $(,)?) => {
        impl std::str::FromStr for $type {
            type Err = $crate::Error;

            #[doc = concat!("One of" $(, " `", $word, "`")+, ".")]
            fn from_str(text: &str) -> $crate::Result<Self> {
                match text {
                    $($word => Ok(Self::$variant),)+
                    _ => Err($crate::quant::words::unknown(&format!($name, text), &[$($word),+])),
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self {
                    $(Self::$variant => $word,)+
                })
            }
        }
    };
}
pub(crate) use words;
