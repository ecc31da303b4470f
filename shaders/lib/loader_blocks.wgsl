// The exact tier's loader for E2M1 lines of whole 128 positions: as lib/loader_nibbles.wgsl, but stage j is the chunk's block j,
// of which an invocation has a word; four neighbours have it all. The values are not scaled: block `lane_part()` of the chunk
// is the one whose factor an invocation makes.

struct op_Unit { codes: vec4<u32>, next: vec4<u32>, scale: u32, anchor: u32, factor: f32, h: vec4<u32> }

fn op_word(line: u32, k: u32) -> u32 {
    if (GROUPED_K && k >= k_end()) { return 0u; }
    return op_codes[line * p.op_pitch + k / 8u + lane_part()];
}

fn op_ahead(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        let i = op_within(row0 + r0 + u * ROW_STEP, limit);
        (*units)[u].next = vec4<u32>(op_word(op_i0 + i, k), op_word(op_i0 + i, k + 32u), op_word(op_i0 + i, k + 64u), op_word(op_i0 + i, k + 96u));
        if (OP_SCALE_WORDS) {
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
            if (OP_SCALE_WORDS) { scale = (scale >> (8u * lane_part())) & 0xffu; }
            (*units)[u].codes = (*units)[u].next;
            (*units)[u].factor = op_exact_factor(scale, (*units)[u].anchor);
        }
        let w = (*units)[u].codes[j];
        var h = vec4<u32>(nibble_pair(w, 12u), nibble_pair(w, 8u), nibble_pair(w, 4u), nibble_pair(w, 0u));
        if (!PAIRS) {
            h = vec4<u32>((h.x & 0xffffu) | (h.y << 16u), (h.z & 0xffffu) | (h.w << 16u),
                          (h.x >> 16u) | (h.y & 0xffff0000u), (h.z >> 16u) | (h.w & 0xffff0000u));
        }
        (*units)[u].h = h;
    }
}

fn op_put(units: ptr<function, array<op_Unit, OP_UNITS>>, r0: u32, j: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        let row = OP_ROW0 + r0 + u * ROW_STEP;
        tile_put(row * PITCH + lane_part(), (*units)[u].h);
        if (j == 0u) {
            for (var s = 0u; s < SEGMENTS; s++) { // unroll
                factor_put(lane_part(), s, row, (*units)[u].factor);
            }
        }
    }
}
