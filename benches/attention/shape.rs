//! Shapes, and how much work they are.

use serde::{Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// `[B, H, N, D]`, for queries, keys and values alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape(pub [usize; 4]);

/// The shapes of the README's tables.
pub const README: [Shape; 7] = [
    Shape([1, 4, 1024, 256]),
    Shape([1, 12, 128, 32]),
    Shape([1, 12, 512, 32]),
    Shape([8, 12, 128, 64]),
    Shape([1, 12, 512, 64]),
    Shape([1, 12, 2048, 64]),
    Shape([1, 8, 4096, 128]),
];

/// Small and odd ones: these show that everything runs, not how fast.
pub const SHORT: [Shape; 2] = [Shape([1, 2, 48, 32]), Shape([2, 3, 65, 50])];

impl Shape {
    /// Elements of one operand.
    pub fn elements(self) -> usize {
        self.0.iter().product()
    }

    /// Tokens of each sequence: queries and keys.
    pub fn tokens(self) -> usize {
        self.0[2]
    }

    /// `B * H * N * N`: scores, and exponentials of a softmax.
    pub fn scores(self) -> f64 {
        let [b, h, n, _] = self.0.map(|x| x as f64);
        b * h * n * n
    }

    /// Multiply-accumulates of one product: queries with keys, or probabilities with values.
    pub fn macs(self) -> f64 {
        self.scores() * self.0[3] as f64
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [b, h, n, d] = self.0;
        write!(f, "[{b}, {h}, {n}, {d}]")
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Option<Vec<usize>> =
            text.split(',').map(|n| n.trim().parse().ok().filter(|&n| n > 0)).collect();
        let shape = numbers
            .and_then(|numbers| numbers.try_into().ok())
            .map(Shape)
            .ok_or_else(|| format!("{text:?}, expected four positive numbers B,H,N,D"))?;
        match shape.0.iter().try_fold(1usize, |product, &x| product.checked_mul(x)) {
            Some(elements) if elements <= MOST_ELEMENTS => Ok(shape),
            _ => Err(format!("{text}: more than {MOST_ELEMENTS} elements in q, k and v each")),
        }
    }
}

/// 4 GB in f32, far beyond what is worth measuring.
const MOST_ELEMENTS: usize = 1 << 30;

impl Serialize for Shape {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}
