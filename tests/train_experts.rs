//! The mixture of experts on every engine (tests/common/engines.rs), against a dense one in f64: every expert applied to
//! every token, and masked by the choice. Bounds come from running error analysis (tests/common/approx.rs), and the reference's
//! gradients are checked against finite differences of its own forward pass. Outputs hold NaN before, and routes those of
//! other logits.

#[path = "common/approx.rs"]
mod approx;
mod common;

use approx::{Approx, within};
use common::engines::{self, CPU, Form, PLAIN, Test};
use common::{gaussian, narrowed, to_f32};
use libtest_mimic::{Failed, Trial};
use microscaling::kernels::matmul::Extras;
use microscaling::kernels::permute;
use microscaling::kernels::router::NO_TOKEN;
use microscaling::{
    Axis, Context, DType, Error, MXFP4, Matmul, MatmulDesc, MxTensor, Operand, Options, Quantize,
    QuantizeDesc, Router, RouterDesc, Routes, Tensor, Tier, wgpu,
};

const SUITE: &[(&str, Test)] = &[
    ("slots_are_sorted_and_padded", slots_are_sorted),
    ("weights_are_the_softmax_of_the_chosen", weights_are_softmax),
    ("equal_logits_go_to_lower_experts", ties),
    ("nan_logits_show_and_stay_in_range", nan_logits),
    ("a_bias_chooses_and_nothing_else", biased),
    ("balance_evens_the_load", balance),
    ("rows_go_there_and_back", permutations),
    ("experts_are_the_dense_mixture", dense_mixture),
    ("blocks_along_the_slots_have_one_expert", packed_gradients),
    ("bad_input_is_an_error", bad_input),
];

fn main() {
    let none = (wgpu::Features::empty(), "");
    let forms = [Form { what: PLAIN, options: Options::default(), steps: [1, 1], needs: none }];
    let alone = vec![
        Trial::test("the_reference_is_its_finite_differences", finite_differences),
        Trial::test("a_planted_error_is_outside_the_bound", comparison_fails),
    ];
    let suite = |form: &str| match form {
        CPU | PLAIN => SUITE.to_vec(),
        _ => Vec::new(),
    };
    engines::run(suite, &forms, alone);
}

// ---- On the device -------------------------------------------------------------------------------------------------

fn upload(ctx: &Context, dtype: DType, cols: usize, values: &[f32]) -> Result<Tensor, Error> {
    ctx.upload(dtype, values.len() / cols, cols, &narrowed(dtype, values))
}

fn nan(ctx: &Context, dtype: DType, rows: usize, cols: usize) -> Result<Tensor, Error> {
    upload(ctx, dtype, cols, &vec![f32::NAN; rows * cols])
}

fn read(ctx: &Context, x: &Tensor) -> Result<Vec<f32>, Error> {
    Ok(to_f32(x.dtype(), &ctx.read_blocking(x)?))
}

/// Routes on the device, over what other logits left there.
fn route(
    ctx: &Context,
    desc: &RouterDesc,
    logits: &[f32],
    bias: Option<&[f32]>,
) -> Result<(Router, Routes), Error> {
    let router = Router::new(ctx, desc)?;
    let mut routes = Routes::new(ctx, desc)?;
    let bias = bias.map(|bias| upload(ctx, DType::F32, desc.experts, bias)).transpose()?;
    for logits in [&gaussian(999, logits.len())[..], logits] {
        let logits = upload(ctx, DType::F32, desc.experts, logits)?;
        let mut stream = ctx.stream();
        router.record(&mut stream, &logits, bias.as_ref(), &mut routes)?;
        ctx.submit(stream)?;
    }
    Ok((router, routes))
}

/// Routes on the host.
struct Read {
    choice: Vec<usize>,
    weights: Vec<f32>,
    probs: Vec<f32>,
    counts: Vec<u32>,
    slot_of: Vec<u32>,
    token_of: Vec<u32>,
    offsets: Vec<u32>,
    aux: f32,
}

impl Read {
    fn new(ctx: &Context, routes: &Routes) -> Result<Read, Error> {
        let ids = |ids| ctx.read_ids_blocking(ids);
        Ok(Read {
            choice: ids(&routes.choice)?.into_iter().map(|e| e as usize).collect(),
            weights: read(ctx, &routes.weights)?,
            probs: read(ctx, &routes.probs)?,
            counts: ids(&routes.counts)?,
            slot_of: ids(&routes.slot_of)?,
            token_of: ids(&routes.token_of)?,
            offsets: pollster::block_on(routes.groups.offsets(ctx))?,
            aux: read(ctx, &routes.aux)?[0],
        })
    }

    /// Whether each expert was chosen, `[T, E]`.
    fn mask(&self, desc: &RouterDesc) -> Vec<bool> {
        let mut mask = vec![false; desc.tokens * desc.experts];
        for (i, expert) in self.choice.iter().enumerate() {
            mask[i / desc.top_k * desc.experts + expert] = true;
        }
        mask
    }

    /// Slots, counts and offsets are those of a stable sort of the choices.
    fn check_slots(&self, desc: &RouterDesc) -> Result<(), Failed> {
        assert_eq!(self.token_of.len(), desc.slots());
        let mut pairs: Vec<(usize, usize)> =
            self.choice.iter().enumerate().map(|(i, e)| (*e, i)).collect();
        pairs.sort();
        let mut token_of = vec![NO_TOKEN; desc.slots()];
        let mut slot_of = vec![0; self.choice.len()];
        let (mut counts, mut offsets) = (Vec::new(), vec![0]);
        let mut slot = 0;
        for expert in 0..desc.experts {
            let own: Vec<usize> =
                pairs.iter().filter(|(e, _)| *e == expert).map(|(_, i)| *i).collect();
            for (at, i) in own.iter().enumerate() {
                token_of[slot + at] = (i / desc.top_k) as u32;
                slot_of[*i] = (slot + at) as u32;
            }
            counts.push(own.len() as u32);
            slot += own.len().div_ceil(desc.align) * desc.align;
            offsets.push(slot as u32);
        }
        assert_eq!(self.counts, counts);
        assert_eq!(self.offsets, offsets);
        assert_eq!(self.slot_of, slot_of);
        assert_eq!(self.token_of, token_of);
        Ok(())
    }
}

// ---- The reference -------------------------------------------------------------------------------------------------

/// The choice by the definition: descending, equals by the lower index.
fn best(scores: &[f64], top_k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    order.truncate(top_k);
    order
}

fn choices(logits: &[f32], desc: &RouterDesc) -> Vec<usize> {
    let scores: Vec<f64> = logits.iter().map(|x| f64::from(*x) + 0.0).collect();
    scores.chunks(desc.experts).flat_map(|scores| best(scores, desc.top_k)).collect()
}

fn exact(values: &[f32]) -> Vec<Approx> {
    values.iter().map(|v| Approx::exact(f64::from(*v))).collect()
}

fn softmax(logits: &[Approx]) -> Vec<Approx> {
    let top = logits.iter().map(|x| x.value).fold(f64::MIN, f64::max);
    let terms: Vec<Approx> = logits.iter().map(|x| (*x - Approx::exact(top)).exp()).collect();
    let sum = Approx::sum(terms.iter().copied());
    terms.iter().map(|term| *term / sum).collect()
}

/// A dense mixture of linear experts: y[t] = Σ gate[t, e] · W[e] · x[t].
struct Dense {
    desc: RouterDesc,
    /// Of x and y.
    cols: [usize; 2],
    mask: Vec<bool>,
    logits: Vec<Approx>,
    x: Vec<Approx>,
    w: Vec<Approx>,
    dy: Vec<Approx>,
    aux_scale: f64,
}

struct Forward {
    probs: Vec<Approx>,
    /// The chosen experts' probabilities' sum, or 1, `[T]`.
    share: Vec<Approx>,
    /// `[T, E]`, zero where not chosen.
    gate: Vec<Approx>,
    /// Every expert's output, `[T, E, N]`.
    h: Vec<Approx>,
    y: Vec<Approx>,
    aux: Approx,
}

struct Gradients {
    x: Vec<Approx>,
    w: Vec<Approx>,
    logits: Vec<Approx>,
}

impl Dense {
    /// What the auxiliary loss's gradient by each probability of an expert is, before its scale.
    fn load(&self, expert: usize) -> Approx {
        let RouterDesc { tokens, experts, top_k, aux, .. } = self.desc;
        let count = (0..tokens).filter(|t| self.mask[t * experts + expert]).count();
        let share = count as f64 / (tokens * top_k) as f64;
        let factor = Approx::exact(f64::from(aux) * experts as f64 * share / tokens as f64);
        // As many roundings as its own factors have.
        factor * Approx::exact(1.0) * Approx::exact(1.0)
    }

    fn forward(&self) -> Forward {
        let RouterDesc { tokens, experts, renormalize, .. } = self.desc;
        let [c, n] = self.cols;
        let probs: Vec<Approx> = self.logits.chunks(experts).flat_map(softmax).collect();
        let chosen = |t: usize| (t * experts..(t + 1) * experts).filter(|at| self.mask[*at]);
        let share: Vec<Approx> = (0..tokens)
            .map(|t| match renormalize {
                true => Approx::sum(chosen(t).map(|at| probs[at])),
                false => Approx::exact(1.0),
            })
            .collect();
        let gate: Vec<Approx> =
            (0..tokens * experts)
                .map(|at| {
                    if self.mask[at] { probs[at] / share[at / experts] } else { Approx::default() }
                })
                .collect();
        let mut h = Vec::new();
        for t in 0..tokens {
            for line in 0..experts * n {
                h.push(Approx::sum((0..c).map(|i| self.x[t * c + i] * self.w[line * c + i])));
            }
        }
        let mut y = Vec::new();
        for t in 0..tokens {
            for i in 0..n {
                let of = |e: usize| gate[t * experts + e] * h[(t * experts + e) * n + i];
                y.push(Approx::sum((0..experts).map(of)));
            }
        }
        let mean = |e: usize| Approx::sum((0..tokens).map(|t| probs[t * experts + e]));
        let aux = Approx::sum((0..experts).map(|e| mean(e) * self.load(e)));
        Forward { probs, share, gate, h, y, aux }
    }

    /// ⟨dy, y⟩ and the auxiliary loss.
    fn loss(&self) -> f64 {
        let forward = self.forward();
        let main: f64 = forward.y.iter().zip(&self.dy).map(|(y, dy)| y.value * dy.value).sum();
        main + self.aux_scale * forward.aux.value
    }

    fn backward(&self, forward: &Forward) -> Gradients {
        let RouterDesc { tokens, experts, renormalize, .. } = self.desc;
        let [c, n] = self.cols;
        let Forward { probs, share, gate, h, .. } = forward;
        // ∂y by a gate.
        let dgate: Vec<Approx> = (0..tokens * experts)
            .map(|at| match self.mask[at] {
                true => {
                    let dy = &self.dy[at / experts * n..][..n];
                    Approx::sum(dy.iter().zip(&h[at * n..]).map(|(dy, h)| *dy * *h))
                }
                false => Approx::default(),
            })
            .collect();
        let dh = |t: usize, e: usize, i: usize| gate[t * experts + e] * self.dy[t * n + i];
        let mut x = Vec::new();
        for t in 0..tokens {
            for i in 0..c {
                let by = |e: usize| {
                    let term = |j: usize| dh(t, e, j) * self.w[(e * n + j) * c + i];
                    Approx::sum((0..n).map(term))
                };
                let chosen = (0..experts).filter(|e| self.mask[t * experts + e]);
                x.push(Approx::sum(chosen.map(by)));
            }
        }
        let mut w = Vec::new();
        for e in 0..experts {
            let own: Vec<usize> = (0..tokens).filter(|t| self.mask[t * experts + e]).collect();
            for j in 0..n {
                for i in 0..c {
                    let term = |t: &usize| dh(*t, e, j) * self.x[t * c + i];
                    w.push(Approx::sum(own.iter().map(term)));
                }
            }
        }
        let scale = Approx::exact(self.aux_scale);
        let mut logits = Vec::new();
        for (t, share) in share.iter().enumerate() {
            let row = t * experts..(t + 1) * experts;
            let (p, dg) = (&probs[row.clone()], &dgate[row.clone()]);
            let inner = Approx::sum(p.iter().zip(dg).map(|(p, d)| *p * *d)) / *share;
            let dp: Vec<Approx> = (0..experts)
                .map(|e| {
                    let router = match (self.mask[t * experts + e], renormalize) {
                        (false, _) => Approx::default(),
                        (true, true) => (dg[e] - inner) / *share,
                        (true, false) => dg[e],
                    };
                    router + scale * self.load(e)
                })
                .collect();
            let mean = Approx::sum(p.iter().zip(&dp).map(|(p, d)| *p * *d));
            logits.extend(p.iter().zip(&dp).map(|(p, d)| *p * (*d - mean)));
        }
        Gradients { x, w, logits }
    }
}

/// Random operands; the choice by the logits.
fn dense(seed: u64, desc: RouterDesc, cols: [usize; 2], logits: Vec<f32>) -> Dense {
    let RouterDesc { tokens, experts, .. } = desc;
    let mut mask = vec![false; tokens * experts];
    for (i, expert) in choices(&logits, &desc).into_iter().enumerate() {
        mask[i / desc.top_k * experts + expert] = true;
    }
    Dense {
        desc,
        cols,
        mask,
        logits: exact(&logits),
        x: exact(&gaussian(seed + 1, tokens * cols[0])),
        w: exact(&gaussian(seed + 2, experts * cols[1] * cols[0])),
        dy: exact(&gaussian(seed + 3, tokens * cols[1])),
        aux_scale: 0.5,
    }
}

fn f32s(values: &[Approx]) -> Vec<f32> {
    values.iter().map(|v| v.value as f32).collect()
}

// ---- Routes --------------------------------------------------------------------------------------------------------

fn slots_are_sorted(ctx: &Context, _: usize) -> Result<(), Failed> {
    let shapes: [[usize; 4]; 7] = [
        [1, 4, 1, 32],
        [33, 4, 4, 32],
        [300, 8, 2, 32],
        [700, 64, 8, 128],
        [257, 256, 3, 32],
        [512, 12, 1, 64],
        [1030, 16, 2, 32],
    ];
    for (i, [tokens, experts, top_k, align]) in shapes.into_iter().enumerate() {
        let desc = RouterDesc { tokens, experts, top_k, align, ..Default::default() };
        let mut logits = gaussian(i as u64, tokens * experts);
        if i % 2 == 1 {
            // Few kinds of values, so that there are equals; some experts rare.
            for (at, x) in logits.iter_mut().enumerate() {
                *x = (*x * 2.0).round() - (at % experts) as f32 * 0.25;
            }
        }
        let (_, routes) = route(ctx, &desc, &logits, None)?;
        let got = Read::new(ctx, &routes)?;
        assert_eq!(got.choice, choices(&logits, &desc), "{desc:?}");
        got.check_slots(&desc)?;
    }
    // All to one, and then none: every token to the last expert, with the first one second.
    let desc = RouterDesc { tokens: 290, experts: 8, top_k: 2, ..Default::default() };
    let row = [1.0, 0.0, 0.0, -1.0, -1.0, 0.5, 0.0, 2.0];
    let (_, routes) = route(ctx, &desc, &row.repeat(290), None)?;
    let got = Read::new(ctx, &routes)?;
    assert_eq!(got.choice, [7, 0].repeat(290));
    assert_eq!(got.counts, [290, 0, 0, 0, 0, 0, 0, 290]);
    assert_eq!(got.offsets, [0, 320, 320, 320, 320, 320, 320, 320, 640]);
    got.check_slots(&desc)
}

fn weights_are_softmax(ctx: &Context, _: usize) -> Result<(), Failed> {
    for (i, (renormalize, aux, spread)) in
        [(true, 0.0, 1.0), (false, 0.01, 3.0), (true, 0.02, 40.0)].into_iter().enumerate()
    {
        let (tokens, experts) = (270, [8, 20, 64][i]);
        let desc = RouterDesc { tokens, experts, top_k: 3, renormalize, aux, ..Default::default() };
        let logits: Vec<f32> =
            gaussian(20 + i as u64, tokens * experts).iter().map(|x| x * spread).collect();
        let (_, routes) = route(ctx, &desc, &logits, None)?;
        let got = Read::new(ctx, &routes)?;
        let mut dense = dense(0, desc, [0, 0], logits);
        dense.x.clear();
        let want = dense.forward();
        within("probabilities", &got.probs, &want.probs, experts)?;
        let gates: Vec<Approx> = got
            .choice
            .iter()
            .enumerate()
            .map(|(at, e)| want.gate[at / desc.top_k * experts + e])
            .collect();
        within("weights", &got.weights, &gates, desc.top_k)?;
        if aux != 0.0 {
            within("auxiliary loss", &[got.aux], &[want.aux], 1)?;
        }
    }
    Ok(())
}

fn ties(ctx: &Context, _: usize) -> Result<(), Failed> {
    let desc = RouterDesc { tokens: 3, experts: 8, top_k: 3, ..Default::default() };
    let logits = [
        [0.0; 8],
        [-1.0, 2.0, 2.0, 5.0, 2.0, 5.0, 2.0, 5.0],
        // The sign of zero counts for nothing.
        [-0.0, 0.0, -0.0, -3.0, -3.0, 0.0, -0.0, -1.0],
    ];
    let (_, routes) = route(ctx, &desc, logits.as_flattened(), None)?;
    let got = Read::new(ctx, &routes)?;
    assert_eq!(got.choice, [0, 1, 2, 3, 5, 7, 0, 1, 2]);
    let biased = RouterDesc { bias: true, ..desc };
    let (_, routes) = route(ctx, &biased, logits.as_flattened(), Some(&[0.25; 8]))?;
    assert_eq!(Read::new(ctx, &routes)?.choice, got.choice);
    got.check_slots(&desc)
}

fn nan_logits(ctx: &Context, _: usize) -> Result<(), Failed> {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let desc = RouterDesc { tokens: 6, experts: 4, top_k: 2, aux: 0.1, ..Default::default() };
    let logits = [
        [0.0, 1.0, nan, 2.0],
        [nan; 4],
        [0.0, -nan, 1.0, -inf],
        // Not NaN.
        [0.0, inf, -inf, 1.0],
        [-inf; 4],
        [f32::MAX, inf, f32::MIN, 0.0],
    ];
    let mut first = None;
    for bias in [None, Some(&[0.0, nan, inf, 0.0][..])] {
        let desc = RouterDesc { bias: bias.is_some(), ..desc };
        let (router, routes) = route(ctx, &desc, logits.as_flattened(), bias)?;
        let got = Read::new(ctx, &routes)?;
        got.check_slots(&desc)?;
        assert!(got.choice.iter().all(|e| *e < 4));
        for t in 0..6 {
            assert_ne!(got.choice[2 * t], got.choice[2 * t + 1], "token {t}");
            for row in [&got.weights[2 * t..][..2], &got.probs[4 * t..][..4]] {
                assert!(row.iter().all(|v| v.is_nan() == (t < 3)), "token {t}: {row:?}");
            }
        }
        assert!(got.aux.is_nan());
        if bias.is_none() {
            assert_eq!(got.choice, [3, 1, 0, 1, 2, 0, 1, 3, 0, 1, 0, 1]);
            assert_eq!(got.weights[6..], [1.0, 0.0, 0.5, 0.5, 0.5, 0.5]);
        } else {
            // The bias's NaN is the least, its infinity the most.
            assert!((0..6).all(|t| got.choice[2 * t] == 2 && got.choice[2 * t + 1] != 1));
        }
        // And it reaches the gradient of its own token alone.
        let mut dlogits = self::nan(ctx, DType::F32, 6, 4)?;
        let dweights = upload(ctx, DType::F32, 2, &[1.0; 12])?;
        let mut stream = ctx.stream();
        router.backward(&mut stream, &routes, &dweights, &mut dlogits, 1.0)?;
        ctx.submit(stream)?;
        for (at, d) in read(ctx, &dlogits)?.into_iter().enumerate() {
            assert_eq!(d.is_nan(), at / 4 < 3, "token {}", at / 4);
        }
        let bits: Vec<u32> = got.weights.iter().map(|w| w.to_bits()).collect();
        first.get_or_insert(bits);
    }
    let (_, routes) = route(ctx, &desc, logits.as_flattened(), None)?;
    let again: Vec<u32> = Read::new(ctx, &routes)?.weights.iter().map(|w| w.to_bits()).collect();
    assert_eq!(Some(again), first);
    Ok(())
}

fn biased(ctx: &Context, _: usize) -> Result<(), Failed> {
    let (tokens, experts, top_k) = (200, 16, 4);
    let desc = RouterDesc { tokens, experts, top_k, bias: true, ..Default::default() };
    let logits = gaussian(50, tokens * experts);
    let bias: Vec<f32> = gaussian(51, experts).iter().map(|b| b * 0.1).collect();
    let (_, routes) = route(ctx, &desc, &logits, Some(&bias))?;
    let got = Read::new(ctx, &routes)?;
    got.check_slots(&desc)?;
    let mut dense = dense(0, desc, [0, 0], logits.clone());
    dense.mask = got.mask(&desc);
    let want = dense.forward();
    let mut moved = 0;
    for (t, chosen) in got.choice.chunks(top_k).enumerate() {
        let score = |e: usize| want.probs[t * experts + e] + Approx::exact(f64::from(bias[e]));
        // What was chosen before is no worse than what was chosen later, or not at all; but for errors.
        let mut order = chosen.to_vec();
        order.extend((0..experts).filter(|e| !chosen.contains(e)));
        for (at, a) in chosen.iter().enumerate() {
            for b in &order[at + 1..] {
                let (a, b) = (score(*a), score(*b));
                assert!(a.value + a.error >= b.value - b.error, "token {t}");
            }
        }
        moved += usize::from(chosen != choices(&logits[t * experts..][..experts], &desc));
        for (weight, e) in got.weights[t * top_k..].iter().zip(chosen) {
            within("a weight", &[*weight], &[want.gate[t * experts + e]], 1)?;
        }
    }
    assert!(moved > tokens / 2, "the bias changed {moved} of {tokens}");
    Ok(())
}

/// Logits that prefer some experts; the bias finds out, and the choice's counts get even.
fn balance(ctx: &Context, _: usize) -> Result<(), Failed> {
    let (tokens, experts, top_k) = (256, 8, 2);
    let desc = RouterDesc { tokens, experts, top_k, bias: true, ..Default::default() };
    let logits: Vec<f32> = gaussian(60, tokens * experts)
        .iter()
        .enumerate()
        .map(|(at, x)| x + (at % experts) as f32 * 0.4)
        .collect();
    let logits = upload(ctx, DType::F32, experts, &logits)?;
    let router = Router::new(ctx, &desc)?;
    let mut routes = Routes::new(ctx, &desc)?;
    let mut bias = ctx.zeros(DType::F32, 1, experts)?;
    let mean = (tokens * top_k / experts) as f64;
    let mut worst = Vec::new();
    let mut last: Option<(Vec<f32>, Vec<u32>)> = None;
    for steps in [1, 80] {
        let mut stream = ctx.stream();
        for _ in 0..steps {
            router.record(&mut stream, &logits, Some(&bias), &mut routes)?;
            router.balance(&mut stream, &routes, &mut bias, 1.0 / 128.0)?;
        }
        ctx.submit(stream)?;
        let counts = ctx.read_ids_blocking(&routes.counts)?;
        worst.push(counts.iter().map(|c| f64::from(*c) / mean).fold(0.0, f64::max));
        if steps == 1 {
            // One step is the sign of each error.
            let want: Vec<f32> = counts
                .iter()
                .map(|c| match f64::from(*c) - mean {
                    d if d > 0.0 => -1.0 / 128.0,
                    d if d < 0.0 => 1.0 / 128.0,
                    _ => 0.0,
                })
                .collect();
            assert_eq!(read(ctx, &bias)?, want);
        }
        last = Some((read(ctx, &bias)?, counts));
    }
    assert!(
        worst[0] > 2.0 && worst[1] < 1.25,
        "the largest load over the mean: {worst:?}, {last:?}"
    );
    Ok(())
}

// ---- Rows ----------------------------------------------------------------------------------------------------------

fn permutations(ctx: &Context, _: usize) -> Result<(), Failed> {
    use DType::{BF16, F32};
    let cases = [
        (70, 8, 2, 36, [F32, F32, F32], true),
        (33, 4, 1, 132, [BF16, F32, BF16], false),
        (41, 12, 8, 20, [F32, BF16, F32], true),
        (50, 4, 3, 640, [BF16, BF16, BF16], false),
    ];
    for (i, (tokens, experts, top_k, cols, [of_x, of_ys, of_y], accumulate)) in
        cases.into_iter().enumerate()
    {
        let seed = 100 * i as u64;
        let desc = RouterDesc { tokens, experts, top_k, ..Default::default() };
        let (_, routes) = route(ctx, &desc, &gaussian(seed, tokens * experts), None)?;
        let got = Read::new(ctx, &routes)?;
        let slots = routes.slots();
        let x = upload(ctx, of_x, cols, &gaussian(seed + 1, tokens * cols))?;
        let x_values = read(ctx, &x)?;
        let round = |dtype: DType, v: Approx| if dtype == F32 { v } else { v.narrowed() };

        // There; exact.
        let mut xs = nan(ctx, of_ys, slots, cols)?;
        let mut stream = ctx.stream();
        permute::gather(&mut stream, &routes, &x, &mut xs)?;
        ctx.submit(stream)?;
        let xs = read(ctx, &xs)?;
        for (slot, row) in xs.chunks(cols).enumerate() {
            let want = match got.token_of[slot] {
                NO_TOKEN => vec![0.0; cols],
                token => x_values[token as usize * cols..][..cols].to_vec(),
            };
            assert_eq!(row, to_f32(of_ys, &narrowed(of_ys, &want)), "slot {slot}");
        }

        // Back, and both gradients. Slots of no token hold NaN: nobody may read them.
        let mut ys_values = gaussian(seed + 2, slots * cols);
        for (slot, row) in ys_values.chunks_mut(cols).enumerate() {
            if got.token_of[slot] == NO_TOKEN {
                row.fill(f32::NAN);
            }
        }
        let ys = upload(ctx, of_ys, cols, &ys_values)?;
        let ys_values = exact(&read(ctx, &ys)?);
        let old = match accumulate {
            true => gaussian(seed + 3, tokens * cols),
            false => vec![f32::NAN; tokens * cols],
        };
        let mut y = upload(ctx, of_y, cols, &old)?;
        let mut dx = upload(ctx, of_y, cols, &old)?;
        let old = exact(&read(ctx, &y)?);
        let mut dys = nan(ctx, of_ys, slots, cols)?;
        let mut dweights = nan(ctx, F32, tokens, top_k)?;
        let mut stream = ctx.stream();
        permute::combine(&mut stream, &routes, &ys, &mut y, accumulate)?;
        permute::gather_backward(&mut stream, &routes, &ys, &mut dx, accumulate)?;
        permute::combine_backward(&mut stream, &routes, &x, &ys, &mut dys, &mut dweights)?;
        let mut cleared = upload(ctx, of_ys, cols, &f32s(&ys_values))?;
        permute::clear_padding(&mut stream, &routes, &mut cleared)?;
        ctx.submit(stream)?;
        let cleared = read(ctx, &cleared)?;
        for (at, (now, old)) in cleared.iter().zip(&ys_values).enumerate() {
            let empty = got.token_of[at / cols] == NO_TOKEN;
            let want = if empty { 0.0 } else { old.value as f32 };
            assert_eq!(now.to_bits(), want.to_bits(), "row {}", at / cols);
        }

        let weights = exact(&got.weights);
        let dy = exact(&x_values);
        let mut want = [Vec::new(), Vec::new()];
        let mut want_dw = Vec::new();
        for t in 0..tokens {
            for c in 0..cols {
                for (weighted, want) in want.iter_mut().enumerate() {
                    let term = |j: usize| {
                        let y = ys_values[got.slot_of[t * top_k + j] as usize * cols + c];
                        if weighted == 1 { weights[t * top_k + j] * y } else { y }
                    };
                    let old = if accumulate { old[t * cols + c] } else { Approx::default() };
                    let terms = (0..top_k).map(term).chain([old]);
                    want.push(round(of_y, Approx::sum(terms)));
                }
            }
            for j in 0..top_k {
                let slot = got.slot_of[t * top_k + j] as usize;
                let term = |c: usize| dy[t * cols + c] * ys_values[slot * cols + c];
                want_dw.push(Approx::sum((0..cols).map(term)));
            }
        }
        within("combined", &read(ctx, &y)?, &want[1], cols)?;
        within("gathered back", &read(ctx, &dx)?, &want[0], cols)?;
        within("dweights", &read(ctx, &dweights)?, &want_dw, top_k)?;
        let mut want = vec![Approx::default(); slots * cols];
        for (place, slot) in got.slot_of.iter().enumerate() {
            for c in 0..cols {
                let product = weights[place] * dy[place / top_k * cols + c];
                want[*slot as usize * cols + c] = round(of_ys, product);
            }
        }
        within("dys", &read(ctx, &dys)?, &want, cols)?;
    }
    Ok(())
}

// ---- Experts -------------------------------------------------------------------------------------------------------

struct Outputs {
    y: Vec<f32>,
    dx: Vec<f32>,
    dw: Vec<f32>,
    dlogits: Vec<f32>,
}

/// The mixture as a trainer records it, in one stream.
fn experts_on_device(ctx: &Context, dense: &Dense) -> Result<Outputs, Error> {
    let Dense { desc, cols: [c, n], .. } = dense;
    let RouterDesc { tokens, experts, top_k, .. } = *desc;
    let slots = desc.slots();
    let f32 = |values: &[Approx], cols| upload(ctx, DType::F32, cols, &f32s(values));
    let (x, w, dy) = (f32(&dense.x, *c)?, f32(&dense.w, *c)?, f32(&dense.dy, *n)?);
    let (router, routes) = route(ctx, desc, &f32s(&dense.logits), None)?;
    let float = Operand::from(DType::F32);
    let grouped = MatmulDesc { experts: Some(experts), tier: Tier::Alu, ..Default::default() };
    let product = |desc: MatmulDesc, a: &Tensor, b: &Tensor, y: &mut Tensor| {
        let mut stream = ctx.stream();
        let extras = Extras { groups: Some(&routes.groups), bias: None };
        Matmul::new(ctx, &desc)?.record_with(&mut stream, a, b, y, extras)?;
        ctx.submit(stream)
    };
    let empty = |rows, cols| nan(ctx, DType::F32, rows, cols);

    let mut xs = empty(slots, *c)?;
    let mut ys = empty(slots, *n)?;
    let mut y = empty(tokens, *n)?;
    let mut stream = ctx.stream();
    permute::gather(&mut stream, &routes, &x, &mut xs)?;
    ctx.submit(stream)?;
    let forward = MatmulDesc { m: slots, n: *n, k: *c, a: float, b: float, ..grouped };
    product(forward, &xs, &w, &mut ys)?;
    let mut dys = empty(slots, *n)?;
    let mut dweights = empty(tokens, top_k)?;
    let mut dlogits = empty(tokens, experts)?;
    let mut stream = ctx.stream();
    permute::combine(&mut stream, &routes, &ys, &mut y, false)?;
    permute::combine_backward(&mut stream, &routes, &dy, &ys, &mut dys, &mut dweights)?;
    let scale = dense.aux_scale as f32;
    router.backward(&mut stream, &routes, &dweights, &mut dlogits, scale)?;
    ctx.submit(stream)?;
    let mut dxs = empty(slots, *c)?;
    let mut dx = empty(tokens, *c)?;
    let mut dw = empty(experts * n, *c)?;
    let back = MatmulDesc { m: slots, n: *c, k: *n, a: float, b: float.transposed(), ..grouped };
    product(back, &dys, &w, &mut dxs)?;
    let (a, b) = (float.transposed(), float.transposed());
    let of_weights = MatmulDesc { m: *n, n: *c, k: slots, a, b, group_k: true, ..grouped };
    product(of_weights, &dys, &xs, &mut dw)?;
    let mut stream = ctx.stream();
    permute::gather_backward(&mut stream, &routes, &dxs, &mut dx, false)?;
    ctx.submit(stream)?;
    let [y, dx, dw, dlogits] = [y, dx, dw, dlogits].map(|tensor| read(ctx, &tensor));
    Ok(Outputs { y: y?, dx: dx?, dw: dw?, dlogits: dlogits? })
}

/// Mixtures of both kinds of weights and losses; one with all tokens at one expert, and experts with none.
fn mixtures() -> Vec<Dense> {
    let new = |tokens, experts, top_k, renormalize, aux| RouterDesc {
        tokens,
        experts,
        top_k,
        renormalize,
        aux,
        ..Default::default()
    };
    let skewed = |at: usize, x: f32| if at % 4 == 2 { x + 9.0 } else { x };
    vec![
        dense(10, new(45, 4, 2, true, 0.0), [16, 12], gaussian(10, 45 * 4)),
        dense(20, new(37, 8, 1, false, 0.3), [12, 8], gaussian(20, 37 * 8)),
        dense(30, new(30, 8, 3, true, 0.3), [8, 20], gaussian(30, 30 * 8)),
        dense(
            40,
            new(40, 4, 1, true, 0.1),
            [8, 8],
            gaussian(40, 160).into_iter().enumerate().map(|(at, x)| skewed(at, x)).collect(),
        ),
        dense(50, new(20, 4, 2, false, 0.0), [8, 8], gaussian(50, 80)),
    ]
}

fn dense_mixture(ctx: &Context, _: usize) -> Result<(), Failed> {
    for (i, dense) in mixtures().into_iter().enumerate() {
        let forward = dense.forward();
        let want = dense.backward(&forward);
        let got = experts_on_device(ctx, &dense)?;
        let [c, n] = dense.cols;
        within(&format!("{i}: y"), &got.y, &forward.y, n)?;
        within(&format!("{i}: dx"), &got.dx, &want.x, c)?;
        within(&format!("{i}: dw"), &got.dw, &want.w, c)?;
        within(&format!("{i}: dlogits"), &got.dlogits, &want.logits, dense.desc.experts)?;
        if i == 3 {
            let lone = 2 * n * c..3 * n * c;
            assert!((0..4 * n * c).all(|at| lone.contains(&at) || got.dw[at] == 0.0));
            assert!(got.dw[lone].iter().any(|v| *v != 0.0));
        }
    }
    Ok(())
}

/// What is quantized along the slots, and multiplied by groups of k, is what each expert's rows alone give.
fn packed_gradients(ctx: &Context, _: usize) -> Result<(), Failed> {
    let desc = RouterDesc { tokens: 90, experts: 4, top_k: 2, ..Default::default() };
    let [c, n] = [20, 12];
    let mut logits = gaussian(70, 90 * 4);
    // Nobody takes expert 1.
    logits.iter_mut().skip(1).step_by(4).for_each(|x| *x -= 100.0);
    let (_, routes) = route(ctx, &desc, &logits, None)?;
    let offsets = Read::new(ctx, &routes)?.offsets;
    assert_eq!(offsets[1], offsets[2]);
    let slots = routes.slots();
    let mut rows = Vec::new();
    let mut packed = Vec::new();
    let quantize = QuantizeDesc { axis: Axis::Zero, ..Default::default() };
    for (seed, cols) in [(71, n), (72, c)] {
        let x = upload(ctx, DType::F32, cols, &gaussian(seed, 90 * cols))?;
        let mut xs = nan(ctx, DType::F32, slots, cols)?;
        let mut codes = ctx.zeros_mx(MXFP4, Axis::Zero, slots, cols)?;
        let mut stream = ctx.stream();
        permute::gather(&mut stream, &routes, &x, &mut xs)?;
        Quantize::new(ctx, &quantize)?.record(&mut stream, &xs, &mut codes)?;
        ctx.submit(stream)?;
        rows.push(read(ctx, &xs)?);
        packed.push(codes);
    }
    let tier = Tier::Exact;
    let experts = Some(4);
    let of_weights =
        MatmulDesc { m: n, n: c, k: slots, experts, group_k: true, tier, ..Default::default() };
    let mut dw = nan(ctx, DType::F32, 4 * n, c)?;
    let mut stream = ctx.stream();
    let extras = Extras { groups: Some(&routes.groups), bias: None };
    let kernel = Matmul::new(ctx, &of_weights)?;
    kernel.record_with(&mut stream, &packed[0], &packed[1], &mut dw, extras)?;
    ctx.submit(stream)?;
    let mut want = Vec::new();
    for range in offsets.windows(2) {
        let own = |values: &[f32], cols: usize| -> Result<Vec<f32>, Error> {
            let rows = &values[range[0] as usize * cols..range[1] as usize * cols];
            Ok(MxTensor::quantize(rows, rows.len() / cols, cols, &quantize)?.dequantize())
        };
        let (dy, x) = (exact(&own(&rows[0], n)?), exact(&own(&rows[1], c)?));
        for j in 0..n {
            for i in 0..c {
                let slots = 0..(range[1] - range[0]) as usize;
                want.push(Approx::sum(slots.map(|s| dy[s * n + j] * x[s * c + i])));
            }
        }
    }
    Ok(within("dw", &read(ctx, &dw)?, &want, c)?)
}

// ---- The reference itself, and errors --------------------------------------------------------------------------------

/// Central differences at two steps: they differ by three times what the smaller one's error is, to first order, and by what
/// f64 loses.
fn finite_differences() -> Result<(), Failed> {
    for (i, mut dense) in mixtures().into_iter().enumerate() {
        let gradients = dense.backward(&dense.forward());
        let magnitude = dense.loss().abs() + dense.dy.len() as f64;
        let at = |dense: &mut Dense, which: usize, at: usize, step: f64| {
            let place = match which {
                0 => &mut dense.x[at],
                1 => &mut dense.w[at],
                _ => &mut dense.logits[at],
            };
            place.value += step;
            let loss = dense.loss();
            let place = match which {
                0 => &mut dense.x[at],
                1 => &mut dense.w[at],
                _ => &mut dense.logits[at],
            };
            place.value -= step;
            loss
        };
        for (which, gradient) in
            [&gradients.x, &gradients.w, &gradients.logits].into_iter().enumerate()
        {
            for element in (0..gradient.len()).step_by(gradient.len() / 12 + 1) {
                let [wide, narrow] = [1e-3, 5e-4].map(|step| {
                    let ends = [step, -step].map(|step| at(&mut dense, which, element, step));
                    (ends[0] - ends[1]) / (2.0 * step)
                });
                let error = (wide - narrow).abs() + magnitude * 2f64.powi(-44) / 5e-4;
                let want = gradient[element].value;
                if (narrow - want).abs() > error {
                    return Err(format!(
                        "{i}: gradient {which} at {element}: {want:e}, differences {narrow:e} ± {error:e}"
                    )
                    .into());
                }
            }
        }
    }
    Ok(())
}

/// A token's weights swapped, or a row gathered from its neighbour, is far outside the bounds.
fn comparison_fails() -> Result<(), Failed> {
    let ctx = Context::cpu();
    let right = &mixtures()[0];
    let want = right.forward();
    let got = experts_on_device(&ctx, right)?;
    within("y", &got.y, &want.y, 12)?;
    let mut wrong = Dense { ..dense(10, right.desc, right.cols, gaussian(10, 45 * 4)) };
    wrong.x[3 * 16].value *= 1.0 + 1e-4;
    let got = experts_on_device(&ctx, &wrong)?;
    let error = within("y", &got.y, &want.y, 12).expect_err("a wrong element passes");
    assert!(error.contains("first at (3,"), "{error}");
    assert!(!Approx::exact(1.0).contains(f32::NAN) && !Approx::exact(0.0).contains(f32::NAN));
    Ok(())
}

fn says<T>(result: Result<T, Error>, parts: &[&str]) {
    let text = result.err().expect("an error").to_string();
    for part in parts {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
}

fn bad_input(ctx: &Context, _: usize) -> Result<(), Failed> {
    let desc = RouterDesc { tokens: 10, experts: 4, top_k: 2, ..Default::default() };
    for (bad, parts) in [
        (RouterDesc { experts: 6, ..desc }, ["6 experts", "multiple of 4"]),
        (RouterDesc { experts: 260, ..desc }, ["260", "256"]),
        (RouterDesc { top_k: 5, ..desc }, ["5 of 4", "1 to 4"]),
        (RouterDesc { top_k: 9, experts: 16, ..desc }, ["9 of 16", "1 to 8"]),
        (RouterDesc { top_k: 0, ..desc }, ["0 of 4", "1 to 4"]),
        (RouterDesc { align: 48, ..desc }, ["align = 48", "32"]),
        (RouterDesc { align: 1 << 40, ..desc }, ["align = 1099511627776", "1024"]),
        (RouterDesc { aux: -1.0, ..desc }, ["aux = -1", "negative"]),
        (RouterDesc { tokens: 0, ..desc }, ["0 tokens", "1 token"]),
        (RouterDesc { tokens: 1 << 30, ..desc }, ["tokens", "2^32"]),
    ] {
        says(Router::new(ctx, &bad), &parts);
        says(Routes::new(ctx, &bad), &parts);
    }
    let router = Router::new(ctx, &desc)?;
    let mut routes = Routes::new(ctx, &desc)?;
    let zeros = |rows, cols| ctx.zeros(DType::F32, rows, cols);
    let mut stream = ctx.stream();
    let logits = zeros(10, 4)?;
    let short = zeros(9, 4)?;
    says(router.record(&mut stream, &short, None, &mut routes), &["logits", "[9, 4]", "[10, 4]"]);
    let half = ctx.zeros(DType::BF16, 10, 4)?;
    says(router.record(&mut stream, &half, None, &mut routes), &["logits", "bf16", "f32"]);
    let bias = zeros(1, 4)?;
    says(
        router.record(&mut stream, &logits, Some(&bias), &mut routes),
        &["bias", "given", "false"],
    );
    let other = RouterDesc { top_k: 1, ..desc };
    let mut others = Routes::new(ctx, &other)?;
    says(router.record(&mut stream, &logits, None, &mut others), &["top_k: 1", "top_k: 2"]);
    let mut dlogits = zeros(10, 4)?;
    let narrow = zeros(10, 1)?;
    says(
        router.backward(&mut stream, &routes, &narrow, &mut dlogits, 1.0),
        &["dweights", "[10, 1]", "[10, 2]"],
    );
    let mut wide = zeros(1, 8)?;
    says(router.balance(&mut stream, &routes, &mut wide, 0.1), &["bias", "[1, 8]", "[1, 4]"]);

    let slots = routes.slots();
    let x = zeros(10, 8)?;
    let mut xs = zeros(slots, 8)?;
    let mut few = zeros(slots - 1, 8)?;
    says(permute::gather(&mut stream, &routes, &x, &mut few), &["xs", "256", "255"]);
    let odd = zeros(10, 6)?;
    says(permute::gather(&mut stream, &routes, &odd, &mut xs), &["6 columns", "multiple of 4"]);
    says(permute::clear_padding(&mut stream, &routes, &mut few), &["x", "256", "255"]);
    let half = ctx.zeros(DType::F16, 10, 8)?;
    says(permute::gather(&mut stream, &routes, &half, &mut xs), &["x", "f16", "f32 or bf16"]);
    let mut y = zeros(10, 4)?;
    says(permute::combine(&mut stream, &routes, &xs, &mut y, false), &["ys", "8]", "4]"]);
    says(permute::gather_backward(&mut stream, &routes, &xs, &mut y, false), &["dxs", "8]", "4]"]);
    let mut dw = zeros(10, 3)?;
    let mut dys = zeros(slots, 8)?;
    says(
        permute::combine_backward(&mut stream, &routes, &x, &xs, &mut dys, &mut dw),
        &["dweights", "[10, 3]", "[10, 2]"],
    );
    if ctx.wgpu().is_some() {
        let cpu = Context::cpu();
        let elsewhere = cpu.zeros(DType::F32, 10, 8)?;
        says(permute::gather(&mut stream, &routes, &elsewhere, &mut xs), &["CPU engine"]);
        let elsewhere = cpu.zeros(DType::F32, 10, 4)?;
        says(router.record(&mut stream, &elsewhere, None, &mut routes), &["CPU engine"]);
        let mut foreign = Routes::new(&cpu, &desc)?;
        says(router.record(&mut stream, &logits, None, &mut foreign), &["CPU engine"]);
    }
    Ok(())
}
