// 16 codes of lines of whole 128, of E2M1: 8 bytes, so that neighbours read and write whole lines of memory.

alias Codes = vec2<u32>;

fn part_codes(i: u32, k: u32) -> vec2<u32> { return a_codes[i * (p.a_pitch / 2u) + k / 16u]; }
