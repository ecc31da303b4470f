// Integer addition as a · 1 + b, with a 1 that the compiler cannot know. NVIDIA's integer pipe, which also shifts and
// xors, limits stochastic rounding, while multiply-adds run on another one that idles. Same result as lib/add.wgsl.
fn add(a: u32, b: u32) -> u32 { return a * p.one + b; }
fn add4(a: vec4<u32>, b: vec4<u32>) -> vec4<u32> { return a * p.one + b; }
