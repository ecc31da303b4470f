// No gradient over the residual.
fn residual_gradient(at: u32) -> vec4<f32> { return vec4<f32>(); }
