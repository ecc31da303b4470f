// A strip of a tile to a dense y whose rows are whole quads: y is bound as an array of them. `strip_get4(i)`: the strip's
// sums, BN a row. Needs lib/y_quads_*.wgsl.

// A sum's bits under its anchors, with what y held and the bias.
fn y_value(sum: f32, ra: u32, rb: u32, old: u32, j: u32, valid: bool) -> u32 {
    var value = finished(sum, ra, rb, valid);
    if ((p.beta & 0x7fffffffu) != 0u) {
        // The exclusive or is of nothing, and keeps the product from being fused with the sum.
        value = added(value, bitcast<u32>(bitcast<f32>(p.beta) * bitcast<f32>(old)) ^ p.zero);
    }
    return with_bias(value, j);
}

// Rows first … first + STRIP_ROWS - 1 of the tile: STORE_ROWS an invocation, which keeps to its columns.
fn strip_store(tile: Tile, first: u32, lane: u32) {
    const ACROSS = min(BN / 4u, WG);
    for (var c = lane % ACROSS * 4u; c < BN; c += ACROSS * 4u) {
        let j = tile.col + c;
        if (j >= p.n) { continue; }
        let rb = vec4<u32>(b_anchor(j), b_anchor(j + 1u), b_anchor(j + 2u), b_anchor(j + 3u));
        var ra: array<u32, STORE_ROWS>;
        for (var q = 0u; q < STORE_ROWS; q++) { // unroll
            ra[q] = a_anchor(tile.row + min(first + lane / ACROSS + q * (WG / ACROSS), tile.rows - 1u));
        }
        for (var q = 0u; q < STORE_ROWS; q++) { // unroll
            let r = lane / ACROSS + q * (WG / ACROSS);
            if (r < STRIP_ROWS && first + r < tile.rows) {
                let at = ((tile.y_row + first + r) * p.y_pitch + p.y_col + j) / 4u;
                let sum = strip_get4(r * BN + c);
                var old = vec4<u32>();
                if ((p.beta & 0x7fffffffu) != 0u) { old = y_load(at); }
                y_store(at, vec4<u32>(y_value(sum.x, ra[q], rb.x, old.x, j, tile.valid),
                                      y_value(sum.y, ra[q], rb.y, old.y, j + 1u, tile.valid),
                                      y_value(sum.z, ra[q], rb.z, old.z, j + 2u, tile.valid),
                                      y_value(sum.w, ra[q], rb.w, old.w, j + 3u, tile.valid)));
            }
        }
    }
}
