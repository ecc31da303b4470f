// attention_dq: the gradient of a tile of queries: a workgroup goes through the tiles of keys up to the diagonal.
// Layout:   x = qkv and y = dqkv, rows of 3 · heads · head_dim, of which q's third is written; g = dout, rows of
//           heads · head_dim; lse and delta as attention_forward and attention_delta leave them.
// Numerics: bounded. f32; scores and their gradients in ascending position, dq in ascending key.
// Dispatch: tiles · heads · batch workgroups, spread over x and y; a head's longest tiles first
// Twin:     src/kernels/attention/cpu.rs

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x_data: array<x_Quad>;
@group(0) @binding(2) var<storage, read> g_data: array<g_Quad>;
@group(0) @binding(3) var<storage, read> lse: array<f32>;
@group(0) @binding(4) var<storage, read> delta: array<f32>;
@group(0) @binding(5) var<storage, read_write> y_data: array<y_Quad>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let group = wg.y * wgs.x + wg.x;
    if (group >= p.groups) { return; }
    let place = place_of(group);
    let tile = p.tiles - 1u - place.tile;
    let ty = lane / ACROSS;
    let tx = lane % ACROSS;
    let width = p.heads * p.quads;
    let pitch = 3u * width;
    let queries = place.row * pitch + place.head * p.quads;
    let keys = queries + width;
    let values = keys + width;
    let outs = place.row * width + place.head * p.quads;

    var a: x_Raws;
    var b: x_Raws;
    var g: g_Raws;
    var weights: s_Sums;
    var ds: s_Sums;
    var dq: o_Sums;
    o_zero(&dq);
    var row_lse: array<f32, TM>;
    var row_delta: array<f32, TM>;
    for (var i = 0u; i < TM; i++) { // unroll
        let at = (place.row + min(tile * TILE + row_of(i, ty), p.seq - 1u)) * p.heads + place.head;
        row_lse[i] = lse[at];
        row_delta[i] = delta[at];
    }

    for (var t = 0u; t <= tile; t++) {
        s_zero(&weights);
        x_fetch_lines(&a, queries, pitch, tile * TILE, 0u, lane);
        x_fetch_lines(&b, keys, pitch, t * TILE, 0u, lane);
        for (var quad = 0u; quad < p.quads; quad += DEPTH / 4u) {
            workgroupBarrier();
            x_put_a(&a, lane);
            x_put_b(&b, lane);
            workgroupBarrier();
            x_fetch_lines(&a, queries, pitch, tile * TILE, quad + DEPTH / 4u, lane);
            x_fetch_lines(&b, keys, pitch, t * TILE, quad + DEPTH / 4u, lane);
            s_multiply(&weights, ty, tx);
        }

        s_zero(&ds);
        g_fetch_lines(&g, outs, width, tile * TILE, 0u, lane);
        x_fetch_lines(&b, values, pitch, t * TILE, 0u, lane);
        for (var quad = 0u; quad < p.quads; quad += DEPTH / 4u) {
            workgroupBarrier();
            g_put_a(&g, lane);
            x_put_b(&b, lane);
            workgroupBarrier();
            g_fetch_lines(&g, outs, width, tile * TILE, quad + DEPTH / 4u, lane);
            x_fetch_lines(&b, values, pitch, t * TILE, quad + DEPTH / 4u, lane);
            s_multiply(&ds, ty, tx);
        }
        x_fetch_slab(&b, keys, pitch, t * TILE, lane);

        for (var i = 0u; i < TM; i++) { // unroll
            for (var j = 0u; j < S_COLS / 4u; j++) { // unroll
                let w = exp(weights[i * (S_COLS / 4u) + j] * p.scale - vec4<f32>(row_lse[i]));
                let d = w * (ds[i * (S_COLS / 4u) + j] - vec4<f32>(row_delta[i]));
                let there = vec4<bool>(t < tile) | (cols_of(j, tx) <= vec4<u32>(row_of(i, ty)));
                ds[i * (S_COLS / 4u) + j] = select(vec4<f32>(), d, there);
            }
        }
        for (var n = 0u; n < TILE / DEPTH; n++) {
            workgroupBarrier();
            put_columns(&ds, n, ty, tx);
            x_put_slab(&b, lane);
            workgroupBarrier();
            x_fetch_slab(&b, keys, pitch, t * TILE + (n + 1u) * DEPTH, lane);
            o_multiply(&dq, ty, tx);
        }
    }
    for (var s = 0u; s < TM * O_COLS / 4u; s++) { // unroll
        dq[s] *= p.scale;
    }
    store(&dq, queries, pitch, tile * TILE, ty, tx);
}
