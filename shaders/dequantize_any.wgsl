// dequantize_any: codes and scales → y for every layout: ragged rows, blocks along the columns, square blocks;
// one word of y an invocation.
// Layout:   codes[lines, line_words words] · scales[⌈lines/BLOCK_LINES⌉, blocks bytes] · y[rows, cols], tight
// Numerics: as shaders/dequantize.wgsl; bit-exact with the twin.
// Dispatch: ceil(words of y / WG) workgroups, spread over x and y
// Twin:     src/kernels/dequantize.rs

struct Params {
    rows: u32,              // of y, in this binding
    cols: u32,
    line0: u32,             // the first line in the binding of codes
    lines: u32,             // lines in the binding of codes
    k0: u32,                // with blocks along columns: the tensor's row that is y's first
    line_words: u32,        // words of a line of codes
    blocks: u32,            // blocks of a line
    row0: u32,              // with blocks along rows: the tensor's row that is y's first
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> codes: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read> state: array<u32>;    // [2]: the tensor-wide scale, see quantize.wgsl
@group(0) @binding(4) var<storage, read_write> y: array<u32>;

const PER_WORD = select(2u, 1u, Y_TYPE == X_F32);

// The f32 bits of the element (row, col) of y; `old` if its line is in another binding.
fn element(row: u32, col: u32, old: u32) -> u32 {
    let line = select(p.row0 + row, col, TRANSPOSED) - p.line0;
    let k = select(col, p.k0 + row, TRANSPOSED);
    if (line >= p.lines) { return old; }
    let bit = k * BITS;
    let at = line * p.line_words + bit / 32u;
    var code = codes[at] >> (bit % 32u);
    if (BITS == 6u && bit % 32u > 26u) { code |= codes[at + 1u] << (32u - bit % 32u); }
    let block = line / BLOCK_LINES * p.blocks + k / BLOCK;
    let scale = (scales[block / 4u] >> (8u * (block % 4u))) & 0xffu;
    var ts = 0u;
    if (TENSOR_SCALED) { ts = state[2]; }
    let value = mx_decode(code & ((1u << BITS) - 1u), scale, ts);
    if (Y_TYPE == X_F32) { return value; }
    return narrow(value);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let word = (wg.y * wgs.x + wg.x) * WG + lane;
    let first = word * PER_WORD;
    if (first >= p.rows * p.cols) { return; }
    let old = y[word];
    if (Y_TYPE == X_F32) {
        y[word] = element(first / p.cols, first % p.cols, old);
        return;
    }
    var value = element(first / p.cols, first % p.cols, old & 0xffffu);
    if (first + 1u < p.rows * p.cols) {
        let next = first + 1u;
        value |= element(next / p.cols, next % p.cols, old >> 16u) << 16u;
    }
    y[word] = value;
}
