//! Rotary position embedding: rotates the q and k thirds of qkv `[T, 3 · heads · head_dim]` in place.
//!
//! Element i of a head's first half is paired with element i of its second half, as in GPT-NeoX and Llama (not with its
//! neighbour, as in the paper that introduced it, Su et al., arXiv:2104.09864). At position pos, pair i < half =
//! head_dim / 2 turns by `pos · base^(-i / half)`:
//!
//! ```text
//! a' = a cos − b sin        b' = b cos + a sin
//! ```
//!
//! The backward direction is the rotation by the opposite angle, which is the gradient's.
//!
//! **Bounded**: cosines and sines are computed on the host in f64 and rounded to f32, the same on every engine; the
//! rotation is two products and a sum in f32, which a device may fuse. Shader: `shaders/rope.wgsl`.

use crate::engine::buffer::{DType, Tensor};
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::engine::{Context, Stream};
use crate::{Error, Result};

use super::WORKGROUP;

/// Which way to turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// By the angle, for activations.
    Forward,
    /// By minus the angle, for their gradients.
    Backward,
}

/// The kernel that rotates, with its table.
#[derive(Debug)]
pub struct Rope {
    seq: usize,
    head_dim: usize,
    /// `[seq, head_dim]`: half cosines, then half sines.
    table: Tensor,
}

impl Rope {
    /// Makes the table. `head_dim` is a multiple of 8.
    pub fn new(ctx: &Context, seq: usize, head_dim: usize, base: f64) -> Result<Rope> {
        if seq == 0 || head_dim == 0 || !head_dim.is_multiple_of(8) {
            return Err(Error::Mismatch {
                operation: "Rope::new",
                problem: format!(
                    "{seq} positions of head_dim {head_dim}: at least one, and a positive multiple of 8"
                ),
            });
        }
        let half = head_dim / 2;
        let mut values = Vec::with_capacity(seq * head_dim);
        for pos in 0..seq {
            let angle = |i: usize| pos as f64 * base.powf(-(i as f64) / half as f64);
            values.extend((0..half).map(|i| angle(i).cos() as f32));
            values.extend((0..half).map(|i| angle(i).sin() as f32));
        }
        let table = ctx.upload(DType::F32, seq, head_dim, bytemuck::cast_slice(&values))?;
        Ok(Rope { seq, head_dim, table })
    }

    /// Records the rotation of `qkv`, `[T, 3 · heads · head_dim]` in f32 or bf16. Row r is at position r % seq.
    pub fn record(
        &self,
        stream: &mut Stream<'_>,
        qkv: &mut Tensor,
        direction: Direction,
    ) -> Result<()> {
        const OPERATION: &str = "Rope::record";
        let [rows, cols] = qkv.shape();
        if cols == 0 || !cols.is_multiple_of(3 * self.head_dim) {
            return Err(Error::Mismatch {
                operation: OPERATION,
                problem: format!(
                    "qkv is [{rows}, {cols}], expected columns of 3 · heads · {}",
                    self.head_dim
                ),
            });
        }
        qkv.expect(OPERATION, "qkv", [rows, cols], &[DType::F32, DType::BF16])?;
        stream.context().check_same(&self.table.data, &qkv.data)?;
        let (heads, half) = (cols / (3 * self.head_dim), self.head_dim / 2);
        let sign = match direction {
            Direction::Forward => 1f32,
            Direction::Backward => -1.0,
        };
        if stream.gpu().is_some() {
            if rows == 0 {
                return Ok(());
            }
            let invocations = (rows * heads * half / 4) as u64;
            let dtype = qkv.dtype;
            return stream.dispatch(
                &name(dtype),
                || kernel(dtype),
                &[
                    invocations as u32,
                    heads as u32,
                    (half / 4) as u32,
                    self.seq as u32,
                    sign.to_bits(),
                ],
                &[self.table.binding()?, qkv.binding()?],
                invocations.div_ceil(u64::from(WORKGROUP)),
            );
        }
        let table = self.table.widened();
        qkv.fill_rows(|row, values| {
            let (cosines, sines) =
                table[row % self.seq * self.head_dim..][..self.head_dim].split_at(half);
            for head in values[..cols / 3 * 2].chunks_exact_mut(self.head_dim) {
                let (first, second) = head.split_at_mut(half);
                for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
                    let sin = sin * sign;
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        });
        Ok(())
    }
}

fn name(dtype: DType) -> String {
    format!("rope.{dtype}")
}

fn kernel(dtype: DType) -> Kernel {
    let source =
        Source::new().constant("WG", WORKGROUP).quads("x", dtype).fragment(shader!("rope.wgsl"));
    Kernel::portable(name(dtype), source, &[Binding::Read, Binding::Write])
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    [DType::F32, DType::BF16].map(kernel).into()
}
