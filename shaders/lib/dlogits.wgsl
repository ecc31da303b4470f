@group(0) @binding(4) var<storage, read_write> dlogits: array<dlogits_Quad>;

fn gradient_put(at: u32, v: vec4<f32>) { dlogits[at] = dlogits_set(v); }
