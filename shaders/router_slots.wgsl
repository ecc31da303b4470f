// router_slots: choices → slots sorted by expert and token, every expert's range padded to a multiple of `align`.
// Layout:   choice[tokens · TOPK], blocks[ceil(tokens / WG), experts] from shaders/router.wgsl, slot_of[tokens · TOPK],
//           token_of[slots] (0xffffffff: padding), counts[experts], groups as in lib/grouped.wgsl, its offsets written
// Numerics: exact
// Dispatch: ceil(tokens / WG) workgroups, spread over x and y; each sums all of `blocks` for itself
// Twin:     src/kernels/router.rs

struct Params {
    tokens: u32,
    experts: u32,
    align: u32,
    slots: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> choice: array<u32>;
@group(0) @binding(2) var<storage, read> blocks: array<u32>;
@group(0) @binding(3) var<storage, read_write> slot_of: array<u32>;
@group(0) @binding(4) var<storage, read_write> token_of: array<u32>;
@group(0) @binding(5) var<storage, read_write> counts: array<u32>;
@group(0) @binding(6) var<storage, read_write> groups: array<u32>;

const EXPERTS_MAX = 256u;
const MASK_WORDS = WG / 32u;

// Of all tokens, and of those in the blocks before.
var<workgroup> totals: array<atomic<u32>, EXPERTS_MAX>;
var<workgroup> before: array<atomic<u32>, EXPERTS_MAX>;
// Where an expert's range ends.
var<workgroup> ends: array<u32, EXPERTS_MAX>;
// Which of the block's tokens chose an expert, a bit each.
var<workgroup> masks: array<atomic<u32>, EXPERTS_MAX * MASK_WORDS>;

fn padded(count: u32) -> u32 { return (count + p.align - 1u) / p.align * p.align; }

fn start_of(expert: u32) -> u32 { return ends[expert] - padded(atomicLoad(&totals[expert])); }

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let block = wg.y * wgs.x + wg.x;
    let all = (p.tokens + WG - 1u) / WG;
    if (block >= all) { return; }
    atomicStore(&totals[lane], 0u);
    atomicStore(&before[lane], 0u);
    for (var i = lane; i < EXPERTS_MAX * MASK_WORDS; i += WG) { atomicStore(&masks[i], 0u); }
    workgroupBarrier();
    for (var i = lane; i < all * p.experts; i += WG) {
        let n = blocks[i];
        if (n != 0u) {
            atomicAdd(&totals[i % p.experts], n);
            if (i / p.experts < block) { atomicAdd(&before[i % p.experts], n); }
        }
    }
    let token = block * WG + lane;
    if (token < p.tokens) {
        for (var j = 0u; j < TOPK; j++) {
            atomicOr(&masks[choice[token * TOPK + j] * MASK_WORDS + lane / 32u], 1u << (lane % 32u));
        }
    }
    workgroupBarrier();
    // Sums of 1, 2, 4 … padded counts up to an expert's own.
    var end = padded(atomicLoad(&totals[lane]));
    ends[lane] = end;
    for (var step = 1u; step < EXPERTS_MAX; step *= 2u) {
        workgroupBarrier();
        if (lane >= step) { end += ends[lane - step]; }
        workgroupBarrier();
        ends[lane] = end;
    }
    workgroupBarrier();

    if (token < p.tokens) {
        for (var j = 0u; j < TOPK; j++) {
            let expert = choice[token * TOPK + j];
            var slot = start_of(expert) + atomicLoad(&before[expert]);
            for (var w = 0u; w < lane / 32u; w++) { slot += countOneBits(atomicLoad(&masks[expert * MASK_WORDS + w])); }
            slot += countOneBits(atomicLoad(&masks[expert * MASK_WORDS + lane / 32u]) & ((1u << (lane % 32u)) - 1u));
            slot_of[token * TOPK + j] = slot;
            token_of[slot] = token;
        }
    }
    // Padding: behind every expert's tokens, and behind the last expert.
    for (var expert = block; expert < p.experts; expert += all) {
        for (var slot = start_of(expert) + atomicLoad(&totals[expert]) + lane; slot < ends[expert]; slot += WG) {
            token_of[slot] = 0xffffffffu;
        }
    }
    for (var slot = ends[p.experts - 1u] + block * WG + lane; slot < p.slots; slot += all * WG) {
        token_of[slot] = 0xffffffffu;
    }
    if (block == 0u && lane < p.experts) {
        counts[lane] = atomicLoad(&totals[lane]);
        if (lane == 0u) { groups[GROUP_OFFSETS] = 0u; }
        groups[GROUP_OFFSETS + 1u + lane] = ends[lane];
    }
}
