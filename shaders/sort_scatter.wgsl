// sort_scatter: the entries by their digit, equal ones in the order they had.
// Layout:   see lib/sort_entry.wgsl · after[len]
// Numerics: exact
// Dispatch: a workgroup a chunk, spread over x and y
// Twin:     src/kernels/sort.rs

@group(0) @binding(4) var<storage, read_write> after: array<u32>;

// Where the next entry of a digit goes.
var<workgroup> wg_next: array<u32, 256>;
var<workgroup> wg_digits: array<u32, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let chunk = wg.y * wgs.x + wg.x;
    if (chunk >= p.chunks) { return; }
    wg_next[lane] = counts[chunk * 256u + lane];
    for (var first = 0u; first < CHUNK; first += WG) {
        let mine = entry(chunk * CHUNK + first + lane);
        wg_digits[lane] = mine.digit;
        workgroupBarrier();
        var rank = 0u;
        var equal = 0u;
        for (var other = 0u; other < WG; other++) {
            let same = u32(wg_digits[other] == mine.digit);
            equal += same;
            rank += select(0u, same, other < lane);
        }
        var at = 0u;
        if (mine.digit != NONE) {
            at = wg_next[mine.digit] + rank;
            after[at] = mine.index;
        }
        workgroupBarrier();
        // The last of its digit says where the next round goes on.
        if (mine.digit != NONE && rank + 1u == equal) { wg_next[mine.digit] = at + 1u; }
    }
}
