// The tensor tier's loader for E2M1 lines of whole 128 positions: an invocation fetches its rows' 32 codes at once and ahead
// of time, one load of 16 bytes, and decodes a word of them a stage. `op_` as in lib/operand.wgsl; needs lib/nibble_pair.wgsl. PAIRS: the order within
// eight may be 0, 4, 1, 5, 2, 6, 3, 7, since the other operand has it too.

struct op_Unit { codes: vec4<u32>, scale: u32, anchor: u32, factor: vec2<f16> }

// Once, before the first fetch.
fn op_open(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        (*units)[u].anchor = op_anchor(min(row0 + r0 + u * ROW_STEP, limit));
    }
}

fn op_fetch(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        let i = min(row0 + r0 + u * ROW_STEP, limit);
        let part = lane_part();
        (*units)[u].codes = vec4<u32>();
        if (!GROUPED_K || k + part * 32u < k_end()) { (*units)[u].codes = op_codes[(op_i0 + i) * (p.op_pitch / 4u) + k / 32u + part]; }
        (*units)[u].scale = op_scale(i, k + part * 32u);
    }
}

fn op_stage(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32, part: u32, j: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        let w = (*units)[u].codes[j];
        // Not sooner: the scale is on its way while the last chunk is multiplied.
        if (j == 0u) { (*units)[u].factor = op_half_factor((*units)[u].scale, (*units)[u].anchor); }
        let f = (*units)[u].factor;
        var h = vec4<u32>(op_scaled(half2(nibble_pair(w, 12u)), f), op_scaled(half2(nibble_pair(w, 8u)), f),
                          op_scaled(half2(nibble_pair(w, 4u)), f), op_scaled(half2(nibble_pair(w, 0u)), f));
        if (!PAIRS) {
            h = vec4<u32>((h.x & 0xffffu) | (h.y << 16u), (h.z & 0xffffu) | (h.w << 16u),
                          (h.x >> 16u) | (h.y & 0xffff0000u), (h.z >> 16u) | (h.w & 0xffff0000u));
        }
        tile_put((OP_ROW0 + r0 + u * ROW_STEP) * PITCH + part, h);
    }
}
