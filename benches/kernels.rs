//! `cargo bench`: the kernels against a copy on the same device, in one run.
//!
//! `MX_BENCH_DEVICE` chooses the device as `--device` does in the examples; `MX_BENCH_JSON=FILE` writes the medians, from
//! which `benches/table.py` makes the README's tables; `MX_BENCH_NUMPY=PYTHON` runs `benches/numpy_baseline.py` with that
//! interpreter on a tensor of the same size, before and after, as the CPU engine's baseline. A case fails the run if its
//! output is not the twin's.

use std::sync::Mutex;
use std::time::Duration;

use criterion::{Criterion, Throughput};
use microscaling::kernels::{Guards, Hadamard, QuantizeBoth, Side, Signs};
use microscaling::{
    Axis, Block, Context, DType, Dequantize, DequantizeDesc, MXFP4, MXFP6_E2M3, MXFP8_E4M3, MxSpec,
    MxTensor, NVFP4, Options, Quantize, QuantizeDesc, Rounding, ScaleRule, kernels::Copy, report,
};
use serde_json::json;

/// Operands take turns, so that no run finds the last one's in a cache.
const SETS: usize = 3;

struct Case {
    name: String,
    bytes: u64,
    seconds: f64,
    samples: usize,
}

struct Bench {
    ctx: Context,
    criterion: Criterion,
    cases: Vec<Case>,
}

impl Bench {
    /// Measures one case: median seconds of an iteration.
    fn run(
        &mut self,
        name: &str,
        bytes: u64,
        mut record: impl FnMut(&mut microscaling::Stream<'_>, u64) -> microscaling::Result<()>,
    ) {
        let samples = Mutex::new(Vec::new());
        let mut group = self.criterion.benchmark_group("kernels");
        group.throughput(Throughput::Bytes(bytes));
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| {
                // Criterion asks for many iterations of short ones: keep a command buffer within bounds.
                let mut total = Duration::ZERO;
                let mut left = iterations;
                while left > 0 {
                    let now = left.min(50);
                    total +=
                        pollster::block_on(report::time(&self.ctx, now, &mut record)).expect(name);
                    left -= now;
                }
                samples.lock().unwrap().push(total.as_secs_f64() / iterations as f64);
                total
            });
        });
        group.finish();
        let samples = samples.into_inner().unwrap();
        if samples.is_empty() {
            return; // Filtered out on the command line.
        }
        // The first ones warm up.
        let warm = &samples[samples.len() / 4..];
        let seconds = report::median(warm);
        self.cases.push(Case { name: name.into(), bytes, seconds, samples: warm.len() });
    }
}

fn main() {
    let device = std::env::var("MX_BENCH_DEVICE").unwrap_or_else(|_| "auto".into());
    let options = Options { device: device.parse().unwrap(), ..Default::default() };
    let ctx = Context::open_blocking(&options).unwrap_or_else(|error| panic!("{error}"));
    let caps = ctx.caps();
    // Far beyond any cache on a GPU; on a CPU beyond most.
    let (rows, cols) = if caps.software { (2048, 4096) } else { (16384, 8192) };
    let criterion = Criterion::default()
        .configure_from_args()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(if caps.software { 4 } else { 2 }))
        .sample_size(20);
    let mut bench = Bench { ctx: ctx.clone(), criterion, cases: Vec::new() };
    println!(
        "{} ({}), [{rows}, {cols}], clock: {}",
        caps.name,
        caps.driver,
        report::clock(&ctx).name()
    );

    let data = gaussian(rows * cols);
    let xs: Vec<_> = (0..SETS)
        .map(|_| ctx.upload(DType::F32, rows, cols, bytemuck::cast_slice(&data)).expect("upload"))
        .collect();
    let numpy =
        || std::env::var("MX_BENCH_NUMPY").ok().map(|python| numpy_baseline(&python, rows, cols));
    let mut baselines: Vec<_> = numpy().into_iter().collect();

    copy(&mut bench, &ctx, rows, cols);
    let stochastic = Rounding::Stochastic { seed: 1, stream: 2 };
    let square = MXFP4.with_block(Block::Square(32));
    for (name, spec, axis, rounding) in [
        ("quantize f32→mxfp4 rows nearest", MXFP4, Axis::One, Rounding::NearestEven),
        ("quantize f32→mxfp4 rows stochastic", MXFP4, Axis::One, stochastic),
        ("quantize f32→mxfp4 columns nearest", MXFP4, Axis::Zero, Rounding::NearestEven),
        ("quantize f32→mxfp4 columns stochastic", MXFP4, Axis::Zero, stochastic),
        ("quantize f32→mxfp4 square nearest", square, Axis::One, Rounding::NearestEven),
        ("quantize f32→mxfp4 square stochastic", square, Axis::One, stochastic),
        ("quantize f32→mxfp6-e2m3 rows nearest", MXFP6_E2M3, Axis::One, Rounding::NearestEven),
        ("quantize f32→mxfp8-e4m3 rows nearest", MXFP8_E4M3, Axis::One, Rounding::NearestEven),
        ("quantize f32→nvfp4 rows nearest", NVFP4, Axis::One, Rounding::NearestEven),
    ] {
        quantize(&mut bench, &ctx, &xs, &data, name, spec, axis, rounding);
    }
    drop(xs);
    for dtype in [DType::F32, DType::BF16] {
        for (name, size, rounding) in [
            ("nearest", 0, Rounding::NearestEven),
            ("h32 nearest", 32, Rounding::NearestEven),
            ("stochastic", 0, stochastic),
            ("h32 stochastic", 32, stochastic),
        ] {
            let name = format!("quantize {dtype}→mxfp4 rows and columns {name}");
            quantize_both(&mut bench, &ctx, dtype, &data, [rows, cols], &name, size, rounding);
        }
        dequantize(&mut bench, &ctx, &data, rows, cols, dtype);
    }
    copy(&mut bench, &ctx, rows, cols);
    baselines.extend(numpy());
    bench.criterion.final_summary();

    if let Ok(path) = std::env::var("MX_BENCH_JSON") {
        let copies: Vec<f64> = bench
            .cases
            .iter()
            .filter(|c| c.name == "copy")
            .map(|c| c.bytes as f64 / c.seconds)
            .collect();
        let copy = report::median(&copies);
        let cases: Vec<_> = bench
            .cases
            .iter()
            .map(|c| {
                let rate = c.bytes as f64 / c.seconds;
                json!({
                    "name": c.name, "microseconds": c.seconds * 1e6, "bytes": c.bytes, "gigabytes_per_second": rate / 1e9,
                    "of_copy": rate / copy, "samples": c.samples,
                    "million_elements_per_second": (rows * cols) as f64 / c.seconds / 1e6,
                })
            })
            .collect();
        let result = json!({
            "device": caps.name, "driver": caps.driver, "backend": caps.backend, "software": caps.software,
            "clock": report::clock(&ctx).name(), "shape": [rows, cols], "version": env!("CARGO_PKG_VERSION"),
            "threads": std::thread::available_parallelism().map_or(1, |n| n.get()),
            "cases": cases, "numpy": baselines,
        });
        let text = serde_json::to_string_pretty(&result).expect("json") + "\n";
        std::fs::write(&path, text).unwrap_or_else(|error| panic!("{path}: {error}"));
        println!("wrote {path}");
    }
}

fn gaussian(n: usize) -> Vec<f32> {
    // Sums of four uniforms, from a small generator: the distribution matters little, the spread does.
    let mut state = 0x2545_f491_4f6c_dd1du64;
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

/// A copy of the same size: by a kernel, and on a GPU by the API's own command too.
fn copy(bench: &mut Bench, ctx: &Context, rows: usize, cols: usize) {
    let data = vec![7; rows * cols * 4];
    let xs: Vec<_> =
        (0..SETS).map(|_| ctx.upload(DType::F32, rows, cols, &data).expect("copy")).collect();
    let mut ys: Vec<_> =
        (0..SETS).map(|_| ctx.zeros(DType::F32, rows, cols).expect("copy")).collect();
    let bytes = 2 * data.len() as u64;
    let kernel = Copy::new(ctx);
    bench.run("copy", bytes, |stream, i| {
        let i = i as usize % SETS;
        kernel.record(stream, &xs[i], &mut ys[i])
    });
    if ctx.wgpu().is_some() {
        assert!(ctx.read_blocking(&ys[0]).expect("copy") == data, "copy: not the input's bytes");
        bench.run("copy by command", bytes, |stream, i| {
            let i = i as usize % SETS;
            let encoder = stream.wgpu_encoder().expect("on a GPU");
            for (from, to) in xs[i].buffers().iter().zip(ys[i].buffers()) {
                encoder.copy_buffer_to_buffer(from, 0, to, 0, from.size());
            }
            Ok(())
        });
    }
}

#[allow(clippy::too_many_arguments)]
fn quantize(
    bench: &mut Bench,
    ctx: &Context,
    xs: &[microscaling::Tensor],
    data: &[f32],
    name: &str,
    spec: MxSpec,
    axis: Axis,
    rounding: Rounding,
) {
    let [rows, cols] = xs[0].shape();
    let rule = if spec == NVFP4 { ScaleRule::Even } else { ScaleRule::Rceil };
    let desc = QuantizeDesc { spec, axis, rounding, scale_rule: Some(rule), ..Default::default() };
    let kernel = Quantize::new(ctx, &desc).expect(name);
    let mut outs: Vec<_> =
        (0..SETS).map(|_| ctx.zeros_mx(spec, axis, rows, cols).expect(name)).collect();
    // NVFP4 reads the input a second time, for the tensor's amax.
    let passes = if spec == NVFP4 { 2 } else { 1 };
    let bytes = (xs[0].bytes() * passes + outs[0].bytes()) as u64;
    bench.run(name, bytes, |stream, i| {
        let i = i as usize % SETS;
        kernel.record(stream, &xs[i], &mut outs[i])
    });
    if ctx.wgpu().is_some() && bench.cases.last().is_some_and(|c| c.name == name) {
        let got = ctx.read_mx_blocking(&outs[0]).expect(name);
        assert!(
            got == MxTensor::quantize(data, rows, cols, &desc).expect(name),
            "{name}: not the twin's bytes"
        );
    }
}

/// Both layouts in one pass, the columns transformed: what a gradient goes through.
#[allow(clippy::too_many_arguments)]
fn quantize_both(
    bench: &mut Bench,
    ctx: &Context,
    dtype: DType,
    data: &[f32],
    [rows, cols]: [usize; 2],
    name: &str,
    size: u32,
    rounding: Rounding,
) {
    let bytes: Vec<u8> = match dtype {
        DType::F32 => bytemuck::cast_slice(data).to_vec(),
        _ => data.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
    };
    let side = Side { rounding, scale_rule: Some(ScaleRule::Rceil), ..Default::default() };
    let hadamard = (size > 0).then_some(Hadamard { size, signs: Signs::Random { seed: 3 } });
    let transformed = Side { hadamard, ..side };
    let kernel = QuantizeBoth::new(ctx, Some(side), Some(transformed)).expect(name);
    let make = |ctx: &Context| {
        let x = ctx.upload(dtype, rows, cols, &bytes)?;
        let a = ctx.zeros_mx(MXFP4, Axis::One, rows, cols)?;
        Ok::<_, microscaling::Error>((x, a, ctx.zeros_mx(MXFP4, Axis::Zero, rows, cols)?))
    };
    let mut sets: Vec<_> = (0..SETS).map(|_| make(ctx).expect(name)).collect();
    let moved = (sets[0].0.bytes() + sets[0].1.bytes() + sets[0].2.bytes()) as u64;
    bench.run(name, moved, |stream, i| {
        let (x, a, b) = &mut sets[i as usize % SETS];
        kernel.record(stream, x, Some(a), Some(b), &Guards::default(), None)
    });
    if ctx.wgpu().is_some() && bench.cases.last().is_some_and(|c| c.name == name) {
        let cpu = Context::cpu();
        let (x, mut a, mut b) = make(&cpu).expect(name);
        kernel
            .record(&mut cpu.stream(), &x, Some(&mut a), Some(&mut b), &Guards::default(), None)
            .expect(name);
        for (got, want) in [(&sets[0].1, &a), (&sets[0].2, &b)] {
            let got = ctx.read_mx_blocking(got).expect(name);
            assert!(got == cpu.read_mx_blocking(want).expect(name), "{name}: not the twin's bytes");
        }
    }
}

fn dequantize(
    bench: &mut Bench,
    ctx: &Context,
    data: &[f32],
    rows: usize,
    cols: usize,
    dtype: DType,
) {
    let name = format!("dequantize mxfp4→{dtype} rows");
    let packed = MxTensor::quantize(data, rows, cols, &QuantizeDesc::default()).expect("quantize");
    let xs: Vec<_> = (0..SETS).map(|_| ctx.upload_mx(&packed).expect("upload")).collect();
    let mut ys: Vec<_> = (0..SETS).map(|_| ctx.zeros(dtype, rows, cols).expect("zeros")).collect();
    let kernel = Dequantize::new(ctx, &DequantizeDesc::default()).expect("dequantize");
    bench.run(&name, (xs[0].bytes() + ys[0].bytes()) as u64, |stream, i| {
        let i = i as usize % SETS;
        kernel.record(stream, &xs[i], &mut ys[i])
    });
    if dtype == DType::F32 && bench.cases.last().is_some_and(|c| c.name == name) {
        let got = ctx.read_blocking(&ys[0]).expect("read");
        assert!(
            got == bytemuck::cast_slice::<f32, u8>(&packed.dequantize()),
            "{name}: not the twin's bytes"
        );
    }
}

/// Seconds that numpy and ml_dtypes take for f32→MXFP4 on a tensor of this shape, as JSON.
fn numpy_baseline(python: &str, rows: usize, cols: usize) -> serde_json::Value {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/numpy_baseline.py");
    let out = std::process::Command::new(python)
        .args([script, &rows.to_string(), &cols.to_string()])
        .output()
        .unwrap_or_else(|error| panic!("{python}: {error}"));
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("the baseline prints JSON")
}
