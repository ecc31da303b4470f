// column_sum: x[rows, quads] → y[quads], the sums of the columns, or added to what y held.
// Layout:   f32, in quads of 4 columns
// Numerics: f32; every DOWN-th row in ascending order, then pairwise
// Dispatch: ceil(quads / ACROSS) workgroups, spread over x and y
// Twin:     src/kernels/reduce.rs

struct Params {
    rows: u32,
    quads: u32,
    accumulate: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;

const DOWN = WG / ACROSS;

var<workgroup> wg_sums: array<vec4<f32>, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let q = (wg.y * wgs.x + wg.x) * ACROSS + lane % ACROSS;
    var sum = vec4<f32>();
    if (q < p.quads) {
        for (var row = lane / ACROSS; row < p.rows; row += DOWN) { sum += x[row * p.quads + q]; }
    }
    wg_sums[lane] = sum;
    for (var step = WG / 2u; step >= ACROSS; step /= 2u) {
        workgroupBarrier();
        if (lane < step) { wg_sums[lane] += wg_sums[lane + step]; }
    }
    // An invocation below ACROSS wrote what it reads.
    if (lane < ACROSS && q < p.quads) {
        var total = wg_sums[lane];
        if (p.accumulate != 0u) { total += y[q]; }
        y[q] = total;
    }
}
