//! The router of a dropless mixture of experts: logits `[T, E]` → the `top_k` experts of each token, their weights, and slots
//! sorted by expert.
//!
//! - Scores: softmax over the experts. Chosen are those with the largest logits, or, with a bias, the largest probability
//!   plus bias; equals by the lower index. `weights[t, j]`, j descending in that order, is the probability, renormalized to sum 1
//!   if [`RouterDesc::renormalize`].
//! - Balance: [`Router::balance`] moves the bias by the sign of each expert's load error (auxiliary-loss-free balancing,
//!   arXiv 2408.15664, DeepSeek-V3). [`RouterDesc::aux`] is α of Switch's loss α · E · Σ f_e · P_e (arXiv 2101.03961), f_e the
//!   share of the choices that e got and P_e its mean probability; f_e counts as constant in the gradient.
//! - Slots: [`Routes::slot_of`]`[t · k + j]` and [`Routes::token_of`]`[slot]`, sorted by expert, then token. Each expert's range
//!   is padded to a multiple of [`RouterDesc::align`], so that no block of a quantizer along the slots has two experts in it.
//!   No token is dropped, and nothing is read back: [`Routes::groups`] is for [`crate::Matmul`].
//!
//! # Exactness
//! Slots, counts and offsets are exact functions of the choice; the choice is exact without a bias (it compares logits).
//! Probabilities, weights and gradients are bounded. A probability below e⁻⁸⁷ of the token's largest is zero, and the sum that
//! weights are divided by is at least 1e-20.
//!
//! A NaN logit is the least when experts are chosen, ±∞ is ±1e38; the probabilities and weights of a token with a NaN are
//! NaN, so that it shows.
//! Shaders: `shaders/router.wgsl`, `router_slots.wgsl`, `router_aux.wgsl`, `router_balance.wgsl`, `router_backward.wgsl`.

use super::matmul::GROUP_OFFSETS;
use super::{Groups, WORKGROUP};
use crate::engine::buffer::{DType, Ids, Tensor};
use crate::engine::shader::{Binding, Kernel, Source, shader};
use crate::engine::{Context, Stream};
use crate::formats::element::NAN;
use crate::{Error, Result};

/// Experts, at most.
pub const MAX_EXPERTS: usize = 256;
/// Experts of a token, at most.
pub const MAX_TOP_K: usize = 8;
/// [`RouterDesc::align`], at most.
pub const MAX_ALIGN: usize = 1024;
/// [`Routes::token_of`] of a slot that no token has.
pub const NO_TOKEN: u32 = u32::MAX;

/// What a [`Router`] does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterDesc {
    /// T.
    pub tokens: usize,
    /// E, a multiple of 4, at most [`MAX_EXPERTS`].
    pub experts: usize,
    /// Experts of a token, at most [`MAX_TOP_K`].
    pub top_k: usize,
    /// Whether a token's weights are divided by their sum.
    pub renormalize: bool,
    /// Whether experts are chosen by probability plus a bias.
    pub bias: bool,
    /// α of the auxiliary loss; zero: none.
    pub aux: f32,
    /// What an expert's slots are padded to a multiple of; a multiple of 32.
    pub align: usize,
}

impl Default for RouterDesc {
    fn default() -> Self {
        RouterDesc {
            tokens: 0,
            experts: 0,
            top_k: 2,
            renormalize: true,
            bias: false,
            aux: 0.0,
            align: 32,
        }
    }
}

impl RouterDesc {
    /// Checks the sizes.
    pub fn validate(&self) -> Result<()> {
        let RouterDesc { tokens, experts, top_k, align, aux, .. } = *self;
        let mismatch = |problem| Err(Error::Mismatch { operation: "Router::new", problem });
        if experts == 0 || experts > MAX_EXPERTS || !experts.is_multiple_of(4) {
            return mismatch(format!("{experts} experts: 4 to {MAX_EXPERTS}, a multiple of 4"));
        }
        if top_k == 0 || top_k > MAX_TOP_K.min(experts) {
            return mismatch(format!(
                "the best {top_k} of {experts} experts: 1 to {}",
                MAX_TOP_K.min(experts)
            ));
        }
        if align == 0 || align > MAX_ALIGN || !align.is_multiple_of(32) {
            return mismatch(format!("align = {align}: 32 to {MAX_ALIGN}, a multiple of 32"));
        }
        if !aux.is_finite() || aux < 0.0 {
            return mismatch(format!("aux = {aux}: finite, not negative"));
        }
        // Loads are compared as count · experts in u32.
        if tokens == 0 || tokens.saturating_mul(top_k * experts) > u32::MAX as usize {
            return mismatch(format!(
                "{tokens} tokens, the best {top_k} of {experts} experts: 1 token at least, and below 2^32 in all"
            ));
        }
        if self.slots() > i32::MAX as usize {
            return mismatch(format!("{} slots: below 2^31", self.slots()));
        }
        Ok(())
    }

    /// Slots that are enough for any choice of a valid descriptor: every expert's padding may be `align` − 1. A multiple of 128 and of `align`, so
    /// that the fast products along the slots apply.
    pub fn slots(&self) -> usize {
        let unit = if self.align.is_multiple_of(128) { self.align } else { 4 * self.align };
        let slots = self.tokens * self.top_k + self.experts * (self.align - 1);
        slots.next_multiple_of(unit)
    }

    fn blocks(&self) -> usize {
        self.tokens.div_ceil(WORKGROUP as usize)
    }

    /// The auxiliary loss is this times Σ counts · sums of probabilities.
    fn factor(&self) -> f32 {
        let (tokens, experts) = (self.tokens as f64, self.experts as f64);
        (f64::from(self.aux) * experts / (tokens * tokens * self.top_k as f64)) as f32
    }
}

/// Where the tokens of a batch go: what [`Router::record`] writes, and the backward pass reads.
#[derive(Debug)]
pub struct Routes {
    /// The chosen experts, `[T · k]`, the best first.
    pub choice: Ids,
    /// Their weights, `[T, k]` in f32.
    pub weights: Tensor,
    /// The probabilities of all experts, `[T, E]` in f32.
    pub probs: Tensor,
    /// How many tokens chose each expert, `[E]`.
    pub counts: Ids,
    /// The slot of each choice, `[T · k]`.
    pub slot_of: Ids,
    /// The token of each slot, or [`NO_TOKEN`], `[slots]`.
    pub token_of: Ids,
    /// Each expert's range of slots.
    pub groups: Groups,
    /// The auxiliary loss, `[1, 1]` in f32; written if [`RouterDesc::aux`] is not zero.
    pub aux: Tensor,
    pub(crate) desc: RouterDesc,
}

impl Routes {
    /// Room for what a router of this descriptor writes.
    pub fn new(ctx: &Context, desc: &RouterDesc) -> Result<Routes> {
        desc.validate()?;
        let RouterDesc { tokens, experts, top_k, .. } = *desc;
        Ok(Routes {
            choice: ctx.zeros_ids(tokens * top_k)?,
            weights: ctx.zeros(DType::F32, tokens, top_k)?,
            probs: ctx.zeros(DType::F32, tokens, experts)?,
            counts: ctx.zeros_ids(experts)?,
            slot_of: ctx.zeros_ids(tokens * top_k)?,
            token_of: ctx.zeros_ids(desc.slots())?,
            groups: Groups::zeros(ctx, experts)?,
            aux: ctx.zeros(DType::F32, 1, 1)?,
            desc: *desc,
        })
    }

    /// What they were made for.
    pub fn desc(&self) -> &RouterDesc {
        &self.desc
    }

    /// How many slots there are, padding included.
    pub fn slots(&self) -> usize {
        self.desc.slots()
    }
}

/// The kernels that route.
#[derive(Debug)]
pub struct Router {
    desc: RouterDesc,
    /// Choices of each expert in every [`WORKGROUP`] tokens, and the sums of their probabilities.
    blocks: Ids,
    sums: Tensor,
    /// Bound where there is no bias.
    no_bias: Tensor,
}

impl Router {
    /// Checks the descriptor and makes scratch; one router serves all layers of its shape.
    pub fn new(ctx: &Context, desc: &RouterDesc) -> Result<Router> {
        desc.validate()?;
        Ok(Router {
            desc: *desc,
            blocks: ctx.zeros_ids(desc.blocks() * desc.experts)?,
            sums: ctx.zeros(DType::F32, desc.blocks(), desc.experts)?,
            no_bias: ctx.zeros(DType::F32, 1, desc.experts)?,
        })
    }

    /// Routes by `logits`, `[T, E]` in f32, and `bias`, `[1, E]` in f32, if the descriptor has one.
    pub fn record(
        &self,
        stream: &mut Stream<'_>,
        logits: &Tensor,
        bias: Option<&Tensor>,
        routes: &mut Routes,
    ) -> Result<()> {
        let operation = "Router::record";
        let RouterDesc { tokens, experts, top_k, .. } = self.desc;
        self.expect(operation, routes)?;
        logits.expect(operation, "logits", [tokens, experts], &[DType::F32])?;
        if bias.is_some() != self.desc.bias {
            return Err(Error::Mismatch {
                operation,
                problem: format!(
                    "a bias was {}, the descriptor says {}",
                    if bias.is_some() { "given" } else { "not given" },
                    self.desc.bias
                ),
            });
        }
        let bias = bias.unwrap_or(&self.no_bias);
        bias.expect(operation, "bias", [1, experts], &[DType::F32])?;
        for data in [&logits.data, &bias.data, &self.sums.data] {
            stream.context().check_same(data, &routes.weights.data)?;
        }
        let factor = self.desc.factor();
        if stream.gpu().is_none() {
            self.choose_on_cpu(logits, bias, routes);
            slots_on_cpu(routes);
            if self.desc.aux != 0.0 {
                let (probs, counts) = (routes.probs.widened(), routes.counts.data.cpu());
                let mut loss = 0.0;
                for (e, count) in counts.iter().enumerate() {
                    let sum: f32 = probs.iter().skip(e).step_by(experts).sum();
                    loss += sum * *count as f32;
                }
                routes.aux.fill_rows(|_, row| row[0] = loss * factor);
            }
            return Ok(());
        }
        let variant = Variant::new(&self.desc);
        let blocks = self.desc.blocks() as u64;
        let Routes { choice, weights, probs, counts, slot_of, token_of, groups, aux, .. } = routes;
        let Some(groups) = groups.binding() else { return Ok(()) };
        stream.dispatch(
            &variant.name(),
            || variant.kernel(),
            &[tokens as u32, experts as u32 / 4],
            &[
                logits.binding()?,
                bias.binding()?,
                choice.binding()?,
                weights.binding()?,
                probs.binding()?,
                self.blocks.binding()?,
                self.sums.binding()?,
            ],
            blocks,
        )?;
        let slots = token_of.len() as u32;
        stream.dispatch(
            &slots_name(top_k as u32),
            || slots_kernel(top_k as u32),
            &[tokens as u32, experts as u32, self.desc.align as u32, slots],
            &[
                choice.binding()?,
                self.blocks.binding()?,
                slot_of.binding()?,
                token_of.binding()?,
                counts.binding()?,
                groups,
            ],
            blocks,
        )?;
        if self.desc.aux != 0.0 {
            stream.dispatch(
                "router_aux",
                aux_kernel,
                &[blocks as u32, experts as u32, factor.to_bits()],
                &[self.sums.binding()?, counts.binding()?, aux.binding()?],
                1,
            )?;
        }
        Ok(())
    }

    /// `dlogits`, `[T, E]` in f32, from `dweights`, `[T, k]` in f32, and from `aux_scale` times the auxiliary loss, if there is
    /// one: 1, or what a micro-batch counts in the step.
    pub fn backward(
        &self,
        stream: &mut Stream<'_>,
        routes: &Routes,
        dweights: &Tensor,
        dlogits: &mut Tensor,
        aux_scale: f32,
    ) -> Result<()> {
        let operation = "Router::backward";
        let RouterDesc { tokens, experts, top_k, .. } = self.desc;
        self.expect(operation, routes)?;
        dweights.expect(operation, "dweights", [tokens, top_k], &[DType::F32])?;
        dlogits.expect(operation, "dlogits", [tokens, experts], &[DType::F32])?;
        for data in [&routes.weights.data, &dweights.data] {
            stream.context().check_same(data, &dlogits.data)?;
        }
        let factor = self.desc.factor() * aux_scale;
        if stream.gpu().is_none() {
            self.backward_on_cpu(routes, dweights, dlogits, factor);
            return Ok(());
        }
        let variant = Variant::new(&self.desc);
        stream.dispatch(
            &variant.backward_name(),
            || variant.backward_kernel(),
            &[tokens as u32, experts as u32 / 4, factor.to_bits()],
            &[
                routes.probs.binding()?,
                routes.choice.binding()?,
                dweights.binding()?,
                routes.counts.binding()?,
                dlogits.binding()?,
            ],
            (tokens as u64).div_ceil(u64::from(BACKWARD_WORKGROUP)),
        )
    }

    /// Moves `bias`, `[1, E]` in f32, by `rate` towards an even load: down where an expert's count is above the mean, up where
    /// it is below. Exact.
    pub fn balance(
        &self,
        stream: &mut Stream<'_>,
        routes: &Routes,
        bias: &mut Tensor,
        rate: f32,
    ) -> Result<()> {
        let operation = "Router::balance";
        let RouterDesc { tokens, experts, top_k, .. } = self.desc;
        self.expect(operation, routes)?;
        bias.expect(operation, "bias", [1, experts], &[DType::F32])?;
        stream.context().check_same(&routes.counts.data, &bias.data)?;
        let all = (tokens * top_k) as u32;
        if stream.gpu().is_none() {
            let counts = routes.counts.data.cpu();
            bias.fill_rows(|_, bias| {
                for (bias, count) in bias.iter_mut().zip(counts) {
                    match (count * experts as u32).cmp(&all) {
                        std::cmp::Ordering::Greater => *bias -= rate,
                        std::cmp::Ordering::Less => *bias += rate,
                        std::cmp::Ordering::Equal => {}
                    }
                }
            });
            return Ok(());
        }
        stream.dispatch(
            "router_balance",
            balance_kernel,
            &[experts as u32, all, rate.to_bits()],
            &[routes.counts.binding()?, bias.binding()?],
            1,
        )
    }

    fn expect(&self, operation: &'static str, routes: &Routes) -> Result<()> {
        if routes.desc != self.desc {
            return Err(Error::Mismatch {
                operation,
                problem: format!(
                    "the routes are for {:?}, the router for {:?}",
                    routes.desc, self.desc
                ),
            });
        }
        Ok(())
    }
}

// ---- The twins -----------------------------------------------------------------------------------------------------

/// Beyond every logit that counts; twice it is still finite.
const LIMIT: f32 = 1e38;

/// A finite number for any float: NaN is the least.
fn finite(x: f32) -> f32 {
    if x.is_nan() { -LIMIT } else { x.clamp(-LIMIT, LIMIT) }
}

fn exp_below(x: f32) -> f32 {
    if x < -87.0 { 0.0 } else { x.exp() }
}

/// Sums of every fourth, and then theirs, as the shaders add.
fn sum_of_quads(terms: impl Iterator<Item = f32>) -> f32 {
    let mut sums = [0.0; 4];
    for (i, term) in terms.enumerate() {
        sums[i % 4] += term;
    }
    (sums[0] + sums[1]) + (sums[2] + sums[3])
}

/// A token's logits and probabilities, and its choice and weights.
type Row<'a> = (&'a [f32], &'a mut [u32]);
type Chosen<'a> = (&'a mut [u32], &'a mut [u32]);

impl Router {
    fn choose_on_cpu(&self, logits: &Tensor, bias: &Tensor, routes: &mut Routes) {
        let RouterDesc { experts, top_k, .. } = self.desc;
        let (logits, bias) = (logits.widened(), bias.widened());
        let run = |((logits, probs), (choice, weights)): (Row<'_>, Chosen<'_>)| {
            self.route(logits, &bias, bytemuck::cast_slice_mut(probs), choice, weights);
        };
        let probs = routes.probs.data.cpu_mut();
        let choice = routes.choice.data.cpu_mut();
        let weights = routes.weights.data.cpu_mut();
        #[cfg(not(target_arch = "wasm32"))]
        {
            use rayon::prelude::*;
            let rows = logits.par_chunks_exact(experts).zip(probs.par_chunks_exact_mut(experts));
            let chosen =
                choice.par_chunks_exact_mut(top_k).zip(weights.par_chunks_exact_mut(top_k));
            rows.zip(chosen).with_min_len(64).for_each(run);
        }
        #[cfg(target_arch = "wasm32")]
        {
            let rows = logits.chunks_exact(experts).zip(probs.chunks_exact_mut(experts));
            let chosen = choice.chunks_exact_mut(top_k).zip(weights.chunks_exact_mut(top_k));
            rows.zip(chosen).for_each(run);
        }
    }

    /// One token.
    fn route(
        &self,
        logits: &[f32],
        bias: &[f32],
        probs: &mut [f32],
        choice: &mut [u32],
        weights: &mut [u32],
    ) {
        let top = logits.iter().map(|x| finite(*x)).fold(-LIMIT, f32::max);
        for (prob, x) in probs.iter_mut().zip(logits) {
            *prob = exp_below(finite(*x) - top);
        }
        let sum = sum_of_quads(probs.iter().copied());
        let mut best = [-3.0 * LIMIT; MAX_TOP_K];
        for (e, x) in logits.iter().enumerate() {
            probs[e] /= sum;
            let score = if self.desc.bias { probs[e] + finite(bias[e]) } else { finite(*x) };
            // Before those that score less, not before its equals.
            let best = &mut best[..choice.len()];
            if let Some(at) = best.iter().position(|best| score > *best) {
                best[at..].rotate_right(1);
                choice[at..].rotate_right(1);
                (best[at], choice[at]) = (score, e as u32);
            }
        }
        let share = match self.desc.renormalize {
            true => choice.iter().map(|e| probs[*e as usize]).sum::<f32>().max(1e-20),
            false => 1.0,
        };
        for (weight, e) in weights.iter_mut().zip(&*choice) {
            *weight = (probs[*e as usize] / share).to_bits();
        }
        if logits.iter().any(|x| x.is_nan()) {
            probs.fill(f32::from_bits(NAN));
            weights.fill(NAN);
        }
    }

    fn backward_on_cpu(
        &self,
        routes: &Routes,
        dweights: &Tensor,
        dlogits: &mut Tensor,
        factor: f32,
    ) {
        let RouterDesc { experts, top_k, renormalize, aux, .. } = self.desc;
        let (probs, dweights) = (routes.probs.widened(), dweights.widened());
        let (choice, counts) = (routes.choice.data.cpu(), routes.counts.data.cpu());
        dlogits.fill_rows(|t, out| {
            let probs = &probs[t * experts..][..experts];
            let choice = &choice[t * top_k..][..top_k];
            let dweights = &dweights[t * top_k..][..top_k];
            let mut d = [0.0; MAX_TOP_K];
            let d = &mut d[..top_k];
            d.copy_from_slice(dweights);
            let prob = |j: usize| probs[choice[j] as usize];
            let mut inner: f32 = (0..top_k).map(|j| prob(j) * d[j]).sum();
            if renormalize {
                let share = (0..top_k).map(prob).sum::<f32>().max(1e-20);
                inner /= share;
                for d in d.iter_mut() {
                    *d = (*d - inner) / share;
                }
                inner = 0.0;
            }
            let of_aux = |e: usize| if aux == 0.0 { 0.0 } else { counts[e] as f32 * factor };
            if aux != 0.0 {
                inner += sum_of_quads((0..experts).map(|e| probs[e] * of_aux(e)));
            }
            for (e, out) in out.iter_mut().enumerate() {
                let mut sum = of_aux(e);
                if let Some(j) = choice.iter().position(|chosen| *chosen as usize == e) {
                    sum += d[j];
                }
                *out = probs[e] * (sum - inner);
            }
        });
    }
}

fn slots_on_cpu(routes: &mut Routes) {
    let RouterDesc { experts, top_k, align, .. } = routes.desc;
    let choice = routes.choice.data.cpu();
    let counts = &mut routes.counts.data.cpu_mut()[..experts];
    counts.fill(0);
    for expert in choice {
        counts[*expert as usize] += 1;
    }
    let offsets = routes.groups.offsets_mut();
    offsets[0] = 0;
    for (e, count) in counts.iter().enumerate() {
        offsets[e + 1] = offsets[e] + count.next_multiple_of(align as u32);
    }
    let mut next = offsets.to_vec();
    let token_of = routes.token_of.data.cpu_mut();
    token_of.fill(NO_TOKEN);
    for (i, (expert, slot)) in choice.iter().zip(routes.slot_of.data.cpu_mut()).enumerate() {
        let free = &mut next[*expert as usize];
        *slot = *free;
        token_of[*free as usize] = (i / top_k) as u32;
        *free += 1;
    }
}

// ---- The shaders ---------------------------------------------------------------------------------------------------

/// Fewer than in the other kernels: many workgroups even with few tokens.
const BACKWARD_WORKGROUP: u32 = 64;

#[derive(Clone, Copy, Debug)]
struct Variant {
    top_k: u32,
    renormalize: bool,
    bias: bool,
    aux: bool,
}

impl Variant {
    fn new(desc: &RouterDesc) -> Variant {
        Variant {
            top_k: desc.top_k as u32,
            renormalize: desc.renormalize,
            bias: desc.bias,
            aux: desc.aux != 0.0,
        }
    }

    fn name(&self) -> String {
        let bias = if self.bias { ".bias" } else { "" };
        format!("router.{}{bias}", self.options())
    }

    fn backward_name(&self) -> String {
        format!("router_backward.{}", self.options())
    }

    fn options(&self) -> String {
        let renormalize = if self.renormalize { ".renormalized" } else { "" };
        format!("top{}{renormalize}{}", self.top_k, if self.aux { ".aux" } else { "" })
    }

    fn source(&self, workgroup: u32) -> Source {
        Source::new()
            .constant("WG", workgroup)
            .constant("TOPK", self.top_k)
            .flag("RENORMALIZE", self.renormalize)
            .flag("AUX", self.aux)
    }

    fn kernel(&self) -> Kernel {
        let source = self.source(WORKGROUP).flag("BIASED", self.bias);
        kernel(self.name(), source.fragment(shader!("router.wgsl")), WORKGROUP, 2, 5)
    }

    fn backward_kernel(&self) -> Kernel {
        let source = self.source(BACKWARD_WORKGROUP).fragment(shader!("router_backward.wgsl"));
        kernel(self.backward_name(), source, BACKWARD_WORKGROUP, 4, 1)
    }
}

fn slots_name(top_k: u32) -> String {
    format!("router_slots.top{top_k}")
}

fn slots_kernel(top_k: u32) -> Kernel {
    let source = Source::new()
        .constant("WG", WORKGROUP)
        .constant("TOPK", top_k)
        .constant("GROUP_OFFSETS", GROUP_OFFSETS as u32)
        .fragment(shader!("router_slots.wgsl"));
    kernel(slots_name(top_k), source, WORKGROUP, 2, 4)
}

fn aux_kernel() -> Kernel {
    let source = Source::new().constant("WG", WORKGROUP).fragment(shader!("router_aux.wgsl"));
    kernel("router_aux".into(), source, WORKGROUP, 2, 1)
}

fn balance_kernel() -> Kernel {
    let source = Source::new().constant("WG", WORKGROUP).fragment(shader!("router_balance.wgsl"));
    kernel("router_balance".into(), source, WORKGROUP, 1, 1)
}

/// A kernel with this many bindings that are read, and then written.
fn kernel(
    name: String,
    source: Source,
    workgroup_size: u32,
    reads: usize,
    writes: usize,
) -> Kernel {
    let mut bindings = vec![Binding::Params];
    bindings.extend([Binding::Read].repeat(reads));
    bindings.extend([Binding::Write].repeat(writes));
    Kernel {
        name,
        wgsl: source.build(),
        bindings,
        workgroup_size,
        features: wgpu::Features::empty(),
        spirv: false,
    }
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    let mut kernels = vec![aux_kernel(), balance_kernel()];
    for top_k in 1..=MAX_TOP_K as u32 {
        kernels.push(slots_kernel(top_k));
        for flags in 0..4 {
            let (renormalize, aux) = (flags & 1 != 0, flags & 2 != 0);
            let variant = |bias| Variant { top_k, renormalize, bias, aux };
            kernels.extend([variant(false).kernel(), variant(true).kernel()]);
            kernels.push(variant(false).backward_kernel());
        }
    }
    kernels
}
