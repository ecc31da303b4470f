// Cooperative matrices over the memory of lib/units_f16.wgsl: plain WGSL, as naga has it.

fn factor_put(slot: u32, segment: u32, row: u32, factor: f32) {}

fn stage_barrier() { workgroupBarrier(); }

fn multiply(sums: ptr<function, Sums>, a_row: u32, b_row: u32, stage: u32) {
    for (var s = 0u; s < 32u / FRAGMENT; s++) { // unroll
        var b: array<MatB, FN>;
        for (var j = 0u; j < FN; j++) { // unroll
            let at = b_fragment(b_row + j * FRAGMENT, s);
            if (B_COLUMNS) { b[j] = coopLoadT<MatB>(&tiles[2u * at], 2u * B_PITCH); } else { b[j] = coopLoad<MatB>(&tiles[2u * at], 2u * PITCH); }
        }
        for (var i = 0u; i < FM; i++) { // unroll
            let at = a_fragment(a_row + i * SUBGROUPS_M * FRAGMENT, s);
            var a: MatA;
            if (A_COLUMNS) { a = coopLoad<MatA>(&tiles[2u * at], 2u * A_PITCH); } else { a = coopLoadT<MatA>(&tiles[2u * at], 2u * PITCH); }
            for (var j = 0u; j < FN; j++) { // unroll
                (*sums)[i * FN + j] = coopMultiplyAdd(a, b[j], (*sums)[i * FN + j]);
            }
        }
    }
}

// Row i of the subgroup's fragments to the strip.
fn strip_fragments(sums: ptr<function, Sums>, i: u32, subgroup_m: u32, b_row: u32, lane: u32) {
    for (var j = 0u; j < FN; j++) { // unroll
        let at = (subgroup_m * FRAGMENT * BN + b_row + j * FRAGMENT);
        let stride = BN;
        let fragment = (*sums)[i * FN + j];
        coopStoreT(fragment, &strip[at], stride);
    }
}
