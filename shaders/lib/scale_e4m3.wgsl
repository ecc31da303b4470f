// NVFP4's scales: E4M3 a block, one f32 a tensor; E2M1 elements. Twin: src/formats/scale.rs.

const SCALE_NAN = 0x7fu;

// a / b of two significands as m · 2^(x−30), 2^30 <= m < 2^31, truncated to QUOTIENT_BITS bits; the bit below
// them is set when anything was cut off, high enough to survive the shift into an element's subnormals.
// a < 2^24, 0 < b < 2^28. Long division: a bit a step.
struct Quotient { m: u32, x: i32 }

// QUOTIENT_BITS, from lib/round_*.wgsl, is what the rounding looks at.
fn quotient(a: u32, b: u32) -> Quotient {
    if (a == 0u) { return Quotient(0u, 0); }
    // Both with their leading bit at bit 28; then 1/2 < rest/divisor < 2.
    let shift_a = countLeadingZeros(a) - 3u;
    let shift_b = countLeadingZeros(b) - 3u;
    var rest = a << shift_a;
    let divisor = b << shift_b;
    var x = i32(shift_b) - i32(shift_a);
    if (rest < divisor) {
        rest = rest << 1u;
        x = x - 1;
    }
    var q = 0u;
    for (var i = 0u; i < QUOTIENT_BITS; i++) {
        let bit = u32(rest >= divisor);
        rest = (rest - bit * divisor) << 1u;
        q = (q << 1u) | bit;
    }
    return Quotient(((q << 1u) | u32(rest != 0u)) << (30u - QUOTIENT_BITS), x);
}

// E4M3 by exact quotient: to nearest even, or up when `carry` is set.
fn scale_from_amax(amax: u32, carry: u32, tensor_scale: u32) -> u32 {
    if (amax >= F32_INFINITY) { return SCALE_NAN; }
    if (amax == 0u) { return 0u; }
    let a = f32_normalize(amax);
    let t = f32_normalize(tensor_scale);
    let q = quotient(a.m, 3u * t.m);
    let d = q.x + a.e - t.e - 1 + 6;
    let shift = u32(clamp(-d, 0, 31));
    let fixed = q.m >> shift;
    let nearest = (1u << 26u) - 1u + ((fixed >> 27u) & 1u);
    let increment = select(nearest, (1u << 27u) - 1u + u32((fixed << shift) != q.m), carry != 0u);
    let units = (fixed + increment) >> 27u;
    return clamp((u32(max(d, 0)) << 3u) + units, 1u, 0x7eu);
}

// The positive finite E4M3 byte as k · 2^x.
fn scale_parts(scale: u32) -> Parts {
    let exponent = (scale >> 3u) & 15u;
    let fraction = scale & 7u;
    let k = select(fraction, fraction | 8u, exponent > 0u);
    return Parts(k, i32(max(exponent, 1u)) - 10);
}

fn mx_encode(x: u32, scale: u32, tensor_scale: u32, r: u32) -> u32 {
    let s = scale_parts(scale);
    if (s.k == 0u) { return elem_assemble(x, 0u); }
    let n = f32_normalize(x);
    let t = f32_normalize(tensor_scale);
    let q = quotient(n.m, s.k * t.m);
    return elem_assemble(x, elem_round(q.m, q.x + n.e - t.e - s.x, r));
}

fn mx_decode(code: u32, scale: u32, tensor_scale: u32) -> u32 {
    if ((scale & 0x7fu) == SCALE_NAN) { return F32_NAN; }
    let s = scale_parts(scale);
    let t = f32_normalize(tensor_scale);
    let p = elem_parts(code);
    return elem_sign(code) | f32_from_parts(p.k * s.k * t.m, p.x + s.x + t.e - 150);
}

// The f32 nearest to amax / 2688 (= 21 · 2^7), at least 2^-126; 1 for an all-zero tensor.
fn tensor_scale_from_amax(amax: u32) -> u32 {
    if (amax == 0u) { return 0x3f800000u; }
    let n = f32_normalize(amax);
    let numerator = n.m << 7u;
    let q = numerator / 21u;
    return max(f32_from_parts((q << 1u) | u32(q * 21u != numerator), n.e - 165), 0x00800000u);
}
