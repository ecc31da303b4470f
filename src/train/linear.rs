//! A linear layer `Y[T, N] = X[T, K] · W[N, K]ᵀ` in the formats of its recipe.
//!
//! X is quantized once on the way forward, along its rows for the product and down its columns for wgrad, so that a packed
//! X is all that is kept; dY likewise on the way back. Weights are packed once a step by [`MxLinear::prepare`].
//!
//! **Exact** where the products' tier is: codes and scales always. Rounding draws belong to (seed, step, layer, operand).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::engine::buffer::{DType, DeviceMxTensor, Ids, Tensor};
use crate::engine::{Context, Stream};
use crate::formats::{Axis, Rounding};
use crate::kernels::matmul::{Extras, Groups, Input, Values};
use crate::kernels::quantize_both::{Guards, Hadamard, QuantizeBoth, Side, Signs};
use crate::kernels::{
    Dequantize, DequantizeDesc, Matmul, MatmulDesc, Operand, Quantile, Quantize, QuantizeDesc,
    Split, add,
};
use crate::{Error, Result};

use super::recipe::{self, Cast, Form, Linear, Round};

/// The sizes of a linear layer.
#[derive(Clone, Copy, Debug)]
pub struct LinearDesc {
    /// Tokens.
    pub rows: usize,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// The type of X.
    pub x: DType,
    /// The type of W.
    pub w: DType,
    /// The type of Y.
    pub y: DType,
    /// The type of dY.
    pub dy: DType,
    /// The type of dX.
    pub dx: DType,
    /// With experts: `rows` are slots, grouped by expert, and W is `[experts · N, K]`.
    pub experts: Option<usize>,
}

/// What random bits of a step depend on.
#[derive(Clone, Copy, Debug)]
pub struct Draws {
    /// The run's seed.
    pub seed: u64,
    /// The step, from 1 on.
    pub step: u32,
}

impl Draws {
    /// Domains that do not meet: the optimizer's streams have the step in their upper half and this bit clear.
    const DOMAIN: u64 = 1 << 63;

    pub(super) fn rounding(self, cast: &Cast, layer: u32, operand: u32) -> Rounding {
        match cast.rounding {
            Round::Nearest => Rounding::NearestEven,
            Round::Stochastic => Rounding::Stochastic {
                seed: self.seed,
                stream: Self::DOMAIN
                    | u64::from(self.step) << 32
                    | u64::from(layer) << 8
                    | u64::from(operand),
            },
        }
    }

    /// Both operands of a product get the same signs.
    pub(super) fn hadamard(self, cast: &Cast, layer: u32, product: u32) -> Option<Hadamard> {
        let place = u64::from(layer) << 8 | u64::from(product);
        cast.hadamard.map(|size| Hadamard {
            size,
            signs: match cast.signs.unwrap_or(recipe::Signs::None) {
                recipe::Signs::None => Signs::None,
                recipe::Signs::Fixed => Signs::Random { seed: self.seed ^ place },
                recipe::Signs::Step => {
                    Signs::Random { seed: self.seed ^ place ^ u64::from(self.step) << 32 }
                }
            },
        })
    }
}

/// What a layer is told of a pass.
#[derive(Debug)]
pub struct Step<'a> {
    /// Random bits.
    pub draws: Draws,
    /// The quantizers count here, see [`crate::kernels::quantize_both::COUNTERS`].
    pub counters: Option<&'a mut Ids>,
    /// With experts: their slots.
    pub groups: Option<&'a Groups>,
}

/// Where the six casts stand in a layer's random streams.
const X_ROWS: u32 = 0;
const X_COLUMNS: u32 = 1;
const DY_ROWS: u32 = 2;
const DY_COLUMNS: u32 = 3;
/// And the three products in its signs.
const FORWARD: u32 = 0;
const DGRAD: u32 = 1;
const WGRAD: u32 = 2;

/// An operand that is made anew every step.
#[derive(Debug)]
enum Made {
    /// The tensor is taken as it is.
    AsIs(DType),
    /// Converted to another dense type.
    Cast(Tensor),
    /// Packed.
    Packed(DeviceMxTensor),
    /// What the other product takes.
    Shared(Values),
}

impl Made {
    /// For a tensor `[rows, cols]` of `from`, contracted along `axis`.
    fn new(ctx: &Context, cast: &Cast, from: DType, shape: [usize; 2], axis: Axis) -> Result<Made> {
        let [rows, cols] = shape;
        Ok(match cast.form()? {
            // What is bf16 already has lost what f32 could keep.
            Form::Dense(to) if to == from || from == DType::BF16 => Made::AsIs(from),
            Form::Dense(to) => Made::Cast(ctx.zeros(to, rows, cols)?),
            Form::Mx(spec) => Made::Packed(ctx.zeros_mx(spec, axis, rows, cols)?),
        })
    }

    /// What the second of two products takes of `first`, the first one's, if it can. `same`: packed alike in both.
    fn shared(first: &Made, same: bool, cast: &Cast) -> Result<Option<Made>> {
        Ok(match (first, cast.form()?) {
            (Made::Cast(tensor), Form::Dense(to)) if to == tensor.dtype() => {
                Some(Made::Shared(first.values()))
            }
            (Made::Packed(_), Form::Mx(_)) if same => Some(Made::Shared(first.values())),
            _ => None,
        })
    }

    fn values(&self) -> Values {
        match self {
            Made::Shared(values) => *values,
            Made::AsIs(dtype) => Values::Dense(*dtype),
            Made::Cast(tensor) => Values::Dense(tensor.dtype()),
            Made::Packed(tensor) => Values::Mx(tensor.layout().spec),
        }
    }

    /// `across`: contracted over the dense tensor's rows.
    fn operand(&self, across: bool) -> Operand {
        let values = self.values();
        Operand { values, transposed: across && matches!(values, Values::Dense(_)) }
    }

    fn input<'a>(&'a self, as_is: &'a Tensor) -> Input<'a> {
        match self {
            Made::AsIs(_) | Made::Shared(_) => as_is.into(),
            Made::Cast(tensor) => tensor.into(),
            Made::Packed(tensor) => tensor.into(),
        }
    }

    /// The second product's, where `first` is the first one's.
    fn input_beside<'a>(&'a self, first: &'a Made, as_is: &'a Tensor) -> Input<'a> {
        match self {
            Made::Shared(_) => first.input(as_is),
            made => made.input(as_is),
        }
    }

    fn packed(&mut self) -> Option<&mut DeviceMxTensor> {
        match self {
            Made::Packed(tensor) => Some(tensor),
            _ => None,
        }
    }
}

/// What layers make and use up within one of their passes: a tensor for all of them, if it has the same form and shape and
/// stands in the same place. It lives as long as a layer has it.
#[derive(Debug, Default)]
pub struct Scratch {
    made: Vec<(Key, Weak<Mutex<Made>>)>,
}

/// A place among a layer's operands; what is there; the type that it is made from; its shape.
type Key = (Place, Form, DType, [usize; 2]);

/// Operands that nothing keeps.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    X,
    XValues,
    Dy,
    DyColumns,
}

/// An operand that other layers may have, too.
type Lent = Arc<Mutex<Made>>;

fn own(made: Made) -> Lent {
    Arc::new(Mutex::new(made))
}

/// For as long as a pass of a layer is recorded: nothing else has it meanwhile.
fn lock(made: &Mutex<Made>) -> MutexGuard<'_, Made> {
    made.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Scratch {
    fn get(&mut self, key: Key, make: impl FnOnce() -> Result<Made>) -> Result<Lent> {
        self.made.retain(|(_, made)| made.strong_count() > 0);
        let found = self.made.iter().find(|(of, _)| *of == key);
        if let Some(made) = found.and_then(|(_, made)| made.upgrade()) {
            return Ok(made);
        }
        let made = own(make()?);
        self.made.push((key, Arc::downgrade(&made)));
        Ok(made)
    }
}

/// The columns that are kept in bf16: their product is added to the main one.
#[derive(Debug)]
struct Outliers {
    split: Split,
    x: Tensor,
    w: Tensor,
    /// Of the weight: in the type of x, if that is not finer.
    w_dense: Made,
    product: Matmul,
}

/// A linear layer: what it needs besides its weight.
#[derive(Debug)]
pub struct MxLinear {
    desc: LinearDesc,
    recipe: Linear,
    /// Its number, for random streams.
    layer: u32,
    accumulate: bool,
    x: Lent,
    x_columns: Made,
    w: Made,
    dy: Lent,
    dy_columns: Lent,
    w_dgrad: Made,
    /// Which way that one's blocks run.
    across: Across,
    forward: Matmul,
    dgrad: Matmul,
    wgrad: Matmul,
    clips: [Option<(Quantile, Tensor)>; 2],
    outliers: Option<Outliers>,
    /// The values of the packed x, where wgrad's is made of them.
    x_values: Option<Lent>,
    /// Copies of x and dy.
    kept: Option<[Tensor; 2]>,
}

impl MxLinear {
    /// Makes the layer number `layer`. `accumulate`: wgrad is added to what dW holds. What it needs for a while is the same as
    /// that of other layers of this `scratch`.
    pub fn new(
        ctx: &Context,
        desc: &LinearDesc,
        recipe: &Linear,
        layer: u32,
        accumulate: bool,
        scratch: &mut Scratch,
    ) -> Result<MxLinear> {
        recipe.validate()?;
        let LinearDesc { rows, n, k, .. } = *desc;
        let experts = desc.experts;
        // Experts' slots are padded to what belongs together.
        let slots = if experts.is_some() { 0 } else { rows };
        for (product, cast, len) in [
            ("forward", &recipe.forward.x, k),
            ("dgrad", &recipe.dgrad.dy, n),
            ("wgrad", &recipe.wgrad.dy, slots),
        ] {
            if let Some(size) = cast.hadamard.filter(|size| !len.is_multiple_of(*size as usize)) {
                return Err(Error::Mismatch {
                    operation: "MxLinear::new",
                    problem: format!(
                        "{product} sums over {len}, which Hadamard transforms of {size} do not divide"
                    ),
                });
            }
        }
        let (xs, ws, ys) = ([rows, k], [experts.unwrap_or(1) * n, k], [rows, n]);
        let mut lend = |place, cast: &Cast, from, shape, axis| {
            let key = (place, cast.form()?, from, shape);
            scratch.get(key, || Made::new(ctx, cast, from, shape, axis))
        };
        let (x_cast, dy_cast) = (&recipe.forward.x, &recipe.dgrad.dy);
        // A conversion that wgrad takes too is kept until then.
        let x = match (x_cast.form()?, recipe.wgrad.x.form()?) {
            (Form::Dense(a), Form::Dense(b)) if a == b => {
                own(Made::new(ctx, x_cast, desc.x, xs, Axis::One)?)
            }
            _ => lend(Place::X, x_cast, desc.x, xs, Axis::One)?,
        };
        let x_columns = match Made::shared(&lock(&x), false, &recipe.wgrad.x)? {
            Some(made) => made,
            None => Made::new(ctx, &recipe.wgrad.x, desc.x, xs, Axis::Zero)?,
        };
        let w = Made::new(ctx, &recipe.forward.w, desc.w, ws, Axis::One)?;
        let dy = lend(Place::Dy, dy_cast, desc.dy, ys, Axis::One)?;
        let dy_columns = match Made::shared(&lock(&dy), false, &recipe.wgrad.dy)? {
            Some(made) => own(made),
            None => lend(Place::DyColumns, &recipe.wgrad.dy, desc.dy, ys, Axis::Zero)?,
        };
        // Experts' matrices lie one under the other. Squares and dense types are read across; vector blocks are another packing,
        // of each one's transpose.
        let (across, shape, axis) = match (experts, recipe.dgrad.w.form()?) {
            (None, _) => (Across::Yes, ws, Axis::Zero),
            (Some(experts), Form::Mx(spec)) if spec.block.lines() == 1 => {
                (Across::Each(experts), [experts * k, n], Axis::One)
            }
            (Some(_), _) => (Across::No, ws, Axis::One),
        };
        let same = across == Across::No && recipe.dgrad.w == recipe.forward.w;
        let w_dgrad = match Made::shared(&w, same, &recipe.dgrad.w)? {
            Some(made) => made,
            None => Made::new(ctx, &recipe.dgrad.w, desc.w, shape, axis)?,
        };
        // What transforms, of both operands or none, and three quarters take from a product.
        let gain = |a: &Cast, b: &Cast| {
            let hadamard = a.hadamard.map(|size| Hadamard { size, signs: Signs::None });
            let less = [a, b].map(|cast| if cast.is_three_quarters() { 4.0 / 3.0 } else { 1.0 });
            (f64::from(hadamard.map_or(1.0, Hadamard::gain)) * less[0] * less[1]) as f32
        };
        // In f16 alone: how many lines of a trained model lie within the window of bytes has not been measured.
        let forward = Matmul::new(
            ctx,
            &MatmulDesc {
                m: rows,
                n,
                k,
                a: lock(&x).operand(false),
                b: w.operand(false),
                out: desc.y.into(),
                alpha: gain(&recipe.forward.x, &recipe.forward.w),
                experts,
                ..Default::default()
            },
        )?
        .without_bytes();
        let dgrad = Matmul::new(
            ctx,
            &MatmulDesc {
                m: rows,
                n: k,
                k: n,
                a: lock(&dy).operand(false),
                b: Operand {
                    transposed: across == Across::No || w_dgrad.operand(true).transposed,
                    ..w_dgrad.operand(true)
                },
                out: desc.dx.into(),
                alpha: gain(&recipe.dgrad.dy, &recipe.dgrad.w),
                experts,
                ..Default::default()
            },
        )?
        .without_bytes();
        let wgrad = Matmul::new(
            ctx,
            &MatmulDesc {
                m: n,
                n: k,
                k: rows,
                a: lock(&dy_columns).operand(true),
                b: x_columns.operand(true),
                out: DType::F32.into(),
                alpha: gain(&recipe.wgrad.dy, &recipe.wgrad.x),
                beta: if accumulate { 1.0 } else { 0.0 },
                experts,
                group_k: experts.is_some(),
                ..Default::default()
            },
        )?
        .without_bytes();
        let clip = |a: &Cast, b: &Cast| {
            let quantile = a.clip.or(b.clip);
            let clip = quantile.map(|q| Ok((Quantile::new(ctx, q)?, ctx.zeros(DType::F32, 1, 1)?)));
            clip.transpose()
        };
        let outliers = match recipe.forward.x.outliers {
            Some(_) if experts.is_some() => {
                return Err(Error::Recipe("forward.x: experts keep no outliers apart".into()));
            }
            None => None,
            Some(columns) => {
                let w_type = if desc.w == DType::BF16 { desc.w } else { desc.x };
                Some(Outliers {
                    split: Split::new(ctx, k, columns)?,
                    x: ctx.zeros(desc.x, rows, columns)?,
                    w: ctx.zeros(w_type, n, columns)?,
                    w_dense: match w_type == desc.w {
                        true => Made::AsIs(w_type),
                        false => Made::Cast(ctx.zeros(w_type, n, k)?),
                    },
                    product: Matmul::new(
                        ctx,
                        &MatmulDesc {
                            m: rows,
                            n,
                            k: columns,
                            a: desc.x.into(),
                            b: w_type.into(),
                            out: desc.y.into(),
                            beta: 1.0,
                            ..Default::default()
                        },
                    )?,
                })
            }
        };
        let x_values = match recipe.wgrad.x.requantized {
            true => {
                let key = (Place::XValues, Form::Dense(desc.x), desc.x, xs);
                Some(scratch.get(key, || Ok(Made::Cast(ctx.zeros(desc.x, rows, k)?)))?)
            }
            false => None,
        };
        Ok(MxLinear {
            desc: *desc,
            clips: [
                clip(&recipe.forward.x, &recipe.wgrad.x)?,
                clip(&recipe.dgrad.dy, &recipe.wgrad.dy)?,
            ],
            recipe: recipe.clone(),
            layer,
            accumulate,
            x,
            x_columns,
            w,
            dy,
            dy_columns,
            w_dgrad,
            across,
            forward,
            dgrad,
            wgrad,
            outliers,
            x_values,
            kept: None,
        })
    }

    /// The same with another recipe; the weight is to be prepared again.
    pub fn with_recipe(
        &self,
        ctx: &Context,
        recipe: &Linear,
        scratch: &mut Scratch,
    ) -> Result<MxLinear> {
        let Self { desc, layer, accumulate, .. } = self;
        let mut linear = MxLinear::new(ctx, desc, recipe, *layer, *accumulate, scratch)?;
        if self.kept.is_some() {
            linear.keep_operands(ctx)?;
        }
        Ok(linear)
    }

    /// What it does.
    pub fn recipe(&self) -> &Linear {
        &self.recipe
    }

    /// The weight as forward takes it, if it is packed.
    pub fn packed_weight(&self) -> Option<&DeviceMxTensor> {
        match &self.w {
            Made::Packed(w) => Some(w),
            _ => None,
        }
    }

    /// Whether backward needs X itself.
    pub fn keeps_x(&self) -> bool {
        matches!(self.x_columns, Made::AsIs(_))
    }

    /// A tensor for X, where backward needs X itself.
    pub fn x_to_keep(&self, ctx: &Context) -> Result<Option<Tensor>> {
        let LinearDesc { rows, k, x, .. } = self.desc;
        self.keeps_x().then(|| ctx.zeros(x, rows, k)).transpose()
    }

    /// Keeps copies of x and dy from now on, to be measured.
    pub fn keep_operands(&mut self, ctx: &Context) -> Result<()> {
        let LinearDesc { rows, n, k, x, dy, .. } = self.desc;
        self.kept = Some([ctx.zeros(x, rows, k)?, ctx.zeros(dy, rows, n)?]);
        Ok(())
    }

    /// Those of the last pass.
    pub fn kept(&self) -> Option<&[Tensor; 2]> {
        self.kept.as_ref()
    }

    /// The tiers of forward, dgrad and wgrad.
    pub fn tiers(&self) -> [crate::Tier; 3] {
        [self.forward.tier(), self.dgrad.tier(), self.wgrad.tier()]
    }

    /// How the weight is packed for forward, and where to, if its blocks are quantized as they are: the optimizer does it
    /// behind the update.
    pub fn packing(&mut self) -> Option<(QuantizeDesc, &mut DeviceMxTensor)> {
        let cast = &self.recipe.forward.w;
        match &mut self.w {
            Made::Packed(w) if cast.hadamard.is_none() => Some((packing(cast, w, Axis::One), w)),
            _ => None,
        }
    }

    /// Records the packing of the weight, which the products take until it is recorded again. `packed`: what
    /// [`MxLinear::packing`] says was done.
    pub fn prepare(
        &mut self,
        stream: &mut Stream<'_>,
        w: &Tensor,
        draws: Draws,
        packed: bool,
    ) -> Result<()> {
        let layer = self.layer;
        if !packed || self.packing().is_none() {
            let forward = &self.recipe.forward.w;
            let hadamard = draws.hadamard(forward, layer, FORWARD);
            weight(stream, w, forward, Across::No, hadamard, &mut self.w)?;
        }
        let dgrad = &self.recipe.dgrad.w;
        let hadamard = draws.hadamard(dgrad, layer, DGRAD);
        weight(stream, w, dgrad, self.across, hadamard, &mut self.w_dgrad)?;
        match &mut self.outliers {
            Some(o) => weight(stream, w, &Cast::plain("bf16"), Across::No, None, &mut o.w_dense),
            None => Ok(()),
        }
    }

    /// Records Y = X · Wᵀ, and what wgrad needs of X.
    pub fn forward(
        &mut self,
        stream: &mut Stream<'_>,
        x: &Tensor,
        w: &Tensor,
        y: &mut Tensor,
        step: Step<'_>,
    ) -> Result<()> {
        let Step { draws, counters, groups } = step;
        let extras = Extras { groups, ..Default::default() };
        let layer = self.layer;
        if let Some([kept, _]) = &mut self.kept {
            add::cast(stream, x, kept)?;
        }
        if let Some(o) = &mut self.outliers {
            o.split.choose(stream, x)?;
        }
        let recipe = &self.recipe;
        let row_cast =
            (&recipe.forward.x, draws.hadamard(&recipe.forward.x, layer, FORWARD), X_ROWS);
        let column_cast =
            (&recipe.wgrad.x, draws.hadamard(&recipe.wgrad.x, layer, WGRAD), X_COLUMNS);
        let mut made = lock(&self.x);
        let none = &mut Made::AsIs(self.desc.x);
        quantize(
            stream,
            x,
            row_cast,
            column_cast,
            &mut made,
            if self.x_values.is_some() { &mut *none } else { &mut self.x_columns },
            &mut self.clips[0],
            self.outliers.as_ref().map(|o| o.split.mask()),
            (draws, layer),
            counters,
        )?;
        let mut values = self.x_values.as_deref().map(lock);
        if let (Some(Made::Cast(values)), Made::Packed(packed)) = (values.as_deref_mut(), &*made) {
            let desc = DequantizeDesc { spec: packed.layout().spec, axis: packed.layout().axis };
            Dequantize::new(stream.context(), &desc)?.record(stream, packed, values)?;
            quantize(
                stream,
                values,
                row_cast,
                column_cast,
                none,
                &mut self.x_columns,
                &mut None,
                None,
                (draws, layer),
                None,
            )?;
        }
        self.forward.record_with(stream, made.input(x), self.w.input(w), &mut *y, extras)?;
        if let Some(o) = &mut self.outliers {
            o.split.gather(stream, x, &mut o.x)?;
            match &o.w_dense {
                Made::Cast(dense) => o.split.gather(stream, dense, &mut o.w)?,
                _ => o.split.gather(stream, w, &mut o.w)?,
            }
            o.product.record(stream, &o.x, &o.w, y)?;
        }
        Ok(())
    }

    /// Records dX = dY · W and dW = dYᵀ · X, of the last forward pass. `x`: as it was, where [`MxLinear::keeps_x`].
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &mut self,
        stream: &mut Stream<'_>,
        x: Option<&Tensor>,
        w: &Tensor,
        dy: &Tensor,
        dx: &mut Tensor,
        dw: &mut Tensor,
        step: Step<'_>,
    ) -> Result<()> {
        let Step { draws, counters, groups } = step;
        let extras = Extras { groups, ..Default::default() };
        let layer = self.layer;
        if let Some([_, kept]) = &mut self.kept {
            add::cast(stream, dy, kept)?;
        }
        let (mut made, mut columns) = (lock(&self.dy), lock(&self.dy_columns));
        quantize(
            stream,
            dy,
            (&self.recipe.dgrad.dy, draws.hadamard(&self.recipe.dgrad.dy, layer, DGRAD), DY_ROWS),
            (
                &self.recipe.wgrad.dy,
                draws.hadamard(&self.recipe.wgrad.dy, layer, WGRAD),
                DY_COLUMNS,
            ),
            &mut made,
            &mut columns,
            &mut self.clips[1],
            None,
            (draws, layer),
            counters,
        )?;
        self.dgrad.record_with(
            stream,
            made.input(dy),
            self.w_dgrad.input_beside(&self.w, w),
            dx,
            extras,
        )?;
        let x = match (&self.x_columns, x) {
            (Made::AsIs(_), None) => {
                return Err(Error::Mismatch {
                    operation: "MxLinear::backward",
                    problem: format!(
                        "[{}, {}]: wgrad reads x itself, and it was not kept",
                        self.desc.rows, self.desc.k
                    ),
                });
            }
            // Not read.
            (_, x) => x.unwrap_or(dy),
        };
        let dy_columns = columns.input_beside(&made, dy);
        let kept = lock(&self.x);
        let x_columns = self.x_columns.input_beside(&kept, x);
        self.wgrad.record_with(stream, dy_columns, x_columns, dw, extras)
    }
}

/// How a weight is packed, if it is not transformed.
fn packing(cast: &Cast, to: &DeviceMxTensor, axis: Axis) -> QuantizeDesc {
    let scale_rule = cast.scale.map(Into::into);
    QuantizeDesc { spec: to.layout().spec, axis, scale_rule, ..Default::default() }
}

/// Which way a weight's blocks run.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Across {
    /// Along its rows, or in squares that are stored so.
    No,
    /// Down its columns.
    Yes,
    /// Down the columns of each of so many experts' matrices.
    Each(usize),
}

/// A weight in its format.
fn weight(
    stream: &mut Stream<'_>,
    w: &Tensor,
    cast: &Cast,
    across: Across,
    hadamard: Option<Hadamard>,
    made: &mut Made,
) -> Result<()> {
    let ctx = stream.context().clone();
    match made {
        Made::AsIs(_) | Made::Shared(_) => Ok(()),
        Made::Cast(tensor) => add::cast(stream, w, tensor),
        Made::Packed(tensor) => {
            let axis = if let Across::No = across { Axis::One } else { Axis::Zero };
            let desc = packing(cast, tensor, axis);
            if let (None, Across::No | Across::Yes) = (hadamard, across) {
                return Quantize::new(&ctx, &desc)?.record(stream, w, tensor);
            }
            let QuantizeDesc { spec, scale_rule, rounding, .. } = desc;
            let side = Side { spec, scale_rule, rounding, hadamard, ..Default::default() };
            let side = Some(side);
            if let Across::No = across {
                let both = QuantizeBoth::new(&ctx, side, None)?;
                return both.record(stream, w, Some(tensor), None, &Guards::default(), None);
            }
            let mut both = QuantizeBoth::new(&ctx, None, side)?;
            if let Across::Each(experts) = across {
                both = both.stacked(experts);
            }
            both.record(stream, w, None, Some(tensor), &Guards::default(), None)
        }
    }
}

/// An activation or gradient in the formats of the two products that it is in.
#[allow(clippy::too_many_arguments)]
fn quantize(
    stream: &mut Stream<'_>,
    x: &Tensor,
    (row_cast, row_hadamard, row_operand): (&Cast, Option<Hadamard>, u32),
    (column_cast, column_hadamard, column_operand): (&Cast, Option<Hadamard>, u32),
    rows: &mut Made,
    columns: &mut Made,
    clip: &mut Option<(Quantile, Tensor)>,
    skip: Option<&Ids>,
    (draws, layer): (Draws, u32),
    mut counters: Option<&mut Ids>,
) -> Result<()> {
    for made in [&mut *rows, &mut *columns] {
        if let Made::Cast(to) = made {
            add::cast(stream, x, to)?;
        }
    }
    let side = |cast: &Cast, hadamard, operand, made: &Made| match made {
        Made::Packed(tensor) => Some(Side {
            spec: tensor.layout().spec,
            scale_rule: cast.scale.map(Into::into),
            rounding: draws.rounding(cast, layer, operand),
            hadamard,
            three_quarters: cast.is_three_quarters(),
        }),
        _ => None,
    };
    let row_side = side(row_cast, row_hadamard, row_operand, rows);
    let column_side = side(column_cast, column_hadamard, column_operand, columns);
    if row_side.is_none() && column_side.is_none() {
        return Ok(());
    }
    if let Some((quantile, threshold)) = clip {
        quantile.record(stream, x, threshold)?;
    }
    let clip = clip.as_ref().map(|(_, threshold)| threshold);
    // The columns that are set apart are missing from the product over them, not from wgrad.
    let row_guards = Guards { clip: row_cast.clip.and(clip), skip };
    let column_guards = Guards { clip: column_cast.clip.and(clip), skip: None };
    let ctx = stream.context().clone();
    let alike = skip.is_none() && row_cast.clip == column_cast.clip;
    if alike || row_side.is_none() || column_side.is_none() {
        let guards = if row_side.is_some() { row_guards } else { column_guards };
        let (rows, columns) = (rows.packed(), columns.packed());
        return QuantizeBoth::new(&ctx, row_side, column_side)?
            .record(stream, x, rows, columns, &guards, counters);
    }
    QuantizeBoth::new(&ctx, row_side, None)?.record(
        stream,
        x,
        rows.packed(),
        None,
        &row_guards,
        counters.as_deref_mut(),
    )?;
    QuantizeBoth::new(&ctx, None, column_side)?.record(
        stream,
        x,
        None,
        columns.packed(),
        &column_guards,
        counters,
    )
}
