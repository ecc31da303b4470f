// A stage of 32 positions in the exact tier: f16 holds the integers, a segment's sum is exact in f32, and it is multiplied with
// the factors of its row and its column, exactly, before it is added. naga has no product of elements: src/engine/spirv.rs
// makes one of every difference of matrices.

// Of stage j's row r (A's rows and then B's) in segment s: at (j · SEGMENTS + s) · (BM + BN) + r. Vectors, because matrices are
// loaded from multiples of 16 bytes (Vulkan): an array of f32 may begin anywhere.
var<workgroup> factors: array<vec4<f32>, SEGMENTS * (BM + BN)>;

fn factor_put(slot: u32, segment: u32, row: u32, factor: f32) {
    let at = (slot * SEGMENTS + segment) * (BM + BN) + row;
    factors[at / 4u][at % 4u] = factor;
}

const STEPS = 32u / FRAGMENT / SEGMENTS;

fn multiply(sums: ptr<function, Sums>, a_row: u32, b_row: u32, stage: u32) {
    for (var segment = 0u; segment < SEGMENTS; segment++) { // unroll
        let at = (stage * SEGMENTS + segment) * (BM + BN);
        var b: array<MatB, STEPS * FN>;
        var fb: array<MatC, FN>;
        for (var j = 0u; j < FN; j++) { // unroll
            for (var s = 0u; s < 32u / FRAGMENT / SEGMENTS; s++) { // unroll
                b[j * STEPS + s] = coopLoad<MatB>(&memory[b_fragment(b_row + j * FRAGMENT, segment * STEPS + s)], PITCH);
            }
            // Rows are all the same: a stride of zero.
            fb[j] = coopLoadT<MatC>(&factors[(at + BM + b_row + j * FRAGMENT) / 4u], 0u);
        }
        for (var i = 0u; i < FM; i++) { // unroll
            let row = a_row + i * SUBGROUPS_M * FRAGMENT;
            var a: array<MatA, STEPS>;
            for (var s = 0u; s < 32u / FRAGMENT / SEGMENTS; s++) { // unroll
                a[s] = coopLoadT<MatA>(&memory[a_fragment(row, segment * STEPS + s)], PITCH);
            }
            let fa = coopLoad<MatC>(&factors[(at + row) / 4u], 0u);
            for (var j = 0u; j < FN; j++) { // unroll
                var sum = MatC();
                for (var s = 0u; s < 32u / FRAGMENT / SEGMENTS; s++) { // unroll
                    sum = coopMultiplyAdd(a[s], b[j * STEPS + s], sum);
                }
                // sums += sum · fa · fb.
                (*sums)[i * FN + j] = (*sums)[i * FN + j] + ((sum - fa) - fb[j]);
            }
        }
    }
}

// Between what is put and read of a slice's tile, which is one subgroup's where the slice has but one.
fn stage_barrier() {
    if (SUBGROUPS_M * SUBGROUPS_N == 1u) { subgroupBarrier(); } else { workgroupBarrier(); }
}
