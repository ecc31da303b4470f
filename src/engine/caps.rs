//! The probe: what an adapter offers, line by line, each with its reason.
//!
//! It separates what is easily confused: a wgpu feature from the hardware behind it, a data type that can be
//! *converted* from one that can be *multiplied*, an extension from a usable configuration of it.

#[cfg(not(target_arch = "wasm32"))]
pub(crate) mod vulkan;

use crate::native::{Report, RouteReport, RouteState};

/// What an adapter (or the CPU engine) offers.
#[derive(Clone, Debug)]
pub struct Caps {
    /// The adapter's name, or `CPU`.
    pub name: String,
    /// The adapter's PCI vendor id; 0 for the CPU engine.
    pub vendor: u32,
    /// Driver name and version.
    pub driver: String,
    /// `Vulkan`, `Metal`, `Dx12`, `BrowserWebGpu`, or `Cpu` for the CPU engine.
    pub backend: String,
    /// Whether the adapter runs on the CPU (llvmpipe, SwiftShader, WARP).
    pub software: bool,
    /// Smallest and largest subgroup, if the adapter has subgroup operations in compute shaders.
    pub subgroups: Option<(u32, u32)>,
    /// Everything probed, in order of interest.
    pub lines: Vec<Capability>,
}

/// One line of the probe.
#[derive(Clone, Debug)]
pub struct Capability {
    /// A stable name, e.g. `shader-f16`.
    pub name: &'static str,
    /// What was found.
    pub state: State,
    /// What it means, or why not.
    pub reason: String,
}

/// The outcome of probing for one capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// There.
    Yes,
    /// Not there.
    No,
    /// This build or backend cannot tell.
    Unknown,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            State::Yes => "yes",
            State::No => "no",
            State::Unknown => "unknown",
        })
    }
}

impl Capability {
    fn new(name: &'static str, yes: bool, reason: impl Into<String>) -> Capability {
        let state = if yes { State::Yes } else { State::No };
        Capability { name, state, reason: reason.into() }
    }

    fn unknown(name: &'static str, reason: impl Into<String>) -> Capability {
        Capability { name, state: State::Unknown, reason: reason.into() }
    }
}

impl Caps {
    /// What the CPU engine offers.
    pub fn cpu() -> Caps {
        let mut lines = vec![Capability::new(
            "threads",
            true,
            format!("{} worker threads", super::cpu_threads()),
        )];
        #[cfg(target_arch = "x86_64")]
        for (name, yes) in [
            ("avx2", std::is_x86_feature_detected!("avx2")),
            ("avx512bw", std::is_x86_feature_detected!("avx512bw")),
        ] {
            lines.push(Capability::new(name, yes, "by cpuid"));
        }
        Caps {
            name: "CPU".into(),
            vendor: 0,
            driver: format!("microscaling {}", env!("CARGO_PKG_VERSION")),
            backend: "Cpu".into(),
            software: true,
            subgroups: None,
            lines,
        }
    }

    /// Probes an adapter; opens no device.
    pub fn probe(adapter: &wgpu::Adapter) -> Caps {
        let info = adapter.get_info();
        let features = adapter.features();
        let limits = adapter.limits();
        let software = info.device_type == wgpu::DeviceType::Cpu;
        let subgroups = features
            .contains(wgpu::Features::SUBGROUP)
            .then_some((info.subgroup_min_size, info.subgroup_max_size));
        let mut lines = Vec::new();

        lines.push(match subgroups {
            Some((min, max)) => {
                Capability::new("subgroups", true, format!("of {min} to {max} invocations"))
            }
            None => Capability::new(
                "subgroups",
                false,
                "reductions go through workgroup memory, with the same bits",
            ),
        });
        for (name, feature, yes, no) in [
            (
                "shader-f16",
                wgpu::Features::SHADER_F16,
                "f16 arithmetic in shaders",
                "no f16 in shaders",
            ),
            (
                "timestamps",
                wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS,
                "kernels are timed by the device",
                "kernels are timed by the host's clock",
            ),
            (
                "spirv-passthrough",
                wgpu::Features::PASSTHROUGH_SHADERS,
                "shaders that WGSL cannot express could be handed to the driver",
                "only what WGSL expresses",
            ),
        ] {
            let found = features.contains(feature);
            lines.push(Capability::new(name, found, if found { yes } else { no }));
        }

        let matrices = adapter.cooperative_matrix_properties();
        let has = features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
        lines.push(Capability::new(
            "cooperative-matrix",
            has && !matrices.is_empty(),
            if !has {
                "wgpu offers no cooperative matrices here".to_string()
            } else if matrices.is_empty() {
                "the feature is there, but wgpu lists no configuration".to_string()
            } else {
                let list: Vec<_> = matrices
                    .iter()
                    .map(|m| {
                        format!(
                            "{}x{}x{} {:?}→{:?}",
                            m.m_size, m.n_size, m.k_size, m.ab_type, m.cr_type
                        )
                    })
                    .collect();
                format!("through wgpu: {}", list.join(", "))
            },
        ));

        #[cfg(not(target_arch = "wasm32"))]
        lines.extend(vulkan::probe(adapter));
        #[cfg(target_arch = "wasm32")]
        lines.push(Capability::unknown("accelerated-dot4", "a browser does not say"));

        lines.push(Capability::new(
            "binding",
            true,
            format!(
                "{} bytes at once, buffers of {} bytes; larger tensors are split",
                limits.max_storage_buffer_binding_size, limits.max_buffer_size
            ),
        ));
        lines.push(Capability::new(
            "workgroup",
            true,
            format!(
                "{} bytes of memory, {} invocations",
                limits.max_compute_workgroup_storage_size,
                limits.max_compute_invocations_per_workgroup
            ),
        ));
        lines.extend(native());
        Caps {
            name: info.name,
            vendor: info.vendor,
            driver: format!("{} {}", info.driver, info.driver_info).trim().to_string(),
            backend: format!("{:?}", info.backend),
            software,
            subgroups,
            lines,
        }
    }

    /// The features that this crate's kernels use where an adapter has them. A host that opens the device
    /// itself requests these for the fast variants; without them the kernels give the same bits.
    pub fn useful_features(adapter: &wgpu::Adapter) -> wgpu::Features {
        adapter.features()
            & (wgpu::Features::SUBGROUP
                | wgpu::Features::SHADER_F16
                | wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX
                | wgpu::Features::PASSTHROUGH_SHADERS
                | wgpu::Features::TIMESTAMP_QUERY
                | wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS
                | match cfg!(any(feature = "cuda", feature = "hip")) {
                    true => wgpu::Features::VULKAN_EXTERNAL_MEMORY_FD,
                    false => wgpu::Features::empty(),
                })
    }

    /// The same, with what a context's native routes said ([`crate::Context::native`], [`crate::Context::test_native`]).
    pub fn with_native(mut self, report: &Report) -> Caps {
        for line in self.lines.iter_mut().filter(|line| line.name.starts_with("native-")) {
            let hip = line.name == "native-hip";
            let of = |route: &&RouteReport| route.name.starts_with("hip") == hip;
            let routes: Vec<_> = report.routes.iter().filter(of).collect();
            // A build without them keeps its line.
            if routes.is_empty() {
                continue;
            }
            let usable = |route: &&RouteReport| !matches!(route.state, RouteState::Disabled(_));
            line.state = if routes.iter().any(usable) { State::Yes } else { State::No };
            // One reason for several routes is said once.
            let mut groups: Vec<(String, Vec<&str>)> = Vec::new();
            for route in &routes {
                let state = match &route.state {
                    RouteState::Untested => "open".into(),
                    RouteState::Passed(_) => "known-answer test passed".into(),
                    RouteState::Disabled(reason) => reason.clone(),
                };
                match groups.iter_mut().find(|(known, _)| *known == state) {
                    Some((_, names)) => names.push(&route.name),
                    None => groups.push((state, vec![&route.name])),
                }
            }
            let said: Vec<_> = groups
                .into_iter()
                .map(|(state, names)| format!("{}: {state}", names.join(", ")))
                .collect();
            line.reason = said.join("; ");
        }
        self
    }

    /// The line called `name`.
    pub fn get(&self, name: &str) -> Option<&Capability> {
        self.lines.iter().find(|line| line.name == name)
    }
}

/// Whether this build has a vendor's native routes, and whether its driver is here. It is loaded, no more: opening a device
/// and asking its libraries takes long; [`Caps::with_native`] has the answers of a context that did. It is looked for where
/// the environment or the system says: an adapter knows nothing of [`crate::Options::libraries`].
fn native() -> [Capability; 2] {
    [("native-cuda", "cuda", cfg!(feature = "cuda")), ("native-hip", "hip", cfg!(feature = "hip"))]
        .map(|(name, feature, built)| match driver(feature) {
            _ if !built => {
                let reason = format!("not in this build, which lacks the Cargo feature {feature}");
                Capability::new(name, false, reason)
            }
            Ok(found) => Capability::unknown(
                name,
                format!("{found} is here; what it takes, `info --native` asks it"),
            ),
            Err(reason) => Capability::new(name, false, reason),
        })
}

/// The name under which a vendor's driver can be loaded, or why it cannot.
fn driver(feature: &str) -> Result<String, String> {
    match feature {
        #[cfg(all(feature = "cuda", any(target_os = "linux", target_os = "windows")))]
        "cuda" => crate::native::cuda::driver::library(None).map(|library| library.name),
        #[cfg(all(feature = "hip", any(target_os = "linux", target_os = "windows")))]
        "hip" => crate::native::hip::driver::library(None).map(|library| library.name),
        _ => Err(format!("{feature} has no libraries on this system")),
    }
}
