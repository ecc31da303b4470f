// attention_forward: causal self-attention of a tile of queries: a workgroup goes through the tiles of keys up to the
// diagonal, with the softmax kept up to date, so that scores live in registers only.
// Layout:   x = qkv, rows of 3 · heads · head_dim: all heads' q, then k, then v. y = out, rows of heads · head_dim.
//           lse[row · heads + head] = log Σ exp of the scaled scores.
// Numerics: bounded. f32; scores in ascending position; the maximum is of unscaled scores, so that the largest weight is
//           exp(0). Keys after the query count as scores of LOWEST, whose weight is zero.
// Dispatch: tiles · heads · batch workgroups, spread over x and y; a head's longest tiles first
// Twin:     src/kernels/attention/cpu.rs

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x_data: array<x_Quad>;
@group(0) @binding(2) var<storage, read_write> y_data: array<y_Quad>;
@group(0) @binding(3) var<storage, read_write> lse: array<f32>;

// Finite, and so is its difference from any score that counts.
const LOWEST = -1e38;

// What the ACROSS invocations of a row tell each other.
var<workgroup> shared_rows: array<vec4<f32>, TILE * ACROSS / 4u>;

fn tell(row: u32, tx: u32, v: f32) { shared_rows[row * (ACROSS / 4u) + tx / 4u][tx % 4u] = v; }

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

    var a: x_Raws;
    var b: x_Raws;
    var s: s_Sums;
    var o: o_Sums;
    o_zero(&o);
    var high: array<f32, TM>;
    var total: array<f32, TM>;
    for (var i = 0u; i < TM; i++) { // unroll
        high[i] = LOWEST;
        total[i] = 0.0;
    }

    for (var t = 0u; t <= tile; t++) {
        s_zero(&s);
        x_fetch_lines(&a, queries, pitch, tile * TILE, 0u, lane);
        x_fetch_lines(&b, keys, pitch, t * TILE, 0u, lane);
        for (var quad = 0u; quad < p.quads; quad += DEPTH / 4u) {
            workgroupBarrier();
            x_put_a(&a, lane);
            x_put_b(&b, lane);
            workgroupBarrier();
            x_fetch_lines(&a, queries, pitch, tile * TILE, quad + DEPTH / 4u, lane);
            x_fetch_lines(&b, keys, pitch, t * TILE, quad + DEPTH / 4u, lane);
            s_multiply(&s, ty, tx);
        }
        x_fetch_slab(&b, values, pitch, t * TILE, lane);

        if (t == tile) {
            for (var i = 0u; i < TM; i++) { // unroll
                for (var j = 0u; j < S_COLS / 4u; j++) { // unroll
                    s[i * (S_COLS / 4u) + j] = select(vec4<f32>(LOWEST), s[i * (S_COLS / 4u) + j],
                                                      cols_of(j, tx) <= vec4<u32>(row_of(i, ty)));
                }
            }
        }
        for (var i = 0u; i < TM; i++) { // unroll
            var v = s[i * (S_COLS / 4u)];
            for (var j = 0u; j < S_COLS / 4u; j++) { // unroll
                v = max(v, s[i * (S_COLS / 4u) + j]);
            }
            tell(row_of(i, ty), tx, max(max(v.x, v.y), max(v.z, v.w)));
        }
        workgroupBarrier();
        for (var i = 0u; i < TM; i++) { // unroll
            var v = vec4<f32>(high[i]);
            for (var j = 0u; j < ACROSS / 4u; j++) { // unroll
                v = max(v, shared_rows[row_of(i, ty) * (ACROSS / 4u) + j]);
            }
            let now = max(max(v.x, v.y), max(v.z, v.w));
            let keep = exp((high[i] - now) * p.scale);
            high[i] = now;
            var sum = vec4<f32>();
            for (var j = 0u; j < S_COLS / 4u; j++) { // unroll
                let weights = exp((s[i * (S_COLS / 4u) + j] - vec4<f32>(now)) * p.scale);
                s[i * (S_COLS / 4u) + j] = weights;
                sum += weights;
            }
            total[i] = total[i] * keep + ((sum.x + sum.y) + (sum.z + sum.w));
            for (var j = 0u; j < O_COLS / 4u; j++) { // unroll
                o[i * (O_COLS / 4u) + j] *= keep;
            }
        }
        for (var n = 0u; n < TILE / DEPTH; n++) {
            workgroupBarrier();
            put_columns(&s, n, ty, tx);
            x_put_slab(&b, lane);
            workgroupBarrier();
            x_fetch_slab(&b, values, pitch, t * TILE + (n + 1u) * DEPTH, lane);
            o_multiply(&o, ty, tx);
        }
    }

    for (var i = 0u; i < TM; i++) { // unroll
        tell(row_of(i, ty), tx, total[i]);
    }
    workgroupBarrier();
    for (var i = 0u; i < TM; i++) { // unroll
        var v = vec4<f32>();
        for (var j = 0u; j < ACROSS / 4u; j++) { // unroll
            v += shared_rows[row_of(i, ty) * (ACROSS / 4u) + j];
        }
        let sum = (v.x + v.y) + (v.z + v.w);
        for (var j = 0u; j < O_COLS / 4u; j++) { // unroll
            o[i * (O_COLS / 4u) + j] /= sum;
        }
        let row = tile * TILE + row_of(i, ty);
        if (tx == 0u && row < p.seq) {
            lse[(place.row + row) * p.heads + place.head] = high[i] * p.scale + log(sum);
        }
    }
    store(&o, place.row * width + place.head * p.quads, width, tile * TILE, ty, tx);
}
