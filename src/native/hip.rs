//! Routes through HIP: the runtime for memory, hipBLASLt and a kernel of this crate's for products. Feature `hip`.
//!
//! | route | operands | scales | needs |
//! |---|---|---|---|
//! | `hipblaslt-mx` | E2M1, E4M3 or E5M2 under E8M0, in any mix | row by row | hipBLASLt 1.0 whose heuristic takes `VEC32_UE8M0`: gfx950 |
//! | `hipblaslt-mx-swizzled` | the same | tiles of 32 × 8 | hipBLASLt 1.3, whose heuristic takes `BLK32_UE8M0_32_8_EXT` |
//! | `hip-mxfp4` | E2M1 twice | row by row | hiprtc, and a device that its code for gfx950 loads on |
//!
//! hipBLASLt adds to f32, `hip-mxfp4` too. None of this has run on such a device; the calls are tested on stand-ins
//! (`tests`), the kernel is assembled (tests/codegen.rs) and emulated (tests/emulator.rs).
//!
//! Bindings are written by hand after the headers of ROCm 7: what is used is little, and statuses are numbers, since a newer
//! library may return one that this build does not know.

pub(crate) mod blaslt;
pub(crate) mod driver;
pub(crate) mod kernel;

use std::sync::Arc;

use super::Libraries;
use super::blaslt::Blas;
use super::registry::Opened;

/// What tells the device that wgpu has open.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// Vulkan's, where there is Vulkan.
    pub(crate) uuid: Option<[u8; 16]>,
    /// `domain:bus:device.function`, or empty.
    pub(crate) pci: String,
}

/// Opens the HIP device that is wanted, and its routes, best first.
pub(crate) fn open(libraries: &Libraries, wanted: &Wanted) -> Vec<Opened> {
    const ROUTES: [blaslt::Scales; 2] = [blaslt::Scales::Plain, blaslt::Scales::Swizzled];
    let driver = match driver::Driver::open(libraries.hip.as_deref(), wanted) {
        Ok(driver) => Arc::new(driver),
        Err(reason) => {
            let names = ROUTES.into_iter().map(Blas::name).chain([kernel::NAME]);
            return names.map(|name| Err((name, reason.clone()))).collect();
        }
    };
    let lt = blaslt::open(libraries.hipblaslt.as_deref(), &driver).map(Arc::new);
    let mut all: Vec<Opened> = Vec::new();
    for scales in ROUTES {
        all.push(match lt.as_ref().map_err(Clone::clone).and_then(|lt| scales.route(lt)) {
            Ok(route) => Ok(Arc::new(route)),
            Err(reason) => Err((scales.name(), reason)),
        });
    }
    all.push(match kernel::open(libraries, &driver) {
        Ok(route) => Ok(Arc::new(route)),
        Err(reason) => Err((kernel::NAME, reason)),
    });
    all
}
