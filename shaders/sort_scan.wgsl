// sort_scan: counts become the places where each chunk's entries of each digit begin.
// Layout:   counts[chunks, 256], then the number of entries
// Numerics: exact
// Dispatch: one workgroup, an invocation a digit
// Twin:     src/kernels/sort.rs

struct Params {
    chunks: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> counts: array<u32>;

var<workgroup> wg_ends: array<u32, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    // A dispatch is of at least one workgroup, and may be of more.
    if (wg.x + wg.y > 0u) { return; }
    var total = 0u;
    for (var chunk = 0u; chunk < p.chunks; chunk++) { total += counts[chunk * 256u + lane]; }
    wg_ends[lane] = total;
    for (var step = 1u; step < WG; step *= 2u) {
        workgroupBarrier();
        var lower = 0u;
        if (lane >= step) { lower = wg_ends[lane - step]; }
        workgroupBarrier();
        wg_ends[lane] += lower;
    }
    var at = wg_ends[lane] - total;
    for (var chunk = 0u; chunk < p.chunks; chunk++) {
        let n = counts[chunk * 256u + lane];
        counts[chunk * 256u + lane] = at;
        at += n;
    }
    if (lane == WG - 1u) { counts[p.chunks * 256u] = at; }
}
