//! What CUDA's and HIP's drivers have in common: calls with the device current, errors with names, kernels.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::time::{Duration, Instant};

use super::Runtime;
use super::load::Library;

/// CUresult, hipError_t: a number, because a newer library may return one that this build does not know.
pub(crate) type Status = c_int;
pub(crate) const SUCCESS: Status = 0;
/// CUDA_ERROR_NOT_READY, hipErrorNotReady.
pub(crate) const NOT_READY: Status = 600;
/// CU_STREAM_NON_BLOCKING, hipStreamNonBlocking: not ordered with the default stream.
pub(crate) const NON_BLOCKING: c_uint = 1;
/// CUDA_EXTERNAL_MEMORY_DEDICATED, hipExternalMemoryDedicated.
pub(crate) const DEDICATED: c_uint = 1;

/// How long a stream is waited for before what belongs to it is destroyed.
const PATIENCE: Duration = Duration::from_secs(2);

/// A driver's device and its stream.
pub(crate) trait Device: Runtime + Sized + 'static {
    /// Runs `f` with the device current in this thread.
    fn with<T>(&self, f: impl FnOnce() -> T) -> Result<T, String>;

    /// The error of a status, by its name.
    fn verdict(&self, what: &str, status: Status) -> Result<(), String>;

    /// The stream that everything goes into.
    fn stream(&self) -> *mut c_void;

    /// What kernels need, or the function that is missing.
    fn modules(&self) -> Result<&Modules, String>;

    /// A call with the device current.
    fn call(&self, what: &str, f: impl FnOnce() -> Status) -> Result<(), String> {
        self.verdict(what, self.with(f)?)
    }

    /// Waits until nothing is in the stream, so that what it works with can be destroyed. Not for ever: then it is kept.
    fn quiet(&self) -> bool {
        let start = Instant::now();
        // A stream that failed works on nothing any more.
        while let Ok(false) = self.check() {
            if start.elapsed() > PATIENCE {
                log::warn!("native: a queue does not end; its memory and handles stay");
                return false;
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        true
    }

    /// Loads code, and finds the kernel `name` in it.
    fn load(&self, code: &[u8], name: &CStr) -> Result<Module, String> {
        let modules = self.modules()?;
        let [load, get, ..] = modules.names;
        let mut module = Module { module: null_mut(), function: null_mut() };
        // SAFETY: the code is a whole binary, as its compiler gave it; the driver copies it.
        self.call(load, || unsafe {
            (modules.load)(&raw mut module.module, code.as_ptr().cast())
        })?;
        // SAFETY: the module was just loaded.
        let found = self.call(get, || unsafe {
            (modules.function)(&raw mut module.function, module.module, name.as_ptr())
        });
        if let Err(error) = found {
            self.unload(&module);
            return Err(error);
        }
        Ok(module)
    }

    /// Gives code back; the stream is idle.
    fn unload(&self, module: &Module) {
        let Ok(modules) = self.modules() else { return };
        // SAFETY: loaded by `load`, and used no more.
        let done = self.call(modules.names[3], || unsafe { (modules.unload)(module.module) });
        if let Err(error) = done {
            log::debug!("native: {error}");
        }
    }

    /// Puts a kernel into the stream.
    ///
    /// # Safety
    /// `module` came from [`Device::load`]; `arguments` point to values of the kernel's parameter types, and memory that these
    /// name is as large as the kernel expects.
    unsafe fn launch(
        &self,
        module: &Module,
        grid: [u32; 2],
        threads: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<(), String> {
        let modules = self.modules()?;
        let (stream, values, none) = (self.stream(), arguments.as_mut_ptr(), null_mut());
        let function = module.function;
        // SAFETY: the caller's.
        self.call(modules.names[2], || unsafe {
            (modules.launch)(function, grid[0], grid[1], 1, threads, 1, 1, 0, stream, values, none)
        })
    }
}

/// Code on a device, and the kernel in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Module {
    module: *mut c_void,
    function: *mut c_void,
}

// SAFETY: the driver's handles, never dereferenced here; both drivers are thread-safe.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// The functions for kernels, whose signatures CUDA and HIP share.
pub(crate) struct Modules {
    load: unsafe extern "C" fn(*mut *mut c_void, *const c_void) -> Status,
    function: unsafe extern "C" fn(*mut *mut c_void, *mut c_void, *const c_char) -> Status,
    #[allow(clippy::type_complexity)]
    launch: unsafe extern "C" fn(
        *mut c_void,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        *mut c_void,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> Status,
    unload: unsafe extern "C" fn(*mut c_void) -> Status,
    names: [&'static str; 4],
}

impl Modules {
    /// Of the functions that load, find, launch and unload.
    pub(crate) fn new(library: &Library, names: [&'static str; 4]) -> Result<Modules, String> {
        let [load, function, launch, unload] = names;
        // SAFETY: the signatures are those of cuda.h and hip_runtime_api.h.
        unsafe {
            Ok(Modules {
                load: library.get(load)?,
                function: library.get(function)?,
                launch: library.get(launch)?,
                unload: library.get(unload)?,
                names,
            })
        }
    }
}

/// The error of a status whose name the library says, or null.
///
/// # Safety
/// `name` is null or a C string that stays.
pub(crate) unsafe fn error(
    what: &str,
    library: &str,
    status: impl std::fmt::Display,
    name: *const c_char,
) -> String {
    if name.is_null() {
        return format!("{what}: {library} {status}");
    }
    // SAFETY: the caller's.
    let name = unsafe { CStr::from_ptr(name) };
    format!("{what}: {} ({status})", name.to_string_lossy())
}
