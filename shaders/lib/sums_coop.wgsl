// A subgroup's sums in cooperative matrices.

alias Word = f32;
alias Sums = array<MatC, FM * FN>;

fn sums_zero(sums: ptr<function, Sums>) {
    for (var f = 0u; f < FM * FN; f++) { // unroll
        (*sums)[f] = MatC();
    }
}
