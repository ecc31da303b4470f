// Whether |x| is larger than the largest element under NVFP4's scales: 6 = 1.5 · 2^2. The quotient is truncated, but the
// bit below its bits says whether anything was cut off. Twin: Element::max in f64, src/kernels/quantize_both.rs.

fn mx_clips(x: u32, scale: u32, tensor_scale: u32) -> bool {
    let s = scale_parts(scale);
    if (s.k == 0u) { return false; }
    let n = f32_normalize(x);
    let t = f32_normalize(tensor_scale);
    let q = quotient(n.m, s.k * t.m);
    let d = q.x + n.e - t.e - s.x;
    return q.m != 0u && (d > EMAX || (d == EMAX && (q.m & 0x3fffffffu) > MAX_FRACTION << 7u));
}
