//! The choice itself, from measured numbers.

use crate::Result;
use crate::drift::layers::Energy;

/// A setting as it was measured in one layer, or a precision in one linear layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Choice {
    /// Which of them.
    pub candidate: usize,
    pub seconds: f64,
    /// Energy of the error of the layer's attention output; for a linear layer, of the model's embedding.
    pub noise: f64,
    /// Mean over heads; for a linear layer, of the embedding.
    pub sqnr_db: f64,
}

/// Settings of one layer that are worth choosing: each is slower than the one before it, and more
/// accurate.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Menu(Vec<Choice>);

/// Times that differ by less than this are the same: measurements are not better.
const SAME_TIME: f64 = 1.03;

impl Menu {
    /// # Panics
    /// If there is no option at all.
    pub(super) fn new(mut options: Vec<Choice>) -> Self {
        options.sort_by(|a, b| a.noise.total_cmp(&b.noise).then(a.seconds.total_cmp(&b.seconds)));
        // From the most accurate on, only what is faster than all before is worth its error.
        let mut menu: Vec<Choice> = Vec::new();
        for option in options {
            if menu.last().is_none_or(|best| option.seconds * SAME_TIME < best.seconds) {
                menu.push(option);
            }
        }
        menu.reverse();
        assert!(!menu.is_empty(), "a layer without any setting");
        Self(menu)
    }

    pub(super) fn get(&self, index: usize) -> Choice {
        self.0[index]
    }

    /// The last one.
    pub(super) fn most_accurate(&self) -> Choice {
        self.0[self.0.len() - 1]
    }

    /// The fastest with at least this ratio, or else the most accurate.
    pub(super) fn cheapest_with(&self, sqnr_db: f64) -> usize {
        let good = self.0.iter().position(|option| option.sqnr_db >= sqnr_db);
        good.unwrap_or(self.0.len() - 1)
    }
}

/// One choice a layer whose `measure` has at least `target` dB, starting from the cheapest of all.
///
/// How much of a layer's own error arrives at the end is measured once for each layer, alone; with
/// it the effect of every step is predicted, the most promising one is taken, and the whole is
/// measured again.
pub(super) fn greedy(
    menus: &[Menu],
    target: f64,
    measure: &mut dyn FnMut(&[usize]) -> Result<Energy>,
) -> Result<Vec<usize>> {
    let last = |layer: usize| menus[layer].0.len() - 1;
    let mut chosen = vec![0; menus.len()];
    if measure(&chosen)?.sqnr_db() >= target {
        return Ok(chosen);
    }
    let gains = gains(menus, measure)?;
    loop {
        // Noise that a step removes, for the time that it costs.
        let worth = |layer: usize| {
            let (now, next) =
                (menus[layer].get(chosen[layer]), menus[layer].get(chosen[layer] + 1));
            gains[layer] * (now.noise - next.noise) / (next.seconds - now.seconds)
        };
        let steps = (0..menus.len()).filter(|&layer| chosen[layer] < last(layer));
        let Some(best) = steps.max_by(|&a, &b| worth(a).total_cmp(&worth(b))) else {
            return Ok(chosen);
        };
        chosen[best] += 1;
        if measure(&chosen)?.sqnr_db() >= target {
            break;
        }
    }
    take_back(menus, target, chosen, measure)
}

/// For each layer, the part of its error's energy that reaches the end.
fn gains(menus: &[Menu], measure: &mut dyn FnMut(&[usize]) -> Result<Energy>) -> Result<Vec<f64>> {
    let exact: Vec<usize> = menus.iter().map(|menu| menu.0.len() - 1).collect();
    let gain = |layer: usize| {
        let mut alone = exact.clone();
        alone[layer] = 0;
        let own = menus[layer].get(0).noise;
        Ok(if own == 0.0 { 0.0 } else { measure(&alone)?.noise / own })
    };
    (0..menus.len()).map(gain).collect()
}

/// Undoes steps that are not needed in the end, those that save the most time first.
fn take_back(
    menus: &[Menu],
    target: f64,
    mut chosen: Vec<usize>,
    measure: &mut dyn FnMut(&[usize]) -> Result<Energy>,
) -> Result<Vec<usize>> {
    let saved = |chosen: &[usize], layer: usize| {
        let menu = &menus[layer];
        menu.get(chosen[layer]).seconds - menu.get(chosen[layer] - 1).seconds
    };
    let mut layers: Vec<usize> = (0..menus.len()).filter(|&layer| chosen[layer] > 0).collect();
    layers.sort_by(|&a, &b| saved(&chosen, b).total_cmp(&saved(&chosen, a)));
    // The step that came last made the difference; the others may not have been needed.
    for layer in layers {
        while chosen[layer] > 0 {
            chosen[layer] -= 1;
            if measure(&chosen)?.sqnr_db() < target {
                chosen[layer] += 1;
                break;
            }
        }
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn option(candidate: usize, seconds: f64, noise: f64) -> Choice {
        Choice { candidate, seconds, noise, sqnr_db: -10.0 * noise.log10() }
    }

    /// Three settings and fp32, which is exact.
    fn menu() -> Menu {
        Menu::new(vec![
            option(0, 1.0, 1e-2),
            option(1, 2.0, 1e-3),
            option(2, 2.5, 1e-4),
            option(3, 8.0, 0.0),
        ])
    }

    /// A model whose layers pass on these parts of their error.
    fn model(gains: [f64; 3]) -> impl FnMut(&[usize]) -> Result<Energy> {
        move |chosen: &[usize]| {
            let noise = chosen.iter().zip(gains).map(|(&i, gain)| gain * menu().get(i).noise);
            Ok(Energy { signal: 1.0, noise: noise.sum() })
        }
    }

    #[test]
    fn a_menu_holds_what_is_faster_or_better() {
        let menu = Menu::new(vec![
            option(0, 1.0, 1e-2),
            option(1, 3.0, 1e-2), // slower, no better
            option(2, 2.0, 1e-3),
            option(3, 1.99, 2e-3), // as fast as the one before, less accurate
            option(4, 8.0, 0.0),
        ]);
        let candidates: Vec<usize> = menu.0.iter().map(|option| option.candidate).collect();
        assert_eq!(candidates, [0, 2, 4]);
        assert_eq!(menu.cheapest_with(10.0), 0);
        assert_eq!(menu.cheapest_with(25.0), 1);
        assert_eq!(menu.cheapest_with(99.0), 2);
        // Where fp32 is fastest, nothing else is on the menu.
        assert_eq!(Menu::new(vec![option(0, 1.0, 1e-2), option(1, 0.5, 0.0)]).0.len(), 1);
    }

    #[test]
    fn the_layer_that_matters_is_repaired_first() {
        let menus = [menu(), menu(), menu()];
        let mut measure = model([0.01, 1.0, 0.01]);
        let run = |target, measure: &mut dyn FnMut(&[usize]) -> Result<Energy>| {
            greedy(&menus, target, measure).unwrap()
        };
        assert_eq!(run(10.0, &mut measure), [0, 0, 0]);
        assert_eq!(run(29.0, &mut measure), [0, 1, 0]);
        assert_eq!(run(35.0, &mut measure), [0, 2, 0]);
        assert_eq!(run(f64::MAX, &mut measure), [3, 3, 3]);
    }

    #[test]
    fn needless_steps_are_taken_back() {
        // The prediction is wrong: only the last layer counts once it has gone two steps up.
        let menus = [menu(), menu(), menu()];
        let mut measure = |chosen: &[usize]| {
            let noise = if chosen[2] >= 2 { 1e-9 } else { 1e-2 * (3 + chosen[0]) as f64 };
            Ok(Energy { signal: 1.0, noise })
        };
        assert_eq!(greedy(&menus, 60.0, &mut measure).unwrap(), [0, 0, 2]);
    }
}
