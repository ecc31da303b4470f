// embedding: tokens, table → x, a row of the table for each token.
// Layout:   tokens[rows] · table[vocabulary, quads of 4 columns] · x[rows, quads]
// Numerics: a value rounded to x's type; NaN for a token outside the vocabulary
// Dispatch: ceil(rows · quads / (WG · STEPS)) workgroups, spread over x and y
// Twin:     src/kernels/embedding.rs

struct Params {
    vectors: u32,       // rows · quads
    quads: u32,
    vocabulary: u32,
    nan: u32,           // its bits: WGSL has no constant NaN
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;
@group(0) @binding(2) var<storage, read> table: array<table_Quad>;
@group(0) @binding(3) var<storage, read_write> x: array<x_Quad>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let first = (wg.y * wgs.x + wg.x) * STEPS * WG + lane;
    var values: array<vec4<f32>, STEPS>;
    for (var i = 0u; i < STEPS; i++) { // unroll
        let at = min(first + i * WG, p.vectors - 1u);
        let token = tokens[at / p.quads];
        values[i] = bitcast<vec4<f32>>(vec4<u32>(p.nan));
        if (token < p.vocabulary) { values[i] = table_get(table[token * p.quads + at % p.quads]); }
    }
    for (var i = 0u; i < STEPS; i++) { // unroll
        if (first + i * WG < p.vectors) { x[first + i * WG] = x_set(values[i]); }
    }
}
