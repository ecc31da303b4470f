//! Ceilings of a machine: kernels that do nothing but one instruction, as often as the device can. Rates of the products are
//! compared with them.
//!
//! Every result is known, and [`Peak::check`] compares it: work that a compiler left out would show. Shaders:
//! `shaders/peak_*.wgsl`. On the CPU engine all cores run loops over registers: for [`Unit::Fma`] as LLVM vectorises them,
//! with AVX2's fused multiply-add where it is there; for [`Unit::Dot`] AVX2's products of bytes with 16-bit sums, which is
//! what the exact tier's twin is made of, and without AVX2 plain loops.

use crate::engine::buffer::{DType, Tensor};
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::engine::{Context, Engine, Stream, cpu_threads};
use crate::{Error, Result};

use super::WORKGROUP;
use super::matmul::{Byte, ByteMatrices};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// f32 multiply-adds; two operations each.
    Fma,
    /// Packed dot products of four signed bytes with 32-bit sums; eight operations each.
    Dot,
    /// Cooperative matrices, f16 to f32.
    Matrix,
    /// Cooperative matrices of bytes, E4M3 to f32 or I8 to i32.
    Bytes,
}

impl Unit {
    /// All of them.
    pub const ALL: [Unit; 4] = [Unit::Fma, Unit::Dot, Unit::Matrix, Unit::Bytes];

    /// `f32 fma`, `packed dot`, `cooperative matrix`, `cooperative matrix of bytes`.
    pub const fn name(self) -> &'static str {
        match self {
            Unit::Fma => "f32 fma",
            Unit::Dot => "packed dot",
            Unit::Matrix => "cooperative matrix",
            Unit::Bytes => "cooperative matrix of bytes",
        }
    }

    /// Words of x.
    fn inputs(self, [side, _, k]: [u32; 3]) -> usize {
        match self {
            Unit::Fma => 512,
            Unit::Dot => 256,
            Unit::Matrix => 8 * (side * k) as usize,
            Unit::Bytes => 8 * (side * k / 4) as usize,
        }
    }

    fn is_matrix(self) -> bool {
        matches!(self, Unit::Matrix | Unit::Bytes)
    }
}

/// Chains of an invocation: more than latency times width anywhere.
const CHAINS: usize = 16;
/// Iterations of a shader's loop, and how often it does each chain's step.
const ITERATIONS: u32 = 256;
const UNROLL: u32 = 4;
const MATRIX_ITERATIONS: u32 = 512;
/// Invocations of a workgroup of cooperative matrices: four subgroups.
const MATRIX_WORKGROUP: u32 = 128;
/// Workgroups on a GPU: 32 for each of the 132 multiprocessors of an H100.
const GROUPS: usize = 4224;
/// On a software adapter.
const SOFTWARE_GROUPS: usize = 16;

/// A kernel at a device's ceiling, with its operands.
#[derive(Debug)]
pub struct Peak {
    unit: Unit,
    /// Of a product of fragments: rows, columns, what is contracted; zeros without.
    fragment: [u32; 3],
    byte: Option<Byte>,
    groups: usize,
    inputs: Vec<u32>,
    x: Tensor,
    y: Tensor,
}

impl Peak {
    /// Allocates the operands. An error if the device lacks the unit.
    pub fn new(ctx: &Context, unit: Unit) -> Result<Peak> {
        let (fragment, byte, groups) = match ctx.engine() {
            Engine::Cpu if unit.is_matrix() => {
                return Err(lacks("cooperative matrices", "the context is the CPU engine".into()));
            }
            Engine::Cpu => ([0; 3], None, CPU_TASKS * cpu_threads()),
            Engine::Gpu(gpu) => {
                let (fragment, byte) = match unit {
                    Unit::Matrix => ([side(gpu)?; 3], None),
                    Unit::Bytes => bytes(gpu)?,
                    _ => ([0; 3], None),
                };
                (fragment, byte, if gpu.caps.software { SOFTWARE_GROUPS } else { GROUPS })
            }
        };
        let inputs = inputs(unit, byte, unit.inputs(fragment));
        let x = ctx.upload(DType::F32, 1, inputs.len(), bytemuck::cast_slice(&inputs))?;
        let y = ctx.zeros(DType::F32, groups, workgroup(unit) as usize)?;
        Ok(Peak { unit, fragment, byte, groups, inputs, x, y })
    }

    /// Operations that one recording does.
    pub fn operations(&self) -> f64 {
        let steps = f64::from(ITERATIONS * UNROLL);
        let all = (self.groups * workgroup(self.unit) as usize) as f64;
        match self.unit {
            Unit::Fma => all * CHAINS as f64 * steps * 2.0,
            Unit::Dot => all * CHAINS as f64 * steps * 8.0,
            Unit::Matrix | Unit::Bytes => {
                let fragment = 2.0 * self.fragment.map(f64::from).iter().product::<f64>();
                all / 32.0 * CHAINS as f64 * f64::from(MATRIX_ITERATIONS) * fragment
            }
        }
    }

    /// The sides of a fragment, or nothing for the other units.
    pub fn fragment(&self) -> Option<[u32; 3]> {
        self.unit.is_matrix().then_some(self.fragment)
    }

    /// Records one run.
    pub fn record(&mut self, stream: &mut Stream<'_>) -> Result<()> {
        if stream.gpu().is_none() {
            let groups = self.y.data.cpu_mut();
            run_cpu(self.unit, &self.inputs, groups);
            return Ok(());
        }
        stream.dispatch(
            &name(self.unit, self.byte, self.fragment),
            || kernel(self.unit, self.byte, self.fragment),
            &[SEED],
            &[&self.x.buffers()[0], &self.y.buffers()[0]],
            self.groups as u64,
        )
    }

    /// An error if the last run's result is not what the arithmetic gives. Waits as [`Context::read`].
    pub async fn check(&self, ctx: &Context) -> Result<()> {
        let bytes = ctx.read(&self.y).await?;
        let got: Vec<u32> = bytemuck::pod_collect_to_vec(&bytes);
        let wrong = |place: usize, got: f64, want: f64| {
            Err(Error::Gpu(format!(
                "the peak of {}: invocation {place} has {got}, not {want}",
                self.unit.name()
            )))
        };
        if self.unit.is_matrix() {
            // Where a fragment's elements lie is the device's affair, but not their sum.
            let values = values(&self.inputs, self.byte);
            let want = matrix_sum(&values, self.fragment) + 32.0 * f64::from(SEED);
            for (i, subgroup) in got.chunks(32).enumerate() {
                let got: f64 = subgroup.iter().map(|bits| f64::from(f32::from_bits(*bits))).sum();
                if got != want {
                    return wrong(32 * i, got, want);
                }
            }
            return Ok(());
        }
        let want: Vec<u32> = match ctx.engine() {
            Engine::Cpu => cpu_expected(self.unit, &self.inputs),
            Engine::Gpu(_) => (0..WORKGROUP as usize)
                .map(|lane| expected(self.unit, &self.inputs, lane))
                .collect(),
        };
        for (i, got) in got.iter().enumerate() {
            let want = want[i % want.len()];
            if *got != want {
                let value = |bits| match self.unit {
                    Unit::Fma => f64::from(f32::from_bits(bits)),
                    _ => f64::from(bits as i32),
                };
                return wrong(i, value(*got), value(want));
            }
        }
        Ok(())
    }
}

/// What the chains start from.
const SEED: u32 = 3;

fn lacks(needs: &str, has: String) -> Error {
    Error::Unsupported {
        operation: "the peak of cooperative matrices".into(),
        needs: needs.into(),
        has,
    }
}

/// The sides of the fragments that the device multiplies.
fn side(gpu: &crate::engine::gpu::Gpu) -> Result<u32> {
    let needed = features(Unit::Matrix);
    if !gpu.device.features().contains(needed) {
        let has = "the device offers none, or was opened without".into();
        return Err(lacks("cooperative matrices and f16 in shaders", has));
    }
    if gpu.caps.subgroups != Some((32, 32)) {
        return Err(lacks("subgroups of 32", format!("the device's are {:?}", gpu.caps.subgroups)));
    }
    [16, 8].into_iter().find(|side| gpu.matrices.contains(&[*side; 3])).ok_or_else(|| {
        lacks(
            "cooperative matrices of 16x16x16 or 8x8x8, f16 to f32",
            format!("the device's are {:?}", gpu.matrices),
        )
    })
}

/// The fragments of bytes that the device multiplies.
fn bytes(gpu: &crate::engine::gpu::Gpu) -> Result<([u32; 3], Option<Byte>)> {
    match gpu.byte_matrices {
        Some(ByteMatrices { byte, k }) if side(gpu)? == 16 => Ok(([16, 16, k], Some(byte))),
        _ => Err(lacks(
            "cooperative matrices of 16x16, E4M3 or I8",
            "the driver lists none, or the device was opened without".into(),
        )),
    }
}

fn features(unit: Unit) -> wgpu::Features {
    match unit {
        Unit::Bytes => {
            wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::PASSTHROUGH_SHADERS
        }
        Unit::Matrix => {
            wgpu::Features::SHADER_F16 | wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX
        }
        _ => wgpu::Features::empty(),
    }
}

fn workgroup(unit: Unit) -> u32 {
    if unit.is_matrix() { MATRIX_WORKGROUP } else { WORKGROUP }
}

// ---- What comes out ------------------------------------------------------------------------------------------------

/// The words of x, as random as small integers are.
fn inputs(unit: Unit, byte: Option<Byte>, count: usize) -> Vec<u32> {
    let mut state = 0x9e37_79b9u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    let words = (0..count).map(|i| {
        let random = next();
        match unit {
            Unit::Fma if i < 256 => if random >> 31 == 0 { 1f32 } else { -1.0 }.to_bits(),
            Unit::Fma => ((random >> 24) as f32 - 128.0).to_bits(),
            Unit::Dot => random,
            Unit::Matrix => (((random >> 16) % 5) as f32 - 2.0).to_bits(),
            // Zeros and ones, of which the last keeps the word from being a subnormal f32.
            Unit::Bytes => (0x0100_0000 | random & 0x0001_0101) * one(byte),
        }
    });
    words.collect()
}

/// One, as a byte.
fn one(byte: Option<Byte>) -> u32 {
    match byte {
        Some(Byte::E4m3) => 0x38,
        _ => 1,
    }
}

/// The elements of fragments.
fn values(inputs: &[u32], byte: Option<Byte>) -> Vec<f64> {
    match byte {
        None => inputs.iter().map(|bits| f64::from(f32::from_bits(*bits))).collect(),
        Some(_) => {
            let bytes = inputs.iter().flat_map(|word| word.to_le_bytes());
            bytes.map(|value| f64::from(u8::from(value != 0))).collect()
        }
    }
}

/// What an invocation of [`Unit::Fma`] or [`Unit::Dot`] writes.
fn expected(unit: Unit, inputs: &[u32], lane: usize) -> u32 {
    let steps = ITERATIONS * UNROLL;
    if unit == Unit::Fma {
        let mut sum = 0f32;
        for i in 0..CHAINS {
            let at = (lane + i) % 256;
            let (a, b) = (f32::from_bits(inputs[at]), f32::from_bits(inputs[256 + at]));
            sum += (0..steps).fold(SEED as f32, |c, _| c * a + b);
        }
        return sum.to_bits();
    }
    (0..CHAINS).fold(0u32, |sum, i| {
        let b = inputs[(lane + i) % 256].to_le_bytes();
        let chain = (0..steps).fold(SEED as i32 + i as i32, |c, _| {
            let products = c.to_le_bytes().into_iter().zip(b);
            products.fold(c, |c, (x, y)| c.wrapping_add(i32::from(x as i8) * i32::from(y as i8)))
        });
        sum.wrapping_add(chain as u32)
    })
}

/// The sum of all fragments of a subgroup: of A · Bᵀ the sum over k of the sums of A's and of B's columns.
fn matrix_sum(values: &[f64], [side, _, long]: [u32; 3]) -> f64 {
    let (side, long) = (side as usize, long as usize);
    let column = |which: usize, k: usize| -> f64 {
        (0..4 * side).map(|row| values[(which * 4 * side + row) * long + k]).sum()
    };
    let sum: f64 = (0..long).map(|k| column(0, k) * column(1, k)).sum();
    sum * f64::from(MATRIX_ITERATIONS)
}

// ---- The CPU -------------------------------------------------------------------------------------------------------

/// Pieces of work a thread, so that none waits for the last.
const CPU_TASKS: usize = 8;
/// Chains of vectors that fit registers beside their operands.
const CPU_CHAINS: usize = 8;
/// Lanes of a chain: the f32s, or 16-bit sums of two products, of 32 bytes.
type Floats = [f32; 8];
type Shorts = [i16; 16];

/// A run: every group's words of y from the same loop, repeated until the operations are those of a workgroup.
fn run_cpu(unit: Unit, inputs: &[u32], y: &mut [u32]) {
    let task = |y: &mut [u32]| {
        let sums: &[u32] = match unit {
            Unit::Fma => &cpu_fma(inputs),
            _ => &cpu_dot(inputs),
        };
        for (i, word) in y.iter_mut().enumerate() {
            *word = sums[i % sums.len()];
        }
    };
    #[cfg(not(target_arch = "wasm32"))]
    {
        use rayon::prelude::*;
        y.par_chunks_mut(WORKGROUP as usize).for_each(task);
    }
    #[cfg(target_arch = "wasm32")]
    y.chunks_mut(WORKGROUP as usize).for_each(task);
}

/// Steps of each chain such that a task does what a workgroup does: 32 bytes hold `each` operations a step.
fn cpu_steps(unit: Unit) -> u32 {
    let operations = WORKGROUP as usize * CHAINS * (ITERATIONS * UNROLL) as usize;
    match unit {
        Unit::Fma => (operations * 2 / (CPU_CHAINS * 16)) as u32,
        _ => (operations * 8 / (CPU_CHAINS * 64)) as u32,
    }
}

/// Chains start differently, or a compiler would see that they are one.
fn cpu_first(chain: usize) -> f32 {
    (SEED as usize + chain) as f32
}

fn cpu_fma(inputs: &[u32]) -> [u32; 8] {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
        // SAFETY: the features were detected.
        return unsafe { cpu_fma_avx2(inputs) };
    }
    cpu_fma_by(inputs, |c, a, b| c * a + b)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn cpu_fma_avx2(inputs: &[u32]) -> [u32; 8] {
    cpu_fma_by(inputs, f32::mul_add)
}

#[inline(always)]
fn cpu_fma_by(inputs: &[u32], step: impl Fn(f32, f32, f32) -> f32) -> [u32; 8] {
    let mut c: [Floats; CPU_CHAINS] = std::array::from_fn(|chain| [cpu_first(chain); 8]);
    let a: Floats = std::array::from_fn(|lane| f32::from_bits(inputs[lane]));
    let b: Floats = std::array::from_fn(|lane| f32::from_bits(inputs[256 + lane]));
    for _ in 0..cpu_steps(Unit::Fma) {
        for chain in &mut c {
            for lane in 0..8 {
                chain[lane] = step(chain[lane], a[lane], b[lane]);
            }
        }
    }
    std::array::from_fn(|lane| c.iter().map(|chain| chain[lane]).sum::<f32>().to_bits())
}

fn cpu_dot(inputs: &[u32]) -> [u32; 16] {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the feature was detected.
        return unsafe { cpu_dot_avx2(inputs) };
    }
    let b = cpu_bytes(inputs);
    let mut c = cpu_start();
    for _ in 0..cpu_steps(Unit::Dot) {
        for chain in &mut c {
            for lane in 0..16 {
                chain[lane] = dot_step(chain[lane], b[lane]);
            }
        }
    }
    cpu_sums(&c)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn cpu_dot_avx2(inputs: &[u32]) -> [u32; 16] {
    use std::arch::x86_64::{__m256i, _mm256_add_epi16, _mm256_maddubs_epi16};
    let vector = |lanes: Shorts| bytemuck::cast::<Shorts, __m256i>(lanes);
    let b = vector(cpu_bytes(inputs));
    let mut c = cpu_start().map(vector);
    for _ in 0..cpu_steps(Unit::Dot) {
        for chain in &mut c {
            *chain = _mm256_add_epi16(_mm256_maddubs_epi16(*chain, b), *chain);
        }
    }
    cpu_sums(&c.map(bytemuck::cast::<__m256i, Shorts>))
}

/// One lane of AVX2's product: unsigned bytes of c times signed bytes of b, two of them added with saturation.
#[inline(always)]
fn dot_step(c: i16, b: i16) -> i16 {
    let ([c0, c1], [b0, b1]) = (c.to_le_bytes(), b.to_le_bytes());
    let product = |c: u8, b: u8| i32::from(c) * i32::from(b as i8);
    let sum = product(c0, b0) + product(c1, b1);
    (sum.clamp(i16::MIN.into(), i16::MAX.into()) as i16).wrapping_add(c)
}

fn cpu_bytes(inputs: &[u32]) -> Shorts {
    std::array::from_fn(|lane| inputs[lane] as i16)
}

fn cpu_start() -> [Shorts; CPU_CHAINS] {
    std::array::from_fn(|chain| [SEED as i16 + chain as i16; 16])
}

fn cpu_sums(c: &[Shorts; CPU_CHAINS]) -> [u32; 16] {
    std::array::from_fn(|lane| {
        let sum = c.iter().fold(0i16, |sum, chain| sum.wrapping_add(chain[lane]));
        u32::from(sum as u16)
    })
}

/// A task's words, by the plainest loop.
fn cpu_expected(unit: Unit, inputs: &[u32]) -> Vec<u32> {
    let steps = cpu_steps(unit);
    if unit == Unit::Fma {
        let lanes = (0..8).map(|lane| {
            let (a, b) = (f32::from_bits(inputs[lane]), f32::from_bits(inputs[256 + lane]));
            let chain = |i| (0..steps).fold(cpu_first(i), |c, _| c * a + b);
            (0..CPU_CHAINS).map(chain).sum::<f32>().to_bits()
        });
        return lanes.collect();
    }
    let b = cpu_bytes(inputs);
    let lanes = (0..16).map(|lane| {
        let sum = cpu_start().iter().fold(0i16, |sum, chain| {
            sum.wrapping_add((0..steps).fold(chain[lane], |c, _| dot_step(c, b[lane])))
        });
        u32::from(sum as u16)
    });
    lanes.collect()
}

// ---- The shaders ---------------------------------------------------------------------------------------------------

fn name(unit: Unit, byte: Option<Byte>, [side, _, k]: [u32; 3]) -> String {
    match unit {
        Unit::Fma => "peak.fma".into(),
        Unit::Dot => "peak.dot".into(),
        Unit::Matrix => format!("peak.matrix{side}"),
        Unit::Bytes => {
            let byte = byte.map_or(String::new(), |byte| byte.to_string().to_lowercase());
            format!("peak.bytes.{byte}k{k}")
        }
    }
}

fn kernel(unit: Unit, byte: Option<Byte>, fragment @ [side, _, k]: [u32; 3]) -> Kernel {
    let mut source = Source::new();
    if unit.is_matrix() {
        // naga says a matrix loaded from f32 memory is of f32; src/engine/spirv.rs says otherwise.
        let loaded = if unit == Unit::Matrix { "f16" } else { "f32" };
        if unit == Unit::Matrix {
            source = source.line("enable f16;");
        }
        source = source.line("enable wgpu_cooperative_matrix;");
        if let Some(byte) = byte {
            source = source.line(&format!("{}{k}", byte.fragments()));
        }
        source = source.line(&format!("alias Loaded = {loaded};")).line("const ONE = 1.0f;");
        for (name, scalar) in [("A", loaded), ("B", loaded), ("C", "f32")] {
            let line = format!("alias Mat{name} = coop_mat{side}x{side}<{scalar}, {name}>;");
            source = source.line(&line);
        }
        let line = if unit == Unit::Matrix { k } else { k / 4 };
        source = source.constant("SIDE", side).constant("LINE", line);
    }
    let iterations = if unit.is_matrix() { MATRIX_ITERATIONS } else { ITERATIONS };
    Kernel {
        name: name(unit, byte, fragment),
        wgsl: source
            .constant("WG", workgroup(unit))
            .constant("ITERATIONS", iterations)
            .fragment(match unit {
                Unit::Fma => shader!("peak_fma.wgsl"),
                Unit::Dot => shader!("peak_dot.wgsl"),
                Unit::Matrix | Unit::Bytes => shader!("peak_matrix.wgsl"),
            })
            .build(),
        bindings: vec![Binding::Params, Binding::Read, Binding::Write],
        workgroup_size: workgroup(unit),
        features: features(unit),
        spirv: unit == Unit::Bytes,
    }
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    let mut list: Vec<_> =
        [Unit::Fma, Unit::Dot].map(|unit| kernel(unit, None, [0; 3])).into_iter().collect();
    list.extend([16, 8].map(|side| kernel(Unit::Matrix, None, [side; 3])));
    for byte in Byte::ALL {
        list.extend([32, 16].map(|k| kernel(Unit::Bytes, Some(byte), [16, 16, k])));
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_engine_does_the_work_and_a_wrong_result_is_seen() {
        let ctx = Context::cpu();
        for unit in [Unit::Fma, Unit::Dot] {
            let mut peak = Peak::new(&ctx, unit).unwrap();
            let mut stream = ctx.stream();
            peak.record(&mut stream).unwrap();
            ctx.submit(stream).unwrap();
            pollster::block_on(peak.check(&ctx)).unwrap();
            let last = peak.y.data.cpu_mut().last_mut().unwrap();
            *last ^= 1;
            assert!(pollster::block_on(peak.check(&ctx)).is_err(), "{unit:?}");
        }
        for unit in [Unit::Matrix, Unit::Bytes] {
            assert!(matches!(Peak::new(&ctx, unit), Err(Error::Unsupported { .. })));
        }
    }
}
