//! The known-answer test that a route passes for a pair of formats before its first product of that pair on a device.
//!
//! Every answer is the CPU engine's, to the value, and every product and sum is exact in any order also in accumulators of few
//! bits; two kinds of data make that possible:
//!
//! - *Sums*: elements are 0 and ±1, scales 1, 2 and 4, differing from block to block, so that every partial sum is a whole number
//!   below 2¹². Then crosses: a scale of A and one of B are doubled, in places that cover the corners of all scale layouts, or an
//!   element of each changes its sign. The answers change in exactly the rows and columns of those (a test below). All-ones data
//!   could not tell one order of scales from another.
//! - *Codes*: one operand has a single element in each line, so that each output is one product. The other has all codes of its
//!   format, but for infinities and NaN, under scales that spread over 40 powers of two (17 where the route's are relative UE4M3,
//!   12 where it has none); then the other way round.

use std::sync::Arc;

use super::registry::Entry;
use super::{Codes, Packing, Problem, RouteScale};
use crate::engine::Engine;
use crate::formats::block::{pack, unpack};
use crate::formats::{Layout, MxSpec, MxTensor};
use crate::kernels::matmul::native::Refused;
use crate::kernels::native_pack::e4m3;
use crate::rng::{ROUNDS, threefry4x32};
use crate::{Axis, Context, DType, Element, Matmul, MatmulDesc, ScaleFormat, Tier};

/// More than one tile of scales down (128 lines) and across (8 blocks of 32), and ragged.
const M: usize = 161;
const N: usize = 150;
const K: usize = 352;

/// Places whose scales are doubled at once: line of A and block of 32, line of B and block of 32.
const CROSSES: [[(usize, usize); 2]; 3] =
    [[(0, 0), (149, 9)], [(33, 5), (64, 3)], [(160, 10), (128, 0)]];

/// Lines whose element changes its sign.
const SIGNS: [usize; 2] = [77, 103];

/// The test's problem for a pair of formats.
pub(crate) fn problem([a, b]: [MxSpec; 2]) -> Problem {
    Problem { m: M, n: N, k: K, a, b }
}

/// A product with its answer.
pub(crate) struct Known {
    operands: [MxTensor; 2],
    answer: Vec<f32>,
}

/// The products of the test for a pair, as the route packs it.
pub(crate) fn known(pair: [MxSpec; 2], packings: &[Packing; 2]) -> Result<Vec<Known>, String> {
    let known = |operands| Ok(Known { answer: answer(&operands)?, operands });
    data(pair, packings)?.into_iter().map(known).collect()
}

/// Multiplies them on the route. A wrong answer is a failure of the route, and so is the library's; that the test could not run
/// is none.
pub(crate) fn run(ctx: &Context, entry: &Arc<Entry>, known: &[Known]) -> Result<(), Refused> {
    known.iter().try_for_each(|product| check(ctx, entry, product))
}

/// What is multiplied: sums, the crosses, and codes of A and of B.
fn data(pair: [MxSpec; 2], packings: &[Packing; 2]) -> Result<Vec<[MxTensor; 2]>, String> {
    let sums = [operand(pair[0], M, 1)?, operand(pair[1], N, 2)?];
    let mut all = vec![sums.clone()];
    for [(a, of_a), (b, of_b)] in CROSSES {
        all.push([doubled(&sums[0], a, of_a)?, doubled(&sums[1], b, of_b)?]);
    }
    all.push([negated(&sums[0], SIGNS[0])?, negated(&sums[1], SIGNS[1])?]);
    for dense in [0, 1] {
        all.push(codes(pair, packings, dense)?);
    }
    Ok(all)
}

/// Whether the route's product is the answer.
fn check(ctx: &Context, entry: &Arc<Entry>, known: &Known) -> Result<(), Refused> {
    let Known { operands, answer } = known;
    let unable = |error: crate::Error| Refused::Declined(error.to_string());
    let matmul = Matmul::on_route(ctx, &desc(operands, Tier::Native), entry).map_err(unable)?;
    let got = multiply(ctx, &matmul, operands, true)?;
    // NaN is not equal to anything; a zero may have either sign.
    match (0..M * N).find(|at| got[*at] != answer[*at]) {
        None => Ok(()),
        Some(at) => Err(Refused::Failed(format!(
            "output ({}, {}) is {}, the answer {}",
            at / N,
            at % N,
            got[at],
            answer[at]
        ))),
    }
}

fn desc(operands: &[MxTensor; 2], tier: Tier) -> MatmulDesc {
    let [a, b] = operands.each_ref().map(|x| x.layout().spec.into());
    MatmulDesc { m: M, n: N, k: K, a, b, tier, ..Default::default() }
}

/// The CPU engine's product.
fn answer(operands: &[MxTensor; 2]) -> Result<Vec<f32>, String> {
    let cpu = Context::cpu();
    let matmul = Matmul::new(&cpu, &desc(operands, Tier::Auto)).map_err(|e| e.to_string())?;
    multiply(&cpu, &matmul, operands, false).map_err(|refused| refused.reason())
}

fn multiply(
    ctx: &Context,
    matmul: &Matmul,
    operands: &[MxTensor; 2],
    alone: bool,
) -> Result<Vec<f32>, Refused> {
    let unable = |error: crate::Error| Refused::Declined(error.to_string());
    let a = ctx.upload_mx(&operands[0]).map_err(unable)?;
    let b = ctx.upload_mx(&operands[1]).map_err(unable)?;
    let nan = vec![0xff; M * N * 4];
    let mut y = ctx.upload(DType::F32, M, N, &nan).map_err(unable)?;
    let mut stream = ctx.stream();
    match (alone, ctx.engine()) {
        (true, Engine::Gpu(gpu)) => {
            let flag = gpu.create_buffer("mx.native.test", 16).map_err(unable)?;
            matmul.record_on_route(&mut stream, &a, &b, &mut y, &flag)?;
            ctx.submit(stream).map_err(unable)?;
            let mut word = Vec::new();
            pollster::block_on(gpu.read(&flag, 4, &mut word)).map_err(unable)?;
            // The next tier's answer says nothing about the route.
            if word.iter().any(|byte| *byte != 0) {
                let reason = "packing says that it does not hold the test's values";
                return Err(Refused::Failed(reason.into()));
            }
        }
        _ => {
            matmul.record(&mut stream, &a, &b, &mut y).map_err(unable)?;
            ctx.submit(stream).map_err(unable)?;
        }
    }
    let bytes = ctx.read_blocking(&y).map_err(unable)?;
    Ok(bytemuck::pod_collect_to_vec(&bytes))
}

/// A tensor of `lines` by K, from what `code` and `scale` say for a line and a position. Positions behind K are zero.
fn tensor(
    spec: MxSpec,
    lines: usize,
    scales: Vec<u8>,
    code: impl Fn(&Layout, &[u8], usize, usize) -> u8,
) -> Result<MxTensor, String> {
    let layout = layout(spec, lines)?;
    let bits = spec.element.bits();
    let mut codes = vec![0u8; layout.codes_len()];
    for (line, out) in codes.chunks_exact_mut(layout.line_bytes()).enumerate() {
        let values: Vec<u8> = (0..out.len() * 8 / bits as usize)
            .map(|at| if at < K { code(&layout, &scales, line, at) } else { 0 })
            .collect();
        pack(bits, &values, out);
    }
    MxTensor::from_parts(layout, codes, scales, 1.0).map_err(|error| error.to_string())
}

fn layout(spec: MxSpec, lines: usize) -> Result<Layout, String> {
    Layout::new(spec, Axis::One, lines, K).map_err(|error| error.to_string())
}

/// A random word for a place.
fn draw(stream: u32, a: usize, b: usize, what: u32) -> u32 {
    threefry4x32::<ROUNDS>([a as u32, b as u32, what, 0], [stream, 0, 0, 0])[0]
}

// ---- Sums ------------------------------------------------------------------------------------------------------------

/// The code of 1.
fn one(element: Element) -> u8 {
    (0..=u8::MAX).find(|code| element.decode(*code) == 1.0).unwrap_or(0)
}

/// The scale byte of 2^e.
fn power(format: ScaleFormat, e: u8) -> u8 {
    match format {
        ScaleFormat::E8M0 => 127 + e,
        ScaleFormat::E4M3 => (e + 7) << 3,
    }
}

fn operand(spec: MxSpec, lines: usize, stream: u32) -> Result<MxTensor, String> {
    let one = one(spec.element);
    let shape = layout(spec, lines)?;
    let blocks = shape.blocks();
    let scales = (0..shape.scales_len())
        .map(|at| power(spec.scale, (draw(stream, at / blocks, at % blocks, 1) % 3) as u8))
        .collect();
    tensor(spec, lines, scales, |_, _, line, at| match draw(stream, line, at, 0) >> 29 {
        0 => one,
        1 => one | 1 << (spec.element.bits() - 1),
        _ => 0,
    })
}

/// The same with one scale (of a block of 32 positions) doubled.
fn doubled(x: &MxTensor, line: usize, block: usize) -> Result<MxTensor, String> {
    let layout = *x.layout();
    let (codes, mut scales, tensor_scale) = x.clone().into_parts();
    let step = if layout.spec.scale == ScaleFormat::E4M3 { 8 } else { 1 };
    scales[layout.scale_index(line, block * 32)] += step;
    MxTensor::from_parts(layout, codes, scales, tensor_scale).map_err(|error| error.to_string())
}

/// The same with the sign of a line's first element that is not zero changed.
fn negated(x: &MxTensor, line: usize) -> Result<MxTensor, String> {
    let layout = *x.layout();
    let bits = layout.spec.element.bits();
    let (mut codes, scales, tensor_scale) = x.clone().into_parts();
    let bytes = &mut codes[line * layout.line_bytes()..(line + 1) * layout.line_bytes()];
    let mut values: Vec<u8> =
        (0..bytes.len() * 8 / bits as usize).map(|at| unpack(bits, bytes, at)).collect();
    if let Some(value) = values.iter_mut().find(|value| **value != 0) {
        *value ^= 1 << (bits - 1);
    }
    pack(bits, &values, bytes);
    MxTensor::from_parts(layout, codes, scales, tensor_scale).map_err(|error| error.to_string())
}

// ---- Codes -----------------------------------------------------------------------------------------------------------

/// All codes of an element but infinities and NaN.
fn finite(element: Element) -> Vec<u8> {
    let all = (0..1u16 << element.bits()).map(|code| code as u8);
    all.filter(|code| element.decode(*code).is_finite()).collect()
}

/// Where a line has its one element.
fn place(line: usize) -> usize {
    (line * 37 + 5) % K
}

/// Operands of which each output is one product: `dense` says which of both has all codes in every line.
fn codes(
    pair: [MxSpec; 2],
    packings: &[Packing; 2],
    dense: usize,
) -> Result<[MxTensor; 2], String> {
    let make = |side: usize| {
        let (spec, lines, packing) = (pair[side], [M, N][side], &packings[side]);
        let stream = (10 + 2 * dense + side) as u32;
        let all = finite(spec.element);
        let hot = side != dense;
        // The line's one element is held exactly at any code under its anchor alone.
        let spread = match (packing.scales.map(|scales| scales.format), hot) {
            (None, true) => 0,
            (None, false) => 12,
            (Some(RouteScale::Ue4m3), _) => 17,
            (Some(RouteScale::E8m0), _) => 40,
        };
        let shape = layout(spec, lines)?;
        let scales = (0..shape.scales_len())
            .map(|at| match spec.scale {
                ScaleFormat::E8M0 => 127 - (draw(stream, at, 0, 1) % (spread + 1)) as u8,
                // Any but zero and NaN.
                ScaleFormat::E4M3 => 1 + (draw(stream, at, 0, 1) % 126) as u8,
            })
            .collect();
        tensor(spec, lines, scales, |layout, scales, line, at| {
            if hot {
                // Every code in turn but the first, which is zero.
                let code = all[1 + (line + 3 * dense) % (all.len() - 1)];
                return if at == place(line) { code } else { 0 };
            }
            let code = all[draw(stream, line, at, 2) as usize % all.len()];
            match packing.codes {
                Codes::Same => code,
                Codes::E4m3 { window } => {
                    let of = |at: usize| i32::from(scales[layout.scale_index(line, at)]);
                    let block = spec.block.len();
                    let anchor = (0..K).step_by(block).map(of).max().unwrap_or(127);
                    let held = e4m3(spec.element, code, of(at) - anchor + window);
                    held.map_or(0, |_| code)
                }
            }
        })
    };
    Ok([make(0)?, make(1)?])
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::formats::Block;
    use crate::native::{ScaleLayout, Scales};
    use crate::{MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8_E4M3, MXFP8_E5M2, NVFP4};

    fn scaled(format: RouteScale, group: usize) -> Packing {
        let scales = Scales { format, group, layout: ScaleLayout::Tiles128x4 };
        Packing { codes: Codes::Same, scales: Some(scales), lines: 16, k: 128 }
    }

    fn window(window: i32) -> Packing {
        Packing { codes: Codes::E4m3 { window }, scales: None, lines: 16, k: 32 }
    }

    /// What routes ask for.
    fn pairs() -> Vec<([MxSpec; 2], [Packing; 2])> {
        let e8m0 = scaled(RouteScale::E8m0, 32);
        let ue4m3 = scaled(RouteScale::Ue4m3, 16);
        let [wide, square] =
            [Block::Vector(128), Block::Square(32)].map(|block| MXFP4.with_block(block));
        vec![
            ([MXFP4; 2], [e8m0; 2]),
            ([wide, square], [e8m0; 2]),
            ([MXFP4, MXFP8_E4M3], [e8m0; 2]),
            ([MXFP8_E4M3, MXFP8_E5M2], [e8m0; 2]),
            ([MXFP8_E5M2, MXFP4], [e8m0; 2]),
            ([NVFP4, MXFP4], [ue4m3; 2]),
            ([NVFP4; 2], [ue4m3; 2]),
            ([MXFP4, MXFP6_E2M3], [window(6), window(5)]),
            ([MXFP6_E3M2, MXFP8_E4M3], [window(4), window(0)]),
            ([MXFP4.with_block(Block::Vector(16)), square], [window(6); 2]),
        ]
    }

    fn data((pair, packings): &([MxSpec; 2], [Packing; 2])) -> Vec<[MxTensor; 2]> {
        super::data(*pair, packings).unwrap()
    }

    /// The lines that share their scales with `line`.
    fn sharing(spec: MxSpec, line: usize, lines: usize) -> Range<usize> {
        let side = spec.block.lines();
        line / side * side..(line / side * side + side).min(lines)
    }

    /// Whether exactly these rows and these columns of the outputs changed.
    fn crossed(
        base: &[f32],
        changed: &[f32],
        [rows, columns]: [Range<usize>; 2],
        what: &str,
    ) -> Result<(), String> {
        let (mut in_rows, mut in_columns) = (false, false);
        for (i, j) in (0..M).flat_map(|i| (0..N).map(move |j| (i, j))) {
            if base[i * N + j] == changed[i * N + j] {
                continue;
            }
            match (rows.contains(&i), columns.contains(&j)) {
                (false, false) => return Err(format!("{what} changed output ({i}, {j})")),
                (true, false) => in_rows = true,
                (false, true) => in_columns = true,
                (true, true) => {}
            }
        }
        match (in_rows, in_columns) {
            (true, true) => Ok(()),
            (false, _) => Err(format!("{what} changed no row")),
            (_, false) => Err(format!("{what} changed no column")),
        }
    }

    #[test]
    fn every_packing_holds_the_data() {
        for pair in pairs() {
            for operands in data(&pair) {
                for (x, packing) in operands.iter().zip(&pair.1) {
                    let packed = crate::kernels::native_pack::pack(x, packing).unwrap();
                    assert!(!packed.inexact, "{:?}", pair.0);
                }
            }
        }
    }

    /// The answers against f64, in which all is exact; and every partial sum fits into 13 bits.
    #[test]
    fn answers_are_exact_and_partial_sums_short() {
        for pair in pairs() {
            for (which, operands) in data(&pair).iter().enumerate() {
                let dense = operands.each_ref().map(|x| -> Vec<f64> {
                    let lines = x.layout().rows;
                    (0..lines * K).map(|at| f64::from(x.get(at / K, at % K))).collect()
                });
                let got = answer(operands).unwrap();
                for (at, got) in got.iter().enumerate() {
                    let a = &dense[0][at / N * K..][..K];
                    let b = &dense[1][at % N * K..][..K];
                    let (mut sum, mut all, mut terms) = (0.0, 0.0, 0);
                    for (a, b) in a.iter().zip(b) {
                        sum += a * b;
                        all += (a * b).abs();
                        terms += usize::from(a * b != 0.0);
                    }
                    assert_eq!(f64::from(*got), sum, "{:?} {which} {at}", pair.0);
                    assert!(all < 4096.0 || terms <= 1, "{:?} {which} {at}: {all}", pair.0);
                    assert!(which < 5 || terms <= 1);
                }
            }
        }
    }

    #[test]
    fn crosses_change_their_rows_and_columns() {
        for pair in pairs() {
            let all: Vec<_> = data(&pair).iter().map(|x| answer(x).unwrap()).collect();
            let [a, b] = pair.0;
            for (i, [(line_a, _), (line_b, _)]) in CROSSES.into_iter().enumerate() {
                let lines = [sharing(a, line_a, M), sharing(b, line_b, N)];
                crossed(&all[0], &all[1 + i], lines, "x").unwrap();
            }
            let [line_a, line_b] = SIGNS;
            crossed(&all[0], &all[4], [line_a..line_a + 1, line_b..line_b + 1], "x").unwrap();
        }
        let (base, mut changed) = (vec![0.0; M * N], vec![0.0; M * N]);
        let cross = [3..4, 5..6];
        let says = |changed: &[f32]| crossed(&base, changed, cross.clone(), "x").unwrap_err();
        assert_eq!(says(&changed), "x changed no row");
        changed[3 * N + 9] = 1.0;
        assert_eq!(says(&changed), "x changed no column");
        changed[8 * N + 5] = 1.0;
        crossed(&base, &changed, cross.clone(), "x").unwrap();
        changed[8 * N + 6] = 1.0;
        assert_eq!(says(&changed), "x changed output (8, 6)");
    }

    /// Every code, where it makes an output.
    #[test]
    fn every_code_is_seen() {
        for (pair, packings) in pairs() {
            for dense in [0, 1] {
                let operands = codes(pair, &packings, dense).unwrap();
                let x = &operands[dense];
                let layout = x.layout();
                let (bits, bytes) = (layout.spec.element.bits(), layout.line_bytes());
                let mut seen = [false; 256];
                for line in 0..layout.rows {
                    for other in 0..[N, M][dense] {
                        let codes = &x.codes()[line * bytes..][..bytes];
                        seen[usize::from(unpack(bits, codes, place(other)))] = true;
                    }
                }
                for code in finite(layout.spec.element) {
                    assert!(seen[usize::from(code)], "{pair:?} {dense}: {code:#x}");
                }
            }
        }
    }
}
