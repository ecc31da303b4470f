// router_backward: gradients of the weights → of the logits, through renormalization and softmax; AUX: and the auxiliary
// loss's, whose gradient by the probability of expert e is factor · counts[e].
// Layout:   probs[tokens, experts], choice[tokens · TOPK], dweights[tokens · TOPK], counts[experts], dlogits[tokens, experts]
// Numerics: bounded
// Dispatch: ceil(tokens / WG) workgroups, spread over x and y; an invocation a token
// Twin:     src/kernels/router.rs

struct Params {
    tokens: u32,
    quads: u32,     // experts / 4
    factor: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> probs: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> choice: array<u32>;
@group(0) @binding(3) var<storage, read> dweights: array<f32>;
@group(0) @binding(4) var<storage, read> counts: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read_write> dlogits: array<vec4<f32>>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let token = (wg.y * wgs.x + wg.x) * WG + lane;
    if (token >= p.tokens) { return; }
    let row = token * p.quads;
    var expert: array<u32, TOPK>;
    var d: array<f32, TOPK>;        // of the loss by the probability
    var prob: array<f32, TOPK>;
    var share = 0.0;
    var inner = 0.0;
    for (var j = 0u; j < TOPK; j++) { // unroll
        expert[j] = choice[token * TOPK + j];
        d[j] = dweights[token * TOPK + j];
        prob[j] = probs[row + expert[j] / 4u][expert[j] % 4u];
        share += prob[j];
        inner += prob[j] * d[j];
    }
    if (RENORMALIZE) {
        // The weights do not change with the probabilities' scale, so what softmax subtracts is zero.
        share = max(share, 1e-20);
        inner = inner / share;
        for (var j = 0u; j < TOPK; j++) { // unroll
            d[j] = (d[j] - inner) / share;
        }
        inner = 0.0;
    }
    if (AUX) {
        var sum = vec4<f32>();
        for (var q = 0u; q < p.quads; q++) { sum += probs[row + q] * (vec4<f32>(counts[q]) * p.factor); }
        inner += (sum.x + sum.y) + (sum.z + sum.w);
    }
    for (var q = 0u; q < p.quads; q++) {
        var sum = vec4<f32>();
        if (AUX) { sum = vec4<f32>(counts[q]) * p.factor; }
        let own = vec4<u32>(q * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
        for (var j = 0u; j < TOPK; j++) { // unroll
            sum += select(vec4<f32>(), vec4<f32>(d[j]), own == vec4<u32>(expert[j]));
        }
        dlogits[row + q] = probs[row + q] * (sum - vec4<f32>(inner));
    }
}
