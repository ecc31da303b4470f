// A row of the outer matrix of lib/side.wgsl by workgroup memory: an invocation makes it from the group's untouched units, so
// that nothing is exchanged. Same result as lib/outer_subgroup.wgsl.

fn outer_quad(line: u32, unit: u32, i: u32) -> Summands {
    let group = unit / PARTS * PARTS;
    var t = array<vec4<f32>, 8>();
    var magnitude = vec4<u32>();
    for (var j = 0u; j < PARTS; j++) { // unroll
        let part = summands(line, group + j, j, i);
        t[j] = part.v;
        magnitude = max(magnitude, part.magnitude);
    }
    // The sign of each stride's second operand.
    if (PARTS > 4u) {
        let f = select(1.0, -1.0, (unit & 4u) != 0u);
        t[0] += t[4] * f;
        t[1] += t[5] * f;
        t[2] += t[6] * f;
        t[3] += t[7] * f;
    }
    if (PARTS > 2u) {
        let f = select(1.0, -1.0, (unit & 2u) != 0u);
        t[0] += t[2] * f;
        t[1] += t[3] * f;
    }
    if (PARTS > 1u) { t[0] += t[1] * select(1.0, -1.0, (unit & 1u) != 0u); }
    return Summands(t[0], magnitude);
}

// The largest of a group.
fn outer_largest(seen: u32) -> u32 { return seen; }
