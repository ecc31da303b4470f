//! Weights that oscillate between two codes are set to the middle of one.
//!
//! Late in a run many master weights move a little to and fro across the border between two codes, and their quantized values
//! jump each time. Over a period the paths Σ|Δw| and Σ|ΔQ(w)| are summed for every weight; where the second is at least
//! `threshold` times the first, w becomes Q(w) at the period's end (OsciReset of TetraJet-v2, arXiv 2510.27527).
//!
//! `w` `[N, K]` of f32 or bf16, everything else f32: 16 bytes a weight are kept. **Exact** but for subnormals, which a GPU may
//! flush. Shader: `shaders/oscillation.wgsl`.

use crate::engine::buffer::Tensor;
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::engine::{Context, Stream};
use crate::{DType, Result};

use super::WORKGROUP;
use super::act::{self, ACT, F32};

/// What [`Oscillation::record`] does; as the shader numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The paths begin at these values.
    Start = 0,
    /// Adds the way from the last values to these.
    Walk = 1,
    /// The same; then weights that oscillate are reset, and the paths begin anew.
    Reset = 2,
}

/// The paths of a weight.
#[derive(Debug)]
pub struct Oscillation {
    w_before: Tensor,
    q_before: Tensor,
    w_path: Tensor,
    q_path: Tensor,
}

impl Oscillation {
    /// For a weight `[rows, cols]`.
    pub fn new(ctx: &Context, rows: usize, cols: usize) -> Result<Oscillation> {
        let zeros = || ctx.zeros(DType::F32, rows, cols);
        Ok(Oscillation {
            w_before: zeros()?,
            q_before: zeros()?,
            w_path: zeros()?,
            q_path: zeros()?,
        })
    }

    /// What it keeps, by name, `[rows, cols]` of f32 each.
    pub fn tensors(&self) -> [(&'static str, &Tensor); 4] {
        [
            ("w_before", &self.w_before),
            ("q_before", &self.q_before),
            ("w_path", &self.w_path),
            ("q_path", &self.q_path),
        ]
    }

    /// The same, to be written.
    pub fn tensors_mut(&mut self) -> [(&'static str, &mut Tensor); 4] {
        [
            ("w_before", &mut self.w_before),
            ("q_before", &mut self.q_before),
            ("w_path", &mut self.w_path),
            ("q_path", &mut self.q_path),
        ]
    }

    /// Records a step of `w`, whose quantized values are `q`.
    pub fn record(
        &mut self,
        stream: &mut Stream<'_>,
        action: Action,
        threshold: f32,
        w: &mut Tensor,
        q: &Tensor,
    ) -> Result<()> {
        let operation = "Oscillation::record";
        let [rows, cols] = act::shape(operation, "w", w)?;
        q.expect(operation, "q", [rows, cols], F32)?;
        self.w_before.expect(operation, "the paths", [rows, cols], F32)?;
        act::check_same(stream, &[&w.data, &q.data, &self.w_before.data])?;
        let Oscillation { w_before, q_before, w_path, q_path } = self;
        if stream.gpu().is_some() {
            let variant = Variant { w: w.dtype };
            let vectors = rows * cols / 4;
            return stream.dispatch(
                &variant.name(),
                || variant.kernel(),
                &[vectors as u32, action as u32, threshold.to_bits()],
                &[
                    w.binding()?,
                    q.binding()?,
                    w_before.binding()?,
                    q_before.binding()?,
                    w_path.binding()?,
                    q_path.binding()?,
                ],
                (vectors as u64).div_ceil(u64::from(WORKGROUP)),
            );
        }
        let walk = |path: &mut Tensor, now: &[f32], before: &Tensor| {
            let before = before.widened();
            path.fill_rows(|row, path| {
                let at = row * cols;
                for ((path, now), before) in path.iter_mut().zip(&now[at..]).zip(&before[at..]) {
                    *path =
                        if action == Action::Start { 0.0 } else { *path + (now - before).abs() };
                }
            });
        };
        let near = q.widened();
        walk(w_path, &w.widened(), w_before);
        walk(q_path, &near, q_before);
        if action == Action::Reset {
            let lengths = [w_path.widened(), q_path.widened()];
            w.fill_rows(|row, w| {
                for (i, w) in w.iter_mut().enumerate() {
                    let [w_length, q_length] = [0, 1].map(|path| lengths[path][row * cols + i]);
                    if q_length > 0.0 && q_length >= threshold * w_length {
                        *w = near[row * cols + i];
                    }
                }
            });
            drop(lengths);
            for path in [w_path, q_path] {
                path.fill_rows(|_, path| path.fill(0.0));
            }
        }
        for (before, now) in [(w_before, w.widened()), (q_before, near)] {
            before.fill_rows(|row, before| before.copy_from_slice(&now[row * cols..][..cols]));
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Variant {
    w: DType,
}

impl Variant {
    fn name(&self) -> String {
        format!("oscillation.{}", self.w)
    }

    fn kernel(&self) -> Kernel {
        let source = Source::new()
            .constant("WG", WORKGROUP)
            .quads("w", self.w)
            .fragment(shader!("oscillation.wgsl"));
        let mut bindings = [Binding::Write; 6];
        bindings[1] = Binding::Read;
        Kernel::portable(self.name(), source, &bindings)
    }
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    ACT.iter().map(|w| Variant { w: *w }.kernel()).collect()
}
