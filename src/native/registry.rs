//! The native routes of a device: opened when first asked for, tested before their first product, disabled when they fail.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::share::Share;
use super::{
    Accumulation, NativeRoute, Packing, Problem, Report, RouteReport, RouteState, selftest,
};
use crate::engine::gpu::Gpu;
use crate::kernels::matmul::native::Refused;
use crate::{Context, MxSpec};

/// A route, or its name and why it is not there.
pub(crate) type Opened = Result<Arc<dyn NativeRoute>, (&'static str, String)>;

/// All routes of this build on a device.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    entries: Vec<Arc<Entry>>,
    /// Routes that could not be opened, and why.
    absent: Vec<(&'static str, String)>,
    /// One for each runtime.
    shares: Vec<Arc<Mutex<Share>>>,
}

/// A route that is open.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) route: Arc<dyn NativeRoute>,
    pub(crate) share: Arc<Mutex<Share>>,
    /// What the known-answer test took for each pair of formats.
    tested: Mutex<HashMap<[MxSpec; 2], Duration>>,
    /// Why the route is of no use any more. Apart from `tested`, which is locked while a test runs.
    disabled: Mutex<Option<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Entry {
    pub(crate) fn share(&self) -> MutexGuard<'_, Share> {
        lock(&self.share)
    }

    pub(crate) fn disable(&self, reason: String) {
        log::warn!("native route {}: {reason}", self.route.name());
        lock(&self.disabled).get_or_insert(reason);
    }

    /// Why no product may go through the route any more.
    pub(crate) fn disabled(&self) -> Option<String> {
        let disabled = lock(&self.disabled).clone();
        disabled.or_else(|| self.share().dead().map(String::from))
    }

    /// Runs the known-answer test if it has not run for the pair, and says whether the route may be used for it. A pair that is
    /// wrong disables the route for all.
    fn ready(self: &Arc<Self>, ctx: &Context, pair: [MxSpec; 2]) -> Result<(), String> {
        let usable = || self.disabled().map_or(Ok(()), Err);
        usable()?;
        if lock(&self.tested).contains_key(&pair) {
            return Ok(());
        }
        let declines = |reason| format!("declines the known-answer test: {reason}");
        let packings = self.route.accepts(&selftest::problem(pair)).map_err(declines)?;
        // Before the lock: threads of the CPU engine's, which compute the answers, may come here too.
        let known = selftest::known(pair, &packings)?;
        // Held throughout: who comes second waits for the verdict.
        let mut tested = lock(&self.tested);
        usable()?;
        if tested.contains_key(&pair) {
            return Ok(());
        }
        let [a, b] = pair;
        let start = Instant::now();
        match selftest::run(ctx, self, &known) {
            Ok(()) => {
                tested.insert(pair, start.elapsed());
            }
            Err(Refused::Failed(reason)) => {
                self.disable(format!("known-answer test of {a} × {b}: {reason}"));
            }
            Err(Refused::Declined(reason)) => {
                return Err(format!("the known-answer test of {a} × {b} could not run: {reason}"));
            }
        }
        usable()
    }

    fn state(&self) -> RouteState {
        if let Some(reason) = self.disabled() {
            return RouteState::Disabled(reason);
        }
        let passed = lock(&self.tested);
        match passed.len() {
            0 => RouteState::Untested,
            _ => RouteState::Passed(passed.values().sum()),
        }
    }

    /// Why only a product by name goes through the route, if it adds up well enough.
    fn slow(&self) -> Result<(), String> {
        match self.share().slow() {
            Some(reason) => Err(format!("{reason}: so only by name")),
            None => Ok(()),
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // What the route destroys is not to be at work, however long that takes.
        self.share().finish();
    }
}

impl Registry {
    /// Opens what the build has for the device.
    pub(crate) fn open(gpu: &Gpu) -> Registry {
        let mut registry = Registry::default();
        let opened = open_all(gpu);
        for opened in opened {
            match opened {
                Err((name, reason)) => registry.absent.push((name, reason)),
                Ok(route) => {
                    let runtime = route.runtime();
                    let known = registry.entries.iter().find(|entry: &&Arc<Entry>| {
                        std::ptr::addr_eq(Arc::as_ptr(entry.route.runtime()), Arc::as_ptr(runtime))
                    });
                    let share = match known {
                        Some(entry) => Arc::clone(&entry.share),
                        None => match Share::new(gpu, Arc::clone(runtime)) {
                            Ok(share) => {
                                let share = Arc::new(Mutex::new(share));
                                registry.shares.push(Arc::clone(&share));
                                share
                            }
                            Err(error) => {
                                registry.absent.push((route.name(), error.to_string()));
                                continue;
                            }
                        },
                    };
                    let (tested, disabled) = (Mutex::default(), Mutex::default());
                    registry.entries.push(Arc::new(Entry { route, share, tested, disabled }));
                }
            }
        }
        registry
    }

    /// The first route that takes the problem and passed its test, or what each one says. `any`: also those that add up in
    /// fewer bits. `slow`: also those for which the host waits or copies.
    pub(crate) fn choose(
        &self,
        ctx: &Context,
        problem: &Problem,
        any: bool,
        slow: bool,
    ) -> Result<(Arc<Entry>, [Packing; 2]), String> {
        let mut reasons = Vec::new();
        for entry in &self.entries {
            let name = entry.route.name();
            if !any && entry.route.accumulation() == Accumulation::Fewer {
                reasons.push(format!("{name}: adds up in fewer bits than f32, so only by name"));
                continue;
            }
            let fast = || if slow { Ok(()) } else { entry.slow() };
            // That memory is not shared may show only in the test.
            let taken = entry.route.accepts(problem).and_then(|packings| {
                fast()?;
                entry.ready(ctx, [problem.a, problem.b])?;
                fast().map(|()| packings)
            });
            match taken {
                Ok(packings) => return Ok((Arc::clone(entry), packings)),
                Err(reason) => reasons.push(format!("{name}: {reason}")),
            }
        }
        // One reason for several routes is said once.
        let mut absent: Vec<(&str, Vec<&str>)> = Vec::new();
        for (name, reason) in &self.absent {
            match absent.iter_mut().find(|(known, _)| known == reason) {
                Some((_, names)) => names.push(name),
                None => absent.push((reason, vec![name])),
            }
        }
        reasons.extend(
            absent.into_iter().map(|(reason, names)| format!("{}: {reason}", names.join(", "))),
        );
        Err(if reasons.is_empty() { "none is built in".into() } else { reasons.join("; ") })
    }

    /// Runs the known-answer test of every open route that takes its problem, and reports. A route that declines it shows as
    /// disabled there, and may still take other problems.
    pub(crate) fn test(&self, ctx: &Context) -> Report {
        let declined: Vec<_> = self
            .entries
            .iter()
            .filter_map(|entry| {
                let pair = entry.route.sample();
                if let Err(reason) = entry.route.accepts(&selftest::problem(pair)) {
                    return Some((entry.route.name(), reason));
                }
                // What it says is kept with the route.
                let _ = entry.ready(ctx, pair);
                None
            })
            .collect();
        let mut report = self.report();
        for (name, reason) in declined {
            for route in report.routes.iter_mut().filter(|route| route.name == name) {
                if route.state == RouteState::Untested {
                    route.state = RouteState::Disabled(format!("declines: {reason}"));
                }
            }
        }
        report
    }

    /// Looks after the libraries' queues while somebody waits for wgpu's. Who is handing a product over looks after its own.
    pub(crate) fn watch(&self, gpu: &Gpu) {
        for share in &self.shares {
            match share.try_lock() {
                Ok(mut share) => share.watch(gpu),
                Err(TryLockError::Poisoned(share)) => share.into_inner().watch(gpu),
                Err(TryLockError::WouldBlock) => {}
            }
        }
    }

    /// The buffers with the counts of products computed anew.
    pub(crate) fn flags(&self) -> Vec<wgpu::Buffer> {
        self.shares.iter().map(|share| lock(share).flags().clone()).collect()
    }

    /// What is there, without the count of products computed anew.
    pub(crate) fn report(&self) -> Report {
        let mut report = Report::default();
        for entry in &self.entries {
            let mut details = entry.route.describe();
            details.extend(entry.route.runtime().describe());
            report.routes.push(RouteReport {
                name: entry.route.name().into(),
                state: entry.state(),
                accumulation: Some(entry.route.accumulation()),
                details,
            });
        }
        for (name, reason) in &self.absent {
            report.routes.push(RouteReport {
                name: (*name).into(),
                state: RouteState::Disabled(reason.clone()),
                accumulation: None,
                details: Vec::new(),
            });
        }
        for share in &self.shares {
            let share = lock(share);
            report.sharing.extend(share.describe());
            let traffic = &mut report.traffic;
            traffic.products += share.traffic.products;
            traffic.to_library += share.traffic.to_library;
            traffic.from_library += share.traffic.from_library;
            traffic.shared += share.traffic.shared;
            traffic.host_waits += share.traffic.host_waits;
        }
        report
    }
}

#[cfg(any(feature = "cuda", feature = "hip"))]
fn open_all(gpu: &Gpu) -> Vec<Opened> {
    #[allow(unused_mut)]
    let mut all = Vec::new();
    #[cfg(all(feature = "cuda", any(target_os = "linux", target_os = "windows")))]
    match crate::engine::vulkan::uuid(&gpu.device) {
        Some(uuid) => all.extend(super::cuda::open(&gpu.libraries, uuid)),
        None => {
            let reason =
                format!("the backend is {}, devices are matched by Vulkan", gpu.caps.backend);
            all.push(Err(("cuda", reason)));
        }
    }
    #[cfg(all(feature = "hip", any(target_os = "linux", target_os = "windows")))]
    {
        let wanted = super::hip::Wanted {
            uuid: crate::engine::vulkan::uuid(&gpu.device),
            pci: gpu.device.adapter_info().device_pci_bus_id,
        };
        all.extend(super::hip::open(&gpu.libraries, &wanted));
    }
    all
}

#[cfg(not(any(feature = "cuda", feature = "hip")))]
fn open_all(_: &Gpu) -> Vec<Opened> {
    Vec::new()
}
