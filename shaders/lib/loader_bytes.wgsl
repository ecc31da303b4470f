// The tensor tier's loader for FP8 lines of whole 128 positions: 16 codes at a time, one load of 16 bytes two stages ahead.
// `op_` as in lib/operand.wgsl, the interface in lib/loader_eight.wgsl; needs lib/operand_halves.wgsl. PAIRS: the order
// within four may be 0, 2, 1, 3, since the other operand has it too.

struct op_Unit { codes: vec4<u32>, next: vec4<u32>, scale: u32, anchor: u32, factor: vec2<f16>, h: vec4<u32> }

fn op_sixteen(i: u32, k: u32) -> vec4<u32> {
    if (GROUPED_K && k >= k_end()) { return vec4<u32>(); }
    return op_codes[(op_i0 + i) * (p.op_pitch / 4u) + k / 16u];
}

fn op_ahead(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        let i = op_within(row0 + r0 + u * ROW_STEP, limit);
        (*units)[u].next = op_sixteen(i, k + lane_part() * 32u);
        if (OP_SCALE_WORDS) {
            // A word has the scales of the chunk's four blocks.
            (*units)[u].scale = op_scales[(op_i0 + i) / OP_LINES * (p.op_blocks / 4u) + k / 128u];
        } else {
            (*units)[u].scale = op_scale(i, k + lane_part() * 32u);
        }
    }
}

fn op_load(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32, next: u32, j: u32) {
    if (j == 0u) {
        for (var u = 0u; u < OP_UNITS; u++) { // unroll
            let i = op_within(row0 + r0 + u * ROW_STEP, limit);
            (*units)[u].next = op_sixteen(i, k + lane_part() * 32u + 16u);
        }
    }
    if (j == 2u) { op_ahead(units, row0, limit, r0, next); }
}

// Codes 0 and 2 of a word as two f16, times the factor. E4M3's NaN has no infinity's bits.
fn op_byte_pair(w: u32, factor: vec2<f16>) -> u32 {
    let bits = ((w << 8u) & 0x80008000u) | ((w << OP_MAGNITUDE_SHIFT) & OP_MAGNITUDES);
    return op_scaled(half2(bits), factor);
}

fn op_four(w: u32, factor: vec2<f16>) -> vec2<u32> {
    var h = vec2<u32>(op_byte_pair(w, factor), op_byte_pair(w >> 8u, factor));
    let nan = ((w & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
    if (!OP_E5M2 && nan != 0u) {
        // Rare: the quantizers never write one.
        let masks = vec2<u32>(((nan >> 7u) & 0x00010001u) * 0xffffu, ((nan >> 15u) & 0x00010001u) * 0xffffu);
        h = (h & ~masks) | (vec2<u32>(0x7e007e00u) & masks);
    }
    if (PAIRS) { return h; }
    return vec2<u32>((h.x & 0xffffu) | (h.y << 16u), (h.x >> 16u) | (h.y & 0xffff0000u));
}

fn op_decode(units: ptr<function, array<op_Unit, OP_UNITS>>, j: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        if (j == 0u) {
            var scale = (*units)[u].scale;
            if (OP_SCALE_WORDS) { scale = (scale >> (8u * lane_part())) & 0xffu; }
            (*units)[u].factor = op_half_factor(scale, (*units)[u].anchor);
        }
        if (j % 2u == 0u) { (*units)[u].codes = (*units)[u].next; }
        let f = (*units)[u].factor;
        (*units)[u].h = vec4<u32>(op_four((*units)[u].codes[2u * (j % 2u)], f), op_four((*units)[u].codes[2u * (j % 2u) + 1u], f));
    }
}

fn op_put(units: ptr<function, array<op_Unit, OP_UNITS>>, r0: u32, j: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        tile_put((OP_ROW0 + r0 + u * ROW_STEP) * PITCH + lane_part(), (*units)[u].h);
    }
}
