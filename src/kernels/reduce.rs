//! Sums in a fixed order: of a column of losses, of every column of a matrix.
//!
//! **Bounded**, and deterministic on an engine: f32, pairwise over invocations. Counts are exact.
//! Shaders: `shaders/reduce.wgsl`, `shaders/column_sum.wgsl`.

use crate::engine::buffer::{DType, Ids, Tensor};
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::engine::{Context, Stream};
use crate::{Error, Result};

use super::WORKGROUP;
use super::act::{self, F32};
use super::cross_entropy::IGNORED;

/// Elements that a workgroup sums.
const PER: u32 = 16 * WORKGROUP;

/// Sums and means of `[T, 1]` f32, such as losses.
#[derive(Debug)]
pub struct Reduce {
    max_rows: usize,
    /// Of the first stage's workgroups.
    sums: Tensor,
    counts: Ids,
    count: Ids,
}

impl Reduce {
    /// For up to `max_rows` rows.
    pub fn new(ctx: &Context, max_rows: usize) -> Result<Reduce> {
        let groups = max_rows.div_ceil(PER as usize).max(1);
        Ok(Reduce {
            max_rows,
            sums: ctx.zeros(DType::F32, groups, 1)?,
            counts: ctx.zeros_ids(groups)?,
            count: ctx.zeros_ids(1)?,
        })
    }

    /// Records the sum of `x` into `out`, `[1, 1]` f32.
    pub fn sum(&mut self, stream: &mut Stream<'_>, x: &Tensor, out: &mut Tensor) -> Result<()> {
        self.record("Reduce::sum", stream, x, None, false, out)
    }

    /// Records the mean of `x` into `out`, `[1, 1]` f32: the sum by the number of rows, or with `targets` by the number of
    /// those that are not ignored ([`IGNORED`]), whose values must be zero. The mean of no rows is zero.
    pub fn mean(
        &mut self,
        stream: &mut Stream<'_>,
        x: &Tensor,
        targets: Option<&Ids>,
        out: &mut Tensor,
    ) -> Result<()> {
        self.record("Reduce::mean", stream, x, targets, true, out)
    }

    /// How many rows the last recording counted: one number.
    pub fn count(&self) -> &Ids {
        &self.count
    }

    fn record(
        &mut self,
        operation: &'static str,
        stream: &mut Stream<'_>,
        x: &Tensor,
        targets: Option<&Ids>,
        mean: bool,
        out: &mut Tensor,
    ) -> Result<()> {
        let rows = x.rows;
        x.expect(operation, "x", [rows, 1], F32)?;
        out.expect(operation, "out", [1, 1], F32)?;
        if rows == 0 || rows > self.max_rows {
            return Err(Error::Mismatch {
                operation,
                problem: format!("x has {rows} rows, expected 1 to {}", self.max_rows),
            });
        }
        act::check_same(stream, &[&x.data, &out.data, &self.sums.data])?;
        if let Some(targets) = targets {
            act::expect_len(operation, "targets", targets.len(), rows)?;
            act::check_same(stream, &[&targets.data])?;
        }
        if stream.gpu().is_none() {
            self.twin(x, targets, mean, out);
            return Ok(());
        }
        let groups = rows.div_ceil(PER as usize);
        // Without targets these are bound and not read.
        let ids = targets.unwrap_or(&self.count);
        stream.dispatch(
            REDUCE,
            reduce_kernel,
            &[rows as u32, u32::from(targets.is_some()), 0],
            &[x.binding()?, ids.binding()?, self.sums.binding()?, self.counts.binding()?],
            groups as u64,
        )?;
        stream.dispatch(
            REDUCE_ALL,
            reduce_all_kernel,
            &[groups as u32, 2, u32::from(mean)],
            &[self.sums.binding()?, self.counts.binding()?, out.binding()?, self.count.binding()?],
            1,
        )
    }

    fn twin(&mut self, x: &Tensor, targets: Option<&Ids>, mean: bool, out: &mut Tensor) {
        let count = match targets {
            Some(targets) => targets.data.cpu().iter().filter(|id| **id != IGNORED).count(),
            None => x.rows,
        };
        self.count.data.cpu_mut()[0] = count as u32;
        let mut sum = pairwise(&x.widened());
        if mean {
            sum /= count.max(1) as f32;
        }
        out.fill_rows(|_, out| out[0] = sum);
    }
}

/// A sum whose error grows with the logarithm of the length.
fn pairwise(x: &[f32]) -> f32 {
    match x.len() {
        0..=32 => x.iter().sum(),
        n => {
            let (low, high) = x.split_at(n / 2);
            pairwise(low) + pairwise(high)
        }
    }
}

/// Records the sums of the columns of `x`'s first `rows` rows into `out`, `[1, C]` f32, or adds them to it.
pub(crate) fn columns(
    stream: &mut Stream<'_>,
    x: &Tensor,
    rows: usize,
    out: &mut Tensor,
    accumulate: bool,
) -> Result<()> {
    let cols = x.cols;
    if stream.gpu().is_none() {
        let x = x.widened();
        out.fill_rows(|_, out| {
            let mut sums = vec![0f32; cols];
            for row in x.chunks(cols).take(rows) {
                for (sum, x) in sums.iter_mut().zip(row) {
                    *sum += x;
                }
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = if accumulate { sum + *out } else { sum };
            }
        });
        return Ok(());
    }
    let quads = cols / 4;
    stream.dispatch(
        COLUMNS,
        columns_kernel,
        &[rows as u32, quads as u32, u32::from(accumulate)],
        &[x.binding()?, out.binding()?],
        (quads as u64).div_ceil(u64::from(ACROSS)),
    )
}

/// Quads side by side in a workgroup of the column sum.
const ACROSS: u32 = 4;

const COLUMNS: &str = "column_sum";
const REDUCE: &str = "reduce.parts";
const REDUCE_ALL: &str = "reduce.all";

fn columns_kernel() -> Kernel {
    let source = Source::new()
        .constant("WG", WORKGROUP)
        .constant("ACROSS", ACROSS)
        .fragment(shader!("column_sum.wgsl"));
    Kernel::portable(COLUMNS.into(), source, &[Binding::Read, Binding::Write])
}

fn reduce_kernel() -> Kernel {
    reduce_variant(REDUCE, PER)
}

/// One workgroup takes everything.
fn reduce_all_kernel() -> Kernel {
    reduce_variant(REDUCE_ALL, 1 << 31)
}

fn reduce_variant(name: &str, per: u32) -> Kernel {
    let source = Source::new()
        .constant("WG", WORKGROUP)
        .constant("PER", per)
        .fragment(shader!("reduce.wgsl"));
    let bindings = [Binding::Read, Binding::Read, Binding::Write, Binding::Write];
    Kernel::portable(name.into(), source, &bindings)
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    vec![columns_kernel(), reduce_kernel(), reduce_all_kernel()]
}
