// An MX operand of the ALU tier: values in f32, relative to the line's anchor. `op_` as in lib/operand.wgsl.

fn op_value(code: u32, relative: f32) -> f32 {
    if (OP_INT8) { return f32(i32(code << 24u) >> 24u) * 0.015625 * relative; }
    let magnitude = code & (OP_CODE_MASK >> 1u);
    let sign = (code >> (OP_BITS - 1u)) << 31u;
    if (OP_BITS == 8u && magnitude > OP_MAX_CODE) {
        if (OP_E5M2 && magnitude == 0x7cu) { return bitcast<f32>(sign | F32_INFINITY); }
        return bitcast<f32>(F32_NAN);
    }
    let exponent = magnitude >> OP_MANTISSA_BITS;
    let fraction = magnitude & ((1u << OP_MANTISSA_BITS) - 1u);
    let k = select(fraction, fraction | (1u << OP_MANTISSA_BITS), exponent > 0u);
    let unit = bitcast<f32>(u32(i32(max(exponent, 1u)) - 1 + OP_EMIN - i32(OP_MANTISSA_BITS) + 127) << 23u);
    return bitcast<f32>(bitcast<u32>(f32(k) * unit * relative) | sign);
}

fn op_values8(i: u32, k: u32) -> array<f32, 8> {
    let raw = op_raw8(i, k);
    let r = op_relative(op_scale(i, k), op_anchor(i), 0u, 100u);
    return array<f32, 8>(op_value(op_pick(raw, 0u), r), op_value(op_pick(raw, 1u), r), op_value(op_pick(raw, 2u), r), op_value(op_pick(raw, 3u), r),
                         op_value(op_pick(raw, 4u), r), op_value(op_pick(raw, 5u), r), op_value(op_pick(raw, 6u), r), op_value(op_pick(raw, 7u), r));
}
