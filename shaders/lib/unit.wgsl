// A unit: UNIT = 16 consecutive elements of a line, encoded by one invocation into whole words.
// Needs lib/pack*.wgsl. Twin: Job::block in src/kernels/quantize.rs.

fn widen(h: u32) -> u32 {
    if (X_TYPE == X_BF16) { return f32_from_bf16(h); }
    return f32_from_f16(h);
}

// The largest magnitude among eight values, as bits; above F32_INFINITY with a NaN among them.
fn amax8(v: array<u32, 8>) -> u32 {
    return max(max(max(v[0] << 1u, v[1] << 1u), max(v[2] << 1u, v[3] << 1u)),
               max(max(v[4] << 1u, v[5] << 1u), max(v[6] << 1u, v[7] << 1u))) >> 1u;
}
