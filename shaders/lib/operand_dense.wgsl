// A dense operand: the interface of lib/operand.wgsl and lib/operand_values.wgsl.

var<private> op_i0: u32;    // the row of i = 0 in the binding; transposed: the column
var<private> op_g0: u32;
var<private> op_k0: u32;    // transposed: the row of k = 0

fn op_place(i: u32, k: u32) -> u32 {
    if (OP_TRANSPOSED) { return (op_k0 + k) * p.op_pitch + op_i0 + i; }
    return (op_i0 + i) * p.op_pitch + k;
}

fn op_anchor(i: u32) -> u32 { return 127u; }

fn op_tensor_scale() -> u32 { return 0x3f800000u; }
