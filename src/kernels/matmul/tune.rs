//! Tiles measured on a device, and the file that keeps them.
//!
//! [`Tuning::measure`] times every tile that a product may take (`tier::candidates`), each of them first compared with what it
//! must give; [`Context::use_tuning`] makes products take the fastest. What is measured holds for products of the same kind
//! and class of size: lengths up to 16 are their own class, longer ones those up to the same power of two. The file is TOML,
//! with a table for every device, driver and version of this crate; those of others are left alone.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::tier::{self, Fragments, SKINNY, Shape};
use super::{Extras, Groups, Input, Matmul, MatmulDesc, Operand, Output, Target, Tier, Values};
use crate::engine::buffer::{DType, DeviceMxTensor, Tensor};
use crate::engine::gpu::Gpu;
use crate::engine::{Context, Engine};
use crate::formats::{Axis, Block, Element, Layout, MxSpec, MxTensor, ScaleFormat};
use crate::{Error, Result, report};

/// Of the file.
const FORMAT: u32 = 1;
/// A file of more bytes is not one of these.
const MAX_BYTES: u64 = 16 << 20;
/// How long a GPU works before it is timed.
const WARM_UP: Duration = Duration::from_millis(500);

/// Tiles that were measured, on any number of devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tuning {
    format: u32,
    #[serde(default, rename = "device")]
    devices: Vec<Device>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Device {
    adapter: String,
    driver: String,
    backend: String,
    /// Of this crate, whose kernels they are.
    version: String,
    #[serde(default, rename = "product")]
    products: Vec<Product>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Product {
    m: usize,
    n: usize,
    k: usize,
    a: String,
    b: String,
    out: String,
    tier: String,
    #[serde(default = "one", skip_serializing_if = "is_one")]
    batch: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    experts: Option<usize>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    group_k: bool,
    /// [`Shape`] in words.
    tile: String,
    /// What it took, and what the tile that is chosen without measuring did.
    microseconds: f64,
    usual_microseconds: f64,
}

fn one() -> usize {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_one(batch: &usize) -> bool {
    *batch == 1
}

/// What [`Context::use_tuning`] did with a [`Tuning`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tuned {
    /// Products that have a measured tile now.
    pub used: usize,
    /// Products of other devices, drivers or versions of this crate.
    pub others: usize,
    /// What is said of this device and cannot be, and why.
    pub refused: Vec<String>,
}

/// A tile that was tried.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Its name.
    pub tile: String,
    /// Seconds a product: the median, or why there is none.
    pub seconds: Result<f64, String>,
}

/// Products that take the same tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    tier: Tier,
    a: Operand,
    b: Operand,
    out: DType,
    size: [usize; 3],
    batch: usize,
    experts: Option<usize>,
    group_k: bool,
    sliced: bool,
    /// Whether lines are whole chunks.
    chunks: bool,
}

impl Key {
    fn new(desc: &MatmulDesc, tier: Tier, sliced: bool) -> Option<Key> {
        let Output::Dense(out) = desc.out else { return None };
        let class = |n: usize| if n <= SKINNY { n } else { n.next_power_of_two() };
        Some(Key {
            tier,
            a: desc.a,
            b: desc.b,
            out,
            size: [desc.m, desc.n, desc.k].map(class),
            batch: class(desc.batch),
            experts: desc.experts,
            group_k: desc.group_k,
            sliced,
            chunks: desc.k.is_multiple_of(128),
        })
    }
}

/// The tiles that a context uses.
pub(crate) type Table = HashMap<Key, Shape>;

impl Gpu {
    /// What was measured for such a product.
    pub(super) fn tuned(&self, desc: &MatmulDesc, tier: Tier, sliced: bool) -> Option<Shape> {
        let table = self.tuning.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        if table.is_empty() {
            return None;
        }
        table.get(&Key::new(desc, tier, sliced)?).copied()
    }
}

impl Context {
    /// Products recorded from now on take the tiles that `tuning` has for this device, driver and version of the crate; those
    /// of an earlier call are forgotten. An empty [`Tuning`] goes back to the usual ones.
    pub fn use_tuning(&self, tuning: &Tuning) -> Tuned {
        let mut tuned = Tuned::default();
        let Engine::Gpu(gpu) = self.engine() else {
            tuned.others = tuning.devices.iter().map(|device| device.products.len()).sum();
            return tuned;
        };
        let mut table = Table::new();
        for device in &tuning.devices {
            if !device.is(self) {
                tuned.others += device.products.len();
                continue;
            }
            for product in &device.products {
                match product.entry(self, gpu) {
                    Ok((key, shape)) => {
                        table.insert(key, shape);
                    }
                    Err(error) => tuned.refused.push(error.to_string()),
                }
            }
        }
        tuned.used = table.len();
        *gpu.tuning.write().unwrap_or_else(std::sync::PoisonError::into_inner) = table;
        tuned
    }
}

impl Device {
    fn of(ctx: &Context) -> Device {
        let caps = ctx.caps();
        Device {
            adapter: caps.name,
            driver: caps.driver,
            backend: caps.backend,
            version: env!("CARGO_PKG_VERSION").into(),
            products: Vec::new(),
        }
    }

    fn is(&self, ctx: &Context) -> bool {
        Device { products: Vec::new(), ..self.clone() } == Device::of(ctx)
    }
}

impl Product {
    fn desc(&self) -> Result<MatmulDesc> {
        let desc = MatmulDesc {
            m: self.m,
            n: self.n,
            k: self.k,
            a: parse_operand(&self.a)?,
            b: parse_operand(&self.b)?,
            out: Output::Dense(parse_dtype(&self.out)?),
            batch: self.batch,
            experts: self.experts,
            group_k: self.group_k,
            tier: self.tier.parse()?,
            ..Default::default()
        };
        desc.validate()?;
        Ok(desc)
    }

    /// Checked: the tile is one that this device's kernels for this product have.
    fn entry(&self, ctx: &Context, gpu: &Gpu) -> Result<(Key, Shape)> {
        let desc = self.desc()?;
        let refuse = |why: String| {
            Error::InvalidData(format!("a tile for {} x {} x {}: {why}", self.m, self.n, self.k))
        };
        if desc.tier == Tier::Auto {
            return Err(refuse("its tier is auto: the one that was measured".into()));
        }
        let (tier, _) = tier::choose(ctx, &desc)?;
        let sliced = tier::slice(ctx, &desc, tier).is_some();
        let shape = tier::candidates(gpu, &desc, tier, sliced)
            .into_iter()
            .find(|shape| shape.to_string() == self.tile)
            .ok_or_else(|| refuse(format!("there is no {:?} in the {tier} tier", self.tile)))?;
        let key = Key::new(&desc, tier, sliced).ok_or_else(|| refuse("packed".into()))?;
        Ok((key, shape))
    }
}

impl Default for Tuning {
    fn default() -> Tuning {
        Tuning { format: FORMAT, devices: Vec::new() }
    }
}

// ---- The file ------------------------------------------------------------------------------------------------------

impl Tuning {
    /// Reads a file that [`Tuning::write`] wrote. A file that is none is an error that says so.
    pub fn read(path: &Path) -> Result<Tuning> {
        let mut text = Vec::new();
        let file = std::fs::File::open(path).map_err(Error::at(path))?;
        file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(Error::at(path))?;
        let wrong = |problem: String| {
            // A parser's message has several lines.
            let problem = problem.split_whitespace().collect::<Vec<_>>().join(" ");
            Error::InvalidData(format!(
                "{}: no file of measured tiles: {problem}; delete it, or name another",
                path.display()
            ))
        };
        if text.len() as u64 > MAX_BYTES {
            return Err(wrong(format!("more than {MAX_BYTES} bytes")));
        }
        let text = String::from_utf8(text).map_err(|_| wrong("it is not text".into()))?;
        let tuning: Tuning = toml::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        if tuning.format != FORMAT {
            return Err(wrong(format!("it is of format {}, not {FORMAT}", tuning.format)));
        }
        Ok(tuning)
    }

    /// Writes a file, whole when it appears.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = toml::to_string(self)
            .map_err(|error| Error::InvalidData(format!("measured tiles: {error}")))?;
        let text = format!("# Tiles that microscaling measured to be the fastest.\n\n{text}");
        // Beside its place, so that renaming is within a file system; a name of its own for every process.
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}.tmp", std::process::id()));
        let beside = path.with_file_name(name);
        let written = std::fs::File::create(&beside).and_then(|mut file| {
            std::io::Write::write_all(&mut file, text.as_bytes())?;
            file.sync_all()
        });
        written.and_then(|()| std::fs::rename(&beside, path)).map_err(|error| {
            // The error that led here is the one to tell.
            let _ = std::fs::remove_file(&beside);
            Error::at(path)(error)
        })
    }
}

// ---- Measuring -----------------------------------------------------------------------------------------------------

impl Tuning {
    /// Times all tiles of a product on `ctx`'s device for about `limit`, keeps the fastest, and returns all, the fastest first
    /// and those that cannot be used last. `tried` is told of each when it has run first. Operands are random; bias, alpha
    /// and beta do not count. A tile whose outputs are wrong is reported and never kept: in the exact tier any other bit than
    /// the usual tile's is wrong, in the others what differs by more than both bounds from the ALU tier's result.
    pub async fn measure(
        &mut self,
        ctx: &Context,
        desc: &MatmulDesc,
        limit: Duration,
        mut tried: impl FnMut(&Candidate, usize),
    ) -> Result<Vec<Candidate>> {
        let Engine::Gpu(gpu) = ctx.engine() else {
            return Err(Error::Unsupported {
                operation: "measuring tiles".into(),
                needs: "a GPU".into(),
                has: "the context is the CPU engine".into(),
            });
        };
        let desc = MatmulDesc { bias: false, alpha: 1.0, beta: 0.0, ..*desc };
        let usual = Matmul::without_native(ctx, &desc)?;
        let (tier, sliced) = (usual.tier, usual.slice.is_some());
        let desc = MatmulDesc { tier, ..desc };
        let (Some(key), Output::Dense(out)) = (Key::new(&desc, tier, sliced), desc.out) else {
            return Err(Error::Unsupported {
                operation: "measuring tiles".into(),
                needs: "a dense output".into(),
                has: "the product's is packed".into(),
            });
        };
        let mut work = Work::new(ctx, &desc, out).await?;
        let shapes = tier::candidates(gpu, &desc, tier, sliced);
        let (mut timed, mut slow): (Vec<Timed>, Vec<Timed>) = Default::default();
        let mut failed = Vec::new();
        let count = shapes.len();
        for shape in shapes {
            let matmul = Matmul { forced: Some(shape), ..usual.clone() };
            let checked = match work.check(ctx, &matmul, tier).await {
                // The first product makes pipelines.
                Ok(()) => work.time(ctx, &matmul, 1).await.map_err(|error| error.to_string()),
                Err(error @ Error::DeviceLost(_)) => return Err(error),
                Err(error) => Err(error.to_string()),
            };
            let candidate = Candidate { tile: shape.to_string(), seconds: checked };
            tried(&candidate, count);
            match candidate.seconds {
                Ok(_) => timed.push((shape, matmul, Vec::new())),
                Err(_) => failed.push(candidate),
            }
        }
        // A GPU that was idle while operands were made takes a good part of a second to come back to its clock.
        let warm = Instant::now();
        while !ctx.caps().software && warm.elapsed() < WARM_UP {
            work.time(ctx, &usual, 20).await?;
        }
        // In turns, so that a clock that changes meets all; those that are far behind drop out.
        let start = Instant::now();
        let mut each = 0.0;
        for round in 0.. {
            for (_, matmul, samples) in &mut timed {
                let sample = if ctx.caps().software { 0.0 } else { 0.004 };
                let iterations = if each > 0.0 { (sample / each) as u64 } else { 3 };
                let seconds = work.time(ctx, matmul, iterations.clamp(1, 200)).await?;
                each = seconds;
                // The first round warms the device up.
                if round > 0 || ctx.caps().software {
                    samples.push(seconds);
                }
            }
            let best = fastest(&timed);
            if round > 0 {
                if round >= 2 {
                    let behind = |t: &mut Timed| report::median(&t.2) > 1.5 * best;
                    slow.extend(timed.extract_if(.., behind));
                }
                if round >= 3 && start.elapsed() > limit || round >= 40 {
                    break;
                }
            }
            if ctx.caps().software && start.elapsed() > limit {
                break;
            }
        }
        let mut list: Vec<_> = timed
            .iter()
            .chain(&slow)
            .map(|(shape, _, samples)| (*shape, report::median(samples)))
            .collect();
        list.sort_by(|a, b| a.1.total_cmp(&b.1));
        if let Some((shape, seconds)) = list.first() {
            let usual = tier::candidates(gpu, &desc, tier, sliced)[0];
            let usual = list.iter().find(|(shape, _)| *shape == usual).map_or(f64::NAN, |u| u.1);
            self.keep(ctx, gpu, &desc, key, *shape, [*seconds, usual]);
        }
        Ok(list
            .into_iter()
            .map(|(shape, seconds)| Candidate { tile: shape.to_string(), seconds: Ok(seconds) })
            .chain(failed)
            .collect())
    }

    fn keep(
        &mut self,
        ctx: &Context,
        gpu: &Gpu,
        desc: &MatmulDesc,
        key: Key,
        shape: Shape,
        [seconds, usual]: [f64; 2],
    ) {
        let at = self.devices.iter().position(|device| device.is(ctx)).unwrap_or_else(|| {
            self.devices.push(Device::of(ctx));
            self.devices.len() - 1
        });
        let products = &mut self.devices[at].products;
        products.retain(|product| product.entry(ctx, gpu).ok().is_none_or(|(old, _)| old != key));
        products.push(Product {
            m: desc.m,
            n: desc.n,
            k: desc.k,
            a: operand_name(desc.a),
            b: operand_name(desc.b),
            out: key.out.to_string(),
            tier: desc.tier.to_string(),
            batch: desc.batch,
            experts: desc.experts,
            group_k: desc.group_k,
            tile: shape.to_string(),
            microseconds: (seconds * 1e9).round() / 1e3,
            usual_microseconds: (usual * 1e9).round() / 1e3,
        });
    }
}

/// A tile and its samples.
type Timed = (Shape, Matmul, Vec<f64>);

fn fastest(timed: &[Timed]) -> f64 {
    timed.iter().map(|(.., samples)| report::median(samples)).fold(f64::INFINITY, f64::min)
}

/// Operands, outputs, and what these should be.
struct Work {
    sets: Vec<(Random, Random, Tensor)>,
    groups: Option<Groups>,
    out: DType,
    /// By the ALU tier, and how far another tier may be from it.
    want: Vec<f32>,
    within: Vec<f32>,
    /// The usual tile's bits.
    first: Option<Vec<u8>>,
}

/// Sets of operands in turn, so that they do not stay in a cache that is smaller than this.
const CACHE: usize = 150 << 20;
const SETS: usize = 3;

impl Work {
    async fn new(ctx: &Context, desc: &MatmulDesc, out: DType) -> Result<Work> {
        let [a_stack, b_stack, y_stack] = desc.stacks();
        let groups = match desc.experts {
            None => None,
            Some(experts) => {
                // Each row, or block of 32 positions, draws an expert: equal parts would fit tiles that others do not.
                let (total, unit) = if desc.group_k { (desc.k / 32, 32) } else { (desc.m, 1) };
                let mut offsets = vec![0; experts + 1];
                for draw in random_bytes(0, total * 4).chunks_exact(4) {
                    let draw = u32::from_le_bytes([draw[0], draw[1], draw[2], draw[3]]);
                    offsets[1 + draw as usize % experts] += unit;
                }
                for g in 0..experts {
                    offsets[g + 1] += offsets[g];
                }
                let ids: Vec<u32> = (0..experts as u32).collect();
                Some(Groups::new(ctx, &offsets, &ids, experts)?)
            }
        };
        let extras = Extras { bias: None, groups: groups.as_ref() };
        let make = |seed: u64, signs: bool| -> Result<(Random, Random)> {
            Ok((
                Random::new(ctx, desc.a, [a_stack, desc.m, desc.k], 2 * seed, signs)?,
                Random::new(ctx, desc.b, [b_stack, desc.n, desc.k], 2 * seed + 1, signs)?,
            ))
        };
        let rows = y_stack * desc.m;
        let alu = MatmulDesc { tier: Tier::Alu, out: DType::F32.into(), ..*desc };
        let alu = Matmul { slice: None, ..Matmul::new(ctx, &alu)? };
        let alu = Matmul { forced: Some(tier::ALU), ..alu };
        let mut y = ctx.zeros(DType::F32, rows, desc.n)?;
        let mut product = async |(a, b): &(Random, Random)| -> Result<Vec<f32>> {
            let mut stream = ctx.stream();
            alu.record_with(&mut stream, a.input(), b.input(), &mut y, extras)?;
            ctx.submit(stream)?;
            Ok(bytemuck::pod_collect_to_vec(&ctx.read(&y).await?))
        };
        let first = make(0, true)?;
        let want = product(&first).await?;
        // Σ|ab| gives the bound.
        let sums = product(&make(0, false)?).await?;
        let (k, unit) = (desc.k as f32, 2f32.powi(-21));
        let most = first.0.largest * first.1.largest;
        let within = sums.iter().map(|sum| (k + 8.0) * unit * sum + k * unit * most).collect();
        let bytes = first.0.bytes() + first.1.bytes() + rows * desc.n * out.size();
        let mut sets = vec![(first.0, first.1, ctx.zeros(out, rows, desc.n)?)];
        while sets.len() < SETS && bytes < CACHE {
            let (a, b) = make(sets.len() as u64, true)?;
            sets.push((a, b, ctx.zeros(out, rows, desc.n)?));
        }
        Ok(Work { sets, groups, out, want, within, first: None })
    }

    /// Runs a product once and compares its outputs.
    async fn check(&mut self, ctx: &Context, matmul: &Matmul, tier: Tier) -> Result<()> {
        let (a, b, y) = &mut self.sets[0];
        // What another tile left does not count.
        let nan = [0xff, 0x7f].repeat(y.bytes() / 2);
        *y = ctx.upload(self.out, y.shape()[0], y.shape()[1], &nan)?;
        let extras = Extras { bias: None, groups: self.groups.as_ref() };
        let mut stream = ctx.stream();
        matmul.record_with(&mut stream, a.input(), b.input(), Target::Dense(y), extras)?;
        ctx.submit(stream)?;
        let bytes = ctx.read(y).await?;
        let columns = y.shape()[1].max(1);
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(
            &[&bytes[..], &[0; 3]].concat()[..bytes.len().next_multiple_of(4)],
        );
        for (i, (want, within)) in self.want.iter().zip(&self.within).enumerate() {
            let got = f32::from_bits(self.out.f32_bits(&words, i));
            let rounding = match self.out {
                DType::F32 => 0.0,
                DType::F16 => 2f32.powi(-10) * want.abs() + 2f32.powi(-24),
                DType::BF16 => 2f32.powi(-7) * want.abs(),
            };
            let over = self.out == DType::F16 && got.is_infinite() && want.abs() > 65000.0;
            // Rows of no group are not written.
            let apart = (got - want).abs() <= within + rounding || over;
            if !(apart || self.groups.is_some() && got.is_nan()) {
                return Err(Error::InvalidData(format!(
                    "WRONG: y[{}, {}] is {got}, in the ALU tier {want}, further apart than {within}",
                    i / columns,
                    i % columns
                )));
            }
        }
        match &self.first {
            Some(first) if tier == Tier::Exact && *first != bytes => {
                let at = first.iter().zip(&bytes).position(|(a, b)| a != b).unwrap_or(0);
                let i = at / self.out.size();
                return Err(Error::InvalidData(format!(
                    "WRONG: the bits of y[{}, {}] are not those of the usual tile",
                    i / columns,
                    i % columns
                )));
            }
            Some(_) => {}
            None => self.first = Some(bytes),
        }
        Ok(())
    }

    /// Seconds a product.
    async fn time(&mut self, ctx: &Context, matmul: &Matmul, iterations: u64) -> Result<f64> {
        let extras = Extras { bias: None, groups: self.groups.as_ref() };
        let sets = &mut self.sets;
        let count = sets.len() as u64;
        let time = report::time(ctx, iterations, |stream, i| {
            let (a, b, y) = &mut sets[(i % count) as usize];
            matmul.record_with(stream, a.input(), b.input(), Target::Dense(y), extras)
        });
        Ok(time.await?.as_secs_f64() / iterations as f64)
    }
}

/// A random operand.
struct Random {
    data: Data,
    /// At least every magnitude.
    largest: f32,
}

enum Data {
    Mx(DeviceMxTensor),
    Dense(Tensor),
}

impl Random {
    /// Of a stack of matrices with so many outputs and positions; the same seed gives the same magnitudes, with or without
    /// signs.
    fn new(
        ctx: &Context,
        operand: Operand,
        [stack, outputs, k]: [usize; 3],
        seed: u64,
        signs: bool,
    ) -> Result<Random> {
        let [rows, cols] = match operand.transposed {
            false => [stack * outputs, k],
            true => [stack * k, outputs],
        };
        match operand.values {
            Values::Mx(spec) => {
                let layout = Layout::new(spec, Axis::One, rows, cols)?;
                let mut codes = random_bytes(seed, layout.codes_len());
                match spec.element {
                    // No NaN, no infinity.
                    Element::E4M3 | Element::E5M2 => codes.iter_mut().for_each(|c| *c &= 0xbf),
                    Element::Int8 => codes.iter_mut().for_each(|c| *c = (*c as i8).max(-127) as u8),
                    _ => {}
                }
                if !signs {
                    unsign(spec.element, &mut codes);
                }
                let mut scales = random_bytes(seed ^ 0x5ca1e, layout.scales_len());
                let (low, spread, most) = match spec.scale {
                    // As far apart as those of normal values: bytes take them (bytes.rs).
                    ScaleFormat::E8M0 => (124, 3, 1.0),
                    // 0.25 to 0.46875.
                    ScaleFormat::E4M3 => (40, 7, 0.5),
                };
                scales.iter_mut().for_each(|s| *s = low + (*s & spread));
                let largest = spec.element.max() * most;
                let tensor = MxTensor::from_parts(layout, codes, scales, 1.0)?;
                Ok(Random { data: Data::Mx(ctx.upload_mx(&tensor)?), largest })
            }
            Values::Dense(dtype) => {
                let values = random_bytes(seed, rows * cols).into_iter().map(|byte| {
                    // A sign, and 0 to 127/128: exact in every type.
                    let magnitude = f32::from(byte & 127) / 128.0;
                    if signs && byte > 127 { -magnitude } else { magnitude }
                });
                let bytes: Vec<u8> = match dtype {
                    DType::F32 => values.flat_map(f32::to_le_bytes).collect(),
                    DType::F16 => {
                        values.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect()
                    }
                    DType::BF16 => {
                        values.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect()
                    }
                };
                let tensor = ctx.upload(dtype, rows, cols, &bytes)?;
                Ok(Random { data: Data::Dense(tensor), largest: 1.0 })
            }
        }
    }

    fn input(&self) -> Input<'_> {
        match &self.data {
            Data::Mx(tensor) => Input::Mx(tensor),
            Data::Dense(tensor) => Input::Dense(tensor),
        }
    }

    fn bytes(&self) -> usize {
        match &self.data {
            Data::Mx(tensor) => tensor.bytes(),
            Data::Dense(tensor) => tensor.bytes(),
        }
    }
}

/// Makes every code that of its magnitude.
fn unsign(element: Element, codes: &mut [u8]) {
    match element.bits() {
        4 => codes.iter_mut().for_each(|c| *c &= 0x77),
        8 if element == Element::Int8 => {
            codes.iter_mut().for_each(|c| *c = (*c as i8).unsigned_abs());
        }
        8 => codes.iter_mut().for_each(|c| *c &= 0x7f),
        // Four codes in three bytes, low bits first: bits 5, 11, 17 and 23.
        _ => codes.chunks_mut(3).for_each(|three| {
            for (byte, signs) in three.iter_mut().zip([0x20, 0x08, 0x82]) {
                *byte &= !signs;
            }
        }),
    }
}

fn random_bytes(seed: u64, n: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15 ^ seed.wrapping_mul(0xd134_2543_de82_ef95);
    let mut out = Vec::with_capacity(n.next_multiple_of(8));
    while out.len() < n {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend(state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    out.truncate(n);
    out
}

// ---- Names ---------------------------------------------------------------------------------------------------------

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Shape::Tile { bm, bn, tm, tn } => write!(f, "tile{bm}x{bn}.{tm}x{tn}"),
            Shape::Skinny { m, rn, halves, own } => {
                let halves = if *halves { ".halves" } else { "" };
                write!(f, "skinny{m}x{rn}{halves}{}", if *own { ".own" } else { "" })
            }
            Shape::Join { bm, bn } => write!(f, "join{bm}x{bn}"),
            Shape::Tensor { subgroups: [sm, sn], fragments: [fm, fn_], slices, side, by } => {
                let by = match by {
                    Fragments::Spirv => "spirv",
                    Fragments::Wgsl => "wgsl",
                    Fragments::Emulated => "emulated",
                    Fragments::Bytes { byte, k, emulated } => {
                        let emulated = if *emulated { "emulated" } else { "" };
                        &format!("{byte}k{k}-{emulated}").to_lowercase()
                    }
                    Fragments::Ocp { emulated: false } => "ocp",
                    Fragments::Ocp { emulated: true } => "ocp-emulated",
                };
                write!(f, "{by}{side}.{sm}x{sn}x{slices}.{fm}x{fn_}")
            }
        }
    }
}

fn operand_name(operand: Operand) -> String {
    let values = match operand.values {
        Values::Mx(spec) => format!("{}/{}", spec.name(), spec.block),
        Values::Dense(dtype) => dtype.to_string(),
    };
    format!("{values}{}", if operand.transposed { "-t" } else { "" })
}

fn parse_operand(name: &str) -> Result<Operand> {
    let (values, transposed) = match name.strip_suffix("-t") {
        Some(values) => (values, true),
        None => (name, false),
    };
    let values = match values.split_once('/') {
        None => Values::Dense(parse_dtype(values)?),
        Some((spec, block)) => {
            let block = Block::ALL
                .into_iter()
                .find(|b| b.to_string() == block)
                .ok_or_else(|| Error::InvalidSpec(format!("block {block:?} of {name:?}")))?;
            Values::Mx(MxSpec::by_name(spec)?.with_block(block))
        }
    };
    Ok(Operand { values, transposed })
}

fn parse_dtype(name: &str) -> Result<DType> {
    DType::ALL
        .into_iter()
        .find(|dtype| dtype.to_string() == name)
        .ok_or_else(|| Error::InvalidSpec(format!("type {name:?}: f32, f16 or bf16")))
}
