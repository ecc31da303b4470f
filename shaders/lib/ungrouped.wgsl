fn tile_grouped(place: Tile, tm: u32, lane: u32) -> Tile { return place; }
fn tile_uniformly_there(tile: Tile, lane: u32) -> bool { return tile.there; }
