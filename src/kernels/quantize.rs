//! Dense tensors to MX: codes and scales, in one pass over the input (NVFP4: one more before, for the tensor's
//! largest magnitude).
//!
//! **Exact**: the same bytes on every engine, for every input. A block with NaN or infinity gets the scale NaN
//! (0xFF; NVFP4 0x7F) and zero codes, and is counted ([`Context::nonfinite_blocks`]). An all-zero block gets scale 0
//! and codes that keep each zero's sign. What a block's last row or column lacks counts as zero.
//!
//! Shaders: `shaders/quantize.wgsl` (vector blocks along rows), `shaders/quantize_square.wgsl` (square blocks along
//! rows), `shaders/quantize_columns.wgsl` (all blocks down the columns), `shaders/amax.wgsl` (NVFP4).

mod fast;

use crate::engine::buffer::{Chunk, DType, DeviceMxTensor, STATE_WORDS, Tensor};
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::engine::{Context, Stream, gpu::Gpu};
use crate::formats::element::{Element, INFINITY, Round};
use crate::formats::scale::{self, carry_threshold};
use crate::formats::{Axis, Layout, MxSpec, MxTensor, Rounding, ScaleFormat, ScaleRule, block};
use crate::rng::{self, RoundingBits};
use crate::{Error, Result};

use super::{
    NVIDIA, UNIT, WORKGROUP, all_specs, anchors, codec, format_constants, format_name,
    type_constants,
};

/// What [`Quantize`] does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QuantizeDesc {
    /// The format. Default MXFP4.
    pub spec: MxSpec,
    /// The axis along which blocks run. Default one: along rows.
    pub axis: Axis,
    /// How the scale follows from a block's amax. `None`: the format's own, that is OCP's `Floor` for E8M0 scales,
    /// rounding to nearest for NVFP4.
    pub scale_rule: Option<ScaleRule>,
    /// How elements are rounded. Default to nearest even.
    pub rounding: Rounding,
    /// NVFP4's tensor-wide scale, positive and normal; `None` computes it, amax / 2688.
    pub tensor_scale: Option<f32>,
}

impl Default for QuantizeDesc {
    fn default() -> Self {
        QuantizeDesc {
            spec: crate::MXFP4,
            axis: Axis::One,
            scale_rule: None,
            rounding: Rounding::NearestEven,
            tensor_scale: None,
        }
    }
}

impl QuantizeDesc {
    /// Checks that the combination exists.
    pub fn validate(&self) -> Result<()> {
        self.spec.validate()?;
        if let Some(scale) = self.tensor_scale {
            block::check_tensor_scale(self.spec, scale)?;
        }
        match (self.spec.scale, self.scale_rule) {
            (ScaleFormat::E4M3, Some(rule @ (ScaleRule::Floor | ScaleRule::Ceil))) => {
                Err(Error::InvalidSpec(format!(
                    "scale rule {rule:?} for {}: its scales are rounded to nearest (Even) or up (Rceil)",
                    self.spec
                )))
            }
            _ => Ok(()),
        }
    }

    fn rule(&self) -> ScaleRule {
        self.scale_rule.unwrap_or(match self.spec.scale {
            ScaleFormat::E8M0 => ScaleRule::Floor,
            ScaleFormat::E4M3 => ScaleRule::Even,
        })
    }

    /// The shaders' `carry`: the fraction of amax from which an E8M0 scale doubles, or whether E4M3 rounds up.
    pub(super) fn carry(&self) -> u32 {
        match self.spec.scale {
            ScaleFormat::E8M0 => carry_threshold(self.spec.element, self.rule()),
            ScaleFormat::E4M3 => u32::from(self.rule() == ScaleRule::Rceil),
        }
    }
}

/// The kernel that packs a dense tensor.
#[derive(Clone, Debug)]
pub struct Quantize {
    desc: QuantizeDesc,
}

impl Quantize {
    /// Checks the descriptor. Pipelines are made when first recorded, for the variant that the shape needs.
    pub fn new(_ctx: &Context, desc: &QuantizeDesc) -> Result<Quantize> {
        desc.validate()?;
        Ok(Quantize { desc: *desc })
    }

    /// Records the quantization of `x` `[rows, cols]` into `out`, which has the same logical shape and the descriptor's
    /// format and axis.
    pub fn record(
        &self,
        stream: &mut Stream<'_>,
        x: &Tensor,
        out: &mut DeviceMxTensor,
    ) -> Result<()> {
        let layout = out.layout;
        let QuantizeDesc { spec, axis, .. } = self.desc;
        if (layout.spec, layout.axis) != (spec, axis) {
            return Err(Error::Mismatch {
                operation: "Quantize::record",
                problem: format!(
                    "the kernel makes {spec} along axis {axis}, the output is {} along axis {}",
                    layout.spec, layout.axis
                ),
            });
        }
        if x.shape() != [layout.rows, layout.cols] {
            return Err(Error::Mismatch {
                operation: "Quantize::record",
                problem: format!(
                    "x is {:?}, the output [{}, {}]",
                    x.shape(),
                    layout.rows,
                    layout.cols
                ),
            });
        }
        stream.context().check_same(&x.data, &out.codes)?;
        if stream.gpu().is_some() {
            self.record_gpu(stream, x, out)
        } else {
            pack_on_cpu(&self.desc, x.dtype, x.data.cpu(), out);
            Ok(())
        }
    }

    fn record_gpu(&self, stream: &mut Stream<'_>, x: &Tensor, out: &DeviceMxTensor) -> Result<()> {
        let [Some(state), ..] = [out.state.chunks().next()] else { return Ok(()) };
        let state = state.buffer;
        stream.clear(state);
        if out.tensor_scaled() && self.desc.tensor_scale.is_none() {
            for chunk in x.data.chunks() {
                let elements = (chunk.rows * x.cols) as u64;
                let words = (elements * x.dtype.size() as u64).div_ceil(4);
                stream.dispatch(
                    &amax_name(x.dtype),
                    || amax_kernel(x.dtype),
                    &[elements as u32],
                    &[chunk.buffer, state],
                    words.div_ceil(u64::from(WORKGROUP * AMAX_STEPS)),
                )?;
            }
        }
        let tiled = Variant::is_tiled(self.desc.spec, self.desc.axis);
        if tiled {
            // Its bytes are put together by atomics.
            for scales in out.scales.chunks() {
                stream.clear(scales.buffer);
            }
        }
        let mut first = true;
        for xs in x.data.chunks() {
            for (codes, scales) in out.codes.chunks().zip(out.scales.chunks()) {
                let buffers = [xs.buffer, codes.buffer, scales.buffer, state];
                if tiled {
                    self.record_tile(stream, x, out, &xs, &codes, buffers, first)?;
                } else {
                    self.record_rows(stream, x, out, &xs, &codes, buffers)?;
                }
                first = false;
            }
        }
        Ok(())
    }

    fn variant(&self, gpu: &Gpu, x: &Tensor) -> Variant {
        let QuantizeDesc { spec, axis, rounding, .. } = self.desc;
        let stochastic = rounding != Rounding::NearestEven;
        let mad = stochastic && gpu.caps.vendor == NVIDIA;
        if Variant::is_tiled(spec, axis) {
            let vec4 = x.cols.is_multiple_of(8);
            // Only where columns are drawn for do invocations exchange anything.
            let subgroup = stochastic && axis == Axis::Zero && gpu.has_subgroups(2);
            let form = Form::Tile { axis, vec4, subgroup };
            return Variant { spec, dtype: x.dtype, stochastic, mad, form };
        }
        let lanes = spec.block.len() as u32 / UNIT;
        let subgroup = gpu.has_subgroups(lanes);
        let contiguous = x.cols.is_multiple_of(spec.block.len());
        Variant { spec, dtype: x.dtype, stochastic, mad, form: Form::Rows { contiguous, subgroup } }
    }

    fn record_rows(
        &self,
        stream: &mut Stream<'_>,
        x: &Tensor,
        out: &DeviceMxTensor,
        xs: &Chunk<'_>,
        codes: &Chunk<'_>,
        buffers: [&wgpu::Buffer; 4],
    ) -> Result<()> {
        let rows = xs.overlap(codes);
        let Some(gpu) = stream.gpu() else { return Ok(()) };
        if rows.is_empty() {
            return Ok(());
        }
        let variant = self.variant(gpu, x);
        let layout = out.layout;
        let groups = x.cols.div_ceil(8);
        let counter = rows.start as u64 * groups as u64;
        let key = rng::key(self.desc.rounding);
        let params = [
            rows.len() as u32,
            x.cols as u32,
            layout.blocks() as u32,
            ((rows.start - xs.first) * x.cols) as u32,
            ((rows.start - codes.first) * line_units(&layout)) as u32,
            ((rows.start - codes.first) * layout.blocks() / 4) as u32,
            self.desc.carry(),
            self.desc.tensor_scale.map_or(0, f32::to_bits),
            key[0],
            key[1],
            key[2],
            key[3],
            counter as u32,
            (counter >> 32) as u32,
            groups as u32,
            1,
            rows.start as u32,
        ];
        let units = rows.len() as u64 * layout.blocks() as u64 * layout.spec.block.len() as u64
            / u64::from(UNIT);
        stream.dispatch(
            &variant.name(),
            || variant.kernel(),
            &params,
            &buffers,
            units.div_ceil(u64::from(WORKGROUP)),
        )
    }

    #[allow(clippy::too_many_arguments)]
    fn record_tile(
        &self,
        stream: &mut Stream<'_>,
        x: &Tensor,
        out: &DeviceMxTensor,
        xs: &Chunk<'_>,
        codes: &Chunk<'_>,
        buffers: [&wgpu::Buffer; 4],
        first: bool,
    ) -> Result<()> {
        let layout = out.layout;
        // The part of x that both chunks hold.
        let (rows, cols) = match layout.axis {
            Axis::Zero => (xs.first..xs.first + xs.rows, codes.first..codes.first + codes.rows),
            Axis::One => (xs.overlap(codes), 0..x.cols),
        };
        let Some(gpu) = stream.gpu() else { return Ok(()) };
        if rows.is_empty() || cols.is_empty() {
            return Ok(());
        }
        let variant = self.variant(gpu, x);
        let groups = x.cols.div_ceil(8);
        let counter = rows.start as u64 * groups as u64 + cols.start as u64 / 8;
        let key = rng::key(self.desc.rounding);
        let (first_line, k) = layout.position(rows.start, cols.start);
        let line = first_line - codes.first;
        let block = layout.spec.block;
        let params = [
            rows.len() as u32,
            cols.len() as u32,
            x.cols as u32,
            ((rows.start - xs.first) * x.cols + cols.start) as u32,
            line_units(&layout) as u32,
            (line * line_units(&layout) + k / UNIT as usize) as u32,
            layout.blocks() as u32,
            (line / block.lines() * layout.blocks() + k / block.len()) as u32,
            self.desc.carry(),
            self.desc.tensor_scale.map_or(0, f32::to_bits),
            groups as u32,
            u32::from(first),
            key[0],
            key[1],
            key[2],
            key[3],
            counter as u32,
            (counter >> 32) as u32,
            1,
            (first_line / block.lines()) as u32,
            (layout.scale_rows() + k / block.len()) as u32,
        ];
        let [tile_rows, tile_cols, _] = tile(layout.axis);
        let tiles = rows.len().div_ceil(tile_rows as usize) as u64
            * cols.len().div_ceil(tile_cols as usize) as u64;
        stream.dispatch(&variant.name(), || variant.kernel(), &params, &buffers, tiles)
    }
}

impl MxTensor {
    /// Quantizes row-major f32 values on the host; the same bytes as [`Quantize`] on any engine.
    pub fn quantize(x: &[f32], rows: usize, cols: usize, desc: &QuantizeDesc) -> Result<MxTensor> {
        desc.validate()?;
        let layout = Layout::new(desc.spec, desc.axis, rows, cols)?;
        if x.len() != rows * cols {
            return Err(Error::Mismatch {
                operation: "MxTensor::quantize",
                problem: format!("{} values for a shape of [{rows}, {cols}]", x.len()),
            });
        }
        let mut codes = vec![0; layout.codes_len()];
        let mut scales = vec![0; layout.scales_len()];
        let x = bytemuck::cast_slice(x);
        let draws = Draws::new(desc.rounding, cols);
        let carry = desc.carry();
        let state = twin(desc, carry, DType::F32, x, &layout, draws, &mut codes, &mut scales);
        MxTensor::from_parts(layout, codes, scales, f32::from_bits(state[2]))
    }
}

// ---- The twin ------------------------------------------------------------------------------------------------------

/// Packs elements, row-major, into `out` on the CPU engine; its anchors too.
pub(super) fn pack_on_cpu(desc: &QuantizeDesc, dtype: DType, x: &[u32], out: &mut DeviceMxTensor) {
    let layout = out.layout;
    let draws = Draws::new(desc.rounding, layout.cols);
    pack(desc, desc.carry(), dtype, x, &layout, draws, out);
}

/// Packs vector blocks whose lines are laid out one behind the other, padded to whole blocks with zeros: those of rows as
/// they are, those of columns transposed, then with the draws of their elements in the same order. `carry` instead of what
/// the descriptor's rule has: see [`QuantizeDesc::carry`].
pub(super) fn pack_lines(
    desc: &QuantizeDesc,
    carry: u32,
    lines: &[f32],
    draws: Option<&[u16]>,
    out: &mut DeviceMxTensor,
) {
    let real = out.layout;
    let cols = real.blocks() * real.spec.block.len();
    let layout = Layout { axis: Axis::One, rows: real.lines(), cols, ..real };
    let draws = draws.map_or_else(|| Draws::new(desc.rounding, real.cols), Draws::Given);
    pack(desc, carry, DType::F32, bytemuck::cast_slice(lines), &layout, draws, out);
}

fn pack(
    desc: &QuantizeDesc,
    carry: u32,
    dtype: DType,
    x: &[u32],
    layout: &Layout,
    draws: Draws<'_>,
    out: &mut DeviceMxTensor,
) {
    let codes_len = out.codes.bytes();
    let scales_len = out.scales.bytes();
    let codes = &mut bytemuck::cast_slice_mut(out.codes.cpu_mut())[..codes_len];
    let scales = &mut bytemuck::cast_slice_mut(out.scales.cpu_mut())[..scales_len];
    let state = twin(desc, carry, dtype, x, layout, draws, codes, scales);
    let anchors = anchors::anchors(&out.layout, scales);
    out.state.cpu_mut()[..3].copy_from_slice(&state);
    out.state.cpu_mut()[STATE_WORDS..].copy_from_slice(&anchors);
}

/// Where a job's random bits come from.
#[derive(Clone, Copy)]
enum Draws<'a> {
    /// Rounding to nearest draws nothing.
    Nearest,
    /// By row and column of the job's layout.
    Elements(RoundingBits),
    /// One an element, in the order of the elements.
    Given(&'a [u16]),
}

impl Draws<'_> {
    fn new(rounding: Rounding, cols: usize) -> Self {
        RoundingBits::new(rounding, cols).map_or(Draws::Nearest, Draws::Elements)
    }
}

/// Quantizes `x` (packed in words) on the CPU, on all cores. Returns the state: blocks with NaN or infinity, NVFP4's
/// amax and tensor-wide scale.
#[allow(clippy::too_many_arguments)]
fn twin(
    desc: &QuantizeDesc,
    carry: u32,
    dtype: DType,
    x: &[u32],
    layout: &Layout,
    draws: Draws<'_>,
    codes: &mut [u8],
    scales: &mut [u8],
) -> [u32; 3] {
    let mut amax = 0;
    let tensor_scale = match (desc.spec.scale, desc.tensor_scale) {
        (ScaleFormat::E8M0, _) => 1f32.to_bits(),
        (ScaleFormat::E4M3, Some(scale)) => scale.to_bits(),
        (ScaleFormat::E4M3, None) => {
            amax = finite_amax(dtype, x, layout.rows * layout.cols);
            scale::nvfp4_tensor_scale(amax)
        }
    };
    let job = Job { desc, dtype, x, layout, carry, tensor_scale, draws };
    let block_bytes = layout.block_bytes();
    let blocks = layout.blocks();
    // Blocks of vectors along a row lie one behind the other in the output: any number of them is a piece of work. Down
    // the columns, sixteen lines share the cache lines that they read; squares are taken a row of squares at a time.
    let nonfinite = if layout.axis == Axis::One && layout.spec.block.lines() == 1 {
        let piece = 512;
        parallel(codes, piece * block_bytes, scales, piece, |i, codes, scales| {
            if let Some(fast) = fast::Rows::of(&job) {
                return fast.blocks(i * piece, codes, scales);
            }
            let mut nonfinite = 0;
            for (j, (codes, scale)) in codes.chunks_exact_mut(block_bytes).zip(scales).enumerate() {
                let at = i * piece + j;
                *scale = job.block(at / blocks, at % blocks, &mut [codes]);
                nonfinite += job.is_nan(*scale);
            }
            nonfinite
        })
    } else {
        let lines = layout.spec.block.lines();
        let piece = lines.max(16);
        let line_bytes = layout.line_bytes();
        parallel(codes, piece * line_bytes, scales, piece / lines * blocks, |i, codes, scales| {
            let mut nonfinite = 0;
            for b in 0..blocks {
                let mut rest = &mut *codes;
                for (j, scale) in scales.chunks_exact_mut(blocks).enumerate() {
                    let take = (lines * line_bytes).min(rest.len());
                    let (now, later) = rest.split_at_mut(take);
                    rest = later;
                    let mut out: Vec<&mut [u8]> = now
                        .chunks_exact_mut(line_bytes)
                        .map(|line| &mut line[b * block_bytes..(b + 1) * block_bytes])
                        .collect();
                    scale[b] = job.block(i * piece / lines + j, b, &mut out);
                    nonfinite += job.is_nan(scale[b]);
                }
            }
            nonfinite
        })
    };
    [nonfinite, amax, tensor_scale]
}

/// Runs `f` on matching pieces of codes and scales, on all cores; returns the sum of its results.
fn parallel(
    codes: &mut [u8],
    codes_piece: usize,
    scales: &mut [u8],
    scales_piece: usize,
    f: impl Fn(usize, &mut [u8], &mut [u8]) -> u32 + Sync,
) -> u32 {
    if codes.is_empty() {
        return 0;
    }
    #[cfg(not(target_arch = "wasm32"))]
    {
        use rayon::prelude::*;
        codes
            .par_chunks_mut(codes_piece)
            .zip(scales.par_chunks_mut(scales_piece))
            .enumerate()
            .map(|(i, (codes, scales))| f(i, codes, scales))
            .sum()
    }
    #[cfg(target_arch = "wasm32")]
    codes
        .chunks_mut(codes_piece)
        .zip(scales.chunks_mut(scales_piece))
        .enumerate()
        .map(|(i, (codes, scales))| f(i, codes, scales))
        .sum()
}

fn finite_amax(dtype: DType, x: &[u32], elements: usize) -> u32 {
    (0..elements)
        .map(|i| dtype.f32_bits(x, i) & 0x7fff_ffff)
        .filter(|magnitude| *magnitude < INFINITY)
        .max()
        .unwrap_or(0)
}

struct Job<'a> {
    desc: &'a QuantizeDesc,
    dtype: DType,
    x: &'a [u32],
    layout: &'a Layout,
    carry: u32,
    tensor_scale: u32,
    draws: Draws<'a>,
}

impl Job<'_> {
    fn is_nan(&self, scale: u8) -> u32 {
        let nan = match self.desc.spec.scale {
            ScaleFormat::E8M0 => scale::E8M0_NAN,
            ScaleFormat::E4M3 => scale::E4M3_NAN,
        };
        u32::from(scale == nan)
    }

    /// Quantizes the block at (`scale_row`, `b`) into the block's part of each of its lines; returns its scale.
    fn block(&self, scale_row: usize, b: usize, out: &mut [&mut [u8]]) -> u8 {
        let layout = self.layout;
        let n = layout.spec.block.len();
        let line0 = scale_row * layout.spec.block.lines();
        let start = b * n;
        let len = n.min(layout.line_len() - start);
        let value = |line: usize, at: usize| {
            let (row, col) = layout.element(line, at);
            self.dtype.f32_bits(self.x, row * layout.cols + col)
        };
        let mut amax = 0;
        for i in 0..out.len() {
            for j in 0..len {
                amax = amax.max(value(line0 + i, start + j) & 0x7fff_ffff);
            }
        }
        let scale = match self.desc.spec.scale {
            ScaleFormat::E8M0 => scale::e8m0_from_amax(self.desc.spec.element, self.carry, amax),
            ScaleFormat::E4M3 => scale::nvfp4_from_amax(amax, self.tensor_scale, self.desc.rule()),
        };
        if amax >= INFINITY {
            for line in out {
                line.fill(0);
            }
            return scale;
        }
        let mut codes = [0u8; 128];
        let mut rounds = [Round::NearestEven; 128];
        for (i, line) in out.iter_mut().enumerate() {
            self.rounds(line0 + i, start, &mut rounds[..len]);
            for j in 0..len {
                codes[j] = self.encode(value(line0 + i, start + j), scale, rounds[j]);
            }
            block::pack(layout.spec.element.bits(), &codes[..n], line);
        }
        scale
    }

    /// How the elements of a line from `start` on, a multiple of 16, are rounded.
    fn rounds(&self, line: usize, start: usize, out: &mut [Round]) {
        let bits = match &self.draws {
            Draws::Nearest => return,
            Draws::Elements(bits) => bits,
            Draws::Given(draws) => {
                for (round, r) in out.iter_mut().zip(&draws[line * self.layout.cols + start..]) {
                    *round = Round::Stochastic(*r);
                }
                return;
            }
        };
        for (g, out) in out.chunks_mut(8).enumerate() {
            match self.layout.axis {
                // One draw serves eight elements of a row.
                Axis::One => {
                    for (round, r) in out.iter_mut().zip(bits.group(line, start / 8 + g)) {
                        *round = Round::Stochastic(r);
                    }
                }
                Axis::Zero => {
                    for (j, round) in out.iter_mut().enumerate() {
                        *round = Round::Stochastic(bits.element(start + 8 * g + j, line));
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn encode(&self, x: u32, scale: u8, round: Round) -> u8 {
        match self.desc.spec.scale {
            ScaleFormat::E8M0 => self.desc.spec.element.encode(x, scale, round),
            ScaleFormat::E4M3 => scale::nvfp4_encode(x, scale, self.tensor_scale, round),
        }
    }
}

// ---- The shaders ---------------------------------------------------------------------------------------------------

/// Units of a line of codes.
fn line_units(layout: &Layout) -> usize {
    layout.blocks() * layout.spec.block.len() / UNIT as usize
}

/// Rows and columns of a workgroup's tile, and its invocations: one unit each in `quantize_square.wgsl`, a part of 16
/// rows and four columns in `quantize_columns.wgsl`. A tile holds whole blocks.
const fn tile(axis: Axis) -> [u32; 3] {
    match axis {
        Axis::Zero => [128, 32, 64],
        Axis::One => [32, 128, 256],
    }
}

#[derive(Clone, Copy, Debug)]
struct Variant {
    spec: MxSpec,
    dtype: DType,
    stochastic: bool,
    /// Adds by multiply-add in the random numbers, see `lib/add_mad.wgsl`.
    mad: bool,
    form: Form,
}

#[derive(Clone, Copy, Debug)]
enum Form {
    /// Vector blocks along rows; contiguous: rows are whole blocks.
    Rows { contiguous: bool, subgroup: bool },
    /// Everything else; vec4: rows are whole groups of eight.
    Tile { axis: Axis, vec4: bool, subgroup: bool },
}

impl Variant {
    fn is_tiled(spec: MxSpec, axis: Axis) -> bool {
        axis == Axis::Zero || spec.block.lines() > 1
    }

    fn name(&self) -> String {
        let rounding = match (self.stochastic, self.mad) {
            (false, _) => "nearest",
            (true, false) => "stochastic",
            (true, true) => "stochastic-mad",
        };
        let form = match self.form {
            Form::Rows { contiguous, subgroup } => format!(
                "rows.{}.{}",
                if contiguous { "contiguous" } else { "ragged" },
                if subgroup { "subgroup" } else { "workgroup" }
            ),
            Form::Tile { axis, vec4, subgroup } => format!(
                "axis{axis}.{}.{}",
                if vec4 { "vec4" } else { "ragged" },
                if subgroup { "subgroup" } else { "workgroup" }
            ),
        };
        format!("quantize.{}.{}.{rounding}.{form}", format_name(self.spec), self.dtype)
    }

    fn kernel(&self) -> Kernel {
        let source = type_constants(format_constants(self.spec), "X_TYPE", self.dtype);
        let source = codec(source, self.spec)
            .fragment(if self.stochastic {
                shader!("lib/round_stochastic.wgsl")
            } else {
                shader!("lib/round_nearest.wgsl")
            })
            .fragment(if self.mad { shader!("lib/add_mad.wgsl") } else { shader!("lib/add.wgsl") })
            .fragment(shader!("lib/threefry.wgsl"))
            .fragment(shader!("lib/unit.wgsl"))
            .fragment(match self.spec.element.bits() {
                4 => shader!("lib/pack4.wgsl"),
                6 => shader!("lib/pack6.wgsl"),
                _ => shader!("lib/pack8.wgsl"),
            })
            .fragment(match (self.spec.element, self.spec.scale) {
                (Element::E2M1, ScaleFormat::E8M0) => shader!("lib/encode_e2m1.wgsl"),
                _ => shader!("lib/encode.wgsl"),
            });
        let source = anchors::fragment(source);
        let load =
            |vec4| if vec4 { shader!("lib/load_vec4.wgsl") } else { shader!("lib/load_any.wgsl") };
        let lanes = |subgroup| {
            if subgroup {
                shader!("lib/lanes_subgroup.wgsl")
            } else {
                shader!("lib/lanes_workgroup.wgsl")
            }
        };
        let (source, subgroup) = match self.form {
            Form::Rows { contiguous, subgroup } => (
                source
                    .constant("WG", WORKGROUP)
                    .flag("CONTIGUOUS", contiguous)
                    .fragment(load(contiguous))
                    .fragment(lanes(subgroup))
                    .fragment(if subgroup {
                        shader!("lib/amax_subgroup.wgsl")
                    } else {
                        shader!("lib/amax_workgroup.wgsl")
                    })
                    .fragment(shader!("quantize.wgsl")),
                subgroup,
            ),
            Form::Tile { axis, vec4, subgroup } => {
                let [rows, cols, invocations] = tile(axis);
                let source = source
                    .constant("WG", invocations)
                    .constant("TILE_ROWS", rows)
                    .constant("TILE_COLS", cols)
                    .fragment(load(vec4))
                    .fragment(shader!("lib/tile.wgsl"))
                    .fragment(shader!("lib/put_scale.wgsl"));
                let source = match axis {
                    Axis::One => source.fragment(shader!("quantize_square.wgsl")),
                    Axis::Zero => source
                        .fragment(lanes(subgroup))
                        .fragment(if subgroup {
                            shader!("lib/draws_subgroup.wgsl")
                        } else {
                            shader!("lib/draws_alone.wgsl")
                        })
                        .fragment(shader!("quantize_columns.wgsl")),
                };
                (source, subgroup)
            }
        };
        Kernel {
            name: self.name(),
            wgsl: source.build(),
            bindings: vec![
                Binding::Params,
                Binding::Read,
                Binding::Write,
                Binding::Write,
                Binding::Write,
            ],
            workgroup_size: match self.form {
                Form::Rows { .. } => WORKGROUP,
                Form::Tile { axis, .. } => tile(axis)[2],
            },
            features: if subgroup { wgpu::Features::SUBGROUP } else { wgpu::Features::empty() },
            spirv: false,
        }
    }
}

/// Words of x that an invocation of `amax.wgsl` looks at.
const AMAX_STEPS: u32 = 16;

fn amax_name(dtype: DType) -> String {
    format!("amax.{dtype}")
}

fn amax_kernel(dtype: DType) -> Kernel {
    let source = Source::new().constant("WG", WORKGROUP).constant("STEPS", AMAX_STEPS);
    let source = type_constants(source, "X_TYPE", dtype)
        .fragment(shader!("lib/float.wgsl"))
        .fragment(shader!("amax.wgsl"));
    Kernel::portable(amax_name(dtype), source, &[Binding::Read, Binding::Write])
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    let mut kernels: Vec<_> = DType::ALL.map(amax_kernel).into();
    for spec in all_specs() {
        let mut forms = Vec::new();
        for a in [false, true] {
            for b in [false, true] {
                forms.push(Form::Tile { axis: Axis::Zero, vec4: a, subgroup: b });
                if spec.block.lines() == 1 {
                    forms.push(Form::Rows { contiguous: a, subgroup: b });
                }
            }
            if spec.block.lines() > 1 {
                forms.push(Form::Tile { axis: Axis::One, vec4: a, subgroup: false });
            }
        }
        for dtype in DType::ALL {
            for (stochastic, mad) in [(false, false), (true, false), (true, true)] {
                for form in &forms {
                    let exchanges = matches!(form, Form::Tile { subgroup: true, .. });
                    if stochastic || !exchanges {
                        let variant = Variant { spec, dtype, stochastic, mad, form: *form };
                        kernels.push(variant.kernel());
                    }
                }
            }
        }
    }
    kernels
}
