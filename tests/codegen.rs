//! The native FP4 kernels through the vendors' own compilers: the tensor instructions are there for the devices that have
//! them, and refused for those that have not. Nothing runs; tests/emulator.rs has what the kernels compute.
//!
//! `MX_NATIVE_TOOLS` names a Python environment into which tests/codegen/requirements.txt was installed (tests/run.sh does
//! that); everything in it is then required. Without it the tests show as ignored.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::{Arguments, Failed, Trial};

const CUDA_SOURCE: &str = include_str!("../src/native/cuda/mxf4.cu");
const HIP_SOURCE: &str = include_str!("../src/native/hip/mxf4.hip");
const TCGEN05: &str = include_str!("codegen/tcgen05.ptx");

type Test = fn(&Tools) -> Result<(), Failed>;

const SUITE: &[(&str, Test)] = &[
    ("cuda_kernel_is_omma_sf_on_sm_120a_and_sm_121a", omma),
    ("cuda_kernel_selects_both_halves_of_its_scales", selectors),
    ("cuda_kernel_is_refused_elsewhere", omma_refused),
    ("tcgen05_is_utcomma_on_sm_100a_and_sm_103a", utcomma),
    ("tcgen05_is_refused_elsewhere", utcomma_refused),
    ("hip_kernel_is_v_mfma_scale_on_gfx950", mfma),
    ("hip_kernel_is_refused_on_gfx942", mfma_refused),
];

fn main() {
    let args = Arguments::from_args();
    let tools = std::env::var_os("MX_NATIVE_TOOLS").map(PathBuf::from);
    let trials = SUITE
        .iter()
        .map(|(name, test)| match &tools {
            None => Trial::test(format!("[no tools] {name}"), || Ok(())).with_ignored_flag(true),
            Some(dir) => {
                let (dir, test) = (dir.clone(), *test);
                Trial::test(*name, move || test(&Tools::find(&dir)?))
            }
        })
        .collect();
    libtest_mimic::run(&args, trials).exit();
}

// ---- The tools -------------------------------------------------------------------------------------------------------

struct Tools {
    python: PathBuf,
    /// NVIDIA's packages.
    cuda: PathBuf,
    scratch: tempfile::TempDir,
}

impl Tools {
    fn find(environment: &Path) -> Result<Tools, Failed> {
        let environment = std::fs::canonicalize(environment)
            .map_err(|error| format!("MX_NATIVE_TOOLS={}: {error}", environment.display()))?;
        let python = environment.join("bin/python");
        let code = "import sysconfig; print(sysconfig.get_path('purelib'))";
        let packages = run(Command::new(&python).args(["-c", code]))??;
        let cuda = Path::new(packages.trim()).join("nvidia/cu13");
        if !cuda.is_dir() {
            return Err(format!("{} is missing", cuda.display()).into());
        }
        Ok(Tools { python, cuda, scratch: tempfile::tempdir()? })
    }

    fn file(&self, name: &str, contents: &[u8]) -> Result<PathBuf, Failed> {
        let path = self.scratch.path().join(name);
        std::fs::write(&path, contents)?;
        Ok(path)
    }

    /// The machine code of a cubin, as text.
    fn disassembled(&self, cubin: &Path) -> Result<String, Failed> {
        Ok(run(Command::new(self.cuda.join("bin/nvdisasm")).arg(cubin))??)
    }

    /// Assembles PTX for its own target.
    fn assembled(&self, ptx: &str, target: &str) -> Result<Result<PathBuf, String>, Failed> {
        let source = self.file("kernel.ptx", ptx.as_bytes())?;
        let cubin = self.scratch.path().join("kernel.cubin");
        let mut command = Command::new(self.cuda.join("bin/ptxas"));
        let done = run(command.arg(format!("-arch={target}")).arg(source).arg("-o").arg(&cubin))?;
        Ok(done.map(|_| cubin))
    }

    /// Compiles for AMD's device as hiprtc would, to assembly.
    fn hip(&self, target: &str, side: u32) -> Result<Result<String, String>, Failed> {
        // The two attributes that hiprtc knows without a header.
        let prelude = "#define __global__ __attribute__((global))\n#define __device__ __attribute__((device))\n";
        let source = self.file("kernel.hip", format!("{prelude}{HIP_SOURCE}").as_bytes())?;
        let assembly = self.scratch.path().join("kernel.s");
        let done = run(Command::new(&self.python)
            .args([
                "-m",
                "ziglang",
                "clang",
                "-x",
                "hip",
                "--cuda-device-only",
                "-nogpuinc",
                "-nogpulib",
            ])
            .args([
                "-O3",
                "-Werror",
                "-S",
                &format!("--offload-arch={target}"),
                &format!("-DSIDE={side}"),
            ])
            .arg("-o")
            .args([&assembly, &source]))?;
        Ok(match done {
            Ok(_) => Ok(std::fs::read_to_string(assembly)?),
            Err(text) => Err(text),
        })
    }
}

/// What a program says: to its output if it succeeds, to its error output if not.
fn run(command: &mut Command) -> Result<Result<String, String>, Failed> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr) + &text(&output.stdout))
    })
}

/// What NVRTC makes of the kernel: a cubin for `sm_…`, PTX for `compute_…`, or its log.
fn nvrtc(tools: &Tools, target: &str) -> Result<Result<Vec<u8>, String>, Failed> {
    // SAFETY: the signatures are nvrtc.h's; buffers have the sizes that the library asks for.
    unsafe {
        let library = libloading::Library::new(tools.cuda.join("lib/libnvrtc.so.13"))?;
        let create: libloading::Symbol<
            unsafe extern "C" fn(
                *mut *mut c_void,
                *const c_char,
                *const c_char,
                c_int,
                *const *const c_char,
                *const *const c_char,
            ) -> c_int,
        > = library.get(b"nvrtcCreateProgram")?;
        let compile: libloading::Symbol<
            unsafe extern "C" fn(*mut c_void, c_int, *const *const c_char) -> c_int,
        > = library.get(b"nvrtcCompileProgram")?;
        type Size = unsafe extern "C" fn(*mut c_void, *mut usize) -> c_int;
        type Get = unsafe extern "C" fn(*mut c_void, *mut c_char) -> c_int;
        let read = |size: &str, get: &str, program| -> Result<Vec<u8>, Failed> {
            let (size, get): (libloading::Symbol<Size>, libloading::Symbol<Get>) =
                (library.get(size.as_bytes())?, library.get(get.as_bytes())?);
            let mut bytes = 0;
            if size(program, &mut bytes) != 0 {
                return Err("NVRTC gives no size".into());
            }
            let mut buffer = vec![0u8; bytes];
            get(program, buffer.as_mut_ptr().cast());
            Ok(buffer)
        };
        let (source, name) = (CString::new(CUDA_SOURCE)?, c"mxf4.cu");
        let option = CString::new(format!("--gpu-architecture={target}"))?;
        let mut program = std::ptr::null_mut();
        let none = std::ptr::null();
        if create(&mut program, source.as_ptr(), name.as_ptr(), 0, none, none) != 0 {
            return Err("nvrtcCreateProgram failed".into());
        }
        if compile(program, 1, [option.as_ptr()].as_ptr()) != 0 {
            let log = read("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program)?;
            return Ok(Err(CStr::from_bytes_until_nul(&log)?.to_string_lossy().into_owned()));
        }
        if target.starts_with("compute_") {
            return read("nvrtcGetPTXSize", "nvrtcGetPTX", program).map(Ok);
        }
        read("nvrtcGetCUBINSize", "nvrtcGetCUBIN", program).map(Ok)
    }
}

// ---- NVIDIA ----------------------------------------------------------------------------------------------------------

/// How many instructions of a kernel step: 4 × 4 fragments, two halves of a stage.
const MMAS: usize = 32;

fn expect(what: &str, got: usize, want: usize) -> Result<(), Failed> {
    if got == want { Ok(()) } else { Err(format!("{got} {what}, not {want}").into()) }
}

fn omma(tools: &Tools) -> Result<(), Failed> {
    for target in ["sm_120a", "sm_121a"] {
        let cubin = nvrtc(tools, target)??;
        let text = tools.disassembled(&tools.file("kernel.cubin", &cubin)?)?;
        expect(
            &format!("OMMA.SF of E2M1 and E8M0 on {target}"),
            text.matches("OMMA.SF.16864.F32.E2M1.E2M1.E8").count(),
            MMAS,
        )?;
        // Registers hold all: what is spilled is read back by LDL.
        expect("spills", text.matches(" LDL").count() + text.matches(" STL").count(), 0)?;
        if !text.contains("LDGSTS") {
            return Err("no asynchronous copies".into());
        }
    }
    Ok(())
}

/// What the emulator does not see: the operands of the instruction itself.
fn selectors(tools: &Tools) -> Result<(), Failed> {
    let ptx = nvrtc(tools, "compute_120a")??;
    let ptx = CStr::from_bytes_until_nul(&ptx)?.to_string_lossy().into_owned();
    let lines: Vec<_> = ptx.lines().filter(|line| line.contains("mma.sync")).collect();
    expect("mma.sync", lines.len(), MMAS)?;
    let with =
        |selector: &str| lines.iter().filter(|line| line.matches(selector).count() == 2).count();
    expect("selectors of the lower bytes", with("{0, 0}"), MMAS / 2)?;
    expect("selectors of the upper bytes", with("{2, 0}"), MMAS / 2)?;
    for line in lines {
        // d, a, b, c and the two scales: c is d.
        let groups: Vec<&str> =
            line.split('{').skip(1).filter_map(|g| g.split('}').next()).collect();
        let registers: Vec<usize> = groups.iter().map(|group| group.split(',').count()).collect();
        if registers != [4, 4, 2, 4, 1, 2, 1, 2] {
            return Err(format!("operands {registers:?}: {line}").into());
        }
    }
    Ok(())
}

fn omma_refused(tools: &Tools) -> Result<(), Failed> {
    for target in ["sm_90a", "sm_100a", "sm_120"] {
        match nvrtc(tools, target)? {
            Ok(_) => return Err(format!("compiled for {target}").into()),
            Err(log) if log.contains("mma with block scale") && log.contains("not supported") => {}
            Err(log) => return Err(format!("{target}: {log}").into()),
        }
    }
    Ok(())
}

fn utcomma(tools: &Tools) -> Result<(), Failed> {
    for target in ["sm_100a", "sm_103a"] {
        let cubin = tools.assembled(&TCGEN05.replace("TARGET", target), target)??;
        let text = tools.disassembled(&cubin)?;
        expect(&format!("UTCOMMA on {target}"), text.matches("UTCOMMA").count(), 1)?;
    }
    Ok(())
}

fn utcomma_refused(tools: &Tools) -> Result<(), Failed> {
    for target in ["sm_90a", "sm_120a"] {
        match tools.assembled(&TCGEN05.replace("TARGET", target), target)? {
            Ok(_) => return Err(format!("assembled for {target}").into()),
            Err(log) if log.contains("tcgen05") && log.contains("not supported") => {}
            Err(log) => return Err(format!("{target}: {log}").into()),
        }
    }
    Ok(())
}

// ---- AMD -------------------------------------------------------------------------------------------------------------

const SIDES: [(u32, &str, usize); 2] =
    [(16, "v_mfma_scale_f32_16x16x128_f8f6f4", 16), (32, "v_mfma_scale_f32_32x32x64_f8f6f4", 4)];

fn mfma(tools: &Tools) -> Result<(), Failed> {
    for (side, instruction, count) in SIDES {
        let text = tools.hip("gfx950", side)??;
        let lines: Vec<_> = text.lines().filter(|line| line.contains(instruction)).collect();
        expect(instruction, lines.len(), count)?;
        // Both formats FP4; byte 0 of the scales, which the assembler writes as no selection.
        let right =
            |line: &&&str| line.contains("cbsz:4 blgp:4") && line.contains("op_sel_hi:[0,0,0]");
        expect("of them with FP4 twice", lines.iter().filter(right).count(), count)?;
        if !text.contains(".vgpr_spill_count: 0") {
            return Err("registers are spilled".into());
        }
    }
    Ok(())
}

fn mfma_refused(tools: &Tools) -> Result<(), Failed> {
    for (side, ..) in SIDES {
        match tools.hip("gfx942", side)? {
            Ok(_) => return Err("compiled for gfx942".into()),
            Err(log) if log.contains("needs target feature gfx950-insts") => {}
            Err(log) => return Err(log.into()),
        }
    }
    Ok(())
}
