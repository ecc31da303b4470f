// permute_clear: rows of slots that no token has become zero; the others are not read.
// Layout:   token_of[slots], x[slots, cols] in quads
// Numerics: exact
// Dispatch: ceil(slots / (WG / LANES)) workgroups, spread over x and y
// Twin:     src/kernels/permute.rs

struct Params {
    tokens: u32,
    quads: u32,     // of a row
    slots: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> token_of: array<u32>;
@group(0) @binding(2) var<storage, read_write> x: array<x_Quad>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let slot = (wg.y * wgs.x + wg.x) * (WG / LANES) + lane / LANES;
    if (slot >= p.slots || token_of[slot] < p.tokens) { return; }
    for (var quad = lane % LANES; quad < p.quads; quad += LANES) {
        x[slot * p.quads + quad] = x_set(vec4<f32>());
    }
}
