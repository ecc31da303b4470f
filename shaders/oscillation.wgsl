// oscillation: how far weights and their quantized values went since the last reset; at a reset, those that oscillate become
// what they are quantized to.
// Layout:   w[vectors] of 4 elements of its type · the others f32[vectors]
// Numerics: one f32 subtraction and one addition an element and path
// Dispatch: ceil(vectors / WG) workgroups, spread over x and y
// Twin:     src/kernels/oscillation.rs

struct Params {
    vectors: u32,
    action: u32,        // see the constants
    threshold: f32,     // of the paths' ratio
}

const START = 0u;       // the paths begin here
const WALK = 1u;        // add this step's
const RESET = 2u;       // the same, then snap, and begin again

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> w: array<w_Quad>;
@group(0) @binding(2) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> w_before: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> q_before: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> w_path: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> q_path: array<vec4<f32>>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let i = (wg.y * wgs.x + wg.x) * WG + lane;
    if (i >= p.vectors) { return; }
    var now = w_get(w[i]);
    let near = q[i];
    var w_length = vec4<f32>();
    var q_length = vec4<f32>();
    if (p.action != START) {
        w_length = w_path[i] + abs(now - w_before[i]);
        q_length = q_path[i] + abs(near - q_before[i]);
    }
    if (p.action == RESET) {
        now = select(now, near, (q_length > vec4<f32>()) & (q_length >= p.threshold * w_length));
        w[i] = w_set(now);
        w_length = vec4<f32>();
        q_length = vec4<f32>();
    }
    w_before[i] = now;
    q_before[i] = near;
    w_path[i] = w_length;
    q_path[i] = q_length;
}
