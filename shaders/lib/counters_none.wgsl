// Nothing is counted. Same interface as lib/counters.wgsl.

const COUNT = false;

fn counters_clear(lane: u32) {}
fn counters_add(side: u32, n: vec4<u32>) {}
fn counters_flush(lane: u32) {}
