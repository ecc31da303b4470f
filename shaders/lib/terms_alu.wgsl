// The ALU tier's terms of one line of B: 32 products each.

alias Word = f32;
alias Eight = array<f32, 8>;
const WORDS = 32u;

fn a_eight(i: u32, k: u32) -> Eight { return a_values8(i, k); }

fn stage_a(m: u32, part: u32, l: u32, x: Eight) {
    for (var j = 0u; j < 8u; j++) { a_memory[(m * WORDS + part * 8u + j) * LANES + l] = x[j]; }
}

fn line_terms(j: u32, n: u32, tile: Tile, k: u32, l: u32) {
    var sums: array<f32, M>;
    for (var m = 0u; m < M; m++) { sums[m] = 0.0; }
    for (var q = 0u; q < 4u; q++) {
        let b = b_values8(j, k + 8u * q);
        for (var m = 0u; m < M; m++) {
            for (var e = 0u; e < 8u; e++) { sums[m] = fma(b[e], a_memory[(m * WORDS + 8u * q + e) * LANES + l], sums[m]); }
        }
    }
    for (var m = 0u; m < M; m++) { put_term(m, n, l, sums[m]); }
}
