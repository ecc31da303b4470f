// A head's rows in the binding op_data, of vectors of eight bf16, to workgroup memory as they are. `origin`: the unit of the
// sequence's first row; `pitch`: units of a row. Rows beyond the sequence are its last one, and positions beyond the head
// zero.

alias op_Raws = array<vec4<u32>, RAWS>;

fn op_load(origin: u32, pitch: u32, row: u32, unit: u32) -> vec4<u32> {
    if (unit < p.quads / 2u) { return op_data[origin + min(row, p.seq - 1u) * pitch + unit]; }
    return vec4<u32>();
}

// STEP rows, by way of registers, so that loads run while products do.
fn op_fetch(raws: ptr<function, op_Raws>, origin: u32, pitch: u32, first: u32, lane: u32) {
    for (var u = 0u; u < RAWS; u++) { // unroll
        let at = u * WG + lane;
        (*raws)[u] = op_load(origin, pitch, first + at / UNITS, at % UNITS);
    }
}

fn op_put(raws: ptr<function, op_Raws>, to: u32, lane: u32) {
    for (var u = 0u; u < RAWS; u++) { // unroll
        let at = u * WG + lane;
        memory_put(to + at / UNITS * PITCH + at % UNITS, (*raws)[u]);
    }
}

// The workgroup's own TILE rows, from the start of memory on, to fragments.
fn op_own(rows: ptr<function, Rows>, origin: u32, pitch: u32, first: u32, lane: u32) {
    workgroupBarrier();
    for (var at = lane; at < TILE * UNITS; at += WG) {
        memory_put(at / UNITS * PITCH + at % UNITS, op_load(origin, pitch, first + at / UNITS, at % UNITS));
    }
    workgroupBarrier();
    rows_get(rows);
}
