// Conversions between float formats, on bits: WGSL's own may flush subnormals, assume away NaN, and round
// either way. Twin: src/formats/element.rs.

const F32_NAN = 0x7fc00000u;
const F32_INFINITY = 0x7f800000u;

// A magnitude as m · 2^(e−127−23) with bit 23 of m set; zero gives m = 0.
struct Normalized { m: u32, e: i32 }

fn f32_normalize(x: u32) -> Normalized {
    let magnitude = x & 0x7fffffffu;
    if (magnitude < 0x00800000u) {
        // A subnormal, or zero: move its leading bit to bit 23.
        let shift = countLeadingZeros(magnitude) - 8u;
        return Normalized(magnitude << shift, 1 - i32(shift));
    }
    return Normalized((magnitude & 0x7fffffu) | 0x800000u, i32(magnitude >> 23u));
}

// The f32 bits of k · 2^x, rounded to nearest even; infinity on overflow.
fn f32_from_parts(k: u32, x: i32) -> u32 {
    if (k == 0u) { return 0u; }
    let lead = countLeadingZeros(k);
    let m = k << lead;
    let biased = x + 158 - i32(lead);
    let drop = u32(8 + max(1 - biased, 0));
    if (drop > 32u) { return 0u; }
    // m / 2^drop, as whole and remainder; a shift by 32 is not defined.
    let kept = select(m >> drop, 0u, drop == 32u);
    let rest = m << (32u - drop);
    let up = u32(rest > 0x80000000u || (rest == 0x80000000u && (kept & 1u) == 1u));
    let exponent = u32(clamp(biased - 1, 0, 254));
    return min((exponent << 23u) + kept + up, F32_INFINITY);
}

fn f32_from_bf16(h: u32) -> u32 { return h << 16u; }

fn f32_from_f16(h: u32) -> u32 {
    let sign = (h & 0x8000u) << 16u;
    let magnitude = h & 0x7fffu;
    if (magnitude >= 0x7c00u) { return sign | F32_INFINITY | ((magnitude & 0x3ffu) << 13u); }
    if (magnitude >= 0x0400u) { return sign | ((magnitude << 13u) + 0x38000000u); }
    return sign | f32_from_parts(magnitude, -24);
}

fn bf16_from_f32(x: u32) -> u32 {
    if ((x & 0x7fffffffu) > F32_INFINITY) { return 0x7fc0u; }
    return (x + 0x7fffu + ((x >> 16u) & 1u)) >> 16u;
}

fn f16_from_f32(x: u32) -> u32 {
    let sign = (x >> 16u) & 0x8000u;
    let magnitude = x & 0x7fffffffu;
    if (magnitude > F32_INFINITY) { return 0x7e00u; }
    // 65520 and above round to infinity.
    if (magnitude >= 0x477ff000u) { return sign | 0x7c00u; }
    if (magnitude >= 0x38800000u) {
        return sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13u) & 1u)) >> 13u);
    }
    // A subnormal f16 counts in units of 2^-24.
    let n = f32_normalize(x);
    let shift = u32(min(126 - n.e, 31));
    let kept = n.m >> shift;
    let rest = n.m & ((1u << shift) - 1u);
    let half = 1u << (shift - 1u);
    return sign | (kept + u32(rest > half || (rest == half && (kept & 1u) == 1u)));
}
