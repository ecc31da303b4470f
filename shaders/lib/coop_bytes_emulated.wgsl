// What lib/coop_bytes.wgsl does, without cooperative matrices: the same bytes in the same places, with lib/byte_*.wgsl.
// Otherwise as lib/coop_emulated.wgsl.

// Byte e of the row of units at `unit`, as a fragment that is loaded from there has it.
fn byte_at(unit: u32, e: u32) -> Sum {
    let word = memory[own_slice * TILE_UNITS + unit + e / 16u][(e % 16u) / 4u];
    return byte_value((word >> (8u * (e % 4u))) & 0xffu);
}

fn a_at(row: u32, k: u32) -> Sum { return byte_at(a_fragment(row, k / FRAGMENT_K), k % FRAGMENT_K); }
fn b_at(row: u32, k: u32) -> Sum { return byte_at(b_fragment(row, k / FRAGMENT_K), k % FRAGMENT_K); }

fn strip_fragments(sums: ptr<function, Sums>, i: u32, subgroup_m: u32, b_row: u32, lane: u32) {
    for (var j = 0u; j < FN; j++) {
        for (var e = 0u; e < OWN; e++) {
            let at = own_lane * OWN + e;
            let place = (subgroup_m * FRAGMENT + at / FRAGMENT) * BN + b_row + j * FRAGMENT + at % FRAGMENT;
            let sum = f32((*sums)[(i * FN + j) * OWN + e]) * BYTES_UNIT;
            memory[own_slice * STRIP_VECTORS + place / LANES][place % LANES] = bitcast<u32>(sum);
        }
    }
}
