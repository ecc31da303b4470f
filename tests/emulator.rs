//! The native FP4 kernels on emulated tensor cores: all of their code, compiled for the host by the C compiler, with the one
//! tensor instruction executed by an emulator that is written from the instruction's documentation.
//!
//! What this shows: that the kernels load what the documentation says a lane holds, for ragged shapes, any order of warps and
//! any timing of asynchronous copies, and that with the exact tier's order of additions they give the exact tier's bits. What
//! it cannot show: that a device keeps to its documentation, and how it adds up. No such device has run these kernels.
#![cfg(target_os = "linux")]

#[path = "emulator/cdna.rs"]
mod cdna;
mod common;
#[path = "emulator/ptx.rs"]
mod ptx;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use common::{to_f32, words};
use microscaling::{
    Axis, Context, DType, DeviceChoice, Layout, MXFP4, Matmul, MatmulDesc, MxTensor, Options, Tier,
};
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
struct Kernel {
    file: &'static str,
    warp: u32,
    defines: &'static [&'static str],
    tensor: extern "C" fn(*mut Lane),
}

const CUDA: Kernel =
    Kernel { file: "src/native/cuda/mxf4.cu", warp: 32, defines: &[], tensor: ptx::m16n8k64 };
const HIP_16: Kernel = Kernel {
    file: "src/native/hip/mxf4.hip",
    warp: 64,
    defines: &["-DSIDE=16"],
    tensor: cdna::mfma::<16>,
};
const HIP_32: Kernel = Kernel { defines: &["-DSIDE=32"], tensor: cdna::mfma::<32>, ..HIP_16 };

type Emulate = unsafe extern "C" fn(
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

/// A kernel compiled for the host. One runs at a time.
struct Program {
    library: Mutex<libloading::Library>,
    kernel: Kernel,
    _dir: TempDir,
}

impl Program {
    fn new(kernel: Kernel) -> Program {
        Program::changed(kernel, &[])
    }

    /// With these replacements in its source, each of which must apply.
    fn changed(kernel: Kernel, changes: &[[&str; 2]]) -> Program {
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
        Program { library: Mutex::new(library), kernel, _dir: dir }
    }

    /// The sums [m, n] of operands as a route packs them.
    fn run(&self, a: &Operand, b: &Operand, seed: u32, late: bool) -> Result<Vec<f32>, i32> {
        let mut sums = vec![f32::NAN; a.lines * b.lines];
        let library = self.library.lock().unwrap();
        // SAFETY: the signature is host.c's, the slices have the lengths that it expects.
        let code = unsafe {
            let emulate: libloading::Symbol<Emulate> = library.get(b"emulate").unwrap();
            emulate(
                a.codes.as_ptr(),
                a.scales.as_ptr(),
                b.codes.as_ptr(),
                b.scales.as_ptr(),
                sums.as_mut_ptr(),
                a.lines as u32,
                b.lines as u32,
                a.k as u32,
                seed,
                i32::from(late),
                self.kernel.tensor,
            )
        };
        if code == 0 { Ok(sums) } else { Err(code) }
    }
}

/// An operand, packed as a route hands it over: scales relative to their line's anchor.
struct Operand {
    lines: usize,
    k: usize,
    codes: Vec<u8>,
    scales: Vec<u8>,
    anchors: Vec<u8>,
    tensor: MxTensor,
}

impl Operand {
    /// Random codes; scales up to `spread` binades below the line's largest, which differs from line to line.
    fn random(seed: u64, lines: usize, k: usize, spread: u32) -> Operand {
        let layout = Layout::new(MXFP4, Axis::One, lines, k).unwrap();
        let bytes =
            words(seed, layout.codes_len() / 4).into_iter().flat_map(u32::to_le_bytes).collect();
        let random = words(seed + 1000, lines + layout.scales_len());
        let (tops, random) = random.split_at(lines);
        let scales = random
            .iter()
            .enumerate()
            .map(|(i, word)| (90 + tops[i / layout.blocks()] % 80 - word % (spread + 1)) as u8)
            .collect();
        Operand::of(MxTensor::from_parts(layout, bytes, scales, 1.0).unwrap())
    }

    fn of(tensor: MxTensor) -> Operand {
        let layout = *tensor.layout();
        let lines = tensor.scales().chunks_exact(layout.blocks());
        let anchors: Vec<u8> = lines.clone().map(|line| *line.iter().max().unwrap()).collect();
        let relative = |(line, anchor): (&[u8], &u8)| {
            line.iter().map(|s| 127 - (anchor - s)).collect::<Vec<_>>()
        };
        Operand {
            lines: layout.lines(),
            k: layout.line_len(),
            codes: tensor.codes().to_vec(),
            scales: lines.zip(&anchors).flat_map(relative).collect(),
            anchors,
            tensor,
        }
    }
}

/// The product by the exact tier, on the CPU engine.
fn exact(a: &Operand, b: &Operand) -> Vec<u32> {
    let options = Options { device: DeviceChoice::Cpu, ..Default::default() };
    let ctx = Context::open_blocking(&options).unwrap();
    let (m, n, k) = (a.lines, b.lines, a.k);
    let desc = MatmulDesc { m, n, k, tier: Tier::Exact, ..Default::default() };
    let matmul = Matmul::new(&ctx, &desc).unwrap();
    let mut y = ctx.zeros(DType::F32, m, n).unwrap();
    let mut stream = ctx.stream();
    let (a, b) = (ctx.upload_mx(&a.tensor).unwrap(), ctx.upload_mx(&b.tensor).unwrap());
    matmul.record(&mut stream, &a, &b, &mut y).unwrap();
    ctx.submit(stream).unwrap();
    to_f32(DType::F32, &ctx.read_blocking(&y).unwrap()).iter().map(|x| x.to_bits()).collect()
}

/// The sums with the anchors' powers of two, rounded once.
fn finished(sums: &[f32], a: &Operand, b: &Operand) -> Vec<u32> {
    let anchors = a.anchors.iter().flat_map(|x| b.anchors.iter().map(move |y| [*x, *y]));
    sums.iter()
        .zip(anchors)
        .map(|(sum, anchors)| {
            let exponent: i32 = anchors.iter().map(|r| i32::from(*r) - 127).sum();
            ((f64::from(*sum) * 2f64.powi(exponent)) as f32).to_bits()
        })
        .collect()
}

#[track_caller]
fn same_bits(program: &Program, a: &Operand, b: &Operand, seed: u32, late: bool) {
    let sums = program.run(a, b, seed, late).unwrap_or_else(|code| panic!("host.c says {code}"));
    let (got, want) = (finished(&sums, a, b), exact(a, b));
    let wrong: Vec<_> = (0..got.len()).filter(|i| got[*i] != want[*i]).collect();
    if let Some(i) = wrong.first() {
        panic!(
            "{}x{}x{}: {} of {} outputs differ, the first at ({}, {}): {}, want {}",
            a.lines,
            b.lines,
            a.k,
            wrong.len(),
            got.len(),
            i / b.lines,
            i % b.lines,
            f32::from_bits(got[*i]),
            f32::from_bits(want[*i])
        );
    }
}

/// m, n and k (multiples of 32): tiles that are whole, ragged on every side, smaller than a fragment; more than one of all.
const SHAPES: [[usize; 3]; 9] = [
    [128, 128, 128],
    [1, 1, 32],
    [16, 8, 64],
    [17, 9, 96],
    [130, 5, 160],
    [3, 140, 256],
    [64, 33, 416],
    [150, 131, 288],
    [40, 100, 640],
];

fn the_exact_tiers_bits(kernel: Kernel) {
    let program = Program::new(kernel);
    for (i, [m, n, k]) in SHAPES.into_iter().enumerate() {
        let spread = [0, 3, 20, 60][i % 4];
        let a = Operand::random(i as u64, m, k, spread);
        let b = Operand::random(100 + i as u64, n, k, spread);
        same_bits(&program, &a, &b, i as u32, i % 2 == 0);
        same_bits(&program, &a, &b, 77 + i as u32, i % 2 == 1);
    }
}

#[test]
fn cuda_kernel_has_the_exact_tiers_bits() {
    the_exact_tiers_bits(CUDA);
}

#[test]
fn hip_kernel_of_16x16x128_has_the_exact_tiers_bits() {
    the_exact_tiers_bits(HIP_16);
}

#[test]
fn hip_kernel_of_32x32x64_has_the_exact_tiers_bits() {
    the_exact_tiers_bits(HIP_32);
}

/// One scale a binade up, one element's sign turned: exactly its own line of outputs changes.
fn one_perturbation(kernel: Kernel) {
    let program = Program::new(kernel);
    let (m, n, k) = (37, 29, 256);
    // All ones, so that every block counts.
    let ones = |lines| {
        let layout = Layout::new(MXFP4, Axis::One, lines, k).unwrap();
        let (codes, scales) = (vec![0x22; layout.codes_len()], vec![127; layout.scales_len()]);
        Operand::of(MxTensor::from_parts(layout, codes, scales, 1.0).unwrap())
    };
    for line in 0..m.max(n) {
        for on_a in [true, false] {
            if line >= if on_a { m } else { n } {
                continue;
            }
            for scale in [true, false] {
                let (mut a, mut b) = (ones(m), ones(n));
                let operand = if on_a { &mut a } else { &mut b };
                let block = line * 5 % 8;
                if scale {
                    operand.scales[line * 8 + block] += 1;
                } else {
                    operand.codes[line * 128 + block * 16 + line % 16] ^=
                        if line % 2 == 0 { 8 } else { 0x80 };
                }
                let sums = program.run(&a, &b, line as u32, false).unwrap();
                for (at, sum) in sums.iter().enumerate() {
                    let own = if on_a { at / n } else { at % n } == line;
                    let change = if scale { 32.0 } else { -2.0 };
                    assert_eq!(
                        *sum,
                        k as f32 + if own { change } else { 0.0 },
                        "line {line}, {at}"
                    );
                }
            }
        }
    }
}

#[test]
fn cuda_kernel_feels_every_line() {
    one_perturbation(CUDA);
}

#[test]
fn hip_kernel_feels_every_line() {
    one_perturbation(HIP_16);
    one_perturbation(HIP_32);
}

/// A NaN scale reaches its line and no other.
#[test]
fn a_nan_scale_makes_its_line_nan() {
    for kernel in [CUDA, HIP_16, HIP_32] {
        let program = Program::new(kernel);
        let (mut a, b) = (Operand::random(1, 20, 160, 3), Operand::random(2, 18, 160, 3));
        a.scales[7 * 5 + 3] = 255;
        let sums = program.run(&a, &b, 0, true).unwrap();
        for (at, sum) in sums.iter().enumerate() {
            assert_eq!(sum.is_nan(), at / 18 == 7, "{at}");
        }
    }
}

/// The test must be able to fail: errors of the kinds that such kernels have, each alone.
#[test]
fn planted_errors_are_found() {
    let cuda: &[[&str; 2]] = &[
        // Registers of A exchanged.
        [
            "fa[1] = codes_of(sa, line + 8, 2 * half, t);",
            "fa[1] = codes_of(sa, line, 2 * half + 1, t);",
        ],
        // The other lane's scales.
        ["scales[line + (t & 1) * 8]", "scales[line + (~t & 1) * 8]"],
        // The same scale for both halves.
        ["scale_b[j], 2 * half);", "scale_b[j], 0);"],
        // The exchange of chunks on one side only.
        ["chunk_offset(line, chunk) + 4 * t", "line * LINE + 16 * chunk + 4 * t"],
        // B's lanes read each other's words. (A's and B's together would be right: a sum in another order.)
        [
            "fb[j][0] = codes_of(sb, line, 2 * half, t);",
            "fb[j][0] = codes_of(sb, line, 2 * half, t ^ 1);",
        ],
        // No wait for copies; no wait for the other warps.
        ["copies_wait();\n", "\n"],
        ["barrier();\n", "\n"],
        // The wrong stage.
        ["&stages[turn][1]", "&stages[turn ^ 1][1]"],
        // Outputs exchanged.
        ["q + e / 2 * 8;", "q + e % 2 * 8;"],
        // Scales in the wrong order.
        ["<< (8 * i)", "<< (24 - 8 * i)"],
    ];
    let hip: &[[&str; 2]] = &[
        ["+ 4 * chunk + e % 4", "+ 4 * (e % 4) + chunk"],
        ["n, block + chunk, blocks, &scale_b[j]", "n, block + (chunk ^ 1), blocks, &scale_b[j]"],
        ["*scale = scales[at];", "*scale = scales[(u64)line * blocks + block / 2 * 2];"],
        [
            "mfma(fa, fb[j], sum[i][j], scale_a, scale_b[j])",
            "mfma(fa, fb[j], sum[i][j], scale_b[j], scale_a)",
        ],
    ];
    let kernels = [(CUDA, cuda), (HIP_16, hip), (HIP_32, hip)];
    // A ragged k, for the scales that are read byte by byte; two stages.
    let (a, b) = (Operand::random(5, 140, 416, 6), Operand::random(6, 20, 416, 6));
    let want = exact(&a, &b);
    for (kernel, changes) in kernels {
        for change in changes {
            let program = Program::changed(kernel, &[*change]);
            let found = (0..4).any(|seed| match program.run(&a, &b, seed, seed % 2 == 0) {
                Ok(sums) => finished(&sums, &a, &b) != want,
                Err(_) => true,
            });
            assert!(found, "{}: {change:?} was not noticed", kernel.file);
        }
    }
}
