//! The norm of all gradients together, and what every gradient must be multiplied by: the inverse of the loss scale, and
//! less where the norm is above the limit. It stays on the device; [`crate::kernels::AdamW`] reads it there.
//!
//! ```text
//! y = [norm, factor, finite, tensor]                 of f32
//! norm    of inverse_scale · gradients
//! factor  inverse_scale · min(1, max_norm / norm)
//! finite  1, or 0 where a gradient or the norm is not finite; then norm is NaN and factor 0
//! tensor  the first gradient with a value that is not finite, or −1
//! ```
//!
//! **Bounded**, the order of the additions fixed: the same bits every time on one engine. Squares are taken under powers of
//! two (on the CPU engine in f64), so neither 10⁻³⁰ nor 10³⁰ is lost, and a loss scale that is a power of two changes no bit
//! of the norm.
//!
//! Shaders: `shaders/gradient_norm.wgsl`, `shaders/gradient_norm_total.wgsl`.

use crate::engine::buffer::{DType, Tensor};
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::engine::{Context, Stream};
use crate::{Error, Result};

use super::WORKGROUP;

const OPERATION: &str = "GradientNorm::record";

/// Quads that an invocation of `gradient_norm.wgsl` adds up; a multiple of 4.
const STEPS: u32 = 16;

/// Elements of a piece, which a workgroup adds up.
const PIECE: usize = (4 * WORKGROUP * STEPS) as usize;

/// The kernel, for one list of gradients.
#[derive(Debug)]
pub struct GradientNorm {
    elements: Vec<usize>,
    /// A piece's sum a row; the CPU engine does not use it.
    partials: Tensor,
}

impl GradientNorm {
    /// For gradients with these numbers of elements, in this order.
    pub fn new(ctx: &Context, elements: &[usize]) -> Result<GradientNorm> {
        let pieces: usize = elements.iter().map(|n| n.div_ceil(PIECE)).sum();
        let partials = ctx.zeros(DType::F32, pieces.max(1), 4)?;
        Ok(GradientNorm { elements: elements.to_vec(), partials })
    }

    /// Records the norm of `inverse_scale · grads`, f32 in rows of whole quads, into `y` `[1, 4]`; `max_norm` may be
    /// infinite.
    pub fn record(
        &mut self,
        stream: &mut Stream<'_>,
        grads: &[&Tensor],
        inverse_scale: f32,
        max_norm: f32,
        y: &mut Tensor,
    ) -> Result<()> {
        self.check(stream, grads, inverse_scale, max_norm, y)?;
        if stream.gpu().is_none() {
            let twin = twin(grads, inverse_scale, max_norm);
            y.fill_rows(|_, row| row.copy_from_slice(&twin));
            return Ok(());
        }
        let partials = self.partials.binding()?;
        let mut pieces = 0;
        for (i, grad) in grads.iter().enumerate() {
            let [rows, cols] = grad.shape();
            if rows * cols == 0 {
                continue;
            }
            let these = (rows * cols).div_ceil(PIECE);
            stream.dispatch(
                "gradient_norm",
                kernel,
                &[(rows * cols / 4) as u32, pieces as u32, i as u32],
                &[grad.binding()?, partials],
                these as u64,
            )?;
            pieces += these;
        }
        stream.dispatch(
            "gradient_norm_total",
            total_kernel,
            &[pieces as u32, inverse_scale.to_bits(), max_norm.min(f32::MAX).to_bits()],
            &[partials, y.binding()?],
            1,
        )
    }

    fn check(
        &self,
        stream: &Stream<'_>,
        grads: &[&Tensor],
        inverse_scale: f32,
        max_norm: f32,
        y: &Tensor,
    ) -> Result<()> {
        let mismatch = |problem| Err(Error::Mismatch { operation: OPERATION, problem });
        if grads.len() != self.elements.len() {
            return mismatch(format!(
                "{} gradients, made for {}",
                grads.len(),
                self.elements.len()
            ));
        }
        if !(inverse_scale.is_normal() && inverse_scale > 0.0 && max_norm > 0.0) {
            return mismatch(format!(
                "inverse_scale {inverse_scale}, max_norm {max_norm}: both must be positive"
            ));
        }
        y.expect(OPERATION, "the result", [1, 4], &[DType::F32])?;
        for (i, (grad, elements)) in grads.iter().zip(&self.elements).enumerate() {
            let [rows, cols] = grad.shape();
            if rows * cols != *elements {
                return mismatch(format!(
                    "gradient {i} is [{rows}, {cols}], made for {elements} elements"
                ));
            }
            grad.expect(OPERATION, "a gradient", [rows, cols], &[DType::F32])?;
            if !cols.is_multiple_of(4) {
                return mismatch(format!(
                    "gradient {i} is [{rows}, {cols}]: columns must be a multiple of 4"
                ));
            }
            stream.context().check_same(&grad.data, &y.data)?;
        }
        stream.context().check_same(&y.data, &self.partials.data)
    }
}

/// The twin. In f64 a sum of squares of f32 is finite exactly where all of them are.
fn twin(grads: &[&Tensor], inverse_scale: f32, max_norm: f32) -> [f32; 4] {
    let squares = |piece: &[f32]| {
        let mut lanes = [0f64; 8];
        for (i, x) in piece.iter().enumerate() {
            lanes[i % 8] += f64::from(*x) * f64::from(*x);
        }
        lanes.iter().sum::<f64>()
    };
    let mut sum = 0.0;
    let mut first = -1.0;
    for (i, grad) in grads.iter().enumerate() {
        let x = grad.widened();
        #[cfg(not(target_arch = "wasm32"))]
        let pieces: Vec<f64> = {
            use rayon::prelude::*;
            x.par_chunks(PIECE).map(squares).collect()
        };
        #[cfg(target_arch = "wasm32")]
        let pieces: Vec<f64> = x.chunks(PIECE).map(squares).collect();
        let this: f64 = pieces.iter().sum();
        if first < 0.0 && !this.is_finite() {
            first = i as f32;
        }
        sum += this;
    }
    let norm = (sum.sqrt() * f64::from(inverse_scale)) as f32;
    if !norm.is_finite() {
        return [f32::NAN, 0.0, 0.0, first];
    }
    let clip = if norm > max_norm { max_norm / norm } else { 1.0 };
    [norm, inverse_scale * clip, 1.0, -1.0]
}

// ---- The shaders ---------------------------------------------------------------------------------------------------

fn kernel() -> Kernel {
    build("gradient_norm", shader!("gradient_norm.wgsl"))
}

fn total_kernel() -> Kernel {
    build("gradient_norm_total", shader!("gradient_norm_total.wgsl"))
}

fn build(name: &str, body: &str) -> Kernel {
    let source = Source::new()
        .constant("WG", WORKGROUP)
        .constant("STEPS", STEPS)
        .fragment(shader!("lib/sum_of_squares.wgsl"))
        .fragment(body);
    Kernel::portable(name.into(), source, &[Binding::Read, Binding::Write])
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    vec![kernel(), total_kernel()]
}
