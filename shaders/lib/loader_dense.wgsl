// The tensor tier's loader for a dense operand of 16 bits. `op_` as in lib/operand_dense.wgsl, the interface in
// lib/loader_eight.wgsl; needs op_eight.

alias op_Unit = vec4<u32>;

fn op_open(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32) { }

fn op_ahead(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        let i = op_within(row0 + r0 + u * ROW_STEP, limit);
        (*units)[u] = op_eight(i, k + lane_part() * 32u);
    }
}

fn op_load(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32, next: u32, j: u32) {
    op_ahead(units, row0, limit, r0, select(k + (j + 1u) * 8u, next, j == 3u));
}

fn op_decode(units: ptr<function, array<op_Unit, OP_UNITS>>, j: u32) { }

fn op_put(units: ptr<function, array<op_Unit, OP_UNITS>>, r0: u32, j: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        tile_put((OP_ROW0 + r0 + u * ROW_STEP) * PITCH + lane_part(), (*units)[u]);
    }
}
