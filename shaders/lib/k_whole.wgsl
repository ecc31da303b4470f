// The whole of k is summed.

fn k_end() -> u32 { return p.k; }
fn tile_k(tile: Tile, lane: u32) -> vec2<u32> { return vec2<u32>(0u, p.k); }
