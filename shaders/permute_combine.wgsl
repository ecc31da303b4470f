// permute_combine: rows of slots → rows of tokens, y[t] = Σ weights[t, j] · ys[slot_of[t, j]], j ascending; ACCUMULATE: added to
// what y holds. Without WEIGHTED the weights are 1: the gradient of shaders/permute_gather.wgsl.
// Layout:   ys[slots, cols], slot_of[tokens · TOPK], weights[tokens · TOPK] (WEIGHTED), y[tokens, cols], in quads
// Numerics: bounded
// Dispatch: ceil(tokens · quads / WG) workgroups, spread over x and y
// Twin:     src/kernels/permute.rs

struct Params {
    quads: u32,     // of a row
    all: u32,       // tokens · quads
    accumulate: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> ys: array<ys_Quad>;
@group(0) @binding(2) var<storage, read> slot_of: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<y_Quad>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let at = (wg.y * wgs.x + wg.x) * WG + lane;
    if (at >= p.all) { return; }
    let place = at / p.quads * TOPK;
    let quad = at % p.quads;
    var sum = vec4<f32>();
    for (var j = 0u; j < TOPK; j++) { // unroll
        sum += weight_at(place + j) * ys_get(ys[slot_of[place + j] * p.quads + quad]);
    }
    if (p.accumulate != 0u) { sum = y_get(y[at]) + sum; }
    y[at] = y_set(sum);
}
