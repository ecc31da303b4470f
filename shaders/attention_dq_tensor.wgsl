// attention_dq_tensor: what attention_dq does, by cooperative matrices.
// Layout:   x = qkv, g = dout, y = dqkv, as vectors of eight bf16; the rest as attention_dq's.
// Numerics: bounded. Operands are bf16, the gradients of scores too; f32 sums, the device's.
// Dispatch: tiles · heads · batch workgroups, spread over x and y; a head's longest tiles first
// Twin:     src/kernels/attention/cpu.rs

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x_data: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> g_data: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> lse: array<f32>;
@group(0) @binding(4) var<storage, read> delta: array<f32>;
@group(0) @binding(5) var<storage, read_write> y_data: array<vec4<u32>>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let group = wg.y * wgs.x + wg.x;
    if (group >= p.groups) { return; }
    let place = place_of(group);
    let tile = p.tiles - 1u - place.tile;
    take_place(lane);
    let units = p.quads / 2u;
    let width = p.heads * units;
    let pitch = 3u * width;
    let queries = place.row * pitch + place.head * units;
    let keys = queries + width;
    let values = keys + width;
    let outs = place.row * width + place.head * units;

    var q: Rows;
    var g: Rows;
    x_own(&q, queries, pitch, tile * TILE, lane);
    g_own(&g, outs, width, tile * TILE, lane);
    var dq: Results;
    results_zero(&dq);
    let line = (place.row + min(tile * TILE + own_row, p.seq - 1u)) * p.heads + place.head;
    let factor = p.scale * LOG2E;
    let row_lse = lse[line] * -LOG2E;
    let row_delta = delta[line];

    var k: x_Raws;
    var v: x_Raws;
    x_fetch(&k, keys, pitch, 0u, lane);
    x_fetch(&v, values, pitch, 0u, lane);
    let steps = min((tile + 1u) * (TILE / STEP), (p.seq + STEP - 1u) / STEP);
    for (var t = 0u; t < steps; t++) {
        workgroupBarrier();
        x_put(&k, FIRST, lane);
        x_put(&v, SECOND, lane);
        workgroupBarrier();
        x_fetch(&k, keys, pitch, (t + 1u) * STEP, lane);
        x_fetch(&v, values, pitch, (t + 1u) * STEP, lane);
        scores(&q, FIRST, SCORES);
        scores(&g, SECOND, SCORES_2);
        rows_barrier();

        var s: Own;
        var d: Own;
        own_get(&s, SCORES);
        own_get(&d, SCORES_2);
        for (var u = 0u; u < 2u * S_UNITS; u++) { // unroll
            let w = exp2(fma(s[u], vec4<f32>(factor), vec4<f32>(row_lse)));
            let key = t * STEP + own_column(u / 2u) + u % 2u * 4u + vec4<u32>(0u, 1u, 2u, 3u);
            s[u] = select(vec4<f32>(), w * (d[u] - vec4<f32>(row_delta)), key <= vec4<u32>(tile * TILE + own_row));
        }
        rows_barrier();
        own_put(&s, SCORES);
        rows_barrier();
        accumulate(&dq, SCORES, FIRST);
    }
    store(&dq, p.scale, queries, pitch, tile * TILE);
}
