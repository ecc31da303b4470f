// Element codec, generic over the constants BITS, MANTISSA_BITS, EMIN, EMAX, MAX_CODE, IS_INT8, IS_E5M2.
// Needs elem_increment from lib/round_*.wgsl. Twin: src/formats/element.rs.

const FRACTION_BITS = 30u - MANTISSA_BITS;

// Rounds m · 2^(e−30), m < 2^31, to a magnitude code, saturating. r: 16 random bits, if any are used.
fn elem_round(m: u32, e: i32, r: u32) -> u32 {
    let d = e - EMIN;
    let fixed = m >> u32(clamp(-d, 0, 31));
    let units = (fixed + elem_increment(fixed, r)) >> FRACTION_BITS;
    return min((u32(max(d, 0)) << MANTISSA_BITS) + units, MAX_CODE);
}

fn elem_assemble(x: u32, magnitude: u32) -> u32 {
    if (IS_INT8) { return select(magnitude, (0u - magnitude) & 0xffu, (x >> 31u) != 0u); }
    return ((x >> 31u) << (BITS - 1u)) | magnitude;
}

// A finite code as ±k · 2^x.
struct Parts { k: u32, x: i32 }

fn elem_parts(code: u32) -> Parts {
    if (IS_INT8) {
        let v = i32(code << 24u) >> 24u;
        return Parts(u32(abs(v)), -6);
    }
    let magnitude = code & ((1u << (BITS - 1u)) - 1u);
    let exponent = magnitude >> MANTISSA_BITS;
    let fraction = magnitude & ((1u << MANTISSA_BITS) - 1u);
    let k = select(fraction, fraction | (1u << MANTISSA_BITS), exponent > 0u);
    return Parts(k, i32(max(exponent, 1u)) - 1 + EMIN - i32(MANTISSA_BITS));
}

fn elem_sign(code: u32) -> u32 { return (code >> (BITS - 1u)) << 31u; }

// The f32 bits of a code that is infinite or NaN, or 0 if it is neither.
fn elem_special(code: u32) -> u32 {
    if (IS_INT8 || BITS < 8u) { return 0u; }
    let magnitude = code & 0x7fu;
    if (magnitude <= MAX_CODE) { return 0u; }
    if (IS_E5M2 && magnitude == 0x7cu) { return elem_sign(code) | F32_INFINITY; }
    return F32_NAN;
}
