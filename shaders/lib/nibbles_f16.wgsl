// Eight E2M1 codes of a word as f16: what lib/loader_nibbles.wgsl puts. `op_` as in lib/operand.wgsl; needs lib/nibble_pair.wgsl
// and lib/operand_halves.wgsl.

alias op_Factor = vec2<f16>;

fn op_block_factor(scale: u32, anchor: u32) -> op_Factor { return op_half_factor(scale, anchor); }

fn op_eight(w: u32, f: op_Factor) -> vec4<u32> {
    let h = vec4<u32>(op_scaled(half2(nibble_pair(w, 12u)), f), op_scaled(half2(nibble_pair(w, 8u)), f),
                      op_scaled(half2(nibble_pair(w, 4u)), f), op_scaled(half2(nibble_pair(w, 0u)), f));
    if (PAIRS) { return h; }
    return vec4<u32>((h.x & 0xffffu) | (h.y << 16u), (h.z & 0xffffu) | (h.w << 16u),
                     (h.x >> 16u) | (h.y & 0xffff0000u), (h.z >> 16u) | (h.w & 0xffff0000u));
}
