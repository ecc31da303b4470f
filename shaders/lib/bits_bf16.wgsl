// Four neighbouring elements of a dense bf16 binding as f32 bits, untouched by arithmetic. Twin: DType::f32_bits.

alias BitsQuad = vec2<u32>;

fn bits_get(quad: BitsQuad) -> vec4<u32> {
    return vec4<u32>(quad.x << 16u, quad.x & 0xffff0000u, quad.y << 16u, quad.y & 0xffff0000u);
}
