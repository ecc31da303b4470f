//! A stand-in: renders a report from made-up metrics.

mod interrupt;
mod metrics;
#[path = "../shared/output.rs"]
mod output;
mod progress;
mod report;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use microscaling::train::data::{Batches, BatchesDesc, Corpus, Limits, cargo_sources};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn main() {
    if let Err(error) = run() {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    let dir = std::env::args().nth(1).unwrap_or("/tmp/w/report".into());
    let slow = std::env::args().nth(2).is_some();
    let dir = Path::new(&dir);
    std::fs::create_dir_all(dir)?;
    let start = Instant::now();
    let limits = Limits { bytes: 64 << 20, ..Default::default() };
    let corpus = Arc::new(Corpus::from_paths(&cargo_sources()?, &limits)?);
    println!("{corpus}, fingerprint {:016x}, {:?}", corpus.fingerprint(), start.elapsed());
    let batches = Batches::new(corpus.clone(), &BatchesDesc::default())?;
    let start = Instant::now();
    let words: usize = (0..100).map(|step| batches.batch(step).len()).sum();
    println!(
        "{} unique bytes, {} held-out batches, unigram {:.4}, epoch(1000) = {:.3}, {:?} for {words} tokens",
        batches.unique_bytes(),
        batches.held_out_batches(),
        batches.unigram_entropy(),
        batches.epoch(1000),
        start.elapsed()
    );
    let interrupt = interrupt::Interrupt::listen()?;
    let path = dir.join("metrics.jsonl");
    let mut metrics = metrics::Metrics::open(&path, |_, _| None)?;
    let progress = progress::Progress::new(2000);
    let arms = [
        ("mxfp4", 0.008, 71e3),
        ("mxfp4-naive", 0.031, 84e3),
        ("bf16", 0.0, 102e3),
        ("mixed <b>", 0.003, 88e3),
    ];
    'all: for (k, (arm, gap, rate)) in arms.into_iter().enumerate() {
        for seed in 0..3u64 {
            let mut run = progress.add(&format!("{arm} {seed}"), 14, 0)?;
            for step in 1..=2000u64 {
                let noise = |salt: u64| {
                    let words = microscaling::rng::threefry4x32::<13>(
                        [step as u32, k as u32, seed as u32, salt as u32],
                        [7; 4],
                    );
                    words.iter().map(|w| *w as f64 / 4294967296.0 - 0.5).sum::<f64>()
                };
                let x = step as f64 / 2000.0;
                let loss = (1.15 + 4.4 * (-60.0 * x).exp() + 0.9 * (-4.0 * x).exp())
                    * (1.0 + gap * (0.4 + x) + 0.0006 * seed as f64);
                let mut record = metrics::Record {
                    arm: arm.into(),
                    seed,
                    step,
                    tokens: step * 16384,
                    loss: Some(loss + 0.05 * noise(0)),
                    lr: Some(
                        6e-4 * (step as f64 / 100.0).min(1.0) * (0.55 + 0.45 * (3.14159 * x).cos()),
                    ),
                    grad_norm: Some(0.4 + 2.0 / (1.0 + 30.0 * x) + 0.1 * noise(1)),
                    tokens_per_second: Some(rate * (1.0 + 0.02 * noise(2))),
                    peak_memory: Some(1.87e9 + 1e8 * k as f64),
                    ..Default::default()
                };
                if arm != "bf16" {
                    record.counters = [
                        (
                            "clipped".to_string(),
                            0.002 * (1.0 + 0.2 * noise(3)) * (1.0 + gap * 20.0),
                        ),
                        ("underflowed".to_string(), 0.11 + 0.03 * x + 0.004 * noise(4)),
                        ("non-finite".to_string(), 0.0),
                        ("loss scale".to_string(), 65536.0 / if x > 0.5 { 2.0 } else { 1.0 }),
                    ]
                    .into();
                }
                if step % 100 == 0 {
                    record.heldout = Some(loss * 1.01 + 0.002 * noise(5));
                    run.held_out(loss);
                }
                if step == 2000 {
                    record.text = Some(
                        format!(
                            "fn main() {{\n    let x: Vec<u8> = \"<{arm}>\";\n\0// the & end\n}}\n"
                        )
                        .repeat(3),
                    );
                }
                if arm == "mxfp4-naive" && seed == 2 && step > 1500 {
                    record.loss = Some(f64::NAN);
                    record.heldout = record.heldout.map(|_| f64::NAN);
                }
                run.update(step, loss, rate, Duration::from_millis(3));
                if slow {
                    std::thread::sleep(Duration::from_millis(3));
                }
                metrics.write(record)?;
                if interrupt.requested() {
                    run.finish("interrupted");
                    break 'all;
                }
            }
            run.finish("done");
            progress.say(&format!("{arm} {seed}: saved"));
        }
    }
    let header = report::Header {
        title: "microscaling: training in FP4".into(),
        facts: [
            ("device", "NVIDIA H100 80GB HBM3 (Vulkan; NVIDIA 570.86.15)"),
            ("model", "30m: 8 layers, 512 wide, 8 heads, 25.2 M parameters"),
            ("data", &corpus.to_string()),
            ("command", "cargo run --release --example train -- --arms bf16,mxfp4,mxfp4-naive,mixed --model 30m --steps 2000 --seeds 3"),
        ].map(|(a, b)| (a.to_string(), b.to_string())).into(),
        baseline: "bf16".into(),
    };
    report::write(&dir.join("report.html"), &header, metrics.records())?;
    print!("{}", report::table(metrics.records(), "bf16"));
    Ok(())
}
