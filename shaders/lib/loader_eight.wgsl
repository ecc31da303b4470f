// The tensor tier's loader for any MX operand: eight codes at a time, loaded one stage ahead. `op_` as in lib/operand.wgsl;
// needs lib/operand_eight.wgsl. The interface of all loaders:
//   open     once
//   ahead    what stage 0 of the chunk at k needs
//   load     before stage j of the chunk at k is multiplied: what comes after it, the next chunk being at `next`
//   decode   after that: stage j's values
//   put      these to workgroup memory, where the fragments of lib/coop_*.wgsl expect them

// In the exact tier stage j is the chunk's block j, of which a part holds eight positions, and h are integers.

struct op_Unit { raw: vec2<u32>, scale: u32, anchor: u32, h: vec4<u32> }

const OP_PART = select(32u, 8u, EXACT);
const OP_STAGE = 40u - OP_PART;

fn op_ahead(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        let i = op_within(row0 + r0 + u * ROW_STEP, limit);
        let at = k + lane_part() * OP_PART;
        (*units)[u].raw = op_raw8(i, at);
        (*units)[u].scale = op_scale(i, at);
    }
}

fn op_load(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32, next: u32, j: u32) {
    op_ahead(units, row0, limit, r0, select(k + (j + 1u) * OP_STAGE, next, j == STAGES - 1u));
}

fn op_decode(units: ptr<function, array<op_Unit, OP_UNITS>>, j: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        (*units)[u].h = op_decode8((*units)[u].raw, (*units)[u].scale, (*units)[u].anchor);
    }
}

fn op_put(units: ptr<function, array<op_Unit, OP_UNITS>>, r0: u32, j: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        let row = OP_ROW0 + r0 + u * ROW_STEP;
        tile_put(row * PITCH + lane_part(), (*units)[u].h);
        // A segment's first part brings its factor.
        if (EXACT && lane_part() % (4u / SEGMENTS) == 0u) {
            factor_put(j, lane_part() / (4u / SEGMENTS), row, op_exact_factor((*units)[u].scale, (*units)[u].anchor));
        }
    }
}
