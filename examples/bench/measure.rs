//! Timing and verification of one product, and of the machine's peaks.

use std::collections::HashMap;
use std::time::Instant;

use microscaling::kernels::matmul::{Input, Target};
use microscaling::kernels::peak::{Peak, Unit};
use microscaling::kernels::{Copy, Extras, Groups, Values};
use microscaling::{
    Axis, Context, DType, DeviceMxTensor, Error, Layout, Matmul, MatmulDesc, MxSpec, MxTensor,
    QuantizeDesc, ScaleFormat, Stream, Tensor, Tier, report,
};
use serde_json::{Value, json};

use crate::cases::{Case, Scale, short};
use crate::{Result, unit};

// ---- Time ----------------------------------------------------------------------------------------------------------

/// Median seconds of an iteration, of how many samples; the device is warm when the first is taken.
fn time(
    ctx: &Context,
    scale: &Scale,
    mut record: impl FnMut(&mut Stream<'_>, u64) -> microscaling::Result<()>,
) -> microscaling::Result<(f64, usize)> {
    let mut once = |iterations: u64| -> microscaling::Result<f64> {
        let time = pollster::block_on(report::time(ctx, iterations, &mut record))?;
        Ok(time.as_secs_f64() / iterations as f64)
    };
    let start = Instant::now();
    // The first makes pipelines, and touches memory.
    let mut each = once(1)?;
    if ctx.wgpu().is_none() && each > 0.5 * scale.sample {
        return Ok((each, 1));
    }
    if scale.software {
        each = once(1)?;
    } else {
        // An idle GPU's clock is a fraction of what it is under load.
        while start.elapsed().as_secs_f64() < scale.warm {
            let iterations = (0.02 / each.max(1e-6)).clamp(1.0, 200.0) as u64;
            each = once(iterations)?;
        }
    }
    let (least, most) = if scale.software { (1, 11) } else { (5, 31) };
    // Samples of a length that the clock can tell, within what a command buffer should hold.
    let sample = if scale.software { 0.002 } else { 0.01 };
    let iterations = (sample / each.max(1e-7)).ceil().clamp(1.0, 400.0) as u64;
    let mut samples =
        if scale.software && each > 0.1 * scale.sample { vec![each] } else { Vec::new() };
    let start = Instant::now();
    while samples.len() < least
        || samples.len() < most && start.elapsed().as_secs_f64() < scale.sample
    {
        samples.push(once(iterations)?);
    }
    Ok((report::median(&samples), samples.len()))
}

/// Operations a second of small products, by kind: from which it follows what the time suffices for.
#[derive(Default)]
pub struct Rates(HashMap<String, f64>);

impl Rates {
    pub fn of(&mut self, ctx: &Context, case: &Case) -> Result<f64> {
        let few = case.m <= 16;
        let key = format!("{} {few}", case.kind());
        if let Some(rate) = self.0.get(&key) {
            return Ok(*rate);
        }
        let mut rate = 0.0;
        // Larger ones until there is something to time.
        for (n, k) in [(128, 256), (512, 512), (1024, 2048)] {
            let m = if few { case.m } else { n };
            let small = Case { m, n, k, ..case.clone() };
            let mut set = Operands::new(&small)?.upload(ctx, &small)?;
            let matmul = small.kernel(ctx)?;
            let mut seconds = f64::INFINITY;
            for _ in 0..2 {
                let run = report::time(ctx, 1, |stream, _| set.record(&matmul, stream));
                seconds = seconds.min(pollster::block_on(run)?.as_secs_f64());
            }
            rate = small.desc().flops() / seconds.max(1e-6);
            if seconds > 0.005 {
                break;
            }
        }
        self.0.insert(key, rate);
        Ok(rate)
    }
}

// ---- Peaks ---------------------------------------------------------------------------------------------------------

/// What the machine can do, measured.
pub struct Peaks {
    /// Bytes a second, read and written.
    pub copy: f64,
    /// Operations a second by [`Unit::ALL`], or what the device lacks.
    pub units: Vec<Result<f64, String>>,
}

impl Peaks {
    pub fn measure(ctx: &Context, scale: &Scale, progress: impl Fn(&str)) -> Result<Peaks> {
        progress("copy");
        // Beyond any cache on a GPU; on a CPU beyond most.
        let (rows, cols) = if scale.software { (2048, 4096) } else { (8192, 8192) };
        let bytes: Vec<u8> =
            (0..rows * cols).flat_map(|i: usize| (i as u32).to_le_bytes()).collect();
        let xs = (0..SETS).map(|_| ctx.upload(DType::F32, rows, cols, &bytes));
        let xs = xs.collect::<microscaling::Result<Vec<_>>>()?;
        let ys = (0..SETS).map(|_| ctx.zeros(DType::F32, rows, cols));
        let mut ys = ys.collect::<microscaling::Result<Vec<_>>>()?;
        let kernel = Copy::new(ctx);
        let (seconds, _) = time(ctx, scale, |stream, i| {
            kernel.record(stream, &xs[i as usize % SETS], &mut ys[i as usize % SETS])
        })?;
        if ctx.read_blocking(&ys[0])? != bytes {
            return Err("the copy is not its input: the device computes wrongly".into());
        }
        let copy = 2.0 * bytes.len() as f64 / seconds;
        let mut units = Vec::new();
        for unit in Unit::ALL {
            progress(unit.name());
            units.push(match Peak::new(ctx, unit) {
                Ok(mut peak) => {
                    let (seconds, _) = time(ctx, scale, |stream, _| peak.record(stream))?;
                    pollster::block_on(peak.check(ctx))?;
                    Ok(peak.operations() / seconds)
                }
                Err(error) => Err(error.to_string()),
            });
        }
        Ok(Peaks { copy, units })
    }

    /// Operations a second of a unit.
    pub fn of(&self, unit: Unit) -> Option<f64> {
        let at = Unit::ALL.iter().position(|u| *u == unit)?;
        self.units[at].as_ref().ok().copied()
    }

    pub fn json(&self) -> Value {
        let mut map = serde_json::Map::new();
        map.insert("copy".into(), json!({ "bytes_per_second": self.copy }));
        for (unit, peak) in Unit::ALL.iter().zip(&self.units) {
            map.insert(
                unit.name().into(),
                match peak {
                    Ok(rate) => json!({ "operations_per_second": rate }),
                    Err(lacks) => json!({ "lacking": lacks }),
                },
            );
        }
        map.into()
    }
}

// ---- Operands ------------------------------------------------------------------------------------------------------

/// Operands take turns, so that no product finds the last one's in a cache.
const SETS: usize = 3;
/// Above this many bytes one set is beyond any cache.
const CACHE: usize = 400 << 20;
/// Random lines that a larger operand repeats: a prime, so that no tile meets the same ones again.
const LINES: usize = 251;

/// A matrix of which line i is line i mod [`LINES`] of what is held.
enum Base {
    Mx(MxTensor),
    Dense(DType, Vec<u8>, usize),
}

impl Base {
    fn new(values: Values, lines: usize, k: usize, seed: u64) -> Result<Base> {
        let lines = lines.min(LINES);
        let data = gaussian(seed, lines * k);
        Ok(match values {
            Values::Mx(spec) => {
                let desc = QuantizeDesc { spec, ..Default::default() };
                Base::Mx(MxTensor::quantize(&data, lines, k, &desc)?)
            }
            Values::Dense(dtype) => {
                let bytes = match dtype {
                    DType::F32 => bytemuck::cast_slice(&data).to_vec(),
                    DType::F16 => {
                        data.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect()
                    }
                    DType::BF16 => {
                        data.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()
                    }
                };
                Base::Dense(dtype, bytes, k)
            }
        })
    }

    /// These lines of the large matrix.
    fn lines(&self, lines: impl Iterator<Item = usize> + Clone) -> microscaling::Result<Base> {
        let take = |bytes: &[u8], size: usize| -> Vec<u8> {
            let count = bytes.len() / size.max(1);
            let mut out = Vec::new();
            for line in lines.clone() {
                let at = line % count * size;
                out.extend_from_slice(&bytes[at..at + size]);
            }
            out
        };
        match self {
            Base::Dense(dtype, bytes, k) => {
                Ok(Base::Dense(*dtype, take(bytes, k * dtype.size()), *k))
            }
            Base::Mx(x) => {
                let layout = x.layout();
                let codes = take(x.codes(), layout.line_bytes());
                let scales = take(x.scales(), layout.blocks());
                let rows = codes.len() / layout.line_bytes();
                let layout = Layout::new(layout.spec, Axis::One, rows, layout.cols)?;
                Ok(Base::Mx(MxTensor::from_parts(layout, codes, scales, x.tensor_scale())?))
            }
        }
    }

    fn upload(&self, ctx: &Context) -> microscaling::Result<Device> {
        Ok(match self {
            Base::Mx(x) => Device::Mx(ctx.upload_mx(x)?),
            Base::Dense(dtype, bytes, k) => {
                Device::Dense(ctx.upload(*dtype, bytes.len() / (k * dtype.size()), *k, bytes)?)
            }
        })
    }

    /// The values, line after line.
    fn values(&self) -> Vec<f64> {
        let floats = match self {
            Base::Mx(x) => x.dequantize(),
            Base::Dense(dtype, bytes, _) => bytes
                .chunks_exact(dtype.size())
                .map(|bytes| match (dtype, bytes) {
                    (DType::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
                    (DType::BF16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
                    _ => bytes.try_into().map_or(f32::NAN, f32::from_le_bytes),
                })
                .collect(),
        };
        floats.into_iter().map(f64::from).collect()
    }
}

/// Gaussian enough: sums of four uniforms, from a small generator.
fn gaussian(seed: u64, n: usize) -> Vec<f32> {
    let mut state = 0x2545_f491_4f6c_dd1d ^ (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let sum: i64 = (0..4).map(|i| i64::from((state >> (16 * i)) as u16) - 32768).sum();
            sum as f32 / 37837.0
        })
        .collect()
}

enum Device {
    Mx(DeviceMxTensor),
    Dense(Tensor),
}

impl Device {
    fn bytes(&self) -> usize {
        match self {
            Device::Mx(x) => x.bytes(),
            Device::Dense(x) => x.bytes(),
        }
    }

    fn input(&self) -> Input<'_> {
        match self {
            Device::Mx(x) => Input::Mx(x),
            Device::Dense(x) => Input::Dense(x),
        }
    }
}

/// A product's operands on the host.
struct Operands {
    a: Base,
    b: Base,
    /// Where each expert's rows start; they are in order.
    offsets: Vec<u32>,
}

/// The same on the device, with an output.
struct Set {
    a: Device,
    b: Device,
    y: Tensor,
    groups: Option<Groups>,
}

impl Set {
    fn record(&mut self, matmul: &Matmul, stream: &mut Stream<'_>) -> microscaling::Result<()> {
        let extras = Extras { bias: None, groups: self.groups.as_ref() };
        matmul.record_with(
            stream,
            self.a.input(),
            self.b.input(),
            Target::Dense(&mut self.y),
            extras,
        )
    }

    fn bytes(&self) -> usize {
        self.a.bytes() + self.b.bytes() + self.y.bytes()
    }
}

impl Operands {
    fn new(case: &Case) -> Result<Operands> {
        let mut offsets = Vec::new();
        if let Some(experts) = case.experts {
            // Each row draws an expert.
            let mut rows = vec![0u32; experts];
            let mut state = 12345u64;
            for _ in 0..case.m {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                rows[(state >> 33) as usize % experts] += 1;
            }
            offsets.push(0);
            for count in rows {
                offsets.push(offsets.last().unwrap_or(&0) + count);
            }
        }
        Ok(Operands {
            a: Base::new(case.a, case.m, case.k, 1)?,
            b: Base::new(case.b, case.lines_b(), case.k, 2)?,
            offsets,
        })
    }

    fn upload(&self, ctx: &Context, case: &Case) -> microscaling::Result<Set> {
        let groups = match case.experts {
            None => None,
            Some(experts) => {
                let list: Vec<u32> = (0..experts as u32).collect();
                Some(Groups::new(ctx, &self.offsets, &list, experts)?)
            }
        };
        Ok(Set {
            a: self.a.lines(0..case.m)?.upload(ctx)?,
            b: self.b.lines(0..case.lines_b())?.upload(ctx)?,
            y: ctx.zeros(DType::F32, case.m, case.n)?,
            groups,
        })
    }
}

// ---- A product -----------------------------------------------------------------------------------------------------

/// What was measured of one product.
pub struct Measured {
    pub case: Case,
    /// Never [`Tier::Auto`].
    pub tier: Tier,
    /// Whether [`Tier::Auto`] would be this one.
    pub auto: bool,
    pub seconds: f64,
    pub samples: usize,
    pub flops: f64,
    pub bytes: usize,
    /// What its arithmetic runs on.
    pub unit: Unit,
    /// Of the unit's peak.
    pub share: Option<f64>,
    pub bound: String,
    /// Bytes of memory besides operands and y.
    pub extra: usize,
    /// The largest error of the sampled outputs, as a part of what it may be.
    pub error_of_bound: f64,
}

/// Measures and verifies. The inner error is a reason to go on without.
pub fn run(
    ctx: &Context,
    scale: &Scale,
    case: &Case,
    peaks: &Peaks,
) -> Result<Result<Measured, String>> {
    match try_run(ctx, scale, case, peaks) {
        Ok(measured) => Ok(Ok(measured)),
        Err(error) => match error.downcast_ref::<Error>() {
            Some(
                Error::OutOfMemory { .. } | Error::TooLarge { .. } | Error::Unsupported { .. },
            ) => Ok(Err(error.to_string())),
            _ => Err(format!("{case}: {error}").into()),
        },
    }
}

fn try_run(ctx: &Context, scale: &Scale, case: &Case, peaks: &Peaks) -> Result<Measured> {
    let matmul = Matmul::new(ctx, &case.desc())?;
    let auto = Matmul::new(ctx, &MatmulDesc { tier: Tier::Auto, ..case.desc() })?;
    let operands = Operands::new(case)?;
    let mut sets = vec![operands.upload(ctx, case)?];
    let bytes = sets[0].bytes();
    while bytes <= CACHE && sets.len() < SETS {
        sets.push(operands.upload(ctx, case)?);
    }
    let count = sets.len() as u64;
    let (seconds, samples) =
        time(ctx, scale, |stream, i| sets[(i % count) as usize].record(&matmul, stream))?;
    let tier = matmul.tier();
    let error_of_bound = verify(ctx, case, tier, &operands, &sets[0])?;

    let flops = case.desc().flops();
    let unit = unit(&matmul);
    let peak = peaks.of(unit);
    let share = peak.map(|peak| flops / seconds / peak);
    Ok(Measured {
        case: case.clone(),
        tier,
        auto: auto.tier() == tier,
        seconds,
        samples,
        flops,
        bytes,
        unit,
        share,
        bound: bound(bytes as f64 / peaks.copy / seconds, share, unit),
        extra: extra_memory(ctx, case, &matmul),
        error_of_bound,
    })
}

/// Which ceiling is nearer, given the shares of both.
fn bound(memory: f64, arithmetic: Option<f64>, unit: Unit) -> String {
    let arithmetic = arithmetic.unwrap_or(0.0);
    let (share, name) =
        if memory > arithmetic { (memory, "memory") } else { (arithmetic, unit.name()) };
    match share {
        s if s < 0.5 => format!("neither ({:.0}% of {name}, the nearer)", 100.0 * s),
        s if name == "memory" => format!("memory ({:.0}% of the copy)", 100.0 * s),
        _ => name.into(),
    }
}

impl Measured {
    pub fn json(&self) -> Value {
        let case = &self.case;
        json!({
            "name": case.to_string(),
            "group": case.group,
            "m": case.m,
            "n": case.n,
            "k": case.k,
            "experts": case.experts,
            "tier": self.tier.to_string(),
            "auto": self.auto,
            "a": short(case.a),
            "b": short(case.b),
            "out": "f32",
            "seconds": self.seconds,
            "samples": self.samples,
            "flops": self.flops,
            "bytes": self.bytes,
            "share": self.share,
            "bound": self.bound,
            "verified": true,
            "error_of_bound": self.error_of_bound,
            "unit": self.unit.name(),
            "extra_memory_bytes": self.extra,
        })
    }
}

/// Memory that a product takes besides its operands and y. On a GPU tiles live in registers and workgroup memory. The CPU
/// engine's sums, and its threads' panels (src/kernels/matmul/cpu.rs).
fn extra_memory(ctx: &Context, case: &Case, matmul: &Matmul) -> usize {
    match ctx.wgpu() {
        Some(_) => matmul.shared_memory(),
        None => {
            let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
            4 * case.m * case.n + threads * 640 * 1024
        }
    }
}

// ---- Verification --------------------------------------------------------------------------------------------------

/// Rows and columns of y that are sampled.
const SIDE: usize = 8;
/// Outputs that are compared.
pub const SAMPLES: usize = SIDE * SIDE;

pub fn verification() -> Value {
    json!({
        "outputs_of_each_case": SAMPLES,
        "against": "f64 dot products of the dequantized operands; the exact tier also against the CPU engine, bit by bit",
        "bound": "exact: (segments + 8) 2^-24 sum|ab|; tensor, alu: (k + 8) 2^-22 sum|ab| + k 2^-22 max|a| max|b|",
    })
}

/// The largest error of a sample of y, as a part of its bound; an error if that is above 1, or if the exact tier's bits are
/// not the CPU engine's.
fn verify(ctx: &Context, case: &Case, tier: Tier, operands: &Operands, set: &Set) -> Result<f64> {
    let Case { m, n, k, .. } = *case;
    let mut state = 0x1234_5678_9abc_def1u64;
    let mut draw = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 20) as usize % below
    };
    // The corners always.
    let mut rows = vec![0, m - 1];
    let mut cols = vec![0, n - 1];
    while rows.len() < SIDE {
        rows.push(draw(m));
        cols.push(draw(n));
    }
    let mut worst = 0.0f64;
    for (r, i) in rows.iter().enumerate() {
        let expert = operands.offsets.partition_point(|o| *o as usize <= *i).saturating_sub(1);
        let a = operands.a.lines(std::iter::once(*i))?;
        let b = operands.b.lines(cols.iter().map(|j| expert * n + j))?;
        let got = read_row(ctx, &set.y, *i)?;
        let want_bits = if tier == Tier::Exact { Some(on_the_cpu(case, &a, &b)?) } else { None };
        let (av, bv) = (a.values(), b.values());
        let amax = av.iter().fold(0.0f64, |max, x| max.max(x.abs()));
        for (c, j) in cols.iter().enumerate() {
            let line = &bv[c * k..(c + 1) * k];
            let (mut exact, mut sum, mut bmax) = (0.0, 0.0, 0.0f64);
            for (x, y) in av.iter().zip(line) {
                exact += x * y;
                sum += (x * y).abs();
                bmax = bmax.max(y.abs());
            }
            let bound = match tier {
                Tier::Exact => {
                    let short =
                        |v| matches!(v, Values::Mx(MxSpec { scale: ScaleFormat::E4M3, .. }));
                    let segment = if short(case.a) || short(case.b) { 16 } else { 32 };
                    (k.div_ceil(segment) + 8) as f64 * 2f64.powi(-24) * sum
                }
                _ => {
                    (k + 8) as f64 * 2f64.powi(-22) * sum + k as f64 * 2f64.powi(-22) * amax * bmax
                }
            };
            let error = (f64::from(got[*j]) - exact).abs();
            if error.is_nan() || error > bound {
                return Err(format!(
                    "WRONG: y[{i}, {j}] is {}, the product {exact}, their difference beyond {bound}; sample {r}, {c}",
                    got[*j]
                )
                .into());
            }
            worst = worst.max(if error > 0.0 { error / bound } else { 0.0 });
            if let Some(want) = want_bits.as_ref().map(|want| want[c]) {
                if want.to_bits() != got[*j].to_bits() {
                    return Err(format!(
                        "WRONG: y[{i}, {j}] is {}, on the CPU engine {want}: the exact tier must have the same bits",
                        got[*j]
                    )
                    .into());
                }
            }
        }
    }
    Ok(worst)
}

/// One line of A times some of B's, by the CPU engine's exact tier.
fn on_the_cpu(case: &Case, a: &Base, b: &Base) -> Result<Vec<f32>> {
    let ctx = Context::cpu();
    let desc = MatmulDesc { m: 1, n: SIDE, experts: None, ..case.desc() };
    let (a, b) = (a.upload(&ctx)?, b.upload(&ctx)?);
    let mut y = ctx.zeros(DType::F32, 1, SIDE)?;
    let mut stream = ctx.stream();
    Matmul::new(&ctx, &desc)?.record(&mut stream, a.input(), b.input(), &mut y)?;
    ctx.submit(stream)?;
    Ok(bytemuck::pod_collect_to_vec(&ctx.read_blocking(&y)?))
}

/// One row of a dense f32 tensor.
fn read_row(ctx: &Context, y: &Tensor, row: usize) -> Result<Vec<f32>> {
    let [_, cols] = y.shape();
    let size = cols as u64 * 4;
    let Some((device, queue)) = ctx.wgpu() else {
        // The CPU engine's copy of y is small.
        let bytes = ctx.read_blocking(y)?;
        return Ok(bytemuck::pod_collect_to_vec(&bytes[row * size as usize..][..size as usize]));
    };
    // A large tensor lies in several buffers, of whole rows.
    let mut first = 0;
    for buffer in y.buffers() {
        let rows = buffer.size() / size;
        let at = row as u64 - first;
        if at >= rows {
            first += rows;
            continue;
        }
        let staging = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("bench.row"),
            size: size.next_multiple_of(16),
            usage: wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let mut encoder = device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(buffer, at * size, &staging, 0, size);
        queue.submit([encoder.finish()]);
        let bytes = pollster::block_on(ctx.read_buffer(&staging, size))?;
        return Ok(bytemuck::pod_collect_to_vec(&bytes));
    }
    Err(format!("row {row} is in no buffer").into())
}

pub fn operations(rate: f64) -> String {
    match rate {
        r if r >= 1e12 => format!("{:.1} TFLOP/s", r / 1e12),
        r if r >= 1e9 => format!("{:.1} GFLOP/s", r / 1e9),
        r => format!("{:.1} MFLOP/s", r / 1e6),
    }
}
