// Sixteen E2M1 codes under an E8M0 scale: the same codes as lib/encode.wgsl in half the instructions.
//
// With y = |x| / 2^scale < 8, E2M1's codes are the rounding of c(y) = min(2y, y + 2, y/2 + 4, 7): the format's three
// slopes, concave. c is held in fixed point with 28 fraction bits, so that its integer part and x's sign are the four
// top bits. All is exact: 2y·2^28 is one product by a power of two, whose fraction is cut only below y = 1/4, where to
// nearest gives 0 anyway and stochastic rounding looks at 17 bits alone.
// Twin: Job::encode in src/kernels/quantize.rs; tests/kernels.rs holds both to the same reference.

fn e2m1_top(x: u32, factor: f32, r: u32) -> u32 {
    let line = u32(abs(bitcast<f32>(x)) * factor);
    let c = min(min(line, (line >> 1u) + 0x20000000u), min((line >> 2u) + 0x40000000u, 0x70000000u));
    var rounded = c + r;
    if (!STOCHASTIC) { rounded = c + 0x7ffffffu + ((c >> 28u) & 1u); }
    return (rounded & 0x70000000u) | (x & 0x8fffffffu);
}

// r: two random halves as the 16 bits below the code, and the centre of their step.
fn e2m1_low(r: u32) -> u32 { return ((r << 12u) & 0x0ffff000u) | 0x800u; }
fn e2m1_high(r: u32) -> u32 { return ((r >> 4u) & 0x0ffff000u) | 0x800u; }

fn e2m1_word(v: array<u32, 8>, factor: f32, r: vec4<u32>) -> u32 {
    var word = e2m1_top(v[7], factor, e2m1_high(r.w)) >> 28u;
    word = (word << 4u) | (e2m1_top(v[6], factor, e2m1_low(r.w)) >> 28u);
    word = (word << 4u) | (e2m1_top(v[5], factor, e2m1_high(r.z)) >> 28u);
    word = (word << 4u) | (e2m1_top(v[4], factor, e2m1_low(r.z)) >> 28u);
    word = (word << 4u) | (e2m1_top(v[3], factor, e2m1_high(r.y)) >> 28u);
    word = (word << 4u) | (e2m1_top(v[2], factor, e2m1_low(r.y)) >> 28u);
    word = (word << 4u) | (e2m1_top(v[1], factor, e2m1_high(r.x)) >> 28u);
    return (word << 4u) | (e2m1_top(v[0], factor, e2m1_low(r.x)) >> 28u);
}

fn e2m1_exact8(v: array<u32, 8>, scale: u32, r: vec4<u32>) -> u32 {
    return pack8(array<u32, 8>(mx_encode(v[0], scale, 0u, r.x & 0xffffu), mx_encode(v[1], scale, 0u, r.x >> 16u),
                               mx_encode(v[2], scale, 0u, r.y & 0xffffu), mx_encode(v[3], scale, 0u, r.y >> 16u),
                               mx_encode(v[4], scale, 0u, r.z & 0xffffu), mx_encode(v[5], scale, 0u, r.z >> 16u),
                               mx_encode(v[6], scale, 0u, r.w & 0xffffu), mx_encode(v[7], scale, 0u, r.w >> 16u)));
}

fn encode16(a: array<u32, 8>, b: array<u32, 8>, scale: u32, ts: u32, ra: vec4<u32>, rb: vec4<u32>) -> Codes {
    // Where f32's subnormals matter (they may be flushed) and where the factor would be one: the general way. Above
    // scale 40 a subnormal x is less than 2^-38 of the scale.
    if (scale < 40u || scale > 253u) { return vec2<u32>(e2m1_exact8(a, scale, ra), e2m1_exact8(b, scale, rb)); }
    // 2 · 2^28 / 2^(scale − 127), as bits.
    let factor = bitcast<f32>((283u - scale) << 23u);
    return vec2<u32>(e2m1_word(a, factor, ra), e2m1_word(b, factor, rb));
}
