// sort_starts: where each id begins in the order, by bisection.
// Layout:   ids[len] · order[len] · counts[… chunks · 256: how many are in the order] · starts[bound + 1]
// Numerics: exact
// Dispatch: ceil((bound + 1) / WG) workgroups, spread over x and y
// Twin:     src/kernels/sort.rs

struct Params {
    bound: u32,
    chunks: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> ids: array<u32>;
@group(0) @binding(2) var<storage, read> order: array<u32>;
@group(0) @binding(3) var<storage, read> counts: array<u32>;
@group(0) @binding(4) var<storage, read_write> starts: array<u32>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let id = (wg.y * wgs.x + wg.x) * WG + lane;
    if (id > p.bound) { return; }
    var low = 0u;
    var high = counts[p.chunks * 256u];
    while (low < high) {
        let middle = (low + high) / 2u;
        if (ids[order[middle]] < id) { low = middle + 1u; } else { high = middle; }
    }
    starts[id] = low;
}
