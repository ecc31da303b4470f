//! Opening a Vulkan device with what wgpu does not ask for: bfloat16 and E4M3 cooperative matrices
//! (VK_KHR_shader_bfloat16, VK_EXT_shader_float8), conversions of E2M1 (VK_EXT_shader_ocp_microscaling_types), and semaphores
//! that other APIs can wait for (VK_KHR_external_semaphore_fd).

use std::ffi::{CStr, c_void};

use ash::vk;

use super::caps::vulkan::{
    BFLOAT16, FLOAT8, Float8Features, OCP, OcpFeatures, byte_matrices_of, configurations,
    e2m1_conversion_of,
};
use crate::kernels::matmul::{Byte, ByteMatrices};
use crate::{Error, Result};

const EXTENSION: &CStr = c"VK_KHR_shader_bfloat16";

/// VkPhysicalDeviceShaderBfloat16FeaturesKHR, which ash 0.38 does not have yet.
#[repr(C)]
struct Bfloat16Features {
    s_type: vk::StructureType,
    p_next: *mut c_void,
    types: vk::Bool32,
    dot_product: vk::Bool32,
    cooperative_matrix: vk::Bool32,
}

impl Bfloat16Features {
    fn new() -> Bfloat16Features {
        Bfloat16Features {
            s_type: vk::StructureType::from_raw(1_000_141_000),
            p_next: std::ptr::null_mut(),
            types: vk::FALSE,
            dot_product: vk::FALSE,
            cooperative_matrix: vk::FALSE,
        }
    }
}

/// Whether the adapter multiplies cooperative matrices of 16×16×16, bf16 to f32.
pub(crate) fn bf16_matrices(adapter: &wgpu::Adapter) -> bool {
    // SAFETY: the adapter handle is only used within this function, while `adapter` is alive.
    let Some(hal) = (unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }) else { return false };
    let instance = hal.shared_instance().raw_instance();
    let device = hal.raw_physical_device();
    // SAFETY: `device` belongs to `instance`, both alive as long as `hal`.
    let extensions =
        unsafe { instance.enumerate_device_extension_properties(device) }.unwrap_or_default();
    let has = |name: &CStr| {
        extensions.iter().any(|e| e.extension_name_as_c_str().is_ok_and(|found| found == name))
    };
    if !has(EXTENSION) || !has(ash::khr::cooperative_matrix::NAME) {
        return false;
    }
    let mut bf16 = Bfloat16Features::new();
    let mut features =
        vk::PhysicalDeviceFeatures2 { p_next: (&raw mut bf16).cast(), ..Default::default() };
    // SAFETY: as above; the chained structure is the extension's, which the device has.
    unsafe { instance.get_physical_device_features2(device, &mut features) };
    bf16.types == vk::TRUE
        && bf16.cooperative_matrix == vk::TRUE
        && configurations(hal.shared_instance().entry(), instance, device).is_some_and(|list| {
            list.iter().any(|c| {
                let [a, b, sums @ ..] = c.types;
                c.subgroup
                    && c.size == [16; 3]
                    && [a.as_raw(), b.as_raw()] == [BFLOAT16; 2]
                    && sums == [vk::ComponentTypeKHR::FLOAT32; 2]
            })
        })
}

/// What a device is opened with besides what wgpu asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extras {
    pub(crate) bf16: bool,
    /// Products in bytes. Of integers they need nothing: wgpu enables shaderInt8 where it is.
    pub(crate) bytes: Option<ByteMatrices>,
    /// Conversions of E2M1 to f16, of VK_EXT_shader_ocp_microscaling_types.
    pub(crate) ocp: bool,
    pub(crate) external_semaphores: bool,
}

impl Extras {
    /// What the adapter has of it and the features can use.
    pub(crate) fn of(adapter: &wgpu::Adapter, features: wgpu::Features) -> Extras {
        let matrices =
            wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::PASSTHROUGH_SHADERS;
        Extras {
            bf16: features.contains(matrices) && bf16_matrices(adapter),
            bytes: if features.contains(matrices) { byte_matrices_of(adapter) } else { None },
            ocp: features.contains(matrices) && e2m1_conversion_of(adapter).is_some(),
            external_semaphores: features.contains(wgpu::Features::VULKAN_EXTERNAL_MEMORY_FD)
                && has_extension(adapter, ash::khr::external_semaphore_fd::NAME),
        }
    }
}

fn has_extension(adapter: &wgpu::Adapter, name: &CStr) -> bool {
    // SAFETY: the adapter handle is only used within this function, while `adapter` is alive.
    let Some(hal) = (unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }) else { return false };
    hal.physical_device_capabilities().supports_extension(name)
}

/// `adapter.request_device`, with `extras` besides.
pub(crate) fn open(
    adapter: &wgpu::Adapter,
    descriptor: &wgpu::DeviceDescriptor<'_>,
    extras: Extras,
) -> Result<(wgpu::Device, wgpu::Queue)> {
    let failed =
        |error: String| Error::Gpu(format!("opening {}: {error}", adapter.get_info().name));
    // SAFETY: the handle is used only to make the device, while `adapter` is alive.
    let Some(hal) = (unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }) else {
        return Err(failed("not a Vulkan adapter".into()));
    };
    let mut bf16 = Bfloat16Features::new();
    bf16.types = vk::TRUE;
    bf16.cooperative_matrix = vk::TRUE;
    let bf16 = &raw mut bf16;
    let mut fp8 = Float8Features::new(true, true);
    let fp8 = &raw mut fp8;
    let mut ocp = if extras.ocp { e2m1_conversion_of(adapter) } else { None };
    let ocp = ocp.as_mut().map(|ocp| ocp as *mut OcpFeatures);
    // SAFETY: the extensions and their features are there (Extras::of); the structures live until the device is made, and
    // are put before what is in the chain already.
    let device = unsafe {
        hal.open_with_callback(
            descriptor.required_features,
            &descriptor.required_limits,
            &descriptor.memory_hints,
            Some(Box::new(move |args| {
                if extras.external_semaphores {
                    args.extensions.push(ash::khr::external_semaphore_fd::NAME);
                }
                if extras.bf16 {
                    args.extensions.push(EXTENSION);
                    (*bf16).p_next = args.create_info.p_next.cast_mut();
                    args.create_info.p_next = bf16.cast_const().cast();
                }
                if extras.bytes.is_some_and(|matrices| matrices.byte == Byte::E4m3) {
                    args.extensions.push(FLOAT8);
                    (*fp8).p_next = args.create_info.p_next.cast_mut();
                    args.create_info.p_next = fp8.cast_const().cast();
                }
                if let Some(ocp) = ocp {
                    args.extensions.push(OCP);
                    (*ocp).p_next = args.create_info.p_next.cast_mut();
                    args.create_info.p_next = ocp.cast_const().cast();
                }
            })),
        )
    }
    .map_err(|error| failed(error.to_string()))?;
    // SAFETY: the device is this adapter's, opened with these features and limits.
    unsafe { adapter.create_device_from_hal(device, descriptor) }
        .map_err(|error| failed(error.to_string()))
}

/// The device's UUID, which other APIs know it by.
#[cfg(any(feature = "cuda", feature = "hip"))]
pub(crate) fn uuid(device: &wgpu::Device) -> Option<[u8; 16]> {
    // SAFETY: the handles are only used within this function, while `device` is alive.
    let hal = unsafe { device.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let mut id = vk::PhysicalDeviceIDProperties::default();
    let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut id);
    // SAFETY: as above; the chained structure is of Vulkan 1.1, which wgpu asks for where it is there.
    unsafe {
        let instance = hal.shared_instance().raw_instance();
        instance.get_physical_device_properties2(hal.raw_physical_device(), &mut properties);
    }
    Some(id.device_uuid)
}
