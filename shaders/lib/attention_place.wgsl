// Where a workgroup of the attention kernels works.

struct Params {
    seq: u32,
    heads: u32,
    quads: u32,     // of a head's row, at most WIDTH / 4
    tiles: u32,     // of a sequence
    groups: u32,    // workgroups with work: tiles · heads · batch
    scale: f32,     // of the scores
}

struct Place {
    head: u32,
    row: u32,       // the sequence's first, of all rows
    tile: u32,
}

// The tiles of one head are neighbours, as they read the same keys.
fn place_of(group: u32) -> Place {
    let sequence = group / p.tiles;
    return Place(sequence % p.heads, sequence / p.heads * p.seq, group % p.tiles);
}
