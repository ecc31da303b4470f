//! Memory and order between wgpu's device and a library's: what both see, and who waits for whom.
//!
//! On Vulkan a buffer's memory is allocated exportable and the library imports its file descriptor; a timeline semaphore goes
//! the same way. Each product takes two values of it: wgpu's queue signals the first behind what packs the operands, the
//! library's the second behind the product. A signal is attached to an empty submission that follows the packing, and a wait
//! to the next submission: whichever that is, also one from another thread, it comes after what must come before, because
//! semaphores order all that precedes and all that follows them in their queue.
//!
//! Without the semaphore the host waits for each side; without the memory, operands and sums go through the host.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use ash::vk;

use super::{Mapped, Runtime, Traffic};
use crate::engine::Stream;
use crate::engine::gpu::Gpu;
use crate::{Error, Result};

/// Buffers of a product: codes and scales of A and of B, sums.
pub(crate) const ROLES: usize = 5;

/// What a library and wgpu's device work on together. Products take turns in it.
#[derive(Debug)]
pub(crate) struct Share {
    runtime: Arc<dyn Runtime>,
    device: wgpu::Device,
    /// Why memory is not shared, if it is not.
    pub(crate) copied: Option<String>,
    /// Or why it is not there.
    timeline: std::result::Result<Timeline, String>,
    buffers: [Option<Shared>; ROLES],
    /// Word 0: a value was not held exactly; word 1: products computed anew.
    flags: wgpu::Buffer,
    /// Of conditional dispatches.
    pub(crate) arguments: wgpu::Buffer,
    pub(crate) traffic: Traffic,
    /// Whether the library may still be at work on the buffers.
    busy: bool,
    /// Whether memory was imported once: then a failure passes, and does not mean that memory cannot be shared.
    imported: bool,
    /// Why the library's queue is of no use any more.
    dead: Option<String>,
    /// The device's: whether it is lost.
    lost: Arc<Mutex<Option<String>>>,
}

#[derive(Debug)]
struct Timeline {
    device: wgpu::Device,
    queue: wgpu::Queue,
    semaphore: vk::Semaphore,
    /// The last value that anyone was told to wait for.
    value: u64,
    /// Values that wgpu's queue waits for, in ascending order: the library owes them.
    owed: VecDeque<u64>,
    /// Whether the device is lost: it can be waited for no more.
    lost: bool,
}

/// A buffer that both see, or a pair that is copied.
#[derive(Debug)]
struct Shared {
    buffer: wgpu::Buffer,
    mapped: Mapped,
    bytes: u64,
}

impl Share {
    pub(crate) fn new(gpu: &Gpu, runtime: Arc<dyn Runtime>) -> Result<Share> {
        let flags = gpu.create_buffer("mx.native.flags", 16)?;
        let arguments = gpu.buffer("mx.native.arguments", 16, {
            wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::INDIRECT
        })?;
        let memory = gpu.device.features().contains(wgpu::Features::VULKAN_EXTERNAL_MEMORY_FD);
        let copied: Option<String> = match () {
            () if cfg!(not(unix)) => Some("memory is shared by file descriptors, on Unix".into()),
            () if !memory => Some("the device was opened without VK_KHR_external_memory_fd".into()),
            () => None,
        };
        let timeline = match (&copied, gpu.external_semaphores) {
            (Some(reason), _) => Err(reason.clone()),
            (None, false) => {
                Err("the device was opened without VK_KHR_external_semaphore_fd".into())
            }
            (None, true) => Timeline::new(gpu, &*runtime),
        };
        Ok(Share {
            runtime,
            device: gpu.device.clone(),
            copied,
            timeline,
            buffers: Default::default(),
            flags,
            arguments,
            traffic: Traffic::default(),
            busy: false,
            imported: false,
            dead: None,
            lost: Arc::clone(gpu.lost()),
        })
    }

    pub(crate) fn flags(&self) -> &wgpu::Buffer {
        &self.flags
    }

    /// The device whose buffers these are.
    pub(crate) fn device(&self) -> &wgpu::Device {
        &self.device
    }

    /// Why the library's queue is of no use any more.
    pub(crate) fn dead(&self) -> Option<&str> {
        self.dead.as_deref()
    }

    /// What a product has to wait for that it would not in another tier.
    pub(crate) fn slow(&self) -> Option<String> {
        match (&self.copied, &self.timeline) {
            (Some(reason), _) => Some(format!("operands go through the host: {reason}")),
            (None, Err(reason)) => Some(format!("the host waits for each side: {reason}")),
            (None, Ok(_)) => None,
        }
    }

    /// How memory is shared and work ordered.
    pub(crate) fn describe(&self) -> [String; 2] {
        [
            match &self.copied {
                None => "memory: exported by Vulkan, imported by the library".into(),
                Some(reason) => format!("memory: copied through the host: {reason}"),
            },
            match &self.timeline {
                Ok(_) => "order: a timeline semaphore".into(),
                Err(reason) => format!("order: the host waits for each side: {reason}"),
            },
        ]
    }

    /// Buffers of at least so many bytes each. Where memory cannot be shared after all, they are copied from here on.
    pub(crate) fn buffers(
        &mut self,
        gpu: &Gpu,
        sizes: [u64; ROLES],
    ) -> Result<[wgpu::Buffer; ROLES]> {
        let mut out = Vec::with_capacity(ROLES);
        let mut role = 0;
        while role < ROLES {
            match self.buffer(gpu, role, sizes[role]) {
                Ok(buffer) => {
                    out.push(buffer);
                    role += 1;
                }
                Err(Error::Gpu(reason)) if self.copied.is_none() && !self.imported => {
                    log::warn!("native routes: operands go through the host: {reason}");
                    self.idle(gpu)?;
                    for old in self.buffers.iter_mut().filter_map(Option::take) {
                        self.runtime.release(old.mapped);
                    }
                    self.timeline = Err("memory is not shared".into());
                    self.copied = Some(reason);
                    out.clear();
                    role = 0;
                }
                Err(error) => return Err(error),
            }
        }
        out.try_into().map_err(|_| Error::Gpu("buffers of a native route".into()))
    }

    fn buffer(&mut self, gpu: &Gpu, role: usize, bytes: u64) -> Result<wgpu::Buffer> {
        let bytes = bytes.next_multiple_of(256).max(256);
        if let Some(shared) = &self.buffers[role] {
            if shared.bytes >= bytes {
                return Ok(shared.buffer.clone());
            }
            // It may be in use on both sides.
            self.idle(gpu)?;
        }
        if let Some(old) = self.buffers[role].take() {
            self.runtime.release(old.mapped);
        }
        let shared = match &self.copied {
            None => self.exported(gpu, bytes)?,
            Some(_) => Shared {
                buffer: gpu.create_buffer("mx.native", bytes)?,
                mapped: self.runtime.allocate(bytes).map_err(Error::Gpu)?,
                bytes,
            },
        };
        Ok(self.buffers[role].insert(shared).buffer.clone())
    }

    /// Where the library sees a buffer.
    pub(crate) fn address(&self, role: usize) -> u64 {
        self.buffers[role].as_ref().map_or(0, |shared| shared.mapped.address)
    }

    /// Waits until neither side works on the buffers.
    fn idle(&mut self, gpu: &Gpu) -> Result<()> {
        // The device's queue waits for the library's: which may fail meanwhile, and nobody else can look, since the caller
        // holds the lock.
        wait(gpu, || self.watch(gpu))?;
        if self.busy {
            if let Err(error) = self.runtime.synchronize() {
                self.fail(gpu, error);
                gpu.check()?;
            }
            self.busy = false;
        }
        Ok(())
    }

    /// Looks after the library's queue while somebody waits for the device's.
    pub(crate) fn watch(&mut self, gpu: &Gpu) {
        if self.dead.is_some() {
            self.release(0);
        } else if self.busy {
            match self.runtime.check() {
                Ok(done) => self.busy = !done,
                Err(error) => self.fail(gpu, error),
            }
        }
    }

    /// The library's queue failed with products in it: what was computed from their sums is wrong, also in recordings that
    /// follow, so the device is given up.
    fn fail(&mut self, gpu: &Gpu, error: String) {
        gpu.lose(error.clone());
        self.dead = Some(error);
        self.release(0);
    }

    /// Submits what was recorded, lets `run` put a product into the library's queue behind it, and makes what is recorded from
    /// here on wait for that. `operands`: bytes of each buffer that the library reads; `sums`: that it writes. `alone`: waits for
    /// the library before anything of wgpu's does, so that its failure hurts nobody else.
    pub(crate) fn hand_over(
        &mut self,
        gpu: &Gpu,
        stream: &mut Stream<'_>,
        operands: [u64; ROLES - 1],
        sums: u64,
        alone: bool,
        run: impl FnOnce() -> std::result::Result<(), String>,
    ) -> Result<std::result::Result<(), String>> {
        if let Some(reason) = &self.dead {
            return Ok(Err(reason.clone()));
        }
        stream.submit_so_far()?;
        self.busy = true;
        let done = match &mut self.timeline {
            Ok(timeline) => {
                // A failure before the wait is attached leaves nothing waiting.
                let value = timeline.value + 2;
                timeline.value = value;
                let semaphore = timeline.semaphore;
                self.queue(gpu, |queue| queue.add_signal_semaphore(semaphore, Some(value - 1)))?;
                if let Err(error) = gpu.checked("submit", 0, || gpu.queue.submit([])) {
                    self.queue(gpu, |queue| {
                        queue.remove_signal_semaphore(semaphore);
                    })?;
                    return Err(error);
                }
                let mut queued = self
                    .runtime
                    .wait(value - 1)
                    .and_then(|()| run())
                    .and_then(|()| self.runtime.signal(value));
                if alone && queued.is_ok() {
                    queued = self.runtime.synchronize();
                    self.dead = queued.clone().err();
                    self.busy = false;
                }
                if queued.is_ok() {
                    if let Ok(timeline) = &mut self.timeline {
                        timeline.owe(value);
                    }
                    let stages = vk::PipelineStageFlags::ALL_COMMANDS;
                    self.queue(gpu, |queue| {
                        queue.add_wait_semaphore(semaphore, Some(value), stages);
                    })?;
                }
                queued
            }
            Err(_) => {
                self.traffic.host_waits += 1;
                wait(gpu, || ())?;
                let done = if self.copied.is_none() {
                    run()
                } else {
                    self.through_the_host(gpu, operands, sums, run)?
                };
                // Nothing of wgpu's waits for the library: its failure is this product's alone.
                self.busy = false;
                done.and_then(|()| {
                    let done = self.runtime.synchronize();
                    self.dead = done.clone().err();
                    done
                })
            }
        };
        if done.is_ok() {
            self.traffic.products += 1;
            if self.copied.is_none() {
                self.traffic.shared += operands.iter().sum::<u64>() + sums;
            }
        }
        Ok(done)
    }

    fn through_the_host(
        &mut self,
        gpu: &Gpu,
        operands: [u64; ROLES - 1],
        sums: u64,
        run: impl FnOnce() -> std::result::Result<(), String>,
    ) -> Result<std::result::Result<(), String>> {
        let mut host = Vec::new();
        for (shared, bytes) in self.buffers.iter().zip(operands) {
            let Some(shared) = shared.as_ref().filter(|_| bytes > 0) else { continue };
            host.clear();
            pollster::block_on(gpu.read(&shared.buffer, bytes, &mut host))?;
            if let Err(error) = self.runtime.upload(shared.mapped.address, &host) {
                return Ok(Err(error));
            }
            self.traffic.to_library += bytes;
        }
        if let Err(error) = run() {
            return Ok(Err(error));
        }
        let Some(shared) = &self.buffers[ROLES - 1] else { return Ok(Ok(())) };
        host.clear();
        host.resize(sums as usize, 0);
        if let Err(error) = self.runtime.download(shared.mapped.address, &mut host) {
            return Ok(Err(error));
        }
        self.traffic.from_library += sums;
        gpu.write(&shared.buffer, &host)?;
        Ok(Ok(()))
    }

    fn queue(&self, gpu: &Gpu, f: impl FnOnce(&wgpu::hal::vulkan::Queue)) -> Result<()> {
        // SAFETY: the queue is only told of semaphores of its device's.
        match unsafe { gpu.queue.as_hal::<wgpu::hal::api::Vulkan>() } {
            Some(queue) => {
                f(&queue);
                Ok(())
            }
            None => Err(Error::Gpu("not a Vulkan queue".into())),
        }
    }

    /// Lets the device's queue go on whose wait will never end: as far as it gets within `nanoseconds` for each value.
    fn release(&mut self, nanoseconds: u64) {
        if let Ok(timeline) = &mut self.timeline {
            timeline.release(nanoseconds);
        }
    }

    #[cfg(not(unix))]
    fn exported(&mut self, _: &Gpu, _: u64) -> Result<Shared> {
        Err(Error::Gpu("memory is shared by file descriptors, on Unix".into()))
    }

    /// A buffer in memory of its own, which the library imports.
    #[cfg(unix)]
    #[expect(clippy::undocumented_unsafe_blocks, reason = "the first comment is about all of them")]
    fn exported(&mut self, gpu: &Gpu, bytes: u64) -> Result<Shared> {
        use std::os::fd::FromRawFd;
        gpu.check()?;
        const HANDLE: vk::ExternalMemoryHandleTypeFlags =
            vk::ExternalMemoryHandleTypeFlags::OPAQUE_FD;
        let failed = |what: &'static str| {
            move |error: vk::Result| match error {
                vk::Result::ERROR_OUT_OF_DEVICE_MEMORY | vk::Result::ERROR_OUT_OF_HOST_MEMORY => {
                    Error::OutOfMemory { what: "memory to share".into(), bytes }
                }
                vk::Result::ERROR_DEVICE_LOST => Error::DeviceLost(what.into()),
                error => Error::Gpu(format!("{what}: {error}")),
            }
        };
        // SAFETY: of all calls below: the handles are of one device, alive as long as `hal`; what is made is destroyed on
        // failure, and handed to wgpu-hal, which destroys it, on success.
        let Some(hal) = (unsafe { self.device.as_hal::<wgpu::hal::api::Vulkan>() }) else {
            return Err(Error::Gpu("not a Vulkan device".into()));
        };
        let instance = hal.shared_instance().raw_instance();
        let device = hal.raw_device();
        let usage = vk::BufferUsageFlags::STORAGE_BUFFER
            | vk::BufferUsageFlags::TRANSFER_SRC
            | vk::BufferUsageFlags::TRANSFER_DST;
        let mut external = vk::ExternalBufferProperties::default();
        let question =
            vk::PhysicalDeviceExternalBufferInfo::default().usage(usage).handle_type(HANDLE);
        unsafe {
            instance.get_physical_device_external_buffer_properties(
                hal.raw_physical_device(),
                &question,
                &mut external,
            );
        }
        let features = external.external_memory_properties.external_memory_features;
        if !features.contains(vk::ExternalMemoryFeatureFlags::EXPORTABLE) {
            return Err(Error::Gpu("the driver exports no storage buffers".into()));
        }
        let dedicated = features.contains(vk::ExternalMemoryFeatureFlags::DEDICATED_ONLY);
        let mut handles = vk::ExternalMemoryBufferCreateInfo::default().handle_types(HANDLE);
        let info = vk::BufferCreateInfo::default()
            .size(bytes)
            .usage(usage)
            .sharing_mode(vk::SharingMode::EXCLUSIVE)
            .push_next(&mut handles);
        let buffer =
            unsafe { device.create_buffer(&info, None) }.map_err(failed("vkCreateBuffer"))?;
        let needs = unsafe { device.get_buffer_memory_requirements(buffer) };
        let types =
            unsafe { instance.get_physical_device_memory_properties(hal.raw_physical_device()) };
        let kind = (0..types.memory_type_count).find(|i| {
            let flags = types.memory_types[*i as usize].property_flags;
            needs.memory_type_bits & (1 << i) != 0
                && flags.contains(vk::MemoryPropertyFlags::DEVICE_LOCAL)
        });
        let kind = kind.unwrap_or_else(|| needs.memory_type_bits.trailing_zeros());
        let mut export = vk::ExportMemoryAllocateInfo::default().handle_types(HANDLE);
        let mut only = vk::MemoryDedicatedAllocateInfo::default().buffer(buffer);
        let mut allocation = vk::MemoryAllocateInfo::default()
            .allocation_size(needs.size)
            .memory_type_index(kind)
            .push_next(&mut export);
        if dedicated {
            allocation = allocation.push_next(&mut only);
        }
        let memory = match unsafe { device.allocate_memory(&allocation, None) } {
            Ok(memory) => memory,
            Err(error) => {
                unsafe { device.destroy_buffer(buffer, None) };
                return Err(failed("vkAllocateMemory")(error));
            }
        };
        let share = || -> Result<Mapped> {
            unsafe { device.bind_buffer_memory(buffer, memory, 0) }
                .map_err(failed("vkBindBufferMemory"))?;
            let files = ash::khr::external_memory_fd::Device::new(instance, device);
            let question = vk::MemoryGetFdInfoKHR::default().memory(memory).handle_type(HANDLE);
            let fd =
                unsafe { files.get_memory_fd(&question) }.map_err(failed("vkGetMemoryFdKHR"))?;
            let fd = unsafe { super::Fd::from_raw_fd(fd) };
            self.runtime.import(fd, needs.size, dedicated).map_err(Error::Gpu)
        };
        let mapped = match share() {
            Ok(mapped) => mapped,
            Err(error) => {
                unsafe {
                    device.destroy_buffer(buffer, None);
                    device.free_memory(memory, None);
                }
                return Err(error);
            }
        };
        let buffer =
            unsafe { wgpu::hal::vulkan::Buffer::from_raw_managed(buffer, memory, 0, needs.size) };
        let descriptor = wgpu::BufferDescriptor {
            label: Some("mx.native"),
            size: bytes,
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_SRC
                | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        };
        drop(hal);
        let buffer = gpu.checked("mx.native", bytes, || unsafe {
            self.device.create_buffer_from_hal::<wgpu::hal::api::Vulkan>(buffer, &descriptor)
        });
        match buffer {
            Ok(buffer) => {
                self.imported = true;
                Ok(Shared { buffer, mapped, bytes })
            }
            Err(error) => {
                self.runtime.release(mapped);
                Err(error)
            }
        }
    }
}

impl Share {
    /// Waits for the library if it is at work. Whether it ended well.
    pub(crate) fn finish(&mut self) -> bool {
        let lost = self.lost.lock().unwrap_or_else(std::sync::PoisonError::into_inner).is_some();
        if let Ok(timeline) = &mut self.timeline {
            timeline.lost = lost;
        }
        if self.dead.is_some() || lost || self.busy && self.runtime.synchronize().is_err() {
            return false;
        }
        self.busy = false;
        true
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        // Buffers of wgpu's wait for its own device themselves.
        if !self.finish() {
            self.release(PATIENCE);
        }
        for old in self.buffers.iter_mut().filter_map(Option::take) {
            self.runtime.release(old.mapped);
        }
    }
}

/// How long the host waits for a value of wgpu's at the end of a share, in nanoseconds.
const PATIENCE: u64 = 2_000_000_000;

/// Waits for all that was submitted; `watch` is called now and then.
fn wait(gpu: &Gpu, watch: impl FnMut()) -> Result<()> {
    let (sender, receiver) = futures_channel::oneshot::channel();
    gpu.queue.on_submitted_work_done(move || {
        // The receiver is gone only if the waiting was given up.
        let _ = sender.send(());
    });
    let done = pollster::block_on(gpu.wait_watching(receiver, watch));
    gpu.check()?;
    done.map_err(|_| Error::DeviceLost("work was cancelled".into()))
}

impl Timeline {
    /// Notes that wgpu's queue waits for `value`, and forgets what was reached.
    fn owe(&mut self, value: u64) {
        // SAFETY: the semaphore is of this device.
        if let Some(hal) = unsafe { self.device.as_hal::<wgpu::hal::api::Vulkan>() } {
            // SAFETY: as above.
            let reached = unsafe { hal.raw_device().get_semaphore_counter_value(self.semaphore) };
            let reached = reached.unwrap_or(0);
            self.owed.retain(|value| *value > reached);
        }
        self.owed.push_back(value);
    }

    /// Sets, in the place of a library whose queue has failed, the values that it owes: each when wgpu's queue has set the one
    /// before, because a timeline only grows; waits so long for that.
    fn release(&mut self, nanoseconds: u64) {
        // SAFETY: of all calls here: the semaphore is of this device, which `self` keeps.
        let Some(hal) = (unsafe { self.device.as_hal::<wgpu::hal::api::Vulkan>() }) else {
            return;
        };
        let raw = hal.raw_device();
        while let Some(value) = self.owed.front().copied() {
            let (semaphores, before) = ([self.semaphore], [value - 1]);
            let wait = vk::SemaphoreWaitInfo::default().semaphores(&semaphores).values(&before);
            // SAFETY: as above.
            if unsafe { raw.wait_semaphores(&wait, nanoseconds) }.is_err() {
                return;
            }
            // SAFETY: as above.
            let reached = unsafe { raw.get_semaphore_counter_value(self.semaphore) };
            if reached.is_ok_and(|reached| reached < value) {
                let signal =
                    vk::SemaphoreSignalInfo::default().semaphore(self.semaphore).value(value);
                // SAFETY: as above; wgpu's queue sets nothing larger before it has seen this value.
                let signalled = unsafe { raw.signal_semaphore(&signal) };
                log::debug!("native: the host set the timeline to {value}: {signalled:?}");
            }
            self.owed.pop_front();
        }
    }

    #[cfg(not(unix))]
    fn new(_: &Gpu, _: &dyn Runtime) -> std::result::Result<Timeline, String> {
        Err("semaphores are shared by file descriptors, on Unix".into())
    }

    #[cfg(unix)]
    #[expect(clippy::undocumented_unsafe_blocks, reason = "the first comment is about all of them")]
    fn new(gpu: &Gpu, runtime: &dyn Runtime) -> std::result::Result<Timeline, String> {
        use std::os::fd::FromRawFd;
        const HANDLE: vk::ExternalSemaphoreHandleTypeFlags =
            vk::ExternalSemaphoreHandleTypeFlags::OPAQUE_FD;
        // SAFETY: of all calls below: the handles are of one device, alive as long as `hal`.
        let hal = unsafe { gpu.device.as_hal::<wgpu::hal::api::Vulkan>() }.ok_or("not Vulkan")?;
        let instance = hal.shared_instance().raw_instance();
        let raw = hal.raw_device();
        let mut kind = vk::SemaphoreTypeCreateInfo::default()
            .semaphore_type(vk::SemaphoreType::TIMELINE)
            .initial_value(0);
        let mut external = vk::ExternalSemaphoreProperties::default();
        let mut kind_asked = kind;
        let question = vk::PhysicalDeviceExternalSemaphoreInfo::default()
            .handle_type(HANDLE)
            .push_next(&mut kind_asked);
        unsafe {
            instance.get_physical_device_external_semaphore_properties(
                hal.raw_physical_device(),
                &question,
                &mut external,
            );
        }
        if !external
            .external_semaphore_features
            .contains(vk::ExternalSemaphoreFeatureFlags::EXPORTABLE)
        {
            return Err("the driver exports no timeline semaphores".into());
        }
        let mut export = vk::ExportSemaphoreCreateInfo::default().handle_types(HANDLE);
        let info = vk::SemaphoreCreateInfo::default().push_next(&mut kind).push_next(&mut export);
        let semaphore = unsafe { raw.create_semaphore(&info, None) }
            .map_err(|error| format!("vkCreateSemaphore: {error}"))?;
        // Destroyed with it, also on failure.
        let (device, queue) = (gpu.device.clone(), gpu.queue.clone());
        let owed = VecDeque::new();
        let timeline = Timeline { device, queue, semaphore, value: 0, owed, lost: false };
        let files = ash::khr::external_semaphore_fd::Device::new(instance, raw);
        let question =
            vk::SemaphoreGetFdInfoKHR::default().semaphore(semaphore).handle_type(HANDLE);
        let fd = unsafe { files.get_semaphore_fd(&question) }
            .map_err(|error| format!("vkGetSemaphoreFdKHR: {error}"))?;
        let fd = unsafe { super::Fd::from_raw_fd(fd) };
        drop(hal);
        runtime.import_timeline(fd)?;
        Ok(timeline)
    }
}

impl Drop for Timeline {
    fn drop(&mut self) {
        // The queue must not be waiting for it, nor be told to.
        // SAFETY: the queue is the device's.
        if let Some(queue) = unsafe { self.queue.as_hal::<wgpu::hal::api::Vulkan>() } {
            queue.remove_signal_semaphore(self.semaphore);
            queue.remove_wait_semaphore(self.semaphore);
        }
        // wgpu takes a failed wait for fatal and panics: a lost device is not waited for, and keeps its semaphore.
        if self.lost {
            return;
        }
        // It can only time out, which it has no limit for.
        let _ = self.device.poll(wgpu::PollType::wait_indefinitely());
        // SAFETY: the device is alive, and its queue idle.
        if let Some(hal) = unsafe { self.device.as_hal::<wgpu::hal::api::Vulkan>() } {
            // SAFETY: as above.
            unsafe { hal.raw_device().destroy_semaphore(self.semaphore, None) };
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::Mutex;
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    use super::*;
    use crate::engine::Engine;
    use crate::kernels::Copy;
    use crate::{Context, DType, Options, Tensor};

    /// What the queue of a library would do, a step after the other.
    enum Step {
        Wait(u64),
        Run(Box<dyn FnOnce() + Send>),
        Signal(u64),
    }

    /// A runtime whose queue is a thread, whose memory are the files that a software driver exports, and whose semaphore is
    /// wgpu's own: the order of [`Share::hand_over`] is the same as with a library that imported it.
    struct Slow {
        steps: Sender<Step>,
        files: Mutex<Vec<Arc<(std::fs::File, u64)>>>,
    }

    impl std::fmt::Debug for Slow {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("Slow")
        }
    }

    impl Slow {
        fn new(device: wgpu::Device, semaphore: vk::Semaphore) -> Slow {
            let (steps, received) = channel();
            std::thread::spawn(move || {
                for step in received {
                    // SAFETY: the semaphore is of this device, and outlives the last step.
                    let hal = unsafe { device.as_hal::<wgpu::hal::api::Vulkan>() }.unwrap();
                    let raw = hal.raw_device().clone();
                    drop(hal);
                    std::thread::sleep(Duration::from_millis(3));
                    match step {
                        Step::Run(run) => run(),
                        Step::Wait(value) => {
                            let (semaphores, values) = ([semaphore], [value]);
                            let info = vk::SemaphoreWaitInfo::default()
                                .semaphores(&semaphores)
                                .values(&values);
                            // SAFETY: as above.
                            unsafe { raw.wait_semaphores(&info, 20_000_000_000) }.unwrap();
                        }
                        Step::Signal(value) => {
                            let info = vk::SemaphoreSignalInfo::default()
                                .semaphore(semaphore)
                                .value(value);
                            // SAFETY: as above.
                            unsafe { raw.signal_semaphore(&info) }.unwrap();
                        }
                    }
                }
            });
            Slow { steps, files: Mutex::default() }
        }

        fn file(&self, address: u64) -> Arc<(std::fs::File, u64)> {
            Arc::clone(&self.files.lock().unwrap()[address as usize - 1])
        }
    }

    impl Runtime for Slow {
        fn describe(&self) -> Vec<(String, String)> {
            Vec::new()
        }
        fn allocate(&self, _: u64) -> std::result::Result<Mapped, String> {
            Err("no memory of its own".into())
        }
        fn import(
            &self,
            fd: super::super::Fd,
            bytes: u64,
            _: bool,
        ) -> std::result::Result<Mapped, String> {
            let file = std::fs::File::from(fd);
            let len = file.metadata().map_err(|error| error.to_string())?.len();
            let mut offset = [0; 8];
            if len > bytes {
                // Mesa's header: its second word says where the memory starts.
                file.read_exact_at(&mut offset, 8).map_err(|error| error.to_string())?;
            }
            let mut files = self.files.lock().unwrap();
            files.push(Arc::new((file, u64::from_ne_bytes(offset))));
            Ok(Mapped { address: files.len() as u64, handle: 0 })
        }
        fn release(&self, _: Mapped) {}
        fn upload(&self, _: u64, _: &[u8]) -> std::result::Result<(), String> {
            Err("no copies".into())
        }
        fn download(&self, _: u64, _: &mut [u8]) -> std::result::Result<(), String> {
            Err("no copies".into())
        }
        fn import_timeline(&self, _: super::super::Fd) -> std::result::Result<(), String> {
            Ok(())
        }
        fn wait(&self, value: u64) -> std::result::Result<(), String> {
            self.steps.send(Step::Wait(value)).map_err(|error| error.to_string())
        }
        fn signal(&self, value: u64) -> std::result::Result<(), String> {
            self.steps.send(Step::Signal(value)).map_err(|error| error.to_string())
        }
        fn synchronize(&self) -> std::result::Result<(), String> {
            let (sender, receiver) = channel();
            let run = Box::new(move || sender.send(()).unwrap_or(()));
            self.steps.send(Step::Run(run)).map_err(|error| error.to_string())?;
            receiver.recv().map_err(|error| error.to_string())
        }
        fn check(&self) -> std::result::Result<bool, String> {
            Ok(false)
        }
    }

    /// Work of two queues on the same memory, in turns, without the host waiting: any order but the right one shows.
    #[test]
    fn a_timeline_orders_both_queues() {
        let adapters = pollster::block_on(crate::engine::adapters(false));
        let Some(adapter) = adapters.iter().find(|adapter| {
            adapter.get_info().device_type == wgpu::DeviceType::Cpu
                && adapter.features().contains(wgpu::Features::VULKAN_EXTERNAL_MEMORY_FD)
        }) else {
            eprintln!("no software adapter exports memory here: not tested");
            return;
        };
        let ctx = pollster::block_on(Context::on_adapter(adapter, &Options::default())).unwrap();
        let Engine::Gpu(gpu) = ctx.engine() else { return };
        if !gpu.device.features().contains(wgpu::Features::VULKAN_EXTERNAL_MEMORY_FD) {
            eprintln!("built without a native route: not tested");
            return;
        }
        let semaphore = {
            // SAFETY: the semaphore is destroyed by the timeline that it is put into.
            let hal = unsafe { gpu.device.as_hal::<wgpu::hal::api::Vulkan>() }.unwrap();
            let mut kind =
                vk::SemaphoreTypeCreateInfo::default().semaphore_type(vk::SemaphoreType::TIMELINE);
            let info = vk::SemaphoreCreateInfo::default().push_next(&mut kind);
            // SAFETY: as above.
            unsafe { hal.raw_device().create_semaphore(&info, None) }.unwrap()
        };
        let slow = Arc::new(Slow::new(gpu.device.clone(), semaphore));
        let mut share = Share::new(gpu, Arc::<Slow>::clone(&slow)).unwrap();
        let (device, queue) = (gpu.device.clone(), gpu.queue.clone());
        let owed = VecDeque::new();
        share.timeline = Ok(Timeline { device, queue, semaphore, value: 0, owed, lost: false });

        const LEN: usize = 1000;
        let bytes = (LEN * 4) as u64;
        let copy = Copy::new(&ctx);
        let mut stream = ctx.stream();
        let mut outs = Vec::new();
        for i in 0..12u32 {
            let values: Vec<f32> = (0..LEN).map(|j| (1000 * i + j as u32) as f32).collect();
            let x = ctx.upload(DType::F32, 1, LEN, bytemuck::cast_slice(&values)).unwrap();
            let buffers = share.buffers(gpu, [bytes, 0, 0, 0, bytes]).unwrap();
            let over = |buffer: &wgpu::Buffer| {
                Tensor::from_buffer(&ctx, DType::F32, 1, LEN, buffer.clone()).unwrap()
            };
            copy.record(&mut stream, &x, &mut over(&buffers[0])).unwrap();
            let (from, to) = (slow.file(share.address(0)), slow.file(share.address(4)));
            let steps = slow.steps.clone();
            let run = move || {
                let run = Box::new(move || {
                    let mut data = vec![0; LEN * 4];
                    from.0.read_exact_at(&mut data, from.1).unwrap();
                    let values: &mut [f32] = bytemuck::cast_slice_mut(&mut data);
                    values.iter_mut().for_each(|value| *value += 0.5);
                    to.0.write_all_at(&data, to.1).unwrap();
                });
                steps.send(Step::Run(run)).map_err(|error| error.to_string())
            };
            share
                .hand_over(gpu, &mut stream, [bytes, 0, 0, 0], bytes, false, run)
                .unwrap()
                .unwrap();
            let mut out = ctx.zeros(DType::F32, 1, LEN).unwrap();
            copy.record(&mut stream, &over(&buffers[4]), &mut out).unwrap();
            outs.push((values, out));
        }
        ctx.submit(stream).unwrap();
        for (values, out) in &outs {
            let got: Vec<f32> = bytemuck::pod_collect_to_vec(&ctx.read_blocking(out).unwrap());
            let want: Vec<f32> = values.iter().map(|value| value + 0.5).collect();
            assert!(got == want, "{:?} instead of {:?}", &got[..4], &want[..4]);
        }
        assert_eq!((share.traffic.products, share.traffic.host_waits), (12, 0));

        if adapter.get_info().name.starts_with("llvmpipe") {
            eprintln!(
                "vkQueueSubmit of lavapipe returns when the value comes, which it never would: the rest is not tested"
            );
            return;
        }
        // A queue that failed: the value never comes, and the host lets wgpu's queue go.
        let mut stream = ctx.stream();
        let broken = Broken(Arc::clone(&slow));
        share.runtime = Arc::new(broken);
        for _ in 0..3 {
            share.hand_over(gpu, &mut stream, [0; 4], 0, false, || Ok(())).unwrap().unwrap();
        }
        ctx.submit(stream).unwrap();
        // Larger buffers wait for both queues, and see that one will never end.
        let grown = share.buffers(gpu, [2 * bytes; ROLES]);
        assert!(matches!(grown, Err(Error::DeviceLost(_))), "{grown:?}");
        assert_eq!(share.dead(), Some("the queue failed"));
        // The host set all three values, each after wgpu's queue had set the one before.
        let Ok(timeline) = &share.timeline else { unreachable!() };
        assert!(timeline.owed.is_empty());
        let mut stream = ctx.stream();
        assert!(share.hand_over(gpu, &mut stream, [0; 4], 0, false, || Ok(())).unwrap().is_err());
        drop(stream);
        share.runtime = slow;
    }

    /// A runtime whose signals are lost.
    #[derive(Debug)]
    struct Broken(Arc<Slow>);

    impl Runtime for Broken {
        fn describe(&self) -> Vec<(String, String)> {
            Vec::new()
        }
        fn allocate(&self, bytes: u64) -> std::result::Result<Mapped, String> {
            self.0.allocate(bytes)
        }
        fn import(
            &self,
            fd: super::super::Fd,
            bytes: u64,
            only: bool,
        ) -> std::result::Result<Mapped, String> {
            self.0.import(fd, bytes, only)
        }
        fn release(&self, _: Mapped) {}
        fn upload(&self, to: u64, bytes: &[u8]) -> std::result::Result<(), String> {
            self.0.upload(to, bytes)
        }
        fn download(&self, from: u64, bytes: &mut [u8]) -> std::result::Result<(), String> {
            self.0.download(from, bytes)
        }
        fn import_timeline(&self, fd: super::super::Fd) -> std::result::Result<(), String> {
            self.0.import_timeline(fd)
        }
        fn wait(&self, value: u64) -> std::result::Result<(), String> {
            self.0.wait(value)
        }
        fn signal(&self, _: u64) -> std::result::Result<(), String> {
            Ok(())
        }
        fn synchronize(&self) -> std::result::Result<(), String> {
            Ok(())
        }
        fn check(&self) -> std::result::Result<bool, String> {
            Err("the queue failed".into())
        }
    }
}
