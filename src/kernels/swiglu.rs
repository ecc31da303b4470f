//! SwiGLU: `h = silu(g) · u`, with the gate and the up projection side by side in one tensor.
//!
//! `gu`, `dgu` `[T, 2F]`, the gate in the first F columns; `h`, `dh` `[T, F]`; f32 or bf16 each. **Bounded**: f32, with what
//! WGSL allows exp and division (the twin: two units in exp). Where |g| is large the results are the limits, `g · u` and zero.
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
    let variant = Variant { gu: gu.dtype, h: h.dtype, dgu: None };
    let vectors = rows * cols / 4;
    stream.dispatch(
        &variant.name(),
        || variant.kernel(),
        &[vectors as u32, (cols / 4) as u32],
        &[gu.binding()?, h.binding()?],
        act::step_groups(vectors),
    )
}

/// Records `gu`, `dh` → `dgu`.
pub fn backward(stream: &mut Stream<'_>, gu: &Tensor, dh: &Tensor, dgu: &mut Tensor) -> Result<()> {
    let operation = "swiglu::backward";
    let [rows, cols] = sizes(operation, gu)?;
    dh.expect(operation, "dh", [rows, cols], ACT)?;
    dgu.expect(operation, "dgu", [rows, 2 * cols], ACT)?;
    act::check_same(stream, &[&gu.data, &dh.data, &dgu.data])?;
    if stream.gpu().is_none() {
        let (gu, dh) = (gu.widened(), dh.widened());
        dgu.fill_rows(|t, dgu| {
            let (g, u) = gu[2 * cols * t..2 * cols * (t + 1)].split_at(cols);
            let d = &dh[cols * t..cols * (t + 1)];
            let (dg, du) = dgu.split_at_mut(cols);
            for i in 0..cols {
                let (of, of_minus) = sigmoid(g[i]);
                dg[i] = d[i] * u[i] * (of * (1.0 + at_most(at_least(g[i])) * of_minus));
                du[i] = d[i] * (at_least(g[i]) * of);
            }
        });
        return Ok(());
    }
    let variant = Variant { gu: gu.dtype, h: dh.dtype, dgu: Some(dgu.dtype) };
    let vectors = rows * cols / 4;
    stream.dispatch(
        &variant.name(),
        || variant.kernel(),
        &[vectors as u32, (cols / 4) as u32],
        &[gu.binding()?, dh.binding()?, dgu.binding()?],
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
    /// Of the backward kernel.
    dgu: Option<DType>,
}

impl Variant {
    fn name(&self) -> String {
        match self.dgu {
            None => format!("swiglu.{}.{}", self.gu, self.h),
            Some(dgu) => format!("swiglu_backward.{}.{}.{dgu}", self.gu, self.h),
        }
    }

    fn kernel(&self) -> Kernel {
        let source = Source::new()
            .constant("WG", WORKGROUP)
            .constant("STEPS", STEPS)
            .fragment(shader!("lib/silu.wgsl"))
            .quads("gu", self.gu);
        match self.dgu {
            None => act::kernel(
                self.name(),
                source.quads("h", self.h).fragment(shader!("swiglu.wgsl")),
                &[Binding::Read, Binding::Write],
            ),
            Some(dgu) => act::kernel(
                self.name(),
                source
                    .quads("dh", self.h)
                    .quads("dgu", dgu)
                    .fragment(shader!("swiglu_backward.wgsl")),
                &[Binding::Read, Binding::Read, Binding::Write],
            ),
        }
    }
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for gu in ACT {
        for h in ACT {
            for dgu in [None, Some(DType::F32), Some(DType::BF16)] {
                kernels.push(Variant { gu: *gu, h: *h, dgu }.kernel());
            }
        }
    }
    kernels
}
