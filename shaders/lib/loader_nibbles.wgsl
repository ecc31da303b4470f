// The tensor tier's loader for E2M1 lines of whole 128 positions: an invocation fetches its rows' 32 codes at once and ahead
// of time, one load of 16 bytes, and decodes a word of them a stage. `op_` as in lib/operand.wgsl; PAIRS: the order within
// eight may be 0, 4, 1, 5, 2, 6, 3, 7, since the other operand has it too.

struct op_Unit { codes: vec4<u32>, factor: vec2<f16> }

fn op_fetch(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32) {
    for (var u = 0u; u < OP_UNITS; u++) {
        let i = min(row0 + r0 + u * ROW_STEP, limit);
        let part = lane_part();
        (*units)[u].codes = op_codes[(op_i0 + i) * (p.op_pitch / 4u) + k / 32u + part];
        (*units)[u].factor = op_half_factor(op_scale(i, min(k + part * 32u, p.k - 1u)), op_anchor(i));
    }
}

// Nibbles s and s + 4 of a word, s = 3 - shift/4, as f16 bits times 2^-14.
fn op_pair_at(w: u32, shift: u32) -> u32 {
    let magnitudes = select(w >> 3u, w << (max(shift, 3u) - 3u), shift >= 3u);
    return ((w << shift) & 0x80008000u) | (magnitudes & 0x0e000e00u);
}

fn op_stage(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32, part: u32, j: u32) {
    for (var u = 0u; u < OP_UNITS; u++) {
        let w = (*units)[u].codes[j];
        let f = (*units)[u].factor;
        var h = vec4<u32>(op_scaled(half2(op_pair_at(w, 12u)), f), op_scaled(half2(op_pair_at(w, 8u)), f),
                          op_scaled(half2(op_pair_at(w, 4u)), f), op_scaled(half2(op_pair_at(w, 0u)), f));
        if (!PAIRS) {
            h = vec4<u32>((h.x & 0xffffu) | (h.y << 16u), (h.z & 0xffffu) | (h.w << 16u),
                          (h.x >> 16u) | (h.y & 0xffff0000u), (h.z >> 16u) | (h.w & 0xffff0000u));
        }
        tile_put((OP_ROW0 + r0 + u * ROW_STEP) * PITCH + part, h);
    }
}
