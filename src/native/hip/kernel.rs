//! The crate's own kernel for gfx950, `mxf4.hip`, compiled by hiprtc. Code for gfx950 loads on gfx950 alone.

use std::sync::Arc;

use super::driver::Driver;
use crate::native::Libraries;
use crate::native::kernel::{Compiler, Route};
use crate::native::load::Library;

/// The route's name.
pub(crate) const NAME: &str = "hip-mxfp4";

pub(crate) fn open(libraries: &Libraries, driver: &Arc<Driver>) -> Result<Route<Driver>, String> {
    let names: &[&str] = if cfg!(windows) {
        &["hiprtc0700.dll", "hiprtc.dll"]
    } else {
        &["libhiprtc.so.7", "libhiprtc.so", "/opt/rocm/lib/libhiprtc.so"]
    };
    let library = Library::open(libraries.hiprtc.as_deref(), "MICROSCALING_HIPRTC", names)?;
    let compiler = Compiler::new(library, "hiprtc", "GetCode")?;
    let target = "--offload-arch=gfx950".into();
    Ok(Route::new(NAME, compiler, include_str!("mxf4.hip"), target, driver))
}
