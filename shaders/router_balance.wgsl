// router_balance: each expert's bias goes down by `rate` where its load is above the mean, and up where it is below.
// Layout:   counts[experts], bias[experts]
// Numerics: exact
// Dispatch: one workgroup
// Twin:     src/kernels/router.rs

struct Params {
    experts: u32,
    all: u32,       // Σ counts
    rate: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> counts: array<u32>;
@group(0) @binding(2) var<storage, read_write> bias: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(local_invocation_index) lane: u32) {
    if (lane >= p.experts) { return; }
    let load = counts[lane] * p.experts;
    if (load > p.all) { bias[lane] -= p.rate; }
    if (load < p.all) { bias[lane] += p.rate; }
}
