//! Rotary embedding and causal attention on every engine (tests/common/engines.rs), against f64 references with whole
//! matrices of scores, f64 finite differences, and what must not change a bit.
//!
//! Bounds, with u = 2⁻²⁴: a sum of n products in any order, fused or not, is off by at most (n + 1) u Σ|terms|; `exp`'s
//! argument x carries its own errors and WGSL grants its result 3 + 2|x| ulp, a division 2.5 ulp and a logarithm 3 ulp or
//! 2⁻²¹. Each error is carried through to the outputs; bf16 rounds them by 2⁻⁸. On tensor cores, weights and the gradients of
//! scores are rounded by 2⁻⁸ as well, and sums by 4 u a term (tests/common/product.rs says why).

mod common;

use common::engines::{self, CPU, Form, PLAIN, Test};
use common::{assert_bytes, gaussian, narrowed, to_f32};
use libtest_mimic::{Failed, Trial};
use microscaling::kernels::{Attention, AttentionDesc, Direction, Rope};
use microscaling::{Context, DType, Error, Options, Tensor, Tier, wgpu};

const SUITE: &[(&str, Test)] = &[
    ("rope_equals_the_reference", rope_equals_the_reference),
    ("rope_backward_is_the_inverse", rope_backward_is_the_inverse),
    ("rope_mismatches_are_errors", rope_mismatches_are_errors),
    ("gradients_equal_finite_differences", gradients_equal_finite_differences),
    ("attention_mismatches_are_errors", attention_mismatches_are_errors),
    ("tiers_are_as_asked_for", tiers_are_as_asked_for),
];

/// In every tier that the engine has.
const TIERS: &[(&str, Test)] = &[
    ("attention_equals_the_reference", attention_equals_the_reference),
    ("later_tokens_change_nothing_earlier", later_tokens_change_nothing_earlier),
    ("sequences_are_independent", sequences_are_independent),
    ("large_logits", large_logits),
    ("wide_heads_need_workgroup_memory", wide_heads),
];

const EMULATED: &str = " emulated";

fn main() {
    let needs = (wgpu::Features::empty(), "");
    let forms = [
        Form { what: PLAIN, options: Options::default(), steps: [1, 1], needs },
        Form {
            what: EMULATED,
            options: Options { emulate_tensor: true, ..Default::default() },
            steps: [1, 1],
            // As for the emulation of matrix products. SwiftShader lacks it, whose compiler takes minutes and gigabytes.
            needs: (wgpu::Features::SHADER_F16, "no f16 in shaders"),
        },
    ];
    let suite = |form: &str| match form {
        CPU | PLAIN => [SUITE, TIERS].concat(),
        _ => TIERS.to_vec(),
    };
    let alone = vec![Trial::test("a_comparison_that_must_fail_fails", comparison_fails)];
    engines::run(suite, &forms, alone);
}

const U: f64 = 1.0 / 16777216.0;
/// What products that are flushed to zero can add up to.
const TINY: f64 = 1e-34;

/// Half a unit in the last place, relative.
fn rounding(dtype: DType) -> f64 {
    if dtype == DType::BF16 { 1.0 / 256.0 } else { U }
}

/// Both matrices of scores on their way to the next product.
fn operand_rounding(tier: Tier) -> f64 {
    if tier == Tier::Tensor { rounding(DType::BF16) } else { 0.0 }
}

/// The tiers to test; the tensor tier alone where it is emulated, since the same driver is tested without emulation too.
fn tiers(ctx: &Context, dtype: DType, head_dim: usize) -> Vec<Tier> {
    let desc = AttentionDesc { batch: 1, seq: 1, heads: 1, head_dim };
    let tensor = Attention::with_tier(ctx, &desc, Tier::Tensor).is_ok();
    match (dtype, tensor) {
        (DType::BF16, true) if ctx.caps().software => vec![Tier::Tensor],
        (DType::BF16, true) => vec![Tier::Alu, Tier::Tensor],
        (_, true) if ctx.caps().software => Vec::new(),
        _ => vec![Tier::Alu],
    }
}

/// Fails unless every `got` is within its bound; NaN never is.
fn compare(what: &str, got: &[f32], want: &[f64], bound: &[f64]) -> Result<(), Failed> {
    assert_eq!((got.len(), want.len()), (want.len(), bound.len()), "{what}: lengths");
    let within = |i: usize| (f64::from(got[i]) - want[i]).abs() <= bound[i];
    let wrong: Vec<_> = (0..got.len()).filter(|i| !within(*i)).collect();
    match wrong.first() {
        None => Ok(()),
        Some(i) => Err(format!(
            "{what}: {} of {} outside their bounds, the first at {i}: {}, want {} ± {}",
            wrong.len(),
            got.len(),
            got[*i],
            want[*i],
            bound[*i]
        )
        .into()),
    }
}

fn comparison_fails() -> Result<(), Failed> {
    let case = Case { batch: 1, seq: 9, heads: 2, dim: 16 };
    let (qkv, dout) = case.inputs(DType::F32, 1, 1.0);
    let want = case.reference(&qkv, &dout, DType::F32, Tier::Alu);
    for x in [&want.out, &want.lse, &want.dqkv] {
        let mut got: Vec<f32> = x.0.iter().map(|v| *v as f32).collect();
        compare("sound", &got, &x.0, &x.1)?;
        let largest = |a: &usize, b: &usize| got[*a].abs().total_cmp(&got[*b].abs());
        let at = (0..got.len()).max_by(largest).unwrap();
        let sound = got[at];
        got[at] = f32::from_bits(sound.to_bits() ^ 0x100);
        assert!(compare("planted", &got, &x.0, &x.1).is_err(), "2^8 units go unnoticed");
        got[at] = f32::NAN;
        assert!(compare("planted", &got, &x.0, &x.1).is_err(), "NaN goes unnoticed");
    }
    Ok(())
}

/// A tensor full of NaN.
fn unwritten(ctx: &Context, dtype: DType, rows: usize, cols: usize) -> Result<Tensor, Error> {
    ctx.upload(dtype, rows, cols, &vec![0xff; rows * cols * dtype.size()])
}

// ---- Rotary embedding ----------------------------------------------------------------------------------------------

fn rope_equals_the_reference(ctx: &Context, _: usize) -> Result<(), Failed> {
    for (rows, seq, heads, dim, base) in
        [(1, 1, 1, 8, 1e4), (14, 7, 3, 16, 1e4), (131, 100, 2, 64, 5e5)]
    {
        let rope = Rope::new(ctx, seq, dim, base)?;
        for (dtype, sign) in [(DType::F32, 1.0), (DType::BF16, 1.0), (DType::F32, -1.0)] {
            let cols = 3 * heads * dim;
            let bytes = narrowed(dtype, &gaussian(3, rows * cols));
            let x = to_f32(dtype, &bytes);
            let mut qkv = ctx.upload(dtype, rows, cols, &bytes)?;
            let mut stream = ctx.stream();
            let direction = if sign > 0.0 { Direction::Forward } else { Direction::Backward };
            rope.record(&mut stream, &mut qkv, direction)?;
            ctx.submit(stream)?;
            let got = to_f32(dtype, &ctx.read_blocking(&qkv)?);
            let (mut want, mut bound) = (Vec::new(), Vec::new());
            for (i, v) in x.iter().enumerate() {
                let (row, col) = (i / cols, i % cols);
                let v = f64::from(*v);
                if col >= 2 * heads * dim {
                    want.push(v);
                    bound.push(0.0);
                    continue;
                }
                // (v, other) as a complex number: the first half's is v + i other.
                let at = col % dim;
                let first = at < dim / 2;
                let other = f64::from(x[if first { i + dim / 2 } else { i - dim / 2 }]);
                let angle = sign * (row % seq) as f64
                    / base.powf(2.0 * (at % (dim / 2)) as f64 / dim as f64);
                let (sin, cos) = angle.sin_cos();
                let turned = if first { v * cos - other * sin } else { v * cos + other * sin };
                // The table's rounding, the product's and the sum's.
                let arithmetic = 3.0 * U * ((v * cos).abs() + (other * sin).abs()) + TINY;
                want.push(turned);
                bound.push(arithmetic + rounding(dtype) * (turned.abs() + arithmetic));
            }
            compare(&format!("{rows} rows of {heads} × {dim}, {dtype}"), &got, &want, &bound)?;
        }
    }
    Ok(())
}

fn rope_backward_is_the_inverse(ctx: &Context, _: usize) -> Result<(), Failed> {
    let (rows, seq, heads, dim) = (33, 33, 2, 32);
    let cols = 3 * heads * dim;
    let x = gaussian(4, rows * cols);
    let mut qkv = ctx.upload(DType::F32, rows, cols, &narrowed(DType::F32, &x))?;
    let rope = Rope::new(ctx, seq, dim, 1e4)?;
    let mut stream = ctx.stream();
    rope.record(&mut stream, &mut qkv, Direction::Forward)?;
    rope.record(&mut stream, &mut qkv, Direction::Backward)?;
    ctx.submit(stream)?;
    let got = to_f32(DType::F32, &ctx.read_blocking(&qkv)?);
    let want: Vec<_> = x.iter().map(|v| f64::from(*v)).collect();
    // Either direction: 4 u of |a| + |b|, which is at most √2 times the pair's length; the length stays.
    let bound: Vec<_> = (0..x.len())
        .map(|i| {
            let at = i % dim;
            let other = x[if at < dim / 2 { i + dim / 2 } else { i - dim / 2 }];
            2.0 * 4.0 * U * 2f64.sqrt() * f64::from(x[i].hypot(other)) * (1.0 + 1e-6)
        })
        .collect();
    compare("there and back", &got, &want, &bound)
}

fn rope_mismatches_are_errors(ctx: &Context, _: usize) -> Result<(), Failed> {
    let error = Rope::new(ctx, 4, 12, 1e4).unwrap_err().to_string();
    assert!(error.contains("12"), "{error}");
    let rope = Rope::new(ctx, 4, 16, 1e4)?;
    for (dtype, cols, says) in [(DType::F32, 40, "40"), (DType::F16, 48, "f16")] {
        let mut qkv = ctx.zeros(dtype, 4, cols)?;
        let error = rope.record(&mut ctx.stream(), &mut qkv, Direction::Forward).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
    Ok(())
}

// ---- Attention -----------------------------------------------------------------------------------------------------

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    seq: usize,
    heads: usize,
    dim: usize,
}

/// Values and bounds.
type Bounded = (Vec<f64>, Vec<f64>);

struct Reference {
    out: Bounded,
    lse: Bounded,
    dqkv: Bounded,
}

/// What an engine makes, in bytes.
struct Results {
    out: Vec<u8>,
    lse: Vec<u8>,
    dqkv: Vec<u8>,
}

impl Case {
    fn rows(&self) -> usize {
        self.batch * self.seq
    }

    fn cols(&self) -> usize {
        self.heads * self.dim
    }

    /// qkv and dout that `dtype` holds exactly.
    fn inputs(&self, dtype: DType, seed: u64, size: f32) -> (Vec<f32>, Vec<f32>) {
        let exact = |x: Vec<f32>| to_f32(dtype, &narrowed(dtype, &x));
        let mut qkv = gaussian(seed, self.rows() * 3 * self.cols());
        for (i, v) in qkv.iter_mut().enumerate() {
            if i % (3 * self.cols()) < 2 * self.cols() {
                *v *= size;
            }
        }
        (exact(qkv), exact(gaussian(seed + 1, self.rows() * self.cols())))
    }

    fn run(
        &self,
        ctx: &Context,
        tier: Tier,
        dtype: DType,
        qkv: &[f32],
        dout: &[f32],
    ) -> Result<Results, Failed> {
        let (rows, cols) = (self.rows(), self.cols());
        let desc = AttentionDesc {
            batch: self.batch,
            seq: self.seq,
            heads: self.heads,
            head_dim: self.dim,
        };
        let attention = Attention::with_tier(ctx, &desc, tier)?;
        assert_eq!(attention.tier(dtype), tier);
        let qkv = ctx.upload(dtype, rows, 3 * cols, &narrowed(dtype, qkv))?;
        let dout = ctx.upload(dtype, rows, cols, &narrowed(dtype, dout))?;
        let mut out = unwritten(ctx, dtype, rows, cols)?;
        let mut lse = unwritten(ctx, DType::F32, rows, self.heads)?;
        let mut dqkv = unwritten(ctx, dtype, rows, 3 * cols)?;
        let mut stream = ctx.stream();
        attention.forward(&mut stream, &qkv, &mut out, &mut lse)?;
        attention.backward(&mut stream, &qkv, &out, &lse, &dout, &mut dqkv)?;
        ctx.submit(stream)?;
        Ok(Results {
            out: ctx.read_blocking(&out)?,
            lse: ctx.read_blocking(&lse)?,
            dqkv: ctx.read_blocking(&dqkv)?,
        })
    }

    /// Where element d of a head's q (third 0), k or v is in qkv.
    fn at(&self, third: usize, b: usize, i: usize, h: usize, d: usize) -> usize {
        ((b * self.seq + i) * 3 + third) * self.cols() + h * self.dim + d
    }

    /// Scores and Σ|q k| of a query with a key.
    fn score(&self, qkv: &[f64], b: usize, h: usize, i: usize, j: usize) -> (f64, f64) {
        let terms =
            (0..self.dim).map(|d| qkv[self.at(0, b, i, h, d)] * qkv[self.at(1, b, j, h, d)]);
        let scale = 1.0 / (self.dim as f64).sqrt();
        terms.fold((0.0, 0.0), |(s, all), term| (s + term * scale, all + term.abs() * scale))
    }

    /// The whole, with every intermediate matrix, and how far an engine may be off.
    fn reference(&self, qkv: &[f32], dout: &[f32], dtype: DType, tier: Tier) -> Reference {
        // Of a sum of products, a term.
        let unit = if tier == Tier::Tensor { 4.0 * U } else { U };
        let operand = operand_rounding(tier);
        let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|v| f64::from(*v)).collect() };
        let (qkv, dout) = (wide(qkv), wide(dout));
        let (n, dim) = (self.seq, self.dim);
        let scale = 1.0 / (dim as f64).sqrt();
        let zeros = |len| (vec![0f64; len], vec![0f64; len]);
        let mut out = zeros(self.rows() * self.cols());
        let mut lse = zeros(self.rows() * self.heads);
        let mut grad = zeros(qkv.len());
        for (b, h) in (0..self.batch).flat_map(|b| (0..self.heads).map(move |h| (b, h))) {
            for i in 0..n {
                let row = b * n + i;
                let keys = i + 1;
                let scores: Vec<_> = (0..keys).map(|j| self.score(&qkv, b, h, i, j)).collect();
                let high = scores.iter().fold(f64::MIN, |m, s| m.max(s.0));
                let total: f64 = scores.iter().map(|s| (s.0 - high).exp()).sum();
                let log = high + total.ln();
                let p: Vec<_> = scores.iter().map(|s| (s.0 - log).exp()).collect();
                // The sum of products; scaled by a rounded factor.
                let score_error: Vec<_> =
                    scores.iter().map(|s| (dim as f64 + 4.0) * unit * s.1).collect();
                // Subtraction, scaling and exp, which for the running maximum happen for a part of the difference in every
                // tile: 6 u of the whole, and a constant a tile. No engine's tiles are smaller than 32. On tensor cores what is
                // subtracted may be 40 less than the maximum, and is scaled before, to which rounding lse adds another.
                let room = if tier == Tier::Tensor { 40.0 } else { 0.0 };
                let tiles = n.div_ceil(32) as f64 + 1.0;
                let weight_error: Vec<_> = scores
                    .iter()
                    .zip(&score_error)
                    .map(|(s, e)| {
                        (e + 6.0 * U * ((s.0 - high).abs() + room) + 7.0 * U * tiles).exp_m1()
                    })
                    .collect();
                let sum_error = (keys as f64 + 2.0) * U;
                let total_error =
                    sum_error + p.iter().zip(&weight_error).map(|(p, e)| p * e).sum::<f64>();
                let at_lse = row * self.heads + h;
                lse.0[at_lse] = log;
                lse.1[at_lse] = total_error * (1.0 + total_error)
                    + (6.0 * U * total.ln().abs()).max(1.0 / f64::from(1 << 21))
                    + 2.0 * U * (high.abs() + room)
                    + U * log.abs();
                let at_out = row * self.cols() + h * dim;
                for d in 0..dim {
                    let v = |j| qkv[self.at(2, b, j, h, d)];
                    let value: f64 = (0..keys).map(|j| p[j] * v(j)).sum();
                    let all: f64 = (0..keys).map(|j| p[j] * v(j).abs()).sum();
                    let off: f64 = (0..keys).map(|j| p[j] * v(j).abs() * weight_error[j]).sum();
                    let sums = (keys as f64 + 2.0) * unit;
                    let error = (off + all * (sums + total_error + 5.0 * U + operand))
                        * (1.0 + 2.0 * total_error + operand)
                        + TINY;
                    out.0[at_out + d] = value;
                    out.1[at_out + d] = error + rounding(dtype) * (value.abs() + error);
                }

                // Backward, from this row's out and lse as the engine may have them.
                let g = |d: usize| dout[at_out + d];
                let delta: f64 = (0..dim).map(|d| g(d) * out.0[at_out + d]).sum();
                let delta_error: f64 = (0..dim)
                    .map(|d| {
                        let (value, error) = (out.0[at_out + d].abs(), out.1[at_out + d]);
                        g(d).abs() * (error + (dim as f64 + 1.0) * U * (value + error))
                    })
                    .sum();
                for j in 0..keys {
                    let x = scores[j].0 - log;
                    // Scores, and lse on tensor cores, are scaled before the subtraction.
                    let scaled = if tier == Tier::Tensor { 4.0 } else { 2.0 };
                    let r = (score_error[j]
                        + lse.1[at_lse]
                        + scaled * U * scores[j].0.abs()
                        + U * x.abs()
                        + (3.0 + 2.0 * x.abs()) * 2.0 * U)
                        .exp_m1();
                    let dp: f64 = (0..dim).map(|d| g(d) * qkv[self.at(2, b, j, h, d)]).sum();
                    let dp_error: f64 =
                        (0..dim).map(|d| (g(d) * qkv[self.at(2, b, j, h, d)]).abs()).sum::<f64>()
                            * (dim as f64 + 1.0)
                            * unit;
                    let difference = dp - delta;
                    let off = dp_error + delta_error + U * difference.abs();
                    let ds = p[j] * difference;
                    let ds_error =
                        p[j] * (r * (difference.abs() + off) + off + 2.0 * U * difference.abs());
                    // As they are rounded for the next product.
                    let ds_error = ds_error + operand * (ds.abs() + ds_error);
                    let r = r + operand * (1.0 + r);
                    // A sum over all queries or keys: n + 3 roundings of each term.
                    let sums = (n as f64 + 3.0) * unit;
                    for d in 0..dim {
                        let (q, k) = (qkv[self.at(0, b, i, h, d)], qkv[self.at(1, b, j, h, d)]);
                        let mut add = |at: usize, term: f64, error: f64| {
                            grad.0[at] += term;
                            grad.1[at] += error + sums * (term.abs() + error) + TINY;
                        };
                        add(self.at(0, b, i, h, d), scale * ds * k, scale * ds_error * k.abs());
                        add(self.at(1, b, j, h, d), scale * ds * q, scale * ds_error * q.abs());
                        add(self.at(2, b, j, h, d), p[j] * g(d), p[j] * r * g(d).abs());
                    }
                }
            }
        }
        for (value, error) in grad.0.iter().zip(&mut grad.1) {
            *error += rounding(dtype) * (value.abs() + *error);
        }
        Reference { out, lse, dqkv: grad }
    }

    fn check(&self, ctx: &Context, dtype: DType, seed: u64, size: f32) -> Result<(), Failed> {
        let (qkv, dout) = self.inputs(dtype, seed, size);
        for tier in tiers(ctx, dtype, self.dim) {
            let got = self.run(ctx, tier, dtype, &qkv, &dout)?;
            let want = self.reference(&qkv, &dout, dtype, tier);
            let compare = |what: &str, dtype, got: &[u8], want: &Bounded| {
                let what = format!("{self:?} {tier} {dtype} {what}");
                compare(&what, &to_f32(dtype, got), &want.0, &want.1)
            };
            compare("out", dtype, &got.out, &want.out)?;
            compare("lse", DType::F32, &got.lse, &want.lse)?;
            compare("dqkv", dtype, &got.dqkv, &want.dqkv)?;
        }
        Ok(())
    }

    /// Σ out ∘ dout in f64.
    fn loss(&self, qkv: &[f64], dout: &[f32]) -> f64 {
        let mut loss = 0.0;
        for (b, h) in (0..self.batch).flat_map(|b| (0..self.heads).map(move |h| (b, h))) {
            for i in 0..self.seq {
                let s: Vec<_> = (0..=i).map(|j| self.score(qkv, b, h, i, j).0.exp()).collect();
                let total: f64 = s.iter().sum();
                for (j, s) in s.iter().enumerate() {
                    let at = (b * self.seq + i) * self.cols() + h * self.dim;
                    let v = |d| qkv[self.at(2, b, j, h, d)];
                    let dot: f64 = (0..self.dim).map(|d| f64::from(dout[at + d]) * v(d)).sum();
                    loss += s / total * dot;
                }
            }
        }
        loss
    }
}

fn attention_equals_the_reference(ctx: &Context, _: usize) -> Result<(), Failed> {
    const F32: &[DType] = &[DType::F32];
    const BF16: &[DType] = &[DType::BF16];
    const BOTH: &[DType] = &[DType::F32, DType::BF16];
    for (batch, seq, heads, dim, dtypes) in [
        (3, 1, 2, 64, BOTH),
        (2, 7, 3, 16, BOTH),
        (1, 20, 1, 24, F32),
        (2, 65, 2, 32, BF16),
        (1, 64, 1, 72, F32),
        (1, 65, 2, 128, BOTH),
        (1, 130, 2, 64, BOTH),
    ] {
        for dtype in dtypes {
            Case { batch, seq, heads, dim }.check(ctx, *dtype, 10 + seq as u64, 1.0)?;
        }
    }
    Ok(())
}

fn gradients_equal_finite_differences(ctx: &Context, _: usize) -> Result<(), Failed> {
    let case = Case { batch: 1, seq: 5, heads: 2, dim: 16 };
    let (qkv, dout) = case.inputs(DType::F32, 20, 1.0);
    let got = to_f32(DType::F32, &case.run(ctx, Tier::Alu, DType::F32, &qkv, &dout)?.dqkv);
    let bounds = case.reference(&qkv, &dout, DType::F32, Tier::Alu).dqkv.1;
    let mut x: Vec<_> = qkv.iter().map(|v| f64::from(*v)).collect();
    let (mut want, mut bound) = (Vec::new(), Vec::new());
    for i in 0..x.len() {
        let value = x[i];
        let mut central = |h: f64| {
            let mut at = |v| {
                x[i] = v;
                case.loss(&x, &dout)
            };
            (at(value + h) - at(value - h)) / (2.0 * h)
        };
        let (fine, coarse) = (central(1e-3), central(2e-3));
        x[i] = value;
        // The error is quadratic in the step: extrapolated, and what that changes bounds what is left. Rounding in f64 adds
        // 2⁻⁵³ / 10⁻³ of the loss's terms, of which there are fewer than 2¹².
        want.push(fine + (fine - coarse) / 3.0);
        bound.push(bounds[i] + (fine - coarse).abs() / 3.0 * 1e-2 + 1e-9);
    }
    compare("gradients", &got, &want, &bound)
}

fn later_tokens_change_nothing_earlier(ctx: &Context, _: usize) -> Result<(), Failed> {
    let case = Case { batch: 1, seq: 100, heads: 2, dim: 16 };
    for dtype in [DType::F32, DType::BF16] {
        for tier in tiers(ctx, dtype, case.dim) {
            // Larger scores exceed what tensor cores' weights are relative to, in some rows and not in others.
            for size in if tier == Tier::Tensor { &[1.0, 10.0][..] } else { &[1.0] } {
                later_tokens(ctx, &case, tier, dtype, *size)?;
            }
        }
    }
    Ok(())
}

fn later_tokens(
    ctx: &Context,
    case: &Case,
    tier: Tier,
    dtype: DType,
    size: f32,
) -> Result<(), Failed> {
    let (mut qkv, mut dout) = case.inputs(dtype, 30, size);
    let before = case.run(ctx, tier, dtype, &qkv, &dout)?;
    for first in [77, 1] {
        for v in &mut qkv[first * 3 * case.cols()..] {
            *v = 2.0 - *v;
        }
        for v in &mut dout[first * case.cols()..] {
            *v = -*v;
        }
        let (qkv, dout) =
            (to_f32(dtype, &narrowed(dtype, &qkv)), to_f32(dtype, &narrowed(dtype, &dout)));
        let after = case.run(ctx, tier, dtype, &qkv, &dout)?;
        let row = case.cols() * dtype.size();
        assert_bytes("out", &after.out[..first * row], &before.out[..first * row]);
        let lses = first * case.heads * 4;
        assert_bytes("lse", &after.lse[..lses], &before.lse[..lses]);
        for i in 0..first {
            let dq = i * 3 * row..i * 3 * row + row;
            assert_bytes("dq", &after.dqkv[dq.clone()], &before.dqkv[dq]);
        }
        let changed = first * row..(first + 1) * row;
        assert_ne!(after.out[changed.clone()], before.out[changed], "row {first} of out");
    }
    Ok(())
}

/// A sequence among others gives the same bits as alone, and so twice.
fn sequences_are_independent(ctx: &Context, _: usize) -> Result<(), Failed> {
    let case = Case { batch: 3, seq: 66, heads: 2, dim: 16 };
    for (dtype, tier) in [(DType::F32, Tier::Alu), (DType::BF16, Tier::Tensor)] {
        if !tiers(ctx, dtype, case.dim).contains(&tier) {
            continue;
        }
        let (qkv, dout) = case.inputs(dtype, 40, 1.0);
        let all = case.run(ctx, tier, dtype, &qkv, &dout)?;
        let alone = Case { batch: 1, ..case };
        for b in 0..case.batch {
            let part = |x: &[f32]| x[b * x.len() / 3..(b + 1) * x.len() / 3].to_vec();
            let one = alone.run(ctx, tier, dtype, &part(&qkv), &part(&dout))?;
            for (what, all, one) in [
                ("out", &all.out, &one.out),
                ("lse", &all.lse, &one.lse),
                ("dqkv", &all.dqkv, &one.dqkv),
            ] {
                assert_bytes(what, one, &all[b * one.len()..(b + 1) * one.len()]);
            }
        }
    }
    Ok(())
}

/// Scores of ±10⁴: weights are 0 or 1, or between where two are close.
fn large_logits(ctx: &Context, _: usize) -> Result<(), Failed> {
    let case = Case { batch: 1, seq: 70, heads: 1, dim: 64 };
    let (qkv, _) = case.inputs(DType::F32, 50, 100.0);
    let wide: Vec<_> = qkv.iter().map(|v| f64::from(*v)).collect();
    let scores = (0..70).flat_map(|i| (0..=i).map(move |j| (i, j)));
    let high = scores.map(|(i, j)| case.score(&wide, 0, 0, i, j).0.abs()).fold(0.0, f64::max);
    assert!(high > 1e4, "the largest score is {high}");
    for dtype in [DType::F32, DType::BF16] {
        case.check(ctx, dtype, 50, 100.0)?;
    }
    Ok(())
}

fn attention_mismatches_are_errors(ctx: &Context, _: usize) -> Result<(), Failed> {
    let desc = AttentionDesc { batch: 2, seq: 3, heads: 2, head_dim: 16 };
    for (wrong, says) in [
        (AttentionDesc { head_dim: 20, ..desc }, "20"),
        (AttentionDesc { head_dim: 136, ..desc }, "136"),
        (AttentionDesc { heads: 0, ..desc }, "heads 0"),
    ] {
        let error = Attention::new(ctx, &wrong).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    let attention = Attention::new(ctx, &desc)?;
    let f32s = |rows, cols| ctx.zeros(DType::F32, rows, cols);
    let (qkv, out, lse) = (f32s(6, 96)?, f32s(6, 32)?, f32s(6, 2)?);
    let fails = |result: Result<(), Error>, says: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    let stream = &mut ctx.stream();
    fails(attention.forward(stream, &f32s(5, 96)?, &mut f32s(6, 32)?, &mut f32s(6, 2)?), "[5, 96]");
    fails(attention.forward(stream, &qkv, &mut f32s(6, 16)?, &mut f32s(6, 2)?), "[6, 16]");
    fails(attention.forward(stream, &qkv, &mut f32s(6, 32)?, &mut f32s(2, 6)?), "[2, 6]");
    let mut half = ctx.zeros(DType::BF16, 6, 32)?;
    fails(attention.forward(stream, &qkv, &mut half, &mut f32s(6, 2)?), "bf16");
    fails(attention.backward(stream, &qkv, &out, &lse, &half, &mut f32s(6, 96)?), "bf16");
    fails(attention.backward(stream, &qkv, &out, &lse, &out, &mut f32s(6, 32)?), "[6, 32]");
    if ctx.wgpu().is_some() {
        let cpu = Attention::new(&Context::cpu(), &desc)?;
        fails(cpu.backward(stream, &qkv, &out, &lse, &out, &mut f32s(6, 96)?), "CPU");
        fails(
            cpu.forward(&mut Context::cpu().stream(), &qkv, &mut f32s(6, 32)?, &mut f32s(6, 2)?),
            "CPU",
        );
    }
    Ok(())
}

fn tiers_are_as_asked_for(ctx: &Context, _: usize) -> Result<(), Failed> {
    let desc = AttentionDesc { batch: 2, seq: 3, heads: 2, head_dim: 16 };
    let alu = Attention::with_tier(ctx, &desc, Tier::Alu)?;
    assert_eq!([alu.tier(DType::F32), alu.tier(DType::BF16)], [Tier::Alu; 2]);
    let error = Attention::with_tier(ctx, &desc, Tier::Exact).unwrap_err().to_string();
    assert!(error.contains("exact"), "{error}");
    let best = Attention::new(ctx, &desc)?;
    match Attention::with_tier(ctx, &desc, Tier::Tensor) {
        Ok(tensor) => {
            assert_eq!(tensor.tier(DType::F32), Tier::Alu);
            assert_eq!([tensor.tier(DType::BF16), best.tier(DType::BF16)], [Tier::Tensor; 2]);
        }
        Err(error) => {
            assert!(error.to_string().contains("cooperative matrices"), "{error}");
            assert_eq!(best.tier(DType::BF16), Tier::Alu);
            assert!(best.why().contains("cooperative matrices"), "{}", best.why());
        }
    }
    assert_eq!(alu.why(), "asked for");
    Ok(())
}

/// Two matrices of scores, two rounds of 32 rows, and a little more, as the shaders lay it out.
fn wide_heads(ctx: &Context, _: usize) -> Result<(), Failed> {
    let of = |head_dim, tier| {
        Attention::with_tier(ctx, &AttentionDesc { batch: 1, seq: 1, heads: 1, head_dim }, tier)
    };
    let Some((device, _)) = ctx.wgpu().filter(|_| of(16, Tier::Tensor).is_ok()) else {
        return Ok(());
    };
    let limit = device.limits().max_compute_workgroup_storage_size;
    match of(128, Tier::Tensor) {
        Ok(_) => assert!(limit >= 37_120, "{limit}"),
        Err(error) => {
            let error = error.to_string();
            assert!(limit < 37_120, "{limit}: {error}");
            let says = [&format!("{limit}"), "37120 bytes", "workgroup memory", "heads of 128"];
            assert!(says.iter().all(|text| error.contains(*text)), "{error}");
            let auto = of(128, Tier::Auto)?;
            assert_eq!(auto.tier(DType::BF16), Tier::Alu);
            assert!(auto.why().contains("37120") || auto.why().contains("emulated"));
        }
    }
    Ok(())
}
