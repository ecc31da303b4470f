// swiglu_backward: gu = [g, u], dh → gu = [dh · u · σ(g) · (1 + g · σ(−g)), dh · silu(g)].
// Layout:   gu[rows, 2 · quads of 4 columns], g first · dh[rows, quads]
// Numerics: f32, with WGSL's exp and division; g → ±∞ gives the limits
// Dispatch: ceil(vectors / (WG · STEPS)) workgroups, spread over x and y
// Twin:     src/kernels/swiglu.rs

struct Params {
    vectors: u32,   // rows · quads
    quads: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> gu: array<gu_Quad>;
@group(0) @binding(2) var<storage, read> dh: array<dh_Quad>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let first = (wg.y * wgs.x + wg.x) * STEPS * WG + lane;
    var gates: array<gu_Quad, STEPS>;
    var ups: array<gu_Quad, STEPS>;
    var ds: array<dh_Quad, STEPS>;
    for (var i = 0u; i < STEPS; i++) { // unroll
        // Beyond the end whatever the last one is by now: it goes nowhere.
        let at = min(first + i * WG, p.vectors - 1u);
        let gate = at + at / p.quads * p.quads;
        gates[i] = gu[gate];
        ups[i] = gu[gate + p.quads];
        ds[i] = dh[at];
    }
    for (var i = 0u; i < STEPS; i++) { // unroll
        let at = first + i * WG;
        let g = gu_get(gates[i]);
        let u = gu_get(ups[i]);
        let d = dh_get(ds[i]);
        let s = sigmoid(g);
        if (at < p.vectors) {
            let gate = at + at / p.quads * p.quads;
            gu[gate] = gu_set(d * u * (s.plus * (1.0 + at_most(at_least(g)) * s.minus)));
            gu[gate + p.quads] = gu_set(d * (at_least(g) * s.plus));
        }
    }
}
