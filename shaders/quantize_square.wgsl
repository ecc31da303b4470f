// quantize_square: square blocks of x → codes along the rows, and scales; one unit of a row an invocation.
// Layout:   x[rows, pitch] · codes[rows, line_units units] · scales[ceil(rows/BLOCK), blocks bytes]
// Numerics: integer-only; bit-exact with the twin, NaN, ±0 and subnormals included. OCP MX v1.0, section 6.3.
// Dispatch: ceil(rows / TILE_ROWS) · ceil(cols / TILE_COLS) workgroups, spread over x and y; scales zeroed before
// Twin:     src/kernels/quantize.rs

@group(0) @binding(0) var<uniform> p: Params;    // lib/tile.wgsl
@group(0) @binding(1) var<storage, read> x: array<XWord>;
@group(0) @binding(2) var<storage, read_write> codes: array<CodesWord>;
@group(0) @binding(3) var<storage, read_write> scales: array<atomic<u32>>;
@group(0) @binding(4) var<storage, read_write> state: array<atomic<u32>>;  // see quantize.wgsl

const ROW_UNITS = TILE_COLS / UNIT;
const ROW_BLOCKS = TILE_COLS / BLOCK;
const TILE_BLOCKS = TILE_ROWS / BLOCK * ROW_BLOCKS;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let tiles = (p.cols + TILE_COLS - 1u) / TILE_COLS;
    let tile = wg.y * wgs.x + wg.x;
    let in_row = lane / ROW_UNITS;
    let in_col = lane % ROW_UNITS * UNIT;
    let row = tile / tiles * TILE_ROWS + in_row;
    let col = tile % tiles * TILE_COLS + in_col;
    tile_clear(lane);
    workgroupBarrier();

    var a = array<u32, 8>();
    var b = array<u32, 8>();
    if (row < p.rows) {
        let at = p.x_offset + row * p.pitch + col;
        a = load8_within(at, col, p.cols);
        b = load8_within(at + 8u, col + 8u, p.cols);
    }
    // Drawn here, while the loads are on their way.
    var ra = array<u32, 8>();
    var rb = array<u32, 8>();
    if (STOCHASTIC) {
        let group = row * p.groups + col / 8u;
        ra = threefry_halves(threefry_group(p.counter, group, p.key));
        rb = threefry_halves(threefry_group(p.counter, group + 1u, p.key));
    }
    let block = in_row / BLOCK * ROW_BLOCKS + in_col / BLOCK;
    atomicMax(&wg_amax[block], max(amax8(a), amax8(b)));
    workgroupBarrier();

    // Units of the last block's padding are written too.
    if (row >= p.rows || col / BLOCK * BLOCK >= p.cols) { return; }
    let ts = tile_tensor_scale(p.tensor_scale, p.first == 1u && tile == 0u && lane == 0u);
    let scale = scale_from_amax(atomicLoad(&wg_amax[block]), p.carry, ts);
    if (in_row % BLOCK == 0u && in_col % BLOCK == 0u) {
        let i = row / BLOCK;
        let j = col / BLOCK;
        tile_put_scale(p.scales_offset + i * p.blocks + j, p.anchor_row + i, p.anchor_column + j, scale);
    }
    var c = Codes();
    if (scale != SCALE_NAN) { c = encode16(a, b, scale, ts, ra, rb); }
    codes_store(p.codes_offset + row * p.line_units + col / UNIT, c);
}
