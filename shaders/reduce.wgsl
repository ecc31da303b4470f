// reduce: sums of x and counts of its rows that are not ignored, a workgroup PER of them; the last stage may divide.
// Layout:   x[rows] f32 · ids[rows] · sums[groups] f32 · counts[groups]
// Numerics: f32; every WG-th element in ascending order, then pairwise. Counts are exact.
// Dispatch: ceil(rows / PER) workgroups, spread over x and y
// Twin:     src/kernels/reduce.rs

struct Params {
    rows: u32,
    counting: u32,  // what ids are: 0 nothing, every row counts; 1 rows with IGNORED do not count; 2 counts of a stage before
    mean: u32,      // whether to divide by the count
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> ids: array<u32>;
@group(0) @binding(3) var<storage, read_write> sums: array<f32>;
@group(0) @binding(4) var<storage, read_write> counts: array<u32>;

const IGNORED = 0xffffffffu;

var<workgroup> wg_sums: array<f32, WG>;
var<workgroup> wg_counts: array<u32, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let group = wg.y * wgs.x + wg.x;
    let end = min((group + 1u) * PER, p.rows);
    var sum = 0.0;
    var count = 0u;
    for (var row = group * PER + lane; row < end; row += WG) {
        sum += x[row];
        if (p.counting == 0u) { count++; }
        if (p.counting == 1u) { count += u32(ids[row] != IGNORED); }
        if (p.counting == 2u) { count += ids[row]; }
    }
    wg_sums[lane] = sum;
    wg_counts[lane] = count;
    for (var step = WG / 2u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (lane < step) {
            wg_sums[lane] += wg_sums[lane + step];
            wg_counts[lane] += wg_counts[lane + step];
        }
    }
    if (lane == 0u && group * PER < p.rows) {
        var result = wg_sums[0];
        // With nothing to count the sum is zero, and so is the mean.
        if (p.mean != 0u) { result /= f32(max(wg_counts[0], 1u)); }
        sums[group] = result;
        counts[group] = wg_counts[0];
    }
}
