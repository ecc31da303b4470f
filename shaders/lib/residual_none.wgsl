// What is normed: x.
fn residual(at: u32) -> vec4<f32> { return x_get(x[at]); }
