// native_codes: the elements of an MX operand as a native route takes them, padded with zeros.
// Layout:   out[lines padded][k padded], 16 bytes an invocation: 32 codes of four bits or 16 of eight. Word 0 of `flags` is set
//           where E4M3 does not hold an element exactly
// Numerics: exact: codes as they are, or E4M3 of value · 2^WINDOW relative to the line's anchor
// Dispatch: ceil(vectors / WG) workgroups, spread over x and y
// Twin:     src/kernels/native_pack.rs

struct Params {
    lines: u32,
    k: u32,
    a_pitch: u32,       // words of a line
    a_blocks: u32,      // blocks of a line
    a_anchors: u32,     // words of the state before the anchors
    line_vectors: u32,  // of 16 bytes, in a padded line
    vectors: u32,       // in all
    window: i32,
}

// E4M3 of a code under a scale d above the anchor's (never above 0): its eight bits, or 256 if E4M3 has no such value.
fn e4m3_of(code: u32, d: i32) -> u32 {
    let magnitude = code & (A_CODE_MASK >> 1u);
    let sign = (code >> (A_BITS - 1u)) << 7u;
    if (A_BITS == 8u && magnitude > A_MAX_CODE) { return sign | 0x7fu; }
    if (magnitude == 0u) { return sign; }
    let exponent = magnitude >> A_MANTISSA_BITS;
    let fraction = magnitude & ((1u << A_MANTISSA_BITS) - 1u);
    // The value is m · 2^(x - 9): E4M3 counts in units of 2^-9 at its smallest, and has four bits.
    var m = select(fraction, fraction | (1u << A_MANTISSA_BITS), exponent > 0u);
    let x = i32(max(exponent, 1u)) - 1 + A_EMIN - i32(A_MANTISSA_BITS) + d + p.window + 9;
    if (x < 0) {
        let drop = u32(min(-x, 31));
        let kept = m >> drop;
        return select(256u, sign | kept, (kept << drop) == m);
    }
    let up = min(countLeadingZeros(m) - 28u, u32(x));
    m <<= up;
    return sign | ((u32(x) - up) * 8u + m);
}

fn bytes4(raw: vec2<u32>, first: u32, d: i32) -> u32 {
    var word = 0u;
    var wrong = 0u;
    for (var j = 0u; j < 4u; j++) {
        let byte = e4m3_of(a_pick(raw, first + j), d);
        wrong |= byte;
        word |= (byte & 0xffu) << (8u * j);
    }
    if (wrong >= 256u) { atomicStore(&flags[0], 1u); }
    return word;
}

fn bytes8(i: u32, k: u32) -> vec2<u32> {
    let raw = a_raw8(i, k);
    let anchor = a_anchor(i);
    // A NaN line is made NaN by its anchor.
    if (anchor == 255u || all(raw == vec2<u32>())) { return vec2<u32>(); }
    let d = i32(a_scale(i, k)) - i32(anchor);
    return vec2<u32>(bytes4(raw, 0u, d), bytes4(raw, 4u, d));
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let at = (wg.y * wgs.x + wg.x) * WG + lane;
    if (at >= p.vectors) { return; }
    let i = at / p.line_vectors;
    let k = at % p.line_vectors * select(16u, 32u, !E4M3 && A_BITS == 4u);
    var vector = vec4<u32>();
    if (i < p.lines && k < p.k) {
        if (E4M3) {
            vector = vec4<u32>(bytes8(i, k), bytes8(i, k + 8u));
        } else if (A_BITS == 4u) {
            vector = vec4<u32>(a_raw8(i, k).x, a_raw8(i, k + 8u).x, a_raw8(i, k + 16u).x, a_raw8(i, k + 24u).x);
        } else {
            vector = vec4<u32>(a_raw8(i, k), a_raw8(i, k + 8u));
        }
    }
    out[at] = vector;
}
