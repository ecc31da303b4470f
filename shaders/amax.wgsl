// amax: the largest finite magnitude of x into state[1], as f32 bits, for NVFP4's tensor-wide scale.
// Layout:   x[elements], in any shape · state: see quantize.wgsl, zeroed before
// Numerics: exact; the maximum of integers, in any order. NaN and infinity do not count.
// Dispatch: ceil(words of x / (WG · STEPS)) workgroups, spread over x and y
// Twin:     src/kernels/quantize.rs

struct Params {
    elements: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<u32>;
@group(0) @binding(2) var<storage, read_write> state: array<atomic<u32>>;

const PER_WORD = select(2u, 1u, X_TYPE == X_F32);

var<workgroup> wg_amax: atomic<u32>;

fn widen(h: u32) -> u32 {
    if (X_TYPE == X_BF16) { return f32_from_bf16(h); }
    return f32_from_f16(h);
}

fn finite(x: u32) -> u32 {
    let magnitude = x & 0x7fffffffu;
    return select(0u, magnitude, magnitude < F32_INFINITY);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    var amax = 0u;
    for (var step = 0u; step < STEPS; step++) {
        let word = ((wg.y * wgs.x + wg.x) * STEPS + step) * WG + lane;
        let element = word * PER_WORD;
        if (element < p.elements) {
            let w = x[word];
            if (X_TYPE == X_F32) {
                amax = max(amax, finite(w));
            } else {
                amax = max(amax, finite(widen(w & 0xffffu)));
                if (element + 1u < p.elements) { amax = max(amax, finite(widen(w >> 16u))); }
            }
        }
    }
    if (lane == 0u) { atomicStore(&wg_amax, 0u); }
    workgroupBarrier();
    atomicMax(&wg_amax, amax);
    workgroupBarrier();
    if (lane == 0u) { atomicMax(&state[1], atomicLoad(&wg_amax)); }
}
