// permute_gather: rows of tokens → rows of slots; slots of no token become zero.
// Layout:   x[tokens, cols], token_of[slots], xs[slots, cols], in quads
// Numerics: exact, but for the narrowing to nearest even
// Dispatch: ceil(slots · quads / (4 · WG)) workgroups, spread over x and y
// Twin:     src/kernels/permute.rs

struct Params {
    tokens: u32,
    quads: u32,     // of a row
    all: u32,       // slots · quads
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<x_Quad>;
@group(0) @binding(2) var<storage, read> token_of: array<u32>;
@group(0) @binding(3) var<storage, read_write> xs: array<xs_Quad>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let first = (wg.y * wgs.x + wg.x) * STEPS * WG + lane;
    // All loads before the first store.
    var v: array<vec4<f32>, STEPS>;
    for (var i = 0u; i < STEPS; i++) { // unroll
        let at = first + i * WG;
        v[i] = vec4<f32>();
        if (at < p.all) {
            let token = token_of[at / p.quads];
            if (token < p.tokens) { v[i] = x_get(x[token * p.quads + at % p.quads]); }
        }
    }
    for (var i = 0u; i < STEPS; i++) { // unroll
        let at = first + i * WG;
        if (at < p.all) { xs[at] = xs_set(v[i]); }
    }
}
