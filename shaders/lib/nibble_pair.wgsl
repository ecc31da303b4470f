// Nibbles s and s + 4 of a word of E2M1 codes, shift = 12 - 4 · s, as the bits of two f16: their values times 2^-14.
fn nibble_pair(w: u32, shift: u32) -> u32 {
    let magnitudes = select(w >> 3u, w << (max(shift, 3u) - 3u), shift >= 3u);
    return ((w << shift) & 0x80008000u) | (magnitudes & 0x0e000e00u);
}
