// embedding_pieces: the rows of dx that belong to one token, summed in pieces of PIECE in ascending order. A token of one piece
// is done; others leave their pieces in `parts` for embedding_rows.
// Layout:   tokens[rows] · order, starts: see sort.rs · dx[rows, quads of 4 columns] · dtable[vocabulary, quads] f32 ·
//           parts[2 · ceil(rows / PIECE), quads] f32: a piece that begins at place at of the order lies in 2 · (at / PIECE), a
//           token's first piece behind it. No two share one: a token's pieces begin PIECE apart, and of two tokens with
//           several pieces the second's first begins more than PIECE after the first's first, its second one more still.
// Numerics: f32 additions in this order and no others
// Dispatch: ceil(rows / PIECE) workgroups, spread over x and y, each for the pieces that begin at PIECE places of the order
// Twin:     src/kernels/embedding.rs

struct Params {
    rows: u32,
    quads: u32,
    vocabulary: u32,
    accumulate: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;
@group(0) @binding(2) var<storage, read> order: array<u32>;
@group(0) @binding(3) var<storage, read> starts: array<u32>;
@group(0) @binding(4) var<storage, read> dx: array<dx_Quad>;
@group(0) @binding(5) var<storage, read_write> dtable: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> parts: array<vec4<f32>>;

// Where this workgroup's pieces begin, in no order.
var<workgroup> wg_places: array<u32, PIECE>;
var<workgroup> wg_pieces: atomic<u32>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    if (lane == 0u) { atomicStore(&wg_pieces, 0u); }
    workgroupBarrier();
    let mine = (wg.y * wgs.x + wg.x) * PIECE + lane;
    if (lane < PIECE && mine < starts[p.vocabulary]) {
        if ((mine - starts[tokens[order[mine]]]) % PIECE == 0u) { wg_places[atomicAdd(&wg_pieces, 1u)] = mine; }
    }
    workgroupBarrier();
    let items = atomicLoad(&wg_pieces) * p.quads;
    for (var item = lane; item < items; item += WG) { sum_piece(wg_places[item / p.quads], item % p.quads); }
}

fn sum_piece(place: u32, q: u32) {
    let token = tokens[order[place]];
    let begin = starts[token];
    let end = starts[token + 1u];
    let stop = min(place + PIECE, end);
    var sum = vec4<f32>();
    var at = place;
    for (; at + 4u <= stop; at += 4u) {
        // Four loads in flight.
        let a = dx_get(dx[order[at] * p.quads + q]);
        let b = dx_get(dx[order[at + 1u] * p.quads + q]);
        let c = dx_get(dx[order[at + 2u] * p.quads + q]);
        let d = dx_get(dx[order[at + 3u] * p.quads + q]);
        sum += a;
        sum += b;
        sum += c;
        sum += d;
    }
    for (; at < stop; at++) { sum += dx_get(dx[order[at] * p.quads + q]); }
    if (end - begin > PIECE) {
        parts[(2u * (place / PIECE) + u32(place == begin)) * p.quads + q] = sum;
    } else if (p.accumulate != 0u) {
        dtable[token * p.quads + q] += sum;
    } else {
        dtable[token * p.quads + q] = sum;
    }
}
