// cross_entropy: logits, targets → loss = log Σ exp(logit) − logit of the target, dlogits = (softmax − onehot) · scale.
// Layout:   logits, dlogits[rows, quads of 4 columns] · targets[rows] · loss[rows]
// Numerics: f32, with WGSL's exp, log and division; each lane keeps the largest logit it has met and the sum of exponentials
//           relative to it, lanes are put together pairwise. Zero for an ignored row, NaN for a target that is no column.
// Dispatch: ceil(rows / (WG / LANES)) workgroups, spread over x and y; LANES invocations a row
// Twin:     src/kernels/cross_entropy.rs

struct Params {
    rows: u32,
    quads: u32,
    scale: f32,     // of the gradient
    nan: u32,       // its bits: WGSL has no constant NaN
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<logits_Quad>;
@group(0) @binding(2) var<storage, read> targets: array<u32>;
@group(0) @binding(3) var<storage, read_write> loss: array<f32>;

const IGNORED = 0xffffffffu;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let row = (wg.y * wgs.x + wg.x) * (WG / LANES) + lane / LANES;
    let first = lane % LANES;
    let start = row * p.quads;
    let wanted = targets[min(row, p.rows - 1u)];
    // Quads of this row that are read: none of an ignored one.
    let quads = select(p.quads, 0u, wanted == IGNORED || row >= p.rows);

    var largest = -3.4028234e38;
    var sum = 0.0;
    for (var q = first; q < quads; q += LANES) {
        let x = logits_get(logits[start + q]);
        let larger = max(largest, max(max(x.x, x.y), max(x.z, x.w)));
        sum = sum * exp(largest - larger) + dot(exp(x - larger), vec4<f32>(1.0));
        largest = larger;
    }
    let top = row_max(largest, lane);
    let total = row_sum(sum * exp(largest - top), lane);

    if (row >= p.rows) { return; }
    let no_column = wanted != IGNORED && wanted / 4u >= p.quads;
    if (first == 0u) {
        var result = 0.0;
        if (no_column) {
            result = bitcast<f32>(p.nan);
        } else if (wanted != IGNORED) {
            result = log(total) - (logits_get(logits[start + wanted / 4u])[wanted % 4u] - top);
        }
        loss[row] = result;
    }
    if (GRADIENT) {
        let inverse = 1.0 / total;
        for (var q = first; q < p.quads; q += LANES) {
            var d = vec4<f32>();
            if (no_column) {
                d = bitcast<vec4<f32>>(vec4<u32>(p.nan));
            } else if (wanted != IGNORED) {
                let hit = vec4<u32>(4u * q) + vec4<u32>(0u, 1u, 2u, 3u) == vec4<u32>(wanted);
                let x = logits_get(logits[start + q]);
                d = (exp(x - top) * inverse - select(vec4<f32>(), vec4<f32>(1.0), hit)) * p.scale;
            }
            gradient_put(start + q, d);
        }
    }
}
