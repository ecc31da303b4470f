// A strip of sums in the memory of lib/units_*.wgsl.

fn strip_get(i: u32) -> f32 { return bitcast<f32>(memory[i / LANES][i % LANES]); }
fn strip_put(i: u32, bits: u32) { memory[i / LANES][i % LANES] = bitcast<Word>(bits); }

// The slices' sums of this strip, put together.
fn strip_join(lane: u32) {
    for (var i = lane; i < STRIP_ROWS * BN; i += WG) {
        var sum = strip_get(i);
        for (var s = 1u; s < SLICES; s++) { sum += bitcast<f32>(memory[s * STRIP_VECTORS + i / LANES][i % LANES]); }
        strip_put(i, bitcast<u32>(sum));
    }
}
