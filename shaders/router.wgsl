// router: logits → the TOPK experts of each token, their weights, all probabilities, and how often each expert was chosen
// among every WG tokens.
// Layout:   logits[tokens, experts] as words, bias[experts] as words (read if BIASED), choice[tokens · TOPK], weights[tokens · TOPK],
//           probs[tokens, experts], blocks[ceil(tokens / WG), experts]; AUX: sums[ceil(tokens / WG), experts] of the probabilities
// Numerics: without a bias the choice is exact; probabilities and weights are bounded
// Dispatch: ceil(tokens / WG) workgroups, spread over x and y; an invocation a token
// Twin:     src/kernels/router.rs

struct Params {
    tokens: u32,
    quads: u32,     // experts / 4
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> bias: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> choice: array<u32>;
@group(0) @binding(4) var<storage, read_write> weights: array<u32>;
@group(0) @binding(5) var<storage, read_write> probs: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read_write> blocks: array<u32>;
@group(0) @binding(7) var<storage, read_write> sums: array<vec4<f32>>;

const EXPERTS_MAX = 256u;
// Beyond every logit that counts; twice it is still finite.
const LIMIT = 1e38f;
const LIMIT_BITS = 0x7e967699u;
// Terms below e^-87 of the largest would be subnormal, and count as zero.
const LEAST = -87.0;

var<workgroup> wg_counts: array<atomic<u32>, EXPERTS_MAX>;
var<workgroup> wg_sums: array<vec4<f32>, WG>;

// A finite number for any bits: NaN is the least.
fn finite(bits: vec4<u32>) -> vec4<f32> {
    let nan = (bits & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
    // Infinity's too.
    let large = (bits & vec4<u32>(0x7fffffffu)) > vec4<u32>(LIMIT_BITS);
    let sign = select(vec4<f32>(LIMIT), vec4<f32>(-LIMIT), (bits & vec4<u32>(0x80000000u)) != vec4<u32>());
    return select(select(bitcast<vec4<f32>>(bits), sign, large), vec4<f32>(-LIMIT), nan);
}

fn exp_below(x: vec4<f32>) -> vec4<f32> {
    return select(exp(max(x, vec4<f32>(LEAST))), vec4<f32>(), x < vec4<f32>(LEAST));
}

fn route(token: u32) {
    let row = token * p.quads;
    var largest = vec4<f32>(-LIMIT);
    var poisoned = false;
    for (var q = 0u; q < p.quads; q++) {
        let bits = logits[row + q];
        largest = max(largest, finite(bits));
        poisoned = poisoned || any((bits & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u));
    }
    let top = max(max(largest.x, largest.y), max(largest.z, largest.w));
    var total = vec4<f32>();
    for (var q = 0u; q < p.quads; q++) {
        total += exp_below(finite(logits[row + q]) - vec4<f32>(top));
    }
    let sum = (total.x + total.y) + (total.z + total.w);

    // The best so far, descending: an expert goes before those that score less, not before its equals.
    var best: array<f32, TOPK>;
    var chosen: array<u32, TOPK>;
    for (var j = 0u; j < TOPK; j++) { // unroll
        best[j] = -3.0f * LIMIT;
        chosen[j] = 0u;
    }
    for (var q = 0u; q < p.quads; q++) {
        let x = finite(logits[row + q]);
        let ps = exp_below(x - vec4<f32>(top)) / sum;
        probs[row + q] = select(bitcast<vec4<u32>>(ps), vec4<u32>(0x7fc00000u), poisoned);
        var scores = x;
        if (BIASED) { scores = ps + finite(bias[q]); }
        for (var c = 0u; c < 4u; c++) {
            var score = scores[c];
            var expert = q * 4u + c;
            var moves = false;
            for (var j = 0u; j < TOPK; j++) { // unroll
                moves = moves || score > best[j];
                let s = best[j];
                let e = chosen[j];
                best[j] = select(s, score, moves);
                chosen[j] = select(e, expert, moves);
                score = select(score, s, moves);
                expert = select(expert, e, moves);
            }
        }
    }
    var prob: array<f32, TOPK>;
    var share = 0.0;
    for (var j = 0u; j < TOPK; j++) { // unroll
        let x = finite(logits[row + chosen[j] / 4u])[chosen[j] % 4u];
        prob[j] = exp_below(vec4<f32>(x - top)).x / sum;
        share += prob[j];
    }
    share = select(1.0, max(share, 1e-20), RENORMALIZE);
    for (var j = 0u; j < TOPK; j++) { // unroll
        choice[token * TOPK + j] = chosen[j];
        weights[token * TOPK + j] = select(bitcast<u32>(prob[j] / share), 0x7fc00000u, poisoned);
        atomicAdd(&wg_counts[chosen[j]], 1u);
    }
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let block = wg.y * wgs.x + wg.x;
    if (block * WG >= p.tokens) { return; }
    atomicStore(&wg_counts[lane], 0u);
    workgroupBarrier();
    if (block * WG + lane < p.tokens) { route(block * WG + lane); }
    workgroupBarrier();
    if (lane < p.quads * 4u) { blocks[block * p.quads * 4u + lane] = atomicLoad(&wg_counts[lane]); }
    if (AUX) {
        // The block's rows, in as many parts as there are invocations for, each in order.
        storageBarrier();
        let parts = WG / p.quads;
        var sum = vec4<f32>();
        if (lane < parts * p.quads) {
            for (var r = lane / p.quads; r < min(WG, p.tokens - block * WG); r += parts) {
                sum += bitcast<vec4<f32>>(probs[(block * WG + r) * p.quads + lane % p.quads]);
            }
        }
        wg_sums[lane] = sum;
        workgroupBarrier();
        if (lane < p.quads) {
            sum = vec4<f32>();
            for (var part = 0u; part < parts; part++) { sum += wg_sums[part * p.quads + lane]; }
            sums[block * p.quads + lane] = sum;
        }
    }
}
