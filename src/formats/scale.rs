//! The shared scale of a block: E8M0 from the largest magnitude by four rules, and NVFP4's E4M3 under a
//! tensor-wide f32.
//!
//! Numerics: integers only, exact. Shaders: `shaders/lib/scale_e8m0.wgsl`, `shaders/lib/scale_e4m3.wgsl`.

use super::ScaleRule;
use super::element::{Element, INFINITY, NAN, Round, f32_from_parts, normalize};

/// The E8M0 byte that stands for NaN.
pub const E8M0_NAN: u8 = 255;
/// The E4M3 byte that marks a block with NaN or infinity in NVFP4.
pub const E4M3_NAN: u8 = 0x7f;
/// NVFP4: the tensor-wide scale is amax divided by this, 448 · 6.
pub const NVFP4_RANGE: u32 = 2688;
/// The smallest tensor-wide scale, f32's smallest normal number.
const MIN_TENSOR_SCALE: u32 = 0x0080_0000;

/// The f32 value of an E8M0 byte; 0 is 2⁻¹²⁷, an f32 subnormal.
pub fn e8m0_to_f32(byte: u8) -> f32 {
    f32::from_bits(if byte == E8M0_NAN { NAN } else { f32_from_parts(1, i32::from(byte) - 127) })
}

/// The fraction of amax, in units of 2⁻²³, from which on `rule` doubles the scale.
///
/// All four rules are OCP's floor plus a carry: never; above a power of two; above the element's largest
/// value; where rounding amax half up to the element's precision carries into the exponent.
pub const fn carry_threshold(element: Element, rule: ScaleRule) -> u32 {
    match rule {
        ScaleRule::Floor => 1 << 23,
        ScaleRule::Ceil => 1,
        ScaleRule::Rceil => element.max_fraction() + 1,
        ScaleRule::Even => (1 << 23) - (1 << (22 - element.mantissa_bits())),
    }
}

/// The E8M0 byte of a block whose largest magnitude has the f32 bits `amax`; `carry` is
/// [`carry_threshold`]'s. NaN or infinity give [`E8M0_NAN`], zero gives 0, and an exponent outside
/// −127 … 127 is clamped.
#[inline(always)]
pub fn e8m0_from_amax(element: Element, carry: u32, amax: u32) -> u8 {
    if amax >= INFINITY {
        return E8M0_NAN;
    }
    if amax == 0 {
        return 0;
    }
    let (m, e) = normalize(amax);
    let up = i32::from(m & 0x7f_ffff >= carry);
    (e - element.emax() + up).clamp(0, 254) as u8
}

/// NVFP4's tensor-wide scale: the f32 nearest to `amax / 2688`, at least 2⁻¹²⁶; 1 for an all-zero tensor.
/// `amax` is the largest finite magnitude of the tensor, as f32 bits.
pub fn nvfp4_tensor_scale(amax: u32) -> u32 {
    if amax == 0 {
        return 1f32.to_bits();
    }
    let (m, e) = normalize(amax);
    // 2688 = 21 · 2^7. The quotient has 26 or 27 bits; its lowest stands for the remainder.
    let numerator = m << 7;
    let quotient = (numerator / 21) << 1 | u32::from(numerator % 21 != 0);
    f32_from_parts(quotient, e - 127 - 23 - 7 - 7 - 1).max(MIN_TENSOR_SCALE)
}

/// `a / b` of two significands: (m, x) with a/b = m·2^(x−30), 2^30 ≤ m < 2^31, truncated to 26 bits; bit 4 of m
/// is set when anything was cut off, high enough to survive the shift into an element's subnormals.
/// `a < 2^24`, `0 < b < 2^28`.
#[inline(always)]
fn quotient(a: u32, b: u32) -> (u32, i32) {
    if a == 0 {
        return (0, 0);
    }
    // a < 2^24 and b < 2^28: the quotient has at least 32 bits.
    let wide = u64::from(a) << 36;
    let (q, rest) = (wide / u64::from(b), wide % u64::from(b));
    let lead = 63 - q.leading_zeros() as i32;
    let cut = lead - 25;
    let sticky = rest != 0 || q & ((1 << cut) - 1) != 0;
    ((q >> cut << 5) as u32 | u32::from(sticky) << 4, lead - 36)
}

/// NVFP4's block scale: E4M3 of `amax / (6 · tensor_scale)`, rounded once from the exact quotient (to
/// nearest even, or up for [`ScaleRule::Rceil`]), saturating at 448 and, unless the block is all zero, at
/// least 2⁻⁹. NaN or infinity give [`E4M3_NAN`].
#[inline(always)]
pub fn nvfp4_from_amax(amax: u32, tensor_scale: u32, rule: ScaleRule) -> u8 {
    if amax >= INFINITY {
        return E4M3_NAN;
    }
    if amax == 0 {
        return 0;
    }
    let (ma, ea) = normalize(amax);
    let (mt, et) = normalize(tensor_scale);
    let (m, x) = quotient(ma, 3 * mt); // 6 = 3 · 2
    let round = if rule == ScaleRule::Rceil { Round::Up } else { Round::NearestEven };
    Element::E4M3.round(m, x + ea - et - 1, round).max(1) as u8
}

/// Encodes a finite f32 divided by `scale · tensor_scale`, rounding the exact quotient once. A zero scale
/// (an all-zero block) gives a signed zero.
#[inline(always)]
pub fn nvfp4_encode(x: u32, scale: u8, tensor_scale: u32, round: Round) -> u8 {
    let (mx, ex) = normalize(x);
    let (mt, et) = normalize(tensor_scale);
    let magnitude = match Element::E4M3.parts(scale) {
        Some((_, ks, xs)) if ks != 0 => {
            // x / (ks·2^xs · mt·2^(et−127−23)), with x = mx·2^(ex−127−23).
            let (m, q) = quotient(mx, ks * mt);
            Element::E2M1.round(m, q + ex - et - xs, round)
        }
        _ => 0,
    };
    Element::E2M1.assemble(x >> 31, magnitude)
}

/// The f32 bits of `code · scale · tensor_scale`, rounded once; the tensor scale is positive and finite.
#[inline(always)]
pub fn nvfp4_decode(code: u8, scale: u8, tensor_scale: u32) -> u32 {
    let (Some((sign, k, x)), Some((_, ks, xs))) =
        (Element::E2M1.parts(code), Element::E4M3.parts(scale))
    else {
        return NAN;
    };
    let (mt, et) = normalize(tensor_scale);
    // At most 12·15·2^24 < 2^32.
    (sign << 31) | f32_from_parts(k * ks * mt, x + xs + et - 127 - 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotient_is_truncated_with_a_sticky_bit() {
        let mut a = 0x80_0001u32;
        for b in [3u32, 7, 0x80_0000 * 3, 0xff_ffff * 15, 0xff_ffff * 3, 0x80_0000, 1] {
            for _ in 0..1000 {
                a = (a.wrapping_mul(1_664_525).wrapping_add(1_013_904_223) & 0x7f_ffff) | 0x80_0000;
                let (m, x) = quotient(a, b);
                assert!((1 << 30..1u32 << 31).contains(&m));
                // m = ⌊a/b·2^(25−x)⌋·2^5 with the sticky bit: compare in exact integers.
                let scaled = u128::from(a) << (25 - x);
                let (whole, rest) = (scaled / u128::from(b), scaled % u128::from(b));
                assert_eq!(u128::from(m), whole << 5 | u128::from(rest != 0) << 4, "{a} / {b}");
            }
        }
    }
}
