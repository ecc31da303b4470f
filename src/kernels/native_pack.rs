//! Operands as native routes take them: see [`crate::native`].
//!
//! **Exact**: a value that a route's format does not hold raises a flag. Shaders: `shaders/native_codes.wgsl`,
//! `shaders/native_scales.wgsl`, `shaders/gate.wgsl`.

use super::matmul::{Operand, Values, operand_constants};
use super::{WORKGROUP, format_name};
use crate::engine::Stream;
use crate::engine::buffer::{DeviceMxTensor, STATE_WORDS};
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::formats::element::Element;
use crate::formats::{MxSpec, MxTensor, ScaleFormat};
use crate::native::{Codes, Packing, RouteScale, ScaleLayout, Scales};
use crate::{Error, Result};

/// Where a packed operand goes on a GPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packed<'a> {
    pub(crate) codes: &'a wgpu::Buffer,
    /// Read only if the packing has scales.
    pub(crate) scales: &'a wgpu::Buffer,
    /// Word 0 is set if a value is not held exactly.
    pub(crate) flags: &'a wgpu::Buffer,
}

/// Records the packing of `x`, which is bound at once.
pub(crate) fn record(
    stream: &mut Stream<'_>,
    x: &DeviceMxTensor,
    transposed: bool,
    packing: &Packing,
    out: Packed<'_>,
) -> Result<()> {
    let layout = &x.layout;
    let spec = layout.spec;
    let operand = Operand { values: Values::Mx(spec), transposed };
    let (lines, k) = match transposed {
        false => (layout.lines(), layout.line_len()),
        true => (layout.line_len(), layout.lines()),
    };
    let anchors = STATE_WORDS + if transposed { layout.scale_rows() } else { 0 };
    let inputs = x.bindings()?;
    let common =
        [lines, k, layout.line_bytes() / 4, layout.blocks(), anchors].map(|value| value as u32);
    let [padded_lines, padded_k] = packing.padded(lines, k);
    let vectors = packing.code_bytes(spec, lines, k) / 16;
    let window = match packing.codes {
        Codes::E4m3 { window } => window,
        Codes::Same => 0,
    };
    let line_vectors = vectors / padded_lines.max(1);
    let mut params = common.to_vec();
    params.extend([line_vectors as u32, vectors as u32, window as u32]);
    let e4m3 = packing.codes != Codes::Same;
    debug_assert!(padded_k % 32 == 0);
    stream.dispatch(
        &codes_name(operand, e4m3),
        || codes_kernel(operand, e4m3),
        &params,
        &[inputs[0], inputs[1], inputs[2], out.codes, out.flags],
        (vectors as u64).div_ceil(u64::from(WORKGROUP)),
    )?;
    let Some(scales) = packing.scales else { return Ok(()) };
    let [rows, groups] = packing.scale_shape(lines, k);
    let words = (rows * groups).div_ceil(4);
    let mut params = common.to_vec();
    params.extend([groups as u32, words as u32, 0]);
    stream.dispatch(
        &scales_name(operand, scales),
        || scales_kernel(operand, scales),
        &params,
        &[inputs[0], inputs[1], inputs[2], out.scales, out.flags],
        (words as u64).div_ceil(u64::from(WORKGROUP)),
    )
}

/// A packed operand on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPacked {
    /// The elements.
    pub codes: Vec<u8>,
    /// The scales; empty if the packing has none.
    pub scales: Vec<u8>,
    /// Whether a value is not held exactly.
    pub inexact: bool,
}

/// The twin: packs `x`, contracted along its lines.
pub fn pack(x: &MxTensor, packing: &Packing) -> Result<HostPacked> {
    let layout = x.layout();
    let spec = layout.spec;
    let (lines, k) = (layout.lines(), layout.line_len());
    if spec.element.bits() == 6 && packing.codes == Codes::Same {
        return Err(Error::Mismatch {
            operation: "native_pack::pack",
            problem: format!("{spec}: six-bit codes are taken by no route as they are"),
        });
    }
    let bits = spec.element.bits();
    let anchors = super::anchors::anchors(layout, x.scales());
    let anchor = |line: usize| anchors[line / spec.block.lines()];
    let scale = |line: usize, at: usize| x.scales()[layout.scale_index(line, at)];
    let code = |line: usize, at: usize| {
        let bytes = layout.line_bytes();
        crate::formats::block::unpack(bits, &x.codes()[line * bytes..(line + 1) * bytes], at)
    };
    let [_, padded_k] = packing.padded(lines, k);
    let mut codes = vec![0u8; packing.code_bytes(spec, lines, k)];
    let mut inexact = false;
    for line in 0..lines {
        for at in 0..k {
            let code = code(line, at);
            match packing.codes {
                Codes::Same if bits == 4 => {
                    let at = line * padded_k + at;
                    codes[at / 2] |= code << (4 * (at % 2));
                }
                Codes::Same => codes[line * padded_k + at] = code,
                Codes::E4m3 { window } if anchor(line) != 255 => {
                    let d = i32::from(scale(line, at)) - anchor(line) as i32;
                    let byte = e4m3(spec.element, code, d + window);
                    inexact |= byte.is_none();
                    codes[line * padded_k + at] = byte.unwrap_or(0);
                }
                Codes::E4m3 { .. } => {}
            }
        }
    }
    let mut scales = Vec::new();
    if let Some(Scales { format, group, layout: order }) = packing.scales {
        let group = group.max(1);
        let [rows, groups] = packing.scale_shape(lines, k);
        scales = vec![0u8; (rows * groups).next_multiple_of(4)];
        for line in 0..lines {
            for first in (0..k).step_by(group) {
                let zero = || {
                    (first..k.min(first + group))
                        .all(|at| code(line, at) & (0x7f >> (8 - bits)) == 0)
                };
                let byte = match (format, spec.scale, anchor(line)) {
                    (.., 255) => 0,
                    (_, ScaleFormat::E4M3, _) => scale(line, first) & 0x7f,
                    (RouteScale::E8m0, _, anchor) => {
                        match 127 + i32::from(scale(line, first)) - anchor as i32 {
                            e @ 0.. => e as u8,
                            _ => {
                                inexact |= !zero();
                                0
                            }
                        }
                    }
                    (RouteScale::Ue4m3, _, anchor) => {
                        match 8 + i32::from(scale(line, first)) - anchor as i32 {
                            e @ -6.. => ((e + 7) as u8) << 3,
                            e @ -9..-6 => 1 << (e + 9),
                            _ => {
                                inexact |= !zero();
                                0
                            }
                        }
                    }
                };
                scales[order.offset(groups, line, first / group)] = byte;
            }
        }
    }
    Ok(HostPacked { codes, scales, inexact })
}

/// E4M3's bits of code · 2^d, if it has them.
pub(crate) fn e4m3(element: Element, code: u8, d: i32) -> Option<u8> {
    let bits = element.bits();
    let sign = code >> (bits - 1) << 7;
    let Some((_, k, x)) = element.parts(code) else { return Some(sign | 0x7f) };
    // In units of 2^-9, E4M3's smallest.
    let value = f64::from(k) * f64::from(x + d + 9).exp2();
    let found = (0..0x7fu8).find(|code| {
        let [exponent, fraction] = [code >> 3, code & 7].map(u32::from);
        let significand = if exponent > 0 { fraction | 8 } else { fraction };
        f64::from(significand) * f64::from(exponent.max(1) - 1).exp2() == value
    });
    found.map(|magnitude| sign | magnitude)
}

// ---- The shaders ---------------------------------------------------------------------------------------------------

fn operand_name(operand: Operand) -> String {
    let name = match operand.values {
        Values::Mx(spec) => format_name(spec),
        Values::Dense(dtype) => dtype.to_string(),
    };
    format!("{name}{}", if operand.transposed { "-t" } else { "" })
}

fn codes_name(operand: Operand, e4m3: bool) -> String {
    let form = if e4m3 { "e4m3" } else { "same" };
    format!("native-codes.{}.{form}", operand_name(operand))
}

fn scales_name(operand: Operand, scales: Scales) -> String {
    format!("native-scales.{}.{}", operand_name(operand), scales_form(scales))
}

fn scales_form(Scales { format, group, layout }: Scales) -> String {
    format!("{format:?}.{group}.{layout:?}").to_lowercase()
}

fn source(operand: Operand) -> Source {
    let source = Source::new().constant("WG", WORKGROUP).flag("GROUPED_K", false);
    operand_constants(source, 'a', operand)
        .line("@group(0) @binding(0) var<uniform> p: Params;")
        .line("@group(0) @binding(1) var<storage, read> a_codes: array<u32>;")
        .line("@group(0) @binding(2) var<storage, read> a_scales: array<u32>;")
        .line("@group(0) @binding(3) var<storage, read> a_state: array<u32>;")
}

fn finished(name: String, source: Source, body: &str) -> Kernel {
    let source = source
        .line("@group(0) @binding(5) var<storage, read_write> flags: array<atomic<u32>>;")
        .fragment(shader!("lib/float.wgsl"))
        .operand('a', shader!("lib/operand.wgsl"))
        .operand('a', shader!("lib/operand_codes.wgsl"))
        .fragment("fn k_end() -> u32 { return p.k; }\n")
        .fragment(body);
    let bindings = [Binding::Read, Binding::Read, Binding::Read, Binding::Write, Binding::Write];
    Kernel::portable(name, source, &bindings)
}

fn codes_kernel(operand: Operand, e4m3: bool) -> Kernel {
    let source = source(operand)
        .flag("E4M3", e4m3)
        .line("@group(0) @binding(4) var<storage, read_write> out: array<vec4<u32>>;");
    finished(codes_name(operand, e4m3), source, shader!("native_codes.wgsl"))
}

fn scales_kernel(operand: Operand, scales: Scales) -> Kernel {
    let layout = match scales.layout {
        ScaleLayout::Rows => 0,
        ScaleLayout::Tiles128x4 => 1,
        ScaleLayout::Tiles32x8 => 2,
    };
    let source = source(operand)
        .flag("UE4M3", scales.format == RouteScale::Ue4m3)
        .constant("GROUP", scales.group as u32)
        .constant("LAYOUT", layout)
        .line("@group(0) @binding(4) var<storage, read_write> out: array<u32>;");
    finished(scales_name(operand, scales), source, shader!("native_scales.wgsl"))
}

/// Makes the arguments of a conditional dispatch: [`crate::engine::Gate`].
pub(crate) const GATE: &str = "gate";

pub(crate) fn gate() -> Kernel {
    Kernel {
        name: GATE.into(),
        wgsl: Source::new().fragment(shader!("gate.wgsl")).build(),
        bindings: vec![Binding::Params, Binding::Write, Binding::Write],
        workgroup_size: 1,
        features: wgpu::Features::empty(),
        spirv: false,
    }
}

/// Every variant of this file's kernels that a route asks for.
pub fn kernels() -> Vec<Kernel> {
    let mut kernels = vec![gate()];
    for spec in super::all_specs() {
        let bits = spec.element.bits();
        for transposed in [false, true] {
            if transposed && spec.block.lines() == 1 {
                continue;
            }
            let operand = Operand { values: Values::Mx(spec), transposed };
            let floats = spec.scale == ScaleFormat::E8M0
                && !matches!(spec.element, Element::Int8 | Element::E5M2);
            if floats {
                kernels.push(codes_kernel(operand, true));
            }
            if bits == 6 {
                continue;
            }
            kernels.push(codes_kernel(operand, false));
            for scales in scales_of(spec) {
                kernels.push(scales_kernel(operand, scales));
            }
        }
    }
    kernels
}

/// The scales in which routes can take a format.
fn scales_of(spec: MxSpec) -> Vec<Scales> {
    use ScaleLayout::{Rows, Tiles32x8, Tiles128x4};
    let mut list = Vec::new();
    let mut add = |format, group, layouts: &[ScaleLayout]| {
        if spec.block.len().is_multiple_of(group) {
            list.extend(layouts.iter().map(|layout| Scales { format, group, layout: *layout }));
        }
    };
    if spec.scale == ScaleFormat::E8M0 {
        add(RouteScale::E8m0, 32, &[Rows, Tiles128x4, Tiles32x8]);
    }
    if spec.element == Element::E2M1 {
        add(RouteScale::Ue4m3, 16, &[Tiles128x4]);
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Engine;
    use crate::formats::{Block, Layout};
    use crate::rng::{ROUNDS, threefry4x32};
    use crate::{Axis, Context, Options};

    /// All packings that a route may ask for.
    fn packings(spec: MxSpec) -> Vec<Packing> {
        let mut all = Vec::new();
        let floats = spec.scale == ScaleFormat::E8M0
            && !matches!(spec.element, Element::Int8 | Element::E5M2);
        if floats {
            // The largest that E4M3 allows, and a smaller one.
            let largest = (448.0 / spec.element.max()).log2().floor() as i32;
            for window in [largest, largest - 2] {
                all.push(Packing { codes: Codes::E4m3 { window }, scales: None, lines: 16, k: 32 });
            }
        }
        if spec.element.bits() != 6 {
            for (scales, lines, k) in scales_of(spec)
                .into_iter()
                .zip([(16, 128), (1, 32), (32, 256), (128, 64)])
                .map(|(s, p)| (s, p.0, p.1))
            {
                all.push(Packing { codes: Codes::Same, scales: Some(scales), lines, k });
            }
        }
        all
    }

    /// Random codes, also in the padding, under scales that lie within `spread` binades but for a few, one line in eight NaN.
    fn tensor(spec: MxSpec, lines: usize, k: usize, spread: u32, seed: u32) -> MxTensor {
        let layout = Layout::new(spec, Axis::One, lines, k).unwrap();
        let word = |at: usize, what: u32| {
            threefry4x32::<ROUNDS>([at as u32, what, 0, 0], [seed, 0, 0, 0])[0]
        };
        let mut codes: Vec<u8> = (0..layout.codes_len()).map(|at| word(at, 0) as u8).collect();
        // Some blocks of zeros, which may have any scale.
        let bytes = layout.block_bytes();
        for block in codes.chunks_exact_mut(bytes).step_by(5) {
            block.fill(0);
        }
        let blocks = layout.blocks();
        let scales = (0..layout.scales_len())
            .map(|at| {
                let draw = word(at, 1) >> 8;
                match spec.scale {
                    ScaleFormat::E4M3 => (draw % 0x7f) as u8,
                    ScaleFormat::E8M0 if at / blocks % 8 == 7 && at % blocks == 0 => 255,
                    // Some lines have a block far above the others.
                    ScaleFormat::E8M0 if spread > 20 && draw % 61 == 0 => {
                        200 + (draw >> 8) as u8 % 55
                    }
                    ScaleFormat::E8M0 if draw % 61 == 0 => (draw >> 8) as u8 % 130,
                    ScaleFormat::E8M0 => 130 - (draw % (spread + 1)) as u8,
                }
            })
            .collect();
        MxTensor::from_parts(layout, codes, scales, 1.0).unwrap()
    }

    /// The same values contracted over their lines: squares have one scale for either.
    fn transpose(x: &MxTensor) -> MxTensor {
        let from = *x.layout();
        let to = Layout::new(from.spec, Axis::One, from.cols, from.rows).unwrap();
        let bits = from.spec.element.bits();
        let mut codes = vec![0; to.codes_len()];
        for (line, out) in codes.chunks_exact_mut(to.line_bytes()).enumerate() {
            let mut values = vec![0; to.line_bytes() * 8 / bits as usize];
            for (at, value) in values.iter_mut().enumerate().take(to.cols) {
                let bytes = from.line_bytes();
                *value =
                    crate::formats::block::unpack(bits, &x.codes()[at * bytes..][..bytes], line);
            }
            crate::formats::block::pack(bits, &values, out);
        }
        let (side, mut scales) = (to.spec.block.lines(), vec![0; to.scales_len()]);
        for line in (0..to.rows).step_by(side) {
            for at in (0..to.cols).step_by(side) {
                scales[to.scale_index(line, at)] = x.scales()[from.scale_index(at, line)];
            }
        }
        MxTensor::from_parts(to, codes, scales, x.tensor_scale()).unwrap()
    }

    /// The largest scale byte of a line, or 255 if any is; 127 where scales are no powers of two.
    fn anchor(x: &MxTensor, line: usize) -> i32 {
        let layout = x.layout();
        if layout.spec.scale == ScaleFormat::E4M3 {
            return 127;
        }
        // A square's lines have one anchor.
        let side = layout.spec.block.lines();
        let scales = (0..layout.blocks()).map(|b| x.scales()[line / side * layout.blocks() + b]);
        scales.max().unwrap_or(127).into()
    }

    /// What a packing means, by values: code · scale · 2^(anchor - 127 - exponent) is the element.
    fn check(x: &MxTensor, packing: &Packing, packed: &HostPacked) {
        let layout = *x.layout();
        let spec = layout.spec;
        let (lines, k) = (layout.lines(), layout.line_len());
        let [padded_lines, padded_k] = packing.padded(lines, k);
        let e4m3 = packing.codes != Codes::Same;
        let bits = if e4m3 { 8 } else { spec.element.bits() as usize };
        assert_eq!(packed.codes.len() * 8, padded_lines * padded_k * bits);
        let element = if e4m3 { Element::E4M3 } else { spec.element };
        let exponent = packing.exponent(spec);
        let mut lost = false;
        let mut seen = vec![false; packed.scales.len()];
        for line in 0..padded_lines {
            for at in 0..padded_k {
                let place = line * padded_k + at;
                let code = match bits {
                    4 => packed.codes[place / 2] >> (4 * (place % 2)) & 15,
                    _ => packed.codes[place],
                };
                let mut scale = 1f64;
                if let Some(Scales { format, group, layout: order }) = packing.scales {
                    let offset = order.offset(padded_k / group, line, at / group);
                    seen[offset] = true;
                    scale = match format {
                        RouteScale::E8m0 => 2f64.powi(i32::from(packed.scales[offset]) - 127),
                        RouteScale::Ue4m3 => f64::from(Element::E4M3.decode(packed.scales[offset])),
                    };
                    if line >= lines || at >= k.next_multiple_of(group) {
                        assert_eq!(packed.scales[offset], 0, "padding of scales, {line} {at}");
                    }
                }
                if line >= lines || at >= k {
                    assert_eq!(code, 0, "padding, {line} {at}");
                    continue;
                }
                let anchor = anchor(x, line);
                if anchor == 255 {
                    continue;
                }
                let bytes = layout.line_bytes();
                let own = crate::formats::block::unpack(
                    spec.element.bits(),
                    &x.codes()[line * bytes..][..bytes],
                    at,
                );
                let byte = x.scales()[layout.scale_index(line, at)];
                let value = f64::from(spec.element.decode(own))
                    * match spec.scale {
                        ScaleFormat::E8M0 => 2f64.powi(i32::from(byte) - anchor),
                        ScaleFormat::E4M3 => f64::from(Element::E4M3.decode(byte)),
                    };
                let got = f64::from(element.decode(code)) * scale * 2f64.powi(-exponent);
                let same = got == value && got.is_sign_negative() == value.is_sign_negative()
                    || got.is_nan() && value.is_nan();
                lost |= !same;
                assert!(
                    same || packed.inexact,
                    "{spec} {packing:?} {line} {at}: {got} instead of {value}"
                );
            }
        }
        assert_eq!(lost, packed.inexact, "{spec} {packing:?}");
        if packing.scales.is_some() {
            let [rows, groups] = packing.scale_shape(lines, k);
            let own = padded_lines * (padded_k / packing.scales.map_or(1, |s| s.group));
            assert_eq!(seen.iter().filter(|seen| **seen).count(), own);
            // What the layout pads besides is zero.
            assert_eq!(packed.scales.len(), (rows * groups).next_multiple_of(4));
            for (byte, _) in packed.scales.iter().zip(&seen).filter(|(_, seen)| !**seen) {
                assert_eq!(*byte, 0);
            }
        }
    }

    const SHAPES: [[usize; 2]; 4] = [[17, 96], [1, 8], [130, 200], [33, 331]];

    #[test]
    fn packed_operands_have_their_values() {
        let mut exact = 0;
        let mut inexact = 0;
        for spec in crate::kernels::all_specs() {
            for packing in packings(spec) {
                for (i, [lines, k]) in SHAPES.into_iter().enumerate() {
                    for spread in [0, 9, 30] {
                        let x = tensor(spec, lines, k, spread, i as u32);
                        let packed = pack(&x, &packing).unwrap();
                        check(&x, &packing, &packed);
                        *(if packed.inexact { &mut inexact } else { &mut exact }) += 1;
                    }
                }
            }
        }
        assert!(exact > 100 && inexact > 100, "{exact} exact, {inexact} not");
    }

    #[test]
    fn values_that_were_moved_are_noticed() {
        let x = tensor(crate::MXFP4, 130, 200, 9, 1);
        let scales =
            Scales { format: RouteScale::E8m0, group: 32, layout: ScaleLayout::Tiles128x4 };
        let packing = Packing { codes: Codes::Same, scales: Some(scales), lines: 16, k: 32 };
        let mut packed = pack(&x, &packing).unwrap();
        packed.scales.swap(4, 20);
        let caught = std::panic::catch_unwind(|| check(&x, &packing, &packed));
        assert!(caught.is_err());
    }

    /// The shaders against the twin, on every adapter.
    #[test]
    fn shaders_pack_as_the_twin() {
        let mode = std::env::var("MX_TEST_GPU").unwrap_or_default();
        let adapters = match &*mode {
            "off" => Vec::new(),
            _ => pollster::block_on(crate::engine::adapters(false)),
        };
        assert!(mode != "require" || !adapters.is_empty(), "MX_TEST_GPU=require, but no adapter");
        for adapter in &adapters {
            let ctx =
                pollster::block_on(Context::on_adapter(adapter, &Options::default())).unwrap();
            for spec in crate::kernels::all_specs() {
                for packing in packings(spec) {
                    for (i, [lines, k]) in SHAPES.into_iter().enumerate() {
                        let x = tensor(spec, lines, k, [9, 0, 30, 14][i], 5);
                        on_device(&ctx, &x, false, &x, &packing);
                        if matches!(spec.block, Block::Square(_)) && i % 2 == 0 {
                            on_device(&ctx, &x, true, &transpose(&x), &packing);
                        }
                    }
                }
            }
        }
    }

    /// Packs `x` on the device and `same`, which is `x` as it is contracted, by the twin.
    fn on_device(
        ctx: &Context,
        x: &MxTensor,
        transposed: bool,
        same: &MxTensor,
        packing: &Packing,
    ) {
        let Engine::Gpu(gpu) = ctx.engine() else { return };
        let want = pack(same, packing).unwrap();
        let make = |bytes: usize, fill: u8| {
            let bytes = bytes.next_multiple_of(16).max(16);
            let buffer = gpu.create_buffer("test", bytes as u64).unwrap();
            gpu.write(&buffer, &vec![fill; bytes]).unwrap();
            buffer
        };
        let buffers = [make(want.codes.len(), 0xa5), make(want.scales.len(), 0xa5), make(16, 0)];
        let [codes, scales, flags] = &buffers;
        let device = ctx.upload_mx(x).unwrap();
        let mut stream = ctx.stream();
        record(&mut stream, &device, transposed, packing, Packed { codes, scales, flags }).unwrap();
        ctx.submit(stream).unwrap();
        let read = |buffer: &wgpu::Buffer, bytes: usize| {
            let mut out = Vec::new();
            let whole = bytes.next_multiple_of(4).max(4) as u64;
            pollster::block_on(gpu.read(buffer, whole, &mut out)).unwrap();
            out.truncate(bytes);
            out
        };
        let got = HostPacked {
            codes: read(codes, want.codes.len()),
            scales: read(scales, want.scales.len()),
            inexact: read(flags, 4) != [0; 4],
        };
        let layout = x.layout();
        assert!(
            got == want,
            "{} {} {}×{} transposed {transposed} {packing:?}: codes {}, scales {}, inexact {} {}",
            ctx.caps().name,
            layout.spec,
            layout.rows,
            layout.cols,
            got.codes == want.codes,
            got.scales == want.scales,
            got.inexact,
            want.inexact
        );
    }
}
