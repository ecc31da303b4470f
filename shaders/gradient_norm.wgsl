// gradient_norm: the sum of squares of a piece of one gradient tensor, a workgroup each.
// Layout:   x[quads] of f32 · partials[…], a piece's from p.first on: see lib/sum_of_squares.wgsl
// Numerics: f32 under a power of two, so no square over- or underflows; bounded, in a fixed order
// Dispatch: ceil(quads / (WG · STEPS)) workgroups, spread over x and y
// Twin:     src/kernels/gradient_norm.rs

struct Params {
    quads: u32,
    first: u32,     // the tensor's first piece
    tensor: u32,    // its index
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> partials: array<vec4<u32>>;

fn quad(at: u32) -> vec4<f32> {
    if (at < p.quads) { return x[at]; }
    return vec4<f32>();
}

fn magnitudes(v: vec4<f32>) -> vec4<u32> { return bitcast<vec4<u32>>(v) & vec4<u32>(0x7fffffffu); }

fn squares(v: vec4<f32>, scale: f32) -> f32 {
    let s = v * scale;
    return (s.x * s.x + s.y * s.y) + (s.z * s.z + s.w * s.w);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let piece = wg.y * wgs.x + wg.x;
    var sum = Sum(0.0, 1u);
    var nonfinite = false;
    for (var i = 0u; i < STEPS; i += 4u) {
        // Four loads in flight.
        let at = (piece * STEPS + i) * WG + lane;
        let a = quad(at);
        let b = quad(at + WG);
        let c = quad(at + 2u * WG);
        let d = quad(at + 3u * WG);
        let most = max(max(magnitudes(a), magnitudes(b)), max(magnitudes(c), magnitudes(d)));
        let amax = max(max(most.x, most.y), max(most.z, most.w));
        nonfinite = nonfinite || amax >= 0x7f800000u;
        let exponent = clamp(amax >> 23u, 1u, 253u);
        // 2^(127 − exponent): what is squared is below four.
        let scale = bitcast<f32>((254u - exponent) << 23u);
        sum = plus(sum, Sum((squares(a, scale) + squares(b, scale)) + (squares(c, scale) + squares(d, scale)), exponent));
    }
    reduce(lane, sum, select(NONE, p.tensor, nonfinite));
    if (lane == 0u && piece * STEPS * WG < p.quads) {
        partials[p.first + piece] = vec4<u32>(bitcast<u32>(wg_total[0]), wg_exponent[0], wg_tensor[0], 0u);
    }
}
