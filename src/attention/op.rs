//! Attention as a Candle op: one forward for both backends, and its gradient.

use super::config::{AttentionConfig, Backend, Int8Config};
use super::engine::{Doubt, Element, Engine, MaskView, Modifiers, Queries};
use super::failure::Failure;
use super::float_head::{FEW, Float, FloatHead, in_place};
use super::int8_head::Int8Head;
use super::keys::PackedKeys;
use super::mask::broadcast_mask;
use super::reference::unfused;
use super::room::with_room;
use super::scorer::{ScoreScale, Scorer};
use super::seen::Seen;
use super::tensor_values::pack_values;
use super::visible::Visible;
use super::{AttentionCall, shapes};
use crate::Result;
use crate::cpu::Level;
use crate::cpu::contracts::Format;
use crate::memory::{Kept, written};
use crate::parallel::Work;
use crate::product::PackedMatrix;
use crate::view::{View, cpu};
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Shape, Tensor, Var};
use std::sync::Arc;

/// `attention` on the CPU; shapes and dtypes are checked.
pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    call: AttentionCall,
    config: &AttentionConfig,
) -> Result<Tensor> {
    let ((b, h, m, d), n) = (q.dims4()?, k.dim(2)?);
    let level = Level::active()?;
    config.spec.scale(d)?;
    if let Backend::Int8(int8) = &config.backend {
        int8.scores.check(q.dims(), k.dims())?;
        int8.pv.format(level)?;
    }
    let visible = Visible::new((b, m, n), &call, &config.spec)?;
    let mask = call.mask.as_ref();
    shapes::check_cpu(
        "attention",
        &mask.map(|mask| ("mask", mask)).into_iter().collect::<Vec<_>>(),
    )?;
    let mask = mask.map(|mask| broadcast_mask(&mask.detach(), &[b, h, m, n])).transpose()?;
    let call = AttentionCall { mask, ..call };
    let run = |q: &Tensor, k: &Tensor, config: &AttentionConfig| -> Result<(Tensor, bool)> {
        let (failure, doubt) = (Failure::default(), Arc::new(Doubt::default()));
        let op = Attention {
            level,
            call: call.clone(),
            visible: visible.clone(),
            config: config.clone(),
            failure: failure.clone(),
            doubt: Arc::clone(&doubt),
        };
        Ok((failure.of(q.apply_op3(k, v, op))?, doubt.is_there()))
    };
    let (out, doubt) = run(q, k, config)?;
    if !doubt {
        return Ok(out);
    }
    let Some((q_with_room, k_with_room, config)) = with_room(q, k, config)? else {
        return Ok(out);
    };
    let (out, _) = run(&q_with_room, &k_with_room, &config)?;
    Ok(out.to_dtype(q.dtype())?)
}

struct Attention {
    level: Level,
    /// Its mask is broadcast to `[B, H, M, N]`.
    call: AttentionCall,
    visible: Visible,
    config: AttentionConfig,
    failure: Failure,
    doubt: Arc<Doubt>,
}

thread_local! {
    /// The keys and values of a head, whose memory is used again for the next one.
    static INT8: Kept<Option<(PackedKeys, PackedMatrix)>> = const { Kept::new() };
    /// The same in f32.
    static FLOAT: Kept<Option<(PackedMatrix, PackedMatrix)>> = const { Kept::new() };
}

impl Attention {
    fn forward(
        &self,
        [(q, q_layout), (k, k_layout), (v, v_layout)]: [(&CpuStorage, &Layout); 3],
    ) -> Result<(CpuStorage, Shape)> {
        let op = "attention";
        let dtype = candle_core::backend::BackendStorage::dtype(q);
        shapes::check_attention(op, q_layout.dims(), k_layout.dims(), v_layout.dims())?;
        let q = View::new(op, "q", q, q_layout)?;
        let (k, v) = (View::new(op, "k", k, k_layout)?, View::new(op, "v", v, v_layout)?);
        let [b, h, m, _] = q.dims();
        let shape = Shape::from(vec![b, h, m, v.depth()]);
        let inputs = [q, k, v];
        let storage = match dtype {
            DType::F16 => CpuStorage::F16(self.run(inputs)?),
            DType::BF16 => CpuStorage::BF16(self.run(inputs)?),
            _ => CpuStorage::F32(self.run(inputs)?),
        };
        Ok((storage, shape))
    }

    /// The output `[B, H, M, Dv]` for q, k and v.
    fn run<T: Element>(&self, inputs: [View<'_>; 3]) -> Result<Vec<T>> {
        let [q, k, v] = &inputs;
        let ([b, h, m, d], n) = (q.dims(), k.tokens());
        // The guard keeps the mask's storage readable while the engine runs.
        let guard = self.call.mask.as_ref().map(Tensor::storage_and_layout);
        let mask = guard.as_ref().map(|(storage, layout)| MaskView::new(cpu(storage)?, layout));
        let mask = mask.transpose()?;
        let group = h.checked_div(k.dims()[1]).unwrap_or(0);
        let seen = Seen::of(&self.visible, mask.as_ref(), [b, h, m, n], group);
        // Keys that it hides from everyone are not there.
        let mask = mask.filter(|mask| !mask.only_hides_keys());
        let spec = &self.config.spec;
        let engine = Engine {
            level: self.level,
            queries: Queries { heads: h, tokens: m, group, apart: false },
            value_dim: v.depth(),
            visible: self.visible.clone(),
            sinks: 0,
            window: None,
            modifiers: Modifiers::new(spec, spec.scale(d)?, mask),
            seen: Some(&seen),
            doubt: &self.doubt,
        };
        let len = [b, h, m, engine.value_dim].iter().product();
        if len == 0 || n == 0 {
            return Ok(vec![T::default(); len]);
        }
        match &self.config.backend {
            Backend::Int8(int8) => self.run_int8(inputs, engine, (int8, seen.clone()), len),
            Backend::Fp32 => Ok(run_fp32(inputs, (engine, &seen), len)),
        }
    }

    fn run_int8<T: Element>(
        &self,
        [q, k, v]: [View<'_>; 3],
        mut engine: Engine<'_>,
        (int8, seen): (&Int8Config, Seen),
        len: usize,
    ) -> Result<Vec<T>> {
        let (factor, row_constants) = (engine.modifiers.factor(), engine.modifiers.row_constants());
        let scale = ScoreScale { factor, row_constants };
        let format = int8.pv.format(engine.level)?;
        let scorer = Scorer::prepare(q, k, &int8.scores, scale, seen)?;
        engine.queries.apart = true;
        let scores = scorer.dims().iter().product::<usize>();
        let inputs = inputs_and_output(scorer.q.view(), scorer.k.view(), &v);
        let work = Work {
            int8_macs: scores.saturating_mul(scorer.depth()),
            value_macs: scores.saturating_mul(v.depth()),
            // Exponentials too.
            elements: scores.saturating_add(QUANTIZED * inputs),
            ..Work::default()
        };
        let level = engine.level;
        // SAFETY: `Engine::run` writes every element, or panics.
        Ok(unsafe {
            written(len, |out| {
                engine.run(work, out, |pace, head, attend| {
                    Kept::with(&INT8, KEPT, |kept| {
                        kept.take_if(|(_, values)| {
                            (values.level(), values.format()) != (level, format)
                        });
                        let new =
                            || (PackedKeys::new(level), PackedMatrix::new(level, format, 0, 0));
                        let (keys, values) = kept.get_or_insert_with(new);
                        scorer.pack_keys(head, pace, keys);
                        pack_values(&v, head, &scorer.seen, values);
                        attend(&Int8Head { scorer: &scorer, keys, values });
                    });
                })
            })
        })
    }
}

/// Bytes that a thread may keep for the next head.
const KEPT: usize = PackedKeys::KEPT;

/// How many times an element is read or written on its way to a code: its mean, what is left, its rotation, its range.
const QUANTIZED: usize = 4;

/// Elements that a call reads and writes.
fn inputs_and_output(q: &View<'_>, k: &View<'_>, v: &View<'_>) -> usize {
    q.len() + k.len() + v.len() + q.len() / q.depth().max(1) * v.depth()
}

fn run_fp32<T: Element>(
    [q, k, v]: [View<'_>; 3],
    (engine, seen): (Engine<'_>, &Seen),
    len: usize,
) -> Vec<T> {
    let (level, factor) = (engine.level, engine.modifiers.factor());
    let ([b, h, m, d], [_, _, tokens, value_dim]) = (q.dims(), v.dims());
    let scores = b * h * m * tokens;
    let work = Work {
        float_macs: scores.saturating_mul(d.saturating_add(value_dim)),
        elements: scores.saturating_add(inputs_and_output(&q, &k, &v)),
        ..Work::default()
    };
    // SAFETY: `Engine::run` writes every element, or panics.
    unsafe {
        written(len, |out| {
            engine.run(work, out, |_, head, attend| {
                Kept::with(&FLOAT, 4 * KEPT, |kept| {
                    kept.take_if(|(keys, _)| keys.level() != level);
                    let new = || PackedMatrix::new(level, Format::F32, 0, 0);
                    let (packed_keys, packed_values) = kept.get_or_insert_with(|| (new(), new()));
                    let [mut buffer, mut gathered, mut value_buffer, mut value_gathered] =
                        [const { Vec::new() }; 4];
                    // Not those that are padding, which would make it another computation.
                    let rows = seen.asking(head, m);
                    let count = seen.keys(head).len();
                    let all = |view, buffer, gathered| {
                        seen.keys(head).rows(view, head, 0..count, buffer, gathered)
                    };
                    let keys = all(&k, &mut buffer, &mut gathered);
                    let keys = if rows <= FEW {
                        Float::InPlace(keys)
                    } else {
                        packed_keys.reset_columns(d, count);
                        packed_keys.put_columns(0, keys, factor);
                        Float::Packed(packed_keys)
                    };
                    let values = if in_place(rows, value_dim) {
                        Float::InPlace(all(&v, &mut value_buffer, &mut value_gathered))
                    } else {
                        pack_values(&v, head, seen, packed_values);
                        Float::Packed(packed_values)
                    };
                    let (queries, shape) = (&q, engine.queries);
                    attend(&FloatHead { level, queries, shape, keys, values, factor });
                });
            })
        })
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        match self.config.backend {
            Backend::Int8(_) => "int8-attention",
            Backend::Fp32 => "fp32-attention",
        }
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.failure.keep(self.forward([(q, q_layout), (k, k_layout), (v, v_layout)]))
    }

    /// That of the same attention in fp32, recomputed with tensor operations: for int8 scores it is
    /// straight-through.
    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let var = |x: &Tensor| Var::from_tensor(&x.detach().to_dtype(DType::F32)?);
        let vars = [var(q)?, var(k)?, var(v)?];
        let config = self.config.with_backend(Backend::Fp32);
        let out = unfused::attention(&vars[0], &vars[1], &vars[2], &self.call, &config)?;
        let grads = (out * grad.to_dtype(DType::F32)?)?.sum_all()?.backward()?;
        let of = |var: &Var, x: &Tensor| match grads.get(var) {
            Some(grad) => grad.to_dtype(x.dtype()),
            None => x.zeros_like(),
        };
        Ok((Some(of(&vars[0], q)?), Some(of(&vars[1], k)?), Some(of(&vars[2], v)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{largest_difference, randn};
    use candle_core::Device;

    const HEADS: usize = 2;

    /// `[1, H, tokens, 16]` of numbers from half of `unit` to twice that, of one sign, so that all scores of a row
    /// leave the range together.
    fn along(tokens: usize, unit: f64) -> Tensor {
        let normal = randn((1, HEADS, tokens, 16)).abs().unwrap();
        ((normal.clamp(0f32, 1.5).unwrap() + 0.5).unwrap() * unit).unwrap()
    }

    /// Additive masks `[M, N]`: row 1 sees no key, row 2 the last one alone, row 3 the first half.
    fn masks(m: usize, n: usize) -> impl Iterator<Item = Tensor> {
        let hides = move |(i, j): (usize, usize)| match i {
            1 => true,
            2 => j + 1 < n,
            3 => j >= n / 2,
            _ => false,
        };
        [f32::NEG_INFINITY, f32::MIN].into_iter().map(move |hidden| {
            let places = (0..m).flat_map(|i| (0..n).map(move |j| (i, j)));
            let mask = places.map(|at| if hides(at) { hidden } else { 0.0 }).collect::<Vec<_>>();
            Tensor::from_vec(mask, (m, n), &Device::Cpu).unwrap()
        })
    }

    fn is_in_doubt([q, k]: [Tensor; 2], mask: &Tensor, config: &AttentionConfig) -> bool {
        let (m, n) = (q.dim(2).unwrap(), k.dim(2).unwrap());
        let call = AttentionCall::default();
        let visible = Visible::new((1, m, n), &call, &config.spec).unwrap();
        let mask = broadcast_mask(mask, &[1, HEADS, m, n]).unwrap();
        let (level, config) = (Level::active().unwrap(), config.clone());
        let (call, failure) = (call.with_mask(mask), Failure::default());
        let doubt = Arc::new(Doubt::default());
        let op = Attention { level, call, visible, config, failure, doubt: Arc::clone(&doubt) };
        q.apply_op3(&k, &k, op).unwrap();
        doubt.is_there()
    }

    /// Numbers of queries and keys, every mask, both backends.
    fn cases() -> Vec<(usize, usize, Tensor, AttentionConfig)> {
        let sizes = [(4, 9), (4, 1300), (60, 700)];
        let masks = sizes.into_iter().flat_map(|(m, n)| masks(m, n).map(move |mask| (m, n, mask)));
        let both = [AttentionConfig::fp32(), AttentionConfig::int8()];
        masks.flat_map(|(m, n, mask)| both.clone().map(|c| (m, n, mask.clone(), c))).collect()
    }

    #[test]
    fn rows_without_a_key_are_no_doubt_and_scores_beyond_f32_are() {
        for (m, n, mask, config) in cases() {
            let what = format!("{m} {n} {config:?}");
            let ordinary = [randn((1, HEADS, m, 16)), randn((1, HEADS, n, 16))];
            assert!(!is_in_doubt(ordinary, &mask, &config), "{what}");
            for sign in [1.0, -1.0] {
                let beyond = [along(m, 1e20), along(n, sign * 1e20)];
                assert!(is_in_doubt(beyond, &mask, &config), "{sign} {what}");
            }
        }
    }

    /// Looking at all queries and keys only in doubt gives what doing so always gives.
    #[test]
    fn room_is_made_where_it_is_needed() -> Result<()> {
        for (m, n, mask, config) in cases() {
            let v = randn((1, HEADS, n, 8));
            let attend = |q: &Tensor, k: &Tensor, config: &AttentionConfig| {
                let call = AttentionCall::default().with_mask(mask.clone());
                attention(q, k, &v, call, config)
            };
            for (of_q, of_k, scale) in
                [(1.0, 1.0, 0.25), (1e17, 1e18, 1.0), (1e19, 3e18, 0.1), (0.1, 1e37, 1.0)]
            {
                for sign in [1.0, -1.0] {
                    let (q, k) = (along(m, sign * of_q), along(n, of_k));
                    let config = config.clone().softmax_scale(scale);
                    let found = attend(&q, &k, &config)?;
                    let always = match with_room(&q, &k, &config)? {
                        Some((q, k, config)) => attend(&q, &k, &config)?,
                        None => attend(&q, &k, &config)?,
                    };
                    let difference = largest_difference(&found, &always);
                    assert!(difference < 1e-5, "{difference}: {m} {n} {sign} {of_q} {config:?}");
                }
            }
        }
        Ok(())
    }
}
