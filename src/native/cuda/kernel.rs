//! The crate's own kernel for compute capability 12.0 and 12.1, `mxf4.cu`, compiled by NVRTC for the device that is there; on
//! any other NVRTC refuses the instruction, and that is the reason given.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::ptr::null_mut;
use std::sync::{Arc, OnceLock};

use super::driver::Driver;
use crate::native::kernel::{Compiler, Launcher, Route};
use crate::native::load::{Library, functions};
use crate::native::{Libraries, Runtime};

/// The route's name.
pub(crate) const NAME: &str = "cuda-mxfp4";

/// CUresult.
type Status = c_uint;
/// CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
const CAPABILITY: [c_uint; 2] = [75, 76];

functions! {
    /// What kernels need of the driver besides.
    struct Functions {
        device: "cuCtxGetDevice" (*mut c_int) -> Status;
        attribute: "cuDeviceGetAttribute" (*mut c_int, c_uint, c_int) -> Status;
        load: "cuModuleLoadData" (*mut *mut c_void, *const c_void) -> Status;
        function: "cuModuleGetFunction" (*mut *mut c_void, *mut c_void, *const c_char) -> Status;
        launch: "cuLaunchKernel" (*mut c_void, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, *mut c_void, *mut *mut c_void, *mut *mut c_void) -> Status;
        error_name: "cuGetErrorName" (Status, *mut *const c_char) -> Status;
    }
}

/// A CUDA device that takes code.
pub(crate) struct Modules {
    functions: Functions,
    driver: Arc<Driver>,
}

pub(crate) fn open(libraries: &Libraries, driver: &Arc<Driver>) -> Result<Route<Modules>, String> {
    let names: &[&str] = if cfg!(windows) {
        &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"]
    } else {
        &[
            "libnvrtc.so.13",
            "libnvrtc.so.12",
            "/usr/local/cuda/lib64/libnvrtc.so.13",
            "/usr/local/cuda/lib64/libnvrtc.so.12",
        ]
    };
    let library = Library::open(libraries.nvrtc.as_deref(), "MICROSCALING_NVRTC", names)?;
    let compiler = Compiler::new(library, "nvrtc", "GetCUBIN")?;
    let modules = Modules::new(libraries.cuda.as_deref(), driver)?;
    let [major, minor] = modules.capability()?;
    let runtime: Arc<dyn Runtime> = Arc::<Driver>::clone(driver);
    Ok(Route {
        name: NAME,
        compiler,
        source: include_str!("mxf4.cu"),
        // `a`: with all that this device has and others may not.
        target: format!("--gpu-architecture=sm_{major}{minor}a"),
        launcher: Arc::new(modules),
        runtime,
        kernel: OnceLock::new(),
    })
}

impl Modules {
    fn new(path: Option<&Path>, driver: &Arc<Driver>) -> Result<Modules, String> {
        // The library that the driver has open already.
        let library = super::driver::library(path)?;
        Ok(Modules { functions: Functions::load(&library)?, driver: Arc::clone(driver) })
    }

    /// Calls with the device's context current.
    fn call(&self, what: &str, f: impl FnOnce(&Functions) -> Status) -> Result<(), String> {
        let status = self.driver.with(|| f(&self.functions))?;
        if status == 0 {
            return Ok(());
        }
        let mut name = std::ptr::null();
        // SAFETY: the pointer is set to a constant of the library's, or left as it is.
        let known = unsafe { (self.functions.error_name)(status, &raw mut name) };
        if known != 0 || name.is_null() {
            return Err(format!("{what}: CUDA error {status}"));
        }
        // SAFETY: as above; the constant is a C string.
        let name = unsafe { CStr::from_ptr(name) };
        Err(format!("{what}: {} ({status})", name.to_string_lossy()))
    }

    fn capability(&self) -> Result<[c_int; 2], String> {
        let mut device = 0;
        // SAFETY: the pointer is to a local, and a context is current.
        self.call("cuCtxGetDevice", |f| unsafe { (f.device)(&raw mut device) })?;
        let mut values = [0; 2];
        for (value, attribute) in values.iter_mut().zip(CAPABILITY) {
            // SAFETY: the pointer is to a local.
            self.call("cuDeviceGetAttribute", |f| unsafe {
                (f.attribute)(&raw mut *value, attribute, device)
            })?;
        }
        Ok(values)
    }
}

impl Launcher for Modules {
    fn load(&self, code: &[u8], name: &CStr) -> Result<u64, String> {
        let (mut module, mut function) = (null_mut(), null_mut());
        // SAFETY: the code is a whole cubin; the driver copies it.
        self.call("cuModuleLoadData", |f| unsafe {
            (f.load)(&raw mut module, code.as_ptr().cast())
        })?;
        // SAFETY: the module was just loaded, and stays.
        self.call("cuModuleGetFunction", |f| unsafe {
            (f.function)(&raw mut function, module, name.as_ptr())
        })?;
        Ok(function as u64)
    }

    unsafe fn launch(
        &self,
        function: u64,
        grid: [u32; 2],
        threads: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<(), String> {
        let (stream, none) = (self.driver.stream(), null_mut());
        // SAFETY: the caller's.
        self.call("cuLaunchKernel", |f| unsafe {
            let (function, values) = (function as *mut c_void, arguments.as_mut_ptr());
            (f.launch)(function, grid[0], grid[1], 1, threads, 1, 1, 0, stream, values, none)
        })
    }
}
