// A strip of a tile to a dense y: f32, or two 16-bit elements a word. `strip_get(i)`: the strip's sums, BN a row.
// Needs lib/y_*.wgsl.

fn y_old(at: u32) -> u32 {
    if (Y_TYPE == X_F32) { return y_load(at); }
    let half = (y_load(at / 2u) >> (16u * (at % 2u))) & 0xffffu;
    if (Y_TYPE == X_BF16) { return f32_from_bf16(half); }
    return f32_from_f16(half);
}

// Element `at` of y, before it is narrowed; `rb` is column j's anchor.
fn y_value(sum: f32, ra: u32, rb: u32, j: u32, at: u32, valid: bool) -> u32 {
    var value = finished(sum, ra, rb, valid);
    if ((p.beta & 0x7fffffffu) != 0u) {
        // The exclusive or is of nothing, and keeps the product from being fused with the sum.
        let old = bitcast<u32>(bitcast<f32>(p.beta) * bitcast<f32>(y_old(at))) ^ p.zero;
        value = added(value, old);
    }
    return with_bias(value, j);
}

// Rows first … first + STRIP_ROWS - 1 of the tile. An invocation keeps to its columns.
fn strip_store(tile: Tile, first: u32, lane: u32) {
    const PER = select(2u, 1u, Y_TYPE == X_F32);
    const ACROSS = min(BN / PER, WG);
    for (var c = lane % ACROSS * PER; c < BN; c += ACROSS * PER) {
        let j = tile.col + c;
        if (j >= p.n) { continue; }
        let rb = b_anchor(j);
        var rb_next = rb;
        if (PER == 2u && j + 1u < p.n) { rb_next = b_anchor(j + 1u); }
        for (var r = lane / ACROSS; r < STRIP_ROWS; r += WG / ACROSS) {
            if (first + r >= tile.rows) { break; }
            let ra = a_anchor(tile.row + first + r);
            let at = (tile.y_row + first + r) * p.y_pitch + p.y_col + j;
            let value = y_value(strip_get(r * BN + c), ra, rb, j, at, tile.valid);
            if (Y_TYPE == X_F32) {
                y_write(at, value);
            } else if (at % 2u == 0u && j + 1u < p.n) {
                let next = y_value(strip_get(r * BN + c + 1u), ra, rb_next, j + 1u, at + 1u, tile.valid);
                y_write(at / 2u, narrow(value) | (narrow(next) << 16u));
            } else {
                y_put_half(at, value);
                if (j + 1u < p.n) { y_put_half(at + 1u, y_value(strip_get(r * BN + c + 1u), ra, rb_next, j + 1u, at + 1u, tile.valid)); }
            }
        }
    }
}
