// A dense operand: the interface of lib/operand.wgsl and lib/operand_values.wgsl.

var<private> op_i0: u32;    // the row of i = 0 in the binding; transposed: the column
var<private> op_g0: u32;
var<private> op_k0: u32;    // transposed: the row of k = 0

fn op_bits(i: u32, k: u32) -> u32 {
    if (k >= k_end()) { return 0u; }
    var at = (op_i0 + i) * p.op_pitch + k;
    if (OP_TRANSPOSED) { at = (op_k0 + k) * p.op_pitch + op_i0 + i; }
    if (OP_TYPE == X_F32) { return op_codes[at]; }
    let half = (op_codes[at / 2u] >> (16u * (at % 2u))) & 0xffffu;
    if (OP_TYPE == X_BF16) { return f32_from_bf16(half); }
    return f32_from_f16(half);
}

fn op_anchor(i: u32) -> u32 { return 127u; }

fn op_tensor_scale() -> u32 { return 0x3f800000u; }

fn op_values8(i: u32, k: u32) -> array<f32, 8> {
    return array<f32, 8>(bitcast<f32>(op_bits(i, k)), bitcast<f32>(op_bits(i, k + 1u)), bitcast<f32>(op_bits(i, k + 2u)), bitcast<f32>(op_bits(i, k + 3u)),
                         bitcast<f32>(op_bits(i, k + 4u)), bitcast<f32>(op_bits(i, k + 5u)), bitcast<f32>(op_bits(i, k + 6u)), bitcast<f32>(op_bits(i, k + 7u)));
}
