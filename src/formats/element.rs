//! Element codecs: f32 bits ↔ codes, in integers only.
//!
//! One routine serves all six formats. A finite f32 is normalised to `m · 2^(e−30)` with
//! `2^30 ≤ m < 2^31`; below the element's smallest normal exponent `m` is shifted right, so that in both
//! regions `m >> (30 − mantissa_bits)` counts units in the last place, and a carry out of the mantissa
//! lands in the exponent by itself. MXINT8 is the same thing with a single binade and two's complement.
//!
//! Numerics: exact; NaN and infinity never get here (they make the whole block NaN, see
//! [`crate::kernels::quantize`]). Source: OCP MX v1.0, section 5.3. Shader: `shaders/lib/element.wgsl`.

/// An element format of OCP MX v1.0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// FP4: 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives.
    E2M1,
    /// FP6 with more precision: up to 7.5.
    E2M3,
    /// FP6 with more range: up to 28.
    E3M2,
    /// FP8 with more precision: up to 448, one NaN code a sign, no infinity.
    E4M3,
    /// FP8 with more range: up to 57344, with infinities and NaNs.
    E5M2,
    /// Two's complement in 64ths: −127/64 … 127/64; −2 decodes but is never produced.
    Int8,
}

/// How a single element is rounded; the element-wise half of [`crate::Rounding`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    /// To nearest, ties to even.
    NearestEven,
    /// Away from zero when `fraction + (r + ½)·2⁻¹⁶ ≥ 1` for the 16 random bits `r`
    /// (gfloat's `RoundMode.StochasticFast` with `srnumbits=16`).
    Stochastic(u16),
    /// Towards +∞ of a positive number; for scales.
    Up,
}

impl Element {
    /// All six, in order of size.
    pub const ALL: [Element; 6] =
        [Element::E2M1, Element::E2M3, Element::E3M2, Element::E4M3, Element::E5M2, Element::Int8];

    /// The spec's name in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Element::E2M1 => "e2m1",
            Element::E2M3 => "e2m3",
            Element::E3M2 => "e3m2",
            Element::E4M3 => "e4m3",
            Element::E5M2 => "e5m2",
            Element::Int8 => "int8",
        }
    }

    /// Bits of a code.
    pub const fn bits(self) -> u32 {
        match self {
            Element::E2M1 => 4,
            Element::E2M3 | Element::E3M2 => 6,
            Element::E4M3 | Element::E5M2 | Element::Int8 => 8,
        }
    }

    /// Explicit mantissa bits; for INT8 the fraction bits of its one binade.
    pub const fn mantissa_bits(self) -> u32 {
        match self {
            Element::E2M1 => 1,
            Element::E3M2 | Element::E5M2 => 2,
            Element::E2M3 | Element::E4M3 => 3,
            Element::Int8 => 6,
        }
    }

    /// Exponent of the smallest normal number (1 − bias); 0 for INT8.
    pub const fn emin(self) -> i32 {
        match self {
            Element::E2M1 | Element::E2M3 | Element::Int8 => 0,
            Element::E3M2 => -2,
            Element::E4M3 => -6,
            Element::E5M2 => -14,
        }
    }

    /// Exponent of the largest normal number.
    pub const fn emax(self) -> i32 {
        match self {
            Element::E2M1 | Element::E2M3 => 2,
            Element::E3M2 => 4,
            Element::E4M3 => 8,
            Element::E5M2 => 15,
            Element::Int8 => 0,
        }
    }

    /// The magnitude code of the largest finite value.
    pub const fn max_code(self) -> u32 {
        match self {
            Element::E2M1 => 0x7,
            Element::E2M3 | Element::E3M2 => 0x1f,
            Element::E4M3 => 0x7e,
            Element::E5M2 => 0x7b,
            Element::Int8 => 0x7f,
        }
    }

    /// The 23-bit f32 fraction of the largest value: 6 = 1.5·2², 448 = 1.75·2⁸, ….
    pub const fn max_fraction(self) -> u32 {
        let mantissa = self.mantissa_bits();
        (self.max_code() & ((1 << mantissa) - 1)) << (23 - mantissa)
    }

    /// The largest finite value.
    pub fn max(self) -> f32 {
        self.decode(self.max_code() as u8)
    }

    /// Encodes a finite f32 divided by 2^(`scale`−127), saturating. Exact rounding of the quotient.
    #[inline(always)]
    pub fn encode(self, x: u32, scale: u8, round: Round) -> u8 {
        let (m, e) = normalize(x);
        self.assemble(x >> 31, self.round(m << 7, e - i32::from(scale), round))
    }

    /// Rounds `m · 2^(e−30)`, `m < 2^31`, to the magnitude code nearest by `round`, saturating.
    /// A quotient that is not exact comes truncated, with a bit below set: see `scale::quotient`.
    #[inline(always)]
    pub(crate) fn round(self, m: u32, e: i32, round: Round) -> u32 {
        let mantissa = self.mantissa_bits();
        let fraction_bits = 30 - mantissa;
        let d = e - self.emin();
        let shift = (-d).clamp(0, 31) as u32;
        let fixed = m >> shift;
        let increment = match round {
            Round::NearestEven => (1 << (fraction_bits - 1)) - 1 + ((fixed >> fraction_bits) & 1),
            Round::Stochastic(r) => {
                (u32::from(r) << (fraction_bits - 16)) | (1 << (fraction_bits - 17))
            }
            Round::Up => {
                // What the shift cuts off must still round up.
                let sticky = u32::from(fixed << shift != m);
                (1 << fraction_bits) - 1 + sticky
            }
        };
        let units = (fixed + increment) >> fraction_bits;
        (((d.max(0) as u32) << mantissa) + units).min(self.max_code())
    }

    /// Puts sign and magnitude together: sign bit on top, or two's complement for INT8.
    #[inline(always)]
    pub(crate) fn assemble(self, sign: u32, magnitude: u32) -> u8 {
        match self {
            Element::Int8 => (if sign != 0 { magnitude.wrapping_neg() } else { magnitude }) as u8,
            _ => ((sign << (self.bits() - 1)) | magnitude) as u8,
        }
    }

    /// A code as sign (0 or 1), integer significand and exponent: value = ±k·2^x. Infinity and NaN,
    /// which E4M3 and E5M2 have, come back as `None`.
    #[inline(always)]
    pub fn parts(self, code: u8) -> Option<(u32, u32, i32)> {
        let code = u32::from(code);
        let mantissa = self.mantissa_bits();
        if self == Element::Int8 {
            let v = i32::from(code as u8 as i8);
            return Some((u32::from(v < 0), v.unsigned_abs(), -6));
        }
        let sign = (code >> (self.bits() - 1)) & 1;
        let magnitude = code & ((1 << (self.bits() - 1)) - 1);
        if magnitude > self.max_code() {
            return None;
        }
        let exponent = magnitude >> mantissa;
        let fraction = magnitude & ((1 << mantissa) - 1);
        let k = if exponent > 0 { fraction | (1 << mantissa) } else { fraction };
        Some((sign, k, exponent.max(1) as i32 - 1 + self.emin() - mantissa as i32))
    }

    /// The value of a code without a scale.
    pub fn decode(self, code: u8) -> f32 {
        f32::from_bits(self.decode_scaled(code, 127))
    }

    /// The f32 bits of `code · 2^(scale−127)`, exact; infinity above f32's range. NaN for a NaN code or
    /// scale 255.
    #[inline(always)]
    pub fn decode_scaled(self, code: u8, scale: u8) -> u32 {
        if scale == 255 {
            return NAN;
        }
        match self.parts(code) {
            Some((sign, k, x)) => (sign << 31) | f32_from_parts(k, x + i32::from(scale) - 127),
            // Only E5M2 has infinities: the code just above its largest finite one.
            None if self == Element::E5M2 && code & 0x7f == 0x7c => {
                (u32::from(code >> 7) << 31) | INFINITY
            }
            None => NAN,
        }
    }
}

/// The one NaN that this crate writes: f32's canonical quiet NaN.
pub const NAN: u32 = 0x7fc0_0000;
/// f32's +∞; bits at or above are not finite.
pub const INFINITY: u32 = 0x7f80_0000;

/// The magnitude of f32 bits as `m · 2^(e−127−23)`, with bit 23 of `m` set; zero gives m = 0.
#[inline(always)]
pub(crate) fn normalize(x: u32) -> (u32, i32) {
    let magnitude = x & 0x7fff_ffff;
    let e = (magnitude >> 23) as i32;
    if e == 0 {
        // A subnormal, or zero: move its leading bit to bit 23.
        let shift = magnitude.leading_zeros() as i32 - 8;
        (magnitude << shift, 1 - shift)
    } else {
        ((magnitude & 0x7f_ffff) | 0x80_0000, e)
    }
}

/// The f32 bits of `k · 2^x`, rounded to nearest even; infinity on overflow.
#[inline(always)]
pub(crate) fn f32_from_parts(k: u32, x: i32) -> u32 {
    if k == 0 {
        return 0;
    }
    let lead = k.leading_zeros();
    let m = k << lead; // bit 31 set: k·2^x = m/2^31 · 2^(x+31−lead)
    let biased = x + 31 - lead as i32 + 127;
    // Normal numbers drop 8 bits; subnormals more.
    let drop = (8 + (1 - biased).max(0)).min(33) as u32;
    let (kept, half, sticky) = match drop {
        33 => (0, 0, 1),
        32 => (0, m >> 31, m & 0x7fff_ffff),
        _ => (m >> drop, (m >> (drop - 1)) & 1, m & ((1 << (drop - 1)) - 1)),
    };
    let up = u32::from(half == 1 && (sticky != 0 || kept & 1 == 1));
    // `kept` carries the implicit bit of a normal number: one less in the exponent field.
    let exponent = (biased - 1).clamp(0, 254) as u32;
    ((exponent << 23) + kept + up).min(INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f32_from_parts_rounds_like_the_hardware() {
        // f64 → f32 is one correctly rounded step; k·2^x is exact in f64.
        for x in -200..=140 {
            for k in [
                1u32,
                2,
                3,
                5,
                0x00ff_ffff,
                0x0100_0001,
                0x0180_0000,
                0x7fff_ffff,
                u32::MAX,
                0xffff_ff80,
                0x8000_0080,
            ] {
                let want = (f64::from(k) * 2f64.powi(x)) as f32;
                assert_eq!(f32_from_parts(k, x), want.to_bits(), "{k:#x}·2^{x}");
            }
        }
    }
}
