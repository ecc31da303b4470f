//! RMSNorm, with the addition of the residual before it: `sum = x + branch`, `y = sum · rstd · gain`,
//! `rstd = 1 / √(mean sum² + eps)` a row.
//!
//! Activations are `[T, C]` of f32 or bf16 each, C a multiple of four up to [`MAX_COLS`]; `gain`, `dgain` `[1, C]` and `rstd`
//! `[T, 1]` are f32. `sum` is **exact** (one f32 addition, rounded to its type), and what is normed is `sum` as rounded. The
//! rest is **bounded**: f32, with what WGSL allows inverseSqrt. Deterministic: `dgain` is summed over rows in fixed parts.
//!
//! Shaders: `shaders/rmsnorm.wgsl`, `shaders/rmsnorm_backward.wgsl`.

use crate::engine::buffer::{DType, Tensor};
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::engine::{Context, Stream};
use crate::{Error, Result};

use super::act::{self, ACT, F32};
use super::{WORKGROUP, reduce};

/// Quads of a row that an invocation holds in registers. Five are 640 columns over 32 invocations.
const HELD: u32 = 5;
/// How many invocations may share a row.
const LANES: [u32; 4] = [32, 64, 128, 256];
/// The longest row.
pub const MAX_COLS: usize = (4 * HELD * LANES[3]) as usize;
/// The workgroups, at most, that a backward pass spreads its rows over: each leaves a part of `dgain`.
const MAX_PARTS: usize = 512;

/// Norms of rows of one length. One serves any number of layers: it holds scratch memory, no parameters.
#[derive(Debug)]
pub struct RmsNorm {
    max_rows: usize,
    cols: usize,
    lanes: u32,
    eps: f32,
    /// Of dgain.
    parts: Tensor,
}

impl RmsNorm {
    /// For rows of `cols` columns, at most `max_rows` at once.
    pub fn new(ctx: &Context, max_rows: usize, cols: usize, eps: f32) -> Result<RmsNorm> {
        let lanes = LANES.into_iter().find(|lanes| cols <= (4 * HELD * lanes) as usize);
        let Some(lanes) = lanes.filter(|_| cols > 0 && cols.is_multiple_of(4)) else {
            return Err(Error::Mismatch {
                operation: "RmsNorm::new",
                problem: format!("{cols} columns, expected a multiple of four up to {MAX_COLS}"),
            });
        };
        let (_, parts) = split(max_rows.max(1), lanes);
        let parts = ctx.zeros(DType::F32, parts, cols)?;
        Ok(RmsNorm { max_rows, cols, lanes, eps, parts })
    }

    /// Records the norm of `x`, or of `x + branch`, which is written to the other tensor of the pair.
    pub fn forward(
        &self,
        stream: &mut Stream<'_>,
        x: &Tensor,
        branch: Option<(&Tensor, &mut Tensor)>,
        gain: &Tensor,
        y: &mut Tensor,
        rstd: &mut Tensor,
    ) -> Result<()> {
        let operation = "RmsNorm::forward";
        let rows = self.rows(operation, x)?;
        gain.expect(operation, "gain", [1, self.cols], F32)?;
        y.expect(operation, "y", [rows, self.cols], ACT)?;
        rstd.expect(operation, "rstd", [rows, 1], F32)?;
        act::check_same(stream, &[&x.data, &gain.data, &y.data, &rstd.data])?;
        if let Some((branch, sum)) = &branch {
            branch.expect(operation, "branch", [rows, self.cols], ACT)?;
            sum.expect(operation, "sum", [rows, self.cols], ACT)?;
            act::check_same(stream, &[&branch.data, &sum.data])?;
        }
        if stream.gpu().is_none() {
            self.forward_twin(x, branch, gain, y, rstd);
            return Ok(());
        }
        let residual = branch.as_ref().map(|(branch, sum)| [branch.dtype, sum.dtype]);
        let variant = Forward { lanes: self.lanes, x: x.dtype, y: y.dtype, residual };
        let mut buffers = vec![x.binding()?, gain.binding()?, y.binding()?, rstd.binding()?];
        if let Some((branch, sum)) = &branch {
            buffers.extend([branch.binding()?, sum.binding()?]);
        }
        stream.dispatch(
            &variant.name(),
            || variant.kernel(),
            &[
                rows as u32,
                (self.cols / 4) as u32,
                (1.0 / self.cols as f32).to_bits(),
                self.eps.to_bits(),
            ],
            &buffers,
            rows.div_ceil((WORKGROUP / self.lanes) as usize) as u64,
        )
    }

    /// Records `dx`, the gradient of what was normed (`x`: the sum, where there was a branch), and `dgain`, which is
    /// overwritten or, with `accumulate`, added to. `residual`: `dx` holds the gradient that arrives over the residual, which is
    /// added.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &mut self,
        stream: &mut Stream<'_>,
        x: &Tensor,
        gain: &Tensor,
        rstd: &Tensor,
        dy: &Tensor,
        residual: bool,
        dx: &mut Tensor,
        dgain: &mut Tensor,
        accumulate: bool,
    ) -> Result<()> {
        let operation = "RmsNorm::backward";
        let rows = self.rows(operation, x)?;
        let shape = [rows, self.cols];
        gain.expect(operation, "gain", [1, self.cols], F32)?;
        rstd.expect(operation, "rstd", [rows, 1], F32)?;
        dy.expect(operation, "dy", shape, ACT)?;
        dx.expect(operation, "dx", shape, ACT)?;
        dgain.expect(operation, "dgain", [1, self.cols], F32)?;
        act::check_same(
            stream,
            &[&x.data, &gain.data, &rstd.data, &dy.data, &dx.data, &dgain.data, &self.parts.data],
        )?;
        let (per_group, groups) = split(rows, self.lanes);
        if stream.gpu().is_none() {
            self.backward_twin(x, gain, rstd, dy, residual, dx, per_group);
        } else {
            let variant =
                Backward { lanes: self.lanes, x: x.dtype, dy: dy.dtype, residual, dx: dx.dtype };
            let buffers = [
                x.binding()?,
                gain.binding()?,
                rstd.binding()?,
                dy.binding()?,
                dx.binding()?,
                self.parts.binding()?,
            ];
            stream.dispatch(
                &variant.name(),
                || variant.kernel(),
                &[
                    rows as u32,
                    (self.cols / 4) as u32,
                    per_group as u32,
                    (1.0 / self.cols as f32).to_bits(),
                ],
                &buffers,
                groups as u64,
            )?;
        }
        reduce::columns(stream, &self.parts, groups, dgain, accumulate)
    }

    fn rows(&self, operation: &'static str, x: &Tensor) -> Result<usize> {
        let [rows, cols] = act::shape(operation, "x", x)?;
        if cols != self.cols || rows > self.max_rows {
            return Err(Error::Mismatch {
                operation,
                problem: format!(
                    "x is [{rows}, {cols}], the norm is for up to {} rows of {} columns",
                    self.max_rows, self.cols
                ),
            });
        }
        Ok(rows)
    }

    // ---- The twins -------------------------------------------------------------------------------------------------

    fn forward_twin(
        &self,
        x: &Tensor,
        branch: Option<(&Tensor, &mut Tensor)>,
        gain: &Tensor,
        y: &mut Tensor,
        rstd: &mut Tensor,
    ) {
        let (cols, gain) = (self.cols, gain.widened());
        let normed = match branch {
            None => x.widened(),
            Some((branch, sum)) => {
                let (x, branch) = (x.widened(), branch.widened());
                sum.fill_rows(|t, sum| {
                    let (x, branch) = (&x[t * cols..], &branch[t * cols..]);
                    for ((sum, x), branch) in sum.iter_mut().zip(x).zip(branch) {
                        *sum = x + branch;
                    }
                });
                let sum: &Tensor = sum;
                sum.widened()
            }
        };
        rstd.fill_rows(|t, rstd| {
            let row = &normed[t * cols..(t + 1) * cols];
            rstd[0] = 1.0 / (act::dot(row, row) / cols as f32 + self.eps).sqrt();
        });
        let rstd = rstd.widened();
        y.fill_rows(|t, y| {
            for ((y, x), gain) in y.iter_mut().zip(&normed[t * cols..]).zip(&*gain) {
                *y = x * rstd[t] * gain;
            }
        });
    }

    #[allow(clippy::too_many_arguments)]
    fn backward_twin(
        &mut self,
        x: &Tensor,
        gain: &Tensor,
        rstd: &Tensor,
        dy: &Tensor,
        residual: bool,
        dx: &mut Tensor,
        per_group: usize,
    ) {
        let (rows, cols) = (x.rows, self.cols);
        let (x, gain, rstd, dy) = (x.widened(), gain.widened(), rstd.widened(), dy.widened());
        dx.fill_rows(|t, dx| {
            let row = t * cols..(t + 1) * cols;
            let (x, dy, r) = (&x[row.clone()], &dy[row], rstd[t]);
            let w: Vec<f32> = dy.iter().zip(&*gain).map(|(dy, gain)| dy * gain).collect();
            let mean = act::dot(&w, x) * r / cols as f32;
            for ((dx, w), x) in dx.iter_mut().zip(w).zip(x) {
                let branch = (w - x * r * mean) * r;
                *dx = if residual { branch + *dx } else { branch };
            }
        });
        self.parts.fill_rows(|group, part| {
            part.fill(0.0);
            for t in (group * per_group..rows).take(per_group) {
                let (x, dy, r) = (&x[t * cols..], &dy[t * cols..], rstd[t]);
                for ((part, x), dy) in part.iter_mut().zip(x).zip(dy) {
                    *part += dy * (x * r);
                }
            }
        });
    }
}

/// How many rows each workgroup of a backward pass takes, and how many workgroups that makes. It depends on nothing but the
/// shape, so that sums do not either.
fn split(rows: usize, lanes: u32) -> (usize, usize) {
    let slots = (WORKGROUP / lanes) as usize;
    let per_group = rows.div_ceil(MAX_PARTS).next_multiple_of(slots);
    (per_group, rows.div_ceil(per_group))
}

// ---- The shaders ---------------------------------------------------------------------------------------------------

#[derive(Clone, Copy)]
struct Forward {
    lanes: u32,
    x: DType,
    y: DType,
    /// The types of the branch and of the sum.
    residual: Option<[DType; 2]>,
}

impl Forward {
    fn name(&self) -> String {
        let residual = match self.residual {
            None => "alone".into(),
            Some([branch, sum]) => format!("{branch}-{sum}"),
        };
        format!("rmsnorm.{}.{residual}.{}.{}", self.x, self.y, self.lanes)
    }

    fn kernel(&self) -> Kernel {
        let source = source(self.lanes).quads("x", self.x).quads("y", self.y);
        let mut bindings = vec![Binding::Read, Binding::Read, Binding::Write, Binding::Write];
        let source = match self.residual {
            None => source.fragment(shader!("lib/residual_none.wgsl")),
            Some([branch, sum]) => {
                bindings.extend([Binding::Read, Binding::Write]);
                source
                    .quads("branch", branch)
                    .quads("sum", sum)
                    .fragment(shader!("lib/residual.wgsl"))
            }
        };
        Kernel::portable(self.name(), source.fragment(shader!("rmsnorm.wgsl")), &bindings)
    }
}

#[derive(Clone, Copy)]
struct Backward {
    lanes: u32,
    x: DType,
    dy: DType,
    residual: bool,
    dx: DType,
}

impl Backward {
    fn name(&self) -> String {
        let Backward { lanes, x, dy, dx, .. } = self;
        let residual = if self.residual { "residual" } else { "alone" };
        format!("rmsnorm_backward.{x}.{dy}.{residual}.{dx}.{lanes}")
    }

    fn kernel(&self) -> Kernel {
        let source =
            source(self.lanes).quads("x", self.x).quads("dy", self.dy).quads("dx", self.dx);
        let mut bindings = vec![Binding::Read; 4];
        bindings.extend([Binding::Write, Binding::Write]);
        let source =
            source.flag("RESIDUAL", self.residual).fragment(shader!("rmsnorm_backward.wgsl"));
        Kernel::portable(self.name(), source, &bindings)
    }
}

fn source(lanes: u32) -> Source {
    Source::new()
        .constant("WG", WORKGROUP)
        .constant("LANES", lanes)
        .constant("HELD", HELD)
        .fragment(shader!("lib/row_reduce.wgsl"))
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    let pairs: Vec<[DType; 2]> = ACT.iter().flat_map(|a| ACT.iter().map(|b| [*a, *b])).collect();
    for lanes in LANES {
        for [x, y] in &pairs {
            let (x, y) = (*x, *y);
            let residuals = std::iter::once(None).chain(pairs.iter().copied().map(Some));
            kernels.extend(residuals.map(|residual| Forward { lanes, x, y, residual }.kernel()));
            for residual in [false, true] {
                for dx in ACT {
                    kernels.push(Backward { lanes, x, dy: y, residual, dx: *dx }.kernel());
                }
            }
        }
    }
    kernels
}
