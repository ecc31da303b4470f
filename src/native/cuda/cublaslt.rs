//! Products through cuBLASLt: descriptors, the heuristic, and the routes that are told apart by data types.
//!
//! cuBLASLt counts columns first, and takes FP8 and FP4 only as `D = op(A)ᵀ · B` with both operands contracted along their
//! columns. So its A is our B `[n, k]`, its B our A `[m, k]`, and its D of n × m is our sums `[m, n]`.

use std::collections::HashMap;
use std::ffi::{c_int, c_uint, c_void};
use std::path::Path;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::sys;

use super::driver::Driver;
use crate::formats::{Element, MxSpec, ScaleFormat};
use crate::native::load::{Library, functions};
use crate::native::{
    Accumulation, Codes, Job, Mapped, NativeRoute, Packing, Problem, RouteScale, Runtime,
    ScaleLayout, Scales,
};

/// cublasStatus_t.
type Status = c_uint;
const SUCCESS: Status = 0;
const NOT_SUPPORTED: Status = 15;

/// cublasLtMatmulHeuristicResult_t, with its status as a number.
#[repr(C)]
#[derive(Clone, Copy)]
struct Choice {
    algorithm: [u64; 8],
    workspace: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

const _: () = assert!(size_of::<Choice>() == size_of::<sys::cublasLtMatmulHeuristicResult_t>());

functions! {
    /// The functions used here.
    struct Functions {
        version: "cublasLtGetVersion" () -> usize;
        create: "cublasLtCreate" (*mut *mut c_void) -> Status;
        desc_create: "cublasLtMatmulDescCreate" (*mut *mut c_void, c_uint, c_uint) -> Status;
        desc_destroy: "cublasLtMatmulDescDestroy" (*mut c_void) -> Status;
        desc_set: "cublasLtMatmulDescSetAttribute" (*mut c_void, c_uint, *const c_void, usize) -> Status;
        layout_create: "cublasLtMatrixLayoutCreate" (*mut *mut c_void, c_uint, u64, u64, i64) -> Status;
        layout_destroy: "cublasLtMatrixLayoutDestroy" (*mut c_void) -> Status;
        preference_create: "cublasLtMatmulPreferenceCreate" (*mut *mut c_void) -> Status;
        preference_destroy: "cublasLtMatmulPreferenceDestroy" (*mut c_void) -> Status;
        preference_set: "cublasLtMatmulPreferenceSetAttribute" (*mut c_void, c_uint, *const c_void, usize) -> Status;
        heuristic: "cublasLtMatmulAlgoGetHeuristic" (*mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void, c_int, *mut Choice, *mut c_int) -> Status;
        matmul: "cublasLtMatmul" (*mut c_void, *mut c_void, *const c_void, *const c_void, *mut c_void, *const c_void, *mut c_void, *const c_void, *const c_void, *mut c_void, *mut c_void, *mut c_void, *const [u64; 8], *mut c_void, usize, *mut c_void) -> Status;
    }
}

/// Versions below this one have other scale modes, or none: `VEC16_UE4M3` and `VEC32_UE8M0` came with CUDA 12.8, FP8 before.
const OLDEST: usize = 120_800;
/// Of scratch memory, which NVIDIA advises for Hopper and later.
const WORKSPACE: u64 = 32 << 20;

/// cuBLASLt on a device.
pub(crate) struct Lt {
    functions: Functions,
    driver: Arc<Driver>,
    handle: *mut c_void,
    workspace: Mapped,
    version: usize,
    name: String,
}

// SAFETY: a cuBLASLt handle may be used from several threads at once, says its documentation.
unsafe impl Send for Lt {}
// SAFETY: as above.
unsafe impl Sync for Lt {}

impl std::fmt::Debug for Lt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lt").field("name", &self.name).field("version", &self.version).finish()
    }
}

fn check(what: &str, status: Status) -> Result<(), String> {
    match status {
        SUCCESS => Ok(()),
        NOT_SUPPORTED => Err(format!("{what}: CUBLAS_STATUS_NOT_SUPPORTED")),
        1 => Err(format!("{what}: CUBLAS_STATUS_NOT_INITIALIZED")),
        7 => Err(format!("{what}: CUBLAS_STATUS_INVALID_VALUE")),
        8 => Err(format!("{what}: CUBLAS_STATUS_ARCH_MISMATCH")),
        status => Err(format!("{what}: cuBLAS status {status}")),
    }
}

impl Lt {
    /// Loads the library and makes a handle on the driver's device.
    pub(crate) fn open(path: Option<&Path>, driver: &Arc<Driver>) -> Result<Lt, String> {
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
        let library = Library::open(path, "MICROSCALING_CUBLASLT", names)?;
        let functions = Functions::load(&library)?;
        // SAFETY: it takes nothing.
        let version = unsafe { (functions.version)() };
        if version < OLDEST {
            return Err(format!(
                "{} is cuBLASLt {version}, {OLDEST} is the oldest that will do",
                library.name
            ));
        }
        let mut handle = null_mut();
        // SAFETY: the pointer is to a local.
        check("cublasLtCreate", driver.with(|| unsafe { (functions.create)(&raw mut handle) })?)?;
        let workspace = driver.allocate(WORKSPACE)?;
        let driver = Arc::clone(driver);
        Ok(Lt { functions, driver, handle, workspace, version, name: library.name })
    }
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

impl Kind {
    fn data_type(self) -> c_uint {
        use sys::cudaDataType_t as Type;
        (match self {
            Kind::Fp8 | Kind::Mxfp8 => Type::CUDA_R_8F_E4M3,
            Kind::Nvfp4 => Type::CUDA_R_4F_E2M1,
        }) as c_uint
    }

    fn scale_mode(self) -> Option<i32> {
        use sys::cublasLtMatmulMatrixScale_t as Mode;
        match self {
            Kind::Fp8 => None,
            Kind::Mxfp8 => Some(Mode::CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0 as i32),
            Kind::Nvfp4 => Some(Mode::CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3 as i32),
        }
    }

    /// How an operand is packed, or why the route does not take its format.
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
}

/// A route of cuBLASLt's. What the heuristic answered is kept for each shape.
#[derive(Debug)]
pub(crate) struct Route {
    lt: Arc<Lt>,
    runtime: Arc<dyn Runtime>,
    kind: Kind,
    choices: Mutex<HashMap<[usize; 3], Result<Chosen, String>>>,
}

#[derive(Clone, Copy, Debug)]
struct Chosen {
    algorithm: [u64; 8],
    workspace: usize,
}

impl Route {
    pub(crate) fn new(lt: &Arc<Lt>, kind: Kind) -> Route {
        let runtime: Arc<dyn Runtime> = Arc::<Driver>::clone(&lt.driver);
        Route { lt: Arc::clone(lt), runtime, kind, choices: Mutex::default() }
    }

    /// The algorithm for a padded shape: the heuristic's first.
    fn choose(&self, shape: [usize; 3]) -> Result<Chosen, String> {
        let mut choices = self.choices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = choices.get(&shape) {
            return known.clone();
        }
        let chosen = self.lt.driver.with(|| self.ask(shape)).and_then(|answer| answer);
        choices.insert(shape, chosen.clone());
        chosen
    }

    fn ask(&self, shape: [usize; 3]) -> Result<Chosen, String> {
        let f = &self.lt.functions;
        // Any address that is aligned as operands' will be: the heuristic looks at whether there are scales, not at them.
        let scales = self.kind.scale_mode().map(|_| [self.lt.workspace.address; 2]);
        let descriptors = Descriptors::new(&self.lt, self.kind, shape, scales)?;
        let mut preference = null_mut();
        // SAFETY: of this call and the next ones: as cuBLASLt documents them, with pointers to locals that outlive the calls.
        check("cublasLtMatmulPreferenceCreate", unsafe {
            (f.preference_create)(&raw mut preference)
        })?;
        let bytes = WORKSPACE;
        let attribute =
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: as above.
        let set = unsafe {
            (f.preference_set)(
                preference,
                attribute as c_uint,
                (&raw const bytes).cast(),
                size_of::<u64>(),
            )
        };
        let mut choice =
            Choice { algorithm: [0; 8], workspace: 0, state: 0, waves: 0.0, reserved: [0; 4] };
        let mut found = 0;
        let Descriptors { desc, a, b, d, .. } = descriptors;
        // SAFETY: as above; one result is asked for, and there is room for one.
        let status = unsafe {
            (f.heuristic)(
                self.lt.handle,
                desc,
                a,
                b,
                d,
                d,
                preference,
                1,
                &raw mut choice,
                &raw mut found,
            )
        };
        // SAFETY: made above.
        unsafe { (f.preference_destroy)(preference) };
        check("cublasLtMatmulPreferenceSetAttribute", set)?;
        check("cublasLtMatmulAlgoGetHeuristic", status)?;
        if found < 1 {
            return Err("cublasLtMatmulAlgoGetHeuristic offers no algorithm".into());
        }
        check("the heuristic's algorithm", choice.state)?;
        if choice.workspace as u64 > WORKSPACE {
            return Err(format!(
                "the heuristic's algorithm wants {} bytes of scratch memory",
                choice.workspace
            ));
        }
        Ok(Chosen { algorithm: choice.algorithm, workspace: choice.workspace })
    }
}

/// A product's descriptors, destroyed with it.
struct Descriptors<'a> {
    functions: &'a Functions,
    desc: *mut c_void,
    a: *mut c_void,
    b: *mut c_void,
    d: *mut c_void,
}

impl Descriptors<'_> {
    /// For `shape`: lines of our A, lines of our B, k. `scales`: of our A and our B. With the device's context current.
    fn new(
        lt: &Lt,
        kind: Kind,
        [m, n, k]: [usize; 3],
        scales: Option<[u64; 2]>,
    ) -> Result<Descriptors<'_>, String> {
        use sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        use sys::cudaDataType_t::CUDA_R_32F;
        let f = &lt.functions;
        let mut all = Descriptors {
            functions: f,
            desc: null_mut(),
            a: null_mut(),
            b: null_mut(),
            d: null_mut(),
        };
        // SAFETY: of this call and the next ones: as cuBLASLt documents them, with pointers to locals that outlive the calls.
        check("cublasLtMatmulDescCreate", unsafe {
            (f.desc_create)(&raw mut all.desc, CUBLAS_COMPUTE_32F as c_uint, CUDA_R_32F as c_uint)
        })?;
        let set = |attribute: Attribute, value: &[u8]| {
            // SAFETY: as above.
            let status = unsafe {
                (f.desc_set)(all.desc, attribute as c_uint, value.as_ptr().cast(), value.len())
            };
            check("cublasLtMatmulDescSetAttribute", status)
                .map_err(|error| format!("{error} for {attribute:?}"))
        };
        // CUBLAS_OP_T and CUBLAS_OP_N.
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &1i32.to_ne_bytes())?;
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &0i32.to_ne_bytes())?;
        if kind == Kind::Fp8 {
            // Partial sums are to go into f32 registers.
            set(Attribute::CUBLASLT_MATMUL_DESC_FAST_ACCUM, &0i8.to_ne_bytes())?;
        }
        if let (Some(mode), Some([of_a, of_b])) = (kind.scale_mode(), scales) {
            set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode.to_ne_bytes())?;
            set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode.to_ne_bytes())?;
            set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &of_b.to_ne_bytes())?;
            set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &of_a.to_ne_bytes())?;
        }
        let layout = |out: &mut *mut c_void, ty: c_uint, rows: usize, columns: usize| {
            // SAFETY: as above.
            check("cublasLtMatrixLayoutCreate", unsafe {
                (f.layout_create)(&raw mut *out, ty, rows as u64, columns as u64, rows as i64)
            })
        };
        let (mut a, mut b, mut d) = (null_mut(), null_mut(), null_mut());
        let made = layout(&mut a, kind.data_type(), k, n)
            .and_then(|()| layout(&mut b, kind.data_type(), k, m))
            .and_then(|()| layout(&mut d, CUDA_R_32F as c_uint, n, m));
        (all.a, all.b, all.d) = (a, b, d);
        made.map(|()| all)
    }
}

impl Drop for Descriptors<'_> {
    fn drop(&mut self) {
        for layout in [self.a, self.b, self.d] {
            if !layout.is_null() {
                // SAFETY: made in `new`, destroyed once.
                unsafe { (self.functions.layout_destroy)(layout) };
            }
        }
        if !self.desc.is_null() {
            // SAFETY: as above.
            unsafe { (self.functions.desc_destroy)(self.desc) };
        }
    }
}

impl NativeRoute for Route {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Fp8 => "cublaslt-fp8",
            Kind::Mxfp8 => "cublaslt-mxfp8",
            Kind::Nvfp4 => "cublaslt-nvfp4",
        }
    }

    fn describe(&self) -> Vec<(String, String)> {
        vec![("cuBLASLt".into(), format!("{} ({})", self.lt.version, self.lt.name))]
    }

    fn accumulation(&self) -> Accumulation {
        match self.kind {
            Kind::Fp8 => Accumulation::Fewer,
            Kind::Mxfp8 | Kind::Nvfp4 => Accumulation::F32,
        }
    }

    fn accepts(&self, problem: &Problem) -> Result<[Packing; 2], String> {
        let packings = [self.kind.packing(problem.a)?, self.kind.packing(problem.b)?];
        self.choose(padded(problem, &packings))?;
        Ok(packings)
    }

    fn run(&self, _: &Problem, job: &Job) -> Result<(), String> {
        let chosen = self.choose(job.shape)?;
        let f = &self.lt.functions;
        let (one, zero) = (1f32, 0f32);
        let status = self.lt.driver.with(|| {
            let scales = self.kind.scale_mode().map(|_| job.scales);
            let descriptors = Descriptors::new(&self.lt, self.kind, job.shape, scales)?;
            let Descriptors { desc, a, b, d, .. } = descriptors;
            let address = |address: u64| address as *mut c_void;
            // SAFETY: the operands have the shapes of the descriptors; alpha and beta are read before the call returns; the
            // algorithm is the heuristic's for these shapes, and the workspace as large as it wants.
            Ok::<_, String>(unsafe {
                (f.matmul)(
                    self.lt.handle,
                    desc,
                    (&raw const one).cast(),
                    address(job.codes[1]),
                    a,
                    address(job.codes[0]),
                    b,
                    (&raw const zero).cast(),
                    address(job.sums),
                    d,
                    address(job.sums),
                    d,
                    &raw const chosen.algorithm,
                    address(self.lt.workspace.address),
                    chosen.workspace,
                    self.lt.driver.stream(),
                )
            })
        })??;
        check("cublasLtMatmul", status)
    }

    fn runtime(&self) -> &Arc<dyn Runtime> {
        &self.runtime
    }

    fn sample(&self) -> [MxSpec; 2] {
        match self.kind {
            Kind::Fp8 | Kind::Nvfp4 => [crate::MXFP4; 2],
            Kind::Mxfp8 => [crate::MXFP8_E4M3; 2],
        }
    }
}

/// What a problem is multiplied as: lines of A, lines of B, k.
fn padded(problem: &Problem, packings: &[Packing; 2]) -> [usize; 3] {
    let [m, k] = packings[0].padded(problem.m, problem.k);
    let [n, of_b] = packings[1].padded(problem.n, problem.k);
    [m, n, k.max(of_b)]
}
