// quantize_tile: a tile of x through workgroup memory → codes and scales, for blocks along the columns (the
// result is the transpose, blocked axis contiguous) and for square blocks, along either axis.
// Layout:   x[rows, pitch] · codes[lines, line_units units] · scales[⌈lines/BLOCK_LINES⌉, blocks bytes]
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

// WG · 16 elements: each invocation loads two groups of eight columns, and encodes one unit along a line.
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

// Loads one group of eight into the tile, zero outside x, and draws its random halves.
fn load_group(group: u32, row0: u32, col0: u32) {
    let r = group / TILE_GROUPS;
    let c = group % TILE_GROUPS * 8u;
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
    let at = r * TILE_PITCH + c;
    wg_tile[at] = v[0];
    wg_tile[at + 1u] = v[1];
    wg_tile[at + 2u] = v[2];
    wg_tile[at + 3u] = v[3];
    wg_tile[at + 4u] = v[4];
    wg_tile[at + 5u] = v[5];
    wg_tile[at + 6u] = v[6];
    wg_tile[at + 7u] = v[7];
    if (STOCHASTIC) {
        let bits = threefry_group(p.counter, (row0 + r) * p.groups + (col0 + c) / 8u, p.key);
        let to = r * BITS_PITCH + c / 2u;
        wg_bits[to] = bits.x;
        wg_bits[to + 1u] = bits.y;
        wg_bits[to + 2u] = bits.z;
        wg_bits[to + 3u] = bits.w;
    }
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let tiles = (p.cols + TILE_COLS - 1u) / TILE_COLS;
    let tile = wg.y * wgs.x + wg.x;
    let row0 = tile / tiles * TILE_ROWS;
    let col0 = tile % tiles * TILE_COLS;

    load_group(lane, row0, col0);
    load_group(lane + WG, row0, col0);
    workgroupBarrier();

    // One unit an invocation, numbered so that a subgroup's reads fall into different banks.
    let line = select(lane / LINE_UNITS, lane % LINES, TRANSPOSED);
    let k = select(lane % LINE_UNITS, lane / LINES, TRANSPOSED) * UNIT;
    let block = line / BLOCK_LINES * LINE_BLOCKS + k / BLOCK;
    let a = tile8(line, k);
    let b = tile8(line, k + 8u);
    atomicMax(&wg_amax[block], max(amax8(a), amax8(b)));
    workgroupBarrier();

    let line0 = select(row0, col0, TRANSPOSED);
    let k0 = select(col0, row0, TRANSPOSED);
    let lines = select(p.rows, p.cols, TRANSPOSED);
    let line_len = select(p.cols, p.rows, TRANSPOSED);
    // Units of the last block's padding are written too.
    let live = line0 + line < lines && (k0 + k) / BLOCK * BLOCK < line_len;
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

    var c = Codes();
    if (scale != SCALE_NAN) { c = encode16(a, b, scale, ts, bits8(line, k), bits8(line, k + 8u)); }
    codes_store(p.codes_offset + (line0 + line) * p.line_units + (k0 + k) / UNIT, c);
}
