//! Matrix products on packed operands: `y = alpha · A · Bᵀ + beta · y + bias`, A `[m, k]`, B `[n, k]`, y `[m, n]`.
//!
//! Either operand is MX in any format, its blocks along the contracted axis, or dense. Square-block and dense operands may
//! also be contracted over their other axis ([`Operand::transposed`]). Products may be batched, or grouped by expert: along
//! the rows of A, or along k, for the gradients of experts' weights.
//!
//! # Tiers
//! - [`Tier::Exact`]: E2M1, E2M3 and INT8 codes are small integers, so a block's dot product is exact in `dot4I8Packed`.
//!   **Exact**: the same bits on every engine.
//! - [`Tier::Tensor`]: cooperative matrices, f16 operands (E2M1 maybe bytes) and f32 accumulators. Bounded.
//! - [`Tier::Alu`]: f32 arithmetic, any operand. Bounded.
//! - [`Tier::Native`]: a vendor's library, where the machine has one that takes the problem ([`crate::native`]). Bounded. Its
//!   products are submitted, with all that the stream holds before them, when they are recorded.
//!
//! # Numerics
//! Every line of an MX operand has an *anchor* r, its largest E8M0 scale byte, kept with the tensor. Elements are decoded
//! relative to it, products are summed in f32, and 2^(rA − 127 + rB − 127) is applied at the end, by integer arithmetic and
//! rounded once: sums neither overflow nor become subnormal. Before it the sum is multiplied by alpha and NVFP4's tensor-wide
//! scales, significand by significand, each product rounded to nearest (powers of two are exact). A NaN scale is the anchor 255
//! and makes its whole line of outputs NaN; in a stack of transposed squares the anchor is that of the whole column of blocks.
//! NaN and infinity codes and values are what the device's arithmetic makes of them.
//!
//! The exact tier cuts k into *segments* of 32 elements (16 if a block has 16). With s the integer dot product of a segment's
//! codes and fa, fb its scales relative to the anchors, `acc += f32(s) · (fa · fb)` in ascending order; the products are exact,
//! and each sum is rounded to nearest. A block whose scale is below 2⁻¹⁰⁷ of its line's largest counts as zero.
//! Shaders: `shaders/matmul.wgsl` (tiles), `shaders/matmul_skinny.wgsl` (few rows), `shaders/matmul_tensor.wgsl`,
//! `shaders/matmul_join.wgsl` (slices of k), `shaders/anchors.wgsl`, `shaders/bytes_pack.wgsl`.

mod bytes;
mod cpu;
mod gpu;
#[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
pub(crate) mod native;
mod tier;
mod tune;

pub use bytes::Byte;
pub(crate) use bytes::ByteMatrices;
pub use gpu::kernels;
pub(in crate::kernels) use gpu::operand_constants;
pub(crate) use tune::Table;
pub use tune::{Candidate, Tuned, Tuning};

use crate::engine::buffer::{DType, DeviceMxTensor, Rows, STATE_WORDS, Tensor};
use crate::engine::{Context, Stream};
use crate::formats::element::{INFINITY, NAN, f32_from_parts, normalize};
use crate::formats::{Axis, Element, Layout, MxSpec, ScaleFormat};
use crate::kernels::QuantizeDesc;
use crate::{Error, Result};

/// How a product is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Tier {
    /// The fastest that the engine has for the problem; [`Matmul::tier`] and [`Matmul::why`] say which and why.
    #[default]
    Auto,
    /// Integer dot products; the same bits on every engine.
    Exact,
    /// Cooperative matrices: f16 operands, f32 accumulators. E2M1 under E8M0 scales on both sides: operands of eight bits, E4M3
    /// or integers ([`Byte`]), where the device has such matrices and that is exact, tile by tile.
    Tensor,
    /// f32 arithmetic.
    Alu,
    /// A vendor's library on FP4 or FP8 tensor cores: see [`crate::native`].
    Native,
}

/// What an operand holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Values {
    /// A packed tensor.
    Mx(MxSpec),
    /// A dense tensor.
    Dense(DType),
}

/// One operand of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Operand {
    /// What it holds.
    pub values: Values,
    /// Whether it is contracted over its other axis: dense `[k, m]` instead of `[m, k]`; MX over its lines instead of along
    /// them, which only square blocks allow.
    pub transposed: bool,
}

impl From<Values> for Operand {
    fn from(values: Values) -> Operand {
        Operand { values, transposed: false }
    }
}

impl From<MxSpec> for Operand {
    fn from(spec: MxSpec) -> Operand {
        Values::Mx(spec).into()
    }
}

impl From<DType> for Operand {
    fn from(dtype: DType) -> Operand {
        Values::Dense(dtype).into()
    }
}

impl Operand {
    /// The same, contracted over the other axis.
    pub const fn transposed(self) -> Operand {
        Operand { transposed: !self.transposed, ..self }
    }
}

/// What a product is written as.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Output {
    /// A dense tensor; f16 and bf16 rounded to nearest even.
    Dense(DType),
    /// Quantized in the same dispatch, with blocks along the rows of y. NVFP4 needs its `tensor_scale` given.
    Mx(QuantizeDesc),
}

impl From<DType> for Output {
    fn from(dtype: DType) -> Output {
        Output::Dense(dtype)
    }
}

impl From<QuantizeDesc> for Output {
    fn from(desc: QuantizeDesc) -> Output {
        Output::Mx(desc)
    }
}

/// What [`Matmul`] does. Set `m`, `n`, `k`; the rest has defaults: one product of two MXFP4 operands to f32, any tier.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MatmulDesc {
    /// Rows of A and of y (in all groups together, if grouped).
    pub m: usize,
    /// Rows of B, columns of y (of one expert, if grouped).
    pub n: usize,
    /// The contracted length.
    pub k: usize,
    /// A.
    pub a: Operand,
    /// B.
    pub b: Operand,
    /// y.
    pub out: Output,
    /// How many products: operands and y are stacked along their first logical axis.
    pub batch: usize,
    /// Grouped: B is a stack of this many experts' matrices, and [`Groups`] says which rows of A go to which.
    pub experts: Option<usize>,
    /// Grouped along k instead: y is a stack of this many experts' matrices `[m, n]`, and that of expert g sums the positions
    /// `offsets[g] .. offsets[g + 1]` of k alone, multiples of 32. A and B are one matrix each, [`Groups`] has as many groups,
    /// and its experts are not read. An empty group's product is zero. Anchors are those of whole lines, so that a NaN scale
    /// makes its line NaN in all experts.
    pub group_k: bool,
    /// The factor of the product.
    pub alpha: f32,
    /// The factor of what y holds already; dense outputs only. Zero ignores it, NaN included.
    pub beta: f32,
    /// Whether a bias `[1, n]` in f32 is added.
    pub bias: bool,
    /// How to compute it.
    pub tier: Tier,
}

impl Default for MatmulDesc {
    fn default() -> Self {
        MatmulDesc {
            m: 0,
            n: 0,
            k: 0,
            a: crate::MXFP4.into(),
            b: crate::MXFP4.into(),
            out: Output::Dense(DType::F32),
            batch: 1,
            experts: None,
            group_k: false,
            alpha: 1.0,
            beta: 0.0,
            bias: false,
            tier: Tier::Auto,
        }
    }
}

/// The groups of a grouped product: group g's rows are `offsets[g] .. offsets[g + 1]`, multiplied with the matrix of expert
/// `experts[g]`; with [`MatmulDesc::group_k`] these are positions of k. Lives on the device, so that a router may write it
/// there; empty groups are allowed, and rows outside all groups are not touched (packed outputs: zero).
#[derive(Debug)]
pub struct Groups {
    groups: usize,
    /// [0] invalid groups met; groups + 1 offsets; groups experts.
    data: Rows,
}

impl Groups {
    /// From the host. Checked: as many offsets as experts and one more, ascending, every expert below `experts_total`.
    pub fn new(
        ctx: &Context,
        offsets: &[u32],
        experts: &[u32],
        experts_total: usize,
    ) -> Result<Groups> {
        let mismatch = |problem| Err(Error::Mismatch { operation: "Groups::new", problem });
        if offsets.len() != experts.len() + 1 {
            return mismatch(format!(
                "{} offsets for {} experts: one more offset than experts",
                offsets.len(),
                experts.len()
            ));
        }
        if let Some(g) = offsets.windows(2).position(|o| o[1] < o[0]) {
            return mismatch(format!(
                "group {g} starts at row {} and ends at row {}",
                offsets[g],
                offsets[g + 1]
            ));
        }
        if let Some(g) = experts.iter().position(|e| *e as usize >= experts_total) {
            return mismatch(format!(
                "group {g} asks for expert {} of {experts_total}",
                experts[g]
            ));
        }
        let words: Vec<u32> = [&[0], offsets, experts].concat();
        let mut data = Rows::new(ctx, "mx.groups", 1, words.len() * 4, 1)?;
        data.write(ctx, bytemuck::cast_slice(&words))?;
        Ok(Groups { groups: experts.len(), data })
    }

    /// For a kernel to write: as many empty groups as experts, group g expert g's.
    pub fn zeros(ctx: &Context, experts: usize) -> Result<Groups> {
        let ids: Vec<u32> = (0..experts as u32).collect();
        Groups::new(ctx, &vec![0; experts + 1], &ids, experts)
    }

    /// Over a buffer of the caller's, with usage `STORAGE`: a word that is zero, then groups + 1 offsets, then groups experts,
    /// u32 each. The values are checked on the device: a group whose offsets descend or pass the last row, or whose expert
    /// does not exist, gives NaN and is counted ([`Groups::invalid`]).
    pub fn from_buffer(ctx: &Context, groups: usize, buffer: wgpu::Buffer) -> Result<Groups> {
        let tensor = Tensor::from_buffer(ctx, DType::F32, 1, 2 * groups + 2, buffer)?;
        Ok(Groups { groups, data: tensor.data })
    }

    /// How many groups were invalid, over all products so far. Waits as [`Context::read`].
    pub async fn invalid(&self, ctx: &Context) -> Result<u32> {
        let bytes = self.data.read(ctx).await?;
        Ok(bytemuck::pod_read_unaligned(&bytes[..4]))
    }

    /// Reads the offsets, one more than groups. Waits as [`Context::read`].
    pub async fn offsets(&self, ctx: &Context) -> Result<Vec<u32>> {
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&self.data.read(ctx).await?);
        Ok(words[GROUP_OFFSETS..][..self.groups + 1].to_vec())
    }

    /// The only buffer on a GPU; the offsets start at word [`GROUP_OFFSETS`].
    pub(crate) fn binding(&self) -> Option<&wgpu::Buffer> {
        self.data.chunks().next().map(|chunk| chunk.buffer)
    }

    /// The offsets on the CPU engine.
    pub(crate) fn offsets_mut(&mut self) -> &mut [u32] {
        let groups = self.groups;
        &mut self.data.cpu_mut()[GROUP_OFFSETS..][..groups + 1]
    }

    /// How many groups.
    pub fn len(&self) -> usize {
        self.groups
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.groups == 0
    }
}

/// Words of [`Groups`]' buffer before the offsets.
pub(crate) const GROUP_OFFSETS: usize = 1;

/// An operand handed to [`Matmul::record`].
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Packed.
    Mx(&'a DeviceMxTensor),
    /// Dense.
    Dense(&'a Tensor),
}

impl<'a> From<&'a DeviceMxTensor> for Input<'a> {
    fn from(tensor: &'a DeviceMxTensor) -> Self {
        Input::Mx(tensor)
    }
}

impl<'a> From<&'a Tensor> for Input<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Input::Dense(tensor)
    }
}

/// The output handed to [`Matmul::record`].
#[derive(Debug)]
pub enum Target<'a> {
    /// Packed, with blocks along axis one.
    Mx(&'a mut DeviceMxTensor),
    /// Dense.
    Dense(&'a mut Tensor),
}

impl Target<'_> {
    #[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
    fn reborrow(&mut self) -> Target<'_> {
        match self {
            Target::Mx(y) => Target::Mx(y),
            Target::Dense(y) => Target::Dense(y),
        }
    }
}

impl<'a> From<&'a mut DeviceMxTensor> for Target<'a> {
    fn from(tensor: &'a mut DeviceMxTensor) -> Self {
        Target::Mx(tensor)
    }
}

impl<'a> From<&'a mut Tensor> for Target<'a> {
    fn from(tensor: &'a mut Tensor) -> Self {
        Target::Dense(tensor)
    }
}

/// What a product may take besides its operands.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extras<'a> {
    /// `[1, n]` in f32; there if and only if the descriptor says so.
    pub bias: Option<&'a Tensor>,
    /// There if and only if the descriptor has experts.
    pub groups: Option<&'a Groups>,
}

/// The kernel that multiplies.
#[derive(Clone, Debug)]
pub struct Matmul {
    desc: MatmulDesc,
    tier: Tier,
    why: String,
    /// Positions of k that are summed apart, if not all.
    slice: Option<usize>,
    #[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
    native: Option<native::Native>,
    /// The tile to take, to measure it.
    forced: Option<tier::Shape>,
    /// The tensor tier: by fragments of bytes, where that is exact.
    bytes: Option<bytes::Way>,
}

impl Matmul {
    /// Checks the descriptor and chooses the tier. Pipelines are made when first recorded.
    pub fn new(ctx: &Context, desc: &MatmulDesc) -> Result<Matmul> {
        desc.validate()?;
        #[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
        if let crate::engine::Engine::Gpu(gpu) = ctx.engine() {
            // Few rows take less time than handing them to a library.
            let named = desc.tier == Tier::Native;
            let auto = desc.tier == Tier::Auto && desc.m > tier::SKINNY;
            match (named || auto).then(|| native::choose(ctx, gpu, desc, named)) {
                None => {}
                Some(Ok((entry, packings, problem))) => {
                    let why = format!("{}: {problem}", entry.route.name());
                    let next = Box::new(Matmul::without_native(ctx, desc)?);
                    let native = Some(native::Native { entry, packings, problem, next });
                    return Ok(Matmul {
                        desc: *desc,
                        tier: Tier::Native,
                        why,
                        slice: None,
                        native,
                        forced: None,
                        bytes: None,
                    });
                }
                Some(Err(has)) if named => {
                    return Err(Error::Unsupported {
                        operation: "the native tier".into(),
                        needs: "a route that takes the product".into(),
                        has,
                    });
                }
                Some(Err(reasons)) => {
                    let mut next = Matmul::without_native(ctx, desc)?;
                    if cfg!(any(feature = "cuda", feature = "hip")) {
                        next.why += &format!("; no native route: {reasons}");
                    }
                    return Ok(next);
                }
            }
        }
        if desc.tier == Tier::Native {
            return Err(Error::Unsupported {
                operation: "the native tier".into(),
                needs: "a GPU, on a system with native routes".into(),
                has: format!("the context is {}", ctx.caps().name),
            });
        }
        Matmul::without_native(ctx, desc)
    }

    /// In the tier asked for, or the fastest but the native one.
    fn without_native(ctx: &Context, desc: &MatmulDesc) -> Result<Matmul> {
        let (tier, mut why) = tier::choose(ctx, desc)?;
        let bytes = match bytes::choose(ctx, desc, tier) {
            Ok(way) => {
                why += &format!("; {} where lines keep within its window", way.matrices.byte);
                Some(way)
            }
            Err(Some(reason)) => {
                why += &format!("; not in bytes: {reason}");
                None
            }
            Err(None) => None,
        };
        Ok(Matmul {
            desc: *desc,
            tier,
            why,
            slice: tier::slice(ctx, desc, tier),
            #[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
            native: None,
            forced: None,
            bytes,
        })
    }

    /// The tier that was chosen; never [`Tier::Auto`].
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// Why that one.
    pub fn why(&self) -> &str {
        &self.why
    }

    /// The name of the tile that it takes on `ctx`, whose kernels are not made for it yet: the one measured for such products
    /// ([`Context::use_tuning`]), or else the usual one. None on the CPU engine.
    pub fn tile(&self, ctx: &Context) -> Option<String> {
        let crate::engine::Engine::Gpu(gpu) = ctx.engine() else { return None };
        let shape = tier::shape(gpu, &self.desc, self.tier, self.slice.is_some());
        Some(self.forced.unwrap_or(shape).to_string())
    }

    /// How many parts k is summed in, one after the other added in ascending order: more than one for few outputs of a long k,
    /// which alone would leave a large GPU half empty. Their sums lie in a buffer that all products of a context share.
    pub fn slices(&self) -> usize {
        self.slice.map_or(1, |slice| self.desc.k.div_ceil(slice))
    }

    /// Bytes of memory that a product takes on a GPU besides its operands and y; all products of a context share them. Operands as
    /// bytes ([`Matmul::bytes`]), and sums of slices ([`Matmul::slices`]).
    pub fn shared_memory(&self) -> usize {
        let MatmulDesc { m, n, .. } = self.desc;
        let sums = self.slice.map_or(0, |_| self.slices() * m * n.next_multiple_of(4) * 4);
        sums + self.bytes.map_or(0, |_| bytes::memory(&self.desc))
    }

    /// What tiles whose lines allow it are computed in instead of f16: see [`Tier::Tensor`].
    pub fn bytes(&self) -> Option<Byte> {
        self.bytes.map(|way| way.matrices.byte)
    }

    /// For tests: leaves out the tiles that are not computed in bytes.
    #[doc(hidden)]
    pub fn bytes_alone(mut self) -> Matmul {
        if let Some(way) = &mut self.bytes {
            way.alone = true;
        }
        self
    }

    /// The same in f16 alone: for operands whose lines mostly have a block outside the window of bytes, for which packing would be
    /// in vain.
    pub fn without_bytes(mut self) -> Matmul {
        self.bytes = None;
        self
    }

    /// For tests: the same without [`crate::Options::ocp_conversion`].
    #[doc(hidden)]
    pub fn without_conversion(mut self, ctx: &Context) -> Matmul {
        if let crate::engine::Engine::Gpu(gpu) = ctx.engine() {
            let shape = tier::shape(gpu, &self.desc, self.tier, self.slice.is_some());
            self.forced = Some(shape.without_conversion());
        }
        self
    }

    /// Records `y = alpha · A · Bᵀ + beta · y`.
    pub fn record<'a>(
        &self,
        stream: &mut Stream<'_>,
        a: impl Into<Input<'a>>,
        b: impl Into<Input<'a>>,
        y: impl Into<Target<'a>>,
    ) -> Result<()> {
        self.record_with(stream, a, b, y, Extras::default())
    }

    /// The same with a bias, or grouped.
    pub fn record_with<'a>(
        &self,
        stream: &mut Stream<'_>,
        a: impl Into<Input<'a>>,
        b: impl Into<Input<'a>>,
        y: impl Into<Target<'a>>,
        extras: Extras<'_>,
    ) -> Result<()> {
        #[allow(unused_mut)]
        let (a, b, mut y) = (a.into(), b.into(), y.into());
        self.check(stream.context(), a, b, &y, extras)?;
        #[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
        if let (Some(native), true) = (&self.native, stream.gpu().is_some()) {
            let recorded = native.record(&self.desc, stream, a, b, y.reborrow(), extras, None)?;
            let Err(refused) = recorded else { return Ok(()) };
            let name = native.entry.route.name();
            let reason = match refused {
                native::Refused::Declined(reason) => reason,
                native::Refused::Failed(reason) => {
                    native.entry.disable(reason.clone());
                    reason
                }
            };
            if self.desc.tier == Tier::Native {
                return Err(Error::Unsupported {
                    operation: "the native tier".into(),
                    needs: format!("{name} to take the product"),
                    has: reason,
                });
            }
            log::info!("{name}: {reason}; the product runs in the {} tier", native.next.tier);
            return native.next.record_with(stream, a, b, y, extras);
        }
        if stream.gpu().is_some() {
            gpu::record(self, stream, a, b, y, extras)
        } else {
            run_cpu(&self.desc, self.tier, a, b, y, extras)
        }
    }

    fn check(
        &self,
        ctx: &Context,
        a: Input<'_>,
        b: Input<'_>,
        y: &Target<'_>,
        extras: Extras<'_>,
    ) -> Result<()> {
        let desc = &self.desc;
        let mismatch = |problem| Err(Error::Mismatch { operation: "Matmul::record", problem });
        let [a_stack, b_stack, y_stack] = desc.stacks();
        for (name, operand, input, outputs, stack) in
            [("A", desc.a, a, desc.m, a_stack), ("B", desc.b, b, desc.n, b_stack)]
        {
            let (values, stored, rows) = match input {
                Input::Dense(t) => (Values::Dense(t.dtype), [t.rows, t.cols], &t.data),
                Input::Mx(t) => {
                    (Values::Mx(t.layout.spec), [t.layout.lines(), t.layout.line_len()], &t.codes)
                }
            };
            if values != operand.values {
                return mismatch(format!(
                    "{name} is {values}, the kernel takes {}",
                    operand.values
                ));
            }
            let wanted = match operand.transposed {
                false => [stack * outputs, desc.k],
                true => [stack * desc.k, outputs],
            };
            if stored != wanted {
                return mismatch(format!(
                    "{name} holds {stored:?} (lines, contracted{}), the product of m = {}, n = {}, k = {} in {stack} takes \
                     {wanted:?}",
                    if operand.transposed { " over the lines" } else { " along them" },
                    desc.m,
                    desc.n,
                    desc.k
                ));
            }
            let out = match y {
                Target::Dense(t) => &t.data,
                Target::Mx(t) => &t.codes,
            };
            ctx.check_same(rows, out)?;
        }
        for extra in
            extras.bias.map(|t| &t.data).into_iter().chain(extras.groups.map(|groups| &groups.data))
        {
            ctx.check_same(extra, extra)?;
        }
        let wanted = [y_stack * desc.m, desc.n];
        match (y, desc.out) {
            (Target::Dense(t), Output::Dense(dtype)) => {
                if (t.dtype, t.shape()) != (dtype, wanted) {
                    return mismatch(format!(
                        "y is {:?} of {}, the product {wanted:?} of {dtype}",
                        t.shape(),
                        t.dtype
                    ));
                }
            }
            (Target::Mx(t), Output::Mx(out)) => {
                let Layout { spec, axis, rows, cols } = t.layout;
                if (spec, axis, [rows, cols]) != (out.spec, out.axis, wanted) {
                    return mismatch(format!(
                        "y is [{rows}, {cols}] in {spec} along axis {axis}, the product {wanted:?} in {} along axis {}",
                        out.spec, out.axis
                    ));
                }
            }
            (Target::Dense(t), Output::Mx(out)) => {
                return mismatch(format!("y is {}, the kernel makes {}", t.dtype, out.spec));
            }
            (Target::Mx(t), Output::Dense(dtype)) => {
                return mismatch(format!("y is {}, the kernel makes {dtype}", t.layout.spec));
            }
        }
        match extras.bias {
            Some(bias) if (bias.dtype, bias.shape()) != (DType::F32, [1, desc.n]) => {
                return mismatch(format!(
                    "the bias is {:?} of {}, the product takes [1, {}] of f32",
                    bias.shape(),
                    bias.dtype,
                    desc.n
                ));
            }
            bias if bias.is_some() != desc.bias => {
                return mismatch(format!(
                    "a bias was {}, the descriptor says {}",
                    if bias.is_some() { "given" } else { "not given" },
                    desc.bias
                ));
            }
            _ => {}
        }
        if extras.groups.is_some() != desc.experts.is_some() {
            return mismatch(format!(
                "groups were {}, the descriptor's experts are {:?}",
                if extras.groups.is_some() { "given" } else { "not given" },
                desc.experts
            ));
        }
        if let (Some(groups), Some(experts), true) = (extras.groups, desc.experts, desc.group_k) {
            if groups.groups != experts {
                return mismatch(format!(
                    "{} groups of k, but y has {experts} experts: a group for each",
                    groups.groups
                ));
            }
        }
        Ok(())
    }
}

impl std::fmt::Display for Values {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Values::Mx(spec) => spec.fmt(f),
            Values::Dense(dtype) => dtype.fmt(f),
        }
    }
}

impl std::fmt::Display for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Tier::Auto => "auto",
            Tier::Exact => "exact",
            Tier::Tensor => "tensor",
            Tier::Alu => "alu",
            Tier::Native => "native",
        })
    }
}

impl std::str::FromStr for Tier {
    type Err = Error;

    fn from_str(text: &str) -> Result<Tier> {
        [Tier::Auto, Tier::Exact, Tier::Tensor, Tier::Alu, Tier::Native]
            .into_iter()
            .find(|tier| tier.to_string() == text)
            .ok_or_else(|| {
                Error::InvalidSpec(format!("tier {text:?}: auto, exact, tensor, alu or native"))
            })
    }
}

/// The longest contraction: sums of the exact tier stay below 2^127 up to here.
const MAX_K: usize = 1 << 24;

impl MatmulDesc {
    /// Checks that the product exists.
    pub fn validate(&self) -> Result<()> {
        let mismatch = |problem| Err(Error::Mismatch { operation: "Matmul::new", problem });
        let [a_stack, b_stack, y_stack] = self.stacks();
        for (name, operand, stack, outputs) in
            [("A", self.a, a_stack, self.m), ("B", self.b, b_stack, self.n)]
        {
            let Values::Mx(spec) = operand.values else { continue };
            spec.validate()?;
            let lines = spec.block.lines();
            if operand.transposed && lines == 1 {
                return mismatch(format!(
                    "{name} in {spec} contracted over its lines: only square blocks have a scale that goes with either axis; \
                     quantize along the other axis, or in squares"
                ));
            }
            let stacked = if operand.transposed { self.k } else { outputs };
            if stack > 1 && !stacked.is_multiple_of(lines) {
                return mismatch(format!(
                    "{name} in {spec}, {stack} of {stacked} lines each: blocks must not span two of them"
                ));
            }
        }
        if let Output::Mx(out) = &self.out {
            out.validate()?;
            if out.axis != Axis::One {
                return mismatch(format!(
                    "an output in {} along axis {}: a product packs along its rows, axis 1",
                    out.spec, out.axis
                ));
            }
            if out.spec.scale == ScaleFormat::E4M3 && out.tensor_scale.is_none() {
                return mismatch(format!(
                    "an output in {} needs its tensor_scale: the largest value is known only after the product",
                    out.spec
                ));
            }
            if self.beta != 0.0 {
                return mismatch(format!("beta = {} with a packed output", self.beta));
            }
            let lines = out.spec.block.lines();
            if lines > 1
                && (self.experts.is_some() || self.batch > 1 && !self.m.is_multiple_of(lines))
            {
                return mismatch(format!(
                    "an output in {}: its blocks would span groups or batches of {} rows",
                    out.spec, self.m
                ));
            }
        }
        if self.experts.is_some() && self.batch != 1 {
            return mismatch(format!("batch = {} of a grouped product", self.batch));
        }
        if self.group_k && self.experts.is_none() {
            return mismatch("groups along k without experts".into());
        }
        if self.experts == Some(0) {
            return mismatch("a grouped product with no expert".into());
        }
        if !self.alpha.is_finite() || !self.beta.is_finite() {
            return mismatch(format!("alpha = {}, beta = {}: finite", self.alpha, self.beta));
        }
        if self.k > MAX_K {
            return Err(Error::TooLarge {
                what: format!("a contraction over k = {}", self.k),
                bytes: self.k as u64,
                limit: MAX_K as u64,
            });
        }
        // What the shaders count in u32.
        for (what, n) in
            [("rows", y_stack.saturating_mul(self.m)), ("columns", b_stack.saturating_mul(self.n))]
        {
            if n >= 1 << 31 {
                return Err(Error::TooLarge {
                    what: format!(
                        "a product of m = {}, n = {}, k = {}: {n} {what}",
                        self.m, self.n, self.k
                    ),
                    bytes: n as u64,
                    limit: (1 << 31) - 1,
                });
            }
        }
        Ok(())
    }

    /// How many matrices A, B and y hold, one under the other.
    pub(super) fn stacks(&self) -> [usize; 3] {
        match self.experts {
            None => [self.batch; 3],
            Some(experts) if self.group_k => [1, 1, experts],
            Some(experts) => [1, experts, 1],
        }
    }

    /// Floating-point operations, one product and one sum for each triple.
    pub fn flops(&self) -> f64 {
        2.0 * self.batch as f64 * self.m as f64 * self.n as f64 * self.k as f64
    }

    /// The power of two that the sums of a tier count in, the anchors apart.
    fn exponent(&self, tier: Tier) -> i32 {
        if tier != Tier::Exact {
            return 0;
        }
        [self.a, self.b]
            .iter()
            .map(|operand| match operand.values {
                Values::Mx(spec) => {
                    let unit = match spec.element {
                        Element::E2M1 => -1,
                        Element::E2M3 => -3,
                        _ => -6,
                    };
                    unit - if spec.scale == ScaleFormat::E8M0 { FACTOR_SHIFT } else { 0 }
                }
                Values::Dense(_) => 0,
            })
            .sum()
    }
}

/// The exact tier's scale factors are 2^44 at the anchor, so that they reach down to 2^-107 of it and their products are
/// normal.
const FACTOR_SHIFT: i32 = 44;

// ---- The twin ------------------------------------------------------------------------------------------------------

/// From a sum to f32 bits, as `shaders/lib/finish.wgsl`.
struct Finish {
    alpha: f32,
    /// NVFP4's tensor-wide scales.
    tensor_scales: [Option<f32>; 2],
    exponent: i32,
}

impl Finish {
    fn bits(&self, sum: f32, anchor_a: u32, anchor_b: u32) -> u32 {
        if anchor_a == 255 || anchor_b == 255 || sum.is_nan() {
            return NAN;
        }
        let sign = (sum.to_bits() ^ self.alpha.to_bits()) & 0x8000_0000;
        if self.alpha == 1.0 && self.tensor_scales == [None; 2] {
            // A power of two: exact, unless the result is not normal.
            let e = anchor_a as i32 + anchor_b as i32 - 254 + self.exponent;
            if (-126..=127).contains(&e) {
                let value = sum * f32::from_bits(((e + 127) as u32) << 23);
                if value.is_normal() {
                    return value.to_bits();
                }
            }
        }
        if sum.is_infinite() {
            return if self.alpha == 0.0 { NAN } else { sign | INFINITY };
        }
        if sum == 0.0 || self.alpha == 0.0 {
            return 0;
        }
        let significand = |x: f32| {
            let (m, e) = normalize(x.to_bits() & 0x7fff_ffff);
            (f32::from_bits(m & 0x7f_ffff | 0x3f80_0000), e - 127)
        };
        let (mut m, mut e) = significand(sum);
        let factors = [Some(self.alpha), self.tensor_scales[0], self.tensor_scales[1]];
        for factor in factors.into_iter().flatten() {
            let (fm, fe) = significand(factor);
            m *= fm;
            e += fe;
        }
        let bits = m.to_bits();
        e += (bits >> 23) as i32 - 127 + anchor_a as i32 + anchor_b as i32 - 254 + self.exponent;
        sign | f32_from_parts(bits & 0x7f_ffff | 0x80_0000, e - 23)
    }

    /// [`Finish::bits`] of a row, in place.
    fn row(&self, anchor_a: u32, anchors: &[u32], sums: &mut [f32]) {
        // Without branches where all factors are powers of two and the results normal, or zero: then nothing is rounded.
        const LANES: usize = 16;
        let alpha = self.alpha.to_bits();
        let power = self.tensor_scales == [None; 2]
            && anchor_a != 255
            && self.alpha.is_normal()
            && alpha & 0x807f_ffff == 0;
        let common = (alpha >> 23) as i32 - 127 + anchor_a as i32 - 254 + self.exponent;
        for (sums, anchors) in sums.chunks_mut(LANES).zip(anchors.chunks(LANES)) {
            if let (true, Ok(from), Ok(of)) =
                (power, <[f32; LANES]>::try_from(&*sums), <&[u32; LANES]>::try_from(anchors))
            {
                let mut values = [0f32; LANES];
                let mut wrong = 0;
                for i in 0..LANES {
                    let e = common + of[i] as i32;
                    let value = from[i] * f32::from_bits(((e + 127) as u32) << 23);
                    let magnitude = value.to_bits() & 0x7fff_ffff;
                    let normal = (0x80_0000..INFINITY).contains(&magnitude);
                    let zero = from[i] == 0.0;
                    let fits = (-126..=127).contains(&e) & normal;
                    wrong |= u32::from(!(fits | zero) | (of[i] == 255));
                    values[i] = if zero { 0.0 } else { value };
                }
                if wrong == 0 {
                    sums.copy_from_slice(&values);
                    continue;
                }
            }
            for (sum, anchor) in sums.iter_mut().zip(anchors) {
                *sum = f32::from_bits(self.bits(*sum, anchor_a, *anchor));
            }
        }
    }
}

/// a + b, NaN the canonical one.
fn added(a: u32, b: u32) -> u32 {
    let sum = f32::from_bits(a) + f32::from_bits(b);
    if sum.is_nan() { NAN } else { sum.to_bits() }
}

/// A product of one batch or group: rows of y, positions of k, and where the operands' output index 0 and k = 0 lie.
struct Part {
    y: usize,
    rows: usize,
    k: usize,
    a: [usize; 2],
    b: [usize; 2],
}

impl Part {
    /// Group `g`, checked.
    fn of_group(
        desc: &MatmulDesc,
        g: usize,
        range: std::ops::Range<usize>,
        expert: usize,
    ) -> Result<Part> {
        let mismatch = |problem| Err(Error::Mismatch { operation: "Matmul::record", problem });
        let (start, end) = (range.start, range.end);
        if desc.group_k {
            if start > end || end > desc.k || start % 32 != 0 || end % 32 != 0 {
                return mismatch(format!(
                    "group {g} is positions {start} to {end} of k = {}: ascending multiples of 32",
                    desc.k
                ));
            }
            return Ok(Part {
                y: g * desc.m,
                rows: desc.m,
                k: range.len(),
                a: [0, start],
                b: [0, start],
            });
        }
        if start > end || end > desc.m {
            return mismatch(format!("a group of rows {start} to {end}, but A has {}", desc.m));
        }
        if expert >= desc.experts.unwrap_or(1) {
            return mismatch(format!("a group of expert {expert}, but B has {:?}", desc.experts));
        }
        let (k, n) = (desc.k, desc.n);
        let b = if desc.b.transposed { [0, expert * k] } else { [expert * n, 0] };
        Ok(Part { y: start, rows: range.len(), k, a: [start, 0], b })
    }
}

fn run_cpu(
    desc: &MatmulDesc,
    tier: Tier,
    a: Input<'_>,
    b: Input<'_>,
    y: Target<'_>,
    extras: Extras<'_>,
) -> Result<()> {
    let MatmulDesc { m, n, k, .. } = *desc;
    let finish = Finish {
        alpha: desc.alpha,
        tensor_scales: [a, b].map(|input| match input {
            Input::Mx(t) if t.tensor_scaled() => Some(f32::from_bits(t.state.cpu()[2])),
            _ => None,
        }),
        exponent: desc.exponent(tier),
    };
    let y_stack = desc.stacks()[2];
    let parts: Vec<Part> = match extras.groups {
        // Transposed operands are stacked along k.
        None => (0..desc.batch)
            .map(|batch| Part {
                y: batch * m,
                rows: m,
                k,
                a: if desc.a.transposed { [0, batch * k] } else { [batch * m, 0] },
                b: if desc.b.transposed { [0, batch * k] } else { [batch * n, 0] },
            })
            .collect(),
        Some(groups) => {
            let words = &groups.data.cpu()[GROUP_OFFSETS..];
            let (offsets, experts) = words.split_at(groups.groups + 1);
            let mut parts = Vec::with_capacity(groups.groups);
            for (g, (range, expert)) in offsets.windows(2).zip(experts).enumerate() {
                let [first, end, expert] = [range[0], range[1], *expert].map(|x| x as usize);
                parts.push(Part::of_group(desc, g, first..end, expert)?);
            }
            parts
        }
    };
    let bias = extras.bias.map(|bias| bias.data.cpu());
    let (mut dense, mut packed) = match y {
        Target::Dense(t) => (Some(t), None),
        Target::Mx(t) => (None, Some((t, vec![0u32; y_stack * m * n]))),
    };
    let mut scratch = Vec::new();
    for Part { y: first, rows, k, a: [first_a, k_a], b: [first_b, k_b] } in parts {
        let a = view(a, desc.a.transposed, first_a, k_a, rows);
        let b = view(b, desc.b.transposed, first_b, k_b, n);
        let anchors: Vec<u32> = (0..n).map(|j| b.anchor(j)).collect();
        // The values take the sums' place.
        let product = |sums: &mut [f32], old: Option<&Tensor>| {
            match tier {
                Tier::Exact => cpu::exact(&a, &b, k, sums),
                _ => cpu::alu(&a, &b, k, sums),
            }
            each_row(sums, n, |i, row| {
                finish.row(a.anchor(i), &anchors, row);
                if desc.beta == 0.0 && bias.is_none() {
                    return;
                }
                for (j, value) in row.iter_mut().enumerate() {
                    let mut bits = value.to_bits();
                    if let (Some(y), true) = (old, desc.beta != 0.0) {
                        let old = y.dtype.f32_bits(y.data.cpu(), (first + i) * n + j);
                        bits = added(bits, (desc.beta * f32::from_bits(old)).to_bits());
                    }
                    if let Some(bias) = bias {
                        bits = added(bits, bias[j]);
                    }
                    *value = f32::from_bits(bits);
                }
            });
        };
        let at = first * n..(first + rows) * n;
        match (&mut dense, &mut packed) {
            (Some(y), _) if y.dtype == DType::F32 && desc.beta == 0.0 => {
                product(bytemuck::cast_slice_mut(&mut y.data.cpu_mut()[at]), None);
            }
            (Some(y), _) => {
                let bytes = (rows * n * 4) as u64;
                let more = (rows * n).saturating_sub(scratch.len());
                scratch.try_reserve_exact(more).map_err(|_| Error::OutOfMemory {
                    what: "the sums of a product".into(),
                    bytes,
                })?;
                scratch.resize(rows * n, 0f32);
                product(&mut scratch, Some(y));
                let (dtype, words) = (y.dtype, y.data.cpu_mut());
                match dtype {
                    DType::F32 => words[at].copy_from_slice(bytemuck::cast_slice(&scratch)),
                    _ => {
                        let halves: &mut [u16] = bytemuck::cast_slice_mut(words);
                        each_row(&mut halves[at], n, |i, halves| {
                            dtype.narrow_all(&scratch[i * n..(i + 1) * n], halves);
                        });
                    }
                }
            }
            (None, Some((_, all))) => product(bytemuck::cast_slice_mut(&mut all[at]), None),
            (None, None) => {}
        }
    }
    if let (Some((y, values)), Output::Mx(out)) = (packed, desc.out) {
        super::quantize::pack_on_cpu(&out, DType::F32, &values, y);
    }
    Ok(())
}

/// Runs `f` on the rows of a matrix and their numbers, on all cores.
fn each_row<T: Send>(values: &mut [T], cols: usize, f: impl Fn(usize, &mut [T]) + Sync + Send) {
    #[cfg(not(target_arch = "wasm32"))]
    {
        use rayon::prelude::*;
        values.par_chunks_exact_mut(cols.max(1)).enumerate().for_each(|(i, row)| f(i, row));
    }
    #[cfg(target_arch = "wasm32")]
    values.chunks_exact_mut(cols.max(1)).enumerate().for_each(|(i, row)| f(i, row));
}

fn view(
    input: Input<'_>,
    transposed: bool,
    first: usize,
    first_k: usize,
    len: usize,
) -> cpu::View<'_> {
    let values = match input {
        Input::Dense(t) => cpu::Source::Dense { dtype: t.dtype, data: t.data.cpu(), cols: t.cols },
        Input::Mx(t) => cpu::Source::Mx {
            layout: t.layout,
            codes: &bytemuck::cast_slice(t.codes.cpu())[..t.codes.bytes()],
            scales: &bytemuck::cast_slice(t.scales.cpu())[..t.scales.bytes()],
            anchors: &t.state.cpu()[STATE_WORDS..],
        },
    };
    cpu::View { values, transposed, first, first_k, len }
}
