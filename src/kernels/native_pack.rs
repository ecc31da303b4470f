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
                    codes[line * padded_k + at] = byte.unwrap_or(code >> (bits - 1) << 7);
                }
                Codes::E4m3 { .. } => {}
            }
        }
    }
    let mut scales = Vec::new();
    if let Some(Scales { format, group, layout: order }) = packing.scales {
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
                        (i32::from(scale(line, first)) - anchor as i32 + 127).max(0) as u8
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
fn e4m3(element: Element, code: u8, d: i32) -> Option<u8> {
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
    Kernel {
        name,
        wgsl: source
            .line("@group(0) @binding(5) var<storage, read_write> flags: array<atomic<u32>>;")
            .fragment(shader!("lib/float.wgsl"))
            .operand('a', shader!("lib/operand.wgsl"))
            .operand('a', shader!("lib/operand_codes.wgsl"))
            .fragment("fn k_end() -> u32 { return p.k; }\n")
            .fragment(body)
            .build(),
        bindings: vec![
            Binding::Params,
            Binding::Read,
            Binding::Read,
            Binding::Read,
            Binding::Write,
            Binding::Write,
        ],
        workgroup_size: WORKGROUP,
        features: wgpu::Features::empty(),
        spirv: false,
    }
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
        if spec.block.len() % group == 0 {
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
