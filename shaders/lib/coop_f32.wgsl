// Cooperative matrices over one workgroup memory, typed f32, which holds the operands' halves and then the sums. naga takes
// a matrix's component type from the pointer; src/engine/spirv.rs makes A and B f16 again.

var<workgroup> memory: array<vec4<f32>, SLICES * max(TILE_UNITS, STRIP_VECTORS)>;

fn tile_put(unit: u32, h: vec4<u32>) { memory[own_slice * TILE_UNITS + unit] = bitcast<vec4<f32>>(h); }
fn strip_get(i: u32) -> f32 { return memory[i / 4u][i % 4u]; }
fn strip_get4(i: u32) -> vec4<f32> { return memory[i / 4u]; }

// The slices' sums of this strip, put together.
fn strip_join(lane: u32) {
    for (var i = lane; i < STRIP_ROWS * BN; i += WG) {
        var sum = strip_get(i);
        for (var s = 1u; s < SLICES; s++) { sum += memory[s * STRIP_VECTORS + i / 4u][i % 4u]; }
        strip_put(i, bitcast<u32>(sum));
    }
}

fn strip_put(i: u32, bits: u32) { memory[i / 4u][i % 4u] = bitcast<f32>(bits); }

alias Sums = array<MatC, FM * FN>;

fn sums_zero(sums: ptr<function, Sums>) {
    for (var f = 0u; f < FM * FN; f++) { // unroll
        (*sums)[f] = MatC();
    }
}

// Row i of the subgroup's fragments to the strip.
fn strip_fragments(sums: ptr<function, Sums>, i: u32, subgroup_m: u32, b_row: u32, lane: u32) {
    for (var j = 0u; j < FN; j++) { // unroll
        let at = own_slice * STRIP_VECTORS + (subgroup_m * FRAGMENT * BN + b_row + j * FRAGMENT) / 4u;
        let stride = BN / 4u;
        let fragment = (*sums)[i * FN + j];
        coopStoreT(fragment, &memory[at], stride);
    }
}
