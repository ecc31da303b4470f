//! Measuring which tiles are the fastest.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use microscaling::kernels::Values;
use microscaling::{
    Context, DType, DeviceChoice, Error, MXFP4, Matmul, MxSpec, Options, Tier, Tuning,
};

use crate::cases::Case;
use crate::measure::operations;
use crate::{Result, seconds};

/// As the command line names it.
impl FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Case, String> {
        let parts: Vec<&str> = text.split(',').collect();
        let size = |at: usize| -> Result<usize, String> {
            let part = parts.get(at).ok_or("M,N,K[,TIER[,A[,B[,EXPERTS]]]]")?;
            part.parse().map_err(|error| format!("{part:?}: {error}"))
        };
        let values = |at: usize| -> Result<Values, String> {
            let name = *parts.get(at).unwrap_or(&"mxfp4");
            match DType::ALL.into_iter().find(|dtype| dtype.name() == name) {
                Some(dtype) => Ok(Values::Dense(dtype)),
                None => Ok(Values::Mx(MxSpec::by_name(name).map_err(|error| error.to_string())?)),
            }
        };
        let tier: Tier =
            parts.get(3).unwrap_or(&"auto").parse().map_err(|error: Error| error.to_string())?;
        if parts.len() > 7 {
            return Err("more than M,N,K,TIER,A,B,EXPERTS".into());
        }
        let experts = if parts.len() > 6 { Some(size(6)?) } else { None };
        Ok(case([size(0)?, size(1)?, size(2)?], [values(4)?, values(5)?], tier, experts))
    }
}

fn case([m, n, k]: [usize; 3], [a, b]: [Values; 2], tier: Tier, experts: Option<usize>) -> Case {
    Case { group: "tuned", m, n, k, a, b, tier, experts, shrinks: false }
}

/// Decoding, prompts and training, as far as a device has memory and time for them.
fn usual(software: bool) -> Vec<Case> {
    let sizes: &[[usize; 3]] = if software {
        &[[1, 1024, 1024], [256, 256, 256]]
    } else {
        &[
            [1, 4096, 14336],
            [1, 16384, 16384],
            [8, 4096, 14336],
            [8, 16384, 16384],
            [16, 16384, 16384],
            [64, 4096, 14336],
            [512, 4096, 14336],
            [1024, 1024, 1024],
            [2048, 2048, 2048],
            [4096, 4096, 4096],
            [8192, 8192, 8192],
        ]
    };
    let tiers = |m| if m == 1 { vec![Tier::Exact] } else { vec![Tier::Exact, Tier::Tensor] };
    let mxfp4 = [Values::Mx(MXFP4); 2];
    sizes
        .iter()
        .flat_map(|size| tiers(size[0]).into_iter().map(move |tier| case(*size, mxfp4, tier, None)))
        .collect()
}

/// Makes products take the tiles of a file.
pub fn take(ctx: &Context, path: &Path) -> Result<()> {
    let tuned = ctx.use_tuning(&Tuning::read(path)?);
    for refused in &tuned.refused {
        eprintln!("{}: {refused}", path.display());
    }
    let other = match tuned.others {
        0 => String::new(),
        n => format!("; {n} of other devices, drivers or versions"),
    };
    eprintln!("{}: tiles for {} products{other}", path.display(), tuned.used);
    Ok(())
}

pub fn tune(
    device: &DeviceChoice,
    products: &[Case],
    limit: f64,
    cache: Option<&Path>,
) -> Result<()> {
    let ctx = Context::open_blocking(&Options { device: device.clone(), ..Default::default() })?;
    let caps = ctx.caps();
    println!("device: {} ({}; {})", caps.name, caps.backend, caps.driver);
    // What other runs measured stays.
    let mut tuning = match cache.map(Tuning::read) {
        Some(Err(Error::Io { source, .. })) if source.kind() == io::ErrorKind::NotFound => {
            Tuning::default()
        }
        Some(read) => read?,
        None => Tuning::default(),
    };
    let products = match products {
        [] => usual(caps.software),
        products => products.to_vec(),
    };
    let limit = Duration::try_from_secs_f64(limit)?;
    let mut wrong = 0;
    for product in &products {
        let desc = product.desc();
        let matmul = match Matmul::new(&ctx, &desc) {
            Ok(matmul) => matmul,
            Err(error @ Error::Unsupported { .. }) => {
                println!("{product}: lacking: {error}");
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let bar = ProgressBar::new(0);
        if !io::stderr().is_terminal() {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg} {elapsed}")?);
        bar.enable_steady_tick(Duration::from_millis(200));
        let list = pollster::block_on(tuning.measure(&ctx, &desc, limit, |tried, count| {
            bar.set_length(count as u64);
            bar.set_message(format!("{product}: {}", tried.tile));
            bar.inc(1);
        }))?;
        bar.finish_and_clear();
        let usual = matmul.tile(&ctx);
        println!("{product} -> {}", matmul.tier());
        for candidate in &list {
            let mark = if usual.as_ref() == Some(&candidate.tile) { "usual" } else { "" };
            let line = match &candidate.seconds {
                Ok(s) => {
                    format!("{:>12} {:>16}  {mark}", seconds(*s), operations(desc.flops() / s))
                }
                Err(problem) => {
                    wrong += u32::from(problem.contains("WRONG"));
                    format!("  {problem}  {mark}")
                }
            };
            writeln!(io::stdout(), "  {:<28} {line}", candidate.tile)?;
        }
        if let Some(path) = cache {
            tuning.write(path)?;
        }
    }
    if let Some(path) = cache {
        println!("wrote {}", path.display());
    }
    if wrong > 0 {
        return Err(format!("{wrong} tiles gave wrong results; they are not kept").into());
    }
    Ok(())
}
