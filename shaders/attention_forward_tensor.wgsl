// attention_forward_tensor: what attention_forward does, by cooperative matrices.
// Layout:   x = qkv, y = out, as vectors of eight bf16; the rest as attention_forward's.
// Numerics: bounded. Operands are bf16, the weights too; f32 sums, the device's. Fragments cannot be scaled by rows, so a
//           row's weights are relative to a reference that stays: the maximum of the first step's scores, unless a later
//           score exceeds it by more than ROOM. Then the rows where that is so, and no others, take a new one. What is
//           rounded is relative, whatever the reference; f32 has room for e^ROOM times a sum.
// Dispatch: tiles · heads · batch workgroups, spread over x and y; a head's longest tiles first
// Twin:     src/kernels/attention/cpu.rs

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x_data: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> y_data: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> lse: array<f32>;

// Finite, and so is its difference from any score that counts.
const LOWEST = -1e38;
const ROOM = 40.0;

var<workgroup> exceeded: atomic<u32>;

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

    var q: Rows;
    x_own(&q, queries, pitch, tile * TILE, lane);
    var o: Results;
    results_zero(&o);
    // exp(scale · x) = exp2(factor · x)
    let factor = p.scale * LOG2E;
    var reference = LOWEST;
    var total = 0.0;

    var k: x_Raws;
    var v: x_Raws;
    x_fetch(&k, keys, pitch, 0u, lane);
    x_fetch(&v, values, pitch, 0u, lane);
    let steps = min((tile + 1u) * (TILE / STEP), (p.seq + STEP - 1u) / STEP);
    for (var t = 0u; t < steps; t++) {
        workgroupBarrier();
        x_put(&k, FIRST, lane);
        x_put(&v, SECOND, lane);
        if (lane == 0u) { atomicStore(&exceeded, 0u); }
        workgroupBarrier();
        x_fetch(&k, keys, pitch, (t + 1u) * STEP, lane);
        x_fetch(&v, values, pitch, (t + 1u) * STEP, lane);
        scores(&q, FIRST, SCORES);
        rows_barrier();

        var s: Own;
        own_get(&s, SCORES);
        if (t * STEP + STEP > tile * TILE) {
            let query = vec4<u32>(tile * TILE + own_row);
            for (var u = 0u; u < S_UNITS; u++) { // unroll
                let key = t * STEP + own_column(u) + vec4<u32>(0u, 1u, 2u, 3u);
                s[2u * u] = select(vec4<f32>(LOWEST), s[2u * u], key <= query);
                s[2u * u + 1u] = select(vec4<f32>(LOWEST), s[2u * u + 1u], key + vec4<u32>(4u) <= query);
            }
        }
        var highs = s[0u];
        for (var u = 0u; u < 2u * S_UNITS; u++) { // unroll
            highs = max(highs, s[u]);
        }
        let high = max(max(highs.x, highs.y), max(highs.z, highs.w));
        if ((high - reference) * p.scale > ROOM) { atomicStore(&exceeded, 1u); }
        workgroupBarrier();
        if (atomicLoad(&exceeded) != 0u) {
            tell(high);
            rows_barrier();
            var now = high;
            for (var i = 0u; i < SHARERS; i++) { now = max(now, told(i)); }
            // A row's bits depend on no other row.
            if ((now - reference) * p.scale <= ROOM) { now = reference; }
            let keep = exp2((reference - now) * factor);
            reference = now;
            total *= keep;
            if (t > 0u) { results_scale(&o, keep); }
        }
        // However it is rounded, it is the same for the row's weights, and cancels.
        let base = vec4<f32>(-reference * factor);
        var sum = vec4<f32>();
        for (var u = 0u; u < 2u * S_UNITS; u++) { // unroll
            s[u] = exp2(fma(s[u], vec4<f32>(factor), base));
            sum += s[u];
        }
        total += (sum.x + sum.y) + (sum.z + sum.w);
        own_put(&s, SCORES);
        rows_barrier();
        accumulate(&o, SCORES, SECOND);
    }

    tell(total);
    rows_barrier();
    var sum = 0.0;
    for (var i = 0u; i < SHARERS; i++) { sum += told(i); }
    let row = tile * TILE + own_row;
    if (own_part == 0u && row < p.seq) {
        lse[(place.row + row) * p.heads + place.head] = reference * p.scale + log(sum);
    }
    store(&o, 1.0 / sum, place.row * width + place.head * units, width, tile * TILE);
}
