// What lib/coop_f32.wgsl does, with operands in E4M3: a unit of eight positions is two words. src/engine/spirv.rs makes A and B
// E4M3, FRAGMENT_K long. Sums leave with E4M3's factors taken out, exactly: then they are what f16 gives.

var<workgroup> memory: array<vec2<f32>, SLICES * max(TILE_UNITS, STRIP_VECTORS)>;

fn tile_put(unit: u32, h: vec4<u32>) { memory[own_slice * TILE_UNITS + unit] = bitcast<vec2<f32>>(h.xy); }
fn strip_get(i: u32) -> f32 { return memory[i / 2u][i % 2u]; }
fn strip_get4(i: u32) -> vec4<f32> { return vec4<f32>(memory[i / 2u], memory[i / 2u + 1u]); }

// The slices' sums of this strip, put together.
fn strip_join(lane: u32) {
    for (var i = lane; i < STRIP_ROWS * BN; i += WG) {
        var sum = strip_get(i);
        for (var s = 1u; s < SLICES; s++) { sum += memory[s * STRIP_VECTORS + i / 2u][i % 2u]; }
        strip_put(i, bitcast<u32>(sum));
    }
}

fn strip_put(i: u32, bits: u32) { memory[i / 2u][i % 2u] = bitcast<f32>(bits); }

alias Sums = array<MatC, FM * FN>;

fn sums_zero(sums: ptr<function, Sums>) {
    for (var f = 0u; f < FM * FN; f++) { // unroll
        (*sums)[f] = MatC();
    }
}

// Row i of the subgroup's fragments to the strip.
fn strip_fragments(sums: ptr<function, Sums>, i: u32, subgroup_m: u32, b_row: u32, lane: u32) {
    for (var j = 0u; j < FN; j++) { // unroll
        let at = own_slice * STRIP_VECTORS + (subgroup_m * FRAGMENT * BN + b_row + j * FRAGMENT) / 2u;
        let stride = BN / 2u;
        let fragment = (*sums)[i * FN + j] * E4M3_UNIT;
        coopStoreT(fragment, &memory[at], stride);
    }
}
