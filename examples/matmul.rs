//! Multiplies two matrices in microscaling formats: y = A · Bᵀ, both quantized on the device.
//!
//! `cargo run --release --example matmul [-- A.safetensors B.safetensors -o C.safetensors [--help]]`
//!
//! Without files it multiplies matrices of its own making and reports.

#[path = "shared/input.rs"]
mod input;
#[path = "shared/output.rs"]
mod output;
#[path = "shared/program.rs"]
mod program;

use std::borrow::Cow;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use memmap2::Mmap;
use microscaling::formats::NAMED;
use microscaling::interop::safetensors::{Dtype, Stored, TensorFile};
use microscaling::kernels::Values;
use microscaling::kernels::matmul::{Input, Target};
use microscaling::{
    Axis, Context, DType, DeviceChoice, DeviceMxTensor, Matmul, MatmulDesc, Options, Output,
    Quantize, QuantizeDesc, ScaleFormat, Tensor, Tier, report, rng,
};
use rayon::prelude::*;

use input::map;
use output::OutputFile;

/// Multiply two matrices in microscaling formats: y = A · Bᵀ.
///
/// Each file holds a tensor `x` of F64, F32, F16 or BF16: A of shape [M, K], B of shape [N, K]. Both are quantized on the
/// device, with blocks along K, and multiplied there; OUT gets `y` of shape [M, N]. Without files it multiplies gaussian
/// matrices of 1024x1024, and only reports unless -o is given. OUT is written in one step when all is done.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The file with A.
    #[arg(value_name = "A.safetensors", requires_all = ["b", "output"])]
    a: Option<PathBuf>,
    /// The file with B.
    #[arg(value_name = "B.safetensors")]
    b: Option<PathBuf>,
    /// The file to write.
    #[arg(short, long, value_name = "OUT.safetensors")]
    output: Option<PathBuf>,
    /// What A is quantized to; f32, f16 and bf16 leave it dense.
    #[arg(long, value_name = "FORMAT", default_value = "mxfp4", value_parser = format())]
    a_format: Values,
    /// What B is quantized to.
    #[arg(long, value_name = "FORMAT", default_value = "mxfp4", value_parser = format())]
    b_format: Values,
    /// What y is written as.
    #[arg(long, value_name = "FORMAT", default_value = "f32", value_parser = format())]
    out: Values,
    /// How it is computed.
    #[arg(long, default_value = "auto", value_parser =
        PossibleValuesParser::new(["auto", "exact", "tensor", "alu", "native"]).try_map(|t| t.parse::<Tier>()))]
    tier: Tier,
    /// auto, cpu, gpu, a part of an adapter's name, or #0, #1, ….
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
}

/// The named formats and the dense types.
fn format() -> impl TypedValueParser<Value = Values> {
    let formats = NAMED.into_iter().map(|(name, spec)| (name, Values::Mx(spec)));
    let dense = DType::ALL.into_iter().map(|dtype| (dtype.name(), Values::Dense(dtype)));
    let all: Vec<(&'static str, Values)> = formats.chain(dense).collect();
    PossibleValuesParser::new(all.iter().map(|(name, _)| *name)).try_map(move |name| {
        all.iter().find(|(n, _)| *n == name).map(|(_, values)| *values).ok_or("unknown")
    })
}

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn main() -> ExitCode {
    program::run(|| run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    // First of all, so that hours of work do not end at a directory that cannot be written.
    let output =
        args.output.as_deref().map(|path| OutputFile::create(path, "matmul")).transpose()?;
    let map = |path: &Option<PathBuf>| path.as_deref().map(map).transpose();
    let (map_a, map_b) = (map(&args.a)?, map(&args.b)?);
    let a = load(&args.a, &map_a, 0)?;
    let b = load(&args.b, &map_b, 1)?;
    if a.cols != b.cols {
        let name = |path: &Option<PathBuf>| {
            path.as_ref().map_or_else(String::new, |path| path.display().to_string())
        };
        return Err(format!(
            "{}: x is [{}, {}], but {}: x is [{}, {}]: both must have as many columns, which are contracted",
            name(&args.a),
            a.rows,
            a.cols,
            name(&args.b),
            b.rows,
            b.cols
        )
        .into());
    }
    let ctx =
        Context::open_blocking(&Options { device: args.device.clone(), ..Default::default() })?;
    let caps = ctx.caps();
    writeln!(io::stdout(), "device: {} ({}; {})", caps.name, caps.backend, caps.driver)?;
    let made = multiply(&ctx, &a, &b, args)?;
    if let Some(mut output) = output {
        // Windows cannot replace a file that is mapped, should OUT be one of the inputs.
        drop((a, b));
        drop((map_a, map_b));
        output.write(|mut out| made.write_to(&mut out))?;
        writeln!(io::stdout(), "{}", output.finish()?)?;
    }
    Ok(())
}

/// A file's matrix, or one of our own.
fn load<'a>(path: &Option<PathBuf>, map: &'a Option<Mmap>, stream: u32) -> Result<Matrix<'a>> {
    match (path, map) {
        (Some(path), Some(map)) => {
            Matrix::read(map).map_err(|error| format!("{}: {error}", path.display()).into())
        }
        _ => Ok(Matrix::gaussian(1024, 1024, stream)),
    }
}

fn multiply(
    ctx: &Context,
    a: &Matrix<'_>,
    b: &Matrix<'_>,
    args: &Args,
) -> Result<TensorFile<'static>> {
    let (m, n, k) = (a.rows, b.rows, a.cols);
    // The scale of an NVFP4 tensor follows from its largest value, so it is quantized when that is known.
    let after = match args.out {
        Values::Mx(spec) if spec.scale == ScaleFormat::E4M3 => Some(spec),
        _ => None,
    };
    let out = match (args.out, after) {
        (Values::Dense(dtype), _) => Output::Dense(dtype),
        (_, Some(_)) => Output::Dense(DType::F32),
        (Values::Mx(spec), None) => Output::Mx(QuantizeDesc { spec, ..Default::default() }),
    };
    let operand = |values| microscaling::Operand { values, transposed: false };
    let desc = MatmulDesc {
        m,
        n,
        k,
        a: operand(args.a_format),
        b: operand(args.b_format),
        out,
        tier: args.tier,
        ..Default::default()
    };
    let matmul = Matmul::new(ctx, &desc)?;
    writeln!(
        io::stdout(),
        "product: A [{m}, {k}] in {} times the transpose of B [{n}, {k}] in {} to y [{m}, {n}] in {}",
        args.a_format,
        args.b_format,
        args.out
    )?;
    writeln!(io::stdout(), "tier: {} ({})", matmul.tier(), matmul.why())?;
    let about = |name| move |error: microscaling::Error| format!("{name}: {error}");
    let da = Device::new(ctx, a, args.a_format).map_err(about("A"))?;
    let db = Device::new(ctx, b, args.b_format).map_err(about("B"))?;
    let mut y = match out {
        Output::Dense(dtype) => Device::Dense(ctx.zeros(dtype, m, n)?),
        Output::Mx(out) => Device::Mx(ctx.zeros_mx(out.spec, Axis::One, m, n)?),
    };
    let time = time(ctx, |stream| matmul.record(stream, da.input(), db.input(), y.target()))?;
    let flops = desc.flops();
    let rate = if flops > 0.0 { flops / time.as_secs_f64() } else { 0.0 };
    writeln!(
        io::stdout(),
        "time: {}, {} on {}",
        duration(time),
        operations(rate),
        match report::clock(ctx) {
            report::Clock::Device => "the device's clock",
            report::Clock::Host => "the host's clock",
        }
    )?;
    if let (Some(spec), Device::Dense(x)) = (after, &y) {
        let mut packed = ctx.zeros_mx(spec, Axis::One, m, n)?;
        let quantize = Quantize::new(ctx, &QuantizeDesc { spec, ..Default::default() })?;
        let mut stream = ctx.stream();
        quantize.record(&mut stream, x, &mut packed)?;
        ctx.submit(stream)?;
        writeln!(io::stdout(), "y is quantized after the product: {spec} needs its largest value")?;
        y = Device::Mx(packed);
    }
    let mut file = TensorFile::default();
    let values: Box<dyn Fn(usize, usize) -> f32> = match y {
        Device::Dense(y) => {
            let data = ctx.read_blocking(&y)?;
            let kind = match y.dtype() {
                DType::F32 => Dtype::F32,
                DType::F16 => Dtype::F16,
                DType::BF16 => Dtype::BF16,
            };
            let stored = Stored { dtype: kind, shape: vec![m, n], data: data.clone().into() };
            file.tensors.insert("y".into(), stored);
            let y = Matrix { kind, rows: m, cols: n, data: data.into() };
            Box::new(move |i, j| y.get(i, j))
        }
        Device::Mx(y) => {
            let y = ctx.read_mx_blocking(&y)?;
            file.insert_mx("y", y.clone())?;
            Box::new(move |i, j| y.get(i, j))
        }
    };
    if m * n > 0 {
        let (samples, error) = sampled_error(a, b, &*values);
        writeln!(
            io::stdout(),
            "error: {:.3} relative, over {samples} outputs against the product of A and B as they were given",
            error
        )?;
    }
    Ok(file)
}

/// An operand or y on the device.
enum Device {
    Mx(DeviceMxTensor),
    Dense(Tensor),
}

impl Device {
    fn new(ctx: &Context, x: &Matrix<'_>, values: Values) -> microscaling::Result<Device> {
        let spec = match values {
            Values::Dense(dtype) => return Ok(Device::Dense(x.upload(ctx, dtype)?)),
            Values::Mx(spec) => spec,
        };
        let x = x.upload(ctx, x.dtype().unwrap_or(DType::F32))?;
        let [rows, cols] = x.shape();
        let mut packed = ctx.zeros_mx(spec, Axis::One, rows, cols)?;
        let quantize = Quantize::new(ctx, &QuantizeDesc { spec, ..Default::default() })?;
        let mut stream = ctx.stream();
        quantize.record(&mut stream, &x, &mut packed)?;
        ctx.submit(stream)?;
        let bad = ctx.nonfinite_blocks_blocking(&packed)?;
        if bad > 0 {
            eprintln!(
                "warning: {bad} blocks with NaN or infinity became NaN, and with them whole lines of y"
            );
        }
        Ok(Device::Mx(packed))
    }

    fn input(&self) -> Input<'_> {
        match self {
            Device::Mx(x) => Input::Mx(x),
            Device::Dense(x) => Input::Dense(x),
        }
    }

    fn target(&mut self) -> Target<'_> {
        match self {
            Device::Mx(x) => Target::Mx(x),
            Device::Dense(x) => Target::Dense(x),
        }
    }
}

/// A matrix of a file, or one of our own.
struct Matrix<'a> {
    kind: Dtype,
    rows: usize,
    cols: usize,
    data: Cow<'a, [u8]>,
}

impl<'a> Matrix<'a> {
    fn read(map: &'a Mmap) -> Result<Matrix<'a>> {
        let mut file = TensorFile::parse(map)?;
        let Some(x) = file.tensors.remove("x") else {
            let mut names: Vec<_> = file.tensors.keys().map(|name| format!("{name:?}")).collect();
            if names.len() > 8 {
                names.truncate(8);
                names.push("…".into());
            }
            let there = if names.is_empty() { "nothing".into() } else { names.join(", ") };
            return Err(
                format!("no tensor \"x\", which is what is multiplied; it has {there}").into()
            );
        };
        let [rows, cols] = x.shape[..] else {
            return Err(format!("x has shape {:?}; a matrix is needed", x.shape).into());
        };
        if !matches!(x.dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(format!("x is {}; F64, F32, F16 or BF16 are multiplied", x.dtype).into());
        }
        Ok(Matrix { kind: x.dtype, rows, cols, data: x.data })
    }

    /// Standard normal values, the same everywhere (up to the last place of the system's logarithm and cosine).
    fn gaussian(rows: usize, cols: usize, stream: u32) -> Matrix<'static> {
        let mut data = vec![0; rows * cols * 4];
        data.par_chunks_mut(16).enumerate().for_each(|(i, out)| {
            let words = rng::threefry4x32::<{ rng::ROUNDS }>([i as u32, stream, 0, 0], [0; 4]);
            for (two, out) in words.chunks(2).zip(out.chunks_mut(8)) {
                // Box-Muller.
                let radius = (-2.0 * ((f64::from(two[0]) + 1.0) / 4294967296.0).ln()).sqrt();
                let (sin, cos) =
                    (std::f64::consts::TAU * f64::from(two[1]) / 4294967296.0).sin_cos();
                let pair = [(radius * cos) as f32, (radius * sin) as f32];
                out.copy_from_slice(
                    &[pair[0].to_le_bytes(), pair[1].to_le_bytes()].concat()[..out.len()],
                );
            }
        });
        Matrix { kind: Dtype::F32, rows, cols, data: data.into() }
    }

    /// The type on the device that holds the values as they are; f64 has none.
    fn dtype(&self) -> Option<DType> {
        match self.kind {
            Dtype::F32 => Some(DType::F32),
            Dtype::F16 => Some(DType::F16),
            Dtype::BF16 => Some(DType::BF16),
            _ => None,
        }
    }

    fn size(&self) -> usize {
        self.dtype().map_or(8, DType::size)
    }

    /// An element's value, rounded to f32.
    fn value(&self, bytes: &[u8]) -> f32 {
        match (self.kind, bytes) {
            (Dtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            (Dtype::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
            (Dtype::BF16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
            _ => bytes.try_into().map_or(f32::NAN, |bytes| f64::from_le_bytes(bytes) as f32),
        }
    }

    fn get(&self, row: usize, col: usize) -> f32 {
        let (at, size) = (row * self.cols + col, self.size());
        self.value(&self.data[at * size..(at + 1) * size])
    }

    /// On the device, rounded to nearest even where the type is narrower.
    fn upload(&self, ctx: &Context, dtype: DType) -> microscaling::Result<Tensor> {
        if self.dtype() == Some(dtype) {
            return ctx.upload(dtype, self.rows, self.cols, &self.data);
        }
        let mut data = vec![0; self.rows * self.cols * dtype.size()];
        data.par_chunks_mut(dtype.size()).zip(self.data.par_chunks(self.size())).for_each(
            |(out, bytes)| {
                let x = self.value(bytes);
                match dtype {
                    DType::F32 => out.copy_from_slice(&x.to_le_bytes()),
                    DType::F16 => out.copy_from_slice(&half::f16::from_f32(x).to_le_bytes()),
                    DType::BF16 => out.copy_from_slice(&half::bf16::from_f32(x).to_le_bytes()),
                }
            },
        );
        ctx.upload(dtype, self.rows, self.cols, &data)
    }
}

/// How many outputs were compared, and the root of their squared errors over that of the squared values.
fn sampled_error(a: &Matrix<'_>, b: &Matrix<'_>, y: &dyn Fn(usize, usize) -> f32) -> (usize, f64) {
    const SAMPLES: usize = 64;
    let (mut errors, mut squares) = (0.0, 0.0);
    for sample in 0..SAMPLES as u32 {
        let words = rng::threefry4x32::<{ rng::ROUNDS }>([sample, 2, 0, 0], [0; 4]);
        let (i, j) = (words[0] as usize % a.rows, words[1] as usize % b.rows);
        let exact: f64 = (0..a.cols).map(|k| f64::from(a.get(i, k)) * f64::from(b.get(j, k))).sum();
        errors += (f64::from(y(i, j)) - exact).powi(2);
        squares += exact.powi(2);
    }
    (SAMPLES, if errors == 0.0 { 0.0 } else { (errors / squares).sqrt() })
}

/// The median time of a product, of up to five within a second; without the making of pipelines, by a run before.
fn time(
    ctx: &Context,
    mut record: impl FnMut(&mut microscaling::Stream<'_>) -> microscaling::Result<()>,
) -> microscaling::Result<Duration> {
    let start = Instant::now();
    let mut once = || pollster::block_on(report::time(ctx, 1, |stream, _| record(stream)));
    let mut samples = vec![once()?.as_secs_f64()];
    if ctx.wgpu().is_some() {
        samples.clear();
    }
    while samples.is_empty() || samples.len() < 5 && start.elapsed() < Duration::from_secs(1) {
        samples.push(once()?.as_secs_f64());
    }
    Ok(Duration::from_secs_f64(report::median(&samples)))
}

fn duration(time: Duration) -> String {
    match time.as_secs_f64() {
        s if s < 1e-3 => format!("{:.1} µs", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}

fn operations(rate: f64) -> String {
    match rate {
        r if r >= 1e12 => format!("{:.1} TFLOP/s", r / 1e12),
        r => format!("{:.1} GFLOP/s", r / 1e9),
    }
}
