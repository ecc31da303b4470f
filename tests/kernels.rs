//! One suite, stamped on every engine: the CPU, and every adapter that wgpu finds, with and without subgroups, and with
//! tensors cut into many bindings (tests/common/engines.rs). Outputs are compared byte for byte with the slow reference of
//! tests/common.

mod common;

use common::engines::{self, Form, PLAIN, Test};
use common::{assert_bytes, garbage, narrowed, panics, reference};
use libtest_mimic::{Failed, Trial};
use microscaling::{
    Axis, Block, Context, DType, Dequantize, DequantizeDesc, DeviceChoice, Error, MXFP4, MxTensor,
    NVFP4, Options, Quantize, QuantizeDesc, Rounding, selftest, wgpu,
};

const SUITE: &[(&str, Test)] = &[
    ("quantize_equals_the_reference", quantize_equals_the_reference),
    ("quantize_from_f16_and_bf16", quantize_from_16_bits),
    ("e2m1_under_every_scale", e2m1_under_every_scale),
    ("tensors_of_many_bindings", tensors_of_many_bindings),
    ("dequantize_equals_the_reference", dequantize_equals_the_reference),
    ("every_code_under_every_scale", every_code_under_every_scale),
    ("empty_tensors", empty_tensors),
    ("a_given_tensor_scale", a_given_tensor_scale),
    ("digests_are_those_of_design_md", digests),
    ("mismatches_are_errors", mismatches_are_errors),
    ("many_dispatches_in_one_stream", many_dispatches),
];

fn main() {
    let forms = [
        Form {
            what: PLAIN,
            options: Options::default(),
            steps: [1, 3],
            needs: (wgpu::Features::empty(), ""),
        },
        Form {
            what: " without subgroups",
            options: Options { without: wgpu::Features::SUBGROUP, ..Default::default() },
            steps: [7, 7],
            needs: (wgpu::Features::SUBGROUP, "never has them"),
        },
        Form {
            what: " in small bindings",
            options: Options { max_binding: Some(180 << 10), ..Default::default() },
            steps: [11, 11],
            needs: (wgpu::Features::empty(), ""),
        },
    ];
    let alone = vec![
        Trial::test("an_adapter_that_does_not_exist", no_such_adapter),
        Trial::test("a_comparison_that_must_fail_fails", comparison_fails),
    ];
    engines::run(|_| SUITE.to_vec(), &forms, alone);
}

fn quantize(
    ctx: &Context,
    desc: &QuantizeDesc,
    dtype: DType,
    x: &[u8],
    rows: usize,
    cols: usize,
) -> Result<(MxTensor, u32), Error> {
    let x = ctx.upload(dtype, rows, cols, x)?;
    let mut out = garbage(ctx, desc, rows, cols)?;
    let mut stream = ctx.stream();
    Quantize::new(ctx, desc)?.record(&mut stream, &x, &mut out)?;
    ctx.submit(stream)?;
    Ok((ctx.read_mx_blocking(&out)?, ctx.nonfinite_blocks_blocking(&out)?))
}

fn compare(
    ctx: &Context,
    desc: &QuantizeDesc,
    dtype: DType,
    rows: usize,
    cols: usize,
) -> Result<(), Failed> {
    let bytes = selftest::input(dtype, rows, cols);
    let want = reference::quantize(&common::to_f32(dtype, &bytes), rows, cols, desc);
    let (got, nonfinite) = quantize(ctx, desc, dtype, &bytes, rows, cols)?;
    let what = format!("{desc:?} {dtype} {rows}x{cols}");
    assert_bytes(&format!("scales of {what}"), got.scales(), &want.scales);
    assert_bytes(
        &format!("codes of {what}"),
        got.codes(),
        &reference::pack(desc.spec.element.bits(), &want.codes),
    );
    assert_eq!(got.tensor_scale().to_bits(), want.tensor_scale.to_bits(), "{what}");
    assert_eq!(nonfinite, want.nonfinite, "non-finite blocks of {what}");
    Ok(())
}

/// All formats, axes and roundings; whole blocks, ragged ones, and a single element.
fn quantize_equals_the_reference(ctx: &Context, step: usize) -> Result<(), Failed> {
    for desc in reference::descriptors().into_iter().step_by(step) {
        for (rows, cols) in [(130, 128), (33, 71), (1, 1)] {
            compare(ctx, &desc, DType::F32, rows, cols)?;
        }
    }
    Ok(())
}

/// A third of them: formats do not depend on how x is loaded, and software drivers take half a second a kernel.
fn quantize_from_16_bits(ctx: &Context, step: usize) -> Result<(), Failed> {
    for (i, desc) in reference::descriptors().into_iter().enumerate().step_by(3 * step) {
        let dtype = [DType::F16, DType::BF16][i % 2];
        let (rows, cols) = if i % 4 < 2 { (34, 128) } else { (131, 69) };
        compare(ctx, &desc, dtype, rows, cols)?;
    }
    Ok(())
}

/// Every value and midpoint of E2M1, their neighbours, and as much between, under every scale that Floor gives: the shaders
/// have a fast path for this format.
fn e2m1_under_every_scale(ctx: &Context, _: usize) -> Result<(), Failed> {
    let mut points = Vec::new();
    for sixteenth in 0..128u8 {
        let x = f32::from(sixteenth) / 16.0;
        points.extend([x.next_down().max(0.0), x, -x.next_up().min(7.999)]);
    }
    let mut x = Vec::new();
    for scale in -127..=125 {
        for points in points.chunks(31) {
            // The block's largest magnitude is in [4, 8) · 2^scale.
            let amax = points.iter().fold(4f32, |a, p| a.max(p.abs()));
            for p in std::iter::once(amax).chain(points.iter().copied()) {
                // Exact, or rounded once where it is subnormal.
                x.push((f64::from(p) * 2f64.powi(scale)) as f32);
            }
            x.resize(x.len().next_multiple_of(32), 0.0);
        }
    }
    let (rows, cols) = (x.len() / 32, 32);
    let stochastic = Rounding::Stochastic { seed: 3, stream: 1 };
    for rounding in [Rounding::NearestEven, stochastic] {
        let desc = QuantizeDesc { rounding, ..Default::default() };
        let want = reference::quantize(&x, rows, cols, &desc);
        assert!((0..=252).all(|s| want.scales.contains(&s)), "a scale is missing");
        let (got, _) = quantize(ctx, &desc, DType::F32, bytemuck::cast_slice(&x), rows, cols)?;
        assert_bytes("scales", got.scales(), &want.scales);
        assert_bytes("codes", got.codes(), &reference::pack(4, &want.codes));
    }
    Ok(())
}

/// Large enough that in small bindings both x and the codes lie in several chunks, along either axis, with and without
/// an odd number of columns.
fn tensors_of_many_bindings(ctx: &Context, _: usize) -> Result<(), Failed> {
    for desc in reference::descriptors().into_iter().step_by(13) {
        let (rows, cols) = if desc.axis == Axis::One { (1300, 261) } else { (1301, 256) };
        compare(ctx, &desc, DType::F32, rows, cols)?;
        let bytes = selftest::input(DType::BF16, rows, cols);
        let (packed, _) = quantize(ctx, &desc, DType::BF16, &bytes, rows, cols)?;
        let layout = packed.layout();
        let want =
            reference::dequantize(layout, packed.codes(), packed.scales(), packed.tensor_scale());
        assert_bytes(
            "bf16",
            &dequantize(ctx, &packed, DType::BF16)?,
            &narrowed(DType::BF16, &want),
        );
    }
    Ok(())
}

fn dequantize(ctx: &Context, x: &MxTensor, dtype: DType) -> Result<Vec<u8>, Error> {
    let layout = *x.layout();
    let x = ctx.upload_mx(x)?;
    let n = layout.rows * layout.cols * dtype.size();
    let mut y = ctx.upload(dtype, layout.rows, layout.cols, &vec![0xa5; n])?;
    let desc = DequantizeDesc { spec: layout.spec, axis: layout.axis };
    let mut stream = ctx.stream();
    Dequantize::new(ctx, &desc)?.record(&mut stream, &x, &mut y)?;
    ctx.submit(stream)?;
    ctx.read_blocking(&y)
}

/// Random codes and random scales, NaN among them, in every layout and type.
fn dequantize_equals_the_reference(ctx: &Context, step: usize) -> Result<(), Failed> {
    for (i, desc) in reference::descriptors().into_iter().step_by(2).enumerate().step_by(step) {
        let dtype = DType::ALL[i % 3];
        for (rows, cols) in [(130, 128), (35, 69)] {
            let layout = microscaling::Layout::new(desc.spec, desc.axis, rows, cols)?;
            let random = |seed, n| -> Vec<u8> {
                common::words(seed, n).into_iter().map(|w| (w >> 24) as u8).collect()
            };
            let scale =
                if desc.spec.scale == microscaling::ScaleFormat::E4M3 { 1.7e-3 } else { 1.0 };
            let scales: Vec<u8> = random(2, layout.scales_len())
                .into_iter()
                .map(|s| if scale == 1.0 { s } else { s & 0x7f })
                .collect();
            let x = MxTensor::from_parts(layout, random(1, layout.codes_len()), scales, scale)?;
            let want = reference::dequantize(&layout, x.codes(), x.scales(), scale);
            let what = format!("{} axis {} {dtype} {rows}x{cols}", desc.spec, desc.axis);
            assert_bytes(&what, &dequantize(ctx, &x, dtype)?, &narrowed(dtype, &want));
        }
    }
    Ok(())
}

/// Exhaustive: all codes of every format under all 256 scales, to all three types.
fn every_code_under_every_scale(ctx: &Context, _: usize) -> Result<(), Failed> {
    for (_, spec) in microscaling::formats::NAMED {
        let spec = spec.with_block(Block::Vector(16));
        let codes = 1usize << spec.element.bits();
        let layout = microscaling::Layout::new(spec, Axis::One, 256, codes)?;
        let line: Vec<u8> = (0..codes).map(|c| c as u8).collect();
        let packed = reference::pack(spec.element.bits(), &line).repeat(256);
        let nvfp4 = spec.scale == microscaling::ScaleFormat::E4M3;
        // NVFP4: bit 7 of a scale is its sign, which must be clear; a tensor scale small enough for subnormal results.
        let scales: Vec<u8> = (0..256)
            .flat_map(|s| {
                std::iter::repeat_n(if nvfp4 { (s & 0x7f) as u8 } else { s as u8 }, layout.blocks())
            })
            .collect();
        let tensor_scale = if nvfp4 { 3.3e-38 } else { 1.0 };
        let x = MxTensor::from_parts(layout, packed, scales, tensor_scale)?;
        let want = reference::dequantize(&layout, x.codes(), x.scales(), tensor_scale);
        for dtype in DType::ALL {
            assert_bytes(
                &format!("{spec} {dtype}"),
                &dequantize(ctx, &x, dtype)?,
                &narrowed(dtype, &want),
            );
        }
    }
    Ok(())
}

fn empty_tensors(ctx: &Context, _: usize) -> Result<(), Failed> {
    for axis in [Axis::Zero, Axis::One] {
        for spec in [MXFP4, NVFP4, MXFP4.with_block(Block::Square(32))] {
            for (rows, cols) in [(0, 0), (0, 64), (64, 0)] {
                let desc = QuantizeDesc { spec, axis, ..Default::default() };
                let (got, nonfinite) = quantize(ctx, &desc, DType::F32, &[], rows, cols)?;
                assert_eq!((got.bytes(), nonfinite), (0, 0), "{spec} {rows}x{cols}");
                assert!(dequantize(ctx, &got, DType::BF16)?.is_empty());
            }
        }
    }
    Ok(())
}

fn a_given_tensor_scale(ctx: &Context, _: usize) -> Result<(), Failed> {
    for axis in [Axis::Zero, Axis::One] {
        for tensor_scale in [0.37, 1e-30] {
            let desc = QuantizeDesc {
                spec: NVFP4,
                axis,
                tensor_scale: Some(tensor_scale),
                ..Default::default()
            };
            compare(ctx, &desc, DType::F32, 40, 64)?;
        }
    }
    Ok(())
}

/// DESIGN.md's digest table, line by line.
fn digests(ctx: &Context, _: usize) -> Result<(), Failed> {
    let design = include_str!("../DESIGN.md");
    let table: Vec<(&str, &str)> = design
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.strip_suffix("` |")?.split_once("` | `"))
        .collect();
    let got = pollster::block_on(selftest::run(ctx, |_, _, _| ()))?;
    let want: Vec<_> = got.iter().map(|d| (d.name.clone(), format!("{:016x}", d.digest))).collect();
    if std::env::var("MX_TEST_PRINT_DIGESTS").is_ok() {
        for (name, digest) in &want {
            println!("| `{name}` | `{digest}` |");
        }
    }
    assert_eq!(table.len(), want.len(), "the table in DESIGN.md has another number of lines");
    for ((name, digest), (got_name, got)) in table.into_iter().zip(&want) {
        assert_eq!((name, digest), (got_name.as_str(), got.as_str()));
    }
    Ok(())
}

fn mismatches_are_errors(ctx: &Context, _: usize) -> Result<(), Failed> {
    let x = ctx.zeros(DType::F32, 4, 64)?;
    let mut out = ctx.zeros_mx(MXFP4, Axis::One, 4, 96)?;
    let mut stream = ctx.stream();
    let kernel = Quantize::new(ctx, &QuantizeDesc::default())?;
    let error = kernel.record(&mut stream, &x, &mut out).unwrap_err().to_string();
    assert!(error.contains("[4, 64]") && error.contains("[4, 96]"), "{error}");
    let mut out = ctx.zeros_mx(NVFP4, Axis::One, 4, 64)?;
    let error = kernel.record(&mut stream, &x, &mut out).unwrap_err().to_string();
    assert!(error.contains("mxfp4/1x32") && error.contains("nvfp4/1x16"), "{error}");
    let mut y = ctx.zeros(DType::F32, 5, 64)?;
    let packed = ctx.zeros_mx(MXFP4, Axis::One, 4, 64)?;
    assert!(
        Dequantize::new(ctx, &DequantizeDesc::default())?
            .record(&mut stream, &packed, &mut y)
            .is_err()
    );
    assert!(ctx.upload(DType::F32, 2, 2, &[0; 15]).unwrap_err().to_string().contains("15 bytes"));
    assert!(ctx.zeros(DType::F32, usize::MAX, 2).is_err());
    if ctx.wgpu().is_none() {
        // A pebibyte and more: beyond the address space.
        let error = ctx.zeros(DType::F32, 1 << 24, 1 << 24).unwrap_err();
        assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    }
    if ctx.wgpu().is_some() {
        let mut elsewhere = Context::cpu().zeros_mx(MXFP4, Axis::One, 4, 64)?;
        let error = kernel.record(&mut stream, &x, &mut elsewhere).unwrap_err().to_string();
        assert!(error.contains("CPU engine"), "{error}");
        // A row too long for one binding cannot be split.
        let limits = ctx.wgpu().unwrap().0.limits();
        let cols = (limits.max_storage_buffer_binding_size / 4 / 64) as usize;
        let error = ctx.zeros(DType::F32, 128, cols).unwrap_err();
        assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    }
    Ok(())
}

/// More dispatches than one arena of parameters holds.
fn many_dispatches(ctx: &Context, _: usize) -> Result<(), Failed> {
    let (rows, cols) = (3, 64);
    let bytes = selftest::input(DType::F32, rows, cols);
    let x = ctx.upload(DType::F32, rows, cols, &bytes)?;
    let mut stream = ctx.stream();
    let mut outs = Vec::new();
    for stream_number in 0..600 {
        let rounding = Rounding::Stochastic { seed: 1, stream: stream_number };
        let desc = QuantizeDesc { rounding, ..Default::default() };
        let mut out = ctx.zeros_mx(MXFP4, Axis::One, rows, cols)?;
        Quantize::new(ctx, &desc)?.record(&mut stream, &x, &mut out)?;
        outs.push((desc, out));
    }
    ctx.submit(stream)?;
    for (desc, out) in outs.iter().step_by(71) {
        let want = MxTensor::quantize(&common::to_f32(DType::F32, &bytes), rows, cols, desc)?;
        assert_eq!(ctx.read_mx_blocking(out)?, want);
    }
    Ok(())
}

fn no_such_adapter() -> Result<(), Failed> {
    let options =
        Options { device: DeviceChoice::Named("no such adapter".into()), ..Default::default() };
    let error = Context::open_blocking(&options).unwrap_err();
    assert!(matches!(error, Error::NoAdapter { .. }));
    assert!(error.to_string().contains("no such adapter"), "{error}");
    Ok(())
}

fn comparison_fails() -> Result<(), Failed> {
    let bytes = selftest::input(DType::F32, 8, 64);
    let desc = QuantizeDesc::default();
    let (got, _) = quantize(&Context::cpu(), &desc, DType::F32, &bytes, 8, 64)?;
    let mut want = reference::pack(
        4,
        &reference::quantize(&common::to_f32(DType::F32, &bytes), 8, 64, &desc).codes,
    );
    want[100] ^= 0x10;
    assert!(panics(|| assert_bytes("", got.codes(), &want)), "one flipped bit passes");
    Ok(())
}
