//! A stand-in for the CUDA driver: two devices whose memory is the host's, a queue that works at once, and a log of every call.
//! tests/native_cuda.rs and tests/native_kernel.rs compile it with `rustc --crate-type cdylib`, and make functions disappear by
//! renaming them in the file. Kernels are launched as tests/emulator/host.c runs them.
#![allow(non_snake_case, clippy::missing_safety_doc, clippy::too_many_arguments)]

mod kernels;
mod log;

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::atomic::AtomicU64;

use log::{gone, last, log, made, setting};

type Status = c_int;

/// What the suites set, by number.
static SETTINGS: [AtomicU64; 13] = [
    AtomicU64::new(0), // 0, 1: the second device's UUID, big-endian.
    AtomicU64::new(0),
    AtomicU64::new(13000), // 2: the driver's version.
    AtomicU64::new(0),     // 3: what cuStreamQuery and cuStreamSynchronize return.
    AtomicU64::new(0),     // 4: what cuInit returns.
    AtomicU64::new(0),     // 5: what cuImportExternalMemory returns.
    AtomicU64::new(0),     // 6: what cuMemAlloc returns.
    AtomicU64::new(90),    // 7: ten times the compute capability.
    AtomicU64::new(0), // 8, 9: `emulate` of tests/emulator/host.c, and the emulator that it hands lanes to.
    AtomicU64::new(0),
    AtomicU64::new(0), // 10: what cuModuleLoadData returns.
    AtomicU64::new(0), // 11: what cuLaunchKernel returns.
    AtomicU64::new(0), // 12: whether there are semaphores. They order nothing.
];

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: c_uint) -> Status {
    log(format!("cuInit {flags}"));
    setting(4) as Status
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Status {
    unsafe { *version = setting(2) as c_int };
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
        for (half, key) in bytes.chunks_exact_mut(8).zip([0, 1]) {
            half.copy_from_slice(&setting(key).to_be_bytes());
        }
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
    let capability = setting(7) as c_int;
    unsafe {
        *value = match attribute {
            75 => capability / 10,
            76 => capability % 10,
            _ => 0,
        };
    }
    // CUDA_ERROR_INVALID_DEVICE.
    if device == 101 { 0 } else { 101 }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(ctx: *mut *mut c_void, device: c_int) -> Status {
    log(format!("cuDevicePrimaryCtxRetain {device}"));
    made("context", device as u64);
    unsafe { *ctx = 0x1000 as *mut c_void };
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> Status {
    last("context", device as u64);
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
    if current() == 0 {
        made("stream", 0x2000);
        unsafe { *stream = 0x2000 as *mut c_void };
    }
    current()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: *mut c_void) -> Status {
    gone("stream", stream as u64);
    current()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(_: *mut c_void) -> Status {
    current().max(setting(3) as Status)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(_: *mut c_void) -> Status {
    current().max(setting(3) as Status)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> Status {
    log(format!("cuMemAlloc {bytes}"));
    if setting(6) != 0 {
        return setting(6) as Status;
    }
    // As aligned as CUDA's, and full of garbage; never given back, so that stale addresses stay harmless.
    let layout = std::alloc::Layout::from_size_align(bytes.max(1), 256).unwrap();
    let memory = unsafe { std::alloc::alloc(layout) };
    unsafe { std::ptr::write_bytes(memory, 0xee, bytes.min(1 << 20)) };
    unsafe { *address = memory as u64 };
    made("memory", memory as u64);
    current()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> Status {
    gone("memory", address);
    current()
}

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
    let text = match status {
        201 => c"CUDA_ERROR_INVALID_CONTEXT",
        209 => c"CUDA_ERROR_NO_BINARY_FOR_GPU",
        700 => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        719 => c"CUDA_ERROR_LAUNCH_FAILED",
        _ => return 1,
    };
    unsafe { *name = text.as_ptr() };
    0
}

// Kernels run on the emulator alone.
modules!(cuModuleLoadData cuModuleGetFunction cuLaunchKernel cuModuleUnload, load 10, launch 11, emulate 8,
    host |_: [u64; 5], _: [u32; 3]| panic!("no emulator"));

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
        if setting(5) != 0 {
            return setting(5) as Status;
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
        made("external memory", at as u64);
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
        made("memory", memory as u64);
        unsafe { *address = memory as u64 };
        current()
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuDestroyExternalMemory(memory: *mut c_void) -> Status {
        log("cuDestroyExternalMemory");
        gone("external memory", memory as u64);
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

    const SEMAPHORE: *mut c_void = 0x8000 as *mut c_void;

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn cuImportExternalSemaphore(
        out: *mut *mut c_void,
        desc: *const SemaphoreDesc,
    ) -> Status {
        let SemaphoreDesc { kind, fd, flags, .. } = unsafe { desc.read() };
        log(format!("cuImportExternalSemaphore kind {kind} flags {flags}"));
        if setting(12) == 0 {
            // Not possible without the other driver's help.
            return 801;
        }
        made("semaphore", SEMAPHORE as u64);
        unsafe {
            // The descriptor is the importer's.
            close(fd as c_int);
            *out = SEMAPHORE;
        }
        current()
    }

    #[unsafe(no_mangle)]
    pub extern "C" fn cuDestroyExternalSemaphore(semaphore: *mut c_void) -> Status {
        gone("semaphore", semaphore as u64);
        current()
    }

    macro_rules! ordering {
        ($name:ident) => {
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(
                semaphores: *const *mut c_void,
                values: *const u64,
                count: c_uint,
                stream: *mut c_void,
            ) -> Status {
                let (semaphore, value) = unsafe { (*semaphores, *values) };
                log(format!(
                    concat!(stringify!($name), " {} {:?} value {} stream {:?}"),
                    count, semaphore, value, stream
                ));
                if semaphore == SEMAPHORE { current() } else { 400 }
            }
        };
    }
    ordering!(cuSignalExternalSemaphoresAsync);
    ordering!(cuWaitExternalSemaphoresAsync);
}
