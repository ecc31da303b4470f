// A strip of a tile to a packed y, blocks along its rows: what shaders/quantize.wgsl and shaders/quantize_square.wgsl do.
// The strip holds whole blocks; the scales were zeroed before.

const STRIP_BLOCKS = STRIP_ROWS / BLOCK_LINES * (BN / BLOCK);

var<workgroup> wg_amax: array<atomic<u32>, STRIP_BLOCKS>;

fn strip_store(tile: Tile, first: u32, lane: u32) {
    for (var i = lane; i < STRIP_BLOCKS; i += WG) { atomicStore(&wg_amax[i], 0u); }
    workgroupBarrier();
    // The values take the sums' place.
    for (var u = lane; u < STRIP_ROWS * BN; u += WG) {
        let r = u / BN;
        let c = u % BN;
        var value = 0u;
        if (first + r < tile.rows && tile.col + c < p.n) {
            value = with_bias(finished(strip_get(u), a_anchor(tile.row + first + r), b_anchor(tile.col + c), tile.valid), tile.col + c);
        }
        strip_put(u, value);
        atomicMax(&wg_amax[r / BLOCK_LINES * (BN / BLOCK) + c / BLOCK], value & 0x7fffffffu);
    }
    workgroupBarrier();
    for (var u = lane; u < STRIP_ROWS * BN / UNIT; u += WG) {
        let r = u / (BN / UNIT);
        let c = u % (BN / UNIT) * UNIT;
        let row = tile.y_row + first + r;
        let col = p.y_col + tile.col + c;
        // Units of the last block's padding are written too.
        if (first + r >= tile.rows || col >= p.y_cols) { continue; }
        let ts = p.tensor_scale;
        let scale = scale_from_amax(atomicLoad(&wg_amax[r / BLOCK_LINES * (BN / BLOCK) + c / BLOCK]), p.carry, ts);
        if (r % BLOCK_LINES == 0u && c % BLOCK == 0u) {
            let at = row / BLOCK_LINES * p.y_blocks + col / BLOCK;
            atomicOr(&scales[at / 4u], scale << (8u * (at % 4u)));
            if (scale == SCALE_NAN) { atomicAdd(&state[0], 1u); }
        }
        var ra = array<u32, 8>();
        var rb = array<u32, 8>();
        if (STOCHASTIC) {
            let group = (row - p.y_row) * p.draws + col / 8u;
            ra = threefry_halves(threefry_group(p.counter, group, p.key));
            rb = threefry_halves(threefry_group(p.counter, group + 1u, p.key));
        }
        var packed = Codes();
        if (scale != SCALE_NAN) { packed = encode16(strip_eight(r * BN + c), strip_eight(r * BN + c + 8u), scale, ts, ra, rb); }
        codes_store(row * p.y_pitch + col / UNIT, packed);
    }
    if (TENSOR_SCALED && tile.row == 0u && tile.col == 0u && lane == 0u) { atomicStore(&state[2], p.tensor_scale); }
}

fn strip_eight(at: u32) -> array<u32, 8> {
    return array<u32, 8>(bitcast<u32>(strip_get(at)), bitcast<u32>(strip_get(at + 1u)), bitcast<u32>(strip_get(at + 2u)), bitcast<u32>(strip_get(at + 3u)),
                         bitcast<u32>(strip_get(at + 4u)), bitcast<u32>(strip_get(at + 5u)), bitcast<u32>(strip_get(at + 6u)), bitcast<u32>(strip_get(at + 7u)));
}
