// peak_fma: what the device's f32 multiply-adds reach. 16 chains an invocation in four vectors, 1024 steps each.
// Layout:   x[512]: 256 factors of ±1, then 256 small integers · y[invocations], the sum of the chains
// Numerics: every value is an integer below 2^24, so the result is known exactly
// Dispatch: as many workgroups as y has room for

struct Params {
    seed: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

fn four(at: u32) -> vec4<f32> {
    return vec4<f32>(x[at % 256u], x[(at + 1u) % 256u], x[(at + 2u) % 256u], x[(at + 3u) % 256u]);
}

fn four_more(at: u32) -> vec4<f32> {
    return vec4<f32>(x[256u + at % 256u], x[256u + (at + 1u) % 256u], x[256u + (at + 2u) % 256u], x[256u + (at + 3u) % 256u]);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let a0 = four(lane);
    let a1 = four(lane + 4u);
    let a2 = four(lane + 8u);
    let a3 = four(lane + 12u);
    let b0 = four_more(lane);
    let b1 = four_more(lane + 4u);
    let b2 = four_more(lane + 8u);
    let b3 = four_more(lane + 12u);
    var c0 = vec4<f32>(f32(p.seed));
    var c1 = c0;
    var c2 = c0;
    var c3 = c0;
    for (var i = 0u; i < ITERATIONS; i++) {
        c0 = fma(c0, a0, b0);
        c1 = fma(c1, a1, b1);
        c2 = fma(c2, a2, b2);
        c3 = fma(c3, a3, b3);
        c0 = fma(c0, a0, b0);
        c1 = fma(c1, a1, b1);
        c2 = fma(c2, a2, b2);
        c3 = fma(c3, a3, b3);
        c0 = fma(c0, a0, b0);
        c1 = fma(c1, a1, b1);
        c2 = fma(c2, a2, b2);
        c3 = fma(c3, a3, b3);
        c0 = fma(c0, a0, b0);
        c1 = fma(c1, a1, b1);
        c2 = fma(c2, a2, b2);
        c3 = fma(c3, a3, b3);
    }
    let s = (c0 + c1) + (c2 + c3);
    y[(wg.y * wgs.x + wg.x) * WG + lane] = (s.x + s.y) + (s.z + s.w);
}
