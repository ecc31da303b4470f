// peak_dot: what the device's packed dot products reach. 16 chains an invocation; c = dot(c, b) + c, so that no step can be
// taken out of the loop.
// Layout:   x[256], words of four signed bytes · y[invocations], the sum of the chains
// Numerics: integers, which wrap around
// Dispatch: as many workgroups as y has room for

struct Params {
    seed: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<i32>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    var b: array<u32, 16>;
    var c: array<i32, 16>;
    for (var i = 0u; i < 16u; i++) {
        b[i] = x[(lane + i) % 256u];
        c[i] = i32(p.seed + i);
    }
    for (var n = 0u; n < ITERATIONS; n++) {
        for (var i = 0u; i < 16u; i++) { c[i] = dot4I8Packed(bitcast<u32>(c[i]), b[i]) + c[i]; }
        for (var i = 0u; i < 16u; i++) { c[i] = dot4I8Packed(bitcast<u32>(c[i]), b[i]) + c[i]; }
        for (var i = 0u; i < 16u; i++) { c[i] = dot4I8Packed(bitcast<u32>(c[i]), b[i]) + c[i]; }
        for (var i = 0u; i < 16u; i++) { c[i] = dot4I8Packed(bitcast<u32>(c[i]), b[i]) + c[i]; }
    }
    var s = 0i;
    for (var i = 0u; i < 16u; i++) { s += c[i]; }
    y[(wg.y * wgs.x + wg.x) * WG + lane] = s;
}
