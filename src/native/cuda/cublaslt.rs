//! cuBLASLt: the routes that are told apart by data types. The calls are in `native/blaslt.rs`.

use std::ffi::{c_int, c_void};
use std::path::Path;
use std::sync::Arc;

use cudarc::cublaslt::sys;
use sys::cublasLtMatmulDescAttributes_t as Name;

use super::driver::Driver;
use crate::formats::{Element, MxSpec, ScaleFormat};
use crate::native::blaslt::{Attribute, Blas, Choice, Lt, Status};
use crate::native::load::Library;
use crate::native::{Accumulation, Codes, Packing, RouteScale, ScaleLayout, Scales};

const _: () =
    assert!(size_of::<Choice<[u64; 8]>>() == size_of::<sys::cublasLtMatmulHeuristicResult_t>());

/// Versions below this one have other scale modes, or none: `VEC16_UE4M3` and `VEC32_UE8M0` came with CUDA 12.8, FP8 before.
const OLDEST: usize = 120_800;

/// Loads the library and makes a handle on the driver's device.
pub(crate) fn open(path: Option<&Path>, driver: &Arc<Driver>) -> Result<Lt<Kind>, String> {
    let names: &[&str] = if cfg!(windows) {
        &["cublasLt64_13.dll", "cublasLt64_12.dll"]
    } else {
        &[
            "libcublasLt.so.13",
            "libcublasLt.so.12",
            "/usr/local/cuda/lib64/libcublasLt.so.13",
            "/usr/local/cuda/lib64/libcublasLt.so.12",
        ]
    };
    Lt::open(Library::open(path, "MICROSCALING_CUBLASLT", names)?, driver)
}

/// Which of the routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// E4M3 without scales.
    Fp8,
    /// E4M3 under E8M0 scales of 32.
    Mxfp8,
    /// E2M1 under UE4M3 scales of 16.
    Nvfp4,
}

impl Blas for Kind {
    type Device = Driver;
    type Algorithm = [u64; 8];

    const PREFIX: &'static str = "cublasLt";
    const COMPUTE_32F: c_int = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F as c_int;
    const R_32F: c_int = sys::cudaDataType_t::CUDA_R_32F as c_int;
    const MAX_WORKSPACE_BYTES: c_int =
        sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
            as c_int;
    // CUBLAS_OP_T and CUBLAS_OP_N.
    const TRANSPOSED: [(Attribute, i32); 2] = [
        ((Name::CUBLASLT_MATMUL_DESC_TRANSA as c_int, "CUBLASLT_MATMUL_DESC_TRANSA"), 1),
        ((Name::CUBLASLT_MATMUL_DESC_TRANSB as c_int, "CUBLASLT_MATMUL_DESC_TRANSB"), 0),
    ];
    const SCALE_MODES: [Attribute; 2] = [
        (Name::CUBLASLT_MATMUL_DESC_A_SCALE_MODE as c_int, "CUBLASLT_MATMUL_DESC_A_SCALE_MODE"),
        (Name::CUBLASLT_MATMUL_DESC_B_SCALE_MODE as c_int, "CUBLASLT_MATMUL_DESC_B_SCALE_MODE"),
    ];
    const SCALE_POINTERS: [Attribute; 2] = [
        (
            Name::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER as c_int,
            "CUBLASLT_MATMUL_DESC_A_SCALE_POINTER",
        ),
        (
            Name::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER as c_int,
            "CUBLASLT_MATMUL_DESC_B_SCALE_POINTER",
        ),
    ];
    /// NVIDIA advises it for Hopper and later.
    const WORKSPACE: u64 = 32 << 20;
    const LONGEST: usize = usize::MAX;

    fn version(library: &Library, _: *mut c_void) -> Result<usize, String> {
        // SAFETY: the signature is cublasLt.h's.
        let version: unsafe extern "C" fn() -> usize =
            unsafe { library.get("cublasLtGetVersion") }?;
        // SAFETY: it takes nothing.
        match unsafe { version() } {
            version @ OLDEST.. => Ok(version),
            version => Err(format!(
                "{} is cuBLASLt {version}, {OLDEST} is the oldest that will do",
                library.name
            )),
        }
    }

    fn describe(version: usize, name: &str) -> (String, String) {
        ("cuBLASLt".into(), format!("{version} ({name})"))
    }

    fn check(what: &str, status: Status) -> Result<(), String> {
        match status {
            0 => Ok(()),
            1 => Err(format!("{what}: CUBLAS_STATUS_NOT_INITIALIZED")),
            7 => Err(format!("{what}: CUBLAS_STATUS_INVALID_VALUE")),
            8 => Err(format!("{what}: CUBLAS_STATUS_ARCH_MISMATCH")),
            15 => Err(format!("{what}: CUBLAS_STATUS_NOT_SUPPORTED")),
            status => Err(format!("{what}: cuBLAS status {status}")),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Fp8 => "cublaslt-fp8",
            Kind::Mxfp8 => "cublaslt-mxfp8",
            Kind::Nvfp4 => "cublaslt-nvfp4",
        }
    }

    fn accumulation(self) -> Accumulation {
        match self {
            Kind::Fp8 => Accumulation::Fewer,
            Kind::Mxfp8 | Kind::Nvfp4 => Accumulation::F32,
        }
    }

    fn sample(self) -> [MxSpec; 2] {
        match self {
            Kind::Fp8 | Kind::Nvfp4 => [crate::MXFP4; 2],
            Kind::Mxfp8 => [crate::MXFP8_E4M3; 2],
        }
    }

    fn packing(self, spec: MxSpec) -> Result<Packing, String> {
        let (codes, scales, k) = match (self, spec.element, spec.scale) {
            (Kind::Fp8, element, ScaleFormat::E8M0) => {
                // The element's largest value times 2^window is at most 448.
                let window = match element {
                    Element::E2M1 => 6,
                    Element::E2M3 => 5,
                    Element::E3M2 => 4,
                    Element::E4M3 => 0,
                    _ => return Err(format!("E4M3 does not hold the elements of {spec}")),
                };
                (Codes::E4m3 { window }, None, 32)
            }
            (Kind::Mxfp8, Element::E4M3, ScaleFormat::E8M0)
                if spec.block.len().is_multiple_of(32) =>
            {
                (Codes::Same, Some((RouteScale::E8m0, 32)), 128)
            }
            (Kind::Nvfp4, Element::E2M1, _) => (Codes::Same, Some((RouteScale::Ue4m3, 16)), 64),
            (Kind::Fp8, ..) => return Err(format!("{spec} has scales that are no powers of two")),
            (Kind::Mxfp8, ..) => {
                return Err(format!("{spec} is not E4M3 under E8M0 scales of at least 32"));
            }
            (Kind::Nvfp4, ..) => return Err(format!("{spec} is not E2M1")),
        };
        let scales =
            scales.map(|(format, group)| Scales { format, group, layout: ScaleLayout::Tiles128x4 });
        Ok(Packing { codes, scales, lines: 16, k })
    }

    fn data_type(self, _: MxSpec) -> c_int {
        use sys::cudaDataType_t as Type;
        (match self {
            Kind::Fp8 | Kind::Mxfp8 => Type::CUDA_R_8F_E4M3,
            Kind::Nvfp4 => Type::CUDA_R_4F_E2M1,
        }) as c_int
    }

    fn scale_mode(self) -> Option<i32> {
        use sys::cublasLtMatmulMatrixScale_t as Mode;
        match self {
            Kind::Fp8 => None,
            Kind::Mxfp8 => Some(Mode::CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0 as i32),
            Kind::Nvfp4 => Some(Mode::CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3 as i32),
        }
    }

    fn attributes(self) -> &'static [(Attribute, &'static [u8])] {
        match self {
            // Partial sums are to go into f32 registers.
            Kind::Fp8 => &[(
                (Name::CUBLASLT_MATMUL_DESC_FAST_ACCUM as c_int, "CUBLASLT_MATMUL_DESC_FAST_ACCUM"),
                &[0],
            )],
            Kind::Mxfp8 | Kind::Nvfp4 => &[],
        }
    }
}
