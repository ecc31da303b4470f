//! A dense tensor to MX along its rows and down its columns at once, as the products of training need it: one pass over
//! the input, each side with a format, rounding and Walsh–Hadamard transform of its own.
//!
//! Shapes: `x` `[T, C]`, F32 or BF16, C a multiple of 4. The row side is packed with blocks along C ([`Axis::One`]), the
//! column side with blocks along T, stored transposed ([`Axis::Zero`]). Either may be absent. A stack of matrices, one under
//! the other, may have the columns of each packed for themselves: [`QuantizeBoth::stacked`].
//!
//! **Exact**: the same bytes on every engine, for every input, and without a transform those of [`Quantize`], random bits
//! included. What a transform adds: its additions are f32's, correctly rounded, in one order (strides from the largest to
//! 1), so they are the same everywhere once subnormals and overflow are out of the way. Hence two rules: before a
//! transform a magnitude below 2⁻⁹⁸ counts as zero, so that every sum is a multiple of 2⁻¹²¹; and a group with NaN,
//! infinity or a magnitude of 2¹²⁰ or more becomes NaN, and with it its blocks. A zero sum is +0.
//!
//! One pass takes that a tile of 2048 elements holds whole blocks and groups of both sides: with lengths of 32 on one side
//! the other may have 64, with 16 128. Longer ones, or a device with too few bindings for all that is asked for, take a
//! pass a side, and NVFP4 takes one more for the largest magnitude, with the same bytes.
//!
//! Shaders: `shaders/quantize_both.wgsl`, with `shaders/lib/side.wgsl` once a side.
//!
//! [`Quantize`]: super::Quantize

use std::borrow::Cow;

use crate::engine::buffer::{DType, DeviceMxTensor, Ids, Tensor};
use crate::engine::shader::{Binding, Kernel, Source, UNCHECKED, shader};
use crate::engine::{Context, Stream};
use crate::formats::element::INFINITY;
use crate::formats::{
    Axis, Block, Element, Layout, MxSpec, Rounding, ScaleFormat, ScaleRule, block, scale,
};
use crate::rng::{self, ROUNDS, RoundingBits, threefry4x32};
use crate::{Error, Result};

use super::quantize::pack_lines;
use super::{NVIDIA, QuantizeDesc, UNIT, all_specs, anchors, codec, format_constants, format_name};
use super::{type_constants, type_number};

/// The signs that a transform's input is multiplied with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Signs {
    /// All positive: a plain Walsh–Hadamard transform.
    #[default]
    None,
    /// A random sign a position, the same in every group. Both operands of a product take the same seed.
    Random {
        /// Of the crate's generator; does not collide with draws of stochastic rounding.
        seed: u64,
    },
}

/// A Walsh–Hadamard transform of groups of `size` neighbours along the blocked axis: x' = (x ∘ s) H · 2⁻ᵖ, with the signs
/// s on the input's side, H Sylvester's matrix of ±1, and 2ᵖ the power of two at or above √size, so that the scaling is
/// exact. Outliers of a group spread over all of it, and a product of two operands that were transformed alike along the
/// contracted axis is the product of the originals divided by [`Hadamard::gain`].
///
/// Signs on the output's side would only flip signs of outputs, and spread nothing: see Quartet II, arXiv 2601.22813.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hadamard {
    /// 16, 32, 64 or 128.
    pub size: u32,
    /// The signs.
    pub signs: Signs,
}

impl Hadamard {
    /// What a product of two transformed operands must be multiplied with: 4ᵖ / size, which is 1 for 16 and 64, and 2 for
    /// 32 and 128.
    pub fn gain(self) -> f32 {
        1.0 / (self.factor() * self.factor() * self.size as f32)
    }

    /// Transforms a group in place, on the host.
    pub(crate) fn apply(self, group: &mut [f32]) {
        let mut tile: Vec<_> = group.iter().map(|v| [*v; ABREAST]).collect();
        transform(&mut tile, self.signs(), self.factor());
        for (v, row) in group.iter_mut().zip(tile) {
            *v = row[0];
        }
    }

    /// 2⁻ᵖ.
    fn factor(self) -> f32 {
        1.0 / (1u32 << self.size.ilog2().div_ceil(2)) as f32
    }

    /// A bit a position. The rounding bits' counters have zeros where this one has a one.
    fn signs(self) -> [u32; 4] {
        match self.signs {
            Signs::None => [0; 4],
            Signs::Random { seed } => {
                threefry4x32::<ROUNDS>([0, 0, 1, 0], [seed as u32, (seed >> 32) as u32, 0, 0])
            }
        }
    }
}

/// One side of [`QuantizeBoth`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Side {
    /// The format, with vector blocks. ([`super::Quantize`] packs square ones.)
    pub spec: MxSpec,
    /// How the scale follows from a block's amax; `None` as in [`QuantizeDesc`].
    pub scale_rule: Option<ScaleRule>,
    /// How elements are rounded. Random bits belong to the element (row, col) of `x`: two sides that must be independent
    /// take different streams.
    pub rounding: Rounding,
    /// The transform before the quantizer. Its size divides the blocked axis' length.
    pub hadamard: Option<Hadamard>,
    /// Pack three quarters of the elements, each rounded to f32, under the scale that Floor gives for the whole ones: then
    /// nothing clips, in any format under E8M0 scales (arXiv 2502.20586). `scale_rule` is Floor or `None`. A product is to be
    /// multiplied with 4/3 for each operand of that kind.
    pub three_quarters: bool,
}

impl Default for Side {
    fn default() -> Self {
        let QuantizeDesc { spec, scale_rule, rounding, .. } = QuantizeDesc::default();
        Side { spec, scale_rule, rounding, hadamard: None, three_quarters: false }
    }
}

impl Side {
    fn desc(&self, axis: Axis) -> QuantizeDesc {
        let Side { spec, scale_rule, rounding, .. } = *self;
        QuantizeDesc { spec, axis, scale_rule, rounding, tensor_scale: None }
    }

    /// See [`QuantizeDesc::carry`]. Of three quarters of an amax the fraction is at least ½ where it is a binade below the amax.
    fn carry(&self, axis: Axis) -> u32 {
        if self.three_quarters { 1 << 22 } else { self.desc(axis).carry() }
    }

    fn validate(&self, axis: Axis) -> Result<()> {
        self.desc(axis).validate()?;
        let floor = matches!(self.scale_rule, None | Some(ScaleRule::Floor));
        if self.three_quarters && !(floor && self.spec.scale == ScaleFormat::E8M0) {
            return Err(Error::InvalidSpec(format!(
                "three quarters of {} under the rule {:?}: they go with Floor, under E8M0 scales",
                self.spec, self.scale_rule
            )));
        }
        if !matches!(self.spec.block, Block::Vector(_)) {
            return Err(Error::InvalidSpec(format!(
                "{} as a side of QuantizeBoth: it takes vector blocks; Quantize packs squares",
                self.spec
            )));
        }
        match self.hadamard {
            Some(Hadamard { size, .. }) if ![16, 32, 64, 128].contains(&size) => {
                Err(Error::InvalidSpec(format!(
                    "a Hadamard transform of size {size}: 16, 32, 64 or 128"
                )))
            }
            _ => Ok(()),
        }
    }

    fn size(&self) -> u32 {
        self.hadamard.map_or(0, |hadamard| hadamard.size)
    }
}

/// What is done to `x` before its sides part.
#[derive(Clone, Copy, Debug, Default)]
pub struct Guards<'a> {
    /// `[1, 1]` F32: finite magnitudes are limited to it. [`super::Quantile`] makes one.
    pub clip: Option<&'a Tensor>,
    /// ⌈C / 32⌉ words, bit c mod 32 of word ⌊c / 32⌋ for column c: columns that count as zero, whatever they hold.
    /// [`super::Split`] makes one.
    pub skip: Option<&'a Ids>,
}

/// The kernel that packs a dense tensor along its rows, its columns, or both.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QuantizeBoth {
    rows: Option<Side>,
    columns: Option<Side>,
    /// If x is a stack: of how many matrices.
    stack: Option<usize>,
}

const AXES: [Axis; 2] = [Axis::One, Axis::Zero];
const OPERATION: &str = "QuantizeBoth::record";

fn mismatch<T>(problem: String) -> Result<T> {
    Err(Error::Mismatch { operation: OPERATION, problem })
}

/// Words of the counters: of the row side, then of the column side, in this order.
///
/// | word | counts |
/// |--:|---|
/// | 0 | elements clipped: larger than the largest element under their block's scale |
/// | 1 | elements underflowed: not zero, and their code is |
/// | 2 | blocks with NaN or infinity; their elements are in neither of the counts before |
/// | 3 | elements |
///
/// Elements are those that are encoded: after clip, skip and transform. Counts are added to what is there, modulo 2³².
pub const COUNTERS: usize = 8;

impl QuantizeBoth {
    /// Checks the sides; at least one is needed. Cheap: rounding and signs may change every step.
    pub fn new(_ctx: &Context, rows: Option<Side>, columns: Option<Side>) -> Result<QuantizeBoth> {
        for (axis, side) in AXES.into_iter().zip([rows, columns]) {
            side.map_or(Ok(()), |side| side.validate(axis))?;
        }
        if rows.is_none() && columns.is_none() {
            return mismatch("neither rows nor columns".into());
        }
        Ok(QuantizeBoth { rows, columns, stack: None })
    }

    /// The same for `x` `[matrices · T, C]`, a stack of matrices: the column side packs the columns of each and stores the
    /// transposes one under the other, as a product takes them. So its output is `[matrices · C, T]` along axis one.
    pub fn stacked(self, matrices: usize) -> QuantizeBoth {
        QuantizeBoth { stack: Some(matrices), ..self }
    }

    /// The output of side `number` for an `x` of this shape: its axis, rows and columns.
    fn output(&self, number: usize, [rows, cols]: [usize; 2]) -> (Axis, [usize; 2]) {
        match self.stack {
            Some(matrices) if number == 1 => (Axis::One, [matrices * cols, rows / matrices.max(1)]),
            _ => (AXES[number], [rows, cols]),
        }
    }

    /// Records the quantization of `x` `[T, C]` into the outputs of the sides that there are, which have the same logical
    /// shape and their side's format and axis. `counters` has [`COUNTERS`] words.
    pub fn record(
        &self,
        stream: &mut Stream<'_>,
        x: &Tensor,
        rows: Option<&mut DeviceMxTensor>,
        columns: Option<&mut DeviceMxTensor>,
        guards: &Guards<'_>,
        mut counters: Option<&mut Ids>,
    ) -> Result<()> {
        let mut jobs = Vec::new();
        for (number, (side, out)) in
            [(self.rows, rows), (self.columns, columns)].into_iter().enumerate()
        {
            match (side, out) {
                (Some(side), Some(out)) => {
                    jobs.push(Job { number, side, out, matrices: self.stack.unwrap_or(1) });
                }
                (None, None) => {}
                (side, _) => {
                    let what = ["row", "column"][number];
                    return mismatch(match side {
                        Some(_) => format!("no output for the {what} side"),
                        None => format!("an output for a {what} side that the kernel has not"),
                    });
                }
            }
        }
        self.check(stream, x, &jobs, guards, counters.as_deref())?;
        if stream.gpu().is_some() {
            return record_gpu(stream, x, &jobs, guards, counters.as_deref());
        }
        if x.rows * x.cols > 0 {
            let values = x.widened();
            for mut job in jobs {
                let counts = job.twin(x, &values, guards, counters.is_some());
                if let Some(counters) = &mut counters {
                    let words = &mut counters.data.cpu_mut()[4 * job.number..][..4];
                    for (word, count) in words.iter_mut().zip(counts) {
                        *word = word.wrapping_add(count);
                    }
                }
            }
        }
        Ok(())
    }

    fn check(
        &self,
        stream: &Stream<'_>,
        x: &Tensor,
        jobs: &[Job<'_>],
        guards: &Guards<'_>,
        counters: Option<&Ids>,
    ) -> Result<()> {
        x.expect(OPERATION, "x", x.shape(), &[DType::F32, DType::BF16])?;
        if let Some(matrices) = self.stack.filter(|n| *n == 0 || !x.rows.is_multiple_of(*n)) {
            return mismatch(format!("x is {:?}: a stack of {matrices} matrices", x.shape()));
        }
        if !x.cols.is_multiple_of(4) {
            return mismatch(format!("x is {:?}: columns come in fours", x.shape()));
        }
        for Job { number, side, out, .. } in jobs {
            let layout = out.layout;
            let (axis, shape) = self.output(*number, x.shape());
            if (layout.spec, layout.axis) != (side.spec, axis) {
                return mismatch(format!(
                    "the side makes {} along axis {axis}, the output is {} along axis {}",
                    side.spec, layout.spec, layout.axis
                ));
            }
            if shape != [layout.rows, layout.cols] {
                let stack = self.stack.map_or(String::new(), |n| format!(" in {n} matrices"));
                return mismatch(format!(
                    "x is {:?}{stack}, the output [{}, {}]",
                    x.shape(),
                    layout.rows,
                    layout.cols
                ));
            }
            if side.size() > 0 && !layout.line_len().is_multiple_of(side.size() as usize) {
                return mismatch(format!(
                    "x is {:?}: a Hadamard transform of size {} along axis {} does not divide it",
                    x.shape(),
                    side.size(),
                    layout.axis
                ));
            }
            stream.context().check_same(&x.data, &out.codes)?;
        }
        if let Some(clip) = guards.clip {
            clip.expect(OPERATION, "clip", [1, 1], &[DType::F32])?;
            stream.context().check_same(&x.data, &clip.data)?;
        }
        let words = |what, ids: &Ids, want: usize| {
            stream.context().check_same(&x.data, &ids.data)?;
            match ids.len() {
                len if len == want => Ok(()),
                len => mismatch(format!("{what} has {len} words, x {:?} needs {want}", x.shape())),
            }
        };
        guards.skip.map_or(Ok(()), |skip| words("skip", skip, x.cols.div_ceil(32)))?;
        counters.map_or(Ok(()), |counters| words("counters", counters, COUNTERS))
    }
}

/// A side with its output; number 0 is the rows', 1 the columns'.
struct Job<'a> {
    number: usize,
    side: Side,
    out: &'a mut DeviceMxTensor,
    /// Of x.
    matrices: usize,
}

fn record_gpu(
    stream: &mut Stream<'_>,
    x: &Tensor,
    jobs: &[Job<'_>],
    guards: &Guards<'_>,
    counters: Option<&Ids>,
) -> Result<()> {
    for job in jobs {
        for rows in [&job.out.state, &job.out.scales] {
            // The scales' bytes are put together by atomics.
            rows.chunks().for_each(|chunk| stream.clear(chunk.buffer));
        }
    }
    if x.rows * x.cols == 0 {
        return Ok(());
    }
    for job in jobs.iter().filter(|job| job.out.tensor_scaled()) {
        dispatch(stream, x, &[job], guards, None, true)?;
    }
    let Some(gpu) = stream.gpu() else { return Ok(()) };
    let bindings = 1
        + 3 * jobs.len()
        + usize::from(guards.clip.is_some())
        + usize::from(guards.skip.is_some())
        + usize::from(counters.is_some());
    let sides: Vec<_> = jobs.iter().map(|job| (job.number, job.side)).collect();
    let limit = gpu.device.limits().max_storage_buffers_per_shader_stage as usize;
    let step = if tile(&sides).is_some() && bindings <= limit { jobs.len() } else { 1 };
    for jobs in jobs.chunks(step) {
        dispatch(stream, x, &jobs.iter().collect::<Vec<_>>(), guards, counters, false)?;
    }
    Ok(())
}

fn dispatch(
    stream: &mut Stream<'_>,
    x: &Tensor,
    jobs: &[&Job<'_>],
    guards: &Guards<'_>,
    counters: Option<&Ids>,
    amax_only: bool,
) -> Result<()> {
    let Some(gpu) = stream.gpu() else { return Ok(()) };
    let mut variant = Variant {
        dtype: x.dtype,
        sides: [None; 2],
        mad: false,
        subgroup: false,
        clip: guards.clip.is_some(),
        skip: guards.skip.is_some(),
        count: counters.is_some(),
        amax_only,
    };
    let matrices = jobs[0].matrices;
    let rows = x.rows / matrices;
    let mut params = vec![rows as u32, x.cols as u32, matrices as u32, 1];
    params.resize(PARAMS, 0);
    let mut buffers = vec![x.binding()?];
    let mut lanes = 1;
    for Job { number, side, out, .. } in jobs {
        let stochastic = side.rounding != Rounding::NearestEven && !amax_only;
        let hadamard = side.size();
        let Side { spec, three_quarters, .. } = *side;
        variant.sides[*number] = Some(SideVariant { spec, hadamard, stochastic, three_quarters });
        variant.mad |= stochastic && gpu.caps.vendor == NVIDIA;
        lanes = lanes.max(side.spec.block.len() as u32 / UNIT).max(hadamard / UNIT);
        let layout = out.layout;
        let words = &mut params[4 + SIDE_WORDS * number..][..SIDE_WORDS];
        words[..4].copy_from_slice(&side.hadamard.map_or([0; 4], Hadamard::signs));
        words[4..8].copy_from_slice(&rng::key(side.rounding));
        words[8] = (layout.blocks() * layout.spec.block.len()) as u32 / UNIT;
        words[9] = layout.blocks() as u32;
        words[10] = side.carry(layout.axis);
        buffers.extend(out.bindings()?);
    }
    variant.subgroup = lanes > 1 && !amax_only && gpu.has_subgroups(lanes);
    if let Some(clip) = guards.clip {
        buffers.push(clip.binding()?);
    }
    if let Some(skip) = guards.skip {
        buffers.push(skip.binding()?);
    }
    if let Some(counters) = counters {
        buffers.push(counters.binding()?);
    }
    let [tile_rows, tile_cols] = variant.tile();
    let tiles = rows.div_ceil(tile_rows as usize) * x.cols.div_ceil(tile_cols as usize);
    let groups = (matrices * tiles) as u64;
    stream.dispatch(&variant.name(), || variant.kernel(), &params, &buffers, groups)
}

// ---- The twin ------------------------------------------------------------------------------------------------------

/// The shader's SMALLEST and TOO_LARGE: 2⁻⁹⁸ and 2¹²⁰.
const SMALLEST: f32 = f32::from_bits(0x0e80_0000);
const TOO_LARGE: f32 = f32::from_bits(0x7b80_0000);

/// Elements of `x` as its sides see them.
struct Guarded<'a> {
    x: &'a [f32],
    cols: usize,
    clip: u32,
    skip: &'a [u32],
}

impl Guarded<'_> {
    fn copy(&self, row: usize, col: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.x[row * self.cols + col..][..out.len()]);
        if self.clip < INFINITY {
            for v in &mut *out {
                let magnitude = v.to_bits() & 0x7fff_ffff;
                if magnitude > self.clip && magnitude < INFINITY {
                    *v = f32::from_bits(v.to_bits() & 0x8000_0000 | self.clip);
                }
            }
        }
        if !self.skip.is_empty() {
            for (col, v) in (col..).zip(out) {
                if self.skip[col / 32] >> (col % 32) & 1 == 1 {
                    *v = 0.0;
                }
            }
        }
    }
}

/// Lines that are laid out together: of columns, two groups of random bits and a cache line of x.
const ABREAST: usize = 16;

impl Job<'_> {
    /// Lays the lines out one behind the other, padded to whole blocks, transforms them, and packs them as [`Quantize`]'s
    /// twin packs rows. Returns the side's counts, if asked to.
    ///
    /// [`Quantize`]: super::Quantize
    fn twin(&mut self, x: &Tensor, values: &[f32], guards: &Guards<'_>, count: bool) -> [u32; 4] {
        let layout = self.out.layout;
        let columns = self.number == 1;
        // Lines of columns are those of one matrix after the other.
        let matrices = if columns { self.matrices } else { 1 };
        let rows = x.rows / matrices;
        let guarded = |matrix| Guarded {
            x: &values[matrix * rows * x.cols..],
            cols: x.cols,
            clip: guards.clip.map_or(INFINITY, |clip| clip.data.cpu()[0] & 0x7fff_ffff),
            skip: guards.skip.map_or(&[], |skip| skip.data.cpu()),
        };
        let padded = layout.blocks() * layout.spec.block.len();
        let of_matrix = layout.lines() / matrices * padded;
        let as_it_is = !columns
            && self.side.hadamard.is_none()
            && !self.side.three_quarters
            && guards.clip.is_none()
            && guards.skip.is_none()
            && padded == x.cols;
        let lines: Cow<'_, [f32]> = match as_it_is {
            true => values.into(),
            false => {
                let mut lines = vec![0f32; layout.lines() * padded];
                for (matrix, lines) in lines.chunks_exact_mut(of_matrix).enumerate() {
                    let guarded = guarded(matrix);
                    parallel(lines, ABREAST * padded, |chunk, lines| {
                        self.lay_out(&guarded, chunk * ABREAST, padded, lines);
                        if self.side.three_quarters {
                            lines.iter_mut().for_each(|v| *v *= 0.75);
                        }
                    });
                }
                lines.into()
            }
        };
        let mut draws = Vec::new();
        if let (true, Some(bits)) = (columns, RoundingBits::new(self.side.rounding, x.cols)) {
            draws = vec![0u16; lines.len()];
            for (matrix, lines) in draws.chunks_exact_mut(of_matrix).enumerate() {
                parallel(lines, ABREAST * padded, |chunk, lines| {
                    let mut tile = [[0; ABREAST]; ABREAST];
                    for start in (0..rows).step_by(ABREAST) {
                        let tile = &mut tile[..ABREAST.min(rows - start)];
                        for (t, rows_of) in
                            (matrix * rows + start..).step_by(4).zip(tile.chunks_mut(4))
                        {
                            for g in 0..ABREAST / 8 {
                                let group = chunk * ABREAST / 8 + g;
                                let of: [_; 4] = std::array::from_fn(|i| (t + i, group));
                                for (row, halves) in rows_of.iter_mut().zip(bits.groups(of)) {
                                    row[8 * g..8 * g + 8].copy_from_slice(&halves);
                                }
                            }
                        }
                        transpose(tile, lines, padded, start);
                    }
                });
            }
        }
        let desc = self.side.desc(layout.axis);
        let carry = self.side.carry(layout.axis);
        pack_lines(&desc, carry, &lines, (!draws.is_empty()).then_some(&draws), self.out);
        if count { self.count(&lines, padded) } else { [0; 4] }
    }

    /// The lines from `first` on, as many as `lines` has room for, at most [`ABREAST`].
    fn lay_out(&self, guarded: &Guarded<'_>, first: usize, padded: usize, lines: &mut [f32]) {
        let layout = self.out.layout;
        let len = layout.line_len();
        let here = lines.len() / padded;
        let hadamard = self.side.hadamard;
        let columns = self.number == 1;
        if !columns {
            for (row, line) in (first..).zip(lines.chunks_exact_mut(padded)) {
                guarded.copy(row, 0, &mut line[..len]);
            }
            if hadamard.is_none() {
                return;
            }
        }
        // A position of all lines is a row: so a transform is one of whole rows.
        let mut tile = [[0f32; ABREAST]; 128];
        let size = hadamard.map_or(ABREAST, |hadamard| hadamard.size as usize);
        for start in (0..len).step_by(size) {
            let tile = &mut tile[..size.min(len - start)];
            if columns {
                for (t, row) in (start..).zip(&mut *tile) {
                    guarded.copy(t, first, &mut row[..here]);
                }
            } else {
                for (j, line) in lines.chunks_exact(padded).enumerate() {
                    for (row, v) in tile.iter_mut().zip(&line[start..]) {
                        row[j] = *v;
                    }
                }
            }
            if let Some(hadamard) = hadamard {
                transform(tile, hadamard.signs(), hadamard.factor());
            }
            transpose(tile, lines, padded, start);
        }
    }

    /// The counts, from the values that were encoded and what they became.
    fn count(&self, lines: &[f32], padded: usize) -> [u32; 4] {
        let Layout { spec, .. } = self.out.layout;
        let n = spec.block.len();
        let element = spec.element;
        let codes = bytemuck::cast_slice::<u32, u8>(self.out.codes.cpu());
        let scales = bytemuck::cast_slice::<u32, u8>(self.out.scales.cpu());
        let tensor_scale = f64::from(f32::from_bits(self.out.state.cpu()[2]));
        let mask = if element == Element::Int8 { 0xff } else { (1 << (element.bits() - 1)) - 1 };
        let of_line = |line: usize, values: &[f32]| {
            let mut counts = [0; 4];
            for (b, values) in values.chunks_exact(n).enumerate() {
                let number = line * (padded / n) + b;
                let bytes = self.out.layout.block_bytes();
                let block = &codes[number * bytes..(number + 1) * bytes];
                let scale = scales[number];
                counts[3] += (self.out.layout.line_len() - b * n).min(n) as u32;
                // Powers of two and E4M3's values are exact in f64, and so is all that is made of them.
                let unit = match spec.scale {
                    ScaleFormat::E8M0 if scale == scale::E8M0_NAN => None,
                    ScaleFormat::E8M0 => Some(f64::from(scale::e8m0_to_f32(scale))),
                    ScaleFormat::E4M3 if scale == scale::E4M3_NAN => None,
                    ScaleFormat::E4M3 => {
                        Some(f64::from(Element::E4M3.decode(scale)) * tensor_scale)
                    }
                };
                let Some(unit) = unit else {
                    counts[2] += 1;
                    continue;
                };
                let largest = f64::from(element.max()) * unit;
                counts[0] +=
                    values.iter().map(|v| u32::from(f64::from(v.abs()) > largest)).sum::<u32>();
                counts[1] += match element.bits() {
                    4 => underflows::<4>(values, block, mask),
                    6 => underflows::<6>(values, block, mask),
                    _ => underflows::<8>(values, block, mask),
                };
            }
            counts
        };
        let sum = |a: [u32; 4], b: [u32; 4]| std::array::from_fn(|i| a[i].wrapping_add(b[i]));
        #[cfg(not(target_arch = "wasm32"))]
        {
            use rayon::prelude::*;
            let lines = lines.par_chunks_exact(padded).enumerate();
            lines.map(|(i, line)| of_line(i, line)).reduce(|| [0; 4], sum)
        }
        #[cfg(target_arch = "wasm32")]
        lines.chunks_exact(padded).enumerate().map(|(i, l)| of_line(i, l)).fold([0; 4], sum)
    }
}

/// Values that are not zero, of a block of codes, while their code is.
#[inline(always)]
fn underflows<const BITS: u32>(values: &[f32], block: &[u8], mask: u8) -> u32 {
    let one = |v: f32, code: u8| u32::from((v != 0.0) & (code & mask == 0));
    match BITS {
        4 => {
            let pairs = values.chunks_exact(2).zip(block);
            pairs.map(|(v, byte)| one(v[0], byte & 0xf) + one(v[1], byte >> 4)).sum()
        }
        _ => (values.iter().enumerate()).map(|(i, v)| one(*v, block::unpack(BITS, block, i))).sum(),
    }
}

/// Writes a position a row of all lines to where the lines have it, from position `start` on.
#[inline(always)]
fn transpose<T: Copy>(tile: &[[T; ABREAST]], lines: &mut [T], padded: usize, start: usize) {
    for (j, line) in lines.chunks_exact_mut(padded).enumerate() {
        for (to, row) in line[start..].iter_mut().zip(tile) {
            *to = row[j % ABREAST];
        }
    }
}

/// Runs `f` on pieces of `data` and their numbers, on all cores.
fn parallel<T: Send>(data: &mut [T], piece: usize, f: impl Fn(usize, &mut [T]) + Sync + Send) {
    #[cfg(not(target_arch = "wasm32"))]
    {
        use rayon::prelude::*;
        data.par_chunks_mut(piece).enumerate().for_each(|(i, piece)| f(i, piece));
    }
    #[cfg(target_arch = "wasm32")]
    data.chunks_mut(piece).enumerate().for_each(|(i, piece)| f(i, piece));
}

/// The transform of a group of each line, a position a row: strides from the largest to 1, as in the shader.
fn transform(tile: &mut [[f32; ABREAST]], signs: [u32; 4], factor: f32) {
    // Not (≥ …), so that NaN counts.
    let mut fits = [true; ABREAST];
    for row in &*tile {
        for (fits, v) in fits.iter_mut().zip(row) {
            *fits &= v.abs() < TOO_LARGE;
        }
    }
    for (i, row) in tile.iter_mut().enumerate() {
        let sign = (signs[i / 32] >> (i % 32)) << 31;
        for v in row {
            *v = if v.abs() < SMALLEST { 0.0 } else { f32::from_bits(v.to_bits() ^ sign) };
        }
    }
    let mut stride = tile.len() / 2;
    while stride > 0 {
        for pair in tile.chunks_exact_mut(2 * stride) {
            let (low, high) = pair.split_at_mut(stride);
            for (low, high) in low.iter_mut().zip(high) {
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
        }
        stride /= 2;
    }
    for row in tile {
        for (v, fits) in row.iter_mut().zip(fits) {
            // Plus zero: −0 becomes +0.
            *v = if fits { *v * factor + 0.0 } else { f32::NAN };
        }
    }
}

// ---- The shaders ---------------------------------------------------------------------------------------------------

/// Invocations, one a unit of each side; and elements of a tile.
const WG: u32 = 128;
const TILE: u32 = WG * UNIT;
/// Words of a side's parameters, and of all.
const SIDE_WORDS: usize = 12;
const PARAMS: usize = 4 + 2 * SIDE_WORDS;

/// Rows and columns of a tile that holds whole blocks and groups of the sides, if there is one.
fn tile(sides: &[(usize, Side)]) -> Option<[u32; 2]> {
    let length = |number| {
        let of = |(_, side): &(usize, Side)| side.size().max(side.spec.block.len() as u32);
        sides.iter().filter(|(n, _)| *n == number).map(of).max().unwrap_or(16)
    };
    tile_of(length(0), length(1))
}

/// The same for these lengths along the rows and down the columns. A row of 32 f32 is a line of most caches.
fn tile_of(along: u32, down: u32) -> Option<[u32; 2]> {
    let cols = along.max(32).min(TILE / down);
    (cols >= along).then_some([TILE / cols, cols])
}

#[derive(Clone, Copy, Debug)]
struct SideVariant {
    spec: MxSpec,
    /// The transform's size, or 0.
    hadamard: u32,
    stochastic: bool,
    three_quarters: bool,
}

#[derive(Clone, Copy, Debug)]
struct Variant {
    dtype: DType,
    sides: [Option<SideVariant>; 2],
    mad: bool,
    subgroup: bool,
    clip: bool,
    skip: bool,
    count: bool,
    /// Finds the tensor's largest magnitude, for NVFP4, and encodes nothing.
    amax_only: bool,
}

impl Variant {
    fn tile(&self) -> [u32; 2] {
        let length = |side: Option<SideVariant>| {
            side.map_or(16, |side| side.hadamard.max(side.spec.block.len() as u32))
        };
        // One side alone always has one.
        tile_of(length(self.sides[0]), length(self.sides[1])).unwrap_or([16, 128])
    }

    /// By how many words 32 rows of a tile in workgroup memory are moved on, so that a column's units lie in banks of their own;
    /// and all rows together.
    fn skew(&self) -> [u32; 2] {
        let [rows, _] = self.tile();
        let skew = 32 * UNIT / rows;
        [skew, rows / 32 * skew]
    }

    fn name(&self) -> String {
        let mut name = format!("quantize-both.{}", self.dtype);
        for (side, what) in self.sides.iter().zip(["rows", "columns"]) {
            if let Some(side) = side {
                name += &format!(".{what}-{}", format_name(side.spec));
                if side.hadamard > 0 {
                    name += &format!("-h{}", side.hadamard);
                }
                name += if side.stochastic { "-stochastic" } else { "-nearest" };
                name += if side.three_quarters { "-3/4" } else { "" };
            }
        }
        for (flag, what) in [
            (self.mad, ".mad"),
            (self.subgroup, ".subgroup"),
            (self.clip, ".clip"),
            (self.skip, ".skip"),
            (self.count, ".count"),
            (self.amax_only, ".amax"),
        ] {
            if flag {
                name += what;
            }
        }
        name
    }

    /// A side's namespace; `binding` is the number of its codes.
    fn side(&self, number: usize, side: SideVariant, binding: usize) -> Source {
        let SideVariant { spec, hadamard, stochastic, three_quarters } = side;
        let element = spec.element;
        let [_, tile_cols] = self.tile();
        let tile_rows = TILE / tile_cols;
        let [_, skewed] = self.skew();
        let draws_tile = stochastic && number == 1;
        let magnitude_mask =
            if element == Element::Int8 { 0xff } else { (1 << (element.bits() - 1)) - 1 };
        let factor = Hadamard { size: hadamard.max(16), signs: Signs::None }.factor();
        let access = |at: usize, kind: &str, declaration: &str| {
            format!("@group(0) @binding({}) var<storage, {kind}> {declaration};", binding + at)
        };
        let source = type_constants(format_constants(spec), "X_TYPE", self.dtype)
            .constant("SIDE", number as u32)
            .constant("MAX_FRACTION", element.max_fraction())
            .constant("MAGNITUDE_MASK", magnitude_mask)
            .constant("PARTS", hadamard.max(16) / UNIT)
            .constant(
                "DRAWS",
                if draws_tile { tile_rows * (tile_cols / 2 + 1) + skewed } else { 1 },
            )
            .flag("COLUMNS", number == 1)
            .flag("HADAMARD", hadamard > 0)
            .flag("DRAWS_TILE", draws_tile)
            .flag("AMAX_ONLY", self.amax_only)
            .flag("THREE_QUARTERS", three_quarters)
            .line(&format!("const FACTOR = {factor:?};"))
            .line(&access(0, "read_write", "codes: array<CodesWord>"))
            .line(&access(1, "read_write", "scales: array<atomic<u32>>"))
            .line(&access(2, "read_write", "state: array<atomic<u32>>"));
        let source = codec(source, spec)
            .fragment(if stochastic {
                shader!("lib/round_stochastic.wgsl")
            } else {
                shader!("lib/round_nearest.wgsl")
            })
            .fragment(if self.mad { shader!("lib/add_mad.wgsl") } else { shader!("lib/add.wgsl") })
            .fragment(shader!("lib/threefry.wgsl"))
            .fragment(shader!("lib/unit.wgsl"))
            .fragment(match element.bits() {
                4 => shader!("lib/pack4.wgsl"),
                6 => shader!("lib/pack6.wgsl"),
                _ => shader!("lib/pack8.wgsl"),
            })
            .fragment(match (element, spec.scale) {
                (Element::E2M1, ScaleFormat::E8M0) => shader!("lib/encode_e2m1.wgsl"),
                _ => shader!("lib/encode.wgsl"),
            })
            .fragment(match spec.scale {
                ScaleFormat::E8M0 => shader!("lib/clips_e8m0.wgsl"),
                ScaleFormat::E4M3 => shader!("lib/clips_e4m3.wgsl"),
            })
            .fragment(if self.subgroup {
                shader!("lib/amax_subgroup.wgsl")
            } else {
                shader!("lib/amax_workgroup.wgsl")
            });
        anchors::fragment(source)
            .fragment(shader!("lib/put_scale.wgsl"))
            .fragment(shader!("lib/side.wgsl"))
            .fragment(if self.subgroup {
                shader!("lib/outer_subgroup.wgsl")
            } else {
                shader!("lib/outer_workgroup.wgsl")
            })
    }

    fn kernel(&self) -> Kernel {
        let [tile_rows, tile_cols] = self.tile();
        let [skew, skewed] = self.skew();
        let mut bindings = vec![Binding::Params, Binding::Read];
        // Every index into the tile and the draws is below a constant; into a binding, guarded by the sizes in Params.
        let mut source = Source::new()
            .line(UNCHECKED)
            .constant("WG", WG)
            .constant("TILE", TILE)
            .constant("TILE_ROWS", tile_rows)
            .constant("TILE_COLS", tile_cols)
            .constant("SKEW", skew)
            .constant("SKEWED", skewed)
            .flag("CLIP", self.clip)
            .flag("SKIP", self.skip)
            .fragment(match type_number(self.dtype) {
                0 => shader!("lib/bits_f32.wgsl"),
                _ => shader!("lib/bits_bf16.wgsl"),
            })
            .fragment(if self.subgroup {
                shader!("lib/lanes_subgroup.wgsl")
            } else {
                shader!("lib/lanes_workgroup.wgsl")
            });
        for (number, (side, prefix)) in self.sides.iter().zip(["r_", "c_"]).enumerate() {
            source = match side {
                Some(side) => {
                    let source = source.module(prefix, self.side(number, *side, bindings.len()));
                    bindings.extend([Binding::Write; 3]);
                    source
                }
                None => {
                    source.module(prefix, Source::new().fragment(shader!("lib/side_none.wgsl")))
                }
            };
        }
        let mut bind = |there: bool, kind: Binding, declaration: &str, none: &str| {
            if !there {
                return none.to_string();
            }
            bindings.push(kind);
            let access = if kind == Binding::Read { "read" } else { "read_write" };
            format!(
                "@group(0) @binding({}) var<storage, {access}> {declaration}",
                bindings.len() - 1
            )
        };
        let clip = bind(
            self.clip,
            Binding::Read,
            "clip: array<u32>;\nfn clip_limit() -> u32 { return clip[0] & 0x7fffffffu; }",
            "fn clip_limit() -> u32 { return 0u; }",
        );
        let skip = bind(
            self.skip,
            Binding::Read,
            "skip: array<u32>;\nfn skip_word(i: u32) -> u32 { return skip[i]; }",
            "fn skip_word(i: u32) -> u32 { return 0u; }",
        );
        let counters = bind(self.count, Binding::Write, "counters: array<atomic<u32>>;", "");
        let source = source
            .line(&clip)
            .line(&skip)
            .line(&counters)
            .fragment(if self.count {
                shader!("lib/counters.wgsl")
            } else {
                shader!("lib/counters_none.wgsl")
            })
            .fragment(shader!("quantize_both.wgsl"));
        Kernel {
            name: self.name(),
            wgsl: source.build(),
            bindings,
            workgroup_size: WG,
            features: if self.subgroup {
                wgpu::Features::SUBGROUP
            } else {
                wgpu::Features::empty()
            },
            spirv: false,
        }
    }
}

/// Variants of this file's kernel: every side alone with every transform, and pairs of the named formats, with the other
/// choices, which do not depend on one another, taking turns. All combinations would be a hundred thousand.
pub fn kernels() -> Vec<Kernel> {
    let mut variants = Vec::new();
    let mut add = |sides: [Option<SideVariant>; 2], amax_only: bool| {
        let turn = variants.len();
        let on = |every: usize| turn % every == 1;
        let stochastic = sides.iter().flatten().any(|side| side.stochastic);
        let units = |side: &SideVariant| side.hadamard.max(side.spec.block.len() as u32) / UNIT;
        let shared = sides.iter().flatten().any(|side| units(side) > 1);
        variants.push(Variant {
            dtype: [DType::F32, DType::BF16][turn / 3 % 2],
            sides,
            mad: stochastic && on(5),
            subgroup: on(2) && shared && !amax_only,
            clip: on(7),
            skip: on(11),
            count: on(3) && !amax_only,
            amax_only,
        });
    };
    let side = |spec, hadamard, stochastic| {
        Some(SideVariant { spec, hadamard, stochastic, three_quarters: false })
    };
    for spec in all_specs().into_iter().filter(|spec| spec.block.lines() == 1) {
        for hadamard in [0, 16, 32, 64, 128] {
            for stochastic in [false, true] {
                add([side(spec, hadamard, stochastic), None], false);
                add([None, side(spec, hadamard, stochastic)], false);
            }
            if spec.scale == ScaleFormat::E4M3 {
                add([side(spec, hadamard, false), None], true);
                add([None, side(spec, hadamard, false)], true);
            }
        }
    }
    for (_, a) in crate::formats::NAMED {
        for (_, b) in crate::formats::NAMED {
            add([side(a, 0, false), side(b, 32, true)], false);
            add([side(a, 16, true), side(b, 16, false)], false);
        }
        if a.scale == ScaleFormat::E8M0 {
            let less = |hadamard| {
                side(a, hadamard, true).map(|side| SideVariant { three_quarters: true, ..side })
            };
            add([less(0), less(32)], false);
        }
    }
    variants.iter().map(Variant::kernel).collect()
}
