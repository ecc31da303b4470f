// σ(g) and σ(−g), without overflow. Where |g| > 128 they are 0 and 1, as they are in f32 from 104 on.

struct Sigmoid { plus: vec4<f32>, minus: vec4<f32> }

fn sigmoid(g: vec4<f32>) -> Sigmoid {
    let e = exp(-min(abs(g), vec4<f32>(128.0)));
    let large = 1.0 / (1.0 + e);
    let small = e * large;
    let positive = g >= vec4<f32>();
    return Sigmoid(select(small, large, positive), select(large, small, positive));
}

// g, within what the sigmoids can tell apart: no product with their zeros is infinity times zero. NaN stays NaN.
fn at_least(g: vec4<f32>) -> vec4<f32> { return select(g, vec4<f32>(-128.0), g < vec4<f32>(-128.0)); }
fn at_most(g: vec4<f32>) -> vec4<f32> { return select(g, vec4<f32>(128.0), g > vec4<f32>(128.0)); }
