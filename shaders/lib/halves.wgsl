// f16 values and their bits. naga has no bitcast between vec2<f16> and u32: src/engine/spirv.rs makes one of these
// conversions, which are exact either way.

fn half2(bits: u32) -> vec2<f16> { return vec2<f16>(unpack2x16float(bits)); }
fn half_bits(h: vec2<f16>) -> u32 { return pack2x16float(vec2<f32>(h)); }

// f16 bits of 2^x, x <= 15; zero below the smallest subnormal.
fn half_power(x: i32) -> u32 {
    if (x >= -14) { return u32(x + 15) << 10u; }
    return select(0u, 1u << u32(clamp(x + 24, 0, 9)), x >= -24);
}
