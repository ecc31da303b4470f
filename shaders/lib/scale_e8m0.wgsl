// E8M0 scales: byte b is 2^(b−127), 255 NaN. Twin: src/formats/scale.rs, src/formats/element.rs.

const SCALE_NAN = 255u;

// carry: the fraction of amax from which the scale doubles; one number says the whole scale rule.
fn scale_from_amax(amax: u32, carry: u32, tensor_scale: u32) -> u32 {
    if (amax >= F32_INFINITY) { return SCALE_NAN; }
    if (amax == 0u) { return 0u; }
    let n = f32_normalize(amax);
    return u32(clamp(n.e - EMAX + i32((n.m & 0x7fffffu) >= carry), 0, 254));
}

fn mx_encode(x: u32, scale: u32, tensor_scale: u32, r: u32) -> u32 {
    let n = f32_normalize(x);
    return elem_assemble(x, elem_round(n.m << 7u, n.e - i32(scale), r));
}

fn mx_decode(code: u32, scale: u32, tensor_scale: u32) -> u32 {
    if (scale == SCALE_NAN) { return F32_NAN; }
    let special = elem_special(code);
    if (special != 0u) { return special; }
    let p = elem_parts(code);
    return elem_sign(code) | f32_from_parts(p.k, p.x + i32(scale) - 127);
}

fn tensor_scale_from_amax(amax: u32) -> u32 { return 0x3f800000u; }
