//! The embedding: a row of a table for each token, and the gradient of the table.
//!
//! `tokens` T ids; `table` `[V, C]` and activations `[T, C]` of f32 or bf16 each, C a multiple of four; `dtable` `[V, C]` f32.
//! **Exact** but for subnormals, which a GPU may flush: the gradient of a token's row is the sum of its rows of `dx` in
//! ascending order, in pieces of [`PIECE`], and then of the pieces; f32 additions that no engine does in another order. A
//! token outside the vocabulary gives a row of NaN, so that it is seen, and has no gradient.
//!
//! Shaders: `shaders/embedding.wgsl`, `shaders/embedding_pieces.wgsl`, `shaders/embedding_rows.wgsl`; and [`super::sort`].

use crate::engine::buffer::{DType, Ids, Tensor};
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::engine::{Context, Stream};
use crate::formats::element::NAN;
use crate::{Error, Result};

use super::WORKGROUP;
use super::act::{self, ACT, F32, STEPS};
use super::sort::Sort;

/// Rows that are summed one after the other.
pub const PIECE: usize = 64;

/// Records the rows of `table` that `tokens` name into `x`.
pub fn forward(
    stream: &mut Stream<'_>,
    tokens: &Ids,
    table: &Tensor,
    x: &mut Tensor,
) -> Result<()> {
    let operation = "embedding::forward";
    let [vocabulary, cols] = act::shape(operation, "table", table)?;
    let rows = tokens.len();
    x.expect(operation, "x", [rows, cols], ACT)?;
    act::check_same(stream, &[&tokens.data, &table.data, &x.data])?;
    if rows == 0 {
        return Ok(());
    }
    if stream.gpu().is_none() {
        let (tokens, table) = (tokens.data.cpu(), table.widened());
        x.fill_rows(|t, x| match tokens[t] as usize {
            token if token < vocabulary => {
                x.copy_from_slice(&table[token * cols..(token + 1) * cols]);
            }
            _ => x.fill(f32::NAN),
        });
        return Ok(());
    }
    let (table_type, x_type) = (table.dtype, x.dtype);
    let vectors = rows * cols / 4;
    stream.dispatch(
        &forward_name(table_type, x_type),
        || forward_kernel(table_type, x_type),
        &[vectors as u32, (cols / 4) as u32, vocabulary as u32, NAN],
        &[tokens.binding()?, table.binding()?, x.binding()?],
        act::step_groups(vectors),
    )
}

/// The gradient of a table, with the memory it needs.
#[derive(Debug)]
pub struct EmbeddingGradient {
    vocabulary: usize,
    cols: usize,
    sort: Sort,
    /// Sums of pieces; see `shaders/embedding_pieces.wgsl`.
    parts: Tensor,
}

impl EmbeddingGradient {
    /// For up to `max_tokens` tokens at once.
    pub fn new(
        ctx: &Context,
        max_tokens: usize,
        vocabulary: usize,
        cols: usize,
    ) -> Result<EmbeddingGradient> {
        let sort = Sort::new(ctx, max_tokens, vocabulary)?;
        // The twin needs none.
        let pieces = if ctx.wgpu().is_some() { max_tokens.div_ceil(PIECE) } else { 0 };
        let parts = ctx.zeros(DType::F32, 2 * pieces, cols)?;
        Ok(EmbeddingGradient { vocabulary, cols, sort, parts })
    }

    /// Records `dtable`, which is overwritten or, with `accumulate`, added to.
    pub fn record(
        &mut self,
        stream: &mut Stream<'_>,
        tokens: &Ids,
        dx: &Tensor,
        dtable: &mut Tensor,
        accumulate: bool,
    ) -> Result<()> {
        let operation = "EmbeddingGradient::record";
        let [rows, cols] = act::shape(operation, "dx", dx)?;
        if cols != self.cols {
            return Err(Error::Mismatch {
                operation,
                problem: format!("dx is [{rows}, {cols}], the table has {} columns", self.cols),
            });
        }
        act::expect_len(operation, "tokens", tokens.len(), rows)?;
        dtable.expect(operation, "dtable", [self.vocabulary, cols], F32)?;
        act::check_same(stream, &[&tokens.data, &dx.data, &dtable.data, &self.parts.data])?;
        self.sort.record(stream, tokens)?;
        if stream.gpu().is_none() {
            self.twin(dx, dtable, accumulate);
            return Ok(());
        }
        let quads = cols / 4;
        let groups = |vectors: usize| (vectors as u64).div_ceil(u64::from(WORKGROUP));
        let dx_type = dx.dtype;
        let (starts, parts) = (self.sort.starts().binding()?, self.parts.binding()?);
        stream.dispatch(
            &pieces_name(dx_type),
            || pieces_kernel(dx_type),
            &[rows as u32, quads as u32, self.vocabulary as u32, u32::from(accumulate)],
            &[
                tokens.binding()?,
                self.sort.order().binding()?,
                starts,
                dx.binding()?,
                dtable.binding()?,
                parts,
            ],
            rows.div_ceil(PIECE) as u64,
        )?;
        stream.dispatch(
            ROWS,
            rows_kernel,
            &[self.vocabulary as u32, quads as u32, u32::from(accumulate)],
            &[starts, parts, dtable.binding()?],
            groups(self.vocabulary * quads),
        )
    }

    fn twin(&self, dx: &Tensor, dtable: &mut Tensor, accumulate: bool) {
        let (cols, dx) = (self.cols, dx.widened());
        let (order, starts) = (self.sort.order().data.cpu(), self.sort.starts().data.cpu());
        dtable.fill_rows(|token, out| {
            let places = &order[starts[token] as usize..starts[token + 1] as usize];
            if accumulate && places.is_empty() {
                return;
            }
            let mut sum = vec![0f32; cols];
            let mut piece = vec![0f32; cols];
            for (i, places) in places.chunks(PIECE).enumerate() {
                piece.fill(0.0);
                for t in places {
                    for (sum, dx) in piece.iter_mut().zip(&dx[*t as usize * cols..]) {
                        *sum += dx;
                    }
                }
                if i == 0 {
                    sum.copy_from_slice(&piece);
                    continue;
                }
                for (sum, piece) in sum.iter_mut().zip(&piece) {
                    *sum += piece;
                }
            }
            for (out, sum) in out.iter_mut().zip(sum) {
                *out = if accumulate { *out + sum } else { sum };
            }
        });
    }
}

// ---- The shaders ---------------------------------------------------------------------------------------------------

const ROWS: &str = "embedding_rows";

fn forward_name(table: DType, x: DType) -> String {
    format!("embedding.{table}.{x}")
}

fn forward_kernel(table: DType, x: DType) -> Kernel {
    let source = Source::new()
        .constant("WG", WORKGROUP)
        .constant("STEPS", STEPS)
        .quads("table", table)
        .quads("x", x)
        .fragment(shader!("embedding.wgsl"));
    let bindings = [Binding::Read, Binding::Read, Binding::Write];
    Kernel::portable(forward_name(table, x), source, &bindings)
}

fn pieces_name(dx: DType) -> String {
    format!("embedding_pieces.{dx}")
}

fn pieces_kernel(dx: DType) -> Kernel {
    let source = Source::new()
        .constant("WG", WORKGROUP)
        .constant("PIECE", PIECE as u32)
        .quads("dx", dx)
        .fragment(shader!("embedding_pieces.wgsl"));
    let mut bindings = vec![Binding::Read; 4];
    bindings.extend([Binding::Write, Binding::Write]);
    Kernel::portable(pieces_name(dx), source, &bindings)
}

fn rows_kernel() -> Kernel {
    let source = Source::new()
        .constant("WG", WORKGROUP)
        .constant("PIECE", PIECE as u32)
        .fragment(shader!("embedding_rows.wgsl"));
    Kernel::portable(ROWS.into(), source, &[Binding::Read, Binding::Read, Binding::Write])
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    let mut kernels = vec![rows_kernel()];
    for a in ACT {
        kernels.push(pieces_kernel(*a));
        kernels.extend(ACT.iter().map(|b| forward_kernel(*a, *b)));
    }
    kernels
}
