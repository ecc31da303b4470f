// column_amax: the largest magnitude of every column of x, as f32 bits; above infinity's with a NaN in it.
// Layout:   x[rows, cols] of quads · amax[cols], zeroed before
// Numerics: exact; the maximum of integers, in any order
// Dispatch: ceil(cols / 4 / WG) · ceil(rows / ROWS) workgroups, spread over x and y
// Twin:     src/kernels/outliers.rs

struct Params { rows: u32, cols: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<BitsQuad>;
@group(0) @binding(2) var<storage, read_write> amax: array<atomic<u32>>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let quads = p.cols / 4u;
    let strips = (quads + WG - 1u) / WG;
    let group = wg.y * wgs.x + wg.x;
    let quad = group % strips * WG + lane;
    let first = group / strips * ROWS;
    if (quad >= quads) { return; }
    var largest = vec4<u32>();
    for (var row = first; row < min(first + ROWS, p.rows); row++) {
        largest = max(largest, bits_get(x[row * quads + quad]) & vec4<u32>(0x7fffffffu));
    }
    for (var i = 0u; i < 4u; i++) { // unroll
        atomicMax(&amax[4u * quad + i], largest[i]);
    }
}
