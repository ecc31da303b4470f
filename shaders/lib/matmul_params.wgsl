// What the matrix products share: parameters, and where a workgroup's tile lies. Twin: record_gpu in src/kernels/matmul.rs.

struct Params {
    m: u32,                 // outputs of this dispatch (of one batch)
    n: u32,
    k: u32,
    tiles_m: u32,           // tiles of this dispatch; grouped: at most
    tiles_n: u32,
    batch: u32,
    groups: u32,            // grouped: how many ranges of rows, or of k
    experts: u32,
    a_first: u32,           // output index 0: its line in the bindings (transposed: position along the lines)
    a_global: u32,          // the same in the whole tensor
    a_stride: u32,          // output indices from one batch to the next (transposed: lines)
    a_pitch: u32,           // words of a line; dense: elements of a row
    a_blocks: u32,          // blocks of a line
    a_anchors: u32,         // words of the state before the anchors
    a_k: u32,               // transposed: the line of k = 0
    b_first: u32,
    b_global: u32,
    b_stride: u32,          // from one batch or expert to the next
    b_pitch: u32,
    b_blocks: u32,
    b_anchors: u32,
    b_k: u32,
    y_row: u32,             // output (0, 0) in the bindings of y
    y_col: u32,
    y_stride: u32,          // rows from one batch to the next
    y_pitch: u32,           // elements of a row; packed: units of a line
    y_cols: u32,            // columns of y; packed ones include the last block's padding
    y_blocks: u32,
    alpha: u32,             // f32 bits
    beta: u32,              // f32 bits
    exponent: i32,          // of what the sum counts in, the anchors apart
    zero: u32,              // 0
    carry: u32,             // packed output: see lib/tile.wgsl
    tensor_scale: u32,
    sums: u32,              // shaders/matmul_join.wgsl: quads of a row of sums
    windows: u32,           // lib/window.wgsl: where B's start
    key: vec4<u32>,
    counter: vec2<u32>,
    draws: u32,
    slice: u32,             // k in slices: positions of each, a multiple of 128
    stamp: u32,             // lib/window.wgsl: of this product
}

// The tile of a workgroup; `rows` are left in it from its first row on.
struct Tile { batch: u32, row: u32, col: u32, rows: u32, y_row: u32, valid: bool, there: bool }

// Neighbouring workgroups share operands: RASTER tiles down before one across.
fn tile_place(index: u32, lane: u32) -> Tile {
    let tiles = p.tiles_m * p.tiles_n;
    let batch = index / tiles;
    let at = index % tiles;
    let band = RASTER * p.tiles_n;
    let first = at / band * RASTER;
    let height = min(p.tiles_m - first, RASTER);
    let tm = first + at % band % height;
    let tn = at % band / height;
    var tile = Tile(batch, tm * BM, tn * BN, 0u, 0u, true, index < tiles * p.batch);
    if (GROUPED) {
        return tile_grouped(tile, tm, lane);
    }
    tile.rows = p.m - min(tile.row, p.m);
    tile.y_row = p.y_row + batch * p.y_stride + tile.row;
    operands_at(batch, batch);
    return tile;
}

// Where the operands of a batch start; `expert` is B's.
fn operands_at(batch: u32, expert: u32) {
    if (A_TRANSPOSED) {
        a_i0 = p.a_first; a_g0 = p.a_global; a_k0 = p.a_k + batch * p.a_stride;
    } else {
        a_i0 = p.a_first + batch * p.a_stride; a_g0 = p.a_global + batch * p.a_stride; a_k0 = 0u;
    }
    if (B_TRANSPOSED) {
        b_i0 = p.b_first; b_g0 = p.b_global; b_k0 = p.b_k + expert * p.b_stride;
    } else {
        b_i0 = p.b_first + expert * p.b_stride; b_g0 = p.b_global + expert * p.b_stride; b_k0 = 0u;
    }
}
