// A dense f16 operand of the tensor tier. `op_` as in lib/operand_dense.wgsl.

fn op_halves8(i: u32, k: u32) -> vec4<u32> {
    var h = array<u32, 8>();
    for (var j = 0u; j < 8u; j++) {
        if (k + j < k_end()) {
            var at = (op_i0 + i) * p.op_pitch + k + j;
            if (OP_TRANSPOSED) { at = (op_k0 + k + j) * p.op_pitch + op_i0 + i; }
            h[j] = (op_codes[at / 2u] >> (16u * (at % 2u))) & 0xffffu;
        }
    }
    return vec4<u32>(h[0] | (h[1] << 16u), h[2] | (h[3] << 16u), h[4] | (h[5] << 16u), h[6] | (h[7] << 16u));
}
