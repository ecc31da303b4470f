// What lib/units_16.wgsl does in plain WGSL: f16 memory for the operands and f32 memory for the sums of the one slice.

var<workgroup> tiles: array<vec4<f16>, 2u * TILE_UNITS>;
var<workgroup> strip: array<f32, STRIP_ROWS * BN>;

fn tile_put(unit: u32, h: vec4<u32>) {
    tiles[2u * unit] = vec4<f16>(half2(h.x), half2(h.y));
    tiles[2u * unit + 1u] = vec4<f16>(half2(h.z), half2(h.w));
}
fn strip_join(lane: u32) { }
fn strip_get(i: u32) -> f32 { return strip[i]; }
fn strip_get4(i: u32) -> vec4<f32> { return vec4<f32>(strip[i], strip[i + 1u], strip[i + 2u], strip[i + 3u]); }
fn strip_put(i: u32, bits: u32) { strip[i] = bitcast<f32>(bits); }
