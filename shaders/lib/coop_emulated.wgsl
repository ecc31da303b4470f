// What lib/coop_f32.wgsl does, without cooperative matrices: each of a subgroup's 32 invocations keeps FRAGMENT² / 32
// elements of every fragment. For tests of the tensor tier's arithmetic where the device has no such matrices; slow.

var<workgroup> memory: array<vec4<u32>, SLICES * max(TILE_UNITS, STRIP_VECTORS)>;

fn tile_put(unit: u32, h: vec4<u32>) { memory[own_slice * TILE_UNITS + unit] = h; }
fn strip_get(i: u32) -> f32 { return bitcast<f32>(memory[i / 4u][i % 4u]); }

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

fn half_at(row: u32, k: u32) -> f32 {
    let pair = unpack2x16float(memory[own_slice * TILE_UNITS + row * PITCH + k / 8u][(k % 8u) / 2u]);
    return select(pair.x, pair.y, k % 2u == 1u);
}

fn multiply(sums: ptr<function, Sums>, a_row: u32, b_row: u32) {
    for (var i = 0u; i < FM; i++) {
        for (var j = 0u; j < FN; j++) {
            for (var e = 0u; e < OWN; e++) {
                let at = own_lane * OWN + e;
                var sum = (*sums)[(i * FN + j) * OWN + e];
                for (var k = 0u; k < 32u; k++) {
                    sum = fma(half_at(a_row + i * SUBGROUPS_M * FRAGMENT + at / FRAGMENT, k),
                              half_at(BM + b_row + j * FRAGMENT + at % FRAGMENT, k), sum);
                }
                (*sums)[(i * FN + j) * OWN + e] = sum;
            }
        }
    }
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
