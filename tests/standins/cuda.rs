//! A stand-in for the CUDA driver: two devices whose memory is the host's, a queue that works at once, and a log of every call
//! that tests/native_cuda.rs reads. Compiled by that suite with `rustc --crate-type cdylib`; `--cfg` picks what is wrong
//! with it: `no_memcpy` and `no_sharing` leave functions out.
#![allow(non_snake_case, clippy::missing_safety_doc)]

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

type Status = c_uint;

static LOG: Mutex<String> = Mutex::new(String::new());
/// The second device's UUID.
static UUID: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];
static VERSION: AtomicU32 = AtomicU32::new(13000);
/// What cuStreamQuery and cuStreamSynchronize return.
static QUEUE: AtomicU32 = AtomicU32::new(0);
/// What cuInit returns.
static INIT: AtomicU32 = AtomicU32::new(0);
/// What cuImportExternalMemory returns.
static IMPORT: AtomicU32 = AtomicU32::new(0);

/// What cuMemAlloc returns.
static ALLOCATE: AtomicU32 = AtomicU32::new(0);

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
    unsafe { std::ptr::copy_nonoverlapping(bytes[bytes.len() - n..].as_ptr(), out, n) };
    bytes.len()
}

#[unsafe(no_mangle)]
pub extern "C" fn standin_set(key: u32, value: u64) {
    match key {
        0 | 1 => UUID[key as usize].store(value, Ordering::SeqCst),
        2 => VERSION.store(value as u32, Ordering::SeqCst),
        3 => QUEUE.store(value as u32, Ordering::SeqCst),
        4 => INIT.store(value as u32, Ordering::SeqCst),
        5 => IMPORT.store(value as u32, Ordering::SeqCst),
        6 => ALLOCATE.store(value as u32, Ordering::SeqCst),
        _ => {}
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: c_uint) -> Status {
    log(format!("cuInit {flags}"));
    INIT.load(Ordering::SeqCst)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Status {
    unsafe { *version = VERSION.load(Ordering::SeqCst) as c_int };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Status {
    unsafe { *count = 2 };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Status {
    unsafe { *device = 100 + ordinal };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) -> Status {
    let text = format!("Stand-in {device}\0");
    assert!(len as usize >= text.len());
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, text.len()) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) -> Status {
    let mut bytes = [0xabu8; 16];
    if device == 101 {
        for (half, value) in bytes.chunks_exact_mut(8).zip(&UUID) {
            half.copy_from_slice(&value.load(Ordering::SeqCst).to_be_bytes());
        }
    }
    unsafe { *uuid = bytes };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut c_int,
    attribute: c_uint,
    _: c_int,
) -> Status {
    // The compute capability's parts are 75 and 76.
    unsafe { *value = if attribute == 75 { 9 } else { 0 } };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(ctx: *mut *mut c_void, device: c_int) -> Status {
    log(format!("cuDevicePrimaryCtxRetain {device}"));
    unsafe { *ctx = 0x1000 as *mut c_void };
    0
}

thread_local! { static DEPTH: std::cell::Cell<u32> = const { std::cell::Cell::new(0) }; }

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

/// CUDA_ERROR_INVALID_CONTEXT where none is current.
fn current() -> Status {
    if DEPTH.with(std::cell::Cell::get) == 0 { 201 } else { 0 }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut *mut c_void, flags: c_uint) -> Status {
    log(format!("cuStreamCreate {flags}"));
    unsafe { *stream = 0x2000 as *mut c_void };
    current()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(_: *mut c_void) -> Status {
    current().max(QUEUE.load(Ordering::SeqCst))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(_: *mut c_void) -> Status {
    current().max(QUEUE.load(Ordering::SeqCst))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> Status {
    log(format!("cuMemAlloc {bytes}"));
    let status = ALLOCATE.load(Ordering::SeqCst);
    if status != 0 {
        return status;
    }
    let layout = std::alloc::Layout::from_size_align(bytes, 256).unwrap();
    unsafe { *address = std::alloc::alloc(layout) as u64 };
    current()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(_: u64) -> Status {
    // Leaked: tests are short.
    current()
}

#[cfg(not(no_memcpy))]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    bytes: usize,
    stream: *mut c_void,
) -> Status {
    log(format!("cuMemcpyHtoDAsync {bytes} stream {stream:?}"));
    unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), to as *mut u8, bytes) };
    current()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) -> Status {
    log(format!("cuMemcpyDtoH {bytes}"));
    unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.cast::<u8>(), bytes) };
    current()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(status: Status, name: *mut *const c_char) -> Status {
    if status != 700 {
        return 1;
    }
    unsafe { *name = c"CUDA_ERROR_ILLEGAL_ADDRESS".as_ptr() };
    0
}

#[cfg(not(no_sharing))]
mod sharing {
    use super::*;

    /// CUDA_EXTERNAL_MEMORY_HANDLE_DESC of a 64-bit system.
    #[repr(C)]
    pub struct MemoryDesc {
        kind: c_uint,
        /// A union of a descriptor and two pointers.
        fd: u64,
        name: u64,
        size: u64,
        flags: c_uint,
        reserved: [c_uint; 16],
    }

    const _: () = assert!(size_of::<MemoryDesc>() == 104);

    unsafe extern "C" {
        fn mmap(
            at: *mut c_void,
            len: usize,
            prot: c_int,
            flags: c_int,
            fd: c_int,
            offset: i64,
        ) -> *mut c_void;
        fn close(fd: c_int) -> c_int;
        fn lseek(fd: c_int, offset: i64, whence: c_int) -> i64;
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn cuImportExternalMemory(
        out: *mut *mut c_void,
        desc: *const MemoryDesc,
    ) -> Status {
        let MemoryDesc { kind, fd, size, flags, reserved, .. } = unsafe { desc.read() };
        log(format!(
            "cuImportExternalMemory kind {kind} size {size} flags {flags} reserved {}",
            reserved.iter().sum::<u32>()
        ));
        let status = IMPORT.load(Ordering::SeqCst);
        if status != 0 {
            return status;
        }
        // A software driver's memory is a file that can be mapped: read and write, shared. Mesa puts a header before it, whose
        // second word is where the memory starts.
        let fd = fd as c_int;
        let bytes = unsafe { lseek(fd, 0, 2) } as usize;
        let at = unsafe { mmap(std::ptr::null_mut(), bytes, 3, 1, fd, 0) };
        if at as isize == -1 || bytes < size as usize {
            return 999;
        }
        let header = bytes > size as usize;
        let offset = if header { unsafe { at.cast::<usize>().add(1).read() } } else { 0 };
        log(format!("file of {bytes} bytes, memory from {offset} on"));
        if offset + size as usize > bytes {
            return 999;
        }
        let at = unsafe { at.byte_add(offset) };
        unsafe {
            // The descriptor is the importer's.
            close(fd);
            *out = at;
        }
        current()
    }

    #[repr(C)]
    pub struct BufferDesc {
        offset: u64,
        size: u64,
        flags: c_uint,
        reserved: [c_uint; 16],
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn cuExternalMemoryGetMappedBuffer(
        address: *mut u64,
        memory: *mut c_void,
        desc: *const BufferDesc,
    ) -> Status {
        let BufferDesc { offset, size, flags, reserved } = unsafe { desc.read() };
        log(format!(
            "cuExternalMemoryGetMappedBuffer offset {offset} size {size} flags {flags} reserved {}",
            reserved.iter().sum::<u32>()
        ));
        unsafe { *address = memory as u64 };
        current()
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuDestroyExternalMemory(_: *mut c_void) -> Status {
        log("cuDestroyExternalMemory".into());
        current()
    }

    #[repr(C)]
    pub struct SemaphoreDesc {
        kind: c_uint,
        fd: u64,
        name: u64,
        flags: c_uint,
        reserved: [c_uint; 16],
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn cuImportExternalSemaphore(
        _: *mut *mut c_void,
        desc: *const SemaphoreDesc,
    ) -> Status {
        let SemaphoreDesc { kind, flags, .. } = unsafe { desc.read() };
        log(format!("cuImportExternalSemaphore kind {kind} flags {flags}"));
        // Not possible without the other driver's help.
        801
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuSignalExternalSemaphoresAsync(
        _: *const c_void,
        _: *const c_void,
        _: c_uint,
        _: *mut c_void,
    ) -> Status {
        801
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuWaitExternalSemaphoresAsync(
        _: *const c_void,
        _: *const c_void,
        _: c_uint,
        _: *mut c_void,
    ) -> Status {
        801
    }
}
