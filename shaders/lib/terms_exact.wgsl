// The exact tier's terms of one line of B: an integer dot product a segment, times both factors.

// A's integers: word w of row m and lane l at (m · WORDS + w) · LANES + l; and its factors.
var<workgroup> a_memory: array<u32, M * WORDS * LANES>;
var<workgroup> a_factors: array<f32, M * TERMS>;

struct Line { anchor: u32, raw: array<vec2<u32>, 4>, scales: vec2<u32> }

fn line_open(j: u32) -> Line {
    var line: Line;
    line.anchor = b_anchor(j);
    return line;
}

fn line_fetch(lines: ptr<function, Lines>, u: u32, j: u32, k: u32) {
    for (var q = 0u; q < 4u; q++) { (*lines)[u].raw[q] = b_raw8(j, k + 8u * q); }
    (*lines)[u].scales.x = b_scale(j, k);
    if (SEGMENTS == 2u) { (*lines)[u].scales.y = b_scale(j, k + 16u); }
}

fn stage_a(tile: Tile, m: u32, part: u32, l: u32, k: u32) {
    let i = a_index(tile, m);
    let words = a_ints(a_raw8(i, k));
    a_memory[(m * WORDS + part * 2u) * LANES + l] = words.x;
    a_memory[(m * WORDS + part * 2u + 1u) * LANES + l] = words.y;
    // A segment's first part brings its scale.
    if (part % (4u / SEGMENTS) == 0u) {
        a_factors[m * TERMS + l * SEGMENTS + part / (4u / SEGMENTS)] = a_factor(a_scale(i, k), a_anchor(i));
    }
}

// A's words of lane l in row m.
fn line_a(m: u32, l: u32) -> array<u32, 8> {
    var a: array<u32, 8>;
    for (var w = 0u; w < WORDS; w++) { // unroll
        a[w] = a_memory[(m * WORDS + w) * LANES + l];
    }
    return a;
}

fn line_terms(lines: ptr<function, Lines>, u: u32, n: u32, m: u32, a: array<u32, 8>, l: u32) {
    for (var segment = 0u; segment < SEGMENTS; segment++) { // unroll
        let fb = b_factor((*lines)[u].scales[segment], (*lines)[u].anchor);
        var s = 0i;
        for (var e = 0u; e < 4u / SEGMENTS; e++) { // unroll
            let b = b_ints((*lines)[u].raw[segment * (4u / SEGMENTS) + e]);
            s += dot4I8Packed(b.x, a[2u * (segment * (4u / SEGMENTS) + e)]);
            s += dot4I8Packed(b.y, a[2u * (segment * (4u / SEGMENTS) + e) + 1u]);
        }
        put_term(m, n, l * SEGMENTS + segment, f32(s) * (a_factors[m * TERMS + l * SEGMENTS + segment] * fb));
    }
}
