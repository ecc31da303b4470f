// What the kernels that work on tiles share: they find a block's amax in workgroup memory and put scales together by
// atomics. Needs the bindings scales and state. Twin: src/kernels/quantize.rs.

var<workgroup> wg_amax: array<atomic<u32>, TILE_BLOCKS>;

fn tile_clear(lane: u32) {
    for (var i = lane; i < TILE_BLOCKS; i += WG) { atomicStore(&wg_amax[i], 0u); }
}

// The tensor-wide scale; the tensor's first invocation writes it down.
fn tile_tensor_scale(given: u32, first: bool) -> u32 {
    if (!TENSOR_SCALED) { return 0u; }
    var ts = given;
    if (ts == 0u) { ts = tensor_scale_from_amax(atomicLoad(&state[1])); }
    if (first) { atomicStore(&state[2], ts); }
    return ts;
}

// Writes a block's scale, at a byte, and counts it if it is NaN.
fn tile_put_scale(at: u32, scale: u32) {
    atomicOr(&scales[at / 4u], scale << (8u * (at % 4u)));
    if (scale == SCALE_NAN) { atomicAdd(&state[0], 1u); }
}
