// An MX operand of the tensor tier: f16 values relative to the line's anchor, two a word. A code's bits, put where f16 has
// them, are its value times 2^-OP_HALF; `op_` as in lib/operand.wgsl. Needs lib/halves.wgsl.

const OP_SIGN_SHIFT = 16u - OP_BITS;
const OP_MAGNITUDE_SHIFT = 10u - OP_MANTISSA_BITS;
const OP_SIGNS = 0x80008000u;
const OP_MAGNITUDES = ((OP_CODE_MASK >> 1u) << OP_MAGNITUDE_SHIFT) * 0x10001u;

// The exact tier takes the bits as they are (INT8: the integers). What makes its integers of them goes into the factor.
const OP_COUNT = select(f32(1u << OP_MANTISSA_BITS) * 16384.0, 1.0, OP_INT8);

fn op_exact_factor(scale: u32, anchor: u32) -> f32 { return op_factor(scale, anchor) * OP_COUNT; }

// What makes values of such bits: 2^(OP_HALF + scale - anchor), or NVFP4's scale.
fn op_half_factor(scale: u32, anchor: u32) -> vec2<f16> {
    if (EXACT) { return vec2<f16>(1.0h); }
    if (OP_SCALE_E4M3) { return vec2<f16>(f16(op_relative(scale, anchor, 0u, 0u))); }
    return half2(half_power(OP_HALF + i32(scale) - i32(anchor)) * 0x10001u);
}

fn op_scaled(h: vec2<f16>, factor: vec2<f16>) -> u32 {
    if (EXACT) { return half_bits(h); }
    if (OP_SCALE_E4M3) { return half_bits(h * vec2<f16>(16384.0h) * factor); }
    return half_bits(h * factor);
}

// Two codes in the low bits of a word's halves.
fn op_pair(codes: u32, factor: vec2<f16>) -> u32 {
    if (OP_INT8) {
        let v = vec2<i32>(i32(codes << 24u) >> 24u, i32(codes << 8u) >> 24u);
        return half_bits(vec2<f16>(v) * factor);
    }
    let bits = ((codes << OP_SIGN_SHIFT) & OP_SIGNS) | ((codes << OP_MAGNITUDE_SHIFT) & OP_MAGNITUDES);
    var value = op_scaled(half2(bits), factor);
    if (OP_BITS == 8u && !OP_E5M2) {
        // E4M3's NaN has no infinity's bits.
        if ((codes & 0x7fu) == 0x7fu) { value = (value & 0xffff0000u) | 0x7e00u; }
        if ((codes & 0x7f0000u) == 0x7f0000u) { value = (value & 0xffffu) | 0x7e000000u; }
    }
    return value;
}
