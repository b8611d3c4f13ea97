//! Adding up what was gathered apart, field by field.

/// What recorders gather.
pub(super) trait Merge {
    /// Adds what was gathered elsewhere.
    fn merge(&mut self, other: &Self);
}

impl Merge for u64 {
    fn merge(&mut self, other: &Self) {
        *self += other;
    }
}

/// Layers, or heads, of the same model.
impl<T: Merge> Merge for Vec<T> {
    fn merge(&mut self, other: &Self) {
        self.iter_mut().zip(other).for_each(|(a, b)| a.merge(b));
    }
}

/// Merges these fields of a struct, which are all that it has: the compiler refuses a list that lacks one.
macro_rules! merge_fields {
    ($whole:ident { $($field:ident),+ }) => {
        impl crate::drift::merge::Merge for $whole {
            fn merge(&mut self, other: &Self) {
                let Self { $($field),+ } = self;
                $($field.merge(&other.$field);)+
            }
        }
    };
}
pub(super) use merge_fields;
