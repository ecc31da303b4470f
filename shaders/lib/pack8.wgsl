// Sixteen 8-bit codes: the words of a unit. Twin: pack in src/formats/block.rs.
alias Codes = vec4<u32>;
alias CodesWord = vec4<u32>;

fn pack4(a: u32, b: u32, c: u32, d: u32) -> u32 { return a | (b << 8u) | (c << 16u) | (d << 24u); }

fn pack16(a: array<u32, 8>, b: array<u32, 8>) -> Codes {
    return vec4<u32>(pack4(a[0], a[1], a[2], a[3]), pack4(a[4], a[5], a[6], a[7]),
                     pack4(b[0], b[1], b[2], b[3]), pack4(b[4], b[5], b[6], b[7]));
}

fn codes_store(unit: u32, c: Codes) { codes[unit] = c; }

fn codes_get(c: Codes, i: u32) -> u32 { return (c[i / 4u] >> (8u * (i % 4u))) & 0xffu; }
