//! How fast the matrix products are on a machine, against what the machine can do.
//!
//! `cargo run --release --example bench [-- --quick] [-- --json FILE] [-- --svg FILE]`, and
//! `cargo run --release --example bench -- --compare FILE... [--svg FILE]` for files written before.
//!
//! `cargo run --release --example bench -- --tune [PRODUCT...] --cache FILE` measures which tiles are the fastest on this
//! device, and `--cache FILE` without it takes them.
//!
//! It prints what the device offers, its measured peaks, and a line for each product: time, rate, share of the peak, what
//! bounds it. A sample of every product's outputs is verified.

mod cases;
mod compare;
mod draw;
mod measure;
#[path = "../shared/output.rs"]
mod output;
#[path = "../shared/program.rs"]
mod program;
mod tune;

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use microscaling::kernels::peak::Unit;
use microscaling::{Context, DeviceChoice, Matmul, Options, Tier, report};
use serde_json::{Value, json};

use cases::{Case, Scale};
use measure::{Measured, Peaks, operations};
use output::OutputFile;

/// Measure the matrix products of one machine, or compare what was measured.
///
/// Times are medians; the work before the first sample warms the device up. Every product's outputs are sampled and
/// verified, and a wrong one ends the program with an error.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The main cases only: under a minute, on software adapters and the CPU engine half of that.
    #[arg(long, conflicts_with = "compare")]
    quick: bool,
    /// Write what was measured to this file.
    #[arg(long, value_name = "FILE", conflicts_with = "compare")]
    json: Option<PathBuf>,
    /// Measure nothing: print these files' results side by side, as Markdown.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    compare: Vec<PathBuf>,
    /// Draw the rooflines: of this machine, or of those compared.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Draw time against size, for the cubes.
    #[arg(long, value_name = "FILE")]
    svg_cubes: Option<PathBuf>,
    /// Measure which tiles are the fastest, for these products, M,N,K[,TIER[,A[,B[,EXPERTS]]]] each (A and B: a format, or
    /// f32, f16, bf16; each row draws an expert); without any for those of the main cases.
    #[arg(long, value_name = "PRODUCT", num_args = 0.., conflicts_with_all = ["compare", "quick", "json", "svg", "svg_cubes"])]
    tune: Option<Vec<cases::Case>>,
    /// Seconds for each product of --tune.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, requires = "tune")]
    seconds: f64,
    /// The file that keeps measured tiles: --tune adds to it, everything else takes what it has for this device.
    #[arg(long, value_name = "FILE", conflicts_with = "compare")]
    cache: Option<PathBuf>,
    /// auto, cpu, gpu, a part of an adapter's name, or #0, #1, ….
    #[arg(long, default_value = "auto", conflicts_with = "compare")]
    device: DeviceChoice,
}

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn main() -> ExitCode {
    program::run(|| run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    if let Some(products) = &args.tune {
        return tune::tune(&args.device, products, args.seconds, args.cache.as_deref());
    }
    let results = match &args.compare[..] {
        [] => {
            // Before anything is measured, so that minutes of work do not end at a file that cannot be written.
            let json = args.json.as_deref().map(create).transpose()?;
            let result = bench(args)?;
            if let Some(json) = json {
                write(json, &(serde_json::to_string_pretty(&result)? + "\n"))?;
            }
            vec![result]
        }
        files => {
            let results =
                files.iter().map(|path| compare::read(path)).collect::<Result<Vec<_>>>()?;
            print!("{}", compare::tables(&results));
            results
        }
    };
    for (path, draw) in [
        (&args.svg, draw::roofline as fn(&[Value]) -> String),
        (&args.svg_cubes, draw::cubes as fn(&[Value]) -> String),
    ] {
        if let Some(path) = path {
            write(create(path)?, &draw(&results))?;
        }
    }
    Ok(())
}

fn create(path: &Path) -> Result<OutputFile> {
    OutputFile::create(path, "bench")
}

/// Writes a text that is whole when it appears.
fn write(mut output: OutputFile, text: &str) -> Result<()> {
    output.write(|out| out.write_all(text.as_bytes()))?;
    eprintln!("{}", output.finish()?);
    Ok(())
}

fn bench(args: &Args) -> Result<Value> {
    let start = Instant::now();
    let ctx =
        Context::open_blocking(&Options { device: args.device.clone(), ..Default::default() })?;
    if let Some(path) = &args.cache {
        tune::take(&ctx, path)?;
    }
    let caps = ctx.caps();
    let scale = Scale::new(args.quick, caps.software);
    println!("device: {} ({}; {})", caps.name, caps.backend, caps.driver);
    for line in &caps.lines {
        println!("  {:<26} {:<8} {}", line.name, line.state.to_string(), line.reason);
    }
    println!("clock: the {}'s", report::clock(&ctx).name());
    println!();

    let cases = cases::all(&scale);
    let bar = ProgressBar::new(cases.len() as u64 + 4);
    if !io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg} {elapsed}")?);
    bar.enable_steady_tick(Duration::from_millis(200));
    let say = |line: String| bar.suspend(|| writeln!(io::stdout(), "{line}"));

    let peaks = Peaks::measure(&ctx, &scale, |name| {
        bar.set_message(format!("peak: {name}"));
        bar.inc(1);
    })?;
    say(format!("{:<26} {}", "copy", gigabytes(peaks.copy)))?;
    for (unit, peak) in Unit::ALL.iter().zip(&peaks.units) {
        let text = match peak {
            Ok(rate) => operations(*rate),
            Err(lacks) => format!("lacking: {lacks}"),
        };
        say(format!("{:<26} {text}", unit.name()))?;
    }
    say(format!(
        "\n{:>30} {:<7} {:<24} {:>10} {:>14} {:>6} {:>12}  bound by",
        "m x n x k", "tier", "a x b", "time", "rate", "share", "bytes"
    ))?;

    let mut measured: Vec<Measured> = Vec::new();
    let mut lacking: Vec<(Case, String)> = Vec::new();
    let mut left_out: Vec<(Case, String)> = Vec::new();
    let mut group = "";
    let mut rates = measure::Rates::default();
    for case in cases {
        bar.inc(1);
        bar.set_message(case.to_string());
        if start.elapsed() > scale.limit {
            left_out.push((case, format!("{} s had passed", scale.limit.as_secs())));
            continue;
        }
        // What a device lacks is said once for each kind of product.
        if let Err(lacks) = case.kernel(&ctx) {
            lacking.push((case, lacks));
            continue;
        }
        let case = match scale.fit(&ctx, case, &mut rates)? {
            Ok(case) => case,
            Err((case, why)) => {
                left_out.push((case, why));
                continue;
            }
        };
        if measured.iter().any(|m| m.case == case) {
            continue; // Two that were made smaller have become the same.
        }
        match measure::run(&ctx, &scale, &case, &peaks)? {
            Ok(result) => {
                if group != case.group {
                    group = case.group;
                    say(group.to_string())?;
                }
                say(line(&result))?;
                measured.push(result);
            }
            Err(why) => left_out.push((case, why)),
        }
    }
    bar.finish_and_clear();
    let lacking = summed(lacking);
    for (what, why, count) in &lacking {
        println!("lacking: {what} ({count} cases): {why}");
    }
    let left_out = summed(left_out);
    for (what, why, count) in &left_out {
        println!("left out: {what} ({count} cases): {why}");
    }
    let worst = measured.iter().map(|m| m.error_of_bound).fold(0.0, f64::max);
    println!(
        "verified: {} outputs of each of {} products against f64, the largest error {:.1e} of its bound; the exact tier's \
         against the CPU engine's bits. * is what Tier::Auto takes. {:.0} s.",
        measure::SAMPLES,
        measured.len(),
        worst,
        start.elapsed().as_secs_f64()
    );

    let list = |list: &[(String, String, usize)]| -> Vec<Value> {
        list.iter().map(|(w, r, n)| json!({ "what": w, "reason": r, "cases": n })).collect()
    };
    let probe: Vec<Value> = caps
        .lines
        .iter()
        .map(|l| json!({ "name": l.name, "state": l.state.to_string(), "reason": l.reason }))
        .collect();
    Ok(json!({
        "kind": "bench",
        "version": env!("CARGO_PKG_VERSION"),
        "quick": args.quick,
        "device": caps.name,
        "driver": caps.driver,
        "backend": caps.backend,
        "software": caps.software,
        "threads": std::thread::available_parallelism().map_or(1, |n| n.get()),
        "clock": report::clock(&ctx).name(),
        "probe": probe,
        "peaks": peaks.json(),
        "verification": measure::verification(),
        "cases": measured.iter().map(|m| m.json()).collect::<Vec<_>>(),
        "lacking": list(&lacking),
        "left_out": list(&left_out),
        "seconds": start.elapsed().as_secs_f64(),
    }))
}

/// Kinds of product with a reason and how many cases it concerns, in order.
fn summed(cases: Vec<(Case, String)>) -> Vec<(String, String, usize)> {
    let mut sums: Vec<(String, String, usize)> = Vec::new();
    for (case, why) in cases {
        let what = case.kind();
        match sums.iter_mut().find(|(w, y, _)| (w, y) == (&what, &why)) {
            Some((.., count)) => *count += 1,
            None => sums.push((what, why, 1)),
        }
    }
    sums
}

fn line(m: &Measured) -> String {
    let auto = if m.auto { "*" } else { " " };
    let share = m.share.map_or("-".into(), |share| format!("{:.0}%", 100.0 * share));
    format!(
        "{:>30} {:<7} {:<24} {:>10} {:>14} {:>6} {:>12}  {}",
        m.case.shape(),
        format!("{}{auto}", m.tier),
        m.case.operands(),
        seconds(m.seconds),
        operations(m.flops / m.seconds),
        share,
        gigabytes(m.bytes as f64 / m.seconds),
        m.bound
    )
}

fn seconds(s: f64) -> String {
    match s {
        s if s < 1e-3 => format!("{:.1} µs", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}

fn gigabytes(rate: f64) -> String {
    format!("{:.1} GB/s", rate / 1e9)
}

/// The unit that a product's arithmetic runs on.
fn unit(matmul: &Matmul) -> Unit {
    match matmul.tier() {
        Tier::Tensor if matmul.bytes().is_some() => Unit::Bytes,
        Tier::Exact => Unit::Dot,
        Tier::Tensor => Unit::Matrix,
        _ => Unit::Fma,
    }
}
