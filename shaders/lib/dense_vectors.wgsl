// Eight elements of 16 bits of a dense operand bound as vectors. `op_` as in lib/operand_dense.wgsl, which it needs.

fn op_eight(i: u32, k: u32) -> vec4<u32> {
    if (GROUPED_K && k >= k_end()) { return vec4<u32>(); }
    return op_codes[op_place(i, k) / 8u];
}
