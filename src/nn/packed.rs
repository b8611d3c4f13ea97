//! Weights and bias of a linear layer in the order the product reads them.

use pulp::{Arch, Simd, WithSimd};

/// Vectors in a panel of many outputs, where there are 32 registers.
pub(super) const WIDE: usize = 4;
/// Vectors in a panel of few outputs, and of all where there are 16 registers.
pub(super) const NARROW: usize = 2;

/// `W` `[N, K]` in panels of some vectors of outputs, so that the product reads it front to back:
///
/// ```text
/// panel of `width` outputs:  [K][width]        the last one filled up with zeros
/// ```
pub(crate) struct PackedWeights {
    arch: Arch,
    panels: Vec<f32>,
    /// Filled up with zeros to whole panels.
    bias: Vec<f32>,
    outputs: usize,
    depth: usize,
    width: usize,
}

impl PackedWeights {
    /// Packs weights `at(output, k)`, for as many outputs as there are biases.
    pub(super) fn pack(
        arch: Arch,
        bias: &[f32],
        depth: usize,
        at: impl Fn(usize, usize) -> f32,
    ) -> Self {
        let (outputs, width) = (bias.len(), arch.dispatch(PanelWidth { outputs: bias.len() }));
        let padded = outputs.next_multiple_of(width);
        let mut panels = vec![0f32; padded * depth];
        for first in (0..outputs).step_by(width) {
            let panel = &mut panels[first * depth..][..width * depth];
            for (k, lanes) in panel.chunks_exact_mut(width).enumerate() {
                for (output, lane) in (first..outputs).zip(lanes) {
                    *lane = at(output, k);
                }
            }
        }
        let mut bias = bias.to_vec();
        bias.resize(padded, 0.0);
        Self { arch, panels, bias, outputs, depth, width }
    }

    /// Packs `weights`, row-major `[bias.len(), depth]`.
    pub(super) fn new(arch: Arch, weights: &[f32], bias: &[f32], depth: usize) -> Self {
        assert_eq!(weights.len(), bias.len() * depth);
        Self::pack(arch, bias, depth, |output, k| weights[output * depth + k])
    }

    /// Outputs in a vector.
    pub(super) fn lanes(arch: Arch) -> usize {
        arch.dispatch(Lanes)
    }

    /// The weights as they came, row-major `[N, K]`.
    pub(super) fn unpacked(&self) -> Vec<f32> {
        let mut weights = Vec::with_capacity(self.outputs * self.depth);
        for output in 0..self.outputs {
            let panel = self.panel(output / self.width * self.width);
            weights.extend(panel.iter().skip(output % self.width).step_by(self.width));
        }
        weights
    }

    /// The vectors it was packed for.
    pub(super) fn arch(&self) -> Arch {
        self.arch
    }

    /// N.
    pub(super) fn outputs(&self) -> usize {
        self.outputs
    }

    /// K.
    pub(super) fn depth(&self) -> usize {
        self.depth
    }

    /// Outputs in a panel.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// The panel that starts at `output`, a multiple of the width.
    #[inline(always)]
    pub(super) fn panel(&self, output: usize) -> &[f32] {
        &self.panels[output * self.depth..][..self.width * self.depth]
    }

    /// What the sums of each output start from, with zeros for whole panels.
    pub(super) fn bias(&self) -> &[f32] {
        &self.bias
    }
}

/// Vectors in a panel at most.
pub(super) const fn most_vectors<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { WIDE } else { NARROW }
}

struct PanelWidth {
    outputs: usize,
}

impl WithSimd for PanelWidth {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        match self.outputs <= NARROW * S::F32_LANES {
            true => NARROW * S::F32_LANES,
            false => most_vectors::<S>() * S::F32_LANES,
        }
    }
}

struct Lanes;

impl WithSimd for Lanes {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        S::F32_LANES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpacking_gives_the_weights_back() {
        for arch in super::super::all_vectors() {
            for outputs in [0, 1, 15, 16, 17, 63, 64, 65, 130] {
                for depth in [0, 1, 3] {
                    let weights: Vec<f32> = (0..outputs * depth).map(|i| i as f32 + 1.0).collect();
                    let bias: Vec<f32> = (0..outputs).map(|i| -(i as f32)).collect();
                    let packed = PackedWeights::new(arch, &weights, &bias, depth);
                    assert_eq!(packed.unpacked(), weights, "{arch:?} {outputs} {depth}");
                    assert_eq!(packed.bias()[..outputs], bias);
                    assert!(packed.bias()[outputs..].iter().all(|&x| x == 0.0));
                }
            }
        }
    }
}
