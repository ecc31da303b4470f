//! The native FP4 kernels on emulated tensor cores: all of their code, compiled for the host by the C compiler, with the one
//! tensor instruction executed by an emulator that is written from the instruction's documentation.
//!
//! What this shows: that the kernels load what the documentation says a lane holds, for ragged shapes, any order of warps and
//! any timing of asynchronous copies, and that with the exact tier's order of additions they give the exact tier's bits. What
//! it cannot show: that a device keeps to its documentation, and how it adds up. No such device has run these kernels.
#![cfg(target_os = "linux")]

mod common;
#[path = "emulator/mod.rs"]
mod machine;

use common::{to_f32, words};
use machine::{CUDA, HIP_16, HIP_32, Kernel, Program};
use microscaling::{
    Axis, Context, DType, DeviceChoice, Layout, MXFP4, Matmul, MatmulDesc, MxTensor, Options, Tier,
};

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

/// The kernel's sums.
fn sums(
    program: &Program,
    a: &Operand,
    b: &Operand,
    seed: u32,
    late: bool,
) -> Result<Vec<f32>, i32> {
    let operands = [&a.codes[..], &a.scales, &b.codes, &b.scales];
    program.run(operands, [a.lines, b.lines, a.k], seed, late)
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
    let sums = sums(program, a, b, seed, late).unwrap_or_else(|code| panic!("host.c says {code}"));
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

/// A second source: the layouts of CUTLASS's traits for this instruction (`SM120_16x8x64_TN_VS`), numbers of a thread and of a
/// value in it to an offset in the matrix, columns first.
#[test]
fn fragment_maps_are_those_of_cutlass_too() {
    use machine::ptx;
    for t in 0..32 {
        for v in 0..32 {
            // A: ((4, 8), (8, 2, 2)) : ((128, 1), (16, 8, 512)), of 16 rows.
            let at = t % 4 * 128 + t / 4 + v % 8 * 16 + v / 8 % 2 * 8 + v / 16 * 512;
            assert_eq!(ptx::place_in_a(t, v), (at % 16, at / 16));
        }
        for v in 0..16 {
            // B: ((4, 8), (8, 2)) : ((64, 1), (8, 256)), of 8 columns, those first.
            let at = t % 4 * 64 + t / 4 + v % 8 * 8 + v / 8 * 256;
            assert_eq!(ptx::place_in_b(t, v), (at / 8, at % 8));
        }
        for v in 0..4 {
            // C: ((4, 8), (2, 2)) : ((32, 1), (16, 8)), of 16 rows.
            let at = t % 4 * 32 + t / 4 + v % 2 * 16 + v / 2 * 8;
            assert_eq!(ptx::place_in_d(t, v), (at % 16, at / 16));
        }
        // Scales of A: (2, 2, 8) : (8, 0, 1); of B: (4, 8) : (0, 1). Where several threads have a line's, one is read.
        if let Some(row) = ptx::row_of_scales(t) {
            assert_eq!(row, t % 2 * 8 + t / 4);
        }
        if let Some(col) = ptx::column_of_scales(t) {
            assert_eq!(col, t / 4);
        }
    }
    let all = |of: fn(usize) -> Option<usize>| {
        let mut lines: Vec<_> = (0..32).filter_map(of).collect();
        lines.sort_unstable();
        lines
    };
    assert_eq!(all(ptx::row_of_scales), (0..16).collect::<Vec<_>>());
    assert_eq!(all(ptx::column_of_scales), (0..8).collect::<Vec<_>>());
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
                let sums = sums(&program, &a, &b, line as u32, false).unwrap();
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

/// Scales over the whole range below the anchor, against f64: what falls below f32's smallest number may be lost, and each of
/// a line's blocks is one addition.
#[test]
fn the_whole_range_of_scales_is_bounded() {
    for kernel in [CUDA, HIP_16, HIP_32] {
        let program = Program::new(kernel);
        let (m, n, k) = (21, 18, 352);
        let mut operands = [Operand::random(3, m, k, 0), Operand::random(4, n, k, 0)];
        for (operand, seed) in operands.iter_mut().zip([31, 32]) {
            let random = words(seed, operand.scales.len());
            operand.scales = random.iter().map(|word| (word % 128) as u8).collect();
        }
        let [a, b] = &operands;
        let sums = sums(&program, a, b, 0, true).unwrap();
        let value = |operand: &Operand, line: usize, at: usize| {
            let code = operand.codes[(line * k + at) / 2] >> (4 * (at % 2));
            let scale = i32::from(operand.scales[(line * k + at) / 32]) - 127;
            f64::from(machine::e2m1(code.into())) / 2.0 * 2f64.powi(scale)
        };
        for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
            let terms: Vec<f64> = (0..k).map(|at| value(a, i, at) * value(b, j, at)).collect();
            let (want, size): (f64, f64) =
                (terms.iter().sum(), terms.iter().map(|t| t.abs()).sum());
            let blocks = (k / 32) as f64;
            // A term below f32's smallest number is rounded too.
            let bound = blocks * (2f64.powi(-24) * size * 1.01 + 2f64.powi(-149));
            let got = f64::from(sums[i * n + j]);
            assert!((got - want).abs() <= bound, "({i}, {j}): {got}, want {want} within {bound}");
        }
    }
}

/// A NaN scale reaches its line and no other.
#[test]
fn a_nan_scale_makes_its_line_nan() {
    for kernel in [CUDA, HIP_16, HIP_32] {
        let program = Program::new(kernel);
        let (mut a, b) = (Operand::random(1, 20, 160, 3), Operand::random(2, 18, 160, 3));
        a.scales[7 * 5 + 3] = 255;
        let sums = sums(&program, &a, &b, 0, true).unwrap();
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
            let found = (0..4).any(|seed| match sums(&program, &a, &b, seed, seed % 2 == 0) {
                Ok(sums) => finished(&sums, &a, &b) != want,
                Err(_) => true,
            });
            assert!(found, "{}: {change:?} was not noticed", kernel.file);
        }
    }
}
