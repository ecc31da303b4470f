//! The crate's own kernel for compute capability 12.0 and 12.1, `mxf4.cu`, compiled by NVRTC for the device that is there; on
//! any other NVRTC refuses the instruction, and that is the reason given.

use std::sync::Arc;

use super::driver::Driver;
use crate::native::Libraries;
use crate::native::kernel::{Compiler, Route};
use crate::native::load::Library;

/// The route's name.
pub(crate) const NAME: &str = "cuda-mxfp4";

pub(crate) fn open(libraries: &Libraries, driver: &Arc<Driver>) -> Result<Route<Driver>, String> {
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
    // `a`: with all that this device has and others may not.
    let [major, minor] = driver.capability;
    let target = format!("--gpu-architecture=sm_{major}{minor}a");
    Ok(Route::new(NAME, compiler, include_str!("mxf4.cu"), target, driver))
}
