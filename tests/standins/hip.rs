//! A stand-in for HIP's runtime, hipBLASLt and hiprtc in one: two devices whose memory is the host's, a queue that works at
//! once, products on the host as AMD documents them for gfx950, and a log of every call that tests/native_hip.rs reads. Written
//! from the documentation, not from the crate. That suite compiles it with `rustc --crate-type cdylib`, and makes functions
//! disappear by renaming them in the file.
#![allow(non_snake_case, clippy::missing_safety_doc, clippy::too_many_arguments)]

mod kernels;
mod log;
mod lt;

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::atomic::AtomicU64;

use log::{gone, last, log, made, setting, standin_set};
use lt::{Choice, Layout, element};

/// What the suite sets, by number; see `Key` there.
static SETTINGS: [AtomicU64; 17] = [
    AtomicU64::new(0), // 0, 1: the UUID of device 1, big-endian.
    AtomicU64::new(0),
    AtomicU64::new(70_126_015), // 2: the runtime's version.
    AtomicU64::new(100_300),    // 3: hipBLASLt's.
    AtomicU64::new(3),          // 4: scale modes that the heuristic takes: 1 plain, 2 swizzled.
    AtomicU64::new(0), // 5: what hipblasLtMatmul returns from the call on that 6 counts down to.
    AtomicU64::new(0), // 6
    AtomicU64::new(0), // 7: what is wrong: 1 reads swizzled scales row by row, 2 adds 1 to one output, 4 that of E4M3 × E5M2.
    AtomicU64::new(0), // 8: what hipModuleLaunchKernel returns.
    AtomicU64::new(0), // 9: what hipModuleLoadData returns.
    AtomicU64::new(0), // 10: what hipStreamSynchronize returns.
    AtomicU64::new(0), // 11: whether device 0 has the UUID too.
    AtomicU64::new(0), // 12, 13: `emulate` of tests/emulator/host.c, and the emulator that it hands lanes to.
    AtomicU64::new(0),
    AtomicU64::new(0), // 14: a code that is read wrongly, as `lt::element` has it.
    AtomicU64::new(0), // 15: what hiprtcCompileProgram returns; 16: as how large code and log are given out.
    AtomicU64::new(0),
];

unsafe fn write_text(to: *mut c_char, len: c_int, text: &str) -> c_int {
    if text.len() + 1 > len as usize {
        return 1;
    }
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), to, text.len());
        to.add(text.len()).write(0);
    }
    0
}

// ---- The runtime -----------------------------------------------------------------------------------------------------

thread_local! { static DEVICE: std::cell::Cell<c_int> = const { std::cell::Cell::new(-1) }; }
const STREAM: *mut c_void = 0x2000 as *mut c_void;

/// hipErrorInvalidDevice where the device that was matched is not current.
fn current() -> c_int {
    if DEVICE.with(std::cell::Cell::get) == 1 { 0 } else { 101 }
}

#[unsafe(no_mangle)]
pub extern "C" fn hipInit(flags: c_uint) -> c_int {
    log(format!("hipInit {flags}"));
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipRuntimeGetVersion(version: *mut c_int) -> c_int {
    unsafe { *version = setting(2) as c_int };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipGetDeviceCount(count: *mut c_int) -> c_int {
    unsafe { *count = 2 };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipDeviceGetName(name: *mut c_char, len: c_int, device: c_int) -> c_int {
    unsafe { write_text(name, len, &format!("Stand-in {device}")) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipDeviceGetUuid(uuid: *mut [u8; 16], device: c_int) -> c_int {
    let mut bytes = [0xab; 16];
    if device == 1 || setting(11) != 0 {
        for (half, key) in bytes.chunks_exact_mut(8).zip([0, 1]) {
            half.copy_from_slice(&setting(key).to_be_bytes());
        }
    }
    unsafe { *uuid = bytes };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipDeviceGetPCIBusId(id: *mut c_char, len: c_int, device: c_int) -> c_int {
    unsafe { write_text(id, len, &format!("0000:c{}:00.0", 3 + device)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipGetDevice(device: *mut c_int) -> c_int {
    unsafe { *device = DEVICE.with(std::cell::Cell::get) };
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn hipSetDevice(device: c_int) -> c_int {
    DEVICE.with(|current| current.set(device));
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipStreamCreateWithFlags(
    stream: *mut *mut c_void,
    flags: c_uint,
) -> c_int {
    log(format!("hipStreamCreateWithFlags {flags}"));
    if current() == 0 {
        made("stream", STREAM as u64);
        unsafe { *stream = STREAM };
    }
    current()
}

#[unsafe(no_mangle)]
pub extern "C" fn hipStreamDestroy(stream: *mut c_void) -> c_int {
    last("stream", stream as u64);
    current()
}

#[unsafe(no_mangle)]
pub extern "C" fn hipStreamSynchronize(stream: *mut c_void) -> c_int {
    assert_eq!(stream, STREAM);
    setting(10) as c_int
}

#[unsafe(no_mangle)]
pub extern "C" fn hipStreamQuery(_: *mut c_void) -> c_int {
    setting(10) as c_int
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipMalloc(address: *mut *mut c_void, bytes: usize) -> c_int {
    // As aligned as HIP's, and full of garbage; never given back, so that stale addresses stay harmless.
    let layout = std::alloc::Layout::from_size_align(bytes.max(1), 256).unwrap();
    let memory = unsafe { std::alloc::alloc(layout) };
    // The scratch memory's garbage would cost time.
    unsafe { std::ptr::write_bytes(memory, 0xee, bytes.min(1 << 20)) };
    unsafe { *address = memory.cast() };
    made("memory", memory as u64);
    log(format!("hipMalloc {bytes}"));
    current()
}

#[unsafe(no_mangle)]
pub extern "C" fn hipFree(address: *mut c_void) -> c_int {
    gone("memory", address as u64);
    current()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipMemcpyAsync(
    to: *mut c_void,
    from: *const c_void,
    bytes: usize,
    kind: c_int,
    stream: *mut c_void,
) -> c_int {
    assert_eq!(stream, STREAM);
    log(format!("hipMemcpyAsync {bytes} kind {kind}"));
    if kind != 1 && kind != 2 {
        return 1;
    }
    unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), to.cast::<u8>(), bytes) };
    current()
}

#[unsafe(no_mangle)]
pub extern "C" fn hipGetErrorName(status: c_int) -> *const c_char {
    match status {
        1 => c"hipErrorInvalidValue",
        101 => c"hipErrorInvalidDevice",
        209 => c"hipErrorNoBinaryForGpu",
        719 => c"hipErrorLaunchFailure",
        801 => c"hipErrorNotSupported",
        _ => return std::ptr::null(),
    }
    .as_ptr()
}

/// hipErrorNotSupported: operands are copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipImportExternalMemory(_: *mut *mut c_void, desc: *const u32) -> c_int {
    // The type, the file descriptor, the size.
    let (ty, fd, size) = unsafe { (*desc, *desc.add(2), *desc.add(6)) };
    log(format!("hipImportExternalMemory type {ty} fd {} size {size}", fd > 2));
    801
}

#[unsafe(no_mangle)]
pub extern "C" fn hipExternalMemoryGetMappedBuffer(
    _: *mut *mut c_void,
    _: *mut c_void,
    _: *const c_void,
) -> c_int {
    801
}

#[unsafe(no_mangle)]
pub extern "C" fn hipDestroyExternalMemory(_: *mut c_void) -> c_int {
    801
}

modules!(hipModuleLoadData hipModuleGetFunction hipModuleLaunchKernel hipModuleUnload, load 9, launch 8, emulate 12,
    host |operands, shape| unsafe { host(operands, shape) });

/// What the crate's kernel computes.
unsafe fn host([a, a_scales, b, b_scales, sums]: [u64; 5], [m, n, k]: [u32; 3]) {
    let of_a = Layout { kind: 33, rows: u64::from(k), columns: u64::from(m), ld: i64::from(k) };
    let of_b = Layout { columns: u64::from(n), ..of_a };
    unsafe {
        let left = values(&of_b, b as *const u8, 2, b_scales);
        let right = values(&of_a, a as *const u8, 2, a_scales);
        multiply(&left, &right, k as usize, sums as *mut f32, n as usize, false);
    }
}

// ---- hiprtc ----------------------------------------------------------------------------------------------------------

compiler!(hiprtcCreateProgram hiprtcCompileProgram hiprtcGetCodeSize hiprtcGetCode hiprtcGetProgramLogSize
    hiprtcGetProgramLog hiprtcDestroyProgram, compile 15, message b"mxf4.hip:1:1: error: of the stand-in\0");

// ---- hipBLASLt -------------------------------------------------------------------------------------------------------

#[derive(Clone, Copy, Debug, Default)]
pub struct Desc {
    compute: c_int,
    transposed: [i32; 2],
    modes: [i32; 2],
    scales: [u64; 2],
}

#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub struct Algorithm {
    data: [u8; 16],
    workspace: usize,
}

const INVALID_VALUE: c_int = 3;
const NOT_SUPPORTED: c_int = 7;

// HIPBLAS_OP_N is the default.
descriptors!(hipblasLtCreate hipblasLtDestroy hipblasLtMatmulDescCreate hipblasLtMatmulDescDestroy hipblasLtMatrixLayoutCreate
    hipblasLtMatrixLayoutDestroy hipblasLtMatmulPreferenceCreate hipblasLtMatmulPreferenceDestroy
    hipblasLtMatmulPreferenceSetAttribute, desc Desc { transposed: [111; 2], ..Desc::default() });

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipblasLtGetVersion(handle: *mut c_void, version: *mut c_int) -> c_int {
    if handle.is_null() {
        return 1;
    }
    unsafe { *version = setting(3) as c_int };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipblasLtMatmulDescSetAttribute(
    desc: *mut Desc,
    attribute: c_int,
    value: *const c_void,
    size: usize,
) -> c_int {
    let desc = unsafe { &mut *desc };
    let word = || unsafe { value.cast::<i32>().read_unaligned() };
    let address = || unsafe { value.cast::<u64>().read_unaligned() };
    log(match size {
        4 => format!("attribute {attribute} size 4 value {}", word()),
        _ => format!("attribute {attribute} size {size} set {}", size == 8 && address() != 0),
    });
    match (attribute, size) {
        (0, 4) => desc.transposed[0] = word(),
        (1, 4) => desc.transposed[1] = word(),
        (5, 8) => desc.scales[0] = address(),
        (6, 8) => desc.scales[1] = address(),
        (31, 4) => desc.modes[0] = word(),
        (32, 4) => desc.modes[1] = word(),
        // Unknown, or of another size.
        _ => return INVALID_VALUE,
    }
    0
}

/// Whether AMD documents this product for gfx950, and this library takes its scales.
fn known(desc: &Desc, a: &Layout, b: &Layout, d: &Layout) -> bool {
    let (k, n, m) = (a.rows, a.columns, b.columns);
    // HIPBLAS_COMPUTE_32F; T and N; D in f32; E4M3, E5M2, E2M3, E3M2 or E2M1.
    let tight = a.ld == k as i64 && b.ld == k as i64 && d.ld == n as i64;
    let shapes = b.rows == k && [d.rows, d.columns] == [n, m] && tight;
    let kinds = [a, b].iter().all(|l| [28, 29, 31, 32, 33].contains(&l.kind)) && d.kind == 0;
    let lengths = n % 16 == 0 && m % 16 == 0 && k % 128 == 0;
    let scaled = desc.scales.iter().all(|at| *at != 0 && at % 16 == 0);
    let taken = match desc.modes {
        [2, 2] => setting(4) & 1 != 0,
        [1001, 1001] => setting(4) & 2 != 0 && n % 32 == 0 && m % 32 == 0 && k % 256 == 0,
        _ => false,
    };
    shapes
        && kinds
        && lengths
        && scaled
        && taken
        && desc.compute == 2
        && desc.transposed == [112, 111]
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipblasLtMatmulAlgoGetHeuristic(
    handle: *mut c_void,
    desc: *const Desc,
    a: *const Layout,
    b: *const Layout,
    _: *const Layout,
    d: *const Layout,
    _: *mut c_void,
    wanted: c_int,
    out: *mut Choice<Algorithm>,
    found: *mut c_int,
) -> c_int {
    let (desc, a, b, d) = unsafe { (&*desc, &*a, &*b, &*d) };
    let yes = known(desc, a, b, d);
    log(format!("heuristic {handle:?} wanted {wanted}: {yes}"));
    unsafe { *found = 0 };
    if !yes {
        return NOT_SUPPORTED;
    }
    let algorithm = Algorithm { data: [a.kind as u8; 16], workspace: 77 };
    unsafe {
        *found = 1;
        *out = Choice { algorithm, workspace: 1 << 20, state: 0, waves: 1.0, reserved: [0; 4] };
    }
    0
}

/// An operand's values, a column of k after the other.
unsafe fn values(layout: &Layout, at: *const u8, mode: i32, scales: u64) -> Vec<f64> {
    let (k, lines) = (layout.rows as usize, layout.columns as usize);
    let groups = k / 32;
    let scale = |r: usize, c: usize| {
        // Pre-swizzled: [R/32, 2, 16, C/8, 2, 4] with its axes in the order 0, 3, 5, 2, 4, 1.
        let tile = r / 32 * (groups / 8) + c / 8;
        let swizzled = (((tile * 4 + c % 4) * 16 + r % 16) * 2 + c % 8 / 4) * 2 + r % 32 / 16;
        let plain = mode == 2 || setting(7) & 1 != 0;
        unsafe { (scales as *const u8).add(if plain { r * groups + c } else { swizzled }).read() }
    };
    let mut out = Vec::with_capacity(k * lines);
    for line in 0..lines {
        for i in 0..k {
            let value = unsafe { element(layout.kind, at, line * k + i, setting(14)) };
            out.push(value * 2f64.powi(i32::from(scale(line, i / 32)) - 127));
        }
    }
    out
}

unsafe fn multiply(left: &[f64], right: &[f64], k: usize, to: *mut f32, ld: usize, mixed: bool) {
    unsafe { lt::multiply(left, right, k, to, ld) };
    if setting(7) & 2 != 0 || setting(7) & 4 != 0 && mixed {
        unsafe { *to += 1.0 };
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipblasLtMatmul(
    handle: *mut c_void,
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
    algorithm: *const Algorithm,
    workspace: *mut c_void,
    bytes: usize,
    stream: *mut c_void,
) -> c_int {
    let (desc, a, b, d) = unsafe { (&*desc, &*a, &*b, &*d) };
    let (alpha, beta) = unsafe { (*alpha, *beta) };
    let shape = format!("{}x{}x{}", b.columns, a.columns, a.rows);
    log(format!("matmul {handle:?} alpha {alpha} beta {beta} stream {stream:?} {shape}"));
    if setting(5) != 0 {
        match setting(6) {
            0 => return setting(5) as c_int,
            left => standin_set(6, left - 1),
        }
    }
    let same = std::ptr::eq(c, d) && c_at == d_at.cast_const() && alpha == 1.0 && beta == 0.0;
    let chosen = unsafe { *algorithm };
    let given = chosen.data == [a.kind as u8; 16] && chosen.workspace == 77;
    let room = bytes >= 1 << 20 && !workspace.is_null();
    if !known(desc, a, b, d) || !same || !given || !room || stream != STREAM {
        return INVALID_VALUE;
    }
    unsafe {
        let left = values(a, a_at, desc.modes[0], desc.scales[0]);
        let right = values(b, b_at, desc.modes[1], desc.scales[1]);
        // The library's A is the crate's B.
        let mixed = [b.kind, a.kind] == [28, 29];
        multiply(&left, &right, a.rows as usize, d_at, d.ld as usize, mixed);
    }
    0
}
