//! cuDNN 9: MXFP4 as a graph of two dequantizations and a product, which an engine on FP4 tensor cores runs as one kernel.
//!
//! ```text
//! A codes [1, m, k] ── block scale dequantize [1, 32] ──┐
//! A scales, 128 × 4 ───┘                                ├── matmul ── sums [1, m, n], f32
//! B codes [1, k, n] ── block scale dequantize [32, 1] ──┘
//! B scales, 128 × 4 ───┘
//! ```
//!
//! The graph is the one of NVIDIA's own sample for block-scaled products. What is between the nodes is virtual: it has no memory.
//! cuDNN's heuristic lists engines; the first whose plan can be made is taken, and if there is none the route declines.
//! Bounded: sums in f32. Not run on a device that has such engines; tests/standins/cudnn.rs checks every attribute.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::cudnn::sys;

use super::driver::Driver;
use crate::native::device::{self, Device};
use crate::native::load::{Library, functions};
use crate::native::memo::Memo;
use crate::native::{
    Accumulation, Job, Mapped, NativeRoute, Packing, Problem, Runtime, ScaleLayout,
};
use sys::cudnnBackendAttributeName_t as Name;
use sys::cudnnBackendAttributeType_t as Type;
use sys::cudnnBackendDescriptorType_t as Kind;

/// The route's name.
pub(crate) const NAME: &str = "cudnn-mxfp4";

/// cudnnStatus_t.
type Status = c_uint;
/// The oldest with block scales in graphs: 9.7.
const OLDEST: usize = 90_700;
/// Of scratch memory.
const WORKSPACE: u64 = 32 << 20;
/// Of the tensors' memory.
const ALIGNMENT: i64 = 16;
/// Elements under a scale.
const BLOCK: usize = 32;

functions! {
    /// The functions used here.
    struct Functions {
        version: "cudnnGetVersion" () -> usize;
        create: "cudnnCreate" (*mut *mut c_void) -> Status;
        destroy_handle: "cudnnDestroy" (*mut c_void) -> Status;
        set_stream: "cudnnSetStream" (*mut c_void, *mut c_void) -> Status;
        make: "cudnnBackendCreateDescriptor" (c_uint, *mut *mut c_void) -> Status;
        destroy: "cudnnBackendDestroyDescriptor" (*mut c_void) -> Status;
        set: "cudnnBackendSetAttribute" (*mut c_void, c_uint, c_uint, i64, *const c_void) -> Status;
        get: "cudnnBackendGetAttribute" (*mut c_void, c_uint, c_uint, i64, *mut i64, *mut c_void) -> Status;
        finalize: "cudnnBackendFinalize" (*mut c_void) -> Status;
        execute: "cudnnBackendExecute" (*mut c_void, *mut c_void, *mut c_void) -> Status;
        error: "cudnnGetErrorString" (Status) -> *const c_char;
    }
}

/// Tensors of the graph.
#[derive(Clone, Copy, Debug)]
enum Id {
    A = 1,
    B = 2,
    ScalesOfA = 3,
    ScalesOfB = 4,
    WideA = 5,
    WideB = 6,
    Sums = 7,
}

/// The route.
pub(crate) struct Route {
    functions: Functions,
    driver: Arc<Driver>,
    runtime: Arc<dyn Runtime>,
    workspace: Mapped,
    version: usize,
    name: String,
    /// The handle may be used by one thread at a time.
    state: Mutex<State>,
}

struct State {
    handle: *mut c_void,
    /// For each shape: the plan, or why there is none.
    plans: Memo<[usize; 3], Result<Plan, String>>,
}

/// An engine's plan, and what it was made of.
struct Plan {
    plan: Descriptor,
    _parts: Vec<Descriptor>,
}

// SAFETY: the handle and the descriptors are used under the mutex alone; cuDNN ties neither to a thread.
unsafe impl Send for State {}

impl std::fmt::Debug for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Route")
            .field("name", &self.name)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// A backend descriptor, destroyed with this.
struct Descriptor {
    functions: Functions,
    raw: *mut c_void,
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        unsafe { (self.functions.destroy)(self.raw) };
    }
}

impl Functions {
    fn check(&self, what: &str, status: Status) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: it takes any number, and returns a constant, which is a C string.
        Err(unsafe { device::error(what, "cuDNN status", status, (self.error)(status)) })
    }
}

impl Descriptor {
    fn new(functions: &Functions, kind: Kind) -> Result<Descriptor, String> {
        let mut raw = null_mut();
        // SAFETY: the pointer is to a local.
        let status = unsafe { (functions.make)(kind as c_uint, &raw mut raw) };
        functions.check("cudnnBackendCreateDescriptor", status)?;
        Ok(Descriptor { functions: *functions, raw })
    }

    /// Sets an attribute of elements that cuDNN reads as `ty`.
    fn set<T>(&mut self, name: Name, ty: Type, values: &[T]) -> Result<(), String> {
        // SAFETY: the elements have the type that the attribute is documented with, and are copied.
        let status = unsafe {
            (self.functions.set)(
                self.raw,
                name as c_uint,
                ty as c_uint,
                values.len() as i64,
                values.as_ptr().cast(),
            )
        };
        self.functions
            .check("cudnnBackendSetAttribute", status)
            .map_err(|error| format!("{error} for {name:?}"))
    }

    fn set_descriptors(&mut self, name: Name, of: &[&Descriptor]) -> Result<(), String> {
        let raw: Vec<_> = of.iter().map(|descriptor| descriptor.raw).collect();
        self.set(name, Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, &raw)
    }

    fn finalize(self, what: &str) -> Result<Descriptor, String> {
        // SAFETY: the descriptor is alive.
        let status = unsafe { (self.functions.finalize)(self.raw) };
        self.functions
            .check("cudnnBackendFinalize", status)
            .map_err(|error| format!("{error} for {what}"))?;
        Ok(self)
    }
}

const FLOAT: c_uint = sys::cudnnDataType_t::CUDNN_DATA_FLOAT as c_uint;

impl Route {
    /// Loads the library and makes a handle on the driver's device.
    pub(crate) fn open(path: Option<&Path>, driver: &Arc<Driver>) -> Result<Route, String> {
        let names: &[&str] = if cfg!(windows) { &["cudnn64_9.dll"] } else { &["libcudnn.so.9"] };
        let library = Library::open(path, "MICROSCALING_CUDNN", names)?;
        let functions = Functions::load(&library, "")?;
        // SAFETY: it takes nothing.
        let version = unsafe { (functions.version)() };
        if version < OLDEST {
            return Err(format!(
                "{} is cuDNN {version}, {OLDEST} is the oldest that will do",
                library.name
            ));
        }
        let runtime: Arc<dyn Runtime> = Arc::<Driver>::clone(driver);
        let mut route = Route {
            functions,
            driver: Arc::clone(driver),
            runtime,
            workspace: Mapped { address: 0, handle: 0 },
            version,
            name: library.name,
            state: Mutex::new(State { handle: null_mut(), plans: Memo::default() }),
        };
        let mut handle = null_mut();
        // SAFETY: of this call and the next: as cuDNN documents them, with the device's context current.
        let made = driver.with(|| unsafe { (functions.create)(&raw mut handle) })?;
        functions.check("cudnnCreate", made)?;
        route.state().handle = handle;
        // SAFETY: as above.
        let set = driver.with(|| unsafe { (functions.set_stream)(handle, driver.stream()) })?;
        functions.check("cudnnSetStream", set)?;
        route.workspace = driver.allocate(WORKSPACE)?;
        Ok(route)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Destroys all plans, none of which may be at work. Says whether it did.
    fn forget(&self, state: &mut State) -> bool {
        self.driver.quiet() && self.driver.with(|| state.plans.clear()).is_ok()
    }

    /// With the plan for a padded shape; it is made when first asked for.
    fn with_plan<T>(
        &self,
        shape: [usize; 3],
        f: impl FnOnce(*mut c_void, &Plan) -> Result<T, String>,
    ) -> Result<T, String> {
        let mut state = self.state();
        if state.plans.is_full(&shape) && !self.forget(&mut state) {
            state.plans.grow();
        }
        let handle = state.handle;
        let plan = state
            .plans
            .get(shape, || self.driver.with(|| self.plan(handle, shape)).and_then(|answer| answer));
        match plan {
            Ok(plan) => self.driver.with(|| f(handle, plan))?,
            Err(reason) => Err(reason.clone()),
        }
    }

    fn tensor(
        &self,
        id: Id,
        data: c_uint,
        dimensions: [usize; 3],
        strides: [usize; 3],
        reordered: bool,
    ) -> Result<Descriptor, String> {
        let mut tensor = Descriptor::new(&self.functions, Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?;
        let wide = |values: [usize; 3]| values.map(|value| value as i64);
        let integers = Type::CUDNN_TYPE_INT64;
        tensor.set(Name::CUDNN_ATTR_TENSOR_UNIQUE_ID, integers, &[id as i64])?;
        tensor.set(Name::CUDNN_ATTR_TENSOR_DATA_TYPE, Type::CUDNN_TYPE_DATA_TYPE, &[data])?;
        tensor.set(Name::CUDNN_ATTR_TENSOR_DIMENSIONS, integers, &wide(dimensions))?;
        tensor.set(Name::CUDNN_ATTR_TENSOR_STRIDES, integers, &wide(strides))?;
        tensor.set(Name::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, integers, &[ALIGNMENT])?;
        if matches!(id, Id::WideA | Id::WideB) {
            tensor.set(Name::CUDNN_ATTR_TENSOR_IS_VIRTUAL, Type::CUDNN_TYPE_BOOLEAN, &[true])?;
        }
        if reordered {
            let order = sys::cudnnBackendTensorReordering_t::CUDNN_TENSOR_REORDERING_F8_128x4;
            tensor.set(
                Name::CUDNN_ATTR_TENSOR_REORDERING_MODE,
                Type::CUDNN_TYPE_TENSOR_REORDERING_MODE,
                &[order as c_uint],
            )?;
        }
        tensor.finalize(&format!("tensor {id:?}"))
    }

    fn dequantize(
        &self,
        x: &Descriptor,
        scales: &Descriptor,
        y: &Descriptor,
        block: [i32; 2],
    ) -> Result<Descriptor, String> {
        let kind = Kind::CUDNN_BACKEND_OPERATION_BLOCK_SCALE_DEQUANTIZE_DESCRIPTOR;
        let mut node = Descriptor::new(&self.functions, kind)?;
        node.set_descriptors(Name::CUDNN_ATTR_OPERATION_BLOCK_SCALE_DEQUANTIZE_XDESC, &[x])?;
        node.set_descriptors(
            Name::CUDNN_ATTR_OPERATION_BLOCK_SCALE_DEQUANTIZE_SCALE_DESC,
            &[scales],
        )?;
        node.set_descriptors(Name::CUDNN_ATTR_OPERATION_BLOCK_SCALE_DEQUANTIZE_YDESC, &[y])?;
        node.set(
            Name::CUDNN_ATTR_OPERATION_BLOCK_SCALE_DEQUANTIZE_MATH_PREC,
            Type::CUDNN_TYPE_DATA_TYPE,
            &[FLOAT],
        )?;
        node.set(
            Name::CUDNN_ATTR_OPERATION_BLOCK_SCALE_DEQUANTIZE_BLOCK_SIZE,
            Type::CUDNN_TYPE_INT32,
            &block,
        )?;
        node.finalize("a dequantization")
    }

    /// The graph for a shape, and the first engine that makes a plan of it. With the device's context current.
    fn plan(&self, handle: *mut c_void, [m, n, k]: [usize; 3]) -> Result<Plan, String> {
        let f = &self.functions;
        let codes = sys::cudnnDataType_t::CUDNN_DATA_FP4_E2M1 as c_uint;
        let scales = sys::cudnnDataType_t::CUDNN_DATA_FP8_E8M0 as c_uint;
        let [tile_lines, tile_groups] = ScaleLayout::Tiles128x4.tile();
        let groups = (k / BLOCK).next_multiple_of(tile_groups);
        let [rows_of_a, rows_of_b] = [m, n].map(|lines| lines.next_multiple_of(tile_lines));

        let a = self.tensor(Id::A, codes, [1, m, k], [m * k, k, 1], false)?;
        let b = self.tensor(Id::B, codes, [1, k, n], [k * n, 1, k], false)?;
        let of_a = {
            let strides = [rows_of_a * groups, groups, 1];
            self.tensor(Id::ScalesOfA, scales, [1, rows_of_a, groups], strides, true)?
        };
        let of_b = {
            let strides = [rows_of_b * groups, 1, groups];
            self.tensor(Id::ScalesOfB, scales, [1, groups, rows_of_b], strides, true)?
        };
        let wide_a = self.tensor(Id::WideA, FLOAT, [1, m, k], [m * k, k, 1], false)?;
        let wide_b = self.tensor(Id::WideB, FLOAT, [1, k, n], [k * n, 1, k], false)?;
        let sums = self.tensor(Id::Sums, FLOAT, [1, m, n], [m * n, n, 1], false)?;
        let block = BLOCK as i32;
        let from_a = self.dequantize(&a, &of_a, &wide_a, [1, block])?;
        let from_b = self.dequantize(&b, &of_b, &wide_b, [block, 1])?;

        let mut how = Descriptor::new(f, Kind::CUDNN_BACKEND_MATMUL_DESCRIPTOR)?;
        how.set(Name::CUDNN_ATTR_MATMUL_COMP_TYPE, Type::CUDNN_TYPE_DATA_TYPE, &[FLOAT])?;
        let how = how.finalize("the product's type")?;
        let mut product = Descriptor::new(f, Kind::CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR)?;
        product.set_descriptors(Name::CUDNN_ATTR_OPERATION_MATMUL_ADESC, &[&wide_a])?;
        product.set_descriptors(Name::CUDNN_ATTR_OPERATION_MATMUL_BDESC, &[&wide_b])?;
        product.set_descriptors(Name::CUDNN_ATTR_OPERATION_MATMUL_CDESC, &[&sums])?;
        product.set_descriptors(Name::CUDNN_ATTR_OPERATION_MATMUL_DESC, &[&how])?;
        let product = product.finalize("the product")?;

        let mut graph = Descriptor::new(f, Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?;
        graph.set(Name::CUDNN_ATTR_OPERATIONGRAPH_HANDLE, Type::CUDNN_TYPE_HANDLE, &[handle])?;
        graph
            .set_descriptors(Name::CUDNN_ATTR_OPERATIONGRAPH_OPS, &[&from_a, &from_b, &product])?;
        let graph = graph.finalize("the graph")?;
        let mut heuristic = Descriptor::new(f, Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?;
        heuristic.set_descriptors(Name::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, &[&graph])?;
        heuristic.set(
            Name::CUDNN_ATTR_ENGINEHEUR_MODE,
            Type::CUDNN_TYPE_HEUR_MODE,
            &[sys::cudnnBackendHeurMode_t::CUDNN_HEUR_MODE_A as c_uint],
        )?;
        let heuristic = heuristic.finalize("the heuristic")?;

        let mut reason = "cuDNN's heuristic offers no engine".to_string();
        for engine in self.engines(&heuristic)? {
            match self.plan_of(handle, &engine) {
                Ok(plan) => {
                    let _parts = vec![
                        engine, heuristic, graph, product, how, from_a, from_b, a, b, of_a, of_b,
                        wide_a, wide_b, sums,
                    ];
                    return Ok(Plan { plan, _parts });
                }
                // The first engine is the one that should have done it.
                Err(error) if reason.starts_with("cuDNN's heuristic") => reason = error,
                Err(_) => {}
            }
        }
        Err(reason)
    }

    /// What the heuristic lists, best first.
    fn engines(&self, heuristic: &Descriptor) -> Result<Vec<Descriptor>, String> {
        let f = &self.functions;
        let get = |room: usize, out: *mut *mut c_void| -> Result<usize, String> {
            let mut count = 0i64;
            // SAFETY: there is room for as many descriptors as are asked for.
            let status = unsafe {
                (f.get)(
                    heuristic.raw,
                    Name::CUDNN_ATTR_ENGINEHEUR_RESULTS as c_uint,
                    Type::CUDNN_TYPE_BACKEND_DESCRIPTOR as c_uint,
                    room as i64,
                    &raw mut count,
                    out.cast(),
                )
            };
            f.check("cudnnBackendGetAttribute", status)?;
            Ok(usize::try_from(count).unwrap_or(0))
        };
        let count = get(0, null_mut())?.min(64);
        let mut engines = Vec::with_capacity(count);
        for _ in 0..count {
            engines.push(Descriptor::new(f, Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR)?);
        }
        // cuDNN fills descriptors that were made.
        let mut raw: Vec<_> = engines.iter().map(|engine| engine.raw).collect();
        let found = if count > 0 { get(count, raw.as_mut_ptr())? } else { 0 };
        engines.truncate(found);
        Ok(engines)
    }

    fn plan_of(&self, handle: *mut c_void, engine: &Descriptor) -> Result<Descriptor, String> {
        let f = &self.functions;
        let mut plan = Descriptor::new(f, Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?;
        plan.set(Name::CUDNN_ATTR_EXECUTION_PLAN_HANDLE, Type::CUDNN_TYPE_HANDLE, &[handle])?;
        plan.set_descriptors(Name::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, &[engine])?;
        let plan = plan.finalize("an engine's plan")?;
        let (mut bytes, mut count) = (0i64, 0i64);
        // SAFETY: one number is asked for, and there is room for one.
        let status = unsafe {
            (f.get)(
                plan.raw,
                Name::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE as c_uint,
                Type::CUDNN_TYPE_INT64 as c_uint,
                1,
                &raw mut count,
                (&raw mut bytes).cast(),
            )
        };
        f.check("cudnnBackendGetAttribute", status)?;
        if bytes as u64 > WORKSPACE {
            return Err(format!("the engine's plan wants {bytes} bytes of scratch memory"));
        }
        Ok(plan)
    }

    fn execute(&self, handle: *mut c_void, plan: &Plan, job: &Job) -> Result<(), String> {
        let f = &self.functions;
        let tensors = [
            (Id::A, job.codes[0]),
            (Id::B, job.codes[1]),
            (Id::ScalesOfA, job.scales[0]),
            (Id::ScalesOfB, job.scales[1]),
            (Id::Sums, job.sums),
        ];
        let mut pack = Descriptor::new(f, Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?;
        let pointer = Type::CUDNN_TYPE_VOID_PTR;
        let ids = tensors.map(|(id, _)| id as i64);
        pack.set(Name::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, Type::CUDNN_TYPE_INT64, &ids)?;
        let addresses = tensors.map(|(_, address)| address as *mut c_void);
        pack.set(Name::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, pointer, &addresses)?;
        let scratch = self.workspace.address as *mut c_void;
        pack.set(Name::CUDNN_ATTR_VARIANT_PACK_WORKSPACE, pointer, &[scratch])?;
        let pack = pack.finalize("the addresses")?;
        // SAFETY: the memory behind the addresses has the shapes of the plan's tensors.
        let status = unsafe { (f.execute)(handle, plan.plan.raw, pack.raw) };
        f.check("cudnnBackendExecute", status)
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        let mut state = self.state();
        if state.handle.is_null() {
            return;
        }
        if !self.forget(&mut state) {
            // They are as long as the process.
            std::mem::forget(std::mem::take(&mut state.plans));
            return;
        }
        // SAFETY: made in `open`; its plans are gone.
        let _ = self.driver.with(|| unsafe { (self.functions.destroy_handle)(state.handle) });
        if self.workspace.address != 0 {
            self.driver.release(self.workspace);
        }
    }
}

impl NativeRoute for Route {
    fn name(&self) -> &'static str {
        NAME
    }

    fn describe(&self) -> Vec<(String, String)> {
        vec![("cuDNN".into(), format!("{} ({})", self.version, self.name))]
    }

    fn accumulation(&self) -> Accumulation {
        Accumulation::F32
    }

    fn accepts(&self, problem: &Problem) -> Result<[Packing; 2], String> {
        // Whole tiles of scales along k.
        let packing = |spec| Packing::mxfp4(spec, ScaleLayout::Tiles128x4, 128);
        let packings = [packing(problem.a)?, packing(problem.b)?];
        let [m, n, k] = problem.padded(&packings);
        if [m, n, k].iter().any(|length| c_int::try_from(*length).is_err()) {
            return Err(format!("{m}×{n}×{k} is more than cuDNN counts"));
        }
        self.with_plan([m, n, k], |_, _| Ok(()))?;
        Ok(packings)
    }

    fn run(&self, _: &Problem, job: &Job) -> Result<(), String> {
        self.with_plan(job.shape, |handle, plan| self.execute(handle, plan, job))
    }

    fn runtime(&self) -> &Arc<dyn Runtime> {
        &self.runtime
    }
}
