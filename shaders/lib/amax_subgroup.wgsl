// The largest value among the LANES invocations of a block, by subgroup shuffles. LANES is a power of two
// no larger than the smallest subgroup, and `lane` numbers the invocations subgroup by subgroup.
// Same result as lib/amax_workgroup.wgsl: the maximum of integers.

fn block_amax(own: u32, lane: u32) -> u32 {
    var amax = own;
    if (LANES > 1u) { amax = max(amax, subgroupShuffleXor(amax, 1u)); }
    if (LANES > 2u) { amax = max(amax, subgroupShuffleXor(amax, 2u)); }
    if (LANES > 4u) { amax = max(amax, subgroupShuffleXor(amax, 4u)); }
    if (LANES > 8u) { amax = max(amax, subgroupShuffleXor(amax, 8u)); }
    return amax;
}
