// adamw_square: adamw, and the new weight packed in square blocks under E8M0 scales, as quantize_square.wgsl packs it.
// Layout:   as adamw.wgsl · codes[rows, units] · scales[ceil(rows/BLOCK), blocks bytes] · state: see quantize.wgsl, zeroed
//           before. Columns are a multiple of TILE_COLS.
// Numerics: as adamw.wgsl; the packed weight is exact
// Dispatch: ceil(rows / TILE_ROWS) · cols / TILE_COLS workgroups, spread over x and y; a unit of a row an invocation
// Twin:     src/kernels/adamw.rs

@group(0) @binding(6) var<storage, read_write> codes: array<CodesWord>;
@group(0) @binding(7) var<storage, read_write> scales: array<u32>;
@group(0) @binding(8) var<storage, read_write> state: array<atomic<u32>>;

const ROW_BLOCKS = TILE_COLS / BLOCK;
const TILE_BLOCKS = TILE_ROWS / BLOCK * ROW_BLOCKS;

var<workgroup> wg_amax: array<atomic<u32>, TILE_BLOCKS>;

fn words(x: Eight) -> array<u32, 8> {
    let a = bitcast<vec4<u32>>(x.lo);
    let b = bitcast<vec4<u32>>(x.hi);
    return array<u32, 8>(a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let index = wg.y * wgs.x + wg.x;
    let tiles = p.cols / TILE_COLS;
    let slot = lane / LANES;
    let first_row = index / tiles * TILE_ROWS;
    let row = first_row + slot;
    let in_col = lane % LANES * UNIT;
    let col = index % tiles * TILE_COLS + in_col;
    let group = (row * p.cols + col) / 8u;
    // A block of the moments is a row of the tile.
    let block = row * tiles + index % tiles;
    let finite = norm[0].z != 0.0;
    let live = finite && row < p.rows;
    moments_clear(lane);
    if (lane < TILE_BLOCKS) { atomicStore(&wg_amax[lane], 0u); }
    workgroupBarrier();

    var x = Updated();
    var y = Updated();
    let square = slot / BLOCK * ROW_BLOCKS + in_col / BLOCK;
    if (live) {
        x = updated(group, block, true);
        y = updated(group + 1u, block, true);
        moments_amax(slot, x.moments);
        moments_amax(slot, y.moments);
        atomicMax(&wg_amax[square], max(amax8(words(x.w)), amax8(words(y.w))));
    }
    workgroupBarrier();

    if (live) {
        w_put(group, true, x.w);
        w_put(group + 1u, true, y.w);
        moments_put(group, block, slot, lane % LANES == 0u, true, x.moments);
        moments_put(group + 1u, block, slot, false, true, y.moments);
        let scale = scale_from_amax(atomicLoad(&wg_amax[square]), p.carry, 0u);
        var c = Codes();
        if (scale != SCALE_NAN) { c = encode16(words(x.w), words(y.w), scale, 0u, array<u32, 8>(), array<u32, 8>()); }
        codes_store((row * p.cols + col) / UNIT, c);
    }
    // The tile's scales are whole words. After a step that was skipped they stay, and are counted again.
    let at = 4u * lane;
    let scale_row = at / ROW_BLOCKS;
    if (at < TILE_BLOCKS && first_row + scale_row * BLOCK < p.rows) {
        let scales_row = first_row / BLOCK + scale_row;
        let scales_col = index % tiles * ROW_BLOCKS + at % ROW_BLOCKS;
        let word = (scales_row * (p.cols / BLOCK) + scales_col) / 4u;
        var packed = scales[word];
        if (finite) {
            packed = scale_from_amax(atomicLoad(&wg_amax[at]), p.carry, 0u)
                | (scale_from_amax(atomicLoad(&wg_amax[at + 1u]), p.carry, 0u) << 8u)
                | (scale_from_amax(atomicLoad(&wg_amax[at + 2u]), p.carry, 0u) << 16u)
                | (scale_from_amax(atomicLoad(&wg_amax[at + 3u]), p.carry, 0u) << 24u);
            scales[word] = packed;
        }
        for (var i = 0u; i < 4u; i++) {
            let scale = (packed >> (8u * i)) & 0xffu;
            anchors_raise(scales_row, (p.rows + BLOCK - 1u) / BLOCK + scales_col + i, scale);
            if (scale == SCALE_NAN) { atomicAdd(&state[0], 1u); }
        }
    }
}
