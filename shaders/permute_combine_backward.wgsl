// permute_combine_backward: dys[slot] = weight · dy[token], zero for slots of no token; dweights = ⟨dy[token], ys[slot]⟩.
// Layout:   dy[tokens, cols], ys[slots, cols], token_of[slots], slot_of[tokens · TOPK], weights[tokens · TOPK],
//           dys[slots, cols], dweights[tokens · TOPK]; rows in quads
// Numerics: bounded; LANES invocations take a slot's quads in turn, and a tree adds their sums
// Dispatch: ceil(slots / (WG / LANES)) workgroups, spread over x and y
// Twin:     src/kernels/permute.rs

struct Params {
    tokens: u32,
    quads: u32,     // of a row
    slots: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> dy: array<dy_Quad>;
@group(0) @binding(2) var<storage, read> ys: array<ys_Quad>;
@group(0) @binding(3) var<storage, read> token_of: array<u32>;
@group(0) @binding(4) var<storage, read> slot_of: array<u32>;
@group(0) @binding(5) var<storage, read> weights: array<f32>;
@group(0) @binding(6) var<storage, read_write> dys: array<dys_Quad>;
@group(0) @binding(7) var<storage, read_write> dweights: array<f32>;

var<workgroup> terms: array<f32, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let slot = (wg.y * wgs.x + wg.x) * (WG / LANES) + lane / LANES;
    var token = 0xffffffffu;
    if (slot < p.slots) { token = token_of[slot]; }
    let full = token < p.tokens;
    var place = 0u;
    var sum = vec4<f32>();
    if (full) {
        // Which of the token's slots this is.
        for (var j = 0u; j < TOPK; j++) {
            if (slot_of[token * TOPK + j] == slot) { place = token * TOPK + j; }
        }
        let weight = weights[place];
        for (var quad = lane % LANES; quad < p.quads; quad += LANES) {
            let g = dy_get(dy[token * p.quads + quad]);
            sum += g * ys_get(ys[slot * p.quads + quad]);
            dys[slot * p.quads + quad] = dys_set(weight * g);
        }
    } else if (slot < p.slots) {
        for (var quad = lane % LANES; quad < p.quads; quad += LANES) {
            dys[slot * p.quads + quad] = dys_set(vec4<f32>());
        }
    }
    terms[lane] = (sum.x + sum.y) + (sum.z + sum.w);
    for (var half = LANES / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (lane % LANES < half) { terms[lane] += terms[lane + half]; }
    }
    if (full && lane % LANES == 0u) { dweights[place] = terms[lane]; }
}
