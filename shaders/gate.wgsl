// gate: the arguments of a dispatch that happens only under a condition known on the device.
// Layout:   flags: [0] the condition, [1] how often what was counted ran · out: workgroups along x, y, z
// Numerics: exact
// Dispatch: 1 workgroup
// Twin:     none: the CPU engine has no native routes

struct Params { wanted: u32, x: u32, y: u32, count: u32 }

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> flags: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<u32>;

@compute @workgroup_size(1)
fn main() {
    let run = u32((flags[0] != 0u) == (p.wanted != 0u));
    out[0] = p.x * run;
    out[1] = p.y * run;
    out[2] = run;
    flags[1] += p.count * run;
}
