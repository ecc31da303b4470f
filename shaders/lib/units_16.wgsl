// The tensor tier's workgroup memory: first the operands' tile, in units of 16 bytes, then a strip of sums.
// naga takes a matrix's component type from the pointer: Word is f32 for cooperative matrices (src/engine/spirv.rs makes A and
// B what they are), and u32 without.

var<workgroup> memory: array<vec4<Word>, SLICES * max(TILE_UNITS, STRIP_VECTORS)>;

fn tile_put(unit: u32, h: vec4<u32>) { memory[own_slice * TILE_UNITS + unit] = bitcast<vec4<Word>>(h); }
fn strip_get4(i: u32) -> vec4<f32> { return bitcast<vec4<f32>>(memory[i / 4u]); }
