//! The quantizers of training, on every engine (tests/common/engines.rs): both layouts at once, Hadamard transforms,
//! counters, clipping and the split of channels. Bytes are compared with the slow reference of tests/common, applied to
//! values that are transformed here by recursion; that transform is held to a dense matrix in f64.

mod common;

use common::engines::{self, CPU, Form, PLAIN, Test};
use common::{assert_bytes, garbage, gaussian, narrowed, panics, reference, to_f32};
use libtest_mimic::{Failed, Trial};
use microscaling::kernels::{
    Guards, Hadamard, Quantile, QuantizeBoth, Side, Signs, Split, quantize_both::COUNTERS,
};
use microscaling::rng::{ROUNDS, threefry4x32};
use microscaling::{
    Axis, Block, Context, DType, Element, Ids, MXFP4, MXFP8_E4M3, MXINT8, Matmul, MatmulDesc,
    MxSpec, MxTensor, NVFP4, Options, Quantize, QuantizeDesc, Rounding, ScaleFormat, ScaleRule,
    Tensor, Tier, engine, selftest, wgpu,
};

fn suite(form: &str) -> Vec<(&'static str, Test)> {
    let mut suite: Vec<(&'static str, Test)> = vec![
        ("without_a_transform_equals_quantize", equals_quantize),
        ("with_transforms_equals_the_reference", equals_the_reference),
        ("stacks_are_packed_matrix_by_matrix", stacks),
        ("ragged_stacks_are_those_of_the_cpu", ragged_stacks),
        ("three_quarters_do_not_clip", three_quarters),
        ("products_of_transformed_operands", products),
        ("counters_count", counters),
        ("clip_and_skip", clip_and_skip),
        ("the_quantile_is_that_of_a_sort", quantile),
        ("the_split_takes_the_largest_columns", split),
        ("anchors_are_recorded", anchors),
        ("empty_tensors", empty),
        ("mismatches_are_errors", mismatches),
    ];
    if form == CPU {
        suite.push(("stochastic_rounding_is_unbiased", unbiased));
    }
    suite
}

fn main() {
    let forms = [
        Form {
            what: PLAIN,
            options: Options::default(),
            steps: [1, 13],
            needs: (wgpu::Features::empty(), ""),
        },
        Form {
            what: " without subgroups",
            options: Options { without: wgpu::Features::SUBGROUP, ..Default::default() },
            steps: [5, 37],
            needs: (wgpu::Features::SUBGROUP, "never has them"),
        },
    ];
    let alone = vec![
        Trial::test("the_reference_is_the_matrix", reference_is_the_matrix),
        Trial::test("gains", gains),
        Trial::test("few_bindings", few_bindings),
        Trial::test("a_comparison_that_must_fail_fails", comparison_fails),
    ];
    engines::run(suite, &forms, alone);
}

// ---- The reference -------------------------------------------------------------------------------------------------

/// The crate's signs: bits of one call of its generator.
fn signs(hadamard: Hadamard) -> Vec<f32> {
    let words = match hadamard.signs {
        Signs::None => [0; 4],
        Signs::Random { seed } => {
            threefry4x32::<ROUNDS>([0, 0, 1, 0], [seed as u32, (seed >> 32) as u32, 0, 0])
        }
    };
    (0..hadamard.size as usize)
        .map(|i| if words[i / 32] >> (i % 32) & 1 == 1 { -1.0 } else { 1.0 })
        .collect()
}

/// 2ᵖ ≥ √size.
fn divisor(hadamard: Hadamard) -> f32 {
    [(16, 4.0), (32, 8.0), (64, 8.0), (128, 16.0)]
        .into_iter()
        .find(|(size, _)| *size == hadamard.size)
        .map(|(_, divisor)| divisor)
        .unwrap()
}

/// Sylvester's construction: H of twice the size is [[H, H], [H, −H]].
fn recurse(x: Vec<f32>) -> Vec<f32> {
    if x.len() == 1 {
        return x;
    }
    let (a, b) = x.split_at(x.len() / 2);
    let sum = a.iter().zip(b).map(|(a, b)| a + b).collect();
    let difference = a.iter().zip(b).map(|(a, b)| a - b).collect();
    [recurse(sum), recurse(difference)].concat()
}

fn transform_group(x: &[f32], hadamard: Hadamard) -> Vec<f32> {
    if x.iter().any(|v| v.is_nan() || v.abs() >= 2f32.powi(120)) {
        return vec![f32::NAN; x.len()];
    }
    let signed = x
        .iter()
        .zip(signs(hadamard))
        .map(|(v, s)| if v.abs() < 2f32.powi(-98) { 0.0 } else { v * s })
        .collect();
    let zero = |v: f32| if v == 0.0 { 0.0 } else { v };
    recurse(signed).into_iter().map(|v| zero(v / divisor(hadamard))).collect()
}

/// The transform along an axis of a row-major matrix.
fn transform(
    x: &[f32],
    [rows, cols]: [usize; 2],
    axis: Axis,
    hadamard: Option<Hadamard>,
) -> Vec<f32> {
    let Some(hadamard) = hadamard else { return x.to_vec() };
    let size = hadamard.size as usize;
    let mut out = x.to_vec();
    let (lines, len) = if axis == Axis::One { (rows, cols) } else { (cols, rows) };
    let at =
        |line: usize, i: usize| if axis == Axis::One { line * cols + i } else { i * cols + line };
    for line in 0..lines {
        for first in (0..len).step_by(size) {
            let group: Vec<f32> = (first..first + size).map(|i| x[at(line, i)]).collect();
            for (i, v) in (first..).zip(transform_group(&group, hadamard)) {
                out[at(line, i)] = v;
            }
        }
    }
    out
}

fn desc(side: &Side, axis: Axis) -> QuantizeDesc {
    let Side { spec, scale_rule, rounding, .. } = *side;
    QuantizeDesc { spec, axis, scale_rule, rounding, tensor_scale: None }
}

/// What the encoder multiplies elements with, after their block has its scale.
fn factor(side: &Side) -> f64 {
    if side.three_quarters { 0.75 } else { 1.0 }
}

/// Compares with the reference's quantization of `values`, which are x after everything but the encoding.
fn compare(what: &str, got: &MxTensor, nonfinite: u32, values: &[f32], desc: &QuantizeDesc) {
    let layout = got.layout();
    let want = reference::quantize(values, layout.rows, layout.cols, desc);
    assert_bytes(&format!("scales of {what}"), got.scales(), &want.scales);
    let codes = reference::pack(desc.spec.element.bits(), &want.codes);
    assert_bytes(&format!("codes of {what}"), got.codes(), &codes);
    assert_eq!(got.tensor_scale().to_bits(), want.tensor_scale.to_bits(), "{what}");
    assert_eq!(nonfinite, want.nonfinite, "non-finite blocks of {what}");
}

/// What a recording gives: each side packed, with its non-finite blocks.
type Packed = [Option<(MxTensor, u32)>; 2];

fn run(
    ctx: &Context,
    sides: [Option<Side>; 2],
    x: &Tensor,
    guards: &Guards<'_>,
    counters: Option<&mut Ids>,
) -> Result<Packed, Failed> {
    let [rows, cols] = x.shape();
    let axes = [Axis::One, Axis::Zero];
    let mut outs = Vec::new();
    for (side, axis) in sides.iter().zip(axes) {
        outs.push(match side {
            Some(side) => Some(garbage(ctx, &desc(side, axis), rows, cols)?),
            None => None,
        });
    }
    let mut stream = ctx.stream();
    let [a, b] = &mut outs[..] else { unreachable!() };
    QuantizeBoth::new(ctx, sides[0], sides[1])?.record(
        &mut stream,
        x,
        a.as_mut(),
        b.as_mut(),
        guards,
        counters,
    )?;
    ctx.submit(stream)?;
    let mut packed = [None, None];
    for (packed, out) in packed.iter_mut().zip(&outs) {
        if let Some(out) = out {
            let n = ctx.nonfinite_blocks_blocking(out)?;
            *packed = Some((ctx.read_mx_blocking(out)?, n));
        }
    }
    Ok(packed)
}

fn vector_specs() -> Vec<MxSpec> {
    let vectors = |spec: &MxSpec| matches!(spec.block, Block::Vector(_));
    microscaling::kernels::all_specs().into_iter().filter(vectors).collect()
}

/// A side of every format and block, rules and roundings taking turns.
fn side(turn: usize, hadamard: u32) -> Side {
    let specs = vector_specs();
    let spec = specs[turn % specs.len()];
    let rules = match spec.scale {
        ScaleFormat::E4M3 => [ScaleRule::Even, ScaleRule::Rceil].repeat(2),
        _ => vec![ScaleRule::Rceil, ScaleRule::Floor, ScaleRule::Even, ScaleRule::Ceil],
    };
    Side {
        spec,
        scale_rule: Some(rules[turn % 4]),
        rounding: match turn % 3 {
            0 => Rounding::NearestEven,
            _ => Rounding::Stochastic { seed: 3 << 33 | 1, stream: turn as u64 },
        },
        hadamard: (hadamard > 0).then_some(Hadamard {
            size: hadamard,
            signs: match turn % 5 {
                0 => Signs::None,
                _ => Signs::Random { seed: 1 << 40 | turn as u64 },
            },
        }),
        three_quarters: false,
    }
}

// ---- Tests ---------------------------------------------------------------------------------------------------------

/// All pairs of block lengths, each side alone too; ragged and whole shapes, both types.
fn equals_quantize(ctx: &Context, step: usize) -> Result<(), Failed> {
    let shapes = [[130, 128], [33, 72], [1, 4], [64, 36], [257, 20]];
    for turn in (0..2 * vector_specs().len()).step_by(step) {
        let (a, b) = (side(turn, 0), side(turn * 5 + 3, 0));
        let [rows, cols] = shapes[turn % shapes.len()];
        let dtype = [DType::F32, DType::BF16][turn / 2 % 2];
        let x = ctx.upload(dtype, rows, cols, &selftest::input(dtype, rows, cols))?;
        let sides = match turn % 4 {
            2 => [Some(a), None],
            3 => [None, Some(b)],
            _ => [Some(a), Some(b)],
        };
        let packed = run(ctx, sides, &x, &Guards::default(), None)?;
        for ((side, got), axis) in sides.iter().zip(packed).zip([Axis::One, Axis::Zero]) {
            let (Some(side), Some((got, nonfinite))) = (side, got) else { continue };
            let desc = desc(side, axis);
            let mut out = garbage(ctx, &desc, rows, cols)?;
            let mut stream = ctx.stream();
            Quantize::new(ctx, &desc)?.record(&mut stream, &x, &mut out)?;
            ctx.submit(stream)?;
            let want = ctx.read_mx_blocking(&out)?;
            let what = format!("{desc:?} {dtype} {rows}x{cols}");
            assert_bytes(&format!("scales of {what}"), got.scales(), want.scales());
            assert_bytes(&format!("codes of {what}"), got.codes(), want.codes());
            assert_eq!(got, want, "{what}");
            assert_eq!(nonfinite, ctx.nonfinite_blocks_blocking(&out)?, "{what}");
        }
    }
    Ok(())
}

/// All sizes against all block lengths; inputs with every corner, and gaussian ones, whose sums round.
fn equals_the_reference(ctx: &Context, step: usize) -> Result<(), Failed> {
    let sizes = [0, 16, 32, 64, 128];
    for turn in (0..2 * vector_specs().len()).step_by(step) {
        let (a, b) = (side(turn, sizes[turn % 5]), side(turn * 3 + 2, sizes[turn / 5 % 5]));
        let [rows, cols] = [[128, 128], [256, 128], [128, 256]][turn % 3];
        let dtype = [DType::F32, DType::BF16][turn / 2 % 2];
        let bytes = match turn % 4 {
            0 => selftest::input(dtype, rows, cols),
            _ => narrowed(dtype, &gaussian(turn as u64, rows * cols)),
        };
        let values = to_f32(dtype, &bytes);
        let x = ctx.upload(dtype, rows, cols, &bytes)?;
        let packed = run(ctx, [Some(a), Some(b)], &x, &Guards::default(), None)?;
        for ((side, got), axis) in [a, b].iter().zip(packed).zip([Axis::One, Axis::Zero]) {
            let (got, nonfinite) = got.unwrap();
            let values = transform(&values, [rows, cols], axis, side.hadamard);
            let what = format!("{side:?} axis {axis} {dtype} {rows}x{cols}");
            compare(&what, &got, nonfinite, &values, &desc(side, axis));
        }
    }
    // A ragged other axis.
    let (rows, cols) = (32, 68);
    let values = gaussian(5, rows * cols);
    let x = ctx.upload(DType::F32, rows, cols, bytemuck::cast_slice(&values))?;
    let side = Side { spec: NVFP4, ..side(1, 32) };
    let side = Side { scale_rule: None, ..side };
    let [_, got] = run(ctx, [None, Some(side)], &x, &Guards::default(), None)?;
    let values = transform(&values, [rows, cols], Axis::Zero, side.hadamard);
    let (got, nonfinite) = got.unwrap();
    compare("ragged columns", &got, nonfinite, &values, &desc(&side, Axis::Zero));
    Ok(())
}

/// Matrices whose rows are no whole blocks, drawn for and counted, as the CPU engine has them.
fn ragged_stacks(ctx: &Context, step: usize) -> Result<(), Failed> {
    for turn in (0..vector_specs().len()).step_by(step) {
        let size = [0, 16][turn / 2 % 2];
        let (matrices, rows, cols) = (3, if size > 0 { 80 } else { 76 - 4 * (turn % 4) }, 20);
        let rounding = Rounding::Stochastic { seed: 7, stream: turn as u64 };
        let columns = Side { rounding, ..side(turn, size) };
        let along = Side { rounding, ..side(turn + 1, 0) };
        let bytes = selftest::input(DType::F32, matrices * rows, cols);
        let pack = |ctx: &Context| -> Result<_, Failed> {
            let x = ctx.upload(DType::F32, matrices * rows, cols, &bytes)?;
            let mut down = garbage(ctx, &desc(&columns, Axis::One), matrices * cols, rows)?;
            let mut across = garbage(ctx, &desc(&along, Axis::One), matrices * rows, cols)?;
            let mut counters = ctx.zeros_ids(COUNTERS)?;
            let both = QuantizeBoth::new(ctx, Some(along), Some(columns))?.stacked(matrices);
            let mut stream = ctx.stream();
            let (outs, guards) = ((Some(&mut across), Some(&mut down)), Guards::default());
            both.record(&mut stream, &x, outs.0, outs.1, &guards, Some(&mut counters))?;
            ctx.submit(stream)?;
            let [across, down] = [ctx.read_mx_blocking(&across)?, ctx.read_mx_blocking(&down)?];
            Ok((across, down, ctx.read_ids_blocking(&counters)?))
        };
        let (got, want) = (pack(ctx)?, pack(&Context::cpu())?);
        let what = format!("{columns:?} {matrices} of {rows}x{cols}");
        for (got, want) in [(got.0, want.0), (got.1, want.1)] {
            assert_bytes(&format!("scales of {what}"), got.scales(), want.scales());
            assert_bytes(&format!("codes of {what}"), got.codes(), want.codes());
        }
        assert_eq!(got.2, want.2, "counters of {what}");
        assert!(got.2[3] > 0 && got.2[7] > 0, "{what}: nothing was counted");
    }
    Ok(())
}

/// A stack of matrices, packed down the columns of each, against the reference: of the whole where no block reaches into the
/// next matrix, draws and tensor-wide scale included, and of each for itself, ragged and to nearest.
fn stacks(ctx: &Context, step: usize) -> Result<(), Failed> {
    let sizes = [0, 16, 32, 64, 128];
    for turn in (0..vector_specs().len()).step_by(step) {
        let matrices = 3;
        let ragged = turn % 3 == 1;
        let [rows, cols] = if ragged { [80, 20] } else { [128, 36] };
        let mut columns = side(turn, if ragged { [0, 16][turn / 3 % 2] } else { sizes[turn % 5] });
        if ragged {
            columns.rounding = Rounding::NearestEven;
        }
        let along = (turn % 2 == 0).then(|| side(turn + 1, 0));
        let dtype = [DType::F32, DType::BF16][turn / 2 % 2];
        let shape = [matrices * rows, cols];
        let bytes = match turn % 4 {
            0 => selftest::input(dtype, shape[0], shape[1]),
            _ => narrowed(dtype, &gaussian(turn as u64, shape[0] * shape[1])),
        };
        let values = to_f32(dtype, &bytes);
        let x = ctx.upload(dtype, shape[0], shape[1], &bytes)?;
        let one = desc(&columns, Axis::One);
        let mut out = garbage(ctx, &one, matrices * cols, rows)?;
        let mut rows_out = match along {
            Some(along) => Some(garbage(ctx, &desc(&along, Axis::One), shape[0], shape[1])?),
            None => None,
        };
        let mut stream = ctx.stream();
        let both = QuantizeBoth::new(ctx, along, Some(columns))?.stacked(matrices);
        let none = Guards::default();
        both.record(&mut stream, &x, rows_out.as_mut(), Some(&mut out), &none, None)?;
        ctx.submit(stream)?;
        let what = format!("{columns:?} {dtype} {matrices} of {rows}x{cols}");
        if let (Some(along), Some(out)) = (along, rows_out) {
            let n = ctx.nonfinite_blocks_blocking(&out)?;
            let desc = desc(&along, Axis::One);
            compare(&what, &ctx.read_mx_blocking(&out)?, n, &values, &desc);
        }
        let (got, nonfinite) = (ctx.read_mx_blocking(&out)?, ctx.nonfinite_blocks_blocking(&out)?);
        let zero = desc(&columns, Axis::Zero);
        let values = transform(&values, shape, Axis::Zero, columns.hadamard);
        let whole = reference::quantize(&values, shape[0], shape[1], &zero);
        // Lines of the whole have all matrices; those of the output are one matrix's.
        let (blocks, n) = (got.layout().blocks(), columns.spec.block.len());
        let (mut scales, mut codes, mut counted) = (Vec::new(), Vec::new(), 0);
        for matrix in 0..matrices {
            let values = &values[matrix * rows * cols..][..rows * cols];
            // Ragged or not, the tensor-wide scale is the whole's.
            let tensor_scale = (zero.spec.scale == ScaleFormat::E4M3).then_some(whole.tensor_scale);
            let zero = QuantizeDesc { tensor_scale, ..zero };
            let alone = reference::quantize(values, rows, cols, &zero);
            counted += alone.nonfinite;
            if ragged {
                scales.extend(alone.scales);
                codes.extend(alone.codes);
                continue;
            }
            for line in 0..cols {
                let first = line * matrices * blocks + matrix * blocks;
                scales.extend(&whole.scales[first..][..blocks]);
                codes.extend(&whole.codes[first * n..][..blocks * n]);
            }
        }
        assert_bytes(&format!("scales of {what}"), got.scales(), &scales);
        let codes = reference::pack(columns.spec.element.bits(), &codes);
        assert_bytes(&format!("codes of {what}"), got.codes(), &codes);
        assert_eq!(got.tensor_scale().to_bits(), whole.tensor_scale.to_bits(), "{what}");
        assert_eq!(nonfinite, counted, "non-finite blocks of {what}");
    }
    // Not whole matrices; an output of another shape.
    let x = ctx.zeros(DType::F32, 96, 64)?;
    let both = QuantizeBoth::new(ctx, None, Some(Side::default()))?;
    for (matrices, lines) in [(5, 320), (0, 64), (3, 64)] {
        let mut out = ctx.zeros_mx(MXFP4, Axis::One, lines, 32)?;
        let both = both.stacked(matrices);
        let error = both
            .record(&mut ctx.stream(), &x, None, Some(&mut out), &Guards::default(), None)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("[96, 64]") && error.contains(&format!("{matrices} mat")),
            "{error}"
        );
    }
    Ok(())
}

/// Three quarters of the elements under Floor's scale of the whole ones, of all formats, against the reference, corners and
/// subnormals included; and nothing is counted as clipped, where Floor alone clips.
fn three_quarters(ctx: &Context, step: usize) -> Result<(), Failed> {
    let mut clipped = 0;
    for turn in (0..vector_specs().len()).step_by(step) {
        let [a, b] = [side(turn, 0), side(turn, [0, 16, 32, 64][turn / 2 % 4])].map(|side| Side {
            scale_rule: [None, Some(ScaleRule::Floor)][turn % 2],
            three_quarters: true,
            ..side
        });
        if a.spec.scale != ScaleFormat::E8M0 {
            continue;
        }
        let [rows, cols] = [128, 68];
        let dtype = [DType::F32, DType::BF16][turn / 3 % 2];
        let bytes = match turn % 3 {
            0 => narrowed(dtype, &gaussian(turn as u64, rows * cols)),
            1 => selftest::input(dtype, rows, cols),
            // Around the smallest normal number.
            _ => {
                let tiny =
                    gaussian(turn as u64, rows * cols).into_iter().map(|v| v * 2f32.powi(-126));
                narrowed(dtype, &tiny.collect::<Vec<_>>())
            }
        };
        let values = to_f32(dtype, &bytes);
        let x = ctx.upload(dtype, rows, cols, &bytes)?;
        let mut counters = ctx.zeros_ids(COUNTERS)?;
        let none = Guards::default();
        let packed = run(ctx, [Some(a), Some(b)], &x, &none, Some(&mut counters))?;
        for ((side, got), axis) in [a, b].iter().zip(packed).zip([Axis::One, Axis::Zero]) {
            let (got, nonfinite) = got.unwrap();
            let values = transform(&values, [rows, cols], axis, side.hadamard);
            let desc = desc(side, axis);
            let want = reference::quantize_times(factor(side), &values, rows, cols, &desc);
            let what = format!("{side:?} axis {axis} {dtype}");
            assert_bytes(&format!("scales of {what}"), got.scales(), &want.scales);
            let codes = reference::pack(side.spec.element.bits(), &want.codes);
            assert_bytes(&format!("codes of {what}"), got.codes(), &codes);
            assert_eq!(nonfinite, want.nonfinite, "{what}");
        }
        let counts = ctx.read_ids_blocking(&counters)?;
        assert_eq!([counts[0], counts[4]], [0; 2], "{a:?}");
        let whole = [a, b].map(|side| Some(Side { three_quarters: false, ..side }));
        run(ctx, whole, &x, &none, Some(&mut counters))?;
        clipped += ctx.read_ids_blocking(&counters)?[0];
    }
    assert!(clipped > 0);
    let plain = Side { three_quarters: true, ..Default::default() };
    for wrong in
        [Side { spec: NVFP4, ..plain }, Side { scale_rule: Some(ScaleRule::Rceil), ..plain }]
    {
        let error = QuantizeBoth::new(ctx, Some(wrong), None).unwrap_err().to_string();
        assert!(error.contains("three quarters"), "{error}");
    }
    Ok(())
}

/// Integers that INT8 holds before and after the transform: the product of transformed operands times the gain is the
/// product of the integers, exactly.
fn products(ctx: &Context, _: usize) -> Result<(), Failed> {
    let (m, n, k) = (20, 12, 256);
    for size in [16, 32, 64, 128] {
        let hadamard = Hadamard { size, signs: Signs::Random { seed: 77 } };
        let plain = Side { spec: MXINT8, ..Default::default() };
        let side = Side { hadamard: Some(hadamard), ..plain };
        // Few of them, so that sums stay small.
        let integers = |seed, len| -> Vec<f32> {
            let words = common::words(seed, len);
            words
                .iter()
                .map(|w| if w % 4 == 0 { (w >> 8) as i32 % 4 - 2 } else { 0 } as f32)
                .collect()
        };
        let (a, b) = (integers(1, k * m), integers(2, k * n));
        // Contracted along T, as a weight's gradient is: [k, m] and [k, n].
        let mut operands = Vec::new();
        for (values, cols) in [(&a, m), (&b, n)] {
            let x = ctx.upload(DType::F32, k, cols, bytemuck::cast_slice(values))?;
            let mut out = ctx.zeros_mx(MXINT8, Axis::Zero, k, cols)?;
            let mut stream = ctx.stream();
            let both = QuantizeBoth::new(ctx, None, Some(side))?;
            both.record(&mut stream, &x, None, Some(&mut out), &Guards::default(), None)?;
            ctx.submit(stream)?;
            operands.push(out);
        }
        let desc = MatmulDesc {
            m,
            n,
            k,
            a: MXINT8.into(),
            b: MXINT8.into(),
            alpha: hadamard.gain(),
            tier: Tier::Exact,
            ..Default::default()
        };
        let mut y = ctx.zeros(DType::F32, m, n)?;
        let mut stream = ctx.stream();
        Matmul::new(ctx, &desc)?.record(&mut stream, &operands[0], &operands[1], &mut y)?;
        ctx.submit(stream)?;
        let got = to_f32(DType::F32, &ctx.read_blocking(&y)?);
        for i in 0..m {
            for j in 0..n {
                let want: f32 = (0..k).map(|t| a[t * m + i] * b[t * n + j]).sum();
                assert_eq!(got[i * n + j], want, "size {size}, element {i} {j}");
            }
        }
    }
    Ok(())
}

/// The counts of a packed tensor, element by element.
fn plain_count(got: &MxTensor, values: &[f32], desc: &QuantizeDesc) -> [u32; 4] {
    let layout = got.layout();
    let want = reference::quantize(values, layout.rows, layout.cols, desc);
    let (n, blocks) = (desc.spec.block.len(), layout.blocks());
    let max = *reference::magnitudes(desc.spec.element).last().unwrap();
    let e4m3 = reference::magnitudes(Element::E4M3);
    let mut counts = [0, 0, want.nonfinite, (layout.rows * layout.cols) as u32];
    for line in 0..layout.lines() {
        for i in 0..layout.line_len() {
            let scale = want.scales[line * blocks + i / n];
            let unit = match desc.spec.scale {
                ScaleFormat::E8M0 if scale == 255 => continue,
                ScaleFormat::E4M3 if scale == 0x7f => continue,
                ScaleFormat::E4M3 => e4m3[usize::from(scale)] * f64::from(want.tensor_scale),
                _ => 2f64.powi(i32::from(scale) - 127),
            };
            let (row, col) = layout.element(line, i);
            let v = f64::from(values[row * layout.cols + col]);
            let code = want.codes[line * blocks * n + i];
            let sign = if desc.spec.element == Element::Int8 {
                0
            } else {
                1 << (desc.spec.element.bits() - 1)
            };
            counts[0] += u32::from(v.abs() > max * unit);
            counts[1] += u32::from(v != 0.0 && code & !sign == 0);
        }
    }
    counts
}

fn counters(ctx: &Context, step: usize) -> Result<(), Failed> {
    for turn in (0..vector_specs().len()).step_by(step) {
        let (mut a, mut b) = (side(turn, 0), side(turn + 9, [0, 16, 32][turn % 3]));
        if turn % 2 == 0 && a.spec.scale == ScaleFormat::E8M0 {
            a.scale_rule = None; // Floor clips.
        }
        b.rounding = Rounding::Stochastic { seed: 5, stream: 5 };
        let [rows, cols] = [96, 100];
        let bytes = selftest::input(DType::F32, rows, cols);
        let values = to_f32(DType::F32, &bytes);
        let x = ctx.upload(DType::F32, rows, cols, &bytes)?;
        let mut counters = ctx.upload_ids(&[1; COUNTERS])?;
        let packed = run(ctx, [Some(a), Some(b)], &x, &Guards::default(), Some(&mut counters))?;
        let mut want = Vec::new();
        for ((side, got), axis) in [a, b].iter().zip(packed).zip([Axis::One, Axis::Zero]) {
            let (got, nonfinite) = got.unwrap();
            let desc = desc(side, axis);
            let values = transform(&values, [rows, cols], axis, side.hadamard);
            compare(&format!("{side:?}"), &got, nonfinite, &values, &desc);
            want.extend(plain_count(&got, &values, &desc).map(|n| n + 1));
        }
        assert_eq!(ctx.read_ids_blocking(&counters)?, want, "{a:?} {b:?}");
    }
    Ok(())
}

fn clip_and_skip(ctx: &Context, step: usize) -> Result<(), Failed> {
    let [rows, cols] = [64, 100];
    // BF16 to NVFP4, whose tensor-wide scale follows from what clip and skip leave.
    for (dtype, sides) in [
        (DType::F32, [Some(side(1, 0)), Some(side(8, 32))]),
        (DType::BF16, [Some(side(25, 0)), Some(side(24, 16))]),
    ] {
        let bytes = selftest::input(dtype, rows, cols);
        let limit = 1.5e-3f32;
        let clip = ctx.upload(DType::F32, 1, 1, &(-limit).to_le_bytes())?;
        let mut mask = vec![0u32; cols.div_ceil(32)];
        let skipped = [0, 3, 31, 32, 64, 97, 99];
        for col in skipped {
            mask[col / 32] |= 1 << (col % 32);
        }
        let skip = ctx.upload_ids(&mask)?;
        let x = ctx.upload(dtype, rows, cols, &bytes)?;
        // Software drivers take up to a second for a pipeline.
        let all = [(true, true), (true, false), (false, true)];
        for (with_clip, with_skip) in all.into_iter().take(if step > 5 { 1 } else { 3 }) {
            let guards =
                Guards { clip: with_clip.then_some(&clip), skip: with_skip.then_some(&skip) };
            let mut counters = ctx.zeros_ids(COUNTERS)?;
            let packed = run(ctx, sides, &x, &guards, Some(&mut counters))?;
            let mut values = to_f32(dtype, &bytes);
            for (i, v) in values.iter_mut().enumerate() {
                if with_clip && v.is_finite() && v.abs() > limit {
                    *v = limit.copysign(*v);
                }
                if with_skip && skipped.contains(&(i % cols)) {
                    *v = 0.0;
                }
            }
            for ((side, got), axis) in sides.iter().zip(packed).zip([Axis::One, Axis::Zero]) {
                let (side, (got, nonfinite)) = (side.unwrap(), got.unwrap());
                let values = transform(&values, [rows, cols], axis, side.hadamard);
                let what = format!("clip {with_clip} skip {with_skip} {dtype} axis {axis}");
                compare(&what, &got, nonfinite, &values, &desc(&side, axis));
            }
        }
    }
    Ok(())
}

/// The order statistic of a sort; F32's is rounded up to 15 significant bits.
fn quantile(ctx: &Context, _: usize) -> Result<(), Failed> {
    for (dtype, rows, cols) in [(DType::F32, 37, 100), (DType::BF16, 64, 1204), (DType::F32, 1, 4)]
    {
        let corners = selftest::input(dtype, rows, cols);
        let plain = narrowed(dtype, &gaussian(3, rows * cols));
        // Half of it NaN and infinity: those count as the largest, the threshold stays finite.
        let infinite =
            narrowed(dtype, &[1.0, f32::NAN, 2.0, f32::NEG_INFINITY].repeat(rows * cols / 4));
        for bytes in [corners, plain, infinite] {
            let mut sorted: Vec<u32> =
                to_f32(dtype, &bytes).iter().map(|v| v.to_bits() & 0x7fff_ffff).collect();
            sorted.sort_unstable();
            for q in [0.0, 0.3, 0.99, 0.999, 1.0] {
                let x = ctx.upload(dtype, rows, cols, &bytes)?;
                let mut threshold = ctx.upload(DType::F32, 1, 1, &f32::NAN.to_le_bytes())?;
                let mut kernel = Quantile::new(ctx, q)?;
                let mut stream = ctx.stream();
                // Twice: histograms are its own.
                kernel.record(&mut stream, &x, &mut threshold)?;
                kernel.record(&mut stream, &x, &mut threshold)?;
                ctx.submit(stream)?;
                let got = to_f32(DType::F32, &ctx.read_blocking(&threshold)?)[0].to_bits();
                let n = sorted.len();
                let above = n - (q * n as f64).ceil() as usize;
                // With all above allowed, the lowest bin there is.
                let statistic = if above == n { 0 } else { sorted[n - 1 - above] };
                let want = match dtype {
                    DType::BF16 => statistic.min(0x7f7f_0000),
                    _ => (statistic | 0x1ff).min(0x7f7f_ffff),
                };
                assert_eq!(got, want, "{dtype} {rows}x{cols} at {q}");
            }
        }
    }
    let x = ctx.zeros(DType::F32, 4, 64)?;
    let mut wrong = ctx.zeros(DType::F32, 2, 1)?;
    let error = Quantile::new(ctx, 0.5)?.record(&mut ctx.stream(), &x, &mut wrong).unwrap_err();
    assert!(error.to_string().contains("[2, 1]"), "{error}");
    assert!(Quantile::new(ctx, 1.5).is_err() && Quantile::new(ctx, f64::NAN).is_err());
    Ok(())
}

/// Columns and mask as a sort gives them; and main product plus side product is the product, exactly, on integers.
fn split(ctx: &Context, _: usize) -> Result<(), Failed> {
    for (turn, (dtype, rows, cols, n)) in
        [(DType::F32, 130, 100, 8), (DType::BF16, 33, 1100, 12), (DType::F32, 8, 4, 4)]
            .into_iter()
            .enumerate()
    {
        // Few different magnitudes, so that there are ties, across all the lanes.
        let mut values: Vec<f32> =
            common::words(turn as u64, rows * cols).iter().map(|w| (w % 5) as f32 - 2.0).collect();
        for (i, col) in [cols - 1, cols / 2, 1, 2].into_iter().enumerate() {
            values[i % rows * cols + col] =
                [40.0, -40.0, f32::INFINITY, f32::NAN][if turn == 1 { i } else { i % 2 }];
        }
        let bytes = narrowed(dtype, &values);
        let x = ctx.upload(dtype, rows, cols, &bytes)?;
        let amax = |col: usize| {
            (0..rows).map(|row| values[row * cols + col].to_bits() & 0x7fff_ffff).max().unwrap()
        };
        let mut order: Vec<usize> = (0..cols).collect();
        order.sort_by_key(|col| std::cmp::Reverse(amax(*col))); // Stable.
        order.truncate(n);
        let mut split = Split::new(ctx, cols, n)?;
        let mut side = ctx.upload(dtype, rows, n, &narrowed(dtype, &vec![f32::NAN; rows * n]))?;
        let mut stream = ctx.stream();
        // Something else before: choosing starts anew.
        split.choose(&mut stream, &ctx.zeros(dtype, 3, cols)?)?;
        split.choose(&mut stream, &x)?;
        split.gather(&mut stream, &x, &mut side)?;
        ctx.submit(stream)?;
        let columns: Vec<_> = order.iter().map(|c| *c as u32).collect();
        assert_eq!(ctx.read_ids_blocking(split.columns())?, columns);
        let mut mask = vec![0u32; cols.div_ceil(32)];
        order.iter().for_each(|c| mask[c / 32] |= 1 << (c % 32));
        assert_eq!(ctx.read_ids_blocking(split.mask())?, mask);
        let want: Vec<f32> = (0..rows * n).map(|i| values[i / n * cols + order[i % n]]).collect();
        assert_bytes("side", &ctx.read_blocking(&side)?, &narrowed(dtype, &want));
        let mut wrong = ctx.zeros(dtype, rows + 1, n)?;
        let error = split.gather(&mut ctx.stream(), &x, &mut wrong).unwrap_err().to_string();
        assert!(error.contains(&format!("[{rows}, {n}]")), "{error}");
        let error = split.choose(&mut ctx.stream(), &ctx.zeros(dtype, 3, cols + 4)?).unwrap_err();
        assert!(error.to_string().contains(&format!("{cols}]")), "{error}");
    }
    assert!(Split::new(ctx, 64, 5).is_err() && Split::new(ctx, 4, 8).is_err());

    let (m, n, k, taken) = (20, 12, 128, 4);
    let integers = |seed, len| -> Vec<f32> {
        common::words(seed, len).iter().map(|w| (w % 13) as f32 - 6.0).collect()
    };
    let (mut a, b) = (integers(1, m * k), integers(2, n * k));
    for row in 0..m {
        a[row * k + 77] = 1000.0 + row as f32; // Too large for INT8 beside 6.
    }
    let x = ctx.upload(DType::F32, m, k, bytemuck::cast_slice(&a))?;
    let w = ctx.upload(DType::F32, n, k, bytemuck::cast_slice(&b))?;
    let mut split = Split::new(ctx, k, taken)?;
    let (mut x_side, mut w_side) =
        (ctx.zeros(DType::F32, m, taken)?, ctx.zeros(DType::F32, n, taken)?);
    let (mut x_main, mut w_main) =
        (ctx.zeros_mx(MXINT8, Axis::One, m, k)?, ctx.zeros_mx(MXINT8, Axis::One, n, k)?);
    let mut y = ctx.zeros(DType::F32, m, n)?;
    let mut stream = ctx.stream();
    split.choose(&mut stream, &x)?;
    split.gather(&mut stream, &x, &mut x_side)?;
    split.gather(&mut stream, &w, &mut w_side)?;
    let both = QuantizeBoth::new(ctx, Some(Side { spec: MXINT8, ..Default::default() }), None)?;
    let guards = Guards { skip: Some(split.mask()), clip: None };
    both.record(&mut stream, &x, Some(&mut x_main), None, &guards, None)?;
    both.record(&mut stream, &w, Some(&mut w_main), None, &Guards::default(), None)?;
    let main = MatmulDesc {
        m,
        n,
        k,
        a: MXINT8.into(),
        b: MXINT8.into(),
        tier: Tier::Exact,
        ..Default::default()
    };
    Matmul::new(ctx, &main)?.record(&mut stream, &x_main, &w_main, &mut y)?;
    let side = MatmulDesc {
        m,
        n,
        k: taken,
        a: DType::F32.into(),
        b: DType::F32.into(),
        beta: 1.0,
        ..Default::default()
    };
    Matmul::new(ctx, &side)?.record(&mut stream, &x_side, &w_side, &mut y)?;
    ctx.submit(stream)?;
    let got = to_f32(DType::F32, &ctx.read_blocking(&y)?);
    for i in 0..m {
        for j in 0..n {
            let want: f32 = (0..k).map(|l| a[i * k + l] * b[j * k + l]).sum();
            assert_eq!(got[i * n + j], want, "element {i} {j}");
        }
    }
    Ok(())
}

/// A product reads the anchors: the same as with a tensor that was uploaded, whose anchors the host makes.
fn anchors(ctx: &Context, _: usize) -> Result<(), Failed> {
    let (m, n, k) = (36, 64, 96);
    let a = ctx.upload(DType::F32, m, k, bytemuck::cast_slice(&gaussian(1, m * k)))?;
    let w = ctx.upload(DType::F32, k, n, bytemuck::cast_slice(&gaussian(2, k * n)))?;
    let mut outs = [ctx.zeros_mx(MXFP4, Axis::One, m, k)?, ctx.zeros_mx(MXFP4, Axis::Zero, k, n)?];
    let mut stream = ctx.stream();
    let [rows, columns] = &mut outs;
    let none = Guards::default();
    let side = Some(Side::default());
    QuantizeBoth::new(ctx, side, None)?.record(&mut stream, &a, Some(rows), None, &none, None)?;
    QuantizeBoth::new(ctx, None, side)?.record(
        &mut stream,
        &w,
        None,
        Some(columns),
        &none,
        None,
    )?;
    ctx.submit(stream)?;
    let uploaded = [
        ctx.upload_mx(&ctx.read_mx_blocking(&outs[0])?)?,
        ctx.upload_mx(&ctx.read_mx_blocking(&outs[1])?)?,
    ];
    let desc = MatmulDesc { m, n, k, tier: Tier::Exact, ..Default::default() };
    let matmul = Matmul::new(ctx, &desc)?;
    let mut results = Vec::new();
    for [a, b] in [&outs, &uploaded] {
        let mut y = ctx.zeros(DType::F32, m, n)?;
        let mut stream = ctx.stream();
        matmul.record(&mut stream, a, b, &mut y)?;
        ctx.submit(stream)?;
        results.push(ctx.read_blocking(&y)?);
    }
    assert!(to_f32(DType::F32, &results[0]).iter().any(|v| v.abs() > 1.0));
    assert_bytes("products", &results[0], &results[1]);
    Ok(())
}

fn empty(ctx: &Context, _: usize) -> Result<(), Failed> {
    for (rows, cols) in [(0, 0), (0, 64), (64, 0)] {
        let x = ctx.zeros(DType::BF16, rows, cols)?;
        let sides = [Some(side(1, 32)), Some(side(2, 16))];
        for got in run(ctx, sides, &x, &Guards::default(), None)? {
            let (got, nonfinite) = got.unwrap();
            assert_eq!((got.bytes(), nonfinite), (0, 0), "{rows}x{cols}");
        }
    }
    Ok(())
}

fn mismatches(ctx: &Context, _: usize) -> Result<(), Failed> {
    let plain = Side::default();
    let none = Guards::default();
    let hadamard =
        |size| Some(Side { hadamard: Some(Hadamard { size, signs: Signs::None }), ..plain });
    let square = Side { spec: MXFP4.with_block(Block::Square(32)), ..plain };
    let error = QuantizeBoth::new(ctx, Some(square), None).unwrap_err().to_string();
    assert!(error.contains("32x32"), "{error}");
    let error = QuantizeBoth::new(ctx, hadamard(48), None).unwrap_err().to_string();
    assert!(error.contains("48"), "{error}");
    assert!(QuantizeBoth::new(ctx, None, None).is_err());
    let ceil = Side { spec: NVFP4, scale_rule: Some(ScaleRule::Ceil), ..plain };
    assert!(QuantizeBoth::new(ctx, None, Some(ceil)).is_err());

    let says =
        |both: QuantizeBoth, x: &Tensor, guards: &Guards<'_>, words: usize, parts: [&str; 2]| {
            let mut rows = ctx.zeros_mx(MXFP4, Axis::One, 40, 64).unwrap();
            let mut counters = ctx.zeros_ids(words).unwrap();
            let error = both
                .record(&mut ctx.stream(), x, Some(&mut rows), None, guards, Some(&mut counters))
                .unwrap_err()
                .to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        };
    let rows = QuantizeBoth::new(ctx, Some(plain), None)?;
    let x = ctx.zeros(DType::F32, 40, 64)?;
    says(rows, &ctx.zeros(DType::F32, 40, 66)?, &none, 8, ["[40, 66]", "fours"]);
    says(rows, &ctx.zeros(DType::F32, 41, 64)?, &none, 8, ["[41, 64]", "[40, 64]"]);
    says(rows, &ctx.zeros(DType::F16, 40, 64)?, &none, 8, ["f16", "f32 or bf16"]);
    says(rows, &x, &none, 7, ["7", "8"]);
    says(QuantizeBoth::new(ctx, None, Some(plain))?, &x, &none, 8, ["row side", "output"]);
    says(
        QuantizeBoth::new(ctx, Some(plain), Some(plain))?,
        &x,
        &none,
        8,
        ["column side", "output"],
    );
    says(QuantizeBoth::new(ctx, hadamard(128), None)?, &x, &none, 8, ["[40, 64]", "128"]);
    let other = Side { spec: MXFP8_E4M3, ..plain };
    says(QuantizeBoth::new(ctx, Some(other), None)?, &x, &none, 8, ["mxfp8-e4m3", "mxfp4"]);
    let clip = ctx.zeros(DType::F32, 1, 2)?;
    says(rows, &x, &Guards { clip: Some(&clip), skip: None }, 8, ["clip", "[1, 2]"]);
    let skip = ctx.zeros_ids(3)?;
    says(rows, &x, &Guards { clip: None, skip: Some(&skip) }, 8, ["skip", "3"]);
    let mut columns = ctx.zeros_mx(MXFP4, Axis::Zero, 40, 64)?;
    let both = QuantizeBoth::new(ctx, None, hadamard(16))?;
    let error = both
        .record(&mut ctx.stream(), &x, None, Some(&mut columns), &none, None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("[40, 64]") && error.contains("16"), "{error}");
    if ctx.wgpu().is_some() {
        let elsewhere = Context::cpu().zeros(DType::F32, 40, 64)?;
        says(rows, &elsewhere, &none, 8, ["CPU engine", "GPU"]);
    }
    Ok(())
}

/// The mean over draws of what a transformed block becomes is the transformed block, or three quarters of it: within six
/// standard errors of an element, whose step is at most 2 · scale.
fn unbiased(ctx: &Context, _: usize) -> Result<(), Failed> {
    let [rows, cols] = [32, 64];
    let values = gaussian(9, rows * cols);
    let x = ctx.upload(DType::F32, rows, cols, bytemuck::cast_slice(&values))?;
    let hadamard = Some(Hadamard { size: 32, signs: Signs::Random { seed: 4 } });
    let draws = 400;
    for (axis, three_quarters) in
        [(Axis::One, false), (Axis::Zero, false), (Axis::One, true), (Axis::Zero, true)]
    {
        let want = transform(&values, [rows, cols], axis, hadamard);
        let mut sums = vec![0f64; rows * cols];
        let mut scales = Vec::new();
        for stream in 0..draws {
            let rounding = Rounding::Stochastic { seed: 8, stream };
            let side = Side {
                scale_rule: (!three_quarters).then_some(ScaleRule::Rceil),
                rounding,
                hadamard,
                three_quarters,
                ..Default::default()
            };
            let sides = if axis == Axis::One { [Some(side), None] } else { [None, Some(side)] };
            let got = run(ctx, sides, &x, &Guards::default(), None)?;
            let (got, _) = got.into_iter().flatten().next().unwrap();
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum += f64::from(got.get(i / cols, i % cols));
            }
            scales = got.scales().to_vec();
        }
        let layout = microscaling::Layout::new(MXFP4, axis, rows, cols)?;
        for (i, (sum, want)) in sums.iter().zip(&want).enumerate() {
            let (line, at) = layout.position(i / cols, i % cols);
            let step = 2f64.powi(i32::from(scales[layout.scale_index(line, at)]) - 127) * 2.0;
            // The product's 4/3.
            let gain = if three_quarters { 4.0 / 3.0 } else { 1.0 };
            let (step, error) = (step * gain, (sum / draws as f64 * gain - f64::from(*want)).abs());
            assert!(
                error <= 6.0 * step / 2.0 / (draws as f64).sqrt(),
                "axis {axis} element {i}: {error}"
            );
        }
    }
    Ok(())
}

/// The recursion in f32 against the dense matrix in f64: each of log2(n) additions on the way rounds, relative to a partial
/// sum of at most Σ|x|. Integers are exact.
fn reference_is_the_matrix() -> Result<(), Failed> {
    for size in [16u32, 32, 64, 128] {
        let hadamard = Hadamard { size, signs: Signs::Random { seed: 3 } };
        let s = signs(hadamard);
        assert!(s.contains(&1.0) && s.contains(&-1.0));
        for exact in [false, true] {
            let x: Vec<f32> = gaussian(u64::from(size), size as usize)
                .into_iter()
                .map(|v| if exact { (v * 1000.0).round() } else { v })
                .collect();
            let got = transform_group(&x, hadamard);
            let sum: f64 = x.iter().map(|v| f64::from(v.abs())).sum();
            let scale = f64::from(divisor(hadamard));
            let bound =
                if exact { 0.0 } else { f64::from(size.ilog2()) * sum * 2f64.powi(-24) / scale };
            for (i, got) in got.iter().enumerate() {
                let want: f64 = (0..size as usize)
                    .map(|j| {
                        let h = if (i & j).count_ones() % 2 == 0 { 1.0 } else { -1.0 };
                        h * f64::from(s[j] * x[j]) / scale
                    })
                    .sum();
                assert!((f64::from(*got) - want).abs() <= bound, "{size} {exact}: {got} {want}");
            }
        }
    }
    Ok(())
}

/// ⟨x', y'⟩ · gain = ⟨x, y⟩, on integers, exactly.
fn gains() -> Result<(), Failed> {
    for (size, gain) in [(16, 1.0), (32, 2.0), (64, 1.0), (128, 2.0)] {
        let hadamard = Hadamard { size, signs: Signs::Random { seed: 12 } };
        assert_eq!(hadamard.gain(), gain);
        let integers = |seed| -> Vec<f32> {
            common::words(seed, size as usize).iter().map(|w| (w % 17) as f32 - 8.0).collect()
        };
        let (x, y) = (integers(1), integers(2));
        let dot = |x: &[f32], y: &[f32]| -> f32 { x.iter().zip(y).map(|(x, y)| x * y).sum() };
        let transformed = dot(&transform_group(&x, hadamard), &transform_group(&y, hadamard));
        assert_eq!(transformed * hadamard.gain(), dot(&x, &y));
    }
    Ok(())
}

/// On a device of WebGPU's default limits everything at once does not fit into the bindings: a pass a side, the same bytes.
fn few_bindings() -> Result<(), Failed> {
    if std::env::var("MX_TEST_GPU").is_ok_and(|mode| mode == "off") {
        return Ok(());
    }
    let cpu = Context::cpu();
    for adapter in pollster::block_on(engine::adapters(false)) {
        let (device, queue) =
            pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default()))?;
        let ctx = Context::from_wgpu(device, queue, &adapter);
        let [rows, cols] = [64, 96];
        let bytes = selftest::input(DType::F32, rows, cols);
        let sides = [Some(side(1, 32)), Some(side(13, 16))];
        let mut results = Vec::new();
        for ctx in [&cpu, &ctx] {
            let x = ctx.upload(DType::F32, rows, cols, &bytes)?;
            let clip = ctx.upload(DType::F32, 1, 1, &1e5f32.to_le_bytes())?;
            let skip = ctx.upload_ids(&[1 << 9, 0, 1 << 31])?;
            let guards = Guards { clip: Some(&clip), skip: Some(&skip) };
            let mut counters = ctx.zeros_ids(COUNTERS)?;
            let packed = run(ctx, sides, &x, &guards, Some(&mut counters))?;
            results.push((packed, ctx.read_ids_blocking(&counters)?));
        }
        assert!(results[0] == results[1]);
    }
    Ok(())
}

/// Signs on the output's side instead of the input's must show.
fn comparison_fails() -> Result<(), Failed> {
    let ctx = Context::cpu();
    let [rows, cols] = [4, 64];
    let values = gaussian(1, rows * cols);
    let side = Side { rounding: Rounding::NearestEven, spec: MXFP4, ..side(1, 32) };
    let x = ctx.upload(DType::F32, rows, cols, bytemuck::cast_slice(&values))?;
    let [got, _] = run(&ctx, [Some(side), None], &x, &Guards::default(), None)?;
    let (got, nonfinite) = got.unwrap();
    let hadamard = side.hadamard.unwrap();
    let desc = desc(&side, Axis::One);
    let right = transform(&values, [rows, cols], Axis::One, side.hadamard);
    compare("right", &got, nonfinite, &right, &desc);
    let plain = Hadamard { signs: Signs::None, ..hadamard };
    let mut wrong = transform(&values, [rows, cols], Axis::One, Some(plain));
    for (i, v) in wrong.iter_mut().enumerate() {
        *v *= signs(hadamard)[i % 32];
    }
    let fails = panics(|| compare("wrong", &got, nonfinite, &wrong, &desc));
    assert!(fails, "signs on the wrong side pass");
    Ok(())
}
