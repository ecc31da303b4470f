// router_aux: the auxiliary loss, factor · Σ counts[e] · Σ sums[·, e].
// Layout:   sums[blocks, experts] from shaders/router.wgsl, counts[experts], loss[1]
// Numerics: bounded; blocks in order, then a tree over the experts
// Dispatch: one workgroup
// Twin:     src/kernels/router.rs

struct Params {
    blocks: u32,
    experts: u32,
    factor: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> sums: array<f32>;
@group(0) @binding(2) var<storage, read> counts: array<u32>;
@group(0) @binding(3) var<storage, read_write> loss: array<f32>;

var<workgroup> terms: array<f32, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(local_invocation_index) lane: u32) {
    var sum = 0.0;
    if (lane < p.experts) {
        for (var block = 0u; block < p.blocks; block++) { sum += sums[block * p.experts + lane]; }
        sum *= f32(counts[lane]);
    }
    terms[lane] = sum;
    for (var half = WG / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane < half) { terms[lane] += terms[lane + half]; }
    }
    if (lane == 0u) { loss[0] = terms[0] * p.factor; }
}
