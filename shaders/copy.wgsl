// copy: x → y. What a kernel can hope for: the measured bandwidth that rates are compared with.
// Layout:   x[vectors], y[vectors], of 16 bytes
// Numerics: exact
// Dispatch: ceil(vectors / WG) workgroups, spread over x and y
// Twin:     src/kernels/copy.rs

struct Params {
    vectors: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<u32>>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let at = (wg.y * wgs.x + wg.x) * WG + lane;
    if (at < p.vectors) { y[at] = x[at]; }
}
