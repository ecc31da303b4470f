// Four neighbouring elements of a dense f32 binding, declared `array<op_Quad>`. Twin: Tensor::widened, Tensor::fill_rows.

alias op_Quad = vec4<f32>;

fn op_get(quad: op_Quad) -> vec4<f32> { return quad; }
fn op_set(v: vec4<f32>) -> op_Quad { return v; }
