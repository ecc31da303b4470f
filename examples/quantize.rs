//! Quantizes the matrices of a .safetensors file to an MX format, or turns such a file back.
//!
//! `cargo run --release --example quantize [-- IN.safetensors -o OUT.safetensors [--format nvfp4] [--help]]`
//!
//! Without a file it quantizes a weight of its own making and reports. `microscaling::interop::safetensors` documents
//! what it writes.

#[path = "shared/input.rs"]
mod input;
#[path = "shared/output.rs"]
mod output;
#[path = "shared/program.rs"]
mod program;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use indicatif::{ProgressBar, ProgressStyle};
use microscaling::formats::NAMED;
use microscaling::interop::safetensors::{Dtype, Stored, TensorFile};
use microscaling::{
    Axis, Block, Context, DType, Dequantize, DequantizeDesc, DeviceChoice, MxSpec, MxTensor,
    Options, Quantize, QuantizeDesc, Rounding, ScaleRule, report, rng,
};
use rayon::prelude::*;

use input::map;
use output::OutputFile;

/// Quantize the matrices (2-D tensors of F32, F16 or BF16) of a .safetensors file to a microscaling format; copy
/// everything else byte for byte.
///
/// Without IN it makes a gaussian weight of 4096x4096 f32 itself, and only reports unless -o is given. OUT is written
/// in one step when all is done; it may be IN.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The file to read.
    #[arg(value_name = "IN.safetensors", requires = "output")]
    input: Option<PathBuf>,
    /// The file to write.
    #[arg(short, long, value_name = "OUT.safetensors")]
    output: Option<PathBuf>,
    /// The other way: each tensor that this program quantized becomes F32 again.
    #[arg(long, requires = "input", conflicts_with_all =
        ["format", "block", "axis", "scale_rule", "rounding", "seed"])]
    dequantize: bool,
    /// The format.
    #[arg(long, default_value = "mxfp4", value_parser =
        PossibleValuesParser::new(NAMED.map(|(name, _)| name)).try_map(|n| MxSpec::by_name(&n)))]
    format: MxSpec,
    /// The elements that share a scale, lines x elements; default the format's own.
    #[arg(long, value_parser = one_of(BLOCKS))]
    block: Option<Block>,
    /// The axis along which blocks run: 1 along rows, 0 down columns (stored transposed).
    #[arg(long, default_value = "1", value_parser = one_of([("0", Axis::Zero), ("1", Axis::One)]))]
    axis: Axis,
    /// How a block's scale follows from its largest magnitude; default the format's own, and rceil for stochastic.
    #[arg(long, value_parser = one_of(SCALE_RULES))]
    scale_rule: Option<ScaleRule>,
    /// How elements are rounded.
    #[arg(long, value_enum, default_value_t = RoundingArg::Nearest)]
    rounding: RoundingArg,
    /// The seed of stochastic rounding [default: 0]. A tensor's stream is its place among the file's tensors, sorted by
    /// name.
    #[arg(long)]
    seed: Option<u64>,
    /// auto, cpu, gpu, a part of an adapter's name, or #0, #1, ….
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum RoundingArg {
    /// To nearest, ties to even.
    Nearest,
    /// Up or down at random, without bias.
    Stochastic,
}

const BLOCKS: [(&str, Block); 6] = [
    ("16", Block::Vector(16)),
    ("32", Block::Vector(32)),
    ("64", Block::Vector(64)),
    ("128", Block::Vector(128)),
    ("16x16", Block::Square(16)),
    ("32x32", Block::Square(32)),
];

const SCALE_RULES: [(&str, ScaleRule); 4] = [
    ("floor", ScaleRule::Floor),
    ("ceil", ScaleRule::Ceil),
    ("rceil", ScaleRule::Rceil),
    ("even", ScaleRule::Even),
];

fn one_of<T: Clone + Send + Sync + 'static, const N: usize>(
    values: [(&'static str, T); N],
) -> impl TypedValueParser<Value = T> {
    let names = values.each_ref().map(|(name, _)| *name);
    PossibleValuesParser::new(names).try_map(move |name| {
        values.iter().find(|(n, _)| *n == name).map(|(_, value)| value.clone()).ok_or("unknown")
    })
}

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn main() -> ExitCode {
    program::run(|| run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let desc = describe(args)?;
    // First of all, so that hours of work do not end at a directory that cannot be written.
    let output =
        args.output.as_deref().map(|path| OutputFile::create(path, "quantize")).transpose()?;
    let map = args.input.as_deref().map(map).transpose()?;
    // Errors name the file that they are about.
    let about = |error: Box<dyn std::error::Error>| match &args.input {
        Some(path) => format!("{}: {error}", path.display()).into(),
        None => error,
    };
    let input = match &map {
        Some(map) => TensorFile::parse(map).map_err(|error| about(error.into()))?,
        None => weight(),
    };
    let ctx =
        Context::open_blocking(&Options { device: args.device.clone(), ..Default::default() })?;
    let caps = ctx.caps();
    writeln!(io::stdout(), "device: {} ({}; {})", caps.name, caps.backend, caps.driver)?;
    let made = match args.dequantize {
        true => dequantize(&ctx, input),
        false => quantize(&ctx, input, &desc),
    }
    .map_err(about)?;
    if let Some(mut output) = output {
        output.write(|mut out| made.write_to(&mut out))?;
        // Windows cannot replace a file that is mapped, should OUT be IN.
        drop(made);
        drop(map);
        writeln!(io::stdout(), "{}", output.finish()?)?;
    }
    Ok(())
}

fn describe(args: &Args) -> Result<QuantizeDesc> {
    let stochastic = args.rounding == RoundingArg::Stochastic;
    if args.seed.is_some() && !stochastic {
        return Err(
            "--seed changes nothing without --rounding stochastic; add that or leave it out".into(),
        );
    }
    let desc = QuantizeDesc {
        spec: args.block.map_or(args.format, |block| args.format.with_block(block)),
        axis: args.axis,
        // A scale with which values clip would bias the expectation.
        scale_rule: args.scale_rule.or(stochastic.then_some(ScaleRule::Rceil)),
        rounding: match stochastic {
            true => Rounding::Stochastic { seed: args.seed.unwrap_or(0), stream: 0 },
            false => Rounding::NearestEven,
        },
        tensor_scale: None,
    };
    desc.validate()?;
    Ok(desc)
}

/// A gaussian weight, the same everywhere (up to the last place of the system's logarithm and cosine).
fn weight() -> TensorFile<'static> {
    const SIDE: usize = 4096;
    let mut data = vec![0; SIDE * SIDE * 4];
    data.par_chunks_mut(16).enumerate().for_each(|(i, out)| {
        let words = rng::threefry4x32::<{ rng::ROUNDS }>([i as u32, 0, 0, 0], [0; 4]);
        for (two, out) in words.chunks(2).zip(out.chunks_mut(8)) {
            // Box-Muller.
            let radius = (-2.0 * ((f64::from(two[0]) + 1.0) / 4294967296.0).ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * f64::from(two[1]) / 4294967296.0).sin_cos();
            out[..4].copy_from_slice(&((0.02 * radius * cos) as f32).to_le_bytes());
            out[4..].copy_from_slice(&((0.02 * radius * sin) as f32).to_le_bytes());
        }
    });
    let mut file = TensorFile::default();
    let stored = Stored { dtype: Dtype::F32, shape: vec![SIDE, SIDE], data: data.into() };
    file.tensors.insert("weight".into(), stored);
    file
}

/// The type and shape of a tensor that is quantized; `None` for those that are copied.
fn matrix(tensor: &Stored<'_>) -> Option<(DType, usize, usize)> {
    let dtype = match tensor.dtype {
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        _ => return None,
    };
    match tensor.shape[..] {
        [rows, cols] => Some((dtype, rows, cols)),
        _ => None,
    }
}

fn quantize<'a>(
    ctx: &Context,
    input: TensorFile<'a>,
    desc: &QuantizeDesc,
) -> Result<TensorFile<'a>> {
    let rounding = match desc.rounding {
        Rounding::NearestEven => "to nearest".to_string(),
        Rounding::Stochastic { seed, .. } => format!("stochastic, seed {seed}"),
    };
    let rule = desc.scale_rule.map_or("the format's own".into(), |rule| {
        SCALE_RULES.iter().find(|(_, r)| *r == rule).map_or("", |(name, _)| *name).to_string()
    });
    writeln!(
        io::stdout(),
        "format: {} along axis {}, {} bits an element; scale rule: {rule}; rounding: {rounding}",
        desc.spec,
        desc.axis,
        desc.spec.bits_per_element()
    )?;
    let count = input.tensors.len();
    let mut out = TensorFile { tensors: Default::default(), metadata: input.metadata };
    let mut todo = Vec::new();
    for (stream, (name, tensor)) in input.tensors.into_iter().enumerate() {
        match matrix(&tensor) {
            Some(matrix) => todo.push((stream as u64, name, tensor, matrix)),
            None => {
                out.tensors.insert(name, tensor);
            }
        }
    }
    for (_, name, ..) in &todo {
        out.check_free(name, desc.spec)?;
    }
    let mut table = Table::new(
        todo.iter().map(|(_, name, tensor, _)| (name.as_str(), tensor.data.len())),
        true,
    )?;
    for (stream, name, tensor, (dtype, rows, cols)) in todo {
        let mut desc = *desc;
        if let Rounding::Stochastic { stream: s, .. } = &mut desc.rounding {
            *s = stream;
        }
        let (packed, nonfinite, time) = quantize_one(ctx, &tensor.data, dtype, rows, cols, &desc)
            .map_err(|error| format!("tensor {name:?}: {error}"))?;
        if nonfinite > 0 {
            table.warn(&format!(
                "tensor {name:?}: {nonfinite} of its blocks with NaN or infinity became NaN; the error leaves them out"
            ));
        }
        let error = error_sums(dtype, &tensor.data, &packed.dequantize());
        table.line(&name, &tensor.shape, Some(error), tensor.data.len(), packed.bytes(), time)?;
        out.insert_mx(&name, packed)?;
    }
    table.total(count)?;
    Ok(out)
}

/// The packed tensor, its blocks with NaN or infinity, and how long the quantization took on the device.
fn quantize_one(
    ctx: &Context,
    data: &[u8],
    dtype: DType,
    rows: usize,
    cols: usize,
    desc: &QuantizeDesc,
) -> microscaling::Result<(MxTensor, u32, Duration)> {
    let kernel = Quantize::new(ctx, desc)?;
    let x = ctx.upload(dtype, rows, cols, data)?;
    let mut packed = ctx.zeros_mx(desc.spec, desc.axis, rows, cols)?;
    let time = time(ctx, |stream| kernel.record(stream, &x, &mut packed))?;
    Ok((ctx.read_mx_blocking(&packed)?, ctx.nonfinite_blocks_blocking(&packed)?, time))
}

/// Runs recorded work and returns how long it took: on a GPU without the upload and the making of pipelines, by a run
/// before the timed one.
fn time(
    ctx: &Context,
    mut record: impl FnMut(&mut microscaling::Stream<'_>) -> microscaling::Result<()>,
) -> microscaling::Result<Duration> {
    if ctx.wgpu().is_some() {
        let mut stream = ctx.stream();
        record(&mut stream)?;
        ctx.submit(stream)?;
        ctx.wait_blocking()?;
    }
    pollster::block_on(report::time(ctx, 1, |stream, _| record(stream)))
}

/// The sums of squared errors and of squared inputs, in f64, always in the same order; without blocks that are NaN.
fn error_sums(dtype: DType, input: &[u8], output: &[f32]) -> (f64, f64) {
    const PIECE: usize = 1 << 16;
    let size = dtype.size();
    let pieces: Vec<(f64, f64)> = input
        .par_chunks(PIECE * size)
        .zip(output.par_chunks(PIECE))
        .map(|(input, output)| {
            let (mut error, mut square) = (0.0, 0.0);
            for (bytes, y) in input.chunks_exact(size).zip(output) {
                let x = match (dtype, bytes) {
                    (DType::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
                    (DType::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
                    (DType::BF16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
                    _ => f32::NAN,
                };
                if !y.is_nan() {
                    error += (f64::from(x) - f64::from(*y)).powi(2);
                    square += f64::from(x).powi(2);
                }
            }
            (error, square)
        })
        .collect();
    pieces.iter().fold((0.0, 0.0), |sum, piece| (sum.0 + piece.0, sum.1 + piece.1))
}

fn dequantize<'a>(ctx: &Context, mut input: TensorFile<'a>) -> Result<TensorFile<'a>> {
    let names = input.mx_names();
    if names.is_empty() {
        return Err(
            "its metadata names no quantized tensor; leave --dequantize out to quantize it".into(),
        );
    }
    let count = input.tensors.len();
    let mut parts = 0;
    let mut sizes = Vec::new();
    for name in &names {
        let layout = input.mx_layout(name)?;
        sizes.push((name.as_str(), layout.codes_len() + layout.scales_len()));
    }
    let mut table = Table::new(sizes.into_iter(), false)?;
    // All are taken out before the first is put back: a tensor may have the name of another's part.
    let mut made = Vec::new();
    for name in &names {
        let packed = input.mx(name)?;
        let layout = *packed.layout();
        let desc = DequantizeDesc { spec: layout.spec, axis: layout.axis };
        let run = || -> microscaling::Result<_> {
            let kernel = Dequantize::new(ctx, &desc)?;
            let x = ctx.upload_mx(&packed)?;
            let mut y = ctx.zeros(DType::F32, layout.rows, layout.cols)?;
            let time = time(ctx, |stream| kernel.record(stream, &x, &mut y))?;
            Ok((ctx.read_blocking(&y)?, time))
        };
        let (data, time) = run().map_err(|error| format!("tensor {name:?}: {error}"))?;
        let shape = vec![layout.rows, layout.cols];
        table.line(name, &shape, None, packed.bytes(), data.len(), time)?;
        made.push(Stored { dtype: Dtype::F32, shape, data: data.into() });
    }
    for name in &names {
        let before = input.tensors.len();
        input.remove_mx(name)?;
        parts += before - input.tensors.len();
    }
    for (name, tensor) in names.iter().zip(made) {
        if input.tensors.insert(name.clone(), tensor).is_some() {
            return Err(
                format!("tensor {name:?} is there twice, quantized and not; remove one").into()
            );
        }
    }
    table.total(count - parts + names.len())?;
    Ok(input)
}

/// The report on standard output, and the progress on standard error where that is a terminal.
struct Table {
    bar: ProgressBar,
    width: usize,
    tensors: usize,
    errors: Option<(f64, f64)>,
    before: usize,
    after: usize,
    time: Duration,
    /// Of quantized values, the rate counts the input's bytes; of dequantized ones the output's.
    quantizes: bool,
}

impl Table {
    fn new<'a>(tensors: impl Iterator<Item = (&'a str, usize)>, quantizes: bool) -> Result<Table> {
        let (mut width, mut bytes) = ("total".len(), 0);
        for (name, size) in tensors {
            width = width.max(name.escape_debug().count());
            bytes += size as u64;
        }
        let bar = ProgressBar::new(bytes);
        if !io::stderr().is_terminal() {
            bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
        }
        bar.set_style(ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {eta}")?);
        let table = Table {
            bar,
            width,
            tensors: 0,
            errors: quantizes.then_some((0.0, 0.0)),
            before: 0,
            after: 0,
            time: Duration::ZERO,
            quantizes,
        };
        table.print("name", "shape", "relative MSE", "before", "after", "GB/s")?;
        Ok(table)
    }

    fn print(
        &self,
        name: &str,
        shape: &str,
        error: &str,
        before: &str,
        after: &str,
        rate: &str,
    ) -> Result<()> {
        let line = |width| {
            let mut out = io::stdout();
            match self.quantizes {
                true => writeln!(
                    out,
                    "{name:width$}  {shape:>14}  {error:>12}  {before:>10}  {after:>10}  {rate:>8}"
                ),
                false => writeln!(
                    out,
                    "{name:width$}  {shape:>14}  {before:>10}  {after:>10}  {rate:>8}"
                ),
            }
        };
        Ok(self.bar.suspend(|| line(self.width))?)
    }

    fn warn(&self, text: &str) {
        self.bar.suspend(|| eprintln!("warning: {text}"));
    }

    fn line(
        &mut self,
        name: &str,
        shape: &[usize],
        error: Option<(f64, f64)>,
        before: usize,
        after: usize,
        time: Duration,
    ) -> Result<()> {
        self.tensors += 1;
        self.before += before;
        self.after += after;
        self.time += time;
        if let (Some(sum), Some(error)) = (&mut self.errors, error) {
            *sum = (sum.0 + error.0, sum.1 + error.1);
        }
        let shape: Vec<_> = shape.iter().map(ToString::to_string).collect();
        self.print(
            &name.escape_debug().to_string(),
            &shape.join("x"),
            &relative(error),
            &size(before),
            &size(after),
            &self.rate(before, after, time),
        )?;
        self.bar.inc(before as u64);
        Ok(())
    }

    /// The last line; `all` is the number of tensors in the file, those that were copied included.
    fn total(self, all: usize) -> Result<()> {
        self.bar.finish_and_clear();
        self.print(
            "total",
            &tensors(self.tensors),
            &relative(self.errors),
            &size(self.before),
            &size(self.after),
            &self.rate(self.before, self.after, self.time),
        )?;
        match all - self.tensors {
            0 => {}
            copied => writeln!(io::stdout(), "copied unchanged: {}", tensors(copied))?,
        }
        if self.tensors == 0 {
            self.warn("nothing was quantized: there is no 2-D tensor of F32, F16 or BF16");
        }
        Ok(())
    }

    fn rate(&self, before: usize, after: usize, time: Duration) -> String {
        let bytes = if self.quantizes { before } else { after };
        match time.as_secs_f64() {
            seconds if seconds > 0.0 && bytes > 0 => format!("{:.2}", bytes as f64 / seconds / 1e9),
            _ => "-".into(),
        }
    }
}

fn tensors(n: usize) -> String {
    format!("{n} tensor{}", if n == 1 { "" } else { "s" })
}

/// The error over the input's energy; 0 where both are.
fn relative(sums: Option<(f64, f64)>) -> String {
    match sums {
        Some((0.0, 0.0)) => format!("{:.4e}", 0.0),
        Some((error, square)) => format!("{:.4e}", error / square),
        None => String::new(),
    }
}

fn size(bytes: usize) -> String {
    match bytes as f64 {
        b if b >= 1e9 => format!("{:.3} GB", b / 1e9),
        b if b >= 1e6 => format!("{:.3} MB", b / 1e6),
        b if b >= 1e3 => format!("{:.3} kB", b / 1e3),
        b => format!("{b} B"),
    }
}
