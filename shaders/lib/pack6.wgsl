// Sixteen 6-bit codes as a little-endian bit stream: the words of a unit. Twin: pack in src/formats/block.rs.
alias Codes = vec3<u32>;
alias CodesWord = u32;

fn pack16(a: array<u32, 8>, b: array<u32, 8>) -> Codes {
    return vec3<u32>(a[0] | (a[1] << 6u) | (a[2] << 12u) | (a[3] << 18u) | (a[4] << 24u) | (a[5] << 30u),
                     (a[5] >> 2u) | (a[6] << 4u) | (a[7] << 10u) | (b[0] << 16u) | (b[1] << 22u) | (b[2] << 28u),
                     (b[2] >> 4u) | (b[3] << 2u) | (b[4] << 8u) | (b[5] << 14u) | (b[6] << 20u) | (b[7] << 26u));
}

fn codes_store(unit: u32, c: Codes) {
    codes[unit * 3u] = c.x;
    codes[unit * 3u + 1u] = c.y;
    codes[unit * 3u + 2u] = c.z;
}

fn codes_get(c: Codes, i: u32) -> u32 {
    let at = 6u * i % 32u;
    var bits = c[6u * i / 32u] >> at;
    if (at > 26u) { bits |= c[min(6u * i / 32u + 1u, 2u)] << (32u - at); }
    return bits & 0x3fu;
}
