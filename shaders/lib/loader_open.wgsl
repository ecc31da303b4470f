// Where the loaders of MX operands begin: their rows' anchors.

fn op_open(units: ptr<function, array<op_Unit, OP_UNITS>>, row0: u32, limit: u32, r0: u32) {
    for (var u = 0u; u < OP_UNITS; u++) { // unroll
        (*units)[u].anchor = op_anchor(op_within(row0 + r0 + u * ROW_STEP, limit));
    }
}
