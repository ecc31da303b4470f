// Sixteen E2M1 codes under an E8M0 scale: the same codes as lib/encode.wgsl in half the instructions.
//
// With y = |x| / 2^scale < 8, let c(y) be 2y below y = 1, and above it the line through E2M1's codes: two codes a binade,
// which is what the bits of an f32 count. The code is the rounding of min(c, 7). c is held in fixed point with 28 fraction
// bits, so that code and sign are the four top bits. All is exact: 2y is a product by a power of two, whose fraction is
// cut only below y = 1/4, where to nearest gives 0 anyway and stochastic rounding looks at 17 bits alone.
// Twin: Job::encode in src/kernels/quantize.rs; tests/kernels.rs holds both to the same reference.

struct E2m1 {
    one: f32,       // 2^scale
    factor: f32,    // 2 · 2^28 / 2^scale
    offset: u32,    // minus the bits of `one`, plus two codes; in units of 2^-6 bits, as the fixed point has them
}

// The code in the top four bits, over what is left of x. The random half is in the upper 16 bits of r; it compares with
// the 16 bits below the code, and half a step is added.
fn e2m1_top(x: u32, s: E2m1, r: u32) -> u32 {
    let a = abs(bitcast<f32>(x));
    let c = min(select(u32(a * s.factor), (x << 6u) + s.offset, a >= s.one), 0x70000000u);
    var rounded = 0u;
    if (STOCHASTIC) {
        rounded = add(c, ((r >> 4u) & 0x0ffff000u) | 0x800u);
    } else {
        rounded = c + 0x7ffffffu + ((c >> 28u) & 1u);
    }
    return (rounded & 0x70000000u) | (x & 0x8fffffffu);
}

fn e2m1_word(v: array<u32, 8>, s: E2m1, r: array<u32, 8>) -> u32 {
    var word = e2m1_top(v[7], s, r[7]) >> 28u;
    word = (word << 4u) | (e2m1_top(v[6], s, r[6]) >> 28u);
    word = (word << 4u) | (e2m1_top(v[5], s, r[5]) >> 28u);
    word = (word << 4u) | (e2m1_top(v[4], s, r[4]) >> 28u);
    word = (word << 4u) | (e2m1_top(v[3], s, r[3]) >> 28u);
    word = (word << 4u) | (e2m1_top(v[2], s, r[2]) >> 28u);
    word = (word << 4u) | (e2m1_top(v[1], s, r[1]) >> 28u);
    return (word << 4u) | (e2m1_top(v[0], s, r[0]) >> 28u);
}

fn encode16(a: array<u32, 8>, b: array<u32, 8>, scale: u32, ts: u32, ra: array<u32, 8>, rb: array<u32, 8>) -> Codes {
    // Where f32's subnormals matter (they may be flushed) and where the factor would be one: the general way. From scale
    // 40 on a subnormal x is less than 2^-38 of the scale.
    if (scale < 40u || scale > 253u) { return pack16(encode8(a, scale, ts, ra), encode8(b, scale, ts, rb)); }
    let one = scale << 23u;
    let s = E2m1(bitcast<f32>(one), bitcast<f32>((283u - scale) << 23u), (0x800000u - one) << 6u);
    return vec2<u32>(e2m1_word(a, s, ra), e2m1_word(b, s, rb));
}
