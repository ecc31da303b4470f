// Integer addition. Same result as lib/add_mad.wgsl.
fn add(a: u32, b: u32) -> u32 { return a + b; }
fn add4(a: vec4<u32>, b: vec4<u32>) -> vec4<u32> { return a + b; }
