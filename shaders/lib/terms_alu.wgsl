// The ALU tier's terms of one line of B: 32 products each.

// A: position e of row m and lane l at (m · 32 + e) · LANES + l.
var<workgroup> a_memory: array<f32, M * 32u * LANES>;

// Nothing is fetched ahead.
alias Line = u32;

var<private> chunk: u32;

fn line_open(j: u32) -> Line { return j; }
fn line_fetch(lines: ptr<function, Lines>, u: u32, j: u32, k: u32) { chunk = k / (32u * LANES) * (32u * LANES); }

fn stage_a(tile: Tile, m: u32, part: u32, l: u32, k: u32) {
    var x = a_values8(a_index(tile, m), k);
    for (var j = 0u; j < 8u; j++) { a_memory[(m * 32u + part * 8u + j) * LANES + l] = x[j]; }
}

fn line_a(m: u32, l: u32) -> u32 { return 0u; }

fn line_terms(lines: ptr<function, Lines>, u: u32, n: u32, m: u32, a: u32, l: u32) {
    var sum = 0.0;
    for (var q = 0u; q < 4u; q++) {
        var b = b_values8((*lines)[u], l * 32u + chunk + 8u * q);
        for (var e = 0u; e < 8u; e++) { sum = fma(b[e], a_memory[(m * 32u + 8u * q + e) * LANES + l], sum); }
    }
    put_term(m, n, l, sum);
}
