//! Trains a small language model in several recipes, on the same bytes in the same order, and reports the difference.
//!
//! Without options: a tiny model, arms bf16, mxfp4 and naive, on the sources that Cargo has fetched. What a run needs to go
//! on is in DIR/ARM-SEED; `--resume` goes on, and ends with the same bits as a run that was not stopped.

mod interrupt;
mod metrics;
#[path = "../shared/output.rs"]
mod output;
#[path = "../shared/program.rs"]
mod program;
mod progress;
mod report;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use microscaling::train::checkpoint::Checkpoint;
use microscaling::train::data::{Batches, BatchesDesc, Corpus, Limits, cargo_sources};
use microscaling::train::linear::Draws;
use microscaling::train::model::ModelDesc;
use microscaling::train::recipe::Recipe;
use microscaling::train::trainer::{RunDesc, Trainer};
use microscaling::train::tune::{self, Tuner};
use microscaling::{Context, DeviceChoice, Error, Options, report as report_time};

use metrics::{Metrics, Record};
use output::OutputFile;
use progress::Progress;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Train a small language model in FP4 and in 16 bits, side by side.
///
/// Losses are in nats a byte. The report is DIR/report.html, the numbers are DIR/metrics.jsonl.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Files or directories of text; by default the sources that Cargo has fetched
    #[arg(long, value_name = "PATH", num_args = 1..)]
    data: Vec<PathBuf>,
    /// Take at most so many megabytes of it
    #[arg(long, value_name = "MB", default_value_t = 512)]
    data_limit: usize,
    /// The recipes to compare, of bf16, f32, mxfp4, mxfp4-backward, mixed, nvfp4, mxfp8, naive; the first is the baseline; ""
    /// for none but those of --recipe
    #[arg(long, value_delimiter = ',', default_value = "bf16,mxfp4,naive")]
    arms: Vec<String>,
    /// Recipes from files, each an arm more; late_forward and late_backward are the shares of the steps, at the end, whose
    /// forward products, and whose dX and dW, are dense
    #[arg(long, value_name = "FILE", num_args = 1..)]
    recipe: Vec<PathBuf>,
    /// Print a preset as a file for --recipe, and leave
    #[arg(long, value_name = "NAME")]
    show_recipe: Option<String>,
    /// tiny (0.5M parameters), small (3.5M), 10m, 30m, moe (8 experts, 10.6M)
    #[arg(long, default_value = "tiny")]
    model: String,
    /// Predict so many tokens beyond the next one, by a block and a head each
    #[arg(long, default_value_t = 0)]
    mtp: usize,
    /// Sequences a step
    #[arg(long)]
    batch: Option<usize>,
    /// Tokens a sequence
    #[arg(long)]
    seq: Option<usize>,
    /// By default 300 for tiny, else 25 tokens a parameter
    #[arg(long)]
    steps: Option<u64>,
    /// The peak of the learning rate, for all arms; by default each recipe's
    #[arg(long)]
    lr: Option<f32>,
    /// The share of the steps, at the end, over which the learning rate falls, for all arms; by default each recipe's
    #[arg(long)]
    decay: Option<f32>,
    /// Train every arm with so many seeds
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 0)]
    first_seed: u64,
    /// auto, cpu, gpu, a part of an adapter's name, or #0, #1, …
    #[arg(long, default_value = "auto")]
    device: String,
    /// Where checkpoints, numbers and report go
    #[arg(long, value_name = "DIR", default_value = "runs/train")]
    out: PathBuf,
    /// Go on from the checkpoints in DIR
    #[arg(long)]
    resume: bool,
    /// Begin with the parameters of the last checkpoint in DIR, of a run of the same model in any recipe
    #[arg(long, value_name = "DIR")]
    init: Option<PathBuf>,
    /// Save and leave after so many seconds; --resume goes on
    #[arg(long, value_name = "SECONDS")]
    max_seconds: Option<u64>,
    /// Save a checkpoint when the last one is so old; at the end of a run in any case
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    save_every: u64,
    /// Train nothing: one table, and one report in --out, of these runs' metrics.jsonl
    #[arg(long, value_name = "FILE", num_args = 1..)]
    report: Vec<PathBuf>,
    /// Say where the time of a step goes, kernel by kernel, after some steps of each arm, and leave; needs a GPU with
    /// timestamps
    #[arg(long)]
    profile: bool,
    /// Choose the blocks of the arm, which is the only one: after some steps in bf16 (--steps, by default 40), the largest
    /// ones with few errors. FILE is for --recipe
    #[arg(long, value_name = "FILE")]
    tune: Option<PathBuf>,
    /// How many times the squared error of blocks of 16 a larger one may have
    #[arg(long, value_name = "FACTOR", default_value_t = tune::LOSS, requires = "tune")]
    tune_loss: f64,
    /// Batches of held-out text to measure on, at most
    #[arg(long, default_value_t = 16)]
    held_out: usize,
}

/// What all runs share.
struct Setting {
    ctx: Context,
    out: PathBuf,
    held_out: usize,
    save_every: Duration,
    until: Option<Instant>,
    interrupt: interrupt::Interrupt,
    init: Option<PathBuf>,
    header: report::Header,
}

/// Why a run ended.
#[derive(PartialEq)]
enum End {
    Done,
    Stopped,
    Diverged,
}

/// Held-out losses of a run.
const EVALUATIONS: u64 = 10;
/// Lines of numbers of a run.
const LINES: u64 = 200;
const PROMPT: &[u8] = b"\nfn main() {\n";
const WRITTEN: usize = 160;

fn main() -> ExitCode {
    program::run(run)
}

fn run() -> Result<()> {
    let args = Args::parse();
    // The CPU engine's steps are many short parallel loops: this thread takes part in them, and need not be woken after each.
    rayon::ThreadPoolBuilder::new().use_current_thread().build_global()?;
    if let Some(name) = &args.show_recipe {
        let recipe = Recipe::preset(name)?;
        // What is 0 has no line of its own.
        let Recipe { late_forward, late_backward, .. } = recipe;
        let late = format!("# late_forward = {late_forward}, late_backward = {late_backward}");
        print!("{late}\n{}", recipe.to_toml()?);
        return Ok(());
    }
    if !args.report.is_empty() {
        return report_on(&args.report, &args.out);
    }
    let presets = args.arms.iter().filter(|name| !name.is_empty());
    let mut recipes: Vec<Recipe> =
        presets.map(|name| Recipe::preset(name)).collect::<Result<_, _>>()?;
    for path in &args.recipe {
        recipes.push(Recipe::load(path)?);
    }
    if recipes.is_empty() {
        return Err("nothing to train: name presets with --arms, or give files to --recipe".into());
    }
    for recipe in &mut recipes {
        let optimizer = &mut recipe.optimizer;
        optimizer.lr = args.lr.unwrap_or(optimizer.lr);
        optimizer.decay = args.decay.unwrap_or(optimizer.decay);
        recipe.validate()?;
    }
    if let Some(twice) =
        (1..recipes.len()).find(|i| recipes[..*i].iter().any(|r| r.name == recipes[*i].name))
    {
        return Err(format!(
            "two arms are called {:?}; give one another name",
            recipes[twice].name
        )
        .into());
    }
    let Some(mut model) = ModelDesc::preset(&args.model) else {
        return Err(
            format!("no model {:?}; there are tiny, small, 10m, 30m, moe", args.model).into()
        );
    };
    model.mtp = args.mtp;
    model.batch = args.batch.unwrap_or(model.batch);
    model.seq = args.seq.unwrap_or(model.seq);
    model.validate()?;
    let steps = args.steps.unwrap_or_else(|| match args.model.as_str() {
        _ if args.tune.is_some() => 40,
        "tiny" => 300,
        _ => (25 * model.parameters()).div_ceil(model.tokens()) as u64,
    });

    let limits = Limits { bytes: args.data_limit << 20, ..Default::default() };
    let paths = if args.data.is_empty() { cargo_sources()? } else { args.data.clone() };
    let corpus = Arc::new(Corpus::from_paths(&paths, &limits)?);
    let device: DeviceChoice = args.device.parse()?;
    let ctx = Context::open_blocking(&Options { device, ..Default::default() })?;
    let batches = |seed| {
        let desc = BatchesDesc {
            seed,
            batch: model.batch,
            seq: model.seq,
            extra: model.mtp,
            ..Default::default()
        };
        Batches::new(corpus.clone(), &desc)
    };
    let first = batches(0)?;
    let unigram = first.unigram_entropy();
    let facts = [
        ("device", ctx.caps().name.clone()),
        (
            "model",
            format!(
                "{}: {} parameters, {} blocks of {} columns, {} heads, {} in the feed-forward part{}",
                args.model,
                model.parameters(),
                model.layers,
                model.dim,
                model.heads,
                model.ffn,
                if model.mtp > 0 {
                    format!(", {} more tokens predicted", model.mtp)
                } else {
                    String::new()
                }
            ),
        ),
        (
            "text",
            format!(
                "{corpus}; {} bytes to train on, {:.2} times",
                first.unique_bytes(),
                first.epoch(steps)
            ),
        ),
        ("batch", format!("{} sequences of {} bytes, {steps} steps", model.batch, model.seq)),
        (
            "unigram entropy",
            format!("{unigram:.4} nats a byte: what the frequencies of bytes alone give"),
        ),
        ("command", std::env::args().skip(1).fold("train".into(), |all, arg| all + " " + &arg)),
    ];
    for (name, value) in &facts {
        println!("{name:16} {value}");
    }
    if first.epoch(steps) > 1.0 {
        println!(
            "note: the text is seen more than once; losses on it are then lower than on new text"
        );
    }
    // Neither has a run to save: what interrupts them ends them.
    if let Some(path) = &args.tune {
        if args.tune_loss.is_nan() || args.tune_loss < 1.0 {
            return Err(format!("--tune-loss {}: at least 1", args.tune_loss).into());
        }
        let [recipe] = &recipes[..] else {
            return Err("--tune takes one arm: --arms mxfp4, or another".into());
        };
        return tune(&ctx, &model, recipe, steps, &first, args.tune_loss, path);
    }
    if args.profile {
        report_time::can_profile(&ctx)?;
        for recipe in &recipes {
            profile(&ctx, &model, recipe, &first)?;
        }
        return Ok(());
    }
    let header = report::Header {
        title: format!("Training in {} recipes", recipes.len()),
        facts: facts.into_iter().map(|(name, value)| (name.into(), value)).collect(),
        baseline: recipes[0].name.clone(),
    };
    std::fs::create_dir_all(&args.out)
        .map_err(|error| format!("{}: {error}", args.out.display()))?;
    let setting = Setting {
        ctx,
        out: args.out.clone(),
        held_out: args.held_out,
        save_every: Duration::from_secs(args.save_every),
        until: args.max_seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds)),
        interrupt: interrupt::Interrupt::listen()?,
        init: args.init.clone(),
        header,
    };
    let seeds = args.first_seed..args.first_seed.saturating_add(args.seeds);
    let directory = |name: &str, seed: u64| args.out.join(format!("{name}-{seed}"));
    // The step that each run goes on from.
    let mut at = HashMap::new();
    for recipe in &recipes {
        for seed in seeds.clone() {
            let directory = directory(&recipe.name, seed);
            let mut step = None;
            if !args.resume && directory.exists() {
                // A run that begins anew has nothing to do with what lies there. All of them at once: after a kill nobody
                // could tell an old checkpoint from one of this start.
                std::fs::remove_dir_all(&directory)
                    .map_err(|error| format!("{}: {error}", directory.display()))?;
            } else if let Some(found) = Checkpoint::load_latest(&directory)? {
                if let Some(passed) = found.passed_over {
                    eprintln!("note: {passed}; going on from the checkpoint before");
                }
                step = Some(found.checkpoint.value::<u64>("step")?);
            }
            at.insert((recipe.name.clone(), seed), step);
        }
    }
    // Of runs that are not asked for this time, what was measured stays as their checkpoints do.
    let others = args.resume.then_some(u64::MAX);
    let last = |arm: &str, seed: u64| at.get(&(arm.into(), seed)).copied().unwrap_or(others);
    let mut metrics = Metrics::open(&args.out.join("metrics.jsonl"), last)?;
    let progress = Progress::new(steps);
    let width = recipes.iter().map(|r| r.name.len()).max().unwrap_or(0) + 2;
    let mut stopped = false;
    let mut diverged = Vec::new();
    // Seeds in the outer loop: what is stopped early has all arms of the first ones.
    'runs: for seed in seeds.clone() {
        let batches = batches(seed)?;
        for recipe in &recipes {
            let run = RunDesc {
                model: model.clone(),
                recipe: recipe.clone(),
                seed,
                steps,
                data: format!("{:016x} of {} bytes", corpus.fingerprint(), corpus.bytes().len()),
            };
            let directory = directory(&recipe.name, seed);
            let checkpoint = Checkpoint::load_latest(&directory)?.map(|found| found.checkpoint);
            let end = train(
                &setting,
                &run,
                &batches,
                checkpoint,
                &directory,
                &mut metrics,
                &progress,
                width,
            )?;
            report::write(&args.out.join("report.html"), &setting.header, metrics.records())?;
            match end {
                End::Done => {}
                // The others are worth their time all the same.
                End::Diverged => diverged.push(format!("{} (seed {seed})", recipe.name)),
                End::Stopped => {
                    stopped = true;
                    break 'runs;
                }
            }
        }
    }
    println!("\n{}", report::table(metrics.records(), &setting.header.baseline));
    println!("report: {}", args.out.join("report.html").display());
    if stopped {
        println!("stopped; --resume with the same options goes on");
    }
    match diverged.is_empty() {
        true => Ok(()),
        false => Err(format!("diverged: {}", diverged.join(", ")).into()),
    }
}

/// One table and one report of what several runs measured; the first arm is the baseline.
fn report_on(files: &[PathBuf], out: &Path) -> Result<()> {
    let mut records = Vec::new();
    for file in files {
        records.extend(metrics::read(file)?);
    }
    let Some(baseline) = records.first().map(|record| record.arm.clone()) else {
        return Err("--report: these files hold no lines".into());
    };
    let names: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
    let header = report::Header {
        title: "Runs side by side".into(),
        facts: vec![("files".into(), names.join(", "))],
        baseline,
    };
    std::fs::create_dir_all(out).map_err(|error| format!("{}: {error}", out.display()))?;
    let path = out.join("report.html");
    report::write(&path, &header, &records)?;
    println!("{}\nreport: {}", report::table(&records, &header.baseline), path.display());
    Ok(())
}

/// Steps at the end of a run in bf16 whose tensors are measured.
const SAMPLES: u64 = 3;

/// Writes the recipe with the largest blocks that lose little, and prints what each would lose.
fn tune(
    ctx: &Context,
    model: &ModelDesc,
    recipe: &Recipe,
    steps: u64,
    batches: &Batches,
    loss: f64,
    path: &Path,
) -> Result<()> {
    // Before the work, so that a path that cannot be written is known at once; not kept, since a signal would leave it.
    drop(OutputFile::create(path, "train")?);
    let mut dense = Recipe::preset("bf16")?;
    dense.optimizer = recipe.optimizer.clone();
    let run = RunDesc { model: model.clone(), recipe: dense, seed: 0, steps, data: String::new() };
    let mut trainer = Trainer::new(ctx, &run)?;
    let mut tuner = Tuner::new(recipe)?;
    trainer.model.keep_operands()?;
    for step in 0..steps {
        trainer.train(&batches.batch(step), false)?;
        if step + SAMPLES >= steps {
            let draws = Draws { seed: 0, step: step as u32 + 1 };
            pollster::block_on(tuner.sample(ctx, &trainer.model, draws))?;
        }
    }
    println!(
        "\nrelative mean squared error of the operands of {}, after {steps} steps in bf16;\n\
         * the largest block within {loss} times the error of 16\n\n{}",
        recipe.name,
        tuner.table(loss)
    );
    let toml = tuner.recipe(loss)?.to_toml()?;
    let mut output = OutputFile::create(path, "train")?;
    output.write(|out| out.write_all(toml.as_bytes()))?;
    println!("\n{}", output.finish()?);
    Ok(())
}

/// Prints where the time of a step goes.
fn profile(ctx: &Context, model: &ModelDesc, recipe: &Recipe, batches: &Batches) -> Result<()> {
    let run = RunDesc {
        model: model.clone(),
        recipe: recipe.clone(),
        seed: 0,
        // Enough that what is measured lies before a dense end.
        steps: 1000,
        data: String::new(),
    };
    let mut trainer = Trainer::new(ctx, &run)?;
    // Pipelines, then the clock of a device that was idle.
    for step in 0..20 {
        trainer.train(&batches.batch(step), false)?;
    }
    ctx.wait_blocking()?;
    let start = Instant::now();
    for step in 20..30 {
        trainer.train(&batches.batch(step), false)?;
    }
    ctx.wait_blocking()?;
    let whole = start.elapsed().as_secs_f64() / 10.0;
    let tokens = batches.batch(30);
    let start = Instant::now();
    let mut stream = ctx.stream();
    trainer.record(&mut stream, &tokens, false)?;
    ctx.submit(stream)?;
    let recording = start.elapsed().as_secs_f64();
    let kernels = pollster::block_on(report_time::profile(ctx, |stream| {
        trainer.record(stream, &tokens, false)
    }))?;
    let sum: f64 = kernels.iter().map(|(_, _, time)| time.as_secs_f64()).sum();
    println!(
        "\n{}: a step takes {:.2} ms, {:.0} tokens/s; its kernels {:.2} ms, recording it {:.2} ms",
        recipe.name,
        whole * 1e3,
        model.tokens() as f64 / whole,
        sum * 1e3,
        recording * 1e3
    );
    for (name, times, time) in kernels.iter().take(40) {
        let time = time.as_secs_f64();
        println!("{:8.3} ms {:5.1} % {times:5} × {name}", time * 1e3, 100.0 * time / sum);
    }
    Ok(())
}

/// Trains one arm with one seed, to the end or until it is stopped.
#[allow(clippy::too_many_arguments)]
fn train(
    setting: &Setting,
    desc: &RunDesc,
    batches: &Batches,
    checkpoint: Option<Checkpoint>,
    directory: &Path,
    metrics: &mut Metrics,
    progress: &Progress,
    width: usize,
) -> Result<End> {
    let Setting { ctx, interrupt, .. } = setting;
    let name = format!("{} {}", desc.recipe.name, desc.seed);
    let steps = desc.steps;
    let mut trainer = Trainer::new(ctx, desc)?;
    if let Some(checkpoint) = checkpoint {
        trainer.restore(checkpoint).map_err(|error| format!("{}: {error}", directory.display()))?;
    } else if let Some(from) = &setting.init {
        let Some(found) = Checkpoint::load_latest(from)? else {
            return Err(format!("--init {}: no checkpoint there", from.display()).into());
        };
        trainer
            .begin_with(found.checkpoint)
            .map_err(|error| format!("--init {}: {error}", from.display()))?;
    }
    let mut bar = progress.add(&name, width, trainer.step())?;
    let tokens = desc.model.tokens() as u64;
    let evaluations = setting.held_out.min(batches.held_out_batches());
    let every = steps.div_ceil(LINES).max(1);
    let evaluate_every = steps.div_ceil(EVALUATIONS).max(1);
    let mut saved = Instant::now();
    let mut since = Instant::now();
    let mut from = trainer.step();
    let save = |trainer: &Trainer| -> Result<()> {
        let checkpoint = pollster::block_on(trainer.checkpoint())?;
        Ok(checkpoint.save_latest(directory)?)
    };
    while trainer.step() < steps {
        let step = trainer.step();
        let due = (step + 1) % every == 0 || step + 1 == steps;
        let lr = trainer.learning_rate(step);
        trainer.train(&batches.batch(step), due)?;
        let step = trainer.step();
        let expired = setting.until.is_some_and(|until| Instant::now() > until);
        let stop = interrupt.requested() || expired;
        let evaluate = step % evaluate_every == 0 || step == steps;
        // Only here is anything read, so that a run that was stopped reads, and adapts the loss scale, after the same steps.
        if due || evaluate {
            let mut record = Record {
                arm: desc.recipe.name.clone(),
                seed: desc.seed,
                step,
                tokens: step * tokens,
                lr: Some(lr.into()),
                ..Default::default()
            };
            let status = match pollster::block_on(trainer.status()) {
                Err(error @ Error::Diverged { .. }) => {
                    metrics.write(Record { loss: Some(f64::NAN), ..record })?;
                    bar.finish(&error.to_string());
                    return Ok(End::Diverged);
                }
                status => status?,
            };
            let took = since.elapsed();
            let rate = (step - from) as f64 * tokens as f64 / took.as_secs_f64();
            record.loss = Some(status.loss);
            record.grad_norm = Some(status.norm);
            record.tokens_per_second = Some(rate);
            record.peak_memory = memory(ctx);
            if due {
                let [x, dy] = pollster::block_on(trainer.shares())?;
                for (what, shares) in [("activations", x), ("gradients", dy)] {
                    for (kind, share) in [
                        ("clipped", shares.clipped),
                        ("underflowed", shares.underflowed),
                        ("non-finite blocks", shares.nonfinite),
                    ] {
                        record.counters.insert(format!("{what} {kind}"), share);
                    }
                }
                record.counters.insert("log2 of the loss scale".into(), status.exponent.into());
            }
            if evaluate {
                let held_out = (0..evaluations).map(|i| batches.held_out(i));
                let loss = pollster::block_on(trainer.evaluate(held_out))?;
                record.heldout = Some(loss);
            }
            bar.update(step, status.loss, record.heldout, rate, took);
            if step == steps {
                let text = pollster::block_on(trainer.generate(PROMPT, WRITTEN, 0.8))?;
                record.text =
                    Some(String::from_utf8_lossy(&[PROMPT, &text[..]].concat()).into_owned());
            }
            metrics.write(record)?;
            if evaluate {
                report::write(
                    &setting.out.join("report.html"),
                    &setting.header,
                    metrics.records(),
                )?;
            }
            if step == steps || saved.elapsed() >= setting.save_every {
                save(&trainer)?;
                saved = Instant::now();
            }
            (since, from) = (Instant::now(), step);
        }
        if stop && step < steps {
            save(&trainer)?;
            bar.finish(&format!("stopped after step {step}, saved"));
            return Ok(End::Stopped);
        }
    }
    bar.finish("done");
    Ok(match interrupt.requested() {
        true => End::Stopped,
        false => End::Done,
    })
}

/// What the device has allocated, where that is known; on the CPU engine the most that the process held.
fn memory(ctx: &Context) -> Option<f64> {
    match ctx.wgpu() {
        Some((device, _)) => {
            device.generate_allocator_report().map(|report| report.total_reserved_bytes as f64)
        }
        None => {
            let status = std::fs::read_to_string("/proc/self/status").ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
            Some(line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()? * 1024.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use microscaling::train::recipe::PRESETS;

    #[test]
    fn the_help_names_every_preset() {
        let help = <Args as clap::CommandFactory>::command().render_help().to_string();
        for name in PRESETS {
            assert!(help.contains(name), "{name}");
        }
    }
}
