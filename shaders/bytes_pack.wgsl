// bytes_pack: E2M1 codes under E8M0 scales as bytes relative to their lines' anchors, a row an output, for products by cooperative
// matrices of bytes; and which lines have a block outside the window: further than BYTES_WINDOW below the anchor, and not zero.
// For square blocks these are rows of blocks, or, contracted over the lines, columns of them.
// Layout:   codes, scales · state: anchors from p.a_anchors on · windows: a word an anchor from p.first on, p.stamp if outside ·
//           packed[outputs, parts of 16 positions], whole 128 positions, zero beyond k
// Numerics: exact inside the window, zero outside: lib/nibbles_{e4m3,i8}.wgsl. A line with a NaN has no window: its outputs are
//           NaN either way
// Dispatch: ceil(ceil(outputs / LINES) · parts / WG) workgroups; an invocation has LINES outputs, one division for all of them
// Twin:     none: the CPU engine has no tensor tier

struct Params { outputs: u32, parts: u32, k: u32, first: u32, stamp: u32, a_pitch: u32, a_blocks: u32, a_anchors: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a_codes: array<Codes>;
@group(0) @binding(2) var<storage, read> a_scales: array<u32>;
@group(0) @binding(3) var<storage, read> a_state: array<u32>;
@group(0) @binding(4) var<storage, read_write> windows: array<atomic<u32>>;
@group(0) @binding(5) var<storage, read_write> packed: array<vec4<u32>>;

const GROUPED_K = false;

fn k_end() -> u32 { return p.k; }

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let at = (wg.y * wgs.x + wg.x) * WG + lane;
    let group = at / p.parts;
    let part = at - group * p.parts;
    let k = part * 16u;
    for (var n = 0u; n < LINES; n++) { // unroll
        let i = group * LINES + n;
        if (i >= p.outputs) { return; }
        let codes = part_codes(i, k);
        let anchor = a_anchor(i);
        let scale = a_scale(i, k);
        packed[i * p.parts + part] = a_bytes(codes, a_block_factor(scale, anchor));
        if (anchor > scale + BYTES_WINDOW && anchor != 255u && ((codes.x | codes.y) & 0x77777777u) != 0u) {
            atomicStore(&windows[p.first + a_anchor_at(i)], p.stamp);
        }
    }
}
