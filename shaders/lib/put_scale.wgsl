// The scales of a side that are put together by atomics, and NVFP4's tensor-wide one. Needs the bindings scales and state,
// and lib/anchors.wgsl.
// Twin: src/kernels/quantize.rs.

// The tensor-wide scale; the tensor's first invocation writes it down.
fn tile_tensor_scale(given: u32, first: bool) -> u32 {
    if (!TENSOR_SCALED) { return 0u; }
    var ts = given;
    if (ts == 0u) { ts = tensor_scale_from_amax(atomicLoad(&state[1])); }
    if (first) { atomicStore(&state[2], ts); }
    return ts;
}

// Writes a block's scale, at a byte, makes its anchors, and counts it if it is NaN.
fn tile_put_scale(at: u32, row: u32, column: u32, scale: u32) {
    atomicOr(&scales[at / 4u], scale << (8u * (at % 4u)));
    anchors_raise(row, column, scale);
    if (scale == SCALE_NAN) { atomicAdd(&state[0], 1u); }
}
