// The exact tier's terms of one line of B: an integer dot product a segment, times both factors.

alias Word = u32;
alias Eight = vec2<u32>;
const WORDS = 8u;

fn a_eight(i: u32, k: u32) -> Eight { return a_ints8(i, k); }

fn stage_a(m: u32, part: u32, l: u32, words: Eight) {
    a_memory[(m * WORDS + part * 2u) * LANES + l] = words.x;
    a_memory[(m * WORDS + part * 2u + 1u) * LANES + l] = words.y;
}

fn line_terms(j: u32, n: u32, tile: Tile, k: u32, l: u32) {
    let b = array<vec2<u32>, 4>(b_ints8(j, k), b_ints8(j, k + 8u), b_ints8(j, k + 16u), b_ints8(j, k + 24u));
    for (var m = 0u; m < M; m++) {
        let i = min(tile.row + m, tile.row + tile.rows - 1u);
        for (var segment = 0u; segment < SEGMENTS; segment++) {
            var s = 0i;
            for (var q = segment * (4u / SEGMENTS); q < (segment + 1u) * (4u / SEGMENTS); q++) {
                s += dot4I8Packed(b[q].x, a_memory[(m * WORDS + 2u * q) * LANES + l]);
                s += dot4I8Packed(b[q].y, a_memory[(m * WORDS + 2u * q + 1u) * LANES + l]);
            }
            let at = k + segment * (32u / SEGMENTS);
            put_term(m, n, l * SEGMENTS + segment, f32(s) * (a_factor(i, at) * b_factor(j, at)));
        }
    }
}
