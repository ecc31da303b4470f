// What lib/coop_f32.wgsl does, without cooperative matrices. For tests of the tensor tier's arithmetic where the device has no
// such matrices; slow.

alias Sum = f32;

fn sum_of(a: Sum, b: Sum, sum: Sum) -> Sum { return fma(a, b, sum); }

// Element e of the row of units at `unit`.
fn half_at(unit: u32, e: u32) -> f32 {
    let word = memory[own_slice * TILE_UNITS + unit + e / 8u][(e % 8u) / 2u];
    if (BF16) { return bitcast<f32>(select(word << 16u, word & 0xffff0000u, e % 2u == 1u)); }
    let pair = unpack2x16float(word);
    return select(pair.x, pair.y, e % 2u == 1u);
}

fn a_at(row: u32, k: u32) -> f32 {
    if (A_COLUMNS) { return half_at(k * A_PITCH, row); }
    return half_at(row * PITCH, k);
}

fn b_at(row: u32, k: u32) -> f32 {
    if (B_COLUMNS) { return half_at(B_ROW0 * PITCH + k * B_PITCH, row); }
    return half_at((B_ROW0 + row) * PITCH, k);
}

fn strip_fragments(sums: ptr<function, Sums>, i: u32, subgroup_m: u32, b_row: u32, lane: u32) {
    for (var j = 0u; j < FN; j++) {
        for (var e = 0u; e < OWN; e++) {
            let at = own_lane * OWN + e;
            let place = (subgroup_m * FRAGMENT + at / FRAGMENT) * BN + b_row + j * FRAGMENT + at % FRAGMENT;
            memory[own_slice * STRIP_VECTORS + place / LANES][place % LANES] = bitcast<u32>((*sums)[(i * FN + j) * OWN + e]);
        }
    }
}
