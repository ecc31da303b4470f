// f32 bits to the 16-bit type Y_TYPE. Twin: DType::narrow in src/engine/buffer.rs.
fn narrow(x: u32) -> u32 {
    if (Y_TYPE == X_BF16) { return bf16_from_f32(x); }
    return f16_from_f32(x);
}
