// quantize_columns: x → codes down its columns (the transpose, blocked axis contiguous) and scales; vector and square
// blocks. An invocation turns a part of 16 rows and four columns: one unit of each column.
// Layout:   x[rows, pitch] · codes[cols, line_units units] · scales[ceil(cols/BLOCK_LINES), blocks bytes]
// Numerics: integer-only; bit-exact with the twin, NaN, ±0 and subnormals included. OCP MX v1.0, section 6.3.
// Dispatch: ceil(rows / TILE_ROWS) · ceil(cols / TILE_COLS) workgroups, spread over x and y; scales zeroed before
// Twin:     src/kernels/quantize.rs

@group(0) @binding(0) var<uniform> p: Params;    // lib/tile.wgsl
@group(0) @binding(1) var<storage, read> x: array<XWord>;
@group(0) @binding(2) var<storage, read_write> codes: array<CodesWord>;
@group(0) @binding(3) var<storage, read_write> scales: array<atomic<u32>>;
@group(0) @binding(4) var<storage, read_write> state: array<atomic<u32>>;  // see quantize.wgsl

const PART_ROWS = UNIT;
const PART_COLS = 4u;
const TILE_PARTS = TILE_COLS / PART_COLS;           // across
const LINE_BLOCKS = TILE_ROWS / BLOCK;
const TILE_BLOCKS = TILE_COLS / BLOCK_LINES * LINE_BLOCKS;

fn load_part(row: u32, col: u32) -> array<u32, 4> {
    if (row < p.rows) { return load4_within(p.x_offset + row * p.pitch + col, col, p.cols); }
    return array<u32, 4>();
}

// The block of a column and row within the tile.
fn tile_block(in_col: u32, in_row: u32) -> u32 { return in_col / BLOCK_LINES * LINE_BLOCKS + in_row / BLOCK; }

@compute @workgroup_size(WG)
fn main(in: Invocation) {
    let lane = invocation_lane(in);
    let tiles = (p.cols + TILE_COLS - 1u) / TILE_COLS;
    let tile = in.wg.y * in.wgs.x + in.wg.x;
    let in_row = lane / TILE_PARTS * PART_ROWS;
    let in_col = lane % TILE_PARTS * PART_COLS;
    let row0 = tile / tiles * TILE_ROWS + in_row;
    let col0 = tile % tiles * TILE_COLS + in_col;
    tile_clear(lane);
    workgroupBarrier();

    // Written out: the part lives in registers, and indices must be constant for that.
    let v0 = load_part(row0 + 0u, col0);
    let v1 = load_part(row0 + 1u, col0);
    let v2 = load_part(row0 + 2u, col0);
    let v3 = load_part(row0 + 3u, col0);
    let v4 = load_part(row0 + 4u, col0);
    let v5 = load_part(row0 + 5u, col0);
    let v6 = load_part(row0 + 6u, col0);
    let v7 = load_part(row0 + 7u, col0);
    let v8 = load_part(row0 + 8u, col0);
    let v9 = load_part(row0 + 9u, col0);
    let v10 = load_part(row0 + 10u, col0);
    let v11 = load_part(row0 + 11u, col0);
    let v12 = load_part(row0 + 12u, col0);
    let v13 = load_part(row0 + 13u, col0);
    let v14 = load_part(row0 + 14u, col0);
    let v15 = load_part(row0 + 15u, col0);
    // Two words a row; a column's random half goes to the upper 16 bits.
    let d = draw_part(row0, col0, lane);
    let a0 = array<u32, 8>(v0[0], v1[0], v2[0], v3[0], v4[0], v5[0], v6[0], v7[0]);
    let b0 = array<u32, 8>(v8[0], v9[0], v10[0], v11[0], v12[0], v13[0], v14[0], v15[0]);
    atomicMax(&wg_amax[tile_block(in_col + 0u, in_row)], max(amax8(a0), amax8(b0)));
    let a1 = array<u32, 8>(v0[1], v1[1], v2[1], v3[1], v4[1], v5[1], v6[1], v7[1]);
    let b1 = array<u32, 8>(v8[1], v9[1], v10[1], v11[1], v12[1], v13[1], v14[1], v15[1]);
    atomicMax(&wg_amax[tile_block(in_col + 1u, in_row)], max(amax8(a1), amax8(b1)));
    let a2 = array<u32, 8>(v0[2], v1[2], v2[2], v3[2], v4[2], v5[2], v6[2], v7[2]);
    let b2 = array<u32, 8>(v8[2], v9[2], v10[2], v11[2], v12[2], v13[2], v14[2], v15[2]);
    atomicMax(&wg_amax[tile_block(in_col + 2u, in_row)], max(amax8(a2), amax8(b2)));
    let a3 = array<u32, 8>(v0[3], v1[3], v2[3], v3[3], v4[3], v5[3], v6[3], v7[3]);
    let b3 = array<u32, 8>(v8[3], v9[3], v10[3], v11[3], v12[3], v13[3], v14[3], v15[3]);
    atomicMax(&wg_amax[tile_block(in_col + 3u, in_row)], max(amax8(a3), amax8(b3)));
    workgroupBarrier();

    // Units of the last block's padding are written too.
    if (row0 / BLOCK * BLOCK >= p.rows) { return; }
    let ts = tile_tensor_scale(p.tensor_scale, p.first == 1u && tile == 0u && lane == 0u);
    put_column(0u, in_col, in_row, col0, row0, ts, a0, b0,
               array<u32, 8>(d[0].x << 16u, d[1].x << 16u, d[2].x << 16u, d[3].x << 16u, d[4].x << 16u, d[5].x << 16u, d[6].x << 16u, d[7].x << 16u),
               array<u32, 8>(d[8].x << 16u, d[9].x << 16u, d[10].x << 16u, d[11].x << 16u, d[12].x << 16u, d[13].x << 16u, d[14].x << 16u, d[15].x << 16u));
    put_column(1u, in_col, in_row, col0, row0, ts, a1, b1,
               array<u32, 8>(d[0].x, d[1].x, d[2].x, d[3].x, d[4].x, d[5].x, d[6].x, d[7].x),
               array<u32, 8>(d[8].x, d[9].x, d[10].x, d[11].x, d[12].x, d[13].x, d[14].x, d[15].x));
    put_column(2u, in_col, in_row, col0, row0, ts, a2, b2,
               array<u32, 8>(d[0].y << 16u, d[1].y << 16u, d[2].y << 16u, d[3].y << 16u, d[4].y << 16u, d[5].y << 16u, d[6].y << 16u, d[7].y << 16u),
               array<u32, 8>(d[8].y << 16u, d[9].y << 16u, d[10].y << 16u, d[11].y << 16u, d[12].y << 16u, d[13].y << 16u, d[14].y << 16u, d[15].y << 16u));
    put_column(3u, in_col, in_row, col0, row0, ts, a3, b3,
               array<u32, 8>(d[0].y, d[1].y, d[2].y, d[3].y, d[4].y, d[5].y, d[6].y, d[7].y),
               array<u32, 8>(d[8].y, d[9].y, d[10].y, d[11].y, d[12].y, d[13].y, d[14].y, d[15].y));
}

// Encodes and writes one column's unit, and its block's scale if it is the first of the block.
fn put_column(c: u32, in_col: u32, in_row: u32, col0: u32, row0: u32, ts: u32, a: array<u32, 8>, b: array<u32, 8>,
              ra: array<u32, 8>, rb: array<u32, 8>) {
    let col = col0 + c;
    if (col >= p.cols) { return; }
    let scale = scale_from_amax(atomicLoad(&wg_amax[tile_block(in_col + c, in_row)]), p.carry, ts);
    if (in_row % BLOCK == 0u && col % BLOCK_LINES == 0u) {
        let i = col / BLOCK_LINES;
        let j = row0 / BLOCK;
        tile_put_scale(p.scales_offset + i * p.blocks + j, p.anchor_row + i, p.anchor_column + j, scale);
    }
    var unit = Codes();
    if (scale != SCALE_NAN) { unit = encode16(a, b, scale, ts, ra, rb); }
    codes_store(p.codes_offset + col * p.line_units + row0 / UNIT, unit);
}
