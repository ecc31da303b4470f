// The tensor tier's loader for what shaders/bytes_pack.wgsl made: 16 positions at a time, one load of 16 bytes a stage ahead.
// `op_` as in lib/operand.wgsl, the interface in lib/loader_eight.wgsl.

struct op_Unit { next: vec4<u32>, h: vec4<u32> }

fn op_open(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32) {}

fn op_ahead(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        let i = op_within(row0 + r0 + u * ROW_STEP, limit);
        if (GROUPED_K && k + lane_part() * 16u >= k_end()) {
            (*units)[u].next = vec4<u32>();
        } else {
            (*units)[u].next = op_codes[(op_i0 + i) * ((p.k + 127u) / 128u * 8u) + k / 16u + lane_part()];
        }
    }
}

fn op_load(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32, next: u32, j: u32) {
    op_ahead(units, row0, limit, r0, select(k + 64u, next, j == STAGES - 1u));
}

fn op_decode(units: ptr<function, array<op_Unit, OP_UNITS>>, j: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        (*units)[u].h = (*units)[u].next;
    }
}

fn op_put(units: ptr<function, array<op_Unit, OP_UNITS>>, r0: u32, j: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        tile_put((OP_ROW0 + r0 + u * ROW_STEP) * PITCH + lane_part(), (*units)[u].h);
    }
}
