// What lib/coop_e4m3.wgsl does, without cooperative matrices: the same bytes in the same places, decoded by E4M3's definition.
// Otherwise as lib/coop_emulated.wgsl.

// A sign, four bits of exponent with bias 7, three of mantissa; S1111111 is NaN.
fn e4m3_value(byte: u32) -> f32 {
    let exponent = (byte >> 3u) & 15u;
    let fraction = f32(byte & 7u);
    if ((byte & 0x7fu) == 0x7fu) { return bitcast<f32>(F32_NAN); }
    let power = bitcast<f32>((max(exponent, 1u) + 120u - 3u) << 23u);
    let magnitude = select(fraction, fraction + 8.0, exponent > 0u) * power;
    return select(magnitude, -magnitude, (byte & 0x80u) != 0u);
}

// Byte e of the row of units at `unit`, as a fragment that is loaded from there has it.
fn e4m3_at(unit: u32, e: u32) -> f32 {
    let word = memory[own_slice * TILE_UNITS + unit + e / 8u][(e % 8u) / 4u];
    return e4m3_value((word >> (8u * (e % 4u))) & 0xffu);
}

// The place of the position that f16's fragments have at k: in this order the sums have their bits.
fn e4m3_place(k: u32) -> u32 { return (k & ~7u) | select(((k & 1u) << 2u) | ((k & 7u) >> 1u), ((k & 3u) << 1u) | ((k & 7u) >> 2u), PAIRS); }

fn a_at(row: u32, k: u32) -> f32 {
    let e = e4m3_place(k);
    return e4m3_at(a_fragment(row, e / FRAGMENT_K), e % FRAGMENT_K);
}

fn b_at(row: u32, k: u32) -> f32 {
    let e = e4m3_place(k);
    return e4m3_at(b_fragment(row, e / FRAGMENT_K), e % FRAGMENT_K);
}

fn strip_fragments(sums: ptr<function, Sums>, i: u32, subgroup_m: u32, b_row: u32, lane: u32) {
    for (var j = 0u; j < FN; j++) {
        for (var e = 0u; e < OWN; e++) {
            let at = own_lane * OWN + e;
            let place = (subgroup_m * FRAGMENT + at / FRAGMENT) * BN + b_row + j * FRAGMENT + at % FRAGMENT;
            memory[own_slice * STRIP_VECTORS + place / LANES][place % LANES] = bitcast<u32>((*sums)[(i * FN + j) * OWN + e] * E4M3_UNIT);
        }
    }
}
