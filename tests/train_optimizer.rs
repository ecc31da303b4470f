//! AdamW and the norm of gradients on all engines, against f64 written as PyTorch's documentation has it. Bounds are running
//! error bounds of the same steps; statistical tests state their confidence.

mod common;

use common::engines::{self, Form, PLAIN, Test};
use common::{assert_bytes, garbage, gaussian, narrowed, panics, to_f32, words};
use libtest_mimic::{Failed, Trial};
use microscaling::kernels::oscillation::Action;
use microscaling::kernels::{
    AdamW, AdamWDesc, AdamWState, GradientNorm, Moments, Oscillation, StepScalars,
};
use microscaling::{
    Axis, Block, Context, DType, Element, MXFP4, Matmul, MatmulDesc, MxSpec, NVFP4, Options,
    Quantize, QuantizeDesc, Rounding, ScaleFormat, ScaleRule, Tensor, wgpu,
};

const SUITE: &[(&str, Test)] = &[
    ("norm_equals_the_reference", norm_equals_the_reference),
    ("norm_of_extreme_gradients", norm_of_extreme_gradients),
    ("norm_finds_what_is_not_finite", norm_finds_what_is_not_finite),
    ("one_step_and_fifty_equal_the_reference", steps_equal_the_reference),
    ("stored_in_fewer_bits_is_a_neighbour", stored_is_a_neighbour),
    ("clipping", clipping),
    ("a_step_that_is_not_finite_changes_nothing", skips),
    ("bf16_weights_are_unbiased", bf16_weights_are_unbiased),
    ("moments_are_unbiased", moments_are_unbiased),
    ("all_moments_converge", all_moments_converge),
    ("same_bits_every_time", same_bits_every_time),
    ("a_loss_scale_changes_no_bit", a_loss_scale_changes_no_bit),
    ("checkpoints_round_trip", checkpoints_round_trip),
    ("packed_weights_equal_quantize", packed_weights_equal_quantize),
    ("bytes_are_what_is_allocated", bytes_are_what_is_allocated),
    ("weights_that_oscillate_are_reset", oscillating_weights),
    ("mismatches_are_errors", mismatches_are_errors),
];

fn main() {
    let forms = [Form {
        what: PLAIN,
        options: Options::default(),
        steps: [1, 5],
        needs: (wgpu::Features::empty(), ""),
    }];
    let alone = vec![Trial::test("a_comparison_that_must_fail_fails", comparison_fails)];
    engines::run(|_| SUITE.to_vec(), &forms, alone);
}

/// Half a unit in the last place of 1 in f32.
const U: f64 = 1.0 / 16777216.0;
/// What WGSL allows a square root (1 / inverseSqrt: 2 + 2.5 units in the last place) and a division (2.5), relative.
const SQRT: f64 = 9.0 * U;
const DIVISION: f64 = 5.0 * U;

const SCALARS: StepScalars = StepScalars { step: 1, lr: 1e-2, weight_decay: 0.1, seed: 42 };

fn every_setting() -> impl Iterator<Item = (DType, Moments)> {
    [DType::F32, DType::BF16].into_iter().flat_map(|w| Moments::ALL.map(|moments| (w, moments)))
}

fn upload(ctx: &Context, rows: usize, cols: usize, x: &[f32]) -> Result<Tensor, Failed> {
    Ok(ctx.upload(DType::F32, rows, cols, &narrowed(DType::F32, x))?)
}

fn read(ctx: &Context, x: &Tensor) -> Result<Vec<f32>, Failed> {
    Ok(to_f32(x.dtype(), &ctx.read_blocking(x)?))
}

/// A parameter with its state.
struct Parameter {
    kernel: AdamW,
    w: Tensor,
    state: AdamWState,
}

impl Parameter {
    fn new(ctx: &Context, desc: &AdamWDesc, w: &[f32]) -> Result<Parameter, Failed> {
        let AdamWDesc { rows, cols, master, .. } = *desc;
        Ok(Parameter {
            kernel: AdamW::new(ctx, desc)?,
            w: ctx.upload(master, rows, cols, &narrowed(master, w))?,
            state: AdamWState::new(ctx, desc)?,
        })
    }

    /// One step with this factor and gradient.
    fn step(
        &mut self,
        ctx: &Context,
        scalars: &StepScalars,
        factor: f32,
        grad: &[f32],
    ) -> Result<(), Failed> {
        let AdamWDesc { rows, cols, .. } = *self.kernel.desc();
        let grad = upload(ctx, rows, cols, grad)?;
        let norm = upload(ctx, 1, 4, &[7.0, factor, 1.0, -1.0])?;
        self.step_from(ctx, scalars, &norm, &grad)
    }

    fn step_from(
        &mut self,
        ctx: &Context,
        scalars: &StepScalars,
        norm: &Tensor,
        grad: &Tensor,
    ) -> Result<(), Failed> {
        let mut stream = ctx.stream();
        let Parameter { kernel, w, state } = self;
        kernel.record(&mut stream, scalars, grad, norm, w, state)?;
        Ok(ctx.submit(stream)?)
    }

    /// All bytes: the weight, then the state.
    fn bytes(&self, ctx: &Context) -> Result<Vec<u8>, Failed> {
        let mut bytes = ctx.read_blocking(&self.w)?;
        for tensor in self.state.tensors() {
            bytes.extend(self.state.read_blocking(ctx, tensor.name)?);
        }
        Ok(bytes)
    }

    /// The moments as they are stored, decoded by their definitions in f64.
    fn moments(&self, ctx: &Context) -> Result<[Vec<f64>; 2], Failed> {
        let AdamWDesc { rows, cols, moments, .. } = *self.kernel.desc();
        let [a, b] = self.state.tensors().map(|t| self.state.read_blocking(ctx, t.name));
        let (a, b) = (a?, b?);
        let dense = |dtype, bytes| to_f32(dtype, bytes).into_iter().map(f64::from).collect();
        Ok(match moments {
            Moments::F32 => [dense(DType::F32, &a), dense(DType::F32, &b)],
            Moments::BF16 => [dense(DType::BF16, &a), dense(DType::BF16, &b)],
            Moments::FP8 => {
                let scale =
                    |i: usize, which: usize| 2f64.powi(i32::from(b[i / 128 * 4 + which]) - 127);
                let code = |i: usize, which: usize| a[i / 8 * 16 + 8 * which + i % 8];
                let e4m4 = |c: u8| match c / 16 {
                    0 => f64::from(c),
                    k => f64::from(16 + c % 16) * 2f64.powi(i32::from(k) - 1),
                };
                let m = |i| f64::from(Element::E4M3.decode(code(i, 0))) * scale(i, 0);
                let v = |i| (e4m4(code(i, 1)) * scale(i, 1)).powi(2);
                [(0..rows * cols).map(m).collect(), (0..rows * cols).map(v).collect()]
            }
        })
    }
}

// ---- The reference -------------------------------------------------------------------------------------------------

/// One element in f64, and by how much f32 may be off.
#[derive(Clone, Copy, Default)]
struct Exact {
    w: f64,
    m: f64,
    v: f64,
    w_error: f64,
    m_error: f64,
    v_error: f64,
}

impl Exact {
    fn step(&mut self, desc: &AdamWDesc, s: &StepScalars, factor: f32, grad: f32) {
        let (beta1, beta2) = (f64::from(desc.beta1), f64::from(desc.beta2));
        let (lr, eps) = (f64::from(s.lr), f64::from(desc.eps));
        let g = f64::from(factor) * f64::from(grad);
        let old = *self;
        // PyTorch's order.
        self.w -= lr * f64::from(s.weight_decay) * self.w;
        self.m = beta1 * self.m + (1.0 - beta1) * g;
        self.v = beta2 * self.v + (1.0 - beta2) * g * g;
        let correction1 = 1.0 - beta1.powi(s.step as i32);
        let correction2 = 1.0 - beta2.powi(s.step as i32);
        let root = self.v.sqrt() / correction2.sqrt();
        let update = lr / correction1 * self.m / (root + eps);
        self.w -= update;
        // Roundings: of the factor's product, of 1 − beta, of a difference, of a product, of a sum. Subnormals may be zero.
        let tiny = f64::from(f32::MIN_POSITIVE);
        self.m_error = beta1 * old.m_error
            + 5.0 * U * (1.0 - beta1) * (g.abs() + old.m.abs())
            + U * self.m.abs()
            + tiny;
        // All terms are positive.
        self.v_error = beta2 * old.v_error + 6.0 * U * self.v + tiny;
        let root_error =
            root * (SQRT + 3.0 * U + if self.v > 0.0 { self.v_error / self.v } else { 0.0 });
        let update_error = lr / correction1 * self.m_error / (root + eps)
            + update.abs() * (root_error / (root + eps) + DIVISION + 4.0 * U);
        let decay = lr * f64::from(s.weight_decay);
        self.w_error = old.w_error
            + update_error
            + U * (self.w.abs() + 3.0 * decay * old.w.abs())
            + 2.0 * U * update.abs();
    }
}

fn reference(w: &[f32]) -> Vec<Exact> {
    w.iter().map(|w| Exact { w: f64::from(*w), ..Default::default() }).collect()
}

#[track_caller]
fn assert_within(what: &str, got: &[f32], want: &[Exact]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let off = (f64::from(*got) - want.w).abs();
        assert!(
            off <= want.w_error,
            "{what}: element {i} is {got:e}, want {:e}, off by {off:e}, at most {:e}",
            want.w,
            want.w_error
        );
    }
}

/// Gradients of very different sizes, zero among them.
fn gradients(seed: u64, n: usize) -> Vec<f32> {
    let sizes = words(seed + 1000, n);
    let values = gaussian(seed, n);
    let scale = |i: usize| match sizes[i] % 16 {
        0 => 0.0,
        k => 2f32.powi(k as i32 - 12),
    };
    (0..n).map(|i| values[i] * scale(i)).collect()
}

// ---- The norm ------------------------------------------------------------------------------------------------------

fn norm(
    ctx: &Context,
    grads: &[(usize, usize, Vec<f32>)],
    inverse_scale: f32,
    max_norm: f32,
) -> Result<Vec<f32>, Failed> {
    let tensors = grads
        .iter()
        .map(|(rows, cols, x)| upload(ctx, *rows, *cols, x))
        .collect::<Result<Vec<_>, _>>()?;
    let tensors: Vec<_> = tensors.iter().collect();
    let elements: Vec<_> = grads.iter().map(|(rows, cols, _)| rows * cols).collect();
    let mut y = upload(ctx, 1, 4, &[f32::NAN; 4])?;
    let mut stream = ctx.stream();
    let mut kernel = GradientNorm::new(ctx, &elements)?;
    kernel.record(&mut stream, &tensors, inverse_scale, max_norm, &mut y)?;
    ctx.submit(stream)?;
    read(ctx, &y)
}

fn norm_inputs() -> Vec<(usize, usize, Vec<f32>)> {
    // More than two pieces, exactly one, less than a quad a workgroup, none.
    [(300, 128), (64, 256), (3, 4), (0, 8), (77, 52)]
        .into_iter()
        .enumerate()
        .map(|(i, (rows, cols))| (rows, cols, gradients(i as u64, rows * cols)))
        .collect()
}

fn exact_norm(grads: &[(usize, usize, Vec<f32>)]) -> f64 {
    let squares = grads.iter().flat_map(|(.., x)| x).map(|x| f64::from(*x).powi(2));
    squares.sum::<f64>().sqrt()
}

/// Of a sum with this many additions in a row at most: an invocation's 64 elements, the workgroup's 8 levels, a few pieces;
/// a power of two costs nothing. The root halves it.
const NORM: f64 = 0.5 * 80.0 * U + SQRT + 2.0 * U;

fn norm_equals_the_reference(ctx: &Context, _: usize) -> Result<(), Failed> {
    let grads = norm_inputs();
    let exact = exact_norm(&grads);
    let close = |got: f32, want: f64, bound: f64| (f64::from(got) - want).abs() <= bound * want;
    for (inverse_scale, max_norm) in [(1.0f32, f32::INFINITY), (0.3, 1.0), (2f32.powi(-15), 1e9)] {
        let y = norm(ctx, &grads, inverse_scale, max_norm)?;
        let scale = f64::from(inverse_scale);
        let want = exact * scale;
        let factor = scale * (f64::from(max_norm) / want).min(1.0);
        assert!(close(y[0], want, NORM), "{y:?}: norm {want}");
        assert!(close(y[1], factor, NORM + DIVISION + U), "{y:?}: factor {factor}");
        assert_eq!(y[2..], [1.0, -1.0]);
    }
    // None at all, and nothing but zeros.
    assert_eq!(norm(ctx, &[], 0.5, 1.0)?, [0.0, 0.5, 1.0, -1.0]);
    assert_eq!(norm(ctx, &[(2, 4, vec![0.0; 8])], 0.5, 1.0)?, [0.0, 0.5, 1.0, -1.0]);
    Ok(())
}

fn norm_of_extreme_gradients(ctx: &Context, _: usize) -> Result<(), Failed> {
    for exponent in [-120, -70, 70, 115] {
        let mut grads = norm_inputs();
        for x in grads.iter_mut().flat_map(|(.., x)| x) {
            // Normal numbers of both ends.
            *x = if x.abs() < 2f32.powi(-6) { 0.0 } else { *x * 2f32.powi(exponent) };
        }
        let (y, want) = (norm(ctx, &grads, 1.0, f32::INFINITY)?, exact_norm(&grads));
        assert!(((f64::from(y[0]) - want) / want).abs() <= NORM, "{y:?}, want {want:e}");
        assert_eq!(y[1..], [1.0, 1.0, -1.0]);
    }
    // Huge in one tensor, tiny in another.
    let grads = [(1, 4, vec![1e-30f32; 4]), (1, 4, vec![3e30; 4]), (1, 4, vec![1e-38; 4])];
    let y = norm(ctx, &grads, 1.0, f32::INFINITY)?;
    assert!((f64::from(y[0]) / 6e30 - 1.0).abs() <= NORM, "{y:?}");
    // Finite gradients whose norm is not: skipped too, no tensor to blame.
    let y = norm(ctx, &[(1, 4, vec![3e38f32; 4])], 1.0, 1.0)?;
    assert!(y[0].is_nan() && y[1..] == [0.0, 0.0, -1.0], "{y:?}");
    Ok(())
}

fn norm_finds_what_is_not_finite(ctx: &Context, _: usize) -> Result<(), Failed> {
    for (tensor, at, value) in
        [(0, 299 * 128 + 127, f32::NAN), (1, 0, f32::INFINITY), (4, 7, f32::NEG_INFINITY)]
    {
        let mut grads = norm_inputs();
        grads[tensor].2[at] = value;
        // A later one must not win.
        grads[4].2[77 * 52 - 1] = f32::NAN;
        let y = norm(ctx, &grads, 0.5, 1.0)?;
        assert!(y[0].is_nan() && y[1..] == [0.0, 0.0, tensor as f32], "{y:?}, tensor {tensor}");
    }
    Ok(())
}

// ---- The update ----------------------------------------------------------------------------------------------------

fn steps_equal_the_reference(ctx: &Context, _: usize) -> Result<(), Failed> {
    for (rows, cols) in [(1, 4), (5, 52), (33, 132)] {
        let desc = AdamWDesc { beta2: 0.97, ..AdamWDesc::new(rows, cols) };
        compare(ctx, &desc, &desc, 50)?;
    }
    // Nothing to do.
    let desc = AdamWDesc::new(0, 8);
    Parameter::new(ctx, &desc, &[])?.step(ctx, &SCALARS, 1.0, &[])
}

fn compare(
    ctx: &Context,
    desc: &AdamWDesc,
    expected: &AdamWDesc,
    steps: u32,
) -> Result<(), Failed> {
    let n = desc.rows * desc.cols;
    let w = gaussian(9, n);
    let mut parameter = Parameter::new(ctx, desc, &w)?;
    let mut want = reference(&w);
    for step in 1..=steps {
        let scalars = StepScalars { step, lr: 1e-2 / step as f32, ..SCALARS };
        let grad = gradients(u64::from(step), n);
        parameter.step(ctx, &scalars, 0.37, &grad)?;
        for (want, grad) in want.iter_mut().zip(grad) {
            want.step(expected, &scalars, 0.37, grad);
        }
        if step == 1 || step == steps {
            assert_within(&format!("step {step} of {desc:?}"), &read(ctx, &parameter.w)?, &want);
        }
    }
    let [m, v] = parameter.moments(ctx)?;
    for (i, want) in want.iter().enumerate() {
        assert!((m[i] - want.m).abs() <= want.m_error, "m {i}: {} {}", m[i], want.m);
        assert!((v[i] - want.v).abs() <= want.v_error, "v {i}: {} {}", v[i], want.v);
    }
    Ok(())
}

fn comparison_fails() -> Result<(), Failed> {
    let ctx = Context::cpu();
    let desc = AdamWDesc::new(4, 64);
    compare(&ctx, &desc, &desc, 3)?;
    for wrong in [
        AdamWDesc { beta1: 0.9f32.next_up().next_up(), ..desc },
        AdamWDesc { beta2: 0.950001, ..desc },
        AdamWDesc { eps: 1.1e-8, ..desc },
    ] {
        assert!(panics(|| compare(&ctx, &desc, &wrong, 3)), "{wrong:?} passes");
    }
    Ok(())
}

/// Every stored value is one of the two around the exact one; f32 is within its bound.
fn stored_is_a_neighbour(ctx: &Context, _: usize) -> Result<(), Failed> {
    let (rows, cols) = (9, 68);
    for (master, moments) in every_setting() {
        let desc = AdamWDesc { master, moments, ..AdamWDesc::new(rows, cols) };
        let w = to_f32(DType::BF16, &narrowed(DType::BF16, &gaussian(3, rows * cols)));
        let grad = gradients(4, rows * cols);
        let mut parameter = Parameter::new(ctx, &desc, &w)?;
        parameter.step(ctx, &SCALARS, 1.0, &grad)?;
        let mut want = reference(&w);
        want.iter_mut().zip(&grad).for_each(|(want, g)| want.step(&desc, &SCALARS, 1.0, *g));
        // bf16's step at x.
        let bf16 =
            |x: f64| if x == 0.0 { 0.0 } else { 2f64.powi(x.abs().log2().floor() as i32 - 7) };
        let [m, v] = parameter.moments(ctx)?;
        let largest = |f: fn(&Exact) -> f64, i: usize| {
            let block = i / 128 * 128..(i / 128 * 128 + 128).min(want.len());
            want[block].iter().map(f).fold(0.0, f64::max)
        };
        for (i, (got, want)) in read(ctx, &parameter.w)?.into_iter().zip(&want).enumerate() {
            let what = format!("{i} of {desc:?}");
            let step = if master == DType::BF16 { bf16(want.w) } else { 0.0 };
            assert!((f64::from(got) - want.w).abs() <= step + want.w_error, "w {what}");
            let (m_step, v_step) = match moments {
                Moments::F32 => (0.0, 0.0),
                Moments::BF16 => (bf16(want.m), bf16(want.v)),
                // An eighth, or the step of the subnormals, 2^-9 of 2^-8 of the largest and its scale's rounding; √v by a
                // sixteenth and 2^-18 likewise, never to zero.
                Moments::FP8 => {
                    let root = want.v.sqrt();
                    let step = (root / 16.0).max(largest(|x| x.v.sqrt(), i) * 2f64.powi(-18));
                    assert_eq!(v[i] == 0.0, want.v == 0.0, "v {what}");
                    (
                        (want.m.abs() / 8.0).max(largest(|x| x.m.abs(), i) * 2f64.powi(-16)),
                        2.0 * root * step + step * step,
                    )
                }
            };
            assert!(
                (m[i] - want.m).abs() <= m_step + want.m_error,
                "m {what}: {} {}",
                m[i],
                want.m
            );
            assert!(
                (v[i] - want.v).abs() <= v_step + want.v_error,
                "v {what}: {} {}",
                v[i],
                want.v
            );
        }
    }
    Ok(())
}

/// Norm and update together: AdamW reads the norm on the device, in the same stream.
fn clipping(ctx: &Context, _: usize) -> Result<(), Failed> {
    let (rows, cols) = (6, 100);
    let (w, grad) = (gaussian(1, rows * cols), gradients(2, rows * cols));
    let exact = exact_norm(&[(rows, cols, grad.clone())]);
    // A large epsilon, so that the size of the gradient counts.
    let desc = AdamWDesc { eps: 0.5, ..AdamWDesc::new(rows, cols) };
    for max_norm in [exact as f32 / 3.0, exact as f32 * 3.0] {
        let mut parameter = Parameter::new(ctx, &desc, &w)?;
        let grads = upload(ctx, rows, cols, &grad)?;
        let mut y = ctx.zeros(DType::F32, 1, 4)?;
        let mut stream = ctx.stream();
        GradientNorm::new(ctx, &[rows * cols])?.record(
            &mut stream,
            &[&grads],
            1.0,
            max_norm,
            &mut y,
        )?;
        let Parameter { kernel, w: weight, state } = &mut parameter;
        kernel.record(&mut stream, &SCALARS, &grads, &y, weight, state)?;
        ctx.submit(stream)?;
        let factor = (f64::from(max_norm) / exact).min(1.0);
        let mut want = reference(&w);
        for (want, g) in want.iter_mut().zip(&grad) {
            want.step(&desc, &SCALARS, factor as f32, *g);
            // The factor's error moves m and √v, and so the update, by as much at most.
            want.w_error += 2.0 * 2e-2 * (NORM + DIVISION + U);
        }
        assert_within(&format!("max_norm {max_norm}"), &read(ctx, &parameter.w)?, &want);
    }
    Ok(())
}

fn skips(ctx: &Context, _: usize) -> Result<(), Failed> {
    let (rows, cols) = (40, 128);
    let spec = MXFP4.with_block(Block::Square(16));
    let quantize = QuantizeDesc { spec, ..Default::default() };
    for (master, moments) in every_setting() {
        let desc = AdamWDesc { master, moments, ..AdamWDesc::new(rows, cols) };
        let mut w = gaussian(3, rows * cols);
        w[17] = f32::INFINITY;
        let mut parameter = Parameter::new(ctx, &desc, &w)?;
        parameter.step(ctx, &SCALARS, 1.0, &gradients(1, rows * cols))?;
        let before = parameter.bytes(ctx)?;
        let mut packed = garbage(ctx, &quantize, rows, cols)?;
        let mut stream = ctx.stream();
        Quantize::new(ctx, &quantize)?.record(&mut stream, &parameter.w, &mut packed)?;
        ctx.submit(stream)?;
        let packed_before = ctx.read_mx_blocking(&packed)?;
        let mut grad = gradients(2, rows * cols);
        grad[33] = f32::NAN;
        let grad = upload(ctx, rows, cols, &grad)?;
        let mut y = ctx.zeros(DType::F32, 1, 4)?;
        let mut stream = ctx.stream();
        let scalars = StepScalars { step: 2, ..SCALARS };
        GradientNorm::new(ctx, &[rows * cols])?.record(&mut stream, &[&grad], 1.0, 1.0, &mut y)?;
        let Parameter { kernel, w, state } = &mut parameter;
        kernel.record(&mut stream, &scalars, &grad, &y, w, state)?;
        kernel.record_quantized(
            &mut stream,
            &scalars,
            &grad,
            &y,
            w,
            state,
            &quantize,
            &mut packed,
        )?;
        ctx.submit(stream)?;
        assert_bytes(&format!("{desc:?}"), &parameter.bytes(ctx)?, &before);
        assert_eq!(ctx.read_mx_blocking(&packed)?, packed_before);
        assert_eq!(ctx.nonfinite_blocks_blocking(&packed)?, 1);
    }
    Ok(())
}

// ---- Stochastic rounding -------------------------------------------------------------------------------------------

/// The mean of `got` against what it should be: within five standard errors of the sample, which a right program exceeds
/// once in 1.7 million.
#[track_caller]
fn assert_mean(what: &str, got: &[f64], want: f64) {
    let n = got.len() as f64;
    let mean = got.iter().sum::<f64>() / n;
    let variance = got.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let error = (variance / n).sqrt();
    assert!(
        (mean - want).abs() <= 5.0 * error,
        "{what}: mean {mean:e}, want {want:e}, standard error {error:e}"
    );
}

/// Steps of 0.13, and then 0.02, of a unit of the weight: lost to nearest; here the mean moves by them.
fn bf16_weights_are_unbiased(ctx: &Context, _: usize) -> Result<(), Failed> {
    let (rows, cols) = (64, 128);
    let n = rows * cols;
    let desc = AdamWDesc { master: DType::BF16, ..AdamWDesc::new(rows, cols) };
    let mut parameter = Parameter::new(ctx, &desc, &vec![1.5; n])?;
    let mut others = Vec::new();
    for index in [0, 1] {
        let desc = AdamWDesc { index, ..desc };
        let mut parameter = Parameter::new(ctx, &desc, &vec![1.5; n])?;
        parameter.step(ctx, &StepScalars { lr: 1e-3, ..SCALARS }, 1.0, &vec![1.0; n])?;
        others.push(read(ctx, &parameter.w)?);
    }
    let differ = others[0].iter().zip(&others[1]).filter(|(a, b)| a != b).count();
    assert!(differ > n / 20, "parameters draw alike: {differ}");
    let unit = 1.0 / 128.0;
    let mut moved = 0.0;
    for step in 1..=12 {
        let fraction = if step == 1 { 0.13 } else { 0.02 };
        let scalars = StepScalars { step, lr: fraction * unit, weight_decay: 0.0, seed: 5 };
        // A constant gradient of one: every step is lr.
        parameter.step(ctx, &scalars, 1.0, &vec![1.0; n])?;
        moved += f64::from(scalars.lr);
        let w: Vec<f64> = read(ctx, &parameter.w)?.into_iter().map(f64::from).collect();
        assert_mean(&format!("step {step}"), &w, 1.5 - moved);
        assert!(w.iter().all(|w| (w * 128.0).fract() == 0.0));
    }
    Ok(())
}

/// A hundred steps under a constant gradient: the moments' means are those of exact moments. Rounding √v without care for
/// its square would add 2% to v here.
fn moments_are_unbiased(ctx: &Context, _: usize) -> Result<(), Failed> {
    let (rows, cols) = (128, 128);
    for moments in [Moments::BF16, Moments::FP8] {
        let desc = AdamWDesc { moments, beta2: 0.99, ..AdamWDesc::new(rows, cols) };
        let mut parameter = Parameter::new(ctx, &desc, &vec![0.0; rows * cols])?;
        let grad = upload(ctx, rows, cols, &vec![0.7; rows * cols])?;
        let norm = upload(ctx, 1, 4, &[1.0, 1.0, 1.0, -1.0])?;
        let mut exact = Exact::default();
        for step in 1..=100 {
            let scalars = StepScalars { step, ..SCALARS };
            parameter.step_from(ctx, &scalars, &norm, &grad)?;
            exact.step(&desc, &scalars, 1.0, 0.7);
            if [1, 2, 10, 100].contains(&step) {
                let [m, v] = parameter.moments(ctx)?;
                assert_mean(&format!("m, {moments:?}, step {step}"), &m, exact.m);
                assert_mean(&format!("v, {moments:?}, step {step}"), &v, exact.v);
            }
        }
    }
    Ok(())
}

/// A quadratic with noisy gradients and curvatures from 1 to 1000: what is left of the loss, relative to f32 moments.
fn all_moments_converge(ctx: &Context, _: usize) -> Result<(), Failed> {
    let (rows, cols) = (4, 128);
    let n = rows * cols;
    let (start, goal) = (gaussian(1, n), gaussian(2, n));
    let curvature = |i: usize| 10f32.powf(3.0 * (i % 61) as f32 / 60.0);
    let loss = |w: &[f32]| -> f64 {
        let term = |i: usize| f64::from(curvature(i)) * f64::from(w[i] - goal[i]).powi(2);
        (0..n).map(term).sum()
    };
    let steps = 120;
    let run = |master, moments| -> Result<f64, Failed> {
        let desc = AdamWDesc { master, moments, ..AdamWDesc::new(rows, cols) };
        let mut parameter = Parameter::new(ctx, &desc, &start)?;
        for step in 1..=steps {
            let w = read(ctx, &parameter.w)?;
            let noise = gaussian(u64::from(step) + 10, n);
            let grad: Vec<_> =
                (0..n).map(|i| curvature(i) * (w[i] - goal[i] + 0.1 * noise[i])).collect();
            let lr = 0.15 * (1.0 - (step - 1) as f32 / steps as f32);
            let scalars = StepScalars { step, lr, weight_decay: 0.0, seed: 3 };
            parameter.step(ctx, &scalars, 1.0, &grad)?;
        }
        Ok(loss(&read(ctx, &parameter.w)?))
    };
    let full = run(DType::F32, Moments::F32)?;
    assert!(full < 0.01 * loss(&start), "{full} of {}", loss(&start));
    for (master, moments, within) in [
        (DType::F32, Moments::BF16, 1.15),
        (DType::F32, Moments::FP8, 1.3),
        (DType::BF16, Moments::FP8, 1.3),
    ] {
        let left = run(master, moments)?;
        assert!(left < within * full, "{master} {moments:?}: {left}, f32 {full}");
    }
    Ok(())
}

fn same_bits_every_time(ctx: &Context, _: usize) -> Result<(), Failed> {
    let (rows, cols) = (5, 68);
    for (master, moments) in every_setting() {
        let desc = AdamWDesc { master, moments, ..AdamWDesc::new(rows, cols) };
        let run = || {
            let mut parameter = Parameter::new(ctx, &desc, &gaussian(1, rows * cols))?;
            for step in 1..=3 {
                let grad = gradients(u64::from(step), rows * cols);
                parameter.step(ctx, &StepScalars { step, ..SCALARS }, 1.0, &grad)?;
            }
            parameter.bytes(ctx)
        };
        assert_bytes(&format!("{desc:?}"), &run()?, &run()?);
    }
    let grads = norm_inputs();
    let bits = || Ok::<_, Failed>(norm(ctx, &grads, 0.3, 1.0)?.into_iter().map(f32::to_bits));
    assert!(bits()?.eq(bits()?));
    Ok(())
}

/// Gradients times 2^k under the inverse scale 2^-k, with and without clipping: the same weights and moments.
fn a_loss_scale_changes_no_bit(ctx: &Context, _: usize) -> Result<(), Failed> {
    let (rows, cols) = (130, 132);
    let desc = AdamWDesc::new(rows, cols);
    for max_norm in [0.5, f32::INFINITY] {
        let run = |scale: f32| {
            let mut parameter = Parameter::new(ctx, &desc, &gaussian(1, rows * cols))?;
            let mut kernel = GradientNorm::new(ctx, &[rows * cols])?;
            let mut y = ctx.zeros(DType::F32, 1, 4)?;
            for step in 1..=3 {
                let grad = gradients(u64::from(step), rows * cols);
                let grad: Vec<_> = grad.iter().map(|g| g * scale).collect();
                let grad = upload(ctx, rows, cols, &grad)?;
                let mut stream = ctx.stream();
                kernel.record(&mut stream, &[&grad], 1.0 / scale, max_norm, &mut y)?;
                ctx.submit(stream)?;
                parameter.step_from(ctx, &StepScalars { step, ..SCALARS }, &y, &grad)?;
            }
            parameter.bytes(ctx)
        };
        let plain = run(1.0)?;
        for k in [-20, 16] {
            assert_bytes(&format!("2^{k}, {max_norm}"), &run(2f32.powi(k))?, &plain);
        }
    }
    Ok(())
}

fn checkpoints_round_trip(ctx: &Context, _: usize) -> Result<(), Failed> {
    let (rows, cols) = (3, 92);
    for (master, moments) in every_setting() {
        let desc = AdamWDesc { master, moments, ..AdamWDesc::new(rows, cols) };
        let grad = |step| gradients(u64::from(step), rows * cols);
        let mut one = Parameter::new(ctx, &desc, &gaussian(1, rows * cols))?;
        for step in 1..=3 {
            one.step(ctx, &StepScalars { step, ..SCALARS }, 1.0, &grad(step))?;
        }
        let mut two = Parameter::new(ctx, &desc, &read(ctx, &one.w)?)?;
        for tensor in one.state.tensors() {
            let bytes = one.state.read_blocking(ctx, tensor.name)?;
            assert_eq!(bytes.len(), tensor.bytes());
            two.state.write(ctx, tensor.name, &bytes)?;
        }
        assert_bytes("loaded", &two.bytes(ctx)?, &one.bytes(ctx)?);
        for parameter in [&mut one, &mut two] {
            parameter.step(ctx, &StepScalars { step: 4, ..SCALARS }, 1.0, &grad(4))?;
        }
        assert_bytes("a step later", &two.bytes(ctx)?, &one.bytes(ctx)?);
        let error = two.state.write(ctx, "m2", &[]).unwrap_err().to_string();
        assert!(error.contains("m2") && error.contains(moments.name()), "{error}");
        let name = two.state.tensors()[0].name;
        let error = two.state.write(ctx, name, &[0; 8]).unwrap_err().to_string();
        assert!(error.contains("8 bytes") && error.contains(name), "{error}");
    }
    Ok(())
}

// ---- The packed weight ---------------------------------------------------------------------------------------------

fn packed_weights_equal_quantize(ctx: &Context, step: usize) -> Result<(), Failed> {
    let rules = [ScaleRule::Floor, ScaleRule::Ceil, ScaleRule::Rceil, ScaleRule::Even];
    let mut cases = Vec::new();
    for element in Element::ALL {
        for side in [16, 32] {
            let spec = MxSpec { element, scale: ScaleFormat::E8M0, block: Block::Square(side) };
            for setting in every_setting() {
                let shape = [(70, 128), (64, 256), (1, 128), (33, 384)][cases.len() % 4];
                let rule = rules[cases.len() % 4];
                let desc = QuantizeDesc { spec, scale_rule: Some(rule), ..Default::default() };
                cases.push((desc, setting, shape));
            }
        }
    }
    // A few that are two dispatches.
    let plain = QuantizeDesc::default();
    let square = MXFP4.with_block(Block::Square(32));
    let stochastic = Rounding::Stochastic { seed: 1, stream: 2 };
    let two = [
        (plain, (33, 128)),
        (QuantizeDesc { spec: square, ..plain }, (33, 68)),
        (QuantizeDesc { spec: square, axis: Axis::Zero, ..plain }, (33, 128)),
        (QuantizeDesc { spec: square, rounding: stochastic, ..plain }, (33, 128)),
        (QuantizeDesc { spec: NVFP4.with_block(Block::Square(16)), ..plain }, (33, 128)),
    ];
    let cases = cases.into_iter().step_by(step);
    let two = two.map(|(desc, shape)| (desc, (DType::F32, Moments::FP8), shape));
    for (quantize, (master, moments), (rows, cols)) in cases.chain(two) {
        let desc = AdamWDesc { master, moments, ..AdamWDesc::new(rows, cols) };
        let (spec, what) = (quantize.spec, format!("{quantize:?} {desc:?}"));
        let mut w = gaussian(1, rows * cols);
        w[rows * cols - 1] = f32::INFINITY;
        let mut fused = Parameter::new(ctx, &desc, &w)?;
        let mut plain = Parameter::new(ctx, &desc, &w)?;
        let mut packed = garbage(ctx, &quantize, rows, cols)?;
        let mut want = garbage(ctx, &quantize, rows, cols)?;
        let norm = upload(ctx, 1, 4, &[1.0, 1.0, 1.0, -1.0])?;
        for step in 1..=2 {
            let scalars = StepScalars { step, ..SCALARS };
            let grad = upload(ctx, rows, cols, &gradients(u64::from(step), rows * cols))?;
            let mut stream = ctx.stream();
            let Parameter { kernel, w, state } = &mut fused;
            kernel.record_quantized(
                &mut stream,
                &scalars,
                &grad,
                &norm,
                w,
                state,
                &quantize,
                &mut packed,
            )?;
            Quantize::new(ctx, &quantize)?.record(&mut stream, w, &mut want)?;
            ctx.submit(stream)?;
            plain.step_from(ctx, &scalars, &norm, &grad)?;
        }
        let (got, want_mx) = (ctx.read_mx_blocking(&packed)?, ctx.read_mx_blocking(&want)?);
        assert_bytes(&format!("scales of {what}"), got.scales(), want_mx.scales());
        assert_bytes(&format!("codes of {what}"), got.codes(), want_mx.codes());
        assert_eq!(got, want_mx, "{what}");
        let count = ctx.nonfinite_blocks_blocking(&packed)?;
        assert_eq!(count, ctx.nonfinite_blocks_blocking(&want)?, "{what}");
        assert_eq!(count, 1, "{what}");
        // A product reads the anchors too.
        if spec.block.lines() > 1 && spec.element == Element::E2M1 && moments == Moments::F32 {
            let operand = spec.into();
            let (a, b) = (operand, operand);
            let desc = MatmulDesc { m: rows, n: rows, k: cols, a, b, ..Default::default() };
            let matmul = Matmul::new(ctx, &desc)?;
            let product = |packed| -> Result<Vec<u8>, Failed> {
                let mut y = ctx.zeros(DType::F32, rows, rows)?;
                let mut stream = ctx.stream();
                matmul.record(&mut stream, packed, packed, &mut y)?;
                ctx.submit(stream)?;
                Ok(ctx.read_blocking(&y)?)
            };
            assert_bytes(&format!("product of {what}"), &product(&packed)?, &product(&want)?);
        }
        // The same update as without packing, but for what another compilation of the same formulas may do: a rounding of
        // f32 that may in turn carry a stochastic one over, where there is one.
        let steps = if master == DType::BF16 { 1.0 / 128.0 } else { 16.0 * U };
        let exact = master == DType::F32 && moments == Moments::F32;
        let (a, b) = (read(ctx, &fused.w)?, read(ctx, &plain.w)?);
        let close = |(a, b): &(&f32, &f32)| {
            let off = f64::from(**a - **b).abs();
            a.is_nan() && b.is_nan() || off <= steps * f64::from(b.abs()) + 16.0 * U * 0.05
        };
        let far = a.iter().zip(&b).filter(|pair| !close(pair)).count();
        let allowed = if exact { 0 } else { rows * cols / 100 };
        assert!(far <= allowed, "{far} of {} weights differ, {what}", rows * cols);
        let step = [16.0 * U, 1.0 / 128.0, 0.25][moments as usize];
        for (a, b) in fused.moments(ctx)?.into_iter().zip(plain.moments(ctx)?) {
            let far = |(a, b): &(f64, f64)| (a - b).abs() > step * b.abs() + 1e-12;
            let far = a.into_iter().zip(b).filter(far).count();
            assert!(far <= allowed, "{far} of {} moments differ, {what}", rows * cols);
        }
    }
    Ok(())
}

// ---- Sizes and errors ----------------------------------------------------------------------------------------------

fn bytes_are_what_is_allocated(ctx: &Context, _: usize) -> Result<(), Failed> {
    for ((master, moments), want) in every_setting().zip([12.0, 8.0, 6.03125, 10.0, 6.0, 4.03125]) {
        let desc = AdamWDesc { master, moments, ..AdamWDesc::new(32, 64) };
        assert_eq!(desc.bytes_per_parameter(), want, "{desc:?}");
        let (rows, cols) = (7, 52);
        let desc = AdamWDesc { rows, cols, ..desc };
        let parameter = Parameter::new(ctx, &desc, &vec![0.0; rows * cols])?;
        let mut bytes = parameter.w.bytes() + parameter.state.bytes();
        assert_eq!(desc.bytes_per_parameter(), bytes as f64 / (rows * cols) as f64);
        bytes -= parameter.w.bytes();
        assert_eq!(bytes, parameter.state.tensors().map(|t| t.bytes()).iter().sum::<usize>());
    }
    Ok(())
}

fn mismatches_are_errors(ctx: &Context, _: usize) -> Result<(), Failed> {
    let desc = AdamWDesc::new(8, 16);
    for (wrong, says) in [
        (AdamWDesc { cols: 6, ..desc }, "[8, 6]"),
        (AdamWDesc { master: DType::F16, ..desc }, "f16"),
        (AdamWDesc { beta1: 1.0, ..desc }, "beta1 1"),
        (AdamWDesc { eps: 0.0, ..desc }, "eps 0"),
        (AdamWDesc { index: 1 << 30, ..desc }, "index"),
    ] {
        let error = AdamW::new(ctx, &wrong).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
        assert!(AdamWState::new(ctx, &wrong).is_err());
    }
    let kernel = AdamW::new(ctx, &desc)?;
    let good = |rows, cols, dtype| ctx.zeros(dtype, rows, cols);
    let try_step = |scalars: &StepScalars, grad: [usize; 2], norm, master, state: &AdamWDesc| {
        let grad = good(grad[0], grad[1], DType::F32)?;
        let norm = good(1, norm, DType::F32)?;
        let mut w = good(8, 16, master)?;
        let mut state = AdamWState::new(ctx, state)?;
        kernel.record(&mut ctx.stream(), scalars, &grad, &norm, &mut w, &mut state)
    };
    try_step(&SCALARS, [8, 16], 4, DType::F32, &desc)?;
    let bf16 = AdamWDesc { moments: Moments::BF16, ..desc };
    for (result, says) in [
        (try_step(&SCALARS, [16, 8], 4, DType::F32, &desc), vec!["[16, 8]", "[8, 16]"]),
        (try_step(&SCALARS, [8, 16], 5, DType::F32, &desc), vec!["[1, 5]", "[1, 4]"]),
        (try_step(&SCALARS, [8, 16], 4, DType::BF16, &desc), vec!["bf16", "f32"]),
        (try_step(&SCALARS, [8, 16], 4, DType::F32, &bf16), vec!["state", "bf16", "[8, 16]"]),
        (
            try_step(&StepScalars { step: 0, ..SCALARS }, [8, 16], 4, DType::F32, &desc),
            vec!["step 0"],
        ),
    ] {
        let error = result.unwrap_err().to_string();
        assert!(says.iter().all(|says| error.contains(says)), "{error}");
    }
    let mut y = good(1, 4, DType::F32)?;
    let grad = good(8, 16, DType::F32)?;
    let halves = good(8, 16, DType::BF16)?;
    let odd = good(32, 4, DType::F32)?;
    let mut of = GradientNorm::new(ctx, &[128, 128])?;
    let mut norm = |grads: &[&Tensor], scale, y: &mut Tensor| {
        of.record(&mut ctx.stream(), grads, scale, 1.0, y).map_err(|error| error.to_string())
    };
    norm(&[&grad, &odd], 1.0, &mut y)?;
    assert!(norm(&[&grad], 1.0, &mut y).unwrap_err().contains("1 gradients"));
    assert!(norm(&[&grad, &halves], 1.0, &mut y).unwrap_err().contains("bf16"));
    assert!(norm(&[&grad, &y_like(ctx)?], 1.0, &mut y).unwrap_err().contains("[1, 4]"));
    assert!(norm(&[&grad, &grad], 0.0, &mut y).unwrap_err().contains("inverse_scale 0"));
    let mut long = good(1, 8, DType::F32)?;
    assert!(norm(&[&grad, &grad], 1.0, &mut long).unwrap_err().contains("[1, 8]"));
    Ok(())
}

fn y_like(ctx: &Context) -> Result<Tensor, Failed> {
    Ok(ctx.zeros(DType::F32, 1, 4)?)
}

/// Weights on a walk, with quantized values that follow it coarsely: against the paths of each weight, summed one by one.
fn oscillating_weights(ctx: &Context, _: usize) -> Result<(), Failed> {
    const THRESHOLD: f32 = 3.0;
    for (master, [rows, cols]) in [(DType::F32, [5, 12]), (DType::BF16, [3, 700])] {
        let n = rows * cols;
        let mut oscillation = Oscillation::new(ctx, rows, cols)?;
        // Walks about the middle between two multiples of 1/2, some of them so small that they always cross it.
        let place = gaussian(1, n);
        let mut w: Vec<f32> = place.iter().map(|p| p.round() * 0.5 + 0.25).collect();
        w[0] = f32::NAN;
        let (mut before, mut paths) = (Vec::new(), vec![[0f32; 2]; n]);
        let mut resets = [0; 2];
        for step in 0..9 {
            let size = 0.5 / (1 + step) as f32;
            for (w, d) in w.iter_mut().zip(gaussian(2 + step, n)) {
                *w += d * size;
            }
            w = to_f32(master, &narrowed(master, &w));
            let q: Vec<f32> = w.iter().map(|w| (w * 2.0).round() / 2.0).collect();
            let action = match step {
                0 => Action::Start,
                4 | 8 => Action::Reset,
                _ => Action::Walk,
            };
            let mut on_engine = ctx.upload(master, rows, cols, &narrowed(master, &w))?;
            let near = upload(ctx, rows, cols, &q)?;
            let mut stream = ctx.stream();
            oscillation.record(&mut stream, action, THRESHOLD, &mut on_engine, &near)?;
            ctx.submit(stream)?;
            for i in 0..n {
                if let Some((w_before, q_before)) = before.get(i) {
                    let (w_before, q_before): (&f32, &f32) = (w_before, q_before);
                    paths[i][0] += (w[i] - w_before).abs();
                    paths[i][1] += (q[i] - q_before).abs();
                }
                if action == Action::Reset {
                    let [w_path, q_path] = std::mem::take(&mut paths[i]);
                    let resets_it = q_path > 0.0 && q_path >= THRESHOLD * w_path;
                    resets[usize::from(resets_it)] += 1;
                    if resets_it {
                        w[i] = q[i];
                    }
                }
            }
            before = w.iter().copied().zip(q).collect();
            let got = read(ctx, &on_engine)?;
            let bits = |x: &[f32]| -> Vec<u32> { x.iter().map(|x| x.to_bits()).collect() };
            assert_eq!(bits(&got[1..]), bits(&w[1..]), "{master}, step {step}");
            assert!(got[0].is_nan());
        }
        assert!(resets.iter().all(|count| *count > n / 20), "{resets:?}");
    }
    let mut oscillation = Oscillation::new(ctx, 4, 8)?;
    let (mut w, q) = (ctx.zeros(DType::F32, 4, 8)?, ctx.zeros(DType::F32, 8, 4)?);
    let mut stream = ctx.stream();
    let error = oscillation.record(&mut stream, Action::Walk, 3.0, &mut w, &q).unwrap_err();
    assert!(error.to_string().contains("[8, 4]"), "{error}");
    Ok(())
}
