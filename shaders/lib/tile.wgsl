// What the kernels that work on tiles share: their parameters, and finding a block's amax in workgroup memory.
// Twin: src/kernels/quantize.rs.

struct Params {
    rows: u32,              // of x, in this dispatch
    cols: u32,              // of x, in this dispatch
    pitch: u32,             // elements of a whole row of x
    x_offset: u32,          // elements before the first one of this dispatch
    line_units: u32,        // units of a whole line of codes
    codes_offset: u32,      // units before the first one of this dispatch
    blocks: u32,            // blocks of a whole line
    scales_offset: u32,     // bytes before the first one of this dispatch
    carry: u32,             // the scale rule, see scale_from_amax
    tensor_scale: u32,      // f32 bits, or 0: from the amax in `state`
    groups: u32,            // random groups of a whole row, ceil(cols / 8)
    first: u32,             // 1 if this dispatch is the tensor's first
    key: vec4<u32>,         // of the random numbers
    counter: vec2<u32>,     // of the first group of this dispatch
    one: u32,               // 1
    anchor_row: u32,        // of the tensor's anchors, the first row's of this dispatch
    anchor_column: u32,     // of square blocks, the first column's
}

var<workgroup> wg_amax: array<atomic<u32>, TILE_BLOCKS>;

fn tile_clear(lane: u32) {
    for (var i = lane; i < TILE_BLOCKS; i += WG) { atomicStore(&wg_amax[i], 0u); }
}
