//! The tensor tier in bytes, emulated: what lies in workgroup memory is E4M3, decoded by definition, or integers. This shows that
//! what a device's matrices are given is right, not what they make of it: tests/matmul.rs shows that on a device that has some.
//!
//! Products must lie within the tensor tier's bound (tests/common/product.rs), and have f16's bits where no sum is rounded, which
//! is always so for integers here; and bytes must have the tiles that they can have, and no others.
//!
//! And its f16 operands converted from E2M1 by VK_EXT_shader_ocp_microscaling_types, emulated by the definition of that: every
//! code as the definition says, and the bits of what decodes codes itself. tests/spirv.rs has what a driver would be given.

mod common;

use common::engines::{self, Form, Test};
use common::product::{Lines, compare, product};
use common::{assert_bytes, garbage, to_f32, words};
use libtest_mimic::Failed;
use microscaling::engine::caps::State;
use microscaling::kernels::matmul::{Byte, Extras, Tuning};
use microscaling::{
    Axis, Block, Context, DType, DeviceChoice, Element, Error, Groups, Layout, MXFP4, MXFP8_E4M3,
    Matmul, MatmulDesc, MxSpec, MxTensor, NVFP4, Operand, Options, Output, QuantizeDesc, Rounding,
    Tier, wgpu,
};

/// Powers of two from a line's anchor to the last block that is exact: 0.5 · 2^(6 − 11) is E4M3's smallest normal number, and
/// 12 · 2^3 the largest that seven bits hold of twice a code.
fn window(ctx: &Context) -> usize {
    match Matmul::new(ctx, &desc(MXFP4, MXFP4, [64, 64, 128])).map(|kernel| kernel.bytes()) {
        Ok(Some(Byte::E4m3)) => 11,
        Ok(Some(Byte::I8)) => 3,
        other => panic!("{other:?}"),
    }
}

const TESTS: &[(&str, Test)] = &[
    ("bytes_have_f16s_bits", same_bits),
    ("borders_of_the_window", borders),
    ("nan_and_zero_blocks", nan_and_zero),
    ("wild_scales", wild),
    ("grouped_and_packed", grouped_and_packed),
    ("planted_errors_show", planted),
    ("what_is_not_for_bytes", not_for_bytes),
];

/// With conversions of E2M1 emulated besides.
const CONVERTED: &[(&str, Test)] = &[
    ("every_code_as_defined", every_code),
    ("conversions_change_no_bit", conversions_change_no_bit),
    ("a_measured_tile_may_convert", measured_tile),
];

const EVERY: (&str, Test) = ("every_code_as_defined", every_code);
const NONE: (&str, Test) = ("no_conversion", no_conversion);

/// Where f16 is left out: nothing has the other tiles.
const ALONE: &[(&str, Test)] = &[("bytes_alone_keep_the_bound", alone)];

const OWN: &str = " in bytes";
const FP8: &str = " emulated in FP8";
const I8: &str = " emulated in I8";
const WITHOUT: &str = " emulated in FP8 without f16";
const OCP: &str = " emulated in FP8 with conversions";

fn main() {
    let f16 = wgpu::Features::SHADER_F16;
    let emulated =
        |byte| Options { emulate_tensor: true, emulate_bytes: Some(byte), ..Default::default() };
    let options = emulated(Byte::E4m3);
    let without = Options { without: f16, ..options.clone() };
    let ocp = Options { ocp_conversion: true, ..options.clone() };
    // It would need no f16, but SwiftShader, which has none, does not end within minutes.
    let slow = (f16, "too slow, as no driver with f16 is");
    let forms = [
        Form {
            what: engines::PLAIN,
            options: Options::default(),
            steps: [1; 2],
            needs: (wgpu::Features::empty(), ""),
        },
        Form {
            what: OWN,
            options: Options { bytes_from: Some(0), ..Default::default() },
            steps: [1; 2],
            needs: (wgpu::Features::empty(), ""),
        },
        Form { what: OCP, options: ocp, steps: [1; 2], needs: (f16, "no f16 in shaders") },
        Form { what: FP8, options, steps: [1, 2], needs: (f16, "no f16 in shaders") },
        Form {
            what: I8,
            options: emulated(Byte::I8),
            steps: [1, 2],
            needs: (f16, "no f16 in shaders"),
        },
        Form { what: WITHOUT, options: without, steps: [1, 1], needs: slow },
    ];
    let suite = |form: &str| match form {
        engines::CPU => vec![EVERY, NONE],
        engines::PLAIN => vec![EVERY, NONE],
        OWN => vec![("the_devices_own_bytes", own as Test)],
        FP8 => [TESTS, &[("a_measured_tile_may_not_convert", measured_tile)]].concat(),
        I8 => TESTS.to_vec(),
        OCP => CONVERTED.to_vec(),
        WITHOUT => ALONE.to_vec(),
        _ => vec![],
    };
    engines::run(suite, &forms, vec![]);
}

// ---- Operands ------------------------------------------------------------------------------------------------------

/// Random codes under scales whose distances below the line's anchor, which differs from line to line, are `below(line, block)`
/// (square blocks: of rows of blocks); None: a block of zeros under scale 0. The anchor is block 0's.
fn operand(
    seed: u64,
    spec: MxSpec,
    [lines, long]: [usize; 2],
    below: impl Fn(usize, usize) -> Option<usize>,
) -> MxTensor {
    let layout = Layout::new(spec, Axis::One, lines, long).unwrap();
    let mut codes: Vec<u8> =
        words(seed, layout.codes_len()).into_iter().map(|w| (w >> 24) as u8 | 1).collect();
    let blocks = layout.blocks();
    let mut scales = Vec::with_capacity(layout.scales_len());
    for row in 0..layout.scale_rows() {
        let anchor = 127 + row * 37 % 61 - 30;
        for block in 0..blocks {
            let distance = if block == 0 { Some(0) } else { below(row, block) };
            scales.push(distance.map_or(0, |distance| (anchor - distance) as u8));
            if distance.is_none() {
                let first = row * spec.block.lines();
                for line in first..(first + spec.block.lines()).min(layout.lines()) {
                    let at = line * layout.line_bytes() + block * layout.block_bytes();
                    // Zeros of either sign.
                    codes[at..][..layout.block_bytes()].fill(0x80);
                }
            }
        }
    }
    MxTensor::from_parts(layout, codes, scales, 1.0).unwrap()
}

/// Distances all over the window.
fn inside(w: usize) -> impl Fn(usize, usize) -> Option<usize> + Copy {
    move |row, block| Some((row * 5 + block * 7) % (w + 1))
}

struct Problem {
    desc: MatmulDesc,
    a: MxTensor,
    b: MxTensor,
    groups: Option<(Vec<u32>, Vec<u32>)>,
}

/// What computes.
#[derive(Clone, Copy, PartialEq)]
enum By {
    Both,
    BytesAlone,
    F16,
    /// F16, without conversions.
    Decoded,
}

fn desc(a: impl Into<Operand>, b: impl Into<Operand>, [m, n, k]: [usize; 3]) -> MatmulDesc {
    let tier = Tier::Tensor;
    MatmulDesc { m, n, k, a: a.into(), b: b.into(), tier, ..Default::default() }
}

impl Problem {
    fn new(desc: MatmulDesc, a: MxTensor, b: MxTensor) -> Problem {
        Problem { desc, a, b, groups: None }
    }

    fn kernel(&self, ctx: &Context, by: By) -> Result<Matmul, Failed> {
        let kernel = Matmul::new(ctx, &self.desc)?;
        let bytes = [By::Both, By::BytesAlone].contains(&by);
        assert!(!bytes || kernel.bytes().is_some(), "{}", kernel.why());
        Ok(match by {
            By::Both => kernel,
            By::BytesAlone => kernel.bytes_alone(),
            By::F16 => kernel.without_bytes(),
            By::Decoded => kernel.without_bytes().without_conversion(ctx),
        })
    }

    /// What y holds, NaN where nothing was written; packed: codes and scales.
    fn run(&self, ctx: &Context, by: By) -> Result<Vec<u8>, Failed> {
        let desc = &self.desc;
        let (a, b) = (ctx.upload_mx(&self.a)?, ctx.upload_mx(&self.b)?);
        let bias: Vec<f32> = (0..desc.n).map(|j| j as f32 / 8.0).collect();
        let bias = match desc.bias {
            true => Some(ctx.upload(DType::F32, 1, desc.n, bytemuck::cast_slice(&bias))?),
            false => None,
        };
        let groups = match &self.groups {
            Some((offsets, experts)) => {
                Some(Groups::new(ctx, offsets, experts, desc.experts.unwrap())?)
            }
            None => None,
        };
        let extras = Extras { bias: bias.as_ref(), groups: groups.as_ref() };
        let kernel = self.kernel(ctx, by)?;
        let stack = if desc.group_k { desc.experts.unwrap_or(1) } else { desc.batch };
        let mut stream = ctx.stream();
        match desc.out {
            Output::Dense(dtype) => {
                let fill: [u8; 2] = if desc.beta == 0.0 { [0xa5, 0x7f] } else { [0x12, 0x3c] };
                let old = fill.repeat(stack * desc.m * desc.n * dtype.size() / 2);
                let mut y = ctx.upload(dtype, stack * desc.m, desc.n, &old)?;
                kernel.record_with(&mut stream, &a, &b, &mut y, extras)?;
                ctx.submit(stream)?;
                Ok(ctx.read_blocking(&y)?)
            }
            Output::Mx(out) => {
                let mut y = garbage(ctx, &out, desc.m, desc.n)?;
                kernel.record_with(&mut stream, &a, &b, &mut y, extras)?;
                ctx.submit(stream)?;
                let y = ctx.read_mx_blocking(&y)?;
                Ok([y.codes(), y.scales()].concat())
            }
        }
    }

    /// What both kernels give together: for integers f16's bits. Sums of E4M3 have another order.
    fn both(&self, ctx: &Context) -> Result<Vec<u8>, Failed> {
        if window(ctx) == 3 { self.has_f16s_bits(ctx) } else { self.run(ctx, By::Both) }
    }

    /// Both kernels together have f16's bits, as they must where no sum is rounded.
    fn has_f16s_bits(&self, ctx: &Context) -> Result<Vec<u8>, Failed> {
        let [both, f16] = [By::Both, By::F16].map(|by| self.run(ctx, by));
        let (both, f16) = (both?, f16?);
        assert_bytes(&format!("{:?}", self.desc), &both, &f16);
        Ok(both)
    }

    /// Within the tensor tier's bound; one product to f32.
    fn keeps_the_bound(&self, got: &[u8]) -> Result<(), Failed> {
        let a = Lines::mx(&self.a, self.desc.a.transposed);
        let b = Lines::mx(&self.b, self.desc.b.transposed);
        let want = product(Tier::Tensor, &a, &b, self.desc.alpha);
        Ok(compare(DType::F32, false, got, &want, self.desc.n)?)
    }

    /// Rows and columns of a tile, from its name: subgroups, slices, fragments.
    fn tile(&self, ctx: &Context) -> Result<[usize; 2], Failed> {
        let name = self.kernel(ctx, By::Both)?.tile(ctx).expect("a GPU");
        let numbers: Vec<usize> =
            name.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect();
        let [16, m, n, _, fm, fn_] = numbers[..] else { panic!("{name}") };
        Ok([m * fm * 16, n * fn_ * 16])
    }

    /// FP8 alone writes exactly the tiles that have no line `outside`, with the same bits. Returns how many it writes and not.
    fn bytes_take_all_but(
        &self,
        ctx: &Context,
        y: &[u8],
        [a_outside, b_outside]: [&dyn Fn(usize) -> bool; 2],
    ) -> Result<[usize; 2], Failed> {
        let MatmulDesc { m, n, .. } = self.desc;
        let alone = self.run(ctx, By::BytesAlone)?;
        let [bm, bn] = self.tile(ctx)?;
        let any = |at: usize, size: usize, end: usize, outside: &dyn Fn(usize) -> bool| {
            let first = at / size * size;
            (first..(first + size).min(end)).any(outside)
        };
        let mut counts = [0; 2];
        for at in 0..m * n {
            let (i, j) = (at / n, at % n);
            let left = any(i, bm, m, a_outside) || any(j, bn, n, b_outside);
            counts[usize::from(left)] += 1;
            let want = if left { &[0xa5, 0x7f, 0xa5, 0x7f] } else { &y[at * 4..][..4] };
            if &alone[at * 4..][..4] != want {
                return Err(
                    format!("({i}, {j}): {left} {:?} {want:?}", &alone[at * 4..][..4]).into()
                );
            }
        }
        Ok(counts)
    }
}

// ---- Tests ---------------------------------------------------------------------------------------------------------

fn never(_: usize) -> bool {
    false
}

/// All of it with a device's own matrices; where the probe knows none there are none.
fn own(ctx: &Context, step: usize) -> Result<(), Failed> {
    let bytes = Matmul::new(ctx, &desc(MXFP4, MXFP4, [64, 64, 128])).map(|kernel| kernel.bytes());
    if let Ok(Some(_)) = bytes {
        return TESTS.iter().try_for_each(|(name, test)| {
            test(ctx, step).map_err(|failed| format!("{name}: {:?}", failed.message()).into())
        });
    }
    let lines = ["fp8-cooperative-matrix", "i8-cooperative-matrix"];
    let usable = lines.map(|name| ctx.caps().get(name).map(|line| line.state) == Some(State::Yes));
    // Matrices of bytes are no use without those of f16.
    assert!(bytes.is_err() || usable == [false; 2], "{bytes:?} {usable:?}");
    Ok(())
}

fn same_bits(ctx: &Context, step: usize) -> Result<(), Failed> {
    let w = window(ctx);
    let with = |block| MXFP4.with_block(block);
    let square = |side| Operand::from(with(Block::Square(side)));
    let v16 = with(Block::Vector(16));
    // Read 16 bytes at a time and word by word, in blocks of all sizes, contracted over either axis, few rows and many.
    for (i, (a, b, shape)) in [
        (MXFP4.into(), MXFP4.into(), [150, 140, 256]),
        (MXFP4.into(), with(Block::Vector(128)).into(), [33, 70, 384]),
        (MXFP4.into(), MXFP4.into(), [70, 65, 200]),
        (MXFP4.into(), square(32), [40, 65, 160]),
        (v16.into(), with(Block::Vector(64)).into(), [40, 33, 97]),
        (MXFP4.into(), square(32).transposed(), [70, 41, 100]),
        (square(16).transposed(), square(32), [17, 70, 128]),
    ]
    .into_iter()
    .enumerate()
    .step_by(step)
    {
        let make = |seed, operand: Operand, lines: usize| {
            let microscaling::kernels::matmul::Values::Mx(spec) = operand.values else { panic!() };
            match operand.transposed {
                false => operand_of(w, seed, spec, [lines, shape[2]]),
                // A column's anchor is not block 0's: distances of one row apart at most.
                true => transposed_of(w, seed, spec, [shape[2], lines]),
            }
        };
        let (i, desc) = (i as u64, desc(a, b, shape));
        let problem = Problem::new(desc, make(i, a, shape[0]), make(i + 100, b, shape[1]));
        let y = problem.both(ctx)?;
        problem.keeps_the_bound(&y).map_err(|f| format!("{i}: {:?}", f.message()))?;
        let [taken, left] = problem.bytes_take_all_but(ctx, &y, [&never, &never])?;
        assert_eq!([taken, left], [shape[0] * shape[1], 0]);
    }
    // What else a product may be, with sums that are exact.
    let near = inside(w.min(3));
    let [m, n, k] = [40, 35, 128];
    let plain = desc(MXFP4, MXFP4, [m, n, k]);
    for desc in [
        MatmulDesc { batch: 3, ..plain },
        MatmulDesc { out: DType::BF16.into(), alpha: -3.0, bias: true, ..plain },
        MatmulDesc { out: DType::F16.into(), n: 36, ..plain },
        MatmulDesc { beta: 0.5, alpha: 2f32.powi(-40), ..plain },
        // Slices of k, in a second pass.
        MatmulDesc { m: 40, n: 24, k: 2304, ..plain },
    ] {
        let outside_at = |row, block| match (row % 29, block) {
            (28, 3) => Some(w + 3),
            _ => near(row, block),
        };
        let a = operand(7, MXFP4, [desc.batch * desc.m, desc.k], outside_at);
        let b = operand(8, MXFP4, [desc.batch * desc.n, desc.k], near);
        Problem::new(desc, a, b).has_f16s_bits(ctx)?;
    }
    Ok(())
}

fn operand_of(w: usize, seed: u64, spec: MxSpec, shape: [usize; 2]) -> MxTensor {
    operand(seed, spec, shape, inside(w))
}

/// For contraction over the lines: scales of all blocks within the window.
fn transposed_of(w: usize, seed: u64, spec: MxSpec, [lines, long]: [usize; 2]) -> MxTensor {
    let x = operand(seed, spec, [lines, long], inside(w));
    let layout = *x.layout();
    let near = |word: &u32| 120 + (word % (w as u32 + 1)) as u8;
    let scales = words(seed, layout.scales_len()).iter().map(near).collect();
    MxTensor::from_parts(layout, x.codes().to_vec(), scales, 1.0).unwrap()
}

/// Lines with blocks all over the window, zeros, a NaN, and one line that is not FP8's.
fn alone(ctx: &Context, _: usize) -> Result<(), Failed> {
    let w = window(ctx);
    for k in [128, 97] {
        let shape @ [m, n, _] = [100, 70, k];
        let a = operand(1, MXFP4, [m, k], |row, block| match (row, block) {
            (80, 2) => Some(w + 1),
            (7, _) => None,
            _ => inside(w)(row, block),
        });
        let b = operand(2, MXFP4, [n, k], inside(w));
        let (codes, mut scales, _) = b.clone().into_parts();
        scales[5 * b.layout().blocks() + 1] = 255;
        let b = MxTensor::from_parts(*b.layout(), codes, scales, 1.0)?;
        let problem = Problem::new(desc(MXFP4, MXFP4, shape), a, b);
        let y = problem.run(ctx, By::BytesAlone)?;
        let (a, b) = (Lines::mx(&problem.a, false), Lines::mx(&problem.b, false));
        let want = product(Tier::Tensor, &a, &b, 1.0);
        let [bm, _] = problem.tile(ctx)?;
        let mut left = 0;
        for at in (0..m * n).filter(|at| at / n / bm == 80 / bm) {
            left += 1;
            assert_eq!(y[at * 4..][..4], [0xa5, 0x7f, 0xa5, 0x7f], "({}, {})", at / n, at % n);
        }
        assert!(left > 0 && left < m * n);
        let rows: Vec<usize> = (0..m).filter(|i| i / bm != 80 / bm).collect();
        let pick = |i: &usize| y[i * n * 4..][..n * 4].to_vec();
        let got: Vec<u8> = rows.iter().flat_map(pick).collect();
        let want: Vec<_> = rows.iter().flat_map(|i| want[i * n..][..n].to_vec()).collect();
        compare(DType::F32, false, &got, &want, n)?;
    }
    Ok(())
}

/// A block at the window's end is FP8's, one further is not; both are right.
fn borders(ctx: &Context, _: usize) -> Result<(), Failed> {
    let w = window(ctx);
    let shape @ [m, n, k] = [150, 140, 128];
    let far = [w + 1, w + 2, 24, 60];
    let odd = |row: usize| row == 40 || row == 107;
    let a = operand(1, MXFP4, [m, k], |row, block| match block {
        1 if odd(row) => Some(far[row % 4]),
        1 => Some(w),
        _ => inside(w)(row, block),
    });
    let last = |row: usize| row == 139;
    let b = operand(2, MXFP4, [n, k], |row, block| match block {
        3 if last(row) => Some(w + 1),
        3 => Some(w),
        _ => Some(0),
    });
    let problem = Problem::new(desc(MXFP4, MXFP4, shape), a, b);
    let y = problem.both(ctx)?;
    problem.keeps_the_bound(&y)?;
    let [taken, left] = problem.bytes_take_all_but(ctx, &y, [&odd, &last])?;
    assert!(taken > 0 && left > 0, "{taken} {left}");

    // Squares: rows of blocks.
    let square = MXFP4.with_block(Block::Square(32));
    let a = operand(3, square, [m, k], |row, block| match (row, block) {
        (2, 3) => Some(w + 1),
        _ => Some(block % 2 * w),
    });
    let b = operand_of(w, 4, MXFP4, [n, k]);
    let problem = Problem::new(desc(square, MXFP4, shape), a, b);
    let y = problem.both(ctx)?;
    let [taken, left] = problem.bytes_take_all_but(ctx, &y, [&|i| i / 32 == 2, &never])?;
    assert!(taken > 0 && left > 0, "{taken} {left}");
    // And columns of them.
    let plain = transposed_of(w, 5, square, [k, n]);
    let (codes, mut scales, _) = plain.clone().into_parts();
    let blocks = plain.layout().blocks();
    (scales[3], scales[blocks + 3]) = (140, 140 - w as u8 - 1);
    let b = MxTensor::from_parts(*plain.layout(), codes, scales, 1.0)?;
    let a = operand_of(w, 6, MXFP4, [m, k]);
    let problem = Problem::new(desc(MXFP4, Operand::from(square).transposed(), shape), a, b);
    let y = problem.both(ctx)?;
    let [taken, left] = problem.bytes_take_all_but(ctx, &y, [&never, &|j| j / 32 == 3])?;
    assert!(taken > 0 && left > 0, "{taken} {left}");
    Ok(())
}

/// Blocks of zeros do not count, whatever their scale; a NaN makes its line NaN, and that by FP8.
fn nan_and_zero(ctx: &Context, _: usize) -> Result<(), Failed> {
    let w = window(ctx);
    let shape @ [m, n, k] = [70, 65, 128];
    let a = operand(1, MXFP4, [m, k], |row, block| match row % 3 == block % 3 {
        true => None,
        false => inside(w)(row, block),
    });
    let b =
        operand(2, MXFP4, [n, k], |row, block| if row == 5 { None } else { inside(w)(row, block) });
    let with_nan = |x: &MxTensor, row: usize, block: usize| {
        let (codes, mut scales, _) = x.clone().into_parts();
        scales[row * x.layout().blocks() + block] = 255;
        MxTensor::from_parts(*x.layout(), codes, scales, 1.0).unwrap()
    };
    let (a, b) = (with_nan(&a, 9, 1), with_nan(&b, 64, 3));
    let problem = Problem::new(desc(MXFP4, MXFP4, shape), a, b);
    let y = problem.both(ctx)?;
    problem.keeps_the_bound(&y)?;
    assert_eq!(problem.bytes_take_all_but(ctx, &y, [&never, &never])?, [m * n, 0]);
    for (at, v) in to_f32(DType::F32, &y).into_iter().enumerate() {
        assert_eq!(v.is_nan(), at / n == 9 || at % n == 64, "({}, {})", at / n, at % n);
    }
    Ok(())
}

/// Any bytes at all.
fn wild(ctx: &Context, _: usize) -> Result<(), Failed> {
    let w = window(ctx);
    let shape @ [m, n, k] = [150, 70, 256];
    let any = |seed, lines| {
        let layout = Layout::new(MXFP4, Axis::One, lines, k).unwrap();
        let codes = words(seed, layout.codes_len()).iter().map(|w| (w >> 24) as u8).collect();
        let scales =
            words(seed + 1, layout.scales_len()).iter().map(|w| (w >> 24) as u8 % 255).collect();
        MxTensor::from_parts(layout, codes, scales, 1.0).unwrap()
    };
    let problem = Problem::new(desc(MXFP4, MXFP4, shape), any(1, m), any(2, n));
    let y = problem.has_f16s_bits(ctx)?;
    problem.keeps_the_bound(&y)?;
    let near = Problem { b: operand_of(w, 3, MXFP4, [n, k]), ..problem };
    let y = near.has_f16s_bits(ctx)?;
    near.keeps_the_bound(&y)
}

fn grouped_and_packed(ctx: &Context, _: usize) -> Result<(), Failed> {
    // Sums are exact.
    let (w, near) = (window(ctx), inside(window(ctx).min(3)));
    let outside_at = |row, block| match (row % 90, block) {
        (45, 1) => Some(w + 1),
        _ => near(row, block),
    };
    for k in [128, 96] {
        let [m, n] = [160, 40];
        let a = operand(1, MXFP4, [m, k], outside_at);
        let b = operand(2, MXFP4, [3 * n, k], near);
        let experts = MatmulDesc { experts: Some(3), ..desc(MXFP4, MXFP4, [m, n, k]) };
        let groups = Some((vec![0, 33, 33, 140], vec![2, 0, 1]));
        Problem { groups, ..Problem::new(experts, a, b) }.has_f16s_bits(ctx)?;
    }

    let [m, n, k] = [70, 33, 256];
    let a = operand(3, MXFP4, [m, k], outside_at);
    let along_k = MatmulDesc { experts: Some(3), group_k: true, ..desc(MXFP4, MXFP4, [m, n, k]) };
    let groups = Some((vec![0, 96, 96, 224], vec![0; 3]));
    let b = operand_of(w.min(3), 4, MXFP4, [n, k]);
    Problem { groups, ..Problem::new(along_k, a, b) }.has_f16s_bits(ctx)?;

    // An invalid group is counted once, though two kernels see it.
    let (a, b) =
        (operand_of(w.min(3), 5, MXFP4, [40, 64]), operand_of(w.min(3), 6, MXFP4, [2 * 16, 64]));
    let (a, b) = (ctx.upload_mx(&a)?, ctx.upload_mx(&b)?);
    let (device, queue) = ctx.wgpu().expect("a GPU");
    let words: Vec<u32> = vec![0, 0, 20, 10, 0, 1];
    let usage =
        wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
    let buffer = device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 24,
        usage,
        mapped_at_creation: false,
    });
    queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&words));
    let groups = Groups::from_buffer(ctx, 2, buffer)?;
    let desc = MatmulDesc { experts: Some(2), ..self::desc(MXFP4, MXFP4, [40, 16, 64]) };
    let kernel = Matmul::new(ctx, &desc)?;
    assert!(kernel.bytes().is_some(), "{}", kernel.why());
    let mut y = ctx.zeros(DType::F32, 40, 16)?;
    let mut stream = ctx.stream();
    let extras = Extras { groups: Some(&groups), bias: None };
    kernel.record_with(&mut stream, &a, &b, &mut y, extras)?;
    ctx.submit(stream)?;
    assert_eq!(pollster::block_on(groups.invalid(ctx))?, 1);

    // Packed, with stochastic rounding: the same draws.
    let out = QuantizeDesc {
        rounding: Rounding::Stochastic { seed: 5, stream: 0 },
        ..Default::default()
    };
    let packed = MatmulDesc { out: out.into(), ..self::desc(MXFP4, MXFP4, [150, 96, 128]) };
    let (a, b) =
        (operand(7, MXFP4, [150, 128], outside_at), operand_of(w.min(3), 8, MXFP4, [96, 128]));
    Problem::new(packed, a, b).has_f16s_bits(ctx)?;
    Ok(())
}

/// The comparisons fail where they should.
fn planted(ctx: &Context, _: usize) -> Result<(), Failed> {
    let w = window(ctx);
    let shape @ [m, n, k] = [40, 33, 128];
    let make = || {
        Problem::new(
            desc(MXFP4, MXFP4, shape),
            operand_of(w, 1, MXFP4, [m, k]),
            operand_of(w, 2, MXFP4, [n, k]),
        )
    };
    let (right, mut code, mut scale) = (make(), make(), make());
    let (mut codes, scales, _) = right.a.clone().into_parts();
    codes[3 * right.a.layout().line_bytes()] ^= 2;
    code.a = MxTensor::from_parts(*right.a.layout(), codes.clone(), scales.clone(), 1.0)?;
    codes[3 * right.a.layout().line_bytes()] ^= 2;
    let mut moved = scales;
    // One power of two in one block.
    moved[7 * right.a.layout().blocks()] -= 1;
    scale.a = MxTensor::from_parts(*right.a.layout(), codes, moved, 1.0)?;
    for (what, wrong) in [("code", code), ("scale", scale)] {
        let y = wrong.run(ctx, By::BytesAlone)?;
        assert!(right.keeps_the_bound(&y).is_err(), "a wrong {what} is within the bound");
        assert_ne!(y, right.run(ctx, By::F16)?, "a wrong {what} has the same bits");
        wrong.keeps_the_bound(&y)?;
        assert!(wrong.bytes_take_all_but(ctx, &y, [&|i| i == 0, &never]).is_err());
    }
    // A block beyond the window that FP8 took nevertheless would count as zero.
    let one = |below| {
        let mut x = make();
        x.a = operand(3, MXFP4, [m, k], |row, block| match (row, block) {
            (20, 1) => below,
            _ => Some(0),
        });
        x
    };
    let (beyond, zero) = (one(Some(w + 1)), one(None));
    assert!(beyond.keeps_the_bound(&zero.run(ctx, By::F16)?).is_err(), "a lost block is not seen");
    assert_eq!(beyond.run(ctx, By::Both)?, beyond.run(ctx, By::F16)?);
    Ok(())
}

fn not_for_bytes(ctx: &Context, _: usize) -> Result<(), Failed> {
    for (desc, part) in [
        (desc(MXFP4, NVFP4, [40, 33, 64]), "B is nvfp4"),
        (desc(MXFP8_E4M3, MXFP4, [40, 33, 64]), "A is mxfp8-e4m3"),
        (desc(DType::F16, MXFP4, [40, 33, 64]), "A is f16"),
        (desc(MXFP4, MXFP4, [16, 33, 64]), "m = 16 is too few rows"),
    ] {
        let kernel = Matmul::new(ctx, &desc)?;
        assert!(kernel.bytes().is_none() && kernel.why().contains(part), "{:?}", kernel.why());
    }
    let other = MatmulDesc { tier: Tier::Exact, ..desc(MXFP4, MXFP4, [40, 33, 64]) };
    assert!(Matmul::new(ctx, &other)?.bytes().is_none());
    assert_eq!(MXFP4.element, Element::E2M1);
    Ok(())
}

// ---- Conversions of E2M1 -------------------------------------------------------------------------------------------

/// E2M1 as OCP MX v1.0 defines it (5.3.3), to which SPV_EXT_ocp_microscaling_types refers: a sign, two bits of exponent with bias
/// 1, one of mantissa.
fn e2m1(code: usize) -> f64 {
    let (exponent, mantissa) = (code >> 1 & 3, (code & 1) as f64 / 2.0);
    let magnitude = match exponent {
        0 => mantissa,
        _ => (1.0 + mantissa) * 2f64.powi(exponent as i32 - 1),
    };
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// Every code at every position of a chunk, in blocks from the anchor down to where f16 has nothing, times one: by the
/// definition. Also what the host decodes.
fn every_code(ctx: &Context, _: usize) -> Result<(), Failed> {
    let converts = Matmul::new(ctx, &desc(MXFP4, MXFP4, [64, 64, 128]))
        .is_ok_and(|kernel| kernel.tile(ctx).is_some_and(|tile| tile.starts_with("ocp-emulated")));
    let tier = match ctx.wgpu() {
        None => Tier::Exact,
        Some(_) if converts => Tier::Tensor,
        Some(_) => Tier::Alu,
    };
    const ANCHOR: usize = 130;
    let [m, n, k] = [176, 128, 128];
    let code = |row: usize, at: usize| (row + at) % 16;
    // Up to 2^-33 of the anchor; f16's least is 2^-24.
    let below = |row: usize, block: usize| if block == 0 { 0 } else { row / 16 * 3 + block };
    let pack = |lines: usize, code: &dyn Fn(usize, usize) -> usize| {
        let nibbles = |row| (0..k / 2).map(move |i| (row, 2 * i));
        let bytes = (0..lines).flat_map(nibbles);
        bytes.map(|(row, at)| (code(row, at) | code(row, at + 1) << 4) as u8).collect::<Vec<_>>()
    };
    let scales = (0..m).flat_map(|row| (0..4).map(move |b| (ANCHOR - below(row, b)) as u8));
    let a = Layout::new(MXFP4, Axis::One, m, k)?;
    let a = MxTensor::from_parts(a, pack(m, &code), scales.collect(), 1.0)?;
    // Code 2 is one.
    let one = |row: usize, at: usize| if row == at { 2 } else { 0 };
    let b = Layout::new(MXFP4, Axis::One, n, k)?;
    let b = MxTensor::from_parts(b, pack(n, &one), vec![127; n * 4], 1.0)?;
    let problem = Problem::new(MatmulDesc { tier, ..desc(MXFP4, MXFP4, [m, n, k]) }, a.clone(), b);
    let y = to_f32(DType::F32, &problem.run(ctx, By::F16)?);
    for (row, at) in (0..m).flat_map(|row| (0..k).map(move |at| (row, at))) {
        let relative = e2m1(code(row, at)) * 2f64.powi(-(below(row, at / 32) as i32));
        let anchor = 2f64.powi(ANCHOR as i32 - 127);
        let what = format!("code {} at {at}, 2^-{}", code(row, at), below(row, at / 32));
        assert_eq!(f64::from(a.get(row, at)), relative * anchor, "host: {what}");
        let relative = match tier {
            Tier::Tensor => half::f16::from_f64(relative).to_f64(),
            _ => relative,
        };
        assert_eq!(f64::from(y[row * n + at]), relative * anchor, "{what}");
    }
    Ok(())
}

fn conversions_change_no_bit(ctx: &Context, _: usize) -> Result<(), Failed> {
    let any = |seed, spec: MxSpec, [lines, long]: [usize; 2]| {
        let layout = Layout::new(spec, Axis::One, lines, long).unwrap();
        let codes = words(seed, layout.codes_len()).iter().map(|w| (w >> 24) as u8).collect();
        // Near each other: many blocks end among f16's subnormals, and some below.
        let scales =
            words(seed + 1, layout.scales_len()).into_iter().map(|w| 100 + (w >> 24) as u8 % 30);
        MxTensor::from_parts(layout, codes, scales.collect(), 1.0).unwrap()
    };
    let v64 = MXFP4.with_block(Block::Vector(64));
    let one = |a: MxSpec, b: MxSpec, [m, n, k]: [usize; 3]| {
        Problem::new(desc(a, b, [m, n, k]), any(1, a, [m, k]), any(2, b, [n, k]))
    };
    let along_k =
        MatmulDesc { experts: Some(3), group_k: true, ..desc(MXFP4, MXFP4, [70, 33, 256]) };
    // Codes in pairs of four apart; of neighbours, where the other operand's order is another; on either side; grouped.
    for problem in [
        one(MXFP4, MXFP4, [150, 140, 256]),
        one(MXFP4, v64, [40, 70, 128]),
        one(MXFP8_E4M3, MXFP4, [33, 70, 128]),
        one(MXFP4, MXFP8_E4M3, [40, 33, 128]),
        Problem {
            groups: Some((vec![0, 96, 96, 224], vec![0; 3])),
            ..Problem::new(along_k, any(3, MXFP4, [70, 256]), any(4, MXFP4, [33, 256]))
        },
    ] {
        let tile = problem.kernel(ctx, By::F16)?.tile(ctx).expect("a GPU");
        assert!(tile.starts_with("ocp-emulated16."), "{tile}");
        let tile = problem.kernel(ctx, By::Decoded)?.tile(ctx).expect("a GPU");
        assert!(tile.starts_with("emulated16."), "{tile}");
        let [converted, decoded] = [By::F16, By::Decoded].map(|by| problem.run(ctx, by));
        let (converted, decoded) = (converted?, decoded?);
        assert_bytes(&format!("{:?}", problem.desc), &converted, &decoded);
        // The tiles that FP8 leaves.
        if problem.desc.a == problem.desc.b {
            assert_bytes(&format!("{:?}", problem.desc), &problem.run(ctx, By::Both)?, &decoded);
        }
    }
    // One wrong code shows.
    let (right, mut wrong) = (one(MXFP4, MXFP4, [40, 33, 128]), one(MXFP4, MXFP4, [40, 33, 128]));
    let (mut codes, scales, _) = wrong.a.into_parts();
    codes[5] ^= 4;
    wrong.a = MxTensor::from_parts(*right.a.layout(), codes, scales, 1.0)?;
    assert_ne!(wrong.run(ctx, By::F16)?, right.run(ctx, By::Decoded)?);
    // Lines that are not whole chunks are decoded word by word.
    let short = one(MXFP4, MXFP4, [40, 33, 96]);
    let tile = short.kernel(ctx, By::F16)?.tile(ctx).expect("a GPU");
    assert!(tile.starts_with("emulated16."), "{tile}");
    Ok(())
}

/// A file of measured tiles may name one that converts where the device can, and only there.
fn measured_tile(ctx: &Context, _: usize) -> Result<(), Failed> {
    let caps = ctx.caps();
    let kernel = Matmul::new(ctx, &desc(MXFP4, MXFP4, [64, 64, 128]))?;
    let usual = kernel.tile(ctx).expect("a GPU");
    let converts = usual.starts_with("ocp-");
    let tile = format!("ocp-emulated16.{}", usual.split_once("16.").expect("a side").1);
    let text = format!(
        "format = 1\n[[device]]\nadapter = {:?}\ndriver = {:?}\nbackend = {:?}\nversion = {:?}\n\
         [[device.product]]\nm = 64\nn = 64\nk = 128\na = \"mxfp4/1x32\"\nb = \"mxfp4/1x32\"\nout = \"f32\"\n\
         tier = \"tensor\"\ntile = {tile:?}\nmicroseconds = 1.0\nusual_microseconds = 2.0\n",
        caps.name,
        caps.driver,
        caps.backend,
        env!("CARGO_PKG_VERSION"),
    );
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("tiles.toml");
    std::fs::write(&path, text)?;
    let tuned = ctx.use_tuning(&Tuning::read(&path)?);
    ctx.use_tuning(&Tuning::default());
    assert_eq!((tuned.used, tuned.others), (usize::from(converts), 0), "{tuned:?}");
    if !converts {
        assert!(tuned.refused[0].contains("there is no \"ocp-emulated16."), "{tuned:?}");
    }
    Ok(())
}

/// Nothing converts by itself, and asking for it where it is not is an error with the probe's reason.
fn no_conversion(ctx: &Context, _: usize) -> Result<(), Failed> {
    for tier in [Tier::Auto, Tier::Tensor] {
        let desc = MatmulDesc { tier, ..desc(MXFP4, MXFP4, [64, 64, 128]) };
        if let Ok(kernel) = Matmul::new(ctx, &desc) {
            assert!(!kernel.tile(ctx).is_some_and(|tile| tile.contains("ocp")), "{desc:?}");
        }
    }
    let caps = ctx.caps();
    let device = match ctx.wgpu() {
        None => DeviceChoice::Cpu,
        Some(_) => DeviceChoice::Named(caps.name.clone()),
    };
    let options = Options { device, ocp_conversion: true, ..Default::default() };
    let line = caps.get("mx-conversion");
    match (Context::open_blocking(&options), line.map(|line| line.state)) {
        (Ok(_), Some(State::Yes)) => {}
        (Err(Error::Unsupported { operation, has, .. }), state) => {
            assert_eq!(operation, "Options::ocp_conversion");
            match line {
                None => assert_eq!(has, "the device is the CPU engine"),
                Some(line) if state != Some(State::Yes) => assert_eq!(has, line.reason),
                // No cooperative matrices besides.
                Some(_) => assert!(!has.is_empty()),
            }
        }
        (opened, state) => return Err(format!("{opened:?} where the probe says {state:?}").into()),
    }
    Ok(())
}
