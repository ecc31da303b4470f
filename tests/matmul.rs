//! Matrix products on every engine (tests/common/engines.rs) against the oracle of tests/common/product.rs: the exact tier
//! bit for bit, the others within a bound derived there. y holds NaN before, so that outputs left out show.
//!
//! The tensor tier runs for real where the device has cooperative matrices, and emulated where it has f16.

mod common;

use common::engines::{self, CPU, Form, PLAIN, Test};
use common::product::{Interval, Lines, compare, product};
use common::{assert_bytes, garbage, gaussian, narrowed, reference, to_f32, words};
use libtest_mimic::{Failed, Trial};
use microscaling::kernels::matmul::{Extras, Input, Values};
use microscaling::{
    Axis, Block, Context, DType, Element, Error, Groups, Layout, MXFP4, MXFP6_E2M3, MXFP6_E3M2,
    MXFP8_E4M3, MXFP8_E5M2, MXINT8, Matmul, MatmulDesc, MxSpec, MxTensor, NVFP4, Operand, Options,
    Output, Quantize, QuantizeDesc, Rounding, ScaleFormat, Tier, Tuning, formats, wgpu,
};

/// Tests of values; every tier that the engine has.
const VALUES: &[(&str, Test)] = &[
    ("bounded_tiers_keep_their_bound", bounded_tiers),
    ("nan_reaches_its_row_and_column_only", nan_scales),
    ("every_kind_of_operand", kinds_of_operands),
    ("empty_products", empty_products),
    ("alpha_beta_and_bias", epilogues),
    ("packed_outputs_are_quantized_dense_ones", packed_outputs),
    ("grouped_is_one_by_one", grouped),
    ("grouped_along_k_is_one_by_one", grouped_along_k),
    ("few_outputs_of_a_long_k", slices_of_k),
    ("invalid_groups_on_the_device", invalid_groups),
    ("quantized_here_or_uploaded", quantized_here_or_uploaded),
];

/// The emulation of the exact tier's fragments too.
const EXACT: &[(&str, Test)] =
    &[("exact_is_the_reference", exact_tier), ("measured_tiles", measured_tiles)];

const PLAINLY: &[(&str, Test)] = &[
    ("exact_is_the_reference", exact_tier),
    ("measured_tiles", measured_tiles),
    ("exact_is_f64_where_that_is_exact", exact_is_f64),
    ("the_sign_of_an_nvfp4_scale_is_ignored", sign_of_a_scale),
    ("bad_input_is_an_error", bad_input),
    ("auto_says_what_and_why", auto),
];

const MANY_BINDINGS: &[(&str, Test)] = &[("operands_of_many_bindings", many_bindings)];

const EMULATED: &str = " emulated";
const SMALL: &str = " in small bindings";

fn main() {
    let none = (wgpu::Features::empty(), "");
    let forms = [
        Form { what: PLAIN, options: Options::default(), steps: [1, 7], needs: none },
        Form {
            what: EMULATED,
            options: Options { emulate_tensor: true, ..Default::default() },
            steps: [1, 13],
            needs: (wgpu::Features::SHADER_F16, "no f16 in shaders"),
        },
        Form {
            what: SMALL,
            options: Options { max_binding: Some(180 << 10), ..Default::default() },
            steps: [1, 1],
            needs: none,
        },
    ];
    let alone = vec![
        Trial::test("groups_are_checked", groups_are_checked),
        Trial::test("a_wrong_code_is_outside_the_bound", comparison_fails),
        Trial::test("wild_problems_have_all_kinds_of_results", wild_results),
    ];
    let suite = |form: &str| match form {
        CPU => [PLAINLY, VALUES, MANY_BINDINGS].concat(),
        PLAIN => [PLAINLY, VALUES].concat(),
        EMULATED => [EXACT, VALUES].concat(),
        _ => MANY_BINDINGS.to_vec(),
    };
    engines::run(suite, &forms, alone);
}

// ---- Problems ------------------------------------------------------------------------------------------------------

/// An operand on the host.
#[derive(Clone, Debug)]
enum Data {
    Mx(MxTensor),
    Dense(DType, [usize; 2], Vec<u8>),
}

impl Data {
    fn lines(&self, transposed: bool) -> Lines {
        match self {
            Data::Mx(x) => Lines::mx(x, transposed),
            Data::Dense(dtype, shape, bytes) => {
                Lines::dense(&to_f32(*dtype, bytes), *shape, transposed)
            }
        }
    }
}

/// A product with all that it takes.
#[derive(Clone, Debug)]
struct Problem {
    /// Its tier counts for nothing.
    desc: MatmulDesc,
    a: Data,
    b: Data,
    /// What y holds before; none: NaN.
    old: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    /// Offsets and experts.
    groups: Option<(Vec<u32>, Vec<u32>)>,
}

/// How the scales of random tensors spread.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Spread {
    /// Within 2^±3.
    Near,
    /// Rows of scales take turns: any byte; within 2^±12 of any; within 2^±110 of any; one huge block, the others tiny.
    /// Every third line's first block is zero.
    Wild,
}

fn bytes(seed: u64, n: usize) -> Vec<u8> {
    words(seed, n).into_iter().map(|w| (w >> 24) as u8).collect()
}

/// Random codes (no infinity, no NaN; padding too), random scales (no NaN).
fn random_mx(
    seed: u64,
    spec: MxSpec,
    axis: Axis,
    [rows, cols]: [usize; 2],
    spread: Spread,
) -> MxTensor {
    let layout = Layout::new(spec, axis, rows, cols).unwrap();
    let mut codes = bytes(seed, layout.codes_len());
    for code in &mut codes {
        match spec.element {
            Element::E4M3 if *code & 0x7f == 0x7f => *code ^= 1,
            Element::E5M2 if *code & 0x7c == 0x7c => *code ^= 4,
            _ => {}
        }
    }
    let blocks = layout.blocks();
    let random = words(seed + 1000, layout.scales_len() + layout.scale_rows());
    let mut scales = Vec::with_capacity(layout.scales_len());
    for row in 0..layout.scale_rows() {
        let center = (random[layout.scales_len() + row] >> 24) as i32;
        for block in 0..blocks {
            let w = (random[row * blocks + block] >> 8) as i32;
            let scale = match (spread, row % 4) {
                (Spread::Near, _) => 127 + w % 7 - 3,
                (_, 0) => w % 255,
                (_, 1) => center + w % 25 - 12,
                (_, 2) => center + w % 221 - 110,
                _ => center + if block == 0 { 90 } else { w % 8 },
            };
            scales.push(match spec.scale {
                ScaleFormat::E4M3 => ((w % 128) as u8).min(0x7e),
                _ => scale.clamp(0, 254) as u8,
            });
        }
    }
    if spread == Spread::Wild && blocks > 0 {
        for line in (1..layout.lines()).step_by(3) {
            codes[line * layout.line_bytes()..][..layout.block_bytes()].fill(0);
        }
    }
    let tensor_scale = if spec.scale == ScaleFormat::E4M3 { 1.7e-3 } else { 1.0 };
    MxTensor::from_parts(layout, codes, scales, tensor_scale).unwrap()
}

/// Random normal values, each row times a power of two; wild: and some f16 subnormals.
fn random_dense(seed: u64, dtype: DType, [rows, cols]: [usize; 2], spread: Spread) -> Data {
    let mut values = gaussian(seed, rows * cols);
    for (i, v) in values.iter_mut().enumerate() {
        if spread == Spread::Wild {
            *v *= 2f32.powi((i / cols.max(1) % 9) as i32 - 4);
            *v *= if i % 7 == 3 { 2f32.powi(-18) } else { 1.0 };
        }
    }
    Data::Dense(dtype, [rows, cols], narrowed(dtype, &values))
}

/// A random operand of `outputs` lines (in all) contracted over `k` (in all).
fn random(
    seed: u64,
    operand: Operand,
    axis: Axis,
    [outputs, k]: [usize; 2],
    spread: Spread,
) -> Data {
    let [rows, cols] = if operand.transposed { [k, outputs] } else { [outputs, k] };
    match operand.values {
        Values::Dense(dtype) => random_dense(seed, dtype, [rows, cols], spread),
        Values::Mx(spec) => {
            let shape = if axis == Axis::One { [rows, cols] } else { [cols, rows] };
            Data::Mx(random_mx(seed, spec, axis, shape, spread))
        }
    }
}

/// Random operands for a descriptor.
fn problem(seed: u64, desc: &MatmulDesc, spread: Spread) -> Problem {
    let shape = |operand: Operand, outputs: usize, stack: usize| match operand.transposed {
        false => [stack * outputs, desc.k],
        true => [outputs, stack * desc.k],
    };
    let stack = if desc.group_k { 1 } else { desc.experts.unwrap_or(desc.batch) };
    Problem {
        desc: *desc,
        a: random(seed, desc.a, Axis::One, shape(desc.a, desc.m, desc.batch), spread),
        b: random(seed + 1, desc.b, Axis::One, shape(desc.b, desc.n, stack), spread),
        old: None,
        bias: desc.bias.then(|| gaussian(seed + 2, desc.n)),
        groups: None,
    }
}

fn desc(a: impl Into<Operand>, b: impl Into<Operand>, [m, n, k]: [usize; 3]) -> MatmulDesc {
    MatmulDesc { m, n, k, a: a.into(), b: b.into(), ..Default::default() }
}

/// The tiers to test: all that the engine has; where fragments are emulated those that have them, since the same driver is
/// tested without emulation too.
fn tiers(ctx: &Context, desc: &MatmulDesc) -> Vec<Tier> {
    let has = |desc: &MatmulDesc, tier| {
        Matmul::new(ctx, &MatmulDesc { tier, ..*desc }).is_ok_and(|kernel| kernel.tier() == tier)
    };
    let sixteen = self::desc(MXFP4, MXFP4, [16; 3]);
    if ctx.caps().software && has(&sixteen, Tier::Tensor) {
        return [Tier::Exact, Tier::Tensor].into_iter().filter(|tier| has(desc, *tier)).collect();
    }
    [Tier::Exact, Tier::Alu, Tier::Tensor].into_iter().filter(|tier| has(desc, *tier)).collect()
}

enum Device {
    Mx(microscaling::DeviceMxTensor),
    Dense(microscaling::Tensor),
}

impl Device {
    fn upload(ctx: &Context, data: &Data) -> Result<Device, Error> {
        Ok(match data {
            Data::Mx(x) => Device::Mx(ctx.upload_mx(x)?),
            Data::Dense(dtype, [rows, cols], bytes) => {
                Device::Dense(ctx.upload(*dtype, *rows, *cols, bytes)?)
            }
        })
    }

    fn input(&self) -> Input<'_> {
        match self {
            Device::Mx(x) => Input::Mx(x),
            Device::Dense(x) => Input::Dense(x),
        }
    }
}

/// What a product wrote.
enum Written {
    Dense(Vec<u8>),
    /// And how many blocks were not finite.
    Mx(MxTensor, u32),
}

/// NaN in f32, and two NaN in the 16-bit types; none of them is the one that kernels write.
fn nan_bytes(dtype: DType, n: usize) -> Vec<u8> {
    [0xa5, 0x7f].repeat(n * dtype.size() / 2)
}

impl Problem {
    fn rows(&self) -> usize {
        let experts = self.desc.experts.filter(|_| self.desc.group_k);
        experts.unwrap_or(self.desc.batch) * self.desc.m
    }

    fn old_bytes(&self, dtype: DType) -> Vec<u8> {
        match &self.old {
            Some(old) => narrowed(dtype, old),
            None => nan_bytes(dtype, self.rows() * self.desc.n),
        }
    }

    fn run(&self, ctx: &Context, tier: Tier) -> Result<Written, Error> {
        let desc = MatmulDesc { tier, ..self.desc };
        let (a, b) = (Device::upload(ctx, &self.a)?, Device::upload(ctx, &self.b)?);
        let bias = match &self.bias {
            Some(bias) => Some(ctx.upload(DType::F32, 1, desc.n, bytemuck::cast_slice(bias))?),
            None => None,
        };
        let groups = match &self.groups {
            Some((offsets, experts)) => {
                Some(Groups::new(ctx, offsets, experts, desc.experts.unwrap())?)
            }
            None => None,
        };
        let extras = Extras { bias: bias.as_ref(), groups: groups.as_ref() };
        let kernel = Matmul::new(ctx, &desc)?;
        let mut stream = ctx.stream();
        match desc.out {
            Output::Dense(dtype) => {
                let mut y = ctx.upload(dtype, self.rows(), desc.n, &self.old_bytes(dtype))?;
                kernel.record_with(&mut stream, a.input(), b.input(), &mut y, extras)?;
                ctx.submit(stream)?;
                Ok(Written::Dense(ctx.read_blocking(&y)?))
            }
            Output::Mx(out) => {
                let mut y = garbage(ctx, &out, self.rows(), desc.n)?;
                kernel.record_with(&mut stream, a.input(), b.input(), &mut y, extras)?;
                ctx.submit(stream)?;
                Ok(Written::Mx(ctx.read_mx_blocking(&y)?, ctx.nonfinite_blocks_blocking(&y)?))
            }
        }
    }

    fn run_dense(&self, ctx: &Context, tier: Tier) -> Result<Vec<u8>, Error> {
        match self.run(ctx, tier)? {
            Written::Dense(bytes) => Ok(bytes),
            Written::Mx(..) => unreachable!("a dense output was asked for"),
        }
    }

    /// The outputs; rows that no group has stay what y held.
    fn want(&self, tier: Tier) -> (Vec<Interval>, Vec<bool>) {
        let MatmulDesc { m, n, k, alpha, beta, .. } = self.desc;
        let (at, bt) = (self.desc.a.transposed, self.desc.b.transposed);
        let (a, b) = (self.a.lines(at), self.b.lines(bt));
        let old: Vec<f32> = match self.desc.out {
            Output::Dense(dtype) => to_f32(dtype, &self.old_bytes(dtype)),
            Output::Mx(_) => vec![0.0; self.rows() * n],
        };
        let mut want: Vec<Interval> = old.iter().map(|v| [*v; 2]).collect();
        let mut written = vec![false; want.len()];
        // First row, rows, matrix of B; along k: group, first position, positions.
        let parts: Vec<[usize; 3]> = match &self.groups {
            None => (0..self.desc.batch).map(|i| [i * m, m, i]).collect(),
            Some((offsets, _)) if self.desc.group_k => offsets
                .windows(2)
                .enumerate()
                .map(|(g, o)| [g, o[0] as usize, (o[1] - o[0]) as usize])
                .collect(),
            Some((offsets, experts)) => offsets
                .windows(2)
                .zip(experts)
                .map(|(o, e)| [o[0] as usize, (o[1] - o[0]) as usize, *e as usize])
                .collect(),
        };
        for part @ [first, rows, matrix] in parts {
            let a = match at {
                _ if self.desc.group_k => a.part(0, m, part[1], part[2]),
                false => a.part(first, rows, 0, k),
                true if self.groups.is_none() => a.part(0, rows, matrix * k, k),
                true => a.part(first, rows, 0, k),
            };
            let b = match bt {
                _ if self.desc.group_k => b.part(0, n, part[1], part[2]),
                true => b.part(0, n, matrix * k, k),
                false => b.part(matrix * n, n, 0, k),
            };
            let first = if self.desc.group_k { part[0] * m } else { first };
            for (i, interval) in product(tier, &a, &b, alpha).into_iter().enumerate() {
                let at = first * n + i;
                want[at] = interval.map(|mut v| {
                    if beta != 0.0 {
                        v += beta * old[at];
                    }
                    if let Some(bias) = &self.bias {
                        v += bias[i % n];
                    }
                    v
                });
                written[at] = true;
            }
        }
        (want, written)
    }

    /// Runs and compares one tier.
    fn check_tier(&self, ctx: &Context, tier: Tier) -> Result<(), Failed> {
        let Output::Dense(dtype) = self.desc.out else { unreachable!("a dense output") };
        let mut got = self.run_dense(ctx, tier)?;
        let (mut want, written) = self.want(tier);
        // What must not be touched is compared as bytes.
        let old = self.old_bytes(dtype);
        for (i, written) in written.iter().enumerate() {
            if !written {
                let at = i * dtype.size()..(i + 1) * dtype.size();
                if got[at.clone()] != old[at.clone()] {
                    return Err(format!("row {} was touched", i / self.desc.n).into());
                }
                got[at].fill(0);
                want[i] = [0.0; 2];
            }
        }
        compare(dtype, tier == Tier::Exact, &got, &want, self.desc.n)
            .map_err(|problem| format!("{tier} {}: {problem}", short(&self.desc)).into())
    }

    /// Runs and compares every tier.
    fn check(&self, ctx: &Context) -> Result<(), Failed> {
        for tier in tiers(ctx, &self.desc) {
            self.check_tier(ctx, tier)?;
        }
        Ok(())
    }
}

/// A descriptor in a line.
fn short(desc: &MatmulDesc) -> String {
    let operand = |x: Operand| format!("{}{}", x.values, if x.transposed { "ᵀ" } else { "" });
    let out = match desc.out {
        Output::Dense(dtype) => dtype.to_string(),
        Output::Mx(out) => format!("{out:?}"),
    };
    format!(
        "{}x{}x{} batch {} experts {:?} {} · {} to {out}, alpha {} beta {} bias {}",
        desc.m,
        desc.n,
        desc.k,
        desc.batch,
        desc.experts,
        operand(desc.a),
        operand(desc.b),
        desc.alpha,
        desc.beta,
        desc.bias
    )
}

// ---- Values --------------------------------------------------------------------------------------------------------

/// Rows of one invocation and of many, whole tiles and ragged ones, whole blocks and parts of them.
const SHAPES: [[usize; 3]; 9] = [
    [1, 33, 65],
    [70, 65, 200],
    [2, 40, 1100],
    [130, 129, 416],
    [3, 17, 64],
    [7, 130, 96],
    [5, 65, 97],
    [17, 64, 128],
    [9, 31, 33],
];

/// All formats whose codes are integers, in all blocks in turn.
fn integer_specs() -> Vec<MxSpec> {
    let mut specs: Vec<MxSpec> = Block::ALL.map(|block| MXFP4.with_block(block)).into();
    specs.extend([
        NVFP4,
        MXFP6_E2M3,
        MXFP6_E2M3.with_block(Block::Square(16)),
        MXINT8,
        MXINT8.with_block(Block::Vector(128)),
    ]);
    specs
}

fn exact_tier(ctx: &Context, step: usize) -> Result<(), Failed> {
    let specs = integer_specs();
    let mut cases = Vec::new();
    for a in &specs {
        for b in &specs {
            // 11 and 9 have no factor in common: every pair of rows gets all shapes.
            let i = cases.len();
            cases.push((*a, *b, SHAPES[i % 9]));
        }
    }
    for (i, (a, b, shape)) in cases.iter().enumerate().step_by(step) {
        let problem = problem(i as u64, &desc(*a, *b, *shape), Spread::Wild);
        problem.check_tier(ctx, Tier::Exact)?;
    }
    // All shapes in one format, all of them with the same scales and many sums that count.
    for (i, shape) in SHAPES.iter().enumerate() {
        let problem = problem(500 + i as u64, &desc(MXFP4, MXFP4, *shape), Spread::Near);
        problem.check_tier(ctx, Tier::Exact)?;
    }
    Ok(())
}

/// Every tile of a small product in every tier gives what the usual one gives, the fastest is kept in a file, and products take
/// it from there.
fn measured_tiles(ctx: &Context, step: usize) -> Result<(), Failed> {
    let mut tuning = Tuning::default();
    let short = std::time::Duration::from_millis(1);
    let cases = [
        (Tier::Exact, desc(MXFP4, MXFP4, [70, 65, 256])),
        (Tier::Exact, desc(MXFP4, MXFP4, [1, 96, 1152])),
        (Tier::Tensor, desc(MXFP4, MXFP4, [33, 20, 128])),
        (Tier::Alu, desc(MXFP8_E4M3, DType::F16, [40, 33, 38])),
        (Tier::Exact, desc(NVFP4, MXFP6_E2M3, [33, 20, 100])),
        (Tier::Exact, desc(NVFP4, MXINT8, [3, 20, 100])),
        (Tier::Alu, desc(MXFP4, MXFP6_E3M2, [2, 33, 70])),
        (Tier::Tensor, desc(MXFP4, DType::F16, [5, 20, 100])),
        (Tier::Tensor, desc(MXFP4, MXFP8_E5M2, [5, 20, 384])),
    ];
    let mut measured = Vec::new();
    // Software drivers take long to make pipelines.
    let count = if step > 1 { 3 } else { cases.len() };
    for (tier, desc) in cases.into_iter().take(count) {
        let desc = MatmulDesc { tier, ..desc };
        let Ok(matmul) = Matmul::new(ctx, &desc) else { continue };
        let mut names = std::collections::HashSet::new();
        let run = tuning.measure(ctx, &desc, short, |tried, _| {
            assert!(names.insert(tried.tile.clone()), "{} twice", tried.tile);
        });
        let list = match pollster::block_on(run) {
            Err(error) if ctx.wgpu().is_none() => {
                says(error, &["measuring tiles needs a GPU"]);
                return Ok(());
            }
            list => list?,
        };
        assert_eq!(list.len(), names.len());
        for candidate in &list {
            if let Err(problem) = &candidate.seconds {
                return Err(format!("{desc:?} {}: {problem}", candidate.tile).into());
            }
        }
        let usual = matmul.tile(ctx).expect("a GPU");
        assert!(names.contains(&usual), "{usual} is not in {names:?}");
        measured.push((desc, list[0].tile.clone()));
    }
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("tiles.toml");
    tuning.write(&path)?;
    tuning.write(&path)?;
    assert_eq!(std::fs::read_dir(&directory)?.count(), 1, "nothing else is left");
    let read = Tuning::read(&path)?;
    assert_eq!(read, tuning);
    let tuned = ctx.use_tuning(&read);
    assert_eq!((tuned.used, tuned.others, tuned.refused), (measured.len(), 0, vec![]));
    for (desc, tile) in &measured {
        assert_eq!(Matmul::new(ctx, desc)?.tile(ctx).as_ref(), Some(tile));
    }

    // Another tile than the usual one is taken, by products of that class of size alone, and the bits stay.
    let desc = MatmulDesc { tier: Tier::Exact, ..desc(MXFP4, MXFP4, [70, 65, 256]) };
    let text = std::fs::read_to_string(&path)?;
    let start = text.find("m = 70").expect("the first product");
    let (at, end) = {
        let at = start + text[start..].find("tile = ").expect("its tile");
        (at, at + text[at..].find('\n').expect("a line"))
    };
    let with = |tile: &str| [&text[..at], &format!("tile = {tile:?}"), &text[end..]].concat();
    std::fs::write(&path, with("tile64x64.8x4"))?;
    assert_eq!(ctx.use_tuning(&Tuning::read(&path)?).used, measured.len());
    let problem = problem(7, &desc, Spread::Wild);
    for (m, takes) in [(70, true), (128, true), (64, false), (129, false)] {
        let tile = Matmul::new(ctx, &MatmulDesc { m, ..desc })?.tile(ctx);
        assert_eq!(tile.as_deref() == Some("tile64x64.8x4"), takes, "{m}: {tile:?}");
    }
    problem.check_tier(ctx, Tier::Exact)?;

    // What is not there, of another device, or of another version.
    for wrong in ["tile3x5.1x1", "skinny1x32", "", "emulated16.2x2x4.9x9"] {
        std::fs::write(&path, with(wrong))?;
        let tuned = ctx.use_tuning(&Tuning::read(&path)?);
        assert_eq!((tuned.used, tuned.refused.len()), (measured.len() - 1, 1), "{wrong}");
        assert!(tuned.refused[0].contains(&format!("{wrong:?}")), "{:?}", tuned.refused);
    }
    for (from, to) in [("version = \"", "version = \"9."), ("adapter = \"", "adapter = \"x")] {
        std::fs::write(&path, text.replace(from, to))?;
        let tuned = ctx.use_tuning(&Tuning::read(&path)?);
        assert_eq!((tuned.used, tuned.others), (0, measured.len()));
    }
    ctx.use_tuning(&Tuning::default());
    let huge = "18446744073709551615";
    for (from, to) in [
        ("m = 70", "m = -70"),
        ("m = 70", &format!("m = {huge}")),
        ("k = 256", "k = 4611686018427387904"),
        ("tier = \"exact\"", "tier = \"auto\""),
        ("mxfp4/1x32", "mxfp4/9x9"),
        ("mxfp4/1x32", "mxfp5/1x32"),
        ("out = \"f32\"", "out = \"f64\""),
        ("format = 1", "format = 2"),
        ("format = 1", "format = \"\u{1F980}\""),
        ("[[device]]", "[device]"),
        ("[", "\0"),
    ] {
        std::fs::write(&path, text.replacen(from, to, 1))?;
        match Tuning::read(&path) {
            Ok(tuning) => assert!(!ctx.use_tuning(&tuning).refused.is_empty(), "{from} {to}"),
            Err(error) => says(error, &["tiles.toml", "no file of measured tiles"]),
        }
    }
    std::fs::write(&path, [0xff; 100])?;
    says(Tuning::read(&path).unwrap_err(), &["it is not text"]);
    for cut in (0..text.len()).step_by(97) {
        std::fs::write(&path, &text.as_bytes()[..cut])?;
        if let Ok(tuning) = Tuning::read(&path) {
            ctx.use_tuning(&tuning);
        }
    }
    ctx.use_tuning(&Tuning::default());
    says(Tuning::read(&directory.path().join("none")).unwrap_err(), &["none: "]);
    says(tuning.write(&directory.path().join("no/such")).unwrap_err(), &["no/such: "]);
    Ok(())
}

/// Scales within 2^±3 and short k: every sum is an integer times a power of two, below 2^24 of them, so f64 and f32 have
/// the same.
fn exact_is_f64(ctx: &Context, step: usize) -> Result<(), Failed> {
    let shape @ [m, n, k] = [20, 33, 96];
    for (a, b) in
        [(MXFP4, MXFP4), (MXFP4, MXFP6_E2M3)].into_iter().take(if step > 1 { 1 } else { 2 })
    {
        let problem = problem(42, &desc(a, b, shape), Spread::Near);
        let got = to_f32(DType::F32, &problem.run_dense(ctx, Tier::Exact)?);
        let (Data::Mx(a), Data::Mx(b)) = (&problem.a, &problem.b) else { unreachable!() };
        for i in 0..m {
            for j in 0..n {
                let want: f64 =
                    (0..k).map(|kk| f64::from(a.get(i, kk)) * f64::from(b.get(j, kk))).sum();
                assert_eq!(f64::from(got[i * n + j]), want, "({i}, {j})");
            }
        }
    }
    Ok(())
}

/// Every byte is a valid scale; E4M3's sign bit counts for nothing, as in [`MxTensor::get`].
fn sign_of_a_scale(ctx: &Context, _: usize) -> Result<(), Failed> {
    let shape @ [m, n, k] = [4, 20, 64];
    let plain = problem(7, &desc(NVFP4, NVFP4, shape), Spread::Near);
    let Data::Mx(a) = &plain.a else { unreachable!() };
    let signed = a.scales().iter().enumerate().map(|(i, s)| s | (i as u8 % 2) << 7).collect();
    let signed = MxTensor::from_parts(*a.layout(), a.codes().to_vec(), signed, a.tensor_scale())?;
    assert!((0..m).all(|i| (0..k).all(|kk| signed.get(i, kk) == a.get(i, kk))));
    let signed = Problem { a: Data::Mx(signed), ..plain.clone() };
    for tier in [Tier::Exact, Tier::Alu] {
        let [got, want] = [&signed, &plain].map(|problem| problem.run_dense(ctx, tier));
        assert_eq!(to_f32(DType::F32, &got?), to_f32(DType::F32, &want?), "{tier} {m}x{n}");
    }
    Ok(())
}

/// All operands that there are.
fn kinds() -> Vec<Values> {
    let mut kinds: Vec<Values> = formats::NAMED.iter().map(|(_, spec)| Values::Mx(*spec)).collect();
    kinds.extend(DType::ALL.map(Values::Dense));
    kinds
}

/// Every kind of operand with MXFP4 on either side and with itself. The exact tier has a test of its own.
fn bounded_tiers(ctx: &Context, step: usize) -> Result<(), Failed> {
    let operand = |values| Operand { values, transposed: false };
    let mxfp4 = operand(Values::Mx(MXFP4));
    let mut cases = Vec::new();
    for kind in kinds().into_iter().map(operand) {
        for (a, b) in [(kind, mxfp4), (mxfp4, kind), (kind, kind)] {
            for spread in [Spread::Wild, Spread::Near] {
                cases.push((a, b, SHAPES[cases.len() % 9], spread));
            }
        }
    }
    for (i, (a, b, shape, spread)) in cases.iter().enumerate().step_by(step) {
        let problem = problem(i as u64, &desc(*a, *b, *shape), *spread);
        for tier in tiers(ctx, &problem.desc).into_iter().filter(|tier| *tier != Tier::Exact) {
            problem.check_tier(ctx, tier).map_err(|failed| {
                format!("case {i} {spread:?}: {}", failed.message().unwrap_or(""))
            })?;
        }
    }
    Ok(())
}

/// x with the scale of a row and block replaced.
fn with_scale(x: &Data, row: usize, block: usize, scale: u8) -> Data {
    let Data::Mx(x) = x else { unreachable!() };
    let (codes, mut scales, tensor_scale) = x.clone().into_parts();
    scales[row * x.layout().blocks() + block] = scale;
    Data::Mx(MxTensor::from_parts(*x.layout(), codes, scales, tensor_scale).unwrap())
}

fn nan_scales(ctx: &Context, _: usize) -> Result<(), Failed> {
    let square = MXFP4.with_block(Block::Square(32));
    let [m, n, k] = [70, 40, 100];
    for (a, b, nan) in [(MXFP4, MXFP4, 0xff), (NVFP4, NVFP4, 0x7f), (square, MXFP4, 0xff)] {
        let mut problem = problem(5, &desc(a, b, [m, n, k]), Spread::Near);
        let rows_a = a.block.lines();
        // In the last block, the padded one, and in the first.
        let last = k.div_ceil(a.block.len()) - 1;
        problem.a = with_scale(&problem.a, 1, last, nan);
        problem.b = with_scale(&problem.b, 7, 0, nan);
        for tier in tiers(ctx, &problem.desc) {
            problem.check_tier(ctx, tier)?;
            let got = problem.run_dense(ctx, tier)?;
            for (at, bits) in got.chunks(4).enumerate() {
                let nan = at / n / rows_a == 1 || at % n == 7;
                let bits = u32::from_le_bytes(bits.try_into()?);
                assert_eq!(bits == 0x7fc0_0000, nan, "{tier} {a} {b} ({}, {})", at / n, at % n);
                assert!(nan || !f32::from_bits(bits).is_nan());
            }
        }
    }
    // A NaN code in E4M3, in a block that counts and in one that is too small to; read word by word and 16 bytes at a time.
    for k in [100, 128] {
        let plain = problem(6, &desc(MXFP8_E4M3, MXFP4, [m, n, k]), Spread::Near);
        let Data::Mx(a) = with_scale(&plain.a, 9, 1, 0) else { unreachable!() };
        let (mut codes, scales, _) = a.clone().into_parts();
        for (row, at, code) in [(3, 70, 0x7f), (9, 40, 0xff)] {
            codes[row * a.layout().line_bytes() + at] = code;
        }
        let problem = Problem {
            a: Data::Mx(MxTensor::from_parts(*a.layout(), codes, scales, 1.0)?),
            ..plain
        };
        for tier in tiers(ctx, &problem.desc) {
            problem.check_tier(ctx, tier)?;
            let got = to_f32(DType::F32, &problem.run_dense(ctx, tier)?);
            for (at, v) in got.iter().enumerate() {
                assert_eq!(
                    v.is_nan(),
                    [3, 9].contains(&(at / n)),
                    "{tier} ({}, {})",
                    at / n,
                    at % n
                );
            }
        }
    }
    Ok(())
}

fn kinds_of_operands(ctx: &Context, step: usize) -> Result<(), Failed> {
    let squares = |spec: MxSpec, n| Operand::from(spec.with_block(Block::Square(n)));
    let dense = Operand::from;
    let mut problems = Vec::new();
    // Contracted over the other axis.
    for (i, (a, b)) in [
        (MXFP4.into(), squares(MXFP4, 32).transposed()),
        (squares(MXFP4, 16).transposed(), squares(MXFP4, 32).transposed()),
        (dense(DType::F16), squares(MXFP4, 32).transposed()),
        (MXFP4.into(), dense(DType::F16).transposed()),
        (squares(MXFP6_E2M3, 16).transposed(), MXINT8.into()),
        (MXFP8_E4M3.into(), squares(MXINT8, 32).transposed()),
        (squares(MXFP6_E3M2, 32).transposed(), squares(MXFP8_E5M2, 16)),
        (dense(DType::F32).transposed(), MXFP4.into()),
        (dense(DType::BF16).transposed(), dense(DType::F16).transposed()),
        (squares(NVFP4, 16).transposed(), squares(NVFP4, 16).transposed()),
    ]
    .into_iter()
    .enumerate()
    {
        for shape in [[70, 41, 100], [3, 70, 67]] {
            problems.push(problem(i as u64, &desc(a, b, shape), Spread::Wild));
        }
    }
    // Dense operands of 16 bits, loaded 16 bytes at a time along k or across it, and word by word.
    for (i, dtype) in [DType::F16, DType::BF16].into_iter().enumerate() {
        let rows = dense(dtype);
        for (j, (a, b)) in [
            (rows, rows),
            (rows, rows.transposed()),
            (rows.transposed(), rows),
            (rows.transposed(), rows.transposed()),
        ]
        .into_iter()
        .enumerate()
        {
            for shape in [[72, 136, 256], [70, 41, 100], [200, 24, 384]] {
                problems.push(problem((50 + 10 * i + j) as u64, &desc(a, b, shape), Spread::Near));
            }
        }
    }
    // FP8 in lines of whole 128, loaded 16 bytes at a time.
    for (i, (a, b)) in [
        (MXFP8_E4M3, MXFP8_E4M3),
        (MXFP8_E5M2, MXFP8_E4M3.with_block(Block::Vector(64))),
        (MXFP8_E4M3, MXFP4),
        (MXFP4.with_block(Block::Square(32)), MXFP8_E5M2),
        (MXFP8_E4M3, MXFP6_E2M3),
    ]
    .into_iter()
    .enumerate()
    {
        let shape = [70 + 58 * (i % 2), 41, 256];
        problems.push(problem(70 + i as u64, &desc(a, b, shape), Spread::Wild));
    }
    // Several in one, and one that is not whole tiles; squares along k of whole blocks.
    for (a, b, shape) in [
        (MXFP4.into(), MXFP4.into(), [5, 33, 64]),
        (MXFP4.into(), squares(MXFP4, 32).transposed(), [65, 33, 64]),
        (dense(DType::F16).transposed(), MXFP4.into(), [20, 33, 50]),
    ] {
        let desc = MatmulDesc { batch: 3, ..desc(a, b, shape) };
        problems.push(problem(20, &desc, Spread::Wild));
    }
    // Quantized along axis zero: [k, n] is n lines.
    let mut problem_zero = problem(30, &desc(MXFP4, MXFP4, [20, 33, 100]), Spread::Wild);
    problem_zero.b = random(31, MXFP4.into(), Axis::Zero, [33, 100], Spread::Wild);
    problems.push(problem_zero);
    for (i, problem) in problems.iter().enumerate().step_by((step / 2) | 1) {
        problem.check(ctx).map_err(|failed| format!("{i}: {}", failed.message().unwrap_or("")))?;
    }
    // Any k.
    for k in [1, 7, 8, 15, 31, 33, 63, 127, 129] {
        problem(40 + k as u64, &desc(MXFP4, MXFP4, [18, 20, k]), Spread::Near).check(ctx)?;
    }
    Ok(())
}

fn empty_products(ctx: &Context, _: usize) -> Result<(), Failed> {
    for shape in [[0, 8, 32], [8, 0, 32], [0, 0, 0]] {
        problem(1, &desc(MXFP4, MXFP4, shape), Spread::Near).check(ctx)?;
    }
    // Nothing to sum: what is left is zero, or beta · y + bias.
    for m in [2, 20] {
        problem(1, &desc(MXFP4, MXFP4, [m, 5, 0]), Spread::Near).check(ctx)?;
    }
    let desc = MatmulDesc { beta: 0.5, bias: true, ..desc(MXFP4, MXFP4, [20, 5, 0]) };
    let mut problem = problem(1, &desc, Spread::Near);
    problem.old = Some(gaussian(2, 100));
    problem.check(ctx)
}

fn epilogues(ctx: &Context, step: usize) -> Result<(), Failed> {
    let mut cases = Vec::new();
    for dtype in DType::ALL {
        for n in [70, 71] {
            for (alpha, beta, bias) in [
                (1.0, 0.0, true),
                (-0.25, 0.0, false),
                (0.3, 1.0, false),
                (1.0, 0.5, true),
                (0.0, 0.5, false),
            ] {
                for m in [20, 5] {
                    cases.push((dtype, n, alpha, beta, bias, m));
                }
            }
        }
    }
    for (i, (dtype, n, alpha, beta, bias, m)) in cases.into_iter().enumerate().step_by(step) {
        let desc =
            MatmulDesc { alpha, beta, bias, out: dtype.into(), ..desc(MXFP4, MXFP4, [m, n, 96]) };
        let mut problem = problem(i as u64, &desc, Spread::Near);
        if beta != 0.0 {
            problem.old = Some(gaussian(9, m * n));
        }
        problem.check(ctx)?;
    }
    // Tensor-wide scales and alpha that are no powers of two.
    let desc = MatmulDesc { alpha: 1.1, ..desc(NVFP4, NVFP4, [20, 33, 64]) };
    problem(1, &desc, Spread::Near).check(ctx)
}

/// Codes and scales are those of the dense product's f32, quantized on the host.
fn packed_outputs(ctx: &Context, step: usize) -> Result<(), Failed> {
    for (i, spec) in microscaling::kernels::all_specs().into_iter().enumerate().step_by(step) {
        // Whole tiles and ragged ones; more rows than the kernels for few rows take, which may sum in another order.
        let [m, n, k] = if i % 2 == 0 { [130, 71, 64] } else { [40, 256, 128] };
        let rounding = match i % 4 {
            0 | 3 => Rounding::NearestEven,
            _ => Rounding::Stochastic { seed: 3 << 32 | 1, stream: i as u64 },
        };
        let tensor_scale = (spec.scale == ScaleFormat::E4M3).then_some(0.37);
        let out = QuantizeDesc { spec, rounding, tensor_scale, ..Default::default() };
        let bias = i % 3 == 0;
        let dense = MatmulDesc { bias, alpha: 0.75, ..desc(MXFP4, MXFP4, [m, n, k]) };
        let mut dense = problem(i as u64, &dense, Spread::Near);
        // One line of NaN.
        dense.a = with_scale(&dense.a, 11, 1, 0xff);
        let packed =
            Problem { desc: MatmulDesc { out: out.into(), ..dense.desc }, ..dense.clone() };
        for tier in tiers(ctx, &packed.desc) {
            let values = to_f32(DType::F32, &dense.run_dense(ctx, tier)?);
            let want = reference::quantize(&values, m, n, &out);
            let Written::Mx(got, nonfinite) = packed.run(ctx, tier)? else { unreachable!() };
            let what = format!("{tier} {}", short(&packed.desc));
            assert_bytes(&format!("scales of {what}"), got.scales(), &want.scales);
            let codes = reference::pack(spec.element.bits(), &want.codes);
            assert_bytes(&format!("codes of {what}"), got.codes(), &codes);
            assert_eq!(got.tensor_scale(), want.tensor_scale, "{what}");
            assert_eq!(nonfinite, want.nonfinite, "{what}");
            assert!(nonfinite > 0);
            assert_eq!(got, MxTensor::quantize(&values, m, n, &out)?, "{what}");
        }
    }
    Ok(())
}

/// Empty groups, rows that no group has, more than one group of one expert.
fn grouped(ctx: &Context, step: usize) -> Result<(), Failed> {
    let groups = (vec![3, 3, 20, 24, 24, 150, 151], vec![2, 0, 3, 1, 0, 3]);
    let cases = [
        (desc(MXFP4, MXFP4, [160, 33, 96]), false),
        // By so few rows on the mean the tensor tier takes tiles of 64, by a few more tiles of 96.
        (desc(DType::F16, MXFP4, [170, 33, 96]), true),
        (
            desc(
                MXFP4,
                Operand::from(MXFP4.with_block(Block::Square(32))).transposed(),
                [160, 40, 64],
            ),
            false,
        ),
        (MatmulDesc { out: DType::BF16.into(), ..desc(MXFP4, MXFP4, [170, 33, 64]) }, true),
    ];
    for (i, (desc, bias)) in cases.into_iter().enumerate().step_by(if step > 1 { 2 } else { 1 }) {
        let desc = MatmulDesc { experts: Some(4), bias, ..desc };
        let grouped =
            Problem { groups: Some(groups.clone()), ..problem(i as u64, &desc, Spread::Wild) };
        grouped.check(ctx)?;
    }
    // Few rows of many experts, none of them whole tiles.
    let desc_few = MatmulDesc { experts: Some(8), ..desc(MXFP4, MXFP4, [9, 20, 32]) };
    let mut few = problem(9, &desc_few, Spread::Near);
    few.groups = Some(((0..10).collect(), vec![7, 1, 1, 0, 4, 2, 7, 3, 5]));
    few.check(ctx)?;
    // Packed: rows that no group has are zero.
    let out = QuantizeDesc::default();
    let dense_desc = MatmulDesc { experts: Some(4), ..desc(MXFP4, MXFP4, [160, 70, 64]) };
    let dense = Problem {
        groups: Some(groups),
        old: Some(vec![0.0; 160 * 70]),
        ..problem(3, &dense_desc, Spread::Near)
    };
    let packed = Problem { desc: MatmulDesc { out: out.into(), ..dense_desc }, ..dense.clone() };
    for tier in tiers(ctx, &packed.desc) {
        let values = to_f32(DType::F32, &dense.run_dense(ctx, tier)?);
        let Written::Mx(got, _) = packed.run(ctx, tier)? else { unreachable!() };
        assert_eq!(got, MxTensor::quantize(&values, 160, 70, &out)?, "{tier}");
    }
    Ok(())
}

/// Ranges of k, empty ones, positions that no group has; of packed lines, of squares and dense matrices lying across.
fn grouped_along_k(ctx: &Context, step: usize) -> Result<(), Failed> {
    let squares = Operand::from(MXFP4.with_block(Block::Square(32))).transposed();
    let across = |dtype: DType| Operand::from(dtype).transposed();
    let offsets = |end: u32| vec![32, 32, 96, 224, 224, end];
    let cases = [
        // Whole vectors of 128 positions, and lines that are not; ranges start anywhere in one.
        (desc(MXFP4, MXFP4, [70, 65, 384]), offsets(384)),
        (desc(MXFP4, MXFP4, [20, 33, 288]), offsets(288)),
        (desc(across(DType::F16), MXFP8_E4M3, [33, 20, 256]), offsets(256)),
        (desc(NVFP4, MXFP6_E2M3, [20, 33, 256]), offsets(256)),
        (desc(across(DType::BF16), across(DType::BF16), [24, 40, 256]), offsets(256)),
        (desc(DType::BF16, across(DType::BF16), [20, 33, 384]), offsets(384)),
        (desc(MXFP8_E5M2, MXFP8_E4M3, [20, 33, 384]), offsets(384)),
        (desc(squares, squares, [40, 33, 256]), offsets(256)),
        (desc(MXFP4.with_block(Block::Vector(64)), MXINT8, [5, 20, 256]), offsets(256)),
    ];
    for (i, (desc, offsets)) in cases.into_iter().enumerate() {
        if step > 1 && i > 6 {
            continue;
        }
        let desc = MatmulDesc { experts: Some(5), group_k: true, ..desc };
        // The experts' ids count for nothing.
        let groups = Some((offsets, vec![0, 4, 4, 1, 2]));
        let mut problem = Problem { groups, ..problem(70 + i as u64, &desc, Spread::Wild) };
        if i == 0 {
            // As a gradient's operands are: blocks along the rows of [k, m].
            problem.a = random(90, desc.a, Axis::Zero, [desc.m, desc.k], Spread::Near);
        }
        problem.check(ctx).map_err(|failed| format!("{i}: {}", failed.message().unwrap_or("")))?;
        if i == 0 {
            // What y held stays where a group is empty.
            let old = Some(gaussian(8, problem.rows() * desc.n));
            let more = MatmulDesc { beta: 1.0, ..problem.desc };
            problem = Problem { old, desc: more, ..problem };
            problem.check(ctx)?;
        }
    }
    one_expert_alone(ctx)?;
    // As many groups as experts; experts.
    let desc = MatmulDesc { experts: Some(2), group_k: true, ..desc(MXFP4, MXFP4, [8, 8, 64]) };
    let mut few = problem(1, &desc, Spread::Near);
    few.groups = Some((vec![0, 64], vec![0]));
    says(few.run_dense(ctx, Tier::Alu).unwrap_err(), &["1 groups", "2 experts"]);
    says(Matmul::new(ctx, &MatmulDesc { experts: None, ..desc }).unwrap_err(), &["along k"]);
    // Ranges that start within a block, or end behind k.
    for offsets in [vec![0, 16, 64], vec![0, 32, 96]] {
        few.groups = Some((offsets, vec![0, 1]));
        for tier in tiers(ctx, &desc) {
            let result = few.run_dense(ctx, tier);
            if ctx.wgpu().is_none() {
                says(result.unwrap_err(), &["multiples of 32"]);
                continue;
            }
            let nan = to_f32(DType::F32, &result?).iter().filter(|v| v.is_nan()).count();
            let wrong = if few.groups.as_ref().is_some_and(|g| g.0[1] == 16) { 2 } else { 1 };
            assert_eq!(nan, wrong * 64, "{tier}");
        }
    }
    Ok(())
}

/// The exact tier's bits are those of a product of an expert's positions alone.
fn one_expert_alone(ctx: &Context) -> Result<(), Failed> {
    let [m, n, start, end] = [20, 33, 96, 224];
    let desc = MatmulDesc { experts: Some(3), group_k: true, ..desc(MXFP4, MXFP4, [m, n, 288]) };
    if !tiers(ctx, &desc).contains(&Tier::Exact) {
        return Ok(());
    }
    let groups = Some((vec![0, start as u32, end as u32, 288], vec![0; 3]));
    let whole = Problem { groups, ..problem(80, &desc, Spread::Near) };
    let got = whole.run_dense(ctx, Tier::Exact)?;
    let cut = |x: &Data| -> Result<Data, Error> {
        let Data::Mx(x) = x else { unreachable!() };
        let take = |bytes: &[u8], pitch: usize, per: usize| -> Vec<u8> {
            bytes.chunks(pitch).flat_map(|line| line[start / per..end / per].to_vec()).collect()
        };
        let codes = take(x.codes(), x.layout().line_bytes(), 2);
        let scales = take(x.scales(), x.layout().blocks(), 32);
        let layout = Layout::new(MXFP4, Axis::One, x.layout().lines(), end - start)?;
        Ok(Data::Mx(MxTensor::from_parts(layout, codes, scales, 1.0)?))
    };
    let alone = Problem {
        desc: self::desc(MXFP4, MXFP4, [m, n, end - start]),
        a: cut(&whole.a)?,
        b: cut(&whole.b)?,
        groups: None,
        ..whole
    };
    let size = m * n * 4;
    assert_bytes("an expert", &got[size..2 * size], &alone.run_dense(ctx, Tier::Exact)?);
    Ok(())
}

/// Sums of slices, which large devices and the emulation have: lines that end within a chunk, and whole ones by vectors and
/// columns; ragged outputs of all types, and what is done with the sum.
fn slices_of_k(ctx: &Context, _: usize) -> Result<(), Failed> {
    let across = |dtype: DType| Operand::from(dtype).transposed();
    let more = |desc| MatmulDesc { alpha: 0.75, beta: 0.5, bias: true, ..desc };
    let bf16 = |desc| MatmulDesc { out: DType::BF16.into(), ..desc };
    let cases = [
        (2, more(desc(MXFP4, MXFP4, [33, 36, 2176]))),
        (3, desc(across(DType::BF16), across(DType::BF16), [24, 40, 3200])),
        (2, desc(MXFP8_E4M3, MXFP4, [17, 36, 2176])),
        (2, bf16(more(desc(NVFP4, MXFP8_E4M3, [20, 33, 2100])))),
        (2, desc(across(DType::F16), MXFP6_E2M3.with_block(Block::Square(16)), [20, 34, 2112])),
        (1, desc(MXFP4, MXFP4, [20, 33, 2000])),
    ];
    let emulated = ctx.caps().software && tiers(ctx, &cases[0].1) == [Tier::Exact, Tier::Tensor];
    for (i, (slices, desc)) in cases.into_iter().enumerate() {
        let old = (desc.beta != 0.0).then(|| gaussian(5, desc.m * desc.n));
        let mut problem = Problem { old, ..problem(95 + 2 * i as u64, &desc, Spread::Wild) };
        for tier in [Tier::Tensor, Tier::Alu] {
            let Ok(kernel) = Matmul::new(ctx, &MatmulDesc { tier, ..desc }) else { continue };
            if emulated {
                assert_eq!(kernel.slices(), slices, "{tier}, {i}");
            }
            problem.check_tier(ctx, tier)?;
            let again = problem.run_dense(ctx, tier)?;
            assert_bytes("again", &again, &problem.run_dense(ctx, tier)?);
        }
        let exact = MatmulDesc { tier: Tier::Exact, ..desc };
        if let Ok(kernel) = Matmul::new(ctx, &exact) {
            assert_eq!(kernel.slices(), 1);
        }
        // A scale that is NaN, in the last slice.
        if let (Data::Mx(a), 0) = (&problem.a, i) {
            let mut scales = a.scales().to_vec();
            let blocks = a.layout().blocks();
            scales[3 * blocks - 1] = 255;
            let a = MxTensor::from_parts(*a.layout(), a.codes().to_vec(), scales, 1.0)?;
            problem.a = Data::Mx(a);
            for tier in [Tier::Tensor, Tier::Alu] {
                if Matmul::new(ctx, &MatmulDesc { tier, ..desc }).is_ok() {
                    problem.check_tier(ctx, tier)?;
                }
            }
        }
    }
    Ok(())
}

/// What a router on the device got wrong.
fn invalid_groups(ctx: &Context, _: usize) -> Result<(), Failed> {
    let shape @ [m, n, _] = [100, 33, 64];
    let desc = MatmulDesc { experts: Some(4), ..desc(MXFP4, MXFP4, shape) };
    let whole = problem(1, &desc, Spread::Near);
    let Some((device, queue)) = ctx.wgpu() else {
        // The CPU engine looks before it starts. (Of its groups, only these may be wrong: the descriptor is another one.)
        for (offsets, experts, total, says) in
            [(vec![0, 101], vec![0], 4, "101"), (vec![0, 100], vec![4], 5, "4")]
        {
            let groups = Groups::new(ctx, &offsets, &experts, total)?;
            let error = record_grouped(ctx, &whole, Tier::Exact, &groups).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        return Ok(());
    };
    // A group each: in order; no such expert; past the last row; descending.
    let words: [u32; 10] = [0, 2, 20, 30, 110, 90, 1, 4, 2, 0];
    let buffer = device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: words.len() as u64 * 4,
        usage: wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::COPY_SRC
            | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&words));
    let groups = Groups::from_buffer(ctx, 4, buffer)?;
    assert_eq!(groups.len(), 4);
    for (i, tier) in tiers(ctx, &desc).into_iter().enumerate() {
        let got = record_grouped(ctx, &whole, tier, &groups)?;
        let right = Problem { groups: Some((vec![2, 20], vec![1])), ..whole.clone() };
        let want = right.run_dense(ctx, tier)?;
        let nan = 0x7fc0_0000u32.to_le_bytes();
        for row in 0..m {
            let at = row * n * 4..(row + 1) * n * 4;
            let (got, want) = (&got[at.clone()], &want[at]);
            match row {
                20.. => assert!(got.chunks(4).all(|v| v == nan), "{tier} row {row} is not NaN"),
                // Rows that no group has keep what `want` has there too.
                _ => assert_bytes(&format!("{tier} row {row}"), got, want),
            }
        }
        // Three more every time.
        assert_eq!(pollster::block_on(groups.invalid(ctx))?, 3 * (i as u32 + 1), "{tier}");
    }
    Ok(())
}

fn record_grouped(
    ctx: &Context,
    problem: &Problem,
    tier: Tier,
    groups: &Groups,
) -> Result<Vec<u8>, Error> {
    let desc = MatmulDesc { tier, ..problem.desc };
    let (a, b) = (Device::upload(ctx, &problem.a)?, Device::upload(ctx, &problem.b)?);
    let mut y = ctx.upload(DType::F32, desc.m, desc.n, &problem.old_bytes(DType::F32))?;
    let mut stream = ctx.stream();
    let extras = Extras { groups: Some(groups), bias: None };
    Matmul::new(ctx, &desc)?.record_with(&mut stream, a.input(), b.input(), &mut y, extras)?;
    ctx.submit(stream)?;
    ctx.read_blocking(&y)
}

/// Anchors are made by Quantize, by upload_mx and by packed products; all are the same.
fn quantized_here_or_uploaded(ctx: &Context, step: usize) -> Result<(), Failed> {
    let square = MXFP4.with_block(Block::Square(32));
    for (i, (spec, axis, transposed)) in [
        (square, Axis::One, true),
        (NVFP4, Axis::One, false),
        (MXFP4, Axis::Zero, false),
        (square, Axis::Zero, false),
        (MXINT8, Axis::One, false),
        (MXFP8_E5M2, Axis::Zero, false),
    ]
    .into_iter()
    .enumerate()
    .step_by(if step > 1 { 2 } else { 1 })
    {
        let [m, n, k] = [20, 41, 100];
        let stored = if transposed { [k, n] } else { [n, k] };
        let [rows, cols] = if axis == Axis::One { stored } else { [stored[1], stored[0]] };
        // Exponents spread, so that a wrong anchor shows.
        let x: Vec<f32> = gaussian(i as u64, rows * cols)
            .iter()
            .enumerate()
            .map(|(at, v)| v * 2f32.powi((at / 37 % 23) as i32 * 3 - 30))
            .collect();
        let qdesc = QuantizeDesc { spec, axis, ..Default::default() };
        let host = MxTensor::quantize(&x, rows, cols, &qdesc)?;
        let dense = ctx.upload(DType::F32, rows, cols, bytemuck::cast_slice(&x))?;
        let mut quantized = garbage(ctx, &qdesc, rows, cols)?;
        let operand = if transposed { Operand::from(spec).transposed() } else { spec.into() };
        let plain = Problem {
            b: Data::Mx(host),
            ..problem(i as u64, &desc(MXFP4, operand, [m, n, k]), Spread::Near)
        };
        let Device::Mx(a) = Device::upload(ctx, &plain.a)? else { unreachable!() };
        for tier in tiers(ctx, &plain.desc) {
            plain.check_tier(ctx, tier)?;
            let want = plain.run_dense(ctx, tier)?;
            let mut y = ctx.upload(DType::F32, m, n, &nan_bytes(DType::F32, m * n))?;
            // In one stream, as programs do.
            let mut stream = ctx.stream();
            Quantize::new(ctx, &qdesc)?.record(&mut stream, &dense, &mut quantized)?;
            Matmul::new(ctx, &MatmulDesc { tier, ..plain.desc })?.record(
                &mut stream,
                &a,
                &quantized,
                &mut y,
            )?;
            ctx.submit(stream)?;
            assert_bytes(&format!("{tier} {spec} axis {axis}"), &ctx.read_blocking(&y)?, &want);
        }
    }
    // A packed product is the next one's operand.
    let [m, n, k] = [40, 70, 64];
    let out = QuantizeDesc::default();
    let first =
        problem(60, &MatmulDesc { out: out.into(), ..desc(MXFP4, MXFP4, [m, n, k]) }, Spread::Wild);
    for tier in tiers(ctx, &first.desc) {
        let second = desc(MXFP4, MXFP4, [m, 33, n]);
        let (a, b) = (Device::upload(ctx, &first.a)?, Device::upload(ctx, &first.b)?);
        let c = random(61, MXFP4.into(), Axis::One, [33, n], Spread::Near);
        let c_device = Device::upload(ctx, &c)?;
        let mut y = garbage(ctx, &out, m, n)?;
        let mut z = ctx.upload(DType::F32, m, 33, &nan_bytes(DType::F32, m * 33))?;
        let mut stream = ctx.stream();
        Matmul::new(ctx, &MatmulDesc { tier, ..first.desc })?.record(
            &mut stream,
            a.input(),
            b.input(),
            &mut y,
        )?;
        Matmul::new(ctx, &MatmulDesc { tier, ..second })?.record(
            &mut stream,
            &y,
            c_device.input(),
            &mut z,
        )?;
        ctx.submit(stream)?;
        let uploaded = Problem {
            desc: second,
            a: Data::Mx(ctx.read_mx_blocking(&y)?),
            b: c,
            old: None,
            bias: None,
            groups: None,
        };
        uploaded.check_tier(ctx, tier)?;
        assert_bytes("a packed product", &ctx.read_blocking(&z)?, &uploaded.run_dense(ctx, tier)?);
    }
    Ok(())
}

/// In small bindings A, B, y and a packed y lie in several.
fn many_bindings(ctx: &Context, _: usize) -> Result<(), Failed> {
    // A binding holds 256 lines of 640 bytes, or 128 rows of y.
    let shapes = [[300, 290, 1280], [2, 290, 1280]];
    for (i, shape @ [m, n, k]) in shapes.into_iter().enumerate() {
        let plain = problem(i as u64, &desc(MXFP4, MXFP4, shape), Spread::Near);
        if ctx.wgpu().is_some() && !ctx.caps().software {
            plain.check_tier(ctx, Tier::Alu)?;
        }
        plain.check_tier(ctx, Tier::Exact)?;
        let out = QuantizeDesc {
            rounding: Rounding::Stochastic { seed: 9, stream: 1 },
            ..Default::default()
        };
        let packed =
            Problem { desc: MatmulDesc { out: out.into(), ..plain.desc }, ..plain.clone() };
        let values = to_f32(DType::F32, &plain.run_dense(ctx, Tier::Exact)?);
        let Written::Mx(got, _) = packed.run(ctx, Tier::Exact)? else { unreachable!() };
        assert_eq!(got, MxTensor::quantize(&values, m, n, &out)?, "{m}x{n}x{k}");
    }
    let batched = MatmulDesc { batch: 3, bias: true, ..desc(MXFP4, MXFP4, [150, 140, 1280]) };
    problem(9, &batched, Spread::Near).check_tier(ctx, Tier::Exact)?;
    // Squares: anchors of rows of scales, in several bindings.
    let square = MXFP4.with_block(Block::Square(32));
    problem(10, &desc(square, MXFP4, [300, 33, 1280]), Spread::Wild)
        .check_tier(ctx, Tier::Exact)?;
    // What cannot be split says so.
    let limit = ctx.wgpu().map(|(device, _)| device.limits().max_storage_buffer_binding_size);
    if limit == Some(180 << 10) {
        let over = desc(MXFP4, Operand::from(square).transposed(), [20, 290, 1280]);
        let routed = MatmulDesc { experts: Some(3), ..desc(MXFP4, MXFP4, [20, 140, 1280]) };
        let mut groups = problem(12, &routed, Spread::Near);
        groups.groups = Some((vec![0, 20], vec![1]));
        for (problem, part) in [(problem(11, &over, Spread::Near), "B"), (groups, "grouped")] {
            let error = problem.run_dense(ctx, Tier::Exact).unwrap_err();
            assert!(matches!(error, Error::TooLarge { .. }), "{error}");
            says(error, &[part]);
        }
    }
    Ok(())
}

// ---- Errors --------------------------------------------------------------------------------------------------------

fn says(error: Error, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
}

fn bad_input(ctx: &Context, _: usize) -> Result<(), Failed> {
    let shape @ [m, n, k] = [20, 33, 64];
    let plain = desc(MXFP4, MXFP4, shape);
    let new = |desc: MatmulDesc| Matmul::new(ctx, &desc).unwrap_err();
    // Descriptors.
    let turned = Operand::from(MXFP4).transposed();
    says(new(desc(turned, MXFP4, shape)), &["A", "mxfp4/1x32", "square"]);
    says(new(desc(MXFP4, turned, shape)), &["B", "mxfp4/1x32", "square"]);
    let packed = QuantizeDesc::default();
    says(new(MatmulDesc { out: packed.into(), beta: 1.0, ..plain }), &["beta = 1", "packed"]);
    let nvfp4 = QuantizeDesc { spec: NVFP4, ..packed };
    says(new(MatmulDesc { out: nvfp4.into(), ..plain }), &["nvfp4", "tensor_scale"]);
    let down = QuantizeDesc { axis: Axis::Zero, ..packed };
    says(new(MatmulDesc { out: down.into(), ..plain }), &["axis 0"]);
    says(new(MatmulDesc { k: (1 << 24) + 1, ..plain }), &["k = 16777217"]);
    for bad in [f32::NAN, f32::INFINITY] {
        says(new(MatmulDesc { alpha: bad, ..plain }), &["alpha"]);
        says(new(MatmulDesc { beta: bad, ..plain }), &["beta"]);
    }
    says(new(MatmulDesc { experts: Some(2), batch: 2, ..plain }), &["batch = 2"]);
    says(new(MatmulDesc { experts: Some(0), ..plain }), &["no expert"]);
    let square = MXFP4.with_block(Block::Square(32));
    says(new(MatmulDesc { batch: 2, ..desc(square, MXFP4, shape) }), &["A", "20 lines"]);
    let none = MXFP4.with_block(Block::Vector(48));
    assert!(matches!(new(desc(none, MXFP4, shape)), Error::InvalidSpec(_)));
    // Tiers by name.
    let error = new(MatmulDesc { tier: Tier::Exact, ..desc(MXFP4, MXFP8_E4M3, shape) });
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    says(error, &["exact tier", "E2M1, E2M3 or INT8", "B is mxfp8-e4m3"]);
    let error = new(MatmulDesc { tier: Tier::Tensor, ..desc(DType::F32, MXFP4, shape) });
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    if ctx.wgpu().is_none() {
        let error = new(MatmulDesc { tier: Tier::Tensor, ..plain });
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        says(error, &["tensor tier", "cooperative matrices", "CPU engine"]);
    }

    // Tensors.
    let kernel = Matmul::new(ctx, &plain)?;
    let mx = |spec, rows, cols| ctx.zeros_mx(spec, Axis::One, rows, cols);
    let (a, b) = (mx(MXFP4, m, k)?, mx(MXFP4, n, k)?);
    let mut y = ctx.zeros(DType::F32, m, n)?;
    let mut stream = ctx.stream();
    let short = mx(MXFP4, n, k - 1)?;
    says(
        kernel.record(&mut stream, &a, &short, &mut y).unwrap_err(),
        &["B", "[33, 63]", "[33, 64]", "m = 20"],
    );
    let tall = mx(MXFP4, m + 1, k)?;
    says(
        kernel.record(&mut stream, &tall, &b, &mut y).unwrap_err(),
        &["A", "[21, 64]", "[20, 64]"],
    );
    let other = mx(MXFP6_E2M3, m, k)?;
    says(
        kernel.record(&mut stream, &other, &b, &mut y).unwrap_err(),
        &["A", "mxfp6-e2m3/1x32", "mxfp4/1x32"],
    );
    let blocks = mx(MXFP4.with_block(Block::Vector(64)), m, k)?;
    says(
        kernel.record(&mut stream, &blocks, &b, &mut y).unwrap_err(),
        &["A", "mxfp4/1x64", "mxfp4/1x32"],
    );
    let dense = ctx.zeros(DType::F16, m, k)?;
    says(kernel.record(&mut stream, &dense, &b, &mut y).unwrap_err(), &["A", "f16", "mxfp4/1x32"]);
    let mut narrow = ctx.zeros(DType::F32, m, n - 1)?;
    says(
        kernel.record(&mut stream, &a, &b, &mut narrow).unwrap_err(),
        &["y", "[20, 32]", "[20, 33]"],
    );
    let mut half = ctx.zeros(DType::F16, m, n)?;
    says(kernel.record(&mut stream, &a, &b, &mut half).unwrap_err(), &["y", "f16", "f32"]);
    let mut packed_y = mx(MXFP4, m, n)?;
    says(
        kernel.record(&mut stream, &a, &b, &mut packed_y).unwrap_err(),
        &["y", "mxfp4/1x32", "f32"],
    );
    let packs = Matmul::new(ctx, &MatmulDesc { out: packed.into(), ..plain })?;
    says(packs.record(&mut stream, &a, &b, &mut y).unwrap_err(), &["y", "f32", "mxfp4/1x32"]);
    let mut down_y = ctx.zeros_mx(MXFP4, Axis::Zero, m, n)?;
    says(packs.record(&mut stream, &a, &b, &mut down_y).unwrap_err(), &["axis 0", "axis 1"]);

    // Bias and groups.
    let bias = ctx.zeros(DType::F32, 1, n)?;
    let with = |bias| Extras { bias: Some(bias), groups: None };
    says(
        kernel.record_with(&mut stream, &a, &b, &mut y, with(&bias)).unwrap_err(),
        &["bias", "given", "false"],
    );
    let biased = Matmul::new(ctx, &MatmulDesc { bias: true, ..plain })?;
    says(biased.record(&mut stream, &a, &b, &mut y).unwrap_err(), &["bias", "not given", "true"]);
    let long = ctx.zeros(DType::F32, 1, n + 1)?;
    says(
        biased.record_with(&mut stream, &a, &b, &mut y, with(&long)).unwrap_err(),
        &["bias", "[1, 34]", "[1, 33]"],
    );
    let half_bias = ctx.zeros(DType::F16, 1, n)?;
    says(
        biased.record_with(&mut stream, &a, &b, &mut y, with(&half_bias)).unwrap_err(),
        &["bias", "f16"],
    );
    let groups = Groups::new(ctx, &[0, 20], &[0], 1)?;
    let extras = Extras { bias: None, groups: Some(&groups) };
    says(
        kernel.record_with(&mut stream, &a, &b, &mut y, extras).unwrap_err(),
        &["groups", "given"],
    );
    let routed = Matmul::new(ctx, &MatmulDesc { experts: Some(1), ..plain })?;
    says(
        routed.record(&mut stream, &a, &b, &mut y).unwrap_err(),
        &["groups", "not given", "Some(1)"],
    );

    // Tensors of another engine.
    if ctx.wgpu().is_some() {
        let cpu = Context::cpu();
        let elsewhere = cpu.zeros_mx(MXFP4, Axis::One, m, k)?;
        says(kernel.record(&mut stream, &elsewhere, &b, &mut y).unwrap_err(), &["CPU engine"]);
        let mut y_cpu = cpu.zeros(DType::F32, m, n)?;
        says(kernel.record(&mut stream, &a, &b, &mut y_cpu).unwrap_err(), &["CPU engine"]);
        let mut on_cpu = cpu.stream();
        says(kernel.record(&mut on_cpu, &a, &b, &mut y).unwrap_err(), &["CPU engine"]);
        let bias_cpu = cpu.zeros(DType::F32, 1, n)?;
        says(
            biased.record_with(&mut stream, &a, &b, &mut y, with(&bias_cpu)).unwrap_err(),
            &["CPU engine"],
        );
        let groups_cpu = Groups::new(&cpu, &[0, 20], &[0], 1)?;
        let extras = Extras { bias: None, groups: Some(&groups_cpu) };
        let error = routed.record_with(&mut stream, &a, &b, &mut y, extras).unwrap_err();
        says(error, &["CPU engine"]);
        // A buffer of a GPU's, on the CPU engine; and one that is too short.
        let buffer = bias.buffers()[0].clone();
        says(Groups::from_buffer(&cpu, 1, buffer.clone()).unwrap_err(), &["CPU engine"]);
        says(Groups::from_buffer(ctx, 100, buffer).unwrap_err(), &["[1, 202]", "808"]);
        // The other way round.
        let [a, b] = [m, n].map(|rows| cpu.zeros_mx(MXFP4, Axis::One, rows, k));
        let (a, b) = (a?, b?);
        let error = biased.record_with(&mut on_cpu, &a, &b, &mut y_cpu, with(&bias)).unwrap_err();
        says(error, &["CPU engine"]);
        let extras = Extras { bias: None, groups: Some(&groups) };
        let error = routed.record_with(&mut on_cpu, &a, &b, &mut y_cpu, extras).unwrap_err();
        says(error, &["CPU engine"]);
    }
    Ok(())
}

fn groups_are_checked() -> Result<(), Failed> {
    let ctx = Context::cpu();
    let new = |offsets: &[u32], experts: &[u32]| Groups::new(&ctx, offsets, experts, 4);
    says(new(&[0, 5], &[1, 2]).unwrap_err(), &["2 offsets", "2 experts"]);
    says(new(&[], &[]).unwrap_err(), &["0 offsets"]);
    says(new(&[0, 5, 4], &[1, 2]).unwrap_err(), &["group 1", "row 5", "row 4"]);
    says(new(&[0, 5, 6], &[1, 4]).unwrap_err(), &["group 1", "expert 4 of 4"]);
    assert!(new(&[7], &[])?.is_empty());
    assert_eq!(new(&[0, 5, 5], &[3, 0])?.len(), 2);
    Ok(())
}

fn auto(ctx: &Context, _: usize) -> Result<(), Failed> {
    let choice = |desc: MatmulDesc| -> Result<(Tier, String), Error> {
        let kernel = Matmul::new(ctx, &desc)?;
        Ok((kernel.tier(), kernel.why().to_string()))
    };
    for (a, b) in [(MXFP4, MXFP4), (MXFP8_E4M3, MXFP4)] {
        for m in [1, 2, 64] {
            let (tier, why) = choice(desc(a, b, [m, 64, 64]))?;
            let integers = a == MXFP4;
            // Other backends have no kernel of cooperative matrices for few rows.
            let tensor = tiers(ctx, &desc(a, b, [m, 64, 64])).contains(&Tier::Tensor)
                && (m > 2 || ctx.caps().backend == "Vulkan");
            let want = match (integers, tensor) {
                (true, true) if m == 1 => Tier::Exact,
                (_, true) => Tier::Tensor,
                (true, false) => Tier::Exact,
                (false, false) => Tier::Alu,
            };
            assert_eq!(tier, want, "m = {m}: {why}");
            assert!(!why.is_empty());
            assert!(tier != Tier::Alu || why.contains("A is mxfp8-e4m3"), "{why}");
        }
    }
    let named = MatmulDesc { tier: Tier::Alu, ..desc(MXFP4, MXFP4, [64, 64, 64]) };
    assert_eq!(choice(named)?, (Tier::Alu, "asked for".into()));
    Ok(())
}

/// The problems reach both ends of f32, and what lies between.
fn wild_results() -> Result<(), Failed> {
    use std::num::FpCategory::{Infinite, Normal, Subnormal, Zero};
    let problem = problem(1, &desc(MXFP4, MXFP4, [70, 65, 200]), Spread::Wild);
    for tier in [Tier::Exact, Tier::Alu, Tier::Tensor] {
        let (want, _) = problem.want(tier);
        for kind in [Infinite, Normal, Subnormal, Zero] {
            let n = want.iter().filter(|ends| ends.map(f32::classify) == [kind; 2]).count();
            assert!(n >= 20, "{tier}: {n} of {kind:?}");
        }
    }
    Ok(())
}

/// A code of A off by one step, in one place of 416, is outside the bound of every tier, in its row and there alone.
fn comparison_fails() -> Result<(), Failed> {
    let ctx = Context::cpu();
    let [m, n, k] = [4, 33, 416];
    for tier in [Tier::Exact, Tier::Alu, Tier::Tensor] {
        let right = problem(3, &desc(MXFP4, MXFP4, [m, n, k]), Spread::Near);
        let Data::Mx(a) = &right.a else { unreachable!() };
        let (mut codes, scales, tensor_scale) = a.clone().into_parts();
        codes[2 * a.layout().line_bytes() + 100] ^= 1;
        let wrong = MxTensor::from_parts(*a.layout(), codes, scales, tensor_scale)?;
        let wrong = Problem { a: Data::Mx(wrong), ..right.clone() };
        let runs = if tier == Tier::Exact { tier } else { Tier::Alu };
        let (want, _) = right.want(tier);
        let exact = tier == Tier::Exact;
        let got = right.run_dense(&ctx, runs)?;
        compare(DType::F32, exact, &got, &want, n)?;
        let got = wrong.run_dense(&ctx, runs)?;
        let error = compare(DType::F32, exact, &got, &want, n).expect_err("a wrong code passes");
        assert!(error.contains("first at (2,"), "{error}");
    }
    // Outputs that nobody wrote.
    let untouched = nan_bytes(DType::F32, 1);
    assert!(compare(DType::F32, false, &untouched, &[[-1.0, 1.0]], 1).is_err());
    assert!(compare(DType::F32, false, &untouched, &[[f32::NAN; 2]], 1).is_err());
    for (got, fits) in [(1.0f32, true), (1.0f32.next_up(), false), (f32::NAN, false)] {
        let result = compare(DType::F32, false, &got.to_le_bytes(), &[[-1.0, 1.0]], 1);
        assert_eq!(result.is_ok(), fits, "{got}");
    }
    Ok(())
}
