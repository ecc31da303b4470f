//! The twin: one head of one sequence, for each of which a thread is responsible.
//!
//! The same algorithm as the shaders' with tiles of [`TILE`] × [`TILE`] scores. All five kinds of products are
//! [`product`], whose innermost loop keeps 4 × 16 sums in registers; matrices are packed for it ([`Head`]), with rows
//! padded to whole tiles and columns to whole vectors by zeros. Products and sums are rounded one by one, so that the
//! bits do not depend on the vectors that a processor has.

/// Queries and keys of a tile. Small, so that little is computed beyond the diagonal.
pub(super) const TILE: usize = 32;

const ROWS: usize = 4;
const COLS: usize = 16;

/// A score that counts for nothing; its difference from any other is finite.
const LOWEST: f32 = -1e38;

/// Sizes of a head's matrices.
#[derive(Clone, Copy)]
pub(super) struct Size {
    pub seq: usize,
    pub head_dim: usize,
}

impl Size {
    fn tiles(self) -> usize {
        self.seq.div_ceil(TILE)
    }

    /// Columns of packed rows.
    fn width(self) -> usize {
        self.head_dim.next_multiple_of(COLS)
    }

    fn scale(self) -> f32 {
        scale(self.head_dim)
    }
}

/// The factor of the scores.
pub(super) fn scale(head_dim: usize) -> f32 {
    (1.0 / (head_dim as f64).sqrt()) as f32
}

/// Rows of one head, in tiles.
pub(super) struct Head {
    /// `[tiles · TILE, width]`.
    rows: Vec<f32>,
    width: usize,
}

impl Head {
    /// Takes `seq` rows, `pitch` apart, from the start of `data`.
    pub(super) fn new(size: Size, data: &[f32], pitch: usize) -> Head {
        let width = size.width();
        let mut rows = vec![0.0; size.tiles() * TILE * width];
        for (to, from) in rows.chunks_exact_mut(width).zip(data.chunks(pitch)).take(size.seq) {
            to[..size.head_dim].copy_from_slice(&from[..size.head_dim]);
        }
        Head { rows, width }
    }

    fn zeros(size: Size) -> Head {
        Head { rows: vec![0.0; size.tiles() * TILE * size.width()], width: size.width() }
    }

    fn tile(&self, tile: usize) -> &[f32] {
        &self.rows[tile * TILE * self.width..][..TILE * self.width]
    }

    fn tile_mut(&mut self, tile: usize) -> &mut [f32] {
        &mut self.rows[tile * TILE * self.width..][..TILE * self.width]
    }

    /// The rows without padding.
    fn unpack(&self, size: Size, to: &mut [f32]) {
        for (to, from) in to.chunks_exact_mut(size.head_dim).zip(self.rows.chunks_exact(self.width))
        {
            to.copy_from_slice(&from[..size.head_dim]);
        }
    }

    /// Every tile transposed: `[tiles][width, TILE]`.
    fn transposed(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows.len()];
        let len = TILE * self.width;
        for (to, from) in out.chunks_exact_mut(len).zip(self.rows.chunks_exact(len)) {
            for (column, to) in to.chunks_exact_mut(TILE).enumerate() {
                for (row, to) in to.iter_mut().enumerate() {
                    *to = from[row * self.width + column];
                }
            }
        }
        out
    }
}

/// out `[seq, head_dim]` and lse `[seq]`.
pub(super) fn forward(size: Size, q: &Head, k: &Head, v: &Head, out: &mut [f32], lse: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { forward_avx2(size, q, k, v, out, lse) };
    }
    forward_any(size, q, k, v, out, lse);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn forward_avx2(size: Size, q: &Head, k: &Head, v: &Head, out: &mut [f32], lse: &mut [f32]) {
    forward_any(size, q, k, v, out, lse);
}

#[inline(always)]
fn forward_any(size: Size, q: &Head, k: &Head, v: &Head, out: &mut [f32], lse: &mut [f32]) {
    let (width, scale) = (size.width(), size.scale());
    let k_transposed = k.transposed();
    let mut scores = [0f32; TILE * TILE];
    let mut sums = vec![0f32; TILE * width];
    for tile in 0..size.tiles() {
        let (mut high, mut total) = ([LOWEST; TILE], [0f32; TILE]);
        sums.fill(0.0);
        for t in 0..=tile {
            scores.fill(0.0);
            let keys = &k_transposed[t * TILE * width..][..TILE * width];
            product(Left::Rows(q.tile(tile), width), size.head_dim, keys, TILE, &mut scores);
            let rows = scores.chunks_exact_mut(TILE).zip(sums.chunks_exact_mut(width));
            for (i, (row, sums)) in rows.enumerate() {
                if t == tile {
                    row[i + 1..].fill(LOWEST);
                }
                let now = maximum(high[i], row);
                let keep = exp((high[i] - now) * scale);
                high[i] = now;
                for s in &mut *row {
                    *s = exp((*s - now) * scale);
                }
                total[i] = total[i] * keep + sum(row);
                for s in sums {
                    *s *= keep;
                }
            }
            product(Left::Rows(&scores, TILE), TILE, v.tile(t), width, &mut sums);
        }
        let rows = tile * TILE..size.seq.min((tile + 1) * TILE);
        for (i, row) in rows.enumerate() {
            lse[row] = high[i] * scale + total[i].ln();
            let to = &mut out[row * size.head_dim..][..size.head_dim];
            for (to, s) in to.iter_mut().zip(&sums[i * width..]) {
                *to = s / total[i];
            }
        }
    }
}

/// What the backward pass of a head reads.
pub(super) struct Inputs {
    pub q: Head,
    pub k: Head,
    pub v: Head,
    pub out: Head,
    pub dout: Head,
    /// Padded to whole tiles.
    pub lse: Vec<f32>,
}

/// dq, dk and dv, `[seq, head_dim]` each.
pub(super) fn backward(size: Size, x: &Inputs, grads: [&mut [f32]; 3]) {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { backward_avx2(size, x, grads) };
    }
    backward_any(size, x, grads);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn backward_avx2(size: Size, x: &Inputs, grads: [&mut [f32]; 3]) {
    backward_any(size, x, grads);
}

#[inline(always)]
fn backward_any(size: Size, x: &Inputs, [dq, dk, dv]: [&mut [f32]; 3]) {
    let (width, scale) = (size.width(), size.scale());
    let (k_transposed, v_transposed) = (x.k.transposed(), x.v.transposed());
    let mut delta = vec![0f32; size.tiles() * TILE];
    let lines = x.out.rows.chunks_exact(width).zip(x.dout.rows.chunks_exact(width));
    for (delta, (out, dout)) in delta.iter_mut().zip(lines) {
        *delta = dot(out, dout);
    }
    let mut all = [Head::zeros(size), Head::zeros(size), Head::zeros(size)];
    let [q_sums, k_sums, v_sums] = &mut all;
    let (mut weights, mut ds) = ([0f32; TILE * TILE], [0f32; TILE * TILE]);
    for tile in 0..size.tiles() {
        let keys = &k_transposed[tile * TILE * width..][..TILE * width];
        let values = &v_transposed[tile * TILE * width..][..TILE * width];
        for t in tile..size.tiles() {
            weights.fill(0.0);
            product(Left::Rows(x.q.tile(t), width), size.head_dim, keys, TILE, &mut weights);
            for (i, row) in weights.chunks_exact_mut(TILE).enumerate() {
                let lse = x.lse[t * TILE + i];
                for w in &mut *row {
                    *w = exp(*w * scale - lse);
                }
                if t == tile {
                    row[i + 1..].fill(0.0);
                }
            }
            // Queries beyond the sequence have dout zero.
            let queries = Left::Columns(&weights, TILE);
            product(queries, TILE, x.dout.tile(t), width, v_sums.tile_mut(tile));
            ds.fill(0.0);
            product(Left::Rows(x.dout.tile(t), width), size.head_dim, values, TILE, &mut ds);
            let rows = ds.chunks_exact_mut(TILE).zip(weights.chunks_exact(TILE));
            for ((row, weights), delta) in rows.zip(&delta[t * TILE..]) {
                for (d, w) in row.iter_mut().zip(weights) {
                    *d = w * (*d - delta);
                }
            }
            product(Left::Columns(&ds, TILE), TILE, x.q.tile(t), width, k_sums.tile_mut(tile));
            product(Left::Rows(&ds, TILE), TILE, x.k.tile(tile), width, q_sums.tile_mut(t));
        }
    }
    for sums in [&mut *q_sums, &mut *k_sums] {
        for s in &mut sums.rows {
            *s *= scale;
        }
    }
    q_sums.unpack(size, dq);
    k_sums.unpack(size, dk);
    v_sums.unpack(size, dv);
}

// ---- Loops that become vectors ---------------------------------------------------------------------------------------

/// The left operand of a product, [`TILE`] rows of it.
#[derive(Clone, Copy)]
enum Left<'a> {
    /// Row-major, with this pitch.
    Rows(&'a [f32], usize),
    /// Column-major.
    Columns(&'a [f32], usize),
}

/// `sums[i, j] += Σ_k a[i, k] · b[k, j]` with i < [`TILE`], k < `depth`, j < `cols`; in ascending order of k.
#[inline(always)]
fn product(a: Left<'_>, depth: usize, b: &[f32], cols: usize, sums: &mut [f32]) {
    /// The deepest product is over a head's width.
    const DEPTH: usize = 128;
    let mut panel = [[0f32; ROWS]; DEPTH];
    let panel = &mut panel[..depth];
    for (strip, sums) in sums.chunks_exact_mut(ROWS * cols).enumerate() {
        match a {
            Left::Rows(a, pitch) => {
                for r in 0..ROWS {
                    let row = &a[(strip * ROWS + r) * pitch..][..depth];
                    for (to, a) in panel.iter_mut().zip(row) {
                        to[r] = *a;
                    }
                }
            }
            Left::Columns(a, pitch) => {
                for (to, a) in panel.iter_mut().zip(a[strip * ROWS..].chunks(pitch)) {
                    to.copy_from_slice(&a[..ROWS]);
                }
            }
        }
        for first in (0..cols).step_by(COLS) {
            let mut acc = [[0f32; COLS]; ROWS];
            for (r, acc) in acc.iter_mut().enumerate() {
                acc.copy_from_slice(&sums[r * cols + first..][..COLS]);
            }
            for (a, b) in panel.iter().zip(b.chunks_exact(cols)) {
                // Bounds that are constant keep the sums in registers.
                if let Some(b) = b[first..].first_chunk::<COLS>() {
                    for r in 0..ROWS {
                        for c in 0..COLS {
                            acc[r][c] += a[r] * b[c];
                        }
                    }
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                sums[r * cols + first..][..COLS].copy_from_slice(acc);
            }
        }
    }
}

const LANES: usize = 8;

#[inline(always)]
fn maximum(first: f32, values: &[f32]) -> f32 {
    let mut lanes = [first; LANES];
    for values in values.chunks_exact(LANES) {
        for (lane, v) in lanes.iter_mut().zip(values) {
            *lane = if *v > *lane { *v } else { *lane };
        }
    }
    lanes.into_iter().fold(first, f32::max)
}

#[inline(always)]
fn sum(values: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    for values in values.chunks_exact(LANES) {
        for (lane, v) in lanes.iter_mut().zip(values) {
            *lane += v;
        }
    }
    lanes.iter().sum()
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    for (a, b) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.iter().sum()
}

/// e^x to 2 units in the last place; 0 where it would be subnormal. Without branches, so that loops over it become
/// vectors: x = n ln 2 + r with |r| ≤ ln 2 / 2, 2^n by its bits and e^r by its Taylor series.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const LEAST: f32 = -87.0;
    /// 1.5 · 2²³: a sum with it is rounded to an integer, which is in its low bits.
    const ROUND: f32 = 12582912.0;
    /// ln 2 with 15 bits, whose products with n are exact, and the rest.
    const LN_2_HIGH: f32 = 0.693_145_75;
    const LN_2_LOW: f32 = 1.428_606_8e-6;
    let y = x.clamp(LEAST, 88.0);
    let rounded = y * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (y - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut series = 1.0 / 5040.0;
    for factorial in [720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0] {
        series = series * r + 1.0 / factorial;
    }
    let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    if x < LEAST { 0.0 } else { series * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Vectors and no vectors: the same bits.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn avx2_changes_nothing() {
        if !std::is_x86_feature_detected!("avx2") {
            return;
        }
        let size = Size { seq: 50, head_dim: 24 };
        let len = size.seq * size.head_dim;
        let data: Vec<f32> =
            (0..4 * len).map(|i| ((i * 7919 + 13) % 1009) as f32 / 300.0 - 1.5).collect();
        let head = |i: usize| Head::new(size, &data[i * len..], size.head_dim);
        let run = |plain: bool| {
            let (mut out, mut lse) = (vec![0.0; len], vec![0.0; 2 * TILE]);
            let mut grads = vec![0.0; 3 * len];
            let [q, k, v] = [0, 1, 2].map(head);
            match plain {
                true => forward_any(size, &q, &k, &v, &mut out, &mut lse),
                false => forward(size, &q, &k, &v, &mut out, &mut lse),
            }
            let saved = Head::new(size, &out, size.head_dim);
            let x = Inputs { q, k, v, out: saved, dout: head(3), lse: lse.clone() };
            let (dq, rest) = grads.split_at_mut(len);
            let (dk, dv) = rest.split_at_mut(len);
            match plain {
                true => backward_any(size, &x, [dq, dk, dv]),
                false => backward(size, &x, [dq, dk, dv]),
            }
            [out, lse, grads].concat().into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(run(true), run(false));
    }

    #[test]
    fn exp_is_within_two_units() {
        let mut worst = 0f64;
        for i in 0..=2_000_000 {
            let x = -87.0 + 175.0 * i as f32 / 2_000_000.0;
            let want = f64::from(x).exp();
            let unit =
                f64::from(f32::from_bits((want as f32).to_bits() + 1)) - f64::from(want as f32);
            worst = worst.max((f64::from(exp(x)) - want).abs() / unit);
        }
        assert!(worst <= 2.0, "{worst} units");
        assert_eq!([exp(0.0), exp(-1e38), exp(-87.5)], [1.0, 0.0, 0.0]);
        assert!(exp(f32::NAN).is_nan());
    }
}
