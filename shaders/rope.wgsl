// rope: rotates the q and k thirds of qkv in place, position pairs (i, i + half) of a head by angle pos · base^(-i / half).
// Layout:   x = qkv, rows of 3 · heads · head_dim; table[pos]: half cosines, then half sines; in quads
// Numerics: bounded: two products and a sum, f32; the table is the host's.
// Dispatch: ceil(rows · heads · half / WG) workgroups, half in quads, spread over x and y; an invocation rotates four pairs of q
//           and the same of k
// Twin:     src/kernels/rope.rs

struct Params {
    invocations: u32,
    heads: u32,
    half: u32,      // quads of half a head's row
    seq: u32,       // a row's position is row % seq
    sign: f32,      // of the angle
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> table: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> x_data: array<x_Quad>;

fn rotate(at: u32, cosine: vec4<f32>, sine: vec4<f32>) {
    let a = x_get(x_data[at]);
    let b = x_get(x_data[at + p.half]);
    x_data[at] = x_set(a * cosine - b * sine);
    x_data[at + p.half] = x_set(b * cosine + a * sine);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let id = (wg.y * wgs.x + wg.x) * WG + lane;
    if (id >= p.invocations) { return; }
    let i = id % p.half;
    let line = id / p.half;
    let row = line / p.heads;
    let cosine = table[row % p.seq * 2u * p.half + i];
    let sine = table[(row % p.seq * 2u + 1u) * p.half + i] * p.sign;
    let q = (row * 3u * p.heads + line % p.heads) * 2u * p.half + i;
    rotate(q, cosine, sine);
    rotate(q + p.heads * 2u * p.half, cosine, sine);
}
