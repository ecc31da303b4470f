// An MX operand, instantiated for A and B: `op_` and `OP_` become `a_`, `A_` or `b_`, `B_`. Output index i and position k
// count from where this dispatch, batch or expert starts. Needs Params and lib/float.wgsl; OP_TRANSPOSED: contracted over
// the lines. Twin: View in src/kernels/matmul/cpu.rs.

var<private> op_i0: u32;    // of i = 0: the line in the bindings, or the position along the lines
var<private> op_g0: u32;    // the same in the whole tensor
var<private> op_k0: u32;    // of k = 0: the position along the lines, or the line

const OP_CODE_MASK = (1u << OP_BITS) - 1u;
// Whether a chunk of whole 128 positions has its scales in a word: a group of k may start at any block.
const OP_SCALE_WORDS = OP_BLOCK == 32u && !OP_SCALE_E4M3 && !GROUPED_K;

fn op_scale(i: u32, k: u32) -> u32 {
    var row = (op_i0 + i) / OP_LINES;
    var col = k / OP_BLOCK;
    if (OP_TRANSPOSED) {
        row = (op_k0 + k) / OP_LINES;
        col = (op_i0 + i) / OP_BLOCK;
    }
    if (select(col >= p.op_blocks, k >= p.k, OP_TRANSPOSED)) { return 0u; }
    let at = row * p.op_blocks + col;
    return (op_scales[at / 4u] >> (8u * (at % 4u))) & 0xffu;
}

// The largest scale byte of the operand's line; 255 if one is NaN. See shaders/anchors.wgsl.
fn op_anchor(i: u32) -> u32 {
    return op_state[p.op_anchors + op_anchor_at(i)];
}

fn op_anchor_at(i: u32) -> u32 { return (op_g0 + i) / select(OP_LINES, OP_BLOCK, OP_TRANSPOSED); }

fn op_tensor_scale() -> u32 { return select(0x3f800000u, op_state[2], OP_SCALE_E4M3); }

// The scale that k lies under, as f32, relative to the line's anchor: 2^(scale - anchor + shift), zero `below` that far
// below it; for E4M3 the scale itself. NaN gives zero: the anchor says it.
fn op_relative(scale: u32, anchor: u32, shift: u32, below: u32) -> f32 {
    if (OP_SCALE_E4M3) {
        let s = scale & 0x7fu;
        if (s == 0x7fu) { return 0.0; }
        return bitcast<f32>(f32_from_parts(select(s & 7u, (s & 7u) | 8u, s >= 8u), i32(max(s >> 3u, 1u)) - 10));
    }
    if (anchor == 255u || scale + below < anchor) { return 0.0; }
    return bitcast<f32>((scale + 127u + shift - anchor) << 23u);
}

// The factor of an integer dot product.
fn op_factor(scale: u32, anchor: u32) -> f32 { return op_relative(scale, anchor, 44u, 107u); }
