// anchors: the largest scale byte of every row of an MX tensor's scales; for square blocks of every column too. For scales
// that a product wrote: quantizers make anchors themselves.
// Layout:   scales[rows, blocks bytes] · state: see lib/anchors.wgsl; the first of these rows' or columns' is p.first
// Numerics: E8M0: the largest byte, 255 if one is NaN. E4M3: 127, or 255.
// Dispatch: rows: ceil(rows / 8) workgroups; columns: ceil(blocks / WG); columns are put together by atomics
// Twin:     src/kernels/anchors.rs

struct Params { rows: u32, blocks: u32, first: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> scales: array<u32>;
@group(0) @binding(2) var<storage, read_write> state: array<atomic<u32>>;

const LANES = 32u;

var<workgroup> largest: array<atomic<u32>, WG / LANES>;

fn anchor_at(row: u32, col: u32) -> u32 {
    let at = row * p.blocks + col;
    return anchor_of((scales[at / 4u] >> (8u * (at % 4u))) & 0xffu);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let group = wg.y * wgs.x + wg.x;
    var anchor = 0u;
    if (COLUMNS) {
        let col = group * WG + lane;
        if (col < p.blocks) {
            for (var row = 0u; row < p.rows; row++) { anchor = max(anchor, anchor_at(row, col)); }
            anchor_raise(p.first + col, anchor);
        }
        return;
    }
    let slot = lane / LANES;
    let row = group * (WG / LANES) + slot;
    if (lane < WG / LANES) { atomicStore(&largest[lane], 0u); }
    workgroupBarrier();
    if (row < p.rows) {
        for (var col = lane % LANES; col < p.blocks; col += LANES) { anchor = max(anchor, anchor_at(row, col)); }
    }
    atomicMax(&largest[slot], anchor);
    workgroupBarrier();
    if (row < p.rows && lane % LANES == 0u) { anchor_raise(p.first + row, atomicLoad(&largest[slot])); }
}
