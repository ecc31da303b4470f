// How a kernel numbers its invocations, where they exchange values through workgroup memory or not at all.
struct Invocation {
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(num_workgroups) wgs: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
}

fn invocation_lane(in: Invocation) -> u32 { return in.local; }
