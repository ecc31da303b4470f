// The tensor tier's loader for E2M1 lines of whole 128 positions (RAGGED: of whole 32): an invocation loads its rows' 32 codes at once, one load
// of 16 bytes a whole chunk ahead, and decodes a word of them a stage. `op_` as in lib/operand.wgsl, the interface in
// lib/loader_eight.wgsl; needs lib/nibbles_*.wgsl. PAIRS: the order within eight may be 0, 4, 1, 5, 2, 6, 3, 7, since the
// other operand has it too.

struct op_Unit { codes: vec4<u32>, next: vec4<u32>, scale: u32, anchor: u32, factor: op_Factor, h: vec4<u32> }

fn op_ahead(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        let i = op_within(row0 + r0 + u * ROW_STEP, limit);
        if ((GROUPED_K || RAGGED) && k + lane_part() * 32u >= k_end()) {
            (*units)[u].next = vec4<u32>();
        } else {
            (*units)[u].next = op_codes[(op_i0 + i) * (p.op_pitch / 4u) + k / 32u + lane_part()];
        }
        if (OP_SCALE_WORDS && !RAGGED) {
            // A word has the scales of the chunk's four blocks.
            (*units)[u].scale = op_scales[(op_i0 + i) / OP_LINES * (p.op_blocks / 4u) + k / 128u];
        } else {
            (*units)[u].scale = op_scale(i, k + lane_part() * 32u);
        }
    }
}

fn op_load(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32, next: u32, j: u32) {
    if (j == 0u) { op_ahead(units, row0, limit, r0, next); }
}

fn op_decode(units: ptr<function, array<op_Unit, OP_UNITS>>, j: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        if (j == 0u) {
            var scale = (*units)[u].scale;
            if (OP_SCALE_WORDS && !RAGGED) { scale = (scale >> (8u * lane_part())) & 0xffu; }
            (*units)[u].codes = (*units)[u].next;
            (*units)[u].factor = op_block_factor(scale, (*units)[u].anchor);
        }
        (*units)[u].h = op_eight((*units)[u].codes[j], (*units)[u].factor);
    }
}

fn op_put(units: ptr<function, array<op_Unit, OP_UNITS>>, r0: u32, j: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        tile_put((OP_ROW0 + r0 + u * ROW_STEP) * PITCH + lane_part(), (*units)[u].h);
    }
}
