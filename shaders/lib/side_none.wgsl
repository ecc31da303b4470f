// A side that is not there: see lib/side.wgsl.

fn prepare(row0: u32, col0: u32, lane: u32) {}
fn run(matrix: u32, row0: u32, col0: u32, lane: u32) {}
