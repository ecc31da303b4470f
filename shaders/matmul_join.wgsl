// matmul_join: y from the sums of a product whose k was cut into slices (lib/sliced_k.wgsl): added in ascending order, then
// what any product does with its sum. Also from the sums of a native route: one slice.
// Layout:   sums: slices · m rows of p.sums quads
// Numerics: bounded, each addition rounded to nearest; the rest as lib/finish.wgsl
// Dispatch: tiles_m · tiles_n workgroups, spread over x and y; an invocation has a quad of y
// Twin:     none: the CPU engine does not cut k

const STRIP_ROWS = BM;

var<private> own_tile: vec2<u32>;

fn strip_get4(i: u32) -> vec4<f32> {
    var at = (own_tile.x + i / BN) * p.sums + (own_tile.y + i % BN) / 4u;
    var sum = sums[at];
    for (var k = p.slice; k < p.k; k += p.slice) {
        at += p.m * p.sums;
        sum += sums[at];
    }
    return sum;
}

fn strip_get(i: u32) -> f32 { return strip_get4(i & ~3u)[i % 4u]; }

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let tile = tile_place(wg.y * wgs.x + wg.x, lane);
    if (!tile.there) { return; }
    own_tile = vec2<u32>(tile.row, tile.col);
    strip_store(tile, 0u, lane);
}
