//! SwiGLU: `h = silu(g) · u`, with the gate and the up projection side by side in one tensor.
//!
//! `gu` `[T, 2F]`, the gate in the first F columns; `h`, `dh` `[T, F]`; f32 or bf16 each. The gradient of `gu` takes its place:
//! nothing needs it any more. **Bounded**: f32, with what WGSL allows exp and division (the twin: two units in exp). Where |g| is large the results are the limits, `g · u` and zero.
//!
//! Shaders: `shaders/swiglu.wgsl`, `shaders/swiglu_backward.wgsl`.

use crate::engine::Stream;
use crate::engine::buffer::{DType, Tensor};
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::{Error, Result};

use super::WORKGROUP;
use super::act::{self, ACT, STEPS};

/// Records `gu` → `h`.
pub fn forward(stream: &mut Stream<'_>, gu: &Tensor, h: &mut Tensor) -> Result<()> {
    let operation = "swiglu::forward";
    let [rows, cols] = sizes(operation, gu)?;
    h.expect(operation, "h", [rows, cols], ACT)?;
    act::check_same(stream, &[&gu.data, &h.data])?;
    if stream.gpu().is_none() {
        let gu = gu.widened();
        h.fill_rows(|t, h| {
            let (g, u) = gu[2 * cols * t..2 * cols * (t + 1)].split_at(cols);
            for ((h, g), u) in h.iter_mut().zip(g).zip(u) {
                *h = at_least(*g) * sigmoid(*g).0 * u;
            }
        });
        return Ok(());
    }
    let variant = Variant { gu: gu.dtype, h: h.dtype, backward: false };
    let vectors = rows * cols / 4;
    stream.dispatch(
        &variant.name(),
        || variant.kernel(),
        &[vectors as u32, (cols / 4) as u32],
        &[gu.binding()?, h.binding()?],
        act::step_groups(vectors),
    )
}

/// Records `gu`, `dh` → the gradient of `gu`, in its place.
pub fn backward(stream: &mut Stream<'_>, gu: &mut Tensor, dh: &Tensor) -> Result<()> {
    let operation = "swiglu::backward";
    let [rows, cols] = sizes(operation, gu)?;
    dh.expect(operation, "dh", [rows, cols], ACT)?;
    act::check_same(stream, &[&gu.data, &dh.data])?;
    if stream.gpu().is_none() {
        let dh = dh.widened();
        gu.fill_rows(|t, gu| {
            let (g, u) = gu.split_at_mut(cols);
            for ((g, u), d) in g.iter_mut().zip(u).zip(&dh[cols * t..]) {
                let (of, of_minus) = sigmoid(*g);
                let dg = d * *u * (of * (1.0 + at_most(at_least(*g)) * of_minus));
                *u = d * (at_least(*g) * of);
                *g = dg;
            }
        });
        return Ok(());
    }
    let variant = Variant { gu: gu.dtype, h: dh.dtype, backward: true };
    let vectors = rows * cols / 4;
    stream.dispatch(
        &variant.name(),
        || variant.kernel(),
        &[vectors as u32, (cols / 4) as u32],
        &[gu.binding()?, dh.binding()?],
        act::step_groups(vectors),
    )
}

/// Rows, and columns of one half.
fn sizes(operation: &'static str, gu: &Tensor) -> Result<[usize; 2]> {
    let [rows, cols] = act::shape(operation, "gu", gu)?;
    if !cols.is_multiple_of(8) {
        return Err(Error::Mismatch {
            operation,
            problem: format!(
                "gu is [{rows}, {cols}], expected two times a multiple of four columns"
            ),
        });
    }
    Ok([rows, cols / 2])
}

/// σ(g) and σ(−g).
#[inline(always)]
fn sigmoid(g: f32) -> (f32, f32) {
    let e = act::exp(-g.abs());
    let large = 1.0 / (1.0 + e);
    let small = e * large;
    if g >= 0.0 { (large, small) } else { (small, large) }
}

/// g, within what the sigmoids can tell apart: no product with their zeros is infinity times zero. NaN stays NaN.
#[inline(always)]
fn at_least(g: f32) -> f32 {
    if g < -128.0 { -128.0 } else { g }
}

#[inline(always)]
fn at_most(g: f32) -> f32 {
    if g > 128.0 { 128.0 } else { g }
}

#[derive(Clone, Copy)]
struct Variant {
    gu: DType,
    /// Or of dh.
    h: DType,
    backward: bool,
}

impl Variant {
    fn name(&self) -> String {
        let of = if self.backward { "_backward" } else { "" };
        format!("swiglu{of}.{}.{}", self.gu, self.h)
    }

    fn kernel(&self) -> Kernel {
        let source = Source::new()
            .constant("WG", WORKGROUP)
            .constant("STEPS", STEPS)
            .fragment(shader!("lib/silu.wgsl"))
            .quads("gu", self.gu);
        match self.backward {
            false => Kernel::portable(
                self.name(),
                source.quads("h", self.h).fragment(shader!("swiglu.wgsl")),
                &[Binding::Read, Binding::Write],
            ),
            true => Kernel::portable(
                self.name(),
                source.quads("dh", self.h).fragment(shader!("swiglu_backward.wgsl")),
                &[Binding::Write, Binding::Read],
            ),
        }
    }
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for gu in ACT {
        for h in ACT {
            for backward in [false, true] {
                kernels.push(Variant { gu: *gu, h: *h, backward }.kernel());
            }
        }
    }
    kernels
}
