//! What native routes do on this machine, as a file that its owner can send: device, versions, which route ran and why not the
//! others, the known-answer test, errors against f64, rates beside the tensor tier's, and bytes moved.

use std::path::Path;

use microscaling::native::{Accumulation, Report, RouteState};
use microscaling::{
    Axis, Context, DType, Layout, MXFP4, MXFP8_E4M3, Matmul, MatmulDesc, MxSpec, MxTensor, NVFP4,
    QuantizeDesc, Tier, report,
};
use serde_json::{Value, json};

use super::Result;
use super::output::OutputFile;

/// Operand formats that someone may ask for.
const FORMATS: [(&str, [MxSpec; 2]); 4] = [
    ("mxfp4 × mxfp4", [MXFP4; 2]),
    ("nvfp4 × nvfp4", [NVFP4; 2]),
    ("mxfp8 × mxfp8", [MXFP8_E4M3; 2]),
    ("mxfp8 × mxfp4", [MXFP8_E4M3, MXFP4]),
];

/// Sizes that are timed, m = n = k.
const SIDES: [usize; 3] = [1024, 4096, 8192];

/// Measures a device's routes, which were tested; `say` gets lines for a person.
pub fn gather(
    ctx: &Context,
    found: &Report,
    quick: bool,
    mut say: impl FnMut(String),
) -> Result<Value> {
    describe(found, &mut say);
    let products = FORMATS
        .iter()
        .map(|(name, specs)| kept("operands", json!(name), product(ctx, name, *specs, &mut say)))
        .collect::<Vec<_>>();
    let sides = if quick { &SIDES[..1] } else { &SIDES[..] };
    let rates = sides
        .iter()
        .map(|side| kept("side", json!(side), rate(ctx, *side, &mut say)))
        .collect::<Vec<_>>();
    let after = pollster::block_on(ctx.native())?;
    let traffic = after.traffic;
    say(format!(
        "  {} products: {} bytes in shared memory, {} through the host to the library, {} back; the host waited {} times; \
         {} computed anew",
        traffic.products,
        traffic.shared,
        traffic.to_library,
        traffic.from_library,
        traffic.host_waits,
        after.recomputed
    ));
    let caps = ctx.caps();
    Ok(json!({
        "crate": env!("CARGO_PKG_VERSION"),
        "device": caps.name,
        "driver": caps.driver,
        "backend": caps.backend,
        "routes": found.routes.iter().map(route).collect::<Vec<_>>(),
        "sharing": found.sharing,
        "products": products,
        "rates": rates,
        "traffic": {
            "products": traffic.products,
            "shared_bytes": traffic.shared,
            "bytes_through_host_to_library": traffic.to_library,
            "bytes_through_host_from_library": traffic.from_library,
            "host_waits": traffic.host_waits,
            "recomputed": after.recomputed,
        },
    }))
}

/// What was measured, or why it could not be: one failure does not cost the others' results.
fn kept(what: &str, of: Value, measured: Result<Value>) -> Value {
    measured.unwrap_or_else(|error| json!({ what: of, "error": error.to_string() }))
}

/// Writes what was gathered, whole or not at all.
pub fn write(folder: &Path, devices: &[Value]) -> Result<String> {
    std::fs::create_dir_all(folder)
        .map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
    let mut file = OutputFile::create(&folder.join("native.json"), "info")?;
    file.write(|out| {
        serde_json::to_writer_pretty(&mut *out, devices)?;
        out.write_all(b"\n")
    })?;
    file.finish()
}

fn describe(found: &Report, say: &mut impl FnMut(String)) {
    for line in &found.sharing {
        say(format!("  {line}"));
    }
    let mut told = Vec::new();
    for route in &found.routes {
        for (what, value) in &route.details {
            let line = format!("  {what}: {value}");
            if !told.contains(&line) {
                say(line.clone());
                told.push(line);
            }
        }
    }
    for route in &found.routes {
        let state = match &route.state {
            RouteState::Untested => "not tested".into(),
            RouteState::Passed(time) => {
                format!("known-answer test passed, in {:.0} ms", time.as_secs_f64() * 1e3)
            }
            RouteState::Disabled(reason) => format!("no: {reason}"),
        };
        say(format!("  {:<22} {state}", route.name));
    }
    if found.routes.is_empty() {
        say("  no native route is built in: --features cuda, --features hip".into());
    }
}

fn route(route: &microscaling::native::RouteReport) -> Value {
    let (state, reason, seconds) = match &route.state {
        RouteState::Untested => ("untested", None, None),
        RouteState::Passed(time) => ("passed", None, Some(time.as_secs_f64())),
        RouteState::Disabled(reason) => ("disabled", Some(reason), None),
    };
    let details: serde_json::Map<_, _> =
        route.details.iter().map(|(what, value)| (what.clone(), json!(value))).collect();
    json!({
        "name": route.name,
        "state": state,
        "reason": reason,
        "known_answer_test_seconds": seconds,
        "adds_up_in": route.accumulation.map(|bits| match bits {
            Accumulation::F32 => "f32",
            Accumulation::Fewer => "fewer bits",
        }),
        "details": details,
    })
}

/// A product by name and by choice, checked against f64.
fn product(
    ctx: &Context,
    name: &str,
    specs: [MxSpec; 2],
    say: &mut impl FnMut(String),
) -> Result<Value> {
    const M: usize = 200;
    const N: usize = 136;
    const K: usize = 1024;
    let mut state = 1u64;
    let mut normal = move || {
        let mut sum = -6.0;
        for _ in 0..12 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            sum += (state >> 40) as f32 / (1u64 << 24) as f32;
        }
        sum
    };
    let mut operand = |lines: usize, spec| {
        let x: Vec<f32> = (0..lines * K).map(|_| normal()).collect();
        MxTensor::quantize(&x, lines, K, &QuantizeDesc { spec, ..Default::default() })
    };
    let (a, b) = (operand(M, specs[0])?, operand(N, specs[1])?);
    let (on_a, on_b) = (ctx.upload_mx(&a)?, ctx.upload_mx(&b)?);
    let mut results = serde_json::Map::new();
    for tier in [Tier::Auto, Tier::Native] {
        let (a_spec, b_spec) = (specs[0].into(), specs[1].into());
        let desc =
            MatmulDesc { m: M, n: N, k: K, a: a_spec, b: b_spec, tier, ..Default::default() };
        let matmul = match Matmul::new(ctx, &desc) {
            Ok(matmul) => matmul,
            Err(error) => {
                say(format!("  {name}, {tier}: {error}"));
                results.insert(tier.to_string(), json!({ "refused": error.to_string() }));
                continue;
            }
        };
        let mut y = ctx.zeros(DType::F32, M, N)?;
        let mut stream = ctx.stream();
        matmul.record(&mut stream, &on_a, &on_b, &mut y)?;
        ctx.submit(stream)?;
        let got: Vec<f32> = bytemuck::pod_collect_to_vec(&ctx.read_blocking(&y)?);
        let mut worst = 0f64;
        for (i, j) in (0..M).flat_map(|i| (0..N).map(move |j| (i, j))) {
            let terms = (0..K).map(|k| f64::from(a.get(i, k)) * f64::from(b.get(j, k)));
            let (sum, all) = terms.fold((0.0, 0.0), |(s, t), x| (s + x, t + x.abs()));
            let error = (f64::from(got[i * N + j]) - sum).abs() / all;
            // NaN is the worst.
            if error > worst || error.is_nan() {
                worst = error;
            }
        }
        say(format!(
            "  {name}, {tier}: {} ({}); largest error {worst:.2e} of the terms' magnitudes",
            matmul.tier(),
            matmul.why()
        ));
        results.insert(
            tier.to_string(),
            json!({ "tier": matmul.tier().to_string(), "why": matmul.why(), "largest_error": worst }),
        );
    }
    results.insert("operands".into(), json!(name));
    Ok(Value::Object(results))
}

fn rate(ctx: &Context, side: usize, say: &mut impl FnMut(String)) -> Result<Value> {
    let layout = Layout::new(MXFP4, Axis::One, side, side)?;
    let codes = (0..layout.codes_len()).map(|at| (at * 37 + at / 251) as u8).collect();
    let scales = (0..layout.scales_len()).map(|at| 125 + (at * 7 % 5) as u8).collect();
    let x = ctx.upload_mx(&MxTensor::from_parts(layout, codes, scales, 1.0)?)?;
    let mut y = ctx.zeros(DType::F32, side, side)?;
    let mut results = serde_json::Map::new();
    results.insert("side".into(), json!(side));
    for tier in [Tier::Tensor, Tier::Native] {
        let desc = MatmulDesc { m: side, n: side, k: side, tier, ..Default::default() };
        let Ok(matmul) = Matmul::new(ctx, &desc) else { continue };
        const TIMES: u64 = 8;
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let time = pollster::block_on(report::time(ctx, TIMES, |stream, _| {
                matmul.record(stream, &x, &x, &mut y)
            }))?;
            best = best.min(time.as_secs_f64() / TIMES as f64);
        }
        let rate = desc.flops() / best * 1e-12;
        say(format!(
            "  mxfp4 {side}³, {tier}: {:.3} ms, {rate:.1} TFLOP/s, by the {}'s clock",
            best * 1e3,
            report::clock(ctx).name()
        ));
        results.insert(
            tier.to_string(),
            json!({ "seconds": best, "tflops": rate, "why": matmul.why(), "clock": report::clock(ctx).name() }),
        );
    }
    Ok(Value::Object(results))
}
