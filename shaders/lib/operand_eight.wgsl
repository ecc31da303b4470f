// Eight codes of an MX operand in f16. `op_` as in lib/operand.wgsl; needs lib/operand_codes.wgsl, lib/operand_halves.wgsl.

fn op_decode8(raw: vec2<u32>, scale: u32, anchor: u32) -> vec4<u32> {
    let f = op_half_factor(scale, anchor);
    return vec4<u32>(op_pair(op_pick(raw, 0u) | (op_pick(raw, 1u) << 16u), f), op_pair(op_pick(raw, 2u) | (op_pick(raw, 3u) << 16u), f),
                     op_pair(op_pick(raw, 4u) | (op_pick(raw, 5u) << 16u), f), op_pair(op_pick(raw, 6u) | (op_pick(raw, 7u) << 16u), f));
}
