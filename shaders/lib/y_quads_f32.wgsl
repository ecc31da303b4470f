// Quads of y in f32.

fn y_load(at: u32) -> vec4<u32> { return y[at]; }
fn y_store(at: u32, v: vec4<u32>) { y[at] = v; }
