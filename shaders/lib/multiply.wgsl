// A stage, by cooperative matrices.

fn multiply(sums: ptr<function, Sums>, a_row: u32, b_row: u32, stage: u32) {
    for (var s = 0u; s < 4u * PER_UNIT / FRAGMENT_K; s++) { // unroll
        var b: array<MatB, FN>;
        for (var j = 0u; j < FN; j++) { // unroll
            let at = own_slice * TILE_UNITS + b_fragment(b_row + j * FRAGMENT, s);
            if (B_COLUMNS) { b[j] = coopLoadT<MatB>(&memory[at], B_PITCH); } else { b[j] = coopLoad<MatB>(&memory[at], PITCH); }
        }
        for (var i = 0u; i < FM; i++) { // unroll
            let at = own_slice * TILE_UNITS + a_fragment(a_row + i * SUBGROUPS_M * FRAGMENT, s);
            var a: MatA;
            if (A_COLUMNS) { a = coopLoad<MatA>(&memory[at], A_PITCH); } else { a = coopLoadT<MatA>(&memory[at], PITCH); }
            for (var j = 0u; j < FN; j++) { // unroll
                (*sums)[i * FN + j] = coopMultiplyAdd(a, b[j], (*sums)[i * FN + j]);
            }
        }
    }
}

fn factor_put(slot: u32, segment: u32, row: u32, factor: f32) {}

// Between what is put and read of a slice's tile, which is one subgroup's where the slice has but one.
fn stage_barrier() {
    if (SUBGROUPS_M * SUBGROUPS_N == 1u) { subgroupBarrier(); } else { workgroupBarrier(); }
}
