// An MX operand of the exact tier: codes as small integers, four signed bytes a word. E2M1 in halves, E2M3 in eighths,
// INT8 in sixty-fourths. `op_` as in lib/operand.wgsl.

// Four nibbles spread over four bytes, E2M1 → 2 · value. |v| = m + (m & 3 if m >= 4) + 2 · (m == 7), in every byte at once.
fn op_e2m1x4(nibbles: u32) -> u32 {
    let m = nibbles & 0x07070707u;
    let high = (m >> 2u) & 0x01010101u;
    let v = m + (m & (high * 3u)) + (((m >> 1u) & m & high) << 1u);
    let negative = ((nibbles >> 3u) & 0x01010101u) * 0xffu;
    // p - q in every byte, without borrows between them.
    return (((v & ~negative) | 0x80808080u) - (v & negative)) ^ 0x80808080u;
}

fn op_spread(w: u32) -> u32 {
    let t = (w | (w << 8u)) & 0x00ff00ffu;
    return (t | (t << 4u)) & 0x0f0f0f0fu;
}

fn op_int_e2m3(code: u32) -> u32 {
    let exponent = (code >> 3u) & 3u;
    let v = select(code & 7u, ((code & 7u) | 8u) << (max(exponent, 1u) - 1u), exponent > 0u);
    return select(v, 0u - v, (code & 32u) != 0u) & 0xffu;
}

// Eight of them, from the stream of their codes.
fn op_ints(raw: vec2<u32>) -> vec2<u32> {
    if (OP_INT8) { return raw; }
    if (OP_BITS == 4u) {
        // Any order within eight will do when both operands have the same.
        if (NIBBLES) { return vec2<u32>(op_e2m1x4(raw.x & 0x0f0f0f0fu), op_e2m1x4((raw.x >> 4u) & 0x0f0f0f0fu)); }
        return vec2<u32>(op_e2m1x4(op_spread(raw.x & 0xffffu)), op_e2m1x4(op_spread(raw.x >> 16u)));
    }
    return vec2<u32>(op_int_e2m3(op_pick(raw, 0u)) | (op_int_e2m3(op_pick(raw, 1u)) << 8u)
                         | (op_int_e2m3(op_pick(raw, 2u)) << 16u) | (op_int_e2m3(op_pick(raw, 3u)) << 24u),
                     op_int_e2m3(op_pick(raw, 4u)) | (op_int_e2m3(op_pick(raw, 5u)) << 8u)
                         | (op_int_e2m3(op_pick(raw, 6u)) << 16u) | (op_int_e2m3(op_pick(raw, 7u)) << 24u));
}
