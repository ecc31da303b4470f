// The anchors of the tensor whose `state` this is, see src/kernels/anchors.rs: maxima, so any order of blocks makes the same.
// Needs the binding state, zeroed before, and STATE_WORDS.

// What a scale says about its line's anchor: E8M0: the byte, 255 a NaN. E4M3: 127, or 255.
fn anchor_of(scale: u32) -> u32 {
    if (TENSOR_SCALED) { return select(127u, 255u, (scale & 0x7fu) == 0x7fu); }
    return scale;
}

// `line`: a row of scales; for square blocks also, behind the rows, a column of them.
fn anchor_raise(line: u32, anchor: u32) { atomicMax(&state[STATE_WORDS + line], anchor); }

// Where a block's scale is written: its row's anchor, and for square blocks its column's.
fn anchors_raise(row: u32, column: u32, scale: u32) {
    anchor_raise(row, anchor_of(scale));
    if (BLOCK_LINES > 1u) { anchor_raise(column, anchor_of(scale)); }
}
