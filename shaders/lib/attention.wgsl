// What the attention kernels on ALUs share: the way of scores through workgroup memory from the invocations that have them
// to all, and the store of a tile of results.
//
// Workgroup memory holds two operands of a product, DEPTH contracted positions of each, position k at [k / 4][k % 4]: of A
// TILE outputs, and of B TILE or WIDTH, four neighbouring outputs a vector. Vector v of position k lies at v ^ 2 · (k / 4)
// of its line: then transposing writes, of eight rows and four groups of positions at once, go to all banks, and so do
// reads. Nested arrays, as WGSL's bounds checks then are on indices that the innermost loops share.
//
// An invocation (ty, tx) has the rows i / 4 · 4 DOWN + 4 ty + i % 4, i < TM, and of a product with N columns an invocation
// the columns j / 4 · 4 ACROSS + 4 tx + j % 4, j < N.

var<workgroup> memory_a: array<array<array<vec4<f32>, TILE / 4u>, 4>, DEPTH / 4u>;
var<workgroup> memory_b: array<array<array<vec4<f32>, max(TILE, WIDTH) / 4u>, 4>, DEPTH / 4u>;

// Row i of an invocation, within the tile.
fn row_of(i: u32, ty: u32) -> u32 { return i / 4u * (4u * DOWN) + 4u * ty + i % 4u; }
// The four columns j of an invocation's scores, within the tile.
fn cols_of(j: u32, tx: u32) -> vec4<u32> { return 4u * (j * ACROSS + tx) + vec4<u32>(0u, 1u, 2u, 3u); }

// Scores to A, as rows of it: the columns n · DEPTH and following become the contracted positions.
fn put_columns(scores: ptr<function, s_Sums>, n: u32, ty: u32, tx: u32) {
    for (var j = 0u; j < S_COLS / 4u; j++) { // unroll
        if (n == j * (ACROSS / 4u) + tx / 4u) {
            for (var c = 0u; c < 4u; c++) { // unroll
                for (var i = 0u; i < TM / 4u; i++) { // unroll
                    let v = vec4<f32>((*scores)[4u * i * (S_COLS / 4u) + j][c],
                                      (*scores)[(4u * i + 1u) * (S_COLS / 4u) + j][c],
                                      (*scores)[(4u * i + 2u) * (S_COLS / 4u) + j][c],
                                      (*scores)[(4u * i + 3u) * (S_COLS / 4u) + j][c]);
                    memory_a[tx % 4u][c][(i * DOWN + ty) ^ (2u * (tx % 4u))] = v;
                }
            }
        }
    }
}

// Scores to A, as columns of it: the rows n · DEPTH and following become the contracted positions.
fn put_rows(scores: ptr<function, s_Sums>, n: u32, ty: u32, tx: u32) {
    for (var i = 0u; i < TM; i++) { // unroll
        if (n == i / 4u * (DOWN / 4u) + ty / 4u) {
            for (var j = 0u; j < S_COLS / 4u; j++) { // unroll
                memory_a[ty % 4u][i % 4u][(j * ACROSS + tx) ^ (2u * (ty % 4u))] =
                    (*scores)[i * (S_COLS / 4u) + j];
            }
        }
    }
}

// A tile of results; `origin`: the first quad of the sequence's first row.
fn store(sums: ptr<function, o_Sums>, origin: u32, pitch: u32, first: u32, ty: u32, tx: u32) {
    for (var i = 0u; i < TM; i++) { // unroll
        let row = first + row_of(i, ty);
        for (var j = 0u; j < O_COLS / 4u; j++) { // unroll
            let quad = j * ACROSS + tx;
            if (row < p.seq && quad < p.quads) {
                y_data[origin + row * pitch + quad] = y_set((*sums)[i * (O_COLS / 4u) + j]);
            }
        }
    }
}
