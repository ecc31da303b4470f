//! An oracle for matrix products, slow and obvious: operands decoded from the tables of tests/common/reference.rs to f64,
//! where they are exact, and every output within an interval. It shares no code with the crate's products.

use microscaling::{DType, Element, MxSpec, MxTensor, ScaleFormat, Tier};

use super::reference::magnitudes;

/// An operand: `n` output indices, contracted over `k` positions.
pub struct Lines {
    pub n: usize,
    pub k: usize,
    /// None if dense.
    spec: Option<MxSpec>,
    /// [n, k]: values, the integers of the codes, the scale bytes that they lie under (dense: 127).
    values: Vec<f64>,
    ints: Vec<i64>,
    scales: Vec<u8>,
    /// [n]: the largest scale byte of the line, 255 with a NaN; 127 for E4M3 scales and dense ones.
    anchors: Vec<u8>,
    tensor_scale: f32,
}

/// The value of a code; E5M2 has infinities, E4M3 and E5M2 have NaN.
fn element_value(element: Element, table: &[f64], code: usize) -> f64 {
    if element == Element::Int8 {
        return f64::from(code as u8 as i8) / 64.0;
    }
    let sign_bit = 1 << (element.bits() - 1);
    let special =
        if element == Element::E5M2 && code & 0x7f == 0x7c { f64::INFINITY } else { f64::NAN };
    let magnitude = table.get(code & (sign_bit - 1)).copied().unwrap_or(special);
    if code & sign_bit == 0 { magnitude } else { -magnitude }
}

impl Lines {
    /// Along the lines of the storage, or over them.
    pub fn mx(x: &MxTensor, transposed: bool) -> Lines {
        let layout = x.layout();
        let spec = layout.spec;
        let bits = spec.element.bits() as usize;
        let [n, k] = match transposed {
            false => [layout.lines(), layout.line_len()],
            true => [layout.line_len(), layout.lines()],
        };
        let (table, e4m3) = (magnitudes(spec.element), magnitudes(Element::E4M3));
        let blocks = layout.line_len().div_ceil(spec.block.len());
        let line_bytes = blocks * spec.block.len() * bits / 8;
        // Of the integers.
        let unit = match spec.element {
            Element::E2M1 => 2.0,
            Element::E2M3 => 8.0,
            _ => 64.0,
        };
        let mut lines = Lines {
            n,
            k,
            spec: Some(spec),
            values: Vec::with_capacity(n * k),
            ints: Vec::with_capacity(n * k),
            scales: Vec::with_capacity(n * k),
            anchors: vec![0; n],
            tensor_scale: x.tensor_scale(),
        };
        for i in 0..n {
            for kk in 0..k {
                let (line, at) = if transposed { (kk, i) } else { (i, kk) };
                let start = line * line_bytes * 8 + at * bits;
                let code = (0..bits).fold(0, |code, bit| {
                    let from = start + bit;
                    code | (usize::from(x.codes()[from / 8] >> (from % 8)) & 1) << bit
                });
                let scale = x.scales()[line / spec.block.lines() * blocks + at / spec.block.len()];
                let value = element_value(spec.element, &table, code);
                let (factor, anchor) = match spec.scale {
                    ScaleFormat::E4M3 => match e4m3.get(usize::from(scale & 0x7f)) {
                        Some(v) => (v * f64::from(x.tensor_scale()), 127),
                        None => (f64::NAN, 255),
                    },
                    _ if scale == 255 => (f64::NAN, 255),
                    _ => (2f64.powi(i32::from(scale) - 127), scale),
                };
                lines.values.push(value * factor);
                lines.ints.push((value * unit) as i64);
                lines.scales.push(scale);
                lines.anchors[i] = lines.anchors[i].max(anchor);
            }
        }
        lines
    }

    /// Row-major values; rows are output indices, or, transposed, columns are.
    pub fn dense(values: &[f32], [rows, cols]: [usize; 2], transposed: bool) -> Lines {
        let [n, k] = if transposed { [cols, rows] } else { [rows, cols] };
        let mut out = Vec::with_capacity(n * k);
        for i in 0..n {
            for kk in 0..k {
                let at = if transposed { kk * cols + i } else { i * cols + kk };
                out.push(f64::from(values[at]));
            }
        }
        Lines {
            n,
            k,
            spec: None,
            values: out,
            ints: vec![0; n * k],
            scales: vec![127; n * k],
            anchors: vec![127; n],
            tensor_scale: 1.0,
        }
    }

    /// Some of the output indices and of the positions. Anchors stay those of whole lines.
    pub fn part(&self, first: usize, n: usize, first_k: usize, k: usize) -> Lines {
        fn cut<T: Copy>(from: &[T], pitch: usize, at: [usize; 4]) -> Vec<T> {
            let [first, n, first_k, k] = at;
            (first..first + n)
                .flat_map(|i| from[i * pitch + first_k..][..k].iter().copied())
                .collect()
        }
        let at = [first, n, first_k, k];
        Lines {
            n,
            k,
            spec: self.spec,
            values: cut(&self.values, self.k, at),
            ints: cut(&self.ints, self.k, at),
            scales: cut(&self.scales, self.k, at),
            anchors: self.anchors[first..first + n].to_vec(),
            tensor_scale: self.tensor_scale,
        }
    }

    fn e4m3(&self) -> bool {
        self.spec.is_some_and(|spec| spec.scale == ScaleFormat::E4M3)
    }

    /// What the anchor stands for.
    fn unit(&self, i: usize) -> f64 {
        2f64.powi(i32::from(self.anchors[i]) - 127) * f64::from(self.tensor_scale)
    }

    /// The exact tier's factor of a segment, and its power of two in all.
    fn factor(&self, i: usize, kk: usize, e4m3: &[f64]) -> f64 {
        let scale = self.scales[i * self.k + kk];
        if self.e4m3() {
            return e4m3[usize::from(scale & 0x7f)];
        }
        let below = i32::from(scale) - i32::from(self.anchors[i]);
        if below < -107 { 0.0 } else { 2f64.powi(below + 44) }
    }

    fn exponent(&self) -> i32 {
        let element = match self.spec.expect("the exact tier has MX operands").element {
            Element::E2M1 => -1,
            Element::E2M3 => -3,
            _ => -6,
        };
        if self.e4m3() { element } else { element - 44 }
    }

    /// By how much each element may be wrong in a tier that is bounded: by nothing, or by its magnitude.
    ///
    /// - ALU: elements whose scale is less than 2^-100 of the anchor count as zero; dense subnormals may be flushed.
    /// - Tensor: f16 holds every element exactly (at most 8 significant bits of 11: NVFP4's products of E2M1 and E4M3 have
    ///   2 + 4) that is at least its smallest normal number, 2^-14 of the anchor. Below, it is rounded, by less than its
    ///   magnitude, or flushed. Elements whose scale is less than 2^-24 of the anchor (INT8, which has its point six
    ///   places further up: 2^-18) have a factor that is no f16, and count as zero whatever they are.
    fn errors(&self, tier: Tier) -> Vec<f64> {
        let int8 = self.spec.is_some_and(|spec| spec.element == Element::Int8);
        let mut errors = Vec::with_capacity(self.values.len());
        for i in 0..self.n {
            for at in i * self.k..(i + 1) * self.k {
                let value = self.values[at].abs();
                let below = match self.spec {
                    Some(_) if !self.e4m3() => {
                        i32::from(self.anchors[i]) - i32::from(self.scales[at])
                    }
                    _ => 0,
                };
                let lost = match tier {
                    Tier::Tensor => {
                        value < 2f64.powi(-14) * self.unit(i) || below > if int8 { 18 } else { 24 }
                    }
                    _ => below > 100 || self.spec.is_none() && value < 2f64.powi(-126),
                };
                errors.push(if lost { value } else { 0.0 });
            }
        }
        errors
    }
}

/// The interval in which f32 `alpha · A · Bᵀ` must lie; exact tier: one value. NaN at both ends: NaN.
pub type Interval = [f32; 2];

/// All outputs, row-major.
pub fn product(tier: Tier, a: &Lines, b: &Lines, alpha: f32) -> Vec<Interval> {
    assert_eq!(a.k, b.k);
    match tier {
        Tier::Exact => exact(a, b, alpha),
        _ => bounded(tier, a, b, alpha),
    }
}

/// As src/kernels/matmul.rs defines it.
fn exact(a: &Lines, b: &Lines, alpha: f32) -> Vec<Interval> {
    let short = |x: &Lines| x.spec.is_some_and(|spec| spec.block.len() < 32);
    let segment = if short(a) || short(b) { 16 } else { 32 };
    let e4m3 = magnitudes(Element::E4M3);
    let mut out = Vec::with_capacity(a.n * b.n);
    for i in 0..a.n {
        for j in 0..b.n {
            if a.anchors[i] == 255 || b.anchors[j] == 255 {
                out.push([f32::NAN; 2]);
                continue;
            }
            let mut sum = 0f32;
            for start in (0..a.k).step_by(segment) {
                let end = a.k.min(start + segment);
                let [ia, ib] = [&a.ints[i * a.k..], &b.ints[j * b.k..]];
                let s: i64 = (start..end).map(|kk| ia[kk] * ib[kk]).sum();
                let factor = a.factor(i, start, &e4m3) * b.factor(j, start, &e4m3);
                // Rounded once: the product has at most 28 bits and is exact in f32, and f64 and then f32 is as good as
                // f32 at once for a sum of two f32 (53 >= 2 · 24 + 2, Figueroa 1995).
                sum = (f64::from(sum) + s as f64 * factor) as f32;
            }
            let power = i32::from(a.anchors[i]) + i32::from(b.anchors[j]) - 254;
            let power = power + a.exponent() + b.exponent();
            let value = finished(sum, [alpha, a.tensor_scale, b.tensor_scale], power);
            out.push([value; 2]);
        }
    }
    out
}

/// sum · factors · 2^power: the significands are multiplied in f32, one factor after the other, then rounded once to what
/// f32 has at that exponent. With factors that are powers of two only that last step rounds.
fn finished(sum: f32, factors: [f32; 3], power: i32) -> f32 {
    // A significand in [1, 2) and its exponent.
    let split = |x: f32| {
        let bits = f64::from(x.abs()).to_bits();
        (f64::from_bits(bits & ((1 << 52) - 1) | 1023 << 52), (bits >> 52) as i32 - 1023)
    };
    if sum == 0.0 || factors[0] == 0.0 {
        return 0.0;
    }
    let (mut significand, mut exponent) = split(sum);
    for factor in factors {
        let (m, e) = split(factor);
        // A product of two f32 is exact in f64.
        significand = f64::from((significand * m) as f32);
        exponent += e;
    }
    let magnitude = (significand * 2f64.powi(exponent + power)) as f32;
    if (sum < 0.0) != (factors[0] < 0.0) { -magnitude } else { magnitude }
}

/// The sum in f64 (whose own error, k · 2^-53 of the magnitudes, is below one of the eight units to spare), give or take
/// - what the elements' errors make of it: Σ ea |b| + |a| eb + ea eb;
/// - the sums in f32: k additions of relative error 2^-24, or 2^-23 if the device truncates, to no more than the sum of
///   the magnitudes; γ = (k + 8) · 2^-23 covers them to second order (k < 2^20), eight more for the factors at the end
///   (alpha and two tensor-wide scales: 3 · 2^-24) and sums that are taken in parts. Tensor units add several products at
///   once and may truncate each when it is aligned: twice that;
/// - k products and k sums that may be flushed to zero below 2^-126, relative to the anchors.
///
/// The ends are rounded to f32: rounding is monotone, so an output that is rounded to nearest stays between them.
fn bounded(tier: Tier, a: &Lines, b: &Lines, alpha: f32) -> Vec<Interval> {
    let (ea, eb) = (a.errors(tier), b.errors(tier));
    let gamma = (a.k as f64 + 8.0) * 2f64.powi(if tier == Tier::Tensor { -22 } else { -23 });
    let mut out = Vec::with_capacity(a.n * b.n);
    for i in 0..a.n {
        for j in 0..b.n {
            if a.anchors[i] == 255 || b.anchors[j] == 255 {
                out.push([f32::NAN; 2]);
                continue;
            }
            let (at, bt) = (i * a.k..(i + 1) * a.k, j * b.k..(j + 1) * b.k);
            let terms = a.values[at.clone()].iter().zip(&ea[at]);
            let terms = terms.zip(b.values[bt.clone()].iter().zip(&eb[bt]));
            let (mut sum, mut magnitude, mut lost) = (0.0, 0.0, 0.0);
            for ((x, ex), (y, ey)) in terms {
                sum += x * y;
                magnitude += (x * y).abs();
                lost += ex * y.abs() + x.abs() * ey + ex * ey;
            }
            let unit = a.unit(i) * b.unit(j);
            let error =
                lost + gamma * (magnitude + lost) + 2.0 * a.k as f64 * 2f64.powi(-126) * unit;
            let (sum, error) = (sum * f64::from(alpha), error * f64::from(alpha.abs()));
            out.push([(sum - error) as f32, (sum + error) as f32]);
        }
    }
    out
}

/// f32 values of little-endian elements against intervals, which are narrowed to `dtype` as outputs are; exact: byte for
/// byte. Says where the first one lies outside.
pub fn compare(
    dtype: DType,
    exact: bool,
    got: &[u8],
    want: &[Interval],
    n: usize,
) -> Result<(), String> {
    if got.len() != want.len() * dtype.size() {
        return Err(format!("{} bytes, want {} elements", got.len(), want.len()));
    }
    let ends = [0, 1].map(|end| {
        // Arithmetic leaves the sign of a NaN open.
        let one_nan = |v: f32| if v.is_nan() { f32::NAN } else { v };
        let values: Vec<f32> = want.iter().map(|ends| one_nan(ends[end])).collect();
        super::narrowed(dtype, &values)
    });
    let (mut wrong, mut first) = (0, None);
    let size = dtype.size();
    for at in 0..want.len() {
        let [low, high, got] = [&ends[0], &ends[1], got].map(|b| &b[at * size..(at + 1) * size]);
        let fits = if exact || want[at][0].is_nan() || want[at][1].is_nan() {
            got == low
        } else {
            let [low, high, got] = [low, high, got].map(|b| super::to_f32(dtype, b)[0]);
            low <= got && got <= high
        };
        if !fits {
            wrong += 1;
            first.get_or_insert(at);
        }
    }
    let Some(at) = first else { return Ok(()) };
    let bits: Vec<_> =
        got[at * size..(at + 1) * size].iter().rev().map(|b| format!("{b:02x}")).collect();
    Err(format!(
        "{wrong} of {} outputs are wrong, the first at ({}, {}): {:e} = {}, want {:e} to {:e}",
        want.len(),
        at / n.max(1),
        at % n.max(1),
        super::to_f32(dtype, &got[at * size..(at + 1) * size])[0],
        bits.concat(),
        want[at][0],
        want[at][1]
    ))
}
