// Four neighbouring elements of a dense bf16 binding, declared `array<op_Quad>`; written to nearest even.
// Twin: Tensor::widened, Tensor::fill_rows.

alias op_Quad = vec2<u32>;

fn op_get(quad: op_Quad) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4<u32>(quad.x << 16u, quad.x & 0xffff0000u, quad.y << 16u, quad.y & 0xffff0000u));
}

fn op_narrow(v: f32) -> u32 {
    let x = bitcast<u32>(v);
    if ((x & 0x7fffffffu) > 0x7f800000u) { return 0x7fc0u; }
    return (x + 0x7fffu + ((x >> 16u) & 1u)) >> 16u;
}

fn op_set(v: vec4<f32>) -> op_Quad {
    return vec2<u32>(op_narrow(v.x) | (op_narrow(v.y) << 16u), op_narrow(v.z) | (op_narrow(v.w) << 16u));
}
