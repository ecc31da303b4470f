// Sixteen E2M1 codes of two words as E4M3: code · 2^(6 + scale - anchor), exact for every block within BYTES_WINDOW of its
// anchor, where no value but zero is below E4M3's smallest normal number. A block further down counts as zero: such a tile is
// not computed in bytes unless the block is zero, see lib/window.wgsl. Of each word codes 0, 2, 4, 6 and then 1, 3, 5, 7: any
// order serves that both operands share. `op_` as in lib/operand.wgsl. Twin: src/kernels/matmul/bytes.rs.

// What is added to the exponent, in place; zero if the block counts as zero.
alias op_Factor = u32;

fn op_block_factor(scale: u32, anchor: u32) -> op_Factor {
    let below = anchor - min(scale, anchor);
    return select((BYTES_WINDOW + 1u - below) << 3u, 0u, below > BYTES_WINDOW);
}

// A code in the low bits of each byte. E2M1's bits, two places up, are E4M3's but for the bias, and for 1 = 0.5, whose bit is
// not a mantissa's.
fn op_e4m3(codes: u32, factor: op_Factor) -> u32 {
    let m = codes & 0x07070707u;
    let some = ((m + 0x07070707u) >> 3u) & 0x01010101u;
    let normal = ((m + 0x06060606u) >> 3u) & 0x01010101u;
    let magnitude = some * factor + ((m << 2u) & (normal * 0x1cu));
    return select(magnitude | ((codes << 4u) & 0x80808080u), 0u, factor == 0u);
}

fn op_bytes(w: vec2<u32>, factor: op_Factor) -> vec4<u32> {
    return vec4<u32>(op_e4m3(w.x & 0x0f0f0f0fu, factor), op_e4m3((w.x >> 4u) & 0x0f0f0f0fu, factor),
                     op_e4m3(w.y & 0x0f0f0f0fu, factor), op_e4m3((w.y >> 4u) & 0x0f0f0f0fu, factor));
}
