//! Between tokens and the slots of [`Routes`]: [`gather`] and [`combine`], and their gradients.
//!
//! Rows are f32 or bf16 of whole quads (columns a multiple of 4); each tensor has its own type. With t a token, s a slot, and
//! w the weights that the router gave:
//!
//! | | |
//! |---|---|
//! | [`gather`] | `xs[s] = x[token_of[s]]`, zero in slots of no token |
//! | [`combine`] | `y[t] = Σ w[t, j] · ys[slot_of[t, j]]` |
//! | [`combine_backward`] | `dys[s] = w · dy[token_of[s]]`, zero in slots of no token; `dw[t, j] = ⟨dy[t], ys[slot_of[t, j]]⟩` |
//! | [`gather_backward`] | `dx[t] = Σ dxs[slot_of[t, j]]` |
//! | [`clear_padding`] | `x[s] = 0` in slots of no token |
//!
//! Sums are f32, those over j in ascending order; no atomics. [`gather`] and [`clear_padding`] are **exact**, but for narrowing to nearest even; the
//! others are bounded.
//! Shaders: `shaders/permute_gather.wgsl`, `permute_combine.wgsl`, `permute_combine_backward.wgsl`,
//! `permute_clear.wgsl`.

use super::WORKGROUP;
use super::router::{MAX_TOP_K, NO_TOKEN, Routes};
use crate::engine::Stream;
use crate::engine::buffer::{DType, Tensor};
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::{Error, Result};

/// The types of rows.
const TYPES: [DType; 2] = [DType::F32, DType::BF16];

/// `xs`, `[slots, C]`, from `x`, `[T, C]`: what the experts read.
pub fn gather(stream: &mut Stream<'_>, routes: &Routes, x: &Tensor, xs: &mut Tensor) -> Result<()> {
    let operation = "permute::gather";
    let [tokens, cols] = rows(operation, routes, x.cols)?;
    x.expect(operation, "x", [tokens, cols], &TYPES)?;
    xs.expect(operation, "xs", [routes.slots(), cols], &TYPES)?;
    same(stream, routes, &[x, xs])?;
    if stream.gpu().is_none() {
        let (x, token_of) = (x.widened(), routes.token_of.data.cpu());
        xs.fill_rows(|slot, row| match token_of[slot] {
            NO_TOKEN => row.fill(0.0),
            token => row.copy_from_slice(&x[token as usize * cols..][..cols]),
        });
        return Ok(());
    }
    let variant = Variant::Gather { x: x.dtype, xs: xs.dtype };
    let quads = routes.slots() as u64 * (cols / 4) as u64;
    stream.dispatch(
        &variant.name(),
        || variant.kernel(),
        &[tokens as u32, cols as u32 / 4, quads as u32],
        &[x.binding()?, routes.token_of.binding()?, xs.binding()?],
        quads.div_ceil(u64::from(STEPS * WORKGROUP)),
    )
}

/// `y`, `[T, C]`, from `ys`, `[slots, C]`, what the experts wrote; `accumulate` adds to what `y` holds.
pub fn combine(
    stream: &mut Stream<'_>,
    routes: &Routes,
    ys: &Tensor,
    y: &mut Tensor,
    accumulate: bool,
) -> Result<()> {
    sum_of_slots("permute::combine", ["ys", "y"], stream, routes, ys, y, accumulate, true)
}

/// The gradient of [`gather`]: `dx`, `[T, C]`, from `dxs`, `[slots, C]`; `accumulate` adds to what `dx` holds.
pub fn gather_backward(
    stream: &mut Stream<'_>,
    routes: &Routes,
    dxs: &Tensor,
    dx: &mut Tensor,
    accumulate: bool,
) -> Result<()> {
    let names = ["dxs", "dx"];
    sum_of_slots("permute::gather_backward", names, stream, routes, dxs, dx, accumulate, false)
}

#[allow(clippy::too_many_arguments)] // Both callers in one, with their names for errors.
fn sum_of_slots(
    operation: &'static str,
    names: [&str; 2],
    stream: &mut Stream<'_>,
    routes: &Routes,
    ys: &Tensor,
    y: &mut Tensor,
    accumulate: bool,
    weighted: bool,
) -> Result<()> {
    let [tokens, cols] = rows(operation, routes, y.cols)?;
    ys.expect(operation, names[0], [routes.slots(), cols], &TYPES)?;
    y.expect(operation, names[1], [tokens, cols], &TYPES)?;
    same(stream, routes, &[ys, y])?;
    let top_k = routes.desc.top_k;
    if stream.gpu().is_none() {
        let (ys, weights) = (ys.widened(), routes.weights.widened());
        let slot_of = routes.slot_of.data.cpu();
        y.fill_rows(|token, row| {
            let old = accumulate.then(|| row.to_vec());
            row.fill(0.0);
            for place in token * top_k..(token + 1) * top_k {
                let weight = if weighted { weights[place] } else { 1.0 };
                let from = &ys[slot_of[place] as usize * cols..][..cols];
                for (sum, y) in row.iter_mut().zip(from) {
                    *sum += weight * y;
                }
            }
            for (sum, old) in row.iter_mut().zip(old.iter().flatten()) {
                *sum += old;
            }
        });
        return Ok(());
    }
    let variant = Variant::Combine { top_k: top_k as u32, ys: ys.dtype, y: y.dtype, weighted };
    let quads = tokens as u64 * (cols / 4) as u64;
    let mut buffers = vec![ys.binding()?, routes.slot_of.binding()?, y.binding()?];
    if weighted {
        buffers.push(routes.weights.binding()?);
    }
    stream.dispatch(
        &variant.name(),
        || variant.kernel(),
        &[cols as u32 / 4, quads as u32, u32::from(accumulate)],
        &buffers,
        quads.div_ceil(u64::from(WORKGROUP)),
    )
}

/// The gradient of [`combine`]: `dys`, `[slots, C]`, and `dweights`, `[T, k]` in f32, from `dy`, `[T, C]`, and the `ys` that were
/// combined.
pub fn combine_backward(
    stream: &mut Stream<'_>,
    routes: &Routes,
    dy: &Tensor,
    ys: &Tensor,
    dys: &mut Tensor,
    dweights: &mut Tensor,
) -> Result<()> {
    let operation = "permute::combine_backward";
    let [tokens, cols] = rows(operation, routes, dy.cols)?;
    let (slots, top_k) = (routes.slots(), routes.desc.top_k);
    dy.expect(operation, "dy", [tokens, cols], &TYPES)?;
    ys.expect(operation, "ys", [slots, cols], &TYPES)?;
    dys.expect(operation, "dys", [slots, cols], &TYPES)?;
    dweights.expect(operation, "dweights", [tokens, top_k], &[DType::F32])?;
    same(stream, routes, &[dy, ys, dys, dweights])?;
    if stream.gpu().is_none() {
        let (dy, ys, weights) = (dy.widened(), ys.widened(), routes.weights.widened());
        let (slot_of, token_of) = (routes.slot_of.data.cpu(), routes.token_of.data.cpu());
        dys.fill_rows(|slot, row| {
            let token = token_of[slot];
            if token == NO_TOKEN {
                return row.fill(0.0);
            }
            let places = token as usize * top_k..(token as usize + 1) * top_k;
            for place in places {
                if slot_of[place] as usize == slot {
                    for (out, dy) in row.iter_mut().zip(&dy[token as usize * cols..]) {
                        *out = weights[place] * dy;
                    }
                }
            }
        });
        dweights.fill_rows(|token, row| {
            let dy = &dy[token * cols..][..cols];
            for (out, slot) in row.iter_mut().zip(&slot_of[token * top_k..]) {
                let ys = &ys[*slot as usize * cols..][..cols];
                // Four sums side by side, as in the shader's quads.
                let mut sums = [0.0; 4];
                for (dy, ys) in dy.chunks_exact(4).zip(ys.chunks_exact(4)) {
                    for lane in 0..4 {
                        sums[lane] += dy[lane] * ys[lane];
                    }
                }
                *out = (sums[0] + sums[1]) + (sums[2] + sums[3]);
            }
        });
        return Ok(());
    }
    let variant = Variant::CombineBackward {
        top_k: top_k as u32,
        dy: dy.dtype,
        ys: ys.dtype,
        dys: dys.dtype,
    };
    stream.dispatch(
        &variant.name(),
        || variant.kernel(),
        &[tokens as u32, cols as u32 / 4, slots as u32],
        &[
            dy.binding()?,
            ys.binding()?,
            routes.token_of.binding()?,
            routes.slot_of.binding()?,
            routes.weights.binding()?,
            dys.binding()?,
            dweights.binding()?,
        ],
        (slots as u64).div_ceil(u64::from(WORKGROUP / LANES)),
    )
}

/// Zeroes the rows of `x`, `[slots, C]`, that no token has. A product grouped by rows leaves what lies behind the last expert
/// as it was, and a quantizer along the slots reads everything: so what it sees depends on this batch alone, and has no NaN of
/// an old one.
pub fn clear_padding(stream: &mut Stream<'_>, routes: &Routes, x: &mut Tensor) -> Result<()> {
    let operation = "permute::clear_padding";
    let [tokens, cols] = rows(operation, routes, x.cols)?;
    let slots = routes.slots();
    x.expect(operation, "x", [slots, cols], &TYPES)?;
    same(stream, routes, &[x])?;
    if stream.gpu().is_none() {
        let token_of = routes.token_of.data.cpu();
        x.fill_rows(|slot, row| {
            if token_of[slot] == NO_TOKEN {
                row.fill(0.0);
            }
        });
        return Ok(());
    }
    let variant = Variant::Clear { x: x.dtype };
    stream.dispatch(
        &variant.name(),
        || variant.kernel(),
        &[tokens as u32, cols as u32 / 4, slots as u32],
        &[routes.token_of.binding()?, x.binding()?],
        (slots as u64).div_ceil(u64::from(WORKGROUP / LANES)),
    )
}

/// Tokens and columns, the latter checked.
fn rows(operation: &'static str, routes: &Routes, cols: usize) -> Result<[usize; 2]> {
    if !cols.is_multiple_of(4) {
        return Err(Error::Mismatch {
            operation,
            problem: format!("rows of {cols} columns: a multiple of 4"),
        });
    }
    Ok([routes.desc.tokens, cols])
}

fn same(stream: &Stream<'_>, routes: &Routes, tensors: &[&Tensor]) -> Result<()> {
    let ctx = stream.context();
    tensors.iter().try_for_each(|tensor| ctx.check_same(&tensor.data, &routes.weights.data))
}

// ---- The shaders ---------------------------------------------------------------------------------------------------

/// Quads of an invocation of `permute_gather.wgsl`.
const STEPS: u32 = 4;
/// Invocations that share a slot in `permute_combine_backward.wgsl` and `permute_clear.wgsl`.
const LANES: u32 = 32;

#[derive(Clone, Copy, Debug)]
enum Variant {
    Clear { x: DType },
    Gather { x: DType, xs: DType },
    Combine { top_k: u32, ys: DType, y: DType, weighted: bool },
    CombineBackward { top_k: u32, dy: DType, ys: DType, dys: DType },
}

impl Variant {
    fn name(&self) -> String {
        match self {
            Variant::Clear { x } => format!("permute_clear.{x}"),
            Variant::Gather { x, xs } => format!("permute_gather.{x}.{xs}"),
            Variant::Combine { top_k, ys, y, weighted } => {
                let weighted = if *weighted { ".weighted" } else { "" };
                format!("permute_combine.top{top_k}.{ys}.{y}{weighted}")
            }
            Variant::CombineBackward { top_k, dy, ys, dys } => {
                format!("permute_combine_backward.top{top_k}.{dy}.{ys}.{dys}")
            }
        }
    }

    fn kernel(&self) -> Kernel {
        use Binding::{Params, Read, Write};
        let source = Source::new().constant("WG", WORKGROUP);
        let (source, bindings) = match *self {
            Variant::Clear { x } => {
                let source = source.constant("LANES", LANES).quads("x", x);
                (source.fragment(shader!("permute_clear.wgsl")), vec![Params, Read, Write])
            }
            Variant::Gather { x, xs } => {
                let source = source.constant("STEPS", STEPS).quads("x", x).quads("xs", xs);
                (source.fragment(shader!("permute_gather.wgsl")), vec![Params, Read, Read, Write])
            }
            Variant::Combine { top_k, ys, y, weighted } => {
                let source = source.constant("TOPK", top_k).quads("ys", ys).quads("y", y);
                let mut bindings = vec![Params, Read, Read, Write];
                let source = if weighted {
                    bindings.push(Read);
                    source
                        .line("@group(0) @binding(4) var<storage, read> weights: array<f32>;")
                        .line("fn weight_at(at: u32) -> f32 { return weights[at]; }")
                } else {
                    source.line("fn weight_at(at: u32) -> f32 { return 1.0; }")
                };
                (source.fragment(shader!("permute_combine.wgsl")), bindings)
            }
            Variant::CombineBackward { top_k, dy, ys, dys } => {
                let source = source
                    .constant("TOPK", top_k)
                    .constant("LANES", LANES)
                    .quads("dy", dy)
                    .quads("ys", ys)
                    .quads("dys", dys)
                    .fragment(shader!("permute_combine_backward.wgsl"));
                (source, vec![Params, Read, Read, Read, Read, Read, Write, Write])
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
    let mut variants = TYPES.map(|x| Variant::Clear { x }).to_vec();
    for from in TYPES {
        for to in TYPES {
            variants.push(Variant::Gather { x: from, xs: to });
            for top_k in 1..=MAX_TOP_K as u32 {
                for weighted in [false, true] {
                    variants.push(Variant::Combine { top_k, ys: from, y: to, weighted });
                }
                for dy in TYPES {
                    variants.push(Variant::CombineBackward { top_k, dy, ys: from, dys: to });
                }
            }
        }
    }
    variants.iter().map(Variant::kernel).collect()
}
