//! Emulated tensor cores, and the kernels of src/native on them: see tests/emulator.rs.
#![allow(dead_code)] // Each test binary uses its part.

pub mod cdna;
pub mod ptx;

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// A lane's registers at the tensor instruction, as tests/emulator/host.c has them.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Lane {
    a: [u32; 4],
    b: [u32; 4],
    sa: u32,
    sb: u32,
    selector: u32,
    d: [f32; 16],
}

/// Twice the value of an E2M1 code, by its fields: OCP MX v1.0, table 5.
pub fn e2m1(code: u32) -> i32 {
    let (exponent, mantissa) = (code >> 1 & 3, code & 1);
    let doubled = if exponent == 0 { mantissa } else { (2 + mantissa) << (exponent - 1) };
    if code & 8 == 0 { doubled as i32 } else { -(doubled as i32) }
}

/// `d` plus a block's sum of products of doubled elements under its two scales.
pub fn accumulate(d: f32, sum: i32, scales: [u8; 2]) -> f32 {
    if scales.contains(&255) {
        return f32::NAN;
    }
    let exponent: i32 = scales.iter().map(|scale| i32::from(*scale) - 127).sum();
    d + (f64::from(sum) / 4.0 * 2f64.powi(exponent)) as f32
}

/// Which kernel, and on which machine it is emulated.
#[derive(Clone, Copy)]
pub struct Kernel {
    pub file: &'static str,
    warp: u32,
    defines: &'static [&'static str],
    pub tensor: extern "C" fn(*mut Lane),
}

pub const CUDA: Kernel =
    Kernel { file: "src/native/cuda/mxf4.cu", warp: 32, defines: &[], tensor: ptx::m16n8k64 };
pub const HIP_16: Kernel = Kernel {
    file: "src/native/hip/mxf4.hip",
    warp: 64,
    defines: &["-DSIDE=16"],
    tensor: cdna::mfma::<16>,
};
pub const HIP_32: Kernel = Kernel { defines: &["-DSIDE=32"], tensor: cdna::mfma::<32>, ..HIP_16 };

/// The function of tests/emulator/host.c.
pub type Emulate = unsafe extern "C" fn(
    *const u8,
    *const u8,
    *const u8,
    *const u8,
    *mut f32,
    u32,
    u32,
    u32,
    u32,
    i32,
    extern "C" fn(*mut Lane),
) -> i32;

/// A kernel compiled for the host.
pub struct Program {
    library: libloading::Library,
    pub kernel: Kernel,
    _dir: TempDir,
}

impl Program {
    pub fn new(kernel: Kernel) -> Program {
        Program::changed(kernel, &[])
    }

    /// With these replacements in its source, each of which must apply.
    pub fn changed(kernel: Kernel, changes: &[[&str; 2]]) -> Program {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut source = std::fs::read_to_string(root.join(kernel.file)).unwrap();
        for [from, to] in changes {
            assert!(source.contains(from), "{} has no {from:?}", kernel.file);
            source = source.replace(from, to);
        }
        let dir = tempfile::tempdir().unwrap();
        let (file, library) = (dir.path().join("kernel.c"), dir.path().join("kernel.so"));
        std::fs::write(&file, source).unwrap();
        // rustc's linker: it is there wherever this test was built.
        let output = Command::new("cc")
            .args(["-std=gnu11", "-O1", "-w", "-fPIC", "-shared", "-fno-strict-aliasing"])
            .arg(format!("-DWARP={}", kernel.warp))
            .arg(format!("-DKERNEL_FILE=\"{}\"", file.display()))
            .args(kernel.defines)
            .arg("-o")
            .args([&library, &root.join("tests/emulator/host.c")] as [&PathBuf; 2])
            .output()
            .expect("a C compiler");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        // SAFETY: the library has no initialisers.
        let library = unsafe { libloading::Library::new(&library) }.unwrap();
        Program { library, kernel, _dir: dir }
    }

    /// The sums [m, n] of operands as a route packs them: codes and scales of A and of B.
    pub fn run(
        &self,
        [a, a_scales, b, b_scales]: [&[u8]; 4],
        [m, n, k]: [usize; 3],
        seed: u32,
        late: bool,
    ) -> Result<Vec<f32>, i32> {
        assert_eq!([a.len(), a_scales.len()], [m * k / 2, m * k / 32]);
        assert_eq!([b.len(), b_scales.len()], [n * k / 2, n * k / 32]);
        let mut sums = vec![f32::NAN; m * n];
        // SAFETY: the signature is host.c's, the slices have the lengths that it expects.
        let code = unsafe {
            let emulate: libloading::Symbol<Emulate> = self.library.get(b"emulate").unwrap();
            let [m, n, k] = [m, n, k].map(|length| length as u32);
            let operands = [a, a_scales, b, b_scales].map(<[u8]>::as_ptr);
            let [a, a_scales, b, b_scales] = operands;
            let (sums, late, tensor) = (sums.as_mut_ptr(), i32::from(late), self.kernel.tensor);
            emulate(a, a_scales, b, b_scales, sums, m, n, k, seed, late, tensor)
        };
        if code == 0 { Ok(sums) } else { Err(code) }
    }

    /// The address of `emulate`, for a stand-in to call.
    pub fn address(&self) -> u64 {
        // SAFETY: the signature is host.c's.
        let emulate = unsafe { self.library.get::<Emulate>(b"emulate") }.unwrap();
        *emulate as usize as u64
    }
}
