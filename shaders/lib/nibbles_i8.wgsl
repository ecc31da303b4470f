// Sixteen E2M1 codes of two words as I8: twice the code's value times 2^(scale - anchor + BYTES_WINDOW), exact for every block
// within BYTES_WINDOW of its anchor: 12 · 2^3 = 96 at most. A block further down counts as zero: such a tile is not computed in
// bytes unless the block is zero, see lib/window.wgsl. Of each word codes 0, 2, 4, 6 and then 1, 3, 5, 7: any order serves that
// both operands share. `op_` as in lib/operand.wgsl. Twin: src/kernels/matmul/bytes.rs.

// A power of two; zero if the block counts as zero.
alias op_Factor = u32;

fn op_block_factor(scale: u32, anchor: u32) -> op_Factor {
    let below = anchor - min(scale, anchor);
    return select(1u << (BYTES_WINDOW - min(below, BYTES_WINDOW)), 0u, below > BYTES_WINDOW);
}

// Magnitudes in the low bits of each byte, and of these those with a sign. No byte borrows from the next: 128 and a magnitude is
// less than 256, and minus twice one still positive.
fn op_signed(magnitudes: u32, negative: u32, factor: op_Factor) -> u32 {
    return (magnitudes * factor + 0x80808080u - negative * (2u * factor)) ^ 0x80808080u;
}

// Twice the value of 0, 1, 2, 3, 4, 5, 6, 7 is 0, 1, 2, 3, 4, 6, 8, 12: from 4 on the code plus its lower two bits, and for 7
// two more.
fn op_integers(w: u32, factor: op_Factor) -> vec2<u32> {
    let low = w & 0x33333333u;
    let both = low & (low >> 1u) & 0x11111111u;
    let upper = ((w >> 2u) & 0x11111111u) * 3u;
    let m = (w & 0x77777777u) + (low & upper) + ((both & upper) << 1u);
    let negative = m & (((w >> 3u) & 0x11111111u) * 15u);
    return vec2<u32>(op_signed(m & 0x0f0f0f0fu, negative & 0x0f0f0f0fu, factor),
                     op_signed((m >> 4u) & 0x0f0f0f0fu, (negative >> 4u) & 0x0f0f0f0fu, factor));
}

fn op_bytes(w: vec2<u32>, factor: op_Factor) -> vec4<u32> {
    return vec4<u32>(op_integers(w.x, factor), op_integers(w.y, factor));
}
