//! What this machine offers: every adapter and the CPU engine, capability by capability, each with its reason.
//!
//! `cargo run --release --example info [-- --json] [-- --selftest]`
//! `cargo run --release --features cuda --example info -- --native --evidence DIR`

#[path = "shared/evidence.rs"]
mod evidence;
#[path = "shared/output.rs"]
mod output;
#[path = "shared/program.rs"]
mod program;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use microscaling::engine::{self, caps::Caps};
use microscaling::{Context, Options, selftest};
use serde_json::json;

/// Show what the adapters of this machine offer, and whether they keep the crate's promise.
#[derive(Parser)]
struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Run every kernel on fixed inputs on every device, print a digest each, and compare them with the CPU engine's.
    #[arg(long)]
    selftest: bool,
    /// Only devices whose name contains this ("cpu" for the CPU engine).
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Open the native routes of every GPU, run their known-answer tests and products on them, and measure.
    #[arg(long)]
    native: bool,
    /// Write what --native found to native.json in this folder: a file to send.
    #[arg(long, value_name = "DIR", requires = "native")]
    evidence: Option<PathBuf>,
    /// Measure --native's small sizes only.
    #[arg(long, requires = "native")]
    quick: bool,
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    program::run(|| run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let wanted = |name: &str| {
        args.device.as_ref().is_none_or(|d| name.to_lowercase().contains(&d.to_lowercase()))
    };
    let adapters: Vec<_> = pollster::block_on(engine::adapters(false))
        .into_iter()
        .filter(|adapter| wanted(&adapter.get_info().name))
        .collect();
    let mut devices: Vec<(Caps, Option<wgpu::Adapter>)> =
        adapters.into_iter().map(|adapter| (Caps::probe(&adapter), Some(adapter))).collect();
    if wanted("cpu") {
        devices.push((Caps::cpu(), None));
    }
    if devices.is_empty() {
        return Err(format!(
            "no device matches {:?}; run without --device to list them",
            args.device.as_deref().unwrap_or("")
        )
        .into());
    }
    let reference = if args.selftest {
        pollster::block_on(selftest::run(&Context::cpu(), |_, _, _| ()))?
    } else {
        Vec::new()
    };
    let mut report = Vec::new();
    let mut natives = Vec::new();
    let mut failed = Vec::new();
    for (caps, adapter) in &devices {
        let (mut caps, mut native) = (caps.clone(), None);
        if let (true, Some(adapter)) = (args.native, adapter) {
            // Also products that are too small to be worth it.
            let options = Options { native_from: Some(0), ..Default::default() };
            let ctx = pollster::block_on(Context::on_adapter(adapter, &options))?;
            let found = pollster::block_on(ctx.test_native())?;
            caps = caps.with_native(&found);
            native = Some((ctx, found));
        }
        let caps = &caps;
        if !args.json {
            print_caps(caps);
        }
        let mut result = caps_json(caps);
        if args.selftest {
            let digests = selftest_on(adapter.as_ref(), args.json)?;
            let wrong = digests.iter().zip(&reference).filter(|(got, want)| got != want).count();
            if !args.json {
                for (got, want) in digests.iter().zip(&reference) {
                    let verdict = if got == want { "" } else { "  DIFFERS from the CPU engine" };
                    println!("  {:016x}  {}{verdict}", got.digest, got.name);
                }
                println!(
                    "  {}\n",
                    if wrong == 0 {
                        format!("all {} digests equal the CPU engine's", digests.len())
                    } else {
                        format!("{wrong} of {} digests DIFFER from the CPU engine's", digests.len())
                    }
                );
            }
            if wrong > 0 {
                failed.push(caps.name.clone());
            }
            let digests: serde_json::Map<_, _> = digests
                .into_iter()
                .map(|d| (d.name, json!(format!("{:016x}", d.digest))))
                .collect();
            result["selftest"] = json!({ "different": wrong, "digests": digests });
        }
        if let Some((ctx, found)) = &native {
            let gathered = evidence::gather(ctx, found, args.quick, |line| {
                if !args.json {
                    println!("{line}");
                }
            })?;
            if !args.json {
                println!();
            }
            result["native"] = gathered.clone();
            natives.push(gathered);
        }
        report.push(result);
    }
    if let Some(folder) = &args.evidence {
        eprintln!("{}", evidence::write(folder, &natives)?);
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    }
    if failed.is_empty() {
        return Ok(());
    }
    Err(format!("the self-test failed on {}: please report this output", failed.join(", ")).into())
}

fn print_caps(caps: &Caps) {
    let kind = if caps.backend != "Cpu" && caps.software { ", software" } else { "" };
    println!("{} ({}{kind}; {})", caps.name, caps.backend, caps.driver);
    for line in &caps.lines {
        println!("  {:<26} {:<8} {}", line.name, line.state, line.reason);
    }
    println!();
}

fn caps_json(caps: &Caps) -> serde_json::Value {
    let lines: Vec<_> = caps
        .lines
        .iter()
        .map(|l| json!({ "name": l.name, "state": l.state.to_string(), "reason": l.reason }))
        .collect();
    json!({
        "name": caps.name, "backend": caps.backend, "driver": caps.driver, "software": caps.software,
        "capabilities": lines,
    })
}

fn selftest_on(
    adapter: Option<&wgpu::Adapter>,
    quiet: bool,
) -> std::result::Result<Vec<selftest::Digest>, microscaling::Error> {
    let ctx = match adapter {
        None => Context::cpu(),
        Some(adapter) => pollster::block_on(Context::on_adapter(adapter, &Options::default()))?,
    };
    let bar = indicatif::ProgressBar::new(0);
    if quiet {
        bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    let digests = pollster::block_on(selftest::run(&ctx, |name, done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        bar.set_message(name.to_string());
    }))?;
    bar.finish_and_clear();
    std::io::stdout().flush().ok();
    Ok(digests)
}
