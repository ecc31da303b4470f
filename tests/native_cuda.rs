//! Native routes through CUDA. Two suites in one: stand-ins for NVIDIA's libraries (tests/standins), compiled here, on every
//! software adapter; and the real ones on every NVIDIA device. What cannot run here shows as ignored.
//!
//! `MX_TEST_GPU` as in tests/kernels.rs. `MX_TEST_NATIVE=require` fails where no NVIDIA device answers.

mod common;
#[path = "common/standin.rs"]
mod standin;

use std::path::Path;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use microscaling::native::{Libraries, Report, RouteState};
use microscaling::{
    Axis, Context, DType, Error, Layout, MXFP4, MXFP6_E2M3, MXFP8_E4M3, MXINT8, Matmul, MatmulDesc,
    MxSpec, MxTensor, NVFP4, Options, QuantizeDesc, Tensor, Tier, engine, engine::caps::State,
};
use standin::{Standin, folder, standin};

type Test = fn(&wgpu::Adapter) -> Result<(), Failed>;

/// On software adapters, with stand-ins.
const STANDINS: &[(&str, Test)] = &[
    ("absent_libraries_are_reasons", absent_libraries),
    ("old_and_incomplete_libraries_are_reasons", incomplete_libraries),
    ("two_devices_of_which_one_matches", two_devices),
    ("the_heuristic_decides", heuristic_decides),
    ("descriptors_are_what_the_library_documents", descriptors),
    ("fp8_end_to_end", fp8),
    ("nvfp4_and_mxfp8_end_to_end", block_scaled),
    ("cudnn_mxfp4_end_to_end", cudnn),
    ("cudnn_declines_with_a_reason", cudnn_declines),
    ("operands_go_through_the_host_where_memory_is_not_shared", copies),
    ("what_a_format_does_not_hold_is_computed_anew", recomputed),
    ("a_wrong_route_is_disabled", planted),
    ("a_failure_in_the_middle_goes_to_the_next_tier", failure),
    ("a_failing_queue_is_a_lost_device", lost_queue),
    ("recordings_into_a_host_encoder_are_declined", host_encoder),
    ("two_recordings_at_once", interleaved),
    ("a_stream_of_another_context_is_declined", foreign_stream),
    ("a_disabled_route_takes_nothing_more", disabled_meanwhile),
    ("out_of_memory_is_one_products_loss", out_of_memory),
    ("a_code_that_is_wrong_disables", wrong_codes),
    ("a_dropped_context_leaves_nothing", nothing_left),
    ("plans_are_forgotten_when_there_are_many", many_shapes),
];

/// On NVIDIA devices, with NVIDIA's libraries.
const REAL: &[(&str, Test)] = &[
    ("fp4_is_run_or_refused_with_a_reason", real_refusal),
    ("memory_and_order_are_shared", real_sharing),
    ("fp8_against_f64", real_fp8),
    ("fp8_epilogues", real_epilogues),
    ("many_products_in_a_row", real_row),
    ("fp8_beside_the_tensor_tier", real_rate),
];

fn main() {
    let args = Arguments::from_args();
    let mode = std::env::var("MX_TEST_GPU").unwrap_or_else(|_| "auto".into());
    let adapters =
        if mode == "off" { Vec::new() } else { pollster::block_on(engine::adapters(false)) };
    assert!(
        mode != "require" || !adapters.is_empty(),
        "MX_TEST_GPU=require, but no adapter answers"
    );
    let nvidia = |adapter: &wgpu::Adapter| {
        let info = adapter.get_info();
        info.vendor == 0x10de && info.backend == wgpu::Backend::Vulkan
    };
    let native = std::env::var("MX_TEST_NATIVE").is_ok_and(|mode| mode == "require");
    assert!(!native || adapters.iter().any(nvidia), "MX_TEST_NATIVE=require, but no NVIDIA device");
    let mut trials = vec![Trial::test("every_guess_is_within_the_bound_of_fp8", guesses)];
    for (suite, what, wanted) in
        [(STANDINS, "software adapter", false), (REAL, "NVIDIA device", true)]
    {
        for (name, test) in suite {
            let fitting: Vec<_> = adapters
                .iter()
                .filter(|adapter| match wanted {
                    true => nvidia(adapter),
                    false => adapter.get_info().device_type == wgpu::DeviceType::Cpu,
                })
                .collect();
            if fitting.is_empty() {
                let name = format!("[no {what}] {name}");
                trials.push(Trial::test(name, || Ok(())).with_ignored_flag(true));
            }
            for adapter in fitting {
                let (adapter, test) = (adapter.clone(), *test);
                let info = adapter.get_info();
                let label = format!("{:?} {} {name}", info.backend, info.name);
                trials.push(Trial::test(label, move || test(&adapter)));
            }
        }
    }
    libtest_mimic::run(&args, trials).exit();
}

// ---- Stand-ins -----------------------------------------------------------------------------------------------------

fn open(adapter: &wgpu::Adapter, cuda: &Path, cublaslt: &Path) -> Result<Context, Failed> {
    let libraries = Libraries {
        cuda: Some(cuda.into()),
        cublaslt: Some(cublaslt.into()),
        cudnn: Some("".into()),
        nvrtc: Some("".into()),
        ..Default::default()
    };
    let options = Options { libraries, native_from: Some(0), ..Default::default() };
    Ok(pollster::block_on(Context::on_adapter(adapter, &options))?)
}

/// Both stand-ins, the driver with the adapter's UUID and without some functions, and the context on them.
fn opened(
    adapter: &wgpu::Adapter,
    without: &[&str],
) -> Result<(Context, Standin, Standin), Failed> {
    let (cuda, lt) = (standin("cuda", without).identify(adapter), standin("cublaslt", &[]));
    let ctx = open(adapter, &cuda.path, &lt.path)?;
    Ok((ctx, cuda, lt))
}

fn report(ctx: &Context) -> Result<Report, Failed> {
    Ok(pollster::block_on(ctx.native())?)
}

/// Why a route is disabled.
fn reason(report: &Report, route: &str) -> Result<String, Failed> {
    match report.routes.iter().find(|r| r.name == route).map(|r| &r.state) {
        Some(RouteState::Disabled(reason)) => Ok(reason.clone()),
        other => Err(format!("{route} is {other:?}").into()),
    }
}

// ---- Products ------------------------------------------------------------------------------------------------------

/// Random operands, [m, k] and [n, k].
fn operands([m, n, k]: [usize; 3], specs: [MxSpec; 2], seed: u64) -> Result<[MxTensor; 2], Failed> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let mut make = |lines: usize, spec| {
        let x: Vec<f32> =
            (0..lines * k).map(|_| uniform() + uniform() + uniform() + uniform()).collect();
        MxTensor::quantize(&x, lines, k, &QuantizeDesc { spec, ..Default::default() })
    };
    Ok([make(m, specs[0])?, make(n, specs[1])?])
}

fn desc(operands: &[MxTensor; 2], tier: Tier) -> MatmulDesc {
    let [a, b] = operands.each_ref().map(|x| *x.layout());
    MatmulDesc {
        m: a.rows,
        n: b.rows,
        k: a.cols,
        a: a.spec.into(),
        b: b.spec.into(),
        tier,
        ..Default::default()
    }
}

/// The product into a tensor full of NaN.
fn multiply(ctx: &Context, desc: &MatmulDesc, operands: &[MxTensor; 2]) -> Result<Vec<f32>, Error> {
    let matmul = Matmul::new(ctx, desc)?;
    let [a, b] = [ctx.upload_mx(&operands[0])?, ctx.upload_mx(&operands[1])?];
    let mut y = ctx.upload(DType::F32, desc.m, desc.n, &vec![0xff; desc.m * desc.n * 4])?;
    let mut stream = ctx.stream();
    matmul.record(&mut stream, &a, &b, &mut y)?;
    ctx.submit(stream)?;
    Ok(bytemuck::pod_collect_to_vec(&ctx.read_blocking(&y)?))
}

/// Each output, and the sum of its terms' magnitudes, in f64.
fn reference(operands: &[MxTensor; 2]) -> Vec<(f64, f64)> {
    let dense = operands.each_ref().map(|x| {
        let Layout { rows, cols, .. } = *x.layout();
        (0..rows * cols).map(|at| f64::from(x.get(at / cols, at % cols))).collect::<Vec<_>>()
    });
    let k = operands[0].layout().cols;
    let mut out = Vec::new();
    for a in dense[0].chunks_exact(k) {
        for b in dense[1].chunks_exact(k) {
            let terms = a.iter().zip(b).map(|(a, b)| a * b);
            out.push(terms.fold((0.0, 0.0), |(sum, abs), t| (sum + t, abs + t.abs())));
        }
    }
    out
}

/// Checks y = sums within `relative` of the terms' magnitudes, and returns the worst quotient.
fn check(got: &[f32], want: &[(f64, f64)], relative: f64) -> Result<f64, Failed> {
    let bounds: Vec<_> =
        want.iter().map(|(want, abs)| (*want, (relative * abs).max(1e-37))).collect();
    Ok(relative * within(got, &bounds)?)
}

/// Checks that y is within the bounds of what is wanted, and returns the largest share of a bound.
fn within(got: &[f32], want: &[(f64, f64)]) -> Result<f64, Failed> {
    assert_eq!(got.len(), want.len());
    let mut worst = 0f64;
    for (at, (got, (want, bound))) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*got) - want).abs();
        // Not true of NaN.
        if error <= *bound {
            worst = worst.max(if error == 0.0 { 0.0 } else { error / bound });
        } else {
            return Err(format!("output {at}: {got}, expected {want} within {bound:e}").into());
        }
    }
    Ok(worst)
}

/// The stand-in sums in f64 and rounds once; the epilogue's power of two is exact.
const ROUNDED: f64 = 1.0 / (1u64 << 24) as f64;

/// What the other tiers make of it.
const TENSOR: f64 = 512.0 * ROUNDED;

fn says(error: &Error, words: &[&str]) -> Result<(), Failed> {
    let text = error.to_string();
    match words.iter().find(|word| !text.contains(**word)) {
        None => Ok(()),
        Some(word) => Err(format!("{text:?} does not say {word:?}").into()),
    }
}

/// The product is right in the tier that Auto takes, and Tier::Native says `words`.
fn falls_back(ctx: &Context, words: &[&str]) -> Result<(), Failed> {
    declines(ctx, words)?;
    let operands = operands([40, 24, 96], [MXFP4; 2], 3)?;
    check(&multiply(ctx, &desc(&operands, Tier::Auto), &operands)?, &reference(&operands), TENSOR)?;
    Ok(())
}

/// Auto takes another tier, and Tier::Native says `words`.
fn declines(ctx: &Context, words: &[&str]) -> Result<(), Failed> {
    let auto = MatmulDesc { m: 40, n: 24, k: 96, ..Default::default() };
    let matmul = Matmul::new(ctx, &auto)?;
    assert_ne!(matmul.tier(), Tier::Native);
    assert!(matmul.why().contains("no native route"), "{}", matmul.why());
    let error = Matmul::new(ctx, &MatmulDesc { tier: Tier::Native, ..auto }).unwrap_err();
    says(&error, words)
}

// ---- The suite on stand-ins ----------------------------------------------------------------------------------------

fn absent_libraries(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let nowhere = Path::new("/nonexistent/libcuda.so.1");
    falls_back(
        &open(adapter, nowhere, nowhere)?,
        &["/nonexistent/libcuda.so.1", "cublaslt-nvfp4"],
    )?;
    declines(&open(adapter, Path::new(""), nowhere)?, &["switched off"])?;
    // A file that is no library.
    let text = folder().join("not-a-library.so");
    std::fs::write(&text, "text")?;
    declines(&open(adapter, &text, &text)?, &["not-a-library.so"])?;
    let cuda = standin("cuda", &[]).identify(adapter);
    declines(
        &open(adapter, &cuda.path, Path::new("/nonexistent/libcublasLt.so"))?,
        &["/nonexistent/libcublasLt.so"],
    )
}

fn incomplete_libraries(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let lt = standin("cublaslt", &[]);
    let lacking = standin("cuda", &["cuMemcpyHtoDAsync_v2"]);
    falls_back(
        &open(adapter, &lacking.path, &lt.path)?,
        &["has no function cuMemcpyHtoDAsync_v2"],
    )?;
    let cuda = standin("cuda", &[]).identify(adapter);
    cuda.set(2, 11000);
    declines(&open(adapter, &cuda.path, &lt.path)?, &["CUDA 11.0", "11.2"])?;
    cuda.set(2, 13000);
    cuda.set(4, 700);
    declines(&open(adapter, &cuda.path, &lt.path)?, &["cuInit: CUDA_ERROR_ILLEGAL_ADDRESS (700)"])?;
    cuda.set(4, 35);
    declines(&open(adapter, &cuda.path, &lt.path)?, &["cuInit: CUDA error 35"])?;
    cuda.set(4, 0);
    let old = standin("cublaslt", &[]);
    old.set(2, 110_000);
    declines(&open(adapter, &cuda.path, &old.path)?, &["is cuBLASLt 110000"])?;
    let lacks = standin("cublaslt", &["cublasLtCreate"]);
    declines(&open(adapter, &cuda.path, &lacks.path)?, &["has no function cublasLtCreate"])
}

fn two_devices(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let (cuda, lt) = (standin("cuda", &[]), standin("cublaslt", &[]));
    declines(&open(adapter, &cuda.path, &lt.path)?, &["none of CUDA's 2 devices"])?;
    let cuda = cuda.identify(adapter);
    let ctx = open(adapter, &cuda.path, &lt.path)?;
    let report = report(&ctx)?;
    let details = &report.routes[0].details;
    assert!(details.iter().any(|(_, value)| value == "Stand-in 101"), "{details:?}");
    let log = cuda.log();
    assert!(log.contains("cuDevicePrimaryCtxRetain 101") && !log.contains("Retain 100"), "{log}");
    // The probe's lines: before anything is asked, and after.
    let caps = ctx.caps();
    let line = caps.get("native-cuda").ok_or("no line")?;
    assert!(line.state != State::Yes && line.reason.contains("libcuda"), "{line:?}");
    let caps = caps.with_native(&report);
    let line = caps.get("native-cuda").ok_or("no line")?;
    assert_eq!(line.state, State::Yes);
    assert!(line.reason.contains("cublaslt-nvfp4, cublaslt-mxfp8, cublaslt-fp8: open"), "{line:?}");
    Ok(())
}

fn heuristic_decides(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let (ctx, _cuda, lt) = opened(adapter, &[])?;
    lt.set(0, 0);
    falls_back(
        &ctx,
        &["cublaslt-nvfp4: cublasLtMatmulAlgoGetHeuristic: CUBLAS_STATUS_NOT_SUPPORTED"],
    )?;
    // It is asked anew for another shape, in another context.
    let (ctx, cuda, lt) = opened(adapter, &[])?;
    lt.set(0, 1);
    let operands = operands([40, 24, 96], [MXFP4; 2], 3)?;
    let matmul = Matmul::new(&ctx, &desc(&operands, Tier::Native))?;
    assert_eq!(matmul.tier(), Tier::Native);
    assert!(matmul.why().contains("cublaslt-fp8"), "{}", matmul.why());
    // FP8 adds up in fewer bits: only by name.
    let auto = Matmul::new(&ctx, &desc(&operands, Tier::Auto))?;
    assert_ne!(auto.tier(), Tier::Native);
    assert!(auto.why().contains("only by name"), "{}", auto.why());
    // A small product is not worth handing over.
    let libraries = Libraries {
        cuda: Some(cuda.path.clone()),
        cublaslt: Some(lt.path.clone()),
        ..Default::default()
    };
    let options = Options { libraries, ..Default::default() };
    let careful = pollster::block_on(Context::on_adapter(adapter, &options))?;
    lt.set(0, 4);
    let small = Matmul::new(&careful, &desc(&operands, Tier::Auto))?;
    assert!(
        small.tier() != Tier::Native && small.why().contains("is below 68719476736"),
        "{}",
        small.why()
    );
    // Nor is one for which the host waits: stand-ins share no semaphore.
    let large = MatmulDesc { m: 4096, n: 4096, k: 4096, ..desc(&operands, Tier::Auto) };
    let large = Matmul::new(&careful, &large)?;
    assert!(
        large.tier() != Tier::Native && large.why().contains("only by name"),
        "{}",
        large.why()
    );
    assert_eq!(Matmul::new(&careful, &desc(&operands, Tier::Native))?.tier(), Tier::Native);
    lt.set(0, 1);
    // Formats and shapes that no route takes.
    for (desc, word) in [
        (
            MatmulDesc { a: MXINT8.into(), ..desc(&operands, Tier::Native) },
            "does not hold the elements",
        ),
        (MatmulDesc { a: DType::F16.into(), ..desc(&operands, Tier::Native) }, "A is f16"),
        (MatmulDesc { batch: 2, ..desc(&operands, Tier::Native) }, "batched"),
        (MatmulDesc { k: 0, ..desc(&operands, Tier::Native) }, "k = 0"),
        // 2⁶⁴ bytes of sums.
        (
            MatmulDesc { m: (1 << 31) - 1, n: (1 << 31) - 1, ..desc(&operands, Tier::Native) },
            "the sums have 18446744073709551615 bytes",
        ),
    ] {
        says(&Matmul::new(&ctx, &desc).unwrap_err(), &[word])?;
    }
    let cpu = Matmul::new(&Context::cpu(), &desc(&operands, Tier::Native)).unwrap_err();
    says(&cpu, &["native tier", "CPU"])
}

fn descriptors(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let (ctx, cuda, lt) = opened(adapter, &[])?;
    let operands = operands([50, 70, 100], [MXFP4; 2], 4)?;
    lt.set(0, 1);
    multiply(&ctx, &desc(&operands, Tier::Native), &operands)?;
    let log = lt.log();
    // cuBLASLt's A is our B, and everything is padded: n to 80, m to 64, k to 128.
    for line in [
        "desc compute 68 scale 0",
        "attribute 3 size 4",
        "attribute 4 size 4",
        "attribute 25 size 1",
        "layout type 28 128x80 ld 128",
        "layout type 28 128x64 ld 128",
        "layout type 0 80x64 ld 80",
        "preference 1 size 8 value 33554432",
    ] {
        assert!(log.lines().any(|found| found == line), "{line} is missing in\n{log}");
    }
    assert!(log.contains("alpha 1 beta 0 stream 0x2000"), "{log}");
    let (ctx, _cuda, lt) = opened(adapter, &[])?;
    multiply(&ctx, &desc(&operands, Tier::Native), &operands)?;
    let nvfp4 = lt.log();
    for line in [
        "attribute 31 size 4",
        "attribute 32 size 4",
        "attribute 17 size 8",
        "attribute 18 size 8",
        "layout type 33 128x80 ld 128",
    ] {
        assert!(nvfp4.lines().any(|found| found == line), "{line} is missing in\n{nvfp4}");
    }
    assert!(nvfp4.contains("modes: [1, 1]") && !nvfp4.contains("attribute 25"), "{nvfp4}");
    let memory = cuda.log();
    for line in memory.lines().filter(|line| line.starts_with("cuImportExternalMemory")) {
        assert!(line.contains("kind 1 ") && line.ends_with("reserved 0"), "{line}");
    }
    Ok(())
}

/// Formats and shapes through a route: right, on the route, and with what the library should have been told.
fn end_to_end(
    adapter: &wgpu::Adapter,
    mode: u64,
    route: &str,
    formats: &[[MxSpec; 2]],
) -> Result<(), Failed> {
    let (ctx, _cuda, lt) = opened(adapter, &[])?;
    lt.set(0, mode);
    let mut products = 0;
    for (i, formats) in formats.iter().enumerate() {
        for shape in [[17, 9, 64], [40, 24, 96], [130, 70, 203]] {
            let operands = operands(shape, *formats, 5 + i as u64)?;
            let desc = desc(&operands, Tier::Native);
            let matmul = Matmul::new(&ctx, &desc)?;
            assert!(matmul.why().contains(route), "{}", matmul.why());
            let got = multiply(&ctx, &desc, &operands)?;
            check(&got, &reference(&operands), ROUNDED)
                .map_err(|error| format!("{formats:?} {shape:?}: {error:?}"))?;
            products += 1;
        }
    }
    let report = report(&ctx)?;
    let found = report.routes.iter().find(|found| found.name == route).ok_or("no such route")?;
    assert!(matches!(found.state, RouteState::Passed(_)), "{found:?}");
    // Each pair's known-answer test has seven.
    assert_eq!(report.traffic.products, products + 7 * formats.len() as u64);
    assert_eq!(report.recomputed, 0);
    Ok(())
}

fn fp8(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let formats = [
        [MXFP4; 2],
        [MXFP4, MXFP6_E2M3],
        [
            MXFP4.with_block(microscaling::Block::Vector(16)),
            MXFP4.with_block(microscaling::Block::Square(32)),
        ],
    ];
    end_to_end(adapter, 1, "cublaslt-fp8", &formats)
}

fn block_scaled(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let wide = MXFP4.with_block(microscaling::Block::Vector(128));
    let formats = [[MXFP4; 2], [NVFP4; 2], [wide, NVFP4]];
    end_to_end(adapter, 4, "cublaslt-nvfp4", &formats)?;
    end_to_end(adapter, 2, "cublaslt-mxfp8", &[[MXFP8_E4M3; 2]])
}

/// The version of cuDNN's stand-in.
const CUDNN: u64 = 91_500;

/// As [`opened`], with cuDNN's stand-in and without cuBLASLt's.
fn opened_cudnn(
    adapter: &wgpu::Adapter,
    without: &[&str],
    settings: [u64; 2],
) -> Result<(Context, Standin, Standin), Failed> {
    let (cuda, dnn) = (standin("cuda", &[]).identify(adapter), standin("cudnn", without));
    dnn.set(0, settings[0]);
    dnn.set(1, settings[1]);
    let libraries = Libraries {
        cuda: Some(cuda.path.clone()),
        cudnn: Some(dnn.path.clone()),
        cublaslt: Some("".into()),
        nvrtc: Some("".into()),
        ..Default::default()
    };
    let options = Options { libraries, native_from: Some(0), ..Default::default() };
    Ok((pollster::block_on(Context::on_adapter(adapter, &options))?, cuda, dnn))
}

fn cudnn(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    // With the first engine, and with the second where the first makes no plan.
    for (mode, engine) in [(1, 0), (1 | 2, 1)] {
        let (ctx, _cuda, dnn) = opened_cudnn(adapter, &[], [mode, CUDNN])?;
        let wide = MXFP4.with_block(microscaling::Block::Vector(64));
        for (shape, specs) in [
            ([50, 70, 100], [MXFP4; 2]),
            ([130, 9, 203], [MXFP4; 2]),
            ([17, 40, 64], [wide, MXFP4]),
        ] {
            let operands = operands(shape, specs, 13)?;
            let auto = desc(&operands, Tier::Auto);
            let matmul = Matmul::new(&ctx, &auto)?;
            assert!(matmul.why().contains("cudnn-mxfp4"), "{}", matmul.why());
            check(&multiply(&ctx, &auto, &operands)?, &reference(&operands), ROUNDED)
                .map_err(|error| format!("{shape:?}: {error:?}"))?;
        }
        let log = dnn.log();
        assert!(!log.contains("refused"), "{log}");
        assert!(log.contains("stream 0x2000 of 0x7000"), "{log}");
        assert!(log.contains(&format!("product by engine {engine} with tensors [1, 2, 3, 4, 7]")));
        // m is padded to 64, n to 80, k to 128; scales to 128 lines and four groups.
        for line in [
            "set 17 901 type 1 [16]",
            "set 17 902 type 3 [1, 64, 128]",
            "set 17 903 type 3 [8192, 128, 1]",
            "set 17 902 type 3 [1, 128, 80]",
            "set 17 903 type 3 [10240, 1, 128]",
            "set 17 901 type 1 [15]",
            "set 17 902 type 3 [1, 128, 4]",
            "set 17 903 type 3 [512, 4, 1]",
            "set 17 902 type 3 [1, 4, 128]",
            "set 17 903 type 3 [512, 1, 4]",
            "set 17 909 type 20 [3]",
            "set 17 907 type 2 [1]",
            "set 37 2604 type 23 [1, 32]",
            "set 37 2604 type 23 [32, 1]",
            "set 37 2603 type 1 [0]",
            "set 18 1500 type 1 [0]",
            "set 15 801 type 15 count 3",
            "set 4 200 type 8 [3]",
        ] {
            assert!(log.lines().any(|found| found == line), "{line} is missing in\n{log}");
        }
        let report = report(&ctx)?;
        let route = report.routes.iter().find(|route| route.name == "cudnn-mxfp4");
        let route = route.ok_or("no such route")?;
        assert!(matches!(route.state, RouteState::Passed(_)), "{route:?}");
        assert!(
            route.details.iter().any(|(what, value)| what == "cuDNN" && value.contains("91500"))
        );
        // NVFP4 has another route.
        let error = Matmul::new(
            &ctx,
            &MatmulDesc {
                a: NVFP4.into(),
                ..MatmulDesc { tier: Tier::Native, ..Default::default() }
            },
        );
        assert!(error.is_err());
    }
    Ok(())
}

fn cudnn_declines(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    for (without, mode, words) in [
        (&[][..], 1, "is cuDNN 90600, 90700 is the oldest"),
        (&["cudnnBackendCreateDescriptor"], 1, "has no function cudnnBackendCreateDescriptor"),
        (&[], 0, "cudnn-mxfp4: cuDNN's heuristic offers no engine"),
        (&[], 1 | 4, "wants 1099511627776 bytes of scratch memory"),
        (&[], 1 | 32, "cudnnBackendFinalize: CUDNN_STATUS_NOT_SUPPORTED (3000) for the graph"),
        (&[], 1 | 16, "cudnn-mxfp4: known-answer test"),
        (&[], 1 | 8, "cudnnBackendExecute: CUDNN_STATUS_EXECUTION_FAILED (5000)"),
    ] {
        let version = if words.contains("oldest") { 90_600 } else { CUDNN };
        let (ctx, _cuda, _dnn) = opened_cudnn(adapter, without, [mode, version])?;
        declines(&ctx, &[words])?;
    }
    Ok(())
}

fn copies(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let operands = operands([40, 24, 96], [MXFP4; 2], 6)?;
    let desc = desc(&operands, Tier::Native);
    let want = reference(&operands);
    // Shared, if the driver can: nothing goes through the host but waiting.
    let (ctx, cuda, _lt) = opened(adapter, &[])?;
    check(&multiply(&ctx, &desc, &operands)?, &want, ROUNDED)?;
    let shared = report(&ctx)?;
    let exports = adapter.features().contains(wgpu::Features::VULKAN_EXTERNAL_MEMORY_FD);
    eprintln!("{}: {:?}", adapter.get_info().name, shared.sharing);
    if exports {
        assert_eq!([shared.traffic.to_library, shared.traffic.from_library], [0; 2]);
        assert!(shared.traffic.shared > 0 && shared.traffic.host_waits > 0);
        assert!(!cuda.log().contains("cuMemcpy"));
    }
    // The driver lacks the functions, refuses the import, or the device was opened without.
    let (ctx, _cuda, _lt) = opened(adapter, &["cuImportExternalMemory"])?;
    let (refused, cuda, _lt2) = opened(adapter, &[])?;
    cuda.set(5, 801);
    let (cuda, lt) = (standin("cuda", &[]).identify(adapter), standin("cublaslt", &[]));
    let libraries = Libraries {
        cuda: Some(cuda.path.clone()),
        cublaslt: Some(lt.path.clone()),
        ..Default::default()
    };
    let without = wgpu::Features::VULKAN_EXTERNAL_MEMORY_FD;
    let options = Options { libraries, without, ..Default::default() };
    let without = pollster::block_on(Context::on_adapter(adapter, &options))?;
    for (ctx, word) in [
        (ctx, "has no function cuImportExternalMemory"),
        (refused, "cuImportExternalMemory: CUDA error 801"),
        (without, "opened without VK_KHR_external_memory_fd"),
    ] {
        check(&multiply(&ctx, &desc, &operands)?, &want, ROUNDED)?;
        let report = report(&ctx)?;
        if exports {
            assert!(report.sharing.iter().any(|line| line.contains(word)), "{:?}", report.sharing);
        }
        assert!(report.traffic.to_library > 0 && report.traffic.from_library > 0);
        assert_eq!(report.traffic.shared, 0);
    }
    Ok(())
}

/// An operand whose scales span more than any window.
fn wide_operands() -> Result<[MxTensor; 2], Failed> {
    let [a, b] = operands([40, 24, 96], [MXFP4; 2], 7)?;
    let layout = *a.layout();
    let (codes, mut scales, scale) = a.into_parts();
    scales[4] = 100;
    scales[5] = 127;
    Ok([MxTensor::from_parts(layout, codes, scales, scale)?, b])
}

fn recomputed(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let operands = wide_operands()?;
    let want = reference(&operands);
    for mode in [1, 4] {
        let (ctx, _cuda, lt) = opened(adapter, &[])?;
        lt.set(0, mode);
        let desc = desc(&operands, Tier::Native);
        check(&multiply(&ctx, &desc, &operands)?, &want, TENSOR)?;
        let first = report(&ctx)?;
        assert_eq!(first.recomputed, 1, "mode {mode}");
        // With beta, y must be read once: by the tier that computes.
        let half = MatmulDesc { beta: 0.5, ..desc };
        let matmul = Matmul::new(&ctx, &half)?;
        let [a, b] = [ctx.upload_mx(&operands[0])?, ctx.upload_mx(&operands[1])?];
        let ones = vec![1f32; half.m * half.n];
        let mut y = ctx.upload(DType::F32, half.m, half.n, bytemuck::cast_slice(&ones))?;
        let mut stream = ctx.stream();
        matmul.record(&mut stream, &a, &b, &mut y)?;
        ctx.submit(stream)?;
        let got: Vec<f32> = bytemuck::pod_collect_to_vec(&ctx.read_blocking(&y)?);
        let want: Vec<_> = want.iter().map(|(sum, abs)| (sum + 0.5, abs + 0.5)).collect();
        check(&got, &want, TENSOR)?;
        // A block of zeros may have any scale.
        let [a, b] = &operands;
        let (mut codes, scales, scale) = a.clone().into_parts();
        let line = a.layout().line_bytes();
        codes[line + 16..line + 32].fill(0x80);
        let zeros = [MxTensor::from_parts(*a.layout(), codes, scales, scale)?, b.clone()];
        check(&multiply(&ctx, &desc, &zeros)?, &reference(&zeros), ROUNDED)?;
        assert_eq!(report(&ctx)?.recomputed, 2, "mode {mode}");
    }
    Ok(())
}

fn planted(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    // Sums that are wrong in one place, and scales in another order than documented.
    for mode in [4 | 16, 4 | 8, 2 | 8] {
        let (ctx, _cuda, lt) = opened(adapter, &[])?;
        lt.set(0, mode);
        let specs = if mode & 2 != 0 { [MXFP8_E4M3; 2] } else { [MXFP4; 2] };
        let operands = operands([40, 24, 96], specs, 8)?;
        let auto = desc(&operands, Tier::Auto);
        assert_ne!(Matmul::new(&ctx, &auto)?.tier(), Tier::Native);
        check(&multiply(&ctx, &auto, &operands)?, &reference(&operands), TENSOR)?;
        let error = Matmul::new(&ctx, &MatmulDesc { tier: Tier::Native, ..auto }).unwrap_err();
        says(&error, &["known-answer test", "the answer"])?;
    }
    Ok(())
}

fn failure(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let (ctx, _cuda, lt) = opened(adapter, &[])?;
    lt.set(0, 4);
    let operands = operands([40, 24, 96], [MXFP4; 2], 9)?;
    let want = reference(&operands);
    let auto = desc(&operands, Tier::Auto);
    let matmul = Matmul::new(&ctx, &auto)?;
    assert_eq!(matmul.tier(), Tier::Native, "{}", matmul.why());
    let named = Matmul::new(&ctx, &MatmulDesc { tier: Tier::Native, ..auto })?;
    let [a, b] = [ctx.upload_mx(&operands[0])?, ctx.upload_mx(&operands[1])?];
    let run = |matmul: &Matmul| -> Result<Vec<f32>, Error> {
        let mut y = ctx.upload(DType::F32, auto.m, auto.n, &vec![0xff; auto.m * auto.n * 4])?;
        let mut stream = ctx.stream();
        matmul.record(&mut stream, &a, &b, &mut y)?;
        ctx.submit(stream)?;
        Ok(bytemuck::pod_collect_to_vec(&ctx.read_blocking(&y)?))
    };
    check(&run(&matmul)?, &want, ROUNDED)?;
    lt.set(1, 0);
    // The product that was begun ends in the next tier, and by name it is an error.
    check(&run(&matmul)?, &want, TENSOR)?;
    says(&run(&named).unwrap_err(), &["cublasLtMatmul: cuBLAS status 13"])?;
    // From then on the route is not chosen.
    assert_ne!(Matmul::new(&ctx, &auto)?.tier(), Tier::Native);
    assert!(reason(&report(&ctx)?, "cublaslt-nvfp4")?.contains("status 13"));
    Ok(())
}

fn lost_queue(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let (ctx, cuda, lt) = opened(adapter, &[])?;
    lt.set(0, 4);
    let operands = operands([40, 24, 96], [MXFP4; 2], 9)?;
    let native = desc(&operands, Tier::Native);
    multiply(&ctx, &native, &operands)?;
    cuda.set(3, 700);
    let error = multiply(&ctx, &native, &operands).unwrap_err();
    says(&error, &["CUDA_ERROR_ILLEGAL_ADDRESS"])?;
    // Nothing of wgpu's waited for it: other tiers go on, and no route of that driver's is chosen again.
    let auto = desc(&operands, Tier::Auto);
    assert_ne!(Matmul::new(&ctx, &auto)?.tier(), Tier::Native);
    check(&multiply(&ctx, &auto, &operands)?, &reference(&operands), TENSOR)?;
    assert!(reason(&report(&ctx)?, "cublaslt-fp8")?.contains("ILLEGAL_ADDRESS"));
    // A queue that fails in the known-answer test disables the routes, not the device.
    let (ctx, cuda, _lt) = opened(adapter, &[])?;
    cuda.set(3, 700);
    assert_ne!(Matmul::new(&ctx, &auto)?.tier(), Tier::Native);
    check(&multiply(&ctx, &auto, &operands)?, &reference(&operands), TENSOR)?;
    Ok(())
}

/// A product recorded for another context of the same adapter.
fn foreign_stream(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let ((ctx, _cuda, lt), (other, _cuda2, lt2)) = (opened(adapter, &[])?, opened(adapter, &[])?);
    lt.set(0, 4);
    lt2.set(0, 4);
    let operands = operands([40, 24, 96], [MXFP4; 2], 16)?;
    for tier in [Tier::Auto, Tier::Native] {
        let matmul = Matmul::new(&ctx, &desc(&operands, tier))?;
        assert_eq!(matmul.tier(), Tier::Native);
        let [a, b] = [other.upload_mx(&operands[0])?, other.upload_mx(&operands[1])?];
        let mut y = other.zeros(DType::F32, 40, 24)?;
        let mut stream = other.stream();
        let recorded = matmul.record(&mut stream, &a, &b, &mut y);
        if tier == Tier::Native {
            says(&recorded.unwrap_err(), &["another device"])?;
            continue;
        }
        recorded?;
        other.submit(stream)?;
        let got: Vec<f32> = bytemuck::pod_collect_to_vec(&other.read_blocking(&y)?);
        check(&got, &reference(&operands), TENSOR)?;
    }
    Ok(())
}

/// What was chosen before its route failed declines after.
fn disabled_meanwhile(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let (ctx, _cuda, lt) = opened(adapter, &[])?;
    lt.set(0, 4);
    let operands = operands([40, 24, 96], [MXFP4; 2], 17)?;
    let [first, second] = [
        Matmul::new(&ctx, &desc(&operands, Tier::Native))?,
        Matmul::new(&ctx, &desc(&operands, Tier::Native))?,
    ];
    let [a, b] = [ctx.upload_mx(&operands[0])?, ctx.upload_mx(&operands[1])?];
    let mut y = ctx.zeros(DType::F32, 40, 24)?;
    lt.set(1, 0);
    says(&first.record(&mut ctx.stream(), &a, &b, &mut y).unwrap_err(), &["status 13"])?;
    let calls = lt.log().len();
    says(&second.record(&mut ctx.stream(), &a, &b, &mut y).unwrap_err(), &["status 13"])?;
    assert_eq!(lt.log().len(), calls);
    Ok(())
}

/// Memory that the driver does not give is one product's loss.
fn out_of_memory(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let (ctx, cuda, lt) = opened(adapter, &[])?;
    lt.set(0, 4);
    let small = operands([40, 24, 96], [MXFP4; 2], 18)?;
    check(&multiply(&ctx, &desc(&small, Tier::Auto), &small)?, &reference(&small), ROUNDED)?;
    let before = report(&ctx)?;
    cuda.set(5, 2);
    cuda.set(6, 2);
    let large = operands([320, 200, 96], [MXFP4; 2], 18)?;
    check(&multiply(&ctx, &desc(&large, Tier::Auto), &large)?, &reference(&large), TENSOR)?;
    let error = multiply(&ctx, &desc(&large, Tier::Native), &large).unwrap_err();
    says(&error, &["CUDA error 2"])?;
    cuda.set(5, 0);
    cuda.set(6, 0);
    check(&multiply(&ctx, &desc(&large, Tier::Native), &large)?, &reference(&large), ROUNDED)?;
    assert_eq!(report(&ctx)?.sharing, before.sharing);
    Ok(())
}

/// One code that the library takes for another number: of E2M1, of E4M3, and of E4M3 as E2M1 becomes it. Scales as well: those
/// of NVFP4 are E4M3.
fn wrong_codes(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    for (mode, spec, wrong) in [
        (4, MXFP4, 33 * 256 + 0x7),
        (4, NVFP4, 33 * 256 + 0xd),
        (2, MXFP8_E4M3, 28 * 256 + 0xfe),
        // 6 · 2^6, and 0.5 · 2^6.
        (1, MXFP4, 28 * 256 + 0x7c),
        (1, MXFP4, 28 * 256 + 0x60),
    ] {
        let (ctx, _cuda, lt) = opened(adapter, &[])?;
        lt.set(0, mode);
        lt.set(3, wrong + 1);
        let native = desc(&operands([40, 24, 96], [spec; 2], 19)?, Tier::Native);
        let error = Matmul::new(&ctx, &native).unwrap_err();
        says(&error, &[&format!("known-answer test of {spec} × {spec}: output")])
            .map_err(|error| format!("{wrong:#x}: {error:?}"))?;
    }
    Ok(())
}

/// What a context makes with the libraries it destroys, whatever became of it, and the driver's context last.
fn nothing_left(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let operands = operands([40, 24, 96], [MXFP4; 2], 20)?;
    let (auto, want) = (desc(&operands, Tier::Auto), reference(&operands));
    // cuBLASLt's mode, the settings of the driver, of cuBLASLt: a product in memory that is shared or copied; refused; wrong;
    // failing; no workspace; a queue that fails; another version.
    for (mode, driver, library) in [
        (4, None, None),
        (4, Some((5, 801)), None),
        (0, None, None),
        (4 | 16, None, None),
        (4 | 32, None, None),
        (4, Some((6, 2)), None),
        (4, Some((3, 700)), None),
        (4, None, Some((2, 110_000))),
    ] {
        let (cuda, lt) = (standin("cuda", &[]).identify(adapter), standin("cublaslt", &[]));
        lt.set(0, mode);
        driver.inspect(|(key, value)| cuda.set(*key, *value));
        library.inspect(|(key, value)| lt.set(*key, *value));
        let ctx = open(adapter, &cuda.path, &lt.path)?;
        check(&multiply(&ctx, &auto, &operands)?, &want, TENSOR)?;
        // A driver that no route came of is gone already.
        let opened = !matches!((driver, library), (Some((6, _)), _) | (_, Some(_)));
        assert_eq!(cuda.left().contains("context 0x65"), opened, "{}", cuda.left());
        drop(ctx);
        assert_eq!(cuda.left() + &lt.left(), "", "{mode} {driver:?} {library:?}");
    }
    for mode in [1, 0, 1 | 4, 1 | 8, 1 | 16] {
        let (ctx, cuda, dnn) = opened_cudnn(adapter, &[], [mode, CUDNN])?;
        check(&multiply(&ctx, &auto, &operands)?, &want, TENSOR)?;
        assert!(mode == 0 || dnn.left().contains("handle 0x7000"), "{}", dnn.left());
        drop(ctx);
        assert_eq!(cuda.left() + &dnn.left(), "", "{mode}");
    }
    // Products outlive their context.
    let (ctx, cuda, lt) = opened(adapter, &[])?;
    let matmul = Matmul::new(&ctx, &MatmulDesc { tier: Tier::Native, ..auto })?;
    drop(ctx);
    assert!(lt.left().contains("handle"));
    drop(matmul);
    assert_eq!(cuda.left() + &lt.left(), "");
    Ok(())
}

/// Ever other shapes do not fill the memory, and old ones are as good as new.
fn many_shapes(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let (ctx, _cuda, dnn) = opened_cudnn(adapter, &[], [1, CUDNN])?;
    let operands = operands([40, 24, 96], [MXFP4; 2], 21)?;
    let desc = desc(&operands, Tier::Native);
    multiply(&ctx, &desc, &operands)?;
    let plans = || dnn.left().lines().filter(|line| line.starts_with("plan ")).count();
    assert_eq!(plans(), 2);
    let mut most = 0;
    for i in 1..=600 {
        Matmul::new(&ctx, &MatmulDesc { k: 128 * i, ..desc })?;
        most = most.max(plans());
    }
    assert_eq!(most, 256);
    check(&multiply(&ctx, &desc, &operands)?, &reference(&operands), ROUNDED)?;
    drop(ctx);
    assert_eq!(dnn.left(), "");
    Ok(())
}

fn host_encoder(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let (ctx, _cuda, lt) = opened(adapter, &[])?;
    lt.set(0, 4);
    let operands = operands([40, 24, 96], [MXFP4; 2], 10)?;
    let auto = Matmul::new(&ctx, &desc(&operands, Tier::Auto))?;
    let named = Matmul::new(&ctx, &desc(&operands, Tier::Native))?;
    let [a, b] = [ctx.upload_mx(&operands[0])?, ctx.upload_mx(&operands[1])?];
    let mut y = ctx.zeros(DType::F32, 40, 24)?;
    let (device, queue) = ctx.wgpu().ok_or("not a GPU")?;
    let mut encoder = device.create_command_encoder(&Default::default());
    {
        let mut stream = ctx.stream_onto(&mut encoder)?;
        says(
            &named.record(&mut stream, &a, &b, &mut y).unwrap_err(),
            &["encoder of the caller's"],
        )?;
        auto.record(&mut stream, &a, &b, &mut y)?;
    }
    queue.submit([encoder.finish()]);
    let got: Vec<f32> = bytemuck::pod_collect_to_vec(&ctx.read_blocking(&y)?);
    check(&got, &reference(&operands), TENSOR)?;
    // The route is as good as before.
    assert_eq!(Matmul::new(&ctx, &desc(&operands, Tier::Auto))?.tier(), Tier::Native);
    Ok(())
}

/// Streams of one context that are recorded in turns and submitted in the other order.
fn interleaved(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let (ctx, _cuda, _lt) = opened(adapter, &[])?;
    in_turns(&ctx)
}

fn in_turns(ctx: &Context) -> Result<(), Failed> {
    let pairs = [operands([40, 24, 96], [MXFP4; 2], 11)?, operands([70, 33, 160], [MXFP4; 2], 12)?];
    let mut streams = [ctx.stream(), ctx.stream()];
    let mut ys: Vec<Tensor> = Vec::new();
    for (stream, pair) in streams.iter_mut().zip(&pairs) {
        let desc = desc(pair, Tier::Native);
        let mut y = ctx.zeros(DType::F32, desc.m, desc.n)?;
        let [a, b] = [ctx.upload_mx(&pair[0])?, ctx.upload_mx(&pair[1])?];
        let matmul = Matmul::new(ctx, &desc)?;
        matmul.record(stream, &a, &b, &mut y)?;
        ys.push(y);
    }
    let [first, second] = streams;
    ctx.submit(second)?;
    ctx.submit(first)?;
    for (y, pair) in ys.iter().zip(&pairs) {
        let got: Vec<f32> = bytemuck::pod_collect_to_vec(&ctx.read_blocking(y)?);
        within(&got, &fp8_reference(pair))?;
    }
    Ok(())
}

// ---- The suite on NVIDIA devices -----------------------------------------------------------------------------------

/// How Hopper's tensor cores add FP8 products up, and what that can lose.
///
/// What is known was measured by others (DeepSeek-V3's technical report, arXiv 2412.19437, 3.3.2 and 3.5.2): an instruction takes
/// 32 products and the running sum, shifts all right to the largest exponent among them, keeps about 14 bits of each, adds
/// those, and keeps as many of the result; libraries add the running sum to one in f32 after some instructions, four in
/// CUTLASS, if fast accumulation is off, as here. Assumed: 13 bits after the leading one, 32 neighbours along k, and at most
/// 128 positions between the additions in f32.
mod hopper {
    /// Products of an instruction.
    const GROUP: usize = 32;
    /// Positions of k between additions in f32.
    const PROMOTED: usize = 128;
    /// Bits after the leading one.
    const BITS: i32 = 13;

    /// Of a number that is not zero.
    fn exponent(x: f64) -> i32 {
        ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023
    }

    fn power(e: i32) -> f64 {
        2f64.powi(e)
    }

    /// The exact sum, and how far the device may be from it: each product that is no multiple of the last bit kept loses less
    /// than that bit, and so does the running sum; each result loses less than its own last bit; additions in f32 are rounded.
    pub fn bound(terms: &[f64]) -> (f64, f64) {
        let (mut total, mut lost) = (0f64, 0f64);
        for part in terms.chunks(PROMOTED) {
            let (mut sum, mut error) = (0f64, 0f64);
            for group in part.chunks(GROUP) {
                let running = sum.abs() + error;
                let largest = group.iter().fold(running, |max, term| max.max(term.abs()));
                if largest == 0.0 {
                    continue;
                }
                let unit = power(exponent(largest) - BITS);
                let cut = group.iter().filter(|term| (**term / unit).fract() != 0.0).count();
                error += (cut + usize::from(running > 0.0)) as f64 * unit;
                sum += group.iter().sum::<f64>();
                error += (sum.abs() + error) * power(-BITS);
            }
            total += sum;
            lost += error;
            lost += (total.abs() + lost) * power(-23);
        }
        (total, lost)
    }

    /// A guess at what exactly happens, to be compared with what a device says.
    #[derive(Clone, Copy, Debug)]
    pub struct Guess {
        /// Bits kept after the leading one of the largest product or running sum.
        pub bits: i32,
        /// Cut towards zero, or else towards minus infinity.
        pub to_zero: bool,
        /// Bits kept of the result after its leading one, if fewer than f32's.
        pub result: Option<i32>,
        /// Positions of k between additions in f32.
        pub promoted: usize,
    }

    impl Guess {
        pub fn all() -> Vec<Guess> {
            let mut all = Vec::new();
            for bits in [12, 13, 14] {
                for to_zero in [true, false] {
                    for result in [None, Some(13)] {
                        for promoted in [32, 64, 128, 256, 512, usize::MAX] {
                            all.push(Guess { bits, to_zero, result, promoted });
                        }
                    }
                }
            }
            all
        }

        /// The sum of products a · b.
        pub fn sum(&self, a: &[f64], b: &[f64]) -> f32 {
            let mut total = 0f32;
            for (a, b) in
                a.chunks(self.promoted.min(a.len())).zip(b.chunks(self.promoted.min(a.len())))
            {
                let mut sum = 0f64;
                for (a, b) in a.chunks(GROUP).zip(b.chunks(GROUP)) {
                    sum = self.instruction(a, b, sum);
                }
                total += sum as f32;
            }
            total
        }

        fn instruction(&self, a: &[f64], b: &[f64], sum: f64) -> f64 {
            let nonzero = a.iter().zip(b).filter(|(a, b)| **a != 0.0 && **b != 0.0);
            let largest = nonzero.map(|(a, b)| exponent(*a) + exponent(*b)).max();
            let largest = largest.max((sum != 0.0).then(|| exponent(sum)));
            let Some(largest) = largest else { return 0.0 };
            let cut = |x: f64, unit: f64| match self.to_zero {
                true => (x / unit).trunc() * unit,
                false => (x / unit).floor() * unit,
            };
            let unit = power(largest - self.bits);
            let all: f64 = a.iter().zip(b).map(|(a, b)| cut(a * b, unit)).sum();
            let all = all + cut(sum, unit);
            match self.result {
                Some(bits) if all != 0.0 => cut(all, power(exponent(all) - bits)),
                _ => all,
            }
        }
    }
}

/// Both operands' values, line by line.
fn dense(operands: &[MxTensor; 2]) -> [Vec<Vec<f64>>; 2] {
    operands.each_ref().map(|x| {
        let Layout { rows, cols, .. } = *x.layout();
        (0..rows).map(|row| (0..cols).map(|col| f64::from(x.get(row, col))).collect()).collect()
    })
}

/// Each output, and how far FP8 on Hopper may be from it.
fn fp8_reference(operands: &[MxTensor; 2]) -> Vec<(f64, f64)> {
    let [a, b] = dense(operands);
    let mut out = Vec::new();
    let mut terms = Vec::new();
    for a in &a {
        for b in &b {
            terms.clear();
            terms.extend(a.iter().zip(b).map(|(a, b)| a * b));
            out.push(hopper::bound(&terms));
        }
    }
    out
}

/// Random codes, NaN left out, under scales of 2^0 to 2^-spread.
fn spread_operands(
    [m, n, k]: [usize; 3],
    specs: [MxSpec; 2],
    spread: u32,
    seed: u64,
) -> Result<[MxTensor; 2], Failed> {
    let make = |lines: usize, spec: MxSpec, seed: u64| -> Result<MxTensor, Failed> {
        let layout = Layout::new(spec, Axis::One, lines, k)?;
        let codes = common::words(seed, layout.codes_len().div_ceil(4));
        let mut codes: Vec<u8> = codes.into_iter().flat_map(u32::to_le_bytes).collect();
        codes.truncate(layout.codes_len());
        if spec.element.bits() == 8 {
            codes.iter_mut().filter(|code| **code & 0x7f == 0x7f).for_each(|code| *code ^= 1);
        }
        let scales = common::words(seed + 1, layout.scales_len());
        let scales = scales.iter().map(|word| (127 - (word >> 8) % (spread + 1)) as u8).collect();
        Ok(MxTensor::from_parts(layout, codes, scales, 1.0)?)
    };
    Ok([make(m, specs[0], seed)?, make(n, specs[1], seed + 2)?])
}

fn real(adapter: &wgpu::Adapter) -> Result<Context, Failed> {
    let options = Options { native_from: Some(0), ..Default::default() };
    Ok(pollster::block_on(Context::on_adapter(adapter, &options))?)
}

fn real_refusal(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let ctx = real(adapter)?;
    let pair = operands([256, 256, 512], [MXFP4; 2], 1)?;
    let matmul = Matmul::new(&ctx, &desc(&pair, Tier::Auto))?;
    eprintln!("auto: {}: {}", matmul.tier(), matmul.why());
    check(&multiply(&ctx, &desc(&pair, Tier::Auto), &pair)?, &reference(&pair), TENSOR)?;
    for route in report(&ctx)?.routes {
        eprintln!("{}: {:?} {:?}", route.name, route.state, route.details);
    }
    if matmul.tier() != Tier::Native {
        assert!(matmul.why().contains("cublaslt-nvfp4: "), "{}", matmul.why());
    }
    Ok(())
}

fn real_sharing(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let ctx = real(adapter)?;
    let pair = operands([256, 192, 512], [MXFP4; 2], 2)?;
    let matmul = Matmul::new(&ctx, &desc(&pair, Tier::Native))?;
    eprintln!("{}", matmul.why());
    multiply(&ctx, &desc(&pair, Tier::Native), &pair)?;
    let report = report(&ctx)?;
    eprintln!("{:?} {:?}", report.sharing, report.traffic);
    assert!(report.sharing.iter().any(|line| line.contains("imported by the library")));
    assert!(report.sharing.iter().any(|line| line.contains("a timeline semaphore")));
    assert_eq!([report.traffic.to_library, report.traffic.from_library], [0; 2]);
    assert_eq!(report.traffic.host_waits, 0);
    assert!(report.traffic.products >= 8 && report.traffic.shared > 0);
    Ok(())
}

fn real_fp8(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let ctx = real(adapter)?;
    for (i, (shape, specs, spread)) in [
        ([64, 64, 64], [MXFP4; 2], 0),
        ([130, 70, 203], [MXFP4; 2], 2),
        ([64, 64, 4096], [MXFP4; 2], 0),
        ([64, 64, 4096], [MXFP4; 2], 2),
        ([64, 64, 4096], [MXFP4; 2], 4),
        ([64, 64, 4096], [MXFP4; 2], 8),
        ([64, 64, 4096], [MXFP4; 2], 14),
        ([48, 40, 16384], [MXFP4; 2], 6),
        ([128, 96, 512], [MXFP4, MXFP6_E2M3], 6),
        ([64, 64, 2048], [MXFP8_E4M3; 2], 0),
    ]
    .into_iter()
    .enumerate()
    {
        let pair = spread_operands(shape, specs, spread, 20 + i as u64)?;
        let got = multiply(&ctx, &desc(&pair, Tier::Native), &pair)?;
        let want = fp8_reference(&pair);
        let all = reference(&pair);
        let errors: Vec<f64> = got
            .iter()
            .zip(&all)
            .map(|(got, (sum, abs))| (f64::from(*got) - sum).abs() / abs.max(1e-37))
            .collect();
        let worst = errors.iter().copied().fold(0.0, f64::max);
        let mean = (errors.iter().map(|e| e * e).sum::<f64>() / errors.len() as f64).sqrt();
        eprintln!(
            "{shape:?} {} × {}, scales over {spread} binades: error 2^{:.1} of the terms' magnitudes at most, \
             2^{:.1} root mean square",
            specs[0],
            specs[1],
            worst.log2(),
            mean.log2()
        );
        let share =
            within(&got, &want).map_err(|error| format!("{shape:?} {specs:?}: {error:?}"))?;
        eprintln!("    at most {share:.3} of the derived bound");
        if shape[2] == 4096 && spread >= 2 {
            guess(&pair, &got);
        }
    }
    assert_eq!(report(&ctx)?.recomputed, 0);
    let wide = wide_operands()?;
    check(&multiply(&ctx, &desc(&wide, Tier::Native), &wide)?, &reference(&wide), TENSOR)?;
    assert_eq!(report(&ctx)?.recomputed, 1);
    Ok(())
}

/// What the bound claims, of every way to add up that fits its assumptions; and fewer bits break it.
fn guesses() -> Result<(), Failed> {
    let mut broken = 0;
    for spread in [2, 8] {
        let pair = spread_operands([3, 4, 1000], [MXFP4; 2], spread, 50)?;
        let ([a, b], want) = (dense(&pair), fp8_reference(&pair));
        for guess in hopper::Guess::all() {
            let sums = |guess: hopper::Guess| -> Vec<f32> {
                a.iter().flat_map(|a| b.iter().map(move |b| guess.sum(a, b))).collect()
            };
            if guess.bits >= 13 && guess.promoted <= 128 {
                within(&sums(guess), &want).map_err(|error| format!("{guess:?}: {error:?}"))?;
                let coarse = hopper::Guess { bits: 7, ..guess };
                broken += usize::from(within(&sums(coarse), &want).is_err());
            }
        }
    }
    if broken > 0 { Ok(()) } else { Err("seven bits are within the bound as well".into()) }
}

/// Prints the guesses that most outputs agree with, bit for bit. None need be right.
fn guess(pair: &[MxTensor; 2], got: &[f32]) {
    let [a, b] = dense(pair);
    let (m, n) = (12.min(a.len()), 12.min(b.len()));
    let mut found: Vec<(usize, hopper::Guess)> = hopper::Guess::all()
        .into_iter()
        .map(|guess| {
            let same = |(i, j): &(usize, usize)| {
                got[i * b.len() + j].to_bits() == guess.sum(&a[*i], &b[*j]).to_bits()
            };
            ((0..m).flat_map(|i| (0..n).map(move |j| (i, j))).filter(same).count(), guess)
        })
        .collect();
    found.sort_by_key(|(same, _)| std::cmp::Reverse(*same));
    for (same, guess) in &found[..3] {
        eprintln!("    {same} of {} outputs are those of {guess:?}", m * n);
    }
}

fn real_epilogues(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let ctx = real(adapter)?;
    let pair = operands([96, 65, 256], [MXFP4; 2], 30)?;
    let bias: Vec<f32> = (0..65).map(|j| j as f32 / 8.0).collect();
    let plain = desc(&pair, Tier::Native);
    let full = MatmulDesc { alpha: 3.0, beta: 0.5, bias: true, ..plain };
    let matmul = Matmul::new(&ctx, &full)?;
    let [a, b] = [ctx.upload_mx(&pair[0])?, ctx.upload_mx(&pair[1])?];
    let mut y = ctx.upload(DType::F32, 96, 65, bytemuck::cast_slice(&vec![2f32; 96 * 65]))?;
    let bias_tensor = ctx.upload(DType::F32, 1, 65, bytemuck::cast_slice(&bias))?;
    let mut stream = ctx.stream();
    let extras = microscaling::kernels::Extras { bias: Some(&bias_tensor), ..Default::default() };
    matmul.record_with(&mut stream, &a, &b, &mut y, extras)?;
    ctx.submit(stream)?;
    let got: Vec<f32> = bytemuck::pod_collect_to_vec(&ctx.read_blocking(&y)?);
    let want: Vec<_> = fp8_reference(&pair)
        .iter()
        .enumerate()
        .map(|(at, (sum, bound))| {
            let want = 3.0 * sum + 1.0 + f64::from(bias[at % 65]);
            // Three additions and products in f32.
            (want, 3.0 * bound + 4.0 * ROUNDED * (3.0 * sum.abs() + 10.0))
        })
        .collect();
    within(&got, &want)?;
    Ok(())
}

/// Products back to back, each with other operands and sizes, in one stream and in several.
fn real_row(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let ctx = real(adapter)?;
    let mut pairs = Vec::new();
    for i in 0..24usize {
        let shape = [64 + 37 * (i % 5), 48 + 29 * (i % 7), 128 + 96 * (i % 3)];
        pairs.push(operands(shape, [MXFP4; 2], 40 + i as u64)?);
    }
    let mut stream = ctx.stream();
    let mut ys = Vec::new();
    for (i, pair) in pairs.iter().enumerate() {
        let desc = desc(pair, Tier::Native);
        let mut y = ctx.upload(DType::F32, desc.m, desc.n, &vec![0xff; desc.m * desc.n * 4])?;
        let [a, b] = [ctx.upload_mx(&pair[0])?, ctx.upload_mx(&pair[1])?];
        Matmul::new(&ctx, &desc)?.record(&mut stream, &a, &b, &mut y)?;
        ys.push(y);
        if i % 9 == 8 {
            ctx.submit(std::mem::replace(&mut stream, ctx.stream()))?;
        }
    }
    ctx.submit(stream)?;
    for (y, pair) in ys.iter().zip(&pairs) {
        let got: Vec<f32> = bytemuck::pod_collect_to_vec(&ctx.read_blocking(y)?);
        within(&got, &fp8_reference(pair))?;
    }
    in_turns(&ctx)
}

fn real_rate(adapter: &wgpu::Adapter) -> Result<(), Failed> {
    let ctx = real(adapter)?;
    for side in [64, 1024, 2048, 4096, 8192] {
        // Scales of one value and codes of all kinds: what is multiplied makes no difference here.
        let layout = Layout::new(MXFP4, Axis::One, side, side)?;
        let codes = (0..layout.codes_len()).map(|at| (at * 37 + at / 251) as u8).collect();
        let x = MxTensor::from_parts(layout, codes, vec![127; layout.scales_len()], 1.0)?;
        let x = ctx.upload_mx(&x)?;
        let mut y = ctx.zeros(DType::F32, side, side)?;
        for tier in [Tier::Tensor, Tier::Native] {
            let desc = MatmulDesc { m: side, n: side, k: side, tier, ..Default::default() };
            let Ok(matmul) = Matmul::new(&ctx, &desc) else { continue };
            let (mut best, mut host) = (f64::INFINITY, f64::INFINITY);
            for _ in 0..3 {
                let mut recording = Duration::ZERO;
                let time = pollster::block_on(microscaling::report::time(&ctx, 8, |stream, _| {
                    let start = Instant::now();
                    matmul.record(stream, &x, &x, &mut y)?;
                    recording += start.elapsed();
                    Ok(())
                }))?;
                best = best.min(time.as_secs_f64() / 8.0);
                host = host.min(recording.as_secs_f64() / 8.0);
            }
            eprintln!(
                "{side}³ {tier}: {:.3} ms, {:.0} TFLOP/s; the host records for {:.3} ms",
                best * 1e3,
                desc.flops() / best * 1e-12,
                host * 1e3
            );
        }
    }
    eprintln!("{:?}", report(&ctx)?.traffic);
    Ok(())
}
