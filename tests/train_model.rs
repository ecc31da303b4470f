//! The trainer on every engine (tests/common/engines.rs): the whole model against an f64 reference and its finite
//! differences, linear layers in all recipes against the oracles of tests/common, and what a run promises: the same bits
//! every time, from a checkpoint too.

mod common;

use std::cell::Cell;
use std::collections::BTreeMap;

use common::engines::{self, Form, PLAIN, Test};
use common::product::{self, Interval, Lines};
use common::{gaussian, narrowed, panics, reference, to_f32, words};
use libtest_mimic::{Failed, Trial};
use microscaling::kernels::adamw::StepScalars;
use microscaling::kernels::{GradientNorm, Groups};
use microscaling::rng::{ROUNDS, threefry4x32};
use microscaling::train::checkpoint::Checkpoint;
use microscaling::train::linear::{Draws, LinearDesc, MxLinear, Scratch, Step};
use microscaling::train::model::{Experts, Model, ModelDesc, Param, Pass};
use microscaling::train::recipe::{
    Cast, Dense, Form as Format, Layer, Linear, LossScale, MomentType, PRESETS, Recipe, Reset,
    Round, Scale, Signs,
};
use microscaling::train::trainer::{RunDesc, Trainer};
use microscaling::{
    Axis, Context, DType, Error, Layout, MxTensor, Options, QuantizeDesc, Rounding, Tensor, Tier,
    wgpu,
};
use pollster::block_on;

use DType::{BF16, F32};

const SUITE: &[(&str, Test)] = &[
    ("gradients_are_those_of_the_reference", gradients),
    ("coarser_recipes_are_near_f32", coarser),
    ("linear_layers_of_the_presets", presets),
    ("linear_layers_of_other_recipes", combinations),
    ("linear_layers_of_experts", experts_linear),
    ("a_loss_scale_changes_no_bit", loss_scale),
    ("weights_packed_behind_the_update_are_the_same", packed_behind),
    ("every_preset_learns", learns),
    ("a_run_goes_on_from_a_checkpoint", resumes),
    ("late_products_are_dense", late_products),
    ("a_dense_end_is_that_of_a_dense_run", dense_end),
    ("a_dense_step_has_the_kernels_of_bf16", dense_kernels),
    ("a_skipped_step_before_dense_ones_leaves_weights_packed", skipped_change),
    ("weights_that_oscillate_are_reset", oscillates),
    ("divergence_is_an_error", diverges),
];

fn main() {
    let forms = [Form {
        what: PLAIN,
        options: Options::default(),
        steps: [1, 5],
        needs: (wgpu::Features::empty(), ""),
    }];
    let alone = vec![
        Trial::test("checkpoints_of_other_runs_are_refused", other_checkpoints),
        Trial::test("text_is_generated_and_evaluated", generates),
        Trial::test("the_loss_scale_adapts", loss_scale_adapts),
        Trial::test("mismatches_are_errors", mismatches),
        Trial::test("a_comparison_that_must_fail_fails", comparison_fails),
    ];
    engines::run(|_| SUITE.to_vec(), &forms, alone);
}

// ---- Helpers -------------------------------------------------------------------------------------------------------

/// Small, with heads, tokens and columns in more than one block of 32 where that is cheap.
fn small(layers: usize, mtp: usize) -> ModelDesc {
    ModelDesc {
        vocabulary: 64,
        dim: 32,
        layers,
        heads: 2,
        ffn: 64,
        seq: 32,
        batch: 2,
        mtp,
        experts: None,
    }
}

/// Quantized to the end.
fn recipe(name: &str) -> Recipe {
    Recipe { late_forward: 0.0, late_backward: 0.0, ..Recipe::preset(name).unwrap() }
}

/// The preset `mxfp4` with square weights, which dgrad reads as forward does, no transform in forward, resets of weights that
/// oscillate, and an end of forward in bf16. (The preset's experts are so already.)
fn alto() -> Recipe {
    let mut recipe = recipe("mxfp4");
    let x = Cast::plain("mxfp4").scaled(Scale::Even);
    let w = x.clone().blocked("32x32");
    let linear = &mut recipe.linear;
    (linear.forward.x, linear.forward.w, linear.dgrad.w) = (x, w.clone(), w);
    Recipe { late_forward: 0.18, oscillation: Some(Reset::default()), ..recipe }
}

fn floats(ctx: &Context, x: &Tensor) -> Result<Vec<f32>, Error> {
    Ok(to_f32(x.dtype(), &ctx.read_blocking(x)?))
}

/// A batch in which every token is another surprise.
fn random_batch(desc: &ModelDesc, seed: u64) -> Vec<u32> {
    let window = desc.seq + 1 + desc.mtp;
    words(seed, desc.batch * window).iter().map(|w| w % desc.vocabulary as u32).collect()
}

/// Text of sixteen letters, each of which always follows the same other: nothing is left to guess but the first.
fn letter(place: usize) -> u32 {
    [3, 14, 9, 7, 1, 30, 12, 22, 5, 27, 18, 0, 25, 16, 11, 20][place % 16]
}

fn repetitive_batch(desc: &ModelDesc, step: u64) -> Vec<u32> {
    let window = desc.seq + 1 + desc.mtp;
    let starts = words(step, desc.batch);
    starts.iter().flat_map(|s| (0..window).map(move |i| letter(*s as usize % 16 + i))).collect()
}

fn run_desc(recipe: Recipe, model: ModelDesc, steps: u64) -> RunDesc {
    RunDesc { model, recipe, seed: 1 << 40 | 5, steps, data: "letters".into() }
}

/// The values of all parameters by name.
type Values = BTreeMap<String, Vec<f64>>;

fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

/// Weights with which every part of the model matters: what kernels add and multiply is of order one.
fn set_weights(ctx: &Context, model: &mut Model) -> Result<Values, Failed> {
    let mut values = Values::new();
    for (seed, p) in (100..).zip(&mut model.params) {
        let [rows, cols] = p.value.shape();
        let (mean, deviation) = match (rows, p.name.as_str()) {
            (1, _) => (1.0, 0.2),
            (_, "embedding") => (0.0, 1.0),
            _ => (0.0, 1.0 / (cols as f32).sqrt()),
        };
        let normal = gaussian(seed, rows * cols);
        let mut new: Vec<f32> = normal.iter().map(|v| mean + deviation * v).collect();
        if p.name.contains(".experts.") {
            // Exact in INT8, in any block.
            new.iter_mut().for_each(|v| *v = (*v * 128.0).round().clamp(-127.0, 127.0) / 128.0);
        }
        p.value = ctx.upload(F32, rows, cols, bytemuck::cast_slice(&new))?;
        values.insert(p.name.clone(), widened(&new));
    }
    // So large that they choose some experts of lower probability.
    for (seed, (name, bias)) in (200..).zip(model.biases_mut()) {
        let new: Vec<f32> = gaussian(seed, bias.shape()[1]).iter().map(|v| 0.1 * v).collect();
        *bias = ctx.upload(F32, 1, new.len(), bytemuck::cast_slice(&new))?;
        values.insert(name, widened(&new));
    }
    let mut stream = ctx.stream();
    model.prepare(&mut stream, DRAWS, false)?;
    ctx.submit(stream)?;
    Ok(values)
}

const DRAWS: Draws = Draws { seed: 3 << 33 | 9, step: 4 };

/// No counts, no experts.
fn plain() -> Step<'static> {
    Step { draws: DRAWS, counters: None, groups: None }
}

/// What a pass over a batch gives.
#[derive(Clone)]
struct Outcome {
    losses: Vec<f64>,
    grads: Values,
    logits: Vec<f64>,
}

fn pass(ctx: &Context, model: &mut Model, batch: &[u32]) -> Result<Outcome, Failed> {
    model.set_batch(batch)?;
    let pass = Pass { draws: DRAWS, count: false };
    let mut stream = ctx.stream();
    model.record(&mut stream, pass, Some(1.0))?;
    ctx.submit(stream)?;
    let mut losses = Vec::new();
    for loss in model.losses() {
        losses.push(floats(ctx, loss)?[0].into());
    }
    let mut grads = Values::new();
    for p in &model.params {
        grads.insert(p.name.clone(), widened(&floats(ctx, &p.grad)?));
    }
    let mut stream = ctx.stream();
    model.record(&mut stream, pass, None)?;
    ctx.submit(stream)?;
    let logits = widened(&floats(ctx, model.logits())?);
    Ok(Outcome { losses, grads, logits })
}

// ---- The reference -------------------------------------------------------------------------------------------------

/// x · wᵀ.
fn times(x: &[f64], w: &[f64], k: usize) -> Vec<f64> {
    x.chunks(k)
        .flat_map(|x| w.chunks(k).map(|w| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>()))
        .collect()
}

fn plus(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn rms_norm(s: &[f64], gain: &[f64]) -> Vec<f64> {
    s.chunks(gain.len())
        .flat_map(|row| {
            let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
            row.iter().zip(gain).map(move |(v, g)| v * g / (mean + 1e-5).sqrt())
        })
        .collect()
}

/// Causal attention of one head: q, k, v `[seq, d]`; q and k are turned as complex numbers, whose imaginary parts are their
/// second halves.
fn attention(q: &[f64], k: &[f64], v: &[f64], d: usize) -> Vec<f64> {
    let turned = |x: &[f64]| -> Vec<f64> {
        let mut out = x.to_vec();
        for (place, row) in out.chunks_mut(d).enumerate() {
            for i in 0..d / 2 {
                let (re, im) = (row[i], row[i + d / 2]);
                let angle = place as f64 / 10_000f64.powf(2.0 * i as f64 / d as f64);
                row[i] = re * angle.cos() - im * angle.sin();
                row[i + d / 2] = re * angle.sin() + im * angle.cos();
            }
        }
        out
    };
    let (q, k) = (turned(q), turned(k));
    let mut out = Vec::new();
    for (i, q) in q.chunks(d).enumerate() {
        let dot = |k: &[f64]| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
        let weights: Vec<f64> =
            k.chunks(d).take(i + 1).map(|k| (dot(k) / (d as f64).sqrt()).exp()).collect();
        let sum: f64 = weights.iter().sum();
        out.extend((0..d).map(|c| {
            let terms = weights.iter().zip(v.chunks(d)).map(|(w, v)| w * v[c]);
            terms.sum::<f64>() / sum
        }));
    }
    out
}

/// An expert, or the feed-forward part of a dense block.
fn swiglu(y: &[f64], gate_up: &[f64], down: &[f64], ffn: usize) -> Vec<f64> {
    let gate_up = times(y, gate_up, y.len());
    let h: Vec<f64> =
        (0..ffn).map(|i| gate_up[i] / (1.0 + (-gate_up[i]).exp()) * gate_up[ffn + i]).collect();
    times(&h, down, ffn)
}

/// The model in f64, from what it is said to be.
struct Reference<'a> {
    desc: &'a ModelDesc,
    batch: &'a [u32],
    /// Of all tokens so far, the least by which an expert was better than one that was not chosen.
    margin: Cell<f64>,
}

impl<'a> Reference<'a> {
    fn new(desc: &'a ModelDesc, batch: &'a [u32]) -> Reference<'a> {
        Reference { desc, batch, margin: Cell::new(f64::INFINITY) }
    }

    /// What the experts make of a token: those with the largest probability plus bias, by their share of the probability of
    /// all that are chosen.
    fn mixture(&self, values: &Values, name: &str, y: &[f64], experts: Experts) -> Vec<f64> {
        let ModelDesc { dim, ffn, .. } = *self.desc;
        let value = |part: &str| &values[&format!("{name}.{part}")][..];
        let powers: Vec<f64> = times(y, value("router"), dim).into_iter().map(f64::exp).collect();
        let total: f64 = powers.iter().sum();
        let score = |e: usize| powers[e] / total + value("router.bias")[e];
        let mut order: Vec<usize> = (0..experts.count).collect();
        order.sort_by(|a, b| score(*b).total_cmp(&score(*a)));
        let (chosen, rest) = order.split_at(experts.top_k);
        let margin = score(chosen[chosen.len() - 1]) - score(rest[0]);
        self.margin.set(self.margin.get().min(margin));
        let share: f64 = chosen.iter().map(|e| powers[*e]).sum();
        let mut sum = vec![0.0; dim];
        for e in chosen {
            let gate_up = &value("experts.gate_up")[e * 2 * ffn * dim..][..2 * ffn * dim];
            let down = &value("experts.down")[e * dim * ffn..][..dim * ffn];
            let out = swiglu(y, gate_up, down, ffn);
            sum.iter_mut().zip(out).for_each(|(sum, out)| *sum += powers[*e] / share * out);
        }
        sum
    }

    fn block(&self, values: &Values, name: &str, s: &[f64]) -> Vec<f64> {
        let ModelDesc { dim, heads, ffn, seq, batch, .. } = *self.desc;
        let value = |part: &str| &values[&format!("{name}.{part}")][..];
        let qkv = times(&rms_norm(s, value("norm1")), value("qkv"), dim);
        let d = dim / heads;
        let mut attended = vec![0.0; s.len()];
        for sequence in 0..batch {
            for head in 0..heads {
                let part = |third: usize| -> Vec<f64> {
                    let rows = qkv.chunks(3 * dim).skip(sequence * seq).take(seq);
                    rows.flat_map(|row| row[third * dim + head * d..][..d].to_vec()).collect()
                };
                let out = attention(&part(0), &part(1), &part(2), d);
                for (i, out) in out.chunks(d).enumerate() {
                    attended[(sequence * seq + i) * dim + head * d..][..d].copy_from_slice(out);
                }
            }
        }
        let s = plus(s, &times(&attended, value("out"), dim));
        let y = rms_norm(&s, value("norm2"));
        let added: Vec<f64> = match self.desc.experts {
            None => y
                .chunks(dim)
                .flat_map(|y| swiglu(y, value("gate_up"), value("down"), ffn))
                .collect(),
            Some(experts) => {
                y.chunks(dim).flat_map(|y| self.mixture(values, name, y, experts)).collect()
            }
        };
        plus(&s, &added)
    }

    /// The mean loss and the logits; head 0 predicts the next token, each further one a token more.
    fn head(&self, values: &Values, norm: &str, s: &[f64], number: usize) -> (f64, Vec<f64>) {
        let ModelDesc { dim, vocabulary, seq, mtp, .. } = *self.desc;
        let logits = times(&rms_norm(s, &values[norm]), &values["head"], dim);
        let mut loss = 0.0;
        for (t, row) in logits.chunks(vocabulary).enumerate() {
            let window = &self.batch[t / seq * (seq + 1 + mtp)..];
            let target = window[t % seq + 1 + number] as usize;
            loss += row.iter().map(|v| v.exp()).sum::<f64>().ln() - row[target];
        }
        (loss / self.desc.tokens() as f64, logits)
    }

    /// All heads' losses and the main one's logits.
    fn forward(&self, values: &Values) -> (Vec<f64>, Vec<f64>) {
        let ModelDesc { dim, layers, seq, mtp, .. } = *self.desc;
        let windows = self.batch.chunks(seq + 1 + mtp);
        let inputs = windows.flat_map(|window| &window[..seq]);
        let mut s: Vec<f64> =
            inputs.flat_map(|t| values["embedding"][*t as usize * dim..][..dim].to_vec()).collect();
        for layer in 0..layers {
            s = self.block(values, &format!("blocks.{layer}"), &s);
        }
        let (loss, logits) = self.head(values, "final.norm", &s, 0);
        let mut losses = vec![loss];
        for i in 0..mtp {
            let s = self.block(values, &format!("mtp.{i}"), &s);
            losses.push(self.head(values, &format!("mtp.{i}.final.norm"), &s, i + 1).0);
        }
        (losses, logits)
    }

    /// What gradients are of.
    fn total(&self, values: &Values) -> f64 {
        let (losses, _) = self.forward(values);
        losses[0] + 0.3 * losses[1..].iter().sum::<f64>() / losses[1..].len().max(1) as f64
    }

    /// The derivative of the total along a direction of one parameter, by a central difference: its error is of order
    /// h² = 10⁻⁹ of the third derivative, and 10⁻¹⁵ / h of the loss.
    fn derivative(&self, values: &mut Values, name: &str, direction: &[(usize, f64)]) -> f64 {
        const H: f64 = 3e-5;
        let before = values[name].clone();
        let mut at = |h: f64| {
            let value = values.get_mut(name).unwrap();
            value.copy_from_slice(&before);
            direction.iter().for_each(|(i, d)| value[*i] += h * d);
            self.total(values)
        };
        let derivative = (at(H) - at(-H)) / (2.0 * H);
        values.insert(name.into(), before);
        derivative
    }
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// Compares with the reference. Every stage (a kernel that sums) on the way from the tokens to a gradient is off by at most
/// n · 2^-24, relative to the terms of its sums, of which there are n = 96 at most, plus eight units for what WGSL allows
/// exp, square root and division. With weights of order one no stage makes the error before it much larger, and a block has
/// nine stages each way; with experts four more: the router's product, its softmax, the shares, and the sum over experts. What
/// is compared with is the root mean square of the tensor beside the element itself.
fn check(desc: &ModelDesc, batch: &[u32], values: &mut Values, got: &Outcome) {
    let blocks = desc.layers + desc.mtp;
    let stages = if desc.experts.is_some() { 26 } else { 18 } * blocks + 6;
    let bound = stages as f64 * (96.0 + 8.0) * 2f64.powi(-24);
    let reference = Reference::new(desc, batch);
    let (losses, logits) = reference.forward(values);
    assert_eq!(got.losses.len(), 1 + desc.mtp);
    let mut worst = 0f64;
    let mut near = |what: &str, got: f64, want: f64, size: f64| {
        let (off, allowed) = ((got - want).abs(), bound * (size + want.abs()));
        assert!(off <= allowed, "{what}: {got:e}, want {want:e}, off by {off:e} of {allowed:e}");
        worst = worst.max(off / allowed);
    };
    for (i, (got, want)) in got.losses.iter().zip(&losses).enumerate() {
        near(&format!("loss {i}"), *got, *want, 0.0);
    }
    let rms = |x: &[f64]| norm(x) / (x.len() as f64).sqrt();
    assert_eq!(got.logits.len(), logits.len());
    for (i, (got, want)) in got.logits.iter().zip(&logits).enumerate() {
        near(&format!("logit {i}"), *got, *want, rms(&logits));
    }
    let of_block = if desc.experts.is_some() { 7 } else { 6 };
    assert_eq!(got.grads.len(), 3 + of_block * blocks + desc.mtp);
    for (seed, (name, grad)) in (0..).zip(&got.grads) {
        // All elements at once, along a random direction of length one; then the largest and some others.
        let direction: Vec<f64> = widened(&gaussian(seed, grad.len()));
        let length = norm(&direction);
        let all: Vec<_> = direction.iter().map(|d| d / length).enumerate().collect();
        let along: f64 = all.iter().map(|(i, d)| grad[*i] * d).sum();
        near(name, along, reference.derivative(values, name, &all), norm(grad));
        let largest = (0..grad.len()).max_by(|a, b| grad[*a].abs().total_cmp(&grad[*b].abs()));
        let mut sample: Vec<usize> =
            words(seed, 3).iter().map(|w| *w as usize % grad.len()).collect();
        sample.extend(largest);
        for i in sample {
            let want = reference.derivative(values, name, &[(i, 1.0)]);
            near(&format!("{name} {i}"), grad[i], want, rms(grad));
        }
    }
    // Not so wide that nothing could be outside.
    assert!(worst > 1e-4, "{worst:e}");
    // Nor is there a jump between the two ends of a difference, or another choice in f32.
    assert!(reference.margin.get() > MARGIN / 2.0, "experts change: {}", reference.margin.get());
}

/// By how much an expert must be better than one that is not chosen: more than twice as much as the pass before the one whose
/// logits are compared moves the biases (10⁻³ each), and far more than a difference or f32 moves a probability.
const MARGIN: f64 = 4e-3;

/// A batch whose tokens all choose their experts clearly.
fn clear_batch(desc: &ModelDesc, values: &Values) -> Vec<u32> {
    let clear = |batch: &Vec<u32>| {
        let reference = Reference::new(desc, batch);
        reference.forward(values);
        reference.margin.get() > MARGIN
    };
    (77..1077).map(|seed| random_batch(desc, seed)).find(clear).expect("no batch has clear choices")
}

/// One block and one head more, both with experts: the second's gradients go through the first.
fn experts() -> ModelDesc {
    let experts = Some(Experts { count: 4, top_k: 2 });
    ModelDesc { batch: 1, ffn: 32, experts, ..small(1, 1) }
}

fn gradients(ctx: &Context, _: usize) -> Result<(), Failed> {
    let dense = |layers, mtp, batch| ModelDesc { batch, ..small(layers, mtp) };
    // Weights of experts that are packed, both ways, and have lost nothing.
    let mut packed = recipe("f32");
    let mut linear = packed.linear.clone();
    linear.forward.w = Cast::plain("mxint8");
    linear.dgrad.w = Cast::plain("mxint8").blocked("1x16");
    packed.layers.push(Layer { name: "*.experts.*".into(), linear });
    let f32s = recipe("f32");
    for (desc, recipe) in
        [(dense(2, 0, 1), &f32s), (dense(1, 2, 2), &f32s), (experts(), &f32s), (experts(), &packed)]
    {
        let mut model = Model::new(ctx, &desc, recipe, 1)?;
        let mut values = set_weights(ctx, &mut model)?;
        let batch = clear_batch(&desc, &values);
        let got = pass(ctx, &mut model, &batch)?;
        check(&desc, &batch, &mut values, &got);
    }
    Ok(())
}

/// A gradient that is wrong by one in a thousand must show, in each parameter.
fn comparison_fails() -> Result<(), Failed> {
    let ctx = Context::cpu();
    for desc in [ModelDesc { batch: 1, ..small(1, 0) }, experts()] {
        let mut model = Model::new(&ctx, &desc, &recipe("f32"), 1)?;
        let values = set_weights(&ctx, &mut model)?;
        let batch = clear_batch(&desc, &values);
        let right = pass(&ctx, &mut model, &batch)?;
        check(&desc, &batch, &mut values.clone(), &right);
        for name in right.grads.keys() {
            let mut got = right.clone();
            let grad = got.grads.get_mut(name).unwrap();
            grad.iter_mut().for_each(|g| *g *= 1.001);
            let mut values = values.clone();
            assert!(panics(|| check(&desc, &batch, &mut values, &got)), "{name} wrong passes");
        }
    }
    Ok(())
}

/// Gradients of a recipe, against f32's of the same engine, and those of the CPU engine with the same draws. Bounds are on
/// the distance relative to the norm, of each parameter.
///
/// - bf16 rounds to one part in 2⁹, a dozen times on the way: within 3%. Between engines the sums in f32 differ, and a value
///   near a tie falls to the other side: a bf16 unit, 2^-8, in a few of them; within 1%.
/// - MXFP4 adds noise of 0.013 (to nearest) to 0.027 (stochastic) of the energy with each quantized operand. In two layers
///   are eight products forward and as many back to the first, of two operands each: √(32 · 0.02) = 0.8, if these were all
///   on every way and independent, and half as much again to spare. Between engines a value near a tie, or near
///   its random threshold, becomes the next element; that is rare, and what follows from it is not: within 20%.
fn coarser(ctx: &Context, step: usize) -> Result<(), Failed> {
    let desc = small(if step > 1 { 1 } else { 2 }, 0);
    let batch = random_batch(&desc, 5);
    let run = |ctx: &Context, name: &str| -> Result<Outcome, Failed> {
        let mut model = Model::new(ctx, &desc, &recipe(name), 1)?;
        set_weights(ctx, &mut model)?;
        pass(ctx, &mut model, &batch)
    };
    let cpu = Context::cpu();
    let plain = run(&cpu, "f32")?;
    for (name, loss, from_f32, from_cpu) in [("bf16", 0.005, 0.03, 0.01), ("mxfp4", 0.1, 1.2, 0.2)]
    {
        let got = run(ctx, name)?;
        let same = run(&cpu, name)?;
        let off = |other: &Outcome| (got.losses[0] / other.losses[0] - 1.0).abs();
        assert!(off(&plain) < loss, "{name}: loss {} {}", got.losses[0], plain.losses[0]);
        assert!(off(&same) < from_cpu / 10.0, "{name}: loss {} {}", got.losses[0], same.losses[0]);
        for (what, grad) in &got.grads {
            let distance = |other: &Outcome| {
                let other = &other.grads[what];
                let difference: Vec<f64> = grad.iter().zip(other).map(|(a, b)| a - b).collect();
                norm(&difference) / norm(other)
            };
            let far = [distance(&plain), distance(&same)];
            assert!(far[0] < from_f32, "{name} {what}: {} from f32", far[0]);
            assert!(far[1] < from_cpu, "{name} {what}: {} from the CPU engine", far[1]);
            // It is another recipe. (Gradients of the embedding and gains are little else.)
            assert!(far[0] > 1e-4, "{name} {what}: as f32");
        }
    }
    Ok(())
}

// ---- Linear layers -------------------------------------------------------------------------------------------------

const ROWS: usize = 64;
const N: usize = 96;
const K: usize = 64;
const LAYER: u32 = 7;

/// Normal numbers that are multiples of 2⁻⁸, or in f32 of 2⁻¹², below 8: sums of a hundred are exact, in f32 and f64.
fn grid(dtype: DType, seed: u64, n: usize) -> Vec<f32> {
    let unit = if dtype == BF16 { 256.0 } else { 4096.0 };
    let values: Vec<f32> = gaussian(seed, n).iter().map(|v| (v * unit).round() / unit).collect();
    to_f32(dtype, &narrowed(dtype, &values))
}

/// Each group of `size` neighbours along the axis times its signs, times Sylvester's matrix, over 2ᵖ ≥ √size.
fn transformed(
    x: &[f32],
    [rows, cols]: [usize; 2],
    axis: Axis,
    size: usize,
    signs: [u32; 4],
) -> Vec<f32> {
    let power = f64::from(1 << size.ilog2().div_ceil(2));
    let mut out = vec![0.0; x.len()];
    for row in 0..rows {
        for col in 0..cols {
            let (place, pitch) = if axis == Axis::One { (col, 1) } else { (row, cols) };
            let (i, first) = (place % size, row * cols + col - place % size * pitch);
            let mut sum = 0.0;
            for j in 0..size {
                let sign = signs[j / 32] >> (j % 32) & 1;
                let entry =
                    if ((i & j).count_ones() + sign).is_multiple_of(2) { 1.0 } else { -1.0 };
                sum += entry * f64::from(x[first + j * pitch]);
            }
            let value = sum / power;
            out[row * cols + col] = value as f32;
            assert_eq!(f64::from(value as f32), value, "the test's input is too fine");
        }
    }
    out
}

/// An operand as its cast makes it, contracted along `axis` of the dense tensor; `product` and `operand` are its places in
/// the layer's random streams.
fn operand(
    x: &[f32],
    [rows, cols]: [usize; 2],
    from: DType,
    cast: &Cast,
    axis: Axis,
    [product, operand]: [u64; 2],
) -> Lines {
    let spec = match cast.form().unwrap() {
        Format::Dense(to) => {
            let to = if from == BF16 { BF16 } else { to };
            let values = to_f32(to, &narrowed(to, x));
            return Lines::dense(&values, [rows, cols], axis == Axis::Zero);
        }
        Format::Mx(spec) => spec,
    };
    let place = u64::from(LAYER) << 8 | product;
    let seed = match cast.signs {
        None | Some(Signs::None) => None,
        Some(Signs::Fixed) => Some(DRAWS.seed ^ place),
        Some(Signs::Step) => Some(DRAWS.seed ^ place ^ u64::from(DRAWS.step) << 32),
    };
    let signs = seed.map_or([0; 4], |seed| {
        threefry4x32::<ROUNDS>([0, 0, 1, 0], [seed as u32, (seed >> 32) as u32, 0, 0])
    });
    let x = match cast.hadamard {
        Some(size) => transformed(x, [rows, cols], axis, size as usize, signs),
        None => x.to_vec(),
    };
    let desc = QuantizeDesc {
        spec,
        axis,
        scale_rule: cast.scale.map(Into::into),
        rounding: match cast.rounding {
            Round::Nearest => Rounding::NearestEven,
            Round::Stochastic => Rounding::Stochastic {
                seed: DRAWS.seed,
                stream: 1 << 63 | u64::from(DRAWS.step) << 32 | u64::from(LAYER) << 8 | operand,
            },
        },
        tensor_scale: None,
    };
    let factor = if cast.scale == Some(Scale::ThreeQuarters) { 0.75 } else { 1.0 };
    let q = reference::quantize_times(factor, &x, rows, cols, &desc);
    let codes = reference::pack(spec.element.bits(), &q.codes);
    let layout = Layout::new(spec, axis, rows, cols).unwrap();
    Lines::mx(&MxTensor::from_parts(layout, codes, q.scales, q.tensor_scale).unwrap(), false)
}

/// 4ᵖ / size, and 4/3 for each operand of three quarters.
fn gain(a: &Cast, b: &Cast) -> f32 {
    let size = a.hadamard.unwrap_or(1);
    let less = [a, b].iter().filter(|cast| cast.scale == Some(Scale::ThreeQuarters)).count();
    (f64::from(1 << (2 * size.ilog2().div_ceil(2))) / f64::from(size)
        * [1.0, 4.0 / 3.0, 16.0 / 9.0][less]) as f32
}

/// The magnitude at a quantile, of bf16 values.
fn clipped(x: &[f32], dtype: DType, clip: Option<f64>) -> Vec<f32> {
    let Some(quantile) = clip else { return x.to_vec() };
    assert_eq!(dtype, BF16);
    let mut magnitudes: Vec<f32> = x.iter().map(|v| v.abs()).collect();
    magnitudes.sort_by(f32::total_cmp);
    // The smallest one that leaves no more than this many above it.
    let above = ((1.0 - quantile) * x.len() as f64 + 1e-9).floor() as usize;
    let limit = magnitudes[x.len() - 1 - above];
    x.iter().map(|v| v.clamp(-limit, limit)).collect()
}

/// The types of X, W, dY; Y and dX are of X's.
type Types = [DType; 3];

/// All three products of a layer against the oracle.
fn check_linear(
    ctx: &Context,
    what: &str,
    linear: &Linear,
    [x_type, w_type, dy_type]: Types,
) -> Result<(), Failed> {
    let (mut x, w, dy) =
        (grid(x_type, 1, ROWS * K), grid(w_type, 2, N * K), grid(dy_type, 3, ROWS * N));
    // Columns that are apart from the rest, for outliers and clips.
    for row in x.chunks_mut(K) {
        [5, 40, 33, 62].iter().for_each(|c| row[*c] *= 4.0);
    }
    let upload =
        |dtype, rows, cols, values: &[f32]| ctx.upload(dtype, rows, cols, &narrowed(dtype, values));
    let (xt, wt, dyt) =
        (upload(x_type, ROWS, K, &x)?, upload(w_type, N, K, &w)?, upload(dy_type, ROWS, N, &dy)?);
    let desc = LinearDesc {
        rows: ROWS,
        n: N,
        k: K,
        x: x_type,
        w: w_type,
        y: x_type,
        dy: dy_type,
        dx: x_type,
        experts: None,
    };
    let mut layer = MxLinear::new(ctx, &desc, linear, LAYER, false, &mut Scratch::default())?;
    let nan = |dtype, rows, cols| upload(dtype, rows, cols, &vec![f32::NAN; rows * cols]);
    let (mut y, mut dx, mut dw) = (nan(x_type, ROWS, N)?, nan(x_type, ROWS, K)?, nan(F32, N, K)?);
    let mut stream = ctx.stream();
    layer.prepare(&mut stream, &wt, DRAWS, false)?;
    layer.forward(&mut stream, &xt, &wt, &mut y, plain())?;
    let kept = layer.keeps_x().then_some(&xt);
    layer.backward(&mut stream, kept, &wt, &dyt, &mut dx, &mut dw, plain())?;
    ctx.submit(stream)?;

    let Linear { forward, dgrad, wgrad } = linear;
    let (xs, ws, ys) = ([ROWS, K], [N, K], [ROWS, N]);
    let mut main = clipped(&x, x_type, forward.x.clip);
    let mut apart: Vec<usize> = Vec::new();
    if let Some(n) = forward.x.outliers {
        let amax = |c: &usize| x.iter().skip(*c).step_by(K).fold(0f32, |a, v| a.max(v.abs()));
        apart = (0..K).collect();
        apart.sort_by(|a, b| amax(b).total_cmp(&amax(a)));
        apart.truncate(n);
        main.iter_mut().enumerate().for_each(|(i, v)| {
            if apart.contains(&(i % K)) {
                *v = 0.0;
            }
        });
    }
    let [ft, dt, wgt] = layer.tiers();
    let a = operand(&main, xs, x_type, &forward.x, Axis::One, [0, 0]);
    let b = operand(&w, ws, w_type, &forward.w, Axis::One, [0, 9]);
    let mut want = product::product(ft, &a, &b, gain(&forward.x, &forward.w));
    let mut exact = ft == Tier::Exact;
    if !apart.is_empty() {
        let columns = |x: &[f32], rows: usize, dtype: DType| {
            let values: Vec<f32> =
                (0..rows).flat_map(|row| apart.iter().map(move |c| x[row * K + c])).collect();
            let values = to_f32(dtype, &narrowed(dtype, &values));
            Lines::dense(&values, [rows, apart.len()], false)
        };
        let w_type = if w_type == BF16 { BF16 } else { x_type };
        let side =
            product::product(Tier::Alu, &columns(&x, ROWS, x_type), &columns(&w, N, w_type), 1.0);
        // The first product is rounded to Y's type before the second is added to it.
        let unit = if x_type == BF16 { 2f64.powi(-8) } else { 2f64.powi(-23) };
        for (want, side) in want.iter_mut().zip(side) {
            let sum = |a: f32, b: f32, sign: f64| {
                let (a, b) = (f64::from(a), f64::from(b));
                (a + b + sign * unit * (a.abs() + (a + b).abs())) as f32
            };
            *want = [sum(want[0], side[0], -1.0), sum(want[1], side[1], 1.0)];
        }
        exact = false;
    }
    let report = |part: &str, got: Result<(), String>| {
        got.map_err(|error| format!("{what} {part}: {error}"))
    };
    let compare =
        |part, dtype, exact, tensor: &Tensor, want: &[Interval], n| -> Result<(), Failed> {
            Ok(report(part, product::compare(dtype, exact, &ctx.read_blocking(tensor)?, want, n))?)
        };
    compare("forward", x_type, exact, &y, &want, N)?;
    let clip = |cast: &Cast| clipped(&dy, dy_type, cast.clip);
    let a = operand(&clip(&dgrad.dy), ys, dy_type, &dgrad.dy, Axis::One, [1, 2]);
    let b = operand(&w, ws, w_type, &dgrad.w, Axis::Zero, [1, 9]);
    let want = product::product(dt, &a, &b, gain(&dgrad.dy, &dgrad.w));
    compare("dgrad", x_type, dt == Tier::Exact, &dx, &want, K)?;
    let x = clipped(&x, x_type, wgrad.x.clip);
    let a = operand(&clip(&wgrad.dy), ys, dy_type, &wgrad.dy, Axis::Zero, [2, 3]);
    let b = operand(&x, xs, x_type, &wgrad.x, Axis::Zero, [2, 1]);
    let want = product::product(wgt, &a, &b, gain(&wgrad.dy, &wgrad.x));
    compare("wgrad", F32, wgt == Tier::Exact, &dw, &want, K)
}

fn presets(ctx: &Context, step: usize) -> Result<(), Failed> {
    let names =
        ["mxfp4", "naive", "mixed", "nvfp4", "mxfp8", "mxfp4-backward", "bf16", "f32", "mxfp4"];
    for (i, name) in names.into_iter().enumerate().step_by(step) {
        let dy = [BF16, F32][i % 2];
        let (x, w) = if name == "f32" { (F32, F32) } else { (BF16, F32) };
        check_linear(ctx, name, &recipe(name).linear, [x, w, dy])?;
    }
    Ok(())
}

/// Dense and packed in other pairs than the presets', clips, outliers, weights in bf16.
fn combinations(ctx: &Context, step: usize) -> Result<(), Failed> {
    let mxfp4 = alto().linear;
    let dense = |name| Linear::dense(name);
    let outliers = |linear: &Linear| {
        let mut linear = linear.clone();
        linear.forward.x.outliers = Some(4);
        linear
    };
    let clip = |sides: [Option<f64>; 4]| {
        let mut linear = mxfp4.clone();
        let Linear { forward, dgrad, wgrad } = &mut linear;
        let casts = [&mut forward.x, &mut wgrad.x, &mut dgrad.dy, &mut wgrad.dy];
        casts.into_iter().zip(sides).for_each(|(cast, clip)| cast.clip = clip);
        linear
    };
    let transformed = {
        let mut linear = mxfp4.clone();
        let cast = Cast::plain("mxfp8-e4m3").scaled(Scale::Even).hadamard(64, Signs::None);
        linear.forward.x = cast.clone();
        linear.forward.w = Cast { format: "mxfp6-e2m3".into(), ..cast };
        linear
    };
    // As arXiv 2502.20586 has it, but for the weight.
    let three_quarters = {
        let mut linear = recipe("mxfp4-backward").linear;
        let Linear { dgrad, wgrad, .. } = &mut linear;
        for cast in [&mut dgrad.dy, &mut wgrad.dy, &mut wgrad.x] {
            cast.scale = Some(Scale::ThreeQuarters);
        }
        linear
    };
    let three_quarters_of_x = {
        let mut linear = mxfp4.clone();
        linear.forward.x = Cast::plain("mxfp8-e4m3").scaled(Scale::ThreeQuarters);
        linear.wgrad.dy.scale = Some(Scale::ThreeQuarters);
        linear
    };
    let cases: Vec<(&str, Linear, Types)> = vec![
        // The first is for software drivers.
        ("outliers", outliers(&mxfp4), [BF16, F32, BF16]),
        (
            "packed, then dense",
            Linear { wgrad: dense("bf16").wgrad, ..mxfp4.clone() },
            [BF16, F32, BF16],
        ),
        (
            "dense, then packed",
            Linear { forward: dense("bf16").forward, ..mxfp4.clone() },
            [BF16, F32, BF16],
        ),
        (
            "packed from f32, then bf16",
            Linear { wgrad: dense("bf16").wgrad, ..mxfp4.clone() },
            [F32, F32, F32],
        ),
        ("bf16 from f32 for both", dense("bf16"), [F32, F32, F32]),
        ("bf16, then f32", Linear { wgrad: dense("f32").wgrad, ..dense("bf16") }, [F32, F32, F32]),
        (
            "dense dgrad alone",
            Linear { dgrad: dense("bf16").dgrad, ..mxfp4.clone() },
            [BF16, F32, F32],
        ),
        ("outliers of f32", outliers(&mxfp4), [F32, F32, F32]),
        ("outliers, bf16 weights", outliers(&mxfp4), [F32, BF16, F32]),
        ("bf16 weights", mxfp4.clone(), [BF16, BF16, BF16]),
        ("bf16 weights as f32", dense("f32"), [F32, BF16, F32]),
        ("bf16 weights as bf16", dense("bf16"), [BF16, BF16, F32]),
        ("clips", clip([Some(0.9), Some(0.9), Some(0.95), Some(0.95)]), [BF16, F32, BF16]),
        ("clip of forward", clip([Some(0.9), None, None, None]), [BF16, F32, BF16]),
        ("clip of wgrad", clip([None, Some(0.8), None, Some(0.9)]), [BF16, F32, BF16]),
        ("clip of dgrad", clip([None, None, Some(0.9), None]), [BF16, F32, BF16]),
        (
            "outliers and clips",
            outliers(&clip([Some(0.99), Some(0.99), None, None])),
            [BF16, F32, BF16],
        ),
        ("another transform", transformed, [BF16, F32, BF16]),
        ("three quarters", three_quarters, [BF16, F32, BF16]),
        ("three quarters of x", three_quarters_of_x, [BF16, F32, F32]),
    ];
    let few = if step > 1 { 1 } else { cases.len() };
    for (what, linear, types) in &cases[..few] {
        check_linear(ctx, what, linear, *types)?;
    }
    Ok(())
}

/// All three products of experts' layers against the oracle, expert by expert; one has no slots, and some slots nobody.
fn experts_linear(ctx: &Context, step: usize) -> Result<(), Failed> {
    let (count, rows, offsets) = (3, 128, [0, 64, 64, 96]);
    let nearest = |name: &str| {
        let mut linear = recipe(name).linear;
        linear.forward.w.block = Some("1x16".into());
        linear
    };
    let cases = [
        // Vector blocks with a transform, and without; beside squares; squares alone.
        ("mxfp4-backward", recipe("mxfp4-backward").linear),
        ("naive", recipe("naive").linear),
        ("mxfp4, forward in vectors", nearest("mxfp4")),
        ("mxfp8", recipe("mxfp8").linear),
        ("mxfp4", alto().linear),
    ];
    for (what, linear) in cases.into_iter().step_by(step) {
        let (x, w) = (grid(BF16, 1, rows * K), grid(F32, 2, count * N * K));
        let dy = grid(BF16, 3, rows * N);
        let upload = |dtype, rows, cols, values: &[f32]| {
            ctx.upload(dtype, rows, cols, &narrowed(dtype, values))
        };
        let (xt, wt) = (upload(BF16, rows, K, &x)?, upload(F32, count * N, K, &w)?);
        let dyt = upload(BF16, rows, N, &dy)?;
        let desc = LinearDesc {
            rows,
            n: N,
            k: K,
            x: BF16,
            w: F32,
            y: BF16,
            dy: BF16,
            dx: BF16,
            experts: Some(count),
        };
        let mut layer = MxLinear::new(ctx, &desc, &linear, LAYER, false, &mut Scratch::default())?;
        let nan = |dtype, rows, cols| upload(dtype, rows, cols, &vec![f32::NAN; rows * cols]);
        let (mut y, mut dx) = (nan(BF16, rows, N)?, nan(BF16, rows, K)?);
        let mut dw = nan(F32, count * N, K)?;
        let experts: Vec<u32> = (0..count as u32).collect();
        let groups = Groups::new(ctx, &offsets, &experts, count)?;
        let of = || Step { groups: Some(&groups), ..plain() };
        let mut stream = ctx.stream();
        layer.prepare(&mut stream, &wt, DRAWS, false)?;
        layer.forward(&mut stream, &xt, &wt, &mut y, of())?;
        let kept = layer.keeps_x().then_some(&xt);
        layer.backward(&mut stream, kept, &wt, &dyt, &mut dx, &mut dw, of())?;
        ctx.submit(stream)?;
        let [y, dx, dw] =
            [ctx.read_blocking(&y)?, ctx.read_blocking(&dx)?, ctx.read_blocking(&dw)?];

        let Linear { forward, dgrad, wgrad } = &linear;
        let [ft, dt, wgt] = layer.tiers();
        let (xs, ys) = ([rows, K], [rows, N]);
        let x_rows = operand(&x, xs, BF16, &forward.x, Axis::One, [0, 0]);
        let dy_rows = operand(&dy, ys, BF16, &dgrad.dy, Axis::One, [1, 2]);
        let dy_columns = operand(&dy, ys, BF16, &wgrad.dy, Axis::Zero, [2, 3]);
        let x_columns = operand(&x, xs, BF16, &wgrad.x, Axis::Zero, [2, 1]);
        for expert in 0..count {
            let [first, end] = [offsets[expert], offsets[expert + 1]].map(|at| at as usize);
            let n = end - first;
            let w = &w[expert * N * K..][..N * K];
            let check = |part, tier, dtype: DType, bytes: &[u8], want: &[Interval], cols| {
                let got = &bytes[..want.len() * dtype.size()];
                product::compare(dtype, tier == Tier::Exact, got, want, cols)
                    .map_err(|error| format!("{what}, {part} of expert {expert}: {error}"))
            };
            let b = operand(w, [N, K], F32, &forward.w, Axis::One, [0, 9]);
            let want = product::product(
                ft,
                &x_rows.part(first, n, 0, K),
                &b,
                gain(&forward.x, &forward.w),
            );
            check("forward", ft, BF16, &y[first * N * 2..], &want, N)?;
            let b = operand(w, [N, K], F32, &dgrad.w, Axis::Zero, [1, 9]);
            let want =
                product::product(dt, &dy_rows.part(first, n, 0, N), &b, gain(&dgrad.dy, &dgrad.w));
            check("dgrad", dt, BF16, &dx[first * K * 2..], &want, K)?;
            let a = dy_columns.part(0, N, first, n);
            let b = x_columns.part(0, K, first, n);
            let want = product::product(wgt, &a, &b, gain(&wgrad.dy, &wgrad.x));
            check("wgrad", wgt, F32, &dw[expert * N * K * 4..], &want, K)?;
        }
    }
    Ok(())
}

// ---- Runs ----------------------------------------------------------------------------------------------------------

/// Everything that a step leaves, as bits.
fn state(trainer: &Trainer) -> Result<Checkpoint, Error> {
    block_on(trainer.checkpoint())
}

fn grads(ctx: &Context, trainer: &Trainer) -> Result<Vec<Vec<f32>>, Error> {
    trainer.model.params.iter().map(|p| floats(ctx, &p.grad)).collect()
}

/// Block scales and bf16 follow a power of two exactly, so that the same codes come out: gradients are multiplied by it, and
/// everything else keeps its bits.
fn loss_scale(ctx: &Context, _: usize) -> Result<(), Failed> {
    let desc = small(1, 0);
    let run = |exponent: i32| -> Result<(Vec<Vec<f32>>, Checkpoint), Failed> {
        let mut recipe = alto();
        recipe.loss_scale.initial = exponent;
        let mut trainer = Trainer::new(ctx, &run_desc(recipe, desc.clone(), 10))?;
        for step in 0..2 {
            trainer.train(&repetitive_batch(&desc, step), false)?;
        }
        Ok((grads(ctx, &trainer)?, state(&trainer)?))
    };
    let (plain, weights) = run(0)?;
    assert!(plain.iter().all(|grad| grad.iter().any(|g| *g != 0.0)));
    for exponent in [13, -9] {
        let (scaled, other) = run(exponent)?;
        for (a, b) in plain.iter().flatten().zip(scaled.iter().flatten()) {
            assert_eq!((a * 2f32.powi(exponent)).to_bits(), b.to_bits(), "2^{exponent}: {a} {b}");
        }
        assert!(weights.tensors == other.tensors, "2^{exponent}: weights or moments differ");
    }
    Ok(())
}

/// A trainer's steps with an optimizer that packs, against the same one after the other: bit for bit. Columns are such that it
/// is one dispatch; weights are experts', too, and of two heads.
fn packed_behind(ctx: &Context, step: usize) -> Result<(), Failed> {
    let experts = Some(Experts { count: 4, top_k: 2 });
    let dense = ModelDesc { dim: 128, ffn: 128, ..small(1, 1) };
    let routed = ModelDesc { mtp: 0, batch: 1, experts, ..dense.clone() };
    let plain = Recipe { oscillation: None, late_forward: 0.0, ..alto() };
    let mut head = plain.clone();
    head.layers.retain(|layer| layer.name != "head");
    head.optimizer.master = Dense::Bf16;
    let cases = [(dense, head), (routed, plain)];
    for (desc, recipe) in &cases[..if step > 1 { 1 } else { 2 }] {
        let run = run_desc(recipe.clone(), desc.clone(), 10);
        let mut trainer = Trainer::new(ctx, &run)?;
        let mut model = Model::new(ctx, desc, recipe, run.seed)?;
        let sizes: Vec<usize> =
            model.params.iter().map(|p| p.grad.shape().iter().product()).collect();
        let mut norm = GradientNorm::new(ctx, &sizes)?;
        let mut status = ctx.zeros(F32, 1, 4)?;
        let mut stream = ctx.stream();
        let draws = |step| Draws { seed: run.seed, step };
        model.prepare(&mut stream, draws(1), false)?;
        for number in 1..=3 {
            let batch = repetitive_batch(desc, number.into());
            let lr = trainer.learning_rate(trainer.step());
            trainer.train(&batch, false)?;
            model.set_batch(&batch)?;
            let scale = 2f32.powi(recipe.loss_scale.initial);
            let pass = Pass { draws: draws(number), count: false };
            model.record(&mut stream, pass, Some(scale))?;
            let grads: Vec<&Tensor> = model.params.iter().map(|p| &p.grad).collect();
            let clip = recipe.optimizer.clip_norm;
            norm.record(&mut stream, &grads, 1.0 / scale, clip, &mut status)?;
            for p in &mut model.params {
                let weight_decay = if p.decay { recipe.optimizer.weight_decay } else { 0.0 };
                let scalars = StepScalars { step: number, lr, weight_decay, seed: run.seed };
                p.adam.record(
                    &mut stream,
                    &scalars,
                    &p.grad,
                    &status,
                    &mut p.value,
                    &mut p.state,
                )?;
            }
            model.prepare(&mut stream, draws(number + 1), false)?;
            ctx.submit(std::mem::replace(&mut stream, ctx.stream()))?;
        }
        for (got, want) in trainer.model.params.iter().zip(&model.params) {
            let name = &want.name;
            let bytes = |x: &Tensor| ctx.read_blocking(x);
            assert!(bytes(&got.value)? == bytes(&want.value)?, "{name} differs");
            for tensor in want.state.tensors() {
                let bytes = |of: &Param| of.state.read_blocking(ctx, tensor.name);
                assert!(bytes(got)? == bytes(want)?, "{}: {name} differs", tensor.name);
            }
        }
        let mut packed = 0;
        for ((id, got), (_, want)) in trainer.model.linears().zip(model.linears()) {
            let name = &model.params[id].name;
            let both = got.packed_weight().zip(want.packed_weight());
            let Some((got, want)) = both else { continue };
            assert_eq!(ctx.read_mx_blocking(got)?, ctx.read_mx_blocking(want)?, "{name}");
            packed += 1;
        }
        assert!(packed >= 4, "{packed}");
    }
    Ok(())
}

fn learner() -> ModelDesc {
    ModelDesc { vocabulary: 32, batch: 4, ..small(1, 0) }
}

/// A rate at which thirty steps do much.
fn quick(mut recipe: Recipe) -> Recipe {
    recipe.optimizer.lr = 2e-2;
    recipe
}

fn learns(ctx: &Context, step: usize) -> Result<(), Failed> {
    let desc = learner();
    // Of sixteen letters that are equally frequent.
    let unigram = 16f64.ln();
    let mut names: Vec<&str> = PRESETS.to_vec();
    names.sort_by_key(|name| *name != "mxfp4");
    let mut cases: Vec<_> = names.into_iter().map(|name| (recipe(name), desc.clone())).collect();
    // Three quarters, and experts' weights in vectors, transformed too.
    let mut vectors = recipe("mxfp4-backward");
    vectors.name = "vectors".into();
    vectors.layers.retain(|layer| layer.name != "*.experts.*");
    let Linear { dgrad, wgrad, .. } = &mut vectors.linear;
    for cast in [&mut dgrad.dy, &mut wgrad.dy, &mut wgrad.x] {
        cast.scale = Some(Scale::ThreeQuarters);
    }
    let experts = Some(Experts { count: 4, top_k: 2 });
    cases.push((vectors, ModelDesc { ffn: 32, experts, ..desc.clone() }));
    let few = if step > 1 { 1 } else { cases.len() };
    for (recipe, desc) in cases.into_iter().take(few) {
        let name = &recipe.name.clone();
        let mut trainer = Trainer::new(ctx, &run_desc(quick(recipe), desc.clone(), 30))?;
        let mut lossy = [false; 2];
        for step in 0..30 {
            trainer.train(&repetitive_batch(&desc, step), step >= 20)?;
            if step < 20 {
                continue;
            }
            let shares = block_on(trainer.shares())?;
            for shares in shares {
                assert!(shares.nonfinite == 0.0 && shares.clipped < 0.1, "{name}: {shares:?}");
            }
            // What is cast to fewer bits loses something, and is counted; MXFP8 not in every step.
            lossy = [0, 1].map(|i| lossy[i] || shares[i].underflowed > 0.0);
        }
        let status = block_on(trainer.status())?;
        assert!(
            status.taken && status.norm > 0.0 && status.loss < 0.5 * unigram,
            "{name}: {status:?}"
        );
        let packs = [!["f32", "bf16"].contains(&name.as_str()); 2];
        assert_eq!(lossy, packs, "{name}");
    }
    Ok(())
}

/// Ten steps are five, a file, and five more; nothing else happens in between, and reading changes nothing.
fn resumes(ctx: &Context, step: usize) -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("state.safetensors");
    let desc = small(1, 1);
    let mut eight = recipe("nvfp4");
    eight.optimizer.moments = MomentType::Fp8;
    eight.optimizer.master = Dense::Bf16;
    let mut half = recipe("f32");
    half.optimizer.moments = MomentType::Bf16;
    half.optimizer.master = Dense::Bf16;
    // Resets before the checkpoint, at it, and after; forward is dense from the sixth step on, and from the third, gradients are
    // from the fourth on, the ninth, and with the checkpoint.
    let resets = |every| Some(Reset { every, threshold: 1.0 });
    let late = |every, late_forward, late_backward, recipe| Recipe {
        oscillation: resets(every),
        late_forward,
        late_backward,
        ..recipe
    };
    let [changing, other, at] = [
        late(3, 0.4, 0.7, alto()),
        late(5, 0.7, 0.2, recipe("mixed")),
        Recipe { oscillation: None, ..late(2, 0.0, 0.5, recipe("nvfp4")) },
    ];
    let recipes = [changing, alto(), eight, half, recipe("bf16"), other, at];
    for recipe in &recipes[..if step > 1 { 1 } else { recipes.len() }] {
        let run = run_desc(recipe.clone(), desc.clone(), 10);
        let batch = |step| repetitive_batch(&desc, step);
        let mut whole = Trainer::new(ctx, &run)?;
        for step in 0..10 {
            whole.train(&batch(step), step % 3 == 0)?;
        }
        let mut first = Trainer::new(ctx, &run)?;
        for step in 0..5 {
            first.train(&batch(step), false)?;
            block_on(first.status())?;
        }
        block_on(first.evaluate([batch(50), batch(51)].into_iter()))?;
        state(&first)?.save(&path)?;
        drop(first);
        let mut second = Trainer::new(ctx, &run)?;
        second.restore(Checkpoint::load(&path)?)?;
        assert_eq!(second.step(), 5);
        // What was saved is what was restored.
        assert!(state(&second)? == Checkpoint::load(&path)?, "{}", recipe.name);
        for step in 5..10 {
            second.train(&batch(step), step == 9)?;
        }
        let [a, b] = [block_on(whole.status())?, block_on(second.status())?];
        assert_eq!(a, b, "{}", recipe.name);
        assert!(block_on(whole.shares())? == block_on(second.shares())?);
        let (a, b) = (state(&whole)?, state(&second)?);
        for (name, tensor) in &a.tensors {
            assert!(b.tensors.get(name) == Some(tensor), "{}: {name} differs", recipe.name);
        }
        assert_eq!(a.meta, b.meta);
        // Back from where other products are dense: the same again.
        second.restore(Checkpoint::load(&path)?)?;
        for step in 5..10 {
            second.train(&batch(step), false)?;
        }
        assert!(state(&second)?.tensors == a.tensors, "{}", recipe.name);
        if step == 1 {
            let other = RunDesc { seed: 6, ..run };
            let mut other = Trainer::new(ctx, &other)?;
            other.train(&batch(0), false)?;
            assert!(state(&other)?.tensors != a.tensors);
        }
    }
    Ok(())
}

/// Recipes with everything that a layer does besides packing, in models with experts and extra heads; the activations are f32
/// in the last one.
fn elaborate() -> Vec<(Recipe, ModelDesc)> {
    let mut outliers = alto();
    let Linear { forward, dgrad, wgrad } = &mut outliers.linear;
    forward.x.outliers = Some(4);
    for cast in [&mut forward.x, &mut wgrad.x, &mut dgrad.dy, &mut wgrad.dy] {
        cast.clip = Some(0.99);
    }
    let mut vectors = recipe("mxfp4-backward");
    vectors.oscillation = Some(Reset { every: 2, threshold: 1.0 });
    vectors.linear.forward = recipe("naive").linear.forward;
    for Linear { dgrad, wgrad, .. } in
        vectors.layers.iter_mut().map(|layer| &mut layer.linear).chain([&mut vectors.linear])
    {
        for cast in [&mut dgrad.dy, &mut wgrad.dy, &mut wgrad.x] {
            if cast.format == "mxfp4" {
                cast.scale = Some(Scale::ThreeQuarters);
            }
        }
    }
    vectors.optimizer.master = Dense::Bf16;
    let mut requantized = recipe("mixed");
    requantized.linear.wgrad.x.requantized = true;
    requantized.activations = Dense::F32;
    let experts = Some(Experts { count: 4, top_k: 2 });
    vec![
        (outliers, small(1, 1)),
        (vectors, ModelDesc { experts, ffn: 32, ..small(1, 1) }),
        (requantized, small(1, 0)),
    ]
}

/// A recipe that is dense throughout, and else the same.
fn dense_throughout(of: &Recipe) -> Recipe {
    let dense = if of.activations == Dense::F32 { "f32" } else { "bf16" };
    let Recipe { optimizer, loss_scale, .. } = of.clone();
    Recipe { optimizer, loss_scale, ..recipe(dense) }
}

/// Dense from the first step on is the recipe without the packed products, and bf16's if they all are; the quantizers then
/// have nothing to count.
fn late_products(ctx: &Context, step: usize) -> Result<(), Failed> {
    let cases = [vec![(alto(), small(1, 1))], elaborate()].concat();
    for (base, desc) in cases.into_iter().take(if step > 1 { 2 } else { 4 }) {
        let name = &base.name;
        let plain = Recipe { oscillation: None, late_forward: 0.0, ..base.clone() };
        let late = |forward: f32, backward: f32| Recipe {
            late_forward: forward,
            late_backward: backward,
            ..base.clone()
        };
        let with_products = |forward: bool, backward: bool| {
            let mut recipe = plain.clone();
            let dense = dense_throughout(&plain).linear;
            for linear in
                recipe.layers.iter_mut().map(|layer| &mut layer.linear).chain([&mut recipe.linear])
            {
                if forward {
                    linear.forward = dense.forward.clone();
                    linear.wgrad.x.requantized = false;
                }
                if backward {
                    linear.dgrad = dense.dgrad.clone();
                    linear.wgrad = dense.wgrad.clone();
                }
            }
            recipe
        };
        let mut backward = with_products(false, true);
        backward.oscillation = base.oscillation;
        let pairs = [
            (dense_throughout(&base), late(1.0, 1.0), [false; 2]),
            (backward, late(0.0, 1.0), [true, false]),
            (with_products(true, false), late(1.0, 0.0), [true; 2]),
        ];
        let mut ends = Vec::new();
        for (want, late, packs) in pairs.into_iter().take(if step > 1 { 1 } else { 3 }) {
            let run = |recipe| -> Result<_, Failed> {
                let mut trainer = Trainer::new(ctx, &run_desc(recipe, desc.clone(), 4))?;
                let mut losses = Vec::new();
                for step in 0..4 {
                    trainer.train(&repetitive_batch(&desc, step), step == 3)?;
                    losses.push(block_on(trainer.status())?);
                }
                let counters = [&trainer.model.counters.x, &trainer.model.counters.dy];
                let counted = counters.map(|ids| ctx.read_ids_blocking(ids));
                let [x, dy] = counted.map(|words| words.map(|w| w.iter().any(|n| *n > 0)));
                let counted = [x?, dy?];
                let held_out = std::iter::once(repetitive_batch(&desc, 9));
                let held_out = block_on(trainer.evaluate(held_out))?.to_bits();
                Ok((state(&trainer)?.tensors, losses, held_out, counted))
            };
            let (want, got) = (run(want)?, run(late.clone())?);
            let shares = [late.late_forward, late.late_backward];
            for (of, tensor) in &want.0 {
                assert!(got.0.get(of) == Some(tensor), "{name} {shares:?}: {of} differs");
            }
            assert_eq!((&want.1, want.2), (&got.1, got.2), "{name} {shares:?}");
            assert_eq!((want.3, got.3), (packs, packs), "{name} {shares:?}");
            assert!(!ends.contains(&got.1), "{name} {shares:?}");
            ends.push(got.1);
        }
    }
    Ok(())
}

/// From the step on from which everything is dense, a run is one in the dense recipe, whose state is the same.
fn dense_end(ctx: &Context, step: usize) -> Result<(), Failed> {
    let cases = [elaborate(), vec![(alto(), small(1, 1))]].concat();
    for (base, desc) in cases.into_iter().take(if step > 1 { 1 } else { 4 }) {
        let recipe = Recipe { late_forward: 0.7, late_backward: 0.5, ..base };
        let run = run_desc(recipe.clone(), desc.clone(), 6);
        let mut late = Trainer::new(ctx, &run)?;
        for step in 0..3 {
            late.train(&repetitive_batch(&desc, step), false)?;
        }
        let mut dense = Trainer::new(ctx, &RunDesc { recipe: dense_throughout(&recipe), ..run })?;
        let mut checkpoint = state(&late)?;
        let other = state(&dense)?;
        checkpoint.meta.insert("recipe".into(), other.meta["recipe"].clone());
        dense.restore(checkpoint)?;
        for step in 3..6 {
            for trainer in [&mut late, &mut dense] {
                trainer.train(&repetitive_batch(&desc, step), true)?;
            }
            let [a, b] = [block_on(late.status())?, block_on(dense.status())?];
            assert_eq!(a, b, "{}", recipe.name);
            for shares in block_on(late.shares())? {
                assert_eq!(shares, Default::default(), "{}", recipe.name);
            }
        }
        let (a, b) = (state(&late)?, state(&dense)?);
        for (name, tensor) in &b.tensors {
            assert!(a.tensors.get(name) == Some(tensor), "{}: {name} differs", recipe.name);
        }
        assert_eq!(late.model.tiers(), dense.model.tiers());
        // And so is what it writes.
        let text = |trainer: &Trainer| block_on(trainer.generate(&[3, 14, 9], 2, 0.0));
        assert_eq!(text(&late)?, text(&dense)?);
    }
    Ok(())
}

/// Where everything is dense, nothing but what the dense recipe records is recorded.
fn dense_kernels(ctx: &Context, step: usize) -> Result<(), Failed> {
    let experts = Some(Experts { count: 4, top_k: 2 });
    let routed = ModelDesc { experts, ffn: 32, ..small(1, 0) };
    for desc in [small(1, 1), routed].into_iter().take(if step > 1 { 1 } else { 2 }) {
        let base = alto();
        let dense = dense_throughout(&base);
        let mut all = Vec::new();
        for recipe in [Recipe { late_forward: 0.4, late_backward: 0.4, ..base }, dense] {
            let mut trainer = Trainer::new(ctx, &run_desc(recipe, desc.clone(), 3))?;
            let mut kernels = Vec::new();
            for step in 0..3 {
                let batch = repetitive_batch(&desc, step);
                let profile = microscaling::report::profile(ctx, |stream| {
                    trainer.record(stream, &batch, true)
                });
                let names = match block_on(profile) {
                    // The CPU engine has no clock of kernels, nor have some adapters.
                    Err(Error::Unsupported { .. }) => return Ok(()),
                    profile => profile?.into_iter().map(|(name, times, _)| (name, times)),
                };
                kernels.push(names.collect::<BTreeMap<String, u64>>());
            }
            all.push(kernels);
        }
        let [late, dense] = &all[..] else { unreachable!() };
        assert!(late[0] != dense[0], "{:?}", late[0]);
        // The optimizer of the last packed step packs no more.
        let quantizers = |of: &BTreeMap<String, u64>| -> u64 {
            of.iter().filter(|(name, _)| name.contains("quantize")).map(|(_, times)| times).sum()
        };
        assert!(quantizers(&late[1]) < quantizers(&late[0]), "{:?}", late[1]);
        assert_eq!(late[2..], dense[2..]);
        assert_eq!(quantizers(&dense[2]), 0);
    }
    Ok(())
}

/// Columns are such that the update packs on GPUs, which it does not where it is skipped. What stays packed is what it was.
fn skipped_change(ctx: &Context, _: usize) -> Result<(), Failed> {
    let desc = ModelDesc { dim: 128, ffn: 128, batch: 1, ..small(1, 0) };
    let recipe = Recipe { late_forward: 0.0, late_backward: 0.5, ..alto() };
    let mut trainer = Trainer::new(ctx, &run_desc(recipe, desc.clone(), 2))?;
    let packed = |trainer: &Trainer| -> Result<Vec<MxTensor>, Error> {
        let weights = trainer.model.linears().filter_map(|(_, linear)| linear.packed_weight());
        weights.map(|w| ctx.read_mx_blocking(w)).collect()
    };
    let before = (packed(&trainer)?, trainer.model.tiers());
    assert!(before.0.len() == 4);
    let embedding = &mut trainer.model.params[0];
    assert_eq!(embedding.name, "embedding");
    let [rows, cols] = embedding.value.shape();
    let nan = vec![f32::NAN; rows * cols];
    embedding.value = ctx.upload(F32, rows, cols, &narrowed(F32, &nan))?;
    trainer.train(&repetitive_batch(&desc, 0), false)?;
    assert!(block_on(trainer.status()).is_err());
    let after = (packed(&trainer)?, trainer.model.tiers());
    assert!(before.0 == after.0 && before.1 != after.1, "{:?}", after.1);
    Ok(())
}

/// After a reset at this threshold weights that moved between two codes are what they are quantized to.
fn oscillates(ctx: &Context, _: usize) -> Result<(), Failed> {
    let desc = small(1, 0);
    let mut recipe = Recipe { late_forward: 0.0, ..alto() };
    recipe.optimizer.lr = 3e-3;
    let mut ends = Vec::new();
    for oscillation in [None, Some(Reset { every: 4, threshold: 1.0 })] {
        let recipe = Recipe { oscillation, ..recipe.clone() };
        let mut trainer = Trainer::new(ctx, &run_desc(recipe, desc.clone(), 8))?;
        for step in 0..4 {
            trainer.train(&repetitive_batch(&desc, step), false)?;
        }
        let (id, linear) = trainer.model.linears().next().ok_or("no linear layer")?;
        let packed = linear.packed_weight().ok_or("not packed")?;
        let near = block_on(ctx.read_mx(packed))?.dequantize();
        let w = floats(ctx, &trainer.model.params[id].value)?;
        ends.push(w.iter().zip(&near).filter(|(w, q)| w == q).count());
    }
    assert!(ends[0] == 0 && ends[1] > 20, "{ends:?}");
    Ok(())
}

/// Weights of 10¹⁵ make scores that overflow, and the loss NaN. Those of 10³⁰ overflow in the norms, whose outputs are then
/// zero: the loss is that of equal logits, but its gradient is not finite whatever the scale.
fn diverges(ctx: &Context, step: usize) -> Result<(), Failed> {
    let desc = learner();
    let cases =
        [("f32", 1e15, "the loss is "), ("mxfp4", 1e15, "the loss is "), ("f32", 1e30, "20")];
    for (name, lr, says) in cases.into_iter().take(if step > 1 { 1 } else { 3 }) {
        let mut recipe = recipe(name);
        recipe.optimizer.lr = lr;
        let mut trainer = Trainer::new(ctx, &run_desc(recipe, desc.clone(), 40))?;
        let error = (0..40).find_map(|step| {
            trainer.train(&repetitive_batch(&desc, step), false).unwrap();
            block_on(trainer.status()).err()
        });
        let Some(Error::Diverged { step, what }) = &error else {
            return Err(format!("{name}: {error:?}").into());
        };
        assert!((2..30).contains(step) && what.contains(says), "{name} {step} {what}");
        let error = error.unwrap().to_string();
        assert!(error.contains(&format!("step {}: ", trainer.step())), "{error}");
    }
    Ok(())
}

// ---- On the CPU engine alone ---------------------------------------------------------------------------------------

fn other_checkpoints() -> Result<(), Failed> {
    let ctx = Context::cpu();
    let run = run_desc(alto(), small(1, 0), 10);
    let trainer = Trainer::new(&ctx, &run)?;
    let checkpoint = state(&trainer)?;
    let with = |change: fn(&mut RunDesc)| {
        let mut other = run.clone();
        change(&mut other);
        other
    };
    let cases: [(&str, &[&str], RunDesc); 6] = [
        ("model", &["layers: 1", "layers: 2"], with(|run| run.model.layers = 2)),
        ("recipe", &["naive"], with(|run| run.recipe = recipe("naive"))),
        ("recipe", &["lr = 0.5"], with(|run| run.recipe.optimizer.lr = 0.5)),
        ("seed", &["1099511627781", "8"], with(|run| run.seed = 8)),
        ("steps", &["10", "11"], with(|run| run.steps = 11)),
        ("data", &["letters", "digits"], with(|run| run.data = "digits".into())),
    ];
    for (key, says, other) in cases {
        let mut other = Trainer::new(&ctx, &other)?;
        let before = state(&other)?;
        let error = other.restore(checkpoint.clone()).unwrap_err().to_string();
        assert!(error.contains(&format!("its {key} is")), "{key}: {error}");
        assert!(says.iter().all(|text| error.contains(text)), "{key}: {error}");
        assert!(state(&other)? == before, "{key}: it was changed");
    }
    let mut trainer = trainer;
    let mut fails = |checkpoint: Checkpoint, says: &[&str]| {
        let error = trainer.restore(checkpoint).unwrap_err().to_string();
        assert!(says.iter().all(|text| error.contains(text)), "{error}");
    };
    let mut lacking = checkpoint.clone();
    lacking.tensors.remove("blocks.0.qkv");
    fails(lacking, &["no tensor", "blocks.0.qkv"]);
    let mut lacking = checkpoint.clone();
    lacking.meta.remove("step");
    fails(lacking, &["no metadata \"step\""]);
    let mut wrong = checkpoint.clone();
    let bytes = wrong.tensors.remove("head").unwrap().data.into_owned();
    wrong.insert("head", microscaling::train::checkpoint::Dtype::F32, &[32, 64], bytes)?;
    fails(wrong, &["head", "[32, 64]", "[64, 32]"]);
    fails(Checkpoint::default(), &["no metadata"]);

    let dir = tempfile::tempdir()?;
    let path = dir.path().join("cut.safetensors");
    checkpoint.save(&path)?;
    let bytes = std::fs::read(&path)?;
    std::fs::write(&path, &bytes[..bytes.len() / 2])?;
    let error = Checkpoint::load(&path).unwrap_err().to_string();
    assert!(error.contains("cut short") && error.contains("cut.safetensors"), "{error}");
    Ok(())
}

/// A model that has learnt the letters goes on with them.
fn generates() -> Result<(), Failed> {
    let ctx = Context::cpu();
    let desc = learner();
    let mut trainer = Trainer::new(&ctx, &run_desc(quick(recipe("f32")), desc.clone(), 40))?;
    for step in 0..40 {
        trainer.train(&repetitive_batch(&desc, step), false)?;
    }
    let before = state(&trainer)?;
    let text =
        |from: usize, n: usize| -> Vec<u8> { (from..from + n).map(|i| letter(i) as u8).collect() };
    // Longer than a sequence, in the end.
    for temperature in [0.0, 0.1] {
        assert_eq!(block_on(trainer.generate(&text(3, 7), 40, temperature))?, text(10, 40));
    }
    let hot = block_on(trainer.generate(&text(3, 7), 40, 50.0))?;
    assert!(hot != text(10, 40) && hot.iter().all(|byte| *byte < 32));
    assert_eq!(block_on(trainer.generate(&text(3, 7), 40, 50.0))?, hot);
    assert_eq!(block_on(trainer.generate(b"", 2, 1.0))?.len(), 2);
    // A transform along more tokens than a sequence has.
    let mut long = alto();
    for cast in [&mut long.linear.wgrad.dy, &mut long.linear.wgrad.x] {
        cast.hadamard = Some(128);
    }
    let other = Trainer::new(&ctx, &run_desc(long, desc.clone(), 40))?;
    assert_eq!(block_on(other.generate(b"a", 1, 1.0))?.len(), 1);

    let batches = [repetitive_batch(&desc, 90), random_batch(&desc, 91)];
    let mut each = Vec::new();
    for batch in &batches {
        each.push(block_on(trainer.evaluate([batch.clone()].into_iter()))?);
        let values = trainer
            .model
            .params
            .iter()
            .map(|p| Ok((p.name.clone(), widened(&floats(&ctx, &p.value)?))));
        let values: Values = values.collect::<Result<_, Error>>()?;
        let want = Reference::new(&desc, batch).forward(&values).0[0];
        let loss = each[each.len() - 1];
        assert!((loss - want).abs() < 1e-4 * want.max(1.0), "{loss} {want}");
    }
    assert!(each[0] < 0.5 && each[1] > 2.0, "{each:?}");
    let both = block_on(trainer.evaluate(batches.into_iter()))?;
    assert!((both - (each[0] + each[1]) / 2.0).abs() < 1e-12, "{both} {each:?}");
    assert!(state(&trainer)? == before, "reading changed the state");
    Ok(())
}

/// A step whose gradient overflows is not taken, and the exponent falls; later it grows again, whenever it is looked at.
fn loss_scale_adapts() -> Result<(), Failed> {
    let ctx = Context::cpu();
    let desc = learner();
    let mut recipe = recipe("f32");
    recipe.loss_scale = LossScale { initial: 0, grow_every: 3, max: 2 };
    let mut run = run_desc(recipe, desc.clone(), 100);
    let mut trainer = Trainer::new(&ctx, &run)?;
    let mut exponents = Vec::new();
    for step in 0..9 {
        trainer.train(&repetitive_batch(&desc, step), false)?;
        exponents.push(block_on(trainer.status())?.exponent);
    }
    assert_eq!(exponents, [0, 0, 1, 1, 1, 2, 2, 2, 2]);

    // A head so large that gradients overflow under the scale, while the loss, ln 32 of equal logits, does not.
    run.recipe.loss_scale = LossScale { initial: 24, grow_every: 1000, max: 24 };
    let mut trainer = Trainer::new(&ctx, &run)?;
    set(&ctx, &mut trainer, "final.norm", |_| 0.0)?;
    set(&ctx, &mut trainer, "head", |v| v.signum() * 1e36)?;
    let values = |trainer: &Trainer| -> Result<Vec<Vec<f32>>, Error> {
        trainer.model.params.iter().map(|p| floats(&ctx, &p.value)).collect()
    };
    let before = values(&trainer)?;
    for step in 0.. {
        trainer.train(&repetitive_batch(&desc, step), false)?;
        let status = block_on(trainer.status())?;
        assert!((status.loss - 32f64.ln()).abs() < 1e-5, "{status:?}");
        if status.taken {
            assert!(step > 5 && status.norm.is_finite() && values(&trainer)? != before);
            assert_eq!(status.exponent, 24 - step as i32);
            break;
        }
        assert!(status.norm.is_nan() && status.exponent == 23 - step as i32, "{status:?}");
        assert!(values(&trainer)? == before, "a step was taken");
    }

    // An extra head that is NaN, under every scale; the main one is not, and no step is taken.
    run.model.mtp = 1;
    let mut trainer = Trainer::new(&ctx, &run)?;
    set(&ctx, &mut trainer, "mtp.0.final.norm", |_| f32::NAN)?;
    for step in 1.. {
        trainer.train(&repetitive_batch(&run.model, step), false)?;
        match block_on(trainer.status()) {
            Ok(status) => assert!(!status.taken && status.exponent == 24 - step as i32),
            Err(error) => {
                let error = error.to_string();
                assert!(
                    step == 21 && error.contains("the gradient of embedding"),
                    "{step} {error}"
                );
                break;
            }
        }
    }
    Ok(())
}

/// Changes a parameter.
fn set(
    ctx: &Context,
    trainer: &mut Trainer,
    name: &str,
    change: fn(f32) -> f32,
) -> Result<(), Failed> {
    let p = trainer.model.params.iter_mut().find(|p| p.name == name).ok_or("no such parameter")?;
    let [rows, cols] = p.value.shape();
    let values: Vec<f32> = floats(ctx, &p.value)?.into_iter().map(change).collect();
    p.value = ctx.upload(F32, rows, cols, bytemuck::cast_slice(&values))?;
    Ok(())
}

fn mismatches() -> Result<(), Failed> {
    let ctx = Context::cpu();
    let new = |desc: &ModelDesc, recipe: &Recipe| {
        Model::new(&ctx, desc, recipe, 1).map(|_| ()).unwrap_err().to_string()
    };
    let good = small(1, 0);
    for (says, desc) in [
        ("at least one", ModelDesc { layers: 0, ..good.clone() }),
        ("3 heads", ModelDesc { heads: 3, ..good.clone() }),
        ("4 heads", ModelDesc { heads: 4, ..good.clone() }),
        ("dim is 48", ModelDesc { dim: 48, ..good.clone() }),
        ("ffn is 40", ModelDesc { ffn: 40, ..good.clone() }),
        ("batch · seq is 62", ModelDesc { seq: 31, ..good.clone() }),
        ("vocabulary is 63", ModelDesc { vocabulary: 63, ..good.clone() }),
        ("head_dim is 160", ModelDesc { dim: 160, heads: 1, ..good.clone() }),
    ] {
        let error = new(&desc, &recipe("f32"));
        assert!(error.contains(says), "{says}: {error}");
    }
    // It is said before anything is trained, and where.
    let mut long = alto();
    for cast in [&mut long.linear.wgrad.dy, &mut long.linear.wgrad.x] {
        cast.hadamard = Some(128);
    }
    let error = new(&good, &long);
    assert!(
        error.contains("blocks.0.qkv: ") && error.contains("wgrad") && error.contains("128"),
        "{error}"
    );
    let mut many = alto();
    many.linear.forward.x.outliers = Some(48);
    let error = new(&good, &many);
    assert!(error.contains("48 of 32"), "{error}");

    let mut model = Model::new(&ctx, &small(1, 2), &recipe("f32"), 1)?;
    let error = model.set_batch(&[0; 66]).unwrap_err().to_string();
    assert!(error.contains("66 tokens") && error.contains("[2, 35]"), "{error}");
    assert!(model.set_inputs(&[0; 65]).is_err());
    // A token that is none is seen.
    let mut trainer = Trainer::new(&ctx, &run_desc(recipe("f32"), good.clone(), 5))?;
    let mut batch = random_batch(&good, 1);
    batch[3] = 64;
    trainer.train(&batch, false)?;
    assert!(matches!(block_on(trainer.status()), Err(Error::Diverged { step: 1, .. })));
    // Backward without what it reads.
    let desc = LinearDesc {
        rows: 32,
        n: 32,
        k: 32,
        x: F32,
        w: F32,
        y: F32,
        dy: F32,
        dx: F32,
        experts: None,
    };
    let mut layer =
        MxLinear::new(&ctx, &desc, &Linear::dense("f32"), 1, false, &mut Scratch::default())?;
    let x = ctx.zeros(F32, 32, 32)?;
    let (mut y, mut dw) = (ctx.zeros(F32, 32, 32)?, ctx.zeros(F32, 32, 32)?);
    let mut stream = ctx.stream();
    let error = layer
        .backward(&mut stream, None, &x, &x, &mut y, &mut dw, plain())
        .unwrap_err()
        .to_string();
    assert!(error.contains("not kept"), "{error}");
    Ok(())
}
