//! What the layer kernels of training share: the checks of activations, the building of variants, and the loops of the twins.
//!
//! An activation is a dense `[rows, columns]` of f32 or bf16 with a multiple of four columns: shaders read quads.

use crate::engine::Stream;
use crate::engine::buffer::{DType, Rows, Tensor};
use crate::{Error, Result};

use super::WORKGROUP;

/// The types of an activation.
pub(crate) const ACT: &[DType] = &[DType::F32, DType::BF16];
/// The type of statistics, of parameters' gradients and of losses.
pub(crate) const F32: &[DType] = &[DType::F32];

/// Vectors that an invocation of an elementwise kernel has in flight.
pub(crate) const STEPS: u32 = 4;

/// `x`'s shape, if it is an activation.
pub(crate) fn shape(operation: &'static str, what: &str, x: &Tensor) -> Result<[usize; 2]> {
    x.expect(operation, what, x.shape(), ACT)?;
    let [rows, cols] = x.shape();
    if rows == 0 || cols == 0 || !cols.is_multiple_of(4) {
        return Err(Error::Mismatch {
            operation,
            problem: format!(
                "{what} is [{rows}, {cols}], expected rows and a multiple of four columns"
            ),
        });
    }
    Ok([rows, cols])
}

/// Checks a number of ids.
pub(crate) fn expect_len(
    operation: &'static str,
    what: &str,
    len: usize,
    rows: usize,
) -> Result<()> {
    match len == rows {
        true => Ok(()),
        false => {
            Err(Error::Mismatch { operation, problem: format!("{len} {what}, but {rows} rows") })
        }
    }
}

/// Each of these must live on the stream's engine.
pub(crate) fn check_same(stream: &Stream<'_>, tensors: &[&Rows]) -> Result<()> {
    tensors.iter().try_for_each(|tensor| stream.context().check_same(tensors[0], tensor))
}

/// Workgroups of an elementwise kernel, whose invocations take [`STEPS`] vectors each.
pub(crate) fn step_groups(vectors: usize) -> u64 {
    (vectors as u64).div_ceil(u64::from(WORKGROUP * STEPS))
}

/// Σ a·b in a fixed order that vectorises.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0f32; LANES];
    let (a_parts, b_parts) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = a_parts.remainder().iter().zip(b_parts.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_parts.zip(b_parts) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    rest + sums.iter().sum::<f32>()
}

/// e^x for x ≤ 0, within two units of the last place; zero below −87, where f32 is about to become subnormal. Unlike the
/// standard library's it vectorises.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // x = n·ln 2 + r, n whole: added to 1.5·2²³, a number has no fraction bits left, and its last bits count.
    const WHOLE: f32 = 12_582_912.0;
    let count = x * std::f32::consts::LOG2_E + WHOLE;
    let n = count - WHOLE;
    // ln 2 in two parts, of which n times the first is exact.
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    // The Taylor series: |r| ≤ 0.35, so the first term left out is below 6·10⁻⁹.
    let series = [5040.0f32, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0]
        .into_iter()
        .fold(0.0, |sum, factorial| sum * r + 1.0 / factorial);
    let power = f32::from_bits(count.to_bits().wrapping_add(127) << 23);
    if x < -87.0 { 0.0 } else { series * power }
}

#[cfg(test)]
mod tests {
    #[test]
    fn exp_is_within_two_units() {
        for i in 0..870_000 {
            let x = -(i as f32) * 1e-4;
            let want = f64::from(x).exp();
            let error = (f64::from(super::exp(x)) - want).abs() / want;
            assert!(error < 2.0 * 2f64.powi(-23), "exp({x}) is off by {error:e}");
        }
        assert_eq!(super::exp(0.0), 1.0);
        assert_eq!(super::exp(-1e30), 0.0);
        assert_eq!(super::exp(f32::NEG_INFINITY), 0.0);
        assert!(super::exp(f32::NAN).is_nan());
    }
}
