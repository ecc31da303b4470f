// window: which lines of an E2M1 tensor under E8M0 scales have a block outside the window: further than BYTES_WINDOW below the
// line's anchor, and not zero. For square blocks rows of blocks, or columns of them.
// Layout:   codes[rows · LINES (the last rows' maybe fewer), pitch words] · scales[rows, blocks bytes] · state: anchors from
//           p.anchors on · windows: a word an anchor from p.first on, zero before, 1 if outside
// Numerics: exact. A line with a NaN has no window: its outputs are NaN either way
// Dispatch: ceil(rows · blocks / WG) workgroups
// Twin:     none: the CPU engine has no tensor tier

struct Params { rows: u32, blocks: u32, lines: u32, pitch: u32, anchors: u32, first: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> codes: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read> state: array<u32>;
@group(0) @binding(4) var<storage, read_write> windows: array<atomic<u32>>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let at = (wg.y * wgs.x + wg.x) * WG + lane;
    if (at >= p.rows * p.blocks) { return; }
    let row = at / p.blocks;
    let col = at % p.blocks;
    let scale = (scales[at / 4u] >> (8u * (at % 4u))) & 0xffu;
    let line = select(row, col, COLUMNS);
    let anchor = state[p.anchors + line];
    if (anchor == 255u || anchor <= scale + BYTES_WINDOW) { return; }
    var any = 0u;
    for (var l = row * LINES; l < min(row * LINES + LINES, p.lines); l++) {
        for (var w = 0u; w < WORDS; w++) { any |= codes[l * p.pitch + col * WORDS + w] & 0x77777777u; }
    }
    if (any != 0u) { atomicStore(&windows[p.first + line], 1u); }
}
