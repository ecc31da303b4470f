// quantize_columns: x → codes down its columns (the transpose, blocked axis contiguous) and scales; vector and square
// blocks. An invocation turns a part of 16 rows and four columns: one unit of each column.
// Layout:   x[rows, pitch] · codes[cols, line_units units] · scales[ceil(cols/BLOCK_LINES), blocks bytes]
// Numerics: integer-only; bit-exact with the twin, NaN, ±0 and subnormals included. OCP MX v1.0, section 6.3.
// Dispatch: ceil(rows / TILE_ROWS) · ceil(cols / TILE_COLS) workgroups, spread over x and y; scales zeroed before
// Twin:     src/kernels/quantize.rs

struct Params {
    rows: u32,              // of x, in this dispatch
    cols: u32,              // of x, in this dispatch
    pitch: u32,             // elements of a whole row of x
    x_offset: u32,          // elements before the first one of this dispatch
    line_units: u32,        // units of a whole line of codes
    codes_offset: u32,      // units before the first one of this dispatch
    blocks: u32,            // blocks of a whole line
    scales_offset: u32,     // bytes before the first one of this dispatch
    carry: u32,             // the scale rule, see scale_from_amax
    tensor_scale: u32,      // f32 bits, or 0: from the amax in `state`
    groups: u32,            // random groups of a whole row, ceil(cols / 8)
    first: u32,             // 1 if this dispatch is the tensor's first
    key: vec4<u32>,         // of the random numbers
    counter: vec2<u32>,     // of the first group of this dispatch
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<XWord>;
@group(0) @binding(2) var<storage, read_write> codes: array<CodesWord>;
@group(0) @binding(3) var<storage, read_write> scales: array<atomic<u32>>;
@group(0) @binding(4) var<storage, read_write> state: array<atomic<u32>>;  // see quantize.wgsl

const PART_ROWS = UNIT;
const PART_COLS = 4u;
const TILE_PARTS = TILE_COLS / PART_COLS;           // across
const LINE_BLOCKS = TILE_ROWS / BLOCK;
const TILE_BLOCKS = TILE_COLS / BLOCK_LINES * LINE_BLOCKS;

// Every invocation's own part, element by element, so that a subgroup's accesses fall into different banks.
var<workgroup> wg_part: array<u32, WG * PART_ROWS * PART_COLS>;
// Random words: four for each row and each group of eight columns, that is for two neighbours. They draw half each.
var<workgroup> wg_draws: array<u32, DRAWS>;

fn draw_index(pair: u32, row: u32, word: u32) -> u32 { return (row * 4u + word) * (WG / 2u) + pair; }

// The block of a column and row within the tile.
fn tile_block(in_col: u32, in_row: u32) -> u32 { return in_col / BLOCK_LINES * LINE_BLOCKS + in_row / BLOCK; }

// Eight elements of a column of this invocation's part.
fn part8(lane: u32, row: u32, col: u32) -> array<u32, 8> {
    let at = (row * PART_COLS + col) * WG + lane;
    const STEP = PART_COLS * WG;
    return array<u32, 8>(wg_part[at], wg_part[at + STEP], wg_part[at + 2u * STEP], wg_part[at + 3u * STEP],
                         wg_part[at + 4u * STEP], wg_part[at + 5u * STEP], wg_part[at + 6u * STEP], wg_part[at + 7u * STEP]);
}

// Their random halves, in the upper 16 bits.
fn draws8(lane: u32, row: u32, col: u32) -> array<u32, 8> {
    if (!STOCHASTIC) { return array<u32, 8>(); }
    let word = lane % 2u * 2u + col / 2u;
    let shift = 16u * (1u - col % 2u);
    let at = draw_index(lane / 2u, row, word);
    const STEP = 2u * WG;
    return array<u32, 8>(wg_draws[at] << shift, wg_draws[at + STEP] << shift,
                         wg_draws[at + 2u * STEP] << shift, wg_draws[at + 3u * STEP] << shift,
                         wg_draws[at + 4u * STEP] << shift, wg_draws[at + 5u * STEP] << shift,
                         wg_draws[at + 6u * STEP] << shift, wg_draws[at + 7u * STEP] << shift);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let tiles = (p.cols + TILE_COLS - 1u) / TILE_COLS;
    let tile = wg.y * wgs.x + wg.x;
    let in_row = lane / TILE_PARTS * PART_ROWS;
    let in_col = lane % TILE_PARTS * PART_COLS;
    let row0 = tile / tiles * TILE_ROWS + in_row;
    let col0 = tile % tiles * TILE_COLS + in_col;
    tile_clear(lane);
    workgroupBarrier();

    var amax = vec4<u32>();
    for (var i = 0u; i < PART_ROWS; i++) {
        var v = array<u32, 4>();
        if (row0 + i < p.rows) { v = load4_within(p.x_offset + (row0 + i) * p.pitch + col0, col0, p.cols); }
        let at = i * PART_COLS * WG + lane;
        wg_part[at] = v[0];
        wg_part[at + WG] = v[1];
        wg_part[at + 2u * WG] = v[2];
        wg_part[at + 3u * WG] = v[3];
        amax = max(amax, vec4<u32>(v[0], v[1], v[2], v[3]) << vec4<u32>(1u));
    }
    amax = amax >> vec4<u32>(1u);
    atomicMax(&wg_amax[tile_block(in_col, in_row)], amax.x);
    atomicMax(&wg_amax[tile_block(in_col + 1u, in_row)], amax.y);
    atomicMax(&wg_amax[tile_block(in_col + 2u, in_row)], amax.z);
    atomicMax(&wg_amax[tile_block(in_col + 3u, in_row)], amax.w);
    if (STOCHASTIC) {
        let half = lane % 2u * (PART_ROWS / 2u);
        for (var i = 0u; i < PART_ROWS / 2u; i++) {
            let bits = threefry_group(p.counter, (row0 + half + i) * p.groups + col0 / 8u, p.key);
            wg_draws[draw_index(lane / 2u, half + i, 0u)] = bits.x;
            wg_draws[draw_index(lane / 2u, half + i, 1u)] = bits.y;
            wg_draws[draw_index(lane / 2u, half + i, 2u)] = bits.z;
            wg_draws[draw_index(lane / 2u, half + i, 3u)] = bits.w;
        }
    }
    workgroupBarrier();

    // Units of the last block's padding are written too.
    if (row0 / BLOCK * BLOCK >= p.rows) { return; }
    let ts = tile_tensor_scale(p.tensor_scale, p.first == 1u && tile == 0u && lane == 0u);
    for (var c = 0u; c < PART_COLS; c++) {
        let col = col0 + c;
        if (col >= p.cols) { return; }
        let scale = scale_from_amax(atomicLoad(&wg_amax[tile_block(in_col + c, in_row)]), p.carry, ts);
        if (in_row % BLOCK == 0u && col % BLOCK_LINES == 0u) {
            tile_put_scale(p.scales_offset + col / BLOCK_LINES * p.blocks + row0 / BLOCK, scale);
        }
        var unit = Codes();
        if (scale != SCALE_NAN) {
            unit = encode16(part8(lane, 0u, c), part8(lane, 8u, c), scale, ts, draws8(lane, 0u, c), draws8(lane, 8u, c));
        }
        codes_store(p.codes_offset + col * p.line_units + row0 / UNIT, unit);
    }
}
