// A head's rows in the binding op_data to workgroup memory, by way of registers, so that loads run while products do.
// `origin`: the quad of the sequence's first row; `pitch`: quads of a row. Rows beyond the sequence are its last one, and
// positions beyond the head zero.

alias op_Raws = array<op_Quad, RAWS>;

fn op_load(origin: u32, pitch: u32, row: u32, quad: u32) -> op_Quad {
    if (quad < p.quads) { return op_data[origin + min(row, p.seq - 1u) * pitch + quad]; }
    return op_Quad();
}

// TILE rows, DEPTH positions from `quad` on: positions are contracted. Four neighbours read a row's.
fn op_fetch_lines(raws: ptr<function, op_Raws>, origin: u32, pitch: u32, first: u32, quad: u32, lane: u32) {
    for (var u = 0u; u < TILE * DEPTH / 4u / WG; u++) { // unroll
        let at = u * WG + lane;
        (*raws)[u] = op_load(origin, pitch, first + at / 4u, quad + at % 4u);
    }
}

fn op_put_a(raws: ptr<function, op_Raws>, lane: u32) {
    for (var u = 0u; u < TILE * DEPTH / 4u / WG; u++) { // unroll
        let row = (u * WG + lane) / 4u;
        let part = (u * WG + lane) % 4u;
        let v = op_get((*raws)[u]);
        for (var j = 0u; j < 4u; j++) { // unroll
            memory_a[part][j][(row / 4u) ^ (2u * part)][row % 4u] = v[j];
        }
    }
}

fn op_put_b(raws: ptr<function, op_Raws>, lane: u32) {
    for (var u = 0u; u < TILE * DEPTH / 4u / WG; u++) { // unroll
        let row = (u * WG + lane) / 4u;
        let part = (u * WG + lane) % 4u;
        let v = op_get((*raws)[u]);
        for (var j = 0u; j < 4u; j++) { // unroll
            memory_b[part][j][(row / 4u) ^ (2u * part)][row % 4u] = v[j];
        }
    }
}

// DEPTH rows, whole: rows are contracted.
fn op_fetch_slab(raws: ptr<function, op_Raws>, origin: u32, pitch: u32, first: u32, lane: u32) {
    for (var u = 0u; u < DEPTH * WIDTH / 4u / WG; u++) { // unroll
        let at = u * WG + lane;
        (*raws)[u] = op_load(origin, pitch, first + at / (WIDTH / 4u), at % (WIDTH / 4u));
    }
}

fn op_put_slab(raws: ptr<function, op_Raws>, lane: u32) {
    for (var u = 0u; u < DEPTH * WIDTH / 4u / WG; u++) { // unroll
        let row = (u * WG + lane) / (WIDTH / 4u);
        let quad = (u * WG + lane) % (WIDTH / 4u);
        memory_b[row / 4u][row % 4u][quad ^ (2u * (row / 4u))] = op_get((*raws)[u]);
    }
}
