// A product of what workgroup memory holds, DEPTH contracted positions: A, TILE rows, and B, OP_COLS columns an
// invocation, to sums of TM × OP_COLS. Ascending positions, fused multiply-adds if the device has them.

alias op_Sums = array<vec4<f32>, TM * OP_COLS / 4u>;

fn op_zero(sums: ptr<function, op_Sums>) {
    for (var s = 0u; s < TM * OP_COLS / 4u; s++) { // unroll
        (*sums)[s] = vec4<f32>();
    }
}

fn op_multiply(sums: ptr<function, op_Sums>, ty: u32, tx: u32) {
    for (var q = 0u; q < DEPTH / 4u; q++) {
        for (var k = 0u; k < 4u; k++) { // unroll
            var b: array<vec4<f32>, OP_COLS / 4u>;
            for (var j = 0u; j < OP_COLS / 4u; j++) { // unroll
                b[j] = memory_b[q][k][(j * ACROSS + tx) ^ (2u * q)];
            }
            for (var i = 0u; i < TM / 4u; i++) { // unroll
                let a = memory_a[q][k][(i * DOWN + ty) ^ (2u * q)];
                for (var r = 0u; r < 4u; r++) { // unroll
                    for (var j = 0u; j < OP_COLS / 4u; j++) { // unroll
                        (*sums)[(4u * i + r) * (OP_COLS / 4u) + j] =
                            fma(b[j], vec4<f32>(a[r]), (*sums)[(4u * i + r) * (OP_COLS / 4u) + j]);
                    }
                }
            }
        }
    }
}
