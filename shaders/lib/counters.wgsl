// Counts of the kernel's sides, a vector each, added up in the workgroup before they go to memory. Needs the binding
// counters. Same interface as lib/counters_none.wgsl.

const COUNT = true;

var<workgroup> wg_counters: array<atomic<u32>, 8>;

fn counters_clear(lane: u32) { if (lane < 8u) { atomicStore(&wg_counters[lane], 0u); } }

fn counters_add(side: u32, n: vec4<u32>) {
    if (n.x != 0u) { atomicAdd(&wg_counters[4u * side], n.x); }
    if (n.y != 0u) { atomicAdd(&wg_counters[4u * side + 1u], n.y); }
    if (n.z != 0u) { atomicAdd(&wg_counters[4u * side + 2u], n.z); }
    if (n.w != 0u) { atomicAdd(&wg_counters[4u * side + 3u], n.w); }
}

fn counters_flush(lane: u32) {
    workgroupBarrier();
    if (lane < 8u) {
        let n = atomicLoad(&wg_counters[lane]);
        if (n != 0u) { atomicAdd(&counters[lane], n); }
    }
}
