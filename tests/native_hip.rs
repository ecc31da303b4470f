//! The HIP routes on stand-ins for AMD's libraries (tests/standins/hip.rs): what they are asked for, attribute by attribute,
//! and what becomes of a product when they refuse, lack a function, are of another version, fail, or are wrong. No device of
//! AMD's is involved: products run on a software adapter, what the libraries do on the host.
//!
//! Stamped on the first Vulkan adapter; without one the tests show as ignored. `MX_TEST_GPU` as in tests/common/engines.rs.

mod common;
#[cfg(target_os = "linux")]
#[path = "emulator/mod.rs"]
mod machine;
#[path = "common/standin.rs"]
mod standin;

use std::path::{Path, PathBuf};

use libtest_mimic::{Arguments, Failed, Trial};
use microscaling::native::{Libraries, RouteState};
use microscaling::{
    Axis, Context, DType, Error, Layout, MXFP4, MXFP6_E2M3, MXFP8_E4M3, MXFP8_E5M2, Matmul,
    MatmulDesc, MxSpec, MxTensor, NVFP4, Options, Tier, engine, wgpu,
};

use standin::Standin;

type Test = fn(&Bench) -> Result<(), Failed>;

const SUITE: &[(&str, Test)] = &[
    ("plain_scales_and_every_attribute", plain),
    ("swizzled_scales", swizzled),
    ("formats_in_any_mix", formats),
    ("own_kernel", own_kernel),
    #[cfg(target_os = "linux")]
    ("own_kernel_emulated", own_kernel_emulated),
    ("heuristic_refuses_everything", heuristic_refuses),
    ("other_formats_are_not_taken", other_formats),
    ("missing_functions", missing_functions),
    ("versions", versions),
    ("devices", devices),
    ("missing_libraries", missing_libraries),
    ("own_kernel_that_cannot_be", own_kernel_refused),
    ("wrong_answers_disable", wrong_answers),
    ("a_pair_that_is_wrong_disables", wrong_pair),
    ("a_code_that_is_wrong_disables", wrong_codes),
    ("a_dropped_context_leaves_nothing", nothing_left),
    ("failures_disable", failures),
    ("failing_queue", failing_queue),
];

fn main() {
    let args = Arguments::from_args();
    let mode = std::env::var("MX_TEST_GPU").unwrap_or_else(|_| "auto".into());
    let adapters =
        if mode == "off" { Vec::new() } else { pollster::block_on(engine::adapters(false)) };
    let adapter = adapters.into_iter().find(|a| a.get_info().backend == wgpu::Backend::Vulkan);
    assert!(mode != "require" || adapter.is_some(), "MX_TEST_GPU=require, but no Vulkan adapter");
    // hiprtc has no place in the options.
    let bench = adapter.map(|adapter| Bench { adapter });
    let trials = SUITE
        .iter()
        .map(|(name, test)| match bench.clone() {
            None => Trial::test(format!("[no adapter] {name}"), || Ok(())).with_ignored_flag(true),
            Some(bench) => Trial::test(*name, move || test(&bench)),
        })
        .collect();
    // One after the other: where hiprtc is found is a variable of the process's.
    libtest_mimic::run(&Arguments { test_threads: Some(1), ..args }, trials).exit();
}

// ---- The stand-in ----------------------------------------------------------------------------------------------------

/// What tests set; the numbers are the stand-in's.
#[derive(Clone, Copy)]
enum Key {
    Uuid = 0,
    Version = 2,
    BlasVersion = 3,
    Modes = 4,
    Failure = 5,
    FailAfter = 6,
    Wrong = 7,
    Load = 9,
    Queue = 10,
    Both = 11,
    #[cfg(target_os = "linux")]
    Emulate = 12,
    Code = 14,
    Compile = 15,
}

#[derive(Clone)]
struct Bench {
    adapter: wgpu::Adapter,
}

impl Bench {
    /// A stand-in without these functions.
    fn standin(&self, without: &[&str]) -> Standin {
        standin::standin("hip", without).identify(&self.adapter)
    }

    /// A context of its own, with the stand-in as all of AMD's libraries.
    fn open(&self, standin: &Standin) -> Context {
        self.open_with(
            Libraries {
                cuda: Some(PathBuf::new()),
                hip: Some(standin.path.clone()),
                hipblaslt: Some(standin.path.clone()),
                ..Default::default()
            },
            Some(&standin.path),
        )
    }

    fn open_with(&self, libraries: Libraries, hiprtc: Option<&Path>) -> Context {
        let hiprtc = hiprtc.unwrap_or(Path::new("off"));
        // SAFETY: tests run one after the other, and nothing else reads or writes the environment meanwhile.
        unsafe { std::env::set_var("MICROSCALING_HIPRTC", hiprtc) };
        let options = Options { libraries, native_from: Some(0), ..Default::default() };
        let ctx = pollster::block_on(Context::on_adapter(&self.adapter, &options)).unwrap();
        // Opened now, while the variable is set.
        pollster::block_on(ctx.native()).unwrap();
        ctx
    }

    /// Why no route takes a product.
    fn reasons(&self, ctx: &Context) -> String {
        reasons(ctx, MXFP4, MXFP4)
    }
}

fn reasons(ctx: &Context, a: MxSpec, b: MxSpec) -> String {
    match Matmul::new(ctx, &desc([33, 40, 256], a, b, Tier::Native)) {
        Err(Error::Unsupported { has, .. }) => has,
        other => panic!("{other:?}"),
    }
}

// ---- Products --------------------------------------------------------------------------------------------------------

fn desc([m, n, k]: [usize; 3], a: MxSpec, b: MxSpec, tier: Tier) -> MatmulDesc {
    MatmulDesc { m, n, k, a: a.into(), b: b.into(), tier, ..Default::default() }
}

/// Elements of which products and sums are exact in f32, under scales a few binades apart.
fn operand(seed: usize, spec: MxSpec, lines: usize, k: usize) -> MxTensor {
    let layout = Layout::new(spec, Axis::One, lines, k).unwrap();
    let bits = spec.element.bits();
    let words = common::words(seed as u64, layout.codes_len());
    let codes = words
        .iter()
        .map(|word| match bits {
            4 => *word as u8,
            // One of ±0, ±1, ±2 and so on in either FP8.
            _ if spec == MXFP8_E4M3 => [0x00, 0x38, 0xb8, 0x40, 0xc0, 0x3c][*word as usize % 6],
            _ => [0x00, 0x3c, 0xbc, 0x40, 0xc0, 0x3e][*word as usize % 6],
        })
        .collect();
    let scales = (0..layout.scales_len()).map(|i| 125 + (i * 7 % 5) as u8).collect();
    MxTensor::from_parts(layout, codes, scales, 1.0).unwrap()
}

fn product(ctx: &Context, desc: &MatmulDesc, a: &MxTensor, b: &MxTensor) -> (Matmul, Vec<f32>) {
    let matmul = Matmul::new(ctx, desc).unwrap();
    let nan = vec![0xff; desc.m * desc.n * 4];
    let mut y = ctx.upload(DType::F32, desc.m, desc.n, &nan).unwrap();
    let mut stream = ctx.stream();
    let (a, b) = (ctx.upload_mx(a).unwrap(), ctx.upload_mx(b).unwrap());
    matmul.record(&mut stream, &a, &b, &mut y).unwrap();
    ctx.submit(stream).unwrap();
    (matmul, common::to_f32(DType::F32, &ctx.read_blocking(&y).unwrap()))
}

/// A product in the tier asked for, whose value must be right; says who computed it.
fn right(ctx: &Context, shape: [usize; 3], a: MxSpec, b: MxSpec, tier: Tier) -> String {
    let [m, n, k] = shape;
    let (x, w) = (operand(1, a, m, k), operand(2, b, n, k));
    let (matmul, y) = product(ctx, &desc(shape, a, b, tier), &x, &w);
    for i in 0..m {
        for j in 0..n {
            let want: f64 =
                (0..k).map(|at| f64::from(x.get(i, at)) * f64::from(w.get(j, at))).sum();
            assert_eq!(f64::from(y[i * n + j]), want, "({i}, {j})");
        }
    }
    format!("{:?}: {}", matmul.tier(), matmul.why())
}

fn contains(text: &str, what: &str) -> Result<(), Failed> {
    if text.contains(what) { Ok(()) } else { Err(format!("no {what:?} in: {text}").into()) }
}

const SHAPE: [usize; 3] = [33, 40, 200];

fn plain(bench: &Bench) -> Result<(), Failed> {
    let standin = bench.standin(&[]);
    let ctx = bench.open(&standin);
    let before = standin.log().len();
    contains(&right(&ctx, SHAPE, MXFP4, MXFP4, Tier::Native), "hipblaslt-mx:")?;
    let log = standin.log()[before..].to_string();
    // 33×40×200 is multiplied as 48×48×256; the library's A is our B.
    let call = [
        "desc compute 2 scale 0",
        "attribute 0 size 4 value 112",
        "attribute 1 size 4 value 111",
        "attribute 31 size 4 value 2",
        "attribute 32 size 4 value 2",
        "attribute 5 size 8 set true",
        "attribute 6 size 8 set true",
        "layout type 33 256x48 ld 256",
        "layout type 33 256x48 ld 256",
        "layout type 0 48x48 ld 48",
    ];
    let destroyed = ["layout destroyed", "layout destroyed", "layout destroyed", "desc destroyed"];
    let matmul = ["matmul 0x3000 alpha 1 beta 0 stream 0x2000 48x48x256"];
    let asked = [
        "preference 1 size 8 value 67108864",
        "heuristic 0x3000 wanted 1: true",
        "preference destroyed",
    ];
    contains(&log, &[&call[..], &asked, &destroyed].concat().join("\n"))?;
    contains(&log, &[&call[..], &matmul, &destroyed].concat().join("\n"))?;
    // The known-answer test ran before the product, the heuristic once for each shape.
    let count = |what: &str| log.matches(what).count();
    assert_eq!((count("heuristic"), count("matmul")), (2, 8));
    let report = pollster::block_on(ctx.native())?;
    let traffic = report.traffic;
    assert_eq!(traffic.products, 8);
    assert!(
        traffic.to_library > 0 && traffic.shared == 0 && traffic.host_waits == 8,
        "{traffic:?}"
    );
    assert!(
        report
            .routes
            .iter()
            .any(|r| r.name == "hipblaslt-mx" && matches!(r.state, RouteState::Passed(_)))
    );
    // Every product again has the same bits, and Auto takes the route too.
    contains(&right(&ctx, SHAPE, MXFP4, MXFP4, Tier::Auto), "Native: hipblaslt-mx:")
}

fn swizzled(bench: &Bench) -> Result<(), Failed> {
    let standin = bench.standin(&[]);
    standin.set(Key::Modes as u32, 2);
    let ctx = bench.open(&standin);
    contains(&right(&ctx, SHAPE, MXFP4, MXFP4, Tier::Native), "hipblaslt-mx-swizzled:")?;
    let log = standin.log();
    contains(&log, "attribute 31 size 4 value 1001\nattribute 32 size 4 value 1001")?;
    contains(&log, "matmul 0x3000 alpha 1 beta 0 stream 0x2000 64x64x256")
}

fn formats(bench: &Bench) -> Result<(), Failed> {
    let standin = bench.standin(&[]);
    let ctx = bench.open(&standin);
    let specs = [(MXFP4, 33), (MXFP8_E4M3, 28), (MXFP8_E5M2, 29)];
    for (a, type_a) in specs {
        for (b, type_b) in specs {
            contains(&right(&ctx, [17, 20, 96], a, b, Tier::Native), "hipblaslt-mx:")?;
            let layouts =
                format!("layout type {type_b} 128x32 ld 128\nlayout type {type_a} 128x32 ld 128");
            contains(&standin.log(), &layouts)?;
        }
    }
    Ok(())
}

fn own_kernel(bench: &Bench) -> Result<(), Failed> {
    let standin = bench.standin(&[]);
    standin.set(Key::Modes as u32, 0);
    let ctx = bench.open(&standin);
    contains(&right(&ctx, [150, 40, 200], MXFP4, MXFP4, Tier::Native), "hip-mxfp4:")?;
    let log = standin.log();
    contains(
        &log,
        "hiprtcCreateProgram mxf4 headers 0 kernel true\nhiprtcCompileProgram --offload-arch=gfx950\nhiprtcDestroyProgram",
    )?;
    contains(
        &log,
        "hipModuleLoadData [127, 69, 76, 70]\nhipModuleGetFunction mx_matmul_mxf4 of 0x5000",
    )?;
    contains(
        &log,
        "launch 0x6000 grid 1 2 1 block 256 1 1 shared 0 stream 0x2000 m 160 n 48 k 224",
    )?;
    assert_eq!(log.matches("hiprtcCreateProgram").count(), 1);
    // It is for MXFP4 alone.
    let error = Matmul::new(&ctx, &desc(SHAPE, MXFP8_E4M3, MXFP4, Tier::Native)).unwrap_err();
    contains(&error.to_string(), "hip-mxfp4: mxfp8-e4m3/1x32 is not E2M1")
}

/// From tensors to y through packing, route and epilogue, the kernel's own code on emulated matrix cores in the middle.
#[cfg(target_os = "linux")]
fn own_kernel_emulated(bench: &Bench) -> Result<(), Failed> {
    let program = machine::Program::new(machine::HIP_16);
    let standin = bench.standin(&[]);
    standin.set(Key::Modes as u32, 0);
    standin.set(Key::Emulate as u32, program.address());
    standin.set(13, program.kernel.tensor as usize as u64);
    let ctx = bench.open(&standin);
    for shape in [SHAPE, [150, 40, 96], [129, 130, 64]] {
        contains(&right(&ctx, shape, MXFP4, MXFP4, Tier::Native), "hip-mxfp4:")?;
    }
    // The known-answer test's seven products, and these.
    assert_eq!(standin.log().matches("emulated 0").count(), 10);
    Ok(())
}

fn heuristic_refuses(bench: &Bench) -> Result<(), Failed> {
    let standin = bench.standin(&[]);
    standin.set(Key::Modes as u32, 0);
    standin.set(Key::Compile as u32, 6);
    let ctx = bench.open(&standin);
    let text = bench.reasons(&ctx);
    for what in [
        "hipblaslt-mx: hipblasLtMatmulAlgoGetHeuristic: HIPBLAS_STATUS_NOT_SUPPORTED",
        "hipblaslt-mx-swizzled: hipblasLtMatmulAlgoGetHeuristic: HIPBLAS_STATUS_NOT_SUPPORTED",
        "hip-mxfp4: hiprtc does not compile it with --offload-arch=gfx950: mxf4.hip:1:1: error: of the stand-in",
    ] {
        contains(&text, what)?;
    }
    let next = right(&ctx, SHAPE, MXFP4, MXFP4, Tier::Auto);
    contains(&next, "no native route: hipblaslt-mx: hipblasLtMatmulAlgoGetHeuristic")?;
    assert!(!next.starts_with("Native"), "{next}");
    // Nothing was multiplied, and every descriptor was given back.
    let log = standin.log();
    let count = |what: &str| log.matches(what).count();
    assert_eq!(count("matmul"), 0);
    assert_eq!(count("desc compute"), count("desc destroyed"));
    assert_eq!(count("layout type"), count("layout destroyed"));
    Ok(())
}

fn other_formats(bench: &Bench) -> Result<(), Failed> {
    let standin = bench.standin(&[]);
    let ctx = bench.open(&standin);
    let before = standin.log().len();
    for (spec, reason) in [
        (NVFP4, "nvfp4/1x16 has no E8M0 scales of at least 32 elements"),
        (MXFP6_E2M3, "mxfp6-e2m3/1x32 is neither E2M1, E4M3 nor E5M2"),
        (MXFP4.with_block(microscaling::Block::Vector(16)), "mxfp4/1x16 has no E8M0 scales"),
    ] {
        let error = Matmul::new(&ctx, &desc(SHAPE, spec, MXFP4, Tier::Native)).unwrap_err();
        contains(&error.to_string(), reason)?;
    }
    assert_eq!(standin.log().len(), before, "the library was asked");
    // Longer blocks are repeated.
    let long = MXFP4.with_block(microscaling::Block::Vector(128));
    contains(&right(&ctx, SHAPE, long, MXFP4, Tier::Native), "hipblaslt-mx:")
}

fn missing_functions(bench: &Bench) -> Result<(), Failed> {
    for name in
        ["hipInit", "hipMemcpyAsync", "hipGetErrorName", "hipDeviceGetPCIBusId", "hipStreamDestroy"]
    {
        let standin = bench.standin(&[name]);
        let ctx = bench.open(&standin);
        contains(&bench.reasons(&ctx), &format!("has no function {name}"))?;
    }
    for name in [
        "hipblasLtMatmul",
        "hipblasLtGetVersion",
        "hipblasLtMatmulAlgoGetHeuristic",
        "hipblasLtDestroy",
    ] {
        let standin = bench.standin(&[name]);
        let ctx = bench.open(&standin);
        // The kernel needs none of them.
        contains(&right(&ctx, SHAPE, MXFP4, MXFP4, Tier::Native), "hip-mxfp4:")?;
        let report = pollster::block_on(ctx.native())?;
        for route in report.routes.iter().filter(|route| route.name.starts_with("hipblaslt")) {
            let RouteState::Disabled(reason) = &route.state else { panic!("{route:?}") };
            contains(reason, &format!("has no function {name}"))?;
        }
    }
    let standin = bench.standin(&["hiprtcGetCode", "hipImportExternalMemory"]);
    contains(&right(&bench.open(&standin), SHAPE, MXFP4, MXFP4, Tier::Native), "hipblaslt-mx:")?;
    for name in ["hipModuleLaunchKernel", "hipModuleUnload"] {
        let standin = bench.standin(&[name]);
        standin.set(Key::Modes as u32, 0);
        let reasons = bench.reasons(&bench.open(&standin));
        contains(&reasons, "hip-mxfp4: ")?;
        contains(&reasons, &format!("has no function {name}"))?;
    }
    Ok(())
}

fn versions(bench: &Bench) -> Result<(), Failed> {
    let standin = bench.standin(&[]);
    standin.set(Key::Version as u32, 60_443_484);
    let ctx = bench.open(&standin);
    contains(&bench.reasons(&ctx), "HIP 6.4.43484 is too old, 7.0.0 is the oldest that will do")?;
    contains(
        &right(&ctx, SHAPE, MXFP4, MXFP4, Tier::Auto),
        "hipblaslt-mx, hipblaslt-mx-swizzled, hip-mxfp4: HIP 6.4",
    )?;
    let standin = bench.standin(&[]);
    standin.set(Key::BlasVersion as u32, 1_201);
    standin.set(Key::Compile as u32, 1);
    contains(
        &bench.reasons(&bench.open(&standin)),
        "is hipBLASLt 0.12.1, 1.0.0 is the oldest that will do",
    )?;
    // Up to 1.2 the swizzled mode has another number: not asked for.
    let standin = bench.standin(&[]);
    standin.set(Key::BlasVersion as u32, 100_202);
    standin.set(Key::Modes as u32, 2);
    standin.set(Key::Compile as u32, 1);
    let text = bench.reasons(&bench.open(&standin));
    contains(
        &text,
        "hipblaslt-mx-swizzled: hipBLASLt 1.2.2 has another number for BLK32_UE8M0_32_8_EXT",
    )?;
    assert!(!standin.log().contains("value 1001"));
    Ok(())
}

fn devices(bench: &Bench) -> Result<(), Failed> {
    let standin = bench.standin(&[]);
    standin.set(Key::Uuid as u32, 1);
    let text = bench.reasons(&bench.open(&standin));
    contains(&text, "none of HIP's 2 devices is the one that is open")?;
    contains(&text, "they are at 0000:c3:00.0, 0000:c4:00.0")?;
    let standin = bench.standin(&[]);
    standin.set(Key::Both as u32, 1);
    contains(
        &bench.reasons(&bench.open(&standin)),
        "2 of HIP's devices, 0000:c3:00.0, 0000:c4:00.0, answer",
    )
}

fn missing_libraries(bench: &Bench) -> Result<(), Failed> {
    let off = || Some(PathBuf::new());
    let none = Libraries { cuda: off(), hip: off(), hipblaslt: off(), ..Default::default() };
    let text = bench.reasons(&bench.open_with(none.clone(), None));
    contains(&text, "hipblaslt-mx, hipblaslt-mx-swizzled, hip-mxfp4: switched off")?;
    let nowhere = Libraries { hip: Some("/nowhere/libamdhip64.so".into()), ..none.clone() };
    let text = bench.reasons(&bench.open_with(nowhere, None));
    contains(&text, "cannot load /nowhere/libamdhip64.so")?;
    let standin = bench.standin(&[]);
    let runtime = Libraries { hip: Some(standin.path.clone()), ..none };
    let text = bench.reasons(&bench.open_with(runtime, None));
    contains(&text, "switched off by MICROSCALING_HIPBLASLT")?;
    contains(&text, "switched off by MICROSCALING_HIPRTC")
}

fn own_kernel_refused(bench: &Bench) -> Result<(), Failed> {
    let standin = bench.standin(&[]);
    standin.set(Key::Modes as u32, 0);
    // Of another device than gfx950.
    standin.set(Key::Load as u32, 209);
    let text = bench.reasons(&bench.open(&standin));
    contains(&text, "hip-mxfp4: hipModuleLoadData: hipErrorNoBinaryForGpu (209)")
}

fn wrong_answers(bench: &Bench) -> Result<(), Failed> {
    // Scales read in another order, and a sum that is off by one.
    for (modes, wrong, route) in
        [(2, 1, "hipblaslt-mx-swizzled"), (1, 2, "hipblaslt-mx"), (0, 2, "hip-mxfp4")]
    {
        let standin = bench.standin(&[]);
        standin.set(Key::Modes as u32, modes);
        standin.set(Key::Wrong as u32, wrong);
        if route != "hip-mxfp4" {
            standin.set(Key::Compile as u32, 1);
        }
        let ctx = bench.open(&standin);
        contains(
            &bench.reasons(&ctx),
            &format!("{route}: known-answer test of mxfp4/1x32 × mxfp4/1x32: output"),
        )?;
        let next = right(&ctx, SHAPE, MXFP4, MXFP4, Tier::Auto);
        contains(&next, &format!("{route}: known-answer test"))?;
    }
    Ok(())
}

/// Each pair of formats is tested before its own first product; one that is wrong says something of the device.
fn wrong_pair(bench: &Bench) -> Result<(), Failed> {
    let standin = bench.standin(&[]);
    standin.set(Key::Modes as u32, 1);
    standin.set(Key::Compile as u32, 1);
    standin.set(Key::Wrong as u32, 4);
    let ctx = bench.open(&standin);
    contains(&right(&ctx, SHAPE, MXFP4, MXFP4, Tier::Native), "hipblaslt-mx:")?;
    contains(&right(&ctx, SHAPE, MXFP8_E5M2, MXFP8_E4M3, Tier::Native), "hipblaslt-mx:")?;
    let wrong = "hipblaslt-mx: known-answer test of mxfp8-e4m3/1x32 × mxfp8-e5m2/1x32: output";
    contains(&reasons(&ctx, MXFP8_E4M3, MXFP8_E5M2), wrong)?;
    contains(&right(&ctx, SHAPE, MXFP8_E4M3, MXFP8_E5M2, Tier::Auto), wrong)?;
    // From then on nothing goes there.
    contains(&right(&ctx, SHAPE, MXFP4, MXFP4, Tier::Auto), wrong)?;
    let report = pollster::block_on(ctx.native())?;
    let route = report.routes.iter().find(|route| route.name == "hipblaslt-mx").unwrap();
    let RouteState::Disabled(reason) = &route.state else { panic!("{route:?}") };
    contains(reason, "known-answer test of mxfp8-e4m3/1x32 × mxfp8-e5m2/1x32")
}

/// One code of a format that is taken for another number, on either side.
fn wrong_codes(bench: &Bench) -> Result<(), Failed> {
    for (kind, spec, other, codes) in [
        (33, MXFP4, MXFP4, &[0x0, 0x1, 0x6, 0x7, 0x8, 0xf][..]),
        (28, MXFP8_E4M3, MXFP4, &[0x01, 0x53, 0x7e, 0x80, 0xfe]),
        (29, MXFP8_E5M2, MXFP8_E4M3, &[0x01, 0x7b, 0xa5, 0xfb]),
    ] {
        for (i, code) in codes.iter().enumerate() {
            let standin = bench.standin(&[]);
            standin.set(Key::Modes as u32, 1);
            standin.set(Key::Compile as u32, 1);
            standin.set(Key::Code as u32, kind * 256 + code + 1);
            let pair = if i % 2 == 0 { [spec, other] } else { [other, spec] };
            let text = reasons(&bench.open(&standin), pair[0], pair[1]);
            contains(&text, &format!("known-answer test of {} × {}: output", pair[0], pair[1]))
                .map_err(|error| format!("{code:#x}: {error:?}"))?;
        }
    }
    Ok(())
}

/// What a context makes with the libraries it destroys, whatever became of it, and the stream last.
fn nothing_left(bench: &Bench) -> Result<(), Failed> {
    for (key, value) in [
        (Key::Modes, 3),
        (Key::Modes, 2),
        // The kernel; a kernel that does not compile, or not load.
        (Key::Modes, 0),
        (Key::Compile, 6),
        (Key::Load, 209),
        (Key::BlasVersion, 99_999),
        (Key::Wrong, 2),
        (Key::Failure, 5),
        (Key::Queue, 719),
    ] {
        let standin = bench.standin(&[]);
        standin.set(Key::FailAfter as u32, 7);
        standin.set(key as u32, value);
        if matches!(key, Key::Load) {
            standin.set(Key::Modes as u32, 0);
        }
        let ctx = bench.open(&standin);
        right(&ctx, SHAPE, MXFP4, MXFP4, Tier::Auto);
        contains(&standin.left(), "stream 0x2000")?;
        drop(ctx);
        assert_eq!(standin.left(), "", "{} {value}", key as u32);
    }
    Ok(())
}

/// A library that fails after the known-answer test: the product is computed all the same, and the route not used again.
fn failures(bench: &Bench) -> Result<(), Failed> {
    let standin = bench.standin(&[]);
    standin.set(Key::Failure as u32, 5);
    // The seven products of the known-answer test.
    standin.set(Key::FailAfter as u32, 7);
    let ctx = bench.open(&standin);
    right(&ctx, SHAPE, MXFP4, MXFP4, Tier::Auto);
    let report = pollster::block_on(ctx.native())?;
    let route = report.routes.iter().find(|route| route.name == "hipblaslt-mx").unwrap();
    let RouteState::Disabled(reason) = &route.state else { panic!("{route:?}") };
    contains(reason, "hipblasLtMatmul: HIPBLAS_STATUS_EXECUTION_FAILED")
}

fn failing_queue(bench: &Bench) -> Result<(), Failed> {
    let standin = bench.standin(&[]);
    standin.set(Key::Queue as u32, 719);
    let ctx = bench.open(&standin);
    contains(&bench.reasons(&ctx), "hipErrorLaunchFailure (719)")?;
    right(&ctx, SHAPE, MXFP4, MXFP4, Tier::Auto);
    Ok(())
}
