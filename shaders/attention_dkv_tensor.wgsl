// attention_dkv_tensor: what attention_dkv does, by cooperative matrices. Scores are transposed, a row a key.
// Layout:   x = qkv, g = dout, y = dqkv, as vectors of eight bf16; the rest as attention_dkv's.
// Numerics: bounded. Operands are bf16, weights and the gradients of scores too; f32 sums, the device's.
// Dispatch: tiles · heads · batch workgroups, spread over x and y; a head's longest tiles first
// Twin:     src/kernels/attention/cpu.rs

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x_data: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> g_data: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> lse: array<f32>;
@group(0) @binding(4) var<storage, read> delta: array<f32>;
@group(0) @binding(5) var<storage, read_write> y_data: array<vec4<u32>>;

// Of the step's queries.
var<workgroup> shared_lse: array<vec4<f32>, STEP / 4u>;
var<workgroup> shared_delta: array<vec4<f32>, STEP / 4u>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let group = wg.y * wgs.x + wg.x;
    if (group >= p.groups) { return; }
    let place = place_of(group);
    let tile = place.tile;
    take_place(lane);
    let units = p.quads / 2u;
    let width = p.heads * units;
    let pitch = 3u * width;
    let queries = place.row * pitch + place.head * units;
    let keys = queries + width;
    let values = keys + width;
    let outs = place.row * width + place.head * units;

    var k: Rows;
    var v: Rows;
    x_own(&k, keys, pitch, tile * TILE, lane);
    x_own(&v, values, pitch, tile * TILE, lane);
    var dk: Results;
    var dv: Results;
    results_zero(&dk);
    results_zero(&dv);

    let factor = p.scale * LOG2E;
    var q: x_Raws;
    var g: g_Raws;
    let begin = tile * (TILE / STEP);
    let end = (p.seq + STEP - 1u) / STEP;
    x_fetch(&q, queries, pitch, begin * STEP, lane);
    g_fetch(&g, outs, width, begin * STEP, lane);
    for (var t = begin; t < end; t++) {
        workgroupBarrier();
        x_put(&q, FIRST, lane);
        g_put(&g, SECOND, lane);
        if (lane < STEP) {
            let line = (place.row + min(t * STEP + lane, p.seq - 1u)) * p.heads + place.head;
            shared_lse[lane / 4u][lane % 4u] = lse[line] * -LOG2E;
            shared_delta[lane / 4u][lane % 4u] = delta[line];
        }
        workgroupBarrier();
        x_fetch(&q, queries, pitch, (t + 1u) * STEP, lane);
        g_fetch(&g, outs, width, (t + 1u) * STEP, lane);
        scores(&k, FIRST, SCORES);
        scores(&v, SECOND, SCORES_2);
        rows_barrier();

        var s: Own;
        var d: Own;
        own_get(&s, SCORES);
        own_get(&d, SCORES_2);
        for (var u = 0u; u < 2u * S_UNITS; u++) { // unroll
            let column = own_column(u / 2u) + u % 2u * 4u;
            let query = t * STEP + column + vec4<u32>(0u, 1u, 2u, 3u);
            // Queries beyond the sequence repeat its last one, and must not count.
            let there = (vec4<u32>(tile * TILE + own_row) <= query) & (query < vec4<u32>(p.seq));
            s[u] = select(vec4<f32>(), exp2(fma(s[u], vec4<f32>(factor), shared_lse[column / 4u])), there);
            d[u] = s[u] * (d[u] - shared_delta[column / 4u]);
        }
        rows_barrier();
        own_put(&s, SCORES);
        own_put(&d, SCORES_2);
        rows_barrier();
        accumulate(&dv, SCORES, SECOND);
        accumulate(&dk, SCORES_2, FIRST);
    }
    store(&dk, p.scale, keys, pitch, tile * TILE);
    store(&dv, 1.0, values, pitch, tile * TILE);
}
