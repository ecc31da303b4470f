// rmsnorm: x (+ branch → sum) → y = x · rstd · gain, rstd = 1 / √(mean x² + eps).
// Layout:   x, branch, sum, y[rows, quads of 4 columns] · gain[quads] · rstd[rows]; quads ≤ LANES · HELD
// Numerics: sum is x + branch rounded to its type, and what is normed. f32; squares are added by fours, then along a lane,
//           then pairwise over lanes.
// Dispatch: ceil(rows / (WG / LANES)) workgroups, spread over x and y; LANES invocations a row, which they hold in registers
// Twin:     src/kernels/rmsnorm.rs

struct Params {
    rows: u32,
    quads: u32,
    inverse: f32,   // 1 / columns
    eps: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<x_Quad>;
@group(0) @binding(2) var<storage, read> gain: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> y: array<y_Quad>;
@group(0) @binding(4) var<storage, read_write> rstd: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let row = (wg.y * wgs.x + wg.x) * (WG / LANES) + lane / LANES;
    let there = row < p.rows;
    let first = lane % LANES;
    let start = row * p.quads;
    var held: array<vec4<f32>, HELD>;
    var squares = 0.0;
    for (var i = 0u; i < HELD; i++) { // unroll
        let q = first + i * LANES;
        held[i] = vec4<f32>();
        if (there && q < p.quads) { held[i] = residual(start + q); }
        squares += dot(held[i], held[i]);
    }
    let r = inverseSqrt(row_sum(squares, lane) * p.inverse + p.eps);
    if (there && first == 0u) { rstd[row] = r; }
    for (var i = 0u; i < HELD; i++) { // unroll
        let q = first + i * LANES;
        if (there && q < p.quads) { y[start + q] = y_set(held[i] * r * gain[q]); }
    }
}
