// embedding_rows: the sum of each token's pieces; zero for a token that does not occur.
// Layout:   starts: see sort.rs · parts: see embedding_pieces.wgsl · dtable[vocabulary, quads of 4 columns] f32
// Numerics: f32 additions of the pieces in ascending order
// Dispatch: ceil(vocabulary · quads / WG) workgroups, spread over x and y
// Twin:     src/kernels/embedding.rs

struct Params {
    vocabulary: u32,
    quads: u32,
    accumulate: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> starts: array<u32>;
@group(0) @binding(2) var<storage, read> parts: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> dtable: array<vec4<f32>>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(num_workgroups) wgs: vec3<u32>,
        @builtin(local_invocation_index) lane: u32) {
    let index = (wg.y * wgs.x + wg.x) * WG + lane;
    let token = index / p.quads;
    let q = index % p.quads;
    if (token >= p.vocabulary) { return; }
    let begin = starts[token];
    let end = starts[token + 1u];
    var sum = vec4<f32>();
    if (end - begin > PIECE) {
        sum = parts[(2u * (begin / PIECE) + 1u) * p.quads + q];
        for (var at = begin + PIECE; at < end; at += PIECE) { sum += parts[2u * (at / PIECE) * p.quads + q]; }
    } else if (end > begin) {
        return;
    }
    if (p.accumulate != 0u) { sum = dtable[index] + sum; }
    dtable[index] = sum;
}
