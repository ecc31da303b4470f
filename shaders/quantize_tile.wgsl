// quantize_tile: a tile of x through workgroup memory → codes and scales, for blocks along the columns (the
// result is the transpose, blocked axis contiguous) and for square blocks, along either axis.
// Layout:   x[rows, pitch] · codes[lines, line_words words] · scales[⌈lines/BLOCK_LINES⌉, blocks bytes]
// Numerics: integer-only; bit-exact with the twin, NaN, ±0 and subnormals included. OCP MX v1.0, section 6.3.
// Dispatch: ceil(rows / TILE_ROWS) · ceil(cols / TILE_COLS) workgroups, spread over x and y; scales zeroed before
// Twin:     src/kernels/quantize.rs

struct Params {
    rows: u32,              // of x, in this dispatch
    cols: u32,              // of x, in this dispatch
    pitch: u32,             // elements of a whole row of x
    x_offset: u32,          // elements before the first one of this dispatch
    line_words: u32,        // words of a whole line of codes
    codes_offset: u32,      // words before the first one of this dispatch
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
@group(0) @binding(2) var<storage, read_write> codes: array<u32>;
@group(0) @binding(3) var<storage, read_write> scales: array<atomic<u32>>;
@group(0) @binding(4) var<storage, read_write> state: array<atomic<u32>>;  // see quantize.wgsl

// WG · 8 elements: each invocation loads one group of eight columns.
const TILE_GROUPS = TILE_COLS / 8u;
// An odd pitch spreads a column over the banks.
const TILE_PITCH = TILE_COLS + 1u;
const BITS_PITCH = TILE_COLS / 2u + 1u;
// The tile seen as lines along the blocked axis.
const LINES = select(TILE_ROWS, TILE_COLS, TRANSPOSED);
const LINE_LEN = select(TILE_COLS, TILE_ROWS, TRANSPOSED);
const LINE_UNITS = LINE_LEN / UNIT;
const LINE_BLOCKS = LINE_LEN / BLOCK;

var<workgroup> wg_tile: array<u32, TILE_ROWS * TILE_PITCH>;
var<workgroup> wg_bits: array<u32, TILE_BITS>;
var<workgroup> wg_amax: array<atomic<u32>, LINES / BLOCK_LINES * LINE_BLOCKS>;

// Eight elements of a line of the tile.
fn tile8(line: u32, k: u32) -> array<u32, 8> {
    var at = line * TILE_PITCH + k;
    var step = 1u;
    if (TRANSPOSED) {
        at = k * TILE_PITCH + line;
        step = TILE_PITCH;
    }
    return array<u32, 8>(wg_tile[at], wg_tile[at + step], wg_tile[at + 2u * step], wg_tile[at + 3u * step],
        wg_tile[at + 4u * step], wg_tile[at + 5u * step], wg_tile[at + 6u * step], wg_tile[at + 7u * step]);
}

fn half_at(row: u32, col: u32) -> u32 {
    return (wg_bits[row * BITS_PITCH + col / 2u] >> (16u * (col & 1u))) & 0xffffu;
}

// Their random halves, low ones first.
fn bits8(line: u32, k: u32) -> vec4<u32> {
    if (!STOCHASTIC) { return vec4<u32>(); }
    if (TRANSPOSED) {
        return vec4<u32>(half_at(k, line) | (half_at(k + 1u, line) << 16u),
                         half_at(k + 2u, line) | (half_at(k + 3u, line) << 16u),
                         half_at(k + 4u, line) | (half_at(k + 5u, line) << 16u),
                         half_at(k + 6u, line) | (half_at(k + 7u, line) << 16u));
    }
    let at = line * BITS_PITCH + k / 2u;
    return vec4<u32>(wg_bits[at], wg_bits[at + 1u], wg_bits[at + 2u], wg_bits[at + 3u]);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let tiles = (p.cols + TILE_COLS - 1u) / TILE_COLS;
    let tile = wg.y * wgs.x + wg.x;
    let row0 = tile / tiles * TILE_ROWS;
    let col0 = tile % tiles * TILE_COLS;

    // Load; zero outside x.
    let r = lane / TILE_GROUPS;
    let c = lane % TILE_GROUPS * 8u;
    var v = array<u32, 8>();
    if (row0 + r < p.rows) {
        let at = p.x_offset + (row0 + r) * p.pitch + col0 + c;
        if (col0 + c + 8u <= p.cols) {
            v = load8(at);
        } else {
            for (var j = 0u; j < 8u; j++) {
                if (col0 + c + j < p.cols) { v[j] = load1(at + j); }
            }
        }
    }
    for (var j = 0u; j < 8u; j++) { wg_tile[r * TILE_PITCH + c + j] = v[j]; }
    if (STOCHASTIC) {
        let bits = threefry_group(p.counter, (row0 + r) * p.groups + (col0 + c) / 8u, p.key);
        let at = r * BITS_PITCH + c / 2u;
        wg_bits[at] = bits.x;
        wg_bits[at + 1u] = bits.y;
        wg_bits[at + 2u] = bits.z;
        wg_bits[at + 3u] = bits.w;
    }
    workgroupBarrier();

    // One unit an invocation.
    let line = lane / LINE_UNITS;
    let k = lane % LINE_UNITS * UNIT;
    let block = line / BLOCK_LINES * LINE_BLOCKS + k / BLOCK;
    let working = lane < LINES * LINE_UNITS;
    var a = array<u32, 8>();
    var b = array<u32, 8>();
    if (working) {
        a = tile8(line, k);
        if (UNIT == 16u) { b = tile8(line, k + 8u); }
        atomicMax(&wg_amax[block], max(amax8(a), amax8(b)));
    }
    workgroupBarrier();

    let line0 = select(row0, col0, TRANSPOSED);
    let k0 = select(col0, row0, TRANSPOSED);
    let lines = select(p.rows, p.cols, TRANSPOSED);
    let line_len = select(p.cols, p.rows, TRANSPOSED);
    // Units of the last block's padding are written too.
    let live = working && line0 + line < lines && (k0 + k) / BLOCK * BLOCK < line_len;
    if (!live) { return; }

    var ts = p.tensor_scale;
    if (TENSOR_SCALED) {
        if (ts == 0u) { ts = tensor_scale_from_amax(atomicLoad(&state[1])); }
        if (p.first == 1u && tile == 0u && lane == 0u) { atomicStore(&state[2], ts); }
    }
    let scale = scale_from_amax(atomicLoad(&wg_amax[block]), p.carry, ts);
    if (line % BLOCK_LINES == 0u && k % BLOCK == 0u) {
        let at = p.scales_offset + (line0 + line) / BLOCK_LINES * p.blocks + (k0 + k) / BLOCK;
        atomicOr(&scales[at / 4u], scale << (8u * (at % 4u)));
        if (scale == SCALE_NAN) { atomicAdd(&state[0], 1u); }
    }

    let at = p.codes_offset + (line0 + line) * p.line_words + (k0 + k) / UNIT * UNIT_WORDS;
    if (scale == SCALE_NAN) {
        for (var i = 0u; i < UNIT_WORDS; i++) { codes[at + i] = 0u; }
        return;
    }
    let low = pack8(encode8(a, scale, ts, bits8(line, k)));
    codes[at] = low.x;
    if (BITS == 8u) { codes[at + 1u] = low.y; }
    if (UNIT == 16u) {
        let high = pack8(encode8(b, scale, ts, bits8(line, k + 8u)));
        codes[at + 1u] = low.y | (high.x << 16u);
        codes[at + 2u] = (high.x >> 16u) | (high.y << 16u);
    }
}
