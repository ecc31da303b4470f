//! cuBLASLt and hipBLASLt, which is its likeness: descriptors, the heuristic, and products. What differs is a [`Blas`]'s.
//!
//! Both count columns first, and take block-scaled operands only as `D = op(A)ᵀ · B`, each contracted along its columns. So
//! their A is our B `[n, k]`, their B our A `[m, k]`, and their D of n × m is our sums `[m, n]`.

use std::ffi::{c_int, c_void};
use std::fmt::Debug;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};

use super::device::Device;
use super::load::{Library, functions};
use super::memo::Memo;
use super::{Accumulation, Job, Mapped, NativeRoute, Packing, Problem, Runtime};
use crate::MxSpec;

/// cublasStatus_t, hipblasStatus_t.
pub(crate) type Status = c_int;

/// An attribute of a product's descriptor: its number, and what messages call it.
pub(crate) type Attribute = (c_int, &'static str);

/// A library, and which of its routes.
pub(crate) trait Blas: Copy + Debug + Send + Sync + 'static {
    /// Its device.
    type Device: Device;
    /// What the heuristic chooses.
    type Algorithm: Copy + Default + Debug + Send + Sync;

    /// `cublasLt`, `hipblasLt`.
    const PREFIX: &'static str;
    /// …_COMPUTE_32F, …_R_32F.
    const COMPUTE_32F: c_int;
    const R_32F: c_int;
    /// …_PREF_MAX_WORKSPACE_BYTES.
    const MAX_WORKSPACE_BYTES: c_int;
    /// TRANSA and TRANSB with …_OP_T and …_OP_N.
    const TRANSPOSED: [(Attribute, i32); 2];
    /// A_SCALE_MODE and B_SCALE_MODE, A_SCALE_POINTER and B_SCALE_POINTER.
    const SCALE_MODES: [Attribute; 2];
    const SCALE_POINTERS: [Attribute; 2];
    /// Bytes of scratch memory.
    const WORKSPACE: u64;
    /// The longest length that the library counts.
    const LONGEST: usize;

    /// The library's version; an error if it is too old.
    fn version(library: &Library, handle: *mut c_void) -> Result<usize, String>;
    /// A version and the library's name, for reports.
    fn describe(version: usize, name: &str) -> (String, String);
    /// The error of a status.
    fn check(what: &str, status: Status) -> Result<(), String>;

    /// The route's name.
    fn name(self) -> &'static str;
    /// How it adds up.
    fn accumulation(self) -> Accumulation;
    /// Formats for its known-answer test.
    fn sample(self) -> [MxSpec; 2];
    /// How an operand is packed, or why the route does not take its format.
    fn packing(self, spec: MxSpec) -> Result<Packing, String>;
    /// The library's type of a packed operand's elements.
    fn data_type(self, spec: MxSpec) -> c_int;
    /// How the library finds scales, if it is given any.
    fn scale_mode(self) -> Option<i32>;
    /// Attributes besides.
    fn attributes(self) -> &'static [(Attribute, &'static [u8])];
}

functions! {
    /// The functions used here.
    struct Functions<A> {
        create: "Create" (*mut *mut c_void) -> Status;
        destroy: "Destroy" (*mut c_void) -> Status;
        desc_create: "MatmulDescCreate" (*mut *mut c_void, c_int, c_int) -> Status;
        desc_destroy: "MatmulDescDestroy" (*mut c_void) -> Status;
        desc_set: "MatmulDescSetAttribute" (*mut c_void, c_int, *const c_void, usize) -> Status;
        layout_create: "MatrixLayoutCreate" (*mut *mut c_void, c_int, u64, u64, i64) -> Status;
        layout_destroy: "MatrixLayoutDestroy" (*mut c_void) -> Status;
        preference_create: "MatmulPreferenceCreate" (*mut *mut c_void) -> Status;
        preference_destroy: "MatmulPreferenceDestroy" (*mut c_void) -> Status;
        preference_set: "MatmulPreferenceSetAttribute" (*mut c_void, c_int, *const c_void, usize) -> Status;
        heuristic: "MatmulAlgoGetHeuristic" (*mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void, *mut c_void, c_int, *mut Choice<A>, *mut c_int) -> Status;
        matmul: "Matmul" (*mut c_void, *mut c_void, *const c_void, *const c_void, *mut c_void, *const c_void, *mut c_void, *const c_void, *const c_void, *mut c_void, *mut c_void, *mut c_void, *const A, *mut c_void, usize, *mut c_void) -> Status;
    }
}

/// …LtMatmulHeuristicResult_t, with its status as a number.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Choice<A> {
    algorithm: A,
    workspace: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

/// The library on a device.
pub(crate) struct Lt<B: Blas> {
    functions: Functions<B::Algorithm>,
    device: Arc<B::Device>,
    handle: *mut c_void,
    workspace: Mapped,
    pub(crate) version: usize,
    name: String,
    /// hipBLASLt's handle is for one thread at a time.
    turn: Mutex<()>,
}

// SAFETY: the handle is used by one thread at a time (`turn`).
unsafe impl<B: Blas> Send for Lt<B> {}
// SAFETY: as above.
unsafe impl<B: Blas> Sync for Lt<B> {}

impl<B: Blas> Debug for Lt<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lt").field("name", &self.name).field("version", &self.version).finish()
    }
}

fn check<B: Blas>(what: &str, status: Status) -> Result<(), String> {
    match status {
        0 => Ok(()),
        status => B::check(&format!("{}{what}", B::PREFIX), status),
    }
}

impl<B: Blas> Lt<B> {
    /// A handle on the device.
    pub(crate) fn open(library: Library, device: &Arc<B::Device>) -> Result<Lt<B>, String> {
        let mut lt = Lt {
            functions: Functions::load(&library, B::PREFIX)?,
            device: Arc::clone(device),
            handle: null_mut(),
            workspace: Mapped { address: 0, handle: 0 },
            version: 0,
            name: library.name.clone(),
            turn: Mutex::new(()),
        };
        // SAFETY: the pointer is to a field, which outlives the call.
        let made = device.with(|| unsafe { (lt.functions.create)(&raw mut lt.handle) })?;
        check::<B>("Create", made)?;
        lt.version = B::version(&library, lt.handle)?;
        lt.workspace = device.allocate(B::WORKSPACE)?;
        Ok(lt)
    }
}

impl<B: Blas> Drop for Lt<B> {
    fn drop(&mut self) {
        if self.handle.is_null() || !self.device.quiet() {
            return;
        }
        // SAFETY: made in `open`; nothing of it is in the stream.
        let _ = self.device.with(|| unsafe { (self.functions.destroy)(self.handle) });
        if self.workspace.address != 0 {
            self.device.release(self.workspace);
        }
    }
}

/// A product as a library sees it: data types of A and of B, and the padded shape.
type Key = ([c_int; 2], [usize; 3]);

/// A route of the library's. What the heuristic answered is kept for each shape.
#[derive(Debug)]
pub(crate) struct Route<B: Blas> {
    lt: Arc<Lt<B>>,
    runtime: Arc<dyn Runtime>,
    which: B,
    choices: Mutex<Memo<Key, Result<B::Algorithm, String>>>,
}

impl<B: Blas> Route<B> {
    pub(crate) fn new(lt: &Arc<Lt<B>>, which: B) -> Route<B> {
        let runtime: Arc<dyn Runtime> = Arc::<B::Device>::clone(&lt.device);
        Route { lt: Arc::clone(lt), runtime, which, choices: Mutex::default() }
    }

    fn key(&self, problem: &Problem, shape: [usize; 3]) -> Key {
        ([problem.a, problem.b].map(|spec| self.which.data_type(spec)), shape)
    }

    /// The algorithm for a padded shape: the heuristic's first.
    fn choose(&self, key: Key) -> Result<B::Algorithm, String> {
        let mut choices = self.choices.lock().unwrap_or_else(PoisonError::into_inner);
        let ask = || self.lt.device.with(|| self.ask(key)).and_then(|answer| answer);
        choices.get(key, ask).clone()
    }

    fn ask(&self, key: Key) -> Result<B::Algorithm, String> {
        let f = &self.lt.functions;
        let _turn = self.lt.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // Any address that is aligned as operands' will be: the heuristic looks at whether there are scales, not at them.
        let descriptors = Descriptors::new(self, key, [self.lt.workspace.address; 2])?;
        let [a, b, d] = descriptors.layouts.each_ref().map(|layout| layout.raw);
        // SAFETY: of this call and the next ones: as the library documents them, with pointers to locals that outlive the calls.
        let preference =
            Owned::new::<B>("MatmulPreferenceCreate", f.preference_destroy, |out| unsafe {
                (f.preference_create)(out)
            })?;
        let bytes = B::WORKSPACE;
        // SAFETY: as above.
        check::<B>("MatmulPreferenceSetAttribute", unsafe {
            let value = (&raw const bytes).cast();
            (f.preference_set)(preference.raw, B::MAX_WORKSPACE_BYTES, value, size_of::<u64>())
        })?;
        let mut choice = Choice::default();
        let mut found = 0;
        // SAFETY: as above; one result is asked for, and there is room for one.
        check::<B>("MatmulAlgoGetHeuristic", unsafe {
            let (handle, desc, choice) = (self.lt.handle, descriptors.desc.raw, &raw mut choice);
            (f.heuristic)(handle, desc, a, b, d, d, preference.raw, 1, choice, &raw mut found)
        })?;
        if found < 1 {
            return Err(format!("{}MatmulAlgoGetHeuristic offers no algorithm", B::PREFIX));
        }
        if choice.state != 0 {
            B::check("the heuristic's algorithm", choice.state)?;
        }
        if choice.workspace as u64 > B::WORKSPACE {
            return Err(format!(
                "the heuristic's algorithm wants {} bytes of scratch memory",
                choice.workspace
            ));
        }
        Ok(choice.algorithm)
    }
}

/// What the library made, destroyed with this.
struct Owned {
    raw: *mut c_void,
    destroy: unsafe extern "C" fn(*mut c_void) -> Status,
}

impl Owned {
    fn new<B: Blas>(
        what: &str,
        destroy: unsafe extern "C" fn(*mut c_void) -> Status,
        make: impl FnOnce(*mut *mut c_void) -> Status,
    ) -> Result<Owned, String> {
        let mut raw = null_mut();
        check::<B>(what, make(&raw mut raw))?;
        Ok(Owned { raw, destroy })
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        unsafe { (self.destroy)(self.raw) };
    }
}

/// A product's descriptors; layouts of the library's A, B and D.
struct Descriptors {
    layouts: [Owned; 3],
    desc: Owned,
}

impl Descriptors {
    /// For lines of our A, lines of our B, and k; `scales` of our A and our B. With the device current.
    fn new<B: Blas>(
        route: &Route<B>,
        (types, [m, n, k]): Key,
        scales: [u64; 2],
    ) -> Result<Descriptors, String> {
        let f = &route.lt.functions;
        // SAFETY: of this call and the next ones: as the library documents them, with pointers to locals that outlive the calls.
        let desc = Owned::new::<B>("MatmulDescCreate", f.desc_destroy, |out| unsafe {
            (f.desc_create)(out, B::COMPUTE_32F, B::R_32F)
        })?;
        let set = |(attribute, name): Attribute, value: &[u8]| {
            // SAFETY: as above.
            let status =
                unsafe { (f.desc_set)(desc.raw, attribute, value.as_ptr().cast(), value.len()) };
            check::<B>("MatmulDescSetAttribute", status)
                .map_err(|error| format!("{error} for {name}"))
        };
        for (attribute, operation) in B::TRANSPOSED {
            set(attribute, &operation.to_ne_bytes())?;
        }
        for (attribute, value) in route.which.attributes() {
            set(*attribute, value)?;
        }
        if let Some(mode) = route.which.scale_mode() {
            for attribute in B::SCALE_MODES {
                set(attribute, &mode.to_ne_bytes())?;
            }
            let [of_a, of_b] = scales;
            for (attribute, address) in B::SCALE_POINTERS.into_iter().zip([of_b, of_a]) {
                set(attribute, &address.to_ne_bytes())?;
            }
        }
        let layout = |ty: c_int, rows: usize, columns: usize| {
            // SAFETY: as above.
            Owned::new::<B>("MatrixLayoutCreate", f.layout_destroy, |out| unsafe {
                (f.layout_create)(out, ty, rows as u64, columns as u64, rows as i64)
            })
        };
        let layouts = [layout(types[1], k, n)?, layout(types[0], k, m)?, layout(B::R_32F, n, m)?];
        Ok(Descriptors { layouts, desc })
    }
}

impl<B: Blas> NativeRoute for Route<B> {
    fn name(&self) -> &'static str {
        self.which.name()
    }

    fn describe(&self) -> Vec<(String, String)> {
        vec![B::describe(self.lt.version, &self.lt.name)]
    }

    fn accumulation(&self) -> Accumulation {
        self.which.accumulation()
    }

    fn accepts(&self, problem: &Problem) -> Result<[Packing; 2], String> {
        let packings = [self.which.packing(problem.a)?, self.which.packing(problem.b)?];
        let shape = problem.padded(&packings);
        if let Some(length) = shape.into_iter().find(|length| *length > B::LONGEST) {
            return Err(format!("a length of {length} is beyond the library's 32 bits"));
        }
        self.choose(self.key(problem, shape))?;
        Ok(packings)
    }

    fn run(&self, problem: &Problem, job: &Job) -> Result<(), String> {
        let key = self.key(problem, job.shape);
        let algorithm = self.choose(key)?;
        let f = &self.lt.functions;
        let (one, zero) = (1f32, 0f32);
        let status = self.lt.device.with(|| {
            let _turn = self.lt.turn.lock().unwrap_or_else(PoisonError::into_inner);
            let descriptors = Descriptors::new(self, key, job.scales)?;
            let [a, b, d] = descriptors.layouts.each_ref().map(|layout| layout.raw);
            let address = |address: u64| address as *mut c_void;
            // SAFETY: the operands have the shapes of the descriptors; alpha and beta are read before the call returns; the
            // algorithm is the heuristic's for these shapes, and the workspace as large as it may want.
            Ok::<_, String>(unsafe {
                (f.matmul)(
                    self.lt.handle,
                    descriptors.desc.raw,
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
                    B::WORKSPACE as usize,
                    self.lt.device.stream(),
                )
            })
        })??;
        check::<B>("Matmul", status)
    }

    fn runtime(&self) -> &Arc<dyn Runtime> {
        &self.runtime
    }

    fn sample(&self) -> [MxSpec; 2] {
        self.which.sample()
    }
}
