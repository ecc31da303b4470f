//! The GPU engine: a wgpu device and queue, allocation, transfer, and the pipeline cache.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::caps::Caps;
use super::shader::{Binding, Kernel, UNCHECKED};
use crate::kernels::matmul::Table;
use crate::kernels::matmul::{Byte, ByteMatrices};
use crate::{Error, Result};

/// How often a library's queue is looked at while wgpu's is waited for.
#[cfg(not(target_arch = "wasm32"))]
const WATCH: std::time::Duration = std::time::Duration::from_millis(1);

/// Transfers go through host memory in pieces of at most this size.
const TRANSFER_BYTES: u64 = 64 << 20;

/// A device, and what this crate keeps for it.
#[derive(Debug)]
pub(crate) struct Gpu {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    pub(crate) caps: Caps,
    /// Whether the adapter is a GPU with memory of its own.
    pub(crate) discrete: bool,
    /// The largest buffer that can be bound whole.
    pub(crate) max_binding: u64,
    /// Whether the tensor tier may be emulated.
    pub(crate) emulate_tensor: bool,
    /// What of bytes may be emulated too.
    pub(crate) emulate_bytes: Option<Byte>,
    /// The cooperative matrices of the adapter: the sides of A's rows, B's columns and what is contracted, f16 to f32.
    pub(crate) matrices: Vec<[u32; 3]>,
    /// Whether the device was opened with cooperative matrices of 16×16×16, bf16 to f32.
    pub(crate) bf16_matrices: bool,
    /// The multiply-adds from which on bytes are used, if not as estimated.
    pub(crate) bytes_from: Option<u64>,
    /// The cooperative matrices of bytes that the device was opened with.
    pub(crate) byte_matrices: Option<ByteMatrices>,
    /// Whether the device was opened with conversions of E2M1 to f16 (VK_EXT_shader_ocp_microscaling_types).
    pub(crate) e2m1_conversion: bool,
    /// Whether they are to be used where nothing was measured; with `emulate_tensor`, emulated.
    pub(crate) ocp_conversion: bool,
    /// Whether the device was opened with semaphores that other APIs can wait for.
    pub(crate) external_semaphores: bool,
    /// Where native routes' libraries are.
    pub(crate) libraries: crate::native::Libraries,
    /// The multiply-adds from which on native routes are chosen by themselves.
    pub(crate) native_from: u64,
    /// The native routes, opened when first asked for.
    #[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
    native: std::sync::OnceLock<crate::native::registry::Registry>,
    /// Tiles that were measured.
    pub(crate) tuning: RwLock<Table>,
    pipelines: Mutex<HashMap<String, Arc<Pipeline>>>,
    scratch: Mutex<[Option<wgpu::Buffer>; 4]>,
    /// Whether what they gave at their first use was right.
    pub(crate) bytes_tested: std::sync::OnceLock<std::result::Result<(), String>>,
    stamps: AtomicU32,
    lost: Arc<Mutex<Option<String>>>,
}

/// What [`Gpu::scratch`] is for: one recording may use each.
#[derive(Clone, Copy)]
pub(crate) enum Scratch {
    Sums,
    Windows,
    BytesA,
    BytesB,
}

#[derive(Debug)]
pub(crate) struct Pipeline {
    pub(crate) pipeline: wgpu::ComputePipeline,
    pub(crate) layout: wgpu::BindGroupLayout,
}

impl Gpu {
    /// `own`: the device was opened by this crate, which may then listen for its loss.
    pub(crate) fn new(
        device: wgpu::Device,
        queue: wgpu::Queue,
        adapter: &wgpu::Adapter,
        own: bool,
        emulate_tensor: bool,
    ) -> Gpu {
        let limits = device.limits();
        // Shaders index words by u32, and bytes of scales too.
        let max_binding = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size) & !15;
        let lost = Arc::new(Mutex::new(None));
        if own {
            let lost = Arc::clone(&lost);
            device.set_device_lost_callback(move |reason, message| {
                *lost.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some(format!("{reason:?}: {message}"));
            });
        }
        let matrices = adapter
            .cooperative_matrix_properties()
            .iter()
            .filter(|m| {
                m.ab_type == wgpu::CooperativeScalarType::F16
                    && m.cr_type == wgpu::CooperativeScalarType::F32
            })
            .map(|m| [m.m_size, m.n_size, m.k_size])
            .collect();
        Gpu {
            device,
            queue,
            caps: Caps::probe(adapter),
            discrete: adapter.get_info().device_type == wgpu::DeviceType::DiscreteGpu,
            max_binding,
            emulate_tensor,
            emulate_bytes: None,
            bytes_from: None,
            matrices,
            bf16_matrices: false,
            byte_matrices: None,
            e2m1_conversion: false,
            ocp_conversion: false,
            external_semaphores: false,
            libraries: Default::default(),
            native_from: crate::native::SMALLEST,
            #[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
            native: Default::default(),
            tuning: RwLock::default(),
            pipelines: Mutex::default(),
            scratch: Mutex::default(),
            bytes_tested: Default::default(),
            stamps: AtomicU32::new(1),
            lost,
        }
    }

    /// The native routes, opened now if need be.
    #[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
    pub(crate) fn native(&self) -> &crate::native::registry::Registry {
        self.native.get_or_init(|| crate::native::registry::Registry::open(self))
    }

    /// The native routes, if they were opened.
    #[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
    pub(crate) fn opened_native(&self) -> Option<&crate::native::registry::Registry> {
        self.native.get()
    }

    /// Whether the device is lost, and why.
    #[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
    pub(crate) fn lost(&self) -> &Arc<Mutex<Option<String>>> {
        &self.lost
    }

    /// Notes that the device is lost.
    pub(crate) fn lose(&self, message: String) {
        *self.lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(message);
    }

    /// An error if the device is known to be lost.
    pub(crate) fn check(&self) -> Result<()> {
        match &*self.lost.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(message) => Err(Error::DeviceLost(message.clone())),
            None => Ok(()),
        }
    }

    /// Runs `f` and returns what the API complained about meanwhile. In a browser complaints come later, and
    /// are the page's uncaptured errors.
    pub(crate) fn checked<T>(&self, what: &str, bytes: u64, f: impl FnOnce() -> T) -> Result<T> {
        self.check()?;
        let scopes = [
            self.device.push_error_scope(wgpu::ErrorFilter::Internal),
            self.device.push_error_scope(wgpu::ErrorFilter::Validation),
            self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory),
        ];
        let value = f();
        let mut error = None;
        for scope in scopes.into_iter().rev() {
            let popped = scope.pop();
            #[cfg(not(target_arch = "wasm32"))]
            {
                error = error.or(pollster::block_on(popped));
            }
            #[cfg(target_arch = "wasm32")]
            drop(popped);
        }
        // A loss makes the calls before it fail in other words.
        self.check()?;
        match error {
            None => Ok(value),
            Some(wgpu::Error::OutOfMemory { .. }) => {
                Err(Error::OutOfMemory { what: what.into(), bytes })
            }
            Some(error) => Err(Error::Gpu(format!("{what}: {error}"))),
        }
    }

    /// Whether `lanes` neighbouring invocations, a power of two, always share a subgroup.
    pub(crate) fn has_subgroups(&self, lanes: u32) -> bool {
        self.device.features().contains(wgpu::Features::SUBGROUP)
            && self.caps.subgroups.is_some_and(|(min, _)| lanes <= min)
    }

    pub(crate) fn create_buffer(&self, what: &str, bytes: u64) -> Result<wgpu::Buffer> {
        self.buffer(what, bytes, {
            use wgpu::BufferUsages as Usage;
            Usage::STORAGE | Usage::COPY_SRC | Usage::COPY_DST
        })
    }

    /// A buffer of at least so many bytes for values that one recording writes and reads. All recordings share it, which is
    /// safe because commands run in the order of their submission; where it has to grow, those before keep the old one.
    pub(crate) fn scratch(&self, what: Scratch, bytes: u64) -> Result<wgpu::Buffer> {
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let scratch = &mut scratch[what as usize];
        match scratch {
            Some(buffer) if buffer.size() >= bytes => Ok(buffer.clone()),
            _ => Ok(scratch.insert(self.create_buffer("mx.scratch", bytes)?).clone()),
        }
    }

    /// A word that no other recording of the last 2³² has, and that new memory does not hold.
    pub(crate) fn stamp(&self) -> u32 {
        self.stamps.fetch_add(1, Ordering::Relaxed).max(1)
    }

    pub(crate) fn buffer(
        &self,
        what: &str,
        bytes: u64,
        usage: wgpu::BufferUsages,
    ) -> Result<wgpu::Buffer> {
        self.checked(what, bytes, || {
            self.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(what),
                // A binding must not be empty, and shaders see whole vectors of 16 bytes.
                size: bytes.next_multiple_of(16).max(16),
                usage,
                mapped_at_creation: false,
            })
        })
    }

    /// Writes `data` to the start of `buffer`.
    pub(crate) fn write(&self, buffer: &wgpu::Buffer, data: &[u8]) -> Result<()> {
        let piece = TRANSFER_BYTES as usize;
        for (i, part) in data.chunks(piece).enumerate() {
            self.checked("upload", part.len() as u64, || {
                let words = part.len() & !3;
                let at = (i * piece) as u64;
                self.queue.write_buffer(buffer, at, &part[..words]);
                if words < part.len() {
                    let mut last = [0; 4];
                    last[..part.len() - words].copy_from_slice(&part[words..]);
                    self.queue.write_buffer(buffer, at + words as u64, &last);
                }
                // wgpu holds written data back until the next submission: bound it.
                if part.len() == piece {
                    self.queue.submit([]);
                }
            })?;
        }
        Ok(())
    }

    /// Appends the first `bytes` of `buffer` to `out`.
    pub(crate) async fn read(
        &self,
        buffer: &wgpu::Buffer,
        bytes: u64,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let size = bytes.min(TRANSFER_BYTES);
        let staging = self.buffer(
            "mx.readback",
            size,
            wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        )?;
        let mut at = 0;
        while at < bytes {
            let part = (bytes - at).min(TRANSFER_BYTES);
            let copied = part.next_multiple_of(4);
            self.checked("readback", part, || {
                let mut encoder = self.device.create_command_encoder(&Default::default());
                encoder.copy_buffer_to_buffer(buffer, at, &staging, 0, copied);
                self.queue.submit([encoder.finish()]);
            })?;
            let (sender, receiver) = futures_channel::oneshot::channel();
            staging.map_async(wgpu::MapMode::Read, ..copied, move |result| {
                // The receiver is gone only if the caller dropped the future.
                let _ = sender.send(result);
            });
            match self.wait(receiver).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    self.check()?;
                    return Err(Error::Gpu(format!("readback: {error}")));
                }
                Err(_) => {
                    self.check()?;
                    return Err(Error::DeviceLost("a readback was cancelled".into()));
                }
            }
            let mapped = staging
                .get_mapped_range(..copied)
                .map_err(|error| Error::Gpu(format!("readback: {error}")))?;
            out.extend_from_slice(&mapped[..part as usize]);
            drop(mapped);
            staging.unmap();
            at += part;
        }
        Ok(())
    }

    /// Awaits a callback of the device's. Natively somebody has to poll the device: this future does, without
    /// blocking, whenever it is polled itself.
    pub(crate) async fn wait<T: Unpin>(&self, future: impl Future<Output = T> + Unpin) -> T {
        self.wait_watching(future, || {
            // What the queue waits for may never come.
            #[cfg(not(any(target_arch = "wasm32", target_vendor = "apple")))]
            if let Some(native) = self.opened_native() {
                native.watch(self);
            }
        })
        .await
    }

    /// The same, calling `watch` every now and then.
    #[cfg_attr(target_arch = "wasm32", allow(unused_mut, unused_variables))]
    pub(crate) async fn wait_watching<T: Unpin>(
        &self,
        mut future: impl Future<Output = T> + Unpin,
        mut watch: impl FnMut(),
    ) -> T {
        #[cfg(not(target_arch = "wasm32"))]
        let mut watched = None::<std::time::Instant>;
        std::future::poll_fn(|cx| {
            // Without a limit there is no error to return: a lost device cancels the callback.
            let _ = self.device.poll(wgpu::PollType::Poll);
            let state = std::pin::Pin::new(&mut future).poll(cx);
            #[cfg(not(target_arch = "wasm32"))]
            if state.is_pending() {
                if watched.is_none_or(|at| at.elapsed() >= WATCH) {
                    watch();
                    watched = Some(std::time::Instant::now());
                }
                std::thread::yield_now();
                cx.waker().wake_by_ref();
            }
            state
        })
        .await
    }

    /// The pipeline called `name`, made on first use.
    pub(crate) fn pipeline(
        &self,
        name: &str,
        kernel: impl FnOnce() -> Kernel,
    ) -> Result<Arc<Pipeline>> {
        if let Some(pipeline) =
            self.pipelines.lock().unwrap_or_else(PoisonError::into_inner).get(name)
        {
            return Ok(Arc::clone(pipeline));
        }
        let kernel = kernel();
        debug_assert_eq!(kernel.name, name);
        let missing = kernel.features - self.device.features();
        if !missing.is_empty() {
            return Err(Error::Unsupported {
                operation: kernel.name,
                needs: format!("{missing:?}"),
                has: format!("the device was opened with {:?}", self.device.features()),
            });
        }
        #[cfg(not(target_arch = "wasm32"))]
        let spirv = match kernel.spirv {
            false => None,
            true => Some(super::spirv::compile(&kernel.wgsl).map_err(Error::Gpu)?),
        };
        #[cfg(target_arch = "wasm32")]
        let spirv = None;
        let pipeline = Arc::new(self.checked(&kernel.name, 0, || self.build(&kernel, spirv))?);
        self.pipelines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(kernel.name, Arc::clone(&pipeline));
        Ok(pipeline)
    }

    fn build(&self, kernel: &Kernel, spirv: Option<Vec<u32>>) -> Pipeline {
        let label = Some(kernel.name.as_str());
        let descriptor = wgpu::ShaderModuleDescriptor {
            label,
            source: wgpu::ShaderSource::Wgsl(kernel.wgsl.as_str().into()),
        };
        let checks = wgpu::ShaderRuntimeChecks {
            bounds_checks: !kernel.wgsl.lines().any(|line| line == UNCHECKED),
            force_loop_bounding: false,
            ..Default::default()
        };
        let module = match spirv {
            // SAFETY: bounds checks stay on but for kernels that say that they keep within bounds. Loop bounding is off, which
            // requires that no loop is infinite: every loop of shaders/ counts up to a constant or a parameter.
            None => unsafe { self.device.create_shader_module_trusted(descriptor, checks) },
            Some(words) => {
                let entry = wgpu::PassthroughShaderEntryPoint {
                    name: "main".into(),
                    workgroup_size: (kernel.workgroup_size, 1, 1),
                };
                // SAFETY: the module comes from naga, corrected as src/engine/spirv.rs says; its kernels keep within their
                // bindings and workgroup memory.
                unsafe {
                    self.device.create_shader_module_passthrough(
                        wgpu::ShaderModuleDescriptorPassthrough {
                            label,
                            entry_points: vec![entry].into(),
                            spirv: Some(words.into()),
                            ..Default::default()
                        },
                    )
                }
            }
        };
        let entries: Vec<_> = (0..)
            .zip(&kernel.bindings)
            .map(|(binding, kind)| wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: match kind {
                        Binding::Params => wgpu::BufferBindingType::Uniform,
                        Binding::Read => wgpu::BufferBindingType::Storage { read_only: true },
                        Binding::Write => wgpu::BufferBindingType::Storage { read_only: false },
                    },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let layout = self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label,
            entries: &entries,
        });
        let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                // Every kernel writes its workgroup memory before it reads it.
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache: None,
        });
        Pipeline { pipeline, layout }
    }
}
