//! Native routes: products on FP4 and FP8 tensor cores that no shader reaches, through a vendor's libraries.
//!
//! The libraries are loaded at run time; nothing of theirs is needed to build, and where one is missing, too old, or says no,
//! the reason is kept and the product runs in the next tier. Features: `cuda`, `hip`.
//!
//! # A product, step by step
//! 1. A [`NativeRoute`] says whether it takes the [`Problem`], and in which [`Packing`] it wants the operands. What the
//!    library's own heuristic answers decides, never the device's generation.
//! 2. Kernels ([`crate::kernels::native_pack`]) write both operands in that packing, relative to the anchors of their lines
//!    (see [`crate::kernels::matmul`]), into memory that the library sees too. A block that the packing cannot hold exactly
//!    raises a flag there; nothing is clamped.
//! 3. What was recorded is submitted, the library waits for it, multiplies into f32 sums `[m, n]`, and what is recorded next
//!    waits for the library (`share.rs`). On Vulkan both orders are values of one timeline semaphore and no byte passes through
//!    the host; where memory or semaphores cannot be shared, the operands and sums are copied through it, and counted
//!    ([`Traffic`]).
//! 4. The epilogue of the other tiers makes y from the sums: anchors, alpha, tensor-wide scales, beta, bias, output type. It
//!    runs only if no flag was raised; otherwise the next tier's kernel does, decided on the device, and is counted.
//!
//! Before the first product of a pair of formats on a device every route runs a known-answer test for it (`selftest.rs`); a
//! mismatch disables the route.
//!
//! **Bounded**, as the tensor tier, with the accumulation that the route states ([`Accumulation`]).

#[cfg(all(
    any(feature = "cuda", feature = "hip"),
    any(target_os = "linux", target_os = "windows")
))]
pub(crate) mod blaslt;
#[cfg(all(feature = "cuda", any(target_os = "linux", target_os = "windows")))]
pub mod cuda;
#[cfg(all(
    any(feature = "cuda", feature = "hip"),
    any(target_os = "linux", target_os = "windows")
))]
pub(crate) mod device;
#[cfg(all(feature = "hip", any(target_os = "linux", target_os = "windows")))]
pub mod hip;
#[cfg(all(
    any(feature = "cuda", feature = "hip"),
    any(target_os = "linux", target_os = "windows")
))]
pub(crate) mod kernel;
pub mod layout;
#[cfg(all(
    any(feature = "cuda", feature = "hip"),
    any(target_os = "linux", target_os = "windows")
))]
pub(crate) mod load;
#[cfg(all(
    any(feature = "cuda", feature = "hip"),
    any(target_os = "linux", target_os = "windows")
))]
pub(crate) mod memo;
#[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
pub(crate) mod registry;
#[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
pub(crate) mod selftest;
#[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
pub(crate) mod share;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::formats::MxSpec;

/// Where the libraries are, if not where the system looks: a path that is tried alone. An empty path stands for none. What is
/// not set here is read from the environment when a context first asks for its native routes: `MICROSCALING_CUDA` and so on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Libraries {
    /// The CUDA driver, `libcuda.so.1`.
    pub cuda: Option<PathBuf>,
    /// `libcudnn.so.9`: `MICROSCALING_CUDNN`.
    pub cudnn: Option<PathBuf>,
    /// `libcublasLt.so.13` or `.12`: `MICROSCALING_CUBLASLT`.
    pub cublaslt: Option<PathBuf>,
    /// `libnvrtc.so.13` or `.12`: `MICROSCALING_NVRTC`.
    pub nvrtc: Option<PathBuf>,
    /// `libamdhip64.so`: `MICROSCALING_HIP`.
    pub hip: Option<PathBuf>,
    /// `libhiprtc.so`: `MICROSCALING_HIPRTC`.
    pub hiprtc: Option<PathBuf>,
    /// `libhipblaslt.so`: `MICROSCALING_HIPBLASLT`.
    pub hipblaslt: Option<PathBuf>,
}

/// The multiply-adds from which on [`crate::Tier::Auto`] asks the routes. On an H100 a product through a library costs 0.45 ms
/// besides its own time (DESIGN.md says for what), in which the tensor tier does 2³⁵ to 2³⁶ multiply-adds.
pub const SMALLEST: u64 = 1 << 36;

/// A product of packed operands, all contracted along their lines: A `[m, k]`, B `[n, k]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Rows of A.
    pub m: usize,
    /// Rows of B.
    pub n: usize,
    /// The contracted length.
    pub k: usize,
    /// A's format. W4A4 and W4A8 differ here.
    pub a: MxSpec,
    /// B's.
    pub b: MxSpec,
}

impl Problem {
    /// What it is multiplied as: lines of A, lines of B, positions of k.
    pub fn padded(&self, packings: &[Packing; 2]) -> [usize; 3] {
        let [m, k] = packings[0].padded(self.m, self.k);
        let [n, of_b] = packings[1].padded(self.n, self.k);
        [m, n, k.max(of_b)]
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Problem { m, n, k, a, b } = self;
        write!(f, "{a} × {b}, {m}×{n}×{k}")
    }
}

/// How a route takes an operand. Lines and k are padded with zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Packing {
    /// The elements.
    pub codes: Codes,
    /// Their scales, if the route takes any.
    pub scales: Option<Scales>,
    /// Lines are padded to a multiple of this; 0 stands for 1, also in the others.
    pub lines: usize,
    /// Positions of k are padded to a multiple of this, itself one of 32.
    pub k: usize,
}

/// A route's elements, line by line without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codes {
    /// The operand's own: four bits, the first element in the low ones, or a byte.
    Same,
    /// E4M3 of value · 2^`window`, the value relative to its line's anchor: without scales. Elements that E4M3 does not hold
    /// exactly raise the flag.
    E4m3 {
        /// As large as the largest element allows.
        window: i32,
    },
}

/// A route's scales, a byte for every `group` positions of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scales {
    /// What a byte is.
    pub format: RouteScale,
    /// Positions under one scale: 16 or 32.
    pub group: usize,
    /// Where the bytes lie.
    pub layout: ScaleLayout,
}

/// The scales that routes take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouteScale {
    /// 2^(byte − 127), relative to the line's anchor, which is 127: exact for 127 binades below it, else the flag is raised.
    E8m0,
    /// Positive E4M3. E8M0 scales become 2^(8 + scale − anchor): exact for 17 binades below the anchor, else the flag is
    /// raised. NVFP4's are taken as they are.
    Ue4m3,
}

/// Where the byte of line r and group c lies. Lines are padded as the packing says, groups as the layout needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleLayout {
    /// r · groups + c.
    Rows,
    /// Tiles of 128 lines by 4 groups, 512 bytes each: what cuBLASLt, cuDNN and CUTLASS take.
    Tiles128x4,
    /// Tiles of 32 lines by 8 groups, 256 bytes each: hipBLASLt's pre-swizzled order.
    Tiles32x8,
}

impl Packing {
    /// Of a route that takes E2M1 under E8M0 scales of 32 as they are, or why it does not take the format. Sixteen lines suit the
    /// epilogue, which reads the sums by vectors.
    #[cfg(all(
        any(feature = "cuda", feature = "hip"),
        any(target_os = "linux", target_os = "windows")
    ))]
    pub(crate) fn mxfp4(spec: MxSpec, layout: ScaleLayout, k: usize) -> Result<Packing, String> {
        let scale = spec.scale == crate::ScaleFormat::E8M0 && spec.block.len().is_multiple_of(32);
        if spec.element != crate::Element::E2M1 || !scale {
            return Err(format!("{spec} is not E2M1 under E8M0 scales of at least 32"));
        }
        let scales = Scales { format: RouteScale::E8m0, group: 32, layout };
        Ok(Packing { codes: Codes::Same, scales: Some(scales), lines: 16, k })
    }

    /// Lines and positions of k with the padding.
    pub fn padded(&self, lines: usize, k: usize) -> [usize; 2] {
        [lines.next_multiple_of(self.lines.max(1)), k.next_multiple_of(self.k.max(1))]
    }

    /// Bytes of the codes of so many lines and positions.
    pub fn code_bytes(&self, spec: MxSpec, lines: usize, k: usize) -> usize {
        let [lines, k] = self.padded(lines, k);
        let codes = lines.saturating_mul(k);
        match self.codes {
            Codes::E4m3 { .. } => codes,
            Codes::Same if spec.element.bits() == 8 => codes,
            Codes::Same => codes.saturating_mul(spec.element.bits() as usize).div_ceil(8),
        }
    }

    /// Lines and groups of the scales, with the padding.
    pub fn scale_shape(&self, lines: usize, k: usize) -> [usize; 2] {
        let Some(scales) = self.scales else { return [0; 2] };
        let [lines, k] = self.padded(lines, k);
        scales.layout.padded([lines, k.div_ceil(scales.group.max(1))])
    }

    /// The power of two that a packed value is too large by, relative to the anchor.
    pub fn exponent(&self, spec: MxSpec) -> i32 {
        match (self.codes, self.scales) {
            (Codes::E4m3 { window }, _) => window,
            (Codes::Same, Some(Scales { format: RouteScale::Ue4m3, .. }))
                if spec.scale == crate::ScaleFormat::E8M0 =>
            {
                8
            }
            _ => 0,
        }
    }
}

/// How a route adds products up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accumulation {
    /// In f32, as the tensor tier.
    F32,
    /// In fewer bits: the route's documentation has the bound. [`crate::Tier::Auto`] does not choose such a route.
    Fewer,
}

/// Addresses in the library's address space of what [`NativeRoute::run`] works on. Sizes include the padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Lines of A, lines of B, positions of k.
    pub shape: [usize; 3],
    /// Codes of A and of B.
    pub codes: [u64; 2],
    /// Scales of A and of B; 0 where the packing has none.
    pub scales: [u64; 2],
    /// f32 `[lines of A, lines of B]`, row by row without gaps.
    pub sums: u64,
}

/// A way to multiply that a library offers.
pub trait NativeRoute: std::fmt::Debug + Send + Sync {
    /// A stable name, e.g. `cublaslt-nvfp4`.
    fn name(&self) -> &'static str;

    /// The library's version, for reports.
    fn describe(&self) -> Vec<(String, String)>;

    /// How it adds up.
    fn accumulation(&self) -> Accumulation;

    /// The packings of A and B if the route takes the problem, or why not.
    fn accepts(&self, problem: &Problem) -> Result<[Packing; 2], String>;

    /// Puts the product into the runtime's queue. Called only for problems that were accepted.
    fn run(&self, problem: &Problem, job: &Job) -> Result<(), String>;

    /// Where it runs.
    fn runtime(&self) -> &Arc<dyn Runtime>;

    /// The pair of formats that [`crate::Context::test_native`] tests: MXFP4 twice, unless the route takes something else.
    fn sample(&self) -> [MxSpec; 2] {
        [crate::MXFP4; 2]
    }
}

/// Memory that a runtime sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Its address there.
    pub address: u64,
    /// The runtime's own handle: 0 for memory of its own.
    pub handle: u64,
}

/// A file descriptor that is handed over.
#[cfg(unix)]
pub type Fd = std::os::fd::OwnedFd;
/// There are none: memory is not shared.
#[cfg(not(unix))]
#[derive(Debug)]
pub enum Fd {}

/// A vendor's device with one queue: memory, and order. The device is the one that wgpu has open.
pub trait Runtime: std::fmt::Debug + Send + Sync {
    /// Driver and library versions, the device's name: for reports.
    fn describe(&self) -> Vec<(String, String)>;

    /// Memory of its own.
    fn allocate(&self, bytes: u64) -> Result<Mapped, String>;

    /// Memory exported by Vulkan as an opaque file descriptor, which becomes the runtime's.
    fn import(&self, fd: Fd, bytes: u64, dedicated: bool) -> Result<Mapped, String>;

    /// Gives memory back; the queue is idle.
    fn release(&self, memory: Mapped);

    /// From the host, complete on return.
    fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), String>;

    /// To the host, complete on return; waits for the queue.
    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), String>;

    /// Takes a timeline semaphore exported by Vulkan. An error where there are none: then a fence orders.
    fn import_timeline(&self, fd: Fd) -> Result<(), String>;

    /// Makes the queue wait until the timeline has the value.
    fn wait(&self, value: u64) -> Result<(), String>;

    /// Makes the queue set the timeline's value when it gets there.
    fn signal(&self, value: u64) -> Result<(), String>;

    /// Waits for the queue.
    fn synchronize(&self) -> Result<(), String>;

    /// Whether all in the queue is done, or what went wrong in it, without waiting.
    fn check(&self) -> Result<bool, String>;
}

/// Bytes that native products of a context moved through the host, because memory could not be shared, and others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Products that ran.
    pub products: u64,
    /// Bytes from wgpu's device to the library's through the host.
    pub to_library: u64,
    /// Bytes back.
    pub from_library: u64,
    /// Bytes of operands and sums in memory that both see.
    pub shared: u64,
    /// Times that the host waited for a device, because no semaphore is shared.
    pub host_waits: u64,
}

/// What became of a route on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteState {
    /// Open; no known-answer test has run yet.
    Untested,
    /// The known-answer tests of all pairs of formats so far passed, in this time.
    Passed(Duration),
    /// Not used, and why.
    Disabled(String),
}

/// A route of a context, or why it is not there.
#[derive(Clone, Debug)]
pub struct RouteReport {
    /// The route's name.
    pub name: String,
    /// What became of it.
    pub state: RouteState,
    /// How it adds up, if it is there.
    pub accumulation: Option<Accumulation>,
    /// Versions and device.
    pub details: Vec<(String, String)>,
}

/// What [`crate::Context::native`] tells.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// All routes of this build.
    pub routes: Vec<RouteReport>,
    /// How memory is shared and work is ordered, or why not.
    pub sharing: Vec<String>,
    /// What went where.
    pub traffic: Traffic,
    /// Products that a route's format could not hold exactly, and that the next tier computed.
    pub recomputed: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paddings_of_zero_are_one() {
        let scales = Scales { format: RouteScale::E8m0, group: 0, layout: ScaleLayout::Rows };
        let packing = Packing { codes: Codes::Same, scales: Some(scales), lines: 0, k: 0 };
        assert_eq!(packing.padded(3, 32), [3, 32]);
        assert_eq!(packing.scale_shape(3, 32), [3, 32]);
        let x = crate::formats::MxTensor::quantize(&[1.0; 96], 3, 32, &Default::default()).unwrap();
        assert!(crate::kernels::native_pack::pack(&x, &packing).is_ok());
        // Half a byte at the end, and more bytes than there are numbers.
        let odd =
            crate::formats::MxTensor::quantize(&[1.0; 99], 3, 33, &Default::default()).unwrap();
        assert_eq!(crate::kernels::native_pack::pack(&odd, &packing).unwrap().codes.len(), 50);
        assert_eq!(packing.code_bytes(crate::MXFP8_E4M3, usize::MAX, 32), usize::MAX);
    }
}
