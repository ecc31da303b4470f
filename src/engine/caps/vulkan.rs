//! Vulkan properties that wgpu does not pass on, read through wgpu-hal.

use std::ffi::CStr;

use ash::vk;

use super::Capability;

/// `VK_COMPONENT_TYPE_*` values newer than ash 0.38's headers (Vulkan 1.4.360 registry).
const FLOAT8_E4M3: i32 = 1_000_491_002;
const FLOAT8_E5M2: i32 = 1_000_491_003;
pub(crate) const BFLOAT16: i32 = 1_000_141_000;
const FLOAT4_E2M1_NAME: &str = "a component type newer than this probe";

/// The lines that only Vulkan can answer; on other backends they say so.
pub(super) fn probe(adapter: &wgpu::Adapter) -> Vec<Capability> {
    // SAFETY: the adapter handle is only used within this function, while `adapter` is alive.
    let Some(hal) = (unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }) else {
        let backend = adapter.get_info().backend;
        return [
            "accelerated-dot4",
            "f32-denormals",
            "driver-cooperative-matrix",
            "fp8-cooperative-matrix",
            "fp8-conversion",
            "mx-conversion",
        ]
        .map(|name| Capability::unknown(name, format!("{backend:?} does not say")))
        .into();
    };
    let instance = hal.shared_instance().raw_instance();
    let device = hal.raw_physical_device();

    let mut dot = vk::PhysicalDeviceShaderIntegerDotProductProperties::default();
    let mut float = vk::PhysicalDeviceFloatControlsProperties::default();
    let mut properties =
        vk::PhysicalDeviceProperties2::default().push_next(&mut dot).push_next(&mut float);
    // SAFETY: `device` belongs to `instance`, both alive as long as `hal`; the chain holds structures of
    // Vulkan 1.2 and 1.3, which an implementation of an older version leaves as they are: false.
    unsafe { instance.get_physical_device_properties2(device, &mut properties) };
    // SAFETY: as above.
    let extensions =
        unsafe { instance.enumerate_device_extension_properties(device) }.unwrap_or_default();
    let has = |name: &CStr| {
        extensions.iter().any(|e| e.extension_name_as_c_str().is_ok_and(|found| found == name))
    };
    let extension = |name: &'static str, extension: &CStr, yes: &str| {
        let found = has(extension);
        let text = extension.to_string_lossy();
        Capability::new(
            name,
            found,
            if found { format!("{text}: {yes}") } else { format!("the driver has no {text}") },
        )
    };

    let accelerated = dot.integer_dot_product4x8_bit_packed_signed_accelerated == vk::TRUE;
    let mut lines = vec![
        Capability::new(
            "accelerated-dot4",
            accelerated,
            if accelerated {
                "integerDotProduct4x8BitPackedSignedAccelerated"
            } else {
                "packed 4×8 signed dot products are there but not faster than scalar code"
            },
        ),
        Capability::new(
            "f32-denormals",
            float.shader_denorm_preserve_float32 == vk::TRUE,
            "shaderDenormPreserveFloat32; the exact kernels work on bits and do not depend on it",
        ),
    ];

    let (state, types) = cooperative(
        hal.shared_instance().entry(),
        instance,
        device,
        has(ash::khr::cooperative_matrix::NAME),
    );
    lines.push(state);
    let fp8 = types.iter().any(|t| [FLOAT8_E4M3, FLOAT8_E5M2].contains(t));
    lines.push(Capability::new(
        "fp8-cooperative-matrix",
        fp8,
        if fp8 {
            "the driver lists FP8 among its cooperative configurations".to_string()
        } else if has(c"VK_EXT_shader_float8") {
            "VK_EXT_shader_float8 is there, but no cooperative configuration uses FP8".to_string()
        } else {
            "the driver has no VK_EXT_shader_float8".to_string()
        },
    ));
    lines.push(extension("fp8-conversion", c"VK_EXT_shader_float8", "FP8 types in shaders"));
    lines.push(extension(
        "mx-conversion",
        c"VK_EXT_shader_ocp_microscaling_types",
        "conversions only; the extension has no block-scaled matrix product",
    ));
    lines.push(extension("bf16-types", c"VK_KHR_shader_bfloat16", "bfloat16 types in shaders"));
    lines.push(extension(
        "cooperative-matrix-2",
        c"VK_NV_cooperative_matrix2",
        "dequantization while loading a matrix; still f16 products",
    ));
    lines
}

/// The driver's own list of cooperative configurations, wider than wgpu's, and the component types in it.
fn cooperative(
    entry: &ash::Entry,
    instance: &ash::Instance,
    device: vk::PhysicalDevice,
    has: bool,
) -> (Capability, Vec<i32>) {
    const NAME: &str = "driver-cooperative-matrix";
    if !has {
        return (
            Capability::new(NAME, false, "the driver has no VK_KHR_cooperative_matrix"),
            Vec::new(),
        );
    }
    let Some(properties) = configurations(entry, instance, device) else {
        return (
            Capability::new(NAME, false, "the driver refuses to list its configurations"),
            Vec::new(),
        );
    };
    let mut types = Vec::new();
    let mut list = Vec::new();
    for p in &properties {
        let [m, n, k] = p.size;
        let [a, b, _, result] = p.types;
        types.extend([a.as_raw(), b.as_raw()]);
        let text = format!("{m}x{n}x{k} {}·{}→{}", component(a), component(b), component(result));
        if !list.contains(&text) {
            list.push(text);
        }
    }
    (Capability::new(NAME, !list.is_empty(), list.join(", ")), types)
}

/// A cooperative configuration: m, n, k; the types of A, B, C and the result; whether it is a subgroup's.
pub(crate) struct Configuration {
    pub(crate) size: [u32; 3],
    pub(crate) types: [vk::ComponentTypeKHR; 4],
    pub(crate) subgroup: bool,
}

/// The driver's cooperative configurations; only where it has VK_KHR_cooperative_matrix.
pub(crate) fn configurations(
    entry: &ash::Entry,
    instance: &ash::Instance,
    device: vk::PhysicalDevice,
) -> Option<Vec<Configuration>> {
    let khr = ash::khr::cooperative_matrix::Instance::new(entry, instance);
    // SAFETY: the extension is in the physical device's list, so its instance-level function resolves.
    let list = unsafe { khr.get_physical_device_cooperative_matrix_properties(device) }.ok()?;
    let configuration = |p: &vk::CooperativeMatrixPropertiesKHR<'_>| Configuration {
        size: [p.m_size, p.n_size, p.k_size],
        types: [p.a_type, p.b_type, p.c_type, p.result_type],
        subgroup: p.scope == vk::ScopeKHR::SUBGROUP,
    };
    Some(list.iter().map(configuration).collect())
}

fn component(t: vk::ComponentTypeKHR) -> String {
    match t {
        vk::ComponentTypeKHR::FLOAT16 => "f16".into(),
        vk::ComponentTypeKHR::FLOAT32 => "f32".into(),
        vk::ComponentTypeKHR::FLOAT64 => "f64".into(),
        vk::ComponentTypeKHR::SINT8 => "i8".into(),
        vk::ComponentTypeKHR::UINT8 => "u8".into(),
        vk::ComponentTypeKHR::SINT32 => "i32".into(),
        vk::ComponentTypeKHR::UINT32 => "u32".into(),
        other => match other.as_raw() {
            FLOAT8_E4M3 => "e4m3".into(),
            FLOAT8_E5M2 => "e5m2".into(),
            BFLOAT16 => "bf16".into(),
            raw => format!("{FLOAT4_E2M1_NAME} ({raw})"),
        },
    }
}
