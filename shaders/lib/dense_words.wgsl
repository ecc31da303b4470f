// Elements of a dense operand bound as words. `op_` as in lib/operand_dense.wgsl, which it needs.

fn op_half(i: u32, k: u32) -> u32 {
    let at = op_place(i, k);
    return (op_codes[at / 2u] >> (16u * (at % 2u))) & 0xffffu;
}

fn op_bits(i: u32, k: u32) -> u32 {
    if (k >= k_end()) { return 0u; }
    if (OP_TYPE == X_F32) { return op_codes[op_place(i, k)]; }
    if (OP_TYPE == X_BF16) { return f32_from_bf16(op_half(i, k)); }
    return f32_from_f16(op_half(i, k));
}

fn op_values8(i: u32, k: u32) -> array<f32, 8> {
    return array<f32, 8>(bitcast<f32>(op_bits(i, k)), bitcast<f32>(op_bits(i, k + 1u)), bitcast<f32>(op_bits(i, k + 2u)), bitcast<f32>(op_bits(i, k + 3u)),
                         bitcast<f32>(op_bits(i, k + 4u)), bitcast<f32>(op_bits(i, k + 5u)), bitcast<f32>(op_bits(i, k + 6u)), bitcast<f32>(op_bits(i, k + 7u)));
}

fn op_eight(i: u32, k: u32) -> vec4<u32> {
    var h = array<u32, 8>();
    for (var j = 0u; j < 8u; j++) { // unroll
        if (k + j < k_end()) { h[j] = op_half(i, k + j); }
    }
    return vec4<u32>(h[0] | (h[1] << 16u), h[2] | (h[3] << 16u), h[4] | (h[5] << 16u), h[6] | (h[7] << 16u));
}
