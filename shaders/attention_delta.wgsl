// attention_delta: delta[row · heads + head] = Σ dout ∘ out over a head's row, which the softmax's gradient takes off.
// Layout:   x = out, g = dout, rows of heads · head_dim
// Numerics: bounded. Four f32 sums, then theirs.
// Dispatch: ceil(rows · heads / WG) workgroups, spread over x and y
// Twin:     src/kernels/attention/cpu.rs

struct Params {
    lines: u32,     // rows · heads
    quads: u32,     // of a head's row
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x_data: array<x_Quad>;
@group(0) @binding(2) var<storage, read> g_data: array<g_Quad>;
@group(0) @binding(3) var<storage, read_write> delta: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let line = (wg.y * wgs.x + wg.x) * WG + lane;
    if (line >= p.lines) { return; }
    var sums = vec4<f32>();
    for (var quad = 0u; quad < p.quads; quad++) {
        sums = fma(x_get(x_data[line * p.quads + quad]), g_get(g_data[line * p.quads + quad]), sums);
    }
    delta[line] = (sums.x + sums.y) + (sums.z + sums.w);
}
