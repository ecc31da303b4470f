// A row of the outer matrix of lib/side.wgsl by subgroup shuffles: a butterfly's operands are two invocations'. PARTS is no larger
// than the smallest subgroup. Same result as lib/outer_workgroup.wgsl: the same operands are added, in the same order of strides.

fn outer_quad(line: u32, unit: u32, i: u32) -> Summands {
    var own = summands(line, unit, unit % PARTS, i);
    if (PARTS > 4u) { own.v = subgroupShuffleXor(own.v, 4u) + own.v * select(1.0, -1.0, (unit & 4u) != 0u); }
    if (PARTS > 2u) { own.v = subgroupShuffleXor(own.v, 2u) + own.v * select(1.0, -1.0, (unit & 2u) != 0u); }
    if (PARTS > 1u) { own.v = subgroupShuffleXor(own.v, 1u) + own.v * select(1.0, -1.0, (unit & 1u) != 0u); }
    return own;
}

// The largest of a group, of what its invocations have seen.
fn outer_largest(seen: u32) -> u32 {
    var largest = seen;
    if (PARTS > 1u) { largest = max(largest, subgroupShuffleXor(largest, 1u)); }
    if (PARTS > 2u) { largest = max(largest, subgroupShuffleXor(largest, 2u)); }
    if (PARTS > 4u) { largest = max(largest, subgroupShuffleXor(largest, 4u)); }
    return largest;
}
