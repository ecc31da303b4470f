//! A decoder transformer over bytes, with explicit forward and backward passes.
//!
//! ```text
//! s = embedding(tokens)
//! block:  s += out(attention(rope(qkv(norm(s)))))      s += down(swiglu(gate_up(norm(s))))
//! logits = head(norm(s))
//! ```
//!
//! Pre-norm (RMSNorm), rotary positions, causal attention, SwiGLU, no biases; the head is not tied to the embedding. With
//! `mtp` extra heads, each is a block of its own on the trunk's output, with its own norm and the shared head, and
//! predicts one token further (Gloeckle et al., arXiv 2404.19737).
//!
//! The residual stream and its gradient are f32 `[T, dim]`, T = batch · seq tokens; what lies between kernels is of the
//! recipe's `activations`. Kept for backward: the residual stream at both norms, qkv, attention's output, gate and up (whose
//! gradient takes their place), and what each linear layer keeps of its input, packed where wgrad reads it packed. All
//! else is made and used up within a block, in memory that the blocks share.

use crate::engine::buffer::{DType, Ids, Tensor};
use crate::engine::{Context, Stream};
use crate::kernels::adamw::{AdamW, AdamWDesc, AdamWState, StepScalars};
use crate::kernels::cross_entropy::{IGNORED, cross_entropy};
use crate::kernels::embedding::{self, EmbeddingGradient};
use crate::kernels::oscillation::{Action, Oscillation};
use crate::kernels::reduce::Reduce;
use crate::kernels::rmsnorm::RmsNorm;
use crate::kernels::rope::{Direction, Rope};
use crate::kernels::router::{Router, RouterDesc, Routes};
use crate::kernels::{
    Attention, AttentionDesc, Dequantize, DequantizeDesc, add, permute, quantize_both, swiglu,
};
use crate::rng;
use crate::{Error, Result};

use super::linear::{Draws, LinearDesc, MxLinear, Scratch, Step};
use super::recipe::Recipe;

/// The sizes of a model and of its batch.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelDesc {
    /// Tokens that there are.
    pub vocabulary: usize,
    /// Columns of the residual stream.
    pub dim: usize,
    /// Blocks.
    pub layers: usize,
    /// Heads of attention.
    pub heads: usize,
    /// Columns of the feed-forward part.
    pub ffn: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Sequences of a step.
    pub batch: usize,
    /// Tokens predicted beyond the next one.
    pub mtp: usize,
    /// A mixture of experts in place of the feed-forward part.
    pub experts: Option<Experts>,
}

/// A mixture of experts: each token goes to the best `top_k`, none is dropped. `ffn` is an expert's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    /// How many: a multiple of 4.
    pub count: usize,
    /// Experts of a token.
    pub top_k: usize,
}

/// The weight of all extra heads' losses together.
const MTP_WEIGHT: f32 = 0.3;
/// How far a step moves an expert's bias.
const BALANCE: f32 = 1e-3;
const EPS: f32 = 1e-5;
const ROPE_BASE: f64 = 10_000.0;

impl ModelDesc {
    /// `tiny`, `small`, `10m`, `30m`, `moe`.
    pub fn preset(name: &str) -> Option<ModelDesc> {
        let desc = |dim, layers, heads, ffn, seq, batch| ModelDesc {
            vocabulary: 256,
            dim,
            layers,
            heads,
            ffn,
            seq,
            batch,
            mtp: 0,
            experts: None,
        };
        Some(match name {
            "tiny" => desc(128, 2, 4, 384, 128, 16),
            "small" => desc(256, 4, 4, 768, 256, 16),
            "10m" => desc(384, 6, 6, 1024, 512, 64),
            "30m" => desc(640, 6, 10, 1792, 512, 64),
            "moe" => ModelDesc {
                experts: Some(Experts { count: 8, top_k: 2 }),
                ..desc(256, 4, 4, 384, 256, 16)
            },
            _ => return None,
        })
    }

    /// Tokens of a step.
    pub fn tokens(&self) -> usize {
        self.batch * self.seq
    }

    /// Parameters.
    pub fn parameters(&self) -> usize {
        let experts = self.experts.map_or(1, |experts| experts.count);
        let router = self.experts.map_or(0, |experts| experts.count * self.dim);
        let block =
            4 * self.dim * self.dim + experts * 3 * self.dim * self.ffn + router + 2 * self.dim;
        2 * self.vocabulary * self.dim
            + (self.layers + self.mtp) * block
            + (1 + self.mtp) * self.dim
    }

    /// Checks the sizes.
    pub fn validate(&self) -> Result<()> {
        let wrong = |problem| Err(Error::Mismatch { operation: "ModelDesc", problem });
        let ModelDesc { vocabulary, dim, layers, heads, ffn, seq, batch, .. } = *self;
        if [vocabulary, dim, layers, heads, ffn, seq, batch].contains(&0) {
            return wrong("every size but mtp is at least one".into());
        }
        if !vocabulary.is_multiple_of(4) {
            return wrong(format!("vocabulary is {vocabulary}, expected a multiple of 4"));
        }
        if !dim.is_multiple_of(heads) || !(dim / heads).is_multiple_of(8) || dim / heads < 16 {
            return wrong(format!(
                "dim {dim} by {heads} heads: a multiple of 8, at least 16, expected for each"
            ));
        }
        for (name, size) in [("dim", dim), ("ffn", ffn), ("batch · seq", batch * seq)] {
            if !size.is_multiple_of(32) {
                return wrong(format!("{name} is {size}, expected a multiple of 32"));
            }
        }
        Ok(())
    }
}

/// A parameter, its gradient, and its optimizer's state.
#[derive(Debug)]
pub struct Param {
    /// Its name, as in a checkpoint.
    pub name: String,
    /// The master weight.
    pub value: Tensor,
    /// f32, times the loss scale.
    pub grad: Tensor,
    /// The optimizer.
    pub adam: AdamW,
    /// Its moments.
    pub state: AdamWState,
    /// Whether weight decay applies: to matrices, not to gains and embeddings.
    pub decay: bool,
}

/// The index of a parameter.
type Id = usize;

/// A block, and what it keeps for backward.
#[derive(Debug)]
struct Block {
    norm1: Id,
    qkv: (Id, MxLinear),
    out: (Id, MxLinear),
    norm2: Id,
    gate_up: (Id, MxLinear),
    down: (Id, MxLinear),
    /// The residual stream at the norms.
    s1: Tensor,
    s2: Tensor,
    rstd1: Tensor,
    rstd2: Tensor,
    attended: Tensor,
    lse: Tensor,
    rotated: Tensor,
    gu: Tensor,
    /// Inputs of qkv, gate_up and down, where they are kept as they are.
    y1: Option<Tensor>,
    y2: Option<Tensor>,
    h: Option<Tensor>,
    /// With experts: then y2, gu and h have a row a slot, not a token.
    routed: Option<Routed>,
}

/// The router of a block, and what it keeps.
#[derive(Debug)]
struct Routed {
    router: (Id, MxLinear),
    /// Added to the probabilities for the choice, and moved towards an even load (DeepSeek-V3's balancing).
    bias: Tensor,
    routes: Routes,
    /// The router's input.
    y: Tensor,
    /// The experts' outputs, a row a slot.
    ys: Tensor,
}

/// What the blocks with experts share.
#[derive(Debug)]
struct RoutedShared {
    router: Router,
    logits: Tensor,
    dlogits: Tensor,
    dweights: Tensor,
    /// In forward the experts' input, where nothing keeps it.
    dxs: Tensor,
    dys: Tensor,
    /// The gradient of the router's input.
    dy: Tensor,
}

/// What the blocks share.
#[derive(Debug)]
struct Shared {
    norm: RmsNorm,
    rope: Rope,
    attention: Attention,
    embedding: EmbeddingGradient,
    reduce: Reduce,
    /// The output of the last part of a block, not yet in the residual stream; in backward attention's gradient.
    f: Tensor,
    /// Gradients: of the residual stream, and of what lies between kernels. In forward `dy` and `dh` are the activations
    /// themselves, where nothing keeps them.
    ds: Tensor,
    dy: Tensor,
    dh: Tensor,
    dqkv: Tensor,
    dlogits: Tensor,
    logits: Tensor,
    losses: Tensor,
    /// With extra heads: the gradient of the trunk's output, of all of them.
    dtrunk: Option<Tensor>,
    experts: Option<RoutedShared>,
}

/// A head: the norm before it and what it keeps.
#[derive(Debug)]
struct Head {
    norm: Id,
    linear: MxLinear,
    /// The residual stream at the norm.
    s: Tensor,
    rstd: Tensor,
    y: Tensor,
    targets: Ids,
    /// Mean over the targets.
    loss: Tensor,
}

/// The counters of one step's quantizers, see [`quantize_both::COUNTERS`].
#[derive(Debug)]
pub struct Counters {
    /// Of activations, along rows and columns.
    pub x: Ids,
    /// Of gradients.
    pub dy: Ids,
}

/// A model on an engine.
#[derive(Debug)]
pub struct Model {
    ctx: Context,
    desc: ModelDesc,
    /// All parameters.
    pub params: Vec<Param>,
    embedding: Id,
    head: Id,
    blocks: Vec<Block>,
    /// The main head, then the extra ones, each with a block.
    heads: Vec<Head>,
    extra: Vec<Block>,
    shared: Shared,
    /// What the linear layers share.
    scratch: Scratch,
    tokens: Ids,
    /// The step's counters.
    pub counters: Counters,
    /// Of the weights that are packed for forward, if the recipe resets those that oscillate.
    oscillations: Vec<(Id, Oscillation)>,
    /// For their quantized values, one of each shape.
    quantized: Vec<Tensor>,
}

/// Makes parameters in order.
struct Maker<'a> {
    ctx: &'a Context,
    desc: &'a ModelDesc,
    recipe: &'a Recipe,
    seed: u64,
    params: Vec<Param>,
    layers: u32,
    scratch: Scratch,
}

impl Maker<'_> {
    /// Normal with this deviation; 0: ones.
    fn param(
        &mut self,
        name: String,
        shape: [usize; 2],
        deviation: f64,
        decay: bool,
    ) -> Result<Id> {
        let index = self.params.len();
        let [rows, cols] = shape;
        let o = &self.recipe.optimizer;
        let adam = AdamWDesc {
            // Gains are few, and their kernels take f32.
            master: if rows == 1 { DType::F32 } else { self.master() },
            moments: o.moments.into(),
            beta1: o.beta1,
            beta2: o.beta2,
            eps: o.eps,
            index: index as u32,
            ..AdamWDesc::new(rows, cols)
        };
        let values = normal(self.seed, index as u32, rows * cols, deviation);
        let bytes: Vec<u8> = match adam.master {
            DType::BF16 => {
                values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
            }
            _ => bytemuck::cast_slice(&values).to_vec(),
        };
        self.params.push(Param {
            name,
            value: self.ctx.upload(adam.master, rows, cols, &bytes)?,
            grad: self.ctx.zeros(DType::F32, rows, cols)?,
            state: AdamWState::new(self.ctx, &adam)?,
            adam: AdamW::new(self.ctx, &adam)?,
            decay,
        });
        Ok(index)
    }

    fn gain(&mut self, name: String) -> Result<Id> {
        self.param(name, [1, self.desc.dim], 0.0, false)
    }

    fn act(&self) -> DType {
        self.recipe.activations.into()
    }

    fn master(&self) -> DType {
        self.recipe.optimizer.master.into()
    }

    fn linear(&mut self, name: &str, desc: LinearDesc, accumulate: bool) -> Result<MxLinear> {
        self.layers += 1;
        let (recipe, scratch) = (self.recipe.layer(name), &mut self.scratch);
        MxLinear::new(self.ctx, &desc, recipe, self.layers, accumulate, scratch)
            .map_err(|error| Error::Recipe(format!("{name}: {error}")))
    }

    /// What a router of this block needs.
    fn router(&self, name: &str) -> Option<RouterDesc> {
        let Experts { count, top_k } = self.desc.experts?;
        // Blocks and transforms along the slots do not cross experts.
        let casts = ["gate_up", "down"].map(|layer| {
            let wgrad = &self.recipe.layer(&format!("{name}.experts.{layer}")).wgrad;
            [wgrad.x.length(), wgrad.dy.length()]
        });
        let align = casts.into_iter().flatten().max().unwrap_or(0).max(32);
        Some(RouterDesc {
            tokens: self.desc.tokens(),
            experts: count,
            top_k,
            bias: true,
            align,
            ..Default::default()
        })
    }

    fn block(&mut self, name: &str) -> Result<Block> {
        let ModelDesc { dim, ffn, layers, heads, experts, .. } = *self.desc;
        let (t, act, ctx, master) = (self.desc.tokens(), self.act(), self.ctx, self.master());
        let inner = 0.02 / (2.0 * layers as f64).sqrt();
        let router = self.router(name);
        let (count, rows, prefix) = match (experts, &router) {
            (Some(experts), Some(router)) => (experts.count, router.slots(), "experts."),
            _ => (1, t, ""),
        };
        let norm1 = self.gain(format!("{name}.norm1"))?;
        let qkv = self.param(format!("{name}.qkv"), [3 * dim, dim], 0.02, true)?;
        let out = self.param(format!("{name}.out"), [dim, dim], inner, true)?;
        let norm2 = self.gain(format!("{name}.norm2"))?;
        let (gate_up_name, down_name) =
            (format!("{name}.{prefix}gate_up"), format!("{name}.{prefix}down"));
        let gate_up = self.param(gate_up_name.clone(), [count * 2 * ffn, dim], 0.02, true)?;
        let down = self.param(down_name.clone(), [count * dim, ffn], inner, true)?;
        let plain = |n, k| LinearDesc {
            rows: t,
            n,
            k,
            x: act,
            w: master,
            y: act,
            dy: act,
            dx: act,
            experts: None,
        };
        // The gradient of the residual stream is f32.
        let f32s = |n, k| LinearDesc { dy: DType::F32, ..plain(n, k) };
        let grouped = |desc: LinearDesc| match experts {
            None => desc,
            Some(experts) => LinearDesc { rows, dy: act, experts: Some(experts.count), ..desc },
        };
        let qkv = (qkv, self.linear(&format!("{name}.qkv"), plain(3 * dim, dim), false)?);
        let out = (out, self.linear(&format!("{name}.out"), f32s(dim, dim), false)?);
        let gate_up = (gate_up, self.linear(&gate_up_name, grouped(plain(2 * ffn, dim)), false)?);
        let down = (down, self.linear(&down_name, grouped(f32s(dim, ffn)), false)?);
        let routed = match router {
            None => None,
            Some(desc) => {
                let id = self.param(format!("{name}.router"), [count, dim], 0.02, true)?;
                let linear = LinearDesc { y: DType::F32, ..f32s(count, dim) };
                Some(Routed {
                    router: (id, self.linear(&format!("{name}.router"), linear, false)?),
                    bias: ctx.zeros(DType::F32, 1, count)?,
                    routes: Routes::new(ctx, &desc)?,
                    y: ctx.zeros(act, t, dim)?,
                    ys: ctx.zeros(act, rows, dim)?,
                })
            }
        };
        Ok(Block {
            norm1,
            norm2,
            s1: ctx.zeros(DType::F32, t, dim)?,
            s2: ctx.zeros(DType::F32, t, dim)?,
            rstd1: ctx.zeros(DType::F32, t, 1)?,
            rstd2: ctx.zeros(DType::F32, t, 1)?,
            attended: ctx.zeros(act, t, dim)?,
            lse: ctx.zeros(DType::F32, t, heads)?,
            rotated: ctx.zeros(act, t, 3 * dim)?,
            gu: ctx.zeros(act, rows, 2 * ffn)?,
            y1: qkv.1.x_to_keep(ctx)?,
            y2: gate_up.1.x_to_keep(ctx)?,
            h: down.1.x_to_keep(ctx)?,
            qkv,
            out,
            gate_up,
            down,
            routed,
        })
    }

    fn head(&mut self, name: &str, accumulate: bool) -> Result<Head> {
        let ModelDesc { dim, vocabulary, .. } = *self.desc;
        let (t, act) = (self.desc.tokens(), self.act());
        let norm = self.gain(format!("{name}.norm"))?;
        let desc = LinearDesc {
            rows: t,
            n: vocabulary,
            k: dim,
            x: act,
            w: self.master(),
            y: DType::F32,
            dy: DType::F32,
            dx: act,
            experts: None,
        };
        Ok(Head {
            norm,
            linear: self.linear("head", desc, accumulate)?,
            s: self.ctx.zeros(DType::F32, t, dim)?,
            rstd: self.ctx.zeros(DType::F32, t, 1)?,
            y: self.ctx.zeros(act, t, dim)?,
            targets: self.ctx.zeros_ids(t)?,
            loss: self.ctx.zeros(DType::F32, 1, 1)?,
        })
    }
}

/// Normal numbers of a parameter: Box–Muller on the crate's generator; ones for a deviation of zero.
fn normal(seed: u64, index: u32, len: usize, deviation: f64) -> Vec<f32> {
    if deviation == 0.0 {
        return vec![1.0; len];
    }
    let key = [seed as u32, (seed >> 32) as u32, index, 0x696e_6974];
    let pair = |a: u32, b: u32| {
        let radius = (-2.0 * ((f64::from(a) + 0.5) / 4_294_967_296.0).ln()).sqrt();
        let angle = std::f64::consts::TAU * (f64::from(b) / 4_294_967_296.0);
        [radius * angle.cos(), radius * angle.sin()]
    };
    let mut values = Vec::with_capacity(len + 3);
    for i in 0..len.div_ceil(4) {
        let words = rng::threefry4x32::<{ rng::ROUNDS }>([i as u32, 0, 0, 0], key);
        for [a, b] in [[words[0], words[1]], [words[2], words[3]]] {
            values.extend(pair(a, b).map(|v| (v * deviation) as f32));
        }
    }
    values.truncate(len);
    values
}

/// What a pass is for.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// Random bits.
    pub draws: Draws,
    /// Whether the quantizers count.
    pub count: bool,
}

impl Model {
    /// Makes a model with fresh weights, which depend on the seed alone.
    pub fn new(ctx: &Context, desc: &ModelDesc, recipe: &Recipe, seed: u64) -> Result<Model> {
        desc.validate()?;
        recipe.validate()?;
        let (params, scratch) = (Vec::new(), Scratch::default());
        let mut maker = Maker { ctx, desc, recipe, seed, params, layers: 0, scratch };
        let ModelDesc { vocabulary, dim, ffn, seq, batch, heads, .. } = *desc;
        let (t, act) = (desc.tokens(), maker.act());
        let embedding = maker.param("embedding".into(), [vocabulary, dim], 0.02, false)?;
        let blocks =
            (0..desc.layers).map(|i| maker.block(&format!("blocks.{i}"))).collect::<Result<_>>()?;
        let extra =
            (0..desc.mtp).map(|i| maker.block(&format!("mtp.{i}"))).collect::<Result<_>>()?;
        let head = maker.param("head".into(), [vocabulary, dim], 0.02, true)?;
        let mut all = vec![maker.head("final", false)?];
        for i in 0..desc.mtp {
            all.push(maker.head(&format!("mtp.{i}.final"), true)?);
        }
        let zeros = |dtype, cols| ctx.zeros(dtype, t, cols);
        let router = maker.router("blocks.0");
        let rows = router.map_or(t, |router| router.slots());
        let slots = |cols| ctx.zeros(act, rows, cols);
        let head_dim = dim / heads;
        let shared = Shared {
            norm: RmsNorm::new(ctx, t, dim, EPS)?,
            rope: Rope::new(ctx, seq, head_dim, ROPE_BASE)?,
            attention: Attention::new(ctx, &AttentionDesc { batch, seq, heads, head_dim })?,
            embedding: EmbeddingGradient::new(ctx, t, vocabulary, dim)?,
            reduce: Reduce::new(ctx, t)?,
            f: zeros(act, dim)?,
            ds: zeros(DType::F32, dim)?,
            dy: zeros(act, dim)?,
            dh: slots(ffn)?,
            dqkv: zeros(act, 3 * dim)?,
            dlogits: zeros(DType::F32, vocabulary)?,
            logits: zeros(DType::F32, vocabulary)?,
            losses: zeros(DType::F32, 1)?,
            dtrunk: match desc.mtp {
                0 => None,
                _ => Some(zeros(DType::F32, dim)?),
            },
            experts: match router {
                None => None,
                Some(desc) => Some(RoutedShared {
                    router: Router::new(ctx, &desc)?,
                    logits: zeros(DType::F32, desc.experts)?,
                    dlogits: zeros(DType::F32, desc.experts)?,
                    dweights: zeros(DType::F32, desc.top_k)?,
                    dxs: slots(dim)?,
                    dys: slots(dim)?,
                    dy: zeros(act, dim)?,
                }),
            },
        };
        let mut model = Model {
            ctx: ctx.clone(),
            desc: desc.clone(),
            params: maker.params,
            embedding,
            head,
            blocks,
            heads: all,
            extra,
            shared,
            scratch: maker.scratch,
            tokens: ctx.zeros_ids(t)?,
            counters: Counters {
                x: ctx.zeros_ids(quantize_both::COUNTERS)?,
                dy: ctx.zeros_ids(quantize_both::COUNTERS)?,
            },
            oscillations: Vec::new(),
            quantized: Vec::new(),
        };
        if recipe.oscillation.is_some() {
            let packed = model.linears().filter(|(_, linear)| linear.packed_weight().is_some());
            let ids: Vec<Id> = packed.map(|(id, _)| id).collect();
            for id in ids {
                let [rows, cols] = model.params[id].value.shape();
                model.oscillations.push((id, Oscillation::new(ctx, rows, cols)?));
                if model.quantized.iter().all(|q| q.shape() != [rows, cols]) {
                    model.quantized.push(ctx.zeros(DType::F32, rows, cols)?);
                }
            }
        }
        Ok(model)
    }

    /// The sizes.
    pub fn desc(&self) -> &ModelDesc {
        &self.desc
    }

    /// The linear layers, with the indices of their weights. Extra heads, which share the main one's, are left out.
    pub fn linears(&self) -> impl Iterator<Item = (usize, &MxLinear)> {
        let blocks = self.blocks.iter().chain(&self.extra);
        blocks
            .flat_map(|Block { qkv, out, gate_up, down, .. }| [qkv, out, gate_up, down])
            .map(|(id, linear)| (*id, linear))
            .chain([(self.head, &self.heads[0].linear)])
    }

    /// Every linear layer, routers and extra heads included.
    fn linears_mut(&mut self) -> impl Iterator<Item = (Id, &mut MxLinear)> {
        all_linears(&mut self.blocks, &mut self.extra, &mut self.heads, self.head)
    }

    /// Each linear layer's tiers, by name.
    pub fn tiers(&self) -> Vec<(String, [crate::Tier; 3])> {
        let name = |id: Id| self.params[id].name.clone();
        self.linears().map(|(id, linear)| (name(id), linear.tiers())).collect()
    }

    /// Lets the linear layers keep copies of their operands from now on, to be measured: see [`super::tune`].
    pub fn keep_operands(&mut self) -> Result<()> {
        let ctx = self.ctx.clone();
        self.linears_mut().try_for_each(|(_, linear)| linear.keep_operands(&ctx))
    }

    /// Lets the linear layers do what this recipe says from now on; weights are to be prepared again. Nothing else of
    /// the recipe is taken. Experts' slots stay as they are padded: for no longer blocks or transforms than there were.
    pub fn set_linears(&mut self, recipe: &Recipe) -> Result<()> {
        let Model { ctx, params, blocks, extra, heads, head, scratch, .. } = self;
        for (id, linear) in all_linears(blocks, extra, heads, *head) {
            let recipe = recipe.layer(&params[id].name);
            if recipe != linear.recipe() {
                *linear = linear.with_recipe(ctx, recipe, scratch)?;
            }
        }
        for Block { qkv, gate_up, down, y1, y2, h, .. } in blocks.iter_mut().chain(extra) {
            for (kept, (_, linear)) in [(y1, qkv), (y2, gate_up), (h, down)] {
                if kept.is_some() != linear.keeps_x() {
                    *kept = linear.x_to_keep(ctx)?;
                }
            }
        }
        Ok(())
    }

    /// Records how far the packed weights went, and resets those that oscillate; then they are to be prepared again. Nothing
    /// without the recipe's `oscillation`, or where forward is dense.
    pub fn oscillate(
        &mut self,
        stream: &mut Stream<'_>,
        action: Action,
        threshold: f32,
    ) -> Result<()> {
        let Model { ctx, params, blocks, extra, heads, head, oscillations, quantized, .. } = self;
        for (id, linear) in all_linears(blocks, extra, &mut heads[..1], *head) {
            let state = oscillations.iter_mut().find(|(of, _)| *of == id);
            let Some(((_, state), w)) = state.zip(linear.packed_weight()) else { continue };
            let value = &mut params[id].value;
            let Some(q) = quantized.iter_mut().find(|q| q.shape() == value.shape()) else {
                continue;
            };
            let desc = DequantizeDesc { spec: w.layout().spec, axis: w.layout().axis };
            Dequantize::new(ctx, &desc)?.record(stream, w, q)?;
            state.record(stream, action, threshold, value, q)?;
        }
        Ok(())
    }

    /// The paths of weights that may oscillate, with the indices of these.
    pub fn oscillations(&self) -> impl Iterator<Item = (usize, &Oscillation)> {
        self.oscillations.iter().map(|(id, state)| (*id, state))
    }

    /// The same, to be written.
    pub fn oscillations_mut(&mut self) -> impl Iterator<Item = (usize, &mut Oscillation)> {
        self.oscillations.iter_mut().map(|(id, state)| (*id, state))
    }

    /// Uploads a batch `[batch, seq + 1 + mtp]` of tokens: inputs and, for every head, targets.
    pub fn set_batch(&mut self, tokens: &[u32]) -> Result<()> {
        let ModelDesc { seq, batch, mtp, .. } = self.desc;
        let window = seq + 1 + mtp;
        if tokens.len() != batch * window {
            return Err(Error::Mismatch {
                operation: "Model::set_batch",
                problem: format!("{} tokens, expected [{batch}, {window}]", tokens.len()),
            });
        }
        let from = |offset: usize| -> Vec<u32> {
            tokens.chunks(window).flat_map(|w| w[offset..offset + seq].to_vec()).collect()
        };
        let ctx = self.ctx.clone();
        self.tokens.write(&ctx, &from(0))?;
        for (i, head) in self.heads.iter_mut().enumerate() {
            head.targets.write(&ctx, &from(i + 1))?;
        }
        Ok(())
    }

    /// Uploads inputs `[batch, seq]` alone, to read logits: there are no targets.
    pub fn set_inputs(&mut self, tokens: &[u32]) -> Result<()> {
        let ctx = self.ctx.clone();
        self.tokens.write(&ctx, tokens)?;
        for head in &mut self.heads {
            head.targets.write(&ctx, &vec![IGNORED; self.desc.tokens()])?;
        }
        Ok(())
    }

    /// The logits of the last pass without a backward one, `[T, vocabulary]` f32.
    pub fn logits(&self) -> &Tensor {
        &self.shared.logits
    }

    /// The mean losses of the last pass, a head each, `[1, 1]` f32.
    pub fn losses(&self) -> impl Iterator<Item = &Tensor> {
        self.heads.iter().map(|head| &head.loss)
    }

    /// What a run keeps besides parameters: the routers' biases, `[1, experts]` f32 each, by name.
    pub fn biases(&self) -> impl Iterator<Item = (String, &Tensor)> {
        let routed = self.blocks.iter().chain(&self.extra).filter_map(|b| b.routed.as_ref());
        routed.map(|r| (format!("{}.bias", self.params[r.router.0].name), &r.bias))
    }

    /// The same, to be written.
    pub fn biases_mut(&mut self) -> impl Iterator<Item = (String, &mut Tensor)> {
        let params = &self.params;
        let routed =
            self.blocks.iter_mut().chain(&mut self.extra).filter_map(|b| b.routed.as_mut());
        routed.map(|r| (format!("{}.bias", params[r.router.0].name), &mut r.bias))
    }

    /// Records a step of the optimizer, and the packing of what it has just written for the forward products: then
    /// [`Model::prepare`] has the rest to do. `norm` is [`crate::kernels::GradientNorm`]'s.
    pub fn update(
        &mut self,
        stream: &mut Stream<'_>,
        norm: &Tensor,
        scalars: impl Fn(&Param) -> StepScalars,
    ) -> Result<()> {
        let Model { params, blocks, extra, heads, head, .. } = self;
        let mut firsts: Vec<_> = params.iter().map(|_| None).collect();
        for (id, linear) in all_linears(blocks, extra, heads, *head) {
            firsts[id].get_or_insert(linear);
        }
        for (p, linear) in params.iter_mut().zip(firsts) {
            let scalars = scalars(p);
            let Param { adam, grad, value, state, .. } = p;
            match linear.and_then(MxLinear::packing) {
                Some((desc, packed)) => adam
                    .record_quantized(stream, &scalars, grad, norm, value, state, &desc, packed)?,
                None => adam.record(stream, &scalars, grad, norm, value, state)?,
            }
        }
        Ok(())
    }

    /// Records the packing of all weights, after they changed. `updated`: by [`Model::update`], and by nothing since.
    pub fn prepare(&mut self, stream: &mut Stream<'_>, draws: Draws, updated: bool) -> Result<()> {
        let Model { params, blocks, extra, heads, head, .. } = self;
        // Extra heads have the main one's weight: it is packed for the first of a weight's layers.
        let mut packed = vec![updated; params.len()];
        all_linears(blocks, extra, heads, *head).try_for_each(|(id, linear)| {
            let packed = std::mem::take(&mut packed[id]);
            linear.prepare(stream, &params[id].value, draws, packed)
        })
    }

    /// Records a forward pass over the batch, for the main head's loss. With `scale`, all heads' losses and a backward pass as
    /// well: gradients are those of `scale` times the mean loss (plus the extra heads').
    pub fn record(
        &mut self,
        stream: &mut Stream<'_>,
        pass: Pass,
        scale: Option<f32>,
    ) -> Result<()> {
        if pass.count {
            stream.clear_ids(&mut self.counters.x)?;
            stream.clear_ids(&mut self.counters.dy)?;
        }
        let Model { params, blocks, extra, heads, shared, tokens, counters, desc, .. } = self;
        let head = self.head;
        embedding::forward(stream, tokens, &params[self.embedding].value, &mut blocks[0].s1)?;
        for l in 0..blocks.len() {
            let (before, rest) = blocks.split_at_mut(l);
            let s = before.last().map(|block| &block.s2);
            rest[0].forward(stream, params, shared, s, pass, &mut counters.x)?;
        }
        let (main, others) = heads.split_at_mut(1);
        let main = &mut main[0];
        let last = &blocks[blocks.len() - 1].s2;
        let each = scale.map(|scale| scale / desc.tokens() as f32);
        main.forward(stream, params, head, shared, last, pass, &mut counters.x, each)?;
        let Some(each) = each else { return Ok(()) };
        main.backward(stream, params, head, shared, pass, &mut counters.dy)?;
        if let Some(trunk) = &mut shared.dtrunk {
            add::cast(stream, &shared.ds, trunk)?;
        }
        let each = each * MTP_WEIGHT / others.len().max(1) as f32;
        for (block, other) in extra.iter_mut().zip(others) {
            add::cast(stream, &main.s, &mut block.s1)?;
            block.forward(stream, params, shared, None, pass, &mut counters.x)?;
            other.forward(
                stream,
                params,
                head,
                shared,
                &block.s2,
                pass,
                &mut counters.x,
                Some(each),
            )?;
            other.backward(stream, params, head, shared, pass, &mut counters.dy)?;
            block.backward(stream, params, shared, pass, &mut counters.dy)?;
            if let Some(trunk) = &mut shared.dtrunk {
                add::add(stream, &shared.ds, trunk)?;
            }
        }
        if let Some(trunk) = &shared.dtrunk {
            add::cast(stream, trunk, &mut shared.ds)?;
        }
        for block in blocks.iter_mut().rev() {
            block.backward(stream, params, shared, pass, &mut counters.dy)?;
        }
        let table = &mut params[self.embedding].grad;
        shared.embedding.record(stream, tokens, &shared.ds, table, false)
    }
}

/// Every linear layer of these, with the indices of their weights.
fn all_linears<'a>(
    blocks: &'a mut [Block],
    extra: &'a mut [Block],
    heads: &'a mut [Head],
    head: Id,
) -> impl Iterator<Item = (Id, &'a mut MxLinear)> {
    let of_block = |block: &'a mut Block| {
        let Block { qkv, out, gate_up, down, routed, .. } = block;
        let router = routed.as_mut().map(|routed| &mut routed.router);
        [qkv, out, gate_up, down].into_iter().chain(router).map(|(id, linear)| (*id, linear))
    };
    let heads = heads.iter_mut().map(move |of| (head, &mut of.linear));
    blocks.iter_mut().chain(extra).flat_map(of_block).chain(heads)
}

/// What a layer is told.
fn step(pass: Pass, counters: &mut Ids) -> Step<'_> {
    Step { draws: pass.draws, counters: pass.count.then_some(counters), groups: None }
}

impl Block {
    /// From the residual stream `s` and what is not yet in it, `shared.f`; or from `s1`. Leaves `s2` and a new `shared.f`.
    fn forward(
        &mut self,
        stream: &mut Stream<'_>,
        params: &[Param],
        shared: &mut Shared,
        s: Option<&Tensor>,
        pass: Pass,
        counters: &mut Ids,
    ) -> Result<()> {
        let Shared { norm, rope, attention, dy: y, dh: h, f, experts, .. } = shared;
        let value = |id: Id| &params[id].value;
        let y1 = self.y1.as_mut().unwrap_or(y);
        match s {
            Some(s) => {
                let branch = Some((&*f, &mut self.s1));
                norm.forward(stream, s, branch, value(self.norm1), y1, &mut self.rstd1)?;
            }
            None => norm.forward(stream, &self.s1, None, value(self.norm1), y1, &mut self.rstd1)?,
        }
        let (id, linear) = &mut self.qkv;
        linear.forward(stream, y1, value(*id), &mut self.rotated, step(pass, counters))?;
        rope.record(stream, &mut self.rotated, Direction::Forward)?;
        attention.forward(stream, &self.rotated, &mut self.attended, &mut self.lse)?;
        let (id, linear) = &mut self.out;
        linear.forward(stream, &self.attended, value(*id), f, step(pass, counters))?;
        let branch = Some((&*f, &mut self.s2));
        let gain = value(self.norm2);
        let Some((routed, e)) = self.routed.as_mut().zip(experts.as_mut()) else {
            let y2 = self.y2.as_mut().unwrap_or(y);
            norm.forward(stream, &self.s1, branch, gain, y2, &mut self.rstd2)?;
            let (id, linear) = &mut self.gate_up;
            linear.forward(stream, y2, value(*id), &mut self.gu, step(pass, counters))?;
            let h = self.h.as_mut().unwrap_or(h);
            swiglu::forward(stream, &self.gu, h)?;
            let (id, linear) = &mut self.down;
            return linear.forward(stream, h, value(*id), f, step(pass, counters));
        };
        let Routed { router: (id, linear), bias, routes, y, ys } = routed;
        norm.forward(stream, &self.s1, branch, gain, y, &mut self.rstd2)?;
        linear.forward(stream, y, value(*id), &mut e.logits, step(pass, counters))?;
        e.router.record(stream, &e.logits, Some(bias), routes)?;
        let xs = self.y2.as_mut().unwrap_or(&mut e.dxs);
        permute::gather(stream, routes, y, xs)?;
        let (id, linear) = &mut self.gate_up;
        let groups = Some(&routes.groups);
        let of = Step { groups, ..step(pass, counters) };
        linear.forward(stream, xs, value(*id), &mut self.gu, of)?;
        permute::clear_padding(stream, routes, &mut self.gu)?;
        let h = self.h.as_mut().unwrap_or(h);
        swiglu::forward(stream, &self.gu, h)?;
        let (id, linear) = &mut self.down;
        linear.forward(stream, h, value(*id), ys, Step { groups, ..step(pass, counters) })?;
        permute::combine(stream, routes, ys, f, false)
    }

    /// From the gradient of the block's output in `shared.ds` to that of its input, in the same place.
    fn backward(
        &mut self,
        stream: &mut Stream<'_>,
        params: &mut [Param],
        shared: &mut Shared,
        pass: Pass,
        counters: &mut Ids,
    ) -> Result<()> {
        let Shared { norm, rope, attention, ds, dy, dh, dqkv, f: dattended, experts, .. } = shared;
        match self.routed.as_mut().zip(experts.as_mut()) {
            None => {
                let (id, linear) = &mut self.down;
                let Param { value, grad, .. } = &mut params[*id];
                let h = self.h.as_ref();
                linear.backward(stream, h, value, ds, dh, grad, step(pass, counters))?;
                swiglu::backward(stream, &mut self.gu, dh)?;
                let (id, linear) = &mut self.gate_up;
                let Param { value, grad, .. } = &mut params[*id];
                let y2 = self.y2.as_ref();
                linear.backward(stream, y2, value, &self.gu, dy, grad, step(pass, counters))?;
            }
            Some((Routed { router, bias, routes, y, ys }, e)) => {
                let groups = Some(&routes.groups);
                permute::combine_backward(stream, routes, ds, ys, &mut e.dys, &mut e.dweights)?;
                let (id, linear) = &mut self.down;
                let Param { value, grad, .. } = &mut params[*id];
                let of = Step { groups, ..step(pass, counters) };
                linear.backward(stream, self.h.as_ref(), value, &e.dys, dh, grad, of)?;
                permute::clear_padding(stream, routes, dh)?;
                swiglu::backward(stream, &mut self.gu, dh)?;
                let (id, linear) = &mut self.gate_up;
                let Param { value, grad, .. } = &mut params[*id];
                let of = Step { groups, ..step(pass, counters) };
                let y2 = self.y2.as_ref();
                linear.backward(stream, y2, value, &self.gu, &mut e.dxs, grad, of)?;
                permute::gather_backward(stream, routes, &e.dxs, dy, false)?;
                e.router.backward(stream, routes, &e.dweights, &mut e.dlogits, 0.0)?;
                let (id, linear) = router;
                let Param { value, grad, .. } = &mut params[*id];
                let of = step(pass, counters);
                linear.backward(stream, Some(y), value, &e.dlogits, &mut e.dy, grad, of)?;
                add::add(stream, &e.dy, dy)?;
                e.router.balance(stream, routes, bias, BALANCE)?;
            }
        }
        let Param { value, grad, .. } = &mut params[self.norm2];
        norm.backward(stream, &self.s2, value, &self.rstd2, dy, true, ds, grad, false)?;
        let (id, linear) = &mut self.out;
        let Param { value, grad, .. } = &mut params[*id];
        let x = Some(&self.attended);
        linear.backward(stream, x, value, ds, dattended, grad, step(pass, counters))?;
        attention.backward(stream, &self.rotated, &self.attended, &self.lse, dattended, dqkv)?;
        rope.record(stream, dqkv, Direction::Backward)?;
        let (id, linear) = &mut self.qkv;
        let Param { value, grad, .. } = &mut params[*id];
        let y1 = self.y1.as_ref();
        linear.backward(stream, y1, value, dqkv, dy, grad, step(pass, counters))?;
        let Param { value, grad, .. } = &mut params[self.norm1];
        norm.backward(stream, &self.s1, value, &self.rstd1, dy, true, ds, grad, false)
    }
}

impl Head {
    /// From the residual stream `s` and `shared.f` to the loss and, with its scale, its gradient in `shared.dlogits`.
    #[allow(clippy::too_many_arguments)]
    fn forward(
        &mut self,
        stream: &mut Stream<'_>,
        params: &[Param],
        head: Id,
        shared: &mut Shared,
        s: &Tensor,
        pass: Pass,
        counters: &mut Ids,
        scale: Option<f32>,
    ) -> Result<()> {
        let Shared { norm, f, logits, dlogits, losses, reduce, .. } = shared;
        let branch = Some((&*f, &mut self.s));
        let gain = &params[self.norm].value;
        norm.forward(stream, s, branch, gain, &mut self.y, &mut self.rstd)?;
        let w = &params[head].value;
        self.linear.forward(stream, &self.y, w, logits, step(pass, counters))?;
        let gradient = scale.map(|scale| (dlogits, scale));
        cross_entropy(stream, logits, &self.targets, losses, gradient)?;
        reduce.mean(stream, losses, Some(&self.targets), &mut self.loss)
    }

    /// From `shared.dlogits` to the gradient of the residual stream, in `shared.ds`.
    fn backward(
        &mut self,
        stream: &mut Stream<'_>,
        params: &mut [Param],
        head: Id,
        shared: &mut Shared,
        pass: Pass,
        counters: &mut Ids,
    ) -> Result<()> {
        let Shared { norm, dlogits, dy, ds, .. } = shared;
        let Param { value, grad, .. } = &mut params[head];
        self.linear.backward(
            stream,
            Some(&self.y),
            value,
            dlogits,
            dy,
            grad,
            step(pass, counters),
        )?;
        let Param { value, grad, .. } = &mut params[self.norm];
        norm.backward(stream, &self.s, value, &self.rstd, dy, false, ds, grad, false)
    }
}
