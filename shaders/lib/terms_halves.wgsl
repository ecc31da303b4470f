// The exact tier's terms for E2M1 on both sides, in f16: products are multiples of 1/4 up to 36, so that sums of eight have
// 11 bits and every one of them is exact. Fewer instructions than integers take while there are few rows of A; needs f16
// subnormals, which 1/2 is as read here. Lines of whole 128 positions. Same bits as lib/terms_exact.wgsl.

// A times 2^8: pair w of row m and lane l at (m · WORDS + w) · LANES + l; and its factors.
var<workgroup> a_memory: array<u32, M * WORDS * LANES>;
var<workgroup> a_factors: array<f32, M * TERMS>;

struct Line { anchor: u32, codes: vec4<u32>, scale: u32 }

fn line_open(j: u32) -> Line {
    var line: Line;
    line.anchor = b_anchor(j);
    return line;
}

fn line_fetch(lines: ptr<function, Lines>, u: u32, j: u32, k: u32) {
    if (k < p.k) { (*lines)[u].codes = b_codes[(b_i0 + j) * (p.b_pitch / 4u) + k / 32u]; } else { (*lines)[u].codes = vec4<u32>(); }
    (*lines)[u].scale = b_scale(j, k);
}

fn stage_a(tile: Tile, m: u32, part: u32, l: u32, k: u32) {
    let i = a_index(tile, m);
    var w = 0u;
    if (k < p.k) { w = a_codes[(a_i0 + i) * (p.a_pitch / 4u) + k / 32u][part]; }
    for (var s = 0u; s < 4u; s++) {
        a_memory[(m * WORDS + part * 4u + s) * LANES + l] = pack2x16float(unpack2x16float(nibble_pair(w, 12u - 4u * s)) * 4194304.0);
    }
    if (part == 0u) { a_factors[m * TERMS + l] = a_factor(a_scale(i, k), a_anchor(i)); }
}

// A's pairs of lane l in row m.
fn line_a(m: u32, l: u32) -> array<vec2<f16>, 16> {
    var a: array<vec2<f16>, 16>;
    for (var w = 0u; w < WORDS; w++) { // unroll
        a[w] = half2(a_memory[(m * WORDS + w) * LANES + l]);
    }
    return a;
}

fn half_sum(w: u32, x: vec2<f16>, y: vec2<f16>, z: vec2<f16>, v: vec2<f16>, before: vec2<f16>) -> vec2<f16> {
    var sum = fma(half2(nibble_pair(w, 12u)), x, before);
    sum = fma(half2(nibble_pair(w, 8u)), y, sum);
    sum = fma(half2(nibble_pair(w, 4u)), z, sum);
    return fma(half2(nibble_pair(w, 0u)), v, sum);
}

fn line_terms(lines: ptr<function, Lines>, u: u32, n: u32, m: u32, a: array<vec2<f16>, 16>, l: u32) {
    let fb = b_factor((*lines)[u].scale, (*lines)[u].anchor);
    let c = (*lines)[u].codes;
    let x = vec2<f32>(half_sum(c.y, a[4], a[5], a[6], a[7], half_sum(c.x, a[0], a[1], a[2], a[3], vec2<f16>())));
    let y = vec2<f32>(half_sum(c.w, a[12], a[13], a[14], a[15], half_sum(c.z, a[8], a[9], a[10], a[11], vec2<f16>())));
    // In quarters: 2^14 / 2^8 for the halves' units, times 4.
    let s = ((x.x + x.y) + (y.x + y.y)) * 256.0;
    put_term(m, n, l, s * (a_factors[m * TERMS + l] * fb));
}
