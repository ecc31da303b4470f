//! Vulkan properties that wgpu does not pass on, read through wgpu-hal.

use std::ffi::{CStr, c_void};

use ash::vk;

use super::Capability;
#[cfg(not(target_vendor = "apple"))]
use crate::kernels::matmul::{Byte, ByteMatrices};

/// `VK_COMPONENT_TYPE_*` values newer than ash 0.38's headers (Vulkan 1.4.360 registry).
pub(crate) const FLOAT8_E4M3: i32 = 1_000_491_002;
const FLOAT8_E5M2: i32 = 1_000_491_003;
pub(crate) const BFLOAT16: i32 = 1_000_141_000;
/// Those of VK_EXT_shader_ocp_microscaling_types: E2M3, E3M2, E2M1, E8M0 and MXINT8 follow one another.
const OCP_COMPONENTS: i32 = 1_000_672_000;

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
            "i8-cooperative-matrix",
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

    let configurations = has(ash::khr::cooperative_matrix::NAME)
        .then(|| configurations(hal.shared_instance().entry(), instance, device));
    lines.push(cooperative(&configurations));
    let features = has(FLOAT8).then(|| Float8Features::of(instance, device));
    let list = configurations.flatten().unwrap_or_default();
    let (fp8, reason) = match e4m3_matrices(features.as_ref(), &list) {
        Ok(k) => (true, format!("16x16x{k} e4m3·e4m3→f32: E2M1 operands of the tensor tier")),
        Err(reason) => (false, reason),
    };
    lines.push(Capability::new("fp8-cooperative-matrix", fp8, reason));
    let (i8, reason) = match i8_matrices(has_int8(instance, device), &list) {
        Ok(k) => (true, format!("16x16x{k} i8·i8→i32: E2M1 operands of the tensor tier")),
        Err(reason) => (false, reason),
    };
    lines.push(Capability::new("i8-cooperative-matrix", i8, reason));
    lines.push(extension("fp8-conversion", FLOAT8, "FP8 types in shaders"));
    let ocp = has(OCP).then(|| OcpFeatures::of(instance, device));
    let (found, reason) = match e2m1_conversion(ocp.as_ref()) {
        Ok(reason) => (true, reason),
        Err(reason) => (false, reason),
    };
    lines.push(Capability::new("mx-conversion", found, reason));
    lines.push(extension("bf16-types", c"VK_KHR_shader_bfloat16", "bfloat16 types in shaders"));
    lines.push(extension(
        "cooperative-matrix-2",
        c"VK_NV_cooperative_matrix2",
        "dequantization while loading a matrix; still f16 products",
    ));
    lines
}

/// The driver's own list of cooperative configurations, wider than wgpu's.
fn cooperative(configurations: &Option<Option<Vec<Configuration>>>) -> Capability {
    const NAME: &str = "driver-cooperative-matrix";
    let Some(answer) = configurations else {
        return Capability::new(NAME, false, "the driver has no VK_KHR_cooperative_matrix");
    };
    let Some(properties) = answer else {
        return Capability::new(NAME, false, "the driver refuses to list its configurations");
    };
    let mut list = Vec::new();
    for p in properties {
        let text = p.to_string();
        if !list.contains(&text) {
            list.push(text);
        }
    }
    Capability::new(NAME, !list.is_empty(), list.join(", "))
}

/// The extension with FP8 types.
pub(crate) const FLOAT8: &CStr = c"VK_EXT_shader_float8";

/// VkPhysicalDeviceShaderFloat8FeaturesEXT, which ash 0.38 does not have yet.
#[repr(C)]
pub(crate) struct Float8Features {
    s_type: vk::StructureType,
    pub(crate) p_next: *mut c_void,
    pub(crate) types: vk::Bool32,
    pub(crate) cooperative_matrix: vk::Bool32,
}

impl Float8Features {
    pub(crate) fn new(types: bool, cooperative_matrix: bool) -> Float8Features {
        Float8Features {
            s_type: vk::StructureType::from_raw(1_000_567_000),
            p_next: std::ptr::null_mut(),
            types: types.into(),
            cooperative_matrix: cooperative_matrix.into(),
        }
    }

    /// What a device has, which must have the extension.
    fn of(instance: &ash::Instance, device: vk::PhysicalDevice) -> Float8Features {
        let mut fp8 = Float8Features::new(false, false);
        let mut features =
            vk::PhysicalDeviceFeatures2 { p_next: (&raw mut fp8).cast(), ..Default::default() };
        // SAFETY: `device` belongs to `instance`; the chained structure is the extension's, and outlives the call.
        unsafe { instance.get_physical_device_features2(device, &mut features) };
        fp8
    }
}

/// The extension with the OCP's types, which can be converted and not multiplied.
pub(crate) const OCP: &CStr = c"VK_EXT_shader_ocp_microscaling_types";

/// VkPhysicalDeviceShaderOCPMicroscalingTypesFeaturesEXT, which ash 0.38 does not have yet: its type and the order of its
/// members are the Vulkan 1.4.360 registry's.
#[repr(C)]
pub(crate) struct OcpFeatures {
    s_type: vk::StructureType,
    pub(crate) p_next: *mut c_void,
    /// shaderFloat4, shaderFloat6, shaderFloat8UnsignedE8M0, shaderMXInt8.
    types: [vk::Bool32; 4],
}

impl OcpFeatures {
    fn new(types: [bool; 4]) -> OcpFeatures {
        OcpFeatures {
            s_type: vk::StructureType::from_raw(1_000_672_000),
            p_next: std::ptr::null_mut(),
            types: types.map(vk::Bool32::from),
        }
    }

    /// What a device has, which must have the extension.
    fn of(instance: &ash::Instance, device: vk::PhysicalDevice) -> OcpFeatures {
        let mut ocp = OcpFeatures::new([false; 4]);
        let mut features =
            vk::PhysicalDeviceFeatures2 { p_next: (&raw mut ocp).cast(), ..Default::default() };
        // SAFETY: `device` belongs to `instance`; the chained structure is the extension's, and outlives the call.
        unsafe { instance.get_physical_device_features2(device, &mut features) };
        // Whoever opens a device with these has a chain of their own.
        OcpFeatures { p_next: std::ptr::null_mut(), ..ocp }
    }
}

/// Whether E2M1 codes can be converted to f16, with what there is besides, or why not. `features`: None without the extension.
pub(crate) fn e2m1_conversion(features: Option<&OcpFeatures>) -> Result<String, String> {
    let Some(features) = features else {
        return Err("the driver has no VK_EXT_shader_ocp_microscaling_types".into());
    };
    let names = ["shaderFloat4", "shaderFloat6", "shaderFloat8UnsignedE8M0", "shaderMXInt8"];
    let found: Vec<_> = names
        .into_iter()
        .zip(features.types)
        .filter(|(_, found)| *found == vk::TRUE)
        .map(|(name, _)| name)
        .collect();
    match features.types[0] == vk::TRUE {
        true => Ok(format!(
            "{}: E2M1 operands of the tensor tier, by Options::ocp_conversion or where tiles are measured; conversions \
             alone, no block-scaled matrix product",
            found.join(", ")
        )),
        false => Err(format!(
            "VK_EXT_shader_ocp_microscaling_types is there, shaderFloat4 is not{}{}",
            if found.is_empty() { "" } else { ", but " },
            found.join(", ")
        )),
    }
}

/// What an adapter that can convert E2M1 codes to f16 is opened with: shaderFloat4 alone.
#[cfg(not(target_vendor = "apple"))]
pub(crate) fn e2m1_conversion_of(adapter: &wgpu::Adapter) -> Option<OcpFeatures> {
    // SAFETY: the adapter handle is only used within this function, while `adapter` is alive.
    let hal = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    if !hal.physical_device_capabilities().supports_extension(OCP) {
        return None;
    }
    let (instance, device) = (hal.shared_instance().raw_instance(), hal.raw_physical_device());
    let mut ocp = OcpFeatures::of(instance, device);
    e2m1_conversion(Some(&ocp)).ok()?;
    ocp.types = [vk::TRUE, vk::FALSE, vk::FALSE, vk::FALSE];
    Some(ocp)
}

/// How many positions a usable product of cooperative matrices in E4M3 contracts, or why there is none. Usable: by a subgroup,
/// 16×16 outputs, f32 sums. `features`: None without the extension.
pub(crate) fn e4m3_matrices(
    features: Option<&Float8Features>,
    list: &[Configuration],
) -> Result<u32, String> {
    match features {
        None => return Err("the driver has no VK_EXT_shader_float8".into()),
        Some(fp8) if fp8.types != vk::TRUE || fp8.cooperative_matrix != vk::TRUE => {
            return Err(
                "VK_EXT_shader_float8 is there, shaderFloat8CooperativeMatrix is not".into()
            );
        }
        Some(_) => {}
    }
    let [e4m3, f32] = [vk::ComponentTypeKHR::from_raw(FLOAT8_E4M3), vk::ComponentTypeKHR::FLOAT32];
    let fp8 = |c: &Configuration| {
        c.types[..2].iter().any(|t| [FLOAT8_E4M3, FLOAT8_E5M2].contains(&t.as_raw()))
    };
    let none = "VK_EXT_shader_float8 is there, but no cooperative configuration uses FP8";
    contracted(list, [e4m3, e4m3, f32, f32], fp8, none)
}

/// The same of signed integers of eight bits, with i32 sums. `int8`: shaderInt8.
pub(crate) fn i8_matrices(int8: bool, list: &[Configuration]) -> Result<u32, String> {
    if !int8 {
        return Err("shaderInt8 is not there".into());
    }
    let [i8, i32] = [vk::ComponentTypeKHR::SINT8, vk::ComponentTypeKHR::SINT32];
    let types = [i8, i8, i32, i32];
    contracted(list, types, |c| c.types == types, "no cooperative configuration is i8·i8→i32")
}

/// How many positions a subgroup's product of 16×16 outputs of these types contracts; if there is none, what the driver lists
/// that is `like` it, or `none`.
fn contracted(
    list: &[Configuration],
    types: [vk::ComponentTypeKHR; 4],
    like: impl Fn(&Configuration) -> bool,
    none: &str,
) -> Result<u32, String> {
    let usable =
        |k: &u32| list.iter().any(|c| c.subgroup && c.size == [16, 16, *k] && c.types == types);
    // Fewer instructions with the longer one.
    [32, 16].into_iter().find(usable).ok_or_else(|| {
        let found: Vec<_> = list.iter().filter(|c| like(c)).map(Configuration::to_string).collect();
        let [a, b, _, sums] = types.map(component);
        match found.is_empty() {
            true => none.into(),
            false => format!(
                "16x16x32 or 16x16x16 {a}·{b}→{sums} of a subgroup is needed, the driver lists {}",
                found.join(", ")
            ),
        }
    })
}

/// The cooperative matrices of bytes that the tensor tier uses on an adapter: E4M3 before I8, whose window is smaller.
#[cfg(not(target_vendor = "apple"))]
pub(crate) fn byte_matrices_of(adapter: &wgpu::Adapter) -> Option<ByteMatrices> {
    // SAFETY: the adapter handle is only used within this function, while `adapter` is alive.
    let hal = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let has = |name| hal.physical_device_capabilities().supports_extension(name);
    if !has(ash::khr::cooperative_matrix::NAME) {
        return None;
    }
    let (instance, device) = (hal.shared_instance().raw_instance(), hal.raw_physical_device());
    let list = configurations(hal.shared_instance().entry(), instance, device)?;
    let features = has(FLOAT8).then(|| Float8Features::of(instance, device));
    let e4m3 = e4m3_matrices(features.as_ref(), &list).map(|k| (Byte::E4m3, k));
    let found =
        e4m3.or_else(|_| i8_matrices(has_int8(instance, device), &list).map(|k| (Byte::I8, k)));
    found.ok().map(|(byte, k)| ByteMatrices { byte, k })
}

/// VkPhysicalDeviceShaderFloat16Int8Features' shaderInt8.
fn has_int8(instance: &ash::Instance, device: vk::PhysicalDevice) -> bool {
    let mut int8 = vk::PhysicalDeviceShaderFloat16Int8Features::default();
    let mut features = vk::PhysicalDeviceFeatures2::default().push_next(&mut int8);
    // SAFETY: `device` belongs to `instance`; the chained structure is of Vulkan 1.2, which every driver with cooperative
    // matrices has.
    unsafe { instance.get_physical_device_features2(device, &mut features) };
    int8.shader_int8 == vk::TRUE
}

/// A cooperative configuration: m, n, k; the types of A, B, C and the result; whether it is a subgroup's.
#[derive(Clone, Debug)]
pub(crate) struct Configuration {
    pub(crate) size: [u32; 3],
    pub(crate) types: [vk::ComponentTypeKHR; 4],
    pub(crate) subgroup: bool,
}

impl std::fmt::Display for Configuration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [m, n, k] = self.size;
        let [a, b, _, result] = self.types.map(component);
        write!(f, "{m}x{n}x{k} {a}·{b}→{result}")
    }
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
            raw => match ["e2m3", "e3m2", "e2m1", "e8m0", "mxint8"]
                .get(raw.wrapping_sub(OCP_COMPONENTS) as usize)
            {
                Some(name) => (*name).into(),
                None => format!("a component type newer than this probe ({raw})"),
            },
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const E4M3: vk::ComponentTypeKHR = vk::ComponentTypeKHR::from_raw(FLOAT8_E4M3);
    const E5M2: vk::ComponentTypeKHR = vk::ComponentTypeKHR::from_raw(FLOAT8_E5M2);
    const F32: vk::ComponentTypeKHR = vk::ComponentTypeKHR::FLOAT32;
    const F16: vk::ComponentTypeKHR = vk::ComponentTypeKHR::FLOAT16;

    fn configuration(size: [u32; 3], [a, b, sums]: [vk::ComponentTypeKHR; 3]) -> Configuration {
        Configuration { size, types: [a, b, sums, sums], subgroup: true }
    }

    #[test]
    fn integers_need_shader_int8_and_a_configuration() {
        const I8: vk::ComponentTypeKHR = vk::ComponentTypeKHR::SINT8;
        const I32: vk::ComponentTypeKHR = vk::ComponentTypeKHR::SINT32;
        const U8: vk::ComponentTypeKHR = vk::ComponentTypeKHR::UINT8;
        let usable = configuration([16, 16, 32], [I8, I8, I32]);
        let short = configuration([16; 3], [I8, I8, I32]);
        assert_eq!(i8_matrices(true, std::slice::from_ref(&short)), Ok(16));
        assert_eq!(i8_matrices(true, &[short, usable.clone()]), Ok(32));
        let mut workgroup = usable.clone();
        workgroup.subgroup = false;
        for (int8, list, part) in [
            (false, vec![usable], "shaderInt8"),
            (true, vec![], "no cooperative configuration"),
            (true, vec![configuration([16, 16, 32], [U8, U8, I32])], "no cooperative"),
            (true, vec![configuration([16, 8, 32], [I8, I8, I32])], "lists 16x8x32 i8·i8→i32"),
            (true, vec![workgroup], "lists 16x16x32"),
        ] {
            let reason = i8_matrices(int8, &list).unwrap_err();
            assert!(reason.contains(part), "{reason}");
        }
    }

    #[test]
    fn fp8_needs_the_features_and_a_configuration() {
        let all = Float8Features::new(true, true);
        let usable = configuration([16, 16, 32], [E4M3, E4M3, F32]);
        let short = configuration([16; 3], [E4M3, E4M3, F32]);
        assert_eq!(e4m3_matrices(Some(&all), std::slice::from_ref(&usable)), Ok(32));
        assert_eq!(e4m3_matrices(Some(&all), std::slice::from_ref(&short)), Ok(16));
        assert_eq!(e4m3_matrices(Some(&all), &[short, usable.clone()]), Ok(32));

        let says = |features: Option<Float8Features>, list: &[Configuration], part: &str| {
            let reason = e4m3_matrices(features.as_ref(), list).unwrap_err();
            assert!(reason.contains(part), "{reason:?} lacks {part:?}");
        };
        says(None, std::slice::from_ref(&usable), "no VK_EXT_shader_float8");
        for (types, matrices) in [(true, false), (false, true), (false, false)] {
            let features = Float8Features::new(types, matrices);
            says(
                Some(features),
                std::slice::from_ref(&usable),
                "shaderFloat8CooperativeMatrix is not",
            );
        }
        let has = || Some(Float8Features::new(true, true));
        says(has(), &[], "no cooperative configuration uses FP8");
        says(
            has(),
            &[configuration([16; 3], [F16, F16, F32])],
            "no cooperative configuration uses",
        );
        // All that is listed, and unusable.
        let workgroup = Configuration { subgroup: false, ..usable.clone() };
        let mut sums = usable.clone();
        sums.types[2] = F16;
        for (wrong, text) in [
            (configuration([16, 8, 32], [E4M3, E4M3, F32]), "16x8x32 e4m3·e4m3→f32"),
            (configuration([16, 16, 64], [E4M3, E4M3, F32]), "16x16x64 e4m3·e4m3→f32"),
            (configuration([16, 16, 32], [E5M2, E4M3, F32]), "16x16x32 e5m2·e4m3→f32"),
            (configuration([16, 16, 32], [E4M3, E5M2, F32]), "16x16x32 e4m3·e5m2→f32"),
            (configuration([16, 16, 32], [E4M3, E4M3, F16]), "16x16x32 e4m3·e4m3→f16"),
            (sums, "16x16x32 e4m3·e4m3→f32"),
            (workgroup, "of a subgroup is needed"),
        ] {
            says(has(), &[wrong], text);
        }
    }

    #[test]
    fn conversions_need_float4() {
        let of = |types| e2m1_conversion(Some(&OcpFeatures::new(types)));
        let all = of([true; 4]).unwrap();
        assert!(
            all.starts_with("shaderFloat4, shaderFloat6, shaderFloat8UnsignedE8M0, shaderMXInt8:")
        );
        assert!(of([true, false, false, false]).unwrap().starts_with("shaderFloat4: "));
        let says = |features: Option<OcpFeatures>, part: &str| {
            let reason = e2m1_conversion(features.as_ref()).unwrap_err();
            assert!(reason.ends_with(part), "{reason:?}");
        };
        says(None, "the driver has no VK_EXT_shader_ocp_microscaling_types");
        says(Some(OcpFeatures::new([false; 4])), "shaderFloat4 is not");
        says(
            Some(OcpFeatures::new([false, true, false, true])),
            "shaderFloat4 is not, but shaderFloat6, shaderMXInt8",
        );
        // As the driver lays it out: the type, the chain, four words.
        assert_eq!(std::mem::offset_of!(OcpFeatures, types), 2 * size_of::<usize>());
        assert_eq!(size_of::<OcpFeatures>(), 2 * size_of::<usize>() + 16);
    }

    #[test]
    fn component_types_have_names() {
        let names = |raw| component(vk::ComponentTypeKHR::from_raw(raw));
        assert_eq!(names(1_000_672_002), "e2m1");
        assert_eq!(names(1_000_672_004), "mxint8");
        for raw in [1_000_672_005, 1_000_671_999, i32::MIN] {
            assert_eq!(names(raw), format!("a component type newer than this probe ({raw})"));
        }
    }
}
