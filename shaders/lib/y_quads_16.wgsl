// Quads of y in 16 bits; needs lib/narrow.wgsl.

fn y_load(at: u32) -> vec4<u32> {
    let h = vec4<u32>(y[at].x & 0xffffu, y[at].x >> 16u, y[at].y & 0xffffu, y[at].y >> 16u);
    if (Y_TYPE == X_BF16) { return h << vec4<u32>(16u); }
    return vec4<u32>(f32_from_f16(h.x), f32_from_f16(h.y), f32_from_f16(h.z), f32_from_f16(h.w));
}

fn y_store(at: u32, v: vec4<u32>) { y[at] = vec2<u32>(narrow(v.x) | (narrow(v.y) << 16u), narrow(v.z) | (narrow(v.w) << 16u)); }
