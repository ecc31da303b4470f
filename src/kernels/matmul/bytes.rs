//! The tensor tier in bytes: products of E2M1 operands by cooperative matrices of eight bits, where that is exact.
//!
//! | fragments | a code is put as | *window* | exact because |
//! |---|---|--:|---|
//! | E4M3 → f32 | code · 2^(6 + scale − anchor) | 11 | 6 · 2⁶ = 384 of 448 at most; 0.5 · 2⁻⁵ is the smallest normal number |
//! | I8 → i32 | 2 · code · 2^(3 + scale − anchor) | 3 | 12 · 2³ = 96 of 127 at most; sums below 2³¹ for k below 233 000 |
//!
//! A block may lie so many powers of two below its line's anchor. (E4M3 would have three more in subnormals, but
//! VK_EXT_shader_float8 lets a device flush these in products, issue 1 of its appendix.) A tile of outputs is computed in bytes if
//! no line of it has a block outside the window that is not zero, and else by the same kernel in f16: two dispatches, each of
//! which leaves the other's tiles (`shaders/lib/window.wgsl`).
//!
//! Operands are packed before (`shaders/bytes_pack.wgsl`), which also looks for such blocks: decoding codes in every tile anew
//! takes longer than the product itself, measured on an H100, and packing reads and writes each element once. So a product needs
//! (m + n) · k bytes besides its operands, k in whole 128, which all products of a context share.
//!
//! Sums are multiplied by the factors' inverse, exactly, before anything else is done with them: what the two kernels give differs
//! only by what their cooperative matrices make of the same terms. I8's make the exact sum of it, rounded to f32 once. Vulkan
//! does not say how many bits a matrix product in FP8 keeps of its sums; so either's must pass a test before they are used
//! ([`tested`]).

use super::gpu::operand_constants;
use super::tier::{self, SKINNY};
use super::{Matmul, MatmulDesc, Operand, Tier, Values};
use crate::engine::buffer::{DType, DeviceMxTensor, STATE_WORDS};
use crate::engine::gpu::{Gpu, Scratch};
use crate::engine::shader::{Binding, E4M3_FRAGMENTS, I8_FRAGMENTS, Kernel, Source, shader};
use crate::engine::{Context, Engine, Stream};
use crate::formats::{Axis, Element, Layout, ScaleFormat};
use crate::kernels::{WORKGROUP, format_name};
use crate::{MXFP4, MxTensor, Result};

/// What fragments of eight bits hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Byte {
    /// Floats, with f32 sums: VK_EXT_shader_float8.
    E4m3,
    /// Integers, with i32 sums.
    I8,
}

impl Byte {
    pub(crate) const ALL: [Byte; 2] = [Byte::E4m3, Byte::I8];

    /// A block may lie so many powers of two below its line's anchor.
    pub(super) fn window(self) -> u32 {
        match self {
            Byte::E4m3 => 11,
            Byte::I8 => 3,
        }
    }

    /// The exponent of what is held of a one of a block at the anchor.
    fn top(self) -> i32 {
        match self {
            Byte::E4m3 => 6,
            Byte::I8 => 4,
        }
    }

    /// Positions up to which no sum overflows.
    fn longest(self) -> usize {
        match self {
            Byte::E4m3 => usize::MAX,
            Byte::I8 => i32::MAX as usize / (96 * 96),
        }
    }

    /// What an element is, for kernels without cooperative matrices.
    pub(super) fn emulation(self) -> &'static str {
        match self {
            Byte::E4m3 => shader!("lib/byte_e4m3.wgsl"),
            Byte::I8 => shader!("lib/byte_i8.wgsl"),
        }
    }

    /// The line that asks `src/engine/spirv.rs` for them.
    pub(crate) fn fragments(self) -> &'static str {
        match self {
            Byte::E4m3 => E4M3_FRAGMENTS,
            Byte::I8 => I8_FRAGMENTS,
        }
    }
}

impl std::fmt::Display for Byte {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Byte::E4m3 => "E4M3",
            Byte::I8 => "I8",
        })
    }
}

/// Cooperative matrices of 16×16 outputs, of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ByteMatrices {
    pub(crate) byte: Byte,
    /// Positions that a fragment contracts.
    pub(crate) k: u32,
}

/// How a product is computed in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Way {
    pub(super) matrices: ByteMatrices,
    pub(super) emulated: bool,
    /// For tests: the tiles in f16 are left out.
    pub(super) alone: bool,
}

impl Way {
    pub(super) fn new(byte: Byte, k: u32, emulated: bool) -> Way {
        Way { matrices: ByteMatrices { byte, k }, emulated, alone: false }
    }
}

/// The constants of `shaders/lib/nibbles_{e4m3,i8}.wgsl` and `shaders/lib/coop_bytes.wgsl`.
pub(super) fn constants(source: Source, byte: Byte) -> Source {
    let unit = 2f32.powi(-2 * byte.top());
    source.constant("BYTES_WINDOW", byte.window()).line(&format!("const BYTES_UNIT = {unit:?}f;"))
}

/// Why these operands cannot be bytes, if so.
pub(super) fn lack(a: Operand, b: Operand) -> Option<String> {
    [("A", a), ("B", b)].into_iter().find_map(|(name, operand)| match operand.values {
        Values::Mx(spec) if spec.element == Element::E2M1 && spec.scale == ScaleFormat::E8M0 => {
            None
        }
        values => Some(format!("{name} is {values}, not E2M1 under E8M0")),
    })
}

/// How a product of the tensor tier is computed in bytes; if not, why not, where the device has such matrices.
pub(super) fn choose(
    ctx: &Context,
    desc: &MatmulDesc,
    tier: Tier,
) -> std::result::Result<Way, Option<String>> {
    let Engine::Gpu(gpu) = ctx.engine() else { return Err(None) };
    if tier != Tier::Tensor {
        return Err(None);
    }
    let way = match (gpu.emulate_tensor, gpu.emulate_bytes, gpu.byte_matrices) {
        (true, Some(byte), _) => Way::new(byte, 32, true),
        (false, _, Some(ByteMatrices { byte, k })) => Way::new(byte, k, false),
        _ => return Err(None),
    };
    if let Some(lack) = lack(desc.a, desc.b) {
        return Err(Some(lack));
    }
    if desc.m <= SKINNY {
        return Err(Some(format!("m = {} is too few rows", desc.m)));
    }
    let [a_stack, b_stack, y_stack] = desc.stacks();
    let stacked = [(desc.a, a_stack), (desc.b, b_stack)];
    if stacked.iter().any(|(operand, stack)| operand.transposed && *stack > 1) {
        return Err(Some("matrices of a stack are contracted over their lines".into()));
    }
    let lines = [desc.m * a_stack, desc.n * b_stack];
    let most = lines[0].max(lines[1]);
    if packed_bytes([most, desc.k]) as u64 > gpu.max_binding {
        return Err(Some(format!("{most} lines of k = {} as bytes pass a binding", desc.k)));
    }
    let outputs = desc.m * desc.n * y_stack;
    let worth = match gpu.bytes_from {
        Some(from) => outputs as u64 * desc.k as u64 >= from,
        None => way.emulated || pays(outputs, lines[0] + lines[1], desc.k),
    };
    if !worth {
        return Err(Some("packing would take longer than it saves".into()));
    }
    let longest = way.matrices.byte.longest();
    if desc.k > longest {
        return Err(Some(format!("sums of k = {} may overflow, from {longest} on", desc.k)));
    }
    tested(ctx, gpu, way).map(|()| way).map_err(Some)
}

/// Whether so many outputs are worth the packing of so many lines. On an H100 a product in bytes saves a third of the time of one
/// in f16, and packing takes as long as 280 multiply-adds an element, and two dispatches more.
fn pays(outputs: usize, lines: usize, k: usize) -> bool {
    let (outputs, lines, k) = (outputs as f64, lines as f64, k as f64);
    outputs * k > 280.0 * lines * k + 1e10
}

// ---- Packing -------------------------------------------------------------------------------------------------------

/// Lines that an invocation packs a part of.
const LINES: usize = 4;

/// Operands as bytes, a row an output, and a word for every anchor of A and then of B: the product's stamp if a block is outside
/// the window. So nothing needs to be cleared; what another product left, 2³² before, would send a tile to f16, with the same
/// outputs.
pub(super) struct Packed {
    pub(super) bytes: [wgpu::Buffer; 2],
    pub(super) windows: wgpu::Buffer,
    /// Where B's windows start.
    pub(super) first: usize,
    /// What stands for "outside".
    pub(super) stamp: u32,
}

impl Packed {
    /// What a kernel in bytes is bound to instead of `buffers`: codes, scales and state of A, then of B, and others.
    pub(super) fn instead<'a>(&'a self, buffers: &[&'a wgpu::Buffer]) -> Vec<&'a wgpu::Buffer> {
        let mut buffers = buffers.to_vec();
        (buffers[0], buffers[3]) = (&self.bytes[0], &self.bytes[1]);
        buffers
    }
}

/// Output indices and positions of an operand.
fn size(layout: &Layout, transposed: bool) -> [usize; 2] {
    match transposed {
        false => [layout.lines(), layout.line_len()],
        true => [layout.line_len(), layout.lines()],
    }
}

/// Bytes of a packed operand: whole chunks of 128 positions.
fn packed_bytes([outputs, k]: [usize; 2]) -> usize {
    outputs * k.next_multiple_of(128)
}

/// Bytes of a product's packed operands.
pub(super) fn memory(desc: &MatmulDesc) -> usize {
    let [a_stack, b_stack, _] = desc.stacks();
    packed_bytes([desc.m * a_stack + desc.n * b_stack, desc.k])
}

/// Records the packing of both operands, A and B.
pub(super) fn pack(
    stream: &mut Stream<'_>,
    gpu: &Gpu,
    desc: &MatmulDesc,
    byte: Byte,
    [a, b]: [&DeviceMxTensor; 2],
) -> Result<Packed> {
    let anchors = |x: &DeviceMxTensor, operand: Operand| match operand.transposed {
        true => x.layout.blocks(),
        false => x.layout.scale_rows(),
    };
    let first = anchors(a, desc.a);
    let windows = gpu.scratch(Scratch::Windows, ((first + anchors(b, desc.b)) * 4) as u64)?;
    let stamp = gpu.stamp();
    let mut side = |x: &DeviceMxTensor, across: bool, first: usize, what: Scratch| {
        let layout = x.layout;
        let [outputs, k] = size(&layout, across);
        let packed = gpu.scratch(what, packed_bytes([outputs, k]) as u64)?;
        let parts = k.next_multiple_of(128) / 16;
        let params = [
            outputs,
            parts,
            k,
            first,
            stamp as usize,
            layout.line_bytes() / 4,
            layout.blocks(),
            STATE_WORDS + if across { layout.scale_rows() } else { 0 },
        ]
        .map(|p| p as u32);
        let mut buffers: Vec<_> = x.codes.chunks().take(1).map(|chunk| chunk.buffer).collect();
        buffers.extend(x.scales.chunks().take(1).map(|chunk| chunk.buffer));
        buffers.extend(x.state.chunks().take(1).map(|chunk| chunk.buffer));
        buffers.extend([&windows, &packed]);
        let operand = Operand { values: Values::Mx(layout.spec), transposed: across };
        let wide = tier::wide(&operand, k);
        let groups = (outputs.div_ceil(LINES) * parts).div_ceil(WORKGROUP as usize) as u64;
        let name = name(byte, operand, wide);
        stream.dispatch(&name, || kernel(byte, operand, wide), &params, &buffers, groups)?;
        Ok(packed)
    };
    let bytes = [
        side(a, desc.a.transposed, 0, Scratch::BytesA)?,
        side(b, desc.b.transposed, first, Scratch::BytesB)?,
    ];
    Ok(Packed { bytes, windows, first, stamp })
}

fn name(byte: Byte, operand: Operand, wide: bool) -> String {
    let columns = if operand.transposed { ".columns" } else { "" };
    let wide = if wide { ".vectors" } else { "" };
    match operand.values {
        Values::Mx(spec) => format!("bytes-pack.{byte}.{}{columns}{wide}", format_name(spec)),
        Values::Dense(dtype) => format!("bytes-pack.{byte}.{dtype}"),
    }
    .to_lowercase()
}

/// `wide`: lines of whole 128, 8 bytes at a time.
fn kernel(byte: Byte, operand: Operand, wide: bool) -> Kernel {
    let source = Source::new().constant("WG", WORKGROUP).constant("LINES", LINES as u32);
    let source = operand_constants(constants(source, byte), 'a', operand)
        .fragment(shader!("lib/float.wgsl"))
        .operand('a', shader!("lib/operand.wgsl"))
        .operand('a', if wide { "" } else { shader!("lib/operand_codes.wgsl") })
        .fragment(if wide {
            shader!("lib/part_vectors.wgsl")
        } else {
            shader!("lib/part_words.wgsl")
        })
        .operand(
            'a',
            match byte {
                Byte::E4m3 => shader!("lib/nibbles_e4m3.wgsl"),
                Byte::I8 => shader!("lib/nibbles_i8.wgsl"),
            },
        )
        .fragment(shader!("bytes_pack.wgsl"));
    let bindings = [Binding::Read, Binding::Read, Binding::Read, Binding::Write, Binding::Write];
    Kernel::portable(name(byte, operand, wide), source, &bindings)
}

/// Every variant of this file's kernel.
pub(super) fn kernels() -> Vec<Kernel> {
    crate::formats::Block::ALL
        .into_iter()
        .flat_map(|block| {
            let values = Values::Mx(MXFP4.with_block(block));
            let across: &[bool] = if block.lines() > 1 { &[false, true] } else { &[false] };
            let both = across.iter().flat_map(|across| Byte::ALL.map(|byte| (byte, *across)));
            both.flat_map(move |(byte, transposed)| {
                let operand = Operand { values, transposed };
                let ways: &[bool] =
                    if tier::wide(&operand, 128) { &[false, true] } else { &[false] };
                ways.iter().map(move |wide| kernel(byte, operand, *wide))
            })
        })
        .collect()
}

// ---- The test at first use -----------------------------------------------------------------------------------------

/// Whether this device's products in bytes are right: computed once for each context.
fn tested(ctx: &Context, gpu: &Gpu, way: Way) -> std::result::Result<(), String> {
    gpu.bytes_tested
        .get_or_init(|| {
            let result = test(ctx, way);
            if let Err(reason) = &result {
                log::warn!("products in {} are not used: {reason}", way.matrices.byte);
            }
            result
        })
        .clone()
}

#[cfg(target_arch = "wasm32")]
fn test(_: &Context, _: Way) -> std::result::Result<(), String> {
    Err("a browser has none".into())
}

/// Lines and positions of the test's operands.
const SIDE: usize = 64;
const LONG: usize = 256;

/// Operands whose products' terms are multiples of a quarter, with sums below 2²⁴ of it: exact in f32 in any order, and not in
/// sums of fewer bits. Every line has a block at the top of the window, one at its end, and others between.
fn known(byte: Byte) -> Result<[MxTensor; 2]> {
    let window = byte.window() as usize;
    let operand = |side: usize| {
        let layout = Layout::new(MXFP4, Axis::One, SIDE, LONG)?;
        let mut codes = vec![0; layout.codes_len()];
        for (i, code) in codes.iter_mut().enumerate() {
            *code = ((i + side * 77_777) as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3];
        }
        let mut scales = Vec::with_capacity(layout.scales_len());
        for (row, block) in (0..SIDE).flat_map(|row| (0..LONG / 32).map(move |b| (row, b))) {
            // Where one operand's scales spread, the other's are its least.
            let power = match (block / 4 == side, block % 4) {
                (true, 0) => window,
                (true, 2 | 3) => (row + 5 * block) % window,
                _ => 0,
            };
            scales.push(127 + power as u8);
        }
        MxTensor::from_parts(layout, codes, scales, 1.0)
    };
    Ok([operand(0)?, operand(1)?])
}

/// A product of them, compared with its answer in integers.
#[cfg(not(target_arch = "wasm32"))]
fn test(ctx: &Context, way: Way) -> std::result::Result<(), String> {
    let failed = |error: crate::Error| error.to_string();
    let [a, b] = known(way.matrices.byte).map_err(failed)?;
    let desc = MatmulDesc { m: SIDE, n: SIDE, k: LONG, tier: Tier::Tensor, ..Default::default() };
    let matmul = Matmul {
        desc,
        tier: Tier::Tensor,
        why: "its test".into(),
        slice: None,
        #[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
        native: None,
        forced: None,
        bytes: Some(Way { alone: true, ..way }),
    };
    let run = || -> Result<Vec<u8>> {
        let (a, b) = (ctx.upload_mx(&a)?, ctx.upload_mx(&b)?);
        let nothing = vec![0xff; SIDE * SIDE * 4];
        let mut y = ctx.upload(DType::F32, SIDE, SIDE, &nothing)?;
        let mut stream = ctx.stream();
        matmul.record(&mut stream, &a, &b, &mut y)?;
        ctx.submit(stream)?;
        ctx.read_blocking(&y)
    };
    let got: Vec<f32> = bytemuck::pod_collect_to_vec(&run().map_err(failed)?);
    for (at, got) in got.iter().enumerate() {
        let (i, j) = (at / SIDE, at % SIDE);
        // In quarters: a code is a whole number of halves, and no scale is below one.
        let want: i64 =
            (0..LONG).map(|k| (4.0 * f64::from(a.get(i, k)) * f64::from(b.get(j, k))) as i64).sum();
        let want = want as f64 / 4.0;
        if f64::from(*got) != want {
            return Err(format!("its test gave {got:e} at ({i}, {j}) instead of {want:e}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// E4M3 by its definition.
    fn e4m3(byte: u8) -> f64 {
        let (exponent, fraction) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
        assert_ne!(byte & 0x7f, 0x7f, "NaN");
        let magnitude = match exponent {
            0 => fraction * 2f64.powi(-9),
            _ => (8.0 + fraction) * 2f64.powi(exponent - 10),
        };
        if byte & 0x80 == 0 { magnitude } else { -magnitude }
    }

    /// What `shaders/lib/nibbles_e4m3.wgsl` does.
    fn put(code: u32, below: u32) -> u8 {
        let window = Byte::E4m3.window();
        let factor = if below > window { 0 } else { (window + 1 - below) << 3 };
        let m = code & 7;
        let (some, normal) = ((m + 7) >> 3 & 1, (m + 6) >> 3 & 1);
        let magnitude = some * factor + (m << 2 & (normal * 0x1c));
        if factor == 0 { 0 } else { (magnitude | (code << 4 & 0x80)) as u8 }
    }

    #[test]
    fn the_window_is_where_e4m3_is_exact_and_normal() {
        let (window, top) = (Byte::E4m3.window(), Byte::E4m3.top());
        for below in 0..=window {
            for code in 0..16 {
                let byte = put(code, below);
                let want = value(code) * 2f64.powi(top - below as i32);
                assert_eq!(e4m3(byte), want, "{code} {below}");
                assert!(want == 0.0 || byte >> 3 & 15 > 0, "{code} {below}: subnormal");
            }
        }
        // One more at either end: subnormal; more than 448.
        assert!(0.5 * 2f64.powi(top - window as i32 - 1) < 2f64.powi(-6));
        assert!(6.0 * 2f64.powi(top + 1) > 448.0);
        assert_eq!((0..16).map(|code| put(code, window + 1)).max(), Some(0));
    }

    /// What `shaders/lib/nibbles_i8.wgsl` does with a word.
    fn integers(word: u32, below: u32) -> [u32; 2] {
        let window = Byte::I8.window();
        let factor = if below > window { 0 } else { 1 << (window - below) };
        let low = word & 0x3333_3333;
        let both = low & (low >> 1) & 0x1111_1111;
        let upper = (word >> 2 & 0x1111_1111) * 3;
        let m = (word & 0x7777_7777) + (low & upper) + ((both & upper) << 1);
        let negative = m & ((word >> 3 & 0x1111_1111) * 15);
        [0, 4].map(|half| {
            let [m, negative] = [m, negative].map(|x| x >> half & 0x0f0f_0f0f);
            (m * factor + 0x8080_8080 - negative * 2 * factor) ^ 0x8080_8080
        })
    }

    #[test]
    fn integers_are_exact_in_the_window() {
        let (window, top) = (Byte::I8.window(), Byte::I8.top());
        for (below, code, other) in (0..=window + 1)
            .flat_map(|below| (0..256).map(move |codes| (below, codes % 16, codes / 16)))
        {
            // Every pair of neighbours: no byte may change the next.
            let word = (code | other << 4) * 0x0101_0101;
            for (half, code) in [code, other].into_iter().enumerate() {
                let want = match below > window {
                    true => 0.0,
                    false => value(code) * 2f64.powi(top - below as i32),
                };
                for byte in integers(word, below)[half].to_le_bytes() {
                    assert_eq!(f64::from(byte as i8), want, "{word:08x} {below}");
                }
            }
        }
        // Half of one at the window's end is one; the longest sum.
        assert_eq!(0.5 * 2f64.powi(top - window as i32), 1.0);
        let largest = (6.0 * 2f64.powi(top)) as usize;
        assert!(Byte::I8.longest() * largest * largest <= i32::MAX as usize);
    }

    fn value(code: u32) -> f64 {
        let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][code as usize % 8];
        if code < 8 { magnitude } else { -magnitude }
    }

    #[test]
    fn the_test_at_first_use_is_exact_in_f32() {
        for byte in Byte::ALL {
            exact_in_f32(byte);
        }
    }

    fn exact_in_f32(byte: Byte) {
        let [a, b] = known(byte).unwrap();
        let mut most = 0.0f64;
        for (i, j) in (0..SIDE).flat_map(|i| (0..SIDE).map(move |j| (i, j))) {
            let terms = (0..LONG).map(|k| f64::from(a.get(i, k)) * f64::from(b.get(j, k)));
            let (mut sum, mut magnitude) = (0.0, 0.0);
            for term in terms {
                assert_eq!((4.0 * term).fract(), 0.0);
                sum += term;
                magnitude += term.abs();
            }
            assert!(magnitude * 4.0 < 2f64.powi(24));
            most = most.max(f64::abs(sum));
        }
        // Sums that need more than 20 bits are there; of integers, which keep all, some that need more than 8.
        let bits = if byte == Byte::E4m3 { 20 } else { 8 };
        assert!(most * 4.0 > 2f64.powi(bits), "{most}");
    }
}
