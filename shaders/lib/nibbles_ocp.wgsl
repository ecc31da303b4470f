// Eight E2M1 codes of a word as f16, the same bits as lib/nibbles_f16.wgsl's, converted by the device: lib/e2m1_*.wgsl. `op_`
// as in lib/operand.wgsl; needs lib/operand_halves.wgsl.

alias op_Factor = vec2<f16>;

fn op_block_factor(scale: u32, anchor: u32) -> op_Factor { return op_half_factor(scale, anchor); }

// Where the second code of a pair is, and the next pair: codes 0 and 4, 1 and 5, 2 and 6, 3 and 7, or 0 and 1, 2 and 3, ...
const OP_SECOND = select(4u, 16u, PAIRS);
const OP_NEXT = select(8u, 4u, PAIRS);

fn op_eight(w: u32, f: op_Factor) -> vec4<u32> {
    let words = vec2<u32>(w, w >> OP_SECOND);
    return vec4<u32>(op_scaled(e2m1_pair(words, 0u), f), op_scaled(e2m1_pair(words, OP_NEXT), f),
                     op_scaled(e2m1_pair(words, 2u * OP_NEXT), f), op_scaled(e2m1_pair(words, 3u * OP_NEXT), f));
}
