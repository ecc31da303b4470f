// gradient_norm_total: the partial sums of all gradients → norm, factor, whether all is finite, where not.
// Layout:   partials[pieces], see lib/sum_of_squares.wgsl · y[4]: f32 norm, factor, 1 or 0, tensor or −1
// Numerics: f32, bounded, in a fixed order; norm NaN and factor 0 where something is not finite
// Dispatch: one workgroup
// Twin:     src/kernels/gradient_norm.rs

struct Params {
    pieces: u32,
    inverse_scale: f32,
    max_norm: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> partials: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<u32>>;     // as bits: one of them may be NaN

@compute @workgroup_size(WG)
fn main(@builtin(local_invocation_index) lane: u32) {
    var sum = Sum(0.0, 1u);
    var first = NONE;
    for (var i = lane; i < p.pieces; i += WG) {
        let partial = partials[i];
        sum = plus(sum, Sum(bitcast<f32>(partial.x), partial.y));
        first = min(first, partial.z);
    }
    reduce(lane, sum, first);
    if (lane != 0u) { return; }
    let tensor = wg_tensor[0];
    // The loss scale's inverse before the power of two: neither step leaves f32's normal numbers before the norm does.
    let norm = sqrt(wg_total[0]) * p.inverse_scale * bitcast<f32>(wg_exponent[0] << 23u);
    if (tensor != NONE || (bitcast<u32>(norm) & 0x7fffffffu) >= 0x7f800000u) {
        y[0] = vec4<u32>(0x7fc00000u, 0u, 0u, bitcast<u32>(select(f32(tensor), -1.0, tensor == NONE)));
        return;
    }
    var factor = p.inverse_scale;
    if (norm > p.max_norm) { factor *= p.max_norm / norm; }
    y[0] = bitcast<vec4<u32>>(vec4<f32>(norm, factor, 1.0, -1.0));
}
