//! Tensors on an engine: [`Tensor`] (dense) and [`DeviceMxTensor`] (packed).
//!
//! Storage is a list of *chunks*, each a whole number of rows and small enough to bind at once; most
//! tensors have one. Chunks end at multiples of [`CHUNK_ROWS`] rows, so that no block and no word of scales
//! lies across two of them.

use super::{Context, Engine};
use crate::formats::element::{INFINITY, NAN};
use crate::formats::{Axis, Layout, MxSpec, ScaleFormat};
use crate::{Error, Result};

/// Chunks of a tensor end at multiples of this many rows: the longest block, and a multiple of four
/// scale bytes.
pub const CHUNK_ROWS: usize = 128;

/// The type of a dense tensor's elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    #[default]
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
}

impl DType {
    /// All three.
    pub const ALL: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

    /// Bytes of an element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// `f32`, `f16` or `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
        }
    }

    /// The f32 bits of the element at `index`; exact.
    #[inline(always)]
    pub(crate) fn f32_bits(self, data: &[u32], index: usize) -> u32 {
        match self {
            DType::F32 => data[index],
            DType::F16 | DType::BF16 => self.widen(data[index / 2] >> (16 * (index % 2)) & 0xffff),
        }
    }

    /// Bits of this type as f32's.
    #[inline(always)]
    pub(crate) fn widen(self, bits: u32) -> u32 {
        match self {
            DType::F32 => bits,
            DType::F16 => half::f16::from_bits(bits as u16).to_f32().to_bits(),
            DType::BF16 => bits << 16,
        }
    }

    /// f32 bits in this type, to nearest even; NaN becomes the canonical one.
    #[inline(always)]
    pub(crate) fn narrow(self, bits: u32) -> u32 {
        let nan = bits & 0x7fff_ffff > INFINITY;
        match self {
            DType::F32 => bits,
            DType::F16 if nan => 0x7e00,
            DType::BF16 if nan => NAN >> 16,
            DType::F16 => u32::from(half::f16::from_f32(f32::from_bits(bits)).to_bits()),
            DType::BF16 => bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16,
        }
    }

    /// [`DType::widen`] of 16-bit elements. The type that training uses is a constant of its loop, which so vectorises.
    pub(crate) fn widen_all(self, halves: &[u16], values: &mut [f32]) {
        let each = |dtype: DType, values: &mut [f32]| {
            for (value, half) in values.iter_mut().zip(halves) {
                *value = f32::from_bits(dtype.widen(u32::from(*half)));
            }
        };
        match self {
            DType::BF16 => each(DType::BF16, values),
            dtype => each(dtype, values),
        }
    }

    /// [`DType::narrow`] to 16-bit elements.
    pub(crate) fn narrow_all(self, values: &[f32], halves: &mut [u16]) {
        let each = |dtype: DType, halves: &mut [u16]| {
            for (half, value) in halves.iter_mut().zip(values) {
                *half = dtype.narrow(value.to_bits()) as u16;
            }
        };
        match self {
            DType::BF16 => each(DType::BF16, halves),
            dtype => each(dtype, halves),
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Rows of bytes on an engine.
#[derive(Debug)]
pub(crate) struct Rows {
    pub(crate) rows: usize,
    pub(crate) row_bytes: usize,
    /// Rows of every chunk but the last; at least 1.
    pub(crate) chunk_rows: usize,
    pub(crate) store: Store,
}

#[derive(Debug)]
pub(crate) enum Store {
    /// The whole, in words; the last one padded.
    Cpu(Vec<u32>),
    /// A buffer a chunk, each padded to words.
    Gpu(Vec<wgpu::Buffer>),
}

impl Rows {
    pub(crate) fn new(
        ctx: &Context,
        what: &str,
        rows: usize,
        row_bytes: usize,
        chunk_rows: usize,
    ) -> Result<Rows> {
        let chunk_rows = chunk_rows.max(1);
        let store = match ctx.engine() {
            Engine::Cpu => {
                let bytes = rows as u64 * row_bytes as u64;
                let words = usize::try_from(bytes.div_ceil(4)).unwrap_or(usize::MAX);
                let mut data = Vec::new();
                data.try_reserve_exact(words)
                    .map_err(|_| Error::OutOfMemory { what: what.into(), bytes })?;
                data.resize(words, 0);
                Store::Cpu(data)
            }
            Engine::Gpu(gpu) => {
                let mut buffers = Vec::new();
                let mut row = 0;
                while row < rows {
                    let n = chunk_rows.min(rows - row);
                    buffers.push(gpu.create_buffer(what, (n * row_bytes) as u64)?);
                    row += n;
                }
                Store::Gpu(buffers)
            }
        };
        Ok(Rows { rows, row_bytes, chunk_rows, store })
    }

    /// (first row, rows, buffer) of every chunk on the GPU.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = Chunk<'_>> {
        let buffers = match &self.store {
            Store::Gpu(buffers) => buffers.as_slice(),
            Store::Cpu(_) => &[],
        };
        buffers.iter().enumerate().map(|(i, buffer)| {
            let first = i * self.chunk_rows;
            Chunk { first, rows: self.chunk_rows.min(self.rows - first), buffer }
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.rows * self.row_bytes
    }

    pub(crate) fn cpu(&self) -> &[u32] {
        match &self.store {
            Store::Cpu(data) => data,
            Store::Gpu(_) => unreachable!("checked when recording"),
        }
    }

    pub(crate) fn cpu_mut(&mut self) -> &mut [u32] {
        match &mut self.store {
            Store::Cpu(data) => data,
            Store::Gpu(_) => unreachable!("checked when recording"),
        }
    }

    /// Writes all bytes.
    pub(crate) fn write(&mut self, ctx: &Context, data: &[u8]) -> Result<()> {
        debug_assert_eq!(data.len(), self.bytes());
        match (&mut self.store, ctx.engine()) {
            (Store::Cpu(words), _) => {
                bytemuck::cast_slice_mut::<u32, u8>(words)[..data.len()].copy_from_slice(data);
                Ok(())
            }
            (Store::Gpu(_), Engine::Gpu(gpu)) => {
                for chunk in self.chunks() {
                    let start = chunk.first * self.row_bytes;
                    gpu.write(chunk.buffer, &data[start..start + chunk.rows * self.row_bytes])?;
                }
                Ok(())
            }
            (Store::Gpu(_), Engine::Cpu) => Err(foreign()),
        }
    }

    /// Reads all bytes.
    pub(crate) async fn read(&self, ctx: &Context) -> Result<Vec<u8>> {
        match (&self.store, ctx.engine()) {
            (Store::Cpu(words), _) => {
                Ok(bytemuck::cast_slice::<u32, u8>(words)[..self.bytes()].to_vec())
            }
            (Store::Gpu(_), Engine::Gpu(gpu)) => {
                let mut data = Vec::new();
                data.try_reserve_exact(self.bytes()).map_err(|_| Error::OutOfMemory {
                    what: "readback on the host".into(),
                    bytes: self.bytes() as u64,
                })?;
                for chunk in self.chunks() {
                    gpu.read(chunk.buffer, (chunk.rows * self.row_bytes) as u64, &mut data).await?;
                }
                Ok(data)
            }
            (Store::Gpu(_), Engine::Cpu) => Err(foreign()),
        }
    }
}

fn foreign() -> Error {
    Error::Mismatch {
        operation: "tensor access",
        problem: "the tensor lives on a GPU, the context is the CPU engine".into(),
    }
}

pub(crate) struct Chunk<'a> {
    pub(crate) first: usize,
    pub(crate) rows: usize,
    pub(crate) buffer: &'a wgpu::Buffer,
}

impl Chunk<'_> {
    /// The rows that two chunks have in common.
    pub(crate) fn overlap(&self, other: &Chunk<'_>) -> std::ops::Range<usize> {
        self.first.max(other.first)..(self.first + self.rows).min(other.first + other.rows)
    }
}

/// A dense row-major matrix on an engine.
#[derive(Debug)]
pub struct Tensor {
    pub(crate) dtype: DType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) data: Rows,
}

impl Tensor {
    pub(crate) fn new(ctx: &Context, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        let row_bytes = checked_row_bytes(dtype, rows, cols)?;
        let chunk_rows = ctx.chunk_rows("a row of a tensor", rows, row_bytes)?;
        let data = Rows::new(ctx, "mx.tensor", rows, row_bytes, chunk_rows)?;
        Ok(Tensor { dtype, rows, cols, data })
    }

    /// A tensor over a buffer of the caller's, with usage `STORAGE` (and `COPY_SRC` to be read back). The
    /// buffer holds `[rows, cols]` from its start, and the device must be `ctx`'s.
    pub fn from_buffer(
        ctx: &Context,
        dtype: DType,
        rows: usize,
        cols: usize,
        buffer: wgpu::Buffer,
    ) -> Result<Tensor> {
        let row_bytes = checked_row_bytes(dtype, rows, cols)?;
        let Engine::Gpu(gpu) = ctx.engine() else { return Err(foreign()) };
        let mismatch = |problem| Err(Error::Mismatch { operation: "Tensor::from_buffer", problem });
        let bytes = (rows as u64 * row_bytes as u64).next_multiple_of(4);
        if buffer.size() < bytes {
            return mismatch(format!(
                "{} bytes, but [{rows}, {cols}] of {dtype} has {bytes}",
                buffer.size()
            ));
        }
        if !buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
            return mismatch(format!("usage {:?} lacks STORAGE", buffer.usage()));
        }
        if buffer.size() > gpu.max_binding {
            return Err(Error::TooLarge {
                what: "a buffer of the caller's".into(),
                bytes: buffer.size(),
                limit: gpu.max_binding,
            });
        }
        let data =
            Rows { rows, row_bytes, chunk_rows: rows.max(1), store: Store::Gpu(vec![buffer]) };
        Ok(Tensor { dtype, rows, cols, data })
    }

    /// The type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Bytes of the elements.
    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }

    /// The buffers that hold it on a GPU, in order, whole rows each; none on the CPU engine.
    pub fn buffers(&self) -> &[wgpu::Buffer] {
        buffers(&self.data)
    }
}

fn buffers(rows: &Rows) -> &[wgpu::Buffer] {
    match &rows.store {
        Store::Gpu(buffers) => buffers,
        Store::Cpu(_) => &[],
    }
}

fn checked_row_bytes(dtype: DType, rows: usize, cols: usize) -> Result<usize> {
    match (rows as u128) * (cols as u128) {
        n if n <= 1 << 48 => Ok(cols * dtype.size()),
        _ => Err(Error::Mismatch {
            operation: "tensor",
            problem: format!("[{rows}, {cols}] has more than 2^48 elements"),
        }),
    }
}

/// What the kernels of training need: f32 or bf16 in rows of whole quads, and one binding.
impl Tensor {
    /// Checks the shape and type; `what` names the tensor in the error.
    pub(crate) fn expect(
        &self,
        operation: &'static str,
        what: &str,
        shape: [usize; 2],
        dtypes: &[DType],
    ) -> Result<()> {
        let mismatch = |problem| Err(Error::Mismatch { operation, problem });
        if self.shape() != shape {
            return mismatch(format!("{what} is {:?}, expected {shape:?}", self.shape()));
        }
        if !dtypes.contains(&self.dtype) {
            let names: Vec<_> = dtypes.iter().map(|dtype| dtype.name()).collect();
            return mismatch(format!("{what} is {}, expected {}", self.dtype, names.join(" or ")));
        }
        Ok(())
    }

    /// The only buffer on a GPU.
    pub(crate) fn binding(&self) -> Result<&wgpu::Buffer> {
        single(&self.data, "a tensor of a training kernel")
    }

    /// The elements on the CPU engine, as f32.
    pub(crate) fn widened(&self) -> std::borrow::Cow<'_, [f32]> {
        let words = self.data.cpu();
        if self.dtype == DType::F32 {
            return bytemuck::cast_slice(&words[..self.rows * self.cols]).into();
        }
        let halves: &[u16] = &bytemuck::cast_slice(words)[..self.rows * self.cols];
        let mut values = vec![0f32; halves.len()];
        #[cfg(not(target_arch = "wasm32"))]
        {
            use rayon::prelude::*;
            const PIECE: usize = 1 << 14;
            values
                .par_chunks_mut(PIECE)
                .zip(halves.par_chunks(PIECE))
                .for_each(|(values, halves)| self.dtype.widen_all(halves, values));
        }
        #[cfg(target_arch = "wasm32")]
        self.dtype.widen_all(halves, &mut values);
        values.into()
    }

    /// Computes every row on the CPU engine, on all cores: `fill` gets its index and what it held.
    pub(crate) fn fill_rows(&mut self, fill: impl Fn(usize, &mut [f32]) + Sync) {
        let (dtype, cols) = (self.dtype, self.cols);
        if self.rows * cols == 0 {
            return;
        }
        let run = |values: &mut Vec<f32>, (row, bytes): (usize, &mut [u8])| {
            if dtype == DType::F32 {
                return fill(row, bytemuck::cast_slice_mut(bytes));
            }
            let halves: &mut [u16] = bytemuck::cast_slice_mut(bytes);
            values.resize(cols, 0.0);
            dtype.widen_all(halves, values);
            fill(row, values);
            dtype.narrow_all(values, halves);
        };
        let size = self.data.bytes();
        let bytes = &mut bytemuck::cast_slice_mut::<u32, u8>(self.data.cpu_mut())[..size];
        #[cfg(not(target_arch = "wasm32"))]
        {
            use rayon::prelude::*;
            let rows = bytes.par_chunks_mut(cols * dtype.size()).enumerate();
            rows.for_each_init(Vec::new, run);
        }
        #[cfg(target_arch = "wasm32")]
        {
            let mut values = Vec::new();
            let rows = bytes.chunks_mut(cols * dtype.size()).enumerate();
            rows.for_each(|row| run(&mut values, row));
        }
    }
}

/// Whole numbers on an engine: tokens, expert ids, offsets.
#[derive(Debug)]
pub struct Ids {
    pub(crate) data: Rows,
}

impl Ids {
    pub(crate) fn new(ctx: &Context, len: usize) -> Result<Ids> {
        ctx.chunk_rows("ids", 1, len * 4)?;
        Ok(Ids { data: Rows::new(ctx, "mx.ids", 1, len * 4, 1)? })
    }

    /// How many.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.data.row_bytes / 4
    }

    /// Writes all of them.
    pub(crate) fn write(&mut self, ctx: &Context, ids: &[u32]) -> Result<()> {
        if ids.len() != self.len() {
            return Err(Error::Mismatch {
                operation: "Ids::write",
                problem: format!("{} ids, expected {}", ids.len(), self.len()),
            });
        }
        self.data.write(ctx, bytemuck::cast_slice(ids))
    }

    /// The only buffer on a GPU.
    pub(crate) fn binding(&self) -> Result<&wgpu::Buffer> {
        single(&self.data, "ids")
    }
}

fn single<'a>(rows: &'a Rows, what: &str) -> Result<&'a wgpu::Buffer> {
    match buffers(rows) {
        [buffer] => Ok(buffer),
        several => Err(Error::Mismatch {
            operation: "record",
            problem: format!("{what} has {} bindings, expected one", several.len()),
        }),
    }
}

/// A packed tensor on an engine; [`crate::MxTensor`] is its counterpart on the host.
#[derive(Debug)]
pub struct DeviceMxTensor {
    pub(crate) layout: Layout,
    pub(crate) codes: Rows,
    pub(crate) scales: Rows,
    /// [0] blocks with NaN or infinity, [1] NVFP4's amax, [2] NVFP4's tensor-wide scale, f32 bits; from [`STATE_WORDS`] on
    /// the anchors, see [`crate::kernels::anchors`].
    pub(crate) state: Rows,
}

/// Words of [`DeviceMxTensor`]'s `state` before the anchors.
pub(crate) const STATE_WORDS: usize = 4;

impl DeviceMxTensor {
    pub(crate) fn new(
        ctx: &Context,
        spec: MxSpec,
        axis: Axis,
        rows: usize,
        cols: usize,
    ) -> Result<DeviceMxTensor> {
        let layout = Layout::new(spec, axis, rows, cols)?;
        let chunk_lines = ctx.chunk_rows("a line of codes", layout.lines(), layout.line_bytes())?;
        let codes = Rows::new(ctx, "mx.codes", layout.lines(), layout.line_bytes(), chunk_lines)?;
        let chunk = chunk_lines.div_ceil(spec.block.lines());
        let scales = Rows::new(ctx, "mx.scales", layout.scale_rows(), layout.blocks(), chunk)?;
        let words = STATE_WORDS + layout.anchors();
        ctx.chunk_rows("the anchors of a tensor", 1, words * 4)?;
        let state = Rows::new(ctx, "mx.state", 1, words * 4, 1)?;
        Ok(DeviceMxTensor { layout, codes, scales, state })
    }

    /// The sizes.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The buffers of codes and of scales on a GPU, in order; none on the CPU engine. Both have the same
    /// number, and hold the same lines.
    pub fn buffers(&self) -> (&[wgpu::Buffer], &[wgpu::Buffer]) {
        (buffers(&self.codes), buffers(&self.scales))
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.codes.bytes() + self.scales.bytes()
    }

    /// The only buffers on a GPU: codes, scales and state.
    pub(crate) fn bindings(&self) -> Result<[&wgpu::Buffer; 3]> {
        Ok([
            single(&self.codes, "a packed tensor of a training kernel")?,
            single(&self.scales, "the scales of a packed tensor")?,
            single(&self.state, "the state of a packed tensor")?,
        ])
    }

    pub(crate) fn tensor_scaled(&self) -> bool {
        self.layout.spec.scale == ScaleFormat::E4M3
    }
}
