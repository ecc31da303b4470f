// add: y + x → y, or (cast) x → y in y's type.
// Layout:   x, y[vectors], of 4 elements
// Numerics: the sum or x rounded to nearest even, f32's first
// Dispatch: ceil(vectors / (WG · STEPS)) workgroups, spread over x and y
// Twin:     src/kernels/add.rs

struct Params {
    vectors: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<x_Quad>;
@group(0) @binding(2) var<storage, read_write> y: array<y_Quad>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let first = (wg.y * wgs.x + wg.x) * STEPS * WG + lane;
    // All loads before the first store; beyond the end the last vector once more.
    var values: array<vec4<f32>, STEPS>;
    for (var i = 0u; i < STEPS; i++) { // unroll
        let at = min(first + i * WG, p.vectors - 1u);
        values[i] = x_get(x[at]);
        if (ADD) { values[i] = y_get(y[at]) + values[i]; }
    }
    for (var i = 0u; i < STEPS; i++) { // unroll
        if (first + i * WG < p.vectors) { y[first + i * WG] = y_set(values[i]); }
    }
}
