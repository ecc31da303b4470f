//! The crate's own kernel for gfx950, `mxf4.hip`, compiled by hiprtc.
//!
//! Whether the device takes it is known when its code is loaded: code for gfx950 loads on gfx950.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::{null, null_mut};
use std::sync::{Arc, OnceLock};

use super::driver::Driver;
use super::padded;
use crate::formats::{Element, MxSpec, ScaleFormat};
use crate::native::load::{Library, functions};
use crate::native::{
    Accumulation, Codes, Job, NativeRoute, Packing, Problem, RouteScale, Runtime, ScaleLayout,
    Scales,
};

/// The route's name.
pub(crate) const NAME: &str = "hip-mxfp4";

const SOURCE: &str = include_str!("mxf4.hip");
const FUNCTION: &CStr = c"mx_matmul_mxf4";
const TARGET: &CStr = c"--offload-arch=gfx950";
/// Of the kernel: a block's side, its threads.
const TILE: usize = 128;
const THREADS: u32 = 256;
/// A grid's largest second length.
const MAX_GRID_Y: usize = 65535;

/// hiprtcResult.
type Status = c_int;

functions! {
    /// The functions used here.
    struct Functions {
        create: "hiprtcCreateProgram" (*mut *mut c_void, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> Status;
        compile: "hiprtcCompileProgram" (*mut c_void, c_int, *const *const c_char) -> Status;
        log_size: "hiprtcGetProgramLogSize" (*mut c_void, *mut usize) -> Status;
        log: "hiprtcGetProgramLog" (*mut c_void, *mut c_char) -> Status;
        code_size: "hiprtcGetCodeSize" (*mut c_void, *mut usize) -> Status;
        code: "hiprtcGetCode" (*mut c_void, *mut c_char) -> Status;
        destroy: "hiprtcDestroyProgram" (*mut *mut c_void) -> Status;
    }
}

/// The route of the kernel.
pub(crate) struct Route {
    functions: Functions,
    name: String,
    driver: Arc<Driver>,
    runtime: Arc<dyn Runtime>,
    /// The kernel on the device, or why it is not there. Compiled when first asked for.
    kernel: OnceLock<Result<u64, String>>,
}

impl std::fmt::Debug for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Route").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Route {
    pub(crate) fn open(driver: &Arc<Driver>) -> Result<Route, String> {
        let names: &[&str] = if cfg!(windows) {
            &["hiprtc0700.dll", "hiprtc.dll"]
        } else {
            &["libhiprtc.so.7", "libhiprtc.so", "/opt/rocm/lib/libhiprtc.so"]
        };
        let library = Library::open(None, "MICROSCALING_HIPRTC", names)?;
        let runtime: Arc<dyn Runtime> = Arc::<Driver>::clone(driver);
        Ok(Route {
            functions: Functions::load(&library)?,
            name: library.name,
            driver: Arc::clone(driver),
            runtime,
            kernel: OnceLock::new(),
        })
    }

    fn kernel(&self) -> Result<u64, String> {
        let make = || self.driver.load(&self.compile()?, FUNCTION);
        self.kernel.get_or_init(make).clone()
    }

    fn compile(&self) -> Result<Vec<u8>, String> {
        let f = &self.functions;
        let check = |what: &str, status: Status| match status {
            0 => Ok(()),
            status => Err(format!("{what}: hiprtc status {status}")),
        };
        let source: Vec<u8> = SOURCE.bytes().chain([0]).collect();
        let mut program = null_mut();
        // SAFETY: of this call and the next ones: as hiprtc documents them, with pointers to what outlives the calls.
        check("hiprtcCreateProgram", unsafe {
            let name = c"mxf4.hip".as_ptr();
            (f.create)(&raw mut program, source.as_ptr().cast(), name, 0, null(), null())
        })?;
        // SAFETY: as above.
        let compiled = unsafe { (f.compile)(program, 1, [TARGET.as_ptr()].as_ptr()) };
        let (size, get, what) = match compiled {
            0 => (f.code_size, f.code, "hiprtcGetCode"),
            _ => (f.log_size, f.log, "hiprtcGetProgramLog"),
        };
        let mut bytes = 0;
        // SAFETY: as above.
        let mut done = check(what, unsafe { size(program, &raw mut bytes) });
        let mut buffer = vec![0u8; bytes];
        if done.is_ok() {
            // SAFETY: as above; the buffer has as many bytes as were asked for.
            done = check(what, unsafe { get(program, buffer.as_mut_ptr().cast()) });
        }
        // SAFETY: made above, destroyed once.
        unsafe { (f.destroy)(&raw mut program) };
        done?;
        if compiled == 0 {
            return Ok(buffer);
        }
        let log = String::from_utf8_lossy(&buffer);
        let first = log.trim_end_matches('\0').lines().find(|line| line.contains("error"));
        Err(format!(
            "hiprtc does not compile for gfx950: {}",
            first.unwrap_or("it does not say why")
        ))
    }
}

/// The kernel takes any number of lines; sixteen suit the epilogue, which reads the sums by vectors.
fn packing(spec: MxSpec) -> Result<Packing, String> {
    if spec.element != Element::E2M1
        || spec.scale != ScaleFormat::E8M0
        || spec.block.len() % 32 != 0
    {
        return Err(format!("{spec} is not E2M1 under E8M0 scales of at least 32"));
    }
    let scales = Scales { format: RouteScale::E8m0, group: 32, layout: ScaleLayout::Rows };
    Ok(Packing { codes: Codes::Same, scales: Some(scales), lines: 16, k: 32 })
}

impl NativeRoute for Route {
    fn name(&self) -> &'static str {
        NAME
    }

    fn describe(&self) -> Vec<(String, String)> {
        vec![("hiprtc".into(), self.name.clone())]
    }

    fn accumulation(&self) -> Accumulation {
        Accumulation::F32
    }

    fn accepts(&self, problem: &Problem) -> Result<[Packing; 2], String> {
        let packings = [packing(problem.a)?, packing(problem.b)?];
        let [m, n, k] = padded(problem, &packings);
        if m.div_ceil(TILE) > MAX_GRID_Y || n >= 1 << 31 || k >= 1 << 31 {
            return Err(format!("{m}×{n}×{k} is more than one grid"));
        }
        self.kernel()?;
        Ok(packings)
    }

    fn run(&self, _: &Problem, job: &Job) -> Result<(), String> {
        let kernel = self.kernel()?;
        let mut addresses = [job.codes[0], job.scales[0], job.codes[1], job.scales[1], job.sums];
        let mut lengths = job.shape.map(|length| length as u32);
        let mut arguments: Vec<*mut c_void> =
            addresses.iter_mut().map(|address| (&raw mut *address).cast()).collect();
        arguments.extend(lengths.iter_mut().map(|length| (&raw mut *length).cast::<c_void>()));
        let [m, n, _] = job.shape;
        let grid = [n.div_ceil(TILE) as u32, m.div_ceil(TILE) as u32];
        // SAFETY: five pointers and three u32 are the kernel's parameters; the operands have the packing asked for.
        unsafe { self.driver.launch(kernel, grid, THREADS, &mut arguments) }
    }

    fn runtime(&self) -> &Arc<dyn Runtime> {
        &self.runtime
    }
}
