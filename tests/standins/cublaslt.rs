//! A stand-in for cuBLASLt: it records descriptors and attributes, and multiplies on the host what NVIDIA documents for FP8,
//! MXFP8 and NVFP4. Written from the documentation, not from the crate. `--cfg old` reports another version, `--cfg lacks`
//! misses a function. tests/native_cuda.rs compiles and drives it.
#![allow(non_snake_case, clippy::missing_safety_doc, clippy::too_many_arguments)]

use std::ffi::{c_int, c_uint, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

type Status = c_uint;
const NOT_SUPPORTED: Status = 15;

static LOG: Mutex<String> = Mutex::new(String::new());
/// Bits: 1 takes FP8, 2 takes MXFP8, 4 takes NVFP4; 8: reads scales row by row, which is wrong; 16: adds 1 to the last sum;
/// 32: every product fails.
static MODE: AtomicU64 = AtomicU64::new(7);
/// How many products succeed before all fail.
static LEFT: AtomicU64 = AtomicU64::new(u64::MAX);

fn log(line: String) {
    let mut log = LOG.lock().unwrap_or_else(|e| e.into_inner());
    log.push_str(&line);
    log.push('\n');
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn standin_log(out: *mut u8, room: usize) -> usize {
    let log = LOG.lock().unwrap_or_else(|e| e.into_inner());
    let bytes = log.as_bytes();
    let n = bytes.len().min(room);
    unsafe { std::ptr::copy_nonoverlapping(bytes[bytes.len() - n..].as_ptr(), out, n) };
    bytes.len()
}

#[unsafe(no_mangle)]
pub extern "C" fn standin_set(key: u32, value: u64) {
    match key {
        0 => MODE.store(value, Ordering::SeqCst),
        _ => LEFT.store(value, Ordering::SeqCst),
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Desc {
    compute: c_uint,
    transposed: [i32; 2],
    modes: [i32; 2],
    scales: [u64; 2],
    fast: i8,
}

#[derive(Clone, Copy, Debug)]
struct Layout {
    kind: c_uint,
    rows: u64,
    columns: u64,
    ld: i64,
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtGetVersion() -> usize {
    if cfg!(old) { 110_000 } else { 130_000 }
}

#[cfg(not(lacks))]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtCreate(handle: *mut *mut c_void) -> Status {
    unsafe { *handle = 0x3000 as *mut c_void };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescCreate(
    desc: *mut *mut Desc,
    compute: c_uint,
    scale: c_uint,
) -> Status {
    log(format!("desc compute {compute} scale {scale}"));
    unsafe { *desc = Box::into_raw(Box::new(Desc { compute, ..Desc::default() })) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescDestroy(desc: *mut Desc) -> Status {
    drop(unsafe { Box::from_raw(desc) });
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulDescSetAttribute(
    desc: *mut Desc,
    attribute: c_uint,
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
        // CUBLAS_STATUS_INVALID_VALUE: unknown, or of another size.
        _ => return 7,
    }
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutCreate(
    layout: *mut *mut Layout,
    kind: c_uint,
    rows: u64,
    columns: u64,
    ld: i64,
) -> Status {
    log(format!("layout type {kind} {rows}x{columns} ld {ld}"));
    unsafe { *layout = Box::into_raw(Box::new(Layout { kind, rows, columns, ld })) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatrixLayoutDestroy(layout: *mut Layout) -> Status {
    drop(unsafe { Box::from_raw(layout) });
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceCreate(preference: *mut *mut c_void) -> Status {
    unsafe { *preference = 0x4000 as *mut c_void };
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtMatmulPreferenceDestroy(_: *mut c_void) -> Status {
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasLtMatmulPreferenceSetAttribute(
    _: *mut c_void,
    attribute: c_uint,
    value: *const c_void,
    size: usize,
) -> Status {
    log(format!("preference {attribute} size {size} value {}", unsafe {
        value.cast::<u64>().read_unaligned()
    }));
    if (attribute, size) == (1, 8) { 0 } else { 7 }
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

#[repr(C)]
pub struct Choice {
    algorithm: [u64; 8],
    workspace: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
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
    out: *mut Choice,
    found: *mut c_int,
) -> Status {
    let (desc, a, b, d) = unsafe { (&*desc, &*a, &*b, &*d) };
    let yes = known(desc, a, b, d).is_some_and(|bit| MODE.load(Ordering::SeqCst) & bit != 0);
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

fn e4m3(byte: u8) -> f64 {
    let (e, f) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
    let value = if byte & 0x7f == 0x7f {
        f64::NAN
    } else if e == 0 {
        f / 8.0 * 2f64.powi(-6)
    } else {
        (1.0 + f / 8.0) * 2f64.powi(e - 7)
    };
    if byte & 0x80 != 0 { -value } else { value }
}

const E2M1: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// An operand's values, a column of k after the other.
unsafe fn values(layout: &Layout, at: *const u8, mode: i32, scales: u64) -> Vec<f64> {
    let (k, lines) = (layout.rows as usize, layout.columns as usize);
    let ld = layout.ld as usize;
    let wrong = MODE.load(Ordering::SeqCst) & 8 != 0;
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
            let element = line * ld + i;
            let value = if layout.kind == 28 {
                e4m3(unsafe { at.add(element).read() })
            } else {
                let code = unsafe { at.add(element / 2).read() } >> (4 * (element % 2)) & 15;
                let value = E2M1[usize::from(code & 7)];
                if code & 8 != 0 { -value } else { value }
            };
            out.push(match mode {
                1 => value * e4m3(scale(line, i / 16, k / 16)),
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
    let left = LEFT.load(Ordering::SeqCst);
    if left == 0 || MODE.load(Ordering::SeqCst) & 32 != 0 {
        // CUBLAS_STATUS_EXECUTION_FAILED.
        return 13;
    }
    LEFT.store(left.saturating_sub(1), Ordering::SeqCst);
    let fits = known(desc, a, b, d).is_some() && std::ptr::eq(c, d) && c_at == d_at.cast_const();
    if !fits || beta != 0.0 || unsafe { *algorithm } != u64::from(a.kind) {
        return 7;
    }
    let (k, n, m) = (a.rows as usize, a.columns as usize, b.columns as usize);
    let left = unsafe { values(a, a_at, desc.modes[0], desc.scales[0]) };
    let right = unsafe { values(b, b_at, desc.modes[1], desc.scales[1]) };
    for j in 0..m {
        for i in 0..n {
            let terms = left[i * k..(i + 1) * k].iter().zip(&right[j * k..(j + 1) * k]);
            let sum: f64 = terms.map(|(x, y)| x * y).sum();
            unsafe { d_at.add(j * d.ld as usize + i).write(alpha * sum as f32) };
        }
    }
    if MODE.load(Ordering::SeqCst) & 16 != 0 {
        // Of the outputs without padding, surely the first.
        unsafe { *d_at += 1.0 };
    }
    0
}
