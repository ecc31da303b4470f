//! The crate's own CUDA kernel from tensors to y: packed on a software adapter, handed to a stand-in for CUDA
//! (tests/standins), run there on emulated tensor cores (tests/emulator), and finished on the adapter again. And
//! what is said where it cannot be compiled, loaded or launched.
//!
//! Stamped on the first Vulkan adapter; without one the tests show as ignored. With `MX_NATIVE_TOOLS` (tests/codegen.rs)
//! NVIDIA's own compiler compiles, and refuses, too.

mod common;
#[cfg(target_os = "linux")]
#[path = "emulator/mod.rs"]
mod machine;
#[cfg(target_os = "linux")]
#[path = "common/standin.rs"]
mod standin;

#[cfg(not(target_os = "linux"))]
fn main() {}

#[cfg(target_os = "linux")]
fn main() {
    suite::main();
}

#[cfg(target_os = "linux")]
mod suite {
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use libtest_mimic::{Arguments, Failed, Trial};
    use microscaling::native::{Libraries, RouteState};
    use microscaling::{
        Axis, Context, DType, Error, Layout, MXFP4, MXFP8_E4M3, Matmul, MatmulDesc, MxTensor,
        Options, Tier, engine, wgpu,
    };

    use super::standin::{Standin, standin};
    use super::{common, machine};

    type Test = fn(&Bench) -> Result<(), Failed>;

    const SUITE: &[(&str, Test)] = &[
        ("the_exact_tiers_bits_through_the_route", emulated),
        ("every_device_is_compiled_for_itself", targets),
        ("code_that_cannot_be", refused),
        ("a_failed_launch_disables", failed_launch),
        ("a_wrong_kernel_is_disabled", wrong_kernel),
    ];
    /// With NVIDIA's compiler.
    const TOOLS: &[(&str, Test)] = &[
        ("nvrtc_compiles_for_sm_120", real_compiler),
        ("nvrtc_refuses_hopper_and_b200", real_refusal),
    ];

    pub fn main() {
        let args = Arguments::from_args();
        let mode = std::env::var("MX_TEST_GPU").unwrap_or_else(|_| "auto".into());
        let adapters =
            if mode == "off" { Vec::new() } else { pollster::block_on(engine::adapters(false)) };
        let adapter = adapters.into_iter().find(|a| a.get_info().backend == wgpu::Backend::Vulkan);
        assert!(mode != "require" || adapter.is_some(), "MX_TEST_GPU=require, but no adapter");
        let nvrtc = std::env::var_os("MX_NATIVE_TOOLS").map(|dir| {
            let libraries = Path::new(&dir).join("lib");
            let mut versions = std::fs::read_dir(&libraries).expect("MX_NATIVE_TOOLS").flatten();
            let python =
                versions.find(|entry| entry.file_name().to_string_lossy().starts_with("python"));
            let packages = python.expect("a Python environment").path().join("site-packages");
            packages.join("nvidia/cu13/lib/libnvrtc.so.13")
        });
        let bench = adapter.map(|adapter| Bench::new(adapter, nvrtc));
        let mut trials = Vec::new();
        for (tests, tools) in [(SUITE, false), (TOOLS, true)] {
            for (name, test) in tests {
                let lacks = match &bench {
                    None => Some("no adapter"),
                    Some(bench) if tools && bench.nvrtc.is_none() => Some("no tools"),
                    Some(_) => None,
                };
                trials.push(match (lacks, bench.clone()) {
                    (None, Some(bench)) => Trial::test(*name, move || test(&bench)),
                    (lacks, _) => {
                        let name = format!("[{}] {name}", lacks.unwrap_or_default());
                        Trial::test(name, || Ok(())).with_ignored_flag(true)
                    }
                });
            }
        }
        libtest_mimic::run(&args, trials).exit();
    }

    /// What tests set; the numbers are the driver's stand-in's.
    enum Key {
        Capability = 7,
        Emulate = 8,
        Tensor = 9,
        Load = 10,
        Launch = 11,
    }

    #[derive(Clone)]
    struct Bench {
        adapter: wgpu::Adapter,
        program: Arc<machine::Program>,
        nvrtc: Option<PathBuf>,
    }

    impl Bench {
        fn new(adapter: wgpu::Adapter, nvrtc: Option<PathBuf>) -> Bench {
            Bench { adapter, program: Arc::new(machine::Program::new(machine::CUDA)), nvrtc }
        }

        /// A driver. Operands are copied: the emulator is to see nothing beside them.
        fn standin(&self) -> Standin {
            let standin = standin("cuda", &["cuImportExternalMemory"]).identify(&self.adapter);
            standin.set(Key::Capability as u32, 120);
            self.emulate(&standin, &self.program);
            standin
        }

        fn emulate(&self, standin: &Standin, program: &machine::Program) {
            standin.set(Key::Emulate as u32, program.address());
            standin.set(Key::Tensor as u32, program.kernel.tensor as usize as u64);
        }

        /// A context of its own, with the stand-in as driver.
        fn open(&self, standin: &Standin, nvrtc: &Path) -> Context {
            let libraries = Libraries {
                cuda: Some(standin.path.clone()),
                nvrtc: Some(nvrtc.into()),
                cublaslt: Some(PathBuf::new()),
                hip: Some(PathBuf::new()),
                ..Default::default()
            };
            let options = Options { libraries, native_from: Some(0), ..Default::default() };
            pollster::block_on(Context::on_adapter(&self.adapter, &options)).unwrap()
        }

        /// Why no route takes a product.
        fn reasons(&self, ctx: &Context) -> String {
            match Matmul::new(ctx, &desc(SHAPE, Tier::Native)) {
                Err(Error::Unsupported { has, .. }) => has,
                other => panic!("{other:?}"),
            }
        }
    }

    const SHAPE: [usize; 3] = [150, 37, 200];

    fn desc([m, n, k]: [usize; 3], tier: Tier) -> MatmulDesc {
        MatmulDesc { m, n, k, tier, ..Default::default() }
    }

    fn operand(seed: u64, lines: usize, k: usize) -> MxTensor {
        let layout = Layout::new(MXFP4, Axis::One, lines, k).unwrap();
        let codes = common::words(seed, layout.codes_len() / 4)
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        let scales = common::words(seed + 50, layout.scales_len())
            .iter()
            .map(|w| (100 + w % 40) as u8)
            .collect();
        MxTensor::from_parts(layout, codes, scales, 1.0).unwrap()
    }

    fn product(ctx: &Context, shape: [usize; 3], tier: Tier) -> (String, Vec<u32>) {
        let [m, n, k] = shape;
        let matmul = Matmul::new(ctx, &desc(shape, tier)).unwrap();
        let mut y = ctx.upload(DType::F32, m, n, &vec![0xff; m * n * 4]).unwrap();
        let a = ctx.upload_mx(&operand(1, m, k)).unwrap();
        let b = ctx.upload_mx(&operand(2, n, k)).unwrap();
        let mut stream = ctx.stream();
        matmul.record(&mut stream, &a, &b, &mut y).unwrap();
        ctx.submit(stream).unwrap();
        let bytes = ctx.read_blocking(&y).unwrap();
        (matmul.why().into(), bytemuck::pod_collect_to_vec(&bytes))
    }

    fn contains(text: &str, what: &str) -> Result<(), Failed> {
        if text.contains(what) { Ok(()) } else { Err(format!("no {what:?} in: {text}").into()) }
    }

    fn same_bits(ctx: &Context, shape: [usize; 3]) -> Result<(), Failed> {
        let (why, got) = product(ctx, shape, Tier::Native);
        contains(&why, "cuda-mxfp4:")?;
        let (_, want) = product(&Context::cpu(), shape, Tier::Exact);
        let wrong = got.iter().zip(&want).filter(|(a, b)| a != b).count();
        if wrong > 0 {
            return Err(format!("{wrong} of {} outputs of {shape:?}", want.len()).into());
        }
        Ok(())
    }

    fn emulated(bench: &Bench) -> Result<(), Failed> {
        let (standin, nvrtc) = (bench.standin(), compiler());
        let ctx = bench.open(&standin, &nvrtc.path);
        for shape in [SHAPE, [17, 130, 96], [33, 8, 32]] {
            same_bits(&ctx, shape)?;
        }
        contains(
            &nvrtc.log(),
            "nvrtcCreateProgram mxf4 headers 0 kernel true\nnvrtcCompileProgram --gpu-architecture=sm_120a\nnvrtcDestroyProgram",
        )?;
        let log = standin.log();
        contains(
            &log,
            "cuModuleLoadData [127, 69, 76, 70]\ncuModuleGetFunction mx_matmul_mxf4 of 0x5000",
        )?;
        contains(
            &log,
            "launch 0x6000 grid 1 2 1 block 256 1 1 shared 0 stream 0x2000 m 160 n 48 k 224",
        )?;
        // Compiled once; the known-answer test's seven products, and these.
        assert_eq!(nvrtc.log().matches("nvrtcCreateProgram").count(), 1);
        assert_eq!(log.matches("emulated 0").count(), 10);
        contains(&standin.left(), "module 0x5000")?;
        let error =
            Matmul::new(&ctx, &MatmulDesc { a: MXFP8_E4M3.into(), ..desc(SHAPE, Tier::Native) });
        contains(&error.unwrap_err().to_string(), "cuda-mxfp4: mxfp8-e4m3/1x32 is not E2M1")?;
        drop(ctx);
        assert_eq!(standin.left() + &nvrtc.left(), "");
        Ok(())
    }

    fn targets(bench: &Bench) -> Result<(), Failed> {
        for (capability, target) in
            [(121, "sm_121a"), (100, "sm_100a"), (90, "sm_90a"), (75, "sm_75a")]
        {
            let (standin, nvrtc) = (bench.standin(), compiler());
            standin.set(Key::Capability as u32, capability);
            // NVRTC_ERROR_COMPILATION.
            nvrtc.set(0, 6);
            let reason = bench.reasons(&bench.open(&standin, &nvrtc.path));
            contains(
                &reason,
                &format!(
                    "cuda-mxfp4: nvrtc does not compile it with --gpu-architecture={target}: mxf4(1): error: of the stand-in"
                ),
            )?;
        }
        Ok(())
    }

    fn refused(bench: &Bench) -> Result<(), Failed> {
        let (standin, nvrtc) = (bench.standin(), compiler());
        standin.set(Key::Load as u32, 209);
        let ctx = bench.open(&standin, &nvrtc.path);
        contains(
            &bench.reasons(&ctx),
            "cuda-mxfp4: cuModuleLoadData: CUDA_ERROR_NO_BINARY_FOR_GPU (209)",
        )?;
        let reason = bench.reasons(&bench.open(&bench.standin(), Path::new("/nowhere/nvrtc.so")));
        contains(&reason, "cuda-mxfp4: cannot load /nowhere/nvrtc.so")?;
        // Output of no possible size, of code and of messages.
        for status in [0, 6] {
            let (standin, nvrtc) = (bench.standin(), compiler());
            nvrtc.set(0, status);
            nvrtc.set(1, u64::MAX);
            let reason = bench.reasons(&bench.open(&standin, &nvrtc.path));
            contains(&reason, "cuda-mxfp4: nvrtc has 18446744073709551615 bytes of output")?;
        }
        let lacking = standin_without(bench, "cuLaunchKernel");
        let reason = bench.reasons(&bench.open(&lacking, &nvrtc.path));
        contains(&reason, "has no function cuLaunchKernel")?;
        // The next tier has the product.
        let (why, got) = product(&ctx, SHAPE, Tier::Auto);
        contains(&why, "no native route: cuda-mxfp4: cuModuleLoadData")?;
        if got.contains(&f32::NAN.to_bits()) { Err("no product".into()) } else { Ok(()) }
    }

    fn compiler() -> Standin {
        standin("nvrtc", &[])
    }

    fn standin_without(bench: &Bench, function: &str) -> Standin {
        standin("cuda", &[function]).identify(&bench.adapter)
    }

    fn failed_launch(bench: &Bench) -> Result<(), Failed> {
        let (standin, nvrtc) = (bench.standin(), compiler());
        let ctx = bench.open(&standin, &nvrtc.path);
        same_bits(&ctx, SHAPE)?;
        standin.set(Key::Launch as u32, 719);
        // This one is computed by the next tier, and the route is not used again.
        let (_, got) = product(&ctx, SHAPE, Tier::Auto);
        if got.contains(&u32::MAX) {
            return Err("no product".into());
        }
        let report = pollster::block_on(ctx.native())?;
        let route = report.routes.iter().find(|route| route.name == "cuda-mxfp4").unwrap();
        let RouteState::Disabled(reason) = &route.state else { panic!("{route:?}") };
        contains(reason, "cuLaunchKernel: CUDA_ERROR_LAUNCH_FAILED (719)")
    }

    /// The known-answer test finds what a device that departs from its documentation would do.
    fn wrong_kernel(bench: &Bench) -> Result<(), Failed> {
        for change in [
            ["scales[line + (t & 1) * 8]", "scales[line]"],
            ["scale_b[j], 2 * half);", "scale_b[j], 0);"],
            ["q + e / 2 * 8;", "q + e % 2 * 8;"],
        ] {
            let program = machine::Program::changed(machine::CUDA, &[change]);
            let (standin, nvrtc) = (bench.standin(), compiler());
            bench.emulate(&standin, &program);
            let reason = bench.reasons(&bench.open(&standin, &nvrtc.path));
            contains(&reason, "cuda-mxfp4: known-answer test of mxfp4/1x32 × mxfp4/1x32: ")?;
        }
        Ok(())
    }

    fn real_compiler(bench: &Bench) -> Result<(), Failed> {
        let nvrtc = bench.nvrtc.as_deref().ok_or("no NVRTC")?;
        for capability in [120, 121] {
            let standin = bench.standin();
            standin.set(Key::Capability as u32, capability);
            same_bits(&bench.open(&standin, nvrtc), SHAPE)?;
        }
        Ok(())
    }

    fn real_refusal(bench: &Bench) -> Result<(), Failed> {
        let nvrtc = bench.nvrtc.as_deref().ok_or("no NVRTC")?;
        for capability in [90, 100] {
            let standin = bench.standin();
            standin.set(Key::Capability as u32, capability);
            let reason = bench.reasons(&bench.open(&standin, nvrtc));
            contains(&reason, "Instruction 'mma with block scale' not supported on .target 'sm_")?;
        }
        Ok(())
    }
}
