//! AdamW (Loshchilov and Hutter, arXiv 1711.05101; PyTorch's formula), one dispatch a parameter.
//!
//! ```text
//! g  = factor · grad
//! m += (1 − β1) (g − m)
//! v  = β2 v + (1 − β2) g²
//! w −= lr / (1 − β1^step) · m / (√v / √(1 − β2^step) + ε) + lr · weight_decay · w
//! ```
//!
//! The factor is [`crate::kernels::GradientNorm`]'s and is read on the device. Where that says that a gradient is not
//! finite, nothing is changed.
//!
//! The weight is f32 or bf16, the moments f32, bf16 or eight bits (see `adamw/fp8.rs`); computed with is f32, and the update sees
//! the moments before they are rounded. What is stored in fewer bits is rounded stochastically, or updates below half a
//! unit of a bf16 weight would be lost. The random bits are those of [`crate::rng`] for the parameter as one row:
//!
//! ```text
//! stream = step · 2³² + 4 · index + 0 for w, 1 for m, 2 for v
//! ```
//!
//! **Bounded** against exact arithmetic on the f32 path (division and square root are the device's), **statistical** where
//! rounding is stochastic; the same bits every time on one engine. The packed weight of [`AdamW::record_quantized`] is
//! **exact**: [`Quantize`]'s bytes of the weight that was stored.
//!
//! Shaders: `shaders/adamw.wgsl`, `shaders/adamw_square.wgsl`.

mod fp8;

use crate::engine::buffer::{DType, DeviceMxTensor, Rows, Tensor};
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::engine::{Context, Stream};
use crate::formats::{Axis, Block, Element, MxSpec, Rounding, ScaleFormat};
use crate::rng::{self, RoundingBits};
use crate::{Error, Result};

use super::{
    NVIDIA, Quantize, QuantizeDesc, UNIT, WORKGROUP, all_specs, anchors, codec, format_constants,
    format_name, type_constants,
};

use fp8::BLOCK;

const OPERATION: &str = "AdamW::record";

/// How the moments are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Moments {
    /// f32: eight bytes an element for both.
    #[default]
    F32,
    /// bf16, rounded stochastically: four bytes.
    BF16,
    /// m in E4M3, √v in an unsigned E4M4, under a power of two for 128 elements: two bytes and a 32nd. For β2 up to 0.99;
    /// see the source's `adamw/fp8.rs` for the noise beyond.
    FP8,
}

impl Moments {
    /// All three.
    pub const ALL: [Moments; 3] = [Moments::F32, Moments::BF16, Moments::FP8];

    /// `f32`, `bf16` or `fp8`.
    pub const fn name(self) -> &'static str {
        match self {
            Moments::F32 => "f32",
            Moments::BF16 => "bf16",
            Moments::FP8 => "fp8",
        }
    }
}

/// What [`AdamW`] does with one parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWDesc {
    /// Rows of the parameter.
    pub rows: usize,
    /// Columns, a multiple of 4.
    pub cols: usize,
    /// The weight's type: F32, or BF16 with stochastic rounding.
    pub master: DType,
    /// How the moments are stored.
    pub moments: Moments,
    /// The decay of m, in [0, 1).
    pub beta1: f32,
    /// The decay of v, in [0, 1).
    pub beta2: f32,
    /// Added to √v; positive.
    pub eps: f32,
    /// The parameter's number, below 2³⁰: parameters with different ones draw different random bits.
    pub index: u32,
}

impl AdamWDesc {
    /// Everything in f32, β = (0.9, 0.95), ε = 10⁻⁸.
    pub fn new(rows: usize, cols: usize) -> AdamWDesc {
        AdamWDesc {
            rows,
            cols,
            master: DType::F32,
            moments: Moments::F32,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            index: 0,
        }
    }

    /// Checks the sizes and numbers.
    pub fn validate(&self) -> Result<()> {
        let mismatch = |problem| Err(Error::Mismatch { operation: "AdamWDesc", problem });
        let AdamWDesc { rows, cols, master, beta1, beta2, eps, index, .. } = *self;
        if !cols.is_multiple_of(4) {
            return mismatch(format!("[{rows}, {cols}]: columns must be a multiple of 4"));
        }
        if rows as u128 * cols as u128 > 1 << 34 {
            return mismatch(format!("[{rows}, {cols}] has more than 2^34 elements"));
        }
        if master == DType::F16 {
            return mismatch("the weight is f16, expected f32 or bf16".into());
        }
        let unit = 0.0..1.0;
        if !(unit.contains(&beta1) && unit.contains(&beta2) && eps.is_normal() && eps > 0.0) {
            return mismatch(format!(
                "beta1 {beta1}, beta2 {beta2}, eps {eps}: expected [0, 1), [0, 1) and positive"
            ));
        }
        if index >= 1 << 30 {
            return mismatch(format!("index {index}, expected below 2^30"));
        }
        Ok(())
    }

    /// Bytes an element of the weight and its moments: what training holds for it besides the gradient.
    pub fn bytes_per_parameter(&self) -> f64 {
        let elements = self.rows * self.cols;
        if elements == 0 {
            return 0.0;
        }
        let state: usize = self.parts().iter().map(|part| part.shape[0] * part.row_bytes()).sum();
        (self.master.size() * elements + state) as f64 / elements as f64
    }

    fn elements(&self) -> usize {
        self.rows * self.cols
    }

    /// What the state consists of: two tensors, each one binding.
    fn parts(&self) -> [StateTensor; 2] {
        let shape = [self.rows, self.cols];
        let dense = |name, dtype| StateTensor { name, dtype, shape };
        match self.moments {
            Moments::F32 => ["m", "v"].map(|name| dense(name, "F32")),
            Moments::BF16 => ["m", "v"].map(|name| dense(name, "BF16")),
            Moments::FP8 => [
                StateTensor {
                    name: "codes",
                    dtype: "U8",
                    shape: [self.elements().div_ceil(8), 16],
                },
                StateTensor {
                    name: "scales",
                    dtype: "U8",
                    shape: [self.elements().div_ceil(BLOCK), 4],
                },
            ],
        }
    }
}

/// The numbers of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepScalars {
    /// Which step this is, from 1: for the bias correction and the random bits.
    pub step: u32,
    /// The learning rate.
    pub lr: f32,
    /// Decoupled weight decay; multiplied by the learning rate, as in PyTorch.
    pub weight_decay: f32,
    /// The seed of the run, for stochastic rounding.
    pub seed: u64,
}

/// One tensor of an [`AdamWState`], as a checkpoint names it. The types are safetensors'.
///
/// F32 and BF16 moments are `m` and `v`. FP8 has `codes`, for every eight elements eight codes of m and eight of √v, and
/// `scales`, for every 128 elements m's, √v's, and two zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateTensor {
    /// Its name.
    pub name: &'static str,
    /// `F32`, `BF16` or `U8`.
    pub dtype: &'static str,
    /// Rows and columns.
    pub shape: [usize; 2],
}

impl StateTensor {
    fn row_bytes(&self) -> usize {
        let size = match self.dtype {
            "F32" => 4,
            "BF16" => 2,
            _ => 1,
        };
        self.shape[1] * size
    }

    /// Bytes of the whole.
    pub fn bytes(&self) -> usize {
        self.shape[0] * self.row_bytes()
    }
}

/// The moments of one parameter, zero at first.
#[derive(Debug)]
pub struct AdamWState {
    rows: usize,
    cols: usize,
    moments: Moments,
    parts: [(StateTensor, Rows); 2],
}

impl AdamWState {
    /// Allocates the moments.
    pub fn new(ctx: &Context, desc: &AdamWDesc) -> Result<AdamWState> {
        desc.validate()?;
        let make = |part: StateTensor| -> Result<(StateTensor, Rows)> {
            ctx.chunk_rows("the moments of a parameter", 1, part.bytes())?;
            Ok((part, Rows::new(ctx, "mx.moments", 1, part.bytes(), 1)?))
        };
        let [a, b] = desc.parts();
        let parts = [make(a)?, make(b)?];
        Ok(AdamWState { rows: desc.rows, cols: desc.cols, moments: desc.moments, parts })
    }

    /// What it consists of.
    pub fn tensors(&self) -> [StateTensor; 2] {
        [self.parts[0].0, self.parts[1].0]
    }

    /// Bytes of all.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|(_, rows)| rows.bytes()).sum()
    }

    /// Reads the tensor of this name; waits as [`Context::read`].
    pub async fn read(&self, ctx: &Context, name: &str) -> Result<Vec<u8>> {
        self.parts[self.find(name)?].1.read(ctx).await
    }

    /// [`AdamWState::read`], blocking.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn read_blocking(&self, ctx: &Context, name: &str) -> Result<Vec<u8>> {
        pollster::block_on(self.read(ctx, name))
    }

    /// Writes what [`AdamWState::read`] gave.
    pub fn write(&mut self, ctx: &Context, name: &str, data: &[u8]) -> Result<()> {
        let (tensor, rows) = &mut self.parts[self.find(name)?];
        if data.len() != rows.bytes() {
            return Err(Error::Mismatch {
                operation: "AdamWState::write",
                problem: format!(
                    "{} bytes, but {name} {:?} of {} has {}",
                    data.len(),
                    tensor.shape,
                    tensor.dtype,
                    rows.bytes()
                ),
            });
        }
        rows.write(ctx, data)
    }

    fn find(&self, name: &str) -> Result<usize> {
        self.parts.iter().position(|(tensor, _)| tensor.name == name).ok_or_else(|| {
            let names = self.tensors().map(|tensor| tensor.name);
            Error::Mismatch {
                operation: "AdamWState",
                problem: format!(
                    "no tensor {name:?}; {} moments have {names:?}",
                    self.moments.name()
                ),
            }
        })
    }
}

/// The kernel that updates one parameter.
#[derive(Clone, Debug)]
pub struct AdamW {
    desc: AdamWDesc,
}

impl AdamW {
    /// Checks the descriptor.
    pub fn new(_ctx: &Context, desc: &AdamWDesc) -> Result<AdamW> {
        desc.validate()?;
        Ok(AdamW { desc: *desc })
    }

    /// What it does.
    pub fn desc(&self) -> &AdamWDesc {
        &self.desc
    }

    /// Records one step. `grad` is f32; `norm` is [`crate::kernels::GradientNorm`]'s, or `[_, factor, 1, _]`.
    pub fn record(
        &self,
        stream: &mut Stream<'_>,
        scalars: &StepScalars,
        grad: &Tensor,
        norm: &Tensor,
        w: &mut Tensor,
        state: &mut AdamWState,
    ) -> Result<()> {
        self.check(stream, scalars, grad, norm, w, state)?;
        if self.desc.elements() == 0 {
            return Ok(());
        }
        let step = Step::new(&self.desc, scalars);
        let Some(gpu) = stream.gpu() else {
            step.twin(&self.desc, grad, norm, w, state);
            return Ok(());
        };
        let variant = Variant::new(&self.desc, gpu.caps.vendor == NVIDIA, None);
        let groups = self.desc.elements().div_ceil(8) as u64;
        stream.dispatch(
            &variant.name(),
            || variant.kernel(),
            &step.params(&self.desc, 0),
            &bindings(grad, norm, w, state)?,
            groups.div_ceil(u64::from(WORKGROUP)),
        )
    }

    /// Records one step, and the quantization of the new weight by `quantize` into `packed`. In one dispatch where blocks
    /// are square, scales E8M0, rounding is to nearest and columns are a multiple of 128; otherwise in two.
    #[allow(clippy::too_many_arguments)]
    pub fn record_quantized(
        &self,
        stream: &mut Stream<'_>,
        scalars: &StepScalars,
        grad: &Tensor,
        norm: &Tensor,
        w: &mut Tensor,
        state: &mut AdamWState,
        quantize: &QuantizeDesc,
        packed: &mut DeviceMxTensor,
    ) -> Result<()> {
        let then = Quantize::new(stream.context(), quantize)?;
        let AdamWDesc { rows, cols, .. } = self.desc;
        let spec = quantize.spec;
        let (layout, codes, scales) =
            (packed.layout, packed.codes.chunks().count(), packed.scales.chunks().count());
        // On the CPU engine there are no chunks.
        let fuses = fusible(spec)
            && (quantize.axis, quantize.rounding) == (Axis::One, Rounding::NearestEven)
            && (layout.spec, layout.axis, layout.rows, layout.cols)
                == (spec, Axis::One, rows, cols)
            && cols.is_multiple_of(TILE_COLS)
            && (codes, scales) == (1, 1);
        let vendor = stream.gpu().filter(|_| fuses).map(|gpu| gpu.caps.vendor);
        let (Some(vendor), Some(state_chunk)) = (vendor, packed.state.chunks().next()) else {
            self.record(stream, scalars, grad, norm, w, state)?;
            return then.record(stream, w, packed);
        };
        self.check(stream, scalars, grad, norm, w, state)?;
        stream.context().check_same(&w.data, &packed.codes)?;
        stream.clear(state_chunk.buffer);
        let variant = Variant::new(&self.desc, vendor == NVIDIA, Some(spec));
        let mut buffers = bindings(grad, norm, w, state)?;
        buffers.extend(packed.codes.chunks().map(|chunk| chunk.buffer));
        buffers.extend(packed.scales.chunks().map(|chunk| chunk.buffer));
        buffers.push(state_chunk.buffer);
        stream.dispatch(
            &variant.name(),
            || variant.kernel(),
            &Step::new(&self.desc, scalars).params(&self.desc, quantize.carry()),
            &buffers,
            (rows.div_ceil(TILE_ROWS) * (cols / TILE_COLS)) as u64,
        )
    }

    fn check(
        &self,
        stream: &Stream<'_>,
        scalars: &StepScalars,
        grad: &Tensor,
        norm: &Tensor,
        w: &Tensor,
        state: &AdamWState,
    ) -> Result<()> {
        let AdamWDesc { rows, cols, master, moments, .. } = self.desc;
        let mismatch = |problem| Err(Error::Mismatch { operation: OPERATION, problem });
        w.expect(OPERATION, "the weight", [rows, cols], &[master])?;
        grad.expect(OPERATION, "the gradient", [rows, cols], &[DType::F32])?;
        norm.expect(OPERATION, "the norm", [1, 4], &[DType::F32])?;
        if (state.rows, state.cols, state.moments) != (rows, cols, moments) {
            return mismatch(format!(
                "the state is {} [{}, {}], expected {} [{rows}, {cols}]",
                state.moments.name(),
                state.rows,
                state.cols,
                moments.name()
            ));
        }
        let StepScalars { step, lr, weight_decay, .. } = *scalars;
        if step == 0 || !lr.is_finite() || !weight_decay.is_finite() {
            return mismatch(format!(
                "step {step}, lr {lr}, weight_decay {weight_decay}: steps count from 1, the others are finite"
            ));
        }
        let ctx = stream.context();
        ctx.check_same(&w.data, &grad.data)?;
        ctx.check_same(&w.data, &norm.data)?;
        ctx.check_same(&state.parts[0].1, &state.parts[1].1)
    }
}

fn bindings<'a>(
    grad: &'a Tensor,
    norm: &'a Tensor,
    w: &'a Tensor,
    state: &'a AdamWState,
) -> Result<Vec<&'a wgpu::Buffer>> {
    let mut buffers = vec![grad.binding()?, norm.binding()?, w.binding()?];
    buffers
        .extend(state.parts.iter().flat_map(|(_, rows)| rows.chunks()).map(|chunk| chunk.buffer));
    Ok(buffers)
}

/// A step's numbers, as the shader has them.
#[derive(Clone, Copy, Debug)]
struct Step {
    seed: u64,
    stream: u64,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    root: f32,
    epsilon: f32,
    rate: f32,
    decay: f32,
}

impl Step {
    /// Everything that a step shares is computed in f64 and rounded once.
    fn new(desc: &AdamWDesc, scalars: &StepScalars) -> Step {
        let (beta1, beta2) = (f64::from(desc.beta1), f64::from(desc.beta2));
        let (lr, step) = (f64::from(scalars.lr), f64::from(scalars.step));
        Step {
            seed: scalars.seed,
            stream: u64::from(scalars.step) << 32 | u64::from(4 * desc.index),
            rest1: (1.0 - beta1) as f32,
            beta2: desc.beta2,
            rest2: (1.0 - beta2) as f32,
            root: (1.0 / (1.0 - beta2.powf(step)).sqrt()) as f32,
            epsilon: desc.eps,
            rate: (lr / (1.0 - beta1.powf(step))) as f32,
            decay: (lr * f64::from(scalars.weight_decay)) as f32,
        }
    }

    fn params(&self, desc: &AdamWDesc, carry: u32) -> [u32; 16] {
        let key = rng::key(Rounding::Stochastic { seed: self.seed, stream: self.stream });
        [
            (desc.elements() / 4) as u32,
            1,
            desc.rows as u32,
            desc.cols as u32,
            key[0],
            key[1],
            key[2],
            key[3],
            self.rest1.to_bits(),
            self.beta2.to_bits(),
            self.rest2.to_bits(),
            self.root.to_bits(),
            self.epsilon.to_bits(),
            self.rate.to_bits(),
            self.decay.to_bits(),
            carry,
        ]
    }
}

// ---- The twin ------------------------------------------------------------------------------------------------------

/// Blocks of 128 elements that are a piece of work.
const PIECE: usize = 64;

impl Step {
    fn twin(
        &self,
        desc: &AdamWDesc,
        grad: &Tensor,
        norm: &Tensor,
        w: &mut Tensor,
        state: &mut AdamWState,
    ) {
        let norm = norm.widened();
        if norm[2] == 0.0 {
            return;
        }
        let factor = norm[1];
        let bits = [0, 1, 2].map(|what| {
            let rounding = Rounding::Stochastic { seed: self.seed, stream: self.stream + what };
            RoundingBits::new(rounding, desc.elements())
        });
        let [Some(w_bits), Some(m_bits), Some(v_bits)] = bits else { return };
        let (master, moments) = (desc.master, desc.moments);
        let twin = Twin { step: *self, factor, master, moments, w_bits, m_bits, v_bits };
        // Bytes of a block: of the weight, of the state's two tensors.
        let w_size = BLOCK * master.size();
        let [a_size, b_size] = match moments {
            Moments::F32 => [4 * BLOCK; 2],
            Moments::BF16 => [2 * BLOCK; 2],
            Moments::FP8 => [2 * BLOCK, 4],
        };
        let piece = |i: usize, w: &mut [u8], g: &[f32], a: &mut [u8], b: &mut [u8]| {
            let weights = w.chunks_mut(w_size).zip(g.chunks(BLOCK));
            let states = a.chunks_mut(a_size).zip(b.chunks_mut(b_size));
            for (j, ((w, g), (a, b))) in weights.zip(states).enumerate() {
                twin.block(i * PIECE + j, w, g, a, b);
            }
        };
        let grad = grad.widened();
        let w = bytes_mut(&mut w.data);
        let [(_, a), (_, b)] = &mut state.parts;
        let (a, b) = (bytes_mut(a), bytes_mut(b));
        #[cfg(not(target_arch = "wasm32"))]
        {
            use rayon::prelude::*;
            w.par_chunks_mut(PIECE * w_size)
                .zip(grad.par_chunks(PIECE * BLOCK))
                .zip(a.par_chunks_mut(PIECE * a_size).zip(b.par_chunks_mut(PIECE * b_size)))
                .enumerate()
                .for_each(|(i, ((w, g), (a, b)))| piece(i, w, g, a, b));
        }
        #[cfg(target_arch = "wasm32")]
        w.chunks_mut(PIECE * w_size)
            .zip(grad.chunks(PIECE * BLOCK))
            .zip(a.chunks_mut(PIECE * a_size).zip(b.chunks_mut(PIECE * b_size)))
            .enumerate()
            .for_each(|(i, ((w, g), (a, b)))| piece(i, w, g, a, b));
    }

    #[inline(always)]
    fn element(&self, g: f32, w: &mut f32, m: &mut f32, v: &mut f32) {
        *m += self.rest1 * (g - *m);
        *v = self.beta2 * *v + self.rest2 * (g * g);
        *w -= self.rate * (*m / (v.sqrt() * self.root + self.epsilon)) + self.decay * *w;
    }
}

fn bytes_mut(rows: &mut Rows) -> &mut [u8] {
    let bytes = rows.bytes();
    &mut bytemuck::cast_slice_mut(rows.cpu_mut())[..bytes]
}

struct Twin {
    step: Step,
    factor: f32,
    master: DType,
    moments: Moments,
    w_bits: RoundingBits,
    m_bits: RoundingBits,
    v_bits: RoundingBits,
}

impl Twin {
    /// Up to 128 elements: the bytes of the weight, the gradient, the bytes of the state's two tensors.
    fn block(&self, block: usize, w: &mut [u8], g: &[f32], a: &mut [u8], b: &mut [u8]) {
        let halves = |bits: &RoundingBits| {
            let mut out = [0; BLOCK];
            let groups = out.chunks_exact_mut(8).take(g.len().div_ceil(8));
            for (i, out) in groups.enumerate() {
                out.copy_from_slice(&bits.group(0, block * (BLOCK / 8) + i));
            }
            out
        };
        let [mut x, mut m, mut v] = [[0f32; BLOCK]; 3];
        load(w, self.master, &mut x);
        match self.moments {
            Moments::FP8 => load_fp8(a, b, &mut m, &mut v),
            dense => {
                load(a, dense.dtype(), &mut m);
                load(b, dense.dtype(), &mut v);
            }
        }
        for (((g, x), m), v) in g.iter().zip(&mut x).zip(&mut m).zip(&mut v) {
            self.step.element(self.factor * g, x, m, v);
        }
        store(&x, self.master, || halves(&self.w_bits), w);
        match self.moments {
            Moments::FP8 => store_fp8(&m, &v, &halves(&self.m_bits), &halves(&self.v_bits), a, b),
            dense => {
                store(&m, dense.dtype(), || halves(&self.m_bits), a);
                store(&v, dense.dtype(), || halves(&self.v_bits), b);
            }
        }
    }
}

impl Moments {
    /// The type of dense moments.
    fn dtype(self) -> DType {
        if self == Moments::BF16 { DType::BF16 } else { DType::F32 }
    }
}

/// Up to 128 elements as f32.
fn load(bytes: &[u8], dtype: DType, out: &mut [f32; BLOCK]) {
    if dtype == DType::F32 {
        let values: &[f32] = bytemuck::cast_slice(bytes);
        out[..values.len()].copy_from_slice(values);
        return;
    }
    for (out, half) in out.iter_mut().zip(bytemuck::cast_slice::<u8, u16>(bytes)) {
        *out = f32::from_bits(u32::from(*half) << 16);
    }
}

/// The inverse; to bf16 with random halves.
fn store(
    values: &[f32; BLOCK],
    dtype: DType,
    halves: impl FnOnce() -> [u16; BLOCK],
    bytes: &mut [u8],
) {
    if dtype == DType::F32 {
        let out: &mut [f32] = bytemuck::cast_slice_mut(bytes);
        out.copy_from_slice(&values[..out.len()]);
        return;
    }
    let out = bytemuck::cast_slice_mut::<u8, u16>(bytes).iter_mut();
    for ((out, value), r) in out.zip(values).zip(halves()) {
        // Up when what bf16 lacks, plus the random half, carries: the probability is exactly the fraction.
        *out = match value.is_finite() {
            true => ((value.to_bits() + u32::from(r)) >> 16) as u16,
            false => dtype.narrow(value.to_bits()) as u16,
        };
    }
}

fn load_fp8(codes: &[u8], scales: &[u8], m: &mut [f32; BLOCK], v: &mut [f32; BLOCK]) {
    let out = m.chunks_exact_mut(8).zip(v.chunks_exact_mut(8));
    for (codes, (m, v)) in codes.chunks_exact(16).zip(out) {
        for i in 0..8 {
            m[i] = fp8::m_decode(codes[i], scales[0]);
            v[i] = fp8::v_decode(codes[8 + i], scales[1]);
        }
    }
}

fn store_fp8(
    m: &[f32; BLOCK],
    v: &[f32; BLOCK],
    m_halves: &[u16; BLOCK],
    v_halves: &[u16; BLOCK],
    codes: &mut [u8],
    scales: &mut [u8],
) {
    let amax = |x: &[f32]| x.iter().fold(0, |amax, x| amax.max(x.to_bits() & 0x7fff_ffff));
    let (m_scale, v_scale) = (fp8::m_scale(amax(m)), fp8::v_scale(amax(v)));
    scales.copy_from_slice(&[m_scale, v_scale, 0, 0]);
    for (group, codes) in codes.chunks_exact_mut(16).enumerate() {
        for i in 0..8 {
            let at = 8 * group + i;
            codes[i] = fp8::m_encode(m[at], m_scale, m_halves[at]);
            codes[8 + i] = fp8::v_encode(v[at], v_scale, v_halves[at]);
        }
    }
}

// ---- The shaders ---------------------------------------------------------------------------------------------------

/// The tile of `adamw_square.wgsl`: columns are a block of the moments, rows the largest square.
const TILE_ROWS: usize = 32;
const TILE_COLS: usize = BLOCK;

/// Whether `adamw_square.wgsl` packs this format.
fn fusible(spec: MxSpec) -> bool {
    spec.scale == ScaleFormat::E8M0 && matches!(spec.block, Block::Square(_))
}

#[derive(Clone, Copy, Debug)]
struct Variant {
    master: DType,
    moments: Moments,
    /// Adds by multiply-add in the random numbers, see `lib/add_mad.wgsl`.
    mad: bool,
    packed: Option<MxSpec>,
}

impl Variant {
    fn new(desc: &AdamWDesc, nvidia: bool, packed: Option<MxSpec>) -> Variant {
        let AdamWDesc { master, moments, .. } = *desc;
        let stochastic = master != DType::F32 || moments != Moments::F32;
        Variant { master, moments, mad: nvidia && stochastic, packed }
    }

    fn name(&self) -> String {
        let mad = if self.mad { ".mad" } else { "" };
        let packed = self.packed.map_or(String::new(), |spec| format!(".{}", format_name(spec)));
        format!("adamw.{}.{}{mad}{packed}", self.master, self.moments.name())
    }

    fn kernel(&self) -> Kernel {
        let source = match self.packed {
            Some(spec) => type_constants(format_constants(spec), "X_TYPE", DType::F32)
                .constant("TILE_ROWS", TILE_ROWS as u32)
                .constant("TILE_COLS", TILE_COLS as u32),
            None => Source::new(),
        };
        // An invocation has eight elements, or a unit of a line.
        let lanes = BLOCK as u32 / if self.packed.is_some() { UNIT } else { 8 };
        let source = source
            .constant("WG", WORKGROUP)
            .constant("LANES", lanes)
            .constant("SLOTS", WORKGROUP / lanes)
            .flag("MASTER_BF16", self.master == DType::BF16)
            .flag("MOMENTS_BF16", self.moments == Moments::BF16)
            .fragment(if self.mad { shader!("lib/add_mad.wgsl") } else { shader!("lib/add.wgsl") })
            .fragment(shader!("lib/threefry.wgsl"))
            .quads("w", self.master)
            .fragment(shader!("lib/adamw.wgsl"));
        let source = match self.moments {
            Moments::FP8 => source.fragment(shader!("lib/moments_fp8.wgsl")),
            dense => source
                .quads("m", dense.dtype())
                .quads("v", dense.dtype())
                .fragment(shader!("lib/moments_dense.wgsl")),
        };
        let mut bindings = vec![
            Binding::Params,
            Binding::Read,
            Binding::Read,
            Binding::Write,
            Binding::Write,
            Binding::Write,
        ];
        let source = match self.packed {
            None => source.fragment(shader!("adamw.wgsl")),
            Some(spec) => {
                bindings.extend([Binding::Write; 3]);
                anchors::fragment(codec(source, spec))
                    .fragment(shader!("lib/round_nearest.wgsl"))
                    .fragment(shader!("lib/unit.wgsl"))
                    .fragment(match spec.element.bits() {
                        4 => shader!("lib/pack4.wgsl"),
                        6 => shader!("lib/pack6.wgsl"),
                        _ => shader!("lib/pack8.wgsl"),
                    })
                    .fragment(match spec.element {
                        Element::E2M1 => shader!("lib/encode_e2m1.wgsl"),
                        _ => shader!("lib/encode.wgsl"),
                    })
                    .fragment(shader!("adamw_square.wgsl"))
            }
        };
        Kernel {
            name: self.name(),
            wgsl: source.build(),
            bindings,
            workgroup_size: WORKGROUP,
            features: wgpu::Features::empty(),
            spirv: false,
        }
    }
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    let packed = all_specs().into_iter().filter(|spec| fusible(*spec)).map(Some);
    let mut kernels = Vec::new();
    for packed in std::iter::once(None).chain(packed) {
        for master in [DType::F32, DType::BF16] {
            for moments in Moments::ALL {
                let desc = AdamWDesc { master, moments, ..AdamWDesc::new(0, 0) };
                let [plain, mad] = [false, true].map(|nvidia| Variant::new(&desc, nvidia, packed));
                kernels.push(plain.kernel());
                if mad.mad {
                    kernels.push(mad.kernel());
                }
            }
        }
    }
    kernels
}
