// What lib/multiply_exact.wgsl does, without cooperative matrices.

var<workgroup> factors: array<f32, 4u * SEGMENTS * (BM + BN)>;

fn factor_put(slot: u32, segment: u32, row: u32, factor: f32) { factors[(slot * SEGMENTS + segment) * (BM + BN) + row] = factor; }

fn multiply(sums: ptr<function, Sums>, a_row: u32, b_row: u32, stage: u32) {
    for (var i = 0u; i < FM; i++) {
        for (var j = 0u; j < FN; j++) {
            for (var e = 0u; e < OWN; e++) {
                let at = own_lane * OWN + e;
                let row = a_row + i * SUBGROUPS_M * FRAGMENT + at / FRAGMENT;
                let col = b_row + j * FRAGMENT + at % FRAGMENT;
                var total = (*sums)[(i * FN + j) * OWN + e];
                for (var segment = 0u; segment < SEGMENTS; segment++) {
                    var sum = 0.0;
                    for (var k8 = 0u; k8 < 32u / SEGMENTS; k8 += 8u) {
                        // As in lib/multiply_emulated.wgsl.
                        for (var k = 0u; k < 8u; k++) { // unroll
                            sum = fma(a_at(row, segment * (32u / SEGMENTS) + k8 + k), b_at(col, segment * (32u / SEGMENTS) + k8 + k), sum);
                        }
                    }
                    let f = (stage * SEGMENTS + segment) * (BM + BN);
                    total = fma(sum * factors[f + row], factors[f + BM + col], total);
                }
                (*sums)[(i * FN + j) * OWN + e] = total;
            }
        }
    }
}

fn stage_barrier() { workgroupBarrier(); }
