//! The two engines: a [`Context`] is a GPU through wgpu, or the CPU.
//!
//! Kernels are recorded into a [`Stream`]. On a GPU that encodes a dispatch; on the CPU it runs the kernel's
//! twin at once. Either way the result is there after [`Context::submit`], and the same.

pub mod buffer;
pub mod caps;
pub(crate) mod gpu;
pub mod shader;
#[cfg(not(target_arch = "wasm32"))]
pub mod spirv;
#[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
pub(crate) mod vulkan;

use std::collections::HashSet;
use std::sync::Arc;

use buffer::{CHUNK_ROWS, DType, DeviceMxTensor, Ids, Tensor};
use caps::Caps;
use gpu::{Gpu, Pipeline};
use shader::Kernel;

use crate::formats::{Axis, Layout, MxSpec, MxTensor, ScaleFormat};
use crate::kernels::anchors::anchors;
use crate::kernels::native_pack;
use crate::{Error, Result};

/// Which device to open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The best hardware adapter; the CPU engine where there is none. Software adapters are not chosen: the CPU
    /// engine is faster.
    #[default]
    Auto,
    /// The CPU engine.
    Cpu,
    /// The best adapter, a software one if need be; an error where there is none.
    Gpu,
    /// The first adapter whose name contains this, whatever its case.
    Named(String),
    /// The adapter with this number, from 0 on, in the order of [`adapters`]: for several of one name.
    Number(usize),
}

impl std::str::FromStr for DeviceChoice {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        Ok(match text {
            "auto" => DeviceChoice::Auto,
            "cpu" => DeviceChoice::Cpu,
            "gpu" => DeviceChoice::Gpu,
            name => match name.strip_prefix('#').and_then(|number| number.parse().ok()) {
                Some(number) => DeviceChoice::Number(number),
                None => DeviceChoice::Named(name.into()),
            },
        })
    }
}

/// How to open a [`Context`].
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Which device.
    pub device: DeviceChoice,
    /// Do without these features even if the adapter has them: to test, or to work around a driver.
    pub without: wgpu::Features,
    /// Bind at most this many bytes at once; by default what the adapter allows.
    pub max_binding: Option<u64>,
    /// Emulate cooperative matrices where the device has none, so that [`crate::Tier::Tensor`] runs; for tests, slow.
    pub emulate_tensor: bool,
    /// Emulate its products in bytes as well, for E2M1 operands; for tests, with [`Options::emulate_tensor`].
    pub emulate_bytes: Option<crate::kernels::matmul::Byte>,
    /// Products of the tensor tier in bytes ([`crate::kernels::matmul::Byte`]) from so many multiply-adds (m · n · k) on, where the
    /// device has such matrices; by default where packing the operands is estimated to take less time than it saves.
    pub bytes_from: Option<u64>,
    /// Decode E2M1 operands of [`crate::Tier::Tensor`] by the conversions of VK_EXT_shader_ocp_microscaling_types instead of by
    /// their bits, where lines are whole vectors of 128 and bytes have not taken them: the same bits of outputs. Nobody has
    /// measured it, so nothing does it by itself; where the device has it, [`crate::Tuning::measure`] tries both. An error on a
    /// device without, and on the CPU engine. With [`Options::emulate_tensor`] it is emulated, for tests.
    pub ocp_conversion: bool,
    /// Ask for the graphics API's validation layers (slow; messages go to `log`).
    pub validation: bool,
    /// Where the native routes' libraries are, if not where the system looks.
    pub libraries: crate::native::Libraries,
    /// Products of fewer multiply-adds (m · n · k) go through a native route only by name, because handing over to another
    /// driver takes longer than they do: 2³⁶, 4096³, unless said otherwise ([`crate::native::SMALLEST`]). With 0 also routes are chosen
    /// for which the host waits or copies, because memory or a semaphore is not shared: otherwise those go only by name too.
    pub native_from: Option<u64>,
}

/// An engine: a GPU or the CPU. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Context {
    engine: Arc<Engine>,
}

#[derive(Debug)]
pub(crate) enum Engine {
    Cpu,
    Gpu(Box<Gpu>),
}

/// All adapters that wgpu finds.
pub async fn adapters(validation: bool) -> Vec<wgpu::Adapter> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::PRIMARY;
    descriptor.flags = if validation {
        wgpu::InstanceFlags::VALIDATION | wgpu::InstanceFlags::DEBUG
    } else {
        wgpu::InstanceFlags::empty()
    };
    // wgpu hides adapters that are not fully conformant by their own word; SwiftShader is one.
    descriptor.flags |= wgpu::InstanceFlags::ALLOW_UNDERLYING_NONCOMPLIANT_ADAPTER;
    let instance = wgpu::Instance::new(descriptor);
    let mut adapters = instance.enumerate_adapters(wgpu::Backends::PRIMARY).await;
    adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    });
    adapters
}

/// Why [`Options::ocp_conversion`] cannot be.
fn no_conversion(has: String) -> Error {
    Error::Unsupported {
        operation: "Options::ocp_conversion".into(),
        needs: "VK_EXT_shader_ocp_microscaling_types with shaderFloat4, beside cooperative matrices by SPIR-V".into(),
        has,
    }
}

impl Context {
    /// The CPU engine.
    pub fn cpu() -> Context {
        Context { engine: Arc::new(Engine::Cpu) }
    }

    /// Opens a device.
    pub async fn open(options: &Options) -> Result<Context> {
        let cpu = || match options.ocp_conversion {
            true => Err(no_conversion("the device is the CPU engine".into())),
            false => Ok(Context::cpu()),
        };
        if options.device == DeviceChoice::Cpu {
            return cpu();
        }
        let adapters = adapters(options.validation).await;
        let chosen = adapters.iter().enumerate().find(|(number, adapter)| {
            let info = adapter.get_info();
            match &options.device {
                DeviceChoice::Number(wanted) => number == wanted,
                DeviceChoice::Auto => info.device_type != wgpu::DeviceType::Cpu,
                DeviceChoice::Gpu => true,
                DeviceChoice::Named(name) => {
                    info.name.to_lowercase().contains(&name.to_lowercase())
                }
                DeviceChoice::Cpu => false,
            }
        });
        match chosen {
            Some((_, adapter)) => Context::on_adapter(adapter, options).await,
            None if options.device == DeviceChoice::Auto => cpu(),
            None => {
                let names: Vec<_> = adapters.iter().map(|a| a.get_info().name).collect();
                Err(Error::NoAdapter {
                    wanted: match &options.device {
                        DeviceChoice::Named(name) => name.clone(),
                        DeviceChoice::Number(number) => format!("#{number}"),
                        _ => "gpu".into(),
                    },
                    available: if names.is_empty() {
                        "none, besides the CPU engine (cpu)".into()
                    } else {
                        names.join(", ")
                    },
                })
            }
        }
    }

    /// Opens a device on this adapter, with all that the kernels can use and the adapter's own limits.
    pub async fn on_adapter(adapter: &wgpu::Adapter, options: &Options) -> Result<Context> {
        let mut limits = adapter.limits();
        if let Some(bytes) = options.max_binding {
            limits.max_storage_buffer_binding_size =
                limits.max_storage_buffer_binding_size.min(bytes);
        }
        const BLOCK: u64 = 32 << 20;
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("microscaling"),
            required_features: Caps::useful_features(adapter) - options.without,
            required_limits: limits,
            // SAFETY: the experimental feature asked for is cooperative matrices, which the tensor tier's kernels use
            // as naga and the driver are known to take them; without it, or on a device that a host opened without,
            // that tier is not there.
            experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
            // Larger tensors have memory of their own: a few hundred megabytes each would leave much of wgpu's blocks of 256 MiB
            // unused.
            memory_hints: wgpu::MemoryHints::Manual {
                suballocated_device_memory_block_size: BLOCK..BLOCK,
            },
            ..Default::default()
        };
        let context = |mut gpu: Gpu| {
            gpu.emulate_bytes = options.emulate_bytes;
            gpu.bytes_from = options.bytes_from;
            gpu.ocp_conversion = options.ocp_conversion;
            gpu.libraries = options.libraries.clone();
            gpu.native_from = options.native_from.unwrap_or(crate::native::SMALLEST);
            match gpu.lacks_conversion().filter(|_| options.ocp_conversion) {
                Some(has) => Err(no_conversion(has)),
                None => Ok(Context { engine: Arc::new(Engine::Gpu(Box::new(gpu))) }),
            }
        };
        #[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
        {
            let extras = vulkan::Extras::of(adapter, descriptor.required_features);
            if extras != vulkan::Extras::default() {
                let (device, queue) = vulkan::open(adapter, &descriptor, extras)?;
                let mut gpu = Gpu::new(device, queue, adapter, true, options.emulate_tensor);
                gpu.bf16_matrices = extras.bf16;
                gpu.byte_matrices = extras.bytes;
                gpu.e2m1_conversion = extras.ocp;
                gpu.external_semaphores = extras.external_semaphores;
                return context(gpu);
            }
        }
        let (device, queue) = adapter
            .request_device(&descriptor)
            .await
            .map_err(|error| Error::Gpu(format!("opening {}: {error}", adapter.get_info().name)))?;
        context(Gpu::new(device, queue, adapter, true, options.emulate_tensor))
    }

    /// Works on the caller's device. Nothing is submitted or blocked on but by the functions that say so, and by products in
    /// [`crate::Tier::Native`] (see [`Stream`]); the device's callbacks stay the caller's. [`Caps::useful_features`] says what to open the device with.
    pub fn from_wgpu(device: wgpu::Device, queue: wgpu::Queue, adapter: &wgpu::Adapter) -> Context {
        let gpu = Gpu::new(device, queue, adapter, false, false);
        Context { engine: Arc::new(Engine::Gpu(Box::new(gpu))) }
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// What the engine offers.
    pub fn caps(&self) -> Caps {
        match self.engine() {
            Engine::Cpu => Caps::cpu(),
            Engine::Gpu(gpu) => gpu.caps.clone(),
        }
    }

    /// The device and queue, on a GPU.
    pub fn wgpu(&self) -> Option<(&wgpu::Device, &wgpu::Queue)> {
        match self.engine() {
            Engine::Cpu => None,
            Engine::Gpu(gpu) => Some((&gpu.device, &gpu.queue)),
        }
    }

    /// How many rows of `row_bytes` go into one chunk.
    pub(crate) fn chunk_rows(&self, what: &str, rows: usize, row_bytes: usize) -> Result<usize> {
        let Engine::Gpu(gpu) = self.engine() else { return Ok(rows) };
        let limit = gpu.max_binding;
        let row_bytes = row_bytes.max(1) as u64;
        if rows as u64 * row_bytes <= limit {
            return Ok(rows);
        }
        let whole = (limit / row_bytes) as usize / CHUNK_ROWS * CHUNK_ROWS;
        if whole == 0 {
            return Err(Error::TooLarge {
                what: format!("{CHUNK_ROWS} times {what}"),
                bytes: row_bytes * CHUNK_ROWS as u64,
                limit,
            });
        }
        Ok(whole)
    }

    /// A dense tensor, zero.
    pub fn zeros(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        Tensor::new(self, dtype, rows, cols)
    }

    /// A packed tensor for a kernel to write, zero until then.
    pub fn zeros_mx(
        &self,
        spec: MxSpec,
        axis: Axis,
        rows: usize,
        cols: usize,
    ) -> Result<DeviceMxTensor> {
        DeviceMxTensor::new(self, spec, axis, rows, cols)
    }

    /// A dense tensor from little-endian bytes, row-major.
    pub fn upload(&self, dtype: DType, rows: usize, cols: usize, data: &[u8]) -> Result<Tensor> {
        let mut tensor = Tensor::new(self, dtype, rows, cols)?;
        if data.len() != tensor.bytes() {
            return Err(Error::Mismatch {
                operation: "upload",
                problem: format!(
                    "{} bytes, but [{rows}, {cols}] of {dtype} has {}",
                    data.len(),
                    tensor.bytes()
                ),
            });
        }
        tensor.data.write(self, data)?;
        Ok(tensor)
    }

    /// Whole numbers for a kernel to write, zero until then.
    pub fn zeros_ids(&self, len: usize) -> Result<Ids> {
        Ids::new(self, len)
    }

    /// Whole numbers from the host's.
    pub fn upload_ids(&self, ids: &[u32]) -> Result<Ids> {
        let mut tensor = Ids::new(self, ids.len())?;
        tensor.data.write(self, bytemuck::cast_slice(ids))?;
        Ok(tensor)
    }

    /// Reads whole numbers; waits as [`Context::read`].
    pub async fn read_ids(&self, ids: &Ids) -> Result<Vec<u32>> {
        Ok(bytemuck::pod_collect_to_vec(&ids.data.read(self).await?))
    }

    /// A packed tensor from the host's.
    pub fn upload_mx(&self, tensor: &MxTensor) -> Result<DeviceMxTensor> {
        let Layout { spec, axis, rows, cols } = *tensor.layout();
        let mut device = DeviceMxTensor::new(self, spec, axis, rows, cols)?;
        device.codes.write(self, tensor.codes())?;
        device.scales.write(self, tensor.scales())?;
        let mut state = vec![0, 0, tensor.tensor_scale().to_bits(), 0];
        state.extend(anchors(tensor.layout(), tensor.scales()));
        device.state.write(self, bytemuck::cast_slice(&state))?;
        Ok(device)
    }

    /// Reads a dense tensor's bytes. Submits a copy and waits for it; on native systems the future polls the
    /// device whenever it is polled.
    pub async fn read(&self, tensor: &Tensor) -> Result<Vec<u8>> {
        tensor.data.read(self).await
    }

    /// Reads a packed tensor; waits as [`Context::read`].
    pub async fn read_mx(&self, tensor: &DeviceMxTensor) -> Result<MxTensor> {
        let codes = tensor.codes.read(self).await?;
        let scales = tensor.scales.read(self).await?;
        let scale = match tensor.layout.spec.scale {
            ScaleFormat::E8M0 => 1.0,
            ScaleFormat::E4M3 => match self.read_state(tensor).await?[2] {
                // Nothing was quantized: the tensor is new, or empty.
                0 => 1.0,
                bits => f32::from_bits(bits),
            },
        };
        MxTensor::from_parts(tensor.layout, codes, scales, scale)
    }

    /// How many blocks of the tensor's last quantization held NaN or infinity (their scale is NaN, their codes
    /// zero). Waits as [`Context::read`].
    pub async fn nonfinite_blocks(&self, tensor: &DeviceMxTensor) -> Result<u32> {
        Ok(self.read_state(tensor).await?[0])
    }

    /// Reads the first `bytes` of a buffer of the device's, with usage `COPY_SRC`. Waits as [`Context::read`].
    pub async fn read_buffer(&self, buffer: &wgpu::Buffer, bytes: u64) -> Result<Vec<u8>> {
        let Engine::Gpu(gpu) = self.engine() else {
            return Err(Error::Unsupported {
                operation: "reading a buffer".into(),
                needs: "a GPU".into(),
                has: "the context is the CPU engine".into(),
            });
        };
        let mut data = Vec::new();
        gpu.read(buffer, bytes, &mut data).await?;
        Ok(data)
    }

    /// What native routes this context has, what became of them, and what they moved. Opens them if that has not happened.
    /// Waits as [`Context::read`].
    pub async fn native(&self) -> Result<crate::native::Report> {
        self.native_report(false).await
    }

    /// The same, after every route's known-answer test. Submits products and waits for them.
    pub async fn test_native(&self) -> Result<crate::native::Report> {
        self.native_report(true).await
    }

    #[cfg_attr(any(target_arch = "wasm32", target_vendor = "apple"), allow(unused_variables))]
    async fn native_report(&self, test: bool) -> Result<crate::native::Report> {
        #[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
        if let Engine::Gpu(gpu) = self.engine() {
            let native = gpu.native();
            let mut report = if test { native.test(self) } else { native.report() };
            for flags in native.flags() {
                let bytes = self.read_buffer(&flags, 8).await?;
                let count: u32 = bytemuck::pod_read_unaligned(&bytes[4..8]);
                report.recomputed += u64::from(count);
            }
            return Ok(report);
        }
        Ok(crate::native::Report::default())
    }

    async fn read_state(&self, tensor: &DeviceMxTensor) -> Result<[u32; 4]> {
        let bytes = tensor.state.read(self).await?;
        Ok(std::array::from_fn(|i| bytemuck::pod_read_unaligned(&bytes[4 * i..4 * i + 4])))
    }

    /// Starts recording.
    pub fn stream(&self) -> Stream<'static> {
        let target = match self.engine() {
            Engine::Cpu => Target::Cpu,
            Engine::Gpu(gpu) => {
                let encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor {
                    label: Some("mx.stream"),
                });
                Target::Own(Box::new(encoder))
            }
        };
        Stream {
            ctx: self.clone(),
            target,
            params: Vec::new(),
            profile: None,
            pending: Vec::new(),
            touched: HashSet::new(),
            gate: None,
            split: None,
        }
    }

    /// Records into the caller's encoder, of this context's device. What was recorded is complete when the stream is
    /// dropped; submitting the encoder is the caller's.
    pub fn stream_onto<'a>(&self, encoder: &'a mut wgpu::CommandEncoder) -> Result<Stream<'a>> {
        match self.engine() {
            Engine::Cpu => Err(Error::Unsupported {
                operation: "recording into an encoder".into(),
                needs: "a GPU".into(),
                has: "the context is the CPU engine".into(),
            }),
            Engine::Gpu(_) => Ok(Stream {
                ctx: self.clone(),
                target: Target::Caller(encoder),
                params: Vec::new(),
                profile: None,
                pending: Vec::new(),
                touched: HashSet::new(),
                gate: None,
                split: None,
            }),
        }
    }

    /// Submits what was recorded; does not wait. On the CPU engine it has run already.
    pub fn submit(&self, mut stream: Stream<'static>) -> Result<()> {
        stream.flush();
        match (self.engine(), std::mem::replace(&mut stream.target, Target::Cpu)) {
            (Engine::Gpu(gpu), Target::Own(encoder)) => gpu.checked("submit", 0, || {
                gpu.queue.submit([encoder.finish()]);
            }),
            (_, Target::Caller(_)) => Err(Error::Mismatch {
                operation: "submit",
                problem: "the stream records into an encoder of the caller's".into(),
            }),
            _ => Ok(()),
        }
    }

    /// Waits until everything submitted is done.
    pub async fn wait(&self) -> Result<()> {
        let Engine::Gpu(gpu) = self.engine() else { return Ok(()) };
        let (sender, receiver) = futures_channel::oneshot::channel();
        gpu.queue.on_submitted_work_done(move || {
            // The receiver is gone only if the caller dropped the future.
            let _ = sender.send(());
        });
        let done = gpu.wait(receiver).await;
        gpu.check()?;
        done.map_err(|_| Error::DeviceLost("work was cancelled".into()))
    }
}

/// The blocking forms, for programs without an executor.
#[cfg(not(target_arch = "wasm32"))]
impl Context {
    /// [`Context::open`], blocking.
    pub fn open_blocking(options: &Options) -> Result<Context> {
        pollster::block_on(Context::open(options))
    }

    /// [`Context::read`], blocking.
    pub fn read_blocking(&self, tensor: &Tensor) -> Result<Vec<u8>> {
        pollster::block_on(self.read(tensor))
    }

    /// [`Context::read_ids`], blocking.
    pub fn read_ids_blocking(&self, ids: &Ids) -> Result<Vec<u32>> {
        pollster::block_on(self.read_ids(ids))
    }

    /// [`Context::read_mx`], blocking.
    pub fn read_mx_blocking(&self, tensor: &DeviceMxTensor) -> Result<MxTensor> {
        pollster::block_on(self.read_mx(tensor))
    }

    /// [`Context::nonfinite_blocks`], blocking.
    pub fn nonfinite_blocks_blocking(&self, tensor: &DeviceMxTensor) -> Result<u32> {
        pollster::block_on(self.nonfinite_blocks(tensor))
    }

    /// [`Context::wait`], blocking.
    pub fn wait_blocking(&self) -> Result<()> {
        pollster::block_on(self.wait())
    }
}

/// Threads that the CPU engine uses.
pub(crate) fn cpu_threads() -> usize {
    #[cfg(not(target_arch = "wasm32"))]
    return rayon::current_num_threads();
    #[cfg(target_arch = "wasm32")]
    1
}

/// A recording. On a GPU it holds dispatches until it is submitted; on the CPU it runs them at once.
///
/// A product in [`crate::Tier::Native`] submits what was recorded so far, and itself, when it is recorded. It waits for the
/// device where its buffers have to grow, where no semaphore is shared with the library, and where bytes go through the host.
/// Dropping the stream does not take back what was submitted.
#[derive(Debug)]
pub struct Stream<'a> {
    ctx: Context,
    target: Target<'a>,
    /// Uniform buffers being filled, mapped until the recording ends.
    params: Vec<ParamArena>,
    /// Timestamps around every dispatch.
    profile: Option<Profile>,
    /// Dispatches that are not in the encoder yet. They go there together, as one pass: a pass of its own costs the host
    /// more than the rest of a dispatch.
    pending: Vec<Pending>,
    /// The buffers that these bind.
    touched: HashSet<wgpu::Buffer>,
    /// What the dispatches from here on depend on.
    gate: Option<Gate>,
    /// When a part of the recording was first submitted before its end.
    split: Option<std::time::Instant>,
}

/// A condition that the device decides: whether word 0 of `flags` is set.
#[derive(Clone, Debug)]
pub(crate) struct Gate {
    pub(crate) flags: wgpu::Buffer,
    /// With usage INDIRECT.
    pub(crate) arguments: wgpu::Buffer,
    /// Run if it is set, or if it is not.
    pub(crate) wanted: bool,
    /// Whether the next dispatch that runs is counted in word 1 of `flags`.
    pub(crate) count: bool,
}

/// Two timestamps a dispatch, and the kernels' names; dispatches beyond the set's size are not timed.
#[derive(Debug)]
pub(crate) struct Profile {
    pub(crate) queries: wgpu::QuerySet,
    pub(crate) names: Vec<String>,
}

/// A dispatch of so many workgroups along x and y, or of as many as a buffer says.
#[derive(Debug)]
struct Pending {
    pipeline: Arc<Pipeline>,
    bind_group: wgpu::BindGroup,
    groups: [u32; 2],
    arguments: Option<wgpu::Buffer>,
}

#[derive(Debug)]
enum Target<'a> {
    Cpu,
    Own(Box<wgpu::CommandEncoder>),
    Caller(&'a mut wgpu::CommandEncoder),
}

impl Target<'_> {
    fn encoder(&mut self) -> Option<&mut wgpu::CommandEncoder> {
        match self {
            Target::Cpu => None,
            Target::Own(encoder) => Some(encoder),
            Target::Caller(encoder) => Some(encoder),
        }
    }
}

/// Parameters of many dispatches in one uniform buffer.
#[derive(Debug)]
struct ParamArena {
    buffer: wgpu::Buffer,
    bytes: Vec<u8>,
}

const ARENA_BYTES: usize = 1 << 16;

impl Stream<'_> {
    pub(crate) fn context(&self) -> &Context {
        &self.ctx
    }

    /// Times the dispatches from here on.
    pub(crate) fn start_profile(&mut self, queries: wgpu::QuerySet) {
        self.profile = Some(Profile { queries, names: Vec::new() });
    }

    pub(crate) fn take_profile(&mut self) -> Option<Profile> {
        self.profile.take()
    }

    /// Dispatches from here on run under a condition, or (`None`) always.
    pub(crate) fn set_gate(&mut self, gate: Option<Gate>) {
        self.gate = gate;
    }

    /// Whether [`Stream::submit_so_far`] may be called.
    pub(crate) fn may_split(&self) -> bool {
        matches!(self.target, Target::Own(_))
    }

    /// When the first part was submitted, if not all of it is yet to be.
    pub(crate) fn first_submission(&self) -> Option<std::time::Instant> {
        self.split
    }

    /// Submits what was recorded and goes on recording. Not for an encoder of the caller's.
    pub(crate) fn submit_so_far(&mut self) -> Result<()> {
        self.flush();
        let ctx = self.ctx.clone();
        let (Engine::Gpu(gpu), Target::Own(encoder)) = (ctx.engine(), &mut self.target) else {
            return Err(Error::Unsupported {
                operation: "submitting a part of a recording".into(),
                needs: "an encoder of the stream's own".into(),
                has: "the stream records into the caller's, or for the CPU engine".into(),
            });
        };
        self.split.get_or_insert_with(std::time::Instant::now);
        let next = gpu
            .device
            .create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("mx.stream") });
        let recorded = std::mem::replace(&mut **encoder, next);
        gpu.checked("submit", 0, || {
            gpu.queue.submit([recorded.finish()]);
        })
    }

    /// The GPU that this stream records for, if any.
    pub(crate) fn gpu(&self) -> Option<&Gpu> {
        match self.ctx.engine() {
            Engine::Cpu => None,
            Engine::Gpu(gpu) => Some(gpu),
        }
    }

    fn encoder(&mut self) -> Option<&mut wgpu::CommandEncoder> {
        self.encode(None);
        self.target.encoder()
    }

    /// Puts the pending dispatches into the encoder; `timed`: with timestamps from this number on.
    fn encode(&mut self, timed: Option<u32>) {
        self.touched.clear();
        let Some(encoder) = self.target.encoder().filter(|_| !self.pending.is_empty()) else {
            return;
        };
        let timestamp_writes = self.profile.as_ref().zip(timed).map(|(profile, first)| {
            wgpu::ComputePassTimestampWrites {
                query_set: &profile.queries,
                beginning_of_pass_write_index: Some(first),
                end_of_pass_write_index: Some(first + 1),
            }
        });
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("mx.stream"),
            timestamp_writes,
        });
        for Pending { pipeline, bind_group, groups: [x, y], arguments } in self.pending.drain(..) {
            pass.set_pipeline(&pipeline.pipeline);
            pass.set_bind_group(0, &bind_group, &[]);
            match arguments {
                None => pass.dispatch_workgroups(x, y, 1),
                Some(arguments) => pass.dispatch_workgroups_indirect(&arguments, 0),
            }
        }
    }

    /// The encoder that this stream records into, for the caller's own commands between kernels; none on the CPU engine.
    pub fn wgpu_encoder(&mut self) -> Option<&mut wgpu::CommandEncoder> {
        self.encoder()
    }

    /// Zeroes a buffer: before the pending dispatches, if none of them binds it.
    pub(crate) fn clear(&mut self, buffer: &wgpu::Buffer) {
        if self.touched.contains(buffer) {
            self.encode(None);
        }
        if let Some(encoder) = self.target.encoder() {
            encoder.clear_buffer(buffer, 0, None);
        }
    }

    /// Zeroes ids.
    pub(crate) fn clear_ids(&mut self, ids: &mut Ids) -> Result<()> {
        match self.gpu() {
            Some(_) => self.clear(ids.binding()?),
            None => ids.data.cpu_mut().fill(0),
        }
        Ok(())
    }

    /// Records one dispatch of at least `groups` workgroups, spread over x and y, with `params` as the kernel's
    /// `Params` and `buffers` as the bindings after it.
    pub(crate) fn dispatch(
        &mut self,
        name: &str,
        kernel: impl FnOnce() -> Kernel,
        params: &[u32],
        buffers: &[&wgpu::Buffer],
        groups: u64,
    ) -> Result<()> {
        if groups == 0 {
            return Ok(());
        }
        let ctx = self.ctx.clone();
        let Engine::Gpu(gpu) = ctx.engine() else {
            unreachable!("kernels dispatch on a GPU only");
        };
        let limits = gpu.device.limits();
        let x = groups.min(u64::from(limits.max_compute_workgroups_per_dimension));
        let y = groups.div_ceil(x);
        if y > x {
            return Err(Error::TooLarge {
                what: format!("{name}: a dispatch of {groups} workgroups"),
                bytes: groups,
                limit: x * x,
            });
        }
        let mut gate = self.gate.take();
        if let Some(gate) = &gate {
            let params = [u32::from(gate.wanted), x as u32, y as u32, u32::from(gate.count)];
            let buffers = [&gate.flags, &gate.arguments];
            self.dispatch(native_pack::GATE, native_pack::gate, &params, &buffers, 1)?;
        }
        let pipeline = gpu.pipeline(name, kernel)?;
        let (arena, offset) = self.push_params(gpu, params)?;
        let mut entries = vec![wgpu::BindGroupEntry {
            binding: 0,
            resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer: &self.params[arena].buffer,
                offset: offset as u64,
                size: std::num::NonZeroU64::new(params.len().next_multiple_of(4) as u64 * 4),
            }),
        }];
        entries.extend((1..).zip(buffers).map(|(binding, buffer)| wgpu::BindGroupEntry {
            binding,
            resource: buffer.as_entire_binding(),
        }));
        let bind_group = gpu.checked(name, 0, || {
            gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(name),
                layout: &pipeline.layout,
                entries: &entries,
            })
        })?;
        let room = wgpu::QUERY_SET_MAX_QUERIES as usize / 2;
        let timed = match &mut self.profile {
            Some(profile) if profile.names.len() < room => {
                profile.names.push(name.into());
                Some(2 * profile.names.len() as u32 - 2)
            }
            _ => None,
        };
        if self.profile.is_some() {
            self.encode(None);
        }
        let arguments = gate.as_ref().map(|gate| gate.arguments.clone());
        self.touched.extend(buffers.iter().copied().chain(&arguments).cloned());
        self.pending.push(Pending {
            pipeline,
            bind_group,
            groups: [x as u32, y as u32],
            arguments,
        });
        if self.profile.is_some() {
            self.encode(timed);
        }
        if let Some(gate) = &mut gate {
            gate.count = false;
        }
        self.gate = gate;
        Ok(())
    }

    /// Puts parameters into an arena; returns which, and where.
    fn push_params(&mut self, gpu: &Gpu, params: &[u32]) -> Result<(usize, usize)> {
        let align = gpu.device.limits().min_uniform_buffer_offset_alignment as usize;
        // A uniform's size is a multiple of 16.
        let size = (params.len() * 4).next_multiple_of(16);
        let full = self.params.last().is_none_or(|arena| arena.bytes.len() + size > ARENA_BYTES);
        if full {
            self.flush();
            let buffer = gpu.checked("mx.params", ARENA_BYTES as u64, || {
                gpu.device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("mx.params"),
                    size: ARENA_BYTES as u64,
                    usage: wgpu::BufferUsages::UNIFORM,
                    mapped_at_creation: true,
                })
            })?;
            self.params.push(ParamArena { buffer, bytes: Vec::with_capacity(ARENA_BYTES) });
        }
        let index = self.params.len() - 1;
        let arena = &mut self.params[index].bytes;
        let offset = arena.len();
        arena.extend_from_slice(bytemuck::cast_slice(params));
        arena.resize((offset + size).next_multiple_of(align), 0);
        Ok((index, offset))
    }

    /// Puts all into the encoder, and hands the parameters to the device.
    fn flush(&mut self) {
        self.encode(None);
        for arena in self.params.drain(..) {
            // A mapping fails only on a lost device, which the submission reports.
            if let Ok(mut view) = arena.buffer.get_mapped_range_mut(..arena.bytes.len() as u64) {
                view.copy_from_slice(&arena.bytes);
            }
            arena.buffer.unmap();
        }
    }
}

impl Drop for Stream<'_> {
    fn drop(&mut self) {
        self.flush();
    }
}

impl Context {
    /// Both tensors must live on this engine.
    pub(crate) fn check_same(&self, a: &buffer::Rows, b: &buffer::Rows) -> Result<()> {
        let on_gpu = |rows: &buffer::Rows| matches!(rows.store, buffer::Store::Gpu(_));
        let gpu = matches!(self.engine(), Engine::Gpu(_));
        if on_gpu(a) == gpu && on_gpu(b) == gpu {
            return Ok(());
        }
        let name = |gpu| if gpu { "a GPU" } else { "the CPU engine" };
        Err(Error::Mismatch {
            operation: "record",
            problem: format!(
                "the stream is for {}, the tensors live on {} and {}",
                name(gpu),
                name(on_gpu(a)),
                name(on_gpu(b))
            ),
        })
    }
}
