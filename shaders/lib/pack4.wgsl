// Sixteen 4-bit codes, element 0 lowest: the words of a unit. Twin: pack in src/formats/block.rs.
alias Codes = vec2<u32>;
alias CodesWord = vec2<u32>;

fn pack8(c: array<u32, 8>) -> u32 {
    return c[0] | (c[1] << 4u) | (c[2] << 8u) | (c[3] << 12u) | (c[4] << 16u) | (c[5] << 20u) | (c[6] << 24u) | (c[7] << 28u);
}

fn pack16(a: array<u32, 8>, b: array<u32, 8>) -> Codes { return vec2<u32>(pack8(a), pack8(b)); }

fn codes_store(unit: u32, c: Codes) { codes[unit] = c; }

fn codes_get(c: Codes, i: u32) -> u32 { return (c[i / 8u] >> (4u * (i % 8u))) & 0xfu; }
