// Four neighbouring elements of a dense f32 binding as f32 bits, untouched by arithmetic. Twin: DType::f32_bits.

alias BitsQuad = vec4<u32>;

fn bits_get(quad: BitsQuad) -> vec4<u32> { return quad; }
