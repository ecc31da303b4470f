//! hipBLASLt: operands under E8M0 scales. The one form that it documents for them has m and n multiples of 16, k one of 128,
//! one batch, and no epilogue. The calls are in `native/blaslt.rs`.

use std::ffi::{c_int, c_void};
use std::path::Path;
use std::sync::Arc;

use super::driver::Driver;
use crate::formats::{Element, MxSpec, ScaleFormat};
use crate::native::blaslt::{Attribute, Blas, Choice, Lt, Route, Status};
use crate::native::load::Library;
use crate::native::{Accumulation, Codes, Packing, RouteScale, ScaleLayout};

/// What `hipblasLtGetVersion` says is major · 100000 + minor · 100 + patch. hipDataType has E2M1 and `VEC32_UE8M0` is 2 from here
/// on.
const OLDEST: usize = 100_000;
/// `BLK32_UE8M0_32_8_EXT` is 1001 from here on. Up to 1.2 it was missing or had another number.
const OLDEST_SWIZZLED: usize = 100_300;

/// hipblasLtMatmulAlgo_t.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Algorithm {
    data: [u8; 16],
    workspace: usize,
}

const _: () = assert!(size_of::<Algorithm>() == 24 && size_of::<Choice<Algorithm>>() == 56);

fn dotted(version: usize) -> String {
    format!("{}.{}.{}", version / 100_000, version / 100 % 1000, version % 100)
}

/// Loads the library and makes a handle on the driver's device.
pub(crate) fn open(path: Option<&Path>, driver: &Arc<Driver>) -> Result<Lt<Scales>, String> {
    let names: &[&str] = if cfg!(windows) {
        &["libhipblaslt.dll", "hipblaslt.dll"]
    } else {
        &["libhipblaslt.so.1", "libhipblaslt.so", "/opt/rocm/lib/libhipblaslt.so"]
    };
    Lt::open(Library::open(path, "MICROSCALING_HIPBLASLT", names)?, driver)
}

/// In which order a route takes the scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scales {
    /// Row by row.
    Plain,
    /// In tiles of 32 × 8.
    Swizzled,
}

impl Scales {
    /// The route, if the library is not too old for it.
    pub(crate) fn route(self, lt: &Arc<Lt<Scales>>) -> Result<Route<Scales>, String> {
        if self == Scales::Swizzled && lt.version < OLDEST_SWIZZLED {
            return Err(format!(
                "hipBLASLt {} has another number for BLK32_UE8M0_32_8_EXT, or none; {} is the oldest that will do",
                dotted(lt.version),
                dotted(OLDEST_SWIZZLED)
            ));
        }
        Ok(Route::new(lt, self))
    }
}

/// hipDataType. FP6 is left out: how the library wants it packed is not documented.
fn data_type(element: Element) -> Option<c_int> {
    match element {
        Element::E4M3 => Some(28),
        Element::E5M2 => Some(29),
        Element::E2M1 => Some(33),
        _ => None,
    }
}

/// Numbers are those of hipblas-common.h, library_types.h and hipblaslt.h, ROCm 7.
impl Blas for Scales {
    type Device = Driver;
    type Algorithm = Algorithm;

    const PREFIX: &'static str = "hipblasLt";
    const COMPUTE_32F: c_int = 2;
    const R_32F: c_int = 0;
    const MAX_WORKSPACE_BYTES: c_int = 1;
    // HIPBLAS_OP_T and HIPBLAS_OP_N.
    const TRANSPOSED: [(Attribute, i32); 2] =
        [((0, "attribute 0"), 112), ((1, "attribute 1"), 111)];
    const SCALE_MODES: [Attribute; 2] = [(31, "attribute 31"), (32, "attribute 32")];
    const SCALE_POINTERS: [Attribute; 2] = [(5, "attribute 5"), (6, "attribute 6")];
    const WORKSPACE: u64 = 64 << 20;
    const LONGEST: usize = i32::MAX as usize;

    fn version(library: &Library, handle: *mut c_void) -> Result<usize, String> {
        // SAFETY: the signature is hipblaslt.h's.
        let get: unsafe extern "C" fn(*mut c_void, *mut c_int) -> Status =
            unsafe { library.get("hipblasLtGetVersion") }?;
        let mut version = 0;
        // SAFETY: the handle was just made; the pointer is to a local.
        Scales::check("hipblasLtGetVersion", unsafe { get(handle, &raw mut version) })?;
        match usize::try_from(version).unwrap_or(0) {
            version @ OLDEST.. => Ok(version),
            version => Err(format!(
                "{} is hipBLASLt {}, {} is the oldest that will do",
                library.name,
                dotted(version),
                dotted(OLDEST)
            )),
        }
    }

    fn describe(version: usize, name: &str) -> (String, String) {
        ("hipBLASLt".into(), format!("{} ({name})", dotted(version)))
    }

    fn check(what: &str, status: Status) -> Result<(), String> {
        match status {
            0 => Ok(()),
            1 => Err(format!("{what}: HIPBLAS_STATUS_NOT_INITIALIZED")),
            2 => Err(format!("{what}: HIPBLAS_STATUS_ALLOC_FAILED")),
            3 => Err(format!("{what}: HIPBLAS_STATUS_INVALID_VALUE")),
            5 => Err(format!("{what}: HIPBLAS_STATUS_EXECUTION_FAILED")),
            6 => Err(format!("{what}: HIPBLAS_STATUS_INTERNAL_ERROR")),
            7 => Err(format!("{what}: HIPBLAS_STATUS_NOT_SUPPORTED")),
            8 => Err(format!("{what}: HIPBLAS_STATUS_ARCH_MISMATCH")),
            10 => Err(format!("{what}: HIPBLAS_STATUS_INVALID_ENUM")),
            status => Err(format!("{what}: hipBLAS status {status}")),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Scales::Plain => "hipblaslt-mx",
            Scales::Swizzled => "hipblaslt-mx-swizzled",
        }
    }

    fn accumulation(self) -> Accumulation {
        Accumulation::F32
    }

    fn sample(self) -> [MxSpec; 2] {
        [crate::MXFP4; 2]
    }

    fn packing(self, spec: MxSpec) -> Result<Packing, String> {
        data_type(spec.element).ok_or_else(|| format!("{spec} is neither E2M1, E4M3 nor E5M2"))?;
        if spec.scale != ScaleFormat::E8M0 || !spec.block.len().is_multiple_of(32) {
            return Err(format!("{spec} has no E8M0 scales of at least 32 elements"));
        }
        let (layout, lines, k) = match self {
            Scales::Plain => (ScaleLayout::Rows, 16, 128),
            // Whole tiles.
            Scales::Swizzled => (ScaleLayout::Tiles32x8, 32, 256),
        };
        let scales = crate::native::Scales { format: RouteScale::E8m0, group: 32, layout };
        Ok(Packing { codes: Codes::Same, scales: Some(scales), lines, k })
    }

    /// Of a format that [`Blas::packing`] takes.
    fn data_type(self, spec: MxSpec) -> c_int {
        data_type(spec.element).unwrap_or(-1)
    }

    /// HIPBLASLT_MATMUL_MATRIX_SCALE_….
    fn scale_mode(self) -> Option<i32> {
        Some(match self {
            Scales::Plain => 2,
            Scales::Swizzled => 1001,
        })
    }

    fn attributes(self) -> &'static [(Attribute, &'static [u8])] {
        &[]
    }
}
