//! What is subtracted from keys.

use super::*;

#[test]
fn a_calibrated_offset_and_the_default_take_the_bias_out() {
    let (k, v, q) = (keys((1, 2, 500, 64)), randn((1, 2, 500, 64)), randn((1, 2, 4, 64)));
    // A bias that is much larger than what differs between the keys.
    let k = (k * 0.2).unwrap().broadcast_add(&(randn((1, 2, 1, 64)) * 5.0).unwrap()).unwrap();
    let exact = attention(&q, &k, &v, &AttnMask::None, &FP32()).unwrap();
    let error = |key_smoothing| {
        let cache = filled(KvCacheConfig { key_smoothing, ..Default::default() }, &k, &v);
        largest_difference(&cache.attention(&q, AttentionCall::default(), &INT8()).unwrap(), &exact)
    };
    let (none, first) = (error(KeySmoothing::None), error(KeySmoothing::default()));
    let calibrated = error(KeySmoothing::calibrated(&k).unwrap());
    assert!(first < 0.3 * none && calibrated < 0.3 * none, "{none} {first} {calibrated}");
}

/// A bias that turns with the position, as a rotary embedding makes it do: a frozen mean is no
/// longer that of later keys, and doubles their range where it points the other way.
#[test]
fn a_moving_offset_follows_a_bias_that_turns() {
    let (n, d, period) = (4096, 32, 2000.0);
    let noise = randn((1, 1, n, d));
    let bias: Vec<f32> = (0..n * d)
        .map(|i| {
            let angle = (i / d) as f32 / period * std::f32::consts::TAU;
            let pair = (i % d / 2) as f32;
            4.0 * if i % 2 == 0 { (angle + pair).cos() } else { (angle + pair).sin() }
        })
        .collect();
    let k = (noise + Tensor::from_vec(bias, (1, 1, n, d), &Device::Cpu).unwrap()).unwrap();
    let (v, q) = (randn((1, 1, n, d)), randn((1, 4, 1, d)));
    let exact = attention(&q, &k, &v, &AttnMask::None, &FP32()).unwrap();
    let error = |key_smoothing| {
        let cache = filled(KvCacheConfig { key_smoothing, ..Default::default() }, &k, &v);
        let out = cache.attention(&q, AttentionCall::causal(), &INT8()).unwrap();
        let square = (out - &exact).unwrap().sqr().unwrap().sum_all().unwrap();
        square.to_scalar::<f32>().unwrap().sqrt()
    };
    let moving = error(KeySmoothing::Groups);
    for other in
        [KeySmoothing::None, KeySmoothing::FirstTokens(64), KeySmoothing::FirstTokens(4096)]
    {
        let other = (error(other.clone()), other);
        assert!(moving < 0.6 * other.0, "{moving}, {other:?}");
    }
}
