// A unit: UNIT = 16 consecutive elements of a line, encoded by one invocation into whole words.
// Needs mx_encode. Twin: Job::block in src/kernels/quantize.rs.

fn widen(h: u32) -> u32 {
    if (X_TYPE == X_BF16) { return f32_from_bf16(h); }
    return f32_from_f16(h);
}

// The largest magnitude among eight values, as bits; above F32_INFINITY with a NaN among them.
fn amax8(v: array<u32, 8>) -> u32 {
    return max(max(max(v[0] << 1u, v[1] << 1u), max(v[2] << 1u, v[3] << 1u)),
               max(max(v[4] << 1u, v[5] << 1u), max(v[6] << 1u, v[7] << 1u))) >> 1u;
}

// Eight codes; r holds an element's random half in its upper 16 bits.
fn encode8(v: array<u32, 8>, scale: u32, ts: u32, r: array<u32, 8>) -> array<u32, 8> {
    return array<u32, 8>(mx_encode(v[0], scale, ts, r[0] >> 16u), mx_encode(v[1], scale, ts, r[1] >> 16u),
                         mx_encode(v[2], scale, ts, r[2] >> 16u), mx_encode(v[3], scale, ts, r[3] >> 16u),
                         mx_encode(v[4], scale, ts, r[4] >> 16u), mx_encode(v[5], scale, ts, r[5] >> 16u),
                         mx_encode(v[6], scale, ts, r[6] >> 16u), mx_encode(v[7], scale, ts, r[7] >> 16u));
}
