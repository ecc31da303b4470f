//! Which format, block, scale rule, rounding and transform each operand of each product of a training step has.
//!
//! A linear layer `Y[T, N] = X[T, K] · W[N, K]ᵀ` is three products: forward over K, dgrad `dX = dY · W` over N, wgrad
//! `dW = dYᵀ · X` over T. A [`Recipe`] names the [`Cast`] of each operand, for all layers and by name for some, and is
//! read and written as TOML. [`Recipe::preset`] has the published ones; sources are at each.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::engine::buffer::DType;
use crate::formats::{Block, MxSpec, ScaleFormat, ScaleRule};
use crate::kernels::adamw::Moments;
use crate::{Error, Result};

/// A recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The name of the arm.
    pub name: String,
    /// The type of activations and their gradients between kernels; the residual stream is f32.
    pub activations: Dense,
    /// The share of the steps, at the end, whose forward products are dense, in the type of the activations: of all layers,
    /// the routers and the head too. 0: none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub late_forward: f32,
    /// The same of dgrad and wgrad ("FP4 All the Way", arXiv 2505.19115, ends so). It may be longer than `late_forward`: the
    /// gradients are then those of the forward pass as if it had quantized nothing. Where both are dense, steps are those of a
    /// dense recipe, bit for bit.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub late_backward: f32,
    /// Linear layers, but for those below.
    pub linear: Linear,
    /// Layers that differ; of those whose pattern matches, the last counts.
    #[serde(default, rename = "layer", skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<Layer>,
    /// Whether weights that oscillate between two codes are reset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oscillation: Option<Reset>,
    /// AdamW.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// Of the loss, so that gradients stay within their formats' range.
    #[serde(default)]
    pub loss_scale: LossScale,
}

/// Layers that differ from the rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// A layer's name, `*` for any characters: `head`, `blocks.5.*`, `*.down`. Names are `blocks.N.{qkv,out,gate_up,down}`,
    /// `blocks.N.experts.{gate_up,down}`, `blocks.N.router`, `mtp.N.…` and `head`.
    pub name: String,
    /// What it does.
    pub linear: Linear,
}

/// The three products of a linear layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Linear {
    /// Y = X · Wᵀ.
    pub forward: Forward,
    /// dX = dY · W.
    pub dgrad: Dgrad,
    /// dW = dYᵀ · X.
    pub wgrad: Wgrad,
}

/// The operands of Y = X · Wᵀ, contracted over the inputs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forward {
    /// Activations.
    pub x: Cast,
    /// Weights.
    pub w: Cast,
}

/// The operands of dX = dY · W, contracted over the outputs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dgrad {
    /// Gradients.
    pub dy: Cast,
    /// Weights.
    pub w: Cast,
}

/// The operands of dW = dYᵀ · X, contracted over the tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wgrad {
    /// Gradients.
    pub dy: Cast,
    /// Activations.
    pub x: Cast,
}

/// A dense type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dense {
    /// f32.
    F32,
    /// bf16.
    #[default]
    Bf16,
}

impl Dense {
    /// The name in [`Cast::format`].
    pub fn name(self) -> &'static str {
        DType::from(self).name()
    }
}

impl From<Dense> for DType {
    fn from(dense: Dense) -> DType {
        match dense {
            Dense::F32 => DType::F32,
            Dense::Bf16 => DType::BF16,
        }
    }
}

/// How an operand is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cast {
    /// `f32`, `bf16`, or an MX format: `mxfp4`, `mxfp6-e2m3`, `mxfp8-e4m3`, `nvfp4`, …
    pub format: String,
    /// `1x16` to `1x128` along what is contracted; weights also `16x16` and `32x32`. Default the format's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<String>,
    /// The scale rule. Default the format's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<Scale>,
    /// How elements are rounded.
    #[serde(default)]
    pub rounding: Round,
    /// The size of a Hadamard transform along what is contracted: 16, 32, 64 or 128, on both operands of a product.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hadamard: Option<u32>,
    /// The transform's signs, on the input's side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signs: Option<Signs>,
    /// Limit magnitudes to this quantile of the tensor's, which is the same for both of its casts that have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
    /// Keep so many columns of the largest magnitude in bf16: their product is added. Forward's x only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outliers: Option<usize>,
    /// Made from what forward takes, quantized, and not from the tensor itself: the gradient of the quantized model (TetraJet,
    /// arXiv 2502.20853). Wgrad's x only.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub requantized: bool,
}

/// The scale rules of [`ScaleRule`], and one more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Scale {
    Floor,
    Ceil,
    Rceil,
    Even,
    /// Floor, for three quarters of the elements, which then do not clip; the product is multiplied with 4/3, or with 16/9 if
    /// both of its operands have it (arXiv 2502.20586). Of activations and gradients under E8M0 scales.
    ThreeQuarters,
}

impl From<Scale> for ScaleRule {
    fn from(scale: Scale) -> ScaleRule {
        match scale {
            Scale::Floor | Scale::ThreeQuarters => ScaleRule::Floor,
            Scale::Ceil => ScaleRule::Ceil,
            Scale::Rceil => ScaleRule::Rceil,
            Scale::Even => ScaleRule::Even,
        }
    }
}

/// How elements are rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Round {
    /// To nearest even.
    #[default]
    Nearest,
    /// Stochastically, with fresh draws every step.
    Stochastic,
}

/// Signs of Hadamard transforms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Signs {
    /// None.
    None,
    /// Random, the same for the whole run.
    Fixed,
    /// Random, fresh every step.
    Step,
}

/// Which products of a step are dense, whatever their casts are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Late {
    /// Y = X · Wᵀ.
    pub forward: bool,
    /// dX = dY · W and dW = dYᵀ · X.
    pub backward: bool,
}

/// When weights count as oscillating; see [`crate::kernels::oscillation`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reset {
    /// Steps of a period.
    pub every: u64,
    /// How many times the way of the weight its quantized value has gone, at least.
    pub threshold: f32,
}

impl Default for Reset {
    /// AMD's ALTO.
    fn default() -> Reset {
        Reset { every: 200, threshold: 4.0 }
    }
}

fn is_zero(share: &f32) -> bool {
    *share == 0.0
}

/// AdamW's numbers and the types of its state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Optimizer {
    /// The weights' type; bf16 is rounded stochastically.
    pub master: Dense,
    /// `f32`, `bf16` or `fp8`.
    pub moments: MomentType,
    /// The peak of the learning rate.
    pub lr: f32,
    /// Of m.
    pub beta1: f32,
    /// Of v.
    pub beta2: f32,
    /// Added to √v.
    pub eps: f32,
    /// Of matrices; norms' gains and embeddings have none.
    pub weight_decay: f32,
    /// The gradient's norm is clipped to this.
    pub clip_norm: f32,
    /// The share of the steps over which the learning rate rises.
    pub warmup: f32,
    /// The share of the steps, at the end, over which it falls; between both it stays at its peak. 1: it falls at once.
    pub decay: f32,
    /// What of the learning rate is left at the end.
    pub final_lr: f32,
}

impl Default for Optimizer {
    fn default() -> Optimizer {
        Optimizer {
            master: Dense::F32,
            moments: MomentType::F32,
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            clip_norm: 1.0,
            warmup: 0.05,
            decay: 0.3,
            final_lr: 0.1,
        }
    }
}

impl Optimizer {
    /// The learning rate of the step after `step` of `steps` done ones: a linear rise, the peak, half a cosine.
    pub fn learning_rate(&self, step: u64, steps: u64) -> f32 {
        let (at, steps) = ((step + 1) as f64, steps.max(1) as f64);
        let rise = f64::from(self.warmup) * steps;
        let fall = rise.max(steps - f64::from(self.decay) * steps);
        let share = if at < rise {
            at / rise
        } else {
            let fallen = (at - fall).max(0.0) / (steps - fall).max(1.0);
            let cosine = 0.5 * (1.0 + (std::f64::consts::PI * fallen.min(1.0)).cos());
            f64::from(self.final_lr) + (1.0 - f64::from(self.final_lr)) * cosine
        };
        (f64::from(self.lr) * share) as f32
    }
}

/// The moments' type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum MomentType {
    #[default]
    F32,
    Bf16,
    Fp8,
}

impl From<MomentType> for Moments {
    fn from(moments: MomentType) -> Moments {
        match moments {
            MomentType::F32 => Moments::F32,
            MomentType::Bf16 => Moments::BF16,
            MomentType::Fp8 => Moments::FP8,
        }
    }
}

/// Power-of-two scaling of the loss. Block scales make it needless for MX formats: the same codes come out under every
/// power of two that nothing over- or underflows under (tested); it keeps bf16 and f32 gradients in range.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossScale {
    /// The exponent at the start.
    pub initial: i32,
    /// Doubles after so many steps without anything that is not finite; 0: never.
    pub grow_every: u32,
    /// The largest exponent.
    pub max: i32,
}

impl Default for LossScale {
    fn default() -> LossScale {
        LossScale { initial: 10, grow_every: 1000, max: 24 }
    }
}

/// What a cast comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// A dense type.
    Dense(DType),
    /// An MX format.
    Mx(MxSpec),
}

impl Cast {
    /// `format` as it is.
    pub fn plain(format: &str) -> Cast {
        Cast {
            format: format.into(),
            block: None,
            scale: None,
            rounding: Round::Nearest,
            hadamard: None,
            signs: None,
            clip: None,
            outliers: None,
            requantized: false,
        }
    }

    /// With this scale rule.
    pub fn scaled(self, scale: Scale) -> Cast {
        Cast { scale: Some(scale), ..self }
    }

    /// With this block.
    pub fn blocked(self, block: &str) -> Cast {
        Cast { block: Some(block.into()), ..self }
    }

    /// Rounded stochastically.
    pub fn stochastic(self) -> Cast {
        Cast { rounding: Round::Stochastic, ..self }
    }

    /// After a Hadamard transform.
    pub fn hadamard(self, size: u32, signs: Signs) -> Cast {
        Cast { hadamard: Some(size), signs: Some(signs), ..self }
    }

    pub(super) fn is_three_quarters(&self) -> bool {
        self.scale == Some(Scale::ThreeQuarters)
    }

    /// The format.
    pub fn form(&self) -> Result<Form> {
        let spec = match self.format.as_str() {
            "f32" => return Ok(Form::Dense(DType::F32)),
            "bf16" => return Ok(Form::Dense(DType::BF16)),
            name => MxSpec::by_name(name)?,
        };
        let Some(block) = &self.block else { return Ok(Form::Mx(spec)) };
        let found = Block::ALL.into_iter().find(|known| known.to_string() == *block);
        let Some(block) = found else {
            let known: Vec<_> = Block::ALL.iter().map(Block::to_string).collect();
            return Err(Error::Recipe(format!("block {block:?}; known: {}", known.join(", "))));
        };
        let spec = spec.with_block(block);
        spec.validate()?;
        Ok(Form::Mx(spec))
    }

    /// How many positions along what is contracted belong together; 1 for dense types.
    pub(super) fn length(&self) -> usize {
        let block = match self.form() {
            Ok(Form::Mx(spec)) => spec.block.len(),
            _ => 1,
        };
        block.max(self.hadamard.unwrap_or(1) as usize)
    }

    fn validate(&self, operand: &str) -> Result<()> {
        let wrong = |problem: String| Err(Error::Recipe(format!("{operand}: {problem}")));
        let form = match self.form() {
            Ok(form) => form,
            Err(error) => return wrong(error.to_string()),
        };
        let weight = operand.ends_with('w');
        match form {
            Form::Dense(_)
                if self.block.is_some()
                    || self.scale.is_some()
                    || self.rounding == Round::Stochastic
                    || self.hadamard.is_some()
                    || self.clip.is_some()
                    || self.outliers.is_some() =>
            {
                return wrong(format!(
                    "{} has no block, scale, stochastic rounding, Hadamard transform, clip or outliers",
                    self.format
                ));
            }
            Form::Mx(spec) if spec.block.lines() > 1 && !weight => {
                return wrong(format!("square blocks ({}) are for weights", spec.block));
            }
            Form::Mx(spec)
                if spec.scale == ScaleFormat::E4M3
                    && matches!(
                        self.scale,
                        Some(Scale::Floor | Scale::Ceil | Scale::ThreeQuarters)
                    ) =>
            {
                return wrong("NVFP4's scales are rounded to nearest (even) or up (rceil)".into());
            }
            Form::Mx(spec)
                if self.rounding == Round::Stochastic
                    && spec.scale == ScaleFormat::E8M0
                    && !matches!(
                        self.scale,
                        Some(Scale::Rceil | Scale::Ceil | Scale::ThreeQuarters)
                    ) =>
            {
                return wrong(
                    "stochastic rounding needs a scale that does not clip: rceil, ceil or three-quarters"
                        .into(),
                );
            }
            _ => {}
        }
        if weight && self.is_three_quarters() {
            return wrong("three-quarters is for activations and gradients".into());
        }
        if weight && self.rounding == Round::Stochastic {
            return wrong("weights are rounded to nearest".into());
        }
        match self.hadamard {
            Some(size) if ![16, 32, 64, 128].contains(&size) => {
                return wrong(format!("a Hadamard transform of size {size}: 16, 32, 64 or 128"));
            }
            Some(_) if weight && matches!(form, Form::Mx(s) if s.block.lines() > 1) => {
                return wrong("a Hadamard transform takes vector blocks".into());
            }
            None if self.signs.is_some() => return wrong("signs without hadamard".into()),
            _ => {}
        }
        if let Some(clip) = self.clip {
            if weight || !(0.0..=1.0).contains(&clip) {
                return wrong(format!("clip = {clip}: a quantile from 0 to 1, not of weights"));
            }
        }
        if self.outliers.is_some_and(|n| n == 0 || !n.is_multiple_of(4))
            || (self.outliers.is_some() && operand != "forward.x")
        {
            return wrong("outliers: a positive multiple of 4, for forward.x only".into());
        }
        if self.requantized && operand != "wgrad.x" {
            return wrong("requantized is for wgrad.x only".into());
        }
        Ok(())
    }
}

impl Linear {
    /// Dense throughout.
    pub fn dense(format: &str) -> Linear {
        let cast = || Cast::plain(format);
        Linear {
            forward: Forward { x: cast(), w: cast() },
            dgrad: Dgrad { dy: cast(), w: cast() },
            wgrad: Wgrad { dy: cast(), x: cast() },
        }
    }

    /// The same with these products dense.
    pub fn late(&self, late: Late, dense: Dense) -> Linear {
        let dense = Linear::dense(dense.name());
        let mut linear = self.clone();
        if late.forward {
            linear.forward = dense.forward;
            // Of what forward takes, which is X itself.
            linear.wgrad.x.requantized = false;
        }
        if late.backward {
            (linear.dgrad, linear.wgrad) = (dense.dgrad, dense.wgrad);
        }
        linear
    }

    /// Checks that every combination exists.
    pub fn validate(&self) -> Result<()> {
        for (name, cast) in [
            ("forward.x", &self.forward.x),
            ("forward.w", &self.forward.w),
            ("dgrad.dy", &self.dgrad.dy),
            ("dgrad.w", &self.dgrad.w),
            ("wgrad.dy", &self.wgrad.dy),
            ("wgrad.x", &self.wgrad.x),
        ] {
            cast.validate(name)?;
        }
        for (name, a, b) in [
            ("forward", &self.forward.x, &self.forward.w),
            ("dgrad", &self.dgrad.dy, &self.dgrad.w),
            ("wgrad", &self.wgrad.dy, &self.wgrad.x),
        ] {
            if (a.hadamard, a.signs) != (b.hadamard, b.signs) {
                return Err(Error::Recipe(format!(
                    "{name}: both operands need the same hadamard and signs, or the product is another one"
                )));
            }
        }
        if self.wgrad.x.requantized {
            let packed = |cast: &Cast| matches!(cast.form(), Ok(Form::Mx(_)));
            let forward = &self.forward.x;
            if !packed(forward) || !packed(&self.wgrad.x) || forward.hadamard.is_some() {
                return Err(Error::Recipe(
                    "wgrad.x: requantized takes two MX formats, and no Hadamard transform in forward".into(),
                ));
            }
            if forward.is_three_quarters() {
                return Err(Error::Recipe(
                    "wgrad.x: requantized takes values, and forward.x has three quarters of them"
                        .into(),
                ));
            }
        }
        for (name, a, b) in
            [("x", &self.forward.x, &self.wgrad.x), ("dy", &self.dgrad.dy, &self.wgrad.dy)]
        {
            if a.clip.zip(b.clip).is_some_and(|(a, b)| a != b) {
                return Err(Error::Recipe(format!(
                    "the clips of {name} are two quantiles of one tensor, expected the same or one alone"
                )));
            }
        }
        Ok(())
    }
}

/// The names of the presets.
pub const PRESETS: [&str; 8] =
    ["f32", "bf16", "mxfp4", "mxfp4-backward", "mixed", "nvfp4", "mxfp8", "naive"];

impl Recipe {
    /// A recipe by name.
    pub fn preset(name: &str) -> Result<Recipe> {
        let mxfp4 = || Cast::plain("mxfp4");
        let linear = match name {
            "f32" | "bf16" => Linear::dense(name),
            // All three products in MXFP4: Even scales to nearest; gradients rounded stochastically under Rceil, which does
            // not clip; Hadamard transforms of both operands of forward and of wgrad. (AMD's ALTO has square blocks for the
            // weights and no transform in forward: that costs 0.6% more of the loss, measured.)
            "mxfp4" => Linear {
                forward: Forward {
                    x: mxfp4().scaled(Scale::Even).hadamard(32, Signs::Fixed),
                    w: mxfp4().scaled(Scale::Even).hadamard(32, Signs::Fixed),
                },
                dgrad: Dgrad {
                    dy: mxfp4().scaled(Scale::Rceil).stochastic(),
                    w: mxfp4().scaled(Scale::Even),
                },
                wgrad: Wgrad {
                    dy: mxfp4().scaled(Scale::Rceil).hadamard(32, Signs::Step).stochastic(),
                    x: mxfp4().scaled(Scale::Even).hadamard(32, Signs::Step),
                },
            },
            // Forward in bf16: arXiv 2502.20586, with Rceil in place of three-quarters.
            "mxfp4-backward" => {
                let cast = || mxfp4().scaled(Scale::Rceil).hadamard(32, Signs::Step).stochastic();
                let dense = || Cast::plain("bf16");
                Linear {
                    forward: Forward { x: dense(), w: dense() },
                    dgrad: Dgrad {
                        dy: cast(),
                        w: Cast { rounding: Round::Nearest, ..cast() }.scaled(Scale::Even),
                    },
                    wgrad: Wgrad { dy: cast(), x: cast() },
                }
            }
            // MXFP4 weights; activations and gradients in MXFP8.
            "mixed" => {
                let cast = || Cast::plain("mxfp8-e4m3").scaled(Scale::Rceil);
                let w = || mxfp4().scaled(Scale::Even);
                Linear {
                    forward: Forward { x: cast(), w: w() },
                    dgrad: Dgrad { dy: cast(), w: w() },
                    wgrad: Wgrad { dy: cast(), x: cast() },
                }
            }
            // arXiv 2509.25149: square blocks for weights, stochastic rounding of gradients, a transform of 16 in wgrad with
            // one fixed vector of signs.
            "nvfp4" => {
                let cast = || Cast::plain("nvfp4");
                Linear {
                    forward: Forward { x: cast(), w: cast().blocked("16x16") },
                    dgrad: Dgrad {
                        dy: cast().scaled(Scale::Rceil).stochastic(),
                        w: cast().blocked("16x16"),
                    },
                    wgrad: Wgrad {
                        dy: cast().scaled(Scale::Rceil).hadamard(16, Signs::Fixed).stochastic(),
                        x: cast().hadamard(16, Signs::Fixed),
                    },
                }
            }
            // arXiv 2506.08027: E4M3 with scales rounded up.
            "mxfp8" => {
                let cast = || Cast::plain("mxfp8-e4m3").scaled(Scale::Rceil);
                Linear {
                    forward: Forward { x: cast(), w: cast() },
                    dgrad: Dgrad { dy: cast(), w: cast() },
                    wgrad: Wgrad { dy: cast(), x: cast() },
                }
            }
            // OCP's Floor, to nearest, nothing else: the bad example.
            "naive" => {
                let cast = || mxfp4().scaled(Scale::Floor);
                Linear {
                    forward: Forward { x: cast(), w: cast() },
                    dgrad: Dgrad { dy: cast(), w: cast() },
                    wgrad: Wgrad { dy: cast(), x: cast() },
                }
            }
            other => {
                return Err(Error::Recipe(format!(
                    "no preset {other:?}; there are {}, and --recipe reads a file",
                    PRESETS.join(", ")
                )));
            }
        };
        let dense = if name == "f32" { "f32" } else { "bf16" };
        let keep = |pattern: &str| Layer { name: pattern.into(), linear: Linear::dense(dense) };
        let fp4_forward = matches!(name, "mxfp4" | "mixed");
        let mut layers = Vec::new();
        if let Form::Mx(spec) = linear.dgrad.w.form()? {
            if spec.block.lines() == 1 {
                // Experts' weights in squares, of which no transform is taken; mxfp4 and mixed have the same ones in forward,
                // packed once and read both ways.
                let mut experts = linear.clone();
                let Linear { forward, dgrad, .. } = &mut experts;
                for cast in [&mut forward.x, &mut forward.w, &mut dgrad.dy, &mut dgrad.w] {
                    (cast.hadamard, cast.signs) = (None, None);
                }
                dgrad.w.block = Some("32x32".into());
                if fp4_forward {
                    forward.w = dgrad.w.clone();
                }
                layers.push(Layer { name: "*.experts.*".into(), linear: experts });
            }
        }
        layers.extend([keep("head"), keep("*.router")]);
        // FP4 in forward: all in bf16 for the second half of the steps, as far as measured the longer the better (README;
        // arXiv 2509.25149, appendix D, ends so for 18%, and 2505.19115 for as long as it takes).
        let late = if fp4_forward { 0.5 } else { 0.0 };
        Ok(Recipe {
            name: name.into(),
            activations: if name == "f32" { Dense::F32 } else { Dense::Bf16 },
            linear,
            layers,
            late_forward: late,
            late_backward: late,
            // ALTO's; weights that are transformed have no codes of their own.
            oscillation: (name == "mixed").then(Reset::default),
            optimizer: Optimizer::default(),
            loss_scale: LossScale::default(),
        })
    }

    /// From TOML.
    pub fn parse(text: &str) -> Result<Recipe> {
        let recipe: Recipe =
            toml::from_str(text).map_err(|error| Error::Recipe(error.to_string()))?;
        recipe.validate()?;
        Ok(recipe)
    }

    /// From a file of TOML.
    pub fn load(path: &Path) -> Result<Recipe> {
        let text = std::fs::read_to_string(path).map_err(Error::at(path))?;
        Recipe::parse(&text).map_err(|error| match error {
            Error::Recipe(problem) => Error::Recipe(format!("{}: {problem}", path.display())),
            other => other,
        })
    }

    /// As TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(|error| Error::Recipe(error.to_string()))
    }

    /// Checks that every combination exists.
    pub fn validate(&self) -> Result<()> {
        // It becomes a directory's name.
        let unfit = |c: char| c.is_control() || "/\\:*?\"<>|".contains(c);
        if self.name.is_empty() || self.name.starts_with('.') || self.name.contains(unfit) {
            return Err(Error::Recipe(format!(
                "name {:?}: expected one that a directory can have",
                self.name
            )));
        }
        self.linear.validate()?;
        for layer in &self.layers {
            layer
                .linear
                .validate()
                .map_err(|error| Error::Recipe(format!("layer {:?}: {error}", layer.name)))?;
        }
        for (name, share) in
            [("late_forward", self.late_forward), ("late_backward", self.late_backward)]
        {
            if !(0.0..=1.0).contains(&share) {
                return Err(Error::Recipe(format!(
                    "{name} = {share}, expected a share of the steps, from 0 to 1"
                )));
            }
        }
        if let Some(Reset { every, threshold }) = self.oscillation {
            if every < 2 || threshold.is_nan() || threshold < 1.0 {
                return Err(Error::Recipe(format!(
                    "oscillation: every {every} steps from a ratio of {threshold}: at least 2 and 1"
                )));
            }
            if self.linears().any(|linear| linear.forward.w.hadamard.is_some()) {
                return Err(Error::Recipe(
                    "oscillation: codes of transformed weights (forward.w.hadamard) are not theirs"
                        .into(),
                ));
            }
        }
        let o = &self.optimizer;
        let wrong = |problem: String| Err(Error::Recipe(format!("optimizer: {problem}")));
        if !(o.lr.is_finite() && o.lr > 0.0) {
            return wrong(format!("lr = {}, expected a positive number", o.lr));
        }
        for (name, value) in [("beta1", o.beta1), ("beta2", o.beta2)] {
            if !(0.0..1.0).contains(&value) {
                return wrong(format!("{name} = {value}, expected 0 to below 1"));
            }
        }
        let shares = [("warmup", o.warmup), ("decay", o.decay), ("final_lr", o.final_lr)];
        for (name, value) in shares {
            if !(0.0..=1.0).contains(&value) {
                return wrong(format!("{name} = {value}, expected a share from 0 to 1"));
            }
        }
        if !(o.eps > 0.0 && o.weight_decay >= 0.0 && o.clip_norm > 0.0) {
            return wrong("eps and clip_norm are positive, weight_decay is not negative".into());
        }
        let scale = &self.loss_scale;
        if !(-60..=60).contains(&scale.initial) || scale.max > 60 || scale.max < scale.initial {
            return Err(Error::Recipe(format!(
                "loss_scale: exponents from -60 to 60, initial {} not above max {}",
                scale.initial, scale.max
            )));
        }
        Ok(())
    }

    /// Which products are dense in the step after `step` of `steps` done ones.
    pub fn late_at(&self, step: u64, steps: u64) -> Late {
        let is_late = |share: f32| {
            let last = (f64::from(share) * steps as f64).round() as u64;
            last > 0 && step.saturating_add(last) >= steps
        };
        Late { forward: is_late(self.late_forward), backward: is_late(self.late_backward) }
    }

    /// The same with these products dense, in the type of the activations.
    pub fn late(&self, late: Late) -> Recipe {
        let mut recipe = self.clone();
        for linear in recipe.layers.iter_mut().map(|layer| &mut layer.linear) {
            *linear = linear.late(late, self.activations);
        }
        recipe.linear = self.linear.late(late, self.activations);
        recipe
    }

    /// What any of its layers do.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().map(|layer| &layer.linear).chain([&self.linear])
    }

    /// What the layer of this name does.
    pub fn layer(&self, name: &str) -> &Linear {
        let found = self.layers.iter().rev().find(|layer| matches(&layer.name, name));
        found.map_or(&self.linear, |layer| &layer.linear)
    }
}

/// Whether `name` is like `pattern`, in which `*` is anything.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, tail)) => name.strip_prefix(head).is_some_and(|rest| {
            (0..=rest.len())
                .filter(|at| rest.is_char_boundary(*at))
                .any(|at| matches(tail, &rest[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_valid_and_survive_a_round_trip() {
        for name in PRESETS {
            let recipe = Recipe::preset(name).unwrap();
            recipe.validate().unwrap();
            assert_eq!(Recipe::parse(&recipe.to_toml().unwrap()).unwrap(), recipe, "{name}");
            assert_eq!(recipe.layer("head").forward.x.rounding, Round::Nearest);
            assert!(matches!(recipe.layer("head").forward.x.form().unwrap(), Form::Dense(_)));
        }
    }

    #[test]
    fn patterns() {
        for (pattern, name, is) in [
            ("head", "head", true),
            ("head", "heads", false),
            ("*.down", "blocks.3.down", true),
            ("blocks.1.*", "blocks.11.qkv", false),
            ("blocks.*.out", "blocks.1.out", true),
            ("*", "", true),
        ] {
            assert_eq!(matches(pattern, name), is, "{pattern} {name}");
        }
    }

    #[test]
    fn the_learning_rate_rises_stays_and_falls() {
        let rates = |decay| {
            let o = Optimizer { lr: 1.0, warmup: 0.1, decay, final_lr: 0.1, ..Default::default() };
            (0..100).map(|step| o.learning_rate(step, 100)).collect::<Vec<_>>()
        };
        for decay in [1.0, 0.9, 0.25, 0.0] {
            let rates = rates(decay);
            assert_eq!(rates[4], 0.5);
            assert!(rates[..10].is_sorted() && rates[9..].is_sorted_by(|a, b| a >= b));
            assert_eq!(rates[9], 1.0);
            assert_eq!(rates[99], if decay == 0.0 { 1.0 } else { 0.1 });
        }
        // A share that the rise leaves no room for is what is left.
        assert_eq!(rates(1.0), rates(0.95));
        let late = rates(0.2);
        assert!(late[9..80].iter().all(|rate| *rate == 1.0) && late[80] < 1.0);
        assert!((late[89] - 0.55).abs() < 1e-6, "half way down a cosine");
    }

    #[test]
    fn what_cannot_be_is_an_error() {
        let good = Recipe { late_backward: 0.0, ..Recipe::preset("mxfp4").unwrap() };
        type Broken = (&'static str, fn(&mut Recipe));
        let broken: [Broken; 22] = [
            ("activations and gradients", |r| r.linear.dgrad.w.scale = Some(Scale::ThreeQuarters)),
            ("three quarters of them", |r| {
                r.linear.forward.x = Cast::plain("mxfp4").scaled(Scale::ThreeQuarters);
                r.linear.forward.w = Cast::plain("mxfp4");
                r.linear.wgrad.x.requantized = true;
            }),
            ("NVFP4", |r| {
                r.linear.forward.x = Cast::plain("nvfp4").scaled(Scale::ThreeQuarters);
            }),
            ("for wgrad.x only", |r| r.linear.dgrad.dy.requantized = true),
            ("two MX formats", |r| {
                r.linear.forward = Linear::dense("bf16").forward;
                r.linear.wgrad.x.requantized = true;
            }),
            ("late_forward = 1.5, expected a share", |r| r.late_forward = 1.5),
            ("late_backward = 1.5, expected a share", |r| r.late_backward = 1.5),
            ("late_backward = -0.1", |r| r.late_backward = -0.1),
            ("late_backward = NaN", |r| r.late_backward = f32::NAN),
            ("at least 2", |r| r.oscillation = Some(Reset { every: 1, ..Default::default() })),
            ("transformed weights", |r| {
                r.oscillation = Some(Reset::default());
                r.linear.forward.w = Cast::plain("mxfp4").hadamard(32, Signs::None);
                r.linear.forward.x = r.linear.forward.w.clone();
            }),
            ("unknown format", |r| r.linear.forward.x.format = "fp3".into()),
            ("block", |r| r.linear.forward.x.block = Some("1x7".into())),
            ("square blocks", |r| r.linear.forward.x.block = Some("32x32".into())),
            ("does not clip", |r| r.linear.dgrad.dy.scale = Some(Scale::Floor)),
            ("same hadamard", |r| r.linear.wgrad.x.hadamard = Some(64)),
            ("has no block", |r| r.linear.forward.x.format = "bf16".into()),
            ("beta2", |r| r.optimizer.beta2 = 1.0),
            ("decay = -0.5", |r| r.optimizer.decay = -0.5),
            ("loss_scale", |r| r.loss_scale.initial = 30),
            ("directory", |r| r.name = "../mxfp4".into()),
            ("two quantiles", |r| {
                (r.linear.dgrad.dy.clip, r.linear.wgrad.dy.clip) = (Some(0.9), Some(0.99));
            }),
        ];
        for (says, breaks) in broken {
            let mut recipe = good.clone();
            breaks(&mut recipe);
            if says == "has no block" {
                recipe.linear.forward.x.block = Some("1x32".into());
            }
            let error = recipe.validate().unwrap_err().to_string();
            assert!(error.contains(says), "{says}: {error}");
        }
        let unknown = good.to_toml().unwrap().replace("clip_norm", "clip_morn");
        assert!(Recipe::parse(&unknown).unwrap_err().to_string().contains("clip_morn"));
        let with = |line: &str| Recipe::parse(&format!("{line}\n{}", good.to_toml().unwrap()));
        assert_eq!(
            with("late_backward = 0.25").unwrap(),
            Recipe { late_backward: 0.25, ..good.clone() }
        );
        for (line, says) in [
            ("late_backwards = 0.25", ["late_backwards", "`late_backward`"]),
            ("late_backward = true", ["late_backward", "boolean"]),
            ("late_backward = 7", ["late_backward = 7", "from 0 to 1"]),
        ] {
            let error = with(line).unwrap_err().to_string();
            assert!(says.iter().all(|text| error.contains(text)), "{line}: {error}");
        }
    }

    #[test]
    fn late_products_are_dense() {
        let at = |late_forward, late_backward, step, steps| {
            let recipe = Recipe { late_forward, late_backward, ..Recipe::preset("mxfp4").unwrap() };
            let Late { forward, backward } = recipe.late_at(step, steps);
            [forward, backward]
        };
        // Half a step is one; the shares are each other's equals.
        assert_eq!(at(0.0, 0.0, 10, 10), [false, false]);
        assert_eq!(at(0.04, 0.05, 9, 10), [false, true]);
        assert_eq!(at(0.04, 0.05, 8, 10), [false, false]);
        assert_eq!(at(0.7, 0.2, 7, 10), [true, false]);
        assert_eq!(at(0.7, 0.2, 8, 10), [true, true]);
        assert_eq!(at(1.0, 0.0, 0, 10), [true, false]);
        assert_eq!(at(0.0, 1.0, 0, 10), [false, true]);
        assert_eq!(at(0.1, 0.1, 11, 10), [true, true]);
        for name in PRESETS {
            let mut recipe = Recipe::preset(name).unwrap();
            if name == "mxfp8" {
                recipe.linear.wgrad.x.requantized = true;
            }
            assert_eq!(recipe.late(Late::default()), recipe);
            for (forward, backward) in [(true, false), (false, true), (true, true)] {
                let late = recipe.late(Late { forward, backward });
                late.validate().unwrap();
                let dense = Linear::dense(recipe.activations.name());
                for (linear, was) in late.linears().zip(recipe.linears()) {
                    assert_eq!(linear.forward, if forward { &dense } else { was }.forward.clone());
                    assert_eq!(linear.dgrad, if backward { &dense } else { was }.dgrad.clone());
                    let mut wgrad = if backward { &dense } else { was }.wgrad.clone();
                    wgrad.x.requantized &= !forward;
                    assert_eq!(linear.wgrad, wgrad);
                }
            }
        }
    }
}
