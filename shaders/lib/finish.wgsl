// From a product's sum to the value of y: the anchors' powers of two and the tensor-wide scales, rounded once; then what y
// held, and the bias. Twin: Finish in src/kernels/matmul.rs.

// x as a significand in [1, 2) and an exponent.
struct Scaled { m: f32, e: i32 }

fn significand(x: u32) -> Scaled {
    let n = f32_normalize(x);
    return Scaled(bitcast<f32>((n.m & 0x7fffffu) | 0x3f800000u), n.e - 127);
}

// f32 bits of sum · alpha · 2^(anchors); `anchors` is the sum of two biased exponents.
fn scaled_sum(sum: f32, anchors: i32) -> u32 {
    let bits = bitcast<u32>(sum);
    let magnitude = bits & 0x7fffffffu;
    let sign = (bits ^ p.alpha) & 0x80000000u;
    // A power of two moves the exponent, where both are normal: nearly always.
    if ((p.alpha & 0x007fffffu) == 0u && !A_SCALE_E4M3 && !B_SCALE_E4M3) {
        let biased = i32(magnitude >> 23u);
        let alpha = i32((p.alpha >> 23u) & 255u);
        let e = biased + alpha - 127 + anchors - 254 + p.exponent;
        if (min(min(biased, alpha), e) > 0 && max(max(biased, alpha), e) < 255) {
            return sign | (u32(e) << 23u) | (magnitude & 0x7fffffu);
        }
    }
    if (magnitude > F32_INFINITY) { return F32_NAN; }
    if (magnitude == F32_INFINITY) { return select(sign | F32_INFINITY, F32_NAN, (p.alpha & 0x7fffffffu) == 0u); }
    if (magnitude == 0u || (p.alpha & 0x7fffffffu) == 0u) { return 0u; }
    var v = significand(magnitude);
    // Products of significands are below 16 and never subnormal.
    let alpha = significand(p.alpha & 0x7fffffffu);
    v.m *= alpha.m;
    v.e += alpha.e;
    if (A_SCALE_E4M3) { let s = significand(a_tensor_scale()); v.m *= s.m; v.e += s.e; }
    if (B_SCALE_E4M3) { let s = significand(b_tensor_scale()); v.m *= s.m; v.e += s.e; }
    let m = bitcast<u32>(v.m);
    let e = v.e + i32(m >> 23u) - 127 + anchors - 254 + p.exponent;
    return sign | f32_from_parts((m & 0x7fffffu) | 0x800000u, e - 23);
}

// The value under the anchors of its row and column, before what y held is added.
fn finished(sum: f32, ra: u32, rb: u32, valid: bool) -> u32 {
    if (ra == 255u || rb == 255u || !valid) { return F32_NAN; }
    return scaled_sum(sum, i32(ra) + i32(rb));
}

// a + b of f32 bits; NaN is the canonical one.
fn added(a: u32, b: u32) -> u32 {
    let sum = bitcast<u32>(bitcast<f32>(a) + bitcast<f32>(b));
    return select(sum, F32_NAN, (sum & 0x7fffffffu) > F32_INFINITY || (a & 0x7fffffffu) > F32_INFINITY || (b & 0x7fffffffu) > F32_INFINITY);
}

fn with_bias(value: u32, j: u32) -> u32 {
    if (!BIAS) { return value; }
    return added(value, bias_at(j));
}
