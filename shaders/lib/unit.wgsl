// A unit: UNIT consecutive elements of a line that one invocation encodes into UNIT_WORDS whole words;
// eight elements, sixteen for FP6. Needs mx_encode. Twin: pack in src/formats/block.rs.

const UNIT_WORDS = UNIT * BITS / 32u;

fn widen(h: u32) -> u32 {
    if (X_TYPE == X_BF16) { return f32_from_bf16(h); }
    return f32_from_f16(h);
}

// The largest magnitude among eight values, as bits; above F32_INFINITY with a NaN among them.
fn amax8(v: array<u32, 8>) -> u32 {
    return max(max(max(v[0] & 0x7fffffffu, v[1] & 0x7fffffffu), max(v[2] & 0x7fffffffu, v[3] & 0x7fffffffu)),
               max(max(v[4] & 0x7fffffffu, v[5] & 0x7fffffffu), max(v[6] & 0x7fffffffu, v[7] & 0x7fffffffu)));
}

// Eight codes; r holds their random halves, low ones first.
fn encode8(v: array<u32, 8>, scale: u32, ts: u32, r: vec4<u32>) -> array<u32, 8> {
    return array<u32, 8>(mx_encode(v[0], scale, ts, r.x & 0xffffu), mx_encode(v[1], scale, ts, r.x >> 16u),
                         mx_encode(v[2], scale, ts, r.y & 0xffffu), mx_encode(v[3], scale, ts, r.y >> 16u),
                         mx_encode(v[4], scale, ts, r.z & 0xffffu), mx_encode(v[5], scale, ts, r.z >> 16u),
                         mx_encode(v[6], scale, ts, r.w & 0xffffu), mx_encode(v[7], scale, ts, r.w >> 16u));
}

// Eight codes as a little-endian bit stream: one word of FP4, two of eight bits, 48 bits of FP6.
fn pack8(c: array<u32, 8>) -> vec2<u32> {
    if (BITS == 4u) {
        return vec2<u32>(c[0] | (c[1] << 4u) | (c[2] << 8u) | (c[3] << 12u) |
                         (c[4] << 16u) | (c[5] << 20u) | (c[6] << 24u) | (c[7] << 28u), 0u);
    }
    if (BITS == 6u) {
        return vec2<u32>(c[0] | (c[1] << 6u) | (c[2] << 12u) | (c[3] << 18u) | (c[4] << 24u) | (c[5] << 30u),
                         (c[5] >> 2u) | (c[6] << 4u) | (c[7] << 10u));
    }
    return vec2<u32>(c[0] | (c[1] << 8u) | (c[2] << 16u) | (c[3] << 24u),
                     c[4] | (c[5] << 8u) | (c[6] << 16u) | (c[7] << 24u));
}
