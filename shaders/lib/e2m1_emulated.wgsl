// What lib/e2m1_ocp.wgsl has the device do, for tests, by its definition: OpBitcastExtractEXT takes so many bits of every
// component from `offset` up, as they are (SPV_EXT_ocp_microscaling_types); E2M1 is a sign, two bits of exponent with bias 1, and
// one of mantissa (OCP MX v1.0, 5.3.3). f16 holds all its values.

fn e2m1_value(code: u32) -> f16 {
    let exponent = (code >> 1u) & 3u;
    let mantissa = f16(code & 1u) * 0.5h;
    let magnitude = select(mantissa, (1.0h + mantissa) * (f16(1u << exponent) * 0.5h), exponent > 0u);
    return select(magnitude, -magnitude, (code & 8u) != 0u);
}

fn e2m1_pair(words: vec2<u32>, offset: u32) -> vec2<f16> {
    let values = vec2<f16>(e2m1_value((words.x >> offset) & 15u), e2m1_value((words.y >> offset) & 15u));
    return values * vec2<f16>(0.00006103515625h);
}
