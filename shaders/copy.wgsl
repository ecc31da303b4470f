// copy: x → y. What a kernel can hope for: the measured bandwidth that rates are compared with.
// Layout:   x[vectors], y[vectors], of 16 bytes
// Numerics: exact
// Dispatch: ceil(vectors / (4 · WG)) workgroups, spread over x and y
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
    // Four loads in flight before the first store.
    let at = (wg.y * wgs.x + wg.x) * 4u * WG + lane;
    if (at + 3u * WG < p.vectors) {
        let a = x[at];
        let b = x[at + WG];
        let c = x[at + 2u * WG];
        let d = x[at + 3u * WG];
        y[at] = a;
        y[at + WG] = b;
        y[at + 2u * WG] = c;
        y[at + 3u * WG] = d;
    } else {
        for (var i = 0u; i < 4u; i++) {
            if (at + i * WG < p.vectors) { y[at + i * WG] = x[at + i * WG]; }
        }
    }
}
