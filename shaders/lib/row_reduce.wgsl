// Sums and maxima over the LANES neighbouring invocations that share a row; pairwise, so in a fixed order. Every invocation
// of the workgroup calls, and every one gets its row's result.

var<workgroup> wg_lanes: array<f32, WG>;

fn row_sum(v: f32, lane: u32) -> f32 {
    // What an earlier call returned may still be being read.
    workgroupBarrier();
    wg_lanes[lane] = v;
    for (var step = LANES / 2u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (lane % LANES < step) { wg_lanes[lane] += wg_lanes[lane + step]; }
    }
    workgroupBarrier();
    return wg_lanes[lane / LANES * LANES];
}

fn row_max(v: f32, lane: u32) -> f32 {
    workgroupBarrier();
    wg_lanes[lane] = v;
    for (var step = LANES / 2u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (lane % LANES < step) { wg_lanes[lane] = max(wg_lanes[lane], wg_lanes[lane + step]); }
    }
    workgroupBarrier();
    return wg_lanes[lane / LANES * LANES];
}
