// The tensor tier's loader for any operand: eight positions of k at a time, straight from the bindings. `op_` as in
// lib/operand.wgsl.

alias op_Unit = u32;

fn op_open(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32) { }

fn op_fetch(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32) { }

fn op_stage(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32, part: u32, j: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        let r = r0 + u * ROW_STEP;
        tile_put((OP_ROW0 + r) * PITCH + part, op_halves8(min(row0 + r, limit), k + part * 32u + j * 8u));
    }
}
