// How a kernel numbers its invocations, where they exchange values through subgroups.
struct Invocation {
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) wgs: vec3<u32>,
    @builtin(subgroup_size) subgroup_size: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) invocation: u32,
}

// WGSL does not promise that local_invocation_index numbers a subgroup's invocations consecutively.
fn invocation_lane(in: Invocation) -> u32 { return in.subgroup * in.subgroup_size + in.invocation; }
