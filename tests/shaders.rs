//! Every kernel in every variant, without a GPU: it validates, keeps within WebGPU's limits, its `Params` end where the
//! host's do, and translates to SPIR-V, MSL and HLSL.

use std::collections::HashSet;
use std::sync::Mutex;

use microscaling::engine::shader::{Binding, Kernel};
use microscaling::kernels;
use naga::valid::{Capabilities, ValidationFlags, Validator};

/// WebGPU's default limits.
const MAX_WORKGROUP_BYTES: u32 = 16384;
const MAX_INVOCATIONS: u32 = 256;

/// What the tensor tier's kernels may use: devices with cooperative matrices have more than WebGPU's default, and the
/// emulation is for tests.
const MAX_TENSOR_WORKGROUP_BYTES: u32 = 49152;

fn check(kernel: &Kernel) -> Result<(), String> {
    let tensor = kernel.features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
    let module = naga::front::wgsl::parse_str(&kernel.wgsl)
        .map_err(|error| error.emit_to_string(&kernel.wgsl))?;
    let mut capabilities = Capabilities::empty();
    if kernel.features.contains(wgpu::Features::SUBGROUP) {
        capabilities |= Capabilities::SUBGROUP;
    }
    if kernel.features.contains(wgpu::Features::SHADER_F16) {
        capabilities |= Capabilities::SHADER_FLOAT16 | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    }
    if tensor {
        capabilities |= Capabilities::COOPERATIVE_MATRIX;
    }
    if kernel.spirv {
        // Vulkan's core has barriers of subgroups.
        capabilities |= Capabilities::SUBGROUP | Capabilities::SUBGROUP_BARRIER;
    }
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
        .subgroup_operations(naga::valid::SubgroupOperationSet::all())
        .validate(&module)
        .map_err(|error| error.emit_to_string(&kernel.wgsl))?;

    let [entry] = &module.entry_points[..] else { return Err("more than one entry point".into()) };
    if entry.name != "main" || entry.workgroup_size != [kernel.workgroup_size, 1, 1] {
        return Err(format!("entry point {} {:?}", entry.name, entry.workgroup_size));
    }
    if entry.workgroup_size.iter().product::<u32>() > MAX_INVOCATIONS {
        return Err(format!("workgroup of {:?}", entry.workgroup_size));
    }
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).map_err(|error| error.to_string())?;
    let mut workgroup_bytes = 0;
    let mut bindings = vec![None; kernel.bindings.len()];
    for (_, variable) in module.global_variables.iter() {
        if variable.space == naga::AddressSpace::WorkGroup {
            workgroup_bytes += layouter[variable.ty].size;
        }
        if let Some(at) = variable.binding {
            let kind = match variable.space {
                naga::AddressSpace::Uniform => Binding::Params,
                naga::AddressSpace::Storage { access } => {
                    if access.contains(naga::StorageAccess::STORE) {
                        Binding::Write
                    } else {
                        Binding::Read
                    }
                }
                other => return Err(format!("binding in {other:?}")),
            };
            *bindings.get_mut(at.binding as usize).ok_or("a binding that is not listed")? =
                Some(kind);
        }
    }
    let limit = match tensor || kernel.name.contains("emulated") {
        true => MAX_TENSOR_WORKGROUP_BYTES,
        false => MAX_WORKGROUP_BYTES,
    };
    if workgroup_bytes > limit {
        return Err(format!("{workgroup_bytes} bytes of workgroup memory"));
    }
    for (listed, found) in kernel.bindings.iter().zip(bindings) {
        if found != Some(*listed) {
            return Err(format!("a binding is {found:?} in the shader, {listed:?} in the list"));
        }
    }

    if kernel.spirv {
        // Only a driver that takes SPIR-V ever sees it.
        return microscaling::engine::spirv::compile(&kernel.wgsl).map(|_| ());
    }
    use naga::back;
    back::spv::write_vec(
        &module,
        &info,
        &back::spv::Options { lang_version: (1, 3), ..Default::default() },
        None,
    )
    .map_err(|error| format!("SPIR-V: {error}"))?;
    let hlsl_lacks = tensor; // Direct3D has no cooperative matrices.
    let msl = back::msl::Options {
        lang_version: (2, 4),
        fake_missing_bindings: true,
        ..Default::default()
    };
    back::msl::write_string(&module, &info, &msl, &back::msl::PipelineOptions::default())
        .map_err(|error| format!("MSL: {error}"))?;
    if hlsl_lacks {
        return Ok(());
    }
    let mut text = String::new();
    let options = back::hlsl::Options {
        shader_model: if kernel.features.contains(wgpu::Features::SHADER_F16) {
            back::hlsl::ShaderModel::V6_2
        } else {
            back::hlsl::ShaderModel::V6_0
        },
        fake_missing_bindings: true,
        ..Default::default()
    };
    back::hlsl::Writer::new(&mut text, &options, &back::hlsl::PipelineOptions::default())
        .write(&module, &info, None)
        .map_err(|error| format!("HLSL: {error}"))?;
    Ok(())
}

#[test]
fn every_kernel_translates_and_keeps_the_limits() {
    let kernels = kernels::all();
    let mut names = HashSet::new();
    for kernel in &kernels {
        assert!(names.insert(&kernel.name), "{} is there twice", kernel.name);
    }
    let failures = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for t in 0..threads {
            let (kernels, failures) = (&kernels, &failures);
            scope.spawn(move || {
                for kernel in kernels.iter().skip(t).step_by(threads) {
                    if let Err(problem) = std::panic::catch_unwind(|| check(kernel))
                        .unwrap_or_else(|_| Err("naga panics".into()))
                    {
                        failures.lock().unwrap().push(format!("{}: {problem}", kernel.name));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(
        failures.is_empty(),
        "{} of {} kernels:\n{}",
        failures.len(),
        kernels.len(),
        failures[0]
    );
    println!("{} kernels", kernels.len());
}

#[test]
fn the_check_rejects_a_broken_kernel() {
    let mut kernel = kernels::all().swap_remove(0);
    check(&kernel).expect("sound");
    kernel.workgroup_size = 128;
    assert!(check(&kernel).is_err(), "a wrong workgroup size passes");
    let mut kernel = kernels::all().swap_remove(0);
    kernel.bindings.swap(0, 1);
    assert!(check(&kernel).is_err(), "wrong bindings pass");
    let mut kernel = kernels::all().swap_remove(0);
    kernel.wgsl +=
        "\nvar<workgroup> wg_large: array<u32, 5000>;\nfn large() -> u32 { return wg_large[0]; }";
    assert!(check(&kernel).is_err(), "too much workgroup memory passes");
}
