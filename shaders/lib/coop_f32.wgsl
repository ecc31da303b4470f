// Cooperative matrices over one workgroup memory, typed f32, which holds the operands' halves and then the sums. naga takes
// a matrix's component type from the pointer; src/engine/spirv.rs makes A and B f16 again.

var<workgroup> memory: array<vec4<f32>, max(TILE_UNITS, STRIP_ROWS * BN / 4u)>;

fn tile_put(unit: u32, h: vec4<u32>) { memory[unit] = bitcast<vec4<f32>>(h); }
fn strip_get(i: u32) -> f32 { return memory[i / 4u][i % 4u]; }
fn strip_put(i: u32, bits: u32) { memory[i / 4u][i % 4u] = bitcast<f32>(bits); }

alias Sums = array<MatC, FM * FN>;

fn sums_zero(sums: ptr<function, Sums>) {
    for (var f = 0u; f < FM * FN; f++) { (*sums)[f] = MatC(); }
}

fn multiply(sums: ptr<function, Sums>, a_row: u32, b_row: u32) {
    for (var s = 0u; s < 32u / FRAGMENT; s++) {
        var b: array<MatB, FN>;
        for (var j = 0u; j < FN; j++) { b[j] = coopLoad<MatB>(&memory[(BM + b_row + j * FRAGMENT) * PITCH + s * (FRAGMENT / 8u)], PITCH); }
        for (var i = 0u; i < FM; i++) {
            let a = coopLoadT<MatA>(&memory[(a_row + i * SUBGROUPS_M * FRAGMENT) * PITCH + s * (FRAGMENT / 8u)], PITCH);
            for (var j = 0u; j < FN; j++) { (*sums)[i * FN + j] = coopMultiplyAdd(a, b[j], (*sums)[i * FN + j]); }
        }
    }
}

// Row i of the subgroup's fragments to the strip.
fn strip_fragments(sums: ptr<function, Sums>, i: u32, subgroup_m: u32, b_row: u32, lane: u32) {
    for (var j = 0u; j < FN; j++) {
        let at = (subgroup_m * FRAGMENT * BN + b_row + j * FRAGMENT) / 4u;
        let stride = BN / 4u;
        coopStoreT((*sums)[i * FN + j], &memory[at], stride);
    }
}
