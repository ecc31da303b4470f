// Which of two kernels takes a tile: the one in bytes if all its lines lie within the window, the one in f16 (OUTSIDE) if not.
// windows: a word for each anchor of A, then of B, the product's stamp if a block lies outside. See shaders/bytes_pack.wgsl.

var<workgroup> wg_outside: atomic<u32>;
var<workgroup> wg_takes: u32;

fn tile_taken(tile: Tile, lane: u32) -> bool {
    if (lane == 0u) { atomicStore(&wg_outside, 0u); }
    workgroupBarrier();
    var outside = false;
    for (var r = lane; r < min(BM, tile.rows); r += WG) { outside |= windows[a_anchor_at(tile.row + r)] == p.stamp; }
    for (var c = lane; c < min(BN, p.n - min(tile.col, p.n)); c += WG) { outside |= windows[p.windows + b_anchor_at(tile.col + c)] == p.stamp; }
    if (outside) { atomicStore(&wg_outside, 1u); }
    workgroupBarrier();
    if (lane == 0u) { wg_takes = u32((atomicLoad(&wg_outside) != 0u) == OUTSIDE); }
    return workgroupUniformLoad(&wg_takes) != 0u;
}
