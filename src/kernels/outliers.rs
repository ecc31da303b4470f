//! What keeps outliers from a quantizer: a clip at a quantile of a tensor's magnitudes ([`Quantile`]), and a split that
//! takes the columns with the largest magnitudes out of a product ([`Split`]). Both are decided on the device, and both go
//! into [`QuantizeBoth`]'s [`Guards`].
//!
//! Shapes: `x` `[T, C]`, F32 or BF16, C a multiple of 4.
//!
//! **Exact**: the same bits on every engine; comparisons and counts of integers.
//!
//! Shaders: `shaders/magnitudes.wgsl`, `shaders/select_magnitude.wgsl`, `shaders/column_amax.wgsl`,
//! `shaders/largest_columns.wgsl`, `shaders/gather_columns.wgsl`.
//!
//! [`QuantizeBoth`]: super::QuantizeBoth
//! [`Guards`]: super::Guards

use crate::engine::buffer::{DType, Ids, Tensor};
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::engine::{Context, Stream};
use crate::{Error, Result};

use super::WORKGROUP;

const DTYPES: [DType; 2] = [DType::F32, DType::BF16];

fn mismatch<T>(operation: &'static str, problem: String) -> Result<T> {
    Err(Error::Mismatch { operation, problem })
}

fn check_x(operation: &'static str, stream: &Stream<'_>, x: &Tensor, ids: &Ids) -> Result<()> {
    x.expect(operation, "x", x.shape(), &DTYPES)?;
    if !x.cols.is_multiple_of(4) {
        return mismatch(operation, format!("x is {:?}: columns come in fours", x.shape()));
    }
    stream.context().check_same(&x.data, &ids.data)
}

// ---- The clip ------------------------------------------------------------------------------------------------------

/// Bits of a magnitude that a round looks at: eight of the exponent and three of the mantissa, then eleven more.
const BINS: usize = 1 << 11;
const SHIFTS: [u32; 2] = [20, 9];

/// The kernel that finds the magnitude at a quantile of a tensor, with its histograms: two passes over the tensor.
#[derive(Debug)]
pub struct Quantile {
    quantile: f64,
    /// Both rounds' histograms, and what the first one leaves to the second.
    bins: Ids,
}

impl Quantile {
    /// `quantile` is of 0 … 1: 0.99 leaves one element in a hundred above the threshold.
    pub fn new(ctx: &Context, quantile: f64) -> Result<Quantile> {
        if !(0.0..=1.0).contains(&quantile) {
            return mismatch("Quantile::new", format!("{quantile} is not within 0 and 1"));
        }
        Ok(Quantile { quantile, bins: ctx.zeros_ids(2 * BINS + 4)? })
    }

    /// Records `threshold` `[1, 1]` F32: the smallest magnitude such that at most ⌊(1 − quantile) · elements⌋ elements are
    /// larger, rounded up to 15 significant bits (a BF16 tensor's is exact). NaN and infinity are larger than everything;
    /// the threshold is finite.
    pub fn record(
        &mut self,
        stream: &mut Stream<'_>,
        x: &Tensor,
        threshold: &mut Tensor,
    ) -> Result<()> {
        const OPERATION: &str = "Quantile::record";
        check_x(OPERATION, stream, x, &self.bins)?;
        threshold.expect(OPERATION, "threshold", [1, 1], &[DType::F32])?;
        stream.context().check_same(&x.data, &threshold.data)?;
        let elements = x.rows * x.cols;
        // 1 − 0.99 is a bit above 0.01; the count of elements is far from 2^53.
        let above = elements - ((self.quantile * elements as f64).ceil() as usize).min(elements);
        if stream.gpu().is_none() {
            threshold.data.cpu_mut()[0] = threshold_twin(x, above);
            return Ok(());
        }
        stream.clear(self.bins.binding()?);
        for round in [0, 1] {
            if elements > 0 {
                stream.dispatch(
                    &magnitudes_name(x.dtype, round),
                    || magnitudes_kernel(x.dtype, round),
                    &[(elements / 4) as u32],
                    &[x.binding()?, self.bins.binding()?],
                    (elements as u64 / 4).div_ceil(u64::from(WORKGROUP * MAGNITUDE_STEPS)),
                )?;
            }
            stream.dispatch(
                &select_name(x.dtype, round),
                || select_kernel(x.dtype, round),
                &[above as u32],
                &[self.bins.binding()?, threshold.binding()?],
                1,
            )?;
        }
        Ok(())
    }
}

/// The bits below those that the rounds look at, set: a bin's upper end. And the largest finite value.
fn ends(dtype: DType) -> [u32; 2] {
    match dtype {
        DType::BF16 => [0, 0x7f7f_0000],
        _ => [(1 << SHIFTS[1]) - 1, 0x7f7f_ffff],
    }
}

fn threshold_twin(x: &Tensor, above: usize) -> u32 {
    let mut left = above;
    let mut chosen = None;
    for shift in SHIFTS {
        let bins = histogram(x, shift, chosen);
        let mut bin = BINS - 1;
        while bin > 0 && bins[bin] as usize <= left {
            left -= bins[bin] as usize;
            bin -= 1;
        }
        chosen = Some(chosen.unwrap_or(0) << (SHIFTS[0] - shift) | bin as u32);
    }
    let [low, largest] = ends(x.dtype);
    (chosen.unwrap_or(0) << SHIFTS[1] | low).min(largest)
}

/// Counts elements by eleven bits from `shift` on, of those whose higher bits are the ones chosen before.
fn histogram(x: &Tensor, shift: u32, chosen: Option<u32>) -> Vec<u32> {
    let count = |words: &[u32]| {
        let mut bins = vec![0u32; BINS];
        let mut add = |bits: u32| {
            let magnitude = bits & 0x7fff_ffff;
            if chosen.is_none_or(|chosen| magnitude >> SHIFTS[0] == chosen) {
                bins[(magnitude >> shift) as usize % BINS] += 1;
            }
        };
        for word in words {
            match x.dtype {
                DType::F32 => add(*word),
                _ => {
                    add(word << 16);
                    add(word & 0xffff_0000);
                }
            }
        }
        bins
    };
    // Columns come in fours, so the last word is whole.
    let words = &x.data.cpu()[..x.data.bytes() / 4];
    #[cfg(not(target_arch = "wasm32"))]
    {
        use rayon::prelude::*;
        words
            .par_chunks(1 << 16)
            .map(count)
            .reduce(|| vec![0; BINS], |a, b| a.iter().zip(b).map(|(a, b)| a + b).collect())
    }
    #[cfg(target_arch = "wasm32")]
    count(words)
}

// ---- The split -----------------------------------------------------------------------------------------------------

/// Takes the columns with the largest magnitudes out of a product over them: X · Wᵀ, X `[T, C]` and W `[N, C]`, is the
/// product of both without these columns, in MX, plus that of the columns alone, dense: `side(X) · side(W)ᵀ`.
///
/// [`Split::choose`] decides, [`Split::mask`] makes the quantizer skip the columns (in X; what W holds there is then
/// multiplied by zero), [`Split::gather`] copies them from either operand, and the products add up with beta = 1.
#[derive(Debug)]
pub struct Split {
    cols: usize,
    amax: Ids,
    columns: Ids,
    mask: Ids,
}

impl Split {
    /// A split of `n` of `cols` columns; `n` a multiple of 4.
    pub fn new(ctx: &Context, cols: usize, n: usize) -> Result<Split> {
        if n > cols || n == 0 || !n.is_multiple_of(4) {
            return mismatch("Split::new", format!("{n} of {cols} columns: they come in fours"));
        }
        Ok(Split {
            cols,
            amax: ctx.zeros_ids(cols)?,
            columns: ctx.zeros_ids(n)?,
            mask: ctx.zeros_ids(cols.div_ceil(32))?,
        })
    }

    /// The columns chosen last, the one with the largest magnitude first.
    pub fn columns(&self) -> &Ids {
        &self.columns
    }

    /// The same as a bit mask, for [`super::Guards::skip`].
    pub fn mask(&self) -> &Ids {
        &self.mask
    }

    /// Records the choice: the columns of `x` `[T, C]` with the largest magnitudes, of equals the lower index. NaN is larger
    /// than infinity.
    pub fn choose(&mut self, stream: &mut Stream<'_>, x: &Tensor) -> Result<()> {
        const OPERATION: &str = "Split::choose";
        check_x(OPERATION, stream, x, &self.amax)?;
        x.expect(OPERATION, "x", [x.rows, self.cols], &DTYPES)?;
        if stream.gpu().is_none() {
            self.choose_twin(x);
            return Ok(());
        }
        stream.clear(self.amax.binding()?);
        stream.clear(self.mask.binding()?);
        if x.rows > 0 {
            let strips = (x.cols / 4).div_ceil(WORKGROUP as usize);
            stream.dispatch(
                &amax_name(x.dtype),
                || amax_kernel(x.dtype),
                &[x.rows as u32, x.cols as u32],
                &[x.binding()?, self.amax.binding()?],
                (strips * x.rows.div_ceil(AMAX_ROWS as usize)) as u64,
            )?;
        }
        stream.dispatch(
            LARGEST,
            largest_kernel,
            &[self.cols as u32, self.columns.len() as u32],
            &[self.amax.binding()?, self.columns.binding()?, self.mask.binding()?],
            1,
        )
    }

    fn choose_twin(&mut self, x: &Tensor) {
        let amax = column_amax(x);
        let mut order: Vec<usize> = (0..self.cols).collect();
        order.sort_by_key(|c| (std::cmp::Reverse(amax[*c]), *c));
        let columns = self.columns.data.cpu_mut();
        let mask = self.mask.data.cpu_mut();
        mask.fill(0);
        for (out, column) in columns.iter_mut().zip(order) {
            *out = column as u32;
            mask[column / 32] |= 1 << (column % 32);
        }
    }

    /// Records the copy of the chosen columns of `x` `[rows, C]`, any operand, into `side` `[rows, n]` of the same type.
    pub fn gather(&self, stream: &mut Stream<'_>, x: &Tensor, side: &mut Tensor) -> Result<()> {
        const OPERATION: &str = "Split::gather";
        let n = self.columns.len();
        check_x(OPERATION, stream, x, &self.columns)?;
        x.expect(OPERATION, "x", [x.rows, self.cols], &DTYPES)?;
        side.expect(OPERATION, "side", [x.rows, n], &[x.dtype])?;
        stream.context().check_same(&x.data, &side.data)?;
        if stream.gpu().is_none() {
            let columns = self.columns.data.cpu();
            side.fill_rows(|row, values| {
                for (v, column) in values.iter_mut().zip(columns) {
                    let at = row * x.cols + *column as usize;
                    *v = f32::from_bits(x.dtype.f32_bits(x.data.cpu(), at));
                }
            });
            return Ok(());
        }
        if x.rows == 0 {
            return Ok(());
        }
        let words = side.bytes() / 4;
        stream.dispatch(
            &gather_name(x.dtype),
            || gather_kernel(x.dtype),
            &[x.cols as u32, n as u32, words as u32],
            &[x.binding()?, self.columns.binding()?, side.binding()?],
            (words as u64).div_ceil(u64::from(WORKGROUP)),
        )
    }
}

fn column_amax(x: &Tensor) -> Vec<u32> {
    let of_rows = |rows: std::ops::Range<usize>| {
        let mut amax = vec![0u32; x.cols];
        for row in rows {
            for (col, amax) in amax.iter_mut().enumerate() {
                let bits = x.dtype.f32_bits(x.data.cpu(), row * x.cols + col);
                *amax = (*amax).max(bits & 0x7fff_ffff);
            }
        }
        amax
    };
    #[cfg(not(target_arch = "wasm32"))]
    {
        use rayon::prelude::*;
        let strip = 256;
        (0..x.rows.div_ceil(strip))
            .into_par_iter()
            .map(|i| of_rows(i * strip..((i + 1) * strip).min(x.rows)))
            .reduce(
                || vec![0; x.cols],
                |a, b| a.into_iter().zip(b).map(|(a, b)| a.max(b)).collect(),
            )
    }
    #[cfg(target_arch = "wasm32")]
    of_rows(0..x.rows)
}

// ---- The shaders ---------------------------------------------------------------------------------------------------

/// Quads that an invocation of `magnitudes.wgsl` looks at: enough that adding the bins to memory is little.
const MAGNITUDE_STEPS: u32 = 32;
/// Rows that an invocation of `column_amax.wgsl` looks at.
const AMAX_ROWS: u32 = 64;
const LARGEST: &str = "largest-columns";

fn bits(source: Source, dtype: DType) -> Source {
    source.fragment(match dtype {
        DType::F32 => shader!("lib/bits_f32.wgsl"),
        _ => shader!("lib/bits_bf16.wgsl"),
    })
}

fn source() -> Source {
    Source::new().constant("WG", WORKGROUP)
}

fn round_constants(round: usize) -> Source {
    source()
        .constant("BINS", BINS as u32)
        .constant("ROUND", round as u32)
        .constant("SHIFT", SHIFTS[round])
}

fn magnitudes_name(dtype: DType, round: usize) -> String {
    format!("magnitudes.{dtype}.{round}")
}

fn magnitudes_kernel(dtype: DType, round: usize) -> Kernel {
    let source = bits(round_constants(round).constant("STEPS", MAGNITUDE_STEPS), dtype)
        .fragment(shader!("magnitudes.wgsl"));
    Kernel::portable(magnitudes_name(dtype, round), source, &[Binding::Read, Binding::Write])
}

fn select_name(dtype: DType, round: usize) -> String {
    format!("select-magnitude.{dtype}.{round}")
}

fn select_kernel(dtype: DType, round: usize) -> Kernel {
    let [low, largest] = ends(dtype);
    let source = round_constants(round)
        .constant("LOW", low)
        .constant("LARGEST", largest)
        .fragment(shader!("select_magnitude.wgsl"));
    Kernel::portable(select_name(dtype, round), source, &[Binding::Write, Binding::Write])
}

fn amax_name(dtype: DType) -> String {
    format!("column-amax.{dtype}")
}

fn amax_kernel(dtype: DType) -> Kernel {
    let source =
        bits(source().constant("ROWS", AMAX_ROWS), dtype).fragment(shader!("column_amax.wgsl"));
    Kernel::portable(amax_name(dtype), source, &[Binding::Read, Binding::Write])
}

fn largest_kernel() -> Kernel {
    Kernel::portable(
        LARGEST.into(),
        source().fragment(shader!("largest_columns.wgsl")),
        &[Binding::Read, Binding::Write, Binding::Write],
    )
}

fn gather_name(dtype: DType) -> String {
    format!("gather-columns.{dtype}")
}

fn gather_kernel(dtype: DType) -> Kernel {
    let source = source()
        .constant("PER_WORD", (4 / dtype.size()) as u32)
        .fragment(shader!("gather_columns.wgsl"));
    let bindings = [Binding::Read, Binding::Read, Binding::Write];
    Kernel::portable(gather_name(dtype), source, &bindings)
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    let mut kernels = vec![largest_kernel()];
    for dtype in DTYPES {
        kernels.extend([amax_kernel(dtype), gather_kernel(dtype)]);
        for round in [0, 1] {
            kernels.extend([magnitudes_kernel(dtype, round), select_kernel(dtype, round)]);
        }
    }
    kernels
}
