// Slices of k: the sums of slice s go to rows s · m … of y, and shaders/matmul_join.wgsl adds the slices.

fn tile_grouped(place: Tile, tm: u32, lane: u32) -> Tile {
    var tile = place;
    tile.rows = p.m - min(tile.row, p.m);
    tile.y_row = tile.batch * p.m + tile.row;
    operands_at(0u, 0u);
    return tile;
}

fn tile_uniformly_there(tile: Tile, lane: u32) -> bool { return tile.there; }

// Slices are whole chunks, but for the last.
fn k_end() -> u32 { return p.k; }

fn tile_k(tile: Tile, lane: u32) -> vec2<u32> {
    let start = tile.batch * p.slice;
    return vec2<u32>(start, min(start + p.slice, p.k));
}
