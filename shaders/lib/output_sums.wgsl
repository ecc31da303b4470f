// A strip of a tile as it was summed, relative to the anchors, in whole quads: y has rows of p.y_pitch, a multiple of four.

fn strip_store(tile: Tile, first: u32, lane: u32) {
    const ACROSS = min(BN / 4u, WG);
    for (var c = lane % ACROSS * 4u; c < BN; c += ACROSS * 4u) {
        if (tile.col + c >= p.n) { continue; }
        for (var r = lane / ACROSS; r < STRIP_ROWS; r += WG / ACROSS) {
            if (first + r >= tile.rows) { break; }
            y[((tile.y_row + first + r) * p.y_pitch + tile.col + c) / 4u] = strip_get4(r * BN + c);
        }
    }
}
