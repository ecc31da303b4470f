// Rows of A grouped by expert. groups: [0] how often a group was invalid; then groups + 1 row offsets; then groups expert
// ids. A group is invalid if its offsets descend or pass the last row, or if there is no such expert; its rows become NaN.

// Read by as many invocations at once: one after the other takes longer than a tile.
const AT_ONCE = 32u;
var<workgroup> wg_groups: array<vec3<u32>, AT_ONCE>;

fn tile_grouped(place: Tile, tm: u32, lane: u32) -> Tile {
    var tile = place;
    var before = 0u;
    for (var g = 0u; g < p.groups; g++) {
        if (g % AT_ONCE == 0u) {
            workgroupBarrier();
            let own = g + lane;
            if (lane < AT_ONCE && own < p.groups) {
                wg_groups[lane] = vec3<u32>(atomicLoad(&groups[1u + own]), atomicLoad(&groups[2u + own]),
                                            atomicLoad(&groups[2u + p.groups + own]));
            }
            workgroupBarrier();
        }
        let start = wg_groups[g % AT_ONCE].x;
        let end = wg_groups[g % AT_ONCE].y;
        let expert = wg_groups[g % AT_ONCE].z;
        let valid = start <= end && end <= p.m && expert < p.experts;
        let rows = min(end, p.m) - min(start, min(end, p.m));
        let count = (rows + BM - 1u) / BM;
        if (COUNTS && !valid && tm == 0u && place.col == 0u && lane == 0u) { atomicAdd(&groups[0], 1u); }
        if (tm >= before && tm < before + count) {
            tile.row = start + (tm - before) * BM;
            tile.rows = rows - (tm - before) * BM;
            tile.y_row = p.y_row + tile.row;
            tile.valid = valid;
            operands_at(0u, min(expert, p.experts - 1u));
        }
        before += count;
    }
    // The workgroup beyond the last tile has nothing to do.
    tile.there = tile.there && tm < before;
    return tile;
}

var<workgroup> wg_there: u32;

// Known to be the same for the whole workgroup, which barriers ask for.
fn tile_uniformly_there(tile: Tile, lane: u32) -> bool {
    if (lane == 0u) { wg_there = u32(tile.there); }
    return workgroupUniformLoad(&wg_there) != 0u;
}
