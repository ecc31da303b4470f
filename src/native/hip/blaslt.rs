//! hipBLASLt: products of operands under E8M0 scales, where its heuristic takes them.
//!
//! The library counts columns first. Its matrix A is our B read as `[k, n]` and transposed, its B our A read as `[k, m]`, its D
//! our sums read as `[n, m]`: the one form, TN, that it documents for block scales, with m and n multiples of 16, k one of 128,
//! one batch, and no epilogue.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::path::Path;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};

use super::driver::Driver;
use super::padded;
use crate::formats::{Element, MxSpec, ScaleFormat};
use crate::native::load::{Library, functions};
use crate::native::{
    Accumulation, Codes, Job, Mapped, NativeRoute, Packing, Problem, RouteScale, Runtime,
    ScaleLayout,
};

/// hipblasStatus_t.
type Status = c_int;
const SUCCESS: Status = 0;

// Of hipblas-common.h, library_types.h and hipblaslt.h, ROCm 7.
/// HIPBLAS_OP_N, HIPBLAS_OP_T.
const OP_N: i32 = 111;
const OP_T: i32 = 112;
/// HIPBLAS_COMPUTE_32F.
const COMPUTE_32F: c_int = 2;
/// HIP_R_32F.
const R_32F: c_int = 0;
/// HIPBLASLT_MATMUL_DESC_….
const TRANSA: c_int = 0;
const TRANSB: c_int = 1;
const A_SCALE_POINTER: c_int = 5;
const B_SCALE_POINTER: c_int = 6;
const A_SCALE_MODE: c_int = 31;
const B_SCALE_MODE: c_int = 32;
/// HIPBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES.
const MAX_WORKSPACE_BYTES: c_int = 1;

/// What `hipblasLtGetVersion` says: major · 100000 + minor · 100 + patch.
type Version = c_int;
/// hipDataType has E2M1 and `VEC32_UE8M0` is 2 from here on.
const OLDEST: Version = 100_000;
/// `BLK32_UE8M0_32_8_EXT` is 1001 from here on. Up to 1.2 it was missing or had another number.
const OLDEST_SWIZZLED: Version = 100_300;
/// Of scratch memory.
const WORKSPACE: u64 = 64 << 20;

/// hipblasLtMatmulAlgo_t.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug)]
struct Algorithm {
    data: [u8; 16],
    workspace: usize,
}

/// hipblasLtMatmulHeuristicResult_t.
#[repr(C)]
struct Choice {
    algorithm: Algorithm,
    workspace: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

const _: () = assert!(size_of::<Algorithm>() == 24 && size_of::<Choice>() == 56);

functions! {
    /// The functions used here.
    struct Functions {
        create: "hipblasLtCreate" (*mut *mut c_void) -> Status;
        version: "hipblasLtGetVersion" (*mut c_void, *mut c_int) -> Status;
        desc_create: "hipblasLtMatmulDescCreate" (*mut *mut c_void, c_int, c_int) -> Status;
        desc_set: "hipblasLtMatmulDescSetAttribute" (*mut c_void, c_int, *const c_void, usize) -> Status;
        desc_destroy: "hipblasLtMatmulDescDestroy" (*mut c_void) -> Status;
        layout_create: "hipblasLtMatrixLayoutCreate" (*mut *mut c_void, c_int, u64, u64, i64) -> Status;
        layout_destroy: "hipblasLtMatrixLayoutDestroy" (*mut c_void) -> Status;
        preference_create: "hipblasLtMatmulPreferenceCreate" (*mut *mut c_void) -> Status;
        preference_set: "hipblasLtMatmulPreferenceSetAttribute" (*mut c_void, c_int, *const c_void, usize) -> Status;
        preference_destroy: "hipblasLtMatmulPreferenceDestroy" (*mut c_void) -> Status;
        heuristic: "hipblasLtMatmulAlgoGetHeuristic" (*mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void, c_int, *mut Choice, *mut c_int) -> Status;
        matmul: "hipblasLtMatmul" (*mut c_void, *mut c_void, *const c_void, *const c_void, *mut c_void, *const c_void, *mut c_void, *const c_void, *const c_void, *mut c_void, *mut c_void, *mut c_void, *const Algorithm, *mut c_void, usize, *mut c_void) -> Status;
    }
}

fn check(what: &str, status: Status) -> Result<(), String> {
    match status {
        SUCCESS => Ok(()),
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

fn dotted(version: Version) -> String {
    format!("{}.{}.{}", version / 100_000, version / 100 % 1000, version % 100)
}

/// hipBLASLt on a device.
pub(crate) struct Lt {
    functions: Functions,
    driver: Arc<Driver>,
    handle: *mut c_void,
    workspace: Mapped,
    version: Version,
    name: String,
    /// A handle is for one thread at a time.
    turn: Mutex<()>,
}

// SAFETY: the handle is used by one thread at a time (`turn`).
unsafe impl Send for Lt {}
// SAFETY: as above.
unsafe impl Sync for Lt {}

impl std::fmt::Debug for Lt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lt").field("name", &self.name).field("version", &self.version).finish()
    }
}

impl Lt {
    /// Loads the library and makes a handle on the driver's device.
    pub(crate) fn open(path: Option<&Path>, driver: &Arc<Driver>) -> Result<Lt, String> {
        let names: &[&str] = if cfg!(windows) {
            &["libhipblaslt.dll", "hipblaslt.dll"]
        } else {
            &["libhipblaslt.so.1", "libhipblaslt.so", "/opt/rocm/lib/libhipblaslt.so"]
        };
        let library = Library::open(path, "MICROSCALING_HIPBLASLT", names)?;
        let functions = Functions::load(&library)?;
        let mut handle = null_mut();
        // SAFETY: the pointer is to a local.
        check("hipblasLtCreate", driver.with(|| unsafe { (functions.create)(&raw mut handle) })?)?;
        let mut version = 0;
        // SAFETY: the handle was just made; the pointer is to a local.
        check("hipblasLtGetVersion", unsafe { (functions.version)(handle, &raw mut version) })?;
        if version < OLDEST {
            return Err(format!(
                "{} is hipBLASLt {}, {} is the oldest that will do",
                library.name,
                dotted(version),
                dotted(OLDEST)
            ));
        }
        let workspace = driver.allocate(WORKSPACE)?;
        let (driver, name) = (Arc::clone(driver), library.name);
        Ok(Lt { functions, driver, handle, workspace, version, name, turn: Mutex::new(()) })
    }
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
    pub(crate) fn route(self) -> &'static str {
        match self {
            Scales::Plain => "hipblaslt-mx",
            Scales::Swizzled => "hipblaslt-mx-swizzled",
        }
    }

    /// HIPBLASLT_MATMUL_MATRIX_SCALE_….
    fn mode(self) -> i32 {
        match self {
            Scales::Plain => 2,
            Scales::Swizzled => 1001,
        }
    }

    /// How an operand is packed, or why the routes do not take its format.
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

/// A route of hipBLASLt's. What the heuristic answered is kept for each shape.
#[derive(Debug)]
pub(crate) struct Route {
    lt: Arc<Lt>,
    runtime: Arc<dyn Runtime>,
    scales: Scales,
    choices: Mutex<HashMap<Key, Result<Algorithm, String>>>,
}

/// Data types of A and B, and the padded shape.
type Key = ([c_int; 2], [usize; 3]);

impl Route {
    pub(crate) fn new(lt: &Arc<Lt>, scales: Scales) -> Result<Route, String> {
        if scales == Scales::Swizzled && lt.version < OLDEST_SWIZZLED {
            return Err(format!(
                "hipBLASLt {} has another number for BLK32_UE8M0_32_8_EXT, or none; {} is the oldest that will do",
                dotted(lt.version),
                dotted(OLDEST_SWIZZLED)
            ));
        }
        let runtime: Arc<dyn Runtime> = Arc::<Driver>::clone(&lt.driver);
        Ok(Route { lt: Arc::clone(lt), runtime, scales, choices: Mutex::default() })
    }

    fn key(problem: &Problem, shape: [usize; 3]) -> Result<Key, String> {
        let of =
            |spec: MxSpec| data_type(spec.element).ok_or_else(|| format!("no type for {spec}"));
        Ok(([of(problem.a)?, of(problem.b)?], shape))
    }

    /// The algorithm for a padded shape: the heuristic's first.
    fn choose(&self, key: Key) -> Result<Algorithm, String> {
        let mut choices = self.choices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = choices.get(&key) {
            return known.clone();
        }
        let chosen = self.lt.driver.with(|| self.ask(key)).and_then(|answer| answer);
        choices.insert(key, chosen.clone());
        chosen
    }

    fn ask(&self, key: Key) -> Result<Algorithm, String> {
        let f = &self.lt.functions;
        let _turn = self.lt.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // Any address that is aligned as operands' will be: the heuristic looks at whether there are scales, not at them.
        let descriptors = Descriptors::new(self, key, [self.lt.workspace.address; 2])?;
        let Descriptors { desc, a, b, d, .. } = descriptors;
        let mut preference = null_mut();
        // SAFETY: of this call and the next ones: as hipBLASLt documents them, with pointers to locals that outlive the calls.
        check("hipblasLtMatmulPreferenceCreate", unsafe {
            (f.preference_create)(&raw mut preference)
        })?;
        let bytes = WORKSPACE;
        // SAFETY: as above.
        let set = unsafe {
            let value = (&raw const bytes).cast();
            (f.preference_set)(preference, MAX_WORKSPACE_BYTES, value, size_of::<u64>())
        };
        let mut choice = Choice {
            algorithm: Algorithm { data: [0; 16], workspace: 0 },
            workspace: 0,
            state: SUCCESS,
            waves: 1.0,
            reserved: [0; 4],
        };
        let mut found = 0;
        // SAFETY: as above; one result is asked for, and there is room for one.
        let status = unsafe {
            let (handle, choice, found) = (self.lt.handle, &raw mut choice, &raw mut found);
            (f.heuristic)(handle, desc, a, b, d, d, preference, 1, choice, found)
        };
        // SAFETY: made above.
        unsafe { (f.preference_destroy)(preference) };
        check("hipblasLtMatmulPreferenceSetAttribute", set)?;
        check("hipblasLtMatmulAlgoGetHeuristic", status)?;
        if found < 1 {
            return Err("hipblasLtMatmulAlgoGetHeuristic offers no algorithm".into());
        }
        check("the heuristic's algorithm", choice.state)?;
        if choice.workspace as u64 > WORKSPACE {
            return Err(format!(
                "the heuristic's algorithm wants {} bytes of scratch memory",
                choice.workspace
            ));
        }
        Ok(choice.algorithm)
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
    /// For lines of our A, lines of our B, and k; `scales` of our A and our B. With the device current.
    fn new(
        route: &Route,
        (types, [m, n, k]): Key,
        scales: [u64; 2],
    ) -> Result<Descriptors<'_>, String> {
        let f = &route.lt.functions;
        let none = null_mut();
        let mut all = Descriptors { functions: f, desc: none, a: none, b: none, d: none };
        // SAFETY: of this call and the next ones: as hipBLASLt documents them, with pointers to locals that outlive the calls.
        check("hipblasLtMatmulDescCreate", unsafe {
            (f.desc_create)(&raw mut all.desc, COMPUTE_32F, R_32F)
        })?;
        let set = |attribute: c_int, value: &[u8]| {
            // SAFETY: as above.
            let status =
                unsafe { (f.desc_set)(all.desc, attribute, value.as_ptr().cast(), value.len()) };
            check("hipblasLtMatmulDescSetAttribute", status)
                .map_err(|error| format!("{error} for attribute {attribute}"))
        };
        set(TRANSA, &OP_T.to_ne_bytes())?;
        set(TRANSB, &OP_N.to_ne_bytes())?;
        let mode = route.scales.mode().to_ne_bytes();
        set(A_SCALE_MODE, &mode)?;
        set(B_SCALE_MODE, &mode)?;
        set(A_SCALE_POINTER, &scales[1].to_ne_bytes())?;
        set(B_SCALE_POINTER, &scales[0].to_ne_bytes())?;
        let layout = |ty: c_int, rows: usize, columns: usize| {
            let mut out = null_mut();
            // SAFETY: as above.
            check("hipblasLtMatrixLayoutCreate", unsafe {
                (f.layout_create)(&raw mut out, ty, rows as u64, columns as u64, rows as i64)
            })
            .map(|()| out)
        };
        all.a = layout(types[1], k, n)?;
        all.b = layout(types[0], k, m)?;
        all.d = layout(R_32F, n, m)?;
        Ok(all)
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
        self.scales.route()
    }

    fn describe(&self) -> Vec<(String, String)> {
        vec![("hipBLASLt".into(), format!("{} ({})", dotted(self.lt.version), self.lt.name))]
    }

    fn accumulation(&self) -> Accumulation {
        Accumulation::F32
    }

    fn accepts(&self, problem: &Problem) -> Result<[Packing; 2], String> {
        let packings = [self.scales.packing(problem.a)?, self.scales.packing(problem.b)?];
        let shape = padded(problem, &packings);
        if let Some(length) = shape.into_iter().find(|length| *length > i32::MAX as usize) {
            return Err(format!("a length of {length} is beyond the library's 32 bits"));
        }
        self.choose(Route::key(problem, shape)?)?;
        Ok(packings)
    }

    fn run(&self, problem: &Problem, job: &Job) -> Result<(), String> {
        let key = Route::key(problem, job.shape)?;
        let algorithm = self.choose(key)?;
        let f = &self.lt.functions;
        let (one, zero) = (1f32, 0f32);
        let status = self.lt.driver.with(|| {
            let _turn = self.lt.turn.lock().unwrap_or_else(PoisonError::into_inner);
            let descriptors = Descriptors::new(self, key, job.scales)?;
            let Descriptors { desc, a, b, d, .. } = descriptors;
            let address = |address: u64| address as *mut c_void;
            // SAFETY: the operands have the shapes of the descriptors; alpha and beta are read before the call returns; the
            // algorithm is the heuristic's for these shapes, and the workspace as large as it may want.
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
                    &raw const algorithm,
                    address(self.lt.workspace.address),
                    WORKSPACE as usize,
                    self.lt.driver.stream(),
                )
            })
        })??;
        check("hipblasLtMatmul", status)
    }

    fn runtime(&self) -> &Arc<dyn Runtime> {
        &self.runtime
    }
}
