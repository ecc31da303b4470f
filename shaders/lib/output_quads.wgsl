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
    var v = vec4<u32>();
    for (var c = 0u; c < 4u; c++) { v[c] = finished(sum[c], ra, rb[c], valid); }
    return v;
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
                let old = y_load(at);
                for (var i = 0u; i < 4u; i++) {
                    // The exclusive or is of nothing, and keeps the product from being fused with the sum.
                    value[i] = added(value[i], bitcast<u32>(bitcast<f32>(p.beta) * bitcast<f32>(old[i])) ^ p.zero);
                }
            }
            if (BIAS) {
                for (var i = 0u; i < 4u; i++) { value[i] = with_bias(value[i], j + i); }
            }
            y_store(at, value);
        }
    }
}
