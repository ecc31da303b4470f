// sort_count: how often each digit occurs in each chunk of CHUNK entries.
// Layout:   see lib/sort_entry.wgsl
// Numerics: exact
// Dispatch: a workgroup a chunk, spread over x and y
// Twin:     src/kernels/sort.rs

// The last one counts what is no entry, and is not looked at.
var<workgroup> wg_counts: array<atomic<u32>, NONE + 1u>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let chunk = wg.y * wgs.x + wg.x;
    atomicStore(&wg_counts[lane], 0u);
    workgroupBarrier();
    for (var at = lane; at < CHUNK; at += WG) { atomicAdd(&wg_counts[entry(chunk * CHUNK + at).digit], 1u); }
    workgroupBarrier();
    if (chunk < p.chunks) { counts[chunk * 256u + lane] = atomicLoad(&wg_counts[lane]); }
}
