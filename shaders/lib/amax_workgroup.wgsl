// The largest value among the LANES invocations of a block, by workgroup memory: for adapters without
// subgroups, or with subgroups smaller than a block. Same result as lib/amax_subgroup.wgsl.

var<workgroup> wg_amax: array<atomic<u32>, WG_BLOCKS>;

fn block_amax(own: u32, lane: u32) -> u32 {
    if (LANES == 1u) { return own; }
    if (lane < WG_BLOCKS) { atomicStore(&wg_amax[lane], 0u); }
    workgroupBarrier();
    atomicMax(&wg_amax[lane / LANES], own);
    workgroupBarrier();
    return atomicLoad(&wg_amax[lane / LANES]);
}
