//! Recording a product on a GPU, and its kernels.

use super::bytes::{self, Byte};
use super::tier::{self, Fragments, Load, Shape};
use super::{Extras, Input, Matmul, MatmulDesc, Operand, Output, Target, Tier, Values};
use crate::engine::buffer::{Chunk, DType, Rows, STATE_WORDS};
use crate::engine::gpu::{Gpu, Scratch};
use crate::engine::shader::{BF16_FRAGMENTS, Binding, E2M1_CONVERSION, Kernel, Source, shader};
use crate::engine::{Engine, Stream};
use crate::formats::{Block, Element, MxSpec, Rounding, ScaleFormat};
use crate::kernels::{
    QuantizeDesc, UNIT, WORKGROUP, anchors, codec, format_constants, format_name, type_constants,
    type_number,
};
use crate::{Error, Result, rng};

/// A part of an operand that is bound at once.
struct Piece<'a> {
    /// Output indices in the whole tensor.
    first: usize,
    len: usize,
    /// The first one's line in the binding (transposed: position along the lines).
    local: usize,
    buffers: Vec<&'a wgpu::Buffer>,
}

/// An operand with what the shaders want to know of it.
struct Side<'a> {
    pieces: Vec<Piece<'a>>,
    pitch: usize,
    blocks: usize,
    anchors: usize,
}

fn side<'a>(name: &str, input: Input<'a>, transposed: bool) -> Result<Side<'a>> {
    let (rows, pitch, blocks, anchors, outputs): (&Rows, _, _, _, _) = match input {
        Input::Dense(t) => (&t.data, t.cols, 0, 0, if transposed { t.cols } else { t.rows }),
        Input::Mx(t) => {
            let layout = &t.layout;
            let across = if transposed { layout.scale_rows() } else { 0 };
            let outputs = if transposed { layout.line_len() } else { layout.lines() };
            (&t.codes, layout.line_bytes() / 4, layout.blocks(), STATE_WORDS + across, outputs)
        }
    };
    let mut pieces = Vec::new();
    let chunks: Vec<Chunk<'_>> = rows.chunks().collect();
    if transposed && chunks.len() > 1 {
        return Err(Error::TooLarge {
            what: format!(
                "{name}, contracted over its lines, which lie in {} bindings:",
                chunks.len()
            ),
            bytes: rows.bytes() as u64,
            limit: (rows.chunk_rows * rows.row_bytes) as u64,
        });
    }
    for (i, chunk) in chunks.iter().enumerate() {
        let mut buffers = vec![chunk.buffer];
        if let Input::Mx(t) = input {
            buffers.extend(t.scales.chunks().nth(i).map(|scales| scales.buffer));
            buffers.extend(t.state.chunks().next().map(|state| state.buffer));
        }
        let (first, len) = if transposed { (0, outputs) } else { (chunk.first, chunk.rows) };
        pieces.push(Piece { first, len, local: 0, buffers });
    }
    Ok(Side { pieces, pitch, blocks, anchors })
}

impl<'a> Side<'a> {
    /// What of each piece lies within `range`.
    fn within(&self, range: std::ops::Range<usize>) -> Vec<Piece<'a>> {
        self.pieces
            .iter()
            .filter_map(|piece| {
                let first = piece.first.max(range.start);
                let end = (piece.first + piece.len).min(range.end);
                (first < end).then(|| Piece {
                    first,
                    len: end - first,
                    local: first - piece.first,
                    buffers: piece.buffers.clone(),
                })
            })
            .collect()
    }
}

pub(super) fn record(
    matmul: &Matmul,
    stream: &mut Stream<'_>,
    a: Input<'_>,
    b: Input<'_>,
    y: Target<'_>,
    extras: Extras<'_>,
) -> Result<()> {
    let desc = &matmul.desc;
    let MatmulDesc { m, n, k, .. } = *desc;
    let ctx = stream.context().clone();
    let Engine::Gpu(gpu) = ctx.engine() else { return Ok(()) };
    let [a_stack, b_stack, y_stack] = desc.stacks();
    if m * y_stack == 0 || n == 0 {
        return Ok(());
    }
    // The other kernels read a first block, which an empty contraction does not have.
    let tier = if k == 0 { Tier::Alu } else { matmul.tier };
    let sides = [side("A", a, desc.a.transposed)?, side("B", b, desc.b.transposed)?];
    let bound_at_once = sides.iter().all(|side| side.pieces.len() <= 1)
        && match &y {
            Target::Dense(t) => t.data.chunks().count() <= 1,
            Target::Mx(t) => t.codes.chunks().count() <= 1,
        };
    let slice = matmul.slice.filter(|_| bound_at_once);
    let shape = match matmul.forced {
        Some(shape) if k != 0 => shape,
        _ => tier::shape(gpu, desc, tier, slice.is_some()),
    };
    let variant = Variant::new(desc, tier, shape, slice.is_some());
    let way = matmul.bytes.filter(|_| bound_at_once && tier == Tier::Tensor);
    let variants = match way.and_then(|way| variant.windowed(way)) {
        Some(two) if two[0].storage().len() <= most_storage(gpu) => two,
        _ => vec![variant],
    };
    let storage = variants[0].storage().len();
    let limit = most_storage(gpu);
    if storage > limit {
        return Err(Error::Unsupported {
            operation: variants[0].name(),
            needs: format!("{storage} storage buffers in a shader"),
            has: format!("the device has {limit}"),
        });
    }
    let mut ys: Vec<Piece<'_>> = Vec::new();
    let (y_pitch, y_cols, y_blocks) = match &y {
        Target::Dense(t) => {
            for chunk in t.data.chunks() {
                ys.push(Piece {
                    first: chunk.first,
                    len: chunk.rows,
                    local: 0,
                    buffers: vec![chunk.buffer],
                });
            }
            (n, n, 0)
        }
        Target::Mx(t) => {
            let state: Vec<_> = t.state.chunks().map(|chunk| chunk.buffer).collect();
            for buffer in &state {
                stream.clear(buffer);
            }
            for (codes, scales) in t.codes.chunks().zip(t.scales.chunks()) {
                stream.clear(scales.buffer);
                if desc.experts.is_some() {
                    stream.clear(codes.buffer);
                }
                let mut buffers = vec![codes.buffer, scales.buffer];
                buffers.extend(&state);
                ys.push(Piece { first: codes.first, len: codes.rows, local: 0, buffers });
            }
            let padded = t.layout.blocks() * t.layout.spec.block.len();
            (padded / UNIT as usize, padded, t.layout.blocks())
        }
    };
    let mut more: Vec<&wgpu::Buffer> = Vec::new();
    for data in extras.bias.map(|t| &t.data).into_iter().chain(extras.groups.map(|g| &g.data)) {
        more.extend(data.chunks().map(|chunk| chunk.buffer));
    }
    let packed = match (variants[0].bytes(), a, b) {
        (Some((byte, ..)), Input::Mx(a), Input::Mx(b)) => {
            Some(bytes::pack(stream, gpu, desc, byte, [a, b])?)
        }
        _ => None,
    };
    more.extend(packed.as_ref().map(|packed| &packed.windows));
    let whole = bound_at_once;
    if !whole && desc.experts.is_some() {
        return Err(Error::TooLarge {
            what: format!(
                "a grouped product of m = {m}, n = {n}, k = {k}, {b_stack} experts: an operand"
            ),
            bytes: gpu.max_binding + 1,
            limit: gpu.max_binding,
        });
    }
    if let (Some(slice), [yp]) = (slice, &ys[..]) {
        let products = (slice, &variants[..], packed.as_ref());
        return record_sliced(matmul, stream, gpu, products, &sides, &yp.buffers, extras);
    }
    // All batches in one dispatch where everything can be bound at once, one at a time else.
    let (rounds, batches) = if whole { (1, y_stack) } else { (y_stack, 1) };
    for round in 0..rounds {
        let rows = round * m..(round + batches) * m;
        let range = |transposed: bool, each: usize, stack: usize| match transposed {
            true => 0..each,
            false => round * each..(round + if whole { stack } else { 1 }) * each,
        };
        for ap in sides[0].within(range(desc.a.transposed, m, a_stack)) {
            for bp in sides[1].within(range(desc.b.transposed, n, b_stack)) {
                for yp in &ys {
                    // The rows of y that this piece of A makes.
                    let a_rows = match desc.a.transposed || desc.group_k {
                        true => rows.clone(),
                        false => ap.first..ap.first + ap.len,
                    };
                    let first = a_rows.start.max(yp.first);
                    let end = a_rows.end.min(yp.first + yp.len);
                    if first >= end {
                        continue;
                    }
                    let skip = first - a_rows.start;
                    let (dm, dn) = if whole { (m, n) } else { (end - first, bp.len) };
                    let column = if whole || desc.b.transposed { 0 } else { bp.first - round * n };
                    let place = Place {
                        m: dm,
                        n: dn,
                        batches,
                        a: [
                            ap.local + skip,
                            ap.first + skip,
                            if desc.a.transposed { round * k } else { 0 },
                        ],
                        b: [bp.local, bp.first, if desc.b.transposed { round * k } else { 0 }],
                        y_row: first - yp.first,
                        y_global: first,
                        y_col: column,
                        y_pitch,
                        y_cols,
                        y_blocks,
                        slice: 0,
                        sums: 0,
                        windows: packed.as_ref().map_or((0, 0), |p| (p.first, p.stamp)),
                    };
                    let (params, groups) = place.params(desc, tier, shape, &sides, extras);
                    let mut buffers = ap.buffers.clone();
                    buffers.extend(&bp.buffers);
                    buffers.extend(&yp.buffers);
                    buffers.extend(&more);
                    for variant in &variants {
                        variant.dispatch(stream, packed.as_ref(), &params, &buffers, groups)?;
                    }
                }
            }
        }
    }
    match y {
        Target::Mx(t) => anchors::record(stream, t),
        Target::Dense(_) => Ok(()),
    }
}

/// Whether a subgroup loads a tile of one fragment's rows for itself: eight at a time.
fn loads_alone(shape: Shape, load: Load) -> bool {
    let Shape::Tensor { subgroups, fragments, side, .. } = shape else { return false };
    subgroups == [1, 1] && fragments[0] == 1 && side == 16 && load != Load::Columns
}

/// How many storage buffers a kernel may have.
fn most_storage(gpu: &Gpu) -> usize {
    gpu.device.limits().max_storage_buffers_per_shader_stage as usize
}

/// The same with k in slices: their sums, and then what adds them.
fn record_sliced(
    matmul: &Matmul,
    stream: &mut Stream<'_>,
    gpu: &Gpu,
    (slice, products, packed): (usize, &[Variant], Option<&bytes::Packed>),
    sides: &[Side<'_>; 2],
    y: &[&wgpu::Buffer],
    extras: Extras<'_>,
) -> Result<()> {
    let desc = &matmul.desc;
    let (slices, pitch) = (desc.k.div_ceil(slice), desc.n.next_multiple_of(4));
    let sums = gpu.scratch(Scratch::Sums, (slices * desc.m * pitch * 4) as u64)?;
    let place = Place {
        m: desc.m,
        n: desc.n,
        batches: slices,
        a: [0; 3],
        b: [0; 3],
        y_row: 0,
        y_global: 0,
        y_col: 0,
        y_pitch: pitch,
        y_cols: desc.n,
        y_blocks: 0,
        slice,
        sums: pitch / 4,
        windows: packed.map_or((0, 0), |packed| (packed.first, packed.stamp)),
    };
    let inputs: Vec<_> = sides.iter().flat_map(|side| &side.pieces).map(|p| &p.buffers).collect();
    let (params, groups) = place.params(desc, matmul.tier, products[0].shape, sides, extras);
    let mut buffers: Vec<_> = inputs.iter().flat_map(|b| b.iter().copied()).collect();
    buffers.push(&sums);
    buffers.extend(packed.map(|packed| &packed.windows));
    for product in products {
        product.dispatch(stream, packed, &params, &buffers, groups)?;
    }

    let join = Variant::join(desc);
    let place = Place { batches: 1, y_pitch: desc.n, ..place };
    let (params, groups) = place.params(desc, matmul.tier, join.shape, sides, extras);
    // Scales and states, without the codes.
    let mut buffers = vec![&sums];
    buffers.extend(inputs.iter().flat_map(|b| &b[1..]));
    buffers.extend(y);
    buffers.extend(extras.bias.iter().flat_map(|t| t.data.chunks()).map(|chunk| chunk.buffer));
    stream.dispatch(&join.name(), || join.kernel(), &params, &buffers, groups)
}

/// Makes y from sums that something else computed, relative to the anchors and 2^`exponent`: `sums` has m rows of so many
/// elements, a multiple of four. Everything is bound at once.
#[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
#[allow(clippy::too_many_arguments)]
pub(super) fn record_join(
    desc: &MatmulDesc,
    stream: &mut Stream<'_>,
    (sums, pitch): (&wgpu::Buffer, usize),
    exponent: i32,
    a: Input<'_>,
    b: Input<'_>,
    y: &Target<'_>,
    extras: Extras<'_>,
) -> Result<()> {
    let Target::Dense(y) = y else { return Ok(()) };
    let sides = [side("A", a, desc.a.transposed)?, side("B", b, desc.b.transposed)?];
    let join = Variant::join(desc);
    let place = Place {
        m: desc.m,
        n: desc.n,
        batches: 1,
        a: [0; 3],
        b: [0; 3],
        y_row: 0,
        y_global: 0,
        y_col: 0,
        y_pitch: desc.n,
        y_cols: desc.n,
        y_blocks: 0,
        slice: desc.k,
        sums: pitch / 4,
        windows: (0, 0),
    };
    let (mut params, groups) = place.params(desc, Tier::Alu, join.shape, &sides, extras);
    params[EXPONENT] = exponent as u32;
    let mut buffers = vec![sums];
    buffers.extend(sides.iter().flat_map(|side| &side.pieces).flat_map(|p| &p.buffers[1..]));
    buffers.extend(y.data.chunks().map(|chunk| chunk.buffer));
    buffers.extend(extras.bias.iter().flat_map(|t| t.data.chunks()).map(|chunk| chunk.buffer));
    stream.dispatch(&join.name(), || join.kernel(), &params, &buffers, groups)
}

/// The word of `Params` that says what sums count in.
#[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
const EXPONENT: usize = 30;

/// Where a dispatch works.
struct Place {
    m: usize,
    n: usize,
    batches: usize,
    /// Output index 0 in the binding and in the tensor, and k = 0.
    a: [usize; 3],
    b: [usize; 3],
    y_row: usize,
    y_global: usize,
    y_col: usize,
    y_pitch: usize,
    y_cols: usize,
    y_blocks: usize,
    slice: usize,
    /// Quads of a row of sums that are to be joined.
    sums: usize,
    /// Where the windows of B's lines start, and what stands for "outside".
    windows: (usize, u32),
}

impl Place {
    /// The shaders' `Params`, and how many workgroups.
    fn params(
        &self,
        desc: &MatmulDesc,
        tier: Tier,
        shape: Shape,
        sides: &[Side<'_>; 2],
        extras: Extras<'_>,
    ) -> (Vec<u32>, u64) {
        let [bm, bn] = shape.outputs().map(|side| side as usize);
        let groups = extras.groups.map_or(0, |groups| groups.groups);
        // Every group may end within a tile.
        let tiles_m = self.m.div_ceil(bm) + if desc.group_k { 0 } else { groups };
        let tiles_n = self.n.div_ceil(bn);
        let (carry, tensor_scale, rounding) = match &desc.out {
            Output::Dense(_) => (0, 0, Rounding::NearestEven),
            Output::Mx(out) => {
                (out.carry(), out.tensor_scale.unwrap_or(1.0).to_bits(), out.rounding)
            }
        };
        let key = rng::key(rounding);
        let draws = desc.n.div_ceil(8);
        let counter = self.y_global as u64 * draws as u64;
        let stride = |operand: Operand, outputs| if operand.transposed { desc.k } else { outputs };
        let params = [
            self.m,
            self.n,
            desc.k,
            tiles_m,
            tiles_n,
            self.batches,
            groups,
            desc.experts.unwrap_or(1),
            self.a[0],
            self.a[1],
            stride(desc.a, desc.m),
            sides[0].pitch,
            sides[0].blocks,
            sides[0].anchors,
            self.a[2],
            self.b[0],
            self.b[1],
            stride(desc.b, desc.n),
            sides[1].pitch,
            sides[1].blocks,
            sides[1].anchors,
            self.b[2],
            self.y_row,
            self.y_col,
            desc.m,
            self.y_pitch,
            self.y_cols,
            self.y_blocks,
        ];
        let mut params: Vec<u32> = params.iter().map(|p| *p as u32).collect();
        params.extend([desc.alpha.to_bits(), desc.beta.to_bits(), desc.exponent(tier) as u32, 0]);
        params.extend([carry, tensor_scale, self.sums as u32, self.windows.0 as u32]);
        params.extend(key);
        params.extend([counter as u32, (counter >> 32) as u32, draws as u32, self.slice as u32]);
        params.push(self.windows.1);
        (params, tiles_m as u64 * tiles_n as u64 * self.batches as u64)
    }
}

// ---- The shaders ---------------------------------------------------------------------------------------------------

/// A quad for each of 256 invocations.
const JOIN: Shape = Shape::Join { bm: 8, bn: 128 };

/// Bands of this many tiles down are taken across before the next: neighbouring workgroups share operands in the cache.
const RASTER: u32 = 8;

#[derive(Clone, Copy, Debug)]
struct Variant {
    tier: Tier,
    shape: Shape,
    a: Operand,
    b: Operand,
    /// How the operands are read.
    load: [Load; 2],
    /// Whether lines of A and of B fill whole tiles.
    whole: [bool; 2],
    /// Whether A has eight rows at most, in a subgroup's tile of sixteen: the others are not loaded.
    few: bool,
    segments: u32,
    out: Out,
    bias: bool,
    grouped: Grouped,
    /// Whether it is for the tiles that the same kernel in bytes leaves.
    outside: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grouped {
    No,
    Rows,
    K,
    /// Not grouped: k in slices.
    Slices,
}

/// What rows of a dense output are whole multiples of.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ends {
    /// Four elements.
    Quads,
    /// Words.
    Words,
    /// Elements of 16 bits: two rows may share a word.
    Halves,
}

impl Ends {
    fn of(dtype: DType, n: usize) -> Ends {
        match (dtype.size(), n % 4) {
            (_, 0) => Ends::Quads,
            (2, 1 | 3) => Ends::Halves,
            _ => Ends::Words,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Out {
    Dense {
        dtype: DType,
        ends: Ends,
    },
    Mx {
        spec: MxSpec,
        stochastic: bool,
    },
    /// As they are summed, in quads: for [`Shape::Join`].
    Sums,
}

impl Variant {
    /// What adds the slices of a product.
    fn join(desc: &MatmulDesc) -> Variant {
        let product = Variant::new(desc, Tier::Alu, JOIN, false);
        Variant { load: [Load::Words; 2], ..product }
    }

    fn new(desc: &MatmulDesc, tier: Tier, shape: Shape, sliced: bool) -> Variant {
        let vectors = matches!(shape, Shape::Tensor { .. } | Shape::Skinny { halves: true, .. });
        let fragments = matches!(shape, Shape::Tensor { .. });
        let load = |operand: &Operand, outputs| match (vectors, tier) {
            (true, Tier::Exact) if fragments => tier::load_exact(operand, desc.k),
            (true, _) => tier::load(operand, desc.k, outputs),
            _ => Load::Words,
        };
        let [bm, bn] = shape.outputs().map(|side| side as usize);
        let tensor = matches!(shape, Shape::Tensor { .. });
        let load = [load(&desc.a, desc.m), load(&desc.b, desc.n)];
        Variant {
            tier,
            shape,
            a: desc.a,
            b: desc.b,
            load,
            few: desc.m <= 8 && loads_alone(shape, load[0]),
            whole: [
                tensor && (desc.experts.is_none() || desc.group_k) && desc.m.is_multiple_of(bm),
                tensor && desc.n.is_multiple_of(bn),
            ],
            segments: if tier == Tier::Exact { tier::segments(desc) } else { 1 },
            out: match desc.out {
                Output::Dense(_) if sliced => Out::Sums,
                Output::Dense(dtype) => Out::Dense { dtype, ends: Ends::of(dtype, desc.n) },
                Output::Mx(QuantizeDesc { spec, rounding, .. }) => {
                    Out::Mx { spec, stochastic: rounding != Rounding::NearestEven }
                }
            },
            bias: desc.bias && !sliced,
            grouped: match (desc.experts, desc.group_k) {
                (None, _) if sliced => Grouped::Slices,
                (None, _) => Grouped::No,
                (Some(_), false) => Grouped::Rows,
                (Some(_), true) => Grouped::K,
            },
            outside: false,
        }
    }

    /// Two that share its tiles: in bytes those whose lines allow it, and in f16 the others (for a test: not at all).
    fn windowed(&self, way: bytes::Way) -> Option<Vec<Variant>> {
        let Shape::Tensor { subgroups, fragments, slices, side: 16, by } = self.shape else {
            return None;
        };
        let emulated = by.matrices() == Fragments::Emulated;
        if by == Fragments::Wgsl || emulated != way.emulated {
            return None;
        }
        let bytes::ByteMatrices { byte, k } = way.matrices;
        let by = Fragments::Bytes { byte, k, emulated };
        let shape = Shape::Tensor { subgroups, fragments, slices, side: 16, by };
        // However it is read: it is packed first.
        let mut list = vec![Variant { shape, load: [Load::Vectors; 2], ..*self }];
        if !way.alone {
            list.push(Variant { outside: true, ..*self });
        }
        Some(list)
    }

    /// Whether [`Variant::windowed`] is for it.
    fn is_for_bytes(&self) -> bool {
        self.tier == Tier::Tensor && !self.few && bytes::lack(self.a, self.b).is_none()
    }

    /// Fragments of bytes: of which, positions that they contract, and whether they are emulated.
    fn bytes(&self) -> Option<(Byte, u32, bool)> {
        match self.shape {
            Shape::Tensor { by: Fragments::Bytes { byte, k, emulated }, .. } => {
                Some((byte, k, emulated))
            }
            _ => None,
        }
    }

    /// Whether VK_EXT_shader_ocp_microscaling_types converts E2M1 operands; then whether that is emulated.
    fn ocp(&self) -> Option<bool> {
        match self.shape {
            Shape::Tensor { by: Fragments::Ocp { emulated }, .. } => Some(emulated),
            _ => None,
        }
    }

    /// The same with such conversions, if there is an operand for them.
    fn converting(&self) -> Option<Variant> {
        let Shape::Tensor { subgroups, fragments, slices, side, by } = self.shape else {
            return None;
        };
        let by = match by {
            Fragments::Spirv => Fragments::Ocp { emulated: false },
            Fragments::Emulated => Fragments::Ocp { emulated: true },
            _ => return None,
        };
        let shape = Shape::Tensor { subgroups, fragments, slices, side, by };
        let converts = |(operand, load): (&Operand, &Load)| {
            matches!(operand.values, Values::Mx(spec) if spec.element == Element::E2M1)
                && *load == Load::Vectors
        };
        let any = [self.a, self.b].iter().zip(&self.load).any(converts);
        (any && self.tier == Tier::Tensor).then_some(Variant { shape, ..*self })
    }

    /// Whether it leaves tiles to another.
    fn is_windowed(&self) -> bool {
        self.outside || self.bytes().is_some()
    }

    /// Records it, with what it was packed to if it is in bytes.
    fn dispatch(
        &self,
        stream: &mut Stream<'_>,
        packed: Option<&bytes::Packed>,
        params: &[u32],
        buffers: &[&wgpu::Buffer],
        groups: u64,
    ) -> Result<()> {
        let instead = match (packed, self.bytes()) {
            (Some(packed), Some(_)) => packed.instead(buffers),
            _ => buffers.to_vec(),
        };
        stream.dispatch(&self.name(), || self.kernel(), params, &instead, groups)
    }

    fn name(&self) -> String {
        let operand = |operand: Operand, load: Load, whole: bool| {
            let values = match operand.values {
                Values::Mx(spec) => format_name(spec),
                Values::Dense(dtype) => dtype.to_string(),
            };
            let transposed = if operand.transposed { "-t" } else { "" };
            let load = match load {
                Load::Words => "",
                Load::Vectors => "-vectors",
                Load::Ragged => "-ragged",
                Load::Columns => "-columns",
                Load::Blocks => "-blocks",
            };
            format!("{values}{transposed}{load}{}", if whole { "-whole" } else { "" })
        };
        let shape = self.shape;
        let out = match self.out {
            Out::Dense { dtype, ends } => format!("{dtype}-{ends:?}").to_lowercase(),
            Out::Mx { spec, stochastic } => {
                format!("{}{}", format_name(spec), if stochastic { "-stochastic" } else { "" })
            }
            Out::Sums => "sums".into(),
        };
        format!(
            "matmul.{}.{shape}{}.{}.{}.{out}{}{}{}",
            self.tier,
            if self.few { "-few" } else { "" },
            operand(self.a, self.load[0], self.whole[0]),
            operand(self.b, self.load[1], self.whole[1]),
            if self.bias { ".bias" } else { "" },
            match self.grouped {
                Grouped::No => "",
                Grouped::Rows => ".grouped",
                Grouped::K => ".grouped-k",
                Grouped::Slices => ".sliced",
            },
            if self.outside { ".outside" } else { "" }
        )
    }

    /// The bindings after the parameters: names, types, and whether they are written.
    fn storage(&self) -> Vec<(String, &'static str, bool)> {
        let mut list = Vec::new();
        let join = matches!(self.shape, Shape::Join { .. });
        if join {
            list.push(("sums".into(), "array<vec4<f32>>", false));
        }
        for (name, operand, load) in [("a", self.a, self.load[0]), ("b", self.b, self.load[1])] {
            if !join {
                let codes = match load {
                    Load::Words | Load::Blocks => "array<u32>",
                    Load::Vectors | Load::Ragged | Load::Columns => "array<vec4<u32>>",
                };
                list.push((format!("{name}_codes"), codes, false));
            }
            if let Values::Mx(_) = operand.values {
                list.push((format!("{name}_scales"), "array<u32>", false));
                list.push((format!("{name}_state"), "array<u32>", false));
            }
        }
        match self.out {
            Out::Dense { dtype, ends } => {
                let ty = match (ends, dtype) {
                    (Ends::Quads, DType::F32) => "array<vec4<u32>>",
                    (Ends::Quads, _) => "array<vec2<u32>>",
                    (Ends::Words, _) => "array<u32>",
                    (Ends::Halves, _) => "array<atomic<u32>>",
                };
                list.push(("y".into(), ty, true));
            }
            Out::Mx { .. } => {
                list.push(("codes".into(), "array<CodesWord>", true));
                list.push(("scales".into(), "array<atomic<u32>>", true));
                list.push(("state".into(), "array<atomic<u32>>", true));
            }
            Out::Sums => list.push(("y".into(), "array<vec4<f32>>", true)),
        }
        if self.bias {
            list.push(("bias".into(), "array<u32>", false));
        }
        if matches!(self.grouped, Grouped::Rows | Grouped::K) {
            list.push(("groups".into(), "array<atomic<u32>>", true));
        }
        if self.is_windowed() {
            list.push(("windows".into(), "array<u32>", false));
        }
        list
    }

    fn bindings(&self) -> Vec<Binding> {
        let storage = self.storage().into_iter();
        let storage = storage.map(|(.., write)| if write { Binding::Write } else { Binding::Read });
        [Binding::Params].into_iter().chain(storage).collect()
    }

    /// Positions of k that `shaders/matmul.wgsl` stages at a time.
    fn stage(&self) -> u32 {
        if self.tier == Tier::Exact { 32 } else { 16 }
    }

    fn workgroup(&self) -> u32 {
        self.shape.workgroup()
    }

    /// Rows of outputs that go through workgroup memory at a time.
    fn strip_rows(&self) -> u32 {
        match self.shape {
            Shape::Tile { .. } => match self.out {
                Out::Mx { spec, .. } if spec.block.lines() > 1 => 32,
                _ => 16,
            },
            Shape::Skinny { m, .. } | Shape::Join { bm: m, .. } => m,
            Shape::Tensor { subgroups, side, .. } => subgroups[0] * side,
        }
    }

    fn kernel(&self) -> Kernel {
        let tensor = matches!(self.shape, Shape::Tensor { .. });
        let join = matches!(self.shape, Shape::Join { .. });
        let bf16 =
            [self.a, self.b].iter().all(|o| o.values == Values::Dense(DType::BF16)) && tensor;
        let mut source = Source::new();
        let (mut features, mut passthrough) = (wgpu::Features::empty(), false);
        let halves = matches!(self.shape, Shape::Skinny { halves: true, .. });
        let bytes = self.bytes();
        if tensor && bytes.is_none() || halves {
            source = source.line("enable f16;");
            features |= wgpu::Features::SHADER_F16;
        }
        if halves {
            // The bits of f16 are taken as they are.
            passthrough = true;
            features |= wgpu::Features::PASSTHROUGH_SHADERS;
        }
        if let Shape::Tensor {
            side,
            by:
                by @ (Fragments::Spirv
                | Fragments::Wgsl
                | Fragments::Ocp { emulated: false }
                | Fragments::Bytes { emulated: false, .. }),
            ..
        } = self.shape
        {
            features |= wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
            source = source.line("enable wgpu_cooperative_matrix;");
            // naga says a matrix loaded from f32 memory is of f32; src/engine/spirv.rs says otherwise.
            let loaded = if by == Fragments::Wgsl { "f16" } else { "f32" };
            for (name, scalar) in [("A", loaded), ("B", loaded), ("C", "f32")] {
                source = source
                    .line(&format!("alias Mat{name} = coop_mat{side}x{side}<{scalar}, {name}>;"));
            }
            if bf16 {
                source = source.line(BF16_FRAGMENTS);
            }
            if let Fragments::Ocp { .. } = by {
                source = source.line(E2M1_CONVERSION);
            }
            if let Some((byte, k, _)) = bytes {
                source = source.line(&format!("{}{k}", byte.fragments()));
            }
            if by != Fragments::Wgsl {
                passthrough = true;
                features |= wgpu::Features::PASSTHROUGH_SHADERS;
            }
        }
        source = source.constant("WG", self.workgroup()).constant("RASTER", RASTER);
        source = match self.shape {
            Shape::Tile { bm, bn, tm, tn } => source
                .constant("BM", bm)
                .constant("BN", bn)
                .constant("TM", tm)
                .constant("TN", tn)
                .constant("UNITS", ((bm + bn) * self.stage() / 8).div_ceil(self.workgroup()))
                .constant("STRIP_ROWS", self.strip_rows()),
            Shape::Join { bm, bn } => source.constant("BM", bm).constant("BN", bn),
            Shape::Skinny { m, rn, .. } => source
                .constant("M", m)
                .constant("RN", rn)
                .constant("PASSES", rn / (WORKGROUP / 32))
                .constant("WORDS", if halves { 16 } else { 8 }),
            Shape::Tensor { subgroups, fragments, slices, side, .. } => source
                .constant("SLICES", slices)
                .constant("SUBGROUPS_M", subgroups[0])
                .constant("SUBGROUPS_N", subgroups[1])
                .constant("FM", fragments[0])
                .constant("FN", fragments[1])
                .constant("FRAGMENT", side)
                .constant("FRAGMENT_K", bytes.map_or(side, |(_, k, _)| k))
                .flag("BYTES", bytes.is_some())
                .constant("PER_UNIT", if bytes.is_some() { 16 } else { 8 })
                .constant("STAGES", if bytes.is_some() { 2 } else { 4 })
                .constant(
                    "A_UNITS",
                    self.shape.outputs()[0]
                        / (self.workgroup() / slices / 4)
                        / if self.few { 2 } else { 1 },
                )
                .constant("B_UNITS", self.shape.outputs()[1] / (self.workgroup() / slices / 4)),
        };
        let same = |a: Operand, b: Operand| match (a.values, b.values) {
            (Values::Mx(a), Values::Mx(b)) => {
                a.element == Element::E2M1 && b.element == Element::E2M1
            }
            _ => false,
        };
        // The same order of positions in both loaders.
        let floats =
            |operand: Operand| matches!(operand.values, Values::Mx(spec) if tier::floats(spec));
        let alike = same(self.a, self.b) || floats(self.a) && floats(self.b);
        source = source
            .constant("SEGMENTS", self.segments)
            .constant("STAGE", self.stage())
            .flag("NIBBLES", same(self.a, self.b))
            .flag("EXACT", self.tier == Tier::Exact)
            .flag("RAGGED", self.load.contains(&Load::Ragged))
            .flag(
                "PAIRS",
                alike
                    && [[Load::Vectors; 2], [Load::Ragged; 2], [Load::Blocks; 2]]
                        .contains(&self.load),
            )
            .flag("BF16", bf16)
            .flag("COUNTS", !self.outside)
            .flag("BIAS", self.bias)
            .flag("GROUPED", self.grouped != Grouped::No)
            .flag("GROUPED_K", self.grouped == Grouped::K);
        source = match self.out {
            Out::Dense { dtype, .. } => type_constants(source, "Y_TYPE", dtype),
            Out::Sums => type_constants(source, "Y_TYPE", DType::F32),
            Out::Mx { spec, .. } => {
                type_constants(source.append(format_constants(spec)), "X_TYPE", DType::F32)
            }
        };
        for (side, (name, operand)) in [('a', self.a), ('b', self.b)].into_iter().enumerate() {
            source = operand_constants(source, name, operand);
            let prefix = name.to_ascii_uppercase();
            source = source
                .flag(&format!("{prefix}_COLUMNS"), self.load[side] == Load::Columns)
                .flag(&format!("{prefix}_WHOLE"), self.whole[side]);
        }
        source = source.line("@group(0) @binding(0) var<uniform> p: Params;");
        for (binding, (name, ty, write)) in (1..).zip(self.storage()) {
            let access = if write { "read_write" } else { "read" };
            source = source.line(&format!(
                "@group(0) @binding({binding}) var<storage, {access}> {name}: {ty};"
            ));
        }
        source = source.fragment(shader!("lib/matmul_params.wgsl"));
        source = match self.out {
            Out::Dense { dtype, ends } => source
                .fragment(shader!("lib/float.wgsl"))
                .fragment(shader!("lib/narrow.wgsl"))
                .fragment(match (ends, dtype) {
                    (Ends::Quads, DType::F32) => shader!("lib/y_quads_f32.wgsl"),
                    (Ends::Quads, _) => shader!("lib/y_quads_16.wgsl"),
                    (Ends::Words, _) => shader!("lib/y_plain.wgsl"),
                    (Ends::Halves, _) => shader!("lib/y_atomic.wgsl"),
                }),
            Out::Sums => source.fragment(shader!("lib/float.wgsl")),
            Out::Mx { spec, stochastic } => codec(source, spec)
                .fragment(if stochastic {
                    shader!("lib/round_stochastic.wgsl")
                } else {
                    shader!("lib/round_nearest.wgsl")
                })
                .fragment(shader!("lib/add.wgsl"))
                .fragment(shader!("lib/threefry.wgsl"))
                .fragment(shader!("lib/unit.wgsl"))
                .fragment(match spec.element.bits() {
                    4 => shader!("lib/pack4.wgsl"),
                    6 => shader!("lib/pack6.wgsl"),
                    _ => shader!("lib/pack8.wgsl"),
                })
                .fragment(shader!("lib/encode.wgsl")),
        };
        if let Some((byte, _, emulated)) = bytes {
            source = bytes::constants(source, byte);
            if emulated {
                source = source.fragment(byte.emulation());
            }
        }
        if tensor && bytes.is_none() || halves {
            source = source
                .fragment(shader!("lib/halves.wgsl"))
                .fragment(shader!("lib/nibble_pair.wgsl"));
        }
        if let Some(emulated) = self.ocp() {
            source = source.fragment(match emulated {
                true => shader!("lib/e2m1_emulated.wgsl"),
                false => shader!("lib/e2m1_ocp.wgsl"),
            });
        }
        for (name, operand, load) in [('a', self.a, self.load[0]), ('b', self.b, self.load[1])] {
            let words = load == Load::Words;
            let fragments: &[&str] = match (operand.values, tensor, self.tier) {
                (Values::Dense(_), ..) if join => &[shader!("lib/operand_dense.wgsl")],
                (Values::Mx(_), ..) if join => &[shader!("lib/operand.wgsl")],
                (Values::Dense(_), true, _) if load == Load::Columns => {
                    &[shader!("lib/operand_dense.wgsl"), shader!("lib/loader_columns.wgsl")]
                }
                (Values::Dense(_), true, _) => &[
                    shader!("lib/operand_dense.wgsl"),
                    match words {
                        true => shader!("lib/dense_words.wgsl"),
                        false => shader!("lib/dense_vectors.wgsl"),
                    },
                    shader!("lib/loader_dense.wgsl"),
                ],
                (Values::Dense(_), false, _) => {
                    &[shader!("lib/operand_dense.wgsl"), shader!("lib/dense_words.wgsl")]
                }
                (Values::Mx(_), true, _) if bytes.is_some() => {
                    &[shader!("lib/operand.wgsl"), shader!("lib/loader_packed.wgsl")]
                }
                (Values::Mx(_), true, _) if words => &[
                    shader!("lib/operand.wgsl"),
                    shader!("lib/operand_codes.wgsl"),
                    shader!("lib/operand_halves.wgsl"),
                    shader!("lib/operand_eight.wgsl"),
                    shader!("lib/loader_open.wgsl"),
                    shader!("lib/loader_eight.wgsl"),
                ],
                (Values::Mx(spec), true, _) if load == Load::Blocks || tier::floats(spec) => &[
                    shader!("lib/operand.wgsl"),
                    shader!("lib/operand_halves.wgsl"),
                    shader!("lib/loader_open.wgsl"),
                    match load {
                        Load::Blocks => shader!("lib/loader_blocks.wgsl"),
                        _ => shader!("lib/loader_bytes.wgsl"),
                    },
                ],
                (Values::Mx(_), true, _) => &[
                    shader!("lib/operand.wgsl"),
                    shader!("lib/operand_halves.wgsl"),
                    match self.ocp() {
                        Some(_) => shader!("lib/nibbles_ocp.wgsl"),
                        None => shader!("lib/nibbles_f16.wgsl"),
                    },
                    shader!("lib/loader_open.wgsl"),
                    shader!("lib/loader_nibbles.wgsl"),
                ],
                (Values::Mx(_), false, Tier::Exact) if !words => &[shader!("lib/operand.wgsl")],
                (Values::Mx(_), false, Tier::Exact) => &[
                    shader!("lib/operand.wgsl"),
                    shader!("lib/operand_codes.wgsl"),
                    shader!("lib/operand_ints.wgsl"),
                ],
                (Values::Mx(_), false, _) => &[
                    shader!("lib/operand.wgsl"),
                    shader!("lib/operand_codes.wgsl"),
                    shader!("lib/operand_values.wgsl"),
                ],
            };
            for fragment in fragments {
                source = source.operand(name, fragment);
            }
        }
        source = source
            .fragment(match self.grouped {
                Grouped::No => shader!("lib/ungrouped.wgsl"),
                Grouped::Rows => shader!("lib/grouped.wgsl"),
                Grouped::K => shader!("lib/grouped_k.wgsl"),
                Grouped::Slices => shader!("lib/sliced_k.wgsl"),
            })
            .fragment(match self.grouped {
                Grouped::No | Grouped::Rows => shader!("lib/k_whole.wgsl"),
                Grouped::K | Grouped::Slices => "",
            })
            .fragment(if self.bias {
                shader!("lib/bias.wgsl")
            } else {
                shader!("lib/bias_none.wgsl")
            })
            .fragment(shader!("lib/finish.wgsl"))
            .fragment(match self.out {
                Out::Dense { ends: Ends::Quads, .. } => shader!("lib/output_quads.wgsl"),
                Out::Dense { .. } => shader!("lib/output_dense.wgsl"),
                Out::Mx { .. } => shader!("lib/output_mx.wgsl"),
                Out::Sums => shader!("lib/output_sums.wgsl"),
            });
        if tensor {
            source = match self.is_windowed() {
                true => source.flag("OUTSIDE", self.outside).fragment(shader!("lib/window.wgsl")),
                false => source.fragment(shader!("lib/window_none.wgsl")),
            };
        }
        source = match (self.shape, self.tier) {
            (Shape::Tile { .. }, Tier::Exact) => {
                source.fragment(shader!("lib/dots_exact.wgsl")).fragment(shader!("matmul.wgsl"))
            }
            (Shape::Tile { .. }, _) => {
                source.fragment(shader!("lib/dots_alu.wgsl")).fragment(shader!("matmul.wgsl"))
            }
            (Shape::Join { .. }, _) => source.fragment(shader!("matmul_join.wgsl")),
            (Shape::Skinny { own: true, .. }, _) => {
                source.fragment(shader!("matmul_skinny_own.wgsl"))
            }
            (Shape::Skinny { halves, .. }, Tier::Exact) => source
                .fragment(if halves {
                    shader!("lib/terms_halves.wgsl")
                } else {
                    shader!("lib/terms_exact.wgsl")
                })
                .fragment(shader!("matmul_skinny.wgsl")),
            (Shape::Skinny { .. }, _) => source
                .fragment(shader!("lib/terms_alu.wgsl"))
                .fragment(shader!("matmul_skinny.wgsl")),
            (Shape::Tensor { by, .. }, _) => coop_fragments(by)
                .iter()
                .fold(source, |source, fragment| source.fragment(fragment))
                .fragment(match (by, self.tier) {
                    (Fragments::Spirv, Tier::Exact) => shader!("lib/multiply_exact.wgsl"),
                    (
                        Fragments::Spirv
                        | Fragments::Ocp { emulated: false }
                        | Fragments::Bytes { emulated: false, .. },
                        _,
                    ) => shader!("lib/multiply.wgsl"),
                    (Fragments::Wgsl, _) => "",
                    (Fragments::Emulated, Tier::Exact) => {
                        shader!("lib/multiply_exact_emulated.wgsl")
                    }
                    (Fragments::Emulated | Fragments::Ocp { .. } | Fragments::Bytes { .. }, _) => {
                        shader!("lib/multiply_emulated.wgsl")
                    }
                })
                .fragment(shader!("matmul_tensor.wgsl")),
        };
        Kernel {
            name: self.name(),
            wgsl: source.build(),
            bindings: self.bindings(),
            workgroup_size: self.workgroup(),
            features,
            spirv: passthrough,
        }
    }
}

/// Workgroup memory, sums, and how they leave: what the fragments of `shaders/lib/multiply*.wgsl` need.
fn coop_fragments(by: Fragments) -> &'static [&'static str] {
    match by {
        Fragments::Spirv | Fragments::Ocp { emulated: false } => &[
            shader!("lib/units_16.wgsl"),
            shader!("lib/strip.wgsl"),
            shader!("lib/sums_coop.wgsl"),
            shader!("lib/coop_f32.wgsl"),
        ],
        Fragments::Bytes { emulated: false, .. } => &[
            shader!("lib/units_16.wgsl"),
            shader!("lib/strip.wgsl"),
            shader!("lib/sums_coop.wgsl"),
            shader!("lib/coop_bytes.wgsl"),
        ],
        Fragments::Wgsl => &[
            shader!("lib/units_f16.wgsl"),
            shader!("lib/sums_coop.wgsl"),
            shader!("lib/coop_f16.wgsl"),
        ],
        Fragments::Emulated | Fragments::Ocp { emulated: true } => &[
            shader!("lib/units_16.wgsl"),
            shader!("lib/strip.wgsl"),
            shader!("lib/sums_emulated.wgsl"),
            shader!("lib/coop_emulated.wgsl"),
        ],
        Fragments::Bytes { emulated: true, .. } => &[
            shader!("lib/units_16.wgsl"),
            shader!("lib/strip.wgsl"),
            shader!("lib/sums_emulated.wgsl"),
            shader!("lib/coop_bytes_emulated.wgsl"),
        ],
    }
}

pub(in crate::kernels) fn operand_constants(
    source: Source,
    name: char,
    operand: Operand,
) -> Source {
    let prefix = name.to_ascii_uppercase();
    let named = |what: &str| format!("{prefix}_{what}");
    let source = source.flag(&named("TRANSPOSED"), operand.transposed);
    match operand.values {
        Values::Dense(dtype) => {
            source.flag(&named("SCALE_E4M3"), false).constant(&named("TYPE"), type_number(dtype))
        }
        Values::Mx(spec) => {
            let element = spec.element;
            // Where f16's exponent stands when it holds the element's.
            let half = match element {
                Element::Int8 => -6,
                _ => 16 - (1 - element.emin() + 1),
            };
            source
                .flag(&named("SCALE_E4M3"), spec.scale == ScaleFormat::E4M3)
                .constant(&named("BITS"), element.bits())
                .constant(&named("MANTISSA_BITS"), element.mantissa_bits())
                .signed(&named("EMIN"), element.emin())
                .constant(&named("MAX_CODE"), element.max_code())
                .flag(&named("INT8"), element == Element::Int8)
                .flag(&named("E5M2"), element == Element::E5M2)
                .signed(&named("HALF"), half)
                .constant(&named("BLOCK"), spec.block.len() as u32)
                .constant(&named("LINES"), spec.block.lines() as u32)
        }
    }
}

/// The kernels that this file can make are beyond counting; these have every operand, output and option at least once with
/// every shape.
pub fn kernels() -> Vec<Kernel> {
    let mx = |element, scale, block| Values::Mx(MxSpec { element, scale, block });
    let mut values: Vec<Values> =
        Element::ALL.map(|element| mx(element, ScaleFormat::E8M0, Block::Vector(32))).into();
    values.push(mx(Element::E2M1, ScaleFormat::E4M3, Block::Vector(16)));
    values.push(mx(Element::E2M1, ScaleFormat::E8M0, Block::Square(32)));
    values.push(mx(Element::E2M3, ScaleFormat::E8M0, Block::Square(16)));
    values.extend(DType::ALL.map(Values::Dense));
    let by = |by| Shape::Tensor { subgroups: [2, 2], fragments: [4, 4], slices: 1, side: 16, by };
    let small = |side, by| Shape::Tensor {
        subgroups: [2, 2],
        fragments: [32 / side, 32 / side],
        slices: 1,
        side,
        by,
    };
    let sliced = |subgroups, fragments, slices| Shape::Tensor {
        subgroups,
        fragments,
        slices,
        side: 16,
        by: Fragments::Spirv,
    };
    let shapes = [
        (Tier::Exact, Shape::Tile { bm: 128, bn: 128, tm: 8, tn: 8 }),
        (Tier::Exact, Shape::Tile { bm: 64, bn: 64, tm: 4, tn: 4 }),
        (Tier::Exact, Shape::Skinny { m: 1, rn: 32, halves: false, own: false }),
        (Tier::Exact, Shape::Skinny { m: 4, rn: 8, halves: false, own: false }),
        (Tier::Exact, Shape::Skinny { m: 1, rn: 32, halves: true, own: false }),
        (Tier::Exact, Shape::Skinny { m: 4, rn: 8, halves: true, own: false }),
        (Tier::Exact, Shape::Skinny { m: 1, rn: 32, halves: true, own: true }),
        (Tier::Exact, Shape::Skinny { m: 2, rn: 16, halves: true, own: true }),
        (Tier::Exact, by(Fragments::Spirv)),
        (Tier::Exact, by(Fragments::Emulated)),
        (Tier::Exact, sliced([2, 2], [4, 2], 1)),
        (Tier::Alu, Shape::Tile { bm: 64, bn: 64, tm: 4, tn: 4 }),
        (Tier::Alu, Shape::Skinny { m: 1, rn: 32, halves: false, own: false }),
        (Tier::Alu, Shape::Skinny { m: 2, rn: 16, halves: false, own: false }),
        (Tier::Tensor, by(Fragments::Spirv)),
        (Tier::Tensor, by(Fragments::Emulated)),
        (Tier::Tensor, small(16, Fragments::Wgsl)),
        (Tier::Tensor, small(8, Fragments::Wgsl)),
        (Tier::Tensor, sliced([2, 2], [4, 4], 2)),
        (Tier::Tensor, sliced([2, 2], [2, 2], 2)),
        (Tier::Tensor, sliced([1, 2], [1, 2], 4)),
    ];
    let mut variants = Vec::new();
    for (tier, shape) in shapes {
        let tensor = tier == Tier::Tensor;
        let exact_fragments = tier == Tier::Exact && matches!(shape, Shape::Tensor { .. });
        let halves = matches!(shape, Shape::Skinny { halves: true, .. });
        let reads = |values| match Operand::from(values) {
            operand if exact_fragments => tier::load_exact(&operand, 128),
            operand if tensor || halves => tier::load(&operand, 128, 128),
            _ => Load::Words,
        };
        let takes = |values: Values| match tier {
            Tier::Exact if halves => {
                reads(values) == Load::Vectors && matches!(values, Values::Mx(_))
            }
            Tier::Exact => tier::integers(values),
            Tier::Tensor => !matches!(values, Values::Dense(DType::F32 | DType::BF16)),
            _ => true,
        };
        let plain = |a: Values, b: Values| Variant {
            tier,
            shape,
            a: a.into(),
            b: b.into(),
            load: [a, b].map(reads),
            whole: [false; 2],
            few: false,
            segments: match (
                tier,
                [a, b].iter().any(|v| matches!(v, Values::Mx(s) if s.block.len() < 32)),
            ) {
                (Tier::Exact, true) => 2,
                _ => 1,
            },
            out: Out::Dense { dtype: DType::F32, ends: Ends::Quads },
            bias: false,
            grouped: Grouped::No,
            outside: false,
        };
        let mxfp4 = values[0];
        for a in values.iter().copied().filter(|v| takes(*v)) {
            for b in values.iter().copied().filter(|v| takes(*v)) {
                variants.push(plain(a, b));
            }
            if !halves && reads(a) != Load::Words {
                variants.push(Variant { load: [Load::Words; 2], ..plain(a, a) });
            }
            if matches!(a, Values::Dense(_)) || matches!(a, Values::Mx(s) if s.block.lines() > 1) {
                let mut variant = plain(mxfp4, a);
                if takes(mxfp4) && !halves {
                    variant.b.transposed = true;
                    variant.load[1] = Load::Words;
                    variants.push(variant);
                    if tensor && matches!(a, Values::Dense(_)) {
                        variants.push(Variant {
                            a: variant.b,
                            load: [Load::Columns; 2],
                            ..variant
                        });
                        variant.b.transposed = false;
                        variants.push(variant);
                    }
                }
            }
        }
        if tensor || exact_fragments {
            variants.push(Variant { whole: [true; 2], ..plain(mxfp4, mxfp4) });
        }
        if tensor {
            let (ragged, words) = (Load::Ragged, Load::Words);
            for load in [[ragged; 2], [ragged, words], [words, ragged]] {
                variants.push(Variant { load, ..plain(mxfp4, mxfp4) });
            }
        }
        if tensor && [Fragments::Spirv, Fragments::Emulated].map(by).contains(&shape) {
            // A tile of a subgroup alone, with half of its rows.
            for a in values.iter().copied().filter(|v| takes(*v)) {
                let plain = plain(a, mxfp4);
                let Shape::Tensor { side, by, .. } = shape else { continue };
                let shape =
                    Shape::Tensor { subgroups: [1, 1], fragments: [1, 2], slices: 2, side, by };
                variants.push(Variant { shape, few: true, ..plain });
            }
        }
        if tensor
            && matches!(shape, Shape::Tensor { by: Fragments::Spirv | Fragments::Emulated, .. })
        {
            let bf16 = plain(Values::Dense(DType::BF16), Values::Dense(DType::BF16));
            let transposed = Operand { transposed: true, ..bf16.a };
            let mixed = Variant { b: transposed, load: [Load::Vectors, Load::Columns], ..bf16 };
            let columns = Variant { a: transposed, load: [Load::Columns; 2], ..mixed };
            let words = Variant { load: [Load::Words; 2], ..bf16 };
            for variant in [bf16, mixed, columns, words] {
                variants.push(variant);
                variants.push(Variant { grouped: Grouped::K, ..variant });
                let (out, grouped) = (Out::Sums, Grouped::Slices);
                variants.push(Variant { out, grouped, ..variant });
            }
        }
        for (bias, grouped) in [(true, Grouped::No), (false, Grouped::Rows), (true, Grouped::Rows)]
        {
            variants.push(Variant { bias, grouped, ..plain(mxfp4, mxfp4) });
        }
        // The kernels for few rows take neither groups nor slices of k.
        if !matches!(shape, Shape::Skinny { .. }) {
            for x in values.iter().copied().filter(|v| takes(*v)) {
                if tier != Tier::Exact && !matches!(shape, Shape::Tensor { slices: 2.., .. }) {
                    let sums = Variant { out: Out::Sums, grouped: Grouped::Slices, ..plain(x, x) };
                    variants.push(sums);
                    variants.push(Variant { load: [Load::Words; 2], ..sums });
                }
                let mut variant = Variant { grouped: Grouped::K, ..plain(x, x) };
                variants.push(variant);
                variants.push(Variant { load: [Load::Words; 2], ..variant });
                if let Values::Dense(_) = x {
                    (variant.a.transposed, variant.b.transposed) = (true, true);
                    variant.load = [if tensor { Load::Columns } else { Load::Words }; 2];
                    variants.push(variant);
                }
            }
        }
        for dtype in DType::ALL {
            for n in [4, 2, 1] {
                let out = Out::Dense { dtype, ends: Ends::of(dtype, n) };
                variants.push(Variant { out, ..plain(mxfp4, mxfp4) });
            }
        }
        let skinny = matches!(shape, Shape::Skinny { .. });
        let packs = !skinny
            && shape.outputs()[1] >= 64
            && !matches!(shape, Shape::Tensor { by: Fragments::Wgsl, .. });
        for spec in crate::kernels::all_specs() {
            for stochastic in [false, true] {
                let square = spec.block.lines() > 1;
                let shape = match shape {
                    Shape::Tile { .. } if square => Shape::Tile { bm: 64, bn: 64, tm: 4, tn: 4 },
                    Shape::Tile { .. } => Shape::Tile { bm: 64, bn: 128, tm: 4, tn: 8 },
                    Shape::Tensor { subgroups: [2, 2], fragments: [4, 4], slices: 1, .. } => shape,
                    _ => continue,
                };
                if packs {
                    let out = Out::Mx { spec, stochastic };
                    variants.push(Variant { out, shape, ..plain(mxfp4, mxfp4) });
                }
            }
        }
    }
    for [a, b] in values.iter().flat_map(|v| [[*v, *v], [values[0], *v], [*v, values[0]]]) {
        for (dtype, n) in
            DType::ALL.into_iter().flat_map(|dtype| [(dtype, 4), (dtype, 2), (dtype, 1)])
        {
            for bias in [false, true] {
                let (a, b) = (a.into(), b.into());
                let desc = MatmulDesc { n, a, b, out: dtype.into(), bias, ..Default::default() };
                variants.push(Variant::join(&desc));
            }
        }
    }
    // Packed outputs are the same whatever decodes.
    let dense = variants
        .iter()
        .filter(|v| v.shape == by(Fragments::Spirv) || v.shape == by(Fragments::Emulated));
    let dense = dense.filter(|v| !matches!(v.out, Out::Mx { .. }));
    let converting: Vec<_> = dense.filter_map(Variant::converting).collect();
    variants.extend(converting);
    let mut windowed = Vec::new();
    for (k, emulated) in [(32, false), (16, false), (32, true)] {
        for way in Byte::ALL.map(|byte| bytes::Way::new(byte, k, emulated)) {
            let those = variants.iter().filter(|v| v.is_for_bytes());
            windowed.extend(those.flat_map(|v| v.windowed(way)));
        }
    }
    variants.extend(windowed.into_iter().flatten());
    let mut names = std::collections::HashSet::new();
    variants.retain(|variant| names.insert(variant.name()));
    variants.iter().map(Variant::kernel).chain(bytes::kernels()).collect()
}
