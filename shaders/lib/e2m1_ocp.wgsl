// The E2M1 codes in bits [offset, offset + 3] of two words, as f16: their values times 2^-14, which is exact and what
// lib/operand_halves.wgsl's factors count in. src/engine/spirv.rs makes OpBitcastExtractEXT of the extraction, and the conversion
// one from E2M1; without it this would give the codes as integers.
fn e2m1_pair(words: vec2<u32>, offset: u32) -> vec2<f16> {
    return vec2<f16>(extractBits(words, offset, 4u)) * vec2<f16>(0.00006103515625h);
}
