//! The tensor tier in FP8: products of E2M1 operands by cooperative matrices E4M3 to f32, where that is exact.
//!
//! A code is put into E4M3 relative to its line's anchor: as code · 2^(6 + scale − anchor), at most 6 · 2⁶ = 384 of E4M3's
//! 448. A block up to 11 powers of two below the anchor is exact in E4M3's normal numbers, 0.5 · 2⁻⁵ = 2⁻⁶ being the smallest of
//! them. E4M3 would have three powers of two more in subnormals, but VK_EXT_shader_float8 lets a device flush these in products
//! (issue 1 of its appendix), so the *window* ends before. A tile of outputs is computed in E4M3 if no line of it has a block
//! outside the window that is not zero, and else by the same kernel in f16: two dispatches, each of which leaves the other's
//! tiles (`shaders/lib/window.wgsl`), after one that looks for such blocks (`shaders/window.wgsl`).
//!
//! Sums are multiplied by 2⁻¹², exactly, before anything else is done with them: what the two kernels give differs only by what
//! their cooperative matrices make of the same terms. Vulkan does not say how many bits a matrix product in FP8 keeps of its
//! sums; so the fragments must pass a test before they are used ([`tested`]).

use super::tier::SKINNY;
use super::{Input, Matmul, MatmulDesc, Operand, Tier, Values};
use crate::engine::buffer::{DType, DeviceMxTensor, STATE_WORDS};
use crate::engine::gpu::{Gpu, Scratch};
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::engine::{Context, Engine, Stream};
use crate::formats::{Axis, Element, Layout, MxSpec, ScaleFormat};
use crate::kernels::{WORKGROUP, format_name};
use crate::{MXFP4, MxTensor, Result};

/// A block may lie so many powers of two below its line's anchor.
pub(super) const WINDOW: u32 = 11;
/// The exponent of what E4M3 holds of a block at the anchor.
const TOP: i32 = 6;

/// How a product is computed in E4M3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Way {
    /// Positions that a fragment contracts.
    pub(super) k: u32,
    pub(super) emulated: bool,
    /// For tests: the tiles in f16 are left out.
    pub(super) alone: bool,
}

impl Way {
    pub(super) fn new(k: u32, emulated: bool) -> Way {
        Way { k, emulated, alone: false }
    }
}

/// The constants of `shaders/lib/nibbles_e4m3.wgsl` and `shaders/lib/coop_e4m3.wgsl`.
pub(super) fn constants(source: Source) -> Source {
    let unit = 2f32.powi(-2 * TOP);
    source.constant("E4M3_WINDOW", WINDOW).line(&format!("const E4M3_UNIT = {unit:?}f;"))
}

/// Why these operands cannot be E4M3, if so.
pub(super) fn lack(a: Operand, b: Operand) -> Option<String> {
    [("A", a), ("B", b)].into_iter().find_map(|(name, operand)| match operand.values {
        Values::Mx(spec) if spec.element == Element::E2M1 && spec.scale == ScaleFormat::E8M0 => {
            None
        }
        values => Some(format!("{name} is {values}, not E2M1 under E8M0")),
    })
}

/// How a product of the tensor tier is computed in E4M3; if not, why not, where the device has such matrices.
pub(super) fn choose(
    ctx: &Context,
    desc: &MatmulDesc,
    tier: Tier,
) -> std::result::Result<Way, Option<String>> {
    let Engine::Gpu(gpu) = ctx.engine() else { return Err(None) };
    if tier != Tier::Tensor {
        return Err(None);
    }
    let way = match (gpu.emulate_tensor, gpu.e4m3_matrices) {
        (true, _) if gpu.emulate_fp8 => Way::new(32, true),
        (false, Some(k)) => Way::new(k, false),
        _ => return Err(None),
    };
    if let Some(lack) = lack(desc.a, desc.b) {
        return Err(Some(lack));
    }
    if desc.m <= SKINNY {
        return Err(Some(format!("m = {} is bound by memory", desc.m)));
    }
    tested(ctx, gpu, way).map(|()| way).map_err(Some)
}

// ---- Which lines ---------------------------------------------------------------------------------------------------

/// Records the search for blocks outside the window: a word for every anchor of A and then of B, and where B's start.
pub(super) fn windows(
    stream: &mut Stream<'_>,
    gpu: &Gpu,
    desc: &MatmulDesc,
    a: Input<'_>,
    b: Input<'_>,
) -> Result<(wgpu::Buffer, usize)> {
    let sides: Vec<(&DeviceMxTensor, bool)> = [(a, desc.a), (b, desc.b)]
        .into_iter()
        .filter_map(|(x, operand)| match x {
            Input::Mx(x) => Some((x, operand.transposed)),
            Input::Dense(_) => None,
        })
        .collect();
    let anchors = |(x, across): &(&DeviceMxTensor, bool)| match across {
        true => x.layout.blocks(),
        false => x.layout.scale_rows(),
    };
    let total: usize = sides.iter().map(anchors).sum();
    let windows = gpu.scratch(Scratch::Windows, (total * 4) as u64)?;
    stream.clear(&windows);
    let mut first = 0;
    let mut starts = Vec::new();
    for side in &sides {
        let (x, across) = side;
        starts.push(first);
        let layout = x.layout;
        let (rows, blocks) = (layout.scale_rows(), layout.blocks());
        let params = [
            rows,
            blocks,
            layout.lines(),
            layout.line_bytes() / 4,
            STATE_WORDS + if *across { rows } else { 0 },
            first,
        ]
        .map(|p| p as u32);
        let mut buffers: Vec<_> = x.codes.chunks().take(1).map(|chunk| chunk.buffer).collect();
        buffers.extend(x.scales.chunks().take(1).map(|chunk| chunk.buffer));
        buffers.extend(x.state.chunks().take(1).map(|chunk| chunk.buffer));
        buffers.push(&windows);
        let groups = (rows * blocks).div_ceil(WORKGROUP as usize) as u64;
        let spec = layout.spec;
        stream.dispatch(
            &name(spec, *across),
            || kernel(spec, *across),
            &params,
            &buffers,
            groups,
        )?;
        first += anchors(side);
    }
    Ok((windows, starts.last().copied().unwrap_or(0)))
}

fn name(spec: MxSpec, across: bool) -> String {
    format!("window.{}{}", format_name(spec), if across { ".columns" } else { "" })
}

fn kernel(spec: MxSpec, across: bool) -> Kernel {
    let source = Source::new()
        .constant("WG", WORKGROUP)
        .constant("E4M3_WINDOW", WINDOW)
        .constant("LINES", spec.block.lines() as u32)
        .constant("WORDS", spec.block.len() as u32 / 8)
        .flag("COLUMNS", across)
        .fragment(shader!("window.wgsl"));
    let bindings = [Binding::Read, Binding::Read, Binding::Read, Binding::Write];
    Kernel::portable(name(spec, across), source, &bindings)
}

/// Every variant of this file's kernel.
pub(super) fn kernels() -> Vec<Kernel> {
    crate::formats::Block::ALL
        .into_iter()
        .flat_map(|block| {
            let spec = MXFP4.with_block(block);
            let across: &[bool] = if block.lines() > 1 { &[false, true] } else { &[false] };
            across.iter().map(move |across| kernel(spec, *across))
        })
        .collect()
}

// ---- The test at first use -----------------------------------------------------------------------------------------

/// Whether this device's products in E4M3 are right: computed once for each context.
fn tested(ctx: &Context, gpu: &Gpu, way: Way) -> std::result::Result<(), String> {
    gpu.e4m3_tested
        .get_or_init(|| {
            let result = test(ctx, way);
            if let Err(reason) = &result {
                log::warn!("products in E4M3 are not used: {reason}");
            }
            result
        })
        .clone()
}

#[cfg(target_arch = "wasm32")]
fn test(_: &Context, _: Way) -> std::result::Result<(), String> {
    Err("a browser has none".into())
}

/// Lines and positions of the test's operands.
const SIDE: usize = 64;
const LONG: usize = 256;

/// Operands whose products' terms are multiples of a quarter, with sums below 2²⁴ of it: exact in f32 in any order, and not in
/// sums of fewer bits. Every line has a block at the top of the window, one at its end, and others between.
fn known() -> Result<[MxTensor; 2]> {
    let operand = |side: usize| {
        let layout = Layout::new(MXFP4, Axis::One, SIDE, LONG)?;
        let mut codes = vec![0; layout.codes_len()];
        for (i, code) in codes.iter_mut().enumerate() {
            *code = ((i + side * 77_777) as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3];
        }
        let mut scales = Vec::with_capacity(layout.scales_len());
        for (row, block) in (0..SIDE).flat_map(|row| (0..LONG / 32).map(move |b| (row, b))) {
            // Where one operand's scales spread, the other's are its least.
            let power = match (block / 4 == side, block % 4) {
                (true, 0) => WINDOW as usize,
                (true, 2 | 3) => (row + 5 * block) % WINDOW as usize,
                _ => 0,
            };
            scales.push(127 + power as u8);
        }
        MxTensor::from_parts(layout, codes, scales, 1.0)
    };
    Ok([operand(0)?, operand(1)?])
}

/// A product of them, compared with its answer in integers.
#[cfg(not(target_arch = "wasm32"))]
fn test(ctx: &Context, way: Way) -> std::result::Result<(), String> {
    let failed = |error: crate::Error| error.to_string();
    let [a, b] = known().map_err(failed)?;
    let desc = MatmulDesc { m: SIDE, n: SIDE, k: LONG, tier: Tier::Tensor, ..Default::default() };
    let matmul = Matmul {
        desc,
        tier: Tier::Tensor,
        why: "its test".into(),
        slice: None,
        #[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
        native: None,
        forced: None,
        e4m3: Some(Way { alone: true, ..way }),
    };
    let run = || -> Result<Vec<u8>> {
        let (a, b) = (ctx.upload_mx(&a)?, ctx.upload_mx(&b)?);
        let nothing = vec![0xff; SIDE * SIDE * 4];
        let mut y = ctx.upload(DType::F32, SIDE, SIDE, &nothing)?;
        let mut stream = ctx.stream();
        matmul.record(&mut stream, &a, &b, &mut y)?;
        ctx.submit(stream)?;
        ctx.read_blocking(&y)
    };
    let got: Vec<f32> = bytemuck::pod_collect_to_vec(&run().map_err(failed)?);
    for (at, got) in got.iter().enumerate() {
        let (i, j) = (at / SIDE, at % SIDE);
        // In quarters: a code is a whole number of halves, and no scale is below one.
        let want: i64 =
            (0..LONG).map(|k| (4.0 * f64::from(a.get(i, k)) * f64::from(b.get(j, k))) as i64).sum();
        let want = want as f64 / 4.0;
        if f64::from(*got) != want {
            return Err(format!("its test gave {got:e} at ({i}, {j}) instead of {want:e}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// E4M3 by its definition.
    fn e4m3(byte: u8) -> f64 {
        let (exponent, fraction) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
        assert_ne!(byte & 0x7f, 0x7f, "NaN");
        let magnitude = match exponent {
            0 => fraction * 2f64.powi(-9),
            _ => (8.0 + fraction) * 2f64.powi(exponent - 10),
        };
        if byte & 0x80 == 0 { magnitude } else { -magnitude }
    }

    /// What `shaders/lib/nibbles_e4m3.wgsl` does.
    fn put(code: u32, below: u32) -> u8 {
        let factor = if below > WINDOW { 0 } else { (WINDOW + 1 - below) << 3 };
        let m = code & 7;
        let (some, normal) = ((m + 7) >> 3 & 1, (m + 6) >> 3 & 1);
        let magnitude = some * factor + (m << 2 & (normal * 0x1c));
        if factor == 0 { 0 } else { (magnitude | (code << 4 & 0x80)) as u8 }
    }

    #[test]
    fn the_window_is_where_e4m3_is_exact_and_normal() {
        let values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        for below in 0..=WINDOW {
            for code in 0..16 {
                let byte = put(code, below);
                let sign = if code < 8 { 1.0 } else { -1.0 };
                let want = sign * values[code as usize % 8] * 2f64.powi(TOP - below as i32);
                assert_eq!(e4m3(byte), want, "{code} {below}");
                assert!(want == 0.0 || byte >> 3 & 15 > 0, "{code} {below}: subnormal");
            }
        }
        // One more at either end: subnormal; more than 448.
        assert!(0.5 * 2f64.powi(TOP - WINDOW as i32 - 1) < 2f64.powi(-6));
        assert!(6.0 * 2f64.powi(TOP + 1) > 448.0);
        assert_eq!((0..16).map(|code| put(code, WINDOW + 1)).max(), Some(0));
    }

    #[test]
    fn the_test_at_first_use_is_exact_in_f32() {
        let [a, b] = known().unwrap();
        let mut most = 0.0f64;
        for (i, j) in (0..SIDE).flat_map(|i| (0..SIDE).map(move |j| (i, j))) {
            let terms = (0..LONG).map(|k| f64::from(a.get(i, k)) * f64::from(b.get(j, k)));
            let (mut sum, mut magnitude) = (0.0, 0.0);
            for term in terms {
                assert_eq!((4.0 * term).fract(), 0.0);
                sum += term;
                magnitude += term.abs();
            }
            assert!(magnitude * 4.0 < 2f64.powi(24));
            most = most.max(f64::abs(sum));
        }
        // Sums that need more than 20 bits are there.
        assert!(most * 4.0 > 2f64.powi(20), "{most}");
    }
}
