//! A stand-in for what the crate's own kernel needs of CUDA: a driver with one device whose memory is the host's, and NVRTC.
//! Kernels are launched as tests/emulator/host.c runs them. tests/native_kernel.rs compiles it with `rustc --crate-type cdylib`
//! and reads its log.
#![allow(non_snake_case, clippy::missing_safety_doc, clippy::too_many_arguments)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

type Status = c_uint;

static LOG: Mutex<String> = Mutex::new(String::new());

/// What the suite sets, by number; see `Key` there.
static SETTINGS: [AtomicU64; 8] = [
    AtomicU64::new(0), // 0, 1: the device's UUID, big-endian.
    AtomicU64::new(0),
    AtomicU64::new(120), // 2: ten times the compute capability.
    AtomicU64::new(0),   // 3, 4: `emulate`, and the emulator that it hands lanes to.
    AtomicU64::new(0),
    AtomicU64::new(0), // 5: what nvrtcCompileProgram returns.
    AtomicU64::new(0), // 6: what cuModuleLoadData returns.
    AtomicU64::new(0), // 7: what cuLaunchKernel returns.
];

fn setting(key: usize) -> u64 {
    SETTINGS[key].load(Ordering::SeqCst)
}

fn log(line: String) {
    let mut log = LOG.lock().unwrap_or_else(|e| e.into_inner());
    log.push_str(&line);
    log.push('\n');
}

/// Copies the log's end into `out` and returns its whole length.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn standin_log(out: *mut u8, room: usize) -> usize {
    let log = LOG.lock().unwrap_or_else(|e| e.into_inner());
    let bytes = log.as_bytes();
    let n = bytes.len().min(room);
    if n > 0 {
        unsafe { std::ptr::copy_nonoverlapping(bytes[bytes.len() - n..].as_ptr(), out, n) };
    }
    bytes.len()
}

#[unsafe(no_mangle)]
pub extern "C" fn standin_set(key: u32, value: u64) {
    SETTINGS[key as usize].store(value, Ordering::SeqCst);
}

// ---- The driver ------------------------------------------------------------------------------------------------------

const STREAM: *mut c_void = 0x2000 as *mut c_void;

thread_local! { static DEPTH: std::cell::Cell<u32> = const { std::cell::Cell::new(0) }; }

/// CUDA_ERROR_INVALID_CONTEXT where none is current.
fn current() -> Status {
    if DEPTH.with(std::cell::Cell::get) == 0 { 201 } else { 0 }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_: c_uint) -> Status {
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Status {
    unsafe { *version = 13000 };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Status {
    unsafe { *count = 1 };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Status {
    unsafe { *device = 100 + ordinal };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, _: c_int, _: c_int) -> Status {
    unsafe { std::ptr::copy_nonoverlapping(c"Stand-in".as_ptr(), name, 9) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], _: c_int) -> Status {
    let mut bytes = [0; 16];
    for (half, key) in bytes.chunks_exact_mut(8).zip([0, 1]) {
        half.copy_from_slice(&setting(key).to_be_bytes());
    }
    unsafe { *uuid = bytes };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut c_int,
    attribute: c_uint,
    device: c_int,
) -> Status {
    let capability = setting(2) as c_int;
    unsafe {
        *value = match attribute {
            75 => capability / 10,
            76 => capability % 10,
            _ => 0,
        };
    }
    if device == 100 { 0 } else { 101 }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(ctx: *mut *mut c_void, _: c_int) -> Status {
    unsafe { *ctx = 0x1000 as *mut c_void };
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPushCurrent_v2(_: *mut c_void) -> Status {
    DEPTH.with(|depth| depth.set(depth.get() + 1));
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPopCurrent_v2(_: *mut *mut c_void) -> Status {
    DEPTH.with(|depth| depth.set(depth.get() - 1));
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetDevice(device: *mut c_int) -> Status {
    unsafe { *device = 100 };
    current()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut *mut c_void, _: c_uint) -> Status {
    unsafe { *stream = STREAM };
    current()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(_: *mut c_void) -> Status {
    current()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(_: *mut c_void) -> Status {
    current()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> Status {
    // As aligned as CUDA's, and full of garbage; never given back, so that stale addresses stay harmless.
    let layout = std::alloc::Layout::from_size_align(bytes.max(1), 256).unwrap();
    let memory = unsafe { std::alloc::alloc(layout) };
    unsafe { std::ptr::write_bytes(memory, 0xee, bytes.min(1 << 20)) };
    unsafe { *address = memory as u64 };
    current()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(_: u64) -> Status {
    current()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const u8,
    bytes: usize,
    _stream: *mut c_void,
) -> Status {
    unsafe { std::ptr::copy_nonoverlapping(from, to as *mut u8, bytes) };
    current()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoH_v2(to: *mut u8, from: u64, bytes: usize) -> Status {
    unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to, bytes) };
    current()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(status: Status, name: *mut *const c_char) -> Status {
    let text = match status {
        201 => c"CUDA_ERROR_INVALID_CONTEXT",
        209 => c"CUDA_ERROR_NO_BINARY_FOR_GPU",
        719 => c"CUDA_ERROR_LAUNCH_FAILED",
        _ => return 1,
    };
    unsafe { *name = text.as_ptr() };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut *mut c_void, image: *const u8) -> Status {
    log(format!("cuModuleLoadData {:?}", unsafe { std::slice::from_raw_parts(image, 4) }));
    unsafe { *module = 0x5000 as *mut c_void };
    if setting(6) != 0 { setting(6) as Status } else { current() }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut *mut c_void,
    module: *mut c_void,
    name: *const c_char,
) -> Status {
    let name = unsafe { CStr::from_ptr(name) }.to_str().unwrap();
    log(format!("cuModuleGetFunction {name} of {module:?}"));
    unsafe { *function = 0x6000 as *mut c_void };
    current()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: *mut c_void,
    gx: c_uint,
    gy: c_uint,
    gz: c_uint,
    bx: c_uint,
    by: c_uint,
    bz: c_uint,
    shared: c_uint,
    stream: *mut c_void,
    arguments: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Status {
    assert!(extra.is_null());
    let word = |i: usize| unsafe { (*arguments.add(i)).cast::<u32>().read() };
    let address = |i: usize| unsafe { (*arguments.add(i)).cast::<u64>().read() };
    let [m, n, k] = [word(5), word(6), word(7)];
    log(format!(
        "launch {function:?} grid {gx} {gy} {gz} block {bx} {by} {bz} shared {shared} stream {stream:?} m {m} n {n} k {k}"
    ));
    if setting(7) != 0 {
        return setting(7) as Status;
    }
    type Emulate =
        unsafe extern "C" fn(u64, u64, u64, u64, u64, u32, u32, u32, u32, i32, u64) -> c_int;
    let [a, a_scales, b, b_scales, sums] = [0, 1, 2, 3, 4].map(address);
    let emulate: Emulate = unsafe { std::mem::transmute(setting(3) as usize) };
    let code = unsafe { emulate(a, a_scales, b, b_scales, sums, m, n, k, 1, 1, setting(4)) };
    log(format!("emulated {code}"));
    if code == 0 { current() } else { 719 }
}

// ---- NVRTC -----------------------------------------------------------------------------------------------------------

const CUBIN: &[u8] = b"\x7fELF of the stand-in";
const MESSAGE: &[u8] = b"mxf4(1): error: of the stand-in\0";

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCreateProgram(
    program: *mut *mut c_void,
    source: *const c_char,
    _: *const c_char,
    headers: c_int,
    _: *const *const c_char,
    _: *const *const c_char,
) -> c_int {
    let source = unsafe { CStr::from_ptr(source) }.to_str().unwrap();
    log(format!(
        "nvrtcCreateProgram headers {headers} kernel {}",
        source.contains("KERNEL mx_matmul_mxf4(")
    ));
    unsafe { *program = 0x7000 as *mut c_void };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCompileProgram(
    _: *mut c_void,
    count: c_int,
    options: *const *const c_char,
) -> c_int {
    for i in 0..count as usize {
        log(format!(
            "nvrtc option {}",
            unsafe { CStr::from_ptr(*options.add(i)) }.to_str().unwrap()
        ));
    }
    setting(5) as c_int
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBINSize(_: *mut c_void, bytes: *mut usize) -> c_int {
    unsafe { *bytes = CUBIN.len() };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBIN(_: *mut c_void, code: *mut u8) -> c_int {
    unsafe { std::ptr::copy_nonoverlapping(CUBIN.as_ptr(), code, CUBIN.len()) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLogSize(_: *mut c_void, bytes: *mut usize) -> c_int {
    unsafe { *bytes = MESSAGE.len() };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLog(_: *mut c_void, text: *mut u8) -> c_int {
    unsafe { std::ptr::copy_nonoverlapping(MESSAGE.as_ptr(), text, MESSAGE.len()) };
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcDestroyProgram(_: *mut *mut c_void) -> c_int {
    log("nvrtcDestroyProgram".into());
    0
}
