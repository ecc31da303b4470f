// The tensor tier's loader for a dense operand of 16 bits that is contracted over its rows, whole 128 of them: its tile is
// kept as it lies, k by k, and the fragments are loaded the other way round. `op_` as in lib/operand_dense.wgsl, the
// interface in lib/loader_eight.wgsl. Outputs come by eights.

alias op_Unit = vec4<u32>;

const OP_EIGHTS = OP_SIDE / 8u;

fn op_open(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32) { }

fn op_ahead(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        let e = own_thread + u * (WG / SLICES);
        let i = min(row0 + e % OP_EIGHTS * 8u, limit - 7u);
        let at = e / OP_EIGHTS;
        let position = k + at / 8u * 32u + at % 8u;
        if (GROUPED_K && position >= k_end()) {
            (*units)[u] = vec4<u32>();
        } else {
            (*units)[u] = op_codes[((op_k0 + position) * p.op_pitch + op_i0 + i) / 8u];
        }
    }
}

fn op_load(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32, k: u32, next: u32, j: u32) {
    op_ahead(units, row0, limit, r0, select(k + (j + 1u) * 8u, next, j == 3u));
}

fn op_decode(units: ptr<function, array<op_Unit, OP_UNITS>>, j: u32) { }

fn op_put(units: ptr<function, array<op_Unit, OP_UNITS>>, r0: u32, j: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        let e = own_thread + u * (WG / SLICES);
        tile_put(OP_ROW0 * PITCH + e / OP_EIGHTS * (OP_EIGHTS + 1u) + e % OP_EIGHTS, (*units)[u]);
    }
}
