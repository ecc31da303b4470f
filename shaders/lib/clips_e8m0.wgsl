// Whether |x| is larger than the largest element under an E8M0 scale. Twin: Element::max in f64, src/kernels/quantize_both.rs.

fn mx_clips(x: u32, scale: u32, tensor_scale: u32) -> bool {
    let n = f32_normalize(x);
    let d = n.e - i32(scale);
    return n.m != 0u && (d > EMAX || (d == EMAX && (n.m & 0x7fffffu) > MAX_FRACTION));
}
