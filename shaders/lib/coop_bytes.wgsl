// What lib/coop_f32.wgsl does, with operands of eight bits: src/engine/spirv.rs makes A and B E4M3 or I8, FRAGMENT_K long, and
// sums of I8 i32, which become f32 here. Sums leave with the bytes' factors taken out, exactly: then they are what f16 gives.

fn strip_fragments(sums: ptr<function, Sums>, i: u32, subgroup_m: u32, b_row: u32, lane: u32) {
    for (var j = 0u; j < FN; j++) { // unroll
        let at = own_slice * STRIP_VECTORS + (subgroup_m * FRAGMENT * BN + b_row + j * FRAGMENT) / LANES;
        let stride = BN / LANES;
        let fragment = (*sums)[i * FN + j] * BYTES_UNIT;
        coopStoreT(fragment, &memory[at], stride);
    }
}
