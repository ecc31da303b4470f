// A strip of a tile to a dense y whose rows are whole quads: y is bound as an array of them. `strip_get4(i)`: the strip's
// sums, BN a row. Needs lib/y_quads_*.wgsl.

// Four values: all at once where powers of two move only exponents, nearly always; else one after another, in a loop, so that
// the code stays small.
fn finished4(sum: vec4<f32>, ra: u32, rb: vec4<u32>, valid: bool) -> vec4<u32> {
    let bits = bitcast<vec4<u32>>(sum);
    let biased = vec4<i32>((bits >> vec4<u32>(23u)) & vec4<u32>(255u));
    let alpha = i32((p.alpha >> 23u) & 255u);
    let e = biased + vec4<i32>(rb) + (alpha - 127 + i32(ra) - 254 + p.exponent);
    let zero = (bits & vec4<u32>(0x7fffffffu)) == vec4<u32>();
    let plain = min(biased, e) > vec4<i32>() & max(biased, e) < vec4<i32>(255);
    if ((p.alpha & 0x007fffffu) == 0u && alpha > 0 && alpha < 255 && !A_SCALE_E4M3 && !B_SCALE_E4M3 && valid && ra != 255u
        && all(rb != vec4<u32>(255u)) && all(zero | plain)) {
        let v = ((bits ^ vec4<u32>(p.alpha)) & vec4<u32>(0x80000000u)) | (vec4<u32>(e) << vec4<u32>(23u)) | (bits & vec4<u32>(0x007fffffu));
        return select(v, vec4<u32>(), zero);
    }
    // No index but constants: a vector that is indexed otherwise lives in memory.
    var v = vec4<u32>();
    for (var c = 0u; c < 4u; c++) {
        let one = select(select(sum.x, sum.y, c == 1u), select(sum.z, sum.w, c == 3u), c >= 2u);
        let anchor = select(select(rb.x, rb.y, c == 1u), select(rb.z, rb.w, c == 3u), c >= 2u);
        v = select(v, vec4<u32>(finished(one, ra, anchor, valid)), vec4<u32>(0u, 1u, 2u, 3u) == vec4<u32>(c));
    }
    return v;
}

// `added` of four.
fn added4(a: vec4<u32>, b: vec4<u32>) -> vec4<u32> {
    let sum = bitcast<vec4<u32>>(bitcast<vec4<f32>>(a) + bitcast<vec4<f32>>(b));
    let magnitudes = vec4<u32>(0x7fffffffu);
    let most = max(max(sum & magnitudes, a & magnitudes), b & magnitudes);
    return select(sum, vec4<u32>(F32_NAN), most > vec4<u32>(F32_INFINITY));
}

// Rows first … first + STRIP_ROWS - 1 of the tile. An invocation keeps to its columns.
fn strip_store(tile: Tile, first: u32, lane: u32) {
    const ACROSS = min(BN / 4u, WG);
    for (var c = lane % ACROSS * 4u; c < BN; c += ACROSS * 4u) {
        let j = tile.col + c;
        if (j >= p.n) { continue; }
        let rb = vec4<u32>(b_anchor(j), b_anchor(j + 1u), b_anchor(j + 2u), b_anchor(j + 3u));
        for (var r = lane / ACROSS; r < STRIP_ROWS; r += WG / ACROSS) {
            if (first + r >= tile.rows) { break; }
            let at = ((tile.y_row + first + r) * p.y_pitch + p.y_col + j) / 4u;
            var value = finished4(strip_get4(r * BN + c), a_anchor(tile.row + first + r), rb, tile.valid);
            if ((p.beta & 0x7fffffffu) != 0u) {
                // The exclusive or is of nothing, and keeps the product from being fused with the sum.
                value = added4(value, bitcast<vec4<u32>>(bitcast<f32>(p.beta) * bitcast<vec4<f32>>(y_load(at))) ^ vec4<u32>(p.zero));
            }
            if (BIAS) {
                value = added4(value, vec4<u32>(bias_at(j), bias_at(j + 1u), bias_at(j + 2u), bias_at(j + 3u)));
            }
            y_store(at, value);
        }
    }
}
