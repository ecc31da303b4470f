//! An oracle for quantization, slow and obvious: it searches the table of an element's values, in f64, where every
//! quantity that occurs is exact. It shares no code with the crate but the random bits and the layout.

use microscaling::{
    Axis, Block, Element, Layout, QuantizeDesc, Rounding, ScaleFormat, ScaleRule, rng::RoundingBits,
};

/// The non-negative finite values of a format, code by code, from OCP MX v1.0's tables.
pub fn magnitudes(element: Element) -> Vec<f64> {
    let minifloat = |mantissa: i32, bias: i32, codes: i32| {
        (0..codes)
            .map(|code| {
                let (e, m) = (code >> mantissa, code & ((1 << mantissa) - 1));
                let unit = 2f64.powi(e.max(1) - bias - mantissa);
                f64::from(if e > 0 { m + (1 << mantissa) } else { m }) * unit
            })
            .collect()
    };
    match element {
        Element::E2M1 => minifloat(1, 1, 8),
        Element::E2M3 => minifloat(3, 1, 32),
        Element::E3M2 => minifloat(2, 3, 32),
        Element::E4M3 => minifloat(3, 7, 127),
        Element::E5M2 => minifloat(2, 15, 124),
        Element::Int8 => (0..128).map(|code| f64::from(code) / 64.0).collect(),
    }
}

fn emax(element: Element) -> i32 {
    match element {
        Element::E2M1 | Element::E2M3 => 2,
        Element::E3M2 => 4,
        Element::E4M3 => 8,
        Element::E5M2 => 15,
        Element::Int8 => 0,
    }
}

fn mantissa_bits(element: Element) -> i32 {
    match element {
        Element::E2M1 => 1,
        Element::E3M2 | Element::E5M2 => 2,
        Element::E2M3 | Element::E4M3 => 3,
        Element::Int8 => 6,
    }
}

/// The magnitude code of `|x| / unit`, where both are positive and `unit · value` is exact in f64 for every value and
/// every point that a rounding compares with.
pub fn round(values: &[f64], x: f64, unit: f64, bits: Option<u16>) -> usize {
    let above = values.partition_point(|v| v * unit <= x); // values[above - 1] <= x < values[above]
    let low = above - 1;
    if above == values.len() {
        return low;
    }
    let (a, b) = (values[low], values[above]);
    let up = match bits {
        None => {
            let tie = (a + b) / 2.0 * unit;
            x > tie || (x == tie && low % 2 == 1)
        }
        // fraction + (r + 1/2) / 2^16 >= 1
        Some(r) => x >= (a + (b - a) * (1.0 - (f64::from(r) + 0.5) / 65536.0)) * unit,
    };
    low + usize::from(up)
}

fn floor_log2(x: f64) -> i32 {
    // f64 subnormals do not occur: the smallest f32 is 2^-149.
    (x.to_bits() >> 52) as i32 - 1023
}

fn e8m0(element: Element, rule: ScaleRule, amax: f64) -> u8 {
    let max = *magnitudes(element).last().unwrap();
    let floor = floor_log2(amax);
    let power = |e: i32| 2f64.powi(e);
    let exponent = match rule {
        ScaleRule::Floor => floor - emax(element),
        ScaleRule::Ceil => (if power(floor) == amax { floor } else { floor + 1 }) - emax(element),
        ScaleRule::Rceil => (-300..300).find(|e| amax <= max * power(*e)).unwrap(),
        ScaleRule::Even => {
            let unit = power(floor - mantissa_bits(element));
            floor_log2((amax / unit + 0.5).floor() * unit) - emax(element)
        }
    };
    (exponent + 127).clamp(0, 254) as u8
}

/// Codes (one a byte, `[lines, padded line]`), scales, tensor-wide scale, blocks that are not finite.
pub struct Quantized {
    pub codes: Vec<u8>,
    pub scales: Vec<u8>,
    pub tensor_scale: f32,
    pub nonfinite: u32,
}

pub fn quantize(x: &[f32], rows: usize, cols: usize, desc: &QuantizeDesc) -> Quantized {
    quantize_times(1.0, x, rows, cols, desc)
}

/// The elements times a factor, rounded to f32, under the scales that follow from them without it.
pub fn quantize_times(
    factor: f64,
    x: &[f32],
    rows: usize,
    cols: usize,
    desc: &QuantizeDesc,
) -> Quantized {
    let QuantizeDesc { spec, axis, .. } = *desc;
    let element = spec.element;
    let (n, across) = match spec.block {
        Block::Vector(n) => (n as usize, 1),
        Block::Square(n) => (n as usize, n as usize),
        _ => unreachable!(),
    };
    let (lines, len) = if axis == Axis::One { (rows, cols) } else { (cols, rows) };
    let at = |line: usize, k: usize| {
        if line >= lines || k >= len {
            0.0
        } else if axis == Axis::One {
            x[line * cols + k]
        } else {
            x[k * cols + line]
        }
    };
    let values = magnitudes(element);
    let bits = RoundingBits::new(desc.rounding, cols);
    let nvfp4 = spec.scale == ScaleFormat::E4M3;
    let e4m3 = magnitudes(Element::E4M3);
    let tensor_amax = x.iter().filter(|v| v.is_finite()).fold(0f32, |a, v| a.max(v.abs()));
    let tensor_scale = match desc.tensor_scale {
        _ if !nvfp4 => 1.0,
        Some(scale) => scale,
        None if tensor_amax == 0.0 => 1.0,
        // f64 division, then f32: doubly rounded, which is right since 53 >= 2·24 + 2 (Figueroa 1995).
        None => ((f64::from(tensor_amax) / 2688.0) as f32).max(f32::MIN_POSITIVE),
    };
    let blocks = len.div_ceil(n);
    let scale_rows = lines.div_ceil(across);
    let mut out = Quantized {
        codes: vec![0; lines * blocks * n],
        scales: vec![0; scale_rows * blocks],
        tensor_scale,
        nonfinite: 0,
    };
    for s in 0..scale_rows {
        for b in 0..blocks {
            let members: Vec<_> = (s * across..((s + 1) * across).min(lines))
                .flat_map(|line| (b * n..(b + 1) * n).map(move |k| (line, k)))
                .collect();
            let scale = &mut out.scales[s * blocks + b];
            if members.iter().any(|(line, k)| !at(*line, *k).is_finite()) {
                *scale = if nvfp4 { 0x7f } else { 0xff };
                out.nonfinite += 1;
                continue;
            }
            let amax =
                members.iter().fold(0f64, |a, (line, k)| a.max(f64::from(at(*line, *k)).abs()));
            let rule = desc.scale_rule;
            let unit = if nvfp4 {
                let six = 6.0 * f64::from(tensor_scale);
                let code = match rule {
                    _ if amax == 0.0 => 0,
                    Some(ScaleRule::Rceil) => {
                        e4m3.iter().position(|v| v * six >= amax).unwrap_or(126).max(1)
                    }
                    _ => round(&e4m3, amax, six, None).max(1),
                };
                *scale = code as u8;
                e4m3[code] * f64::from(tensor_scale)
            } else {
                *scale = if amax == 0.0 {
                    0
                } else {
                    e8m0(element, rule.unwrap_or(ScaleRule::Floor), amax)
                };
                2f64.powi(i32::from(*scale) - 127)
            };
            for (line, k) in members {
                let v = (f64::from(at(line, k)) * factor) as f32;
                let (row, col) = if axis == Axis::One { (line, k) } else { (k, line) };
                let r = bits.as_ref().filter(|_| k < len).map(|bits| bits.element(row, col));
                let magnitude =
                    if unit == 0.0 { 0 } else { round(&values, f64::from(v).abs(), unit, r) };
                let negative = v.is_sign_negative();
                out.codes[line * blocks * n + k] = match element {
                    Element::Int8 if negative => (magnitude as u8).wrapping_neg(),
                    Element::Int8 => magnitude as u8,
                    _ => (u8::from(negative) << (element.bits() - 1)) | magnitude as u8,
                };
            }
        }
    }
    out
}

/// Packs one-a-byte codes as a bit stream, a bit at a time.
pub fn pack(bits: u32, codes: &[u8]) -> Vec<u8> {
    let mut out = vec![0u8; codes.len() * bits as usize / 8];
    for (i, code) in codes.iter().enumerate() {
        for bit in 0..bits as usize {
            let to = i * bits as usize + bit;
            out[to / 8] |= ((code >> bit) & 1) << (to % 8);
        }
    }
    out
}

/// The f32 values of a packed tensor, row-major.
pub fn dequantize(layout: &Layout, codes: &[u8], scales: &[u8], tensor_scale: f32) -> Vec<f32> {
    let spec = layout.spec;
    let bits = spec.element.bits() as usize;
    let (n, across) = (spec.block.len(), spec.block.lines());
    let len = if layout.axis == Axis::One { layout.cols } else { layout.rows };
    let blocks = len.div_ceil(n);
    let line_bytes = blocks * n * bits / 8;
    let values = magnitudes(spec.element);
    let e4m3 = magnitudes(Element::E4M3);
    let mut out = Vec::with_capacity(layout.rows * layout.cols);
    for row in 0..layout.rows {
        for col in 0..layout.cols {
            let (line, k) = if layout.axis == Axis::One { (row, col) } else { (col, row) };
            let code = (0..bits).fold(0usize, |code, bit| {
                let from = k * bits + bit;
                code | (usize::from(codes[line * line_bytes + from / 8] >> (from % 8)) & 1) << bit
            });
            let scale = scales[line / across * blocks + k / n];
            let unit = match spec.scale {
                ScaleFormat::E4M3 => e4m3
                    .get(usize::from(scale & 0x7f))
                    .map_or(f64::NAN, |v| v * f64::from(tensor_scale)),
                _ if scale == 255 => f64::NAN,
                _ => 2f64.powi(i32::from(scale) - 127),
            };
            let value = if spec.element == Element::Int8 {
                f64::from(code as u8 as i8) / 64.0
            } else {
                let sign = if code >> (bits - 1) == 1 { -1.0 } else { 1.0 };
                let magnitude = code & ((1 << (bits - 1)) - 1);
                let special = match (spec.element, magnitude) {
                    (Element::E5M2, 0x7c) => f64::INFINITY,
                    _ => f64::NAN,
                };
                sign * values.get(magnitude).copied().unwrap_or(special)
            };
            let value = (value * unit) as f32;
            // The crate writes one NaN; arithmetic leaves its sign open.
            out.push(if value.is_nan() { f32::from_bits(0x7fc0_0000) } else { value });
        }
    }
    out
}

/// Descriptors over all formats, axes and roundings, rules taking turns.
pub fn descriptors() -> Vec<QuantizeDesc> {
    let mut out = Vec::new();
    for (i, spec) in microscaling::kernels::all_specs().into_iter().enumerate() {
        for axis in [Axis::Zero, Axis::One] {
            for stochastic in [false, true] {
                let rules: &[ScaleRule] = match spec.scale {
                    ScaleFormat::E4M3 => &[ScaleRule::Even, ScaleRule::Rceil],
                    _ => &[ScaleRule::Floor, ScaleRule::Ceil, ScaleRule::Rceil, ScaleRule::Even],
                };
                out.push(QuantizeDesc {
                    spec,
                    axis,
                    scale_rule: Some(rules[(i + out.len() / 2) % rules.len()]),
                    rounding: if stochastic {
                        Rounding::Stochastic { seed: 7 << 32 | 5, stream: 11 << 32 | i as u64 }
                    } else {
                        Rounding::NearestEven
                    },
                    tensor_scale: None,
                });
            }
        }
    }
    out
}
