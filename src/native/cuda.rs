//! Routes through CUDA: the driver API for memory and order, cuDNN, cuBLASLt and a kernel of this crate's for products. Feature `cuda`.
//!
//! | route | operands | adds up | needs |
//! |---|---|---|---|
//! | `cuda-mxfp4` | E2M1 twice under E8M0 | f32 | an NVRTC that compiles this crate's kernel for the device: sm_120 and sm_121. Not run on either: assembled (tests/codegen.rs) and emulated (tests/emulator.rs) |
//! | `cudnn-mxfp4` | E2M1 twice under E8M0 | f32 | a cuDNN 9.7 whose heuristic has an engine for the graph: sm_100 and later. Tested on a stand-in |
//! | `cublaslt-nvfp4` | E2M1 under E8M0 (MXFP4, its scales exactly rescaled) or E4M3 (NVFP4) | f32 | a cuBLASLt whose heuristic takes E2M1 with `VEC16_UE4M3` scales: sm_100 and later |
//! | `cublaslt-mxfp8` | E4M3 under E8M0 | f32 | a heuristic that takes `VEC32_UE8M0` scales: sm_100 and later |
//! | `cublaslt-fp8` | E2M1, E2M3, E3M2 or E4M3 under E8M0, as E4M3 relative to the line's anchor | fewer bits | a heuristic that takes FP8: sm_89 and later |
//!
//! `driver`, `cudnn` and `cublaslt` call functions by pointers that were checked one by one; types and constants
//! are cudarc's, made from NVIDIA's headers. Statuses are numbers here, not Rust enums: a newer library may return one that
//! this build does not know.

pub(crate) mod cublaslt;
pub(crate) mod cudnn;
pub(crate) mod driver;
pub(crate) mod kernel;

use std::sync::Arc;

use super::Libraries;
use super::blaslt::Route;
use super::registry::Opened;

/// The names of the routes.
const NAMES: [&str; 5] =
    [kernel::NAME, cudnn::NAME, "cublaslt-nvfp4", "cublaslt-mxfp8", "cublaslt-fp8"];

/// Opens the CUDA device with this UUID, and its routes, best first.
pub(crate) fn open(libraries: &Libraries, uuid: [u8; 16]) -> Vec<Opened> {
    let all = |reason: String| NAMES.map(|name| Err((name, reason.clone()))).into();
    let driver = match driver::Driver::open(libraries.cuda.as_deref(), uuid) {
        Ok(driver) => Arc::new(driver),
        Err(reason) => return all(reason),
    };
    let mut opened: Vec<Opened> = vec![match kernel::open(libraries, &driver) {
        Ok(route) => Ok(Arc::new(route)),
        Err(reason) => Err((kernel::NAME, reason)),
    }];
    opened.push(match cudnn::Route::open(libraries.cudnn.as_deref(), &driver) {
        Ok(route) => Ok(Arc::new(route)),
        Err(reason) => Err((cudnn::NAME, reason)),
    });
    match cublaslt::open(libraries.cublaslt.as_deref(), &driver) {
        Err(reason) => opened.extend(NAMES[2..].iter().map(|name| Err((*name, reason.clone())))),
        Ok(lt) => {
            let lt = Arc::new(lt);
            for kind in [cublaslt::Kind::Nvfp4, cublaslt::Kind::Mxfp8, cublaslt::Kind::Fp8] {
                opened.push(Ok(Arc::new(Route::new(&lt, kind))));
            }
        }
    }
    opened
}
