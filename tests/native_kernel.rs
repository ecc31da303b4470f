//! The crate's own CUDA kernel from tensors to y: packed on a software adapter, handed to a stand-in for CUDA
//! (tests/standins/cuda_kernel.rs), run there on emulated tensor cores (tests/emulator), and finished on the adapter again. And
//! what is said where it cannot be compiled, loaded or launched.
//!
//! Stamped on the first Vulkan adapter; without one the tests show as ignored. With `MX_NATIVE_TOOLS` (tests/codegen.rs)
//! NVIDIA's own compiler compiles, and refuses, too.

mod common;
#[cfg(target_os = "linux")]
#[path = "emulator/mod.rs"]
mod machine;

#[cfg(not(target_os = "linux"))]
fn main() {}

#[cfg(target_os = "linux")]
fn main() {
    suite::main();
}

#[cfg(target_os = "linux")]
mod suite {
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use ash::vk;
    use libtest_mimic::{Arguments, Failed, Trial};
    use microscaling::native::{Libraries, RouteState};
    use microscaling::{
        Axis, Context, DType, Error, Layout, MXFP4, MXFP8_E4M3, Matmul, MatmulDesc, MxTensor,
        Options, Tier, engine, wgpu,
    };

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

    /// What tests set; the numbers are the stand-in's.
    enum Key {
        Uuid = 0,
        Capability = 2,
        Emulate = 3,
        Tensor = 4,
        Compile = 5,
        Load = 6,
        Launch = 7,
    }

    #[derive(Clone)]
    struct Bench {
        adapter: wgpu::Adapter,
        dir: Arc<tempfile::TempDir>,
        program: Arc<machine::Program>,
        nvrtc: Option<PathBuf>,
    }

    /// A stand-in of a test's own.
    struct Standin {
        path: PathBuf,
        library: libloading::Library,
    }

    static NUMBER: AtomicU32 = AtomicU32::new(0);

    impl Bench {
        fn new(adapter: wgpu::Adapter, nvrtc: Option<PathBuf>) -> Bench {
            let dir = tempfile::tempdir().unwrap();
            let source =
                Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/standins/cuda_kernel.rs");
            let output = Command::new(std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into()))
                .args(["--edition", "2024", "--crate-type", "cdylib", "-C", "opt-level=2", "-o"])
                .args([&dir.path().join("standin.so"), &source])
                .output()
                .expect("rustc");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let program = Arc::new(machine::Program::new(machine::CUDA));
            Bench { adapter, dir: dir.into(), program, nvrtc }
        }

        fn standin(&self) -> Standin {
            let number = NUMBER.fetch_add(1, Ordering::SeqCst);
            let path = self.dir.path().join(format!("libcuda-{number}.so"));
            std::fs::copy(self.dir.path().join("standin.so"), &path).unwrap();
            // SAFETY: the library has no initialisers but Rust's own.
            let library = unsafe { libloading::Library::new(&path) }.unwrap();
            let standin = Standin { path, library };
            let uuid = u128::from_be_bytes(self.uuid());
            standin.set(Key::Uuid as u32, (uuid >> 64) as u64);
            standin.set(1, uuid as u64);
            self.emulate(&standin, &self.program);
            standin
        }

        fn emulate(&self, standin: &Standin, program: &machine::Program) {
            standin.set(Key::Emulate as u32, program.address());
            standin.set(Key::Tensor as u32, program.kernel.tensor as usize as u64);
        }

        /// The UUID that Vulkan gives the adapter.
        fn uuid(&self) -> [u8; 16] {
            // SAFETY: the handles are only used within this function.
            unsafe {
                let hal = self.adapter.as_hal::<wgpu::hal::api::Vulkan>().unwrap();
                let mut id = vk::PhysicalDeviceIDProperties::default();
                let mut all = vk::PhysicalDeviceProperties2::default().push_next(&mut id);
                let instance = hal.shared_instance().raw_instance();
                instance.get_physical_device_properties2(hal.raw_physical_device(), &mut all);
                id.device_uuid
            }
        }

        /// A context of its own, with the stand-in as driver and, if no other is given, as compiler.
        fn open(&self, standin: &Standin, nvrtc: Option<&Path>) -> Context {
            let libraries = Libraries {
                cuda: Some(standin.path.clone()),
                nvrtc: Some(nvrtc.unwrap_or(&standin.path).into()),
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

    impl Standin {
        fn set(&self, key: u32, value: u64) {
            // SAFETY: the signature is the stand-in's.
            unsafe {
                let set: libloading::Symbol<unsafe extern "C" fn(u32, u64)> =
                    self.library.get(b"standin_set").unwrap();
                set(key, value);
            }
        }

        fn log(&self) -> String {
            // SAFETY: the signature is the stand-in's, and the second call has room for all of it.
            unsafe {
                let log: libloading::Symbol<unsafe extern "C" fn(*mut u8, usize) -> usize> =
                    self.library.get(b"standin_log").unwrap();
                let mut text = vec![0; log(std::ptr::null_mut(), 0)];
                log(text.as_mut_ptr(), text.len());
                String::from_utf8(text).unwrap()
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
        let standin = bench.standin();
        let ctx = bench.open(&standin, None);
        for shape in [SHAPE, [17, 130, 96], [33, 8, 32]] {
            same_bits(&ctx, shape)?;
        }
        let log = standin.log();
        contains(
            &log,
            "nvrtcCreateProgram headers 0 kernel true\nnvrtc option --gpu-architecture=sm_120a\nnvrtcDestroyProgram",
        )?;
        contains(
            &log,
            "cuModuleLoadData [127, 69, 76, 70]\ncuModuleGetFunction mx_matmul_mxf4 of 0x5000",
        )?;
        contains(
            &log,
            "launch 0x6000 grid 1 2 1 block 256 1 1 shared 0 stream 0x2000 m 160 n 48 k 224",
        )?;
        // Compiled once; the known-answer test's seven products, and these.
        assert_eq!(log.matches("nvrtcCreateProgram").count(), 1);
        assert_eq!(log.matches("emulated 0").count(), 10);
        let error =
            Matmul::new(&ctx, &MatmulDesc { a: MXFP8_E4M3.into(), ..desc(SHAPE, Tier::Native) });
        contains(&error.unwrap_err().to_string(), "cuda-mxfp4: mxfp8-e4m3/1x32 is not E2M1")
    }

    fn targets(bench: &Bench) -> Result<(), Failed> {
        for (capability, target) in
            [(121, "sm_121a"), (100, "sm_100a"), (90, "sm_90a"), (75, "sm_75a")]
        {
            let standin = bench.standin();
            standin.set(Key::Capability as u32, capability);
            standin.set(Key::Compile as u32, 6);
            let reason = bench.reasons(&bench.open(&standin, None));
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
        let standin = bench.standin();
        standin.set(Key::Load as u32, 209);
        let ctx = bench.open(&standin, None);
        contains(
            &bench.reasons(&ctx),
            "cuda-mxfp4: cuModuleLoadData: CUDA_ERROR_NO_BINARY_FOR_GPU (209)",
        )?;
        let reason =
            bench.reasons(&bench.open(&bench.standin(), Some(Path::new("/nowhere/nvrtc.so"))));
        contains(&reason, "cuda-mxfp4: cannot load /nowhere/nvrtc.so")?;
        // The next tier has the product.
        let (why, got) = product(&ctx, SHAPE, Tier::Auto);
        contains(&why, "no native route: cuda-mxfp4: cuModuleLoadData")?;
        if got.contains(&f32::NAN.to_bits()) { Err("no product".into()) } else { Ok(()) }
    }

    fn failed_launch(bench: &Bench) -> Result<(), Failed> {
        let standin = bench.standin();
        let ctx = bench.open(&standin, None);
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
            let standin = bench.standin();
            bench.emulate(&standin, &program);
            let reason = bench.reasons(&bench.open(&standin, None));
            contains(&reason, "cuda-mxfp4: known-answer test: ")?;
        }
        Ok(())
    }

    fn real_compiler(bench: &Bench) -> Result<(), Failed> {
        for capability in [120, 121] {
            let standin = bench.standin();
            standin.set(Key::Capability as u32, capability);
            same_bits(&bench.open(&standin, bench.nvrtc.as_deref()), SHAPE)?;
        }
        Ok(())
    }

    fn real_refusal(bench: &Bench) -> Result<(), Failed> {
        for capability in [90, 100] {
            let standin = bench.standin();
            standin.set(Key::Capability as u32, capability);
            let reason = bench.reasons(&bench.open(&standin, bench.nvrtc.as_deref()));
            contains(&reason, "Instruction 'mma with block scale' not supported on .target 'sm_")?;
        }
        Ok(())
    }
}
