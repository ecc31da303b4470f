// native_scales: the scales of an MX operand as a native route takes them.
// Layout:   out: bytes of [rows][groups], both padded, in the order LAYOUT; a word an invocation. Word 0 of `flags` is set
//           where the format does not hold the scale of a block that is not zero
// Numerics: exact: E8M0 relative to the line's anchor, which is 127; or UE4M3 of 2^(8 + scale - anchor), or NVFP4's own bytes
// Dispatch: ceil(words / WG) workgroups, spread over x and y
// Twin:     src/kernels/native_pack.rs

struct Params {
    lines: u32,
    k: u32,
    a_pitch: u32,       // words of a line
    a_blocks: u32,      // blocks of a line
    a_anchors: u32,     // words of the state before the anchors
    groups: u32,        // of a line, with the padding
    words: u32,
    pad: u32,
}

struct Place { i: u32, group: u32 }

// Where byte b of a word belongs.
fn place(word: u32, b: u32) -> Place {
    if (LAYOUT == 1u) {
        // Tiles of 128 lines by 4 groups: line % 32, line / 32, group.
        let tile = word / 128u;
        let across = p.groups / 4u;
        let at = word % 128u;
        return Place(tile / across * 128u + at / 4u + at % 4u * 32u, tile % across * 4u + b);
    }
    if (LAYOUT == 2u) {
        // Tiles of 32 lines by 8 groups: group % 4, line % 16, group / 4, line / 16.
        let tile = word / 64u;
        let across = p.groups / 8u;
        let at = word % 64u;
        return Place(tile / across * 32u + at % 16u + b % 2u * 16u, tile % across * 8u + at / 16u + b / 2u * 4u);
    }
    let at = word * 4u + b;
    return Place(at / p.groups, at % p.groups);
}

fn is_zero(i: u32, k: u32) -> bool {
    let signless = 0x7fu >> (8u - A_BITS);
    for (var at = k; at < min(k + GROUP, p.k); at += 8u) {
        let raw = a_raw8(i, at);
        for (var j = 0u; j < 8u; j++) {
            if ((a_pick(raw, j) & signless) != 0u) { return false; }
        }
    }
    return true;
}

fn byte_at(i: u32, k: u32) -> u32 {
    if (i >= p.lines || k >= p.k) { return 0u; }
    let scale = a_scale(i, k);
    let anchor = a_anchor(i);
    if (anchor == 255u) { return 0u; }
    if (A_SCALE_E4M3) { return scale & 0x7fu; }
    let d = i32(scale) - i32(anchor);
    if (!UE4M3 && d >= -127) { return u32(d + 127); }
    // 2^(8 + d), normal from 2^-6 on.
    if (UE4M3 && d >= -14) { return u32(d + 15) << 3u; }
    if (UE4M3 && d >= -17) { return 1u << u32(d + 17); }
    if (!is_zero(i, k)) { atomicStore(&flags[0], 1u); }
    return 0u;
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let at = (wg.y * wgs.x + wg.x) * WG + lane;
    if (at >= p.words) { return; }
    var word = 0u;
    for (var b = 0u; b < 4u; b++) {
        let spot = place(at, b);
        word |= byte_at(spot.i, spot.group * GROUP) << (8u * b);
    }
    out[at] = word;
}
