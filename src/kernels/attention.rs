//! Causal self-attention and its gradient, with no matrix of scores in memory.
//!
//! ```text
//! out = softmax(mask(q kᵀ / √head_dim)) v        of each head of each sequence; query i sees the keys 0 ..= i
//! ```
//!
//! | tensor | shape | type |
//! |---|---|---|
//! | qkv, dqkv | `[batch · seq, 3 · heads · head_dim]`: all heads' q, then k, then v | f32 or bf16 |
//! | out, dout | `[batch · seq, heads · head_dim]` | the same |
//! | lse | `[batch · seq, heads]`: log Σ exp of a query's scaled scores | f32 |
//!
//! The method is FlashAttention-2's (Dao, arXiv:2307.08691): scores are made a tile at a time, with a running maximum and
//! sum of each row; the backward pass makes them again from lse. Gradients of queries, and of keys and values, are two
//! kernels, each of which makes the scores: no atomics, so the same bits every time.
//!
//! | tier | where | products |
//! |---|---|---|
//! | [`Tier::Alu`] | everywhere | f32 throughout |
//! | [`Tier::Tensor`] | bf16 qkv, on a GPU with cooperative matrices of bf16 | weights, and the gradients of scores, are rounded to bf16 too, as FlashAttention does; sums are f32, the device's |
//!
//! **Bounded**: scores carry the error of a sum of head_dim products, weights that and `exp`'s (on tensor cores 2⁻⁸ more), and
//! results that of a sum over the keys (queries). An output depends on no later token by a single bit, if all are finite.
//! Shaders: `shaders/attention_forward.wgsl`, `attention_delta.wgsl`, `attention_dq.wgsl`, `attention_dkv.wgsl`, and
//! `attention_forward_tensor.wgsl`, `attention_dq_tensor.wgsl`, `attention_dkv_tensor.wgsl`.

mod cpu;

use crate::engine::buffer::{DType, Tensor};
use crate::engine::gpu::Gpu;
use crate::engine::shader::{BF16_FRAGMENTS, Binding, Kernel, Source, shader};
use crate::engine::{Context, Engine, Stream};
use crate::{Error, Result};

use super::{Tier, WORKGROUP};

/// What [`Attention`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionDesc {
    /// Sequences, which do not see each other.
    pub batch: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Heads.
    pub heads: usize,
    /// Elements of a head's q, k and v: a multiple of 8, 16 to 128.
    pub head_dim: usize,
}

/// The kernels of attention.
#[derive(Debug)]
pub struct Attention {
    desc: AttentionDesc,
    /// `[batch · seq, heads]`, on a GPU: what the gradient of the softmax takes off.
    delta: Option<Tensor>,
    /// How bf16 is multiplied.
    bf16: Form,
    /// Why so.
    why: String,
}

/// How the products are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Alu,
    /// By cooperative matrices in SPIR-V that this crate makes (src/engine/spirv.rs).
    Spirv,
    /// The same kernels without cooperative matrices.
    Emulated,
}

impl Attention {
    /// Checks the descriptor, and makes scratch memory for the backward pass: an f32 a row and head, on a GPU. bf16 goes to
    /// tensor cores where there are any.
    pub fn new(ctx: &Context, desc: &AttentionDesc) -> Result<Attention> {
        Attention::with_tier(ctx, desc, Tier::Auto)
    }

    /// As [`Attention::new`], with the tier for bf16 asked for by name: [`Tier::Alu`] or [`Tier::Tensor`], which is an error
    /// where it is lacking. It needs up to 37 KiB of workgroup memory, for the widest heads.
    pub fn with_tier(ctx: &Context, desc: &AttentionDesc, tier: Tier) -> Result<Attention> {
        let AttentionDesc { batch, seq, heads, head_dim } = *desc;
        let mismatch = |problem| Err(Error::Mismatch { operation: "Attention::new", problem });
        if !head_dim.is_multiple_of(8) || !(16..=128).contains(&head_dim) {
            return mismatch(format!(
                "head_dim is {head_dim}, expected a multiple of 8, 16 to 128"
            ));
        }
        if batch == 0 || seq == 0 || heads == 0 {
            return mismatch(format!(
                "batch {batch}, seq {seq}, heads {heads}: at least one of each"
            ));
        }
        // Shaders count quads of qkv in u32.
        let quads = batch as u128 * seq as u128 * heads as u128 * (3 * head_dim / 4) as u128;
        if quads > u128::from(u32::MAX) {
            return mismatch(format!("qkv has {quads} quads, at most 2^32 - 1"));
        }
        let delta = match ctx.wgpu() {
            Some(_) => Some(ctx.zeros(DType::F32, batch * seq, heads)?),
            None => None,
        };
        let (bf16, why) = match (tier, tensor(ctx, width(head_dim))) {
            (Tier::Auto, Ok(Form::Spirv)) => {
                (Form::Spirv, "the device has cooperative matrices of bf16".into())
            }
            (Tier::Auto, Ok(_)) => {
                (Form::Alu, "emulated cooperative matrices are for tests alone".into())
            }
            (Tier::Auto, Err([needs, has])) => {
                (Form::Alu, format!("not the tensor tier: it needs {needs}, but {has}"))
            }
            (Tier::Tensor, Err([needs, has])) => {
                let operation = "attention on the tensor tier".into();
                return Err(Error::Unsupported { operation, needs, has });
            }
            (Tier::Tensor, Ok(form)) => (form, "asked for".into()),
            (Tier::Alu, _) => (Form::Alu, "asked for".into()),
            (Tier::Exact | Tier::Native, _) => {
                return mismatch(format!("attention has no {tier} tier"));
            }
        };
        Ok(Attention { desc: *desc, delta, bf16, why })
    }

    /// The tier for tensors of this type.
    pub fn tier(&self, dtype: DType) -> Tier {
        if dtype == DType::BF16 && self.bf16 != Form::Alu { Tier::Tensor } else { Tier::Alu }
    }

    /// Why bf16 has its tier. f32 is always multiplied by ALUs.
    pub fn why(&self) -> &str {
        &self.why
    }

    /// Records the forward pass.
    pub fn forward(
        &self,
        stream: &mut Stream<'_>,
        qkv: &Tensor,
        out: &mut Tensor,
        lse: &mut Tensor,
    ) -> Result<()> {
        self.check("Attention::forward", stream.context(), qkv, &[("out", out)], lse)?;
        if stream.gpu().is_none() {
            self.forward_cpu(qkv, out, lse);
            return Ok(());
        }
        let buffers = [qkv.binding()?, out.binding()?, lse.binding()?];
        self.dispatch(stream, Pass::Forward, qkv.dtype, &buffers)
    }

    /// Records the backward pass: `dqkv` from the forward pass's `qkv`, `out` and `lse`, and the gradient of `out`.
    pub fn backward(
        &self,
        stream: &mut Stream<'_>,
        qkv: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        dout: &Tensor,
        dqkv: &mut Tensor,
    ) -> Result<()> {
        const OPERATION: &str = "Attention::backward";
        let ctx = stream.context().clone();
        self.check(OPERATION, &ctx, qkv, &[("out", out), ("dout", dout)], lse)?;
        dqkv.expect(OPERATION, "dqkv", qkv.shape(), &[qkv.dtype])?;
        ctx.check_same(&dqkv.data, &dqkv.data)?;
        if stream.gpu().is_none() {
            self.backward_cpu(qkv, out, lse, dout, dqkv);
            return Ok(());
        }
        let Some(delta) = &self.delta else {
            return Err(Error::Mismatch {
                operation: OPERATION,
                problem: "made for the CPU engine, recorded on a GPU".into(),
            });
        };
        ctx.check_same(&delta.data, &qkv.data)?;
        let dtype = qkv.dtype;
        let lines = (lse.rows * lse.cols) as u64;
        stream.dispatch(
            &delta_name(dtype),
            || delta_kernel(dtype),
            &[lines as u32, (self.desc.head_dim / 4) as u32],
            &[out.binding()?, dout.binding()?, delta.binding()?],
            lines.div_ceil(u64::from(WORKGROUP)),
        )?;
        let buffers =
            [qkv.binding()?, dout.binding()?, lse.binding()?, delta.binding()?, dqkv.binding()?];
        self.dispatch(stream, Pass::Queries, dtype, &buffers)?;
        self.dispatch(stream, Pass::KeysValues, dtype, &buffers)
    }

    fn check(
        &self,
        operation: &'static str,
        ctx: &Context,
        qkv: &Tensor,
        outs: &[(&str, &Tensor)],
        lse: &Tensor,
    ) -> Result<()> {
        let AttentionDesc { batch, seq, heads, head_dim } = self.desc;
        let (rows, cols) = (batch * seq, heads * head_dim);
        qkv.expect(operation, "qkv", [rows, 3 * cols], &[DType::F32, DType::BF16])?;
        for (what, out) in outs {
            out.expect(operation, what, [rows, cols], &[qkv.dtype])?;
            ctx.check_same(&qkv.data, &out.data)?;
        }
        lse.expect(operation, "lse", [rows, heads], &[DType::F32])?;
        ctx.check_same(&lse.data, &lse.data)
    }

    fn dispatch(
        &self,
        stream: &mut Stream<'_>,
        pass: Pass,
        dtype: DType,
        buffers: &[&wgpu::Buffer],
    ) -> Result<()> {
        let AttentionDesc { batch, seq, heads, head_dim } = self.desc;
        let form = if dtype == DType::BF16 { self.bf16 } else { Form::Alu };
        let variant = Variant { pass, width: width(head_dim), dtype, form };
        let tiles = seq.div_ceil(TILE as usize);
        let groups = (tiles * heads * batch) as u64;
        let params = [
            seq as u32,
            heads as u32,
            (head_dim / 4) as u32,
            tiles as u32,
            groups as u32,
            cpu::scale(head_dim).to_bits(),
        ];
        stream.dispatch(&variant.name(), || variant.kernel(), &params, buffers, groups)
    }
}

/// How this engine makes products of bf16 by tensor cores, for heads of this width, or what that needs and what is there
/// instead.
fn tensor(ctx: &Context, width: u32) -> std::result::Result<Form, [String; 2]> {
    let Engine::Gpu(gpu) = ctx.engine() else {
        return Err([MATRICES.into(), "the context is the CPU engine".into()]);
    };
    let gpu: &Gpu = gpu;
    if !gpu.emulate_tensor && !gpu.bf16_matrices {
        return Err([MATRICES.into(), "the device offers none, or was opened without".into()]);
    }
    if !gpu.emulate_tensor && gpu.caps.subgroups != Some((32, 32)) {
        let has = format!("the device's are {:?}", gpu.caps.subgroups);
        return Err(["subgroups of 32".into(), has]);
    }
    let form = if gpu.emulate_tensor { Form::Emulated } else { Form::Spirv };
    // The backward passes need most, and one as much as the other.
    let bytes = Variant { pass: Pass::Queries, width, dtype: DType::BF16, form }.tensor_bytes();
    let limit = gpu.device.limits().max_compute_workgroup_storage_size;
    if bytes > limit {
        let needs = format!("{bytes} bytes of workgroup memory for heads of {width}");
        return Err([needs, format!("the device has {limit}")]);
    }
    Ok(form)
}

const MATRICES: &str = "cooperative matrices of bf16";

// ---- The twin ------------------------------------------------------------------------------------------------------

impl Attention {
    /// Where the rows of head `i` start, in a tensor of `thirds` · heads · head_dim columns.
    fn head_start(&self, i: usize, thirds: usize) -> usize {
        let AttentionDesc { seq, heads, head_dim, .. } = self.desc;
        (i / heads * seq * thirds * heads + i % heads) * head_dim
    }

    /// `fill` makes `len` results of every head of every sequence, on all cores.
    fn each_head(&self, len: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
        let mut results = vec![0f32; self.desc.batch * self.desc.heads * len];
        let run = |(i, results): (usize, &mut [f32])| fill(i, results);
        #[cfg(not(target_arch = "wasm32"))]
        {
            use rayon::prelude::*;
            results.par_chunks_mut(len).enumerate().for_each(run);
        }
        #[cfg(target_arch = "wasm32")]
        results.chunks_mut(len).enumerate().for_each(run);
        results
    }

    fn forward_cpu(&self, qkv: &Tensor, out: &mut Tensor, lse: &mut Tensor) {
        let AttentionDesc { seq, heads, head_dim, .. } = self.desc;
        let size = cpu::Size { seq, head_dim };
        let (pitch, values) = (qkv.cols, qkv.widened());
        let len = seq * (head_dim + 1);
        let results = self.each_head(len, |i, results| {
            let start = self.head_start(i, 3);
            let [q, k, v] = [0, 1, 2]
                .map(|third| cpu::Head::new(size, &values[start + third * pitch / 3..], pitch));
            let (out, lse) = results.split_at_mut(seq * head_dim);
            cpu::forward(size, &q, &k, &v, out, lse);
        });
        let of = |row: usize, head: usize| &results[(row / seq * heads + head) * len..][..len];
        out.fill_rows(|row, values| {
            for (head, to) in values.chunks_exact_mut(head_dim).enumerate() {
                to.copy_from_slice(&of(row, head)[row % seq * head_dim..][..head_dim]);
            }
        });
        lse.fill_rows(|row, values| {
            for (head, to) in values.iter_mut().enumerate() {
                *to = of(row, head)[seq * head_dim + row % seq];
            }
        });
    }

    fn backward_cpu(
        &self,
        qkv: &Tensor,
        out: &Tensor,
        lse: &Tensor,
        dout: &Tensor,
        dqkv: &mut Tensor,
    ) {
        let AttentionDesc { seq, heads, head_dim, .. } = self.desc;
        let size = cpu::Size { seq, head_dim };
        let (qkv, out, lse, dout) = (qkv.widened(), out.widened(), lse.widened(), dout.widened());
        let cols = heads * head_dim;
        let len = seq * head_dim;
        let results = self.each_head(3 * len, |i, results| {
            let third =
                |n| cpu::Head::new(size, &qkv[self.head_start(i, 3) + n * cols..], 3 * cols);
            let start = self.head_start(i, 1);
            let lse = &lse[i / heads * seq * heads + i % heads..];
            let inputs = cpu::Inputs {
                q: third(0),
                k: third(1),
                v: third(2),
                out: cpu::Head::new(size, &out[start..], cols),
                dout: cpu::Head::new(size, &dout[start..], cols),
                lse: (0..seq.next_multiple_of(cpu::TILE))
                    .map(|row| if row < seq { lse[row * heads] } else { 0.0 })
                    .collect(),
            };
            let (dq, rest) = results.split_at_mut(len);
            let (dk, dv) = rest.split_at_mut(len);
            cpu::backward(size, &inputs, [dq, dk, dv]);
        });
        dqkv.fill_rows(|row, values| {
            for (at, to) in values.chunks_exact_mut(head_dim).enumerate() {
                let (third, head) = (at / heads, at % heads);
                let of = ((row / seq * heads + head) * 3 + third) * len;
                to.copy_from_slice(&results[of + row % seq * head_dim..][..head_dim]);
            }
        });
    }
}

// ---- The shaders ---------------------------------------------------------------------------------------------------

/// Queries and keys of a tile.
const TILE: u32 = 64;
/// Contracted positions in workgroup memory at once, on ALUs.
const DEPTH: u32 = 16;
/// Rows of the other side at a time, on tensor cores.
const STEP: u32 = 32;

/// The width for which a head is padded.
fn width(head_dim: usize) -> u32 {
    WIDTHS.into_iter().find(|width| head_dim <= *width as usize).unwrap_or(128)
}

const WIDTHS: [u32; 3] = [32, 64, 128];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    Forward,
    Queries,
    KeysValues,
}

#[derive(Clone, Copy, Debug)]
struct Variant {
    pass: Pass,
    width: u32,
    dtype: DType,
    form: Form,
}

impl Variant {
    fn name(&self) -> String {
        let pass = match self.pass {
            Pass::Forward => "forward",
            Pass::Queries => "dq",
            Pass::KeysValues => "dkv",
        };
        let form = match self.form {
            Form::Alu => "",
            Form::Spirv => ".spirv",
            Form::Emulated => ".emulated",
        };
        format!("attention.{pass}.{}.{}{form}", self.width, self.dtype)
    }

    /// Rows of scores that an invocation has, and invocations a row. As many sums an invocation as registers allow: 8 × 8
    /// scores and as many results, or 4 × 8 where there are more results or two kinds of scores.
    fn shape(&self) -> (u32, u32) {
        match (self.pass, self.width) {
            (Pass::Forward, 128) => (4, 8),
            (Pass::Forward, _) => (8, 8),
            (_, 128) => (4, 16),
            (_, _) => (4, 8),
        }
    }

    fn kernel(&self) -> Kernel {
        if self.form == Form::Alu { self.alu() } else { self.tensor() }
    }

    fn bindings(&self) -> Vec<Binding> {
        let (reads, writes) = if self.pass == Pass::Forward { (1, 2) } else { (4, 1) };
        let mut bindings = vec![Binding::Params];
        bindings.extend(vec![Binding::Read; reads]);
        bindings.extend(vec![Binding::Write; writes]);
        bindings
    }

    /// Workgroup memory of the kernel on tensor cores, which `shaders/lib/attention_tensor.wgsl` lays out.
    fn tensor_bytes(&self) -> u32 {
        let units = 2 * STEP * (self.width / 8 + 1) + self.matrices() * TILE * (STEP / 4 + 1);
        16 * units + 4 * self.tensor_workgroup() + 2 * 4 * STEP
    }

    /// Matrices of scores that are in memory at once.
    fn matrices(&self) -> u32 {
        if self.pass == Pass::Forward { 1 } else { 2 }
    }

    /// Subgroups that share rows: one has no more than 64 columns of results in registers.
    fn across(&self) -> u32 {
        self.width.div_ceil(64)
    }

    fn tensor_workgroup(&self) -> u32 {
        TILE / 16 * 32 * self.across()
    }

    fn tensor(&self) -> Kernel {
        let (across, workgroup) = (self.across(), self.tensor_workgroup());
        let mut source = Source::new();
        let mut features = wgpu::Features::empty();
        if self.form == Form::Spirv {
            features |= wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX
                | wgpu::Features::PASSTHROUGH_SHADERS;
            source = source
                .line("enable wgpu_cooperative_matrix;")
                // naga says that a matrix loaded from f32 memory is of f32; src/engine/spirv.rs says otherwise.
                .line("alias MatA = coop_mat16x16<f32, A>;")
                .line("alias MatB = coop_mat16x16<f32, B>;")
                .line("alias MatC = coop_mat16x16<f32, C>;")
                .line(BF16_FRAGMENTS);
        }
        let s_fragments = STEP / 16 / across;
        let o_fragments = self.width / 16 / across;
        source = source
            .constant("WG", workgroup)
            .constant("TILE", TILE)
            .constant("STEP", STEP)
            .constant("WIDTH", self.width)
            .constant("ACROSS", across)
            .constant("MATRICES", self.matrices())
            .constant("D_FRAGMENTS", self.width / 16)
            .constant("S_FRAGMENTS", s_fragments)
            .constant("O_FRAGMENTS", o_fragments)
            .constant("ROUNDS", o_fragments / s_fragments)
            .constant("S_UNITS", TILE * STEP / 8 / workgroup)
            .constant("RAWS", STEP * self.width / 8 / workgroup)
            .quads("y", self.dtype)
            .fragment(shader!("lib/attention_place.wgsl"))
            .fragment(shader!("lib/attention_tensor.wgsl"))
            .fragment(match self.form {
                Form::Emulated => shader!("lib/attention_emulated.wgsl"),
                _ => shader!("lib/attention_coop.wgsl"),
            })
            .operand('x', shader!("lib/attention_units.wgsl"));
        if self.pass != Pass::Forward {
            source = source.operand('g', shader!("lib/attention_units.wgsl"));
        }
        let text = match self.pass {
            Pass::Forward => shader!("attention_forward_tensor.wgsl"),
            Pass::Queries => shader!("attention_dq_tensor.wgsl"),
            Pass::KeysValues => shader!("attention_dkv_tensor.wgsl"),
        };
        Kernel {
            name: self.name(),
            wgsl: source.fragment(text).build(),
            bindings: self.bindings(),
            workgroup_size: workgroup,
            features,
            spirv: self.form == Form::Spirv,
        }
    }

    fn alu(&self) -> Kernel {
        let (rows, across) = self.shape();
        let workgroup = TILE / rows * across;
        let mut source = Source::new()
            .constant("WG", workgroup)
            .constant("TILE", TILE)
            .constant("DEPTH", DEPTH)
            .constant("WIDTH", self.width)
            .constant("TM", rows)
            .constant("DOWN", TILE / rows)
            .constant("ACROSS", across)
            .constant("S_COLS", TILE / across)
            .constant("O_COLS", self.width / across)
            .constant("RAWS", DEPTH * TILE.max(self.width) / 4 / workgroup)
            .quads("x", self.dtype)
            .quads("y", self.dtype)
            .fragment(shader!("lib/attention_place.wgsl"))
            .fragment(shader!("lib/attention.wgsl"))
            .operand('s', shader!("lib/attention_product.wgsl"))
            .operand('o', shader!("lib/attention_product.wgsl"))
            .operand('x', shader!("lib/attention_rows.wgsl"));
        if self.pass != Pass::Forward {
            source = source.quads("g", self.dtype).operand('g', shader!("lib/attention_rows.wgsl"));
        }
        let text = match self.pass {
            Pass::Forward => shader!("attention_forward.wgsl"),
            Pass::Queries => shader!("attention_dq.wgsl"),
            Pass::KeysValues => shader!("attention_dkv.wgsl"),
        };
        Kernel {
            name: self.name(),
            wgsl: source.fragment(text).build(),
            bindings: self.bindings(),
            workgroup_size: workgroup,
            features: wgpu::Features::empty(),
            spirv: false,
        }
    }
}

fn delta_name(dtype: DType) -> String {
    format!("attention.delta.{dtype}")
}

fn delta_kernel(dtype: DType) -> Kernel {
    let source = Source::new()
        .constant("WG", WORKGROUP)
        .quads("x", dtype)
        .quads("g", dtype)
        .fragment(shader!("attention_delta.wgsl"));
    Kernel::portable(delta_name(dtype), source, &[Binding::Read, Binding::Read, Binding::Write])
}

/// Every variant of this file's kernels.
pub fn kernels() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for (dtype, forms) in
        [(DType::F32, &[Form::Alu][..]), (DType::BF16, &[Form::Alu, Form::Spirv, Form::Emulated])]
    {
        kernels.push(delta_kernel(dtype));
        for pass in [Pass::Forward, Pass::Queries, Pass::KeysValues] {
            for form in forms.iter().copied() {
                let variant = |width| Variant { pass, width, dtype, form }.kernel();
                kernels.extend(WIDTHS.map(variant));
            }
        }
    }
    kernels
}
