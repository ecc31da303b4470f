// The loss alone: not called.
fn gradient_put(at: u32, v: vec4<f32>) {}
