//! The known-answer test that a route passes before its first product on a device.
//!
//! Elements are 0 and ±1, scales 1, 2 and 4, differing from block to block: every partial sum, in any order, is a whole number
//! below 2¹², so that also accumulators of few bits hold it, and the answer is the CPU engine's exact tier's, bit for bit. Then
//! single scales are doubled, in places that cover the corners of all scale layouts: exactly one row, or one column, must
//! change, and to the answer again. All-ones data could not tell one order of scales from another.

use std::sync::Arc;

use super::registry::Entry;
use super::{NativeRoute, Problem};
use crate::engine::Engine;
use crate::formats::{Layout, MxSpec, MxTensor};
use crate::rng::{ROUNDS, threefry4x32};
use crate::{Axis, Context, DType, Element, Matmul, MatmulDesc, ScaleFormat, Tier};

/// More than one tile of scales down (128 lines) and across (8 blocks of 32), and ragged.
const M: usize = 161;
const N: usize = 150;
const K: usize = 352;

/// Places whose scales are doubled: side, line, block of 32.
const PLACES: [(usize, usize, usize); 6] =
    [(0, 0, 0), (0, 33, 5), (0, 160, 10), (1, 149, 9), (1, 64, 3), (1, 128, 0)];

/// The test's problem.
pub(crate) fn problem(route: &dyn NativeRoute) -> Problem {
    let [a, b] = route.sample();
    Problem { m: M, n: N, k: K, a, b }
}

/// Runs the test; says what was wrong.
pub(crate) fn run(ctx: &Context, entry: &Arc<Entry>) -> Result<(), String> {
    let [a_spec, b_spec] = entry.route.sample();
    let operands = [operand(a_spec, M, 1)?, operand(b_spec, N, 2)?];
    let base = product(ctx, entry, &operands)?;
    for (side, line, block) in PLACES {
        let mut perturbed = operands.clone();
        perturbed[side] = doubled(&operands[side], line, block)?;
        let changed = product(ctx, entry, &perturbed)?;
        let same = |i: usize, j: usize| base[i * N + j] == changed[i * N + j];
        let of = ["A", "B"][side];
        let at = |i: usize, j: usize| [i, j][side];
        let mut any = false;
        for (i, j) in (0..M).flat_map(|i| (0..N).map(move |j| (i, j))) {
            any |= !same(i, j);
            if at(i, j) != line && !same(i, j) {
                return Err(format!(
                    "doubling the scale of {of}'s line {line}, block {block}, changed output ({i}, {j})"
                ));
            }
        }
        if !any {
            return Err(format!(
                "doubling the scale of {of}'s line {line}, block {block}, changed nothing"
            ));
        }
    }
    Ok(())
}

/// The product on the route, as f32 bits, if it is the answer.
fn product(
    ctx: &Context,
    entry: &Arc<Entry>,
    operands: &[MxTensor; 2],
) -> Result<Vec<u32>, String> {
    let say = |error: crate::Error| error.to_string();
    let desc = MatmulDesc {
        m: M,
        n: N,
        k: K,
        a: operands[0].layout().spec.into(),
        b: operands[1].layout().spec.into(),
        tier: Tier::Native,
        ..Default::default()
    };
    let cpu = Context::cpu();
    let want = multiply(
        &cpu,
        &Matmul::new(&cpu, &MatmulDesc { tier: Tier::Auto, ..desc }).map_err(say)?,
        operands,
        false,
    )?;
    let got = multiply(ctx, &Matmul::on_route(ctx, &desc, entry).map_err(say)?, operands, true)?;
    match (0..M * N).find(|at| got[*at] != want[*at]) {
        None => Ok(got),
        Some(at) => Err(format!(
            "output ({}, {}) is {}, the answer {}",
            at / N,
            at % N,
            f32::from_bits(got[at]),
            f32::from_bits(want[at])
        )),
    }
}

fn multiply(
    ctx: &Context,
    matmul: &Matmul,
    operands: &[MxTensor; 2],
    alone: bool,
) -> Result<Vec<u32>, String> {
    let say = |error: crate::Error| error.to_string();
    let a = ctx.upload_mx(&operands[0]).map_err(say)?;
    let b = ctx.upload_mx(&operands[1]).map_err(say)?;
    let nan = vec![0xff; M * N * 4];
    let mut y = ctx.upload(DType::F32, M, N, &nan).map_err(say)?;
    let mut stream = ctx.stream();
    match (alone, ctx.engine()) {
        (true, Engine::Gpu(gpu)) => {
            let flag = gpu.create_buffer("mx.native.test", 16).map_err(say)?;
            matmul.record_on_route(&mut stream, &a, &b, &mut y, &flag)?;
            ctx.submit(stream).map_err(say)?;
            let mut word = Vec::new();
            pollster::block_on(gpu.read(&flag, 4, &mut word)).map_err(say)?;
            // The next tier's answer says nothing about the route.
            if word.iter().any(|byte| *byte != 0) {
                return Err("packing says that it does not hold the test's values".into());
            }
        }
        _ => {
            matmul.record(&mut stream, &a, &b, &mut y).map_err(say)?;
            ctx.submit(stream).map_err(say)?;
        }
    }
    let bytes = ctx.read_blocking(&y).map_err(say)?;
    Ok(bytemuck::pod_collect_to_vec(&bytes))
}

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
    let layout = Layout::new(spec, Axis::One, lines, K).map_err(|error| error.to_string())?;
    let bits = spec.element.bits();
    let one = one(spec.element);
    let draw = |a: usize, b: usize, what: u32| {
        threefry4x32::<ROUNDS>([a as u32, b as u32, what, 0], [stream, 0, 0, 0])[0]
    };
    let mut codes = vec![0u8; layout.codes_len()];
    let line_bytes = layout.line_bytes();
    for line in 0..lines {
        let values: Vec<u8> = (0..line_bytes * 8 / bits as usize)
            .map(|at| match draw(line, at, 0) >> 29 {
                _ if at >= K => 0,
                0 => one,
                1 => one | 1 << (bits - 1),
                _ => 0,
            })
            .collect();
        let line = &mut codes[line * line_bytes..(line + 1) * line_bytes];
        crate::formats::block::pack(bits, &values, line);
    }
    let blocks = layout.blocks();
    let scales: Vec<u8> = (0..layout.scales_len())
        .map(|at| power(spec.scale, (draw(at / blocks, at % blocks, 1) % 3) as u8))
        .collect();
    MxTensor::from_parts(layout, codes, scales, 1.0).map_err(|error| error.to_string())
}

/// The same with one scale (of a block of 32 positions) doubled.
fn doubled(x: &MxTensor, line: usize, block: usize) -> Result<MxTensor, String> {
    let layout = *x.layout();
    let (codes, mut scales, tensor_scale) = x.clone().into_parts();
    let step = if layout.spec.scale == ScaleFormat::E4M3 { 8 } else { 1 };
    scales[layout.scale_index(line, block * 32)] += step;
    MxTensor::from_parts(layout, codes, scales, tensor_scale).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_sums_are_small_and_places_matter() {
        for spec in [crate::MXFP4, crate::MXFP8_E4M3, crate::NVFP4] {
            let x = operand(spec, M, 1).unwrap();
            for line in 0..M {
                let total: f32 = (0..K).map(|at| x.get(line, at).abs()).sum();
                // Each product is at most four times the element, times two for a doubled scale.
                assert!(total * 8.0 < 4096.0, "{spec} line {line}: {total}");
            }
            for (side, line, block) in PLACES {
                let x = operand(spec, [M, N][side], side as u32 + 1).unwrap();
                let nonzero = (block * 32..block * 32 + 16).any(|at| x.get(line, at) != 0.0);
                assert!(nonzero, "{spec}: nothing under the scale at {line}, {block}");
            }
        }
    }
}
