//! Blocks for a recipe, chosen on a model's own tensors.
//!
//! For every linear layer and every packed operand of its three products, a [`Tuner`] measures the *relative mean squared
//! error* of each block size,
//!
//! ```text
//! e(block) = Σ (q(v) − v)² / Σ v²
//! ```
//!
//! over the samples it is given: v are the operand's values as the quantizer sees them, along the axis that the product
//! contracts and after the cast's Hadamard transform, if it has one; q packs them with the cast's format, scale rule and
//! rounding, and unpacks. [`choose`] then takes the largest block with `e(block) ≤ loss · e(16)`: larger blocks have fewer
//! scales to store, read and multiply, and cost accuracy where magnitudes within them differ.
//!
//! Vector blocks compete with vector blocks and squares with squares: whether a weight has squares is the recipe's decision,
//! because dgrad then reads what forward read, and not one about errors. Both kinds are in the [`Tuner::table`]. The blocks
//! of a product's operands need not be the same. Clipping and columns kept apart (`clip`, `outliers`) are left out of the
//! measurement.
//!
//! Samples come from [`Model::keep_operands`], in a run in bf16: errors are those of packing once, not of a run that has
//! adapted to them. Measured on the host, in f64.

use crate::engine::buffer::{DType, Tensor};
use crate::formats::{Axis, Block, MxSpec, MxTensor};
use crate::kernels::QuantizeDesc;
use crate::kernels::quantize_both::Hadamard;
use crate::{Context, Error, Result};

use super::linear::Draws;
use super::model::Model;
use super::recipe::{Cast, Form, Layer, Linear, Recipe, Scale};

/// The factor of [`choose`], if nothing else is asked for.
pub const LOSS: f64 = 1.1;
/// Tokens of a sample that are measured, at most.
const TOKENS: usize = 4096;

/// The operands of a layer's products: name, tensor, contracted axis, product.
const OPERANDS: [(&str, Source, Axis, u32); 6] = [
    ("forward.x", Source::X, Axis::One, 0),
    ("forward.w", Source::W, Axis::One, 0),
    ("dgrad.dy", Source::Dy, Axis::One, 1),
    ("dgrad.w", Source::W, Axis::Zero, 1),
    ("wgrad.dy", Source::Dy, Axis::Zero, 2),
    ("wgrad.x", Source::X, Axis::Zero, 2),
];

#[derive(Clone, Copy, PartialEq)]
enum Source {
    X,
    W,
    Dy,
}

fn casts(linear: &mut Linear) -> [&mut Cast; 6] {
    let Linear { forward, dgrad, wgrad } = linear;
    [&mut forward.x, &mut forward.w, &mut dgrad.dy, &mut dgrad.w, &mut wgrad.dy, &mut wgrad.x]
}

/// A row-major matrix on the host.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Its elements.
    pub values: Vec<f32>,
    /// Rows and columns.
    pub shape: [usize; 2],
}

impl Matrix {
    /// Lines along `axis`, that is itself or its transpose.
    fn lines(&self, axis: Axis) -> Matrix {
        let [rows, cols] = self.shape;
        match axis {
            Axis::One => self.clone(),
            Axis::Zero => Matrix {
                values: (0..rows * cols).map(|i| self.values[i % rows * cols + i / rows]).collect(),
                shape: [cols, rows],
            },
        }
    }
}

/// Sums over what was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Sums {
    error: f64,
    signal: f64,
}

impl Sums {
    /// The relative mean squared error; of nothing but zeros it is zero.
    fn relative(self) -> f64 {
        if self.signal == 0.0 { self.error } else { self.error / self.signal }
    }
}

/// What was measured of an operand.
#[derive(Debug)]
struct Operand {
    name: &'static str,
    /// In the order of [`Block::ALL`]; nothing where the operand cannot have it.
    sums: [Option<Sums>; Block::ALL.len()],
    /// Whether the recipe has squares.
    square: bool,
}

impl Operand {
    fn errors(&self, square: bool) -> Vec<(Block, f64)> {
        let all = Block::ALL.into_iter().zip(self.sums);
        all.filter(|(block, _)| (block.lines() > 1) == square)
            .filter_map(|(block, sums)| Some((block, sums?.relative())))
            .collect()
    }

    fn chosen(&self, loss: f64) -> Option<Block> {
        choose(&self.errors(self.square), loss)
    }
}

/// The largest block whose error is at most `loss` times that of the first; blocks in ascending order. That is the first if
/// its error is no number.
pub fn choose(errors: &[(Block, f64)], loss: f64) -> Option<Block> {
    let (first, least) = errors.first()?;
    let within = errors.iter().rev().find(|(_, error)| *error <= loss * least);
    Some(within.map_or(*first, |(block, _)| *block))
}

/// Measures a recipe's operands, and chooses blocks for them.
#[derive(Debug)]
pub struct Tuner {
    recipe: Recipe,
    layers: Vec<(String, Vec<Operand>)>,
}

impl Tuner {
    /// For a recipe, of which operands in dense formats stay as they are.
    pub fn new(recipe: &Recipe) -> Result<Tuner> {
        recipe.validate()?;
        Ok(Tuner { recipe: recipe.clone(), layers: Vec::new() })
    }

    /// Measures what the layers of a model kept of their last pass, after [`Model::keep_operands`]. Waits.
    pub async fn sample(&mut self, ctx: &Context, model: &Model, draws: Draws) -> Result<()> {
        for (id, linear) in model.linears() {
            let param = &model.params[id];
            let Some([x, dy]) = linear.kept() else {
                return Err(Error::Mismatch {
                    operation: "Tuner::sample",
                    problem: format!("{} kept no operands", param.name),
                });
            };
            let read = async |tensor: &Tensor, rows: usize| -> Result<Matrix> {
                let cols = tensor.shape()[1];
                let rows = rows.min(tensor.shape()[0]);
                let bytes = ctx.read(tensor).await?;
                let values = match tensor.dtype() {
                    DType::F32 => bytemuck::pod_collect_to_vec(&bytes[..rows * cols * 4]),
                    dtype => {
                        let mut values = vec![0.0; rows * cols];
                        let halves: Vec<u16> = bytemuck::pod_collect_to_vec(&bytes);
                        dtype.widen_all(&halves, &mut values);
                        values
                    }
                };
                Ok(Matrix { values, shape: [rows, cols] })
            };
            let [x, dy] = [read(x, TOKENS).await?, read(dy, TOKENS).await?];
            self.measure(&param.name, &x, &read(&param.value, usize::MAX).await?, &dy, draws)?;
        }
        Ok(())
    }

    /// Measures the operands of the layer of this name: inputs `[T, K]`, weights `[N, K]` and gradients of the outputs
    /// `[T, N]`.
    pub fn measure(
        &mut self,
        layer: &str,
        x: &Matrix,
        w: &Matrix,
        dy: &Matrix,
        draws: Draws,
    ) -> Result<()> {
        let at = match self.layers.iter().position(|(name, _)| name == layer) {
            Some(at) => at,
            None => {
                self.layers.push((layer.into(), Vec::new()));
                self.layers.len() - 1
            }
        };
        let mut linear = self.recipe.layer(layer).clone();
        for (number, (cast, (name, source, axis, product))) in
            (0..).zip(casts(&mut linear).into_iter().zip(OPERANDS))
        {
            let Form::Mx(spec) = cast.form()? else { continue };
            let from = match source {
                Source::X => x,
                Source::W => w,
                Source::Dy => dy,
            };
            let mut lines = from.lines(axis);
            let hadamard = draws.hadamard(cast, at as u32, product);
            if let Some(hadamard) = hadamard {
                transform(hadamard, name, &mut lines)?;
            }
            let operands = &mut self.layers[at].1;
            let of = match operands.iter().position(|operand| operand.name == name) {
                Some(of) => of,
                None => {
                    let square = spec.block.lines() > 1;
                    operands.push(Operand { name, sums: [None; Block::ALL.len()], square });
                    operands.len() - 1
                }
            };
            for (block, sums) in Block::ALL.into_iter().zip(&mut operands[of].sums) {
                let exists = match block {
                    Block::Vector(n) => n == 16 || n as usize <= lines.shape[1],
                    Block::Square(_) => source == Source::W && hadamard.is_none(),
                };
                if !exists {
                    continue;
                }
                // Three quarters do not clip either: under another rule that does not, errors are much the same.
                let rule = if cast.is_three_quarters() { Some(Scale::Rceil) } else { cast.scale };
                let desc = QuantizeDesc {
                    spec: MxSpec { block, ..spec },
                    scale_rule: rule.map(Into::into),
                    rounding: draws.rounding(cast, at as u32, number),
                    ..Default::default()
                };
                let packed =
                    MxTensor::quantize(&lines.values, lines.shape[0], lines.shape[1], &desc)?;
                let sums = sums.get_or_insert_default();
                for (v, q) in lines.values.iter().zip(packed.dequantize()) {
                    let v = f64::from(*v);
                    sums.error += (f64::from(q) - v).powi(2);
                    sums.signal += v * v;
                }
            }
        }
        Ok(())
    }

    /// The recipe with the chosen blocks, an entry for each layer that was measured, called NAME-tuned.
    pub fn recipe(&self, loss: f64) -> Result<Recipe> {
        let mut recipe = self.recipe.clone();
        recipe.name += "-tuned";
        for (name, operands) in self.layers.iter().filter(|(_, operands)| !operands.is_empty()) {
            let mut linear = self.recipe.layer(name).clone();
            for (cast, (operand, ..)) in casts(&mut linear).into_iter().zip(OPERANDS) {
                let measured = operands.iter().find(|measured| measured.name == operand);
                if let Some(block) = measured.and_then(|measured| measured.chosen(loss)) {
                    cast.block = Some(block.to_string());
                }
            }
            recipe.layers.push(Layer { name: name.clone(), linear });
        }
        recipe.validate()?;
        Ok(recipe)
    }

    /// The errors as lines of text; the chosen blocks have a star.
    pub fn table(&self, loss: f64) -> String {
        let width = self.layers.iter().map(|(name, _)| name.len()).max().unwrap_or(0).max(5);
        let mut text = format!("{:width$}  {:9}", "layer", "operand");
        for block in Block::ALL {
            text += &format!("  {:>9} ", block.to_string());
        }
        for (name, operands) in &self.layers {
            for operand in operands {
                text += &format!("\n{name:width$}  {:9}", operand.name);
                let chosen = operand.chosen(loss);
                for (block, sums) in Block::ALL.into_iter().zip(operand.sums) {
                    let error = sums.map_or(String::new(), |s| format!("{:.3e}", s.relative()));
                    let star = if chosen == Some(block) { '*' } else { ' ' };
                    text += &format!("  {error:>9}{star}");
                }
                text.truncate(text.trim_end().len());
            }
        }
        text
    }
}

/// The transform of all lines.
fn transform(hadamard: Hadamard, operand: &str, lines: &mut Matrix) -> Result<()> {
    let size = hadamard.size as usize;
    if !lines.shape[1].is_multiple_of(size) {
        return Err(Error::Mismatch {
            operation: "Tuner::measure",
            problem: format!(
                "{operand}: a Hadamard transform of size {size} of lines of {}",
                lines.shape[1]
            ),
        });
    }
    lines.values.chunks_exact_mut(size).for_each(|group| hadamard.apply(group));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::model::{ModelDesc, Pass};
    use crate::train::recipe::Forward;
    use crate::{DeviceChoice, Options};

    const DRAWS: Draws = Draws { seed: 1, step: 1 };

    #[test]
    fn the_largest_block_within_the_loss() {
        let errors = |e: [f64; 4]| -> Vec<_> {
            [16, 32, 64, 128].map(Block::Vector).into_iter().zip(e).collect()
        };
        for (e, loss, block) in [
            ([1.0, 1.05, 1.1, 1.2], 1.1, 64),
            ([1.0, 1.05, 1.1, 1.2], 1.0, 16),
            ([1.0, 1.05, 1.1, 1.2], 2.0, 128),
            // It need not rise.
            ([1.0, 1.3, 1.05, 1.2], 1.1, 64),
            ([1.0, 0.9, 1.2, 1.2], 1.1, 32),
            ([0.0, 0.0, 0.0, 1e-9], 1.1, 64),
            ([f64::NAN, 1.0, 1.0, 1.0], 1.1, 16),
        ] {
            assert_eq!(choose(&errors(e), loss), Some(Block::Vector(block)), "{e:?}");
        }
        assert_eq!(choose(&[], 1.1), None);
    }

    /// Numbers of E2M1, of which each run of `run` along `axis` has another exponent: exact in blocks up to `run`, and
    /// rounded to zero in longer ones.
    fn runs(shape: [usize; 2], axis: Axis, run: usize) -> Matrix {
        let values = (0..shape[0] * shape[1]).map(|i| {
            let at = if axis == Axis::One { i % shape[1] } else { i / shape[1] };
            let value = [1.0, 1.5, -2.0, 3.0, -4.0, 6.0][(i % shape[1] + i / shape[1]) % 6];
            if at / run % 2 == 1 { value / 1024.0 } else { value }
        });
        Matrix { values: values.collect(), shape }
    }

    #[test]
    fn blocks_follow_the_runs_of_magnitudes() {
        let recipe = Recipe::preset("naive").unwrap();
        for (run, block) in [(16, "1x16"), (32, "1x32"), (64, "1x64"), (128, "1x128")] {
            let mut tuner = Tuner::new(&recipe).unwrap();
            // Along rows for forward; what is contracted elsewhere has no runs, and errors as in blocks of 16.
            let x = runs([128, 256], Axis::One, run);
            let w = runs([128, 256], Axis::One, run);
            let dy = runs([128, 128], Axis::Zero, run);
            tuner.measure("a.b", &x, &w, &dy, DRAWS).unwrap();
            let tuned = tuner.recipe(1.0).unwrap();
            let a = tuned.layer("a.b");
            assert_eq!(a.forward.x.block.as_deref(), Some(block), "{run}");
            assert_eq!(a.forward.w.block.as_deref(), Some(block));
            assert_eq!(a.wgrad.dy.block.as_deref(), Some(if run == 128 { "1x128" } else { block }));
            assert_eq!(a.dgrad.dy.block.as_deref(), Some("1x128"));
            // Others stay.
            assert_eq!(tuned.layer("c"), recipe.layer("c"));
            assert_eq!(tuned.layer("head"), recipe.layer("head"));
            assert_eq!(Recipe::parse(&tuned.to_toml().unwrap()).unwrap(), tuned);
            let table = tuner.table(1.0);
            assert_eq!(table.lines().count(), 7, "{table}");
            assert_eq!(table.matches('*').count(), 6, "{table}");
        }
    }

    #[test]
    fn squares_stay_squares() {
        let mut recipe = Recipe::preset("mxfp4").unwrap();
        let w = Cast::plain("mxfp4").blocked("32x32").scaled(Scale::Even);
        recipe.linear.forward =
            Forward { x: Cast::plain("mxfp4").scaled(Scale::Even), w: w.clone() };
        recipe.linear.dgrad.w = w;
        let mut tuner = Tuner::new(&recipe).unwrap();
        let all = runs([128, 128], Axis::One, 16);
        tuner.measure("a", &all, &all, &all, DRAWS).unwrap();
        let tuned = tuner.recipe(1.1).unwrap();
        assert_eq!(tuned.layer("a").forward.w.block.as_deref(), Some("16x16"));
        assert_eq!(tuned.layer("a").dgrad.w.block.as_deref(), Some("16x16"));
        assert_eq!(tuned.layer("a").wgrad.x.hadamard, Some(32));
        let few = Matrix { values: vec![1.0; 8 * 128], shape: [8, 128] };
        let error = tuner.measure("a", &few, &all, &few, DRAWS).unwrap_err();
        assert!(error.to_string().contains("wgrad.dy"), "{error}");
    }

    #[test]
    fn a_tuned_model_trains() {
        let options = Options { device: DeviceChoice::Cpu, ..Default::default() };
        let ctx = Context::open_blocking(&options).unwrap();
        let desc = ModelDesc {
            layers: 1,
            dim: 64,
            ffn: 96,
            heads: 2,
            seq: 64,
            batch: 1,
            ..ModelDesc::preset("tiny").unwrap()
        };
        let tokens: Vec<u32> = (0..65).map(|i| i * i % 251).collect();
        let pass = Pass { draws: DRAWS, count: false };
        let step = |recipe: &Recipe, tuner: Option<&mut Tuner>| {
            let mut model = Model::new(&ctx, &desc, recipe, 0).unwrap();
            if let Some(tuner) = &tuner {
                let error = pollster::block_on(
                    Tuner::new(&tuner.recipe).unwrap().sample(&ctx, &model, DRAWS),
                );
                assert!(error.unwrap_err().to_string().contains("kept no operands"));
                model.keep_operands().unwrap();
            }
            model.set_batch(&tokens).unwrap();
            let mut stream = ctx.stream();
            model.prepare(&mut stream, DRAWS, false).unwrap();
            model.record(&mut stream, pass, Some(1.0)).unwrap();
            ctx.submit(stream).unwrap();
            if let Some(tuner) = tuner {
                pollster::block_on(tuner.sample(&ctx, &model, DRAWS)).unwrap();
            }
            let loss = ctx.read_blocking(model.losses().next().unwrap()).unwrap();
            f32::from_le_bytes(loss.try_into().unwrap())
        };
        let mut tuner = Tuner::new(&Recipe::preset("mxfp4").unwrap()).unwrap();
        let dense = step(&Recipe::preset("bf16").unwrap(), Some(&mut tuner));
        // Each of four layers, not the head.
        let tuned = tuner.recipe(LOSS).unwrap();
        let entries: Vec<_> = tuned.layers.iter().map(|layer| &layer.name[..]).collect();
        assert_eq!(
            entries,
            [
                "*.experts.*",
                "head",
                "*.router",
                "blocks.0.qkv",
                "blocks.0.out",
                "blocks.0.gate_up",
                "blocks.0.down"
            ]
        );
        let packed = step(&tuned, None);
        assert!((packed - dense).abs() < 0.1, "{packed} {dense}");
    }
}
