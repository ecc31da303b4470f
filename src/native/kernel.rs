//! The crate's own FP4 kernels: compiled at run time by the vendor's compiler, launched in the vendor's queue.
//!
//! `cuda/mxf4.cu` and `hip/mxf4.hip` take MXFP4 operands as this crate keeps them, scales row by row, and write f32 sums.
//! Whether a device has the instruction is not looked up anywhere: its compiler, or the loading of its code, says so.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr::{null, null_mut};
use std::sync::{Arc, OnceLock};

use super::device::{Device, Module};
use super::load::Library;
use super::{Accumulation, Job, NativeRoute, Packing, Problem, Runtime, ScaleLayout};

/// Of both kernels: their name, a block's side, its threads.
const FUNCTION: &CStr = c"mx_matmul_mxf4";
const TILE: usize = 128;
const THREADS: u32 = 256;
/// Of code, or of a compiler's messages: more is an error.
const MAX_CODE: usize = 1 << 28;
/// A grid's largest second length, on either machine.
const MAX_GRID_Y: usize = 65535;

/// nvrtcResult, hiprtcResult.
type Status = c_int;

/// NVRTC or hiprtc, whose functions differ in name only.
pub(crate) struct Compiler {
    create: unsafe extern "C" fn(
        *mut *mut c_void,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(*mut c_void, c_int, *const *const c_char) -> Status,
    log: Text,
    code: Text,
    destroy: unsafe extern "C" fn(*mut *mut c_void) -> Status,
    /// `nvrtc` or `hiprtc`.
    prefix: &'static str,
    name: String,
}

/// What a program has: its size, and the bytes.
#[derive(Clone, Copy)]
struct Text {
    size: unsafe extern "C" fn(*mut c_void, *mut usize) -> Status,
    get: unsafe extern "C" fn(*mut c_void, *mut c_char) -> Status,
}

impl Compiler {
    /// `code` is what the library calls the code that it makes.
    pub(crate) fn new(
        library: Library,
        prefix: &'static str,
        code: &str,
    ) -> Result<Compiler, String> {
        let symbol = |name: &str| format!("{prefix}{name}");
        // SAFETY: of this and the next ones: the signatures are those of nvrtc.h and hiprtc.h.
        let text = |name: &str| unsafe {
            Ok::<_, String>(Text {
                size: library.get(&symbol(&format!("{name}Size")))?,
                get: library.get(&symbol(name))?,
            })
        };
        // SAFETY: as above.
        let (create, compile, destroy) = unsafe {
            (
                library.get(&symbol("CreateProgram"))?,
                library.get(&symbol("CompileProgram"))?,
                library.get(&symbol("DestroyProgram"))?,
            )
        };
        let (log, code) = (text("GetProgramLog")?, text(code)?);
        Ok(Compiler { create, compile, log, code, destroy, prefix, name: library.name })
    }

    /// Compiles for a target, or says why not.
    fn compile(&self, source: &str, target: &str) -> Result<Vec<u8>, String> {
        let prefix = self.prefix;
        let check = |status: Status| match status {
            0 => Ok(()),
            status => Err(format!("{prefix} status {status}")),
        };
        let text = |text: &str| CString::new(text).map_err(|error| error.to_string());
        let (source, target) = (text(source)?, text(target)?);
        let mut program = null_mut();
        // SAFETY: of this call and the next ones: as the library documents them, with pointers to what outlives the calls.
        check(unsafe {
            let name = c"mxf4".as_ptr();
            (self.create)(&raw mut program, source.as_ptr(), name, 0, null(), null())
        })?;
        // SAFETY: as above.
        let compiled = unsafe { (self.compile)(program, 1, [target.as_ptr()].as_ptr()) };
        let wanted = if compiled == 0 { self.code } else { self.log };
        let mut bytes = 0;
        // SAFETY: as above.
        let mut done = check(unsafe { (wanted.size)(program, &raw mut bytes) });
        if bytes > MAX_CODE {
            done = done.and(Err(format!("{prefix} has {bytes} bytes of output")));
        }
        let mut buffer = vec![0u8; if done.is_ok() { bytes } else { 0 }];
        if !buffer.is_empty() {
            // SAFETY: as above; the buffer has as many bytes as were asked for.
            done = check(unsafe { (wanted.get)(program, buffer.as_mut_ptr().cast()) });
        }
        // SAFETY: made above, destroyed once.
        unsafe { (self.destroy)(&raw mut program) };
        done?;
        if compiled == 0 {
            return Ok(buffer);
        }
        let log = String::from_utf8_lossy(&buffer);
        let mut lines = log.trim_end_matches('\0').lines().map(str::trim);
        let first = lines.find(|line| line.contains("error")).map(str::to_string);
        let why = first.unwrap_or_else(|| format!("{prefix} status {compiled}"));
        Err(format!("{prefix} does not compile it with {}: {why}", target.to_string_lossy()))
    }
}

/// The route of a kernel.
pub(crate) struct Route<D: Device> {
    name: &'static str,
    compiler: Compiler,
    source: &'static str,
    /// The option that names the device.
    target: String,
    device: Arc<D>,
    runtime: Arc<dyn Runtime>,
    /// The kernel on the device, or why it is not there. Compiled when first asked for.
    kernel: OnceLock<Result<Module, String>>,
}

impl<D: Device> std::fmt::Debug for Route<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut f = f.debug_struct("Route");
        f.field("name", &self.name).field("compiler", &self.compiler.name).finish_non_exhaustive()
    }
}

impl<D: Device> Route<D> {
    pub(crate) fn new(
        name: &'static str,
        compiler: Compiler,
        source: &'static str,
        target: String,
        device: &Arc<D>,
    ) -> Route<D> {
        let (device, runtime) = (Arc::clone(device), Arc::<D>::clone(device) as Arc<dyn Runtime>);
        Route { name, compiler, source, target, device, runtime, kernel: OnceLock::new() }
    }

    fn kernel(&self) -> Result<Module, String> {
        let make = || {
            let code = self.compiler.compile(self.source, &self.target)?;
            self.device.load(&code, FUNCTION)
        };
        self.kernel.get_or_init(make).clone()
    }
}

impl<D: Device> Drop for Route<D> {
    fn drop(&mut self) {
        match self.kernel.get() {
            Some(Ok(module)) if self.device.quiet() => self.device.unload(module),
            _ => {}
        }
    }
}

impl<D: Device> NativeRoute for Route<D> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn describe(&self) -> Vec<(String, String)> {
        vec![(self.compiler.prefix.into(), format!("{}, {}", self.compiler.name, self.target))]
    }

    fn accumulation(&self) -> Accumulation {
        Accumulation::F32
    }

    fn accepts(&self, problem: &Problem) -> Result<[Packing; 2], String> {
        let packing = |spec| Packing::mxfp4(spec, ScaleLayout::Rows, 32);
        let packings = [packing(problem.a)?, packing(problem.b)?];
        let [m, n, k] = problem.padded(&packings);
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
        unsafe { self.device.launch(&kernel, grid, THREADS, &mut arguments) }
    }

    fn runtime(&self) -> &Arc<dyn Runtime> {
        &self.runtime
    }
}
