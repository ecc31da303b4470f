// What the kernels that work on tiles share: they find a block's amax in workgroup memory and put scales together by
// atomics. Needs the bindings p, scales and state. Twin: src/kernels/quantize.rs.

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

// Writes the scales of the tile, a line of blocks an invocation, whole words of them at a time. `at`: the byte of the
// tile's first block; `lines`, `blocks`: how many of the tile's there are. Counts the blocks whose scale is NaN.
fn tile_put_scales(lane: u32, at: u32, lines: u32, blocks: u32, ts: u32) {
    if (lane >= min(lines, TILE_BLOCKS / TILE_LINE_BLOCKS)) { return; }
    var word = 0u;
    for (var i = 0u; i < TILE_LINE_BLOCKS; i++) {
        if (i < blocks) {
            let scale = scale_from_amax(atomicLoad(&wg_amax[lane * TILE_LINE_BLOCKS + i]), p.carry, ts);
            if (scale == SCALE_NAN) { atomicAdd(&state[0], 1u); }
            let byte = at + lane * p.blocks + i;
            word |= scale << (8u * (byte % 4u));
            if (byte % 4u == 3u || i + 1u == min(blocks, TILE_LINE_BLOCKS)) {
                atomicOr(&scales[byte / 4u], word);
                word = 0u;
            }
        }
    }
}
