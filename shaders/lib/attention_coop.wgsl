// Cooperative matrices over one workgroup memory, typed f32, which holds bf16 operands as well as f32 scores. naga takes a
// matrix's component type from the pointer; src/engine/spirv.rs makes A and B bf16 again.

var<workgroup> memory: array<vec4<f32>, MEMORY>;

fn memory_put(unit: u32, h: vec4<u32>) { memory[unit] = bitcast<vec4<f32>>(h); }
fn memory_get(unit: u32) -> vec4<u32> { return bitcast<vec4<u32>>(memory[unit]); }

// Between what is written to and read from the same rows of scores: a subgroup's own, unless others share them.
fn rows_barrier() {
    if (ACROSS == 1u) { subgroupBarrier(); } else { workgroupBarrier(); }
}

alias Rows = array<MatA, D_FRAGMENTS>;
alias Scores = array<MatC, S_FRAGMENTS>;
alias Results = array<MatC, O_FRAGMENTS>;

// The subgroup's 16 rows.
fn rows_get(rows: ptr<function, Rows>) {
    for (var k = 0u; k < D_FRAGMENTS; k++) { // unroll
        (*rows)[k] = coopLoadT<MatA>(&memory[own_rows * PITCH + 2u * k], PITCH);
    }
}

// Products of the subgroup's rows with those of the tile at `tile`, to the matrix at `to`.
fn scores(rows: ptr<function, Rows>, tile: u32, to: u32) {
    var sums: Scores;
    for (var j = 0u; j < S_FRAGMENTS; j++) { // unroll
        sums[j] = MatC();
    }
    let first = own_across * S_FRAGMENTS * 16u;
    for (var k = 0u; k < D_FRAGMENTS; k++) { // unroll
        for (var j = 0u; j < S_FRAGMENTS; j++) { // unroll
            let b = coopLoad<MatB>(&memory[tile + (first + j * 16u) * PITCH + 2u * k], PITCH);
            sums[j] = coopMultiplyAdd((*rows)[k], b, sums[j]);
        }
    }
    for (var j = 0u; j < S_FRAGMENTS; j++) { // unroll
        let at = to + own_rows * S_PITCH + (first + j * 16u) / 4u;
        let stride = S_PITCH;
        let fragment = sums[j];
        coopStoreT(fragment, &memory[at], stride);
    }
}

fn results_zero(sums: ptr<function, Results>) {
    for (var j = 0u; j < O_FRAGMENTS; j++) { // unroll
        (*sums)[j] = MatC();
    }
}

// Adds the product of the operand at `left` with the tile at `tile`, of which rows are contracted.
fn accumulate(sums: ptr<function, Results>, left: u32, tile: u32) {
    for (var k = 0u; k < STEP / 16u; k++) { // unroll
        let a = coopLoadT<MatA>(&memory[left + own_rows * S_PITCH + 2u * k], S_PITCH);
        for (var j = 0u; j < O_FRAGMENTS; j++) { // unroll
            let b = coopLoadT<MatB>(&memory[tile + k * 16u * PITCH + (own_across * O_FRAGMENTS + j) * 2u], PITCH);
            (*sums)[j] = coopMultiplyAdd(a, b, (*sums)[j]);
        }
    }
}

// As many columns of results as of scores, the round r of them.
fn results_put(sums: ptr<function, Results>, r: u32, to: u32) {
    for (var i = 0u; i < ROUNDS; i++) { // unroll
        if (r == i) {
            for (var j = 0u; j < S_FRAGMENTS; j++) { // unroll
                let at = to + own_rows * S_PITCH + (own_across * S_FRAGMENTS + j) * 4u;
                let stride = S_PITCH;
                let fragment = (*sums)[i * S_FRAGMENTS + j];
                coopStoreT(fragment, &memory[at], stride);
            }
        }
    }
}

// Results times a factor of each row, through the memory of the scores.
fn results_scale(sums: ptr<function, Results>, factor: f32) {
    for (var r = 0u; r < ROUNDS; r++) { // unroll
        results_put(sums, r, SCORES);
        rows_barrier();
        own_scale(SCORES, factor);
        rows_barrier();
        for (var j = 0u; j < S_FRAGMENTS; j++) { // unroll
            let at = SCORES + own_rows * S_PITCH + (own_across * S_FRAGMENTS + j) * 4u;
            (*sums)[r * S_FRAGMENTS + j] = coopLoadT<MatC>(&memory[at], S_PITCH);
        }
        rows_barrier();
    }
}
