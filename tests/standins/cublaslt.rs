//! A stand-in for cuBLASLt: it records descriptors and attributes, and multiplies on the host what NVIDIA documents for FP8,
//! MXFP8 and NVFP4. Written from the documentation, not from the crate. tests/native_cuda.rs compiles and drives it.
#![allow(non_snake_case, clippy::missing_safety_doc, clippy::too_many_arguments)]

mod log;
mod lt;

use std::ffi::{c_int, c_void};
use std::sync::atomic::AtomicU64;

use log::{gone, log, made, setting, standin_set};
use lt::{Choice, Layout, element, fp8, multiply};

type Status = c_int;
const INVALID_VALUE: Status = 7;
const NOT_SUPPORTED: Status = 15;

/// What the suite sets, by number.
static SETTINGS: [AtomicU64; 4] = [
    // 0, bits: 1 takes FP8, 2 takes MXFP8, 4 takes NVFP4; 8: reads scales row by row, which is wrong; 16: adds 1 to the last sum;
    // 32: every product fails.
    AtomicU64::new(7),
    AtomicU64::new(u64::MAX), // 1: how many products succeed before all fail.
    AtomicU64::new(130_000),  // 2: the version.
    AtomicU64::new(0),        // 3: a code that is read wrongly, as `lt::element` has it.
];

#[derive(Clone, Copy, Debug, Default)]
pub struct Desc {
    compute: c_int,
    transposed: [i32; 2],
    modes: [i32; 2],
    scales: [u64; 2],
    fast: i8,
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtGetVersion() -> usize {
    setting(2) as usize
}

descriptors!(cublasLtCreate cublasLtDestroy cublasLtMatmulDescCreate cublasLtMatmulDescDestroy cublasLtMatrixLayoutCreate
    cublasLtMatrixLayoutDestroy cublasLtMatmulPreferenceCreate cublasLtMatmulPreferenceDestroy
    cublasLtMatmulPreferenceSetAttribute, desc Desc::default());

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescSetAttribute(
    desc: *mut Desc,
    attribute: c_int,
    value: *const c_void,
    size: usize,
) -> Status {
    log(format!("attribute {attribute} size {size}"));
    let desc = unsafe { &mut *desc };
    let word = || unsafe { value.cast::<i32>().read_unaligned() };
    let address = || unsafe { value.cast::<u64>().read_unaligned() };
    match (attribute, size) {
        (3, 4) => desc.transposed[0] = word(),
        (4, 4) => desc.transposed[1] = word(),
        (17, 8) => desc.scales[0] = address(),
        (18, 8) => desc.scales[1] = address(),
        (25, 1) => desc.fast = unsafe { value.cast::<i8>().read() },
        (31, 4) => desc.modes[0] = word(),
        (32, 4) => desc.modes[1] = word(),
        // Unknown, or of another size.
        _ => return INVALID_VALUE,
    }
    0
}

/// The bit of `MODE` for a product that NVIDIA documents, or none.
fn known(desc: &Desc, a: &Layout, b: &Layout, d: &Layout) -> Option<u64> {
    let (k, n, m) = (a.rows, a.columns, b.columns);
    let shapes = b.rows == k && [d.rows, d.columns] == [n, m] && d.ld >= n as i64;
    // CUBLAS_COMPUTE_32F, T and N, sums in CUDA_R_32F.
    if !shapes || desc.compute != 68 || desc.transposed != [1, 0] || d.kind != 0 || a.kind != b.kind
    {
        return None;
    }
    // 16 bytes.
    if [a.ld, b.ld].iter().any(|ld| ld % 16 != 0) || n % 16 != 0 || m % 16 != 0 || k % 16 != 0 {
        return None;
    }
    let scaled = desc.scales.iter().all(|at| *at != 0 && at % 16 == 0);
    match (a.kind, desc.modes) {
        (28, [0, 0]) if desc.fast == 0 => Some(1),
        (28, [2, 2]) if scaled && k % 32 == 0 => Some(2),
        (33, [1, 1]) if scaled && k % 32 == 0 => Some(4),
        _ => None,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulAlgoGetHeuristic(
    _: *mut c_void,
    desc: *const Desc,
    a: *const Layout,
    b: *const Layout,
    _: *const Layout,
    d: *const Layout,
    _: *mut c_void,
    wanted: c_int,
    out: *mut Choice<[u64; 8]>,
    found: *mut c_int,
) -> Status {
    let (desc, a, b, d) = unsafe { (&*desc, &*a, &*b, &*d) };
    let yes = known(desc, a, b, d).is_some_and(|bit| setting(0) & bit != 0);
    log(format!("heuristic {desc:?} {a:?} {b:?} {d:?}: {yes}"));
    unsafe { *found = 0 };
    if !yes {
        return NOT_SUPPORTED;
    }
    assert!(wanted >= 1);
    unsafe {
        *found = 1;
        *out = Choice {
            algorithm: [a.kind as u64; 8],
            workspace: 0,
            state: 0,
            waves: 1.0,
            reserved: [0; 4],
        };
    }
    0
}

/// An operand's values, a column of k after the other.
unsafe fn values(layout: &Layout, at: *const u8, mode: i32, scales: u64) -> Vec<f64> {
    let (k, lines) = (layout.rows as usize, layout.columns as usize);
    let ld = layout.ld as usize;
    let wrong = setting(0) & 8 != 0;
    let scale = |line: usize, group: usize, groups: usize| {
        let across = groups.div_ceil(4);
        // NVIDIA's tiles of 128 × 4: cuBLAS documentation, "1D Block Scaling Factors Layout".
        let tile = (line / 128) * across + group / 4;
        let offset = tile * 512 + (line % 32) * 16 + (line % 128) / 32 * 4 + group % 4;
        let offset = if wrong { line * groups + group } else { offset };
        unsafe { (scales as *const u8).add(offset).read() }
    };
    let mut out = Vec::with_capacity(k * lines);
    for line in 0..lines {
        for i in 0..k {
            let value = unsafe { element(layout.kind, at, line * ld + i, setting(3)) };
            out.push(match mode {
                1 => value * fp8(scale(line, i / 16, k / 16), 3, 7),
                2 => value * 2f64.powi(i32::from(scale(line, i / 32, k / 32)) - 127),
                _ => value,
            });
        }
    }
    out
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmul(
    _: *mut c_void,
    desc: *const Desc,
    alpha: *const f32,
    a_at: *const u8,
    a: *const Layout,
    b_at: *const u8,
    b: *const Layout,
    beta: *const f32,
    c_at: *const f32,
    c: *const Layout,
    d_at: *mut f32,
    d: *const Layout,
    algorithm: *const u64,
    _: *mut c_void,
    _: usize,
    stream: *mut c_void,
) -> Status {
    let (desc, a, b, d) = unsafe { (&*desc, &*a, &*b, &*d) };
    let (alpha, beta) = unsafe { (*alpha, *beta) };
    log(format!("matmul {desc:?} {a:?} {b:?} {d:?} alpha {alpha} beta {beta} stream {stream:?}"));
    let left = setting(1);
    if left == 0 || setting(0) & 32 != 0 {
        // CUBLAS_STATUS_EXECUTION_FAILED.
        return 13;
    }
    standin_set(1, left.saturating_sub(1));
    let fits = known(desc, a, b, d).is_some() && std::ptr::eq(c, d) && c_at == d_at.cast_const();
    if !fits || alpha != 1.0 || beta != 0.0 || unsafe { *algorithm } != a.kind as u64 {
        return INVALID_VALUE;
    }
    let left = unsafe { values(a, a_at, desc.modes[0], desc.scales[0]) };
    let right = unsafe { values(b, b_at, desc.modes[1], desc.scales[1]) };
    unsafe { multiply(&left, &right, a.rows as usize, d_at, d.ld as usize) };
    if setting(0) & 16 != 0 {
        // Of the outputs without padding, surely the first.
        unsafe { *d_at += 1.0 };
    }
    0
}
