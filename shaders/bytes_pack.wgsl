// bytes_pack: E2M1 codes under E8M0 scales as bytes relative to their lines' anchors, a row an output, for products by cooperative
// matrices of bytes; and which lines have a block outside the window: further than BYTES_WINDOW below the anchor, and not zero.
// For square blocks these are rows of blocks, or, contracted over the lines, columns of them.
// Layout:   codes, scales · state: anchors from p.a_anchors on · windows: a word an anchor from p.first on, zero before, 1 if
//           outside · packed[outputs, parts of 32 positions], whole 128 positions, zero beyond k
// Numerics: exact inside the window, zero outside: lib/nibbles_{e4m3,i8}.wgsl. A line with a NaN has no window: its outputs are
//           NaN either way
// Dispatch: ceil(outputs · parts / WG) workgroups
// Twin:     none: the CPU engine has no tensor tier

struct Params { outputs: u32, parts: u32, k: u32, first: u32, a_pitch: u32, a_blocks: u32, a_anchors: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a_codes: array<Codes>;
@group(0) @binding(2) var<storage, read> a_scales: array<u32>;
@group(0) @binding(3) var<storage, read> a_state: array<u32>;
@group(0) @binding(4) var<storage, read_write> windows: array<atomic<u32>>;
@group(0) @binding(5) var<storage, read_write> packed: array<vec4<u32>>;

const GROUPED_K = false;

fn k_end() -> u32 { return p.k; }

// What stands for 16 codes; if they lie outside, their line is marked.
fn half_part(i: u32, codes: vec2<u32>, scale: u32, anchor: u32) -> vec4<u32> {
    if (anchor > scale + BYTES_WINDOW && anchor != 255u && ((codes.x | codes.y) & 0x77777777u) != 0u) {
        atomicStore(&windows[p.first + a_anchor_at(i)], 1u);
    }
    return a_bytes(codes, a_block_factor(scale, anchor));
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let at = (wg.y * wgs.x + wg.x) * WG + lane;
    if (at >= p.outputs * p.parts) { return; }
    let i = at / p.parts;
    let k = (at - i * p.parts) * 32u;
    let codes = part_codes(i, k);
    let anchor = a_anchor(i);
    let scale = a_scale(i, k);
    packed[2u * at] = half_part(i, codes.xy, scale, anchor);
    var next = scale;
    if (A_BLOCK < 32u) { next = a_scale(i, k + 16u); }
    packed[2u * at + 1u] = half_part(i, codes.zw, next, anchor);
}
