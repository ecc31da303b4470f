//! The CUDA driver: a device found by its UUID, a stream, memory, and what Vulkan shares.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::zeroed;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys;

use crate::native::device::{
    self, DEDICATED, Device, Modules, NON_BLOCKING, NOT_READY, SUCCESS, Status,
};
use crate::native::load::{Library, functions};
use crate::native::{Fd, Mapped, Runtime};

/// The oldest driver with everything used here, as `cuDriverGetVersion` counts: timeline semaphores came with CUDA 11.2.
const OLDEST: c_int = 11020;

functions! {
    /// The functions used here. Names ending in `_v2` are what the headers of CUDA 11 to 13 call without it.
    struct Functions {
        init: "cuInit" (c_uint) -> Status;
        driver_version: "cuDriverGetVersion" (*mut c_int) -> Status;
        device_count: "cuDeviceGetCount" (*mut c_int) -> Status;
        device: "cuDeviceGet" (*mut c_int, c_int) -> Status;
        device_name: "cuDeviceGetName" (*mut c_char, c_int, c_int) -> Status;
        device_uuid: "cuDeviceGetUuid_v2" (*mut sys::CUuuid, c_int) -> Status;
        device_attribute: "cuDeviceGetAttribute" (*mut c_int, c_uint, c_int) -> Status;
        retain: "cuDevicePrimaryCtxRetain" (*mut sys::CUcontext, c_int) -> Status;
        release: "cuDevicePrimaryCtxRelease_v2" (c_int) -> Status;
        push: "cuCtxPushCurrent_v2" (sys::CUcontext) -> Status;
        pop: "cuCtxPopCurrent_v2" (*mut sys::CUcontext) -> Status;
        stream: "cuStreamCreate" (*mut sys::CUstream, c_uint) -> Status;
        destroy_stream: "cuStreamDestroy_v2" (sys::CUstream) -> Status;
        synchronize: "cuStreamSynchronize" (sys::CUstream) -> Status;
        query: "cuStreamQuery" (sys::CUstream) -> Status;
        allocate: "cuMemAlloc_v2" (*mut u64, usize) -> Status;
        free: "cuMemFree_v2" (u64) -> Status;
        to_device: "cuMemcpyHtoDAsync_v2" (u64, *const c_void, usize, sys::CUstream) -> Status;
        to_host: "cuMemcpyDtoH_v2" (*mut c_void, u64, usize) -> Status;
        error_name: "cuGetErrorName" (Status, *mut *const c_char) -> Status;
    }
}

functions! {
    /// What sharing with Vulkan needs besides; without it operands are copied.
    struct Sharing {
        import_memory: "cuImportExternalMemory" (*mut sys::CUexternalMemory, *const sys::CUDA_EXTERNAL_MEMORY_HANDLE_DESC) -> Status;
        map: "cuExternalMemoryGetMappedBuffer" (*mut u64, sys::CUexternalMemory, *const sys::CUDA_EXTERNAL_MEMORY_BUFFER_DESC) -> Status;
        destroy_memory: "cuDestroyExternalMemory" (sys::CUexternalMemory) -> Status;
        import_semaphore: "cuImportExternalSemaphore" (*mut sys::CUexternalSemaphore, *const sys::CUDA_EXTERNAL_SEMAPHORE_HANDLE_DESC) -> Status;
        destroy_semaphore: "cuDestroyExternalSemaphore" (sys::CUexternalSemaphore) -> Status;
        signal: "cuSignalExternalSemaphoresAsync" (*const sys::CUexternalSemaphore, *const sys::CUDA_EXTERNAL_SEMAPHORE_SIGNAL_PARAMS, c_uint, sys::CUstream) -> Status;
        wait: "cuWaitExternalSemaphoresAsync" (*const sys::CUexternalSemaphore, *const sys::CUDA_EXTERNAL_SEMAPHORE_WAIT_PARAMS, c_uint, sys::CUstream) -> Status;
    }
}

/// A CUDA device with its primary context and a stream. What holds memory, handles or code of it holds the driver too, so it goes
/// last; the library stays for good.
pub(crate) struct Driver {
    functions: Functions,
    /// Or the function that is missing.
    sharing: Result<Sharing, String>,
    modules: Result<Modules, String>,
    device: c_int,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Null until one is imported.
    timeline: Mutex<Handle>,
    /// Major and minor.
    pub(crate) capability: [c_int; 2],
    details: Vec<(String, String)>,
}

/// An opaque pointer of the driver's.
#[derive(Clone, Copy)]
struct Handle(sys::CUexternalSemaphore);

// SAFETY: the driver API is thread-safe; the handles are the driver's own, never dereferenced here.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").field("details", &self.details).finish_non_exhaustive()
    }
}

impl Functions {
    fn check(&self, what: &str, status: Status) -> Result<(), String> {
        if status == SUCCESS {
            return Ok(());
        }
        let mut name = std::ptr::null();
        // SAFETY: the pointer is set to a constant of the library's, or left as it is.
        if unsafe { (self.error_name)(status, &raw mut name) } != SUCCESS {
            name = std::ptr::null();
        }
        // SAFETY: as above; the constant is a C string.
        Err(unsafe { device::error(what, "CUDA error", status, name) })
    }
}

/// Loads the driver; calls nothing.
pub(crate) fn library(path: Option<&Path>) -> Result<Library, String> {
    let names: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1"] };
    Library::open(path, "MICROSCALING_CUDA", names)
}

impl Driver {
    /// Loads the driver and opens the device.
    pub(crate) fn open(path: Option<&Path>, uuid: [u8; 16]) -> Result<Driver, String> {
        let library = library(path)?;
        let functions = Functions::load(&library, "")?;
        let check = |what: &str, status| functions.check(what, status);
        // SAFETY: of this call and the next ones: the arguments are as the CUDA driver API documents them, and pointers are
        // to locals that outlive the calls.
        check("cuInit", unsafe { (functions.init)(0) })?;
        let mut version = 0;
        // SAFETY: as above.
        check("cuDriverGetVersion", unsafe { (functions.driver_version)(&raw mut version) })?;
        if version < OLDEST {
            return Err(format!(
                "the driver is for CUDA {}, {} is the oldest that will do",
                dotted(version),
                dotted(OLDEST)
            ));
        }
        let mut count = 0;
        // SAFETY: as above.
        check("cuDeviceGetCount", unsafe { (functions.device_count)(&raw mut count) })?;
        let mut seen = Vec::new();
        let mut found = None;
        for ordinal in 0..count {
            let mut device = 0;
            // SAFETY: as above.
            check("cuDeviceGet", unsafe { (functions.device)(&raw mut device, ordinal) })?;
            let mut id = sys::CUuuid { bytes: [0; 16] };
            // SAFETY: as above.
            check("cuDeviceGetUuid", unsafe { (functions.device_uuid)(&raw mut id, device) })?;
            let id = id.bytes.map(|byte| byte as u8);
            if id == uuid {
                found = Some(device);
            }
            seen.push(hex(id));
        }
        let Some(device) = found else {
            return Err(format!(
                "none of CUDA's {count} devices is the one that is open: {} is not among {}",
                hex(uuid),
                if seen.is_empty() { "none".into() } else { seen.join(", ") }
            ));
        };
        let mut name = [0u8; 256];
        // SAFETY: as above; the name is cut to the 256 bytes.
        let status = unsafe { (functions.device_name)(name.as_mut_ptr().cast(), 256, device) };
        check("cuDeviceGetName", status)?;
        name[255] = 0;
        let name =
            CStr::from_bytes_until_nul(&name).map(|name| name.to_string_lossy().into_owned());
        let attribute = |attribute: sys::CUdevice_attribute| -> Result<c_int, String> {
            let mut value = 0;
            // SAFETY: as above.
            let status = unsafe {
                (functions.device_attribute)(&raw mut value, attribute as c_uint, device)
            };
            check("cuDeviceGetAttribute", status).map(|()| value)
        };
        use sys::CUdevice_attribute_enum as Attribute;
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let mut context = null_mut();
        // SAFETY: as above.
        check("cuDevicePrimaryCtxRetain", unsafe { (functions.retain)(&raw mut context, device) })?;
        let mut driver = Driver {
            functions,
            sharing: Sharing::load(&library, ""),
            modules: Modules::new(
                &library,
                ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuModuleUnload"],
            ),
            device,
            context,
            stream: null_mut(),
            timeline: Mutex::new(Handle(null_mut())),
            capability: [major, minor],
            details: vec![
                ("CUDA device".into(), name.unwrap_or_default()),
                ("CUDA UUID".into(), hex(uuid)),
                ("CUDA driver".into(), format!("{} ({})", dotted(version), library.name)),
                ("compute capability".into(), format!("{major}.{minor}")),
            ],
        };
        let mut stream = null_mut();
        driver.call("cuStreamCreate", || {
            // SAFETY: as above; the device's context is current.
            unsafe { (driver.functions.stream)(&raw mut stream, NON_BLOCKING) }
        })?;
        driver.stream = stream;
        Ok(driver)
    }

    fn sharing(&self) -> Result<&Sharing, String> {
        self.sharing.as_ref().map_err(Clone::clone)
    }

    fn timeline(&self) -> Handle {
        *self.timeline.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Driver {
    fn with<T>(&self, f: impl FnOnce() -> T) -> Result<T, String> {
        // SAFETY: the context is the device's primary one, retained until `self` goes.
        self.functions.check("cuCtxPushCurrent", unsafe { (self.functions.push)(self.context) })?;
        let value = f();
        let mut popped = null_mut();
        // SAFETY: what was pushed above is on top, since calls are nested.
        let status = unsafe { (self.functions.pop)(&raw mut popped) };
        self.functions.check("cuCtxPopCurrent", status)?;
        Ok(value)
    }

    fn verdict(&self, what: &str, status: Status) -> Result<(), String> {
        self.functions.check(what, status)
    }

    fn stream(&self) -> *mut c_void {
        self.stream.cast()
    }

    fn modules(&self) -> Result<&Modules, String> {
        self.modules.as_ref().map_err(Clone::clone)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if !self.stream.is_null() {
            if !self.quiet() {
                return;
            }
            let Handle(semaphore) = self.timeline();
            match &self.sharing {
                Ok(sharing) if !semaphore.is_null() => {
                    // SAFETY: imported by `import_timeline`; nothing in the stream waits for it or sets it.
                    let _ = self.with(|| unsafe { (sharing.destroy_semaphore)(semaphore) });
                }
                _ => {}
            }
            // SAFETY: made in `open`, and idle.
            let _ = self.with(|| unsafe { (self.functions.destroy_stream)(self.stream) });
        }
        // SAFETY: retained in `open`. Its memory, handles and modules are gone, or are kept for good: who has them has the driver.
        let status = unsafe { (self.functions.release)(self.device) };
        if let Err(error) = self.functions.check("cuDevicePrimaryCtxRelease", status) {
            log::debug!("native: {error}");
        }
    }
}

impl Runtime for Driver {
    fn describe(&self) -> Vec<(String, String)> {
        self.details.clone()
    }

    fn allocate(&self, bytes: u64) -> Result<Mapped, String> {
        let mut address = 0;
        // SAFETY: the pointer is to a local.
        self.call("cuMemAlloc", || unsafe {
            (self.functions.allocate)(&raw mut address, bytes as usize)
        })?;
        Ok(Mapped { address, handle: 0 })
    }

    #[cfg(not(unix))]
    fn import(&self, fd: Fd, _: u64, _: bool) -> Result<Mapped, String> {
        match fd {}
    }

    #[cfg(unix)]
    fn import(&self, fd: Fd, bytes: u64, dedicated: bool) -> Result<Mapped, String> {
        use std::os::fd::AsRawFd;
        let sharing = self.sharing()?;
        // SAFETY: plain old data, of which zero is a value: the type is set below.
        let mut desc: sys::CUDA_EXTERNAL_MEMORY_HANDLE_DESC = unsafe { zeroed_with_type() };
        desc.handle.fd = fd.as_raw_fd();
        desc.size = bytes;
        desc.flags = if dedicated { DEDICATED } else { 0 };
        let mut memory = null_mut();
        // SAFETY: the descriptor is complete; the driver owns the file descriptor if it succeeds.
        self.call("cuImportExternalMemory", || unsafe {
            (sharing.import_memory)(&raw mut memory, &raw const desc)
        })?;
        std::mem::forget(fd);
        // SAFETY: plain old data, of which zero is a value.
        let mut whole: sys::CUDA_EXTERNAL_MEMORY_BUFFER_DESC = unsafe { zeroed() };
        whole.size = bytes;
        let mut address = 0;
        // SAFETY: the memory was just imported and has so many bytes.
        let mapped = self.call("cuExternalMemoryGetMappedBuffer", || unsafe {
            (sharing.map)(&raw mut address, memory, &raw const whole)
        });
        if let Err(error) = mapped {
            // SAFETY: nothing was mapped from it.
            self.call("cuDestroyExternalMemory", || unsafe { (sharing.destroy_memory)(memory) })?;
            return Err(error);
        }
        Ok(Mapped { address, handle: memory as u64 })
    }

    fn release(&self, memory: Mapped) {
        // A mapped buffer is freed as memory of the driver's own, then what it was mapped from.
        // SAFETY: the address came from `allocate` or `import`, and the queue is idle.
        let freed = self.call("cuMemFree", || unsafe { (self.functions.free)(memory.address) });
        let destroyed = match (&self.sharing, memory.handle) {
            (Ok(sharing), handle @ 1..) => {
                // SAFETY: the handle came from `import`; its mapping is freed.
                self.call("cuDestroyExternalMemory", || unsafe {
                    (sharing.destroy_memory)(handle as sys::CUexternalMemory)
                })
            }
            _ => Ok(()),
        };
        for error in [freed, destroyed].into_iter().filter_map(Result::err) {
            log::warn!("native memory: {error}");
        }
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), String> {
        // In the stream, which is not ordered with the default one: cuMemcpyHtoD may return before the device has the bytes.
        // SAFETY: the caller's buffer has so many bytes, and outlives the call: the next one waits.
        let queued = self.call("cuMemcpyHtoDAsync", || unsafe {
            (self.functions.to_device)(to, bytes.as_ptr().cast(), bytes.len(), self.stream)
        });
        self.synchronize().and(queued)
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), String> {
        self.synchronize()?;
        // SAFETY: as above.
        self.call("cuMemcpyDtoH", || unsafe {
            (self.functions.to_host)(bytes.as_mut_ptr().cast(), from, bytes.len())
        })
    }

    #[cfg(not(unix))]
    fn import_timeline(&self, fd: Fd) -> Result<(), String> {
        match fd {}
    }

    #[cfg(unix)]
    fn import_timeline(&self, fd: Fd) -> Result<(), String> {
        use std::os::fd::AsRawFd;
        let sharing = self.sharing()?;
        // SAFETY: plain old data; the type is set to one of its values.
        let mut desc: sys::CUDA_EXTERNAL_SEMAPHORE_HANDLE_DESC = unsafe { semaphore_desc() };
        desc.handle.fd = fd.as_raw_fd();
        let mut semaphore = null_mut();
        // SAFETY: the descriptor is complete; the driver owns the file descriptor if it succeeds.
        self.call("cuImportExternalSemaphore", || unsafe {
            (sharing.import_semaphore)(&raw mut semaphore, &raw const desc)
        })?;
        std::mem::forget(fd);
        *self.timeline.lock().unwrap_or_else(PoisonError::into_inner) = Handle(semaphore);
        Ok(())
    }

    fn wait(&self, value: u64) -> Result<(), String> {
        let (sharing, Handle(semaphore)) = (self.sharing()?, self.timeline());
        // SAFETY: plain old data, of which zero is a value.
        let mut params: sys::CUDA_EXTERNAL_SEMAPHORE_WAIT_PARAMS = unsafe { zeroed() };
        params.params.fence.value = value;
        // SAFETY: one semaphore with its parameters, imported before.
        self.call("cuWaitExternalSemaphoresAsync", || unsafe {
            (sharing.wait)(&raw const semaphore, &raw const params, 1, self.stream)
        })
    }

    fn signal(&self, value: u64) -> Result<(), String> {
        let (sharing, Handle(semaphore)) = (self.sharing()?, self.timeline());
        // SAFETY: plain old data, of which zero is a value.
        let mut params: sys::CUDA_EXTERNAL_SEMAPHORE_SIGNAL_PARAMS = unsafe { zeroed() };
        params.params.fence.value = value;
        // SAFETY: as above.
        self.call("cuSignalExternalSemaphoresAsync", || unsafe {
            (sharing.signal)(&raw const semaphore, &raw const params, 1, self.stream)
        })
    }

    fn synchronize(&self) -> Result<(), String> {
        // SAFETY: the stream is this driver's.
        self.call("cuStreamSynchronize", || unsafe { (self.functions.synchronize)(self.stream) })
    }

    fn check(&self) -> Result<bool, String> {
        // SAFETY: the stream is this driver's.
        let status = self.with(|| unsafe { (self.functions.query)(self.stream) })?;
        match status {
            NOT_READY => Ok(false),
            status => {
                self.functions.check("a product on CUDA's stream", status)?;
                Ok(true)
            }
        }
    }
}

/// A descriptor of an opaque file descriptor.
///
/// # Safety
/// None beyond that of zeroed plain old data: the enum is written before the value exists.
#[cfg(unix)]
unsafe fn zeroed_with_type() -> sys::CUDA_EXTERNAL_MEMORY_HANDLE_DESC {
    let mut desc = std::mem::MaybeUninit::<sys::CUDA_EXTERNAL_MEMORY_HANDLE_DESC>::zeroed();
    // SAFETY: the pointer is to the field of a local; all other fields may be zero.
    unsafe {
        (&raw mut (*desc.as_mut_ptr()).type_)
            .write(sys::CUexternalMemoryHandleType::CU_EXTERNAL_MEMORY_HANDLE_TYPE_OPAQUE_FD);
        desc.assume_init()
    }
}

/// The same of a timeline semaphore.
///
/// # Safety
/// As above.
#[cfg(unix)]
unsafe fn semaphore_desc() -> sys::CUDA_EXTERNAL_SEMAPHORE_HANDLE_DESC {
    let mut desc = std::mem::MaybeUninit::<sys::CUDA_EXTERNAL_SEMAPHORE_HANDLE_DESC>::zeroed();
    // SAFETY: as above.
    unsafe {
        (&raw mut (*desc.as_mut_ptr()).type_).write(
            sys::CUexternalSemaphoreHandleType::CU_EXTERNAL_SEMAPHORE_HANDLE_TYPE_TIMELINE_SEMAPHORE_FD,
        );
        desc.assume_init()
    }
}

/// 13000 is 13.0.
fn dotted(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

fn hex(bytes: [u8; 16]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(all(test, target_os = "linux"))]
#[path = "../../../tests/common/standin.rs"]
#[allow(dead_code)]
mod standin;

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::standin::standin;
    use super::*;

    fn file() -> Fd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    /// Software adapters share no semaphores, so here the driver is alone with its stand-in.
    #[test]
    fn a_driver_destroys_what_it_made() {
        let standin = standin("cuda", &[]);
        standin.set(12, 1);
        let driver = Driver::open(Some(&standin.path), [0; 16]).unwrap();
        driver.import_timeline(file()).unwrap();
        driver.wait(3).unwrap();
        driver.signal(4).unwrap();
        let log = standin.log();
        for line in [
            "cuImportExternalSemaphore kind 9 flags 0",
            "cuWaitExternalSemaphoresAsync 1 0x8000 value 3 stream 0x2000",
            "cuSignalExternalSemaphoresAsync 1 0x8000 value 4 stream 0x2000",
        ] {
            assert!(log.contains(line), "{line} is missing in\n{log}");
        }
        let memory = driver.allocate(100).unwrap();
        for kind in ["context", "stream", "semaphore", "memory"] {
            assert!(standin.left().contains(kind), "{kind}");
        }
        driver.release(memory);
        drop(driver);
        assert_eq!(standin.left(), "");
    }

    #[test]
    fn a_queue_that_does_not_end_keeps_what_it_works_with() {
        let standin = standin("cuda", &[]);
        let driver = Driver::open(Some(&standin.path), [0; 16]).unwrap();
        standin.set(3, NOT_READY as u64);
        assert!(!driver.quiet());
        drop(driver);
        assert_eq!(standin.left(), "context 0x65\nstream 0x2000\n");
    }

    #[test]
    fn what_is_missing_or_fails_leaves_nothing() {
        for (without, setting) in [
            ("cuStreamDestroy_v2", (0, 0)),
            ("cuDestroyExternalSemaphore", (0, 0)),
            ("cuModuleUnload", (0, 0)),
            ("cuGetErrorName", (0, 0)),
            ("cuLaunchKernel", (4, 999)),
        ] {
            let standin = standin("cuda", &[without]);
            standin.set(setting.0, setting.1);
            let driver = Driver::open(Some(&standin.path), [0; 16]);
            if let Ok(driver) = &driver {
                let lacking = [driver.sharing().err(), driver.modules().err()];
                let lacking = lacking.into_iter().flatten().next().unwrap_or_default();
                assert!(lacking.ends_with(&format!("has no function {without}")), "{lacking}");
                assert!(driver.import_timeline(file()).is_err());
            }
            drop(driver);
            assert_eq!(standin.left(), "", "{without}");
        }
    }
}
