fn tile_taken(tile: Tile, lane: u32) -> bool { return true; }
