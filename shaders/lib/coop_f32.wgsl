// Cooperative matrices over one workgroup memory, typed f32, which holds the operands' halves and then the sums.

// Row i of the subgroup's fragments to the strip.
fn strip_fragments(sums: ptr<function, Sums>, i: u32, subgroup_m: u32, b_row: u32, lane: u32) {
    for (var j = 0u; j < FN; j++) { // unroll
        let at = own_slice * STRIP_VECTORS + (subgroup_m * FRAGMENT * BN + b_row + j * FRAGMENT) / LANES;
        let stride = BN / LANES;
        let fragment = (*sums)[i * FN + j];
        coopStoreT(fragment, &memory[at], stride);
    }
}
