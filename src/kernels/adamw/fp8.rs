//! Adam's moments in eight bits.
//!
//! | | code | value |
//! |---|---|---|
//! | m | E4M3, as in MXFP8 | code · 2^(scale − 127) |
//! | v | E4M4 without a sign, of √v: exponent in the upper four bits, c = L · 2^k with L < 32, k ≤ 14 | (c · 2^(scale − 127))² |
//!
//! A scale is a power of two for 128 elements, the smallest with which the largest one does not clip. Rounding is
//! stochastic, by 16 bits.
//!
//! Why √v: v has the squares' range, twice m's in binades; its root has m's, and E4M3's 18 binades suffice for both. COAT
//! (arXiv 2410.19313) expands ranges by a power that it fits for each group of 128 instead; torchao's `AdamFp8` stores m and
//! v in E4M3 under an f32 scale for 256 elements, to nearest; FP8-LM (MS-AMP) m in E4M3 and v in f16. Why four mantissa
//! bits: v is never negative, and the sign's bit halves the noise. Why a power of two for a scale: an element format with
//! an exponent gains nothing from a finer one, decoding is exact, and it is a byte.
//!
//! Why stochastic: v decays by the factor β2 a step. To nearest, a decay of 5% never leaves a code whose neighbour is 6% to
//! 12% away, and v sticks to its largest value (arXiv 2603.16731 calls such states stale). Rounding √v stochastically keeps its
//! expectation but not v's: E[q²] = v + Var q. That excess, a relative 0.00035 on average and 0.0014 in E4M3, comes back every
//! step: v is too large by the factor 1 / (1 − 0.00035 β2 / (1 − β2)), and grows without bound where there is none. So the
//! root rounds up with the probability (v − a²) / (b² − a²) between the neighbours a and b: then E[q²] = v. The noise that
//! remains is a relative 0.038 / √(2(1 − β2)) of v, which is 12% for β2 = 0.95 and 84% for 0.999: for the latter take BF16
//! moments.
//!
//! Why v does not round to zero: with v = 0 and m > 0 the next step is m / ε. What lies below the smallest code becomes
//! that code: such an element, 2⁻¹⁹ of its block's largest, moves less than it should, and never more.
//!
//! Scales stop where the smallest code is 2⁻¹²⁶, so that no decoded value is subnormal. Shader: `lib/moments_fp8.wgsl`.

use crate::formats::element::{Element, Round};

/// Elements that share the scales.
pub(super) const BLOCK: usize = 128;

const M_SCALE_MIN: u8 = 10;
const V_SCALE_MIN: i32 = 64;
const V_SCALE_MAX: i32 = 171;
const LARGEST: u32 = 0x7f7f_ffff;

/// The scale of m for the bits of the largest magnitude: 448 = 1.75 · 2⁸ times it is at least that.
pub(super) fn m_scale(amax: u32) -> u8 {
    let a = amax.min(LARGEST);
    let e = (a >> 23) as i32 - 8 + i32::from(a & 0x7f_ffff > 0x60_0000);
    e.max(i32::from(M_SCALE_MIN)) as u8
}

/// The scale of √v for the bits of the largest v: 31 · 2¹⁴ times it, squared 1.877 · 2³⁷, is at least that.
pub(super) fn v_scale(amax: u32) -> u8 {
    let a = amax.min(LARGEST);
    let e = (a >> 23) as i32 - 127 + i32::from(a & 0x7f_ffff > 0x70_4000);
    (((e - 36) >> 1) + 127).clamp(V_SCALE_MIN, V_SCALE_MAX) as u8
}

#[inline(always)]
pub(super) fn m_decode(code: u8, scale: u8) -> f32 {
    f32::from_bits(Element::E4M3.decode_scaled(code, scale.max(M_SCALE_MIN)))
}

#[inline(always)]
pub(super) fn m_encode(x: f32, scale: u8, r: u16) -> u8 {
    let bits = x.to_bits();
    let finite = bits & 0x8000_0000 | (bits & 0x7fff_ffff).min(LARGEST);
    Element::E4M3.encode(finite, scale, Round::Stochastic(r))
}

#[inline(always)]
pub(super) fn v_decode(code: u8, scale: u8) -> f32 {
    let scale = i32::from(scale).clamp(V_SCALE_MIN, V_SCALE_MAX);
    let k = u32::from(code >> 4).max(1) - 1;
    let root = u32::from(code) - 16 * k;
    let exponent = 127 + 2 * (k as i32 + scale - 127);
    (root * root) as f32 * f32::from_bits((exponent as u32) << 23)
}

#[inline(always)]
pub(super) fn v_encode(x: f32, scale: u8, r: u16) -> u8 {
    let a = (x.to_bits() & 0x7fff_ffff).min(LARGEST);
    let significand = if a >> 23 == 0 { 0 } else { a & 0x7f_ffff | 0x80_0000 };
    // v in squared units of the code: significand · 2^(e − 23), then in those of the code's binade k.
    let e = (a >> 23) as i32 - 127 - 2 * (i32::from(scale) - 127);
    let k = ((e - 8) >> 1).clamp(0, 14);
    let up = (e - 2 * k - 8).min(1);
    // 15 bits after the point.
    let square = if up < 0 { significand >> (-up).min(31) } else { significand << up };
    let whole = square >> 15;
    // Below 1024 f32's root, which is correctly rounded, has the right whole part.
    let mut root = (whole as f32).sqrt() as u32;
    let rest = square - ((root * root) << 15);
    root += u32::from(4 * rest >= (2 * root + 1) * (131_071 - 2 * u32::from(r)));
    // Never to zero.
    root = root.max(u32::from(a != 0));
    (16 * k as u32 + root).min(255) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The f64 definition: the neighbours of √v among the codes, and how likely the upper one is.
    fn neighbours(v: f64, unit: f64) -> (u8, f64) {
        let value = |c: u8| {
            let k = (c >> 4).max(1) - 1;
            (f64::from(c - 16 * k) * 2f64.powi(i32::from(k)) * unit).powi(2)
        };
        let below = (0..=255u8).rev().find(|c| value(*c) <= v).unwrap();
        let above = below.saturating_add(1);
        (below, (v - value(below)) / (value(above) - value(below)))
    }

    #[test]
    fn codes_decode_to_themselves() {
        for scale in [V_SCALE_MIN as u8, 100, 127, V_SCALE_MAX as u8] {
            for code in 0..=255u8 {
                for r in [0, 1, 0x7fff, 0xffff] {
                    let v = v_decode(code, scale);
                    assert!(v == 0.0 || v.is_normal(), "{code} under {scale}");
                    assert_eq!(v_encode(v, scale, r), code, "{v:e} under {scale}");
                    if code & 0x7f != 0x7f {
                        let m = m_decode(code, scale);
                        assert_eq!(m_encode(m, scale, r), code, "{m:e} under {scale}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_largest_of_a_block_does_not_clip() {
        let mut x = 1e-37f32;
        while x < 1e37 {
            for v in [x, x.next_up(), x * 1.3, x * 1.9] {
                let scale = v_scale(v.to_bits());
                let (down, up) =
                    (v_decode(v_encode(v, scale, 0), scale), v_encode(v, scale, 65535));
                assert!(down <= v && v <= v_decode(up, scale), "{v:e} under {scale}");
                // The smallest such scale.
                assert!(scale == V_SCALE_MIN as u8 || v_decode(255, scale - 1) < v, "{v:e}");
                let scale = m_scale(v.to_bits());
                let up = m_encode(v, scale, 65535);
                assert!(m_decode(up, scale) >= v, "{v:e} under {scale}");
            }
            x *= 1.7;
        }
        assert_eq!(v_encode(f32::MAX, v_scale(f32::MAX.to_bits()), 0), 255);
        assert!(v_decode(255, V_SCALE_MAX as u8).is_finite());
    }

    /// Over all 65536 random halves: exactly the probability that keeps E[v], to a step of the halves.
    #[test]
    fn expectations_are_kept() {
        let mut v = 3.3e-12f32;
        let scale = v_scale(1.0f32.to_bits());
        let unit = 2f64.powi(i32::from(scale) - 127);
        while v < 1.0 {
            let (below, p) = neighbours(f64::from(v), unit);
            let ups = (0..=65535u16).filter(|r| v_encode(v, scale, *r) == below + 1).count();
            let rest = (0..=65535u16).filter(|r| v_encode(v, scale, *r) == below).count();
            if below > 0 {
                assert_eq!(ups + rest, 65536, "{v:e}");
                assert!((ups as f64 / 65536.0 - p).abs() <= 1.0 / 65536.0, "{v:e}: {ups}, {p}");
            } else {
                assert_eq!(ups, 65536, "{v:e} became zero");
            }
            v *= 2.37;
        }
        assert_eq!(v_encode(0.0, scale, 65535), 0);
        for m in [0.7f32, -0.01, 3e-5] {
            let scale = m_scale(1.0f32.to_bits());
            let mean = (0..=65535u16).map(|r| f64::from(m_decode(m_encode(m, scale, r), scale)));
            let mean = mean.sum::<f64>() / 65536.0;
            let step = f64::from(m.abs()).max(2f64.powi(-6 + i32::from(scale) - 127)) / 8.0;
            assert!((mean - f64::from(m)).abs() <= step / 65536.0, "{m}: {mean}");
        }
    }
}
