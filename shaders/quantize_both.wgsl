// quantize_both: a tile of x, read once, to codes and scales of one or two sides: blocks along the rows (r_), down the
// columns (c_, stored transposed), each after a Walsh-Hadamard transform of its own if it has one (lib/side.wgsl).
// Layout:   x[matrices · rows, cols] of quads, each matrix packed for itself · a side: codes[lines, line_units units] ·
//           scales[lines, blocks bytes] · state, see quantize.wgsl · clip[1], f32 bits · skip[ceil(cols/32)], a bit a column ·
//           counters[8]
// Numerics: exact. Integer-only but for the transform, which adds f32 in a fixed order, without subnormals and overflow.
// Dispatch: matrices · ceil(rows / TILE_ROWS) · ceil(cols / TILE_COLS) workgroups, spread over x and y; scales zeroed before
// Twin:     src/kernels/quantize_both.rs

struct Side {
    signs: vec4<u32>,       // a bit a position of a transform's group
    key: vec4<u32>,         // of the random numbers
    line_units: u32,        // units of a line of codes
    blocks: u32,            // blocks of a line
    carry: u32,             // the scale rule, see scale_from_amax
    zero: f32,              // 0
}

struct Params {
    rows: u32,              // of a matrix
    cols: u32,
    matrices: u32,          // of x, one under the other
    one: u32,               // 1
    sides: array<Side, 2>,  // rows, columns
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<BitsQuad>;

// Random groups of a row.
fn row_groups() -> u32 { return (p.cols + 7u) / 8u; }

const PITCH = TILE_COLS + 1u;
const TILE_QUADS = TILE_COLS / 4u;          // of a row

var<workgroup> wg_tile: array<u32, TILE_ROWS * PITCH + SKEWED>;

// 32 neighbouring invocations that read down the columns have 16 rows each: they meet in no bank of 32 because the pitch is
// odd, and because every 32 rows are moved on.
fn skew(row: u32) -> u32 { return row / 32u * SKEW; }

// Limits finite magnitudes to the clip; zero where a column is skipped.
fn guarded(bits: vec4<u32>, col: u32) -> vec4<u32> {
    var v = bits;
    if (CLIP) {
        let limit = vec4<u32>(clip_limit());
        let magnitude = v & vec4<u32>(0x7fffffffu);
        let over = (magnitude > limit) & (magnitude < vec4<u32>(0x7f800000u));
        v = select(v, (v & vec4<u32>(0x80000000u)) | limit, over);
    }
    if (SKIP && col < p.cols) {
        let s = skip_word(col / 32u) >> (col % 32u);
        v = select(v, vec4<u32>(), (vec4<u32>(s, s >> 1u, s >> 2u, s >> 3u) & vec4<u32>(1u)) != vec4<u32>());
    }
    return v;
}

@compute @workgroup_size(WG)
fn main(in: Invocation) {
    let lane = invocation_lane(in);
    let across = (p.cols + TILE_COLS - 1u) / TILE_COLS;
    let down = (p.rows + TILE_ROWS - 1u) / TILE_ROWS;
    let tile = in.wg.y * in.wgs.x + in.wg.x;
    // Of a stack the row of tiles, then of its matrix.
    var tile_row = tile / across;
    let col0 = (tile - tile_row * across) * TILE_COLS;
    var matrix = 0u;
    if (p.matrices != 1u) {
        matrix = tile_row / down;
        tile_row -= matrix * down;
    }
    let row0 = tile_row * TILE_ROWS;
    let there = matrix < p.matrices;
    let first = matrix * p.rows;
    // All loads before the first use.
    var quads = array<vec4<u32>, 4>();
    for (var i = 0u; i < 4u; i++) { // unroll
        let at = i * WG + lane;
        let row = row0 + at / TILE_QUADS;
        let col = col0 + at % TILE_QUADS * 4u;
        if (there && row < p.rows && col < p.cols) { quads[i] = bits_get(x[((first + row) * p.cols + col) / 4u]); }
    }
    // Drawn while the loads are on their way.
    counters_clear(lane);
    r_prepare(first + row0, col0, lane);
    c_prepare(first + row0, col0, lane);
    for (var i = 0u; i < 4u; i++) { // unroll
        let at = i * WG + lane;
        let in_row = at / TILE_QUADS;
        let in_col = at % TILE_QUADS * 4u;
        let to = in_row * PITCH + in_col + skew(in_row);
        let v = guarded(quads[i], col0 + in_col);
        wg_tile[to] = v.x;
        wg_tile[to + 1u] = v.y;
        wg_tile[to + 2u] = v.z;
        wg_tile[to + 3u] = v.w;
    }
    workgroupBarrier();
    r_run(matrix, row0, col0, lane);
    c_run(matrix, row0, col0, lane);
    counters_flush(lane);
}
