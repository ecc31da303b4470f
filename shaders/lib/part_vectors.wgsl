// 32 codes of lines of whole 128, of E2M1: 16 bytes.

alias Codes = vec4<u32>;

fn part_codes(i: u32, k: u32) -> vec4<u32> { return a_codes[i * (p.a_pitch / 4u) + k / 32u]; }
