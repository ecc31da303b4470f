// magnitudes: a histogram of |x| by eleven bits of its f32 magnitude, from bit SHIFT on; in the second round only of those
// elements whose higher bits are the ones chosen in the first. Counted in the workgroup, then added to memory.
// Layout:   x[elements] of quads · bins[2 · BINS, 4]: both rounds' histograms; the higher bits chosen, see select_magnitude.wgsl
// Numerics: exact; integer counts, in any order
// Dispatch: ceil(quads of x / (WG · STEPS)) workgroups, spread over x and y
// Twin:     src/kernels/outliers.rs

struct Params { quads: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<BitsQuad>;
@group(0) @binding(2) var<storage, read_write> bins: array<atomic<u32>>;

var<workgroup> wg_bins: array<atomic<u32>, BINS>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    for (var i = lane; i < BINS; i += WG) { atomicStore(&wg_bins[i], 0u); }
    workgroupBarrier();
    var chosen = 0u;
    if (ROUND == 1u) { chosen = atomicLoad(&bins[2u * BINS]); }
    for (var step = 0u; step < STEPS; step++) {
        let quad = ((wg.y * wgs.x + wg.x) * STEPS + step) * WG + lane;
        if (quad < p.quads) {
            let v = bits_get(x[quad]) & vec4<u32>(0x7fffffffu);
            for (var i = 0u; i < 4u; i++) { // unroll
                if (ROUND == 0u || v[i] >> 20u == chosen) { atomicAdd(&wg_bins[(v[i] >> SHIFT) & (BINS - 1u)], 1u); }
            }
        }
    }
    workgroupBarrier();
    for (var i = lane; i < BINS; i += WG) {
        let n = atomicLoad(&wg_bins[i]);
        if (n != 0u) { atomicAdd(&bins[ROUND * BINS + i], n); }
    }
}
