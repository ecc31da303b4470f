//! Which tier, and which tile.

use super::bytes::{self, Byte};
use super::{MatmulDesc, Operand, Output, Tier, Values};
use crate::engine::buffer::DType;
use crate::engine::caps::State;
use crate::engine::gpu::Gpu;
use crate::engine::{Context, Engine};
use crate::formats::{Element, MxSpec};
use crate::kernels::{NVIDIA, WORKGROUP};
use crate::{Error, Result};

/// Rows of A up to which the skinny kernels are meant.
pub(super) const SKINNY: usize = 16;

/// The ALU tier's tile, which takes any product.
pub(super) const ALU: Shape = Shape::Tile { bm: 64, bn: 64, tm: 4, tn: 4 };

/// How the tensor tier's fragments are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fragments {
    /// By SPIR-V that this crate makes (src/engine/spirv.rs).
    Spirv,
    /// By plain WGSL.
    Wgsl,
    /// Without cooperative matrices.
    Emulated,
    /// Of eight bits, by SPIR-V of this crate's or without cooperative matrices: k positions at a time. No product's usual tile:
    /// they take the place of [`Fragments::Spirv`] and [`Fragments::Emulated`] where `bytes.rs` says so.
    Bytes { byte: Byte, k: u32, emulated: bool },
    /// As [`Fragments::Spirv`] or [`Fragments::Emulated`], with E2M1 operands converted by VK_EXT_shader_ocp_microscaling_types.
    Ocp { emulated: bool },
}

impl Fragments {
    /// The same, whatever E2M1 operands are decoded by.
    pub(super) fn matrices(self) -> Fragments {
        match self {
            Fragments::Ocp { emulated: false } => Fragments::Spirv,
            Fragments::Ocp { emulated: true } => Fragments::Emulated,
            by => by,
        }
    }
}

/// The work of a workgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// `shaders/matmul.wgsl`: `bm × bn` outputs, `tm × tn` an invocation.
    Tile { bm: u32, bn: u32, tm: u32, tn: u32 },
    /// `shaders/matmul_skinny.wgsl`: `m` rows of A, `rn` lines of B; by f16 where that is exact, and then maybe each
    /// invocation with its own part of A (`shaders/matmul_skinny_own.wgsl`).
    Skinny { m: u32, rn: u32, halves: bool, own: bool },
    /// `shaders/matmul_join.wgsl`: `bm × bn` outputs.
    Join { bm: u32, bn: u32 },
    /// `shaders/matmul_tensor.wgsl`: subgroups and fragments down and across, and slices of k.
    Tensor { subgroups: [u32; 2], fragments: [u32; 2], slices: u32, side: u32, by: Fragments },
}

impl Shape {
    /// Rows and columns of outputs.
    pub(super) fn outputs(self) -> [u32; 2] {
        match self {
            Shape::Tile { bm, bn, .. } | Shape::Join { bm, bn } => [bm, bn],
            Shape::Skinny { m, rn, .. } => [m, rn],
            Shape::Tensor { subgroups, fragments, side, .. } => {
                [subgroups[0] * fragments[0] * side, subgroups[1] * fragments[1] * side]
            }
        }
    }

    /// With E2M1 operands decoded from their bits.
    pub(super) fn without_conversion(mut self) -> Shape {
        if let Shape::Tensor { by, .. } = &mut self {
            *by = by.matrices();
        }
        self
    }

    /// Invocations of a workgroup.
    pub(super) fn workgroup(self) -> u32 {
        match self {
            Shape::Tensor { subgroups: [m, n], slices, .. } => 32 * m * n * slices,
            Shape::Tile { bm, bn, tm, tn } => bm / tm * (bn / tn),
            Shape::Skinny { .. } | Shape::Join { .. } => WORKGROUP,
        }
    }

    /// Bytes of workgroup memory, at most.
    fn memory(self, desc: &MatmulDesc, tier: Tier) -> u32 {
        let segments = if tier == Tier::Exact { segments(desc) } else { 1 };
        let [bm, bn] = self.outputs();
        match self {
            Shape::Tile { .. } => {
                let words = if tier == Tier::Exact { 8 } else { 16 };
                4 * ((words * (bm + bn)).max(16 * bn) + segments * (bm + bn))
            }
            Shape::Join { .. } => 0,
            Shape::Skinny { m, rn, own: true, .. } => 256 * m * rn,
            // Terms, and A's part: at most a word a position.
            Shape::Skinny { m, rn, halves, .. } => {
                let words = match (tier, halves) {
                    (Tier::Exact, true) => 16,
                    (Tier::Exact, false) => 8,
                    _ => 32,
                };
                128 * (m * rn * segments + m * words + m * segments)
            }
            Shape::Tensor { subgroups, side, slices, .. } => {
                let tile = ((bm + bn) * 5 * 16).max(subgroups[0] * side * bn * 4);
                slices * tile + if tier == Tier::Exact { 16 * segments * (bm + bn) } else { 0 }
            }
        }
    }

    /// Whether its invocations share loads and stores evenly, as the shaders take for granted.
    fn is_whole(self) -> bool {
        let [bm, bn] = self.outputs();
        match self {
            Shape::Tensor { slices, .. } => {
                let step = self.workgroup() / slices / 4;
                bm.is_multiple_of(step) && bn.is_multiple_of(step)
            }
            Shape::Skinny { m, rn, own, .. } => m * rn <= WORKGROUP && (!own || m <= 2),
            _ => true,
        }
    }
}

/// Chooses; an error if the tier asked for by name cannot do it.
pub(super) fn choose(ctx: &Context, desc: &MatmulDesc) -> Result<(Tier, String)> {
    let gpu = match ctx.engine() {
        Engine::Cpu => None,
        Engine::Gpu(gpu) => Some(&**gpu),
    };
    let exact = exact(desc);
    let tensor = tensor(gpu, desc);
    match desc.tier {
        Tier::Alu => return Ok((Tier::Alu, "asked for".into())),
        Tier::Exact | Tier::Tensor => {
            let lacks = if desc.tier == Tier::Exact { exact.err() } else { tensor.err() };
            return match lacks {
                None => Ok((desc.tier, "asked for".into())),
                Some([needs, has]) => {
                    let operation = format!("the {} tier", desc.tier);
                    Err(Error::Unsupported { operation, needs, has })
                }
            };
        }
        // What computes what a native route does not hold exactly.
        Tier::Native | Tier::Auto => {}
    }
    let tensor = tensor.and_then(|(by, _)| match by {
        // Those have no kernel for few rows.
        Fragments::Wgsl if desc.m <= 2 => {
            Err(["more than two rows".into(), format!("m is {}", desc.m)])
        }
        _ => Ok(()),
    });
    let no = |lacks: &std::result::Result<(), [String; 2]>| match lacks {
        Ok(()) => String::new(),
        Err([needs, has]) => format!("it needs {needs}, but {has}"),
    };
    Ok(match (gpu, &exact, &tensor) {
        (None, Ok(()), _) => (Tier::Exact, "integer codes, on the CPU engine".into()),
        (None, Err(_), _) => {
            (Tier::Alu, format!("on the CPU engine; not the exact tier: {}", no(&exact)))
        }
        (Some(_), Ok(()), _) if desc.m == 1 => {
            (Tier::Exact, "one row, and codes are integers".into())
        }
        (Some(gpu), _, Ok(())) if !gpu.emulate_tensor => {
            (Tier::Tensor, "the device has cooperative matrices f16 to f32".into())
        }
        (Some(_), Ok(()), _) => {
            (Tier::Exact, format!("integer codes; not the tensor tier: {}", no(&tensor)))
        }
        (Some(_), Err(_), _) => (
            Tier::Alu,
            format!("not the tensor tier: {}; not the exact tier: {}", no(&tensor), no(&exact)),
        ),
    })
}

/// Whether the codes are small integers.
pub(super) fn integers(values: Values) -> bool {
    matches!(values, Values::Mx(spec)
        if matches!(spec.element, Element::E2M1 | Element::E2M3 | Element::Int8))
}

/// What the exact tier needs and what is there instead.
fn exact(desc: &MatmulDesc) -> std::result::Result<(), [String; 2]> {
    for (name, operand) in [("A", desc.a), ("B", desc.b)] {
        if !integers(operand.values) {
            return Err([
                "E2M1, E2M3 or INT8 codes on both sides".into(),
                format!("{name} is {}", operand.values),
            ]);
        }
    }
    Ok(())
}

/// The tensor tier's fragments on this device for this problem, or what it needs and what is there instead.
fn tensor(
    gpu: Option<&Gpu>,
    desc: &MatmulDesc,
) -> std::result::Result<(Fragments, u32), [String; 2]> {
    let lack = |needs: &str, has: String| Err([needs.to_string(), has]);
    let Some(gpu) = gpu else {
        return lack("cooperative matrices", "the context is the CPU engine".into());
    };
    let bf16 = is_bf16(desc);
    for (name, operand) in [("A", desc.a), ("B", desc.b)] {
        match operand.values {
            Values::Dense(dtype @ (DType::F32 | DType::BF16)) if !bf16 => {
                return lack("MX or f16 operands, or bf16 twice", format!("{name} is {dtype}"));
            }
            _ => {}
        }
    }
    let features = gpu.device.features();
    let alone =
        gpu.emulate_tensor && gpu.emulate_bytes.is_some() && bytes::lack(desc.a, desc.b).is_none();
    if !features.contains(wgpu::Features::SHADER_F16) && !alone {
        return lack("f16 in shaders", "the device was opened without".into());
    }
    if gpu.emulate_tensor {
        return Ok((Fragments::Emulated, 16));
    }
    if !features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
        return lack(
            "cooperative matrices",
            "the device offers none, or was opened without".into(),
        );
    }
    if gpu.caps.subgroups.is_none_or(|sizes| sizes != (32, 32)) {
        return lack("subgroups of 32", format!("the device's are {:?}", gpu.caps.subgroups));
    }
    let Some(side) = [16, 8].into_iter().find(|side| gpu.matrices.contains(&[*side; 3])) else {
        return lack(
            "cooperative matrices of 16x16x16 or 8x8x8, f16 to f32",
            format!("the device's are {:?}", gpu.matrices),
        );
    };
    let spirv = side == 16
        && gpu.caps.backend == "Vulkan"
        && features.contains(wgpu::Features::PASSTHROUGH_SHADERS);
    let by = if spirv { Fragments::Spirv } else { Fragments::Wgsl };
    if bf16 && !(spirv && gpu.bf16_matrices) {
        return lack(
            "cooperative matrices of bf16",
            "VK_KHR_shader_bfloat16 offers none here, or the device was opened without".into(),
        );
    }
    if by == Fragments::Wgsl && matches!(desc.out, Output::Mx(_)) {
        return lack(
            "SPIR-V to be taken as it is, for a packed output",
            format!("the backend is {}", gpu.caps.backend),
        );
    }
    Ok((by, side))
}

/// The tensor tier's fragments with E2M1 operands converted by VK_EXT_shader_ocp_microscaling_types, if an operand is one that
/// is, and if the device can or is to emulate it.
fn converting(gpu: &Gpu, desc: &MatmulDesc, tier: Tier, by: Fragments) -> Option<Fragments> {
    let emulated = match (tier, by) {
        (Tier::Tensor, Fragments::Spirv) if gpu.e2m1_conversion => false,
        (Tier::Tensor, Fragments::Emulated) if gpu.ocp_conversion => true,
        _ => return None,
    };
    let any = [desc.a, desc.b].iter().any(|operand| wide(operand, desc.k));
    any.then_some(Fragments::Ocp { emulated })
}

impl Gpu {
    /// What is in the way of [`crate::Options::ocp_conversion`].
    pub(crate) fn lacks_conversion(&self) -> Option<String> {
        let probed = self.caps.get("mx-conversion").filter(|line| line.state != State::Yes);
        if let (Some(line), false) = (probed, self.emulate_tensor) {
            return Some(line.reason.clone());
        }
        if !self.device.features().contains(wgpu::Features::SHADER_F16) {
            return Some("the device has no f16 in shaders, or was opened without".into());
        }
        if self.emulate_tensor {
            return None;
        }
        // Any product will do.
        let fragments =
            tensor(Some(self), &MatmulDesc { m: 1, n: 1, k: 128, ..Default::default() });
        match fragments {
            Err([_, has]) => Some(has),
            Ok((Fragments::Spirv, _)) if self.e2m1_conversion => None,
            Ok(_) => Some(
                "its matrices are not 16x16x16 by SPIR-V, as it is, through Vulkan, or the device was opened without"
                    .into(),
            ),
        }
    }
}

/// Whether both operands are dense bf16.
pub(super) fn is_bf16(desc: &MatmulDesc) -> bool {
    [desc.a, desc.b].iter().all(|operand| operand.values == Values::Dense(DType::BF16))
}

/// From so many tiles on, k is not cut.
const WHOLE: usize = 200;
/// Of an H100 or H200: wgpu does not tell how many a device has.
const MULTIPROCESSORS: usize = 132;
/// Positions of a slice at least.
const SHORTEST: usize = 1024;
/// Adding a slice moves eight bytes an output, which takes about as long as multiplying so many positions.
const ADDING: usize = 400;

/// How k is cut where outputs are few and k is long, as in gradients of weights: positions of a slice, a multiple of 128. On
/// NVIDIA's discrete devices (and with the emulation, for tests), where tiles are few. Not in the exact tier, whose additions have
/// an order.
pub(super) fn slice(ctx: &Context, desc: &MatmulDesc, tier: Tier) -> Option<usize> {
    let Engine::Gpu(gpu) = ctx.engine() else { return None };
    let large = gpu.caps.vendor == NVIDIA && gpu.discrete || gpu.emulate_tensor;
    let one = desc.batch == 1 && desc.experts.is_none() && matches!(desc.out, Output::Dense(_));
    if !large || !one || tier == Tier::Exact || desc.m <= SKINNY {
        return None;
    }
    let side = if tier == Tier::Tensor { 128 } else { 64 };
    let tiles = desc.m.div_ceil(side) * desc.n.div_ceil(side);
    // From 200 on a tile is best left whole.
    if tiles == 0 || tiles >= WHOLE {
        return None;
    }
    // Their sums are bound at once.
    let sums = (desc.m * desc.n.next_multiple_of(4) * 4) as u64;
    let most = (desc.k / SHORTEST).min((gpu.max_binding / sums) as usize);
    let slices = slices(tiles, desc.k, most);
    (slices > 1).then(|| desc.k.div_ceil(slices).next_multiple_of(128))
}

/// How many slices: what makes the product and the addition of the slices shortest. Two workgroups share a multiprocessor; one
/// alone takes about 0.7 of the time of two.
fn slices(tiles: usize, k: usize, most: usize) -> usize {
    let pair = 2 * MULTIPROCESSORS;
    let time = |slices: &usize| {
        let workgroups = tiles * slices;
        let last = match workgroups % pair {
            0 => 0.0,
            few if few <= MULTIPROCESSORS => 1.4,
            _ => 2.0,
        };
        let busy = (2 * (workgroups / pair)) as f64 + last;
        // In positions of k, as long as a multiprocessor takes for its share of them.
        let product = k as f64 * busy * MULTIPROCESSORS as f64 / workgroups as f64;
        product + (ADDING * slices) as f64
    };
    (1..=most.max(1)).min_by(|a, b| time(a).total_cmp(&time(b))).unwrap_or(1)
}

/// The tile for a problem: what was measured on this device (`tune.rs`), or else what was best elsewhere.
pub(super) fn shape(gpu: &Gpu, desc: &MatmulDesc, tier: Tier, sliced: bool) -> Shape {
    gpu.tuned(desc, tier, sliced).unwrap_or_else(|| usual(gpu, desc, tier, sliced))
}

/// Rows that share a line of B, about.
fn rows(desc: &MatmulDesc) -> usize {
    match desc.experts {
        Some(experts) if !desc.group_k => desc.m.div_ceil(experts),
        _ => desc.m,
    }
}

/// Whether the output is packed, and then whether in squares.
fn square(desc: &MatmulDesc) -> Option<bool> {
    match desc.out {
        Output::Mx(out) => Some(out.spec.block.lines() > 1),
        Output::Dense(_) => None,
    }
}

/// Where few rows have kernels of their own.
fn is_skinny(desc: &MatmulDesc) -> bool {
    desc.experts.is_none() && square(desc).is_none() && rows(desc) <= SKINNY
}

/// The tile by size; see benches/results.
fn usual(gpu: &Gpu, desc: &MatmulDesc, tier: Tier, sliced: bool) -> Shape {
    let (rows, square) = (rows(desc), square(desc));
    let tiles = rows.div_ceil(128) * desc.n.div_ceil(128) * desc.batch;
    if tier == Tier::Tensor {
        let (by, side) = tensor(Some(gpu), desc).unwrap_or((Fragments::Emulated, 16));
        let by = converting(gpu, desc, tier, by).filter(|_| gpu.ocp_conversion).unwrap_or(by);
        let tiles = tiles * desc.experts.unwrap_or(1);
        let routed = desc.experts.is_some() && !desc.group_k;
        let (subgroups, fragments, slices) = match (by, rows) {
            (Fragments::Wgsl, _) if side == 8 => ([2, 2], [4, 4], 1),
            (Fragments::Wgsl, _) => ([2, 2], [2, 2], 1),
            // A subgroup alone needs no barriers in its loop; slices of k make a thousand of them.
            (_, 0..=SKINNY) if square.is_none() => {
                let subgroups = desc.n.div_ceil(32) * desc.batch * desc.experts.unwrap_or(1);
                let slices = [2, 4, 8].into_iter().find(|slices| subgroups * slices >= 1024);
                ([1, 1], [1, 2], slices.unwrap_or(8) as u32)
            }
            _ if square.is_some() || sliced => ([2, 2], [4, 4], 1),
            // An expert's rows would leave half of a tile empty. Routed experts have unlike numbers of them: where 64 is the
            // mean, some have a few more, and a second tile of 64 each.
            _ if desc.group_k && rows <= 64 => ([2, 2], [2, 4], 1),
            _ if routed && rows <= 40 => ([2, 2], [2, 4], 1),
            _ if routed && rows <= 80 => ([2, 2], [3, 4], 1),
            // As many subgroups as keep a large device busy, from k where there are few tiles.
            _ if tiles >= WHOLE => ([2, 2], [4, 4], 1),
            _ if tiles >= 100 => ([2, 2], [4, 4], 2),
            _ if tiles >= 50 => ([2, 2], [2, 2], 1),
            _ => ([2, 2], [2, 2], 2),
        };
        return Shape::Tensor { subgroups, fragments, slices, side, by };
    }
    if is_skinny(desc) {
        let short = segments(desc) == 2;
        let halves = rows <= 4 && tier == Tier::Exact && halves(gpu, desc);
        // Terms and A's part must fit workgroup memory.
        let (m, rn) = match (tier, rows) {
            (_, 0..=1) if halves && desc.n < 8192 => (1, 16),
            (_, 0..=1) => (1, 32),
            (Tier::Exact, 2) if !short => (2, 32),
            (_, 2) | (Tier::Alu, _) => (2, 16),
            (_, 3..=4) if !short && !halves => (4, 16),
            _ if short || halves => (4, 8),
            _ => (8, 8),
        };
        return Shape::Skinny { m, rn, halves, own: halves && m == 1 };
    }
    if let (Tier::Exact, Some(by)) = (tier, exact_fragments(gpu)) {
        let (subgroups, fragments) = match square {
            Some(_) => ([2, 2], [4, 4]),
            None if tiles < 50 => ([2, 2], [2, 2]),
            None => ([2, 4], [4, 2]),
        };
        return Shape::Tensor { subgroups, fragments, slices: 1, side: 16, by };
    }
    match square {
        Some(false) => Shape::Tile { bm: 64, bn: 128, tm: 4, tn: 8 },
        Some(true) => Shape::Tile { bm: 64, bn: 64, tm: 4, tn: 4 },
        None if tier == Tier::Exact && rows > 64 && desc.n > 64 => {
            Shape::Tile { bm: 128, bn: 128, tm: 8, tn: 8 }
        }
        None => Shape::Tile { bm: 64, bn: 64, tm: 4, tn: 4 },
    }
}

/// All tiles that the product may take, the usual one first. Any of them gives a right result for any size; in the exact tier
/// the same one.
pub(super) fn candidates(gpu: &Gpu, desc: &MatmulDesc, tier: Tier, sliced: bool) -> Vec<Shape> {
    let usual = usual(gpu, desc, tier, sliced);
    let mut list = vec![usual];
    // Packed outputs need whole blocks in a strip; emulated and portable fragments are not worth the choice.
    if square(desc).is_some() {
        return list;
    }
    let limits = gpu.device.limits();
    match (usual, tier) {
        (Shape::Tensor { by: Fragments::Wgsl, .. }, _) => {}
        (Shape::Tensor { by, side, .. }, _) => {
            let by = by.matrices();
            let wide: &[([u32; 2], [u32; 2], &[u32])] = &[
                ([2, 2], [4, 4], &[1, 2]),
                ([2, 2], [4, 2], &[1, 2]),
                ([2, 2], [2, 4], &[1, 2]),
                ([2, 2], [2, 2], &[1, 2, 4]),
                ([2, 4], [4, 2], &[1, 2]),
                ([4, 2], [2, 4], &[1]),
                ([2, 4], [2, 2], &[1, 2]),
                ([1, 4], [4, 2], &[1, 2]),
                ([1, 4], [4, 4], &[1]),
                ([2, 4], [2, 4], &[1]),
                // Experts' rows, a few more than half of a tile of 128.
                ([1, 5], [5, 2], &[1]),
                ([1, 4], [6, 2], &[1]),
                ([2, 2], [3, 4], &[1]),
                ([2, 3], [3, 4], &[1]),
                ([1, 6], [6, 2], &[1]),
                ([2, 4], [4, 4], &[1]),
                ([4, 2], [4, 4], &[1]),
            ];
            let narrow: &[([u32; 2], [u32; 2], &[u32])] = &[
                ([1, 1], [1, 1], &[4, 8]),
                ([1, 1], [1, 2], &[2, 4, 8]),
                ([1, 1], [1, 4], &[2, 4, 8]),
                ([1, 2], [1, 1], &[2, 4]),
                ([1, 2], [1, 2], &[1, 2, 4]),
                ([1, 2], [1, 4], &[1, 2, 4]),
            ];
            let tiles = if is_skinny(desc) { narrow } else { wide };
            // The emulation is for tests.
            let count = if by == Fragments::Emulated { 3 } else { tiles.len() };
            let ways: Vec<_> = std::iter::once(by).chain(converting(gpu, desc, tier, by)).collect();
            for (subgroups, fragments, slices) in &tiles[..count] {
                // The exact tier's additions have an order, and slices that are joined later are enough.
                let one = tier == Tier::Exact || sliced;
                for slices in slices.iter().filter(|slices| !one || **slices == 1) {
                    list.extend(ways.iter().map(|by| Shape::Tensor {
                        subgroups: *subgroups,
                        fragments: *fragments,
                        slices: *slices,
                        side,
                        by: *by,
                    }));
                }
            }
        }
        (Shape::Skinny { halves, .. }, _) => {
            let most = rows(desc).next_power_of_two() as u32;
            let sizes = [(1, 16), (1, 32), (1, 64), (2, 16), (2, 32), (4, 8), (4, 16), (8, 8)];
            for (m, rn) in sizes.into_iter().filter(|(m, _)| *m <= most) {
                list.push(Shape::Skinny { m, rn, halves: false, own: false });
                if halves {
                    list.push(Shape::Skinny { m, rn, halves, own: false });
                    list.push(Shape::Skinny { m, rn, halves, own: true });
                }
            }
        }
        _ => {}
    }
    // Tiles of ALUs, besides the exact tier's fragments too.
    if tier != Tier::Tensor && !is_skinny(desc) {
        for (bm, bn, tm, tn) in [
            (128, 128, 8, 8),
            (128, 64, 8, 4),
            (64, 128, 4, 8),
            (64, 64, 4, 4),
            (64, 64, 8, 4),
            (64, 64, 8, 8),
            (128, 64, 8, 8),
            (32, 64, 4, 4),
        ] {
            list.push(Shape::Tile { bm, bn, tm, tn });
        }
    }
    let mut seen = Vec::new();
    list.retain(|shape| {
        let fits = shape.workgroup()
            <= limits
                .max_compute_invocations_per_workgroup
                .min(limits.max_compute_workgroup_size_x)
            && shape.memory(desc, tier) <= limits.max_compute_workgroup_storage_size;
        (*shape == usual || fits && shape.is_whole()) && !seen.contains(shape) && {
            seen.push(*shape);
            true
        }
    });
    list
}

/// How the exact tier's fragments are computed, if they are: f16 holds the integers, and a segment's sum must be exact in a
/// cooperative matrix's f32, subnormal operands included. NVIDIA's devices are known to keep that.
fn exact_fragments(gpu: &Gpu) -> Option<Fragments> {
    let features = gpu.device.features();
    if !features.contains(wgpu::Features::SHADER_F16) {
        return None;
    }
    if gpu.emulate_tensor {
        return Some(Fragments::Emulated);
    }
    let matrices = features.contains(
        wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::PASSTHROUGH_SHADERS,
    );
    (gpu.caps.vendor == NVIDIA
        && gpu.caps.backend == "Vulkan"
        && gpu.caps.subgroups == Some((32, 32))
        && matrices
        && gpu.matrices.contains(&[16; 3]))
    .then_some(Fragments::Spirv)
}

/// Whether `lib/terms_halves.wgsl` applies: E2M1 under E8M0 on both sides, and f16 with subnormals, which NVIDIA's devices
/// keep; with the emulation, for tests.
fn halves(gpu: &Gpu, desc: &MatmulDesc) -> bool {
    (gpu.caps.vendor == NVIDIA || gpu.emulate_tensor)
        && gpu.caps.backend == "Vulkan"
        && gpu
            .device
            .features()
            .contains(wgpu::Features::SHADER_F16 | wgpu::Features::PASSTHROUGH_SHADERS)
        && [desc.a, desc.b].iter().all(|operand| wide(operand, desc.k))
}

/// How a kernel reads an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Load {
    /// Word by word: any layout.
    Words,
    /// 16 bytes at a time along lines of whole 128 positions: E2M1 and FP8 under E8M0 scales of at least 32, or dense of 16
    /// bits.
    Vectors,
    /// As [`Load::Vectors`], of E2M1 lines of whole 32: the last 128 may be fewer.
    Ragged,
    /// 16 bytes at a time across the lines, whole 128 of them, of a transposed dense operand of 16 bits.
    Columns,
    /// A word of each of the four blocks of 128 positions: what [`Load::Vectors`] takes of E2M1, for the exact tier.
    Blocks,
}

/// Elements of eight bits that are floats.
pub(super) fn floats(spec: MxSpec) -> bool {
    matches!(spec.element, Element::E4M3 | Element::E5M2)
}

/// How the tensor kernel, and the skinny one in f16, read an operand of `outputs` lines.
pub(super) fn load(operand: &Operand, k: usize, outputs: usize) -> Load {
    if !k.is_multiple_of(128) {
        // 16 bytes of a line are still its own.
        let ragged = nibbles(operand) && k.is_multiple_of(32);
        return if ragged { Load::Ragged } else { Load::Words };
    }
    match (operand.values, operand.transposed) {
        (Values::Mx(_), _) if wide(operand, k) => Load::Vectors,
        (Values::Mx(spec), false) if floats(spec) && spec.block.len() >= 32 => Load::Vectors,
        (Values::Dense(DType::F16 | DType::BF16), false) => Load::Vectors,
        (Values::Dense(DType::F16 | DType::BF16), true) if outputs.is_multiple_of(8) => {
            Load::Columns
        }
        _ => Load::Words,
    }
}

/// How the exact tier's fragments read an operand.
pub(super) fn load_exact(operand: &Operand, k: usize) -> Load {
    if wide(operand, k) { Load::Blocks } else { Load::Words }
}

/// Whether an operand's lines are whole vectors of 128 codes of E2M1 under scales of at least 32: loaded 16 bytes at a time.
pub(super) fn wide(operand: &Operand, k: usize) -> bool {
    k.is_multiple_of(128) && nibbles(operand)
}

/// Whether an operand is contracted along lines of E2M1 codes under scales of at least 32.
fn nibbles(operand: &Operand) -> bool {
    matches!(operand, Operand { values: Values::Mx(spec), transposed: false }
        if spec.element == Element::E2M1 && spec.block.len() >= 32)
}

/// Parts of 32 positions that the exact tier rounds separately.
pub(super) fn segments(desc: &MatmulDesc) -> u32 {
    let short = |values| matches!(values, Values::Mx(spec) if spec.block.len() < 32);
    if short(desc.a.values) || short(desc.b.values) { 2 } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_fill_the_multiprocessors() {
        // The example of DESIGN.md; at most so many; two for each multiprocessor; a short k.
        assert_eq!(slices(75, 32768, 32), 7);
        assert_eq!(slices(75, 32768, 3), 3);
        assert_eq!(slices(75, 32768, 1), 1);
        assert_eq!(slices(75, 32768, 0), 1);
        assert_eq!(slices(128, 14336, 14), 2);
        assert_eq!(slices(132, 32768, 32), 2);
        assert_eq!(slices(128, 512, 14), 1);
        for tiles in 1..WHOLE {
            // Many rounds, or a last one that is nearly full.
            let workgroups = tiles * slices(tiles, 1 << 20, 1000);
            let last = workgroups % (2 * MULTIPROCESSORS);
            assert!(last == 0 || last > 200 || workgroups > 6 * MULTIPROCESSORS, "{tiles}");
        }
    }
}
