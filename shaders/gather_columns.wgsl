// gather_columns: columns of x, in a given order, to y.
// Layout:   x[rows, cols] · columns[n] · y[rows, n]; words, of two elements where they have 16 bits
// Numerics: exact
// Dispatch: ceil(words of y / WG) workgroups, spread over x and y
// Twin:     src/kernels/outliers.rs

struct Params { cols: u32, n: u32, words: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<u32>;
@group(0) @binding(2) var<storage, read> columns: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<u32>;

fn half_at(at: u32) -> u32 { return (x[at / 2u] >> (16u * (at & 1u))) & 0xffffu; }

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let word = (wg.y * wgs.x + wg.x) * WG + lane;
    if (word >= p.words) { return; }
    let at = word * PER_WORD;
    let row = at / p.n * p.cols;
    let i = at % p.n;
    if (PER_WORD == 1u) {
        y[word] = x[row + columns[i]];
    } else {
        y[word] = half_at(row + columns[i]) | (half_at(row + columns[i + 1u]) << 16u);
    }
}
