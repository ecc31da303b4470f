// 16 codes of any operand of E2M1, word by word, zero beyond k. Needs lib/operand_codes.wgsl.

alias Codes = u32;

fn part_codes(i: u32, k: u32) -> vec2<u32> { return vec2<u32>(a_raw8(i, k).x, a_raw8(i, k + 8u).x); }
