//! The HIP runtime: the device that wgpu has open, a stream, memory, and what Vulkan shares.
//!
//! HIP's UUID need not be Vulkan's: Mesa makes its own from the PCI address. So a device is the one wanted if either the UUID or
//! the PCI address is, and it must be the only one. External semaphores are not supported on Linux (HIP's documentation): the
//! host orders the two queues.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::ptr::null_mut;

use super::Wanted;
use crate::native::device::{
    self, DEDICATED, Device, Modules, NON_BLOCKING, NOT_READY, SUCCESS, Status,
};
use crate::native::load::{Library, functions};
use crate::native::{Fd, Mapped, Runtime};

/// hipMemcpyHostToDevice, hipMemcpyDeviceToHost.
const TO_DEVICE: c_int = 1;
const TO_HOST: c_int = 2;
/// The oldest runtime that was looked at, as `hipRuntimeGetVersion` counts: gfx950 came with ROCm 7.
const OLDEST: c_int = 70_000_000;

functions! {
    /// The functions used here.
    struct Functions {
        init: "hipInit" (c_uint) -> Status;
        version: "hipRuntimeGetVersion" (*mut c_int) -> Status;
        device_count: "hipGetDeviceCount" (*mut c_int) -> Status;
        device_name: "hipDeviceGetName" (*mut c_char, c_int, c_int) -> Status;
        device_uuid: "hipDeviceGetUuid" (*mut [u8; 16], c_int) -> Status;
        device_pci: "hipDeviceGetPCIBusId" (*mut c_char, c_int, c_int) -> Status;
        current_device: "hipGetDevice" (*mut c_int) -> Status;
        set_device: "hipSetDevice" (c_int) -> Status;
        stream: "hipStreamCreateWithFlags" (*mut *mut c_void, c_uint) -> Status;
        destroy_stream: "hipStreamDestroy" (*mut c_void) -> Status;
        synchronize: "hipStreamSynchronize" (*mut c_void) -> Status;
        query: "hipStreamQuery" (*mut c_void) -> Status;
        allocate: "hipMalloc" (*mut *mut c_void, usize) -> Status;
        free: "hipFree" (*mut c_void) -> Status;
        copy: "hipMemcpyAsync" (*mut c_void, *const c_void, usize, c_int, *mut c_void) -> Status;
        error_name: "hipGetErrorName" (Status) -> *const c_char;
    }
}

functions! {
    /// What sharing with Vulkan needs besides; without it operands are copied.
    struct Sharing {
        import: "hipImportExternalMemory" (*mut *mut c_void, *const ExternalMemory) -> Status;
        map: "hipExternalMemoryGetMappedBuffer" (*mut *mut c_void, *mut c_void, *const ExternalBuffer) -> Status;
        destroy: "hipDestroyExternalMemory" (*mut c_void) -> Status;
    }
}

/// hipExternalMemoryHandleDesc; the union is its largest member, two pointers.
#[repr(C)]
struct ExternalMemory {
    ty: c_int,
    handle: Handle,
    size: u64,
    flags: c_uint,
    reserved: [c_uint; 16],
}

#[repr(C, align(8))]
struct Handle {
    fd: c_int,
    unused: [c_int; 3],
}

/// hipExternalMemoryHandleTypeOpaqueFd.
const OPAQUE_FD: c_int = 1;

/// hipExternalMemoryBufferDesc.
#[repr(C)]
struct ExternalBuffer {
    offset: u64,
    size: u64,
    flags: c_uint,
    reserved: [c_uint; 16],
}

/// A HIP device with a stream. What holds memory, handles or code of it holds the driver too, so the stream goes last; the
/// library stays for good.
pub(crate) struct Driver {
    functions: Functions,
    /// Or the function that is missing.
    sharing: Result<Sharing, String>,
    modules: Result<Modules, String>,
    device: c_int,
    stream: *mut c_void,
    details: Vec<(String, String)>,
}

// SAFETY: the runtime is thread-safe; the stream is its own, never dereferenced here.
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
        // SAFETY: it takes any number, and returns a constant, which is a C string.
        Err(unsafe { device::error(what, "HIP error", status, (self.error_name)(status)) })
    }

    /// Text that a function writes into a buffer of so many bytes.
    fn text(
        &self,
        what: &str,
        f: impl FnOnce(*mut c_char, c_int) -> Status,
    ) -> Result<String, String> {
        let mut buffer = [0u8; 256];
        self.check(what, f(buffer.as_mut_ptr().cast(), 255))?;
        let text = CStr::from_bytes_until_nul(&buffer).map_err(|_| format!("{what}: no text"))?;
        Ok(text.to_string_lossy().into_owned())
    }
}

/// Domain, bus, device and function of `0000:03:00.0`.
fn pci(address: &str) -> Option<[u32; 4]> {
    let (rest, function) = address.trim().rsplit_once('.')?;
    let mut parts = rest.split(':').map(|part| u32::from_str_radix(part, 16).ok());
    let address = [parts.next()??, parts.next()??, parts.next()??];
    let function = u32::from_str_radix(function, 16).ok()?;
    parts.next().is_none().then_some([address[0], address[1], address[2], function])
}

/// Which of the devices, by PCI address and UUID, is the one wanted.
fn find(devices: &[(String, Option<[u8; 16]>)], wanted: &Wanted) -> Result<usize, String> {
    let at = pci(&wanted.pci);
    let is = |(address, uuid): &(String, Option<[u8; 16]>)| {
        let same_uuid = uuid.is_some() && *uuid == wanted.uuid;
        same_uuid || at.is_some() && pci(address) == at
    };
    let found: Vec<usize> = (0..devices.len()).filter(|i| is(&devices[*i])).collect();
    let addresses: Vec<&str> = devices.iter().map(|(address, _)| &**address).collect();
    match found[..] {
        [one] => Ok(one),
        [] => Err(format!(
            "none of HIP's {} devices is the one that is open: it is at {} with UUID {}, they are at {}",
            devices.len(),
            if wanted.pci.is_empty() { "no PCI address" } else { &wanted.pci },
            wanted.uuid.map_or("none".into(), |id| id.map(|byte| format!("{byte:02x}")).concat()),
            if addresses.is_empty() { "none".into() } else { addresses.join(", ") }
        )),
        _ => Err(format!(
            "{} of HIP's devices, {}, answer to the one that is open: partitions of one cannot be told apart",
            found.len(),
            addresses.join(", ")
        )),
    }
}

/// Loads the runtime; calls nothing.
pub(crate) fn library(path: Option<&Path>) -> Result<Library, String> {
    let names: &[&str] = if cfg!(windows) {
        &["amdhip64_7.dll", "amdhip64.dll"]
    } else {
        &["libamdhip64.so.7", "libamdhip64.so", "/opt/rocm/lib/libamdhip64.so"]
    };
    Library::open(path, "MICROSCALING_HIP", names)
}

impl Driver {
    /// Loads the runtime and opens the device.
    pub(crate) fn open(path: Option<&Path>, wanted: &Wanted) -> Result<Driver, String> {
        let library = library(path)?;
        let functions = Functions::load(&library, "")?;
        let check = |what: &str, status| functions.check(what, status);
        // SAFETY: of this call and the next ones: the arguments are as HIP documents them, and pointers are to locals that
        // outlive the calls.
        check("hipInit", unsafe { (functions.init)(0) })?;
        let mut version = 0;
        // SAFETY: as above.
        check("hipRuntimeGetVersion", unsafe { (functions.version)(&raw mut version) })?;
        let dotted = |v: c_int| format!("{}.{}.{}", v / 10_000_000, v / 100_000 % 100, v % 100_000);
        if version < OLDEST {
            return Err(format!(
                "HIP {} is too old, {} is the oldest that will do",
                dotted(version),
                dotted(OLDEST)
            ));
        }
        let mut count = 0;
        // SAFETY: as above.
        check("hipGetDeviceCount", unsafe { (functions.device_count)(&raw mut count) })?;
        let mut devices = Vec::new();
        for device in 0..count {
            let address = functions.text("hipDeviceGetPCIBusId", |buffer, len| {
                // SAFETY: as above; the buffer has so many bytes.
                unsafe { (functions.device_pci)(buffer, len, device) }
            })?;
            let mut uuid = [0; 16];
            // SAFETY: as above. A runtime that has none for the device is matched by address.
            let has = unsafe { (functions.device_uuid)(&raw mut uuid, device) } == SUCCESS;
            devices.push((address, has.then_some(uuid)));
        }
        let found = find(&devices, wanted)?;
        let (device, address) = (found as c_int, &devices[found].0);
        let name = functions.text("hipDeviceGetName", |buffer, len| {
            // SAFETY: as above.
            unsafe { (functions.device_name)(buffer, len, device) }
        })?;
        let mut driver = Driver {
            functions,
            sharing: Sharing::load(&library, ""),
            modules: Modules::new(
                &library,
                [
                    "hipModuleLoadData",
                    "hipModuleGetFunction",
                    "hipModuleLaunchKernel",
                    "hipModuleUnload",
                ],
            ),
            device,
            stream: null_mut(),
            details: vec![
                ("HIP device".into(), format!("{name} at {address}")),
                ("HIP runtime".into(), format!("{} ({})", dotted(version), library.name)),
            ],
        };
        let mut stream = null_mut();
        driver.call("hipStreamCreateWithFlags", || {
            // SAFETY: as above; the device is current.
            unsafe { (driver.functions.stream)(&raw mut stream, NON_BLOCKING) }
        })?;
        driver.stream = stream;
        Ok(driver)
    }

    /// Copies behind what is in the stream, which is not ordered with the default one, and waits.
    fn copy(
        &self,
        to: *mut c_void,
        from: *const c_void,
        bytes: usize,
        kind: c_int,
    ) -> Result<(), String> {
        // SAFETY: the callers'; both sides outlive the call, because the next one waits.
        let queued = self.call("hipMemcpyAsync", || unsafe {
            (self.functions.copy)(to, from, bytes, kind, self.stream)
        });
        self.synchronize().and(queued)
    }
}

impl Device for Driver {
    /// Afterwards the device is current that was before.
    fn with<T>(&self, f: impl FnOnce() -> T) -> Result<T, String> {
        let mut before = 0;
        // SAFETY: the pointer is to a local.
        let status = unsafe { (self.functions.current_device)(&raw mut before) };
        self.functions.check("hipGetDevice", status)?;
        let set = |device: c_int| {
            // SAFETY: the device exists.
            let status = unsafe { (self.functions.set_device)(device) };
            self.functions.check("hipSetDevice", status)
        };
        if before != self.device {
            set(self.device)?;
        }
        let value = f();
        if before != self.device {
            set(before)?;
        }
        Ok(value)
    }

    fn verdict(&self, what: &str, status: Status) -> Result<(), String> {
        self.functions.check(what, status)
    }

    fn stream(&self) -> *mut c_void {
        self.stream
    }

    fn modules(&self) -> Result<&Modules, String> {
        self.modules.as_ref().map_err(Clone::clone)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if !self.stream.is_null() && self.quiet() {
            // SAFETY: made in `open`, and idle.
            let _ = self.with(|| unsafe { (self.functions.destroy_stream)(self.stream) });
        }
    }
}

impl Runtime for Driver {
    fn describe(&self) -> Vec<(String, String)> {
        self.details.clone()
    }

    fn allocate(&self, bytes: u64) -> Result<Mapped, String> {
        let mut address = null_mut();
        // SAFETY: the pointer is to a local.
        self.call("hipMalloc", || unsafe {
            (self.functions.allocate)(&raw mut address, bytes as usize)
        })?;
        Ok(Mapped { address: address as u64, handle: 0 })
    }

    #[cfg(not(unix))]
    fn import(&self, fd: Fd, _: u64, _: bool) -> Result<Mapped, String> {
        match fd {}
    }

    #[cfg(unix)]
    fn import(&self, fd: Fd, bytes: u64, dedicated: bool) -> Result<Mapped, String> {
        use std::os::fd::AsRawFd;
        let sharing = self.sharing.as_ref().map_err(Clone::clone)?;
        let desc = ExternalMemory {
            ty: OPAQUE_FD,
            handle: Handle { fd: fd.as_raw_fd(), unused: [0; 3] },
            size: bytes,
            flags: if dedicated { DEDICATED } else { 0 },
            reserved: [0; 16],
        };
        let mut memory = null_mut();
        // SAFETY: the descriptor is complete; the runtime owns the file descriptor if it succeeds.
        self.call("hipImportExternalMemory", || unsafe {
            (sharing.import)(&raw mut memory, &raw const desc)
        })?;
        std::mem::forget(fd);
        let whole = ExternalBuffer { offset: 0, size: bytes, flags: 0, reserved: [0; 16] };
        let mut address = null_mut();
        // SAFETY: the memory was just imported and has so many bytes.
        let mapped = self.call("hipExternalMemoryGetMappedBuffer", || unsafe {
            (sharing.map)(&raw mut address, memory, &raw const whole)
        });
        if let Err(error) = mapped {
            // SAFETY: nothing was mapped from it.
            self.call("hipDestroyExternalMemory", || unsafe { (sharing.destroy)(memory) })?;
            return Err(error);
        }
        Ok(Mapped { address: address as u64, handle: memory as u64 })
    }

    fn release(&self, memory: Mapped) {
        let result = match (&self.sharing, memory.handle) {
            // Its mapping goes with it.
            (Ok(sharing), handle @ 1..) => {
                // SAFETY: the handle came from `import`, and the queue is idle.
                self.call("hipDestroyExternalMemory", || unsafe {
                    (sharing.destroy)(handle as *mut c_void)
                })
            }
            _ => {
                // SAFETY: the address came from `allocate`, and the queue is idle.
                self.call("hipFree", || unsafe {
                    (self.functions.free)(memory.address as *mut c_void)
                })
            }
        };
        if let Err(error) = result {
            log::warn!("native memory: {error}");
        }
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), String> {
        self.copy(to as *mut c_void, bytes.as_ptr().cast(), bytes.len(), TO_DEVICE)
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), String> {
        self.copy(bytes.as_mut_ptr().cast(), from as *const c_void, bytes.len(), TO_HOST)
    }

    fn import_timeline(&self, _: Fd) -> Result<(), String> {
        Err("HIP does not support external semaphores".into())
    }

    fn wait(&self, _: u64) -> Result<(), String> {
        Err("HIP does not support external semaphores".into())
    }

    fn signal(&self, _: u64) -> Result<(), String> {
        Err("HIP does not support external semaphores".into())
    }

    fn synchronize(&self) -> Result<(), String> {
        // SAFETY: the stream is this driver's.
        self.call("hipStreamSynchronize", || unsafe { (self.functions.synchronize)(self.stream) })
    }

    fn check(&self) -> Result<bool, String> {
        // SAFETY: as above.
        let status = self.with(|| unsafe { (self.functions.query)(self.stream) })?;
        if status == NOT_READY {
            return Ok(false);
        }
        self.functions.check("the HIP queue", status)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    /// As a C compiler lays out the headers' structures on 64 bits.
    #[test]
    fn structures_are_the_headers() {
        assert_eq!(size_of::<ExternalMemory>(), 104);
        let offsets = [
            offset_of!(ExternalMemory, handle),
            offset_of!(ExternalMemory, size),
            offset_of!(ExternalMemory, flags),
        ];
        assert_eq!(offsets, [8, 24, 32]);
        assert_eq!(size_of::<ExternalBuffer>(), 88);
    }

    #[test]
    fn a_device_is_found_by_uuid_or_address() {
        let device = |address: &str, id: u8| (address.to_string(), (id > 0).then_some([id; 16]));
        let devices =
            [device("0000:03:00.0", 0), device("0000:C3:00.0", 7), device("0001:c3:00.0", 8)];
        let wanted =
            |uuid: Option<u8>, pci: &str| Wanted { uuid: uuid.map(|id| [id; 16]), pci: pci.into() };
        assert_eq!(find(&devices, &wanted(Some(7), "")), Ok(1));
        // Mesa's UUID is another one.
        assert_eq!(find(&devices, &wanted(Some(99), "0000:c3:00.0")), Ok(1));
        assert_eq!(find(&devices, &wanted(None, "0001:c3:00.0")), Ok(2));
        // No address is no match, also where HIP has no UUID.
        for none in [wanted(None, ""), wanted(Some(99), "0000:04:00.0"), wanted(Some(0), "?")] {
            assert!(find(&devices, &none).unwrap_err().starts_with("none of HIP's 3 devices"));
        }
        let partitions = [device("0000:03:00.0", 1), device("0000:03:00.0", 2)];
        let several = find(&partitions, &wanted(None, "0000:03:00.0")).unwrap_err();
        assert!(several.starts_with("2 of HIP's devices"), "{several}");
        assert!(find(&[], &wanted(None, "")).is_err());
    }

    #[test]
    fn addresses() {
        assert_eq!(pci("0000:03:00.0"), Some([0, 3, 0, 0]));
        assert_eq!(pci("0001:C3:1f.7"), Some([1, 0xc3, 0x1f, 7]));
        for wrong in ["", "03:00.0", "0000:03:00", "0000:03:00.0.0", "0000:xx:00.0", "1:2:3:4.0"] {
            assert_eq!(pci(wrong), None, "{wrong}");
        }
    }
}
