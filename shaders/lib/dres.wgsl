// The gradient that arrives over the residual.
@group(0) @binding(7) var<storage, read> dres: array<dres_Quad>;

fn residual_gradient(at: u32) -> vec4<f32> { return dres_get(dres[at]); }
