// swiglu: gu = [g, u] → h = silu(g) · u.
// Layout:   gu[rows, 2 · quads of 4 columns], g first · h[rows, quads]
// Numerics: f32, with WGSL's exp and division; g → ±∞ gives g · u and zero
// Dispatch: ceil(vectors / (WG · STEPS)) workgroups, spread over x and y
// Twin:     src/kernels/swiglu.rs

struct Params {
    vectors: u32,   // rows · quads
    quads: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> gu: array<gu_Quad>;
@group(0) @binding(2) var<storage, read_write> h: array<h_Quad>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let first = (wg.y * wgs.x + wg.x) * STEPS * WG + lane;
    // All loads before the first store; beyond the end the last vector once more.
    var gates: array<gu_Quad, STEPS>;
    var ups: array<gu_Quad, STEPS>;
    for (var i = 0u; i < STEPS; i++) { // unroll
        let at = min(first + i * WG, p.vectors - 1u);
        let gate = at + at / p.quads * p.quads;
        gates[i] = gu[gate];
        ups[i] = gu[gate + p.quads];
    }
    for (var i = 0u; i < STEPS; i++) { // unroll
        let g = gu_get(gates[i]);
        if (first + i * WG < p.vectors) {
            h[first + i * WG] = h_set(at_least(g) * sigmoid(g).plus * gu_get(ups[i]));
        }
    }
}
