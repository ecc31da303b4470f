// What lib/units_16.wgsl does, with positions of 8 bits: a unit of eight is two words.

var<workgroup> memory: array<vec2<Word>, SLICES * max(TILE_UNITS, STRIP_VECTORS)>;

fn tile_put(unit: u32, h: vec4<u32>) { memory[own_slice * TILE_UNITS + unit] = bitcast<vec2<Word>>(h.xy); }
fn strip_get4(i: u32) -> vec4<f32> { return bitcast<vec4<f32>>(vec4<Word>(memory[i / 2u], memory[i / 2u + 1u])); }
