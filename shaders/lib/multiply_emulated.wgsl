// What lib/multiply.wgsl does, without cooperative matrices.

fn multiply(sums: ptr<function, Sums>, a_row: u32, b_row: u32, stage: u32) {
    for (var i = 0u; i < FM; i++) {
        for (var j = 0u; j < FN; j++) {
            for (var e = 0u; e < OWN; e++) {
                let at = own_lane * OWN + e;
                var sum = (*sums)[(i * FN + j) * OWN + e];
                for (var k8 = 0u; k8 < 4u * PER_UNIT; k8 += 8u) {
                    // llvmpipe ends an invocation's loops after 65535 rounds in all, which a long k would meet.
                    for (var k = 0u; k < 8u; k++) { // unroll
                        sum = sum_of(a_at(a_row + i * SUBGROUPS_M * FRAGMENT + at / FRAGMENT, k8 + k),
                                     b_at(b_row + j * FRAGMENT + at % FRAGMENT, k8 + k), sum);
                    }
                }
                (*sums)[(i * FN + j) * OWN + e] = sum;
            }
        }
    }
}

fn factor_put(slot: u32, segment: u32, row: u32, factor: f32) {}

fn stage_barrier() { workgroupBarrier(); }
