// What lib/coop_f32.wgsl does, without cooperative matrices: each of a subgroup's 32 invocations keeps FRAGMENT² / 32
// elements of every fragment. For tests of the tensor tier's arithmetic where the device has no such matrices; slow.

var<workgroup> memory: array<vec4<u32>, SLICES * max(TILE_UNITS, STRIP_VECTORS)>;

fn tile_put(unit: u32, h: vec4<u32>) { memory[own_slice * TILE_UNITS + unit] = h; }
fn strip_get(i: u32) -> f32 { return bitcast<f32>(memory[i / 4u][i % 4u]); }
fn strip_get4(i: u32) -> vec4<f32> { return bitcast<vec4<f32>>(memory[i / 4u]); }

// The slices' sums of this strip, put together.
fn strip_join(lane: u32) {
    for (var i = lane; i < STRIP_ROWS * BN; i += WG) {
        var sum = strip_get(i);
        for (var s = 1u; s < SLICES; s++) { sum += bitcast<f32>(memory[s * STRIP_VECTORS + i / 4u][i % 4u]); }
        strip_put(i, bitcast<u32>(sum));
    }
}

fn strip_put(i: u32, bits: u32) { memory[i / 4u][i % 4u] = bits; }

const OWN = FRAGMENT * FRAGMENT / 32u;

alias Sums = array<f32, FM * FN * OWN>;

fn sums_zero(sums: ptr<function, Sums>) {
    for (var f = 0u; f < FM * FN * OWN; f++) { (*sums)[f] = 0.0; }
}

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
            memory[own_slice * STRIP_VECTORS + place / 4u][place % 4u] = bitcast<u32>((*sums)[(i * FN + j) * OWN + e]);
        }
    }
}
