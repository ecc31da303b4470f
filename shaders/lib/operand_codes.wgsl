// The codes of an MX operand, word by word. `op_` as in lib/operand.wgsl, which it needs.

fn op_code_at(line: u32, at: u32) -> u32 {
    let bit = at * OP_BITS;
    let word = line * p.op_pitch + bit / 32u;
    var code = op_codes[word] >> (bit % 32u);
    if (OP_BITS == 6u && bit % 32u > 26u) { code |= op_codes[word + 1u] << (32u - bit % 32u); }
    return code & OP_CODE_MASK;
}

// Eight codes from k on, a multiple of 8, as a stream of 8 · OP_BITS bits; zero from k_end() on.
fn op_raw8(i: u32, k: u32) -> vec2<u32> {
    var raw = op_stream(i, k);
    if (k + 8u > k_end()) {
        // What pads a line may be anything.
        let bits = (k_end() - min(k, k_end())) * OP_BITS;
        raw.x = select(raw.x, extractBits(raw.x, 0u, bits), bits < 32u);
        raw.y = select(raw.y, extractBits(raw.y, 0u, max(bits, 32u) - 32u), bits < 64u);
    }
    return raw;
}

fn op_stream(i: u32, k: u32) -> vec2<u32> {
    if (OP_TRANSPOSED) {
        var raw = vec2<u32>();
        for (var j = 0u; j < 8u; j++) {
            if (k + j < p.k) {
                let code = op_code_at(op_k0 + k + j, op_i0 + i);
                let bit = j * OP_BITS;
                if (bit < 32u) { raw.x |= code << bit; } else { raw.y |= code << (bit - 32u); }
                if (OP_BITS == 6u && j == 5u) { raw.y |= code >> 2u; }
            }
        }
        return raw;
    }
    if (k / OP_BLOCK >= p.op_blocks) { return vec2<u32>(); }
    let bit = k * OP_BITS;
    let word = (op_i0 + i) * p.op_pitch + bit / 32u;
    if (OP_BITS == 4u) { return vec2<u32>(op_codes[word], 0u); }
    let x = vec2<u32>(op_codes[word], op_codes[word + 1u]);
    if (OP_BITS == 8u) { return x; }
    if (bit % 32u == 0u) { return vec2<u32>(x.x, x.y & 0xffffu); }
    return vec2<u32>((x.x >> 16u) | (x.y << 16u), x.y >> 16u);
}

// The code j < 8 of such a stream.
fn op_pick(raw: vec2<u32>, j: u32) -> u32 {
    let bit = j * OP_BITS;
    var code = raw.y >> (bit % 32u);
    if (bit < 32u) { code = raw.x >> bit; }
    if (OP_BITS == 6u && j == 5u) { code |= raw.y << 2u; }
    return code & OP_CODE_MASK;
}

