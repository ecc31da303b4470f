// Ranges of k, one for each matrix of y: both operands are whole, and batch g sums positions offsets[g] .. offsets[g + 1].
// groups: as in lib/grouped.wgsl, the experts not read. A group is invalid if its offsets descend, pass the last position or
// are no multiples of 32, which every read from packed lines may assume; its matrix becomes NaN.

var<private> own_k: vec2<u32>;
var<workgroup> wg_k: vec2<u32>;

fn tile_grouped(place: Tile, tm: u32, lane: u32) -> Tile {
    var tile = place;
    let g = min(tile.batch, p.groups - 1u);
    let start = atomicLoad(&groups[1u + g]);
    let end = atomicLoad(&groups[2u + g]);
    tile.valid = start <= end && end <= p.k && start % 32u == 0u && end % 32u == 0u;
    own_k = select(vec2<u32>(), vec2<u32>(start, end), tile.valid);
    if (COUNTS && !tile.valid && tile.there && tm == 0u && place.col == 0u && lane == 0u) { atomicAdd(&groups[0], 1u); }
    tile.rows = p.m - min(tile.row, p.m);
    tile.y_row = p.y_row + g * p.y_stride + tile.row;
    operands_at(0u, 0u);
    return tile;
}

fn tile_uniformly_there(tile: Tile, lane: u32) -> bool {
    if (lane == 0u) { wg_k = vec2<u32>(u32(tile.there), 0u); }
    return workgroupUniformLoad(&wg_k).x != 0u;
}

fn k_end() -> u32 { return own_k.y; }

// Known to be the same for the whole workgroup, which barriers ask for.
fn tile_k(tile: Tile, lane: u32) -> vec2<u32> {
    if (lane == 0u) { wg_k = own_k; }
    return workgroupUniformLoad(&wg_k);
}
