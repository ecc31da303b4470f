//! One run: a step, evaluation, text, and the state that a checkpoint holds.
//!
//! A run is a function of its [`RunDesc`] and its batches: what it draws depends on seed and step, so a run that goes on
//! from a checkpoint ends with the same bits as one that was never stopped, on the same engine.

use crate::engine::buffer::{DType, Tensor};
use crate::engine::{Context, Stream};
use crate::kernels::adamw::StepScalars;
use crate::kernels::oscillation::Action;
use crate::kernels::{GradientNorm, quantize_both};
use crate::{Error, Result};

use super::checkpoint::{Checkpoint, Dtype};
use super::linear::Draws;
use super::model::{Model, ModelDesc, Pass};
use super::recipe::{Late, Recipe};

/// What a run is.
#[derive(Clone, Debug, PartialEq)]
pub struct RunDesc {
    /// The model's sizes.
    pub model: ModelDesc,
    /// The formats and the optimizer.
    pub recipe: Recipe,
    /// Of weights and draws.
    pub seed: u64,
    /// How many steps there will be: the learning rate's schedule ends there.
    pub steps: u64,
    /// What the batches are taken from; a checkpoint of another text is refused.
    pub data: String,
}

/// A run on an engine.
#[derive(Debug)]
pub struct Trainer {
    ctx: Context,
    desc: RunDesc,
    /// The model and its optimizer.
    pub model: Model,
    norm: GradientNorm,
    /// What the norm says; see [`GradientNorm`].
    status: Tensor,
    step: u64,
    /// Which of the model's products are dense by now: see [`Recipe::late_forward`].
    late: Late,
    /// log2 of the loss scale.
    exponent: i32,
    /// The step at which the exponent changed last, or a gradient was not finite.
    steady_since: u64,
    /// Statuses in a row that were not finite.
    bad: u32,
}

/// What was read after a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// The mean loss of the step's batch, of the token that comes next.
    pub loss: f64,
    /// The gradient's norm, before clipping.
    pub norm: f64,
    /// Whether the step was taken: not if a gradient was not finite.
    pub taken: bool,
    /// log2 of the loss scale.
    pub exponent: i32,
}

/// Of everything that the quantizers counted in a step: shares.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Shares {
    /// Elements beyond their block's range.
    pub clipped: f64,
    /// Elements that became zero.
    pub underflowed: f64,
    /// Blocks with NaN or infinity.
    pub nonfinite: f64,
}

/// Statuses in a row that are not finite, after which a run is given up.
const GIVE_UP: u32 = 20;

impl Trainer {
    /// A run from its beginning.
    pub fn new(ctx: &Context, desc: &RunDesc) -> Result<Trainer> {
        let model = Model::new(ctx, &desc.model, &desc.recipe, desc.seed)?;
        let sizes: Vec<usize> =
            model.params.iter().map(|p| p.grad.shape().iter().product()).collect();
        let mut trainer = Trainer {
            ctx: ctx.clone(),
            norm: GradientNorm::new(ctx, &sizes)?,
            status: ctx.zeros(DType::F32, 1, 4)?,
            model,
            step: 0,
            late: Late::default(),
            exponent: desc.recipe.loss_scale.initial,
            steady_since: 0,
            bad: 0,
            desc: desc.clone(),
        };
        let mut stream = ctx.stream();
        trainer.set_linears(0)?;
        trainer.prepare(&mut stream, false)?;
        trainer.oscillate(&mut stream, Action::Start)?;
        ctx.submit(stream)?;
        Ok(trainer)
    }

    /// Whether the step after `step` done ones has other products than the model now.
    fn changes(&self, step: u64) -> bool {
        self.desc.recipe.late_at(step, self.desc.steps) != self.late
    }

    /// Makes the model's products those of the step after `step` done ones. Whether they are others than before.
    fn set_linears(&mut self, step: u64) -> Result<bool> {
        let changes = self.changes(step);
        if changes {
            let RunDesc { recipe, steps, .. } = &self.desc;
            let late = recipe.late_at(step, *steps);
            self.model.set_linears(&recipe.late(late))?;
            self.late = late;
        }
        Ok(changes)
    }

    /// Records what the next step needs of the weights: signs and draws are its own. `updated`: see [`Model::prepare`].
    fn prepare(&mut self, stream: &mut Stream<'_>, updated: bool) -> Result<()> {
        let draws = Draws { seed: self.desc.seed, step: self.step as u32 + 1 };
        self.model.prepare(stream, draws, updated)
    }

    fn oscillate(&mut self, stream: &mut Stream<'_>, action: Action) -> Result<()> {
        match self.desc.recipe.oscillation {
            Some(reset) => self.model.oscillate(stream, action, reset.threshold),
            None => Ok(()),
        }
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// What the run is.
    pub fn desc(&self) -> &RunDesc {
        &self.desc
    }

    /// The learning rate of the step after `step` done ones.
    pub fn learning_rate(&self, step: u64) -> f32 {
        self.desc.recipe.optimizer.learning_rate(step, self.desc.steps)
    }

    /// Submits a step on a batch `[batch, seq + 1 + mtp]`; does not wait. `count`: the quantizers count.
    pub fn train(&mut self, tokens: &[u32], count: bool) -> Result<()> {
        let mut stream = self.ctx.stream();
        self.record(&mut stream, tokens, count)?;
        self.ctx.submit(stream)
    }

    /// Records what [`Trainer::train`] submits; the batch is uploaded at once.
    pub fn record(&mut self, stream: &mut Stream<'_>, tokens: &[u32], count: bool) -> Result<()> {
        let number = self.step as u32 + 1;
        let draws = Draws { seed: self.desc.seed, step: number };
        let lr = self.learning_rate(self.step);
        self.model.set_batch(tokens)?;
        let scale = 2f32.powi(self.exponent);
        self.model.record(stream, Pass { draws, count }, Some(scale))?;
        let grads: Vec<&Tensor> = self.model.params.iter().map(|p| &p.grad).collect();
        let clip = self.desc.recipe.optimizer.clip_norm;
        self.norm.record(stream, &grads, 1.0 / scale, clip, &mut self.status)?;
        // Before the update, which packs nothing then for products that are dense from now on. What is recorded holds the operands
        // that these no longer have: their memory is to be free before others are made.
        #[cfg(not(target_arch = "wasm32"))]
        if self.changes(self.step + 1) && stream.may_split() {
            stream.submit_so_far()?;
            self.ctx.wait_blocking()?;
        }
        let changed = self.set_linears(self.step + 1)?;
        let o = &self.desc.recipe.optimizer;
        self.model.update(stream, &self.status, |p| StepScalars {
            step: number,
            lr,
            weight_decay: if p.decay { o.weight_decay } else { 0.0 },
            seed: self.desc.seed,
        })?;
        self.step += 1;
        // If the update is skipped it may pack nothing, and what new layers have is not what it was.
        self.prepare(stream, !changed)?;
        match self.desc.recipe.oscillation {
            Some(reset) if self.step.is_multiple_of(reset.every) => {
                self.oscillate(stream, Action::Reset)?;
                self.prepare(stream, false)
            }
            _ => self.oscillate(stream, Action::Walk),
        }
    }

    /// Reads how the last step went, and adapts the loss scale: runs are the same where this is called after the same steps.
    /// Waits. An error if the loss is not finite, or gradients have not been for long.
    pub async fn status(&mut self) -> Result<Status> {
        let mut losses = Vec::new();
        for loss in self.model.losses() {
            losses.push(f64::from(floats(&self.ctx.read(loss).await?)[0]));
        }
        let [norm, _, finite, first] = floats(&self.ctx.read(&self.status).await?)[..] else {
            return Err(Error::InvalidData("the gradient's status has four numbers".into()));
        };
        let at = self.step;
        let name = |first: f32| match self.model.params.get(first as usize) {
            Some(p) if first >= 0.0 => format!("the gradient of {}", p.name),
            _ => "the gradient's norm".into(),
        };
        if !losses[0].is_finite() {
            return Err(Error::Diverged { step: at, what: format!("the loss is {}", losses[0]) });
        }
        let taken = finite == 1.0;
        let scale = &self.desc.recipe.loss_scale;
        if taken {
            self.bad = 0;
            if scale.grow_every > 0
                && at - self.steady_since >= u64::from(scale.grow_every)
                && self.exponent < scale.max
            {
                (self.exponent, self.steady_since) = (self.exponent + 1, at);
            }
        } else {
            (self.bad, self.steady_since) = (self.bad + 1, at);
            if self.bad > GIVE_UP {
                let what = format!("{} is not finite, under {GIVE_UP} loss scales", name(first));
                return Err(Error::Diverged { step: at, what });
            }
            self.exponent = (self.exponent - 1).max(-60);
        }
        Ok(Status { loss: losses[0], norm: norm.into(), taken, exponent: self.exponent })
    }

    /// What the quantizers counted in the last step that counted: of activations, of gradients. Waits.
    pub async fn shares(&self) -> Result<[Shares; 2]> {
        let mut all = [Shares::default(); 2];
        for (shares, ids) in all.iter_mut().zip([&self.model.counters.x, &self.model.counters.dy]) {
            let words = self.ctx.read_ids(ids).await?;
            debug_assert_eq!(words.len(), quantize_both::COUNTERS);
            let sum = |i: usize| f64::from(words[i]) + f64::from(words[4 + i]);
            let elements = sum(3).max(1.0);
            *shares = Shares {
                clipped: sum(0) / elements,
                underflowed: sum(1) / elements,
                nonfinite: sum(2) / elements,
            };
        }
        Ok(all)
    }

    /// The mean loss over batches. Waits.
    pub async fn evaluate(&mut self, batches: impl Iterator<Item = Vec<u32>>) -> Result<f64> {
        let (mut sum, mut n) = (0.0, 0);
        let draws = Draws { seed: self.desc.seed, step: self.step as u32 + 1 };
        for tokens in batches {
            self.model.set_batch(&tokens)?;
            let mut stream = self.ctx.stream();
            self.model.record(&mut stream, Pass { draws, count: false }, None)?;
            self.ctx.submit(stream)?;
            let Some(loss) = self.model.losses().next() else { break };
            sum += f64::from(floats(&self.ctx.read(loss).await?)[0]);
            n += 1;
        }
        Ok(sum / f64::from(n.max(1)))
    }

    /// Goes on with a text, `count` bytes, each drawn from the model's distribution at this temperature; at 0 the likeliest.
    /// Waits. In a model of as few sequences as there can be, with these weights.
    pub async fn generate(&self, prompt: &[u8], count: usize, temperature: f64) -> Result<Vec<u8>> {
        let ModelDesc { seq, vocabulary, .. } = self.desc.model;
        // Transforms along the tokens divide them.
        let recipe = &self.desc.recipe.late(self.late);
        let sizes = recipe.linears().filter_map(|linear| linear.wgrad.x.hadamard);
        let unit = sizes.fold(32, |unit, size| unit.max(size as usize));
        let batch = (1..unit).find(|batch| (batch * seq).is_multiple_of(unit)).unwrap_or(unit);
        let desc = ModelDesc { batch, mtp: 0, ..self.desc.model.clone() };
        let mut model = Model::new(&self.ctx, &desc, recipe, self.desc.seed)?;
        for to in &mut model.params {
            if let Some(from) = self.model.params.iter().find(|from| from.name == to.name) {
                to.value.data.write(&self.ctx, &self.ctx.read(&from.value).await?)?;
            }
        }
        for (to, from) in model.biases_mut().zip(self.model.biases()) {
            to.1.data.write(&self.ctx, &self.ctx.read(from.1).await?)?;
        }
        let draws = Draws { seed: self.desc.seed, step: self.step as u32 + 1 };
        let mut stream = self.ctx.stream();
        model.prepare(&mut stream, draws, false)?;
        self.ctx.submit(stream)?;
        let mut text = prompt.to_vec();
        for i in 0..count {
            let from = text.len().saturating_sub(seq);
            let mut tokens: Vec<u32> = text[from..].iter().map(|byte| u32::from(*byte)).collect();
            let last = tokens.len().saturating_sub(1);
            tokens.resize(batch * seq, 0);
            model.set_inputs(&tokens)?;
            let mut stream = self.ctx.stream();
            model.record(&mut stream, Pass { draws, count: false }, None)?;
            self.ctx.submit(stream)?;
            let logits = floats(&self.ctx.read(model.logits()).await?);
            let row = &logits[last * vocabulary..(last + 1) * vocabulary];
            let most = row.iter().fold(f32::MIN, |a, b| a.max(*b));
            let coldest = temperature.max(f64::MIN_POSITIVE);
            let weight = |logit: &f32| (f64::from(logit - most) / coldest).exp();
            let total: f64 = row.iter().map(weight).sum();
            let key = [self.desc.seed as u32, i as u32, 0x7465_7874, 0];
            let word = crate::rng::threefry4x32::<{ crate::rng::ROUNDS }>([0; 4], key)[0];
            let mut left = f64::from(word) / 4_294_967_296.0 * total;
            let chosen = row.iter().position(|logit| {
                left -= weight(logit);
                left < 0.0
            });
            text.push(chosen.unwrap_or(0) as u8);
        }
        Ok(text.split_off(prompt.len()))
    }

    /// Everything that the run needs to go on. Waits.
    pub async fn checkpoint(&self) -> Result<Checkpoint> {
        let mut checkpoint = Checkpoint::default();
        for (key, value) in self.meta()? {
            checkpoint.meta.insert(key.into(), value);
        }
        for (key, value) in [
            ("step", self.step as i64),
            ("loss_scale", self.exponent.into()),
            ("steady_since", self.steady_since as i64),
            ("bad", self.bad.into()),
        ] {
            checkpoint.meta.insert(key.into(), value.to_string());
        }
        for p in &self.model.params {
            let shape = p.value.shape();
            checkpoint.insert(
                p.name.clone(),
                dtype(p.value.dtype()),
                &shape,
                self.ctx.read(&p.value).await?,
            )?;
            for tensor in p.state.tensors() {
                checkpoint.insert(
                    format!("{}.{}", p.name, tensor.name),
                    state_dtype(tensor.dtype),
                    &tensor.shape,
                    p.state.read(&self.ctx, tensor.name).await?,
                )?;
            }
        }
        for (name, bias) in self.model.biases() {
            checkpoint.insert(name, Dtype::F32, &bias.shape(), self.ctx.read(bias).await?)?;
        }
        for (id, state) in self.model.oscillations() {
            for (name, tensor) in state.tensors() {
                let name = format!("{}.{name}", self.model.params[id].name);
                let bytes = self.ctx.read(tensor).await?;
                checkpoint.insert(name, Dtype::F32, &tensor.shape(), bytes)?;
            }
        }
        Ok(checkpoint)
    }

    /// Goes on from a checkpoint of the same run.
    pub fn restore(&mut self, mut checkpoint: Checkpoint) -> Result<()> {
        for (key, here) in self.meta()? {
            let there: String = checkpoint.value(key)?;
            if there != here {
                return Err(Error::InvalidData(format!(
                    "the checkpoint is of another run: its {key} is\n{there}\nand here it is\n{here}"
                )));
            }
        }
        self.take_parameters(&mut checkpoint)?;
        let ctx = self.ctx.clone();
        for p in &mut self.model.params {
            for tensor in p.state.tensors() {
                let name = format!("{}.{}", p.name, tensor.name);
                let bytes = checkpoint.take(&name, state_dtype(tensor.dtype), &tensor.shape)?;
                p.state.write(&ctx, tensor.name, &bytes)?;
            }
        }
        let names: Vec<String> = self.model.params.iter().map(|p| p.name.clone()).collect();
        for (id, state) in self.model.oscillations_mut() {
            for (name, tensor) in state.tensors_mut() {
                let name = format!("{}.{name}", names[id]);
                let bytes = checkpoint.take(&name, Dtype::F32, &tensor.shape())?;
                tensor.data.write(&ctx, &bytes)?;
            }
        }
        self.step = checkpoint.value("step")?;
        self.exponent = checkpoint.value("loss_scale")?;
        self.steady_since = checkpoint.value("steady_since")?;
        self.bad = checkpoint.value("bad")?;
        self.set_linears(self.step)?;
        let mut stream = ctx.stream();
        self.prepare(&mut stream, false)?;
        ctx.submit(stream)
    }

    /// Begins with the parameters of another run's checkpoint, of the same model in any recipe; its optimizer is not taken.
    pub fn begin_with(&mut self, mut checkpoint: Checkpoint) -> Result<()> {
        self.take_parameters(&mut checkpoint)?;
        let ctx = self.ctx.clone();
        let mut stream = ctx.stream();
        self.prepare(&mut stream, false)?;
        self.oscillate(&mut stream, Action::Start)?;
        ctx.submit(stream)
    }

    fn take_parameters(&mut self, checkpoint: &mut Checkpoint) -> Result<()> {
        for p in &mut self.model.params {
            let bytes = checkpoint.take(&p.name, dtype(p.value.dtype()), &p.value.shape())?;
            p.value.data.write(&self.ctx, &bytes)?;
        }
        for (name, bias) in self.model.biases_mut() {
            let bytes = checkpoint.take(&name, Dtype::F32, &bias.shape())?;
            bias.data.write(&self.ctx, &bytes)?;
        }
        Ok(())
    }

    fn meta(&self) -> Result<[(&'static str, String); 5]> {
        Ok([
            ("model", format!("{:?}", self.desc.model)),
            ("recipe", self.desc.recipe.to_toml()?),
            ("seed", self.desc.seed.to_string()),
            ("steps", self.desc.steps.to_string()),
            ("data", self.desc.data.clone()),
        ])
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytemuck::pod_collect_to_vec(bytes)
}

fn dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
    }
}

fn state_dtype(name: &str) -> Dtype {
    match name {
        "F32" => Dtype::F32,
        "BF16" => Dtype::BF16,
        _ => Dtype::U8,
    }
}
